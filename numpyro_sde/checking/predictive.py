"""Is the model right for these data? Posterior predictive checks and one-step residuals.

Posterior predictive checks: Gelman, Meng and Stern (1996), Statistica Sinica 6, 733-807. Residuals:
:mod:`numpyro_sde.diagnostics.prediction.residuals`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray
from scipy.special import ndtr

from numpyro_sde.checking.fitting import CheckedFit
from numpyro_sde.checking.replicas import simulator
from numpyro_sde.checking.steps import LEVEL, Step, stopwatch
from numpyro_sde.diagnostics.compare.plots import load_pyplot
from numpyro_sde.diagnostics.compare.sites import law_times
from numpyro_sde.diagnostics.prediction.residuals import Residuals, residuals
from numpyro_sde.filters import AbstractFilter, Forward, Kalman, Particle

_BATCH = 32
_MAX_SERIES = 6
_PARTICLES = 400


def _lag_one(y: Float[np.ndarray, "... T"]) -> Float[np.ndarray, "..."]:
    z = y - np.nanmean(y, axis=-1, keepdims=True)
    return np.nanmean(z[..., 1:] * z[..., :-1], axis=-1) / np.nanmean(z**2, axis=-1)


STATISTICS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda y: np.nanmean(y, axis=-1),
    "sd": lambda y: np.nanstd(y, axis=-1),
    "smallest": lambda y: np.nanmin(y, axis=-1),
    "largest": lambda y: np.nanmax(y, axis=-1),
    "sd of changes": lambda y: np.nanstd(np.diff(y, axis=-1), axis=-1),
    "largest change": lambda y: np.nanmax(np.abs(np.diff(y, axis=-1)), axis=-1),
    "autocorrelation": _lag_one,
}
_SAYS = {
    "mean": "level",
    "sd": "spread",
    "smallest": "lower extreme",
    "largest": "upper extreme",
    "sd of changes": "roughness",
    "largest change": "largest jump",
    "autocorrelation": "memory",
}


def predictive_check(
    fit: CheckedFit,
    *,
    num_draws: int = 400,
    statistics: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None = None,
    rng_key: PRNGKeyArray | None = None,
) -> Step:
    """Data as the fitted model would make them, set beside the data by what can be seen of them.

    New paths and data are drawn at posterior draws of the parameters; a statistic of the data that
    hardly any of them reaches is a misfit. Parameters have seen the data, so p-values are
    conservative: a small one is bad, a middling one says little.

    Args:
        fit: From `nsde.checking.fit`.
        num_draws: How many data sets to draw.
        statistics: Name to a function of series `(..., T)`, NaN where missing, that drops the last
            axis; None takes level, spread, extremes, roughness, largest change, autocorrelation.
        rng_key: None is `jax.random.key(2)`.

    Returns:
        The verdict, its `result` the drawn data by site, `(draw, ...)`.

    Source: see the module's description.

    Example:
        >>> import jax, numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model(y):
        ...     a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(a, 1.0).expand([9]).to_event(1), obs=y)
        >>> found = nsde.checking.fit(model, np.r_[np.linspace(-1, 1, 8), 30.0], progress=False)
        >>> nsde.checking.predictive_check(found).level  # one datum is far out
        'bad'
    """
    name = "posterior predictive"
    if fit.sites.trouble:
        return Step(name, "not done", fit.sites.trouble)
    key = jax.random.key(2) if rng_key is None else rng_key
    with stopwatch() as seconds:
        drawn = _replicated(fit, num_draws, key)
        lost = _not_finite(fit, drawn)
        rows: dict[str, dict[str, float]] = {}
        for site, replicated in drawn.items():
            data = np.asarray(fit.sites.observed[site], np.float64)
            for label, own, others in _series(fit, site, data, replicated):
                rows |= _tail_areas(label, own, others, statistics or STATISTICS)
        took = seconds()
    if not rows:
        return Step(name, "not done", "no observation site has a series of numbers", seconds=took)
    import pandas as pd

    table = pd.DataFrame.from_dict(rows, orient="index")
    bad = table[table["p_value"] * len(table) < LEVEL]
    if len(bad):
        parts = []
        for label, row in list(bad.iterrows())[:4]:
            what = str(label).rpartition(": ")
            said = _SAYS.get(what[2], what[2])
            parts.append(
                f"the {said} of {what[0]} is {row['data']:.3g}, the model makes it "
                f"{row['low']:.3g} to {row['high']:.3g}"
            )
        level, words = "bad", "the data are not such as the model makes: " + "; ".join(parts)
    else:
        level, words = "good", f"{len(table)} statistics of the data are such as the model makes"
    if lost:
        level = "bad"
        words += (
            f"; {lost} of {num_draws} data sets that it makes run off to infinity: steps too long "
            "for the drift, or a drift that does not hold the state"
        )
    return Step(
        name,
        level,  # type: ignore[arg-type]
        words,
        table=table,
        result=drawn,
        draw=lambda: _plot(fit, drawn),
        seconds=took,
    )


def _replicated(fit: CheckedFit, num_draws: int, key: PRNGKeyArray) -> dict[str, np.ndarray]:
    simulate = simulator(fit.model, fit.args, fit.kwargs, fit.sites)
    values = fit.parameters
    total = len(next(iter(values.values()))) if values else num_draws
    chosen = np.linspace(0, total - 1, min(num_draws, total)).round().astype(int)
    thinned = {name: jnp.asarray(value[chosen]) for name, value in values.items()}
    keys = jax.random.split(key, len(chosen))
    drawn = jax.lax.map(lambda inputs: simulate(*inputs), (thinned, keys), batch_size=_BATCH)
    return {name: np.array(value, np.float64) for name, value in drawn.items()}


def _not_finite(fit: CheckedFit, drawn: Mapping[str, np.ndarray]) -> int:
    """How many data sets are not finite where the data are; they are taken out by NaN."""
    bad = np.zeros(len(next(iter(drawn.values()))), bool)
    for site, values in drawn.items():
        there = np.isfinite(np.asarray(fit.sites.observed[site], np.float64))
        bad |= (~np.isfinite(values) & there).reshape(len(bad), -1).any(axis=1)
    for site in drawn:
        drawn[site][bad] = np.nan
    return int(bad.sum())


def _series(
    fit: CheckedFit, site: str, data: np.ndarray, replicated: np.ndarray
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Each scalar series of a site, time last, with its replications."""
    axis = _time_axis(fit, site, data)
    if axis is None or data.shape[axis] < 3:
        return []
    own = np.moveaxis(data, axis, -1).reshape(-1, data.shape[axis])
    others = np.moveaxis(replicated, axis + 1, -1).reshape(len(replicated), *own.shape)
    labels = [site] if len(own) == 1 else [f"{site}[{k}]" for k in range(len(own))]
    kept = [k for k in range(len(own)) if np.isfinite(own[k]).sum() > 2][:_MAX_SERIES]
    return [(labels[k], own[k], others[:, k]) for k in kept]


