"""Is the engine right on this data set? Posterior simulation-based calibration.

Sailynoja, Schmitt, Buerkner and Vehtari (2025), "Posterior SBC", arXiv:2502.03279: the posterior
given the data is the prior of a second data set that is drawn from it; ranks of its parameters
among draws given both are uniform if the engine is exact. Calibration over the prior
(`diagnostics.sbc`) asks the same of data sets that may look nothing like yours.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray
from scipy.special import chdtr, ndtri

from numpyro_sde.checking.engines import refitter
from numpyro_sde.checking.fitting import CheckedFit
from numpyro_sde.checking.replicas import doubled, simulator
from numpyro_sde.checking.steps import LEVEL, Step, stopwatch
from numpyro_sde.diagnostics.calibration.replicates import rank_truth
from numpyro_sde.diagnostics.calibration.sbc import SBCResult

_NUM_RANKS = 31
_MAX_QUANTITIES = 20
_FEWEST = 20  # replicates below which nothing can be told
_EDGE = 1e-6


def posterior_sbc(
    fit: CheckedFit,
    num_replicates: int = 60,
    *,
    num_warmup: int = 200,
    num_draws: int = 200,
    time_budget: float = 120.0,
    rng_key: PRNGKeyArray | None = None,
    progress: bool = True,
) -> Step:
    """Calibrate the engine of a fit around its own posterior.

    Each replicate takes a posterior draw of the parameters, draws new data and paths from the model
    at it, fits both data sets together with the same engine and treatment, compiled once, and ranks
    the draw. It says whether the engine is exact for such data, not whether the model is right.

    Args:
        fit: From `nsde.checking.fit`.
        num_replicates: Replicates at most.
        num_warmup: Warm-up iterations of each; a guide takes the steps that the fit took.
        num_draws: Draws of each.
        time_budget: Seconds, after which a replicate is given up; a compilation is not interrupted.
        rng_key: None is `jax.random.key(1)`.
        progress: Show progress on standard error.

    Returns:
        The verdict, its `result` an `SBCResult`.

    Source: see the module's description.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model(y):
        ...     a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(a, 1.0), obs=y)
        >>> found = nsde.checking.fit(model, 0.5, progress=False)
        >>> nsde.checking.posterior_sbc(found, 25, progress=False).level
        'good'
    """
    name = "posterior calibration"
    if fit.sites.trouble or not fit.sites.parameters:
        return Step(name, "not done", fit.sites.trouble or "the model has no parameters")
    # Both data sets in one model, at least a gradient of each in every step of a refit.
    likely = 2.0 * fit.seconds_per_iteration * (num_warmup + num_draws)
    if not fit.is_variational and _FEWEST * likely > time_budget:
        words = f"{_FEWEST} refits of some {likely:.0f} s each do not fit into {time_budget:.0f} s"
        return Step(name, "not done", words)
    key = jax.random.key(1) if rng_key is None else rng_key
    end = time.perf_counter() + time_budget
    labels, elements = _quantities(fit)
    simulate = simulator(fit.model, fit.args, fit.kwargs, fit.sites)
    both = doubled(fit.model, fit.treat, fit.args, fit.kwargs, fit.sites.parameters)
    steps = fit.num_steps if fit.is_variational else num_warmup
    refit = refitter(fit.engine, both, fit.sites.observed, fit.sites.parameters, steps, num_draws)
    truths = fit.parameters
    total = len(next(iter(truths.values())))
    chosen = np.random.default_rng(0).permutation(total)[:num_replicates]
    rows, failures, cost = [], dict[int, str](), 0.0
    with stopwatch() as seconds:
        for index, place in enumerate(chosen):
            if index and time.perf_counter() + cost > end:
                break
            with stopwatch() as own:
                truth = {name: value[place] for name, value in truths.items()}
                row = _replicate(
                    jax.random.fold_in(key, index),
                    truth,
                    elements,
                    (simulate, refit, fit.is_variational),
                    end,
                )
                cost = own() if index else own() / 2.0  # the first compiles
            if row is None:
                break
            if isinstance(row, str):
                failures[index] = row
            else:
                rows.append((index, row))
            if progress:
                left = min(len(chosen) - index - 1, (end - time.perf_counter()) / max(cost, 1e-3))
                text = f"posterior calibration, replicate {index + 1}, {max(left, 0):.0f} to go"
                sys.stderr.write(f"\rcheck: {text:<60}")
                sys.stderr.flush()
        took = seconds()
    if not rows:
        if not failures:
            return Step(name, "not done", f"a single refit did not end within {time_budget:.0f} s")
        why = next(iter(failures.values()))
        return Step(name, "bad", f"no refit succeeded: {why}")
    return _judged(name, _result(labels, rows, failures), took)


def _quantities(fit: CheckedFit) -> tuple[list[str], list[tuple[str, tuple[int, ...]]]]:
    """Labels and places of the scalars that are ranked."""
    elements = [
        (name, element)
        for name, value in fit.parameters.items()
        for element in np.ndindex(value.shape[1:])
        if np.ptp(value[(slice(None), *element)]) > 0
    ]
    if len(elements) > _MAX_QUANTITIES:
        places = np.linspace(0, len(elements) - 1, _MAX_QUANTITIES).round().astype(int)
        elements = [elements[i] for i in places]
    labels = [n if not e else f"{n}[{', '.join(map(str, e))}]" for n, e in elements]
    return labels, elements


def _replicate(
    key: PRNGKeyArray,
    truth: Mapping[str, np.ndarray],
    elements: list[tuple[str, tuple[int, ...]]],
    functions: tuple[Any, Any, bool],
    end: float,
) -> list[tuple[float, ...]] | str | None:
    """A row of ranks for each quantity, or why there is none; None where time was up."""
    simulate, refit, independent = functions
    key_data, key_fit = jax.random.split(key)
    try:
        data = simulate({name: jnp.asarray(value) for name, value in truth.items()}, key_data)
        draws = refit(key_fit, data, end)
    except Exception as error:  # one replicate that fails must not lose the others
        return f"{type(error).__name__}: {error}"
    if draws is None:
        return None
    random = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
    rows: list[tuple[float, ...]] = []
    for name, element in elements:
        values = np.array([one[element] for one in draws[name]])
        if not np.isfinite(values).all():
            return f"draws of {name} are not finite"
        rows.append(
            rank_truth(float(truth[name][element]), values[None], _NUM_RANKS, independent, random)
        )
    return rows


def _result(labels: list[str], rows: list[Any], failures: Mapping[int, str]) -> SBCResult:
    table = np.array([row for _, row in rows])  # (N, Q, 5)
    columns = dict(
        zip(("pit", "truth", "mean", "sd", "num_kept"), np.moveaxis(table, -1, 0), strict=True)
    )
    return SBCResult(
        names=tuple(labels),
        **columns,
        max_rank=_NUM_RANKS,
        replicates=np.array([index for index, _ in rows]),
        failures=dict(failures),
        level=LEVEL,
    )


def spread_p_values(pit: Float[np.ndarray, "N Q"]) -> Float[np.ndarray, " Q"]:
    """p-values of the sum of squared normal scores of ranks: intervals too narrow, or too wide.

    More powerful than a test of uniformity where only the width is wrong (Cook, Gelman and Rubin
    2006, Journal of Computational and Graphical Statistics 15, 675-692).

    Example:
        >>> spread_p_values(np.array([[0.5], [0.02], [0.98], [0.01]])).round(3).tolist()
        [0.016]
    """
    scores = ndtri(np.clip(pit, _EDGE, 1.0 - _EDGE))
    tail = chdtr(len(pit), np.sum(scores**2, axis=0))
    return 2.0 * np.minimum(tail, 1.0 - tail)


def _judged(name: str, result: SBCResult, seconds: float) -> Step:
    table = result.table()
    table.insert(1, "p_spread", spread_p_values(result.pit))
    number = len(result.pit)
    tests = 2 * len(result.names)
    bad = []
    for k, label in enumerate(result.names):
        row = table.loc[label]
        if min(row["p_value"], row["p_spread"]) * tests >= LEVEL:
            continue
        scores = ndtri(np.clip(result.pit[:, k], _EDGE, 1.0 - _EDGE))
        width = float(np.sqrt(np.mean(scores**2)))
        what = "shifted" if abs(scores.mean()) * np.sqrt(number) > 2.6 else "of the wrong shape"
        if row["p_spread"] * tests < LEVEL and what != "shifted":
            what = "too narrow" if width > 1.0 else "too wide"
        bad.append(
            f"{label} ({what}: the central 90 % interval holds {row['coverage_90']:.0%} of truths)"
        )
    lost = f"; {len(result.failures)} refits failed" if result.failures else ""
    if bad:
        level, words = "bad", f"the engine is not calibrated for {', '.join(bad)}{lost}"
    elif len(result.failures) > 0.1 * (number + len(result.failures)):
        level, words = (
            "bad",
            f"{len(result.failures)} of {number + len(result.failures)} refits failed",
        )
    elif number < _FEWEST:
        level, words = "not done", f"{number} replicates tell nothing, {_FEWEST} are needed{lost}"
    else:
        level = "good"
        many = f"{number} refits of {len(result.names)} quantities"
        words = f"no departure from uniform ranks in {many}{lost}"
    few = np.median(result.num_kept) < 0.5 * _NUM_RANKS
    if few and level == "good":
        words += "; ranks count few draws, a blunt test"

    def draw() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return result.plot(result.names[:4])[0].figure

    return Step(
        name,
        level,  # type: ignore[arg-type]
        words,
        table=table,
        result=result,
        draw=draw,
        seconds=seconds,
    )
