"""Filters that go on: a state is kept, new data are added to it, forecasts are made from it.

The law of the state at the last time is all that later data need (it is Markov): two moments for
the filters of Kalman's family, equally weighted particles for `Particle`. Clocks and data are
arguments of the compiled programs, and pieces have a power of two of new times, so that a stream
compiles a few programs at its begin and none later.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, PRNGKeyArray

from numpyro_sde.checks.data import as_data
from numpyro_sde.distributions.observation import Emission, EmissionPath
from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.distributions.state_space import ObservedPath, check_powers, with_missing_terms
from numpyro_sde.distributions.statement import make_statement
from numpyro_sde.filters.extended import ExtendedKalman
from numpyro_sde.filters.kalman import Kalman
from numpyro_sde.filters.moment_matching import MomentMatching
from numpyro_sde.filters.particle import Particle
from numpyro_sde.filters.unscented import UnscentedKalman
from numpyro_sde.grid import TimeGrid, check_times
from numpyro_sde.observe import check_data
from numpyro_sde.runtime.entry import entry_point
from numpyro_sde.schemes import AbstractScheme
from numpyro_sde.sde import SDE
from numpyro_sde.statespace.model import AbstractFilter, StateSpaceModel

_METHODS = (Kalman, ExtendedKalman, UnscentedKalman, MomentMatching, Particle)
_LONGEST = 256  # new times in one piece


class StreamState(NamedTuple):
    """Where a stream is: all of the past that later data need.

    Attributes:
        time: the last time, `(*batch,)`, float64 on the host.
        mean: mean of the state there given the data so far, `(*batch, d)`.
        cov: its covariance, `(*batch, d, d)`.
        particles: equally weighted particles, `(*batch, M, d)`, or None.
        log_likelihood: log density of the data so far, `(*batch,)`; of particles an estimate whose
            exponential is unbiased.
        num_times: how many times have been filtered.

    Example:
        >>> import numpy as np
        >>> from numpyro_sde import StreamState
        >>> state = StreamState(np.zeros(()), np.zeros(1), np.eye(1), None, np.zeros(()), 0)
        >>> state.num_times
        0
    """

    time: np.ndarray
    mean: Any
    cov: Any
    particles: Any
    log_likelihood: Any
    num_times: int

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file (`.npz`), which is whole at any moment."""
        file = Path(path)
        partly = file.with_name(file.name + ".part")
        kept = {name: value for name, value in self._asdict().items() if value is not None}
        with partly.open("wb") as stream:
            np.savez(stream, **kept)
        partly.replace(file)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StreamState:
        """The state that `save` wrote."""
        with np.load(path, allow_pickle=False) as saved:
            found = {name: saved[name] for name in saved.files}
        number = int(found.pop("num_times"))
        return cls(particles=found.pop("particles", None), num_times=number, **found)


