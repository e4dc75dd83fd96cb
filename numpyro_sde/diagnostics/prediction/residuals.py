"""One-step residuals: is what came next what the model said would come?

The probability integral transform of each datum under its one-step prediction is uniform, and
independent of the others, if the model is right (Rosenblatt 1952; Diebold, Gunther and Tay 1998,
"Evaluating density forecasts", International Economic Review 39, 863-883). Counts are
randomised between the values of the distribution function below and at the datum (Smith 1985;
Czado, Gneiting and Held 2009, Biometrics 65, 1254-1261).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray
from scipy.special import chdtr, chdtrc, ndtr, ndtri

from numpyro_sde.describe import html_text
from numpyro_sde.diagnostics.prediction.one_step import Predictions, predict
from numpyro_sde.diagnostics.prediction.reading import read_predictive
from numpyro_sde.statespace.model import AbstractFilter

_MAX_LAG = 10
_EDGE = 1e-12  # a transform of exactly 0 or 1 has no normal score
_FEWEST = 8


@dataclass(frozen=True, eq=False)
class Residuals:
    """Probability integral transforms of a fit's data; prints its tests, and draws itself.

    Attributes:
        pit: By site, shape of the data, NaN where missing: uniform on (0, 1) if the model is
            right.
        times: By site, `(*batch, K)` or `(K,)`.
        num_draws: Parameter draws behind them.
        event_dims: By site, how many dimensions behind time one observation has; 0 if not named.
        level: Level of the tests, over all of them.

    Example:
        >>> import numpy as np
        >>> from numpyro_sde.diagnostics import Residuals
        >>> pit = np.random.default_rng(0).uniform(size=200)
        >>> found = Residuals({"y": pit}, {"y": np.arange(200.0)}, 100)
        >>> found.ok, found.scores["y"].shape
        (True, (200,))
    """

    pit: Mapping[str, Float[np.ndarray, "*batch K *obs"]]
    times: Mapping[str, Float[np.ndarray, "*batch K"]]
    num_draws: int
    event_dims: Mapping[str, int] = field(default_factory=dict)
    level: float = 0.05

    @property
    def scores(self) -> dict[str, Float[np.ndarray, "*batch K *obs"]]:
        """Normal scores by site: standard normal if the model is right."""
        return {name: ndtri(np.clip(u, _EDGE, 1.0 - _EDGE)) for name, u in self.pit.items()}

    def table(self) -> Any:
        """A pandas data frame with one row for each site and component.

        Columns: `number` of data; of the normal scores `mean`, `sd`, and `acf_1` of successive
        ones; p-values `uniform` (Kolmogorov-Smirnov), `location` (of the mean), `spread` (of the
        variance), `serial` (Ljung-Box over at most 10 lags, of the scores) and `volatility` (the
        same of their squares).
        """
        import pandas as pd

        rows = {}
        for name, scores in self.scores.items():
            for label, series in _series(name, scores, self.event_dims.get(name, 0)):
                rows[label] = _tests(series)
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("site")

    @property
    def p_values(self) -> Any:
        """The p-value columns of :meth:`table`."""
        return self.table()[["uniform", "location", "spread", "serial", "volatility"]]

    @property
    def ok(self) -> bool:
        """Whether no test rejects, with Bonferroni's correction for their number."""
        values = self.p_values.to_numpy()
        known = values[np.isfinite(values)]
        return bool(known.size == 0 or known.min() * known.size >= self.level)

    def __repr__(self) -> str:  # what an interactive session shows
        return str(self)

    def _repr_html_(self) -> str:
        return html_text(str(self))

    def __str__(self) -> str:
        values = self.p_values
        number = int(np.isfinite(values.to_numpy()).sum())
        bad = [
            f"{site} ({test})"
            for site, row in values.iterrows()
            for test, value in row.items()
            if value * number < self.level
        ]
        verdict = (
            f"Not as predicted (level {self.level:g}): {', '.join(bad)}"
            if bad
            else f"No departure from the predictions found (level {self.level:g})"
        )
        text = self.table().to_string(float_format=lambda v: f"{v:.3g}")
        return f"One-step residuals, {self.num_draws} parameter draws\n{text}\n{verdict}"

    def plot(self, site: str | None = None, axes: Any = None) -> list[Any]:
        """Four pictures of a site: scores over time, histogram, quantiles, autocorrelation.

        Args:
            site: The observation site; None takes the first.
            axes: Four axes to draw on; None makes a new figure.

        Returns:
            The list of `matplotlib.axes.Axes`.

        Raises:
            ValueError: If there is no such site, or not four axes.
            ImportError: If Matplotlib is not installed.
        """
        from numpyro_sde.diagnostics.prediction.residual_plots import plot_residuals

        return plot_residuals(self, site, axes)


