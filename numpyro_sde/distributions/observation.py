"""The law of noisy observations of a path, given its states."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray
from numpyro.distributions import constraints
from numpyro.distributions.batch_util import promote_batch_shape
from numpyro.util import is_prng_key

from numpyro_sde.checks.closures import refuse_closures
from numpyro_sde.checks.data import as_data
from numpyro_sde.distributions.batching import (
    align_new_axes,
    describe_batch,
    leading_dims,
    map_batch,
)
from numpyro_sde.distributions.missing import log_prob_of_present, tolerates_partial
from numpyro_sde.distributions.moments import (
    has_independent_components,
    has_moments,
    is_exact,
    is_gaussian,
)
from numpyro_sde.events import Rule
from numpyro_sde.runtime.entry import subprogram
from numpyro_sde.schemes.events import open_state
from numpyro_sde.sde import (
    Code,
    Parameters,
    as_function,
    broadcast_batch,
)


class EmissionStructure(NamedTuple):
    """What an emission returns at one time, found by tracing it.

    Attributes:
        shape: shape of one observation.
        support: constraint on one observation, its event the whole of it; where its bounds are
            arrays, only real or whole numbers.
        moving: whether the support has bounds that are arrays, which may depend on the state.
        has_rsample: whether draws can be differentiated.
        partial: whether single components may be missing.
        gaussian: whether it is normal, with any mean and covariance.
        diagonal: whether its components are independent given the state.
        exact: whether it is a point mass: seen without noise.
        family: class name of the distribution, for messages.
        has_moments: whether it has a mean and a variance; None where traced parameters decide.
    """

    shape: tuple[int, ...]
    support: Any
    moving: bool
    has_rsample: bool
    partial: bool
    gaussian: bool
    diagonal: bool
    exact: bool
    family: str
    has_moments: bool | None


class Opening(eqx.Module):
    """Events after which states are observed.

    Attributes:
        rules: what each kind of event does.
        parameters: parameters of the SDE.
    """

    rules: tuple[Rule, ...]
    parameters: Parameters

    def leaf_event_dims(self) -> list[int]:
        """Event dimensions of each array leaf."""
        whole = [jnp.ndim(leaf) for leaf in jax.tree_util.tree_leaves(self.rules)]
        return [*whole, *self.parameters.event_dims]

    def open(self, x: Array, shown: Any) -> Array:
        """State after the events of one time."""
        return open_state(self.rules, self.parameters.tree, x, shown)


class Openings(NamedTuple):
    """Events at the times observed: what they do, which there are, and their event dimensions."""

    opening: Opening
    shown: Any
    dims: tuple[int, ...]


class _NotADistributionError(TypeError):
    """Told apart from errors that an emission itself raises."""


class Emission(eqx.Module):
    """The observation law at one time: `emission(t, x[, p][, u])` returns a distribution.

    Args:
        fn: the function, for one state of one process.
        params: pytree of arrays handed over as `p`; None for none.
        event_dims: dimensions of each parameter that belong to one process.
        inputs: pytree of arrays with one entry for each time, `(*batch, T, ...)` or
            `(T, ...)`, handed over as `u`, last; None for none.
        num_times: number of observation times T.
        batch_shape: batch shape of the states.
        openings: the events after which the states are seen; None for before.
        split: parts a state into the process and its integrals, or None.
        whole: whether states are whole numbers, which parameters may be indexed with.

    Raises:
        TypeError: `fn` is no function of these arguments.
        ValueError: inputs without a time dimension of length T.
    """

    fn: Code
    parameters: Parameters
    inputs: Any
    input_dims: tuple[int, ...] = eqx.field(static=True)
    has_params: bool = eqx.field(static=True)
    has_inputs: bool = eqx.field(static=True)
    opening: Opening | None
    split: Any = eqx.field(static=True)
    whole: bool = eqx.field(static=True)

    def __init__(
        self,
        fn: Callable[..., Any],
        params: Any,
        event_dims: Any,
        inputs: Any,
        num_times: int,
        batch_shape: tuple[int, ...],
        openings: Openings | None = None,
        split: Callable[[Array], tuple[Array, Any]] | None = None,
        *,
        whole: bool = False,
    ) -> None:
        self.has_params, self.has_inputs = params is not None, inputs is not None
        self.opening = None if openings is None else openings.opening
        self.split, self.whole = split, whole
        optional = {"p": ("params", self.has_params), "u": ("inputs", self.has_inputs)}
        arguments = "t, x" if split is None else "t, x, acc"
        if isinstance(fn, dist.Distribution) or _is_law_class(fn):
            # Both can be called with two arguments, to another end.
            name = fn.__name__ if isinstance(fn, type) else type(fn).__name__
            raise TypeError(
                f"emission must be a function of (t, x) that returns a distribution, got {name} "
                f"itself: write lambda t, x: {name}(...)"
            )
        self.fn = as_function(fn, "emission", arguments, optional)
        self.parameters = Parameters(params, event_dims, owner="params of observe")
        self.inputs = None if inputs is None else jax.tree.map(jnp.asarray, inputs)
        self.input_dims = tuple(
            _input_event_dim(leaf, num_times, batch_shape)
            for leaf in jax.tree_util.tree_leaves(self.inputs)
        )
        if openings is not None:
            self.inputs = (self.inputs, openings.shown)
            self.input_dims = (*self.input_dims, *openings.dims)

    def at_other_times(self, inputs: Any, openings: Openings | None) -> Emission:
        """The same law at other times.

        Args:
            inputs: those of the emission there, `(*batch, F, ...)`; None for none.
            openings: the events after which the states there are seen; None where they are seen
                before.
        """
        new = copy.copy(self)
        own = self.input_dims[: len(jax.tree_util.tree_leaves(inputs))]
        changed: dict[str, Any] = {"inputs": inputs}
        if openings is not None:
            changed["inputs"] = (inputs, openings.shown)
            changed |= {"opening": openings.opening, "input_dims": (*own, *openings.dims)}
        for name, value in changed.items():  # a copy that nobody has seen yet
            object.__setattr__(new, name, value)
        return new

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Batch shape of parameters and inputs."""
        shapes = {"params of observe": self.parameters.batch_shape}
        leaves = jax.tree_util.tree_leaves(self.inputs)
        for i, (leaf, dim) in enumerate(zip(leaves, self.input_dims, strict=True)):
            shapes[f"inputs (leaf {i})"] = leaf.shape[: leaf.ndim - dim]
        if self.opening is not None:
            shapes["params of the SDE"] = self.opening.parameters.batch_shape
        return broadcast_batch(shapes)

    def leaf_event_dims(self) -> list[int]:
        """Event dimensions of each array leaf of this object, in flattening order."""
        whole = [jnp.ndim(leaf) for leaf in jax.tree_util.tree_leaves(self.fn)]
        opening = [] if self.opening is None else self.opening.leaf_event_dims()
        return [*whole, *self.parameters.event_dims, *self.input_dims, *opening]

    def at(self, t: Any, x: Any, u: Any) -> dist.Distribution:
        """The law of the observation at one time of one process."""
        if self.opening is not None:
            u, shown = u
            x = self.opening.open(x, shown)
        if self.whole:
            x = jnp.asarray(x).astype(jnp.int32)
        args = [t, x] if self.split is None else [t, *self.split(x)]
        if self.has_params:
            args.append(self.parameters.tree)
        if self.has_inputs:
            args.append(u)
        law = self.fn(*args)
        if not isinstance(law, dist.Distribution):
            raise _NotADistributionError(
                "emission must return a NumPyro distribution for one time, got "
                f"{type(law).__name__} from a state of shape {jnp.shape(x)}"
            )
        return law

    def structure(self, state_shape: tuple[int, ...]) -> EmissionStructure:
        """Trace the emission at one time to see what it returns."""
        found: list[EmissionStructure] = []

        def probe(emission: Emission, t: Any, x: Any) -> int:
            u = jax.tree.map(lambda leaf: leaf[0], emission.inputs)
            with jax.ensure_compile_time_eval():  # constants of the law stay readable
                law = emission.at(t, x, u)
            support: Any = law.support
            moving = any(isinstance(v, jax.Array) for v in jax.tree_util.tree_leaves(support))
            if moving:
                # Bounds that depend on the state cannot be stated once for all times.
                kind = constraints.nonnegative_integer if support.is_discrete else constraints.real
                support = constraints.independent(kind, law.event_dim) if law.event_dim else kind
            found.append(
                EmissionStructure(
                    law.batch_shape + law.event_shape,
                    constraints.independent(support, len(law.batch_shape) + 1),
                    moving,
                    law.has_rsample,
                    tolerates_partial(law),
                    is_gaussian(law),
                    has_independent_components(law),
                    is_exact(law),
                    type(law).__name__,
                    has_moments(law),
                )
            )
            return 0

        real = jnp.result_type(float)
        leaves, treedef = jax.tree_util.tree_flatten(self)
        one = [
            jax.ShapeDtypeStruct(jnp.shape(leaf)[jnp.ndim(leaf) - dim :], jnp.result_type(leaf))
            for leaf, dim in zip(leaves, self.leaf_event_dims(), strict=True)
        ]
        shapes = (
            jax.tree_util.tree_unflatten(treedef, one),
            jax.ShapeDtypeStruct((), real),
            jax.ShapeDtypeStruct(state_shape, real),
        )
        try:
            jax.eval_shape(probe, *shapes)
        except _NotADistributionError:
            raise
        except (TypeError, ValueError, IndexError) as error:
            hint = self.parameters.batch_hint
            if not hint:
                raise
            raise ValueError(
                f"emission fails on a state of shape {state_shape}: {error}{hint}"
            ) from error
        return found[0]


