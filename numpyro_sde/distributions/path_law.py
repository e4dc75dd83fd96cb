"""The law of a random path at given times: what every engine that takes paths works on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray
from numpyro.distributions import constraints
from numpyro.distributions.batch_util import promote_batch_shape, vmap_over
from numpyro.distributions.util import validate_sample
from numpyro.util import is_prng_key

from numpyro_sde.checks.data import as_data
from numpyro_sde.describe import block, html_table, one_line, path_entries
from numpyro_sde.distributions import arguments, moments
from numpyro_sde.distributions.batching import (
    align_new_axes,
    leading_dims,
    map_batch,
    promote_inner,
    undeclared_dims,
)
from numpyro_sde.distributions.clocks import Clock, remember_clock, remember_value
from numpyro_sde.distributions.parts import as_constant
from numpyro_sde.dynamics import AbstractDynamics, Structure
from numpyro_sde.events import Events
from numpyro_sde.grid import TimeGrid, check_times
from numpyro_sde.runtime.entry import subprogram
from numpyro_sde.schemes import AbstractScheme
from numpyro_sde.schemes.events import Forcing

_DIMS = ("leaf_dims", "lead_dims")


class AbstractPathLaw(dist.Distribution):
    """The law of the states of a random process at T times.

    What `observe`, `handlers.marginalize`, `smooth`, `forecast`, the diagnostics and the particle
    kernels take: a start, a law of each next state (`scheme`) under some dynamics (`sde`), and a
    clock. `SDEPath` is the law of the states of a diffusion, `JumpPath` that of a Markov jump
    process. An engine asks for what it needs (a Gaussian step, a map of normal numbers, whole
    states) and refuses a law that has it not by name.

    A subclass calls `_compose` in its constructor and defines `support` and `replace`.

    Attributes:
        sde: the dynamics; for a jump process, that in the form of an equation.
        times: the times, shape `(*batch, T)`.
        dt: the steps between them.
        grid: the `TimeGrid` that they were given as, or None.
        init: law of the first state.
        scheme: law of each next state.
        scheme_chosen: whether the user named it.
        events: known jumps of the state.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> chain = nsde.MarkovJumpProcess(jnp.array([[0.0, 1.0], [3.0, 0.0]]), 2)
        >>> path = nsde.JumpPath(chain, [0.0, 0.5, 2.0])
        >>> isinstance(path, nsde.AbstractPathLaw), isinstance(path, nsde.SDEPath)
        (True, False)
        >>> path.num_times, path.state_shape, path.whole_states
        (3, (), True)
    """

    arg_constraints: ClassVar = {"times": constraints.ordered_vector}
    reparametrized_params: ClassVar = ["times"]
    pytree_data_fields = ("sde", "times", "dt", "init", "scheme", "forcing", "events")
    pytree_aux_fields = ("structure", "grid", "scheme_chosen", "start_kind", *_DIMS)

    whole_states: ClassVar[bool] = False
    """Whether states are whole numbers, which parameters may be indexed with."""

    sde: Any
    times: Any
    dt: Any
    init: dist.Distribution
    scheme: AbstractScheme
    forcing: Forcing | None
    events: tuple[Events, ...]
    structure: Structure
    grid: TimeGrid | None
    scheme_chosen: bool
    start_kind: moments.StartKind
    # Batch dimensions that only parameters brought, where a model made the law outside any plate:
    # most likely dimensions of one process that were not declared.
    undeclared: frozenset[int] = frozenset()
    # Dimensions of `_leaves` as constructed: transformations that stack laws add axes to them.
    leaf_dims: tuple[int, ...]
    lead_dims: tuple[int, ...]

    def _compose(
        self,
        sde: Any,
        init: dist.Distribution,
        scheme: AbstractScheme,
        *,
        scheme_chosen: bool,
        events: tuple[Events, ...] = (),
        batch_shape: tuple[int, ...],
        validate_args: bool | None,
    ) -> None:
        """Put a law together whose clock is set and whose parts fit each other."""
        self.sde, self.init, self.scheme, self.events = sde, init, scheme, events
        self.scheme_chosen = scheme_chosen
        self.start_kind = moments.start_kind(init)
        state_shape = init.event_shape
        self.structure = arguments.checked_structure(sde, init)
        scheme.check(sde, state_shape)
        sde.check_scheme(scheme)
        self.forcing = None
        if sde.inputs is not None or events:
            arguments.check_forced(sde, scheme, events)
            self.forcing = Forcing(sde, events, self.times, self.dt, state_shape)
        whole = [jnp.ndim(leaf) for leaf in jax.tree_util.tree_leaves(scheme)]
        forced = [] if self.forcing is None else self.forcing.leaf_event_dims()
        self.leaf_dims = (*sde.leaf_event_dims(), *whole, 1, 1, *forced)
        self.lead_dims = leading_dims(self._leaves, self.leaf_dims)
        dist.Distribution.__init__(
            self,
            batch_shape,
            (jnp.shape(self.times)[-1], *state_shape),
            validate_args=validate_args,
        )
        others = jnp.broadcast_shapes(jnp.shape(self.times)[:-1], init.batch_shape)
        self.undeclared = undeclared_dims(sde.batch_shape, others)
        remember_clock(self.clock)

    def _set_clock(self, times: Any) -> None:
        self.grid = times if isinstance(times, TimeGrid) and times.on_host else None
        if isinstance(times, TimeGrid):  # checked when it was made
            self.times, self.dt = times.times, times.dt
        elif isinstance(times, jax.core.Tracer):
            if times.ndim == 0:
                raise ValueError("times must have shape (*batch, T), got ()")
            self.times, self.dt = times, jnp.diff(times, axis=-1)
        else:
            # Kept as NumPy: steps are taken in float64 and equal steps can be found on the host.
            self.times = check_times(times)
            self.dt = np.diff(self.times, axis=-1)

    @property
    def _leaves(self) -> tuple[AbstractDynamics, AbstractScheme, Any, Any, Forcing | None]:
        return self.sde, self.scheme, self.times, self.dt, self.forcing

    @property
    def given_times(self) -> Any:
        """What a law on the same clock takes for its `times`."""
        if self.grid is not None:
            return self.grid
        if isinstance(self.times, np.ndarray):
            return self.times
        # Differences of traced times would have lost digits that these steps have.
        return TimeGrid.of_arrays(self.times, self.dt)

    @property
    def num_times(self) -> int:
        """Number of times T, the first state included."""
        return self.event_shape[0]

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of one state, `()` or `(d,)`."""
        return self.event_shape[1:]

    @property
    def clock(self) -> Clock:
        """Times and state shape, for observation statements."""
        return Clock(self.times, self.state_shape, self)

    @property
    def fixed_start(self) -> Array | None:
        """The first state where it is fixed, shape `(*batch, *state)`, else None."""
        base = self.init
        while isinstance(base, dist.ExpandedDistribution):
            base = base.base_dist
        if isinstance(base, dist.Delta):
            return jnp.broadcast_to(base.v, self.init.batch_shape + self.state_shape)
        return None

    def __repr__(self) -> str:
        return one_line(type(self).__name__, path_entries(self))

    def __str__(self) -> str:
        return block(type(self).__name__, path_entries(self))

    def _repr_html_(self) -> str:
        return html_table(type(self).__name__, path_entries(self))

    def replace(self, *args: Any, **changes: Any) -> Any:
        """The same law with some arguments changed."""
        raise NotImplementedError

    def of_states(self, states: Array) -> Array:
        """Draws of states that an engine made, as this law has them."""
        return states

    def state_space_model(self) -> Any:
        """One path without data as filters take it, a `filters.StateSpaceModel`.

        Raises:
            ValueError: a batch of paths.
        """
        from numpyro_sde.distributions.state_space import ObservedPath  # which takes path laws

        if self.batch_shape:
            raise ValueError(
                f"state_space_model is that of one path, got a batch of shape {self.batch_shape}"
            )
        return ObservedPath(self, ()).map(lambda model: model)

    def instruments(self, statement: Any, times: Any, y: Array) -> list[Any]:
        """Lay a statement's unbatched data out on the grid, as filters take them."""
        return list(statement.instruments(times, self.state_shape, y))

    def _map(
        self,
        fn: Callable[..., Any],
        lead: tuple[int, ...],
        arrays: tuple[Any, ...] = (),
        dims: tuple[Any, ...] = (),
        at: Any = None,
        num_bytes: int | None = None,
    ) -> Any:
        """Map `fn(sde, scheme, times, dt, cache, *arrays)`, unbatched, over `lead`, or at one."""
        clock_is_shared = jnp.ndim(self.times) == 1

        def one(
            sde: Any, scheme: AbstractScheme, times: Any, dt: Any, forcing: Any, *rest: Any
        ) -> Any:
            if clock_is_shared:  # stays a host array, outside every vmap
                times, dt = self.times, self.dt
            cache = scheme.prepare(sde, times, dt) if np.shape(dt)[0] else None
            if forcing is not None:
                scheme, cache = forcing.force(sde, scheme, cache)
            return fn(sde, scheme, times, dt, cache, *rest)

        clock = ((), ()) if clock_is_shared else (self.times, self.dt)
        num_sde = len(jax.tree_util.tree_leaves(self.sde))
        num_core = num_sde + len(jax.tree_util.tree_leaves(self.scheme))
        inside, forced = self.leaf_dims[num_sde:num_core], self.leaf_dims[num_core + 2 :]
        return map_batch(
            one,
            lead,
            (self.sde, self.scheme, *clock, self.forcing, *arrays),
            (self.leaf_dims[:num_sde], inside, 1, 1, forced, *dims),
            at,
            num_bytes,
        )

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> Array:  # noqa: ARG002
        return self._checked_log_prob(value)

    def _log_prob(self, value: ArrayLike) -> Array:
        return cast("Array", self._density(value, _total_of))

    _checked_log_prob = validate_sample(_log_prob)

    def log_prob_pointwise(self, value: ArrayLike) -> Float[Array, "*batch T"]:
        """Terms of the log density, shape `(*lead, T)`.

        The density of the first state, 0 where it is fixed, then of each state given the one
        before: what leave-one-out statistics of a directly observed path are made of.
        """
        start, transitions = self._density(value, _each_of)
        if transitions is None:
            return start[..., None]
        return jnp.concatenate([start[..., None], transitions], axis=-1)

    def _density(self, value: ArrayLike, program: Callable[..., Any]) -> Any:
        """What a program makes of the law and a path that has been checked."""
        value = jnp.asarray(as_data("path", value))
        shape = value.shape[: value.ndim - self.event_dim]
        lead = self._lead(value)
        value = jnp.broadcast_to(value, lead + self.event_shape)
        if not self.scheme.has_density:
            otherwise = (
                "use it with reparam.InnovationReparam or for prediction, or choose another scheme"
            )
            raise TypeError(
                f"{type(self.scheme).__name__} has no transition density: "
                f"{self.scheme.remedy(otherwise)}"
            )
        arguments.refuse_undeclared(self.undeclared, self.batch_shape, shape)
        if self.num_times > 1:
            arguments.refuse_without_noise(self.sde, self.state_shape)
        if self.init._validate_args:  # its checks are for values that are known
            self._expanded_init().log_prob(self._take(value, 0))
        known = not isinstance(value, jax.core.Tracer)
        return program(self, lead, as_constant(value) if known else value)

    def _density_now(self, lead: tuple[int, ...], value: Array, what: str) -> tuple[Array, Any]:
        """Log density of the first state, and the scheme's of the transitions, if there are any."""

        def transitions(
            sde: Any, scheme: AbstractScheme, times: Any, dt: Any, cache: Any, x: Array
        ) -> Array:
            density: Array = getattr(scheme, what)(sde, times, dt, x, cache)
            return density

        start = self._expanded_init().log_prob(self._take(value, 0))
        if self.num_times == 1:
            return start, None
        return start, self._map(transitions, lead, (value,), (self.event_dim,))

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Array:
        assert is_prng_key(key)
        key_init, key_path = jax.random.split(key)
        lead = sample_shape + self.batch_shape
        x0 = moments.draw_start(self._expanded_init(), key_init, sample_shape)
        if self.scheme.has_innovations:
            shape = lead + self.innovation_shape
            z = jax.random.normal(key_path, shape, jnp.result_type(float))
            path = self.forward(x0, z)
        else:
            path = self._simulate(x0, jax.random.split(key_path, lead), lead)
        remember_value(path, self.clock)
        return path

    def _simulate(self, x0: Array, keys: Array, lead: tuple[int, ...]) -> Array:
        """Draw paths of a scheme that is no map of Gaussian innovations."""
        return _simulated(self, x0, keys, lead)

    def _simulate_now(self, x0: Array, keys: Array, lead: tuple[int, ...]) -> Array:
        def simulate(
            sde: Any, scheme: AbstractScheme, times: Any, dt: Any, cache: Any, x0: Array, key: Any
        ) -> Array:
            def step(x: Array, inputs: Any) -> tuple[Array, Array]:
                t, h, k, c = inputs
                x = scheme.draw(sde, k, t, h, x, c)
                return x, x

            keys = jax.random.split(key, dt.shape[0])
            return self._scan(step, x0, (times[:-1], dt, keys, cache))

        return self._map(simulate, lead, (x0, keys), (len(self.state_shape), keys.ndim - len(lead)))

    @property
    def innovation_shape(self) -> tuple[int, ...]:
        """Shape of the innovations of one path, `(T - 1, m)` or `(T - 1,)`."""
        one = self.scheme.innovation_shape(self.sde, self.state_shape)
        return (self.num_times - 1, *one)

    def forward(self, x0: Float[Array, "..."], innovations: Float[Array, "..."]) -> Array:
        """Map the first state and standard normal innovations to the path.

        Args:
            x0: first states, shape `(*lead, *state)`.
            innovations: shape `(*lead, T - 1, m)`, `(*lead, T - 1)` for a scalar process.

        Returns:
            Paths of shape `(*lead, T, *state)`, where `lead` broadcasts with the batch shape.

        Raises:
            TypeError: the scheme is no map of Gaussian innovations.
        """
        self._require_innovations()
        x0, innovations = jnp.asarray(x0), jnp.asarray(innovations)
        state_dim, dim = len(self.state_shape), len(self.innovation_shape)
        lead = jnp.broadcast_shapes(
            self.batch_shape,
            x0.shape[: x0.ndim - state_dim],
            innovations.shape[: innovations.ndim - dim],
        )
        return _forward(self, x0, innovations, lead)

    def _forward_now(self, x0: Array, innovations: Array, lead: tuple[int, ...]) -> Array:
        state_dim, dim = len(self.state_shape), len(self.innovation_shape)

        def simulate(
            sde: Any, scheme: AbstractScheme, times: Any, dt: Any, cache: Any, x0: Array, z: Array
        ) -> Array:
            def step(x: Array, inputs: Any) -> tuple[Array, Array]:
                t, h, e, c = inputs
                x = scheme.step(sde, t, h, x, e, c)
                return x, x

            states = self._scan(step, scheme.carry(sde, x0), (times[:-1], dt, z, cache))
            return scheme.visible(states)

        return self._map(simulate, lead, (x0, innovations), (state_dim, dim))

    def _require_innovations(self) -> None:
        if not self.scheme.has_innovations:
            otherwise = (
                "give SDEPath another scheme (for example scheme=Euler()) to whiten the path"
            )
            raise TypeError(
                f"{type(self.scheme).__name__} is not a map of Gaussian innovations: "
                f"{self.scheme.remedy(otherwise)}"
            )

    def _scan(self, step: Callable[..., Any], x0: Array, inputs: Any) -> Array:
        if self.num_times == 1:
            return x0[None]
        dtype = jnp.result_type(x0, float)
        inputs = jax.tree.map(jnp.asarray, inputs)

        def cast_step(x: Array, one: Any) -> tuple[Array, Array]:
            x, _ = step(x, one)
            x = x.astype(dtype)
            return x, x

        x0 = x0.astype(dtype)
        # Recomputing a step in the backward pass beats storing its parts.
        _, rest = lax.scan(jax.checkpoint(cast_step), x0, inputs)
        return jnp.concatenate([x0[None], rest])

    def _lead(self, value: Array) -> tuple[int, ...]:
        lead = value.shape[: value.ndim - self.event_dim]
        if value.shape[value.ndim - self.event_dim :] != self.event_shape:
            raise ValueError(
                f"a path must have event shape {self.event_shape}, got an array of shape "
                f"{value.shape}"
            )
        return jnp.broadcast_shapes(lead, self.batch_shape)

    def _expanded_init(self) -> dist.Distribution:
        return self.init.expand(self.batch_shape)

    def _take(self, path: Array, index: int) -> Array:
        return lax.index_in_dim(path, index, path.ndim - self.event_dim, keepdims=False)


