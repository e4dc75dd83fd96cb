"""Snapshots as arrays: clouds of cells of different sizes in one array, NaN where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from numpyro_sde.checks.data import as_data


class Cells(eqx.Module):
    """K snapshots, checked.

    Attributes:
        values: cells as vectors, shape `(K, n, d)`; where there is none, one that there is.
        weights: share of each cell in its snapshot, `(K, n)`; zero where there is none.
        scalar: whether states are scalar, so that the user's arrays have shape `(K, n)`.
    """

    values: Float[Array, "K n d"]
    weights: Float[Array, "K n"]
    scalar: bool = eqx.field(static=True)


def stack_snapshots(snapshots: Sequence[ArrayLike]) -> Float[np.ndarray, "K n *state"]:
    """Put snapshots of different sizes into one array, filled up with NaN.

    Args:
        snapshots: for each time an array of cells, `(n_k, d)`, or `(n_k,)` for scalar states.

    Returns:
        Shape `(K, n, d)` or `(K, n)`, where `n` is the size of the largest.

    Raises:
        ValueError: no snapshot, or shapes that do not fit each other.

    Example:
        >>> import numpy as np, numpyro_sde as nsde
        >>> nsde.snapshots.stack_snapshots([np.ones((3, 2)), np.zeros((1, 2))]).shape
        (2, 3, 2)
    """
    clouds = [np.asarray(as_data("snapshots", cloud), float) for cloud in snapshots]
    if not clouds:
        raise ValueError("snapshots must hold at least one snapshot, got none")
    shapes = [cloud.shape for cloud in clouds]
    if any(len(shape) not in (1, 2) or shape[1:] != shapes[0][1:] for shape in shapes):
        raise ValueError(
            "snapshots must be arrays of shape (n_k, d), or (n_k,) for scalar states, with the "
            f"same d, got shapes {shapes}"
        )
    n = max(shape[0] for shape in shapes)
    out = np.full((len(clouds), n, *shapes[0][1:]), np.nan)
    for k, cloud in enumerate(clouds):
        out[k, : len(cloud)] = cloud
    return out


def as_snapshots(snapshots: Any) -> Any:
    """Snapshots as one array `(K, n, *state)`, from that or from a list of clouds."""
    if isinstance(snapshots, list | tuple):
        return stack_snapshots(snapshots)
    return as_data("snapshots", snapshots)


def as_cells(snapshots: Any, times: np.ndarray, weights: Any = None) -> Cells:
    """Check snapshots and their weights.

    Args:
        snapshots: shape `(K, n, d)` or `(K, n)`, or a list of clouds.
        times: the times, `(K,)`.
        weights: relative weights of the cells, `(K, n)`; None for equal ones.

    Raises:
        ValueError: shapes that do not fit, an empty snapshot, infinite cells, cells that are
            missing in part, weights that are negative.
    """
    array = as_snapshots(snapshots)
    if array.ndim not in (2, 3) or array.shape[0] != times.size:
        raise ValueError(
            f"snapshots must have shape ({times.size}, n, d), or ({times.size}, n) for scalar "
            f"states, one cloud for each time, got {array.shape}"
        )
    scalar = array.ndim == 2
    values = jnp.asarray(array, jnp.result_type(float)).reshape(*array.shape[:2], -1)
    missing = jnp.isnan(values)
    here = ~jnp.any(missing, axis=-1)
    shares = here.astype(values.dtype)
    if weights is not None:
        given = jnp.asarray(weights, values.dtype)
        if given.shape != here.shape:
            raise ValueError(f"weights must have shape {here.shape}, got {given.shape}")
        shares = jnp.where(here, given, 0.0)
    if not isinstance(values, jax.core.Tracer):
        _check_values(np.asarray(values))
        if not isinstance(shares, jax.core.Tracer):
            _check_shares(np.asarray(shares))
    shares = shares / jnp.sum(shares, axis=1, keepdims=True)
    return Cells(filled(values, here), shares, scalar)


def filled(values: Float[Array, "*k n d"], here: Array) -> Float[Array, "*k n d"]:
    """Cells with one that is there in the place of each that is not: a state like any other."""
    first = jnp.argmax(here, axis=-1)[..., None, None]
    return jnp.where(here[..., None], values, jnp.take_along_axis(values, first, axis=-2))


def check_whole(values: np.ndarray) -> None:
    """Raise where a cell is missing in part, or infinite; cells are vectors `(..., n, d)`.

    Raises:
        ValueError: naming the first such cell.
    """
    missing = np.isnan(values)
    part = missing.any(-1) & ~missing.all(-1)
    if part.any():
        where = tuple(int(i) for i in np.argwhere(part)[0])
        raise ValueError(
            f"snapshots: cell {where} is missing in part; a cell is there in all its components, "
            "or in none (a row of NaN)"
        )
    if np.isinf(values).any():
        where = tuple(int(i) for i in np.argwhere(np.isinf(values))[0])
        raise ValueError(f"snapshots must be finite, or NaN for no cell, got inf at {where}")


def _check_values(values: np.ndarray) -> None:
    check_whole(values)
    empty = np.isnan(values).all((1, 2))
    if empty.any():
        raise ValueError(f"snapshots: no cell at time {int(np.argmax(empty))}: leave the time out")


def _check_shares(shares: np.ndarray) -> None:
    if not np.all(np.isfinite(shares)) or (shares < 0).any() or not (shares.sum(1) > 0).all():
        raise ValueError(
            "weights must be finite and not negative, with a positive sum at each time"
        )
