"""A path law and what is said of it, as the state-space model that filters take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, PRNGKeyArray

from numpyro_sde.checks.closures import refuse_closures
from numpyro_sde.distributions.batching import describe_batch
from numpyro_sde.distributions.missing import log_prob_of_present
from numpyro_sde.distributions.moments import (
    is_flat,
    is_gaussian,
    mean_and_cov,
    start_moments,
)
from numpyro_sde.distributions.observation import Emission, EmissionStructure
from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.schemes import LocalLinear
from numpyro_sde.schemes.fractional_linear import markovian_sde
from numpyro_sde.schemes.memory import MemoryScheme, noise_of, num_states
from numpyro_sde.statespace.model import AbstractFilter, Instrument, StateSpaceModel


class Rows:
    """Indices into a path, hashable so that they can be static."""

    def __init__(self, index: Any) -> None:
        self.index = np.asarray(index, dtype=np.int64)
        self._key = self.index.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __len__(self) -> int:
        return int(self.index.size)


class Statement(eqx.Module):
    """One observation statement on a path that is integrated out."""

    emission: Emission
    rows: Rows = eqx.field(static=True)
    structure: EmissionStructure = eqx.field(static=True)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of its data, `(K, *observation)`."""
        return (len(self.rows), *self.structure.shape)

    def leaf_event_dims(self) -> list[int]:
        """Event dimensions of each array leaf of this object, in flattening order."""
        return self.emission.leaf_event_dims()

    def instruments(self, times: Any, state_shape: tuple[int, ...], y: Array) -> list[Instrument]:
        """Lay unbatched data out on a path's grid.

        Times that occur twice in the statement go to separate instruments.
        """
        rounds: list[list[int]] = []
        seen: dict[int, int] = {}
        num_times = np.shape(times)[0]
        for position, row in enumerate(self.rows.index % num_times):
            turn = seen.get(int(row), 0)
            seen[int(row)] = turn + 1
            if turn == len(rounds):
                rounds.append([])
            rounds[turn].append(position)
        return [self._instrument(times, state_shape, y, np.asarray(r)) for r in rounds]

    def _instrument(
        self, times: Any, state_shape: tuple[int, ...], y: Array, take: np.ndarray
    ) -> Instrument:
        num_times = np.shape(times)[0]
        rows = self.rows.index[take] % num_times
        whole = rows.size == num_times and bool(np.all(np.diff(rows) > 0))
        shape = self.structure.shape
        size = int(np.prod(shape, dtype=int))

        def spread(a: Any) -> Any:
            if len(take) != a.shape[0]:
                a = a[take]
            if whole:
                return a
            if isinstance(a, np.ndarray):
                out = np.zeros((num_times, *a.shape[1:]), a.dtype)
                out[rows] = a
                return out
            return jnp.zeros((num_times, *a.shape[1:]), a.dtype).at[rows].set(a)

        # Data known before tracing stay on the host: filters then see that none is missing.
        xp: Any = np if isinstance(y, np.ndarray) else jnp
        flat = y.reshape(y.shape[0], size)
        floating = jnp.issubdtype(flat.dtype, jnp.floating)
        known = ~xp.isnan(flat) if floating else xp.ones(flat.shape, bool)
        values = xp.where(known, flat, 0).astype(jnp.result_type(float))
        emission = self.emission

        def law_at(inputs: Any, x: Array) -> dist.Distribution:
            t, u = inputs
            return emission.at(t, x[0] if state_shape == () else x[: state_shape[0]], u)

        def moments(inputs: Any, x: Array) -> tuple[Array, Array]:
            return mean_and_cov(law_at(inputs, x), len(shape))

        def log_prob(inputs: Any, x: Array, y: Array, present: Array) -> Array:
            marked = jnp.where(present, y, jnp.nan).reshape(shape)
            return log_prob_of_present(law_at(inputs, x), marked)

        return Instrument(
            inputs=(jnp.asarray(times), jax.tree.map(spread, emission.inputs)),
            values=spread(values),
            present=spread(known),
            moments=moments,
            log_prob=log_prob,
            gaussian=self.structure.gaussian,
            rows=np.sort(rows),
            diagonal=self.structure.diagonal,
            has_moments=self.structure.has_moments,
            law=law_at,
        )


def as_array(value: Any) -> Any:
    """Keep data that are known on the host there."""
    return value if isinstance(value, np.ndarray) else jnp.asarray(value)


def run_on_model(
    path: SDEPath,
    lead: tuple[int, ...],
    data: list[tuple[Statement, Any]],
    fn: Callable[..., Any],
    arrays: tuple[Any, ...] = (),
    dims: tuple[int, ...] = (),
) -> Any:
    """Map `fn(model, *arrays)` of the unbatched state-space model over `lead`."""
    kind, mean, cov = start_moments(path.init, len(path.state_shape))
    # A start given in whole numbers is a real state all the same.
    mean, cov = mean.astype(jnp.result_type(mean, float)), cov.astype(jnp.result_type(cov, float))
    state_shape, chosen = path.state_shape, path.scheme_chosen
    flat: list[Any] = []
    flat_dims: list[Any] = []
    for statement, y in data:
        flat += [statement, y]
        flat_dims += [statement.leaf_event_dims(), len(statement.event_shape)]

    def one(
        sde: Any, scheme: Any, times: Any, dt: Any, cache: Any, mean: Array, cov: Array, *rest: Any
    ) -> Any:
        observed, others = rest[: len(flat)], rest[len(flat) :]
        instruments: list[Instrument] = []
        for statement, y in zip(observed[::2], observed[1::2], strict=True):
            instruments += statement.instruments(times, state_shape, y)
        model = StateSpaceModel(
            sde=sde,
            scheme=scheme,
            scheme_chosen=chosen,
            times=times,
            dt=dt,
            cache=cache,
            init_mean=mean,
            init_cov=cov,
            init_gaussian=kind == "normal",
            init_kind=kind,
            scalar=state_shape == (),
            instruments=tuple(instruments),
        )
        return fn(with_memory(model, state_shape), *others)

    return path._map(one, lead, (mean, cov, *flat, *arrays), (1, 2, *flat_dims, *dims))


