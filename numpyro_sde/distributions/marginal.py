"""The law of observations with the path integrated out, and the path's stand-in in a model."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NoReturn

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray
from numpyro.distributions import constraints
from numpyro.distributions.batch_util import promote_batch_shape
from numpyro.util import is_prng_key

from numpyro_sde.closures import refuse_closures
from numpyro_sde.distributions.batching import describe_batch
from numpyro_sde.distributions.clocks import Clock
from numpyro_sde.distributions.missing import log_prob_of_present
from numpyro_sde.distributions.moments import (
    is_gaussian,
    mean_and_cov,
)
from numpyro_sde.distributions.observation import Emission, EmissionPath, EmissionStructure
from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.filters.model import AbstractFilter, Instrument, StateSpaceModel
from numpyro_sde.schemes import LocalLinear
from numpyro_sde.schemes.fractional_linear import markovian_sde
from numpyro_sde.schemes.memory import MemoryScheme, noise_of, num_states
from numpyro_sde.sde import broadcast_batch


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
        )


def _as_array(value: Any) -> Any:
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
    mean, cov = mean_and_cov(path.init, len(path.state_shape))
    # A start given in whole numbers is a real state all the same.
    mean, cov = mean.astype(jnp.result_type(mean, float)), cov.astype(jnp.result_type(cov, float))
    state_shape, chosen, normal_start = path.state_shape, path.scheme_chosen, is_gaussian(path.init)
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
            init_gaussian=normal_start,
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
    first = key if key.ndim == 0 else key[0]
    starts = draw_starts(path, lead, method.num_starts, jax.random.fold_in(first, 1))
    keys = _keys_for(key, lead)

    def seeded(model: StateSpaceModel, key: PRNGKeyArray, *starts: Array) -> Any:
        model = with_starts(model, *starts)
        chosen = method.with_key(key)
        chosen.check(model)
        return fn(chosen, model)

    dims = (keys.ndim - len(lead), *(1 + len(path.state_shape) for _ in starts))
    return run_on_model(path, lead, data, seeded, (keys, *starts), dims)


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


class MarginalPath(dist.Distribution):
    """Observations of a path that is integrated out.

    Event shape `(K, *observation)`, as without integrating out. Where earlier statements
    observe the same path, this is the law given their data.

    Args:
        path: the law of the path.
        method: the filter that integrates it out.
        statement: what is observed.
        earlier: statements before this one, with their data.
        lead: batch shape of the path, plates included.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    pytree_data_fields = ("path", "method", "statement", "earlier")
    pytree_aux_fields = ("lead",)

    def __init__(
        self,
        path: SDEPath,
        method: AbstractFilter,
        statement: Statement,
        earlier: tuple[tuple[Statement, Array], ...] = (),
        lead: tuple[int, ...] = (),
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.path, self.method, self.statement = path, method, statement
        self.earlier, self.lead = earlier, lead
        batch_shape = broadcast_batch(
            {
                "the path": lead,
                "params and inputs of observe": statement.emission.batch_shape,
            }
        )
        super().__init__(batch_shape, statement.event_shape, validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:
        return False

    @property
    def times(self) -> Any:
        """Observation times, shape `(*batch, K)`."""
        return self.path.times[..., self.statement.rows.index]

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        return self.statement.structure.support

    def _lead(self, value: Any) -> tuple[int, ...]:
        cut = value.ndim - self.event_dim
        if value.shape[cut:] != self.event_shape:
            raise ValueError(
                f"observations must have event shape {self.event_shape}, got an array of shape "
                f"{value.shape}"
            )
        leads = [y.shape[: y.ndim - len(s.event_shape)] for s, y in self.earlier]
        return jnp.broadcast_shapes(self.batch_shape, value.shape[:cut], *leads)

    def _run(self, data: list[tuple[Statement, Any]], lead: tuple[int, ...], what: str) -> Array:
        def evaluate(method: AbstractFilter, model: StateSpaceModel) -> Array:
            return getattr(method, what)(model)

        return run_method(self.path, lead, data, self.method, evaluate)

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> Array:  # noqa: ARG002
        value = _as_array(value)
        lead = self._lead(value)
        total = self._run([*self.earlier, (self.statement, value)], lead, "log_likelihood")
        if self.earlier:
            total = total - self._run(list(self.earlier), lead, "log_likelihood")
        return total

    def log_prob_pointwise(self, value: ArrayLike) -> Float[Array, "*batch K"]:
        """One-step-ahead log predictive densities, shape `(*lead, K)`; 0 where missing.

        Their sum is `log_prob`. With earlier statements on the same path, what those gain from
        this one's data between two of its times is added to the first of the two.
        """
        value = _as_array(value)
        lead = self._lead(value)
        terms = self._run([*self.earlier, (self.statement, value)], lead, "increments")
        if self.earlier:
            terms = terms - self._run(list(self.earlier), lead, "increments")
        rows = self.statement.rows.index % self.path.num_times
        unique, inverse, counts = np.unique(rows, return_inverse=True, return_counts=True)
        owner = np.searchsorted(unique, np.arange(self.path.num_times), side="right") - 1
        owner = np.maximum(owner, 0)
        sums = jnp.zeros((*terms.shape[:-1], unique.size), terms.dtype).at[..., owner].add(terms)
        return sums[..., inverse] / counts[inverse]

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Array:
        assert is_prng_key(key)
        key_path, key_data = jax.random.split(key)
        lead = sample_shape + self.batch_shape
        if self.earlier:
            states = self._draw_given_earlier(key_path, lead)
        else:
            path = self.method.simulator(self.path)
            states = path.expand(lead).sample(key_path)
        take = self.statement.rows.index % self.path.num_times
        axis = len(lead)
        law = EmissionPath(
            self.statement.emission,
            self.path.times[..., take],
            jnp.take(states, take, axis=axis),
            self.path.state_shape,
        )
        return law.expand(lead).sample(key_data)

    def _draw_given_earlier(self, key: PRNGKeyArray, lead: tuple[int, ...]) -> Array:
        return draw_smoothed(self.path, self.method, list(self.earlier), lead, key)


def draw_smoothed(
    path: SDEPath,
    method: AbstractFilter,
    data: list[tuple[Statement, Any]],
    lead: tuple[int, ...],
    key: PRNGKeyArray,
) -> Array:
    """Draw one path for each element of `lead`, given the data, shape `(*lead, T, *state)`."""
    filter_key, draw_key = jax.random.split(key)
    keys = jax.random.split(draw_key, lead)
    # Draws for many parameter values must not share the filter's random numbers.
    method = method.for_smoothing().with_key(filter_key)
    method_key = method.random_key
    method_keys = keys if method_key is None else jax.random.split(method_key, lead)
    starts = draw_starts(path, lead, method.num_starts, jax.random.fold_in(key, 1))

    def one(model: StateSpaceModel, key: PRNGKeyArray, other: Any, *starts: Array) -> Array:
        model = with_starts(model, *starts)
        chosen = method.with_key(other)
        chosen.check(model)
        draw = chosen.filter(model).sample(key, 1)[0]
        return model.visible(draw)

    key_dim = keys.ndim - len(lead)
    dims = (key_dim, key_dim, *(1 + len(path.state_shape) for _ in starts))
    return run_on_model(path, lead, data, one, (keys, method_keys, *starts), dims)


@promote_batch_shape.register
def _promote_marginal(law: MarginalPath) -> MarginalPath:
    new = copy.copy(law)
    new.path = promote_batch_shape(law.path)
    new._batch_shape = jnp.broadcast_shapes(
        law.batch_shape, new.path.batch_shape, new.statement.emission.batch_shape
    )
    return new


def make_statement(
    emission: Emission, rows: Any, state_shape: tuple[int, ...], batch_shape: tuple[int, ...]
) -> Statement:
    """Check an emission and bind it to indices of a path."""
    refuse_closures(emission.fn.function, "emission", describe_batch(batch_shape))
    return Statement(emission, Rows(rows), emission.structure(state_shape))


def no_value(name: str) -> str:
    """Why the value of a path that is integrated out cannot be used."""
    return (
        f"path {name!r} is integrated out by marginalize(...), so it has no value here: it can "
        "only be handed to nsde.observe. Leave it latent with marginalize(..., sites=[...]), or "
        "draw it afterwards with nsde.smooth"
    )


class IntegratedPath:
    """Stands for the value of a path that is integrated out; only `observe` can take it.

    Args:
        name: the path's site.
        path: its law.
        method: the filter that integrates it out.
        lead: batch shape of the path, plates included.
        index: the times of the path that the model sees; None for all.
    """

    def __init__(
        self,
        name: str,
        path: SDEPath,
        method: AbstractFilter,
        lead: tuple[int, ...],
        index: np.ndarray | None = None,
    ) -> None:
        self.name, self.path, self.method, self.lead = name, path, method, lead
        self.index = np.arange(path.num_times) if index is None else index
        self.seen: list[tuple[Statement, Array]] = []

    def view(self, index: np.ndarray) -> IntegratedPath:
        """The same path as seen by a model that knows only some of its times."""
        seen = IntegratedPath(self.name, self.path, self.method, self.lead, self.index[index])
        seen.seen = self.seen  # what is said of one view is said of the path
        return seen

    @property
    def clock(self) -> Clock:
        """Times that the model sees, and state shape."""
        return Clock(self.path.times[..., self.index], self.path.state_shape)

    def law_of(self, statement: Statement) -> MarginalPath:
        """The law of one more statement's data, given those seen so far."""
        method, key = self.method, self.method.random_key
        if key is not None:
            # Random numbers of its own for each path: estimates multiply only if independent.
            own = partial(jax.random.fold_in, data=zlib.crc32(self.name.encode()))
            method = method.with_key(own(key) if key.ndim == 0 else jax.vmap(own)(key))
        return MarginalPath(self.path, method, statement, tuple(self.seen), self.lead)

    def note(self, statement: Statement, value: Array) -> None:
        """Remember a statement's data for the statements after it."""
        self.seen.append((statement, value))

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(no_value(self.name))

    # As properties, so that asking whether they are there is refused with the reason.
    __array__ = __jax_array__ = property(_refuse)
    __iter__ = __len__ = __getitem__ = __bool__ = __float__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __neg__ = __abs__ = _refuse
    __truediv__ = __rtruediv__ = __pow__ = __rpow__ = __matmul__ = __rmatmul__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __mod__ = __floordiv__ = _refuse

    def __getattr__(self, attribute: str) -> NoReturn:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        self._refuse()
