"""Guided particles of a jump-diffusion: whether to jump, too, is drawn given later observations.

A step of `JumpEuler` with normal sizes is a mixture over the number n of jumps, `w_n N(m_n, V_n)`.
What the next data say of its end x' is a mixture too, over whether the particle still jumps before
they come:

    h(x') = (1 - p) h_0(x') + p h_1(x'),   p = 1 - exp(-rate * time left),

h_0 the guide of the diffusion alone, h_1 with a jump's mean and covariance added on the way; one
normal guide of matched moments would give up a particle that waits with its jump. Every pair (n, j)
integrates in closed form: it is drawn in proportion, then the state from its component.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr, logsumexp
from jaxtyping import Array, Float

from numpyro_sde.linear.information import Spans, innovation_precision
from numpyro_sde.linear.small import (
    cholesky,
    diagonal,
    matmul,
    matvec,
    psd_factor,
    solve,
    solve_lower,
    symmetrize,
    transpose,
)
from numpyro_sde.schemes.jump_euler import JumpEuler, JumpMixture, mixture
from numpyro_sde.schemes.matched_jumps import MatchedJumps
from numpyro_sde.smc.proposals import Guided, Plan, no_way, way_to_data
from numpyro_sde.statespace.exact import has_exact, refuse_exact
from numpyro_sde.statespace.guide import Guide, innovation_size, linearize_along
from numpyro_sde.statespace.model import StateSpaceModel
from numpyro_sde.statespace.reference import believed_guide


def jumps_freely(model: StateSpaceModel) -> bool:
    """Whether steps are a mixture over numbers of jumps that is no smooth map of innovations."""
    return isinstance(model.scheme, JumpEuler) and not isinstance(model.scheme, JumpMixture)


def can_be_guided(model: StateSpaceModel) -> bool:
    """Whether the steps of a jump-diffusion have what guided jumps need."""
    if not jumps_freely(model) or innovation_size(model) < model.dim + 2 or has_exact(model):
        return False
    state = model.to_state(model.init_mean)
    t = jnp.zeros((), model.init_mean.dtype)
    try:
        for source in model.sde.jumps:
            jax.eval_shape(lambda x, s=source: s.normal_size(t, x, model.sde.arguments), state)
    except TypeError:  # sizes that are not normal
        return False
    return True


class _Ahead(NamedTuple):
    """What is known at a time of the next observed one.

    Attributes:
        H: precision of all observations from then on, there.
        e: their information vector, about the reference there.
        span: what leads there without jumps, in deviations from the reference.
        reference: state of linearisation at this time.
        t: this time.
        left: time left.
    """

    H: Float[Array, "*N d d"]
    e: Float[Array, "*N d"]
    span: Spans
    reference: Float[Array, "*N d"]
    t: Float[Array, "*N"]
    left: Float[Array, "*N"]


class _Parts(NamedTuple):
    """A mixture of unnormalised normal functions of a deviation, `exp(c + e'a - a'H a / 2)`."""

    H: Float[Array, "2 d d"]
    e: Float[Array, "2 d"]
    c: Float[Array, " 2"]

    def log_at(self, a: Float[Array, " d"]) -> Float[Array, ""]:
        """Log of the mixture."""
        each = [
            c + jnp.sum(a * (e - 0.5 * matvec(H, a)))
            for H, e, c in zip(self.H, self.e, self.c, strict=True)
        ]
        return logsumexp(jnp.stack(each))


class _Pairs(NamedTuple):
    """All pairs of a number n of jumps in a step and a part j of the guide at its end.

    Attributes:
        means: of the next state by n.
        factors: of its covariance by n.
        parts: the guide.
        L: factor of the innovations' precision, by n and j.
        half: their whitened pull, by n and j.
        log_joint: log of weight times integral, by n and j, flat.
        total: log of their sum.
    """

    means: Float[Array, "K d"]
    factors: Float[Array, "K d d"]
    parts: _Parts
    L: Float[Array, "K 2 d d"]
    half: Float[Array, "K 2 d"]
    log_joint: Float[Array, " 2K"]
    total: Float[Array, ""]


class GuidedJumps(Guided):
    """What proposal="guided" is for a jump-diffusion with normal sizes.

    Example:
        >>> GuidedJumps()
        GuidedJumps()
    """

    def plan(self, model: StateSpaceModel) -> Plan:
        refuse_exact(model, "Particle(proposal='guided') of a jump-diffusion")
        if innovation_size(model) < model.dim + 1:
            raise ValueError(
                f"guided jumps need a noise of its own in each of {model.dim} components, got "
                f"{innovation_size(model) - 2} noises: use proposal='bootstrap'"
            )
        scheme = _scheme_of(model)
        guide = believed_guide(model._replace(scheme=MatchedJumps(scheme.base))).guide
        before, after = self._ahead(model._replace(scheme=scheme.base), guide)
        return Plan((model.step_inputs(), after, None), before, guide)

    def _ahead(self, calm: StateSpaceModel, guide: Guide) -> tuple[_Ahead, _Ahead]:
        """What is known at each time, and at the end of each step."""
        times, last = jnp.asarray(calm.times), calm.num_times - 1
        way = way_to_data(calm, linearize_along(calm, guide.reference))
        whole = jax.tree.map(
            lambda a, b: jnp.concatenate([a, b[None]]), way.from_start, no_way(way.from_start)
        )

        def at(rows: np.ndarray, following: np.ndarray, span: Spans) -> _Ahead:
            left = times[following] - times[rows]
            dtype = guide.e.dtype
            own = guide.reference[rows], times[rows].astype(dtype), left.astype(dtype)
            return _Ahead(guide.H[following], guide.e[following], span, *own)

        # A node looks beyond its own data, which are in the weights already.
        nodes = at(np.arange(last + 1), np.append(way.following, last), whole)
        return nodes, at(np.arange(1, last + 1), way.following, way.from_end)

    def look_ahead(
        self, model: StateSpaceModel, node: _Ahead, x: Float[Array, " d"]
    ) -> Float[Array, ""]:
        return _parts(model, node, x).log_at(x - node.reference)

    def move(
        self, model: StateSpaceModel, step: Any, x: Float[Array, " d"], memo: Any, z: Array
    ) -> tuple[Float[Array, " d"], Any, Float[Array, ""]]:
        pairs = self._pairs(model, step, x)
        normals, u = z[: model.dim], z[-1]
        shares = jnp.exp(pairs.log_joint - pairs.total)
        chosen = jnp.sum(jnp.cumsum(shares)[:-1] < jnp.exp(log_ndtr(u)))
        n, j = chosen // 2, chosen % 2
        half = pairs.half[n, j] + normals
        w = solve_lower(pairs.L[n, j], half[:, None], transposed=True)[:, 0]
        new = (pairs.means[n] + matvec(pairs.factors[n], w)).astype(x.dtype)
        return new, memo, self._ratio(pairs, step, new)

    def ratio(self, model: StateSpaceModel, step: Any, x: Array, following: Array) -> Array:
        return self._ratio(self._pairs(model, step, x), step, following)

    def _ratio(self, pairs: _Pairs, step: Any, new: Array) -> Array:
        """Of the model over the proposal: what all pairs integrate to, over the guide at the end.

        So it is known from the ends of a step, whatever number of jumps led there.
        """
        ahead: _Ahead = step[1]
        return pairs.total - pairs.parts.log_at(new - ahead.reference)

    def _pairs(self, model: StateSpaceModel, step: Any, x: Float[Array, " d"]) -> _Pairs:
        t, dt, cache = self.grid_step(step)
        ahead: _Ahead = step[1]
        base = _scheme_of(model).base
        log_w, means, covs = mixture(base, model.sde, t, dt, model.to_state(x), cache)
        means, factors = jnp.reshape(means, (-1, model.dim)), psd_factor(covs)
        parts = _parts(model, ahead, x)

        def of(mean: Array, B: Array, H: Array, e: Array) -> tuple[Array, Array, Array]:
            """Factor of the innovations' precision, whitened pull, and log of the integral."""
            a = mean - ahead.reference
            L = cholesky(innovation_precision(H, B))
            pull = matvec(transpose(B), e - matvec(H, a))
            half = solve_lower(L, pull[:, None])[:, 0]
            at_mean = jnp.sum(a * (e - 0.5 * matvec(H, a)))
            log_Z = at_mean + 0.5 * jnp.sum(half**2) - jnp.sum(jnp.log(diagonal(L)))
            return L, half, log_Z

        over = jax.vmap(jax.vmap(of, (None, None, 0, 0)), (0, 0, None, None))
        L, half, log_Z = over(means, factors, parts.H, parts.e)
        joint = (log_w[:, None] + parts.c[None] + log_Z).reshape(-1)
        return _Pairs(means, factors, parts, L, half, joint, logsumexp(joint))


