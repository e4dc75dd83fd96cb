"""Forecasts of paths and of data at further times, from any fit and any treatment of its paths.

A path that was integrated out is drawn given all data, its filter's law going on to the further
times (forward filtering, backward sampling). A path that was kept latent is Markov: from its state
at the last datum the law simulates on. Data are then drawn from each statement's emission.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from numpyro_sde.describe import html_text
from numpyro_sde.diagnostics.compare.arviz_compat import make_dataset, make_tree
from numpyro_sde.diagnostics.compare.path_places import PathPlace, find_paths
from numpyro_sde.diagnostics.prediction.ahead import ForecastPlan
from numpyro_sde.diagnostics.prediction.reading import read_for_forecast
from numpyro_sde.diagnostics.prediction.rules import log_score
from numpyro_sde.events import Events
from numpyro_sde.handlers import extend
from numpyro_sde.inputs import Input
from numpyro_sde.statespace.model import AbstractFilter

_BATCH = 32  # draws treated at once


class ForecastSite(NamedTuple):
    """What a forecast knows of one site.

    Attributes:
        path: The path that it is, or observes.
        event_dim: Dimensions of one state or observation.
        batch: Names of its batch dimensions, where plates name them.
    """

    path: str
    event_dim: int
    batch: tuple[str | None, ...]


@dataclass(frozen=True, eq=False)
class Forecast(Mapping[str, np.ndarray]):
    """Draws of paths and data at further times, by site; from `nsde.forecast`.

    `forecast["x"]` are draws of a path, `(draw, *batch, F, *state)`, `forecast["y"]` of the data
    of a statement, `(draw, *batch, F, *observation)`, one for each posterior draw.

    Attributes:
        times: The further times in the order given, `(F,)` or `(*batch, F)`.
        draws: Draws by site.
        paths: Sites that are paths.
        sites: What is known of each site of data; `diagnostics.score` reads it.
        labels: What to write on the time axis: dates where the times had a calendar.

    Example:
        >>> import numpy as np
        >>> from numpyro_sde.diagnostics import Forecast
        >>> Forecast(np.array([3.0, 4.0]), {"y": np.zeros((50, 2))}, (), {})["y"].shape
        (50, 2)
    """

    times: Float[np.ndarray, "*batch F"]
    draws: Mapping[str, np.ndarray]
    paths: tuple[str, ...]
    sites: Mapping[str, ForecastSite]
    path_sites: Mapping[str, ForecastSite] = field(default_factory=dict)
    labels: Any = None
    laws: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __getitem__(self, site: str) -> np.ndarray:
        return self.draws[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.draws)

    def __len__(self) -> int:
        return len(self.draws)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {value.shape}" for name, value in self.draws.items())
        span = f"{self.times.min():g} to {self.times.max():g}"
        return f"Forecast({self.times.shape[-1]} times, {span}; {shapes})"

    def _repr_html_(self) -> str:
        return html_text(repr(self))

    def log_score(self, site: str, y: ArrayLike) -> Float[np.ndarray, "*batch F"]:
        """Log density of data at each time under the mixture of all draws; NaN where missing.

        The mean over draws of the emission's density at the drawn states: for emissions that are
        precise beside the spread of the states it needs many draws.

        Args:
            site: The statement.
            y: What came, shape `(*batch, F, *observation)`.
        """
        law, y = self.laws[site], jnp.asarray(y, float)
        density = np.asarray(jax.jit(jax.vmap(lambda one: one.log_prob_pointwise(y)))(law))
        event_dim = self.sites[site].event_dim
        beyond = tuple(range(y.ndim - event_dim, y.ndim))
        missing = np.isnan(np.asarray(y)).all(axis=beyond) if event_dim else np.isnan(np.asarray(y))
        return np.where(missing, np.nan, log_score(density))

    def to_arviz(self) -> Any:
        """The draws as an ArviZ object with one group, `predictions`; `plot_paths` takes it.

        `plot_paths(forecast.to_arviz(), "y", group="predictions")`.
        """
        variables: dict[str, Any] = {}
        coords: dict[str, Any] = {}
        labels = np.asarray(self.times if self.labels is None else self.labels)
        for name, value in self.draws.items():
            known = self.sites.get(name) or self.path_sites[name]
            rank = value.ndim - 2 - known.event_dim
            batch = [
                known.batch[k] if k < len(known.batch) and known.batch[k] else f"{name}_dim_{k}"
                for k in range(rank)
            ]
            state = "state" if name in self.path_sites else f"{name}_dim"
            dims = ("chain", "draw", *map(str, batch), "time", *([state] * known.event_dim))
            variables[name] = (dims, value[None])
            if labels.ndim > 1:
                own = tuple(str(b) for b in batch[len(batch) - labels.ndim + 1 :])
                shape = (*value.shape[1 + rank - len(own) : 1 + rank], labels.shape[-1])
                coords["time_value"] = ((*own, "time"), np.broadcast_to(labels, shape))
        if labels.ndim == 1:
            coords["time"] = labels
        group = make_dataset(variables, coords, {"inference_library": "numpyro"})
        return make_tree({"predictions": group})


def forecast(
    fit: Any,
    times: Any,
    *,
    method: AbstractFilter | None = None,
    model: Callable[..., Any] | None = None,
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Input] | None = None,
    events: Events | Sequence[Events] = (),
    observe_inputs: Mapping[str, Any] | None = None,
    max_step: float | None = None,
    num_samples: int = 1000,
    rng_key: PRNGKeyArray,
) -> Forecast:
    """Draw paths and data at further times: one of each for every posterior draw.

    Args:
        fit: A fit of any engine: an `MCMC` (NUTS, particle Gibbs, PMMH), a variational fit, a
            refined one, or draws with `model=`; with its path latent, whitened, guided or
            integrated out.
        times: Times, `(F,)`, or `(*batch, F)` with a clock for each series of a panel; or what
            `nsde.data.as_times` gave. Between the data and before the last of them they need a
            path that is integrated out; a latent path goes on from its last datum.
        method: A filter, to integrate a latent path out for the forecast, under the fit's
            parameters; None treats the path as it was fitted.
        model: As for `to_arviz`; so are the next two. `model_args` are those of the fit, the data
            included.
        model_args: See `model`.
        model_kwargs: See `model`.
        inputs: Scenarios of the inputs of the equation by name, past and future; up to the last
            datum they must be what the fit had.
        events: Doses or other events to come, beside the model's own.
        observe_inputs: By statement the inputs of its emission at `times`, shape `(F, ...)` or
            `(*batch, F, ...)`, for statements that have any.
        max_step: Longest step between times; None takes the longest of the model's own grid.
        num_samples: Draws from a guide.
        rng_key: Random key.

    Returns:
        A mapping from sites to draws: paths `(draw, *batch, F, *state)`, data
        `(draw, *batch, F, *observation)`.

    Raises:
        ValueError: Times that a latent path cannot be drawn at, a scenario that changes the past,
            a statement whose inputs are not given, or one that joins the path with an array over
            the path's own times.

    Example:
        >>> import jax, numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model(y=None):
        ...     rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
        ...     ou = nsde.processes.OrnsteinUhlenbeck(rate, 0.0, 1.0)
        ...     x = numpyro.sample("x", nsde.SDEPath(ou, np.arange(4.0), dist.Normal(0.0, 1.0)))
        ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)
        >>> marginal = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())
        >>> draws, y = {"rate": np.full(50, 0.7)}, np.array([0.1, np.nan, 0.3, 0.2])
        >>> ahead = nsde.forecast(
        ...     draws, [4.0, 5.0], model=marginal, model_args=(y,), rng_key=jax.random.key(0))
        >>> ahead["x"].shape, ahead["y"].shape
        ((50, 2), (50, 2))
    """
    labels = times.labels if hasattr(times, "labels") else None
    given = np.asarray(getattr(times, "values", times), np.float64)
    order = np.argsort(given, axis=-1)
    read_key, run_key = jax.random.split(rng_key)
    reading = read_for_forecast(
        fit,
        method=method,
        model=model,
        model_args=model_args,
        model_kwargs=model_kwargs,
        num_samples=num_samples,
        rng_key=read_key,
    )
    places = find_paths(reading.model, reading.args, reading.kwargs)
    ends = [_last_time(places[name].times, row) for name, row in reading.last_rows.items()]
    wide = extend(
        reading.model,
        given,
        inputs=inputs,
        events=events,
        max_step=max_step,
        until=max(ends, default=None),
    )
    plan = ForecastPlan(reading, wide, given, order, dict(observe_inputs or {}))

    def one(inputs: tuple[dict[str, Array], PRNGKeyArray]) -> Any:
        return plan.draw(*inputs)

    samples = {name: jnp.asarray(value) for name, value in reading.samples.items()}
    keys = jax.random.split(run_key, reading.num_draws)
    found = jax.jit(lambda xs: jax.lax.map(one, xs, batch_size=_BATCH))((samples, keys))
    draws, leaves = found
    laws = {
        name: jax.tree_util.tree_unflatten(plan.structures[name], own)
        for name, own in leaves.items()
    }
    draws = {name: np.asarray(value) for name, value in draws.items()}
    return Forecast(
        times=given,
        draws=draws,
        paths=tuple(plan.state_dims),
        sites={
            name: ForecastSite(path, dim, _plates(places.get(path), draws[name].ndim - 2 - dim))
            for name, (path, dim) in plan.observations.items()
        },
        path_sites={
            name: ForecastSite(name, dim, _plates(places.get(name), draws[name].ndim - 2 - dim))
            for name, dim in plan.state_dims.items()
        },
        labels=labels,
        laws=laws,
    )


def _last_time(times: np.ndarray, row: np.ndarray) -> float:
    """Time of the last datum of any series."""
    lead = np.broadcast_shapes(times.shape[:-1], row.shape)
    every = np.broadcast_to(times, (*lead, times.shape[-1]))
    return float(np.take_along_axis(every, np.broadcast_to(row, lead)[..., None], axis=-1).max())


def _plates(place: PathPlace | None, rank: int) -> tuple[str | None, ...]:
    """Names of batch dimensions, None where no plate names one."""
    names: list[str | None] = [None] * max(rank, 0)
    for name, dim, _ in () if place is None else place.plates:
        if -dim <= len(names):
            names[dim] = name
    return tuple(names)
