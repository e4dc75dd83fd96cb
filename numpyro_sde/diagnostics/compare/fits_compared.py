"""Fits of one model side by side: parameters, paths, predictive density, evidence, a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

import numpy as np
from jaxtyping import PRNGKeyArray

from numpyro_sde.diagnostics.compare.arviz_compat import get_group, is_tree
from numpyro_sde.diagnostics.compare.convert import to_arviz
from numpyro_sde.diagnostics.compare.parameter_weights import NUM_PATHS
from numpyro_sde.diagnostics.compare.started import run_starts
from numpyro_sde.diagnostics.compare.tables import (
    Differences,
    Summary,
    fit_table,
    has_time,
    labelled,
    over_time,
    parameter_table,
    path_table,
)
from numpyro_sde.diagnostics.compare.timing import Timing
from numpyro_sde.diagnostics.compare.verdicts import (
    Evidence,
    chain_verdict,
    disagreement,
    guide_verdict,
    point_verdict,
    resampled_verdict,
    tempering_verdict,
    variational_verdict,
)
from numpyro_sde.runtime.executors import ExecutorLike

_COMPARISONS = (
    *("distance", "mean_distance", "difference", "in_errors"),
    *("mean_difference", "sd_difference"),
)
_MAX_SIZE = 50  # more scalars than this in one site are summarised in a row
_MAX_ROWS = 200  # of a printed table; the data frames hold all
_HEADINGS = {
    "parameters": "Parameters (distance: 1-Wasserstein in posterior sds of {reference})",
    "paths": "Paths and large sites (largest of their elements; where the distance is largest)",
    "fits": "Fits (times in seconds)",
}


@dataclass(frozen=True)
class FitComparison:
    """Tables of :func:`compare_fits`, as pandas data frames; prints as text and as HTML.

    Attributes:
        parameters: One row for each scalar parameter and fit: `mean`, `sd`, `distance`
            (1-Wasserstein distance to the reference fit in its posterior sds), and for draws of
            a Markov chain `rhat`, `ess_bulk`, `ess_tail`, `ess_per_second` (bulk, by run time).
            Against the reference: `difference`, the larger of those of mean and sd, in its
            posterior sds, and `in_errors`, the larger of both in Monte Carlo standard errors.
        paths: One row for each path or large site and fit: the largest `distance` over its
            elements, the `mean_distance`, and `where` the largest is; the largest
            `mean_difference` and `sd_difference`, in sds of the reference, and `in_errors`; for
            draws of a Markov chain the largest `rhat` and the smallest `ess`, and where draws lie
            on two sides `side_rhat` and `side_ess` of the side that they are on.
        fits: One row for each fit: `method`, `draws`; `elpd`, `elpd_se`, `p_loo` by PSIS-LOO
            with `num_points` data points, `bad_khat` of which are above the threshold, and the
            difference `elpd_diff`, `diff_se` to the reference; for a variational fit `elbo`,
            `elbo_se`, its importance-weighted `log_evidence` with `efficiency` (effective share
            of the draws), and `khat` of the fit; for a maximum likelihood fit `log_likelihood`
            with its Monte Carlo error; `khat_parameters` and `efficiency_parameters`
            with the path integrated out, for a guide that offers `path_sites()`;
            `guide_efficiency` and `guide_khat` of the guide behind chains along guided paths;
            `round_trips` of `infer.Tempered`; `divergences`;
            `run_time` and the other seconds of :class:`Timing`.
        reference: Name of the fit that distances and differences are taken to.
        verdicts: What to make of each fit, in words.
        over_time: For each path an `xarray.Dataset` with dimensions `fit` and the path's own:
            `mean_difference` and `sd_difference` of the fits other than the reference, in its
            posterior sds, and their Monte Carlo standard errors `mean_error`, `sd_error`.

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
    verdicts: Mapping[str, str] = field(default_factory=dict)
    over_time: Mapping[str, Any] = field(default_factory=dict)

    def _tables(self) -> list[tuple[str, Any]]:
        """Headings and tables to show: fits in columns, what is known of none left out."""
        shown = []
        for name, heading in _HEADINGS.items():
            table = getattr(self, name).drop(columns="num_elements", errors="ignore")
            table = table.dropna(axis=1, how="all")
            if len(table):
                text = table.map(format_number)
                shown.append((heading.format(reference=self.reference), text))
        heading, fits = shown[-1]
        return [*shown[:-1], (heading, fits.T.rename_axis(columns=None))]

    def __repr__(self) -> str:  # what an interactive session shows
        return str(self)

    def __str__(self) -> str:
        parts = [
            f"{heading}\n{table.to_string(max_rows=_MAX_ROWS)}" for heading, table in self._tables()
        ]
        if self.verdicts:
            lines = [f"{name}: {verdict}" for name, verdict in self.verdicts.items()]
            parts.append("\n".join(["Verdicts", *lines]))
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        parts = [
            f"<h4>{heading}</h4>{table.to_html(max_rows=_MAX_ROWS)}"
            for heading, table in self._tables()
        ]
        if self.verdicts:
            items = [
                f"<li><b>{escape(name)}</b>: {escape(verdict)}</li>"
                for name, verdict in self.verdicts.items()
            ]
            parts.append(f"<h4>Verdicts</h4><ul>{''.join(items)}</ul>")
        return "".join(parts)


