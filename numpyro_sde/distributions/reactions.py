"""The path of a reaction network under one of its laws."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, PRNGKeyArray
from numpyro.distributions import constraints

from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.grid import TimeGrid
from numpyro_sde.jumps.reactions import ReactionNetwork
from numpyro_sde.laws import AbstractLaw, Langevin


def ReactionPath(  # noqa: N802
    net: ReactionNetwork,
    times: ArrayLike | TimeGrid,
    init: dist.Distribution | ArrayLike,
    *,
    law: AbstractLaw | None = None,
    validate_args: bool | None = None,
) -> SDEPath:
    """The law of a network's state at given times: a NumPyro distribution.

    Event shape `(T, d)`: the species, then, for each accumulated reaction, how often it fired since
    the time before (0 at the first time). Let the path's times be those of the data, then an
    emission of `net.of(x, "infection")` is one of the incidence between two data.

    Args:
        net: the network.
        times: increasing times, shape `(*batch, T)`, or a `TimeGrid`.
        init: distribution of the species at the first time, or fixed numbers, shape
            `(num_species,)`. Jump laws take discrete distributions too.
        law: one of `nsde.laws`; None for `Langevin()`.
        validate_args: as for every NumPyro distribution.

    Raises:
        ValueError: an `init` that does not fit the species, or no counts under a law of counts; a
            law that cannot treat this network.
        TypeError: a network or a law that is none.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro_sde as nsde
        >>> sir = nsde.ReactionNetwork([[1, 0], [1, 1]], [[0, 0], [2, 0]], jnp.array([0.06, 0.6]),
        ...                            species=["S", "I"], reactions=["infection", "recovery"])
        >>> path = nsde.ReactionPath(sir, [0.0, 1.0, 2.0], [27.0, 3.0], law=nsde.laws.Jump())
        >>> x = path.sample(jax.random.key(0))
        >>> x.shape, bool(jnp.all(x == jnp.round(x)))
        ((3, 2), True)
    """
    if not isinstance(net, ReactionNetwork):
        raise TypeError(f"net must be an nsde.ReactionNetwork, got {type(net).__name__}")
    law = Langevin() if law is None else law
    if not isinstance(law, AbstractLaw):
        hint = f"; call it, law={law.__name__}()" if isinstance(law, type) else ""
        raise TypeError(f"law must be one of nsde.laws, got {law!r}{hint}")
    start = _with_accumulators(net, init, law)
    clock = times.times if isinstance(times, TimeGrid) else times
    scheme = law.scheme_from(net, start, clock)
    return SDEPath(net, times, start, scheme=scheme, validate_args=validate_args)


def _with_accumulators(net: ReactionNetwork, init: Any, law: AbstractLaw) -> Any:
    species, extra = net.num_species, len(net.accumulated)
    if not isinstance(init, dist.Distribution):
        with jax.ensure_compile_time_eval():  # a start that is known stays known inside a trace
            state = jnp.asarray(init, jnp.result_type(float))
        if state.shape != (species,):
            raise ValueError(
                f"init must have shape ({species},), one number for each of "
                f"{', '.join(net.species)}, got {state.shape}"
            )
        if law.counts:
            check_counts("init", state)
        with jax.ensure_compile_time_eval():
            return jnp.concatenate([state, jnp.zeros(extra, state.dtype)])
    if init.event_shape != (species,):
        raise ValueError(
            f"init must have event shape ({species},), one number for each of "
            f"{', '.join(net.species)}, got {init.event_shape}: use .to_event(1)"
        )
    if law.counts and not init.is_discrete and not isinstance(init, dist.Delta):
        raise ValueError(
            f"{type(law).__name__} is a law of counts, but init is a continuous "
            f"{type(init).__name__}: give whole numbers or a discrete distribution"
        )
    if extra == 0:
        return init
    base = init.base_dist if isinstance(init, dist.Independent) else init
    if type(base) is dist.Normal:
        # The accumulators of the first time count nothing: any proper law does for them.
        loc = jnp.concatenate([base.loc, jnp.zeros((*base.loc.shape[:-1], extra))], axis=-1)
        ones = jnp.ones((*base.scale.shape[:-1], extra))
        return dist.Normal(loc, jnp.concatenate([base.scale, ones], axis=-1)).to_event(1)
    return WithAccumulators(init, extra)


def check_counts(name: str, state: Any) -> None:
    """Raise a `ValueError` for a known state that is not made of counts."""
    if isinstance(state, jax.core.Tracer):
        return
    known = np.asarray(state)
    if np.any(known < 0) or np.any(known != np.round(known)):
        raise ValueError(f"{name} must hold whole numbers, 0 or more, for a law of counts: {known}")


class WithAccumulators(dist.Distribution):
    """A law of the species, and accumulators at zero.

    Args:
        species: law of the species, event shape `(d,)`.
        extra: number of accumulators.
    """

    pytree_data_fields = ("species",)
    pytree_aux_fields = ("extra",)

    def __init__(self, species: dist.Distribution, extra: int) -> None:
        self.species, self.extra = species, extra
        shape = (species.event_shape[0] + extra,)
        super().__init__(species.batch_shape, shape)

    @constraints.dependent_property(event_dim=1)
    def support(self) -> constraints.Constraint:
        return constraints.real_vector

    @property
    def is_discrete(self) -> bool:
        return bool(self.species.is_discrete)

    @property
    def mean(self) -> Array:
        return self._pad(self.species.mean)

    @property
    def variance(self) -> Array:
        return self._pad(self.species.variance)

    def _pad(self, x: Array) -> Array:
        zeros = jnp.zeros((*x.shape[:-1], self.extra), jnp.result_type(float))
        return jnp.concatenate([x.astype(zeros.dtype), zeros], axis=-1)

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Array:
        return self._pad(self.species.sample(key, sample_shape))

    def log_prob(self, value: ArrayLike) -> Array:
        value = jnp.asarray(value)
        at_zero = jnp.all(value[..., -self.extra :] == 0.0, axis=-1)
        return jnp.where(at_zero, self.species.log_prob(value[..., : -self.extra]), -jnp.inf)
