"""The tables of a comparison: one row for each quantity and fit, or for each fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from numpyro_sde.diagnostics.compare.arviz_compat import (
    effective_sample_size,
    get_group,
    make_dataset,
    scalar_draws,
    split_rhat,
)
from numpyro_sde.diagnostics.compare.fits import POINT
from numpyro_sde.diagnostics.compare.path_distances import (
    Difference,
    Moments,
    difference,
    largest_rhat,
    moments,
    point_moments,
    sides,
)
from numpyro_sde.diagnostics.compare.statistics import fit_weights, leave_one_out, wasserstein

_MAX_EFFICIENCY = 1000  # scalars whose effective sizes are averaged for PSIS
_TIMES = ("compile_time", "trace_time", "search_time", "import_time")
_FIT_COLUMNS = (
    *("method", "draws", "elpd", "elpd_se", "p_loo", "num_points", "bad_khat"),
    *("elpd_diff", "diff_se", "log_likelihood", "log_likelihood_se"),
    *("elbo", "elbo_se", "log_evidence", "efficiency", "khat"),
    *("khat_parameters", "efficiency_parameters"),
    *("guide_efficiency", "guide_khat", "round_trips"),
    *("divergences", "run_time", *_TIMES),
)


class Summary(NamedTuple):
    """What one fit contributes: draws of its variables, and its own numbers.

    Attributes:
        tree: The ArviZ object.
        posterior: Its posterior group.
        attrs: Attributes of that, with times.

    Example:
        >>> Summary(None, None, {"method": "variational"}).is_chain
        False
    """

    tree: Any
    posterior: Any
    attrs: Mapping[str, Any]

    @property
    def method(self) -> str:
        """How the draws were made."""
        return str(self.attrs.get("method", ""))

    @property
    def is_chain(self) -> bool:
        """Whether its draws are those of a Markov chain, or of unknown kind."""
        return self.method not in ("variational", "psis", POINT)

    @property
    def is_point(self) -> bool:
        """Whether it is a maximum of the likelihood, without a posterior."""
        return self.method == POINT

    def sd(self, var: str, values: np.ndarray) -> float:
        """Standard deviation of a scalar's draws; of a point its standard error, if known."""
        if self.is_point:
            return float(self.attrs.get(f"profile_error_{var}", np.nan))
        return float(values.std(ddof=1))

    @property
    def run_time(self) -> float:
        """Seconds, NaN where unknown."""
        return float(self.attrs.get("sampling_time", np.nan))

    @property
    def num_draws(self) -> int:
        """Number of draws of all chains."""
        return int(self.posterior.sizes["chain"] * self.posterior.sizes["draw"])

    def moments(self, var: str) -> Moments:
        """Moments of a variable with their Monte Carlo errors."""
        if self.is_point:
            return point_moments(np.asarray(self.posterior[var].values, np.float64))
        size = None if self.is_chain else float(self.num_draws)
        if self.method == "psis":
            size = min(float(self.attrs["importance_ess"]), float(self.num_draws))
        return moments(np.asarray(self.posterior[var].values, np.float64), size)


def _flat(variable: Any) -> np.ndarray:
    values = np.asarray(variable.values, np.float64)
    return values.reshape(-1, *values.shape[2:])


def _scaled_distance(variable: Any, reference: Any) -> Float[np.ndarray, "*shape"]:
    """1-Wasserstein distance in sds of the reference; NaN where the reference is constant."""
    other = _flat(reference)
    scale = other.std(axis=0, ddof=1) if len(other) > 1 else np.full(other.shape[1:], np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 0, wasserstein(_flat(variable), other) / scale, np.nan)


def _places(variable: Any, index: tuple[int, ...]) -> dict[str, str]:
    """Where an element is: for each dimension its coordinate as text."""
    dims = [str(dim) for dim in variable.dims[2:]]
    position = dict(zip(dims, index, strict=True))
    places = {}
    for dim in dims:
        clock = f"{dim}_value"  # every series its own clock
        name = clock if clock in variable.coords else dim
        value: Any = position[dim]
        if name in variable.coords:
            coordinate = variable.coords[name]
            value = coordinate.values[tuple(position[str(d)] for d in coordinate.dims)]
        places[dim] = f"{value:.6g}" if isinstance(value, float) else str(value)
    return places


def _chain_statistics(values: Float[np.ndarray, "chain draw"], seconds: float) -> dict[str, float]:
    bulk = effective_sample_size(values)
    return {
        "rhat": split_rhat(values),
        "ess_bulk": bulk,
        "ess_tail": effective_sample_size(values, "tail"),
        "ess_per_second": bulk / seconds if seconds > 0 else np.nan,
    }


