"""A fit read as draws of parameters and a model whose paths are integrated out.

One-step predictions need p(y_k | y_1, ..., y_{k-1}, parameters), which a filter gives and a latent
path does not: draws of a latent path have seen all data. A fit that kept its path latent is read by
its parameters alone, with a filter given as `method`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from numpyro import handlers as numpyro_handlers
from numpyro.infer import MCMC

from numpyro_sde.diagnostics.compare.draws import complete_draws, flatten_draws, read_fit
from numpyro_sde.diagnostics.compare.path_places import find_paths, strip_treatments
from numpyro_sde.diagnostics.compare.sites import (
    hold_values,
    is_latent,
    is_observation,
    trace_model,
    unwrap,
)
from numpyro_sde.distributions.clocks import identity_of_path, times_shown
from numpyro_sde.distributions.marginal import IntegratedPath
from numpyro_sde.distributions.observation import EmissionPath
from numpyro_sde.distributions.path_law import AbstractPathLaw
from numpyro_sde.distributions.state_space import ObservedPath
from numpyro_sde.distributions.statement import Statement
from numpyro_sde.filters.particle import Particle
from numpyro_sde.infer.pmmh import PMMH
from numpyro_sde.models.survey import survey
from numpyro_sde.runtime.draws import on_one_device
from numpyro_sde.states.integrated import run_integrated
from numpyro_sde.statespace.model import AbstractFilter


class SeenPath(NamedTuple):
    """A path that is integrated out and all that was said of it, under one draw.

    Attributes:
        name: Its site.
        path: Its law.
        lead: Batch shape of path and data.
        data: Statements with their data, in order.
        sites: Names of the statements' sites.
    """

    name: str
    path: AbstractPathLaw
    lead: tuple[int, ...]
    data: list[tuple[Statement, Any]]
    sites: list[str]

    @property
    def observed(self) -> ObservedPath:
        """The path and its data as filters take them."""
        return ObservedPath(self.path, self.lead, tuple(self.data), self.name)


class DirectPath(NamedTuple):
    """A path that is observed itself, without noise, under one draw.

    Attributes:
        name: Its site.
        path: Its law, expanded over plates.
        value: The data.
    """

    name: str
    path: AbstractPathLaw
    value: Any


_NUM_PARTICLES = 1000  # where a sampler does not say how many
PerDraw = Callable[[list[SeenPath | DirectPath], PRNGKeyArray], Any]


class Reading(NamedTuple):
    """What predictions of a fit are made from.

    Attributes:
        samples: Parameter draws by site, `(num_draws, ...)`; no paths.
        model: The model, its paths as it states them.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        params: Values of its `param` sites.
        method: The filter; None where every path is observed directly.
        integrated: Names of the paths that it integrates out.
        direct: Names of the paths that are observed directly.
        fitted_model: The model as it was fitted, with whatever treats its paths.
        transformed: Whether the model computes with a path before it observes it.
        last_rows: For each path the index of its last datum, shape `lead`; for forecasts only.
    """

    samples: dict[str, np.ndarray]
    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    params: Mapping[str, Any]
    method: AbstractFilter | None
    integrated: frozenset[str]
    direct: tuple[str, ...]
    fitted_model: Callable[..., Any]
    transformed: bool
    last_rows: Mapping[str, np.ndarray] = {}

    @property
    def paths(self) -> frozenset[str]:
        """Names of all paths of which something is known."""
        return self.integrated | frozenset(self.last_rows)

    @property
    def num_draws(self) -> int:
        """Number of parameter draws."""
        return len(next(iter(self.samples.values())))

    def thin(self, num_draws: int | None) -> Reading:
        """At most so many draws, evenly chosen."""
        if num_draws is None or num_draws >= self.num_draws:
            return self
        chosen = np.linspace(0, self.num_draws - 1, num_draws).round().astype(int)
        return self._replace(samples={name: v[chosen] for name, v in self.samples.items()})

    def run(self, draw: Mapping[str, Array], key: PRNGKeyArray) -> list[SeenPath | DirectPath]:
        """Run the model under one draw of the parameters."""
        model = hold_values(numpyro_handlers.seed(self.model, key), {**self.params, **draw})
        stand_ins: list[IntegratedPath] = []
        if self.method is None:
            trace = numpyro_handlers.trace(model).get_trace(*self.args, **self.kwargs)
        else:
            paths, trace = run_integrated(
                model,
                self.args,
                self.kwargs,
                method=self.method,
                sites=self.integrated,
                transformed=self.transformed,
            )
            stand_ins = list(paths.values())
        return [
            *(_seen(stand_in) for stand_in in stand_ins),
            *(_direct(name, trace[name]) for name in self.direct),
        ]

    def map(self, function: PerDraw, rng_key: PRNGKeyArray, batch_size: int = 32) -> Any:
        """Apply a function to what each draw says, leading axis the draws."""
        return self.mapper(function, batch_size)(self.samples, rng_key)

    def mapper(
        self, function: PerDraw, batch_size: int = 32
    ) -> Callable[[Mapping[str, Any], PRNGKeyArray], Any]:
        """The same as a function of draws and key, compiled once for draws of a shape."""

        def one(inputs: tuple[dict[str, Array], PRNGKeyArray]) -> Any:
            draw, key = inputs
            model_key, own_key = jax.random.split(key)
            return function(self.run(draw, model_key), own_key)

        over_draws = jax.jit(lambda xs: jax.lax.map(one, xs, batch_size=batch_size))

        def call(samples: Mapping[str, Any], rng_key: PRNGKeyArray) -> Any:
            values = on_one_device(samples, self.samples)
            keys = jax.random.split(rng_key, len(next(iter(values.values()))))
            return jax.tree.map(np.asarray, over_draws((values, keys)))

        return call


def _seen(stand_in: IntegratedPath) -> SeenPath:
    data = list(stand_in.seen)
    for (statement, _), site in zip(data, stand_in.sites, strict=True):
        if statement.power is not None:
            raise ValueError(
                f"observe({site!r}) stands inside handlers.scale: a likelihood to a power is no "
                "density of the data, so it predicts none. Give the model without the scale"
            )
    lead = jnp.broadcast_shapes(
        stand_in.lead, *(np.shape(y)[: np.ndim(y) - len(s.event_shape)] for s, y in data)
    )
    return SeenPath(stand_in.name, stand_in.path, lead, data, list(stand_in.sites))


def _direct(name: str, site: Mapping[str, Any]) -> DirectPath:
    law = site["fn"]
    lead = law.batch_shape
    path = unwrap(law)
    return DirectPath(name, path.expand(lead) if path.batch_shape != lead else path, site["value"])


def read_predictive(
    fit: Any,
    *,
    caller: str,
    method: AbstractFilter | None = None,
    model: Callable[..., Any] | None = None,
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
    rng_key: PRNGKeyArray,
) -> Reading:
    """Read a fit for one-step predictions.

    Args:
        fit: Anything that `to_arviz` takes.
        caller: Name of the function, for messages.
        method: The filter; None takes that of `handlers.marginalize`.
        model: As for `to_arviz`; so are the next three.
        model_args: See `model`.
        model_kwargs: See `model`.
        num_samples: Draws from a guide.
        rng_key: For draws from a guide.

    Raises:
        ValueError: If the path was kept latent and no method is given, the model observes no
            path, or the fit lacks draws of a parameter.
        TypeError: If `method` is no filter.
    """
    found, samples, trace = _read(
        fit, caller, method, model, model_args, model_kwargs, num_samples, rng_key
    )
    _check(caller, trace, found.integrated, found.direct, found.method, samples)
    latent = {
        name
        for name, site in trace.items()
        if name not in found.integrated and (is_latent(site) or site["type"] == "param")
    }
    kept = {name: value for name, value in samples.items() if name in latent}
    if not found.integrated:
        found = found._replace(method=None)
    return found._replace(samples=kept or _NO_PARAMETERS)


def read_for_forecast(
    fit: Any,
    *,
    method: AbstractFilter | None,
    model: Callable[..., Any] | None,
    model_args: tuple[Any, ...],
    model_kwargs: Mapping[str, Any] | None,
    num_samples: int,
    rng_key: PRNGKeyArray,
) -> Reading:
    """Read a fit for draws at further times; a latent path may stay so. Arguments as above.

    Raises:
        ValueError: If there is no path, or the fit lacks draws of a parameter or of a latent path.
    """
    caller = "forecast"
    found, samples, trace = _read(
        fit, caller, method, model, model_args, model_kwargs, num_samples, rng_key
    )
    paths = [
        name
        for name, site in trace.items()
        if site["type"] == "sample" and isinstance(unwrap(site["fn"]), AbstractPathLaw)
    ]
    if not paths:
        raise ValueError(f"{caller}: the model has no SDEPath")
    integrated = found.integrated if found.method is not None else frozenset()
    _require_draws(caller, trace, integrated, samples)
    kept = {
        name: value
        for name, value in samples.items()
        if name in trace and name not in integrated and trace[name]["type"] in ("sample", "param")
    }
    rows = {name: _last_row(name, trace) for name in paths}
    return found._replace(samples=kept or _NO_PARAMETERS, integrated=integrated, last_rows=rows)


# A model without parameters: one draw of nothing in particular.
_NO_PARAMETERS = {"": np.zeros((1,))}


def _last_row(name: str, trace: Mapping[str, Any]) -> np.ndarray:
    """Index of the last datum of each series of a path; its last time where all is known."""
    site = trace[name]
    path = unwrap(site["fn"])
    end = path.num_times - 1
    lead = np.shape(site["value"])[: np.ndim(site["value"]) - path.event_dim]
    last = np.full(lead, -1)
    if site["is_observed"]:
        return np.full(lead, end)
    values = {id(one["value"]) for one in trace.values()}
    stated = False
    for other in trace.values():
        if not is_observation(other):
            continue
        law = unwrap(other["fn"])
        owner = identity_of_path(law.observed_path) if isinstance(law, EmissionPath) else None
        if owner != id(site["value"]):
            # Data that may depend on the path in a way not seen here: all of it is known.
            if owner not in values and not isinstance(law, AbstractPathLaw):
                return np.full(lead, end)
            continue
        stated = True
        shown = times_shown(law.observed_path)
        rows = np.asarray(law.observed_rows) % len(np.arange(end + 1) if shown is None else shown)
        rows = rows if shown is None else np.asarray(shown)[rows]
        value = np.asarray(other["value"], np.float64)
        size = len(law.event_shape)
        there = ~np.isnan(value).reshape(*value.shape[: value.ndim - size + 1], -1).all(axis=-1)
        latest = np.where(there, rows, -1).max(axis=-1, initial=-1)
        last = np.maximum(last, latest)
    return np.maximum(last, 0) if stated else np.full(lead, end)


def _filter_of(fit: Any) -> AbstractFilter | None:
    """The filter that a sampler integrates paths out by itself with."""
    sampler = fit.sampler if isinstance(fit, MCMC) else None
    if not isinstance(sampler, PMMH):
        return None
    return Particle(
        sampler.num_particles or _NUM_PARTICLES,
        proposal=sampler.proposal,
        resampling=sampler.resampling,
        ess_threshold=sampler.ess_threshold,
    )


def _read(
    fit: Any,
    caller: str,
    method: AbstractFilter | None,
    model: Callable[..., Any] | None,
    model_args: tuple[Any, ...],
    model_kwargs: Mapping[str, Any] | None,
    num_samples: int,
    rng_key: PRNGKeyArray,
) -> tuple[Reading, dict[str, np.ndarray], dict[str, Any]]:
    """A fit, all its draws, and a trace of its plain model under the first of them."""
    if method is not None and not isinstance(method, AbstractFilter):
        raise TypeError(f"method must be one of nsde.filters, got {method!r}")
    draws = read_fit(fit, model=model, model_args=model_args, model_kwargs=model_kwargs)
    if draws.model is None:
        raise ValueError(f"{caller} needs the model that was fitted: give model=")
    fitted = draws.model
    inner, own = strip_treatments(fitted)
    own = own or _filter_of(fit)
    paths = find_paths(inner, draws.model_args, draws.model_kwargs)
    draws = complete_draws(
        draws,
        num_samples=num_samples,
        rng_key=rng_key,
        log_likelihood=False,
        num_times=None,
        deterministic=[name for name in paths if own is None and method is None],
    )
    samples = flatten_draws(draws.posterior)
    first = {name: jnp.asarray(value[0]) for name, value in samples.items()}
    trace = trace_model(
        inner, draws.model_args, draws.model_kwargs, {**draws.params, **first}, rng_key
    )
    direct = tuple(
        name
        for name, site in trace.items()
        if is_observation(site) and isinstance(unwrap(site["fn"]), AbstractPathLaw)
    )
    uses = survey(inner, draws.model_args, draws.model_kwargs)
    integrated = frozenset(uses.observed.values())
    found = Reading(
        samples={},
        model=inner,
        args=draws.model_args,
        kwargs=draws.model_kwargs,
        params=draws.params,
        method=method or own,
        integrated=integrated,
        direct=direct,
        fitted_model=fitted,
        transformed=bool(uses.transformed),
    )
    return found, samples, trace


def _check(
    caller: str,
    trace: Mapping[str, Any],
    integrated: frozenset[str],
    direct: tuple[str, ...],
    method: AbstractFilter | None,
    samples: Mapping[str, Any],
) -> None:
    if not integrated and not direct:
        raise ValueError(
            f"{caller}: the model observes no SDEPath, so nothing is predicted in time"
        )
    if integrated and method is None:
        raise ValueError(
            f"{caller}: path {', '.join(sorted(integrated))} was kept latent, and its draws have "
            "seen all data. Give method= (one of nsde.filters, Kalman() where the model is "
            "linear), by which it is integrated out under the fit's parameter draws, or fit "
            "handlers.marginalize(model, method=...)"
        )
    _require_draws(caller, trace, integrated, samples)


def _require_draws(
    caller: str, trace: Mapping[str, Any], integrated: frozenset[str], samples: Mapping[str, Any]
) -> None:
    lost = [
        name
        for name, site in trace.items()
        if is_latent(site) and name not in integrated and name not in samples
    ]
    if lost:
        raise ValueError(f"{caller}: the fit has no draws of {lost}; it has {list(samples)}")


def union_times(times: list[np.ndarray]) -> np.ndarray:
    """All times of several clocks, sorted, those alike up to rounding once.

    Example:
        >>> union_times([np.array([0.0, 1.0]), np.array([1.0, 1.5])]).tolist()
        [0.0, 1.0, 1.5]
    """
    every = np.unique(np.concatenate([np.ravel(t) for t in times]))
    span = float(np.ptp(every)) or 1.0
    return every[np.concatenate([[True], np.diff(every) > 1e-9 * span])]
