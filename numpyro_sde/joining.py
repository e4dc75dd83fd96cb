"""A path's clock and further times on one grid, in panels too.

In a panel all series share the indices of a grid, so that what is said of a path at an index holds
for all of them. Between two old times, and after the last, every series gets as many times as the
one that asks for most; the others are filled up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from numpyro_sde.grid import TimeGrid

_SAME = 1e-9  # of the span: times nearer than this are one


class JoinedClock(NamedTuple):
    """A grid that holds a path's times and further ones.

    Attributes:
        grid: the grid, times `(*batch, M)`.
        old: indices of the path's own times, `(N,)`.
        place: indices of the further times, `(*batch, F)` or `(F,)`.
    """

    grid: TimeGrid
    old: NDArray[np.int64]
    place: NDArray[np.int64]


def join_clocks(old: Any, further: Any, max_step: float | None = None) -> JoinedClock:
    """Join a path's times and further times, between them or after the last.

    Args:
        old: the path's times, `(*batch, N)`.
        further: times to add, `(F,)` for all series alike or `(*batch, F)`, in any order.
        max_step: longest step of the grid; None adds no times of its own.

    Raises:
        ValueError: batch shapes that do not fit, or a time before the first.

    Example:
        >>> joined = join_clocks([0.0, 1.0, 2.0], [3.0, 1.5])
        >>> joined.grid.times.tolist(), joined.old.tolist(), joined.place.tolist()
        ([0.0, 1.0, 1.5, 2.0, 3.0], [0, 1, 3], [4, 2])
    """
    old, further = np.asarray(old, np.float64), np.asarray(further, np.float64)
    try:
        lead = np.broadcast_shapes(old.shape[:-1], further.shape[:-1])
    except ValueError:
        raise ValueError(
            f"times have batch shape {further.shape[:-1]}, which does not fit that of the path's "
            f"times, {old.shape[:-1]}"
        ) from None
    rows_old = np.broadcast_to(old, (*lead, old.shape[-1])).reshape(-1, old.shape[-1])
    rows_new = np.broadcast_to(further, (*lead, further.shape[-1])).reshape(-1, further.shape[-1])
    slack = _SAME * max(float(np.ptp(old)), float(np.abs(np.diff(rows_old)).max(initial=0.0)))
    early = rows_new < rows_old[:, :1] - slack
    if early.any():
        series = int(np.argwhere(early)[0][0])
        raise ValueError(
            f"times start at {rows_new[series].min():g}, before the path does at "
            f"{rows_old[series, 0]:g}; the law of the first state holds there and not earlier"
        )
    gaps = [_gaps(a, b, slack) for a, b in zip(rows_old, rows_new, strict=True)]
    counts = [max(len(own[k]) for own in gaps) for k in range(old.shape[-1])]
    merged = np.stack([_fill(a, own, counts) for a, own in zip(rows_old, gaps, strict=True)])
    where_old = np.arange(old.shape[-1]) + np.concatenate([[0], np.cumsum(counts[:-1])])
    place = np.stack([_nearest(m, b) for m, b in zip(merged, rows_new, strict=True)])
    if not lead or (np.all(merged == merged[0]) and not old.shape[:-1]):
        merged, shape = merged[0], ()
    else:
        merged, shape = merged.reshape(*lead, -1), lead
    grid = TimeGrid(merged, max_step)
    index = np.asarray(grid.index)
    place = place.reshape(*lead, -1) if shape else place[0]
    return JoinedClock(grid, index[where_old], index[place])


def _gaps(old: np.ndarray, new: np.ndarray, slack: float) -> list[np.ndarray]:
    """The new times inside each gap after an old time, the last one open."""
    new = np.unique(new)
    apart = np.abs(new[:, None] - old).min(axis=1) > slack
    new = new[apart & np.concatenate([[True], np.diff(new) > slack])[: len(new)]]
    owner = np.searchsorted(old, new, side="right") - 1
    return [new[owner == k] for k in range(len(old))]


def _fill(old: np.ndarray, gaps: list[np.ndarray], counts: list[int]) -> np.ndarray:
    """Times of one series with so many in each gap: the longest pieces are halved."""
    parts = []
    for k, (own, count) in enumerate(zip(gaps, counts, strict=True)):
        last = k == len(old) - 1
        inside = [old[k], *own] if last else [old[k], *own, old[k + 1]]
        while len(inside) < count + (1 if last else 2):
            if last:
                step = inside[-1] - inside[-2] if len(inside) > 1 else _usual(old)
                inside.append(inside[-1] + step)
            else:
                longest = int(np.argmax(np.diff(inside)))
                inside.insert(longest + 1, 0.5 * (inside[longest] + inside[longest + 1]))
        parts.append(np.array(inside if last else inside[:-1]))
    return np.concatenate(parts)


def _usual(old: np.ndarray) -> float:
    return float(np.median(np.diff(old))) if len(old) > 1 else 1.0


def _nearest(merged: np.ndarray, new: np.ndarray) -> np.ndarray:
    right = np.clip(np.searchsorted(merged, new), 1, len(merged) - 1) if len(merged) > 1 else None
    if right is None:
        return np.zeros(len(new), np.int64)
    left = right - 1
    nearer = np.abs(merged[right] - new) < np.abs(merged[left] - new)
    return np.where(nearer, right, left).astype(np.int64)