# What a model asks of a law, each one program.


@subprogram
def _total_of(law: AbstractPathLaw, lead: tuple[int, ...], value: Array) -> Array:
    start, total = law._density_now(lead, value, "log_density_sum")
    return start if total is None else start + total


@subprogram
def _each_of(law: AbstractPathLaw, lead: tuple[int, ...], value: Array) -> tuple[Array, Any]:
    return law._density_now(lead, value, "log_densities")


@subprogram
def _forward(law: AbstractPathLaw, x0: Array, innovations: Array, lead: tuple[int, ...]) -> Array:
    return law._forward_now(x0, innovations, lead)


@subprogram
def _simulated(law: AbstractPathLaw, x0: Array, keys: Array, lead: tuple[int, ...]) -> Array:
    return law._simulate_now(x0, keys, lead)


@vmap_over.register
def _vmap_over_path(
    path: AbstractPathLaw,
    sde: Any = None,
    times: Any = None,
    init: Any = None,
    scheme: Any = None,
    events: Any = None,
) -> AbstractPathLaw:
    axes: Any = copy.copy(path)
    axes.sde, axes.times, axes.dt, axes.init, axes.scheme = sde, times, times, init, scheme
    axes.forcing, axes.events = (times if times is not None else events), events
    return cast("AbstractPathLaw", axes)


@promote_batch_shape.register
def _promote_path(path: AbstractPathLaw) -> AbstractPathLaw:
    new, rank = copy.copy(path), len(path.batch_shape)
    leaves, new.lead_dims = align_new_axes(path._leaves, path.leaf_dims, path.lead_dims, rank)
    new.sde, new.scheme, new.times, new.dt, new.forcing = leaves
    new.init = promote_inner(path.init, rank)
    shapes = [
        jnp.shape(leaf)[:lead]
        for leaf, lead in zip(jax.tree_util.tree_leaves(leaves), new.lead_dims, strict=True)
    ]
    new._batch_shape = jnp.broadcast_shapes(path.batch_shape, *shapes, new.init.batch_shape)
    return new
