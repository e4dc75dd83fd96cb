"""Pictures of one-step residuals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import ndtri

from numpyro_sde.diagnostics.compare.plots import COLOURS, make_axes

if TYPE_CHECKING:
    from numpyro_sde.diagnostics.prediction.residuals import Residuals

_MAX_BINS, _PER_BIN = 20, 10
_BAND = "#999999"


def plot_residuals(result: Residuals, site: str | None = None, axes: Any = None) -> list[Any]:
    """Draw what :meth:`Residuals.plot` describes; bands hold 95 % pointwise.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> from numpyro_sde.diagnostics import Residuals
        >>> pit = np.random.default_rng(0).uniform(size=200)
        >>> axes = plot_residuals(Residuals({"y": pit}, {"y": np.arange(200.0)}, 100))
        >>> [axis.get_xlabel() for axis in axes]
        ['time', 'transform (PIT)', 'standard normal quantile', 'lag']
    """
    from numpyro_sde.diagnostics.prediction.residuals import autocorrelation

    names = list(result.pit)
    site = names[0] if site is None else site
    if site not in names:
        raise ValueError(f"site must be one of {names}, got {site!r}")
    event_dim = result.event_dims.get(site, 0)
    z, pit = result.scores[site], np.asarray(result.pit[site])
    clock = z.ndim - 1 - event_dim
    times = np.broadcast_to(
        np.reshape(result.times[site], (*result.times[site].shape, *(1,) * event_dim)), z.shape
    )
    over_time, histogram, quantiles, lags = make_axes(axes, 4, names=[""] * 4)
    seen = np.isfinite(z)
    over_time.plot(times[seen], z[seen], "o", color=COLOURS[0], markersize=3)
    over_time.axhspan(-1.96, 1.96, color=_BAND, alpha=0.25, linewidth=0)
    over_time.axhline(0.0, color="black", linewidth=0.8)
    over_time.set(xlabel="time", ylabel=f"normal score of {site}")
    _draw_histogram(histogram, pit[seen])
    ordered = np.sort(z[seen])
    expected = ndtri((np.arange(ordered.size) + 0.5) / max(ordered.size, 1))
    quantiles.plot(expected, ordered, "o", color=COLOURS[0], markersize=3)
    ends = expected[[0, -1]] if ordered.size else np.array([-1.0, 1.0])
    quantiles.plot(ends, ends, color="black", linewidth=0.8)
    quantiles.set(xlabel="standard normal quantile", ylabel="residual quantile")
    rows = np.moveaxis(z, clock, -1).reshape(-1, z.shape[clock])
    kept = [row[np.isfinite(row)] for row in rows]
    longest = max((row.size for row in kept), default=0)
    wanted = list(range(1, min(20, max(longest // 2, 1)) + 1))
    found = [autocorrelation(kept, lag) for lag in wanted]
    width = [1.96 / np.sqrt(max(n, 1)) for _, n in found]
    lags.fill_between(wanted, np.negative(width), width, color=_BAND, alpha=0.25, linewidth=0)
    lags.vlines(wanted, 0.0, [r for r, _ in found], color=COLOURS[0])
    lags.axhline(0.0, color="black", linewidth=0.8)
    lags.set(xlabel="lag", ylabel="autocorrelation")
    return [over_time, histogram, quantiles, lags]


def _draw_histogram(axis: Any, pit: np.ndarray) -> None:
    number = pit.size
    bins = max(2, min(_MAX_BINS, number // _PER_BIN))
    edges = np.linspace(0.0, 1.0, bins + 1)
    counts, _ = np.histogram(pit, edges)
    from scipy.stats import binom  # slow to import

    low, high = binom(number, 1.0 / bins).ppf([0.025, 0.975])
    axis.stairs(counts, edges, fill=True, color=COLOURS[0], alpha=0.8)
    axis.axhspan(low, high, color=_BAND, alpha=0.4, linewidth=0)
    axis.axhline(number / bins, color="black", linewidth=0.8)
    axis.set(xlabel="transform (PIT)", ylabel="data", xlim=(0.0, 1.0))
