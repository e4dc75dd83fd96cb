"""Models of one data set side by side, judged by what they predict.

Parameters of different models are not the same quantity, though they may be called alike: the
`scale` of a square-root process is no `scale` of a Vasicek process. So none are compared here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from numpyro_sde.diagnostics.compare.arviz_compat import get_group, is_tree, stacking_weights
from numpyro_sde.diagnostics.compare.convert import to_arviz
from numpyro_sde.diagnostics.compare.fits_compared import fit_problems, format_number
from numpyro_sde.diagnostics.compare.statistics import khat_threshold, leave_one_out
from numpyro_sde.diagnostics.compare.tables import (
    Summary,
    fit_table,
    pointwise_log_likelihood,
    relative_efficiency,
    sum_error,
)
from numpyro_sde.diagnostics.prediction.leave_future import LeaveFutureOut

_ALIKE = 4.0  # nats: models that predict alike, whatever the standard error says
_MANY_ERRORS = 2.0
_FEW_POINTS = 100
_KHAT = 0.7


@dataclass(frozen=True)
class ModelComparison:
    """Table of :func:`compare_models`, the best model first; prints as text and as HTML.

    Attributes:
        models: A pandas data frame, one row a model: `elpd`, the expected log predictive density,
            and its standard error `elpd_se`; `elpd_diff` to the best model, with `diff_se` of the
            difference; `weight` by stacking; `p_loo`, the effective number of parameters;
            `num_points`, the data points judged; `bad_khat`, how many of them cannot be trusted;
            `log_evidence` and `log_evidence_se` where known, and `log_bayes_factor` with
            `log_bayes_factor_se`: the log of the Bayes factor against the model of the largest
            evidence.
        by: `"loo"` (leave-one-out) or `"lfo"` (leave-future-out).
        verdicts: What to make of each model, in words.
        pointwise: For each model the log predictive density of every point.
        parameters: Means and sds of the parameters asked for; None where none were.

    Example:
        >>> import numpy as np
        >>> from numpyro_sde.diagnostics import compare_models, LeaveFutureOut
        >>> points = np.random.default_rng(0).normal(-1.0, 0.3, size=200)
        >>> def result(p):
        ...     return LeaveFutureOut(p, np.arange(200.0), np.zeros(200), np.array([0]), 1, 500)
        >>> table = compare_models({"plain": result(points - 0.2), "rich": result(points)})
        >>> list(table.models.index), table.verdicts["rich"]
        (['rich', 'plain'], 'predicts best')
    """

    models: Any
    by: str
    verdicts: Mapping[str, str]
    pointwise: Mapping[str, Float[np.ndarray, " n"]] = field(default_factory=dict)
    parameters: Any = None

    def _tables(self) -> list[tuple[str, Any]]:
        name = {"loo": "leave-one-out", "lfo": "leave-future-out"}[self.by]
        shown = self.models.dropna(axis=1, how="all").map(format_number)
        tables = [(f"Models by {name} (log densities in nats; the larger the better)", shown)]
        if self.parameters is not None:
            tables.append(("Parameters asked for", self.parameters.map(format_number)))
        return tables

    def __repr__(self) -> str:  # what an interactive session shows
        return str(self)

    def __str__(self) -> str:
        parts = [f"{heading}\n{table.to_string()}" for heading, table in self._tables()]
        lines = [f"{name}: {verdict}" for name, verdict in self.verdicts.items()]
        return "\n\n".join([*parts, "\n".join(["Verdicts", *lines])])

    def _repr_html_(self) -> str:
        parts = [f"<h4>{heading}</h4>{table.to_html()}" for heading, table in self._tables()]
        items = [
            f"<li><b>{escape(name)}</b>: {escape(verdict)}</li>"
            for name, verdict in self.verdicts.items()
        ]
        return "".join([*parts, f"<h4>Verdicts</h4><ul>{''.join(items)}</ul>"])

    def plot(self, axes: Any = None) -> list[Any]:
        """Differences with two standard errors, and where along the data they come from.

        Args:
            axes: Two axes to draw on; None makes a new figure.

        Returns:
            The list of `matplotlib.axes.Axes`.

        Raises:
            ValueError: If not two axes are given.
            ImportError: If Matplotlib is not installed.
        """
        from numpyro_sde.diagnostics.prediction.model_plots import plot_models

        return plot_models(self, axes)


class _Judged(NamedTuple):
    """One model's predictions and what is to be said of its fit."""

    points: Float[np.ndarray, " n"]
    khat: Float[np.ndarray, " n"]
    threshold: float
    row: dict[str, Any]
    problem: str


