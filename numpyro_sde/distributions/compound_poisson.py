"""Compound Poisson jumps of an SDE, their sizes with any NumPyro distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_sde.distributions.moments import has_moments, is_gaussian, mean_and_cov
from numpyro_sde.noise.jumps import AbstractJumps
from numpyro_sde.parameters import Code


class CompoundPoisson(AbstractJumps):
    """Jumps at the times of a Poisson process, of random sizes.

    For `SDE(drift, diffusion, jumps=CompoundPoisson(...))`. A self-exciting intensity (Hawkes) is a
    component of the state that decays by the drift and that each jump raises: `rate=lambda t, x, p:
    x[1]`, the size's second component the rise.

    Args:
        rate: jumps per unit time: a number, or `rate(t, x, p)` (`rate(t, x)` where the SDE has no
            params), taken at the beginning of each step of the grid.
        size: distribution of what a jump adds to the state, or `size(t, x, p)` that returns one.
            Normal sizes give the transition a density; others can be simulated only.
        max_per_step: most jumps in one step. Where the Poisson law has more than 1e-6 beyond it,
            steps are NaN: refine the grid, or allow more.

    Raises:
        ValueError: a negative rate or count.
        TypeError: a rate or size of the wrong kind.

    Example:
        >>> import jax, numpyro.distributions as dist, numpyro_sde as nsde
        >>> prices = nsde.SDE(
        ...     lambda t, x: 0.05, lambda t, x: 0.2,
        ...     jumps=nsde.CompoundPoisson(3.0, dist.Normal(-0.1, 0.15)),
        ... )
        >>> path = nsde.SDEPath(prices, [0.0, 0.25, 0.5], 0.0)
        >>> path.sample(jax.random.key(0)).shape, type(path.scheme).__name__
        ((3,), 'JumpEuler')
    """

    rate: Any
    size: Any
    max_per_step: int = eqx.field(static=True)

    def __init__(
        self,
        rate: float | Callable[..., Any],
        size: dist.Distribution | Callable[..., dist.Distribution],
        *,
        max_per_step: int = 8,
    ) -> None:
        if isinstance(max_per_step, bool) or not isinstance(max_per_step, int):
            raise TypeError(f"max_per_step must be an integer, got {max_per_step!r}")
        if max_per_step < 1:
            raise ValueError(f"max_per_step must be at least 1, got {max_per_step}")
        if callable(rate):
            self.rate = Code(rate)
        else:
            known = np.asarray(rate) if isinstance(rate, int | float | np.ndarray) else None
            if known is not None and (known.shape != () or not known >= 0.0):
                raise ValueError(
                    f"rate must be one number, 0 or more, or a function of (t, x, p), got {rate}"
                )
            self.rate = jnp.asarray(rate, jnp.result_type(float))
            if self.rate.ndim:
                raise ValueError(
                    f"rate must be one number, got shape {self.rate.shape}: what varies over a "
                    "plate goes through params, rate=lambda t, x, p: p['rate']"
                )
        if isinstance(size, dist.Distribution):
            if size.batch_shape:
                raise ValueError(
                    f"size must have no batch shape, got {size.batch_shape}: use to_event(1) for a "
                    "vector, and size=lambda t, x, p: ... for what varies over a plate"
                )
            self.size = size
        elif callable(size) and not isinstance(size, type):
            self.size = Code(size)
        else:
            raise TypeError(
                "size must be a distribution or a function of (t, x, p) that returns one, got "
                f"{size!r}"
            )
        self.max_per_step = max_per_step

    def rate_at(self, t: Any, x: Array, args: tuple[Any, ...]) -> Float[Array, ""]:
        value = self.rate(t, x, *args) if isinstance(self.rate, Code) else self.rate
        value = jnp.asarray(value, jnp.result_type(x, float))
        return jnp.where(value >= 0.0, value, jnp.nan)

    def size_at(self, t: Any, x: Array, args: tuple[Any, ...]) -> dist.Distribution:
        """The distribution of one jump from a state."""
        law = self.size(t, x, *args) if isinstance(self.size, Code) else self.size
        if not isinstance(law, dist.Distribution):
            raise TypeError(f"size must return a distribution, got {type(law).__name__}")
        shape = law.batch_shape + law.event_shape
        if shape not in ((), jnp.shape(x)):
            raise ValueError(f"size must have the shape of the state {jnp.shape(x)}, got {shape}")
        return law

    def draw_size(self, key: PRNGKeyArray, t: Any, x: Array, args: tuple[Any, ...]) -> Array:
        return jnp.broadcast_to(self.size_at(t, x, args).sample(key), jnp.shape(x))

    def normal_size(self, t: Any, x: Array, args: tuple[Any, ...]) -> tuple[Array, Array]:
        law = self.size_at(t, x, args)
        if not is_gaussian(law):
            raise TypeError(
                f"jumps of size {type(law).__name__} have no transition density in closed form: "
                "normal sizes have; others can be simulated, filters.Particle(proposal='bootstrap')"
            )
        return self.size_moments(t, x, args)

    def size_moments(self, t: Any, x: Array, args: tuple[Any, ...]) -> tuple[Array, Array]:
        law = self.size_at(t, x, args)
        if has_moments(law) is False:
            raise TypeError(
                f"jumps of size {type(law).__name__} have no mean and variance to be matched: use "
                "filters.Particle(proposal='bootstrap')"
            )
        if jnp.ndim(x) == 1 and law.batch_shape + law.event_shape == ():
            law = law.expand(jnp.shape(x)).to_event(1)
        mean, cov = mean_and_cov(law, jnp.ndim(x))
        return mean.reshape(jnp.shape(x)), cov
