"""Times of snapshots, and the finer grid on which what lies between them is computed."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from numpyro_sde.grid import TimeGrid, check_times

# Steps between two snapshots where the user names no grid.
DEFAULT_STEPS = 20


@jax.tree_util.register_static
class Clock:
    """Times of snapshots and a grid that holds them, all on the host; compared by their numbers.

    Attributes:
        times: times of the snapshots, `(K,)`.
        grid: grid times, `(T,)`.
        dt: its steps, `(T - 1,)`.
        index: where the snapshots stand in the grid, `(K,)`.
    """

    def __init__(self, times: Any, grid: Any, dt: Any, index: Any) -> None:
        self.times, self.grid, self.dt = (np.asarray(a, np.float64) for a in (times, grid, dt))
        self.index = np.asarray(index, np.int64)
        self._key = (self.grid.tobytes(), self.index.tobytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Clock) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def num_snapshots(self) -> int:
        """Number K of snapshots."""
        return self.times.size


def snapshot_clock(times: Any, *, least: int = 2) -> Clock:
    """Check the times of snapshots, and refine them.

    Args:
        times: increasing times `(K,)`, or a `TimeGrid` of them.
        least: fewest times.

    Raises:
        TypeError: traced times.
        ValueError: unsorted times, too few, or a batch of them.
    """
    given = times.times if isinstance(times, TimeGrid) else times
    if isinstance(given, jax.core.Tracer):
        raise TypeError("times of snapshots must be known before tracing, got a traced array")
    own = times.observation_times if isinstance(times, TimeGrid) else check_times(times)
    own = np.asarray(own, np.float64)
    if own.ndim != 1:
        raise ValueError(f"times of snapshots must have shape (K,), got {own.shape}")
    if own.size < least:
        raise ValueError(f"times must hold at least {least} snapshots, got {own.size}")
    if isinstance(times, TimeGrid):
        return Clock(own, np.asarray(times.times), np.asarray(times.dt), np.asarray(times.index))
    shares = np.arange(DEFAULT_STEPS) / DEFAULT_STEPS
    inner = own[:-1, None] + np.diff(own)[:, None] * shares[None]
    grid = np.append(inner.ravel(), own[-1])
    dt = np.repeat(np.diff(own) / DEFAULT_STEPS, DEFAULT_STEPS)
    return Clock(own, grid, dt, np.arange(own.size) * DEFAULT_STEPS)


def coarse(clock: Clock) -> Clock:
    """The same snapshots on a grid of their own times alone: for transitions that are exact."""
    return Clock(clock.times, clock.times, np.diff(clock.times), np.arange(clock.times.size))