def compare_models(
    fits: Mapping[str, Any],
    *,
    log_evidence: Mapping[str, Any] | None = None,
    parameters: Iterable[str] = (),
    times: Any = None,
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
) -> ModelComparison:
    """Compare different models of the same data: by prediction, and by evidence if given.

    Each model's expected log predictive density is found by PSIS leave-one-out from its log
    likelihood, or taken from :func:`lfo`, which is the better judge of a model of time: points
    left out one by one are predicted from their future too. Differences are paired by data point,
    and their standard errors are those of the difference.

    A difference below 4 nats is none to speak of, whatever its error; one below two standard
    errors is not certain; with fewer than 100 data points the errors themselves are rough (Sivula,
    Magnusson, Matamoros and Vehtari 2020, arXiv:2008.10296). Bad Pareto k-hats mean that the
    density of those points is too optimistic: they enter every verdict, and where it would be
    another without the points at which either model's k-hat is bad, it says so ("seems to"). A
    latent path makes them; integrate it out, or take `lfo`, which fits again where k-hat asks.

    All models must predict the same data in the same unit: the density of log prices is not that
    of prices.

    Args:
        fits: Name to fit: results of :func:`to_arviz` with their log likelihood, fits that it
            converts, or results of :func:`lfo` (all of them, with equal `start` and `horizon`).
        log_evidence: By name a log marginal likelihood, a pair with its standard error, or what
            `nsde.evidence` returned; what is known of a fit already (:func:`refine_fit`,
            `infer.Tempered`) need not be given. Their differences are log Bayes factors.
        parameters: Names of parameters to list side by side, in the models that have them. They
            are not compared.
        times: As for `to_arviz`, for fits that are not converted yet; so are the next three.
        model_args: See `times`.
        model_kwargs: See `times`.
        num_samples: Draws from a guide.

    Raises:
        ValueError: If there is no fit, a fit has no log likelihood, models predict different data
            or numbers of points, or kinds are mixed.

    Source: Vehtari, Gelman and Gabry (2017), Statistics and Computing 27, 1413-1432; stacking,
    Yao, Vehtari, Simpson and Gelman (2018), Bayesian Analysis 13, 917-1007.

    Example:
        >>> import numpy as np, numpyro, numpyro.distributions as dist
        >>> from numpyro_sde.diagnostics import compare_models, to_arviz
        >>> y = np.random.default_rng(0).normal(size=150)
        >>> def model(sd):
        ...     level = numpyro.sample("level", dist.Normal(0.0, 1.0))
        ...     with numpyro.plate("i", 150):
        ...         numpyro.sample("y", dist.Normal(level, sd), obs=y)
        >>> draws = {"level": np.random.default_rng(1).normal(0.0, 0.08, size=500)}
        >>> fits = {f"sd {s}": to_arviz(draws, model=model, model_args=(s,)) for s in (1.0, 3.0)}
        >>> table = compare_models(fits)
        >>> print(table.verdicts["sd 3.0"].split(" (")[0])
        predicts worse by 103
    """
    if not fits:
        raise ValueError("fits must name at least one model, got an empty mapping")
    kinds = {name: isinstance(fit, LeaveFutureOut) for name, fit in fits.items()}
    if len(set(kinds.values())) > 1:
        raise ValueError(
            f"fits must be all results of lfo or none: {[n for n, k in kinds.items() if k]} are"
        )
    if unknown := [name for name in log_evidence or {} if name not in fits]:
        raise ValueError(f"log_evidence names {unknown}, but the fits are {list(fits)}")
    by_future = next(iter(kinds.values()))
    trees: dict[str, Any] = {}
    if by_future:
        _check_same_future(fits)
        judged = {name: _judge_future(fit) for name, fit in fits.items()}
    else:
        for name, fit in fits.items():
            trees[name] = (
                fit
                if is_tree(fit)
                else to_arviz(
                    fit,
                    times=times,
                    model_args=model_args,
                    model_kwargs=model_kwargs,
                    num_samples=num_samples,
                )
            )
        _check_same_data(trees)
        judged = {name: _judge_loo(name, tree) for name, tree in trees.items()}
    sizes = {name: one.points.size for name, one in judged.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"models must predict the same data points, got these numbers: {sizes}")
    table = _table(judged, log_evidence or {})
    return ModelComparison(
        models=table,
        by="lfo" if by_future else "loo",
        verdicts={name: _verdict(table, name, judged, by_future) for name in table.index},
        pointwise={name: judged[name].points for name in table.index},
        parameters=_listed(trees, list(parameters)),
    )


