"""Brownian motion, geometric Brownian motion and the Ornstein-Uhlenbeck process.

Their transition laws are normal or log-normal: Karlin and Taylor (1981), A Second Course in
Stochastic Processes, chapter 15; Glasserman (2004), Monte Carlo Methods in Financial
Engineering, sections 3.2 and 3.3.
"""

# ruff: noqa: ARG001, ARG002
# Functions of one protocol share its arguments, used or not.

from __future__ import annotations

import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from numpyro_sde.processes.arguments import parameter, positive, real
from numpyro_sde.processes.linear import rounding_of
from numpyro_sde.processes.special import expm1_ratio
from numpyro_sde.schemes.base import AbstractScheme, GaussianScheme
from numpyro_sde.schemes.euler import Euler
from numpyro_sde.schemes.log_euler import grown, log_ratio
from numpyro_sde.sde import SDE

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


def _brownian_drift(t: Any, x: Any, p: Any) -> Array:
    return jnp.broadcast_to(p["drift"], jnp.shape(x))


def _constant_diffusion(t: Any, x: Any, p: Any) -> Array:
    return p["scale"]


class BrownianMotion(SDE):
    """Brownian motion with drift, `dX = drift dt + scale dW`.

    The continuous-time random walk: a slowly wandering level in a structural time series, the
    position of a free particle. Its transition is `N(x + drift dt, scale^2 dt)`, which the
    Euler step gives exactly; there is no stationary law.

    Args:
        drift: mean slope, state units per time.
        scale: volatility, state units per square root of time; positive.

    Raises:
        ValueError: a number that is not finite, or a `scale` that is not positive.
        TypeError: an argument that is no number or array.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> walk = nsde.processes.BrownianMotion(drift=1.0, scale=2.0)
        >>> path = nsde.SDEPath(walk, [0.0, 0.25], init=0.0)
        >>> round(float(path.log_prob(jnp.array([0.0, 0.25]))), 4)  # N(0.25, 1)
        -0.9189
    """

    drift_rate = parameter("drift", "Mean slope, state units per time.")
    scale = parameter("scale", "Volatility, state units per square root of time.")

    def __init__(self, drift: ArrayLike = 0.0, scale: ArrayLike = 1.0) -> None:
        super().__init__(
            _brownian_drift,
            _constant_diffusion,
            params={"drift": real("drift", drift), "scale": positive("scale", scale)},
        )

    def exact_transition(self) -> AbstractScheme | None:
        """The Euler step, exact with constant coefficients."""
        return Euler() if self.noise.independent else None


def _geometric_drift(t: Any, x: Any, p: Any) -> Array:
    return p["drift"] * x


def _geometric_diffusion(t: Any, x: Any, p: Any) -> Array:
    return p["volatility"] * x


class GeometricBrownianMotion(SDE):
    """Geometric Brownian motion, `dX = drift X dt + volatility X dW`.

    Growth at a noisy relative rate: share prices (Black and Scholes 1973), populations far
    below capacity. `log X` is a Brownian motion of slope `drift - volatility^2 / 2`, so the
    transition is log-normal; there is no stationary law.

    Args:
        drift: mean relative growth rate, 1/time: `E[X_t] = x_0 exp(drift t)`.
        volatility: relative volatility, 1/sqrt(time); positive.

    Raises:
        ValueError: a number that is not finite, or a `volatility` that is not positive.
        TypeError: an argument that is no number or array.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> price = nsde.processes.GeometricBrownianMotion(drift=0.05, volatility=0.2)
        >>> path = nsde.SDEPath(price, [0.0, 1.0], init=100.0)
        >>> round(float(path.log_prob(jnp.array([100.0, 103.0]))), 4)
        -3.9442
    """

    growth_rate = parameter("drift", "Mean relative growth rate, 1/time.")
    volatility = parameter("volatility", "Relative volatility, 1/sqrt(time).")

    def __init__(self, drift: ArrayLike, volatility: ArrayLike) -> None:
        super().__init__(
            _geometric_drift,
            _geometric_diffusion,
            params={
                "drift": real("drift", drift),
                "volatility": positive("volatility", volatility),
            },
        )

    @property
    def positive(self) -> bool:
        """A positive state stays positive."""
        return True

    def exact_transition(self) -> AbstractScheme | None:
        """The log-normal transition."""
        return LogNormalTransition() if self.noise.independent else None


