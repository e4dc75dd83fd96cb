"""Pictures of bands of unknown functions."""

from __future__ import annotations

from typing import Any

import numpy as np

from numpyro_sde.diagnostics.compare.plots import COLOURS, make_axes

_INFORMED = 2.0


def plot_field(band: Any, ax: Any = None, truth: Any = None) -> Any:
    """Draw the band of a function of one or two coordinates.

    One coordinate: mean and bands of 50 and 90 per cent, ticks at the observed states, grey where
    the data have not halved the prior's standard deviation. Two: arrows of the mean for vectors,
    contours for scalars, hatched there.

    Args:
        band: from `field_band`; for two coordinates over a full grid of states.
        ax: Matplotlib axes; None makes a figure.
        truth: values to compare with, shape `(n,)`; one coordinate only.

    Returns:
        The axes.

    Raises:
        ImportError: if Matplotlib is not installed.
        ValueError: more than two coordinates, or two that are no grid.

    Example:
        >>> import matplotlib, numpy as np, numpyro, numpyro_sde as nsde
        >>> matplotlib.use("Agg")
        >>> prior = nsde.fields.HSGP(dim=1, box=2.5, num=4)
        >>> def model():
        ...     prior.register("f", amplitude=1.0, length=1.0)
        >>> draws = {"f/z": np.random.default_rng(0).normal(size=(50, 4))}
        >>> band = nsde.diagnostics.field_band(draws, "f", np.linspace(-2.0, 2.0, 9), model=model)
        >>> nsde.diagnostics.plot_field(band).get_xlabel()
        'state'
    """
    points = band["x"].values
    (axis,) = make_axes(ax, 1, [""])
    if points.ndim == 1 or points.shape[1] == 1:
        _plot_line(band, axis, points.reshape(-1), truth)
    elif points.shape[1] == 2:
        _plot_plane(band, axis, points)
    else:
        raise ValueError(f"plot_field draws one or two coordinates, got {points.shape[1]}")
    return axis


def _plot_line(band: Any, axis: Any, x: np.ndarray, truth: Any) -> None:
    order = np.argsort(x)
    vector = band["mean"].ndim > 1
    for k in range(band["mean"].shape[1] if vector else 1):
        mean, *edges = (
            (band[v].values[:, k] if vector else band[v].values)[order]
            for v in ("mean", "lower_90", "upper_90", "lower_50", "upper_50")
        )
        colour = COLOURS[k % len(COLOURS)]
        label = f"output {k}, mean" if vector else "mean"
        for low, high, alpha, level in ((*edges[:2], 0.2, 90), (*edges[2:], 0.4, 50)):
            style = {"color": colour, "alpha": alpha, "linewidth": 0}
            axis.fill_between(x[order], low, high, label=None if vector else f"{level} %", **style)
        axis.plot(x[order], mean, color=colour, label=label)
    if truth is not None:
        axis.plot(x[order], np.asarray(truth)[order], "--", color="black", lw=1.0, label="truth")
    if "informed" in band:
        informed = band["informed"].values
        poor = (informed if informed.ndim == 1 else informed.min(1))[order] < _INFORMED
        style = {"color": "0.5", "alpha": 0.15, "linewidth": 0, "label": "little from the data"}
        axis.fill_between(x[order], 0, 1, where=poor, transform=axis.get_xaxis_transform(), **style)
    if "states" in band:
        states = band["states"].values.reshape(-1)
        shown = states[:: max(1, len(states) // 400)]
        foot = np.zeros_like(shown)
        axis.plot(shown, foot, "|", color="0.3", ms=6, transform=axis.get_xaxis_transform())
    axis.axhline(0.0, color="0.7", lw=0.8, zorder=0)
    axis.set_xlabel("state")
    axis.set_ylabel(f"{band.attrs['name']}(state)")
    axis.legend(frameon=False, fontsize="small")


def _plot_plane(band: Any, axis: Any, points: np.ndarray) -> None:
    first, second = (np.unique(points[:, i]) for i in (0, 1))
    if len(first) * len(second) != len(points):
        raise ValueError("two coordinates must be a full grid: np.meshgrid, then stack and reshape")
    order = np.lexsort((points[:, 0], points[:, 1]))
    shape = len(second), len(first)

    def grid(values: np.ndarray) -> np.ndarray:
        return values[order].reshape(shape)

    mean = band["mean"].values
    if mean.ndim == 1:
        drawn = axis.contourf(first, second, grid(mean), 12)
        axis.figure.colorbar(drawn, ax=axis, label=band.attrs["name"])
    else:
        axis.quiver(first, second, grid(mean[:, 0]), grid(mean[:, 1]), color=COLOURS[0])
    if "states" in band:
        states = band["states"].values
        axis.plot(*states[:: max(1, len(states) // 2000)].T, ".", ms=1.5, color="0.6", zorder=0)
    if "informed" in band:
        informed = band["informed"].values
        least = grid(informed if informed.ndim == 1 else informed.min(1))
        if np.any(least < _INFORMED):
            levels = [-np.inf, _INFORMED] if np.any(least >= _INFORMED) else 1
            axis.contourf(first, second, least, levels, colors="none", hatches=["///"])
    axis.set_xlabel("first coordinate")
    axis.set_ylabel("second coordinate")
