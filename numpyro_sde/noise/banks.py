"""The Ornstein-Uhlenbeck bank seen through the path: its filter, and the likelihood of increments.

Increments `d_k = loading_k . U_k + e_k` of one noise are observed exactly; the bank is not. Given
the increments so far `U_k ~ N(m_k, P_k)`, and

    d_k = loading . m + s^(1/2) z_k,   m' = decay m + gain s^(1/2) z_k,   z_k ~ N(0, 1),

so the noise is a map of one standard normal a step (the innovations form), P is the same for
every path, and nothing is left to infer. `P_0` is the law of the bank's start: it is integrated
out, never frozen.

With equal steps the likelihood is also taken in blocks: given the bank at its start, a block of B
increments has one covariance, inverted once, and blocks are joined in pairs, pairs in pairs, and
so on.
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

from numpyro_sde.linear.small import diagonal
from numpyro_sde.noise.markov_fbm import BankSteps

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
BLOCK = 32
"""Number of increments in a block, up to twice as many; see `_split`."""


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
        P = one.decay[:, None] * P * one.decay[None] + one.noise
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
        mean = one.decay[None] * mean + rest[:, None] * one.gain[None]
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


# Both derivatives below are in terms of inverses that are there already: far less work, and far
# less to compile, than the derivatives of factorisations.


@jax.custom_jvp
def _inverse(M: Float[Array, "n n"]) -> tuple[Array, Array]:
    """Inverse and log of the absolute determinant."""
    factors = jax.scipy.linalg.lu_factor(M)
    log_det = jnp.log(jnp.abs(diagonal(factors[0]))).sum()
    return jax.scipy.linalg.lu_solve(factors, jnp.eye(M.shape[0], dtype=M.dtype)), log_det


@_inverse.defjvp
def _inverse_jvp(primals: Any, tangents: Any) -> Any:
    inverse, log_det = _inverse(*primals)
    (change,) = tangents
    return (inverse, log_det), (-inverse @ change @ inverse, (inverse.T * change).sum())


@jax.custom_jvp
def _normal(
    T: Float[Array, "s s"], y: Float[Array, "s c"], B: Float[Array, "s k"]
) -> tuple[Array, Array]:
    """Log density of the columns of y under `N(0, T)`, and `T^-1 B`."""
    return _normal_parts(T, y, B)[:2]


def _normal_parts(T: Array, y: Array, B: Array) -> tuple[Array, Array, Array, Array]:
    L = jnp.linalg.cholesky(T, symmetrize_input=False)
    half = jax.scipy.linalg.solve_triangular(L, jnp.eye(T.shape[0], dtype=T.dtype), lower=True)
    precision = half.T @ half
    solved = precision @ y
    log_det = jnp.log(diagonal(L)).sum() + T.shape[0] * _HALF_LOG_2PI
    return -0.5 * (y * solved).sum() - y.shape[1] * log_det, precision @ B, precision, solved


@_normal.defjvp
def _normal_jvp(primals: Any, tangents: Any) -> Any:
    T, y, B = primals
    dT, dy, dB = tangents
    value, solved_b, precision, solved = _normal_parts(T, y, B)
    slope = 0.5 * (solved @ solved.T - y.shape[1] * precision)
    change = (slope * dT).sum() - (solved * dy).sum()
    return (value, solved_b), (change, precision @ (dB - dT @ solved_b))


# A run of increments is a matrix `[[-J, D'], [D, C]]` and for each noise a row `[eta, shift]`:
#
#     p(d | U) = exp(eta . U - U'J U / 2 + ...),   U_end | U, d ~ N(D U + shift, C).
#
# Two runs, one after the other, are a run again: the bank between them is integrated out, which
# is the star product of Redheffer (1960, "On a certain linear fractional transformation").


def _block_law(steps: BankSteps, size: int) -> tuple[Array, Array, Array, Array]:
    """The law of a block of increments given the bank at its start.

    Their covariance and their covariance with `[information on the start, bank at the end]`;
    decay of the bank and its covariance over the block.
    """
    one = jax.tree.map(lambda a: a[0], steps)
    f, h = one.decay, one.loading
    # The first row apart: where f is 0 its derivative would be NaN.
    row = f[None]
    power = jnp.concatenate([jnp.ones_like(row), row ** np.arange(1.0, size + 1.0)[:, None]])
    # The stationary law of the bank, 0 where it has none because nothing drives it: given the
    # bank at the start, the covariance of increments is the stationary one less what it explains.
    ratio = f[:, None] * row
    still = one.noise / jnp.where(ratio < 1.0, 1.0 - ratio, 1.0)
    V = power[:size] * h[None]
    after = row * ((still @ h)[None] - power[:size] * (V @ still)) + one.gain[None]
    column = jnp.append(h @ still @ h + one.variance, V[:-1] @ (f * (still @ h) + one.gain))
    both = jnp.concatenate([V, power[size - 1 - np.arange(size)] * after], axis=1)
    end = still * (1.0 - power[size][:, None] * power[size][None])
    return _toeplitz(column) - V @ still @ V.T, both, power[size], end


def _run(covariance: Array, both: Array, decay: Array, end: Array, y: Array) -> Any:
    """A block as a run: its matrix, its rows, and the log density given no bank at its start.

    Args:
        covariance: of the increments, given the bank at the start.
        both: see `_block_law`.
        decay: of the bank over the block.
        end: covariance of the bank at the end, given that at the start.
        y: the increments, one column for each block and noise.
    """
    value, solved = _normal(covariance, y, both)
    moved = jnp.diag(decay)
    free = jnp.block([[jnp.zeros_like(end), moved], [moved, end]])
    return free - both.T @ solved, y.T @ solved, value


class _Join(NamedTuple):
    """Of two runs, what their rows are joined by."""

    Q: Float[Array, "k k"]
    W: Float[Array, "k k"]
    log_det: Float[Array, ""]


def _join(first: Float[Array, "k k"], second: Float[Array, "k k"]) -> tuple[Array, _Join]:
    """The matrix of two runs together, and what joins their rows."""
    n = first.shape[0] // 2
    J, C, zero = -second[:n, :n], first[n:, n:], jnp.zeros((n, n), first.dtype)
    keep, log_det = _inverse(jnp.eye(n, dtype=first.dtype) + C @ J)
    left = keep @ C
    Q = jnp.block([[0.5 * (left + left.T), keep], [keep.T, -J @ keep]])
    W = jnp.block([[zero, second[:n, n:]], [first[n:, :n], zero]])
    kept = jnp.block([[first[:n, :n], zero], [zero, second[n:, n:]]])
    whole = kept + W.T @ (Q @ W)
    return 0.5 * (whole + whole.T), _Join(Q, W, log_det)


def _joined(join: _Join, first: Array, second: Array) -> tuple[Array, Array]:
    """Rows of the runs together, and the log evidence of the joints.

    Args:
        join: see `_join`.
        first: rows of the runs before, shape `(runs, 2n)`.
        second: rows of what follows, shape `(runs, 2n)`.
    """
    of_eta = np.arange(first.shape[1]) < first.shape[1] // 2
    v = jnp.where(of_eta, second, first)
    seen = v @ join.Q
    rows = jnp.where(of_eta, first, second) + seen @ join.W
    return rows, 0.5 * (v * seen).sum() - 0.5 * v.shape[0] * join.log_det


def _toeplitz(column: Float[Array, " s"]) -> Float[Array, "s s"]:
    """The symmetric Toeplitz matrix, by reshapes: the transpose of a gather is a slow scatter."""
    size = column.size
    around = jnp.concatenate([column[:0:-1], column, jnp.zeros(1, column.dtype)])
    # Copies by a product, whose transpose is a product: that of `tile` is a slow sum.
    copies = jnp.ones((size, 1), column.dtype) @ around[None]
    rows = copies.ravel()[: size * (2 * size - 1)].reshape(size, 2 * size - 1)
    return rows[:, size - 1 :]


def _split(length: int, size: int) -> tuple[int, int, int]:
    """Increments in a block, number of blocks, and the increments left over.

    From one to two times the given size, such that the number of blocks has few binary digits
    set: each is a run of its own to join.
    """
    sizes = range(min(size, length), min(2 * size, length + 1))
    best = min(sizes, key=lambda s: ((length // s).bit_count() + (length % s > 0), s))
    return best, length // best, length % best


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
        size: number of increments in a block, up to twice as many.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> from numpyro_sde.noise import MarkovFBM
        >>> bank, steps = MarkovFBM(0.5).on_grid(np.arange(5.0), np.ones(4))
        >>> round(float(log_likelihood(steps, bank.start, jnp.zeros((4, 1)))), 3)  # white noise
        -3.676
    """
    length, m = increments.shape
    size, count, rest = _split(length, size)
    covariance, both, decay, end = _block_law(steps, size)
    y = jnp.moveaxis(increments[: length - rest].reshape(count, size, m), 1, 0)
    run, rows, total = _run(covariance, both, decay, end, y.reshape(size, -1))
    rows = rows.reshape(count, m, -1)
    after: tuple[Array, Array] | None = None  # matrix and rows of what follows the runs at hand
    if rest:
        # Nothing follows it: its own end does not matter.
        only_start = both[:rest].at[:, start.shape[0] :].set(0.0)
        last = increments[length - rest :]
        matrix, vectors, value = _run(covariance[:rest, :rest], only_start, decay, end, last)
        after, total = (matrix, vectors), total + value

    def double(run: Array, _: None) -> tuple[Array, Any]:
        whole, join = _join(run, run)
        return whole, (run, join)

    num_levels = count.bit_length() - 1
    top, levels = lax.scan(double, run, None, length=num_levels)
    for level in range(num_levels + 1):
        run, join = top, None
        if level < num_levels:
            run, join = jax.tree.map(lambda a, level=level: a[level], levels)
        if count >> level & 1:
            single, rows = rows[-1], rows[:-1]
            if after is None:
                after = run, single
            else:
                whole, ends = _join(run, after[0])
                single, gained = _joined(ends, single, after[1])
                after, total = (whole, single), total + gained
        if join is not None:
            pairs = rows.reshape(-1, 2, m, rows.shape[-1])
            first, second = (pairs[:, k].reshape(-1, rows.shape[-1]) for k in (0, 1))
            rows, gained = _joined(join, first, second)
            rows, total = rows.reshape(-1, m, rows.shape[-1]), total + gained
    assert after is not None
    origin = jnp.zeros_like(top).at[start.shape[0] :, start.shape[0] :].set(start)
    _, ends = _join(origin, after[0])
    return total + _joined(ends, jnp.zeros_like(after[1]), after[1])[1]
