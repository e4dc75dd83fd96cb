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
BLOCK = 64
"""Least number of increments in a block, where there are as many."""


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


@partial(jax.jit, static_argnums=(2, 3))
def innovations_form(
    steps: BankSteps, start: Float[Array, "n n"], length: int, stationary: bool = False
) -> Innovations:
    """Gains and scales of all steps, by one scan over the bank's covariance.

    Args:
        steps: the law of each step, or of one for all.
        start: covariance of the bank at the start.
        length: number of steps N.
        stationary: whether that covariance is the stationary one; then equal steps need no
            matrices.
    """
    same = steps.variance.shape[0] == 1 and length != 1
    if same and stationary:
        return _stationary_form(steps, start, length)

    def step(P: Array, now: Any) -> tuple[Array, tuple[Array, Array]]:
        one = jax.tree.map(lambda a: a[0], steps) if same else now
        seen = P @ one.loading
        variance = one.loading @ seen + one.variance
        cross = one.decay * seen + one.gain
        P = one.decay[:, None] * P * one.decay + one.noise
        P = P - jnp.outer(cross, cross) / variance
        return 0.5 * (P + P.T), (variance, cross / variance)

    _, (variance, gain) = lax.scan(step, start, None if same else steps, length)
    return _form(steps, variance, gain)


def _form(steps: BankSteps, variance: Array, gain: Array) -> Innovations:
    def spread(a: Array) -> Array:
        return jnp.broadcast_to(a, (gain.shape[0], *a.shape[1:]))

    return Innovations(spread(steps.decay), spread(steps.loading), jnp.sqrt(variance), gain)


def _stationary_form(steps: BankSteps, start: Array, length: int) -> Innovations:
    """The same by the recursions of Chandrasekhar's type: two vectors instead of a covariance.

    From the stationary law the covariance changes by a matrix of rank one in every step,
    `P' - P = -l l' / r` (Morf, Sidhu and Kailath 1974, "Some new algorithms for recursive
    estimation in constant, linear, discrete-time systems").
    """
    one = jax.tree.map(lambda a: a[0], steps)
    f, h, n = one.decay, one.loading, one.decay.size
    seen = start @ h
    variance, cross = h @ seen + one.variance, f * seen + one.gain

    @jax.checkpoint
    def step(packed: Array, _: None) -> tuple[Array, Array]:
        # Packed: a loop over one vector is far quicker than one over several arrays.
        s, r, k, change = packed[0], packed[1], packed[2 : 2 + n], packed[2 + n :]
        a = jnp.sum(h * change)
        moved = f * change
        scalars = jnp.stack([s - a * a / r, r - a * a / s])
        return jnp.concatenate([scalars, k - moved * (a / r), moved - k * (a / s)]), packed

    first = jnp.concatenate([jnp.stack([variance, variance]), cross, cross])
    _, states = lax.scan(step, first, None, length)
    return _form(steps, states[:, 0], states[:, 2 : 2 + n] / states[:, :1])


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


class _Run(NamedTuple):
    """What a run of increments says of the bank at its start, and makes of it at its end.

    `p(d | U) = exp(eta . U - U'J U / 2 + ...)` and `U_end | U, d ~ N(decay U + shift, cov)`; J,
    decay and cov are the same for every run of one length.
    """

    J: Array
    decay: Array
    cov: Array


class _Join(NamedTuple):
    """Of a run and what follows it, as far as no data enter.

    Given both, the bank in between is `keep (decay U + shift + cov eta)` with covariance `left`.
    """

    J: Array  # of what follows
    cov: Array  # of the run before
    left: Array
    back: Array  # from the bank in between to that at the start
    on: Array  # to that at the end of what follows
    log_det: Array


def _join(first: _Run, J: Array, decay: Array) -> _Join:
    """Join a run with something that says J of the bank, and moves it on by `decay`."""
    eye = jnp.eye(J.shape[0], dtype=J.dtype)
    factors = jax.scipy.linalg.lu_factor(eye + first.cov @ J)
    keep = jax.scipy.linalg.lu_solve(factors, eye)
    log_det = jnp.log(jnp.abs(jnp.diagonal(factors[0]))).sum()
    return _Join(J, first.cov, keep @ first.cov, first.decay.T @ keep.T, decay @ keep, log_det)


def _joined(join: _Join, eta: Array, shift: Array) -> tuple[Array, Array]:
    """Log evidence of the joints, and what each passes back to the start of its run.

    Args:
        join: the matrices.
        eta: information of what follows, shape `(runs, m, n)`.
        shift: of the runs before, shape `(runs, m, n)`.
    """
    seen = shift @ join.J
    rest = eta - seen
    gained = (eta * shift).sum() - 0.5 * (seen * shift).sum()
    gained = gained + 0.5 * ((rest @ join.left) * rest).sum()
    runs = eta.shape[0] * eta.shape[1]
    return gained - 0.5 * runs * join.log_det, rest @ join.back.T


