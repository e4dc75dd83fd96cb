"""Backward sampling: new ancestors, and new states between two observation times.

On a grid finer than the data the transition over one short step is nearly degenerate: given its
end, hardly any particle but the true ancestor could have made it, and backward sampling one grid
step at a time cannot change a path. Here a path is changed block by block, from one observation
time to the next: another particle is chosen at the start of the block, and the states between are
drawn anew as a bridge that ends where the path does. Bridges come from the backward information
of the end point in the linearised model, and the pair of ancestor and bridge is weighed by the
exact transition densities, so the smoothing law is kept whatever the linearisation. Where every
grid time is observed there is nothing between, and this is backward sampling as it was first
described.

Sources: Godsill, Doucet and West (2004); Bunch and Godsill (2013) and Dau and Chopin (2023), "On
backward smoothing algorithms" (MCMC moves); Karppinen, Singh and Vihola (2022), "Conditional
particle filters with bridge backward sampling" (blocks).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from numpyro_sde.linear.information import (
    Spans,
    guided_innovations,
    log_weight,
    match_noise,
    spans,
    step_sd,
    whiten_innovations,
)
from numpyro_sde.linear.small import cholesky, matmul, matvec, solve_lower, transpose
from numpyro_sde.schemes.base import AbstractScheme, GaussianScheme
from numpyro_sde.sde import SDE
from numpyro_sde.smc.loop import clean
from numpyro_sde.smc.normals import normals
from numpyro_sde.smc.proposals import observed_rows, plain_step
from numpyro_sde.smc.resampling import running_sum
from numpyro_sde.statespace.guide import affine_step, linearize_along, linearize_step
from numpyro_sde.statespace.model import StateSpaceModel


class Dynamics(eqx.Module):
    """A path law without its observations, and where those were: what smoothing needs.

    Attributes:
        sde: the equation.
        scheme: its transition.
        times: grid times, `(N,)`.
        dt: step lengths, `(N - 1,)`.
        cache: what the scheme prepared.
        init_mean: mean of the first state.
        init_cov: its covariance.
        reference: path along which bridges are linearised, `(N, d)`.
        scalar: whether states have shape `()`.
        nodes: grid indices of block ends: the observed times, the first and the last.
    """

    sde: SDE
    scheme: AbstractScheme
    times: Any
    dt: Any
    cache: Any
    init_mean: Array
    init_cov: Array
    reference: Array
    scalar: bool = eqx.field(static=True)
    nodes: tuple[int, ...] = eqx.field(static=True)

    @classmethod
    def of(cls, model: StateSpaceModel, reference: Float[Array, "N d"]) -> Dynamics:
        """Take the dynamics from a model."""
        rows = {0, model.num_times - 1, *observed_rows(model).tolist()}
        return cls(
            model.sde,
            model.scheme,
            model.times,
            model.dt,
            model.cache,
            model.init_mean,
            model.init_cov,
            reference,
            model.scalar,
            tuple(sorted(rows)),
        )

    @property
    def model(self) -> StateSpaceModel:
        """The state-space model without instruments."""
        return StateSpaceModel(
            sde=self.sde,
            scheme=self.scheme,
            scheme_chosen=True,
            times=self.times,
            dt=self.dt,
            cache=self.cache,
            init_mean=self.init_mean,
            init_cov=self.init_cov,
            init_gaussian=True,
            scalar=self.scalar,
            instruments=(),
        )

    @property
    def longest(self) -> int:
        """Number of steps in the longest block."""
        return int(np.max(np.diff(self.nodes), initial=1))


def invertible(model: StateSpaceModel) -> str:
    """Why the innovations of a step cannot be read off its ends; empty where they can."""
    state_shape = () if model.scalar else (model.dim,)
    shape = model.scheme.innovation_shape(model.sde, state_shape)
    if not model.scheme.has_density:
        return f"{type(model.scheme).__name__} has no transition density"
    if not model.scheme.smooth:
        return f"the innovations of {type(model.scheme).__name__} cannot be read off its ends"
    if int(np.prod(shape, dtype=int)) > model.dim:
        return f"the innovations of {type(model.scheme).__name__} cannot be read off its ends"
    if int(np.prod(shape, dtype=int)) < model.dim:
        return (
            f"a step of {type(model.scheme).__name__} has {int(np.prod(shape, dtype=int))} "
            f"innovation(s) for {model.dim} states, so it has no density"
        )
    return ""


class Block(NamedTuple):
    """One block, padded to the longest: inputs of its inner steps and its last step.

    Attributes:
        start: grid index of its first time.
        end: of its last.
        rows: grid indices of the times inside, `(n,)`; those of padding repeat the first.
        real: which of these are in the block, `(n,)`.
        inner: time, length and cache of the steps that lead there.
        last: those of the step that leads to the end.
        to_end: what leads from the times inside to the end, in the linearised model.
        sd: standard deviations of the inner steps there, `(n, d)`.
        references: linearisation path at the times inside, `(n, d)`.
        reference_end: and at the end.
    """

    start: Any
    end: Any
    rows: Any
    real: Any
    inner: Any
    last: Any
    to_end: Spans
    sd: Any
    references: Any
    reference_end: Any


def blocks_of(law: Dynamics) -> Block:
    """All blocks, stacked along a leading axis, first to last."""
    nodes = np.asarray(law.nodes)
    starts, ends = nodes[:-1], nodes[1:]
    inside = np.arange(law.longest - 1)
    real = inside[None, :] < (ends - starts - 1)[:, None]
    steps = np.where(real, starts[:, None] + inside[None, :], starts[:, None])
    rows = np.where(real, steps + 1, starts[:, None])
    inputs = law.model.step_inputs()
    if law.longest == 1:  # nothing inside, nothing to linearise
        to_end, sd = _nothing_inside(law.reference)
    else:
        linear = linearize_along(law.model, law.reference)
        is_end = jnp.asarray(np.isin(np.arange(1, len(law.times)), nodes))
        to_end = spans(linear.A, linear.c, linear.B, is_end)
        sd = jax.vmap(step_sd)(linear.B)
    return Block(
        starts,
        ends,
        rows,
        real,
        jax.tree.map(lambda a: a[steps], inputs),
        jax.tree.map(lambda a: a[ends - 1], inputs),
        jax.tree.map(lambda a: a[rows], to_end),
        sd[steps],
        law.reference[rows],
        law.reference[ends],
    )


def _nothing_inside(references: Float[Array, "n d"]) -> tuple[Spans, Float[Array, "n d"]]:
    """What is known of the times inside a block that nobody asks for."""
    n, d = references.shape
    zero = jnp.zeros((n, d), references.dtype)
    return Spans(jnp.zeros((n, d, d), zero.dtype), zero, jnp.zeros((n, d, d), zero.dtype)), zero


def block_between(
    model: StateSpaceModel,
    inputs: Any,
    start: Any,
    end: Any,
    longest: int,
    reference: Callable[[Any], Array],
) -> Block:
    """One block of those of `blocks_of`, from what is known of its own times alone.

    Args:
        model: the path law.
        inputs: its `step_inputs()`.
        start: grid index of the block's first time.
        end: of its last.
        longest: number of steps in the longest block.
        reference: states of linearisation at some grid indices of the block.
    """
    inside = jnp.arange(longest - 1)
    real = inside < end - start - 1
    steps = jnp.where(real, start + inside, start)
    rows = jnp.where(real, steps + 1, start)
    references, reference_end = reference(rows), reference(end)
    to_end, sd = _nothing_inside(references)
    inner = jax.tree.map(lambda a: a[steps], inputs)
    if longest > 1:
        is_last = inside == end - start - 2
        later = jnp.where(is_last[:, None], reference_end, jnp.roll(references, -1, axis=0))
        following = jax.tree.map(lambda a: a[rows], inputs)
        expand: Any = partial(linearize_step, model)
        A, c, B = jax.vmap(expand)(following, references, later)
        to_end = spans(A, c, B, is_last)

        def sd_of(step: Any, x: Array) -> Array:
            t, dt, cache = step
            return step_sd(affine_step(model, t, dt, x, cache)[1])

        sd = jax.vmap(sd_of)(inner, reference(steps))
    return Block(
        start,
        end,
        rows,
        real,
        inner,
        jax.tree.map(lambda a: a[end - 1], inputs),
        to_end,
        sd,
        references,
        reference_end,
    )


def _end_information(to_end: Spans, sd: Array, B: Array, end: Array) -> tuple[Array, Array]:
    """What the end of a bridge, less its reference, says about the end of a step inside."""
    L = cholesky(match_noise(to_end.V, B, sd))
    white = solve_lower(L, jnp.concatenate([to_end.phi, (end - to_end.b)[:, None]], axis=1))
    half = transpose(white[:, :-1])
    return matmul(half, white[:, :-1]), matvec(half, white[:, -1])


def draw_bridge(
    model: StateSpaceModel,
    block: Block,
    start: Float[Array, " d"],
    end: Float[Array, " d"],
    z: Float[Array, "n m"],
) -> tuple[Float[Array, "n d"], Float[Array, ""]]:
    """Draw the states inside a block given its ends.

    Returns:
        The states, and the log of the true density of the block given its start over that of
        the draw.
    """
    deviation = end - block.reference_end

    def step(x: Array, now: Any) -> tuple[Array, Any]:
        (t, dt, cache), to_end, sd, reference, real, z = now
        mean, B = affine_step(model, t, dt, x, cache)
        H, e = _end_information(to_end, sd, B, deviation)
        w, log_det = guided_innovations(H, e, mean - reference, B, z)
        if isinstance(model.scheme, GaussianScheme):
            new = mean + (B * w if B.ndim == 1 else matvec(B, w))
        else:
            new = plain_step(model, (t, dt, cache), x, w)
        new = jnp.where(real, new, x).astype(x.dtype)
        return new, (new, jnp.where(real, log_weight(w, z, log_det), 0.0))

    inputs = (block.inner, block.to_end, block.sd, block.references, block.real, z)
    last, (states, ratios) = lax.scan(step, start, inputs)
    return states, jnp.sum(ratios) + _arrival(model, block, last, end)


def weigh_bridge(
    model: StateSpaceModel,
    block: Block,
    start: Float[Array, " d"],
    states: Float[Array, "n d"],
    end: Float[Array, " d"],
) -> Float[Array, ""]:
    """The log ratio that `draw_bridge` would have returned with these states."""
    deviation = end - block.reference_end
    before = jnp.concatenate([start[None], states])[:-1] if states.shape[0] else states

    def one(now: Any, x: Array, new: Array) -> Array:
        (t, dt, cache), to_end, sd, reference, real = now
        mean, B = affine_step(model, t, dt, x, cache)
        H, e = _end_information(to_end, sd, B, deviation)
        w = model.scheme.invert(model.sde, t, dt, model.to_state(x), model.to_state(new), cache)
        z, log_det = whiten_innovations(H, e, mean - reference, B, jnp.reshape(w, (-1,)))
        return jnp.where(real, log_weight(jnp.reshape(w, (-1,)), z, log_det), 0.0)

    inputs = (block.inner, block.to_end, block.sd, block.references, block.real)
    total = jnp.zeros((), start.dtype)
    last = start
    if states.shape[0]:
        total = jnp.sum(jax.vmap(one)(inputs, before, states))
        last = states[-1]
    return total + _arrival(model, block, last, end)


def _arrival(model: StateSpaceModel, block: Block, last: Array, end: Array) -> Array:
    t, dt, cache = block.last
    return model.scheme.log_density(
        model.sde, t, dt, model.to_state(last), model.to_state(end), cache
    )


class Pool(NamedTuple):
    """Particles at a block's start.

    Attributes:
        x: states, `(M, d)`.
        log_weights: log weights for the law given the data so far, `(M,)`.
        log_choice: log of the weights by which candidates are proposed, `(M,)`.
        sums: running sums of those weights.
    """

    x: Float[Array, "M d"]
    log_weights: Float[Array, " M"]
    log_choice: Float[Array, " M"]
    sums: Float[Array, " M"]


def make_pool(
    particles: Float[Array, "d M"], log_weights: Float[Array, " M"], look_ahead: Any
) -> Pool:
    """Gather the candidates of one block."""
    log_weights = clean(log_weights)
    choice = log_weights if look_ahead is None else clean(log_weights + look_ahead)
    top = jnp.max(choice)
    weights = jnp.exp(choice - jnp.where(jnp.isfinite(top), top, 0.0))
    return Pool(particles.T, log_weights, choice, running_sum(weights))


class Piece(NamedTuple):
    """A path's part in one block: index and state at the start, states inside, log weight."""

    ancestor: Int[Array, ""]
    start: Float[Array, " d"]
    states: Float[Array, "n d"]
    log_weight: Float[Array, ""]