def _time_axis(fit: CheckedFit, site: str, data: np.ndarray) -> int | None:
    law = fit.sites.data_laws.get(site)
    if law is None or not law.event_dim:
        return None if data.ndim == 0 else data.ndim - 1
    return data.ndim - law.event_dim


def _tail_areas(
    label: str,
    own: np.ndarray,
    others: np.ndarray,
    statistics: Mapping[str, Callable[[np.ndarray], np.ndarray]],
) -> dict[str, dict[str, float]]:
    rows = {}
    for name, function in statistics.items():
        with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of slices that are all NaN
            seen, made = float(function(own)), np.asarray(function(others), np.float64)
        made = made[np.isfinite(made)]
        if not np.isfinite(seen) or made.size == 0:
            continue
        # Ties count half; the datum is one of them, so that no p-value is zero.
        above = (np.sum(made > seen) + 0.5 * np.sum(made == seen) + 0.5) / (made.size + 1)
        low, high = np.quantile(made, [0.005, 0.995])
        tail = 2.0 * min(above, 1.0 - above)
        if not made.min() <= seen <= made.max():  # beyond what draws can count
            z = (seen - made.mean()) / max(made.std(), 1e-30)
            tail = min(tail, 2.0 * float(ndtr(-abs(z))))
        rows[f"{label}: {name}"] = {
            "data": seen,
            "low": low,
            "median": float(np.median(made)),
            "high": high,
            "p_value": min(tail, 1.0),
        }
    return rows


