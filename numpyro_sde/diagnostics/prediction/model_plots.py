"""Pictures of models compared by prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_sde.diagnostics.compare.plots import COLOURS, make_axes

if TYPE_CHECKING:
    from numpyro_sde.diagnostics.prediction.models_compared import ModelComparison


def plot_models(result: ModelComparison, axes: Any = None) -> list[Any]:
    """Draw what :meth:`ModelComparison.plot` describes.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> from numpyro_sde.diagnostics import LeaveFutureOut, compare_models
        >>> def result(p):
        ...     return LeaveFutureOut(p, np.arange(9.0), np.zeros(9), np.array([0]), 1, 500)
        >>> table = compare_models({"a": result(np.zeros(9)), "b": result(np.arange(9) / 9)})
        >>> [axis.get_xlabel() for axis in plot_models(table)]
        ['elpd, less that of b', 'data point']
    """
    names = list(result.models.index)
    left, right = make_axes(axes, 2, names=["", ""])
    places = np.arange(len(names))[::-1]
    left.axvline(0.0, color="black", linewidth=0.8)
    for k, (name, place) in enumerate(zip(names, places, strict=True)):
        row = result.models.loc[name]
        width = 0.0 if np.isnan(row["diff_se"]) else 2.0 * row["diff_se"]
        colour = COLOURS[k % len(COLOURS)]
        left.errorbar(row["elpd_diff"], place, xerr=width, fmt="o", color=colour, capsize=3)
        away = np.cumsum(result.pointwise[name] - result.pointwise[names[0]])
        right.plot(np.arange(1, away.size + 1), away, color=colour, label=name)
    left.set_yticks(places, names)
    left.set_ylim(-0.5, len(names) - 0.5)
    left.set_xlabel(f"elpd, less that of {names[0]}")
    right.set(xlabel="data point", ylabel="difference so far")
    right.legend(frameon=False, fontsize="small")
    return [left, right]