def compare_fits(
    fits: Mapping[str, Any],
    *,
    reference: str | None = None,
    times: Any = None,
    model: Callable[..., Any] | None = None,
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
    num_paths: int = NUM_PATHS,
    rng_key: PRNGKeyArray | None = None,
    timings: Mapping[str, Timing] | None = None,
    var_names: Iterable[str] | None = None,
    max_size: int = _MAX_SIZE,
    executor: ExecutorLike = None,
) -> FitComparison:
    """Compare fits of one model, or of models that share parameters and data.

    Parameters are the unobserved sites and deterministic values that every fit has; those with a
    time dimension, and those of more than `max_size` elements, are summarised in one row.

    PSIS-LOO takes the draws of every fit as they are: for a variational fit it is the
    predictive density of that approximation. How near the approximation is to the posterior,
    `khat` says: below 0.5 good, to 0.7 usable as a proposal, above that its parameters are not
    to be trusted. It judges path and parameters together. A guide that draws parameters first
    and paths given them, and names these by a method `path_sites()`, gets `khat_parameters` too,
    of the parameters with the path integrated out by importance sampling; for others that is
    empty. R-hat and effective sizes speak of Markov chains only and stay empty for a
    variational fit, whose draws are independent whatever their law. A time is compared only
    where :func:`timed` measured it.

    Every fit gets a verdict in words: "use it", "use it as a proposal" or "do not trust these
    parameters", with their names. Chains are judged by R-hat (1.01; above 1.05 not to be
    trusted), effective sizes (400; 100) and divergences (1 %), of a path with two modes also of the
    side that it is on; chains along guided paths by how much of the path's posterior the guide
    covers (efficiency 0.05, k-hat 0.7), since they miss what it misses without another sign, unless
    a sound fit by another engine agrees; runs of `infer.Tempered` by what their report says;
    guides by `khat` and efficiency; and all by differences from the reference of more than 0.1
    posterior sds and more than four Monte Carlo errors, where the reference can be trusted itself.
    Bad k-hats of LOO are told in every verdict. Of fits of different models (as `to_arviz` knew
    them) like-named parameters are not set against each other, unless `var_names` asks for it:
    :func:`compare_models` is for those.

    Args:
        fits: Name to fit: results of :func:`to_arviz`, anything that it converts, or a function
            without arguments that returns either, which is then run and timed.
        reference: Name of the fit to compare with; None is the first.
        times: As for `to_arviz`, for the fits that are not converted yet; likewise `model`,
            `model_args`, `model_kwargs`, `num_samples`, `num_paths` and `rng_key`. Raw fits must
            share them.
        model: See `times`.
        model_args: See `times`.
        model_kwargs: See `times`.
        num_samples: Draws from a guide, also the particles of its ELBO.
        num_paths: See `times`.
        rng_key: See `times`.
        timings: From :func:`timed`, by name of the fit.
        var_names: Sites to compare; None takes all in common.
        max_size: Largest site whose elements get rows of their own.
        executor: Where functions among `fits` run, as for `fit_panel`: None for here, a number of
            processes, or any `concurrent.futures.Executor`. One that fails is left out with a
            warning.

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
    options = {
        "times": times,
        "model": model,
        "model_args": model_args,
        "model_kwargs": model_kwargs,
        "num_samples": num_samples,
        "num_paths": num_paths,
        "rng_key": rng_key,
    }
    fits = run_starts(fits, executor, options)
    if reference not in fits:
        raise ValueError(f"the reference {reference!r} failed, so there is nothing to compare with")
    summaries = {}
    for name, fit in fits.items():
        tree = fit if is_tree(fit) else to_arviz(fit, **options)
        summaries[name] = _summarise(tree, name, (timings or {}).get(name))
    shared = _shared_variables(summaries, reference, var_names)
    small = [name for name in shared if _is_small(labelled(summaries, reference, name), max_size)]
    large = {
        name: Differences.between(summaries, reference, name)
        for name in shared
        if name not in small
    }
    table = FitComparison(
        parameters=parameter_table(summaries, reference, small),
        paths=path_table(summaries, reference, large),
        fits=fit_table(summaries, reference),
        reference=reference,
        over_time=over_time(summaries, reference, large),
    )
    strangers = _other_models(summaries, reference)
    if var_names is None:
        table = _without_comparisons(table, strangers)
    return replace(table, verdicts=_verdicts(summaries, table, strangers))


def _other_models(summaries: Mapping[str, Summary], reference: str) -> frozenset[str]:
    """Fits of a model that is known not to be the reference's."""
    first = summaries[reference].attrs.get("model")
    models = {name: summary.attrs.get("model") for name, summary in summaries.items()}
    return frozenset(name for name, own in models.items() if first and own and own != first)


