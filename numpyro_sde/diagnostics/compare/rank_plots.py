"""Pictures of calibration: rank histograms and ECDF differences with simultaneous bands."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_sde.diagnostics.calibration.uniformity import (
    bin_edges,
    ecdf_band,
    ecdf_counts,
    histogram_band,
)
from numpyro_sde.diagnostics.compare.plots import COLOURS, make_axes

if TYPE_CHECKING:
    from numpyro_sde.diagnostics.calibration.sbc import SBCResult

_MAX_QUANTITIES = 6
_MAX_BINS = 16
_PER_BIN = 10  # ranks expected in each bin


def plot_ranks(result: SBCResult, names: Iterable[str] | None = None, axes: Any = None) -> list:
    """Draw what :meth:`SBCResult.plot` describes: two axes for each quantity.

    The shaded bands are simultaneous: uniform ranks stay inside everywhere with 95 %
    probability, for one quantity.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> from numpyro_sde.diagnostics import SBCResult
        >>> pit = (np.arange(200)[:, None] + 0.5) / 200
        >>> ones = np.ones_like(pit)
        >>> result = SBCResult(("rate",), pit, ones, ones, ones, 63 * ones, 63, np.arange(200), {})
        >>> [axis.get_xlabel() for axis in plot_ranks(result)]
        ['rank of rate', 'rank of rate, as a share']
    """
    chosen = list(result.names[:_MAX_QUANTITIES]) if names is None else list(names)
    if unknown := [name for name in chosen if name not in result.names]:
        raise ValueError(f"names has {unknown}, but the quantities are {list(result.names)}")
    panels = make_axes(axes, 2 * len(chosen), names=[""] * (2 * len(chosen)), columns=2)
    number, top = len(result.pit), result.max_rank
    bins = max(2, min(_MAX_BINS, number // _PER_BIN, top + 1))
    edges, histogram = bin_edges(top, bins), histogram_band(number, top, bins)
    ecdf = ecdf_band(number, top)
    for k, name in enumerate(chosen):
        ranks = result.ranks[:, result.names.index(name)]
        left, right = panels[2 * k : 2 * k + 2]
        counts, _ = np.histogram(ranks, edges)
        left.stairs(counts, edges, fill=True, color=COLOURS[0], alpha=0.8)
        left.stairs(
            histogram.upper, edges, baseline=histogram.lower, fill=True, color="#999999", alpha=0.4
        )
        left.stairs(histogram.expected, edges, color="black", linewidth=0.8, baseline=None)
        left.set(xlabel=f"rank of {name}", ylabel="replicates")
        left.set_ylim(bottom=0.0)
        low, high = (bound / number - ecdf.points for bound in (ecdf.lower, ecdf.upper))
        right.fill_between(ecdf.points, low, high, color="#999999", alpha=0.4, step="mid")
        difference = ecdf_counts(ranks, top) / number - ecdf.points
        right.step(ecdf.points, difference, where="mid", color=COLOURS[0])
        right.axhline(0.0, color="black", linewidth=0.8)
        right.set(xlabel=f"rank of {name}, as a share", ylabel="ECDF less uniform")
    return panels
