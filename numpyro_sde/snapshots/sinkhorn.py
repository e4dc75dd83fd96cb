r"""Static Schrödinger bridges by Sinkhorn's iteration.

Given the log kernel `log K` and two weight vectors a, b, the coupling

    pi_ij = a_i b_j exp(f_i + g_j) K_ij

with marginals a and b is the one of least relative entropy to `a_i b_j K_ij`. The potentials solve

    f_i = -log sum_j b_j K_ij exp(g_j),   g_j = -log sum_i a_i K_ij exp(f_i)

(Sinkhorn 1967; Léonard 2014, "A survey of the Schrödinger problem"). Each round takes one
step in logs, which no scale of the kernel can break, then multiplies matrices by vectors as long as
the scalings stay near one, and takes these into the potentials (Schmitzer 2019, "Stabilized
sparse scaling algorithms"): an iteration then costs two products in the place of two passes of
exponentials.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# Largest factor by which scalings may leave the potentials before these take them in.
_LARGEST_SCALING = 1e8
_MOST_INNER = 500
# Entries of a kernel that is held in memory; a larger one is evaluated anew, block by block.
MOST_ENTRIES = 25_000_000
_BLOCK_ENTRIES = 2_000_000


class Potentials(NamedTuple):
    """A solution of Sinkhorn's equations.

    Attributes:
        f: `(n,)`.
        g: `(m,)`.
        error: sum of the absolute errors of the first marginal; the second is exact.
        iterations: number of updates of both potentials.
    """

    f: Float[Array, " n"]
    g: Float[Array, " m"]
    error: Float[Array, ""]
    iterations: Int[Array, ""]


def solve(
    log_kernel: Float[Array, "n m"],
    a: Float[Array, " n"],
    b: Float[Array, " m"],
    *,
    tol: float | Array,
    max_iterations: int,
) -> Potentials:
    """Solve for the potentials of a kernel in memory.

    Args:
        log_kernel: log densities.
        a: weights of the rows, summing to one; zeros for rows that are not there.
        b: weights of the columns.
        tol: largest sum of the absolute errors of a marginal.
        max_iterations: bound on the iterations.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([0.0, 1.0])
        >>> log_kernel = -0.5 * (x[:, None] - x[None]) ** 2
        >>> half = jnp.array([0.5, 0.5])
        >>> found = solve(log_kernel, half, half, tol=1e-6, max_iterations=100)
        >>> coupling(log_kernel, half, half, found.f, found.g).sum(0).round(4).tolist()
        [0.5, 0.5]
    """
    log_b = _log(b)

    def one_round(carry: tuple[Array, Array, Array, Array]) -> Any:
        _, g, _, count = carry
        f = -jax.nn.logsumexp(log_kernel + (g + log_b)[None], axis=1)
        # Columns that no row reaches in this precision would be lost for good.
        g = -jax.nn.logsumexp(log_kernel + (f + _log(a))[:, None], axis=0)
        scaled = jnp.exp(log_kernel + f[:, None] + g[None])
        u, v, error, more = _scale(scaled, a, b, tol, max_iterations - count - 1)
        return f + jnp.log(u), g + jnp.log(v), error, count + 1 + more

    def unfinished(carry: tuple[Array, Array, Array, Array]) -> Array:
        return (carry[2] > tol) & (carry[3] < max_iterations)

    zero = jnp.zeros((), log_kernel.dtype)
    start = (zero + 0.0 * a, zero + 0.0 * b, zero + jnp.inf, jnp.zeros((), jnp.int32))
    return Potentials(*lax.while_loop(unfinished, one_round, start))


def _scale(A: Array, a: Array, b: Array, tol: float | Array, most: Array) -> tuple[Array, ...]:
    """Iterate scalings of rows and columns from one on; the last that are safe."""

    def rows(v: Array) -> Array:
        return jnp.where(a > 0, A @ (b * v), 1.0)

    def columns(u: Array) -> Array:
        return jnp.where(b > 0, (a * u) @ A, 1.0)

    def safe(x: Array) -> Array:
        return jnp.all((x < _LARGEST_SCALING) & (x > 1.0 / _LARGEST_SCALING))

    def step(carry: Any) -> Any:
        u, v, r, _, count, _ = carry
        new_u = 1.0 / r
        new_v = 1.0 / columns(new_u)
        fine = safe(new_u) & safe(new_v)
        u, v = jnp.where(fine, new_u, u), jnp.where(fine, new_v, v)
        r = rows(v)
        return u, v, r, jnp.sum(a * jnp.abs(u * r - 1.0)), count + 1, fine

    def going(carry: Any) -> Array:
        *_, error, count, fine = carry
        return fine & (error > tol) & (count < jnp.minimum(most, _MOST_INNER))

    u, v = jnp.ones_like(a), jnp.ones_like(b)
    r = rows(v)
    error = jnp.sum(a * jnp.abs(r - 1.0))
    start = (u, v, r, error, jnp.zeros((), jnp.int32), jnp.array(True))
    u, v, _, error, count, _ = lax.while_loop(going, step, start)
    return u, v, error, count


def solve_in_blocks(
    block: Callable[[Any], Float[Array, "r m"]],
    num_blocks: int,
    a: Float[Array, " n"],
    b: Float[Array, " m"],
    *,
    tol: float | Array,
    max_iterations: int,
) -> Potentials:
    """Solve for the potentials of a kernel that is evaluated anew in each iteration, in logs.

    One pass over blocks of rows updates both potentials: those of a block's rows need no other
    block, and what its rows give to the columns is summed up.

    Args:
        block: log densities of block number k, all blocks of one size.
        num_blocks: their number; it divides n.
        a: weights of the rows.
        b: weights of the columns.
        tol: as in `solve`.
        max_iterations: as in `solve`.
    """
    log_a, log_b, shares = _log(a).reshape(num_blocks, -1), _log(b), a.reshape(num_blocks, -1)

    def one_round(carry: tuple[Array, Array, Array, Array]) -> Any:
        f, g, _, count = carry

        def of_block(total: Array, now: Any) -> tuple[Array, tuple[Array, Array]]:
            k, log_share, share, old = now
            kernel = block(k)
            new = -jax.nn.logsumexp(kernel + (g + log_b)[None], axis=1)
            # Rows of the coupling before this update: how far it was from its marginal.
            miss = jnp.sum(share * jnp.abs(jnp.exp(old - new) - 1.0))
            given = jax.nn.logsumexp(kernel + (new + log_share)[:, None], axis=0)
            return jnp.logaddexp(total, given), (new, miss)

        empty = jnp.full(b.shape, -jnp.inf, b.dtype)
        now = (jnp.arange(num_blocks), log_a, shares, f)
        total, (f, misses) = lax.scan(of_block, empty, now)
        return f, -total, jnp.where(count > 0, jnp.sum(misses), jnp.inf), count + 1

    def unfinished(carry: tuple[Array, Array, Array, Array]) -> Array:
        return (carry[2] > tol) & (carry[3] < max_iterations)

    start = (
        jnp.zeros_like(shares),
        jnp.zeros_like(b),
        jnp.full((), jnp.inf, a.dtype),
        jnp.zeros((), jnp.int32),
    )
    f, g, error, count = lax.while_loop(unfinished, one_round, start)
    return Potentials(f.ravel(), g, error, count)


def blocks_of(num_rows: int, num_columns: int) -> int:
    """Number of blocks of rows for a kernel of this shape; 1 where it is held in memory."""
    if num_rows * num_columns <= MOST_ENTRIES:
        return 1
    wanted = math.ceil(num_rows * num_columns / _BLOCK_ENTRIES)
    while num_rows % wanted:
        wanted += 1
    return wanted


def coupling(
    log_kernel: Float[Array, "n m"],
    a: Float[Array, " n"],
    b: Float[Array, " m"],
    f: Float[Array, " n"],
    g: Float[Array, " m"],
) -> Float[Array, "n m"]:
    """The coupling of two potentials."""
    return a[:, None] * b[None] * jnp.exp(log_kernel + f[:, None] + g[None])


def _log(weights: Array) -> Array:
    there = weights > 0
    return jnp.where(there, jnp.log(jnp.where(there, weights, 1.0)), -jnp.inf)
