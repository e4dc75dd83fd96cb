"""The cell problem of homogenisation, solved in polynomials of the fast state.

`-L Phi = F` with L the generator of the frozen fast process, by a Galerkin method in the fast law:
Pavliotis and Stuart (2008), chapter 11.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from numpyro_sde.checks.numbers import at_least
from numpyro_sde.multiscale.slow_fast import as_columns, call, slow_squares

# A force whose mean is above this share of its size has no limit of this kind.
MOST_MEAN = 1e-3


class CellProblem(eqx.Module):
    """Homogenise by a Galerkin solution of the cell problem in polynomials of the fast state.

    Exact where the fast dynamics are linear and the forcing is a polynomial of at most this
    degree; spectrally accurate for smooth coefficients otherwise.

    Args:
        degree: total degree of the polynomials.

    Raises:
        ValueError: a degree below 1.

    Example:
        >>> from numpyro_sde.multiscale import CellProblem
        >>> CellProblem(degree=4).degree
        4
    """

    degree: int = eqx.field(static=True, default=4)

    def __check_init__(self) -> None:
        at_least("degree", self.degree, 1)


def _polynomials(dim: int, degree: int) -> np.ndarray:
    """Exponents of the monomials of total degree 1 to `degree`, shape `(n, d)`."""
    powers = itertools.product(range(degree + 1), repeat=dim)
    return np.array([k for k in powers if 0 < sum(k) <= degree])


def _monomials(y: Array, exponents: np.ndarray) -> Array:
    """Values of monomials at one fast state, by repeated products (no powers of zero)."""
    flat = jnp.atleast_1d(y)
    powers = [jnp.ones_like(flat)]
    for _ in range(int(exponents.max())):
        powers.append(powers[-1] * flat)
    table = jnp.stack(powers)
    return jnp.prod(table[exponents, np.arange(exponents.shape[1])], axis=-1)


def _generator(drift: Array, noise: Array, phi: Callable[[Array], Array], y: Array) -> Array:
    """`L phi = g . grad phi + 1/2 sum_j b_j b_j : hess phi` at one fast state."""
    flat = y.ravel()

    def of_flat(v: Array) -> Array:
        return phi(v.reshape(y.shape))

    _, value = jax.jvp(of_flat, (flat,), (drift.ravel(),))
    for j in range(noise.shape[1]):
        column = noise[:, j]

        def along(v: Array, column: Array = column) -> Array:
            return jax.jvp(of_flat, (v,), (column,))[1]

        value = value + 0.5 * jax.jvp(along, (flat,), (column,))[1]
    return value


def galerkin(
    functions: dict[str, Any], nodes: Any, degree: int, t: Any, x: Any, p: Any
) -> tuple[Array, Array]:
    """Effective drift and square at one slow state by the cell problem in polynomials."""
    x = jnp.asarray(x, jnp.result_type(float, x))
    y, weights = nodes(t, x, p)
    exponents = _polynomials(math.prod(y.shape[1:]), degree)
    # The basis is centred and scaled for conditioning alone: its span does not depend on that.
    loc = lax.stop_gradient(jnp.tensordot(weights, y, axes=1))
    scale = lax.stop_gradient(jnp.sqrt(jnp.tensordot(weights, (y - loc[None]) ** 2, axes=1)))

    def basis(one: Array) -> Array:
        return _monomials((one - loc) / scale, exponents)

    def force(x: Array, one: Array) -> Array:
        return call(functions["slow_forcing"], t, x, one, p)

    def coefficients(x: Array) -> Array:
        y, weights = nodes(t, x, p)

        def at(one: Array) -> tuple[Array, Array, Array]:
            drift = call(functions["fast_drift"], t, x, one, p)
            noise = as_columns(call(functions["fast_diffusion"], t, x, one, p), one)
            return basis(one), _generator(drift, noise, basis, one), force(x, one)

        phi, generated, forces = jax.vmap(at)(y)
        tested = phi - jnp.tensordot(weights, phi, axes=1)[None]
        M = -jnp.einsum("l,li,lj->ij", weights, tested, generated)
        return jnp.linalg.solve(M, jnp.tensordot((weights[:, None] * tested).T, forces, axes=1))

    solution = coefficients(x)
    slopes = jax.jacfwd(coefficients)(x)  # (n, *slow, *slow)
    values = jax.vmap(basis)(y)
    forces = jax.vmap(lambda one: force(x, one))(y)
    cell = jnp.tensordot(values, solution, axes=1)
    by_x = jnp.tensordot(values, slopes, axes=1)
    drift = by_x * forces if x.ndim == 0 else jnp.einsum("lij,lj->li", by_x, forces)
    drift = drift + jax.vmap(lambda one: call(functions["slow_drift"], t, x, one, p))(y)
    if "fast_forcing" in functions:

        def response(one: Array) -> Array:
            push = call(functions["fast_forcing"], t, x, one, p)
            return jnp.tensordot(jax.jvp(basis, (one,), (push,))[1], solution, axes=1)

        drift = drift + jax.vmap(response)(y)
    square = _squares(functions, t, x, p, y, forces, cell)
    mean = jnp.tensordot(weights, forces, axes=1)
    size = jnp.sqrt(jnp.tensordot(weights, forces**2, axes=1))
    ok = jnp.all(jnp.abs(mean) <= MOST_MEAN * size)
    drift = jnp.tensordot(weights, drift, axes=1)
    square = jnp.tensordot(weights, square, axes=1)
    return jnp.where(ok, drift, jnp.nan), jnp.where(ok, square, jnp.nan)


def _squares(
    functions: dict[str, Any], t: Any, x: Array, p: Any, y: Array, forces: Array, cell: Array
) -> Array:
    """`s s' + F Phi' + Phi F'` at every node."""
    slow = slow_squares(functions, t, x, p, y)
    if x.ndim == 0:
        return slow + 2.0 * forces * cell
    cross = jnp.einsum("li,lj->lij", forces, cell)
    return slow + cross + cross.swapaxes(1, 2)
