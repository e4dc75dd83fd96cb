"""Forecasts against what came: one table of scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from numpyro_sde.diagnostics.prediction.rules import (
    crps,
    energy_score,
    interval_hit,
    interval_score,
)


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of predictions by :func:`score`; prints its table.

    Attributes:
        pointwise: By site and score, one value for each datum (for each time, of the energy and
            log score), NaN where there is none.
        levels: Probabilities of the intervals.

    Example:
        >>> import numpy as np
        >>> from numpyro_sde.diagnostics import Scores
        >>> Scores({"y": {"crps": np.array([0.2, 0.4])}}, (0.9,)).table().loc["y", "number"]
        np.float64(2.0)
    """

    pointwise: Mapping[str, Mapping[str, Float[np.ndarray, "..."]]]
    levels: Sequence[float]

    def table(self) -> Any:
        """A pandas data frame, one row a site: `number` of data and mean scores.

        `crps` (fair), `energy` for vectors and `absolute_error` of the median are in the unit of
        the data, the smaller the better; `log_score` the larger the better; `bias` is mean
        prediction less datum; `cover_90` the share of data inside the central interval of
        90 %, and `interval_90` its interval score.
        """
        import pandas as pd

        rows = {}
        for site, scores in self.pointwise.items():
            row = {name: _mean(values) for name, values in scores.items()}
            rows[site] = {"number": float(np.isfinite(scores["crps"]).sum()), **row}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("site")

    def __repr__(self) -> str:  # what an interactive session shows
        return str(self)

    def __str__(self) -> str:
        return self.table().to_string(float_format=lambda value: f"{value:.4g}")

    def _repr_html_(self) -> str:
        return self.table().to_html(float_format=lambda value: f"{value:.4g}")


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def score(
    forecast: Any,
    y: Any = None,
    *,
    levels: Sequence[float] = (0.5, 0.9),
    event_dims: int | Mapping[str, int] | None = None,
) -> Scores:
    """Score predictions against what came.

    Args:
        forecast: From `nsde.forecast` or :func:`k_step`; or draws, an array `(draw, *shape)` or a
            dictionary of such by site.
        y: What came, `shape`, NaN where nothing did; a dictionary by site where there are
            several. None for predictions that hold their data (`k_step`).
        levels: Probabilities of central intervals.
        event_dims: For draws: how many trailing dimensions one observation has, 0 or 1 (a vector,
            which gets an energy score too); None is 0, or what the forecast knows.

    Raises:
        ValueError: If there is nothing to compare with, shapes differ, or a level lies outside
            (0, 1).

    Source: Gneiting and Raftery (2007), Journal of the American Statistical Association 102,
    359-378.

    Example:
        >>> import numpy as np
        >>> from numpyro_sde.diagnostics import score
        >>> draws = np.random.default_rng(0).normal(size=(2000, 3))
        >>> table = score(draws, np.array([0.0, 1.0, np.nan])).table()
        >>> table.loc["y", ["number", "cover_90"]].tolist()
        [2.0, 1.0]
    """
    draws, data = _paired(forecast, y)
    found = {}
    for site, values in draws.items():
        target = np.asarray(data[site], np.float64)
        values = np.asarray(values, np.float64)
        if values.shape[1:] != target.shape:
            raise ValueError(
                f"predictions of {site!r} have shape {values.shape[1:]}, what came has "
                f"{target.shape}"
            )
        row = {
            "crps": crps(values, target, fair=len(values) > 1),
            "absolute_error": np.abs(np.median(values, axis=0) - target),
            "bias": values.mean(axis=0) - target,
        }
        if _event_dim(forecast, site, event_dims):
            row["energy"] = energy_score(values, target, fair=len(values) > 1)
        for level in levels:
            row[f"cover_{100 * level:g}"] = interval_hit(values, target, level)
            row[f"interval_{100 * level:g}"] = interval_score(values, target, level)
        log_density = getattr(forecast, "log_score", None)
        if log_density is not None:
            row["log_score"] = log_density(site, target)
        found[site] = row
    if len(found) and hasattr(forecast, "log_scores"):
        # One density for all data of a path at a time: told with the first of its sites.
        first = next(iter(found))
        seen = np.concatenate([np.ravel(v[v != 0.0]) for v in forecast.log_scores.values()])
        found[first]["log_score"] = seen
    return Scores(found, tuple(levels))


def _paired(forecast: Any, y: Any) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Draws and data by site."""
    if y is None:
        if not (hasattr(forecast, "sites") and hasattr(forecast, "data")):
            raise ValueError("y must give what came: these predictions do not hold their data")
        y = forecast.data
    if hasattr(forecast, "sites"):
        names = list(forecast.sites)
        draws = {name: forecast[name] for name in names}
    elif isinstance(forecast, Mapping):
        draws = dict(forecast)
    else:
        draws = {"y": forecast}
    if not isinstance(y, Mapping):
        if len(draws) != 1:
            raise ValueError(f"y must be a dictionary of the sites {list(draws)}")
        y = {next(iter(draws)): y}
    unknown = [name for name in y if name not in draws]
    if unknown or not y:
        raise ValueError(f"y names {unknown or 'no site'}, the predictions are of {list(draws)}")
    return {name: draws[name] for name in y}, y


def _event_dim(forecast: Any, site: str, given: int | Mapping[str, int] | None) -> int:
    if isinstance(given, Mapping):
        return given.get(site, 0)
    if given is not None:
        return given
    known = getattr(forecast, "sites", {})
    return getattr(known[site], "event_dim", 0) if site in known else 0