def _plot(fit: CheckedFit, drawn: Mapping[str, np.ndarray]) -> Any:
    """The data over bands of what the model makes."""
    panels = [
        (label, own, others, _clock(fit, site, own))
        for site, values in drawn.items()
        for label, own, others in _series(
            fit, site, np.asarray(fit.sites.observed[site], np.float64), values
        )
    ][:_MAX_SERIES]
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(7.2, 2.6 * len(panels)), squeeze=False, layout="constrained"
    )
    for axis, (label, own, others, times) in zip(axes[:, 0], panels, strict=True):
        for low, high in ((0.05, 0.95), (0.25, 0.75)):
            band = np.nanquantile(others, [low, high], axis=0)
            axis.fill_between(times, *band, color="C0", alpha=0.2, linewidth=0)
        for one in others[:3]:
            axis.plot(times, one, color="C0", linewidth=0.6, alpha=0.7)
        axis.plot(times, own, "k.", markersize=3, label="data")
        axis.set(ylabel=label, xlabel="time")
    return figure


def _clock(fit: CheckedFit, site: str, own: np.ndarray) -> np.ndarray:
    law = fit.sites.data_laws.get(site)
    times = None if law is None else law_times(law)
    fits = times is not None and times.ndim == 1 and len(times) == len(own)
    return times if fits and times is not None else np.arange(len(own))


def residual_check(
    fit: CheckedFit,
    *,
    method: AbstractFilter | None = None,
    num_draws: int = 100,
    rng_key: PRNGKeyArray | None = None,
) -> Step:
    """One-step residuals of a fit, and what their departures mean.

    Args:
        fit: From `nsde.checking.fit`.
        method: The filter; None takes that of the treatment, and particles for a path that was
            kept latent.
        num_draws: Parameter draws at most.
        rng_key: None is `jax.random.key(3)`.

    Returns:
        The verdict, its `result` a `Residuals`.

    Example:
        >>> import numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model(y):
        ...     scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     walk = nsde.processes.BrownianMotion(0.0, scale)
        ...     numpyro.sample("y", nsde.SDEPath(walk, np.arange(20.0), init=0.0), obs=y)
        >>> found = nsde.checking.fit(model, np.sin(np.arange(20.0)), progress=False)
        >>> "serial" in nsde.checking.residual_check(found).words
        True
    """
    name = "one-step residuals"
    key = jax.random.key(3) if rng_key is None else rng_key
    if not fit.sites.paths:
        return Step(name, "not done", "the model has no path")
    with stopwatch() as seconds:
        chosen = method or _filter(fit)
        found = residuals(
            fit.parameters,
            method=chosen,
            model=fit.model,
            model_args=fit.args,
            model_kwargs=fit.kwargs,
            num_draws=num_draws,
            rng_key=key,
        )
        took = seconds()
    found = Residuals(found.pit, found.times, found.num_draws, found.event_dims, level=LEVEL)
    values = found.p_values
    number = int(np.isfinite(values.to_numpy()).sum())
    if number == 0:
        lost = any(np.isnan(u).all() for u in found.pit.values())
        why = "predictions under some draws are not finite" if lost else "too few data for tests"
        return Step(name, "not done", why, result=found, seconds=took)
    bad = [
        f"{_MEANS[test]} ({test} of {site}, p {value:.1g})"
        for site, row in values.iterrows()
        for test, value in row.items()
        if value * number < LEVEL
    ]
    words = (
        f"what came next is not what the model said would: {'; '.join(bad[:5])}"
        if bad
        else f"each datum came as predicted from those before it ({number} tests)"
    )
    return Step(
        name,
        "bad" if bad else "good",
        words,
        table=found.table(),
        result=found,
        draw=lambda: found.plot()[0].figure,
        seconds=took,
    )


_MEANS = {
    "uniform": "the shape of the predictions is wrong: heavier tails, jumps, another emission",
    "location": "predictions are off to one side: the drift",
    "spread": "too little or too much noise",
    "serial": "serial dependence is left: the dynamics are too simple",
    "volatility": "the volatility changes: the diffusion hangs on the state or is a process",
}


def _filter(fit: CheckedFit) -> AbstractFilter | None:
    treatments = set(fit.treatments.values())
    if treatments <= {"observed"} and fit.treatments:
        return None
    if "integrated out" in treatments:
        whole = any(law.whole_states for law in fit.sites.laws.values())
        return Forward() if whole else Kalman()
    latent = [law for name, law in fit.sites.laws.items() if name not in fit.sites.data]
    return Particle(_PARTICLES) if latent else None
