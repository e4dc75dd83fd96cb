"""The law of an SDE's states at given times, as a NumPyro distribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float
from numpyro.distributions import constraints

from numpyro_sde.checks.closures import refuse_closures
from numpyro_sde.distributions import arguments
from numpyro_sde.distributions.batching import describe_batch
from numpyro_sde.distributions.fixed_start import FixedStart
from numpyro_sde.distributions.path_law import AbstractPathLaw
from numpyro_sde.distributions.step_check import warn_coarse_step
from numpyro_sde.events import Events
from numpyro_sde.fields.boxes import refuse_outside
from numpyro_sde.grid import TimeGrid
from numpyro_sde.schemes import AbstractScheme
from numpyro_sde.sde import SDE, broadcast_batch


class SDEPath(AbstractPathLaw):
    """The law of the states of an SDE at T times.

    Event shape `(T,)` for a scalar process, `(T, d)` for a d-dimensional one; the first state,
    at the first time, follows `init`. The batch shape is the broadcast of the leading
    dimensions of the parameters, of `times` and of `init`.

    Args:
        sde: the equation.
        times: strictly increasing times, shape `(*batch, T)`, or a `TimeGrid`.
        init: distribution of the first state, or one fixed state (an array of shape `()` or
            `(d,)`; for a batch of fixed states use `dist.Delta(states, event_dim=...)`).
        scheme: transition density; None takes the process's exact one if it has one, else
            `Euler()`.
        events: known jumps of the state (`nsde.doses`, `nsde.Events`); those of one time act in
            the order of the list. A state at an event's time is the one before it.
        validate_args: as for every NumPyro distribution.

    Raises:
        ValueError: unsorted, repeated or non-finite times; coefficients whose shape does not
            fit the state; batch shapes that do not broadcast; in a batched law, coefficients
            that close over arrays; inputs that do not cover the times, a breakpoint of theirs or
            an event that is not on the grid.
        TypeError: arguments of the wrong kind.

    Example:
        >>> import jax, numpyro.distributions as dist, numpyro_sde as nsde
        >>> sde = nsde.processes.OrnsteinUhlenbeck(rate=1.0, mean=0.0, scale=0.5)
        >>> path = nsde.SDEPath(sde, [0.0, 0.1, 0.3], init=dist.Normal(0.0, 1.0))
        >>> path.sample(jax.random.key(0), (5,)).shape
        (5, 3)
    """

    def __init__(
        self,
        sde: SDE,
        times: ArrayLike | TimeGrid,
        init: dist.Distribution | ArrayLike,
        *,
        scheme: AbstractScheme | None = None,
        events: Events | Sequence[Events] = (),
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(sde, SDE):
            raise TypeError(f"sde must be an nsde.SDE, got {type(sde).__name__}")
        self._set_clock(times)
        init = arguments.as_init(init, counts=getattr(scheme, "counts", False))
        state_shape = init.event_shape
        if len(state_shape) > 1:
            raise ValueError(f"init must have event shape () or (d,), got {state_shape}")
        listed = arguments.as_events(events)
        chosen = arguments.resolve_scheme(sde, scheme, state_shape)
        if scheme is None and any(one.flows for one in listed):
            chosen = arguments.with_flow(chosen)
        batch_shape = broadcast_batch(
            {
                "params of the SDE": sde.batch_shape,
                "times": jnp.shape(self.times)[:-1],
                "init": init.batch_shape,
                **{f"events[{i}]": one.batch_shape for i, one in enumerate(listed)},
            }
        )
        batch = describe_batch(batch_shape)
        refuse_closures(sde.drift.function, "drift", batch)
        refuse_closures(sde.diffusion.function, "diffusion", batch)
        self._compose(
            sde,
            init,
            chosen,
            scheme_chosen=scheme is not None,
            events=listed,
            batch_shape=batch_shape,
            validate_args=validate_args,
        )

    @property
    def has_rsample(self) -> bool:
        return self.scheme.has_innovations and (
            self.init.has_rsample or self.fixed_start is not None
        )

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        one: Any = constraints.real
        if self.sde.positive and self.scheme.keeps_positive:
            one = constraints.nonnegative if self.scheme.reaches_zero else constraints.positive
        start = self.fixed_start
        if start is not None:
            return cast("constraints.Constraint", FixedStart(start, one, len(self.state_shape)))
        return constraints.independent(one, self.event_dim)

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> Array:  # noqa: ARG002
        traced = isinstance(value, jax.core.Tracer)
        if traced and self.fixed_start is None and not self.sde.positive:
            # Only NaN and infinity are outside, and say so: a test would cost a sixth of it.
            return self._log_prob(value)
        if not traced:
            refuse_outside(self.sde, self.times, value, self.state_shape)
        warn_coarse_step(self, value)
        return self._checked_log_prob(value)

    def inverse(self, path: Float[Array, "..."]) -> tuple[Array, Array]:
        """Map paths to their first states and innovations: the inverse of `forward`.

        Raises:
            TypeError: the scheme is no map of Gaussian innovations.
            ValueError: fewer noises than states, so that the innovations are not unique.
        """
        self._require_innovations()
        path = jnp.asarray(path)
        lead = self._lead(path)

        def whiten(
            sde: SDE, scheme: AbstractScheme, times: Any, dt: Any, cache: Any, x: Array
        ) -> Array:
            axes = (None, 0, 0, 0, 0, None if cache is None else 0)
            x = scheme.lift(sde, times, dt, x, cache)
            return jax.vmap(scheme.invert, axes)(sde, times[:-1], dt, x[:-1], x[1:], cache)

        path = jnp.broadcast_to(path, lead + self.event_shape)
        return self._take(path, 0), self._map(whiten, lead, (path,), (self.event_dim,))

    def replace(
        self,
        *,
        sde: SDE | None = None,
        times: ArrayLike | TimeGrid | None = None,
        init: dist.Distribution | None = None,
        scheme: AbstractScheme | None = None,
        events: Sequence[Events] | None = None,
    ) -> SDEPath:
        """The same law with some arguments changed."""
        if scheme is None and self.scheme_chosen:
            scheme = self.scheme
        return SDEPath(
            self.sde if sde is None else sde,
            self.given_times if times is None else times,
            self.init if init is None else init,
            scheme=scheme,
            events=self.events if events is None else events,
        )

    @staticmethod
    def infer_shapes(
        sde: Any, times: tuple[int, ...], init: Any, scheme: Any = None, events: Any = ()
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Batch and event shape from the shapes of the arguments.

        Args:
            sde: an SDE, or the batch shape of its parameters.
            times: shape of the times.
            init: a distribution, or the shape of one (unbatched) first state.
            scheme: not used.
            events: events of the path.
        """
        del scheme
        batch = sde.batch_shape if isinstance(sde, SDE) else tuple(sde)
        batch = jnp.broadcast_shapes(
            batch, *(one.batch_shape for one in arguments.as_events(events))
        )
        if isinstance(init, dist.Distribution):
            init_batch, state = init.batch_shape, init.event_shape
        else:
            init_batch, state = (), tuple(init)
        return jnp.broadcast_shapes(batch, times[:-1], init_batch), (times[-1], *state)
