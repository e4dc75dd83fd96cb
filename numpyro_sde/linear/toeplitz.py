"""Symmetric positive definite Toeplitz matrices, given by their first column.

A stationary Gaussian series on a regular grid has one. Products and preconditioned conjugate
gradients cost O(N log N) by the fast Fourier transform; the log determinant O(N^2) and O(N)
memory by the recursion of Levinson (1947) and Durbin (1960).

Sources: T. Chan (1988), "An optimal circulant preconditioner for Toeplitz systems"; R. Chan and
M. Ng (1996), "Conjugate gradient methods for Toeplitz systems"; Gohberg and Semencul (1972) for
the inverse; Brockwell and Davis (1991), Time Series, section 5.2, for the recursion.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

_MAX_ITERATIONS = 200


def _fft_size(n: int) -> int:
    """Smallest product of small primes that is at least n."""
    best = 1 << (n - 1).bit_length()
    for factor in (3, 5, 9, 15):
        power = 1 << max((-(-n // factor) - 1).bit_length(), 0)
        best = min(best, factor * power)
    return best


def toeplitz_product(column: Float[Array, " N"], x: Float[Array, " N"]) -> Float[Array, " N"]:
    """Product of the symmetric Toeplitz matrix of this first column with a vector.

    Example:
        >>> import jax.numpy as jnp
        >>> toeplitz_product(jnp.array([2.0, 1.0]), jnp.array([1.0, 0.0])).round(5).tolist()
        [2.0, 1.0]
    """
    n = column.shape[0]
    size = _fft_size(2 * n)
    return _circulant_product(_embedded_spectrum(column, size), x, size)


def _embedded_spectrum(column: Array, size: int) -> Array:
    """Eigenvalues of a circulant matrix whose leading block is the Toeplitz matrix."""
    n = column.shape[0]
    gap = jnp.zeros(size - 2 * n + 1, column.dtype)
    return jnp.fft.rfft(jnp.concatenate([column, gap, column[:0:-1]])).real


def _circulant_product(spectrum: Array, x: Array, size: int) -> Array:
    return jnp.fft.irfft(spectrum * jnp.fft.rfft(x, size), size)[: x.shape[0]]


def _solve_by_gradients(column: Array, b: Array) -> Array:
    """Conjugate gradients with T. Chan's circulant preconditioner, to rounding."""
    n, size = column.shape[0], _fft_size(2 * column.shape[0])
    spectrum = _embedded_spectrum(column, size)
    k = jnp.arange(n, dtype=column.dtype)
    closest = ((n - k) * column + k * jnp.roll(column[::-1], 1)) / n
    inverse = 1.0 / jnp.fft.rfft(closest).real

    def precondition(r: Array) -> Array:
        return jnp.fft.irfft(inverse * jnp.fft.rfft(r), n)

    floor = (4.0 * jnp.finfo(column.dtype).eps) ** 2

    def unfinished(carry: Any) -> Array:
        _, _, _, rho, first, count = carry
        return (rho > floor * first) & (count < _MAX_ITERATIONS)

    def step(carry: Any) -> Any:
        x, r, p, rho, first, count = carry
        q = _circulant_product(spectrum, p, size)
        alpha = rho / (p @ q)
        r = r - alpha * q
        z = precondition(r)
        new = r @ z
        return x + alpha * p, r, z + (new / rho) * p, new, first, count + 1

    z = precondition(b)
    rho = b @ z
    start = (jnp.zeros_like(b), b, z, rho, rho, 0)
    return lax.while_loop(unfinished, step, start)[0]


def toeplitz_solve(column: Float[Array, " N"], b: Float[Array, " N"]) -> Float[Array, " N"]:
    """Solve `C x = b` for the symmetric positive definite Toeplitz matrix of this first column.

    O(N log N), for matrices whose condition the circulant preconditioner tames (all fractional
    Gaussian noises: some 15 iterations, whatever the size). Differentiable in both arguments.

    Example:
        >>> import jax.numpy as jnp
        >>> toeplitz_solve(jnp.array([2.0, 1.0]), jnp.array([3.0, 3.0])).round(4).tolist()
        [1.0, 1.0]
    """
    size = _fft_size(2 * column.shape[0])
    spectrum = _embedded_spectrum(column, size)
    fixed = lax.stop_gradient(column)
    return lax.custom_linear_solve(
        lambda x: _circulant_product(spectrum, x, size),
        b,
        lambda _, b: _solve_by_gradients(fixed, b),
        symmetric=True,
    )


@jax.custom_jvp
def toeplitz_quadratic(column: Float[Array, " N"], x: Float[Array, " N"]) -> Float[Array, ""]:
    """`x' C^-1 x` for the symmetric positive definite Toeplitz matrix of this first column.

    O(N log N), and so is its gradient, from the one solution: with `z = C^-1 x` it is `2 z` by
    `x` and minus the autocorrelation of `z` by the column.

    Example:
        >>> import jax.numpy as jnp
        >>> round(float(toeplitz_quadratic(jnp.array([2.0, 1.0]), jnp.array([3.0, 3.0]))), 4)
        6.0
    """
    return x @ toeplitz_solve(column, x)


