"""The Ornstein-Uhlenbeck bank seen through the path: its filter, and the likelihood of increments.

Increments `d_k = loading_k . U_k + e_k` of one noise are observed exactly; the bank is not. Given
the increments so far `U_k ~ N(m_k, P_k)`, and

    d_k = loading . m + s^(1/2) z_k,   m' = decay m + gain s^(1/2) z_k,   z_k ~ N(0, 1),

so the noise is a map of one standard normal a step (the innovations form), P is the same for
every path, and nothing is left to infer. `P_0` is the law of the bank's start: it is integrated
out, never frozen.

With equal steps the likelihood is also taken in blocks: given the bank at its start, a block of B
increments has one covariance, factorised once, and blocks are combined in pairs of pairs.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from numpyro_sde.noise.markov_fbm import BankSteps

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
BLOCK = 32
"""Increments in a block."""


class Innovations(NamedTuple):
    """The innovations form, one entry for each step.

    Attributes:
        decay: shape `(N, n)`.
        loading: shape `(N, n)`.
        scale: standard deviation of an increment given those before, shape `(N,)`.
        gain: what the bank's mean takes up of its innovation `d - loading . m`, shape `(N, n)`.
    """

    decay: Float[Array, "N n"]
    loading: Float[Array, "N n"]
    scale: Float[Array, " N"]
    gain: Float[Array, "N n"]


@partial(jax.jit, static_argnums=2)
def innovations_form(steps: BankSteps, start: Float[Array, "n n"], length: int) -> Innovations:
    """Gains and scales of all steps, by one scan over the bank's covariance.

    Args:
        steps: the law of each step, or of one for all.
        start: covariance of the bank at the start.
        length: number of steps N.
    """
    same = steps.variance.shape[0] == 1 and length != 1

    def step(P: Array, now: Any) -> tuple[Array, tuple[Array, Array]]:
        one = jax.tree.map(lambda a: a[0], steps) if same else now
        seen = P @ one.loading
        variance = one.loading @ seen + one.variance
        cross = one.decay * seen + one.gain
        P = one.decay[:, None] * P * one.decay + one.noise
        P = P - jnp.outer(cross, cross) / variance
        return 0.5 * (P + P.T), (variance, cross / variance)

    _, (variance, gain) = lax.scan(step, start, None if same else steps, length)

    def spread(a: Array) -> Array:
        return jnp.broadcast_to(a, (length, *a.shape[1:]))

    return Innovations(spread(steps.decay), spread(steps.loading), jnp.sqrt(variance), gain)


@jax.jit
def bank_means(form: Innovations, increments: Float[Array, "N m"]) -> Float[Array, "{N}+1 m n"]:
    """Mean of the bank of each of m noises before every step, given the increments so far."""

    def step(mean: Array, now: Any) -> tuple[Array, Array]:
        one, d = now
        rest = d - mean @ one.loading
        mean = one.decay * mean + rest[:, None] * one.gain
        return mean, mean

    first = jnp.zeros((increments.shape[1], form.gain.shape[1]), increments.dtype)
    _, later = lax.scan(step, first, (form, increments))
    return jnp.concatenate([first[None], later])


@jax.jit
def increment_log_densities(
    form: Innovations, increments: Float[Array, "N m"]
) -> Float[Array, " N"]:
    """Log density of each step's increments given those before, summed over the m noises."""
    means = bank_means(form, increments)[:-1]
    rest = increments - jnp.einsum("kmn,kn->km", means, form.loading)
    z = rest / form.scale[:, None]
    return (-0.5 * z**2 - jnp.log(form.scale)[:, None] - _HALF_LOG_2PI).sum(-1)


class _Element(NamedTuple):
    """What a run of increments says of the bank at its start, and makes of it at its end.

    `p(d | U) = exp(eta . U - U'J U / 2 + ...)` and `U_end | U, d ~ N(decay U + shift, cov)`. The
    matrices are those of every run of this length; eta and shift are stacked, `(runs, m, n)`.
    """

    J: Array
    decay: Array
    cov: Array
    eta: Array
    shift: Array


def _block_law(steps: BankSteps, size: int) -> tuple[Array, Array, Array, Array, Array]:
    """The law of a block given the bank at its start.

    Cholesky factor and whitened loading of its increments; of the bank at its end given them,
    decay, gain and covariance.
    """
    one = jax.tree.map(lambda a: a[0], steps)
    f, h, n = one.decay, one.loading, one.decay.size
    power = jnp.concatenate(
        [jnp.ones((1, n), f.dtype), jnp.cumprod(jnp.broadcast_to(f, (size, n)), axis=0)]
    )
    # Covariance of the bank after 0, ..., size steps: a geometric sum.
    ratio = f[:, None] * f
    ends = jnp.where(ratio < 1.0, 1.0 - ratio, 1.0)
    spread = one.noise * (1.0 - power[:, :, None] * power[:, None, :]) / ends
    # Covariance of the increment at i with the bank after it; then with the increments at j > i.
    after = f * (spread[:size] @ h) + one.gain
    lag = np.arange(size)[:, None] - np.arange(size) - 1
    later = jnp.einsum("ijn,jn->ij", power[np.maximum(lag, 0)] * h, after)
    own = jnp.einsum("n,inm,m->i", h, spread[:size], h) + one.variance
    cov = jnp.where(lag >= 0, later, 0.0)
    L = jnp.linalg.cholesky(cov + cov.T + jnp.diag(own))
    cross = power[size - 1 - np.arange(size)] * after
    white = jax.scipy.linalg.solve_triangular(
        L, jnp.concatenate([power[:size] * h, cross], axis=1), lower=True
    )
    loading, gain = white[:, :n], white[:, n:].T
    return L, loading, jnp.diag(power[size]) - gain @ loading, gain, spread[size] - gain @ gain.T


