"""Products with transition matrices of which only the first rows are full.

A state that a bank of relaxations drives, as one with fractional noise is, moves by such a matrix:
the state's own rows read the bank, each process of the bank reads itself alone. A product takes the
square of the number of states then, not its cube.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from numpyro_sde.linear.small import diagonal, matmul, matvec, outer, transpose


def is_dense(F: Array, coupled: int | None) -> bool:
    """Whether nothing is known of the rows of `F` that would save work.

    Example:
        >>> is_dense(jnp.eye(3), None), is_dense(jnp.eye(3), 1)
        (True, False)
    """
    return coupled is None or coupled >= F.shape[-1]


def times(
    F: Float[Array, "*n d d"], Z: Float[Array, "*n d m"], coupled: int | None
) -> Float[Array, "*n d m"]:
    """The product `F Z`.

    Args:
        F: matrices; what stands off the diagonal in a row from `coupled` on is not read.
        Z: matrices.
        coupled: number of leading rows that are full; None for all.

    Example:
        >>> F = jnp.array([[1.0, 2.0], [0.0, 3.0]])
        >>> times(F, jnp.ones((2, 1)), 1)[:, 0].tolist()
        [3.0, 3.0]
    """
    if is_dense(F, coupled):
        return matmul(F, Z)
    full = matmul(F[..., :coupled, :], Z)
    alone = diagonal(F)[..., coupled:, None] * Z[..., coupled:, :]
    return jnp.concatenate([full, alone], axis=-2)


def transposed_times(
    F: Float[Array, "*n d d"], Z: Float[Array, "*n d m"], coupled: int | None
) -> Float[Array, "*n d m"]:
    """The product `F' Z`, of the same matrices as in `times`.

    Example:
        >>> F = jnp.array([[1.0, 2.0], [0.0, 3.0]])
        >>> transposed_times(F, jnp.ones((2, 1)), 1)[:, 0].tolist()
        [1.0, 5.0]
    """
    if is_dense(F, coupled):
        return matmul(transpose(F), Z)
    full = matmul(transpose(F[..., :coupled, :]), Z[..., :coupled, :])
    alone = diagonal(F)[..., coupled:, None] * Z[..., coupled:, :]
    return jnp.concatenate([full[..., :coupled, :], full[..., coupled:, :] + alone], axis=-2)


def through(
    product: Callable[[Array], Array],
    a: Float[Array, " d"],
    b: Float[Array, " d"],
    Z: Float[Array, "d d+1"],
) -> Float[Array, "d d+1"]:
    """`[L P L' | L m]` of `Z = [P | m]`, where `L Z = product(Z) - a b' Z`.

    Example:
        >>> e = jnp.array([1.0, 0.0])
        >>> through(lambda Z: 2.0 * Z, e, e, jnp.ones((2, 3))).tolist()
        [[1.0, 2.0, 1.0], [2.0, 4.0, 2.0]]
    """
    d = Z.shape[0]
    W = product(Z) - outer(a, matvec(transpose(Z), b))
    P = transpose(product(transpose(W[:, :d]))) - outer(matvec(W[:, :d], b), a)
    return jnp.concatenate([P, W[:, d:]], axis=-1)


def slope_of_transition(
    F: Float[Array, "n d d"],
    n: Float[Array, "k d"],
    m: Float[Array, "k d"],
    G: Float[Array, "k d d"],
    P: Float[Array, "k d d"],
    coupled: int | None,
) -> Float[Array, "n d d"]:
    """`n m' + 2 G F P` of each step, or of all in sum where one `F` stands at every step.

    Zero for the elements that are not read.

    Example:
        >>> one = jnp.ones((3, 2, 2))
        >>> slope_of_transition(one[:1], one[..., 0], one[..., 0], one, one, 1).tolist()
        [[[21.0, 21.0], [0.0, 21.0]]]
    """
    shared, dense = F.shape[0] == 1 and n.shape[0] > 1, is_dense(F, coupled)
    FP = times(F, P, coupled)
    top, ahead = (G, n) if dense else (G[:, :coupled], n[:, :coupled])
    if shared:
        sum_of = partial(jnp.einsum, precision=lax.Precision.HIGHEST)
        full = (sum_of("ka,kb->ab", ahead, m) + 2 * sum_of("kab,kbc->ac", top, FP))[None]
    else:
        full = outer(ahead, m) + 2 * matmul(top, FP)
    if dense:
        return full
    alone = n * m + 2 * jnp.sum(G * transpose(FP), axis=-1)
    alone = jnp.sum(alone, axis=0, keepdims=True) if shared else alone
    eye = jnp.eye(F.shape[-1], dtype=F.dtype)[None, coupled:]
    return jnp.concatenate([full, alone[:, coupled:, None] * eye], axis=-2)
