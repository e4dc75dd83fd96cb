"""Rows of arrays along a grid: taken, and put back.

XLA turns a scatter, and so the gradient of a gather, into a loop over its rows on a CPU. Rows that
are known beforehand and equally spaced, as those of observations on a refined grid mostly are, need
neither: they are a slice, and its reverse is a padding.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Shaped


def take_rows(
    values: Shaped[Array, "N ..."], rows: np.ndarray, axis: int = 0
) -> Shaped[Array, "K ..."]:
    """Values at some rows.

    Args:
        values: one a row, `(N, ...)`.
        rows: indices from 0 and below `N`, known on the host, `(K,)`.
        axis: that of the rows.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> take_rows(jnp.arange(6), np.array([1, 3, 5])).tolist()
        [1, 3, 5]
    """
    stride = _stride(rows)
    if not stride:
        return values[(slice(None),) * axis + (rows,)]
    first, last = int(rows[0]), int(rows[-1])
    return lax.slice_in_dim(values, first, last + 1, stride, axis)


def put_rows(
    values: Shaped[Array, "K ..."], rows: np.ndarray, length: int
) -> Shaped[Array, "N ..."]:
    """Values put at their rows of an array of zeros; those of the same row are added.

    Args:
        values: one a row, `(K, ...)`.
        rows: indices below `length`, known on the host, `(K,)`.
        length: number of rows of the result.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> put_rows(jnp.array([7, 8]), np.array([1, 3]), 5).tolist()
        [0, 7, 0, 8, 0]
    """
    stride = _stride(rows)
    if not stride:
        place = jnp.zeros((length, *values.shape[1:]), values.dtype).at[rows]
        return place.max(values) if values.dtype == bool else place.add(values)
    before, after = int(rows[0]), length - 1 - int(rows[-1])
    around = [(before, after, stride - 1), *[(0, 0, 0)] * (values.ndim - 1)]
    return lax.pad(values, jnp.zeros((), values.dtype), around)


def _stride(rows: np.ndarray) -> int:
    """The distance of equally spaced, increasing rows; 0 for others."""
    if rows.size < 2:
        return rows.size
    gaps = np.diff(rows)
    return int(gaps[0]) if gaps[0] > 0 and np.all(gaps == gaps[0]) else 0