def _judge_future(result: LeaveFutureOut) -> _Judged:
    row = {"draws": result.num_draws, "num_fits": len(result.refits)}
    return _Judged(result.pointwise, result.khat, _KHAT, row, "")


def _judge_loo(name: str, tree: Any) -> _Judged:
    posterior = get_group(tree, "posterior")
    if posterior is None:
        raise ValueError(f"fit {name!r} has no posterior group")
    summary = Summary(tree, posterior, dict(posterior.attrs))
    log_likelihood = pointwise_log_likelihood(summary)
    if log_likelihood is None:
        raise ValueError(
            f"fit {name!r} has no log likelihood: convert it by to_arviz with its model"
        )
    loo = leave_one_out(log_likelihood, relative_efficiency(summary))
    own = fit_table({name: summary}, name).loc[name]
    row = {
        "draws": summary.num_draws,
        "p_loo": loo.num_effective,
        "log_evidence": own["log_evidence"],
        "log_evidence_se": summary.attrs.get("log_evidence_se", np.nan),
    }
    threshold = khat_threshold(summary.num_draws)
    return _Judged(loo.elpd, loo.khat, threshold, row, fit_problems(name, summary))


def _table(judged: Mapping[str, _Judged], log_evidence: Mapping[str, Any]) -> Any:
    import pandas as pd

    weights = stacking_weights({name: one.points for name, one in judged.items()})
    order = sorted(judged, key=lambda name: -judged[name].points.sum())
    best = judged[order[0]].points
    rows = []
    for name in order:
        one = judged[name]
        given = log_evidence.get(name)
        if given is not None:
            value, error = _with_error(given)
            one.row.update(log_evidence=value, log_evidence_se=error)
        difference = one.points - best
        rows.append(
            {
                "elpd": one.points.sum(),
                "elpd_se": sum_error(one.points),
                "elpd_diff": difference.sum(),
                "diff_se": 0.0 if name == order[0] else sum_error(difference),
                "weight": weights[name],
                "num_points": one.points.size,
                "bad_khat": int(np.sum(~(one.khat <= one.threshold))),
                **one.row,
            }
        )
    columns = [
        *("elpd", "elpd_se", "elpd_diff", "diff_se", "weight", "p_loo", "num_points", "bad_khat"),
        *("log_evidence", "log_evidence_se", "log_bayes_factor", "log_bayes_factor_se"),
        *("num_fits", "draws"),
    ]
    table = pd.DataFrame(rows, index=pd.Index(order, name="model"), columns=columns)
    _add_bayes_factors(table)
    counts = ["num_points", "bad_khat", "draws", "num_fits"]
    floats = [name for name in columns if name not in counts]
    return table.astype({**dict.fromkeys(counts, "Int64"), **dict.fromkeys(floats, float)})


def _with_error(given: Any) -> tuple[float, float]:
    """A log evidence and its standard error, from what a user may hand over."""
    if hasattr(given, "log_evidence"):
        error = getattr(given, "error", getattr(given, "log_evidence_se", np.nan))
        return float(given.log_evidence), float(error)
    pair = tuple(np.ravel(given)) if np.ndim(given) else (given, np.nan)
    return float(pair[0]), float(pair[1])


def _add_bayes_factors(table: Any) -> None:
    """Log Bayes factors against the model of the largest evidence, where two or more are known."""
    known = table["log_evidence"].astype(float)
    if known.notna().sum() < 2:
        return
    best = known.idxmax()
    errors = table["log_evidence_se"].astype(float)
    table["log_bayes_factor"] = known - known[best]
    table["log_bayes_factor_se"] = np.hypot(errors, errors[best])
    table.loc[best, "log_bayes_factor_se"] = 0.0