def move_piece(
    model: StateSpaceModel,
    block: Block,
    pool: Pool,
    piece: Piece,
    end: Float[Array, " d"],
    key: PRNGKeyArray,
) -> tuple[Piece, Array]:
    """One Metropolis-Hastings move of ancestor and bridge; the piece, and whether it moved."""
    index_key, bridge_key, accept_key = jax.random.split(key, 3)
    u = jax.random.uniform(index_key, (), pool.sums.dtype) * pool.sums[-1]
    index = jnp.minimum(jnp.searchsorted(pool.sums, u, side="right"), pool.x.shape[0] - 1)
    z = normals(bridge_key, (piece.states.shape[0], model.dim), end.dtype)
    states, ratio = draw_bridge(model, block, pool.x[index], end, z)
    proposed = Piece(index.astype(piece.ancestor.dtype), pool.x[index], states, ratio)
    log_ratio = _score(pool, proposed) - _score(pool, piece)
    # A current path that was impossible takes whatever comes.
    log_ratio = jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio)
    accept = jnp.log(jax.random.uniform(accept_key, (), end.dtype)) < log_ratio
    moved = jax.tree.map(lambda a, b: jnp.where(accept, a, b), proposed, piece)
    return moved, accept & (index != piece.ancestor)


def _score(pool: Pool, piece: Piece) -> Array:
    return piece.log_weight + pool.log_weights[piece.ancestor] - pool.log_choice[piece.ancestor]


def choose_piece(
    model: StateSpaceModel,
    block: Block,
    pool: Pool,
    piece: Piece,
    end: Float[Array, " d"],
    key: PRNGKeyArray,
) -> tuple[Piece, Array]:
    """Choose among all particles, each with a bridge of its own, the present one keeping its.

    With nothing inside the block this is backward sampling without error.
    """
    bridge_key, choice_key = jax.random.split(key)
    M, n = pool.x.shape[0], piece.states.shape[0]
    z = normals(bridge_key, (M, n, model.dim), end.dtype)
    states, ratios = jax.vmap(lambda x, z: draw_bridge(model, block, x, end, z))(pool.x, z)
    states = states.at[piece.ancestor].set(piece.states)
    ratios = ratios.at[piece.ancestor].set(piece.log_weight)
    scores = clean(ratios + pool.log_weights)
    usable = jnp.isfinite(jnp.max(scores))
    index = jax.random.categorical(choice_key, jnp.where(usable, scores, 0.0))
    index = jnp.where(usable, index, piece.ancestor).astype(piece.ancestor.dtype)
    return (
        Piece(index, pool.x[index], states[index], ratios[index]),
        index != piece.ancestor,
    )
