"""Coefficients tabulated on a grid of slow states, and read off by smooth interpolation.

A path of N steps averaged over L nodes costs N L evaluations of the slow drift; a table of G states
costs G L and one interpolation a step. For a scalar slow variable each cell holds the cubic that
matches value and exact derivative at both ends (error `h^4 / 384` times the fourth derivative);
for a vector the tensor product of four-point Lagrange polynomials (error of order `h^4`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


class Table(NamedTuple):
    """A regular grid of slow states.

    Outside of it coefficients are NaN, never extrapolated: choose it to hold the whole path,
    with room for the states that a latent path may visit.

    Attributes:
        low: smallest state; a tuple for a vector.
        high: largest state.
        num: grid points in each dimension, at least 4.

    Example:
        >>> from numpyro_sde.multiscale import Table
        >>> Table(-2.0, 2.0, 5).states().tolist()
        [-2.0, -1.0, 0.0, 1.0, 2.0]
    """

    low: float | tuple[float, ...]
    high: float | tuple[float, ...]
    num: int | tuple[int, ...] = 64

    @property
    def shape(self) -> tuple[int, ...]:
        """Grid points along each dimension; one entry for a scalar."""
        return self.num if isinstance(self.num, tuple) else (self.num,)

    def axes(self) -> list[np.ndarray]:
        """Grid states along each dimension."""
        ends = zip(np.atleast_1d(self.low), np.atleast_1d(self.high), self.shape, strict=True)
        return [np.linspace(a, b, n) for a, b, n in ends]

    def states(self) -> np.ndarray:
        """All grid states, shape `(G,)` for a scalar, `(G, d)` for a vector."""
        if np.ndim(self.low) == 0:
            return self.axes()[0]
        return np.stack(np.meshgrid(*self.axes(), indexing="ij"), axis=-1).reshape(
            -1, len(self.shape)
        )


def as_table(table: Any, slow_shape: tuple[int, ...]) -> Table | None:
    """A `Table` for states of this shape, from one, `(low, high, num)`, or an array of states.

    Raises:
        TypeError: anything else.
        ValueError: ends out of order or not finite, fewer than 4 states, states that are not
            equally spaced, or a table for another number of slow coordinates.
    """
    if table is None:
        return None
    if isinstance(table, tuple) and not isinstance(table, Table):
        if len(table) not in (2, 3):
            raise TypeError(f"table must be (low, high, num), got {len(table)} entries")
        table = Table(*table)
    elif not isinstance(table, Table):
        states = np.asarray(table, np.float64)
        if states.ndim != 1 or len(states) < 2 or not np.allclose(np.diff(states, 2), 0, atol=1e-6):
            raise ValueError("table must be (low, high, num) or an array of equally spaced states")
        table = Table(float(states[0]), float(states[-1]), len(states))
    size = math.prod(slow_shape)
    low, high = (np.ravel(np.asarray(end, np.float64)) for end in (table.low, table.high))
    if len(low) != size or len(high) != size:
        raise ValueError(
            f"table must have low and high for {size} slow coordinate(s), got {table.low} and "
            f"{table.high}"
        )
    if not (np.all(np.isfinite(low)) and np.all(np.isfinite(high)) and np.all(low < high)):
        raise ValueError(f"table must have finite low < high, got {table.low} and {table.high}")
    num = tuple(int(n) for n in np.broadcast_to(table.num, (size,)))
    if min(num) < 4:
        raise ValueError(f"table must have at least 4 states a dimension, got {table.num}")
    if slow_shape == ():
        return Table(float(low[0]), float(high[0]), num[0])
    return Table(tuple(map(float, low)), tuple(map(float, high)), num)


def tabulate(table: Table, fn: Callable[[Array], Array]) -> Array:
    """Table of a function of one slow state: leading axes for the cells, then its shape."""
    dtype = jnp.result_type(float)
    states = jnp.asarray(table.states(), dtype)
    if len(table.shape) > 1:
        values = jax.vmap(fn)(states)
        return values.reshape(*table.shape, *values.shape[1:])
    step = (np.ravel(table.high)[0] - np.ravel(table.low)[0]) / (table.shape[0] - 1)
    unit = jnp.ones(states.shape[1:], dtype)
    values, slopes = jax.vmap(lambda x: jax.jvp(fn, (x,), (unit,)))(states)
    left, right = values[:-1], values[1:]
    rise, fall = step * slopes[:-1], step * slopes[1:]
    square = 3 * (right - left) - 2 * rise - fall
    return jnp.stack([left, rise, square, 2 * (left - right) + rise + fall], axis=1)


def look_up(table: Table, entries: Array, x: Array) -> Array:
    """Interpolate a table at one slow state; NaN outside of the grid."""
    position = []
    low, high = np.ravel(table.low), np.ravel(table.high)
    inside = jnp.ones((), bool)
    for one, a, b, n in zip(jnp.atleast_1d(x), low, high, table.shape, strict=True):
        u = (one - a) * ((n - 1) / (b - a))
        # Rounding at the very ends does not count as outside.
        inside = inside & (u >= -1e-4) & (u <= n - 1 + 1e-4)
        position.append(u)
    if len(position) == 1:
        u = position[0]
        cell = jnp.clip(jnp.floor(u), 0, table.shape[0] - 2)
        c, u = entries[jnp.where(inside, cell, 0).astype(int)], u - cell
        value = c[0] + u * (c[1] + u * (c[2] + u * c[3]))
    else:
        value = _tensor_product(entries, position, table.shape)
    return jnp.where(inside, value, jnp.nan)


def _tensor_product(entries: Array, position: list[Array], shape: tuple[int, ...]) -> Array:
    corners, weights = [], []
    for u, n in zip(position, shape, strict=True):
        corner = jnp.clip(jnp.floor(u) - 1, 0, n - 4)
        s = u - corner
        corners.append(corner.astype(int))
        weights.append([_lagrange(s, k) for k in range(4)])
    total = jnp.zeros(entries.shape[len(shape) :], entries.dtype)
    for offsets in itertools.product(range(4), repeat=len(shape)):
        index = tuple(c + o for c, o in zip(corners, offsets, strict=True))
        weight: Any = math.prod(w[o] for w, o in zip(weights, offsets, strict=True))
        total = total + weight * entries[index]
    return total


def _lagrange(s: Array, node: int) -> Array:
    """Lagrange polynomial of one of the nodes 0, 1, 2, 3."""
    value: Any = 1.0
    for other in range(4):
        if other != node:
            value = value * (s - other) / (node - other)
    return value
