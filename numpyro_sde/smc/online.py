"""PaRIS while the filter runs: smoothed sums along a path in memory that does not grow with time.

A filter goes from one observation time to the next and keeps what one block needs: the particles
at its start, those inside it, and each particle's estimate of the sum so far. At its end every
estimate is updated by backward draws of an ancestor, with a new bridge where the block has times
inside (`smc.backward`), and the block is forgotten.

Source: Olsson and Westerborn (2017), "Efficient particle-based online smoothing in general hidden
Markov models: the PaRIS algorithm".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_sde.linear.ranks import equal_rank
from numpyro_sde.smc.backward import Piece, Pool, block_between, make_pool, weigh_bridge
from numpyro_sde.smc.loop import (
    Loop,
    Particles,
    Way,
    branch,
    clean,
    log_mean,
    weighted_moments,
)
from numpyro_sde.smc.proposals import observed_rows
from numpyro_sde.smc.settings import Setting
from numpyro_sde.smc.smoothers import check_backward, no_sums, pad_forward, update_sums
from numpyro_sde.statespace.model import StateSpaceModel
from numpyro_sde.statespace.updates import with_valid_inputs


class OnlineSums(NamedTuple):
    """What PaRIS gives while a filter runs.

    Attributes:
        sums: estimates of the expected sum up to the end of each block between observed times,
            given the data up to there, `(blocks, ...)`; the last is given all data.
        log_likelihood: log of the filter's unbiased estimate of the likelihood.
    """

    sums: Float[Array, "blocks ..."]
    log_likelihood: Float[Array, ""]


def additive_online(
    model: StateSpaceModel,
    setting: Setting,
    key: PRNGKeyArray,
    functional: Callable[[Array, Array, Array, Array], Array],
    *,
    num_backward: int = 2,
) -> OnlineSums:
    """Run a particle filter and PaRIS along with it.

    Beyond the data and the estimates, memory holds the particles of one block; with the guided
    proposal also its plan, which looks at all data before it begins: O(N d^2), whatever the number
    of particles.

    Args:
        model: the path and its instruments; its steps must have a density.
        setting: particles, proposal, resampling.
        key: random key.
        functional: `functional(t, dt, x, x_next)`, the term of one grid step, states `(d,)`.
        num_backward: draws of an ancestor for each particle, at least 2.
    """
    check_backward(num_backward)
    model = with_valid_inputs(model)
    M, N = setting.num_particles, model.num_times
    loop = Loop.of(model, setting)
    plan = loop.plan
    rows = observed_rows(model)
    nodes = np.unique(np.concatenate([[0, N - 1], rows]))
    observed = np.isin(nodes, rows)
    longest = int(np.max(np.diff(nodes), initial=1))
    data, inputs = model.observation_inputs(), model.step_inputs()
    start_key, key = jax.random.split(key)
    x, ratio = loop.start(start_key)
    p = Particles(x, None, ratio, jnp.zeros((), x.dtype))
    if observed[0]:
        p = loop.observe(p, _at(data, 0))
    p = loop.enter(p, _at(plan.nodes, 0))
    sums = no_sums(functional, x)
    if N == 1:
        return OnlineSums(sums[:0], p.total + log_mean(p.log_weights))
    places, seen = jnp.asarray(nodes), jnp.asarray(observed)

    def select(p: Particles, k: Any, chance: PRNGKeyArray) -> tuple[Particles, Array]:
        p, chosen = loop.select(p, _at(plan.nodes, k), chance, Way(False, False, None))
        return p, chosen.ancestors

    def go_on(p: Particles, *_: Any) -> tuple[Particles, Array]:
        return p, jnp.arange(M, dtype=jnp.int32)

    def observe(p: Particles, k: Any) -> Particles:
        return loop.observe(p, _at(data, k))

    def through(p: Particles, start: Any, end: Any, key: PRNGKeyArray) -> tuple[Particles, Array]:
        """Move particles to the end of a block; the states on the way, padded, `(n, d, M)`."""

        def step(p: Particles, i: Any) -> tuple[Particles, Array]:
            k = jnp.minimum(start + i, end - 1)
            new = loop.move(p, _at(plan.steps, k), loop.numbers(jax.random.fold_in(key, i)))
            if longest > 1:
                new = jax.tree.map(lambda a, b: jnp.where(start + i < end, a, b), new, p)
            return new, new.x

        p, states = lax.scan(step, p, jnp.arange(longest))
        return p, states[:-1]

    def step(carry: tuple[Particles, Array, Any], _: None) -> tuple[Any, Array]:
        p, sums, i = carry
        start, end = places[i], places[i + 1]
        move_key, select_key, sum_key = jax.random.split(jax.random.fold_in(key, i), 3)
        pool = make_pool(p.x, p.log_weights, loop.look_ahead(p.x, _at(plan.nodes, start)))
        p, ancestors = branch(seen[i], observed[:-1], select, go_on)(p, start, select_key)
        p, states = through(p, start, end, move_key)
        p = branch(seen[i + 1], observed[1:], observe, lambda p, _: p)(p, end)
        reference = _straight_line(model, pool, p, start, end)
        if plan.guide is not None:
            reference = plan.guide.reference.__getitem__
        block = block_between(model, inputs, start, end, longest, reference)

        def piece_of(ancestor: Array, states: Array, end: Array) -> Piece:
            x = pool.x[ancestor]
            states = pad_forward(states, block.real, x)
            return Piece(ancestor, x, states, weigh_bridge(model, block, x, states, end))

        piece = jax.vmap(piece_of, (0, 2, 1))(ancestors, states, p.x)
        sums = update_sums(
            model, block, pool, piece, sums, p.x.T, sum_key, functional, num_backward
        )
        w = jax.nn.softmax(clean(p.log_weights))
        return (p, sums, i + 1), jnp.tensordot(w, sums, 1)

    # Without inputs to scan over: they would be cut from the data, a copy of all of them.
    (p, _, _), means = lax.scan(step, (p, sums, 0), None, len(nodes) - 1)
    return OnlineSums(means, p.total + log_mean(p.log_weights))


def _at(tree: Any, k: Any) -> Any:
    return jax.tree.map(lambda a: jnp.asarray(a)[k], tree)


def _straight_line(
    model: StateSpaceModel, pool: Pool, p: Particles, start: Any, end: Any
) -> Callable[[Any], Array]:
    """Where to linearise bridges: between the means of the particles at a block's two ends.

    Given all these particles the states inside are independent of one another, each with its
    law given its own ends: so bridges may depend on the means and still keep that law.
    """
    first, _ = weighted_moments(pool.x.T, pool.log_weights)
    last, _ = weighted_moments(p.x, p.log_weights)
    times = jnp.asarray(model.times, first.dtype)

    def reference(k: Any) -> Array:
        share = (times[k] - times[start]) / (times[end] - times[start])
        share, start_, end_ = equal_rank(share[..., None], first, last)
        return start_ + share * (end_ - start_)

    return reference