def _without_comparisons(table: FitComparison, strangers: frozenset[str]) -> FitComparison:
    """Numbers that set a fit against a reference of another model, taken out."""
    tables = {}
    for name in ("parameters", "paths"):
        frame = getattr(table, name)
        if len(frame):
            rows = frame.index.get_level_values("fit").isin(list(strangers))
            columns = [c for c in _COMPARISONS if c in frame.columns]
            frame = frame.copy()
            frame.loc[rows, columns] = np.nan
        tables[name] = frame
    return replace(table, **tables)


def _summarise(tree: Any, name: str, timing: Timing | None) -> Summary:
    posterior = get_group(tree, "posterior")
    if posterior is None:
        raise ValueError(f"fit {name!r} has no posterior group")
    attrs = dict(posterior.attrs)
    if timing is not None:
        attrs |= timing.attributes()
    return Summary(tree, posterior, attrs)


def _shared_variables(
    summaries: Mapping[str, Summary], reference: str, var_names: Iterable[str] | None
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
    return not has_time(variable) and int(np.prod(variable.shape[2:])) <= max_size


def _verdicts(
    summaries: Mapping[str, Summary], table: FitComparison, strangers: frozenset[str]
) -> dict[str, str]:
    """A verdict on each fit, the reference first: others are held against it if it is sound."""
    sound = False
    verdicts: dict[str, str] = {}
    for name in (table.reference, *(one for one in summaries if one != table.reference)):
        summary, row = summaries[name], table.fits.loc[name]
        known = _evidence(table, name)
        other = name in strangers
        against = table.reference if sound and name != table.reference and not other else None
        if summary.method == "variational":
            text = variational_verdict(known, row, against)
            verdicts[name] = _with_notes(text, row, table.reference if other else None)
            continue
        if summary.is_point:
            verdicts[name] = point_verdict(known, summary.attrs, against)
            continue
        if summary.method == "psis":
            ess = float(summary.attrs["importance_ess"])
            text, usable = resampled_verdict(known, row["khat"], ess, summary.num_draws)
        else:
            lost = row["divergences"]
            divergences = 0 if str(lost) == "<NA>" else int(lost)
            text, usable = chain_verdict(known, divergences, summary.num_draws)
            if usable and (why := tempering_verdict(summary.attrs)):
                text, usable = why, False
        if usable and against is not None:
            text = disagreement(known, against) or text
        elif usable and (why := guide_verdict(row)):
            # No sound fit by another engine to hold it against: it may have missed a mode.
            text, usable = why, False
        sound = sound or (usable and name == table.reference)
        verdicts[name] = _with_notes(text, row, table.reference if other else None)
    return {name: verdicts[name] for name in summaries}


def _with_notes(text: str, row: Any, stranger_to: str | None) -> str:
    """A verdict with what is to be said of the fit's elpd and of another model."""
    notes = [text]
    if stranger_to is not None:
        notes.append(
            f"another model than {stranger_to}, so like-named parameters are not compared: "
            "compare_models judges it by prediction"
        )
    lost = row["bad_khat"]
    bad = 0 if str(lost) == "<NA>" else int(lost)
    if bad:
        notes.append(f"not its elpd ({bad} of {int(row['num_points'])} k-hats of LOO are bad)")
    return "; ".join(notes)


def fit_problems(name: str, summary: Summary) -> str:
    """Why the draws of a fit are not to be trusted; empty if they are.

    Example:
        >>> import numpy as np
        >>> from numpyro_sde.diagnostics import to_arviz
        >>> tree = to_arviz({"a": np.random.default_rng(0).normal(size=2000)})
        >>> fit_problems("NUTS", Summary(tree, get_group(tree, "posterior"), {}))
        ''
    """
    small = [str(v) for v in summary.posterior.data_vars if _is_small(summary.posterior[v], 50)]
    alone = {name: summary}
    table = FitComparison(
        parameters=parameter_table(alone, name, small),
        paths=path_table(alone, name, {}),
        fits=fit_table(alone, name),
        reference=name,
    )
    text = _verdicts(alone, table, frozenset())[name]
    return text.split("; not its elpd")[0] if text.startswith("do not trust") else ""


def _evidence(table: FitComparison, name: str) -> dict[str, Evidence]:
    """What is known of each parameter and path under a fit."""
    known: dict[str, Evidence] = {}
    for label, row in _rows(table.parameters, name):
        still = row["sd"] == 0.0 and table.parameters.loc[label, "sd"].max() > 0.0
        ess = 1.0 if still else min(row["ess_bulk"], row["ess_tail"])
        known[str(label)] = Evidence(row["rhat"], ess, row["difference"], row["in_errors"], 1)
    for label, row in _rows(table.paths, name):
        size = np.fmax(row["mean_difference"], row["sd_difference"])
        number = int(row["num_elements"])
        known[str(label)] = Evidence(row["rhat"], row["ess"], size, row["in_errors"], number)
        if not np.isnan(row["side_rhat"]):
            found = Evidence(row["side_rhat"], row["side_ess"], np.nan, np.nan, 0)
            known[f"which side {label} is on"] = found
    return known


def _rows(table: Any, fit: str) -> Iterable[tuple[Any, Any]]:
    return table.xs(fit, level="fit").iterrows() if len(table) else ()


def format_number(value: Any) -> str:
    """Three significant digits of a number, all of its whole digits, a dash for none.

    Example:
        >>> format_number(0.123456), format_number(1234.5), format_number(float("nan"))
        ('0.123', '1234', '-')
    """
    if not isinstance(value, float | np.floating):
        return "-" if str(value) in ("<NA>", "nan") else str(value)
    number = float(value)
    if np.isnan(number):
        return "-"
    if abs(number) >= 100:
        return f"{number:.0f}" if abs(number) >= 1000 else f"{number:.1f}"
    return f"{number:.3g}"
