"""The law of observations with the path integrated out, and the path's stand-in in a model."""

from __future__ import annotations

import copy
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

from numpyro_sde.distributions.clocks import Clock
from numpyro_sde.distributions.observation import EmissionPath
from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.distributions.state_space import (
    Statement,
    as_array,
    draw_starts,
    run_method,
    run_on_model,
    with_starts,
)
from numpyro_sde.sde import broadcast_batch
from numpyro_sde.statespace.model import AbstractFilter, StateSpaceModel


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
        value = as_array(value)
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
        value = as_array(value)
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
    filter_key, draw_key, start_key = jax.random.split(key, 3)
    keys = jax.random.split(draw_key, lead)
    # Draws for many parameter values must not share the filter's random numbers.
    method = method.for_smoothing().with_key(filter_key)
    method_key = method.random_key
    method_keys = keys if method_key is None else jax.random.split(method_key, lead)
    starts = draw_starts(path, lead, method.num_starts, start_key)

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