def _block_law(steps: BankSteps, size: int) -> tuple[Array, Array, Array, Array, Array]:
    """The law of a block given the bank at its start.

    Cholesky factor and whitened loading of its increments; of the bank at its end given them,
    decay, gain and covariance.
    """
    one = jax.tree.map(lambda a: a[0], steps)
    f, h, n = one.decay, one.loading, one.decay.size
    power, square = jnp.ones((1, n), f.dtype), f
    while power.shape[0] <= size:  # by doubling: a cumulative product compiles for seconds
        power, square = jnp.concatenate([power, power * square]), square * square
    power = power[: size + 1]
    # The stationary law of the bank, 0 where it has none because nothing drives it: given the
    # bank at the start, the covariance of increments is the stationary one less what it explains.
    ratio = f[:, None] * f
    still = one.noise / jnp.where(ratio < 1.0, 1.0 - ratio, 1.0)
    V = power[:size] * h
    after = f * (still @ h - power[:size] * (V @ still)) + one.gain
    column = jnp.append(h @ still @ h + one.variance, V[:-1] @ (f * (still @ h) + one.gain))
    L = jnp.linalg.cholesky(_toeplitz(column) - V @ still @ V.T)
    cross = power[size - 1 - np.arange(size)] * after
    end = still * (1.0 - power[size][:, None] * power[size])
    white = jax.scipy.linalg.solve_triangular(L, jnp.concatenate([V, cross], axis=1), lower=True)
    loading, gain = white[:, :n], white[:, n:].T
    return L, loading, jnp.diag(power[size]) - gain @ loading, gain, end - gain @ gain.T


def _toeplitz(column: Float[Array, " s"]) -> Float[Array, "s s"]:
    """The symmetric Toeplitz matrix, by reshapes: the transpose of a gather is a slow scatter."""
    size = column.size
    around = jnp.concatenate([column[:0:-1], column, jnp.zeros(1, column.dtype)])
    rows = jnp.tile(around, size)[: size * (2 * size - 1)].reshape(size, 2 * size - 1)
    return rows[:, size - 1 :]


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
        size: least number of increments in a block.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> from numpyro_sde.noise import MarkovFBM
        >>> bank, steps = MarkovFBM(0.5).on_grid(np.arange(5.0), np.ones(4))
        >>> round(float(log_likelihood(steps, bank.start, jnp.zeros((4, 1)))), 3)  # white noise
        -3.676
    """
    length, m = increments.shape
    # A power of two of equal blocks, and the rest.
    count = 1 << max(int(math.log2(length / size)), 0)
    size, rest = length // count, length % count
    L, loading, decay, gain, cov = _block_law(steps, size)
    y = jnp.moveaxis(increments[: count * size].reshape(count, size, m), 0, 1)
    white = jax.scipy.linalg.solve_triangular(L, y.reshape(size, -1), lower=True)
    white = white.reshape(size, count, m)
    log_scale = jnp.log(jnp.diagonal(L)).sum()
    total = -0.5 * (white**2).sum() - m * (count * log_scale + length * _HALF_LOG_2PI)
    run = _Run(loading.T @ loading, decay, cov)
    eta = jnp.einsum("bn,bkm->kmn", loading, white)
    shift = jnp.einsum("nb,bkm->kmn", gain, white)

    def double(run: _Run, _: None) -> tuple[_Run, _Join]:
        join = _join(run, run.J, run.decay)
        J = run.J + join.back @ run.J @ run.decay
        cov = run.decay @ join.left @ run.decay.T + run.cov
        return _Run(0.5 * (J + J.T), join.on @ run.decay, 0.5 * (cov + cov.T)), join

    run, joins = lax.scan(double, run, None, length=count.bit_length() - 1)
    for level in range(count.bit_length() - 1):
        join: _Join = jax.tree.map(lambda a, level=level: a[level], joins)
        first, second = shift[0::2], shift[1::2]
        gained, back = _joined(join, eta[1::2], first)
        total = total + gained
        shift = (first + eta[1::2] @ join.cov) @ join.on.T + second
        eta = eta[0::2] + back
    J = run.J
    if rest:
        L, loading, *_ = _block_law(steps, rest)
        white = jax.scipy.linalg.solve_triangular(L, increments[length - rest :], lower=True)
        log_scale = jnp.log(jnp.diagonal(L)).sum()
        last = loading.T @ loading
        join = _join(run, last, run.decay)
        gained, back = _joined(join, jnp.einsum("bn,bm->mn", loading, white)[None], shift)
        total = total + gained - 0.5 * (white**2).sum() - m * log_scale
        J, eta = J + join.back @ last @ run.decay, eta + back
    origin = _Run(J, jnp.eye(J.shape[0], dtype=J.dtype), start)
    return total + _joined(_join(origin, J, origin.decay), eta, jnp.zeros_like(eta))[0]
