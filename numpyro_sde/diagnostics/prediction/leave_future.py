"""Leave the future out: fit the data up to a time, predict what comes next, go on.

A fit of the data up to one time serves later ones too, its draws weighed by the densities of what
came in between; when the Pareto k-hat of these weights grows above 0.7 the model is fitted again.
Source: Buerkner, Gabry and Vehtari (2020), "Approximate leave-future-out cross-validation for
Bayesian time series models", Journal of Statistical Computation and Simulation 90, 2499-2523.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray
from scipy.special import logsumexp

from numpyro_sde.describe import html_text
from numpyro_sde.diagnostics.compare.arviz_compat import smooth_log_weights
from numpyro_sde.diagnostics.prediction.increments import Increments, increments_by_time
from numpyro_sde.diagnostics.prediction.reading import read_predictive
from numpyro_sde.diagnostics.prediction.refits import Refit, default_refit, until
from numpyro_sde.statespace.model import AbstractFilter

_KHAT = 0.7
_FEW_TIMES = 10


@dataclass(frozen=True, eq=False)
class LeaveFutureOut:
    """Result of :func:`lfo`.

    Attributes:
        elpd: Sum of `pointwise`: the larger, the better the predictions.
        se: Its standard error, from the spread of `pointwise`.
        pointwise: Log density of what came at the `horizon` times after each origin, given all
            before, shape `(P,)`.
        origins: Times up to which the data were known, `(P,)`.
        khat: Pareto k-hat of the weights at each origin, `(P,)`; minus infinity right after a
            fit, where no weights are needed.
        refits: Positions among `origins` at which the model was fitted, the first among them.
        horizon: Number of times predicted at once.
        num_draws: Draws of each fit.

    Example:
        >>> import numpy as np
        >>> from numpyro_sde.diagnostics import LeaveFutureOut
        >>> points = np.array([-1.0, -1.5, -0.5])
        >>> print(LeaveFutureOut(points, np.arange(3.0), np.zeros(3), np.array([0]), 1, 500))
        elpd -3.0 (se 0.9) of 3 predictions, 1 ahead; 1 fit, largest k-hat 0.00
    """

    pointwise: Float[np.ndarray, " P"]
    origins: Float[np.ndarray, " P"]
    khat: Float[np.ndarray, " P"]
    refits: Int[np.ndarray, " R"]
    horizon: int
    num_draws: int

    @property
    def elpd(self) -> float:
        """Sum of the log densities."""
        return float(self.pointwise.sum())

    @property
    def se(self) -> float:
        """Standard error of `elpd`, from the spread of its terms."""
        number = self.pointwise.size
        return float(np.sqrt(number * self.pointwise.var(ddof=1))) if number > 1 else float("nan")

    def __repr__(self) -> str:  # what an interactive session shows
        return str(self)

    def _repr_html_(self) -> str:
        return html_text(str(self))

    def __str__(self) -> str:
        fits = len(self.refits)
        return (
            f"elpd {self.elpd:.1f} (se {self.se:.1f}) of {self.pointwise.size} predictions, "
            f"{self.horizon} ahead; {fits} fit{'s' * (fits != 1)}, largest k-hat "
            f"{self.khat.max():.2f}"
        )


def lfo(
    fit: Any,
    *,
    start: int | None = None,
    horizon: int = 1,
    refit: str | Refit = "psis",
    method: AbstractFilter | None = None,
    model: Callable[..., Any] | None = None,
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    khat_threshold: float = _KHAT,
    max_refits: int | None = None,
    rng_key: PRNGKeyArray | None = None,
) -> LeaveFutureOut:
    """Leave-future-out cross-validation: the honest score of a model of time.

    Times are the distinct times of all series and instruments together. At each the data so far
    predict the next `horizon` of them. Where data have no time they belong to every fit.

    The first fit is to the first `start` times; later ones follow where k-hat asks. The data left
    out become missing (NaN), so that shapes stay and the sampler compiles once.

    Args:
        fit: A fitted `MCMC` with a NUTS or HMC kernel, whose settings the refits use; or any fit
            that :func:`to_arviz` takes, with `refit=`.
        start: Number of times in the first fit; None takes a quarter of them, at least 10.
        horizon: Number of times to predict at once.
        refit: `"psis"`, refit where k-hat asks; `"all"`, refit at every time; or a function that
            makes the refits, for other engines: it takes a model of one argument and returns a
            function of a random key and that argument which returns draws by site, such as
            `lambda model: compiled_chain(NUTS(model), 300, 300)`.
        method: The filter that predicts; None takes that of `handlers.marginalize`. For a fit
            whose path is latent it must be given; refits then still use the latent path.
        model: As for `to_arviz`; so are the next two.
        model_args: See `model`.
        model_kwargs: See `model`.
        khat_threshold: k-hat above which the model is fitted again.
        max_refits: Give up with an error rather than fit more often; None sets no limit.
        rng_key: None is `jax.random.key(0)`.

    Raises:
        ValueError: If the path was kept latent and `method` is not given, a count is out of
            range, more than `max_refits` fits are asked for, or the fit's engine cannot be run
            again without `refit=`.

    Source: see the module's description.

    Example:
        >>> import jax, numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> from numpyro_sde.diagnostics import lfo
        >>> def model(y):
        ...     noise = numpyro.sample("noise", dist.LogNormal(0.0, 0.5))
        ...     ou = nsde.processes.OrnsteinUhlenbeck(1.0, 0.0, 1.0)
        ...     x = numpyro.sample("x", nsde.SDEPath(ou, np.arange(20.0), dist.Normal(0.0, 1.0)))
        ...     nsde.observe("y", x, lambda t, x, p: dist.Normal(x, p), params=noise, obs=y)
        >>> marginal = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())
        >>> y = np.random.default_rng(0).normal(size=20)
        >>> mcmc = numpyro.infer.MCMC(
        ...     numpyro.infer.NUTS(marginal), num_warmup=50, num_samples=100, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), y)
        >>> lfo(mcmc, start=15).pointwise.shape
        (5,)
    """
    if isinstance(refit, str) and refit not in ("psis", "all"):
        raise ValueError(f'refit must be "psis", "all" or a function, got {refit!r}')
    key = jax.random.key(0) if rng_key is None else rng_key
    read_key, key = jax.random.split(key)
    reading = read_predictive(
        fit,
        caller="lfo",
        method=method,
        model=model,
        model_args=model_args,
        model_kwargs=model_kwargs,
        rng_key=read_key,
    )
    make = default_refit(fit) if isinstance(refit, str) else refit
    terms = increments_by_time(reading)
    first = _first_origin(len(terms.times), start, horizon)
    fitted = make(until(reading.fitted_model, reading.args, reading.kwargs))
    always = refit == "all"
    limit = np.inf if max_refits is None else max_refits
    return _run(fitted, terms, first, horizon, key, _Rule(always, khat_threshold, limit))


def _first_origin(num_times: int, start: int | None, horizon: int) -> int:
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1, got {horizon}")
    start = max(num_times // 4, min(_FEW_TIMES, num_times // 2)) if start is None else start
    if not 1 <= start <= num_times - horizon:
        raise ValueError(
            f"start must leave {horizon} of the {num_times} times to predict: from 1 to "
            f"{num_times - horizon}, got {start}"
        )
    return start


@dataclass(frozen=True)
class _Rule:
    """When to fit again."""

    always: bool
    khat: float
    limit: float


def _run(
    fitted: Callable[..., Mapping[str, Any]],
    terms: Increments,
    start: int,
    horizon: int,
    key: PRNGKeyArray,
    rule: _Rule,
) -> LeaveFutureOut:
    times, count = terms.times, len(terms.times) - horizon - start + 1
    pointwise, khats = np.empty(count), np.empty(count)
    refits: list[int] = []
    density = np.empty((0, len(times)))
    since = -1  # the origin of the current fit
    for point in range(count):
        origin = start + point  # so many times are known
        weights, khat = _weights(density, since, origin)
        if since < 0 or rule.always or not khat <= rule.khat:
            if len(refits) >= rule.limit:
                raise ValueError(
                    f"lfo: the fit at time {times[origin - 1]:g} would be the {len(refits) + 1}th; "
                    f"max_refits={rule.limit}"
                )
            own, later = jax.random.split(jax.random.fold_in(key, origin))
            # Between this time and the next, so that rounding of times does not matter.
            cutoff = 0.5 * (times[origin - 1] + times[origin])
            density = terms.evaluate(fitted(own, cutoff), later)
            since = origin
            refits.append(point)
            weights, khat = _weights(density, since, origin)
        ahead = density[:, origin : origin + horizon].sum(axis=1)
        pointwise[point], khats[point] = logsumexp(weights + ahead), khat
    origins = times[start - 1 : start - 1 + count]
    return LeaveFutureOut(pointwise, origins, khats, np.array(refits), horizon, density.shape[0])


def _weights(density: np.ndarray, since: int, origin: int) -> tuple[np.ndarray, float]:
    """Normalised log weights of draws of one fit as draws of the fit up to a later origin."""
    if since < 0:
        return np.zeros(0), np.inf
    if since == origin:
        return np.full(len(density), -np.log(len(density))), -np.inf
    ratio = density[:, since:origin].sum(axis=1)
    if not np.isfinite(ratio).all():
        return np.zeros(len(density)), np.inf
    if np.ptp(ratio) == 0.0:
        return np.full(len(density), -np.log(len(density))), -np.inf
    weights, khat = smooth_log_weights(ratio)
    return weights, float(khat)