def _verdict(table: Any, name: str, judged: Mapping[str, _Judged], by_future: bool) -> str:
    row, one = table.loc[name], judged[name]
    best = table.index[0]
    parts = []
    if name == best:
        # What others are found to be worse by may rest on points that cannot be trusted.
        others = [n for n in table.index[1:] if _rests_on(judged[n], one)[0]]
        predicts = "seems to predict" if others else "predicts"
        parts.append(f"{predicts} best" if len(table) > 1 else "the only model")
    else:
        parts += _difference(one, judged[best], best)
    evidence = table["log_evidence"]
    if evidence.notna().sum() > 1 and np.isfinite(evidence[name]):
        behind = -float(table["log_bayes_factor"][name])
        error = float(table["log_bayes_factor_se"][name])
        told = f" (se {error:.1f})" if np.isfinite(error) else ""
        sure = "" if not behind < _MANY_ERRORS * error else ", which is not certain"
        text = f"log evidence less by {behind:.1f}{told}{sure}"
        parts.append("largest evidence" if behind == 0 else text)
    if bad := int(row["bad_khat"]):
        remedy = "a smaller khat_threshold" if by_future else "lfo says more"
        parts.append(
            f"its elpd is not to be trusted: {bad} of {one.points.size} k-hats above "
            f"{one.threshold:.2f} ({remedy})"
        )
    if one.problem:
        parts.append(one.problem)
    return "; ".join(parts)


def _difference(one: _Judged, best: _Judged, name: str) -> list[str]:
    """By how much a model predicts worse than the best, and how far that is to be believed."""
    difference = one.points - best.points
    size, error = -difference.sum(), sum_error(difference)
    text = f"{size:.{0 if size >= 10 else 1}f} (se {error:.1f})"
    rests, bad = _rests_on(one, best)
    predicts = "seems to predict" if rests else "predicts"
    kind = _kind(difference)
    if kind == "alike":
        parts = [f"{predicts} as well as {name}: worse by {text}"]
    else:
        parts = [f"{predicts} worse by {text}{', which is not certain' * (kind == 'uncertain')}"]
    if rests:
        without = -difference[~bad].sum() + 0.0  # no minus sign before a zero
        parts.append(
            f"that rests on {bad.sum()} points with bad k-hats: by {without:.1f} without them"
        )
    if difference.size < _FEW_POINTS:
        parts.append(f"of {difference.size} points the error is rough")
    return parts


def _kind(difference: Float[np.ndarray, " n"]) -> str:
    """What a difference to the best model amounts to."""
    size = -difference.sum()
    if size < _ALIKE:
        return "alike"
    return "uncertain" if size < _MANY_ERRORS * sum_error(difference) else "worse"


def _rests_on(one: _Judged, best: _Judged) -> tuple[bool, np.ndarray]:
    """Whether points with bad k-hats decide between two models; and which points these are.

    A bad k-hat makes a model look better than it is: those of the best count against it, and those
    of the other where the two are found alike.
    """
    difference = one.points - best.points
    kind = _kind(difference)
    good = best.khat <= best.threshold
    if kind == "alike":
        good = good & (one.khat <= one.threshold)
    if good.all():
        return False, ~good
    return not good.any() or _kind(difference[good]) != kind, ~good


def _check_same_future(fits: Mapping[str, LeaveFutureOut]) -> None:
    first = next(iter(fits.values()))
    for name, fit in fits.items():
        if fit.horizon != first.horizon or not np.array_equal(fit.origins, first.origins):
            raise ValueError(
                f"results of lfo must have the same origins and horizon: {name!r} has "
                f"{fit.origins.size} origins, horizon {fit.horizon}; the first has "
                f"{first.origins.size}, {first.horizon}"
            )


def _check_same_data(trees: Mapping[str, Any]) -> None:
    """Raise where two models say what data they had, and these differ."""
    known: dict[str, tuple[str, np.ndarray]] = {}
    for name, tree in trees.items():
        group = get_group(tree, "observed_data")
        for site in [] if group is None else group.data_vars:
            values = np.asarray(group[site].values, np.float64)
            if str(site) not in known:
                known[str(site)] = (name, values)
                continue
            other, first = known[str(site)]
            if first.shape != values.shape or not np.allclose(first, values, equal_nan=True):
                raise ValueError(
                    f"models must have the same data: {str(site)!r} of {name!r} is not that of "
                    f"{other!r}"
                )


def _listed(trees: Mapping[str, Any], names: list[str]) -> Any | None:
    """Means and sds of parameters by model, where it has them."""
    if not names:
        return None
    import pandas as pd

    rows = {}
    for var in names:
        for name, tree in trees.items():
            posterior = get_group(tree, "posterior")
            if var not in posterior:
                continue
            values = np.asarray(posterior[var].values, np.float64)
            for element in np.ndindex(values.shape[2:]):
                draws = values[(..., *element)]
                label = f"{var}{list(element)}" if element else var
                rows[label, name] = {"mean": draws.mean(), "sd": draws.std(ddof=1)}
    if not rows:
        raise ValueError(f"parameters names {names}, which are in none of the fits {list(trees)}")
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["parameter", "model"])
