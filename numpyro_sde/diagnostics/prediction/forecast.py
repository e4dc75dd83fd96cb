"""Forecasts of paths and of data at further times, from any fit and any treatment of its paths.

A path that was integrated out is drawn given all data, its filter's law going on to the further
times (forward filtering, backward sampling). A path that was kept latent is Markov: from its state
at the last datum the law simulates on. Data are then drawn from each statement's emission.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray
from numpyro import handlers as numpyro_handlers

from numpyro_sde.diagnostics.compare.arviz_compat import make_dataset, make_tree
from numpyro_sde.diagnostics.compare.path_places import PathPlace, find_paths
from numpyro_sde.diagnostics.compare.sites import hold_values, unwrap
from numpyro_sde.diagnostics.prediction.reading import Reading, SeenPath, read_for_forecast
from numpyro_sde.diagnostics.prediction.rules import log_score
from numpyro_sde.distributions.clocks import identity_of_path
from numpyro_sde.distributions.marginal import draw_smoothed
from numpyro_sde.distributions.observation import EmissionPath
from numpyro_sde.distributions.path_law import AbstractPathLaw
from numpyro_sde.events import Events
from numpyro_sde.handlers import extend
from numpyro_sde.inputs import Input
from numpyro_sde.schemes.switching import SwitchingSteps
from numpyro_sde.states.smoothing import take_times
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
            a statement whose inputs are not given, fractional noise on a latent path, or
            interval observations.

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
    plan = _Plan(reading, wide, given, order, dict(observe_inputs or {}))

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


class _Plan:
    """How to draw a forecast under one posterior draw."""

    def __init__(
        self,
        reading: Reading,
        wide: extend,
        times: np.ndarray,
        order: np.ndarray,
        observe_inputs: dict[str, Any],
    ) -> None:
        self.reading, self.wide, self.times = reading, wide, times
        self.back = np.argsort(order, axis=-1)  # from increasing times to those given
        self.observe_inputs = observe_inputs
        self.observations: dict[str, tuple[str, int]] = {}
        self.state_dims: dict[str, int] = {}
        self.structures: dict[str, Any] = {}

    def draw(self, values: dict[str, Array], key: PRNGKeyArray) -> Any:
        """States and data at the further times, and the laws of the data."""
        reading, wide = self.reading, self.wide
        model_key, path_key, data_key = jax.random.split(key, 3)
        parameters = {n: v for n, v in values.items() if n not in reading.paths}
        model = hold_values(
            numpyro_handlers.seed(wide, model_key), {**reading.params, **parameters}
        )
        trace = numpyro_handlers.trace(model).get_trace(*reading.args, **reading.kwargs)
        laws = dict(wide.laws)
        places = {name: self._place(name) for name in laws}
        keys = dict(zip(laws, jax.random.split(path_key, len(laws)), strict=True))
        states: dict[str, Array] = {}
        if reading.integrated:
            states |= self._smoothed(parameters, model_key, keys)
        for name, law in laws.items():
            if name not in states:
                known = trace[name]["value"] if trace[name]["is_observed"] else values[name]
                states[name] = self._gone_on(name, law, known, keys[name])
        ahead = {
            name: take_times(states[name], places[name], len(law.state_shape))
            for name, law in laws.items()
        }
        self.state_dims = {name: len(law.state_shape) for name, law in laws.items()}
        owners = {id(site["value"]): name for name, site in trace.items() if name in laws}
        emissions: dict[str, EmissionPath] = {}
        self.observations = {}
        for name, site in trace.items():
            seen = unwrap(site["fn"]) if site["type"] == "sample" else None
            if isinstance(seen, EmissionPath):
                owner = owners.get(identity_of_path(seen.observed_path))
                if owner is None:
                    raise ValueError(
                        f"forecast: observe({name!r}) sees a path that was transformed first; put "
                        "the transformation inside the emission"
                    )
                emissions[name] = self._emission(name, seen, laws[owner], ahead[owner], owner)
                self.observations[name] = owner, len(emissions[name].event_shape) - 1
        draws = dict(ahead)
        own_keys = jax.random.split(data_key, max(len(emissions), 1))
        for own, (name, emission) in zip(own_keys, emissions.items(), strict=False):
            draws[name] = emission.sample(own)
        # Every trace makes functions of its own, so that laws are told apart: their leaves go out.
        flat = {name: jax.tree_util.tree_flatten(law) for name, law in emissions.items()}
        self.structures = {name: treedef for name, (_, treedef) in flat.items()}
        return draws, {name: leaves for name, (leaves, _) in flat.items()}

    def _place(self, name: str) -> np.ndarray:
        """Grid indices of the times in the order given."""
        place, back = self.wide.place(name), self.back
        lead = np.broadcast_shapes(place.shape[:-1], back.shape[:-1])
        return np.take_along_axis(
            np.broadcast_to(place, (*lead, place.shape[-1])),
            np.broadcast_to(back, (*lead, back.shape[-1])),
            axis=-1,
        )

    def _smoothed(
        self, parameters: dict[str, Array], model_key: PRNGKeyArray, keys: dict[str, PRNGKeyArray]
    ) -> dict[str, Array]:
        """Whole long paths of those that are integrated out, given all data."""
        found = {}
        for seen in self.reading._replace(model=self.wide).run(parameters, model_key):
            if isinstance(seen, SeenPath):
                assert self.reading.method is not None
                found[seen.name] = draw_smoothed(
                    seen.observed, self.reading.method, keys[seen.name]
                )
        return found

    def _gone_on(self, name: str, law: AbstractPathLaw, known: Array, key: PRNGKeyArray) -> Array:
        """The known path up to its last datum, and a simulation from there, on the long grid."""
        if law.scheme.has_memory:
            what = (
                "regime of path {!r} is hidden"
                if isinstance(law.scheme, SwitchingSteps)
                else "noise of path {!r} has a memory"
            )
            raise ValueError(
                f"forecast: the {what.format(name)}, which its last state does not hold: give "
                "method= to integrate it out"
            )
        clock = self.wide.clocks[name]
        known = jnp.asarray(known, float)
        lead = jnp.broadcast_shapes(law.batch_shape, known.shape[: known.ndim - law.event_dim])
        last = np.broadcast_to(self.reading.last_rows[name], lead)
        self._check_later(name, law, clock.old[last])
        long = jnp.zeros((*lead, *law.event_shape), known.dtype)
        axis = len(lead)
        known = jnp.broadcast_to(known, (*lead, len(clock.old), *law.state_shape))
        long = long.at[(*(slice(None),) * axis, clock.old)].set(known)
        is_old = np.zeros(law.num_times, bool)
        is_old[clock.old] = True
        kept = is_old & (np.arange(law.num_times) <= clock.old[last][..., None])

        def simulate(
            sde: Any, scheme: Any, times: Any, dt: Any, cache: Any, x: Array, kept: Array, key: Any
        ) -> Array:
            def step(state: Array, inputs: Any) -> tuple[Array, Array]:
                t, h, k, c, own, keep = inputs
                drawn = scheme.draw(sde, k, t, h, state, c)
                new = jnp.where(keep, own, drawn)
                return new, new

            keys = jax.random.split(key, dt.shape[0])
            return law._scan(step, x[0], (times[:-1], dt, keys, cache, x[1:], kept[1:]))

        keys = jax.random.split(key, lead)
        dims = (law.event_dim, 1, keys.ndim - axis)
        return law.of_states(law._map(simulate, lead, (long, jnp.asarray(kept), keys), dims))

    def _check_later(self, name: str, law: AbstractPathLaw, start: np.ndarray) -> None:
        """Raise where a latent path is asked for at a time that its data have fixed already."""
        grid = np.broadcast_to(np.asarray(law.times), (*start.shape, law.num_times))
        begins = np.take_along_axis(grid, start[..., None], axis=-1)
        wanted = np.broadcast_to(self.times, (*start.shape, self.times.shape[-1]))
        early = wanted < begins - 1e-9 * max(float(np.ptp(grid)), 1.0)
        if early.any():
            at = tuple(int(i) for i in np.argwhere(early)[0])
            raise ValueError(
                f"forecast: path {name!r} was kept latent and goes on from its last datum at "
                f"{float(begins[at[:-1]].ravel()[0]):g}; it cannot be drawn at {wanted[at]:g}. "
                "Give method= to integrate it out, or take the path's own draws"
            )

    def _emission(
        self, name: str, law: EmissionPath, path: AbstractPathLaw, states: Array, owner: str
    ) -> EmissionPath:
        """The law of a statement's data at the further times."""
        emission = law.emission
        if emission.split is not None:
            raise ValueError(
                f"forecast: observe({name!r}, accumulated=...) reads integrals since its last "
                "reading, whose resets at further times are not stated: forecast the path, and "
                "integrate it"
            )
        inputs = self.observe_inputs.get(name)
        if emission.has_inputs and inputs is None:
            raise ValueError(
                f"forecast: the emission of {name!r} takes inputs; give those at the further times "
                f"by observe_inputs={{{name!r}: ...}}"
            )
        if inputs is not None and not emission.has_inputs:
            raise ValueError(f"observe_inputs names {name!r}, whose emission takes no inputs")
        inputs = None if inputs is None else jax.tree.map(jnp.asarray, inputs)
        if emission.opening is not None:
            place = self._place(owner)
            if place.ndim > 1 or path.forcing is None:
                raise ValueError(
                    f"forecast: observe({name!r}, side='after') needs one clock for all series"
                )
            shown, _ = path.forcing.openings(place)
            inputs = (inputs, shown)
        if inputs is not None:
            emission = eqx.tree_at(
                lambda e: e.inputs, emission, inputs, is_leaf=lambda leaf: leaf is None
            )
        return EmissionPath(emission, jnp.asarray(self.times), states, path.state_shape)
