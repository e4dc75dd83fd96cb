"""Fits of one model side by side: parameters, predictive density, evidence, time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, PRNGKeyArray

from numpyro_sde.diagnostics.arviz_compat import (
    effective_sample_size,
    get_group,
    is_tree,
    scalar_draws,
    split_rhat,
)
from numpyro_sde.diagnostics.convert import to_arviz
from numpyro_sde.diagnostics.statistics import fit_weights, leave_one_out, wasserstein
from numpyro_sde.diagnostics.timing import Timing

_MAX_SIZE = 50  # more scalars than this in one site are summarised in a row
_MAX_ROWS = 200  # of a printed table; the data frames hold all
_MAX_EFFICIENCY = 1000  # scalars whose effective sizes are averaged for PSIS
_FIT_COLUMNS = (
    *("method", "draws", "elpd", "elpd_se", "p_loo", "num_points", "bad_khat"),
    *("elpd_diff", "diff_se", "elbo", "elbo_se", "log_evidence", "efficiency", "khat"),
    *("divergences", "run_time", "compile_time"),
)
_HEADINGS = {
    "parameters": "Parameters (distance: 1-Wasserstein in posterior sds of {reference})",
    "paths": "Paths and large sites (largest distance over their elements, and where)",
    "fits": "Fits (times in seconds)",
}


@dataclass(frozen=True)
class FitComparison:
    """Tables of :func:`compare_fits`, as pandas data frames; prints as text and as HTML.

    Attributes:
        parameters: One row for each scalar parameter and fit: `mean`, `sd`, `distance`
            (1-Wasserstein distance to the reference fit in its posterior sds), and for draws of
            a Markov chain `rhat`, `ess_bulk`, `ess_tail`, `ess_per_second` (bulk, by run time).
        paths: One row for each path or large site and fit: the largest `distance` over its
            elements, the `mean_distance`, and `where` the largest is.
        fits: One row for each fit: `method`, `draws`; `elpd`, `elpd_se`, `p_loo` by PSIS-LOO
            with `num_points` data points, `bad_khat` of which are above the threshold, and the
            difference `elpd_diff`, `diff_se` to the reference; for a variational fit `elbo`,
            `elbo_se`, its importance-weighted `log_evidence` with `efficiency` (effective share
            of the draws), and `khat` of the fit; `divergences`; `run_time`, `compile_time`.
        reference: Name of the fit that distances and differences are taken to.

    Example:
        >>> import numpy as np
        >>> from numpyro_sde.diagnostics import compare_fits
        >>> draws = np.random.default_rng(0).normal(size=(2, 500))
        >>> table = compare_fits({"NUTS": {"rate": draws[0]}, "SVI": {"rate": draws[1]}})
        >>> table.reference, list(table.fits.index)
        ('NUTS', ['NUTS', 'SVI'])
    """

    parameters: Any
    paths: Any
    fits: Any
    reference: str

    def _tables(self) -> list[tuple[str, Any]]:
        """Headings and tables to show: fits in columns, what is known of none left out."""
        shown = []
        for name, heading in _HEADINGS.items():
            table = getattr(self, name).dropna(axis=1, how="all")
            if len(table):
                text = table.map(_format)
                shown.append((heading.format(reference=self.reference), text))
        heading, fits = shown[-1]
        return [*shown[:-1], (heading, fits.T.rename_axis(columns=None))]

    def __str__(self) -> str:
        return "\n\n".join(
            f"{heading}\n{table.to_string(max_rows=_MAX_ROWS)}" for heading, table in self._tables()
        )

    def _repr_html_(self) -> str:
        return "".join(
            f"<h4>{heading}</h4>{table.to_html(max_rows=_MAX_ROWS)}"
            for heading, table in self._tables()
        )


class _Summary(NamedTuple):
    """What one fit contributes: draws of its variables, and its own numbers."""

    tree: Any
    posterior: Any
    attrs: Mapping[str, Any]

    @property
    def is_variational(self) -> bool:
        return self.attrs.get("method") == "variational"

    @property
    def run_time(self) -> float:
        return float(self.attrs.get("sampling_time", np.nan))


def compare_fits(
    fits: Mapping[str, Any],
    *,
    reference: str | None = None,
    times: Any = None,
    model: Callable[..., Any] | None = None,
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
    rng_key: PRNGKeyArray | None = None,
    timings: Mapping[str, Timing] | None = None,
    var_names: Iterable[str] | None = None,
    max_size: int = _MAX_SIZE,
) -> FitComparison:
    """Compare fits of one model, or of models that share parameters and data.

    Parameters are the unobserved sites and deterministic values that every fit has; those with a
    time dimension, and those of more than `max_size` elements, are summarised in one row.

    PSIS-LOO takes the draws of every fit as they are: for a variational fit it is the
    predictive density of that approximation. How near the approximation is to the posterior,
    `khat` says: below 0.5 good, to 0.7 usable as a proposal, above that its parameters are not
    to be trusted. R-hat and effective sizes speak of Markov chains only and stay empty for a
    variational fit, whose draws are independent whatever their law. A time is compared only
    where :func:`timed` measured it.

    Args:
        fits: Name to fit: results of :func:`to_arviz`, or anything that it converts.
        reference: Name of the fit to compare with; None is the first.
        times: As for `to_arviz`, for the fits that are not converted yet; likewise `model`,
            `model_args`, `model_kwargs`, `num_samples` and `rng_key`. Raw fits must share them.
        model: See `times`.
        model_args: See `times`.
        model_kwargs: See `times`.
        num_samples: Draws from a guide, also the particles of its ELBO.
        rng_key: See `times`.
        timings: From :func:`timed`, by name of the fit.
        var_names: Sites to compare; None takes all in common.
        max_size: Largest site whose elements get rows of their own.

    Raises:
        ValueError: If there is no fit, `reference` or `timings` names none of them, or a name in
            `var_names` is not in every fit.
        TypeError: If a fit is of no known kind.

    Source: PSIS-LOO, Vehtari, Gelman and Gabry (2017); k-hat of a fit, Yao et al. (2018).

    Example:
        >>> import numpy as np
        >>> from numpyro_sde.diagnostics import compare_fits
        >>> rng = np.random.default_rng(0)
        >>> exact, wide = {"a": rng.normal(size=2000)}, {"a": rng.normal(size=2000) + 1.0}
        >>> table = compare_fits({"exact": exact, "shifted": wide}).parameters
        >>> bool(abs(table.loc[("a", "shifted"), "distance"] - 1.0) < 0.1)
        True
    """
    if not fits:
        raise ValueError("fits must name at least one fit, got an empty mapping")
    reference = next(iter(fits)) if reference is None else reference
    for argument, names in {"reference": [reference], "timings": list(timings or {})}.items():
        if unknown := [name for name in names if name not in fits]:
            raise ValueError(f"{argument} names {unknown}, but the fits are {list(fits)}")
    summaries = {}
    for name, fit in fits.items():
        tree = fit
        if not is_tree(fit):
            tree = to_arviz(
                fit,
                times=times,
                model=model,
                model_args=model_args,
                model_kwargs=model_kwargs,
                num_samples=num_samples,
                rng_key=rng_key,
            )
        summaries[name] = _summarise(tree, name, (timings or {}).get(name))
    shared = _shared_variables(summaries, reference, var_names)
    small = [name for name in shared if _is_small(summaries[reference].posterior[name], max_size)]
    return FitComparison(
        parameters=_parameter_table(summaries, reference, small),
        paths=_path_table(summaries, reference, [name for name in shared if name not in small]),
        fits=_fit_table(summaries, reference),
        reference=reference,
    )


def _summarise(tree: Any, name: str, timing: Timing | None) -> _Summary:
    posterior = get_group(tree, "posterior")
    if posterior is None:
        raise ValueError(f"fit {name!r} has no posterior group")
    attrs = dict(posterior.attrs)
    if timing is not None:
        attrs |= {"sampling_time": timing.run_time, "compile_time": timing.compile_time}
    return _Summary(tree, posterior, attrs)


def _shared_variables(
    summaries: Mapping[str, _Summary], reference: str, var_names: Iterable[str] | None
) -> list[str]:
    first = summaries[reference].posterior
    if var_names is not None:
        wanted = list(var_names)
        for name, summary in summaries.items():
            if missing := [var for var in wanted if var not in summary.posterior]:
                raise ValueError(
                    f"var_names has {missing}, but fit {name!r} has {list(summary.posterior)}"
                )
        return wanted
    return [
        str(var)
        for var in first.data_vars
        if all(
            var in other.posterior and other.posterior[var].shape[2:] == first[var].shape[2:]
            for other in summaries.values()
        )
    ]


def _is_small(variable: Any, max_size: int) -> bool:
    on_time = any(str(dim).startswith("time") for dim in variable.dims)
    return not on_time and int(np.prod(variable.shape[2:])) <= max_size


def _flat(variable: Any) -> np.ndarray:
    values = np.asarray(variable.values, np.float64)
    return values.reshape(-1, *values.shape[2:])


def _scaled_distance(variable: Any, reference: Any) -> Float[np.ndarray, "*shape"]:
    """1-Wasserstein distance in sds of the reference; NaN where the reference is constant."""
    other = _flat(reference)
    scale = other.std(axis=0, ddof=1)
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


def _parameter_table(
    summaries: Mapping[str, _Summary], reference: str, variables: list[str]
) -> Any:
    import pandas as pd

    rows, index = [], []
    for var in variables:
        first = summaries[reference].posterior[var]
        distances = {
            name: _scaled_distance(summary.posterior[var], first)
            for name, summary in summaries.items()
        }
        for element in np.ndindex(first.shape[2:]):
            label = f"{var}[{', '.join(_places(first, element).values())}]" if element else var
            for name, summary in summaries.items():
                values = scalar_draws(summary.posterior, var, element)
                row = {
                    "mean": values.mean(),
                    "sd": values.std(ddof=1),
                    "distance": float(distances[name][element]),
                }
                if not summary.is_variational:
                    row |= _chain_statistics(values, summary.run_time)
                rows.append(row)
                index.append((label, name))
    columns = ["mean", "sd", "distance", "rhat", "ess_bulk", "ess_tail", "ess_per_second"]
    names = ["parameter", "fit"]
    return pd.DataFrame(
        rows, columns=columns, index=pd.MultiIndex.from_tuples(index, names=names), dtype=float
    )


def _path_table(summaries: Mapping[str, _Summary], reference: str, variables: list[str]) -> Any:
    import pandas as pd

    rows, index = [], []
    for var in variables:
        first = summaries[reference].posterior[var]
        for name, summary in summaries.items():
            distance = np.asarray(_scaled_distance(summary.posterior[var], first))
            row: dict[str, Any] = {"distance": np.nan, "mean_distance": np.nan, "where": ""}
            if np.isfinite(distance).any():
                at = np.unravel_index(int(np.nanargmax(distance)), distance.shape)
                row["distance"] = float(np.nanmax(distance))
                row["mean_distance"] = float(np.nanmean(distance))
                if name != reference:
                    places = _places(first, tuple(int(i) for i in at))
                    row["where"] = ", ".join(f"{dim}={place}" for dim, place in places.items())
            rows.append(row)
            index.append((var, name))
    columns = ["distance", "mean_distance", "where"]
    names = ["path", "fit"]
    return pd.DataFrame(rows, columns=columns, index=pd.MultiIndex.from_tuples(index, names=names))


def _pointwise(summary: _Summary) -> Float[np.ndarray, "draw n"] | None:
    """Log likelihood of all data points of all observation sites, side by side."""
    group = get_group(summary.tree, "log_likelihood")
    if group is None or not group.data_vars:
        return None
    parts = [_flat(group[var]) for var in group.data_vars]
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


def _relative_efficiency(summary: _Summary) -> float:
    """Effective over actual draws, averaged over all variables as `arviz.loo` has it.

    Of more than a thousand scalars (long paths) an even choice stands for all. One chain alone,
    and independent draws, count as fully efficient.
    """
    posterior = summary.posterior
    if summary.is_variational or posterior.sizes["chain"] == 1:
        return 1.0
    scalars = [
        (str(var), element)
        for var in posterior.data_vars
        for element in np.ndindex(posterior[var].shape[2:])
    ]
    scalars = scalars[:: -(-len(scalars) // _MAX_EFFICIENCY)]
    sizes = [effective_sample_size(scalar_draws(posterior, *scalar), "mean") for scalar in scalars]
    return float(np.nanmean(sizes) / (posterior.sizes["chain"] * posterior.sizes["draw"]))


def _sum_error(points: Float[np.ndarray, " n"]) -> float:
    """Standard error of a sum over data points, from their spread; NaN for a single point."""
    if points.size < 2:
        return float("nan")
    return float(np.sqrt(points.size * points.var(ddof=1)))


def _fit_row(summary: _Summary) -> tuple[dict[str, Any], Float[np.ndarray, " n"] | None]:
    sizes = summary.posterior.sizes
    row: dict[str, Any] = {
        "method": summary.attrs.get("method", ""),
        "draws": sizes["chain"] * sizes["draw"],
        "run_time": summary.run_time,
        "compile_time": float(summary.attrs.get("compile_time", np.nan)),
    }
    statistics = get_group(summary.tree, "sample_stats")
    if statistics is not None and "diverging" in statistics:
        row["divergences"] = int(statistics["diverging"].values.sum())
    if statistics is not None and {"log_p", "log_q"} <= set(statistics.data_vars):
        weights = fit_weights(_flat(statistics["log_p"]) - _flat(statistics["log_q"]))
        row |= weights._asdict()
    log_likelihood = _pointwise(summary)
    if log_likelihood is None:
        return row, None
    loo = leave_one_out(log_likelihood, _relative_efficiency(summary))
    row |= {
        "elpd": loo.elpd.sum(),
        "elpd_se": _sum_error(loo.elpd),
        "p_loo": loo.num_effective,
        "num_points": loo.elpd.size,
        "bad_khat": int(np.sum(~(loo.khat <= loo.threshold))),
    }
    return row, loo.elpd


def _fit_table(summaries: Mapping[str, _Summary], reference: str) -> Any:
    import pandas as pd

    rows = {name: _fit_row(summary) for name, summary in summaries.items()}
    first = rows[reference][1]
    for row, elpd in rows.values():
        if first is not None and elpd is not None and elpd.shape == first.shape:
            difference = elpd - first
            row["elpd_diff"] = difference.sum()
            row["diff_se"] = _sum_error(difference)
    columns = list(_FIT_COLUMNS)
    index = pd.Index(list(rows), name="fit")
    table = pd.DataFrame([row for row, _ in rows.values()], columns=columns, index=index)
    counts = ["draws", "num_points", "bad_khat", "divergences"]
    return table.astype(dict.fromkeys(counts, "Int64"))


def _format(value: Any) -> str:
    """Three significant digits of a number, all of its whole digits, a dash for none."""
    if not isinstance(value, float | np.floating):
        return "-" if str(value) in ("<NA>", "nan") else str(value)
    number = float(value)
    if np.isnan(number):
        return "-"
    if abs(number) >= 100:
        return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.1f}"
    return f"{number:.3g}"