class FilterStream:
    """A filter that is given its data as they come.

    For given parameters; to learn of parameters meanwhile give them a leading dimension of draws:
    the increments of `log_likelihood` are what reweighs these. Equal to one run of the same filter
    over all data, for `Kalman`, `ExtendedKalman`, `UnscentedKalman` and `MomentMatching` to
    rounding, for `Particle` in law. Not for processes with a memory or hidden regimes, known jumps
    of the state, or flat starts; and smoothing needs the past: run `filter_path` over it.

    Args:
        sde: the equation, its parameters given; leading dimensions are a batch.
        init: law of the state at the start, or a fixed state.
        emission: as in `observe`.
        start: time of the start; an array `(*batch,)` for series on their own clocks.
        method: `filters.Kalman`, `ExtendedKalman`, `UnscentedKalman`, `MomentMatching` or
            `Particle`.
        params: as in `observe`.
        event_dims: as in `observe`.
        scheme: as for `SDEPath`.
        substeps: steps between two times, for schemes that need short ones.

    Raises:
        TypeError: a method of another kind.
        ValueError: an SDE with a memory or `substeps` below 1; in use, data that do not fit, or
            times that are not after the state's.

    Example:
        >>> import numpy as np, numpyro.distributions as dist, numpyro_sde as nsde
        >>> ou = nsde.processes.OrnsteinUhlenbeck(rate=1.0, mean=0.0, scale=1.0)
        >>> stream = nsde.FilterStream(
        ...     ou, dist.Normal(0.0, 0.7), lambda t, x: dist.Normal(x, 0.5),
        ...     start=0.0, method=nsde.filters.Kalman())
        >>> state = stream.begin()
        >>> state = stream.update(state, [1.0, 1.5], [0.3, -0.1])  # now and then
        >>> mean, cov = stream.predict(state, [2.0, 4.0])
        >>> mean.shape, int(state.num_times)
        ((2, 1), 2)
    """

    def __init__(
        self,
        sde: SDE,
        init: dist.Distribution | ArrayLike,
        emission: Callable[..., dist.Distribution],
        *,
        start: ArrayLike,
        method: AbstractFilter,
        params: Any = None,
        event_dims: Any = None,
        scheme: AbstractScheme | None = None,
        substeps: int = 1,
    ) -> None:
        if not isinstance(method, _METHODS):
            names = ", ".join(kind.__name__ for kind in _METHODS)
            raise TypeError(f"method must be one of {names}, got {method!r}")
        if isinstance(substeps, bool) or not isinstance(substeps, int) or substeps < 1:
            raise ValueError(f"substeps must be a positive whole number, got {substeps!r}")
        self.method, self.substeps = method, substeps
        self.start = np.asarray(start, np.float64)
        if not np.all(np.isfinite(self.start)):
            raise ValueError(f"start must be finite, got {start!r}")
        self._spec = _Spec(sde, init, emission, params, event_dims, scheme)
        law = self._spec.path(TimeGrid(np.stack([self.start, self.start + 1.0], axis=-1)))
        if law.scheme.has_memory or not (sde.is_diffusion and sde.noise.independent):
            raise ValueError(
                f"a stream keeps the state alone, but {type(sde).__name__} with scheme "
                f"{type(law.scheme).__name__} has a memory, jumps or a hidden regime: run "
                "filter_path over all data"
            )
        self._state_shape = law.state_shape
        emissions = Emission(emission, params, event_dims, None, 1, law.batch_shape)
        self._structure = emissions.structure(self._state_shape)
        self._batch = jnp.broadcast_shapes(law.batch_shape, emissions.batch_shape)

    def begin(self, obs: ArrayLike | None = None) -> StreamState:
        """The state at the start, with a datum at its time if there is one.

        Args:
            obs: shape `(*batch, *observation)`.
        """
        shape = (*self._batch, 1, *self._structure.shape)
        y = np.full(shape, np.nan) if obs is None else np.asarray(as_data("obs", obs))[None]
        if obs is not None and self._batch:
            y = np.moveaxis(y, 0, len(self._batch))
        times = np.broadcast_to(self.start, self._batch)
        state = StreamState(times, None, None, None, jnp.zeros(self._batch), 0)
        return self._piece(state, times[..., None], y)._replace(num_times=0)

    def update(self, state: StreamState, times: ArrayLike, obs: ArrayLike) -> StreamState:
        """The state after new data.

        Args:
            state: where the stream is.
            times: new times, increasing and after the state's, shape `(*batch, K)` or `(K,)`.
            obs: their data, `(*batch, K, *observation)`; NaN is missing.

        Raises:
            ValueError: times that are not after the state's, or data that do not fit.
        """
        new, y = self._checked(state, times), np.asarray(as_data("obs", obs))
        count = new.shape[-1]
        check_data("y", y, self._batch, (count, *self._structure.shape), self._structure)
        y = np.broadcast_to(y, (*self._batch, count, *self._structure.shape))
        done = 0
        axis = len(self._batch)
        for width in _widths(count):
            part = np.take(y, np.arange(done, done + width), axis=axis)
            state = self._piece(state, new[..., done : done + width], part)
            done += width
        return state

    def predict(self, state: StreamState, times: ArrayLike) -> tuple[Array, Array]:
        """Moments of the state at later times given the data so far.

        Args:
            state: where the stream is.
            times: as for `update`.

        Returns:
            Means `(*batch, F, d)` and covariances `(*batch, F, d, d)`.
        """
        new = self._checked(state, times)
        means, covs = [], []
        nothing = np.full((*self._batch, 1, *self._structure.shape), np.nan)
        for k in range(new.shape[-1]):
            state = self._piece(state, new[..., k : k + 1], nothing)
            means.append(state.mean)
            covs.append(state.cov)
        axis = len(self._batch)
        return jnp.stack(means, axis=axis), jnp.stack(covs, axis=axis)

    def forecast(
        self, state: StreamState, times: ArrayLike, num_draws: int, *, rng_key: PRNGKeyArray
    ) -> dict[str, Array]:
        """Draws of later states and data, from the data so far.

        Args:
            state: where the stream is.
            times: as for `update`.
            num_draws: number of draws.
            rng_key: random key.

        Returns:
            `"x"`, `(draws, *batch, F, *state)`, and `"y"`, `(draws, *batch, F, *observation)`.
        """
        new = self._checked(state, times)
        grid, rows = self._grid(state, new)
        x, y = _draw(
            self._spec,
            self.method,
            jax.tree.map(jnp.asarray, (state.mean, state.cov, state.particles)),
            (grid.times, grid.dt),
            tuple(rows.tolist()),
            num_draws,
            rng_key,
        )
        return {"x": x, "y": y}

    def _checked(self, state: StreamState, times: ArrayLike) -> np.ndarray:
        new = check_times(times)
        new = np.broadcast_to(new, (*self._batch, new.shape[-1]))
        if not np.all(new[..., 0] > state.time):
            raise ValueError(
                f"times must be after the state's, {np.max(state.time)!r}, got {np.min(new)!r}"
            )
        return new

    def _grid(self, state: StreamState, new: np.ndarray) -> tuple[TimeGrid, np.ndarray]:
        """From the state's time on to the new ones, as data of a program."""
        ends = np.concatenate([np.asarray(state.time)[..., None], new], axis=-1)
        gaps = np.diff(ends, axis=-1)
        step = np.repeat(gaps / self.substeps, self.substeps, axis=-1)
        within = np.tile(np.arange(self.substeps), gaps.shape[-1])
        times = np.repeat(ends[..., :-1], self.substeps, axis=-1) + within * step
        times = np.concatenate([times, ends[..., -1:]], axis=-1)
        rows = np.arange(1, gaps.shape[-1] + 1) * self.substeps
        return TimeGrid.of_arrays(jnp.asarray(times), jnp.asarray(step)), rows

    def _piece(self, state: StreamState, new: np.ndarray, y: np.ndarray) -> StreamState:
        first = state.mean is None
        if first:
            grid, rows = TimeGrid.of_arrays(jnp.asarray(new), jnp.zeros((*self._batch, 0))), [0]
        else:
            grid, steps = self._grid(state, new)
            rows = steps.tolist()
        key = jax.random.fold_in(_key_of(self.method), state.num_times)
        # Arrays of NumPy, as a file gives them, would be constants of the program.
        arrays = jax.tree.map(jnp.asarray, (state.mean, state.cov, state.particles))
        floats = jnp.asarray(y, jnp.result_type(float))
        mean, cov, particles, gain = _advance(
            self._spec,
            self.method,
            None if first else arrays,
            (grid.times, grid.dt),
            tuple(rows),
            floats,
            key,
        )
        return StreamState(
            time=np.array(new[..., -1]),
            mean=mean,
            cov=cov,
            particles=particles,
            log_likelihood=state.log_likelihood + gain,
            num_times=state.num_times + new.shape[-1],
        )