def met(law: dist.Distribution, y: Array) -> Array:
    """Zero where the state agrees with a reading without noise to rounding, else minus infinity.

    A path that is conditioned on its readings meets them up to the rounding of its steps.
    """
    mean = jnp.reshape(jnp.asarray(law.mean), jnp.shape(y))
    near = jnp.sqrt(jnp.finfo(mean.dtype).eps) * (1.0 + jnp.abs(y))
    agrees = jnp.isnan(y) | (jnp.abs(y - mean) <= near)
    return jnp.where(jnp.all(agrees), 0.0, -jnp.inf).astype(mean.dtype)


def _is_law_class(fn: Any) -> bool:
    return isinstance(fn, type) and issubclass(fn, dist.Distribution)


def _input_event_dim(leaf: Array, num_times: int, batch_shape: tuple[int, ...]) -> int:
    lead = len(batch_shape)
    if leaf.ndim > lead and leaf.shape[: lead + 1] == (*batch_shape, num_times):
        return leaf.ndim - lead
    if leaf.ndim > 0 and leaf.shape[0] == num_times:
        return leaf.ndim
    raise ValueError(
        f"inputs must have shape ({num_times}, ...) or {(*batch_shape, num_times)} + (...,), "
        f"one entry for each observation time, got {leaf.shape}"
    )