def _scheme_of(model: StateSpaceModel) -> JumpEuler:
    assert isinstance(model.scheme, JumpEuler)
    return model.scheme


def _parts(model: StateSpaceModel, ahead: _Ahead, x: Float[Array, " d"]) -> _Parts:
    """The guide at a time, without a jump until the next data and with one.

    Rates and sizes are those of the particle at x.
    """
    state, sde = model.to_state(x), model.sde
    rate, mean = jnp.zeros((), x.dtype), jnp.zeros_like(x)
    second = jnp.zeros((x.size, x.size), x.dtype)
    for source in sde.jumps:
        own = source.rate_at(ahead.t, state, sde.arguments)
        size_mean, size_cov = source.size_moments(ahead.t, state, sde.arguments)
        flat = jnp.reshape(size_mean, (-1,))
        rate, mean = rate + own, mean + own * flat
        second = second + own * (size_cov + flat[:, None] * flat[None, :])
    expected = rate * ahead.left
    jumps = expected > 1e-8
    p = -jnp.expm1(-jnp.where(jumps, expected, 1.0))
    # Given that there is a jump: moments of the sum of at least one.
    share = jnp.where(jumps, ahead.left / p, 0.0)
    m = share * mean
    S = share * second + (share * ahead.left - share**2) * mean[:, None] * mean[None, :]
    eye = jnp.eye(x.size, dtype=x.dtype)

    def part(b: Array, V: Array, log_pi: Array) -> tuple[Array, Array, Array]:
        phi = ahead.span.phi
        known = jnp.concatenate([ahead.H, ahead.e[:, None]], axis=1)
        left = eye + matmul(ahead.H, V)
        both = solve(left, known)
        H, e = symmetrize(both[:, :-1]), both[:, -1]
        root = cholesky(innovation_precision(ahead.H, psd_factor(V)))
        at_b = jnp.sum(b * (e - 0.5 * matvec(H, b)))
        c = log_pi + at_b + 0.5 * jnp.sum(ahead.e * matvec(V, e))
        c = c - jnp.sum(jnp.log(diagonal(root)))
        back = transpose(phi)
        return matmul(back, matmul(H, phi)), matvec(back, e - matvec(H, b)), c

    calm = part(ahead.span.b, ahead.span.V, -expected)
    with_jump = part(ahead.span.b + m, ahead.span.V + S, jnp.where(jumps, jnp.log(p), -math.inf))
    return _Parts(*(jnp.stack(pair) for pair in zip(calm, with_jump, strict=True)))