@toeplitz_quadratic.defjvp
def _toeplitz_quadratic_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    (column, x), (column_dot, x_dot) = primals, tangents
    z = toeplitz_solve(column, x)
    return x @ z, 2.0 * (z @ x_dot) - _lag_sums(z, z) @ column_dot


def _lag_sums(a: Array, b: Array) -> Float[Array, " N"]:
    """Sums of `a_i b_j` over all pairs `|i - j| = k`, for k = 0, ..., N - 1."""
    n = a.shape[0]
    size = _fft_size(2 * n)
    cross = jnp.fft.irfft(jnp.conj(jnp.fft.rfft(a, size)) * jnp.fft.rfft(b, size), size)
    other = jnp.concatenate([jnp.zeros_like(cross[:1]), cross[: size - n : -1]])
    return cross[:n] + other


def _levinson(column: Array) -> tuple[Array, Array, Array]:
    """Log variances of the innovations, the last predictor and its variance."""
    n = column.shape[0]

    def step(carry: tuple[Array, Array], k: Array) -> tuple[tuple[Array, Array], Array]:
        a, v = _longer_predictor(column, *carry, k)
        return (a, v), jnp.log(v)

    first = jnp.zeros_like(column).at[0].set(1.0)
    (a, v), logs = lax.scan(step, (first, column[0]), jnp.arange(1, n))
    return jnp.concatenate([jnp.log(column[:1]), logs]), a, v


def toeplitz_draw(column: Float[Array, " N"], normals: Float[Array, " N"]) -> Float[Array, " N"]:
    """Map standard normals to a series whose covariance matrix has this first column.

    One by one, each given those before it (Hosking 1984): O(N^2), for every positive definite
    matrix.

    Example:
        >>> import jax.numpy as jnp
        >>> toeplitz_draw(jnp.array([4.0, 0.0]), jnp.array([1.0, 0.5])).tolist()
        [2.0, 1.0]
    """
    n = column.shape[0]

    def step(carry: Any, k: Array) -> tuple[Any, None]:
        a, v, x = carry
        a, v = _longer_predictor(column, a, v, k)
        past = jnp.roll(x[::-1], k)  # x[k - 1 - i] at i; a is zero beyond its order
        return (a, v, x.at[k].set(jnp.sqrt(v) * normals[k] - past[:-1] @ a[1:])), None

    first = jnp.zeros_like(column).at[0].set(1.0)
    start = jnp.zeros_like(column).at[0].set(jnp.sqrt(column[0]) * normals[0])
    (_, _, x), _ = lax.scan(step, (first, column[0], start), jnp.arange(1, n))
    return x


def _longer_predictor(column: Array, a: Array, v: Array, k: Any) -> tuple[Array, Array]:
    """Prediction error filter (`a_0 = 1`) and its variance, from order k - 1 to order k."""
    lags = jnp.arange(column.shape[0])
    past = jnp.where(lags < k, jnp.roll(column[::-1], k + 1), 0)  # column[k - i] at i
    reflection = -(a @ past) / v
    turned = jnp.where(lags <= k, jnp.roll(a[::-1], k + 1), 0)  # a[k - i] at i
    return a + reflection * turned, v * (1 - reflection) * (1 + reflection)


@jax.custom_jvp
def toeplitz_log_determinant(column: Float[Array, " N"]) -> Float[Array, ""]:
    """Log determinant of the symmetric positive definite Toeplitz matrix of this first column.

    O(N^2) operations, O(N) memory, NaN where the matrix is not positive definite. The gradient
    costs O(N log N) more: the sums along the diagonals of the inverse, by the formula of
    Gohberg and Semencul. It can be differentiated once.

    Example:
        >>> import jax.numpy as jnp
        >>> round(float(toeplitz_log_determinant(jnp.array([2.0, 1.0]))), 4)  # log 3
        1.0986
    """
    return _levinson(column)[0].sum()


@toeplitz_log_determinant.defjvp
def _toeplitz_log_determinant_jvp(
    primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    (column,), (column_dot,) = primals, tangents
    logs, a, v = _levinson(column)
    n = column.shape[0]
    # sum_i C^-1[i, i + k] = sum_j (n - k - 2 j) a_j a_(j + k) / v
    j = jnp.arange(n, dtype=column.dtype)
    size = _fft_size(2 * n)
    spectrum = jnp.fft.rfft(a, size)
    plain = jnp.fft.irfft(jnp.conj(spectrum) * spectrum, size)[:n]
    weighted = jnp.fft.irfft(jnp.conj(jnp.fft.rfft(j * a, size)) * spectrum, size)[:n]
    sums = ((n - j) * plain - 2.0 * weighted) / v
    twice = jnp.where(np.arange(n) == 0, 1.0, 2.0)
    return logs.sum(), (twice * sums) @ column_dot
