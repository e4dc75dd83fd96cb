"""Particles over the regimes of a switching linear-Gaussian model, the state by Kalman filters.

Given the regimes `r_0 .. r_{T-2}` of the steps the model is linear and normal, so a particle is a
sequence of regimes with the mean and covariance of the state given it and the data. Each step makes
all children of all particles, one for each next regime; of those that have weight, as many are kept
as there are slots, by the resampling of Fearnhead and Clifford (2003, Journal of the Royal
Statistical Society B 65, section 3): children heavier than a threshold keep their weight, the
others are kept with probability weight over threshold and get the threshold as weight. No sequence
stands twice, the likelihood is unbiased, and it is exact while there are no more sequences than
slots.

The same filter that keeps a given sequence, followed by backward sampling, leaves the law of the
regimes given the data as it is: particle Gibbs with the state integrated out (Whiteley, Andrieu and
Doucet 2010, arXiv 1011.2437). Backward weights need the law of later data given a state, which is
carried in information form (Fraser and Potter 1969).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from numpyro_sde.linear.information import discount
from numpyro_sde.linear.kalman import LinearGaussian, kalman_filter, scalar_observations
from numpyro_sde.linear.ranks import equal_rank
from numpyro_sde.linear.small import (
    cholesky,
    congruence,
    diagonal,
    matmul,
    matvec,
    outer,
    psd_factor,
    solve_lower,
    symmetrize,
    transpose,
)
from numpyro_sde.linear.smoothing import backward_kernels, draw_backward


class SwitchingLinear(NamedTuple):
    """A linear-Gaussian model for each regime, and the law of the regimes.

    Attributes:
        each: the models, leading axis the regimes; only their transitions differ.
        start: probabilities of the first step's regime, `(n,)`.
        transitions: from the regime of each step to that of the next, `(T - 1, n, n)`.
        y: observations, `(T, p)`.
        present: whether a component was observed, `(T, p)`, or None for all.
    """

    each: LinearGaussian
    start: Float[Array, " n"]
    transitions: Float[Array, "T-1 n n"]
    y: Float[Array, "T p"]
    present: Any

    @property
    def num_regimes(self) -> int:
        """Number n of regimes."""
        return int(self.start.shape[0])

    @property
    def shared(self) -> LinearGaussian:
        """The model of the first regime, for what does not differ."""
        return jax.tree.map(lambda a: a[0], self.each)

    def along(self, regimes: Int[Array, " T-1"]) -> LinearGaussian:
        """The linear-Gaussian model given the regimes of all steps."""
        steps = jnp.arange(regimes.shape[0])
        one, each = self.shared, self.each
        factor = None if each.Q_factor is None else each.Q_factor[regimes, steps]
        return LinearGaussian(
            m0=one.m0,
            P0=one.P0,
            F=each.F[regimes, steps],
            c=each.c[regimes, steps],
            Q=each.Q[regimes, steps],
            C=one.C,
            R=one.R,
            e=one.e,
            Q_factor=factor,
            correlated=one.correlated,
        )


class Sequences(NamedTuple):
    """Kept sequences after each step.

    Attributes:
        regime: regime of the step, `(T - 1, M)`.
        parent: slot of the sequence before the step, `(T - 1, M)`.
        log_weights: normalised, minus infinity for slots that are free, `(T - 1, M)`.
        mean: of the state after the step given the data up to there, `(T - 1, M, d)`.
        cov: its covariance, `(T - 1, M, d, d)`.
    """

    regime: Int[Array, "T-1 M"]
    parent: Int[Array, "T-1 M"]
    log_weights: Float[Array, "T-1 M"]
    mean: Float[Array, "T-1 M d"]
    cov: Float[Array, "T-1 M d d"]


class Moments(NamedTuple):
    """Moments at each time: of the state before and given its datum, and of the regime."""

    predicted_mean: Float[Array, "T d"]
    predicted_cov: Float[Array, "T d d"]
    mean: Float[Array, "T d"]
    cov: Float[Array, "T d d"]
    regimes: Float[Array, "T n"]


class Run(NamedTuple):
    """What a filter over regimes returns.

    Attributes:
        log_likelihood: log of an unbiased estimate of the density of the data.
        increments: its terms, `(T,)`.
        moments: filtered moments.
        sequences: what was kept.
    """

    log_likelihood: Float[Array, ""]
    increments: Float[Array, " T"]
    moments: Moments
    sequences: Sequences


def keep_sequences(
    log_weights: Float[Array, " K"], u: Float[Array, ""], num_kept: int, retained: Any = None
) -> tuple[Int[Array, " M"], Float[Array, " M"]]:
    """Choose which weighted sequences to keep; none twice, weights unbiased.

    Args:
        log_weights: normalised log weights of all.
        u: uniform number on [0, 1].
        num_kept: how many to keep.
        retained: index of one that must be kept, for conditional filters; None for none.

    Returns:
        Indices, and their log weights; minus infinity in slots that are left free.

    Example:
        >>> import jax.numpy as jnp
        >>> w = jnp.log(jnp.array([0.6, 0.2, 0.1, 0.1]))
        >>> index, kept = keep_sequences(w, jnp.array(0.3), 2)
        >>> index.tolist(), [round(float(w), 3) for w in jnp.exp(kept)]
        ([0, 1], [0.6, 0.4])
    """
    count = log_weights.shape[0]
    slots = jnp.arange(num_kept)
    order = jnp.argsort(-log_weights)
    w = jnp.exp(log_weights[order])
    tail = jnp.cumsum(w[::-1])[::-1]
    # The heaviest A keep their weight, the others share the remaining slots.
    light = w[:num_kept] * (num_kept - slots) <= tail[:num_kept]
    heavy = jnp.argmax(light)
    threshold = tail[heavy] / (num_kept - heavy)
    reached = jnp.cumsum(jnp.where(jnp.arange(count) < heavy, 0.0, w))
    if retained is None:
        offset = u * threshold
    else:
        # The systematic points, given that one of them falls on the retained sequence.
        rank = jnp.argmax(order == retained)
        place = reached[rank] - u * w[rank]
        whole = jnp.floor(place / jnp.where(threshold > 0.0, threshold, 1.0))
        offset = jnp.where(rank < heavy, u * threshold, place - whole * threshold)
    points = offset + jnp.maximum(slots - heavy, 0) * threshold
    drawn = jnp.clip(jnp.searchsorted(reached, points, side="right"), heavy, count - 1)
    chosen = jnp.where(slots < heavy, slots, drawn)
    weight = jnp.where(slots < heavy, w[chosen], jnp.where(threshold > 0.0, threshold, 0.0))
    if retained is not None:  # rounding must not lose it
        kept = jnp.any(chosen == rank)
        last = jnp.argmin(jnp.abs(points - place) + jnp.where(slots < heavy, jnp.inf, 0.0))
        chosen = jnp.where(~kept & (slots == last), rank, chosen)
    total = jnp.sum(weight)
    return order[chosen], jnp.log(weight / jnp.where(total > 0.0, total, 1.0))


def _observed(mean: Array, cov: Array, data: Any) -> tuple[Array, Array, Array]:
    """Condition a Gaussian on independent scalar observations; the log density of them."""
    C, R, y, constant = data

    def one(carry: Any, now: Any) -> tuple[Any, None]:
        m, P, total = carry
        h, r, value = now
        Ph = matvec(P, h)
        S = jnp.sum(h * Ph) + r
        gap = value - jnp.sum(h * m)
        gain = Ph / S
        P = symmetrize(P - outer(gain, Ph))
        return (m + gain * gap, P, total - 0.5 * (jnp.log(S) + gap**2 / S)), None

    if C.shape[0] == 1:
        return one((mean, cov, constant), (C[0], R[0], y[0]))[0]
    return lax.scan(one, (mean, cov, constant), (C, R, y))[0]


def _mixture(weights: Array, means: Array, covs: Array) -> tuple[Array, Array]:
    mean = weights @ means
    centred = means - mean[None]
    spread = jnp.einsum("k,ki,kj->ij", weights, centred, centred)
    return mean, jnp.tensordot(weights, covs, 1) + spread


def regime_filter(
    model: SwitchingLinear,
    key: PRNGKeyArray,
    num_kept: int,
    retained: Int[Array, " T-1"] | None = None,
) -> Run:
    """Run the filter over sequences of regimes.

    Args:
        model: the model and its data.
        key: random key, or keys `(B,)`, one for each of B stretches of time.
        num_kept: number M of sequences.
        retained: a sequence that is kept throughout, for particle Gibbs.
    """
    n, one = model.num_regimes, model.shared
    data = scalar_observations(one, model.y, model.present)
    steps = one.F.shape[0]
    first = jax.tree.map(lambda a: a[0], data)
    mean, cov, start_term = _observed(one.m0, one.P0, first)
    regimes = jnp.arange(n)
    # The first step's regime has a law of its own.
    into = jnp.concatenate([jnp.broadcast_to(model.start, (1, n, n)), model.transitions[:-1]])
    log_into = jnp.log(into)

    def step(carry: Any, inputs: Any) -> tuple[Any, Any]:
        m, P, r, log_w = carry
        (F, c, Q), log_p, now, u, own = inputs

        def child(m: Array, P: Array, F: Array, c: Array, Q: Array) -> Any:
            ahead, spread = matvec(F, m) + c, congruence(F, P) + Q
            return (ahead, spread, *_observed(ahead, spread, now))

        every = jax.vmap(jax.vmap(child, (None, None, 0, 0, 0)), (0, 0, None, None, None))
        before_m, before_P, m, P, terms = every(m, P, F, c, Q)
        prior = log_w[:, None] + log_p[r]
        joint = _clean(prior + jnp.where(jnp.isneginf(prior), 0.0, terms)).reshape(-1)
        increment = logsumexp(joint)
        possible = jnp.isfinite(increment)
        log_all = jnp.where(possible, joint - increment, prior.reshape(-1))
        shares, ahead = jnp.exp(log_all), jnp.exp(prior.reshape(-1))
        flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), (before_m, before_P, m, P))
        by_regime = jnp.sum(shares.reshape(-1, n), axis=0)
        moments = (*_mixture(ahead, *flat[:2]), *_mixture(shares, *flat[2:]), by_regime)
        if retained is None:
            held = None
        else:
            slot, regime = own
            held = slot * n + regime
        index, log_w = keep_sequences(log_all, u, num_kept, held)
        parent, r = index // n, regimes[index % n]
        m, P = flat[2][index], flat[3][index]
        note = Sequences(r, parent, log_w, m, P)
        after = jnp.argmax(index == held) if held is not None else None
        return (m, P, r, log_w), (moments, note, increment, after)

    free = jnp.where(jnp.arange(num_kept) == 0, 0.0, -jnp.inf).astype(mean.dtype)
    carry: Any = (
        jnp.broadcast_to(mean, (num_kept, *mean.shape)),
        jnp.broadcast_to(cov, (num_kept, *cov.shape)),
        jnp.zeros(num_kept, regimes.dtype),
        free,
    )
    each = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), (model.each.F, model.each.c, model.each.Q))
    rest = jax.tree.map(lambda a: a[1:], data)
    inputs = (each, log_into, rest, _uniforms(key, steps, mean.dtype))
    if retained is None:
        _, found = lax.scan(lambda c, i: step(c, (*i, None)), carry, inputs)
    else:
        own = jnp.asarray(retained, regimes.dtype)

        def keeping(state: Any, now: Any) -> tuple[Any, Any]:
            carry, slot = state
            carry, found = step(carry, (*now[:-1], (slot, now[-1])))
            return (carry, found[-1]), found

        start = (carry, jnp.zeros((), jnp.result_type(int)))
        _, found = lax.scan(keeping, start, (*inputs, own))
    moments, sequences, increments, _ = found
    increments = jnp.concatenate([start_term[None], increments])
    at_start = (one.m0, one.P0, mean, cov, model.start)
    whole = [jnp.concatenate([a[None], b]) for a, b in zip(at_start, moments, strict=True)]
    return Run(jnp.sum(increments), increments, Moments(*whole), sequences)


def _clean(log_weights: Array) -> Array:
    return jnp.where(jnp.isnan(log_weights), -jnp.inf, log_weights)


def _uniforms(key: PRNGKeyArray, steps: int, dtype: Any) -> Array:
    """One uniform number a step; of several keys each gives those of a stretch of time."""
    if key.ndim == 0:
        return jax.random.uniform(key, (steps,), dtype)
    length = -(-steps // key.shape[0])
    return jax.vmap(lambda k: jax.random.uniform(k, (length,), dtype))(key).reshape(-1)[:steps]


def draw_regimes(model: SwitchingLinear, sequences: Sequences, key: PRNGKeyArray) -> Array:
    """Draw the regimes of all steps given all data, backward among the kept sequences.

    Returns:
        Regimes, `(T - 1,)`.
    """
    one = model.shared
    C, R, y, _ = scalar_observations(one, model.y, model.present)
    scaled = C / R[..., None]
    J = jnp.einsum("tpi,tpj->tij", scaled, C)[1:]
    s = jnp.einsum("tpi,tp->ti", scaled, y)[1:]
    d = one.m0.shape[0]
    B = psd_factor(model.each.Q) if model.each.Q_factor is None else model.each.Q_factor
    each = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), (model.each.F, model.each.c, B))
    noise = jax.random.gumbel(key, sequences.log_weights.shape, one.m0.dtype)
    log_out = jnp.log(model.transitions)

    def step(carry: Any, inputs: Any) -> tuple[Any, Array]:
        H, e, later, is_last = carry  # of the data after the step's end, given the state there
        (F, c, B), J, s, kept, e_noise, log_p = inputs
        ahead = _log_integral(kept.mean, kept.cov, H, e)
        moved = jnp.where(is_last, 0.0, log_p[kept.regime, later])
        score = _clean(kept.log_weights + moved + ahead)
        regime = kept.regime[jnp.argmax(score + e_noise)]
        F, c, B = F[regime], c[regime], B[regime]
        H, e = H + J, e + s
        M, _ = discount(H, B)
        through = matmul(transpose(F), M)
        new_H = symmetrize(matmul(through, matmul(H, F)))
        new_e = matvec(through, e - matvec(H, c))
        return (new_H, new_e, regime, jnp.zeros((), bool)), regime

    carry = (
        jnp.zeros((d, d), one.m0.dtype),
        jnp.zeros(d, one.m0.dtype),
        jnp.zeros((), sequences.regime.dtype),
        jnp.ones((), bool),
    )
    inputs = (each, J, s, sequences, noise, log_out)
    return lax.scan(step, carry, inputs, reverse=True)[1]


def _log_integral(m: Array, P: Array, H: Array, e: Array) -> Array:
    """Log of the integral of `exp(-x'Hx/2 + e'x)` under normal laws of x, `(M,)`."""
    S = psd_factor(P)
    d = H.shape[-1]
    one, inner = equal_rank(jnp.eye(d, dtype=H.dtype), matmul(transpose(S), matmul(H, S)))
    precision = one + inner
    L = cholesky(symmetrize(precision))
    rest = jnp.subtract(*equal_rank(e, matvec(H, m)))
    half = solve_lower(L, matvec(transpose(S), rest)[..., None])[..., 0]
    e, half_Hm = equal_rank(e, 0.5 * matvec(H, m))
    at_mean = jnp.sum(m * (e - half_Hm), axis=-1)
    log_det = jnp.sum(jnp.log(diagonal(L)), axis=-1)
    return at_mean + 0.5 * jnp.sum(half**2, axis=-1) - log_det


def draw_states(
    model: SwitchingLinear, regimes: Int[Array, " T-1"], key: PRNGKeyArray
) -> Float[Array, "T d"]:
    """Draw the states at all times given all data and the regimes: exact."""
    linear = model.along(regimes)
    filtered = kalman_filter(linear, model.y, model.present, form="sequential")
    normals = jax.random.normal(key, (1, linear.num_times, linear.state_size), linear.m0.dtype)
    draw: Array = draw_backward(backward_kernels(linear, filtered), normals)
    return draw[0]


def conditional_sweep(
    model: SwitchingLinear, regimes: Int[Array, " T-1"], key: PRNGKeyArray, num_kept: int
) -> Int[Array, " T-1"]:
    """New regimes given all data by a filter that keeps the present ones; leaves their law."""
    filter_key, draw_key = jax.random.split(key)
    run = regime_filter(model, filter_key, num_kept, retained=regimes)
    return draw_regimes(model, run.sequences, draw_key)