class _Spec(NamedTuple):
    """What is filtered."""

    sde: SDE
    init: Any
    emission: Callable[..., Any]
    params: Any
    event_dims: Any
    scheme: AbstractScheme | None

    def path(self, grid: TimeGrid) -> SDEPath:
        return SDEPath(self.sde, grid, self.init, scheme=self.scheme)

    def emissions(self, count: int, batch_shape: tuple[int, ...]) -> Emission:
        return Emission(self.emission, self.params, self.event_dims, None, count, batch_shape)


def _key_of(method: AbstractFilter) -> PRNGKeyArray:
    key = method.random_key
    return jax.random.key(0) if key is None else key


def _widths(count: int) -> list[int]:
    """Powers of two that add up to a number, the largest first.

    Example:
        >>> _widths(13)
        [8, 4, 1]
    """
    widths = [_LONGEST] * (count // _LONGEST)
    rest = count % _LONGEST
    return widths + [1 << k for k in range(rest.bit_length() - 1, -1, -1) if rest >> k & 1]


@entry_point
def _advance(
    spec: _Spec,
    method: AbstractFilter,
    state: Any,
    clock: tuple[Any, Any],
    rows: tuple[int, ...],
    y: Array,
    key: PRNGKeyArray,
) -> tuple[Array, Array, Any, Array]:
    """Moments or particles at the last time of a piece, and what its data add."""
    path = spec.path(TimeGrid.of_arrays(*clock))
    emissions = spec.emissions(len(rows), path.batch_shape)
    statement = make_statement(emissions, np.array(rows), path.state_shape, path.batch_shape)
    lead = jnp.broadcast_shapes(path.batch_shape, emissions.batch_shape)
    observed = ObservedPath(path, lead, ((statement, y),)).treated_by(method)

    def checked(model: StateSpaceModel, chosen: AbstractFilter) -> None:
        chosen.check(model)
        check_powers(chosen, model)

    if isinstance(method, Particle):

        def move(model: StateSpaceModel, key: PRNGKeyArray, *particles: Array) -> Any:
            if particles:
                model = _from_moments(model, *_moments(particles[0]))
                model = model._replace(starts=particles[0])
            chosen = method.with_key(key)
            checked(model, chosen)
            gain, last = chosen.resampled_last(model)
            return (*_moments(last), last, gain)

        start: tuple[Any, ...] = () if state is None else (state[2],)
        moved: Any = observed.map_seeded(move, key, method.num_starts, start, (2,) * len(start))
        return moved

    def run(model: StateSpaceModel, *moments: Array) -> Any:
        if moments:
            model = _from_moments(model, *moments)
        checked(model, method)
        result = with_missing_terms(method, model, method.filter(model))
        return result.mean[-1], result.cov[-1], result.log_likelihood

    start = () if state is None else tuple(state[:2])
    mean, cov, gain = observed.map(run, start, (1, 2)[: len(start)])
    return mean, cov, None, gain


def _moments(particles: Array) -> tuple[Array, Array]:
    mean = jnp.mean(particles, axis=0)
    away = particles - mean[None]
    return mean, away.T @ away / particles.shape[0]


def _from_moments(model: StateSpaceModel, mean: Array, cov: Array) -> StateSpaceModel:
    """The model from a law of its first state that was found, not given."""
    return model._replace(
        init_mean=mean,
        init_cov=cov,
        init_gaussian=True,
        init_kind="normal",
        starts=None,
        start_agrees=None,
    )


@entry_point
def _draw(
    spec: _Spec,
    method: AbstractFilter,
    state: Any,
    clock: tuple[Any, Any],
    rows: tuple[int, ...],
    num_draws: int,
    key: PRNGKeyArray,
) -> tuple[Array, Array]:
    """Draws of states and data at later times."""
    mean, cov, particles = state
    lead, dim = mean.shape[:-1], mean.shape[-1]
    start_key, path_key, data_key = jax.random.split(key, 3)
    if particles is None:
        values, vectors = jnp.linalg.eigh(cov)  # a variance may be zero
        root = vectors * jnp.sqrt(jnp.maximum(values, 0.0))[..., None, :]
        z = jax.random.normal(start_key, (num_draws, *lead, dim), mean.dtype)
        x0 = mean[None] + jnp.einsum("...ij,d...j->d...i", root, z)
    else:
        chosen = jax.random.randint(start_key, (num_draws, *lead), 0, particles.shape[-2])
        x0 = jnp.take_along_axis(particles[None], chosen[..., None, None], axis=-2)[..., 0, :]
    law = spec.path(TimeGrid.of_arrays(*clock))
    scalar = law.state_shape == ()
    x0 = x0[..., 0] if scalar else x0
    path = law.replace(init=dist.Delta(x0, event_dim=0 if scalar else 1))
    path = method.simulator(path)
    states = path.sample(path_key)
    take = np.array(rows)
    seen = jnp.take(states, take, axis=1 + len(lead))
    emissions = spec.emissions(len(rows), law.batch_shape)
    times = jnp.asarray(law.times)[..., take]
    y = EmissionPath(emissions, times, seen, law.state_shape).sample(data_key)
    return seen, y
