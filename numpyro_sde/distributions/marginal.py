"""The law of observations with the path integrated out, and the path's stand-in in a model."""

from __future__ import annotations

import copy
import math
import zlib
from functools import partial
from typing import Any, ClassVar, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray
from numpyro.distributions import constraints
from numpyro.distributions.batch_util import promote_batch_shape
from numpyro.util import is_prng_key

from numpyro_sde.checks.data import as_data
from numpyro_sde.distributions.batching import map_batch
from numpyro_sde.distributions.clocks import Clock
from numpyro_sde.distributions.observation import EmissionPath
from numpyro_sde.distributions.parts import part_bytes
from numpyro_sde.distributions.path_law import AbstractPathLaw
from numpyro_sde.distributions.state_space import (
    ObservedPath,
    Readings,
    data_under_law,
)
from numpyro_sde.distributions.statement import (
    Statement,
    broadcast_lead,
    missing_where_masked,
    stack_replicates,
)
from numpyro_sde.filters.forward import ForwardResult
from numpyro_sde.filters.particle_result import ParticleResult
from numpyro_sde.filters.rao_blackwell import RaoBlackwellResult
from numpyro_sde.runtime.entry import subprogram
from numpyro_sde.sde import broadcast_batch
from numpyro_sde.statespace.model import AbstractFilter, StateSpaceModel