class LogNormalTransition(AbstractScheme):
    """The exact step of geometric Brownian motion.

    `X' = x exp((drift - volatility^2 / 2) dt + volatility sqrt(dt) z)`, z standard normal.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> price = nsde.processes.GeometricBrownianMotion(drift=0.05, volatility=0.2)
        >>> step = price.exact_transition().step
        >>> round(float(step(price, 0.0, 1.0, jnp.array(100.0), jnp.array(0.0))), 2)
        103.05
    """

    approximates_sde: ClassVar[bool] = True

    keeps_positive: ClassVar[bool] = True

    def prepare(self, sde: SDE, times: Any, dt: Any) -> Any:
        xp: Any = np if isinstance(dt, np.ndarray) else jnp
        return xp.sqrt(dt), 0.5 * xp.log(dt)

    def log_density(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Float[Array, ""]:
        x, x_next = jnp.asarray(x), jnp.asarray(x_next)
        inside = x_next > 0.0
        x_next = jnp.where(inside, x_next, 1.0)
        x = jnp.where(x > 0.0, x, jnp.nan)
        z = self.invert(sde, t, dt, x, x_next, cache)
        half_log = 0.5 * jnp.log(dt) if cache is None else cache[1]
        log_scale = jnp.log(sde.params["volatility"]) + half_log
        value = -0.5 * z**2 - log_scale - jnp.log(x_next) - _HALF_LOG_2PI
        return jnp.sum(jnp.where(inside | jnp.isnan(x), value, -jnp.inf))

    def step(self, sde: SDE, t: Array, dt: Array, x: Array, z: Array, cache: Any = None) -> Array:
        slope, scale = _log_coefficients(sde)
        root = jnp.sqrt(dt) if cache is None else cache[0]
        return grown(x, slope * dt + scale * root * z)

    def invert(
        self,
        sde: SDE,
        t: Array,
        dt: Array,
        x: Array,
        x_next: Array,
        cache: Any = None,
    ) -> Array:
        slope, scale = _log_coefficients(sde)
        root = jnp.sqrt(dt) if cache is None else cache[0]
        return (log_ratio(x, x_next) - slope * dt) / (scale * root)


def _log_coefficients(sde: SDE) -> tuple[Array, Array]:
    volatility = sde.params["volatility"]
    return sde.params["drift"] - 0.5 * volatility**2, volatility


def _reverting_drift(t: Any, x: Any, p: Any) -> Array:
    return p["rate"] * (p["mean"] - x)


class OrnsteinUhlenbeck(SDE):
    """The Ornstein-Uhlenbeck process, `dX = rate (mean - X) dt + scale dW`.

    Noise that forgets: the velocity of a Brownian particle (Uhlenbeck and Ornstein 1930),
    interest rates (Vasicek 1977), deviations from an optimum, coloured noise. Stationary law
    `N(mean, scale^2 / (2 rate))` with correlation time `1 / rate` for `rate > 0`. A rate of
    zero is Brownian motion and a negative one an unstable process; the transition is
    `N(mean + (x - mean) exp(-rate dt), scale^2 (1 - exp(-2 rate dt)) / (2 rate))` for all.

    Args:
        rate: speed of return, 1/time.
        mean: level of return, state units.
        scale: volatility, state units per square root of time; positive.

    Raises:
        ValueError: a number that is not finite, or a `scale` that is not positive.
        TypeError: an argument that is no number or array.

    Example:
        >>> import numpyro_sde as nsde
        >>> ou = nsde.processes.OrnsteinUhlenbeck(rate=2.0, mean=1.0, scale=0.5)
        >>> [float(m) for m in ou.stationary_moments()]
        [1.0, 0.0625]
    """

    rate = parameter("rate", "Speed of return, 1/time.")
    mean = parameter("mean", "Level of return, state units.")
    scale = parameter("scale", "Volatility, state units per square root of time.")

    def __init__(self, rate: ArrayLike, mean: ArrayLike, scale: ArrayLike) -> None:
        super().__init__(
            _reverting_drift,
            _constant_diffusion,
            params={
                "rate": real("rate", rate),
                "mean": real("mean", mean),
                "scale": positive("scale", scale),
            },
        )

    def exact_transition(self) -> AbstractScheme | None:
        """The Gaussian transition."""
        return OrnsteinUhlenbeckTransition() if self.noise.independent else None

    def stationary_moments(self) -> tuple[Array, Array]:
        """Mean and variance of the stationary law, NaN unless `rate > 0`."""
        stable = self.rate > 0.0
        rate = jnp.where(stable, self.rate, 1.0)
        mean = jnp.where(stable, self.mean, jnp.nan)
        return mean, jnp.where(stable, 0.5 * self.scale**2 / rate, jnp.nan)

    def stationary_log_density(self, x: ArrayLike) -> Float[Array, "..."]:
        """Log density of the stationary normal law at `x`, elementwise."""
        mean, variance = self.stationary_moments()
        z_squared = (jnp.asarray(x) - mean) ** 2 / variance
        return -0.5 * (z_squared + jnp.log(variance)) - _HALF_LOG_2PI


class OrnsteinUhlenbeckTransition(GaussianScheme):
    """The exact Gaussian step of the Ornstein-Uhlenbeck process, smooth through `rate = 0`.

    Example:
        >>> import numpyro_sde as nsde
        >>> ou = nsde.processes.OrnsteinUhlenbeck(rate=1.0, mean=0.0, scale=1.0)
        >>> mean, sd = ou.exact_transition().moments(ou, 0.0, 0.5, 1.0)
        >>> round(float(mean), 4), round(float(sd), 4)
        (0.6065, 0.5622)
    """

    def prepare(self, sde: SDE, times: Any, dt: Any) -> Any:
        if isinstance(dt, np.ndarray) and np.ptp(dt) <= rounding_of(times):
            # One exponential for the whole path instead of one a step.
            coefficients = _ou_coefficients(sde, np.mean(dt))
            return tuple(jnp.broadcast_to(c, dt.shape) for c in coefficients)
        return _ou_coefficients(sde, dt)

    def moments(
        self,
        sde: SDE,
        t: Array,
        dt: Array,
        x: Array,
        cache: Any = None,
    ) -> tuple[Array, Array]:
        pull, scale, _ = _ou_coefficients(sde, dt) if cache is None else cache
        x = jnp.asarray(x)
        return jnp.add(x, (sde.params["mean"] - x) * pull), jnp.broadcast_to(scale, x.shape)

    def log_density(
        self,
        sde: SDE,
        t: Array,
        dt: Array,
        x: Array,
        x_next: Array,
        cache: Any = None,
    ) -> Float[Array, ""]:
        pull, scale, log_scale = _ou_coefficients(sde, dt) if cache is None else cache
        # The increment first: it is exact where steps are short, the next mean is not.
        z = ((x_next - x) - (sde.params["mean"] - x) * pull) / scale
        return jnp.sum(-0.5 * z**2 - log_scale - _HALF_LOG_2PI)


def _ou_coefficients(sde: SDE, dt: Any) -> tuple[Array, Array, Array]:
    """`1 - exp(-rate dt)`, the standard deviation of the step and its logarithm."""
    rate, scale = sde.params["rate"], sde.params["scale"]
    pull = -jnp.expm1(-rate * dt)
    variance = dt * expm1_ratio(2.0 * rate * dt)
    return pull, scale * jnp.sqrt(variance), jnp.log(scale) + 0.5 * jnp.log(variance)