def residuals(
    fit: Any,
    *,
    method: AbstractFilter | None = None,
    model: Callable[..., Any] | None = None,
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    num_draws: int | None = 200,
    rng_key: PRNGKeyArray | None = None,
) -> Residuals:
    """One-step residuals of a fit, by its filter: a test of the model in the units of chance.

    The transform of each datum is the mean over parameter draws of its one-step distribution
    function, so uncertainty of parameters counts. The draws have seen the datum too: with few
    data for each parameter residuals look a little too good.

    Args:
        fit: Anything that :func:`to_arviz` takes.
        method: The filter; None takes that of `handlers.marginalize`. For a fit whose path is
            latent it must be given.
        model: As for `to_arviz`; so are the next two.
        model_args: See `model`.
        model_kwargs: See `model`.
        num_draws: At most so many parameter draws, evenly thinned; None takes all.
        rng_key: For the randomisation of counts and for filters that need it; None is
            `jax.random.key(0)`.

    Raises:
        ValueError: If the path was kept latent and `method` is not given, or an emission has no
            distribution function.

    Source: see the module's description.

    Example:
        >>> import jax, numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> from numpyro_sde.diagnostics import residuals
        >>> def model(y):
        ...     rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
        ...     ou = nsde.processes.OrnsteinUhlenbeck(rate, 0.0, 1.0)
        ...     x = numpyro.sample("x", nsde.SDEPath(ou, np.arange(4.0), dist.Normal(0.0, 1.0)))
        ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.5), obs=y)
        >>> marginal = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())
        >>> y, draws = np.array([0.0, 0.8, np.nan, 0.3]), {"rate": np.array([0.5, 1.0])}
        >>> found = residuals(draws, model=marginal, model_args=(y,))
        >>> [round(float(u), 1) for u in found.pit["y"]]
        [0.5, 0.8, nan, 0.6]
    """
    key = jax.random.key(0) if rng_key is None else rng_key
    read_key, run_key, mix_key = jax.random.split(key, 3)
    reading = read_predictive(
        fit,
        caller="residuals",
        method=method,
        model=model,
        model_args=model_args,
        model_kwargs=model_kwargs,
        rng_key=read_key,
    )
    return of_predictions(predict(reading.thin(num_draws), 1, run_key), mix_key)


def of_predictions(found: Predictions, rng_key: PRNGKeyArray) -> Residuals:
    """Residuals of one-step predictions: transforms, randomised where data are counts."""
    pit, times, event_dims = {}, {}, {}
    for key, (name, site) in zip(
        jax.random.split(rng_key, len(found.sites)), found.sites.items(), strict=True
    ):
        share = np.asarray(jax.random.uniform(key, site.upper.shape))
        pit[name] = site.lower + share * (site.upper - site.lower)
        times[name] = site.times
        event_dims[name] = site.event_dim
    return Residuals(pit, times, found.num_draws, event_dims)


def _series(
    name: str, scores: np.ndarray, event_dim: int
) -> list[tuple[str, Float[np.ndarray, "series K"]]]:
    """Each component of a site as rows of series."""
    if not event_dim:
        return [(name, scores.reshape(-1, scores.shape[-1]))]
    lead, length = scores.ndim - 1 - event_dim, scores.shape[scores.ndim - 1 - event_dim]
    flat = scores.reshape(int(np.prod(scores.shape[:lead])), length, -1)
    return [(f"{name}[{k}]", flat[:, :, k]) for k in range(flat.shape[-1])]


def _tests(series: Float[np.ndarray, "series K"]) -> dict[str, float]:
    rows = [row[np.isfinite(row)] for row in series]
    z = np.concatenate(rows)
    number = z.size
    row = dict.fromkeys(
        ("mean", "sd", "acf_1", "uniform", "location", "spread", "serial", "volatility"), np.nan
    )
    if number == 0:
        return {"number": 0, **row}
    row |= {"mean": float(z.mean()), "sd": float(z.std(ddof=1)) if number > 1 else np.nan}
    if number < _FEWEST:
        return {"number": number, **row}
    from scipy.stats import kstest  # slow to import

    tail = float(chdtr(number, np.sum(z**2)))
    squares = [row**2 - np.mean(z**2) for row in rows]
    lags = min(_MAX_LAG, number // 5)
    return {
        "number": number,
        **row,
        "acf_1": autocorrelation(rows, 1)[0],
        "uniform": float(kstest(z, "norm").pvalue),
        "location": float(2.0 * ndtr(-abs(z.mean()) * np.sqrt(number))),
        "spread": 2.0 * min(tail, 1.0 - tail),
        "serial": _ljung_box(rows, lags),
        "volatility": _ljung_box(squares, lags),
    }


def autocorrelation(rows: list[Float[np.ndarray, " n"]], lag: int) -> tuple[float, int]:
    """Autocorrelation of several series about zero, and the number of pairs behind it.

    Example:
        >>> autocorrelation([np.array([1.0, -1.0, 1.0])], 1)
        (-1.0, 2)
    """
    pairs = [row[lag:] * row[:-lag] for row in rows if row.size > lag]
    products = np.concatenate(pairs) if pairs else np.zeros(0)
    scale = float(np.mean(np.concatenate(rows) ** 2))
    if products.size == 0 or scale == 0.0:
        return float("nan"), 0
    return float(products.mean() / scale), products.size


def _ljung_box(rows: list[np.ndarray], lags: int) -> float:
    """p-value of no autocorrelation up to a lag (Ljung and Box 1978), for series pooled."""
    found = [autocorrelation(rows, lag) for lag in range(1, lags + 1)]
    known = [(r, n) for r, n in found if n > 0]
    if not known:
        return float("nan")
    return float(chdtrc(len(known), sum(n * r**2 for r, n in known)))