def _combine(
    first: _Element, J: Array, eta: Array
) -> tuple[Array, Array, Array, Array, Array, Array]:
    """Runs, each followed by a run that says `(J, eta)` of the bank in between.

    Returns the log evidence gained, J and eta of both together, and what the bank in between is
    given the second: `U_between = keep (decay U + shift + cov eta)`, of covariance `keep cov`.
    """
    n = J.shape[0]
    inner = jnp.eye(n, dtype=J.dtype) + first.cov @ J
    keep = jnp.linalg.inv(inner)
    left = keep @ first.cov
    rest = eta - first.shift @ J
    gained = (eta * first.shift).sum() - 0.5 * ((first.shift @ J) * first.shift).sum()
    gained = gained + 0.5 * ((rest @ left) * rest).sum()
    runs = eta.shape[0] * eta.shape[1]
    gained = gained - 0.5 * runs * jnp.linalg.slogdet(inner)[1]
    back = first.decay.T @ keep.T
    new_J = first.J + back @ J @ first.decay
    return gained, 0.5 * (new_J + new_J.T), first.eta + rest @ back.T, keep, left, rest


def _merge(pairs: _Element) -> tuple[Array, _Element]:
    """Neighbouring runs of one length made runs of twice the length."""
    first = pairs._replace(eta=pairs.eta[0::2], shift=pairs.shift[0::2])
    eta, shift = pairs.eta[1::2], pairs.shift[1::2]
    gained, J, new_eta, keep, left, _ = _combine(first, pairs.J, eta)
    on = pairs.decay @ keep
    cov = pairs.decay @ left @ pairs.decay.T + pairs.cov
    new_shift = (first.shift + eta @ first.cov) @ on.T + shift
    return gained, _Element(J, on @ pairs.decay, 0.5 * (cov + cov.T), new_eta, new_shift)


@partial(jax.jit, static_argnames="size")
def log_likelihood(
    steps: BankSteps,
    start: Float[Array, "n n"],
    increments: Float[Array, "N m"],
    size: int = BLOCK,
) -> Float[Array, ""]:
    """Log density of the increments of m independent noises over equal steps.

    Blocks of equal length have one law, and so have two neighbouring blocks together: their
    matrices are made once for each doubling of the length, and only vectors are combined for all
    of them. O(N) operations in `log N` rounds.

    Args:
        steps: the law of one step, leading axis 1.
        start: covariance of the bank at the start.
        increments: shape `(N, m)`.
        size: increments in a block.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> from numpyro_sde.noise import MarkovFBM
        >>> bank, steps = MarkovFBM(0.5).on_grid(np.arange(5.0), np.ones(4))
        >>> round(float(log_likelihood(steps, bank.start, jnp.zeros((4, 1)))), 3)  # white noise
        -3.676
    """
    length, m = increments.shape
    size = min(size, length)
    count, short = divmod(length, size)
    L, loading, decay, gain, cov = _block_law(steps, size)
    y = jnp.moveaxis(increments[: count * size].reshape(count, size, m), 0, 1)
    white = jax.scipy.linalg.solve_triangular(L, y.reshape(size, -1), lower=True)
    white = white.reshape(size, count, m)
    log_scale = jnp.log(jnp.diagonal(L))
    total = -0.5 * (white**2).sum() - m * (count * log_scale.sum() + length * _HALF_LOG_2PI)
    runs = _Element(
        J=loading.T @ loading,
        decay=decay,
        cov=cov,
        eta=jnp.einsum("bn,bkm->kmn", loading, white),
        shift=jnp.einsum("nb,bkm->kmn", gain, white),
    )
    # What stands after the runs that still pair up: first the increments beyond the last block.
    tail_J, tail_eta = jnp.zeros_like(runs.J), jnp.zeros_like(runs.eta[:1])
    if short:
        rest = jax.scipy.linalg.solve_triangular(
            L[:short, :short], increments[count * size :], lower=True
        )
        tail_J = loading[:short].T @ loading[:short]
        tail_eta = jnp.einsum("bn,bm->mn", loading[:short], rest)[None]
        total = total - 0.5 * (rest**2).sum() - m * log_scale[:short].sum()
    while True:
        count = runs.eta.shape[0]
        if count % 2:
            last = runs._replace(eta=runs.eta[-1:], shift=runs.shift[-1:])
            gained, tail_J, tail_eta, *_ = _combine(last, tail_J, tail_eta)
            total = total + gained
            runs = runs._replace(eta=runs.eta[:-1], shift=runs.shift[:-1])
        if count <= 1:
            break
        gained, runs = _merge(runs)
        total = total + gained
    nothing = jnp.zeros_like(tail_J)
    origin = _Element(nothing, nothing, start, jnp.zeros_like(tail_eta), jnp.zeros_like(tail_eta))
    return total + _combine(origin, tail_J, tail_eta)[0]
