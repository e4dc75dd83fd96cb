"""Operations on small matrices, written so that a compiler can fuse them.

The recursions of state-space models act on matrices of two to six rows, where the cost of a
LAPACK call is the call. Here every operation is arithmetic on array elements, factorisations
and solves unrolled over nested lists of scalars. Each scalar may carry leading batch dimensions, so
the same code serves one matrix, a stack of them, and `jax.vmap`. Above `MAX_UNROLLED` rows
(a static choice: shapes are known when tracing) the dense routines of `jax.numpy` take over.

Everything is differentiable in both modes and works in float32 and float64. Input that is not
positive definite gives NaN, as LAPACK under JAX does, never a finite wrong number.

Sources: G. H. Golub and C. F. Van Loan, Matrix Computations (4th ed., 2013), algorithms 4.2.1
(Cholesky), 3.1.1 and 3.1.2 (substitution), 3.4.1 (elimination with partial pivoting) and
5.2.6 (modified Gram-Schmidt).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from numpyro_sde.linear.ranks import equal_rank
from numpyro_sde.linear.ranks import outer as outer

MAX_UNROLLED = 6
"""Largest number of rows for which factorisations and solves are unrolled."""

_MAX_FUSED = 16  # largest inner dimension for which a product is broadcast and summed

Rows = list[list[Array]]  # one matrix as nested lists of scalars, each of the batch shape


def _rows(A: Array) -> Rows:
    return [[A[..., i, j] for j in range(A.shape[-1])] for i in range(A.shape[-2])]


def _stack(rows: Rows) -> Array:
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def _square(A: Array, name: str) -> int:
    if A.ndim < 2 or A.shape[-1] != A.shape[-2]:
        raise ValueError(f"{name} must be a square matrix (..., d, d); got shape {A.shape}")
    return int(A.shape[-1])


# --- products ---------------------------------------------------------------------------------


def matmul(A: Float[Array, "*batch m k"], B: Float[Array, "*batch k n"]) -> Array:
    """Matrix product without a library call where the inner dimension is small.

    A product of two single matrices, the kind inside a loop, is a broadcast multiplication
    and one sum, which compiles to one kernel; a product of stacks is unrolled over the inner
    dimension, which vectorises over the stack. (Measured, XLA on a CPU, d = 4: a scan with the
    first is 4 times faster than with the second, and a stack of 1,000 with the second 4 times
    faster than with the first. Unrolled where the stack is of one, the gradient of a matrix
    exponential of ten rows took jaxlib 0.12 8.6 s to compile instead of 1.9.)

    Args:
        A: left factor, shape `(..., m, k)`.
        B: right factor, shape `(..., k, n)`.

    Returns:
        The product, shape `(..., m, n)`.

    Raises:
        ValueError: if the inner dimensions differ.

    Example:
        >>> import jax.numpy as jnp
        >>> float(matmul(jnp.eye(2), jnp.full((2, 2), 3.0))[0, 1])
        3.0
    """
    k = A.shape[-1]
    if k != B.shape[-2]:
        raise ValueError(f"matmul: inner dimensions differ in {A.shape} and {B.shape}")
    if k > _MAX_FUSED:
        return jnp.matmul(A, B, precision=lax.Precision.HIGHEST)
    A, B = equal_rank(A, B)
    if math.prod(A.shape[:-2]) == math.prod(B.shape[:-2]) == 1:
        return (A[..., :, :, None] * B[..., None, :, :]).sum(-2)
    out = A[..., :, 0, None] * B[..., 0, None, :]
    for i in range(1, k):
        out = out + A[..., :, i, None] * B[..., i, None, :]
    return out


def matvec(A: Float[Array, "*batch m k"], x: Float[Array, "*batch k"]) -> Array:
    """Product of a matrix and a vector, shapes `(..., m, k)` and `(..., k)`.

    Raises:
        ValueError: if the inner dimensions differ.

    Example:
        >>> import jax.numpy as jnp
        >>> matvec(2.0 * jnp.eye(2), jnp.array([1.0, 3.0])).tolist()
        [2.0, 6.0]
    """
    if A.shape[-1] != x.shape[-1]:
        raise ValueError(f"matvec: inner dimensions differ in {A.shape} and {x.shape}")
    A, x = equal_rank(A, x[..., None, :])
    return (A * x).sum(-1)


def transpose(A: Float[Array, "*batch m n"]) -> Float[Array, "*batch n m"]:
    """Swap the last two axes.

    Example:
        >>> import jax.numpy as jnp
        >>> transpose(jnp.zeros((5, 2, 3))).shape
        (5, 3, 2)
    """
    return jnp.swapaxes(A, -1, -2)


def diagonal(A: Float[Array, "*batch d d"]) -> Float[Array, "*batch d"]:
    """Diagonal of a matrix, as a strided slice.

    `jnp.diagonal` is a gather, its derivative a scatter, and jaxlib 0.12 makes no kernel of a loop
    that has one: three times the time of a gradient through an extended Kalman filter.

    Example:
        >>> import jax.numpy as jnp
        >>> diagonal(jnp.array([[1.0, 2.0], [3.0, 4.0]])).tolist()
        [1.0, 4.0]
    """
    d = _square(A, "A")
    return A.reshape(*A.shape[:-2], d * d)[..., :: d + 1]


def symmetrize(P: Float[Array, "*batch d d"]) -> Float[Array, "*batch d d"]:
    """Average a matrix with its transpose.

    Example:
        >>> import jax.numpy as jnp
        >>> symmetrize(jnp.array([[1.0, 2.0], [4.0, 5.0]])).tolist()
        [[1.0, 3.0], [3.0, 5.0]]
    """
    return 0.5 * (P + transpose(P))


def congruence(A: Float[Array, "*batch m d"], P: Float[Array, "*batch d d"]) -> Array:
    """Symmetric product `A P A'` of shape `(..., m, m)`, for symmetric `P`.

    Example:
        >>> import jax.numpy as jnp
        >>> congruence(jnp.array([[1.0, 2.0]]), jnp.eye(2)).tolist()
        [[5.0]]
    """
    return symmetrize(matmul(matmul(A, P), transpose(A)))


# --- packing ----------------------------------------------------------------------------------


def packed_size(d: int) -> int:
    """Number of elements in the lower triangle of a `d x d` matrix.

    Example:
        >>> packed_size(3)
        6
    """
    return d * (d + 1) // 2


def pack(P: Float[Array, "*batch d d"]) -> Float[Array, "*batch n"]:
    """Lower triangle of a matrix as a vector, row by row; `n = d (d + 1) / 2`.

    Raises:
        ValueError: if the matrix is not square.

    Example:
        >>> import jax.numpy as jnp
        >>> pack(jnp.array([[1.0, 2.0], [2.0, 3.0]])).tolist()
        [1.0, 2.0, 3.0]
    """
    i, j = np.tril_indices(_square(P, "P"))
    return P[..., i, j]


def unpack(v: Float[Array, "*batch n"], *, symmetric: bool = True) -> Float[Array, "*batch d d"]:
    """Matrix whose lower triangle is `v`, the inverse of `pack`.

    Args:
        v: packed lower triangle, shape `(..., d (d + 1) / 2)`.
        symmetric: mirror the triangle; otherwise the upper part is zero.

    Raises:
        ValueError: if the length of `v` is not a triangular number.

    Example:
        >>> import jax.numpy as jnp
        >>> unpack(jnp.array([1.0, 2.0, 3.0])).tolist()
        [[1.0, 2.0], [2.0, 3.0]]
    """
    n = v.shape[-1]
    d = (math.isqrt(8 * n + 1) - 1) // 2
    if packed_size(d) != n:
        raise ValueError(f"unpack: a packed triangle has d (d + 1) / 2 elements, got {n}")
    index = np.zeros((d, d), dtype=int)
    i, j = np.tril_indices(d)
    index[i, j] = index[j, i] = np.arange(n)
    A = v[..., index]
    return A if symmetric else jnp.where(np.tril(np.ones((d, d), bool)), A, 0)


# --- symmetric positive definite systems ------------------------------------------------------


def _cholesky_rows(A: Rows) -> Rows:
    """Lower factor (row i has i + 1 entries) of a matrix given by its lower triangle."""
    L: Rows = []
    for i in range(len(A)):
        row: list[Array] = []
        for j in range(i):
            s = A[i][j]
            for k in range(j):
                s = s - row[k] * L[j][k]
            row.append(s / L[j][j])
        s = A[i][i]
        for k in range(i):
            s = s - row[k] * row[k]
        # sqrt of a negative number is NaN; a zero pivot must not pass for positive definite.
        row.append(jnp.sqrt(jnp.where(s > 0, s, jnp.nan)))
        L.append(row)
    return L


def _lower(L: Rows) -> Array:
    d, zero = len(L), jnp.zeros_like(L[0][0])
    return _stack([L[i] + [zero] * (d - 1 - i) for i in range(d)])


def cholesky(A: Float[Array, "*batch d d"]) -> Float[Array, "*batch d d"]:
    """Lower Cholesky factor `L` with `L L' = A`; NaN where `A` is not positive definite.

    Only the lower triangle of `A` is read when `d <= MAX_UNROLLED`.

    Raises:
        ValueError: if the matrix is not square.

    Example:
        >>> import jax.numpy as jnp
        >>> cholesky(jnp.array([[4.0, 2.0], [2.0, 5.0]])).tolist()
        [[2.0, 0.0], [1.0, 2.0]]
    """
    if _square(A, "A") > MAX_UNROLLED:
        return jnp.linalg.cholesky(A)
    return _lower(_cholesky_rows(_rows(A)))


def _by_columns(step: Callable[[Array, Any], tuple[Array, Array]], A: Array, d: int) -> Array:
    """Columns `step` makes of A for j = 0, ..., d - 1: unrolled for small d, else a scan."""
    if d > MAX_UNROLLED:
        return jnp.moveaxis(lax.scan(step, A, jnp.arange(d))[1], 0, -1)
    columns = []
    for j in range(d):
        A, column = step(A, j)
        columns.append(column)
    return jnp.stack(columns, axis=-1)


def psd_factor(A: Float[Array, "*batch d d"]) -> Float[Array, "*batch d d"]:
    """Lower factor `L` with `L L' = A` of a positive semi-definite matrix.

    A pivot below `8 d eps` times its diagonal element is rounding: its column is zero, with
    zero derivative. A pivot below minus `1e4` times that and minus `1e-6` of the diagonal is a
    matrix that is not positive semi-definite, and gives NaN: without exchanges of rows small
    pivots magnify rounding, to 1e-9 of the diagonal for the bank of a fractional noise.

    Example:
        >>> import jax.numpy as jnp
        >>> psd_factor(jnp.ones((2, 2))).tolist()
        [[1.0, 0.0], [1.0, 0.0]]
    """
    d = _square(A, "A")
    size = jnp.abs(diagonal(A))
    floor = 8 * d * jnp.finfo(A.dtype).eps * size
    least = -jnp.maximum(1e4 * floor, 1e-6 * size)
    index = np.arange(d)

    def step(A: Array, j: Any) -> tuple[Array, Array]:
        pivot, low = A[..., j, j], floor[..., j]
        keep = pivot > low
        scale = jnp.where(keep, 1 / jnp.sqrt(jnp.where(keep, pivot, 1)), 0)
        scale = jnp.where(pivot >= least[..., j], scale, jnp.nan)
        column = jnp.where(index >= j, A[..., :, j] * scale[..., None], 0)
        return A - outer(column, column), column

    return _by_columns(step, A, d)


def _forward_rows(L: Rows, b: list[Array]) -> list[Array]:
    x: list[Array] = []
    for i, s in enumerate(b):
        for k in range(i):
            s = s - L[i][k] * x[k]
        x.append(s / L[i][i])
    return x


def _backward_rows(L: Rows, b: list[Array]) -> list[Array]:
    """Solve `L' x = b`."""
    d = len(b)
    x: list[Array] = [b[-1]] * d
    for i in reversed(range(d)):
        s = b[i]
        for k in range(i + 1, d):
            s = s - L[k][i] * x[k]
        x[i] = s / L[i][i]
    return x


def solve_lower(
    L: Float[Array, "*batch d d"], B: Float[Array, "*batch d n"], *, transposed: bool = False
) -> Float[Array, "*batch d n"]:
    """Solve `L X = B`, or `L' X = B` with `transposed`, for lower triangular `L`.

    Args:
        L: lower triangular matrix, shape `(..., d, d)`; its upper part is not read.
        B: right-hand sides, shape `(..., d, n)`.
        transposed: solve with the transpose of `L`.

    Raises:
        ValueError: if the shapes do not match.

    Example:
        >>> import jax.numpy as jnp
        >>> L = jnp.array([[2.0, 0.0], [1.0, 2.0]])
        >>> solve_lower(L, jnp.array([[2.0], [5.0]])).tolist()
        [[1.0], [2.0]]
    """
    d = _square(L, "L")
    if B.ndim < 2 or B.shape[-2] != d:
        raise ValueError(f"B must have shape (..., {d}, n) for L {L.shape}; got {B.shape}")
    if d > MAX_UNROLLED:
        batch = jnp.broadcast_shapes(L.shape[:-2], B.shape[:-2])
        L, B = (jnp.broadcast_to(M, batch + M.shape[-2:]) for M in (L, B))
        return lax.linalg.triangular_solve(L, B, left_side=True, lower=True, transpose_a=transposed)
    L, B = equal_rank(L, B)
    # each "scalar" of the right-hand side is one row of B, so n costs no extra operations
    rows = [[x[..., None] for x in row] for row in _rows(L)]
    solver = _backward_rows if transposed else _forward_rows
    return jnp.stack(solver(rows, [B[..., i, :] for i in range(d)]), axis=-2)


def cho_solve(L: Float[Array, "*batch d d"], B: Float[Array, "*batch d n"]) -> Array:
    """Solve `L L' X = B` for a lower Cholesky factor `L`, shapes as in `solve_lower`.

    Example:
        >>> import jax.numpy as jnp
        >>> cho_solve(2.0 * jnp.eye(1), jnp.array([[8.0]])).tolist()
        [[2.0]]
    """
    return solve_lower(L, solve_lower(L, B), transposed=True)


def cho_logdet(L: Float[Array, "*batch d d"]) -> Float[Array, "*batch"]:
    """Log-determinant of `L L'` for a lower Cholesky factor `L`.

    Example:
        >>> import jax.numpy as jnp
        >>> float(cho_logdet(jnp.eye(3)))
        0.0
    """
    return 2 * jnp.log(diagonal(L)).sum(-1)


def spd_solve(A: Float[Array, "*batch d d"], B: Float[Array, "*batch d n"]) -> Array:
    """Solve `A X = B` for symmetric positive definite `A`; NaN where it is not.

    Example:
        >>> import jax.numpy as jnp
        >>> spd_solve(4.0 * jnp.eye(2), jnp.ones((2, 1))).tolist()
        [[0.25], [0.25]]
    """
    return cho_solve(cholesky(A), B)


def spd_inverse(A: Float[Array, "*batch d d"]) -> Float[Array, "*batch d d"]:
    """Inverse of a symmetric positive definite matrix; NaN where it is not.

    Example:
        >>> import jax.numpy as jnp
        >>> spd_inverse(4.0 * jnp.eye(1)).tolist()
        [[0.25]]
    """
    L = cholesky(A)
    eye = jnp.broadcast_to(jnp.eye(A.shape[-1], dtype=A.dtype), A.shape)
    half = solve_lower(L, eye)
    return matmul(transpose(half), half)


def spd_logdet(A: Float[Array, "*batch d d"]) -> Float[Array, "*batch"]:
    """Log-determinant of a symmetric positive definite matrix; NaN where it is not.

    Example:
        >>> import jax.numpy as jnp
        >>> round(float(spd_logdet(4.0 * jnp.eye(2))), 4)
        2.7726
    """
    return cho_logdet(cholesky(A))


# --- general systems and orthogonal reduction -------------------------------------------------


def solve(A: Float[Array, "*batch d d"], B: Float[Array, "*batch d n"]) -> Array:
    """Solve `A X = B` for a general square `A`, by elimination with partial pivoting.

    Args:
        A: square matrix, shape `(..., d, d)`; a singular one gives values that are not finite.
        B: right-hand sides, shape `(..., d, n)`.

    Raises:
        ValueError: if the shapes do not match.

    Example:
        >>> import jax.numpy as jnp
        >>> A = jnp.array([[0.0, 2.0], [1.0, 0.0]])
        >>> solve(A, jnp.array([[4.0], [3.0]])).tolist()
        [[3.0], [2.0]]
    """
    d = _square(A, "A")
    if B.ndim < 2 or B.shape[-2] != d:
        raise ValueError(f"B must have shape (..., {d}, n) for A {A.shape}; got {B.shape}")
    batch = jnp.broadcast_shapes(A.shape[:-2], B.shape[:-2])
    A, B = (jnp.broadcast_to(M, batch + M.shape[-2:]) for M in (A, B))
    if d > MAX_UNROLLED:
        return jnp.linalg.solve(A, B)
    rows = [jnp.concatenate([A[..., i, :], B[..., i, :]], axis=-1) for i in range(d)]
    for j in range(d):
        for i in range(j + 1, d):  # bring the row with the largest pivot to position j
            swap = (jnp.abs(rows[i][..., j]) > jnp.abs(rows[j][..., j]))[..., None]
            rows[i], rows[j] = (
                jnp.where(swap, rows[j], rows[i]),
                jnp.where(swap, rows[i], rows[j]),
            )
        for i in range(j + 1, d):
            factor = rows[i][..., j] / rows[j][..., j]
            rows[i] = rows[i] - factor[..., None] * rows[j]
    x: list[Array] = [rows[0]] * d
    for i in reversed(range(d)):
        s = rows[i][..., d:]
        for k in range(i + 1, d):
            s = s - rows[i][..., k, None] * x[k]
        x[i] = s / rows[i][..., i, None]
    return jnp.stack(x, axis=-2)


def inverse_one_plus(H: Float[Array, "*batch d d"], Q: Float[Array, "*batch d d"]) -> Array:
    """Inverse of `I + H Q` for symmetric positive semi-definite `H` and `Q`.

    It exists for every such pair, singular ones included, and neither is inverted: the step
    that a backward information filter and a parallel-in-time filter have in common.

    Example:
        >>> import jax.numpy as jnp
        >>> inverse_one_plus(jnp.eye(2), 3.0 * jnp.eye(2)).tolist()
        [[0.25, 0.0], [0.0, 0.25]]
    """
    eye = jnp.eye(_square(H, "H"), dtype=jnp.result_type(H, Q))
    one, HQ = equal_rank(eye, matmul(H, Q))
    return solve(one + HQ, eye)


def tria(A: Float[Array, "*batch d m"]) -> Float[Array, "*batch d d"]:
    """Lower triangular `L` with `L L' = A A'` and a diagonal that is not negative.

    The product `A A'` is not formed: row `i` of `L` is accurate to rounding relative to the
    norm of row `i` of `A`. What is left of a row that depends on the earlier ones is rounding:
    below `4 d eps` of the row it counts as zero, with zero derivative. Modified Gram-Schmidt.

    Example:
        >>> import jax.numpy as jnp
        >>> tria(jnp.array([[3.0, 4.0]])).tolist()
        [[5.0]]
    """
    d = A.shape[-2]
    # Rows scaled to size one: squares of very small elements would underflow.
    size = lax.stop_gradient(jnp.max(jnp.abs(A), axis=-1, keepdims=True))
    size = jnp.where(size > 0, size, 1)
    floor, index = (4 * d * jnp.finfo(A.dtype).eps) ** 2, np.arange(d)

    def step(A: Array, j: Any) -> tuple[Array, Array]:
        square = (A[..., j, :] ** 2).sum(-1)
        drop = square <= floor  # False for NaN, which stays
        norm = jnp.sqrt(jnp.where(drop, 1, square))
        direction = jnp.where(drop[..., None], 0, A[..., j, :]) / norm[..., None]
        column = jnp.where(index >= j, matvec(A, direction), 0)
        return A - outer(column, direction), column

    return size * _by_columns(step, A / size, d)