class MarginalPath(dist.Distribution):
    """Observations of a path that is integrated out.

    Event shape `(K, *observation)`, as without integrating out. Where earlier statements
    observe the same path, this is the law given their data. Batch dimensions that the path does
    not have are instruments of one path: their joint log density stands at the first of them,
    and zero at the others, so that its sum is right.

    Args:
        path: the law of the path.
        method: the filter that integrates it out.
        statement: what is observed, its batch not yet told apart.
        earlier: statements before this one, with their data, replicates stacked.
        lead: batch shape of the path, plates included.
        batch_shape: batch shape of the statement, plates included; None for the broadcast of the
            path's and the emission's.
        power: power that the likelihood is raised to; None for 1.
        data_mask: where data count, broadcasting with the batch shape; True for everywhere.
        path_mask: where the density of the path counts, broadcasting with `lead`.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    pytree_data_fields = (
        "path",
        "method",
        "statement",
        "earlier",
        "power",
        "data_mask",
        "path_mask",
    )
    pytree_aux_fields = ("lead",)

    # The path's stand-in in the run of a model; not part of the pytree.
    stand_in: IntegratedPath | None = None

    def __init__(
        self,
        path: AbstractPathLaw,
        method: AbstractFilter,
        statement: Statement,
        earlier: tuple[tuple[Statement, Array], ...] = (),
        lead: tuple[int, ...] = (),
        *,
        batch_shape: tuple[int, ...] | None = None,
        power: Any = None,
        data_mask: Any = True,
        path_mask: Any = True,
        validate_args: bool | None = None,
    ) -> None:
        self.path, self.method, self.statement = path, method, statement
        self.earlier, self.lead = earlier, lead
        self.power, self.data_mask, self.path_mask = power, data_mask, path_mask
        own = broadcast_batch(
            {
                "the path": lead,
                "params and inputs of observe": statement.emission.batch_shape,
            }
        )
        batch_shape = own if batch_shape is None else jnp.broadcast_shapes(own, batch_shape)
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

    def laid_out(self, value: Any) -> tuple[Statement, Any, tuple[int, ...], tuple[int, ...]]:
        """The statement and its data, replicates stacked; batch of the paths, and of the data."""
        value = as_data("observations", value)
        cut = value.ndim - self.event_dim
        if value.shape[cut:] != self.event_shape:
            raise ValueError(
                f"observations must have event shape {self.event_shape}, got an array of shape "
                f"{value.shape}"
            )
        batch = jnp.broadcast_shapes(self.batch_shape, value.shape[:cut])
        statement, lay_out, without = self._stacked()
        y = missing_where_masked(value, self.data_mask, self.batch_shape, self.event_dim)
        if statement.replicates:
            y = broadcast_lead(y, self.batch_shape, self.event_dim)
        leads = [y.shape[: y.ndim - len(s.event_shape)] for s, y in self.earlier]
        lead = jnp.broadcast_shapes(without(batch), *leads)
        return statement, lay_out(y, self.event_dim), lead, batch

    def _stacked(self) -> Any:
        return stack_replicates(self.statement, self.batch_shape, self.lead, self.power)

    def _run(self, data: list[tuple[Statement, Any]], lead: tuple[int, ...], what: str) -> Array:
        readings = tuple((statement, Readings.of(statement, y)) for statement, y in data)
        # The states that a known start reaches are found on the host, before the program.
        observed = ObservedPath(self.path, lead, readings).treated_by(self.method)
        return _integrated(observed, self.method, what, part_bytes())

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> Array:  # noqa: ARG002
        statement, y, lead, batch = self.laid_out(value)
        y = self._under_law(statement, y)
        total = self._run([*self.earlier, (statement, y)], lead, "log_likelihood")
        if self.earlier:
            total = total - self._run(list(self.earlier), lead, "log_likelihood")
        if self.path_mask is not True:  # a series whose path and data are masked out says nothing
            total = jnp.where(self.path_mask, total, 0.0)
        return self._at_first_replicate(total, lead, batch)

    def _under_law(self, statement: Statement, y: Any) -> Any:
        """The data, refused where the path alone is masked out."""
        name = "x" if self.stand_in is None else self.stand_in.name
        return data_under_law(self.path_mask, statement, y, name)

    def _at_first_replicate(
        self, total: Array, lead: tuple[int, ...], batch: tuple[int, ...]
    ) -> Array:
        if lead == batch:
            return total
        full = jnp.broadcast_shapes(lead, batch)
        first = np.ones((), bool)
        for axis, (own, size) in enumerate(zip(lead[-len(full) :], full, strict=False)):
            if own != size:
                shape = [1] * len(full)
                shape[axis] = size
                first = first & (np.arange(size) == 0).reshape(shape)
        return jnp.where(first, total, jnp.zeros((), total.dtype))

    def log_prob_pointwise(self, value: ArrayLike) -> Float[Array, "*batch K"]:
        """One-step-ahead log predictive densities, shape `(*lead, K)`; 0 where missing.

        Their sum is `log_prob`. Earlier statements on the same path, and instruments before one in
        a plate of instruments, are known in full: what they gain from this one's data between two
        of its times is added to the first of the two.
        """
        statement, y, lead, batch = self.laid_out(value)
        terms = self._pointwise_of(statement, self._under_law(statement, y), lead, batch)
        if self.path_mask is True:
            return terms
        return jnp.where(jnp.asarray(self.path_mask)[..., None], terms, 0.0)

    def _pointwise_of(
        self, statement: Statement, y: Any, lead: tuple[int, ...], batch: tuple[int, ...]
    ) -> Array:
        count = math.prod(statement.replicates)
        if count == 1:
            return self._pointwise(statement, y, lead, None)
        rank, event = len(statement.replicates), len(statement.event_shape)
        flat = jnp.arange(count).reshape(statement.replicates)
        flat = flat.reshape(*statement.replicates, *(1,) * (event - rank))
        floats = jnp.asarray(y, jnp.result_type(float, y))

        def up_to(last: Array) -> Array:
            later, own = flat > last, flat == last
            known = jnp.where(own, jnp.nan, jnp.where(later, jnp.nan, floats))
            return self._pointwise(statement, jnp.where(later, jnp.nan, floats), lead, known)

        each = jax.lax.map(up_to, jnp.arange(count))  # (count, *lead, K)
        each = jnp.moveaxis(each, 0, -2).reshape(*each.shape[1:-1], *statement.replicates, -1)
        # Back to the order of the batch: replicates stand after the path's axes, 1 in their place.
        axes = [a for a, (n, m) in enumerate(zip(lead, batch, strict=True)) if n != m]
        each = jnp.squeeze(each, axis=tuple(axes))
        source = [len(batch) - rank + i for i in range(rank)]
        return jnp.moveaxis(each, source, axes)

    def _pointwise(self, statement: Statement, y: Any, lead: tuple[int, ...], known: Any) -> Array:
        """Gains by time from `y` over `known`, given all earlier statements, `(*lead, K)`."""
        data = list(self.earlier)
        terms = self._run([*data, (statement, y)], lead, "increments")
        if known is not None:
            data = [*data, (statement, known)]
        if data:
            terms = terms - self._run(data, lead, "increments")
        floats = jnp.asarray(y, jnp.result_type(float, y))
        new = ~jnp.isnan(floats)
        if known is not None:
            new = new & jnp.isnan(known)
        rank, rows = len(statement.replicates), self.statement.rows.index % self.path.num_times
        cut = floats.ndim - len(statement.event_shape)
        others = [a for a in range(cut, floats.ndim) if a != cut + rank]
        present = jnp.any(new, axis=tuple(others))  # (*lead, K)
        present = jnp.broadcast_to(present, (*terms.shape[:-1], rows.size))
        return _sum_from(terms, rows, present)

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Array:
        assert is_prng_key(key)
        key_path, key_data = jax.random.split(key)
        _, _, without = self._stacked()
        lead = sample_shape + without(self.batch_shape)
        if self.earlier:
            observed = ObservedPath(self.path, lead, self.earlier)
            states = draw_smoothed(observed, self.method, key_path)
        else:
            path = self.method.simulator(self.path)
            states = path.expand(lead).sample(key_path)
        take = self.statement.rows.index % self.path.num_times
        states, state_shape = self._seen(states, lead)
        law = EmissionPath(
            self.statement.emission,
            self.path.times[..., take],
            jnp.take(states, take, axis=len(lead)),
            state_shape,
        )
        return law.expand(sample_shape + self.batch_shape).sample(key_data)

    def _seen(self, states: Array, lead: tuple[int, ...]) -> tuple[Array, tuple[int, ...]]:
        """What the model makes of paths `(*lead, T, *state)` before it observes them."""
        view, shape = self.statement.view, self.path.state_shape
        if view is None:
            return states, shape
        consts = view.on_grid(self.path.num_times, len(self.lead))

        def one(x: Array, *now: Array) -> Array:
            return jax.vmap(lambda x, *c: view.apply(x, c))(x, *now)

        dims = (1 + len(shape), *(c.ndim - len(self.lead) for c in consts))
        seen = map_batch(one, lead, (states, *consts), dims)
        return seen, seen.shape[len(lead) + 1 :]


@subprogram
def _integrated(
    observed: ObservedPath,
    method: AbstractFilter,
    what: str,
    budget: int,  # noqa: ARG001
) -> Array:
    """What a filter makes of a path and its data: one program, for a budget of memory."""

    def evaluate(method: AbstractFilter, model: StateSpaceModel) -> Array:
        return getattr(method, what)(model)

    return observed.run(method, evaluate)


def _sum_from(terms: Array, rows: np.ndarray, present: Array) -> Array:
    """Sum terms `(*lead, N)` into the observed one of `rows` at or before each, the first else.

    Rows that stand twice share what falls to their time.
    """
    length = terms.shape[-1]

    def one(terms: Array, present: Array) -> Array:
        where = jnp.zeros(length, bool).at[rows].max(present)
        last = jax.lax.cummax(jnp.where(where, jnp.arange(length), -1))
        owner = jnp.where(last < 0, jnp.argmax(where), last)
        sums = jnp.zeros(length, terms.dtype).at[owner].add(terms)
        count = jnp.zeros(length, terms.dtype).at[rows].add(present)
        return jnp.where(present, sums[rows] / jnp.maximum(count[rows], 1.0), 0.0)

    lead = terms.shape[:-1]
    flat = jax.vmap(one)(terms.reshape(-1, length), present.reshape(-1, rows.size))
    return flat.reshape(*lead, rows.size)


def key_for(method: AbstractFilter, name: str) -> PRNGKeyArray | None:
    """Random numbers of a filter for the path of this name; None where it needs none.

    Each path has its own: estimates multiply only if independent.
    """
    key = method.random_key
    if key is None:
        return None
    own = partial(jax.random.fold_in, data=zlib.crc32(name.encode()))
    return own(key) if key.ndim == 0 else jax.vmap(own)(key)


def draw_smoothed(observed: ObservedPath, method: AbstractFilter, key: PRNGKeyArray) -> Array:
    """Draw one path for each element of the batch, given the data, `(*lead, T, *state)`."""
    return draw_parts(observed, method, key)["path"]


def draw_parts(
    observed: ObservedPath,
    method: AbstractFilter,
    key: PRNGKeyArray,
    filter_key: PRNGKeyArray | None = None,
) -> dict[str, Array]:
    """Draw one path for each element of the batch, and what the method draws with it.

    Args:
        observed: a path with all data on it.
        method: the filter.
        key: random key.
        filter_key: random numbers of the filter, where they are those of an estimate that was made
            before; None for new ones.

    Returns:
        `path`, `(*lead, T, *state)`; others, hidden regimes, of shape `(*lead, T)`.
    """
    observed = observed.treated_by(method)
    path, lead = observed.path, observed.lead
    new_key, draw_key, _ = jax.random.split(key, 3)
    keys = jax.random.split(draw_key, lead)
    key_dim = keys.ndim - len(lead)
    method = method.for_smoothing()
    kept = filter_key is not None
    own: Any = filter_key if kept else new_key

    def one(model: StateSpaceModel, chosen: AbstractFilter, key: PRNGKeyArray) -> dict[str, Array]:
        chosen.check(model)
        result = chosen.filter(model)
        if isinstance(result, RaoBlackwellResult):
            states, regimes = result.sample_with_regimes(key, 1)
            return {"path": model.visible(states[0]), "regime": regimes[0]}
        # Of an accepted estimate only ancestral lines have the posterior for few particles:
        # resampling neither at every step nor by independent draws leaves backward ones biased.
        how = {"method": "genealogy"} if kept and isinstance(result, ParticleResult) else {}
        draw = result.sample(key, 1, **how)[0]
        if isinstance(result, ForwardResult):  # counts of a network, or numbers of states
            return {"path": draw if result.equation.values is not None else draw[:, 0]}
        return {"path": model.visible(draw)}

    draws: dict[str, Array]
    if method.random_key is None:
        draws = observed.map(lambda model, key: one(model, method, key), (keys,), (key_dim,))
    else:

        def seeded(model: StateSpaceModel, other: Any, key: PRNGKeyArray) -> dict[str, Array]:
            return one(model, method.with_key(other), key)

        # Draws for many parameter values must not share the filter's random numbers.
        draws = observed.map_seeded(seeded, own, method.num_starts, (keys,), (key_dim,))
    return {**draws, "path": path.of_states(draws["path"])}


@promote_batch_shape.register
def _promote_marginal(law: MarginalPath) -> MarginalPath:
    new = copy.copy(law)
    new.path = promote_batch_shape(law.path)
    added = len(new.path.batch_shape) - len(law.path.batch_shape)
    if added > 0:
        new.lead = (*new.path.batch_shape[:added], *law.lead)
    new._batch_shape = jnp.broadcast_shapes(
        law.batch_shape, new.path.batch_shape, new.statement.emission.batch_shape
    )
    return new


def no_value(name: str) -> str:
    """Why the value of a path that is integrated out cannot be used."""
    return (
        f"path {name!r} is integrated out by marginalize(...), so it has no value here: it can "
        "only be handed to nsde.observe. Leave it latent with marginalize(..., sites=[...]), or "
        "draw it afterwards with nsde.smooth"
    )


class NoValue:
    """Stands where a path that is integrated out, or what is made of it, would be.

    Args:
        name: the path's site.
    """

    def __init__(self, name: str) -> None:
        self.name = name

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


class IntegratedPath(NoValue):
    """Stands for the value of a path that is integrated out; only `observe` can take it.

    Args:
        name: the path's site.
        path: its law.
        method: the filter that integrates it out.
        lead: batch shape of the path, plates included.
        index: the times of the path that the model sees; None for all.
        mask: where the density of the path counts.
        plates: names of the plates around it.
        owner: the handler that made it.
    """

    def __init__(
        self,
        name: str,
        path: AbstractPathLaw,
        method: AbstractFilter,
        lead: tuple[int, ...],
        index: np.ndarray | None = None,
        *,
        mask: Any = True,
        plates: Any = (),
        owner: Any = None,
    ) -> None:
        super().__init__(name)
        self.path, self.method, self.lead = path, method, lead
        self.mask, self.plates, self.owner = mask, plates, owner
        self.index = np.arange(path.num_times) if index is None else index
        self.seen: list[tuple[Statement, Array]] = []
        self.sites: list[str] = []

    def view(self, index: np.ndarray) -> IntegratedPath:
        """The same path as seen by a model that knows only some of its times."""
        seen = copy.copy(self)
        seen.index = self.index[index]
        seen.seen, seen.sites = (
            self.seen,
            self.sites,
        )  # what is said of one view is said of the path
        return seen

    @property
    def clock(self) -> Clock:
        """Times that the model sees, and state shape."""
        return Clock(self.path.times[..., self.index], self.path.state_shape)

    def law_of(self, statement: Statement) -> MarginalPath:
        """The law of one more statement's data, given those seen so far."""
        method, key = self.method, key_for(self.method, self.name)
        if key is not None:
            method = method.with_key(key)
        law = MarginalPath(
            self.path, method, statement, tuple(self.seen), self.lead, path_mask=self.mask
        )
        law.stand_in = self
        return law

    def note(self, site: str, law: MarginalPath, value: Array) -> None:
        """Remember a statement's data for the statements after it."""
        statement, y, _, _ = law.laid_out(value)
        self.sites.append(site)
        self.seen.append((statement, y))