def parameter_table(summaries: Mapping[str, Summary], reference: str, variables: list[str]) -> Any:
    """Rows for scalars: moments, distances, and what is known of the chains."""
    import pandas as pd

    rows, index = [], []
    for var in variables:
        first = summaries[reference].posterior[var]
        distances = {
            name: _scaled_distance(summary.posterior[var], first)
            for name, summary in summaries.items()
        }
        differences = Differences.between(summaries, reference, var).by_fit
        for element in np.ndindex(first.shape[2:]):
            label = f"{var}[{', '.join(_places(first, element).values())}]" if element else var
            for name, summary in summaries.items():
                values = scalar_draws(summary.posterior, var, element)
                row = {
                    "mean": values.mean(),
                    "sd": summary.sd(var, values),
                    "distance": float(distances[name][element]),
                }
                if name != reference:
                    row |= _difference_row(differences[name], element)
                if summary.is_chain:
                    row |= _chain_statistics(values, summary.run_time)
                rows.append(row)
                index.append((label, name))
    columns = [
        *("mean", "sd", "distance", "difference", "in_errors"),
        *("rhat", "ess_bulk", "ess_tail", "ess_per_second"),
    ]
    names = ["parameter", "fit"]
    return pd.DataFrame(
        rows, columns=columns, index=pd.MultiIndex.from_tuples(index, names=names), dtype=float
    )


def labelled(summaries: Mapping[str, Summary], reference: str, var: str) -> Any:
    """A variable of the reference; of another fit, if only there its times are known.

    Under `GuidedReparam` and the like a path is a deterministic site that knows no times.

    Example:
        >>> posterior = make_dataset({"x": (("chain", "draw"), np.zeros((1, 2)))}, {}, {})
        >>> labelled({"NUTS": Summary(None, posterior, {})}, "NUTS", "x").dims
        ('chain', 'draw')
    """
    own = summaries[reference].posterior[var]
    found = [own, *(summary.posterior[var] for summary in summaries.values())]
    return next((variable for variable in found if has_time(variable)), own)


def has_time(variable: Any) -> bool:
    """Whether a variable has a time dimension.

    Example:
        >>> has_time(make_dataset({"x": (("draw", "time"), np.zeros((1, 2)))}, {}, {})["x"])
        True
    """
    return any(str(dim).startswith("time") for dim in variable.dims)


class Differences(NamedTuple):
    """Moments of a variable under every fit, and their differences from the reference's.

    Attributes:
        moments: By fit.
        by_fit: By fit, the reference left out.

    Example:
        >>> Differences({}, {}).by_fit
        {}
    """

    moments: dict[str, Moments]
    by_fit: dict[str, Difference]

    @staticmethod
    def between(summaries: Mapping[str, Summary], reference: str, var: str) -> Differences:
        """Of one variable that all fits have."""
        known = {name: summary.moments(var) for name, summary in summaries.items()}
        by_fit = {
            name: difference(of_fit, known[reference])
            for name, of_fit in known.items()
            if name != reference
        }
        return Differences(known, by_fit)


def _difference_row(found: Difference, element: Any) -> dict[str, float]:
    return {
        "difference": float(found.size[element]),
        "in_errors": float(found.in_errors[element]),
    }


def over_time(
    summaries: Mapping[str, Summary], reference: str, paths: Mapping[str, Differences]
) -> dict[str, Any]:
    """For each variable an `xarray.Dataset` of differences, dimensions `fit` and the variable's."""
    names = [name for name in summaries if name != reference]
    found = {}
    for var, (_, by_fit) in paths.items() if names else ():
        first = labelled(summaries, reference, var)
        dims = ("fit", *(str(dim) for dim in first.dims[2:]))
        arrays = {
            "mean_difference": [by_fit[name].mean for name in names],
            "mean_error": [by_fit[name].mean_error for name in names],
            "sd_difference": [by_fit[name].sd for name in names],
            "sd_error": [by_fit[name].sd_error for name in names],
        }
        coords: dict[str, Any] = {
            str(label): (tuple(str(d) for d in coordinate.dims), coordinate.values)
            for label, coordinate in first.coords.items()
            if "chain" not in coordinate.dims and "draw" not in coordinate.dims
        }
        found[var] = make_dataset(
            {name: (dims, np.stack(values)) for name, values in arrays.items()},
            {**coords, "fit": names},
            {"reference": reference, "units": "posterior standard deviations of the reference"},
        )
    return found


def path_table(
    summaries: Mapping[str, Summary], reference: str, paths: Mapping[str, Differences]
) -> Any:
    """Rows for paths and large sites: the worst of their elements."""
    import pandas as pd

    rows, index = [], []
    for var, (known, differences) in paths.items():
        first = summaries[reference].posterior[var]
        places = labelled(summaries, reference, var)
        for name, summary in summaries.items():
            distance = np.asarray(_scaled_distance(summary.posterior[var], first))
            row: dict[str, Any] = {"distance": np.nan, "mean_distance": np.nan, "where": ""}
            row["num_elements"] = distance.size
            if np.isfinite(distance).any():
                at = np.unravel_index(int(np.nanargmax(distance)), distance.shape)
                row["distance"] = float(np.nanmax(distance))
                row["mean_distance"] = float(np.nanmean(distance))
                if name != reference:
                    where = _places(places, tuple(int(i) for i in at))
                    row["where"] = ", ".join(f"{dim}={place}" for dim, place in where.items())
            if name in differences and np.isfinite(differences[name].size).any():
                found = differences[name]
                row["mean_difference"] = float(np.nanmax(np.abs(found.mean)))
                row["sd_difference"] = float(np.nanmax(np.abs(found.sd)))
                row["in_errors"] = float(np.nanmax(found.in_errors))
            if summary.is_chain:
                row["rhat"] = largest_rhat(summary.posterior[var].values)
                row["ess"] = float(known[name].ess.min())
                found_sides = sides(summary.posterior[var].values)
                row["side_rhat"], row["side_ess"] = found_sides
            rows.append(row)
            index.append((var, name))
    columns = [
        *("distance", "mean_distance", "where", "mean_difference", "sd_difference", "in_errors"),
        *("rhat", "ess", "side_rhat", "side_ess", "num_elements"),
    ]
    names = ["path", "fit"]
    return pd.DataFrame(rows, columns=columns, index=pd.MultiIndex.from_tuples(index, names=names))


