"""Series of different lengths as arrays of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numpyro_sde.grid import TimeGrid


def fill_up(times: NDArray[np.float64], lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """Times of all series, one after the other, as `(series, T)`; each goes on by its median gap.

    Args:
        times: strictly increasing in each series.
        lengths: how many each series has, at least 1.

    Example:
        >>> fill_up(np.array([0.0, 2.0, 5.0]), np.array([2, 1])).tolist()
        [[0.0, 2.0], [5.0, 7.0]]
    """
    count, most = len(lengths), int(lengths.max())
    inside = np.arange(most)[None] < lengths[:, None]
    filled = np.full((count, most), np.nan)
    filled[inside] = times
    gaps = np.diff(filled, axis=-1)
    known = ~np.isnan(gaps)
    usual = float(np.median(gaps[known])) if known.any() else 1.0
    gap = np.full(count, usual)
    if most > 1:
        some = known.any(axis=-1)
        gap[some] = np.nanmedian(gaps[some], axis=-1)
    last = filled[np.arange(count), lengths - 1]
    beyond = last[:, None] + gap[:, None] * (np.arange(most)[None] - lengths[:, None] + 1)
    return np.where(inside, filled, beyond)


def pad_series(
    times: Sequence[Any], *values: Sequence[Any], max_step: float | None = None
) -> tuple[Any, ...]:
    """Series of any lengths as a panel: one `TimeGrid` of clocks, and arrays filled up with NaN.

    Checked once, here; what comes out may be an argument of compiled functions. Shorter series go
    on at the end by their median gap, and NaN is missing to every engine. All series then cost
    what the longest costs: of lengths that differ by a lot, make a panel of the short ones and one
    of the long ones. For a long table, take `data.from_long`.

    Args:
        times: for each series its strictly increasing times.
        values: one or more lists of data, for each series an array with a leading axis for its
            times.
        max_step: as for `TimeGrid`; the data then stand at `grid.index`.

    Returns:
        The grid of `(series, T)` times, and for each list an array `(series, T, ...)`.

    Raises:
        ValueError: no series, times that are unsorted, repeated or not finite, or data that do
            not fit the times (the series is named).

    Example:
        >>> from numpyro_sde.data import pad_series
        >>> grid, y = pad_series([[0.0, 1.0, 2.5], [4.0]], [[0.1, 0.2, 0.3], [0.4]])
        >>> grid.times.tolist(), y.tolist()
        ([[0.0, 1.0, 2.5], [4.0, 5.25, 6.5]], [[0.1, 0.2, 0.3], [0.4, nan, nan]])
    """
    clocks = [np.asarray(one) for one in times]
    if not clocks:
        raise ValueError("times must hold at least one series, got none")
    for number, one in enumerate(clocks):
        if one.ndim != 1 or one.size == 0 or one.dtype.kind not in "fiu":
            raise ValueError(
                f"times of series {number} must be numbers of shape (T,) with T >= 1, got dtype "
                f"{one.dtype} and shape {one.shape}"
            )
    lengths = np.array([one.size for one in clocks])
    joined = np.concatenate([one.astype(np.float64) for one in clocks])
    owner = np.repeat(np.arange(len(clocks)), lengths)
    bad = np.flatnonzero((np.diff(owner) == 0) & ~(np.diff(joined) > 0))
    bad = bad if np.isfinite(joined).all() else np.flatnonzero(~np.isfinite(joined))
    if bad.size:
        number = int(owner[bad[0]])
        raise ValueError(
            f"times of series {number} must be finite and strictly increasing, got "
            f"{clocks[number].tolist()[:8]}"
        )
    filled = [_filled(k, lists, lengths) for k, lists in enumerate(values)]
    return (TimeGrid(fill_up(joined, lengths), max_step), *filled)


def _filled(place: int, lists: Sequence[Any], lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    arrays = [np.asarray(one, np.float64) for one in lists]
    if len(arrays) != len(lengths):
        raise ValueError(
            f"values[{place}] must have one array for each of the {len(lengths)} series, got "
            f"{len(arrays)}"
        )
    inner = arrays[0].shape[1:]
    for number, (one, length) in enumerate(zip(arrays, lengths, strict=True)):
        if one.shape != (length, *inner):
            raise ValueError(
                f"values[{place}] of series {number} must have shape {(int(length), *inner)}, got "
                f"{one.shape}"
            )
    out = np.full((len(lengths), int(lengths.max()), *inner), np.nan)
    out[np.arange(out.shape[1])[None] < lengths[:, None]] = np.concatenate(arrays)
    return out
