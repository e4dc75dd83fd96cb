"""Clouds and the paths between them, in the plane of two components or over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from numpyro_sde.snapshots.cells import as_cells
from numpyro_sde.snapshots.clock import snapshot_clock
from numpyro_sde.snapshots.pinned import BridgePaths

_MOST_LINES = 40


def plot_snapshots(
    times: Any,
    snapshots: Any,
    paths: BridgePaths | None = None,
    *,
    over: str = "state",
    components: Sequence[int] = (0, 1),
    labels: Sequence[str] | None = None,
    held_out: tuple[Any, Any] | None = None,
    axes: Any = None,
) -> Any:
    """Plot snapshots, with paths of a bridge through them.

    Args:
        times: times of the snapshots, `(K,)`.
        snapshots: cells `(K, n, d)` or `(K, n)`, or a list of clouds.
        paths: paths from `BridgeResult.sample_paths`; of a batch (posterior draws) all are pooled.
        over: "state" for the plane of two components, the colour being the time; "time" for each
            component over time, with the median and the 50 and 90 % bands of the paths.
        components: which components; over time as many as wished.
        labels: names of all components.
        held_out: times and cells that were not used, drawn as crosses.
        axes: where to draw: one axis, or one for each component over time; None for new ones.

    Returns:
        The axis, or an array of them.

    Raises:
        ValueError: another `over`, or fewer than two components in the plane.
        ImportError: Matplotlib is not installed.

    Example:
        >>> import numpy as np, numpyro_sde as nsde
        >>> clouds = np.random.default_rng(0).normal(size=(2, 10, 2))
        >>> axis = nsde.snapshots.plot_snapshots([0.0, 1.0], clouds)
        >>> axis.get_xlabel()
        'component 0'
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plot_snapshots needs Matplotlib: pip install matplotlib") from error
    if over not in ("state", "time"):
        raise ValueError(f"over must be 'state' or 'time', got {over!r}")
    clouds = [(*_read(times, snapshots), "o")]
    if held_out is not None:
        clouds.append((*_read(*held_out), "x"))
    d = clouds[0][1][0].shape[1]
    names = [f"component {i}" for i in range(d)] if labels is None else list(labels)
    states = None
    if paths is not None:
        states = np.asarray(paths.paths)
        states = states.reshape(-1, len(paths.times), d)
    if over == "time":
        chosen = [i for i in components if i < d]
        if axes is None:
            _, axes = plt.subplots(1, len(chosen), figsize=(5 * len(chosen), 3.4), squeeze=False)
        flat = np.ravel(np.atleast_1d(axes))
        for axis, i in zip(flat, chosen, strict=True):
            _over_time(axis, clouds, paths, states, i, names[i])
        return flat
    if d < 2 or len(components) < 2:
        raise ValueError("over='state' needs two components: scalar states go over='time'")
    axis = plt.subplots(figsize=(5, 4.4))[1] if axes is None else axes
    _in_the_plane(axis, clouds, states, (components[0], components[1]), names)
    return axis


def _read(times: Any, snapshots: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    clock = snapshot_clock(times, least=1)
    cells = as_cells(snapshots, clock.times)
    values, weights = np.asarray(cells.values), np.asarray(cells.weights)
    return clock.times, [v[w > 0] for v, w in zip(values, weights, strict=True)]


def _in_the_plane(
    axis: Any, clouds: Any, states: np.ndarray | None, pair: tuple[int, int], names: list[str]
) -> None:
    i, j = pair
    if states is not None:
        for line in states[:_MOST_LINES]:
            axis.plot(line[:, i], line[:, j], color="0.6", lw=0.5, alpha=0.7, zorder=1)
    drawn = None
    low = min(times[0] for times, _, _ in clouds)
    high = max(times[-1] for times, _, _ in clouds)
    for times, values, marker in clouds:
        for t, cloud in zip(times, values, strict=True):
            drawn = axis.scatter(
                cloud[:, i],
                cloud[:, j],
                c=np.full(len(cloud), t),
                vmin=low,
                vmax=high,
                s=14,
                marker=marker,
                linewidths=0.8,
                zorder=2,
            )
    axis.figure.colorbar(drawn, ax=axis, label="time")
    axis.set_xlabel(names[i])
    axis.set_ylabel(names[j])


def _over_time(
    axis: Any, clouds: Any, paths: BridgePaths | None, states: np.ndarray | None, i: int, name: str
) -> None:
    if paths is not None and states is not None:
        levels = np.quantile(states[..., i], [0.05, 0.25, 0.5, 0.75, 0.95], axis=0)
        axis.fill_between(paths.times, levels[0], levels[4], color="C0", alpha=0.2, lw=0)
        axis.fill_between(paths.times, levels[1], levels[3], color="C0", alpha=0.3, lw=0)
        axis.plot(paths.times, levels[2], color="C0", lw=1)
    for times, values, marker in clouds:
        color = "k" if marker == "o" else "C3"
        for t, cloud in zip(times, values, strict=True):
            axis.plot(
                np.full(len(cloud), t), cloud[:, i], marker, color=color, ms=3, alpha=0.4, mew=0.8
            )
    axis.set_xlabel("time")
    axis.set_ylabel(name)