class EmissionPath(dist.Distribution):
    """Observations at T times, independent given the states.

    Event shape `(T, *observation)`. NaN in a value marks a missing component: it is integrated
    out. This is the law of the site that `observe` makes.

    Args:
        emission: the observation law at one time.
        times: observation times, shape `(*batch, T)`.
        states: states at these times, shape `(*batch, T, *state)`.
        state_shape: shape of one state, `()` or `(d,)`.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> from numpyro_sde.distributions.observation import Emission, EmissionPath
        >>> emission = Emission(lambda t, x: dist.Normal(x, 0.1), None, None, None, 3, ())
        >>> law = EmissionPath(emission, jnp.arange(3.0), jnp.zeros(3), ())
        >>> [round(v, 3) for v in law.log_prob_pointwise(jnp.array([0.1, jnp.nan, 0.0])).tolist()]
        [0.884, 0.0, 1.384]
    """

    pytree_data_fields = ("emission", "times", "states")
    pytree_aux_fields = ("structure", "state_shape", "leaf_dims", "lead_dims")

    emission: Emission
    structure: EmissionStructure
    state_shape: tuple[int, ...]
    # The path value observed and the indices into it, for handlers that ask which states a site
    # belongs to. Not part of the pytree: they mean nothing outside the model's run.
    observed_path: Any = None
    observed_rows: Any = None

    def __init__(
        self,
        emission: Emission,
        times: Any,
        states: ArrayLike,
        state_shape: tuple[int, ...],
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.emission, self.times = emission, times
        self.states = jnp.asarray(states)
        self.state_shape = state_shape
        batch_shape = self._broadcast_batch()
        refuse_closures(emission.fn.function, "emission", describe_batch(batch_shape))
        self.structure = emission.structure(state_shape)
        self.leaf_dims = (*emission.leaf_event_dims(), 1, 1 + len(state_shape))
        self.lead_dims = leading_dims(self._leaves, self.leaf_dims)
        super().__init__(
            batch_shape,
            (jnp.shape(times)[-1], *self.structure.shape),
            validate_args=validate_args,
        )

    @property
    def _leaves(self) -> tuple[Emission, Any, Array]:
        return self.emission, self.times, self.states

    def _broadcast_batch(self) -> tuple[int, ...]:
        return broadcast_batch(
            {
                "the path": self.states.shape[: self.states.ndim - 1 - len(self.state_shape)],
                "times": jnp.shape(self.times)[:-1],
                "params and inputs of observe": self.emission.batch_shape,
            }
        )

    @property
    def has_rsample(self) -> bool:
        return self.structure.has_rsample

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        if not self.structure.moving:
            return self.structure.support
        shape = self.structure.shape

        def bounds(law: dist.Distribution) -> Any:
            base: Any = law.support
            while isinstance(base, constraints._IndependentConstraint):
                base = base.base_constraint
            lead = shape[: len(shape) - base.event_dim]
            return jax.tree.map(lambda bound: jnp.broadcast_to(bound, lead), base)

        each = self._map(bounds, self.batch_shape)
        return constraints.independent(each, self.event_dim - each.event_dim)

    @property
    def is_discrete(self) -> bool:
        return self.structure.support.is_discrete

    def _map(
        self,
        fn: Callable[..., Any],
        lead: tuple[int, ...],
        arrays: tuple[Any, ...] = (),
        dims: tuple[int, ...] = (),
    ) -> Any:
        """Map `fn(law, *arrays)` of one time over times and batch."""

        def one(emission: Emission, times: Any, states: Array, *rest: Any) -> Any:
            def at_time(t: Array, x: Array, u: Any, *now: Any) -> Any:
                return fn(emission.at(t, x, u), *now)

            return jax.vmap(at_time)(times, states, emission.inputs, *rest)

        return map_batch(
            one,
            lead,
            (self.emission, jnp.asarray(self.times), self.states, *arrays),
            (self.leaf_dims[:-2], *self.leaf_dims[-2:], *dims),
        )

    def log_prob_pointwise(self, value: ArrayLike) -> Float[Array, "*batch T"]:
        """Log density at each time, shape `(*lead, T)`; 0 where nothing was observed."""
        value = jnp.asarray(as_data("observations", value))
        lead = value.shape[: value.ndim - self.event_dim]
        if value.shape[value.ndim - self.event_dim :] != self.event_shape:
            raise ValueError(
                f"observations must have event shape {self.event_shape}, got an array of shape "
                f"{value.shape}"
            )
        lead = jnp.broadcast_shapes(lead, self.batch_shape)
        value = jnp.broadcast_to(value, lead + self.event_shape)
        terms = _terms_of(self, value, lead)
        if not self.structure.exact:
            return terms
        # What a reading without noise says is in the law of the path, not in that of the reading.
        axes = tuple(range(-len(self.structure.shape), 0))
        seen = ~jnp.all(jnp.isnan(value), axis=axes) if axes else ~jnp.isnan(value)
        return jnp.where(seen, jnp.nan, terms)

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> Array:  # noqa: ARG002
        if self.structure.exact:
            value = jnp.asarray(value)
            lead = jnp.broadcast_shapes(
                value.shape[: value.ndim - self.event_dim], self.batch_shape
            )
            value = jnp.broadcast_to(value, lead + self.event_shape)
            return jnp.sum(_agreement_of(self, value, lead), -1)
        return jnp.sum(self.log_prob_pointwise(value), -1)

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Array:
        assert is_prng_key(key)
        lead = sample_shape + self.batch_shape
        keys = jax.random.split(key, (*lead, self.event_shape[0]))
        return _draw_of(self, keys, lead)

    @property
    def mean(self) -> Array:
        return self._map(lambda law: jnp.asarray(law.mean), self.batch_shape)

    @property
    def variance(self) -> Array:
        return self._map(lambda law: jnp.asarray(law.variance), self.batch_shape)


# What a model asks of a law, each one program.


@subprogram
def _terms_of(law: EmissionPath, value: Array, lead: tuple[int, ...]) -> Array:
    return law._map(log_prob_of_present, lead, (value,), (law.event_dim,))


@subprogram
def _agreement_of(law: EmissionPath, value: Array, lead: tuple[int, ...]) -> Array:
    return law._map(met, lead, (value,), (law.event_dim,))


@subprogram
def _draw_of(law: EmissionPath, keys: Array, lead: tuple[int, ...]) -> Array:
    def draw(law: dist.Distribution, key: PRNGKeyArray) -> Array:
        return jnp.asarray(law.sample(key))

    return law._map(draw, lead, (keys,), (keys.ndim - len(lead),))


@promote_batch_shape.register
def _promote_emission(law: EmissionPath) -> EmissionPath:
    new, rank = copy.copy(law), len(law.batch_shape)
    leaves, new.lead_dims = align_new_axes(law._leaves, law.leaf_dims, law.lead_dims, rank)
    new.emission, new.times, new.states = leaves
    shapes = [
        jnp.shape(leaf)[:lead]
        for leaf, lead in zip(jax.tree_util.tree_leaves(leaves), new.lead_dims, strict=True)
    ]
    new._batch_shape = jnp.broadcast_shapes(law.batch_shape, *shapes)
    return new