def run_method(
    path: SDEPath,
    lead: tuple[int, ...],
    data: list[tuple[Statement, Any]],
    method: AbstractFilter,
    fn: Callable[[AbstractFilter, StateSpaceModel], Any],
) -> Any:
    """Map `fn(method, model)` over `lead`, each element with random numbers of its own."""
    key = method.random_key
    if key is None:

        def plain(model: StateSpaceModel) -> Any:
            method.check(model)
            return fn(method, model)

        return run_on_model(path, lead, data, plain)

    def seeded(model: StateSpaceModel, key: PRNGKeyArray) -> Any:
        chosen = method.with_key(key)
        chosen.check(model)
        return fn(chosen, model)

    return run_seeded(path, lead, data, seeded, key, method.num_starts)


def run_seeded(
    path: SDEPath,
    lead: tuple[int, ...],
    data: list[tuple[Statement, Any]],
    fn: Callable[..., Any],
    key: PRNGKeyArray,
    num_starts: int,
    arrays: tuple[Any, ...] = (),
    dims: tuple[int, ...] = (),
) -> Any:
    """Map `fn(model, key, *arrays)` over `lead`, each element with a key and starts of its own."""
    # Split before use: a child made by `fold_in` may be one that `split` makes.
    start_key, own = jax.random.split(key) if key.ndim == 0 else (key[0], key)
    starts = draw_starts(path, lead, num_starts, start_key)
    keys = _keys_for(own, lead)
    count = len(arrays)

    def seeded(model: StateSpaceModel, key: PRNGKeyArray, *rest: Any) -> Any:
        return fn(with_starts(model, *rest[count:]), key, *rest[:count])

    start_dims = tuple(1 + len(path.state_shape) for _ in starts)
    every = (keys.ndim - len(lead), *dims, *start_dims)
    return run_on_model(path, lead, data, seeded, (keys, *arrays, *starts), every)


def _keys_for(key: PRNGKeyArray, lead: tuple[int, ...]) -> PRNGKeyArray:
    """Independent keys `(*lead, ...)`, made of one key or of each of several."""
    if key.ndim == 0:
        return jax.random.split(key, lead)
    return jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, lead))(key), 0, -1)


def draw_starts(
    path: SDEPath, lead: tuple[int, ...], num_starts: int, key: PRNGKeyArray
) -> tuple[Array, ...]:
    """Draws of first states that are not normal, one array `(*lead, M, *state)`, or none."""
    if num_starts == 0 or is_gaussian(path.init):
        return ()
    if is_flat(path.init):
        raise ValueError(
            "init is flat (ImproperUniform), which cannot be drawn from: particles need a proper "
            "law of the first state. filters.Kalman() takes a flat one exactly"
        )
    draws = path.init.expand(lead).sample(key, (num_starts,))
    return (jnp.moveaxis(draws, 0, len(lead)).astype(jnp.result_type(float)),)


def with_starts(model: StateSpaceModel, *starts: Array) -> StateSpaceModel:
    """Give a model the draws that `draw_starts` made."""
    if not starts:
        return model
    states = jnp.reshape(starts[0], (starts[0].shape[0], -1))
    # A noise with memory starts with a bank of mean zero.
    memory = model.dim - states.shape[1]
    return model._replace(starts=jnp.pad(states, ((0, 0), (0, memory))))


def with_memory(model: StateSpaceModel, state_shape: tuple[int, ...]) -> StateSpaceModel:
    """The model with all that its scheme carries; the same where the noise has no memory."""
    scheme = model.scheme
    if not isinstance(scheme, MemoryScheme):
        return model
    count, size = scheme.num_noises(model.sde), num_states(model.sde)

    def extend(cov: Array) -> tuple[Array, Array]:
        mean = jnp.concatenate([model.init_mean, jnp.zeros(cov.shape[0], cov.dtype)])
        return mean, jax.scipy.linalg.block_diag(model.init_cov, cov)

    markovian = None
    if not noise_of(model.sde).varies:
        bank, _ = noise_of(model.sde).on_grid(model.times, model.dt)
        start_mean, start_cov = extend(jnp.kron(jnp.eye(count), bank.start))
        markovian = model._replace(
            sde=markovian_sde(model.sde, state_shape, bank),
            scheme=LocalLinear(),
            cache=None,
            init_mean=start_mean,
            init_cov=start_cov,
            scalar=False,
            state_shape=state_shape,
        )
    mean, cov = extend(jnp.zeros((count * size, count * size), model.init_cov.dtype))
    return model._replace(
        init_mean=mean, init_cov=cov, scalar=False, state_shape=state_shape, markovian=markovian
    )


def make_statement(
    emission: Emission, rows: Any, state_shape: tuple[int, ...], batch_shape: tuple[int, ...]
) -> Statement:
    """Check an emission and bind it to indices of a path."""
    refuse_closures(emission.fn.function, "emission", describe_batch(batch_shape))
    return Statement(emission, Rows(rows), emission.structure(state_shape))