def pointwise_log_likelihood(summary: Summary) -> Float[np.ndarray, "draw n"] | None:
    """Log likelihood of all data points of all observation sites, side by side."""
    group = get_group(summary.tree, "log_likelihood")
    if group is None or not group.data_vars:
        return None
    parts = [_flat(group[var]) for var in group.data_vars]
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


def relative_efficiency(summary: Summary) -> float:
    """Effective over actual draws, averaged over all variables as `arviz.loo` has it.

    Of more than a thousand scalars (long paths) an even choice stands for all. One chain alone,
    and independent draws, count as fully efficient.
    """
    posterior = summary.posterior
    if not summary.is_chain or posterior.sizes["chain"] == 1:
        return 1.0
    scalars = [
        (str(var), element)
        for var in posterior.data_vars
        for element in np.ndindex(posterior[var].shape[2:])
    ]
    scalars = scalars[:: -(-len(scalars) // _MAX_EFFICIENCY)]
    sizes = [effective_sample_size(scalar_draws(posterior, *scalar), "mean") for scalar in scalars]
    return float(np.nanmean(sizes) / (posterior.sizes["chain"] * posterior.sizes["draw"]))


def sum_error(points: Float[np.ndarray, " n"]) -> float:
    """Standard error of a sum over data points, from their spread; NaN for a single point."""
    if points.size < 2:
        return float("nan")
    return float(np.sqrt(points.size * points.var(ddof=1)))


def _fit_row(summary: Summary) -> tuple[dict[str, Any], Float[np.ndarray, " n"] | None]:
    sizes = summary.posterior.sizes
    row: dict[str, Any] = {
        "method": summary.attrs.get("method", ""),
        "draws": sizes["chain"] * sizes["draw"],
        "run_time": summary.run_time,
        **{name: float(summary.attrs.get(name, np.nan)) for name in _TIMES},
    }
    statistics = get_group(summary.tree, "sample_stats")
    if statistics is not None and "diverging" in statistics:
        row["divergences"] = int(statistics["diverging"].values.sum())
    if statistics is not None and {"log_p", "log_q"} <= set(statistics.data_vars):
        weights = fit_weights(_flat(statistics["log_p"]) - _flat(statistics["log_q"]))
        row |= weights._asdict()
    if statistics is not None and "log_weight_parameters" in statistics:
        weights = fit_weights(_flat(statistics["log_weight_parameters"]))
        row["khat_parameters"] = weights.khat
        row["efficiency_parameters"] = weights.efficiency
    if summary.is_point:
        row |= {k: float(summary.attrs[k]) for k in ("log_likelihood", "log_likelihood_se")}
    for known in ("guide_efficiency", "guide_khat", "round_trips", "log_evidence"):
        if known in summary.attrs:
            row[known] = float(summary.attrs[known])
    if "importance_ess" in summary.attrs:
        attrs = summary.attrs
        row["khat"], row["log_evidence"] = attrs["khat"], attrs["log_evidence"]
        row["efficiency"] = attrs["importance_ess"] / attrs["num_guide_draws"]
    log_likelihood = pointwise_log_likelihood(summary)
    if log_likelihood is None:
        return row, None
    loo = leave_one_out(log_likelihood, relative_efficiency(summary))
    row |= {
        "elpd": loo.elpd.sum(),
        "elpd_se": sum_error(loo.elpd),
        "p_loo": loo.num_effective,
        "num_points": loo.elpd.size,
        "bad_khat": int(np.sum(~(loo.khat <= loo.threshold))),
    }
    return row, loo.elpd


def fit_table(summaries: Mapping[str, Summary], reference: str) -> Any:
    """Rows for fits: predictive density, evidence, weights, times."""
    import pandas as pd

    rows = {name: _fit_row(summary) for name, summary in summaries.items()}
    first = rows[reference][1]
    for row, elpd in rows.values():
        if first is not None and elpd is not None and elpd.shape == first.shape:
            difference = elpd - first
            row["elpd_diff"] = difference.sum()
            row["diff_se"] = sum_error(difference)
    columns = list(_FIT_COLUMNS)
    index = pd.Index(list(rows), name="fit")
    table = pd.DataFrame([row for row, _ in rows.values()], columns=columns, index=index)
    counts = ["draws", "num_points", "bad_khat", "divergences"]
    return table.astype(dict.fromkeys(counts, "Int64"))
