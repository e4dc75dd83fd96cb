"""Euler's step of the logarithm of a positive state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_sde.schemes.base import _HALF_LOG_2PI, AbstractScheme

if TYPE_CHECKING:
    from numpyro_sde.sde import SDE


class LogEuler(AbstractScheme):
    """Euler-Maruyama in `log X`: `X' = x exp((f / x - L^2 / (2 x^2)) dt + (L / x) dW)`.

    For positive states whose noise scales with them, `dX = f dt + L dW` with `f / x` and `L / x`
    tame: no step leaves the positive half line. Exact for geometric Brownian motion; weak order 1
    and strong order 1/2 (1 where `L / x` is constant), as those of Euler's in the new
    coordinate (Ito's formula). Noises must be independent.

    When not to use it: states that reach zero (square-root processes), where `L^2 / x^2` is
    infinite.

    Raises:
        ValueError: when a path is made: Brownian motions that several components share.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> sde = nsde.SDE(lambda t, x: x * (1.0 - x), lambda t, x: 0.5 * x)
        >>> step = nsde.schemes.LogEuler().step
        >>> round(float(step(sde, 0.0, 0.1, jnp.array(1.0), jnp.array(-20.0))), 4)
        0.0418
    """

    approximates_sde: ClassVar[bool] = True
    keeps_positive: ClassVar[bool] = True

    def check(self, sde: SDE, state_shape: tuple[int, ...]) -> None:
        if sde.structure(state_shape).kind != "diagonal":
            raise ValueError(
                "LogEuler needs independent noise for each component, and several components of "
                "this SDE share Brownian motions: state the equation in logarithms yourself"
            )

    def prepare(self, sde: SDE, times: Any, dt: Any) -> Any:  # noqa: ARG002
        xp: Any = np if isinstance(dt, np.ndarray) else jnp
        return xp.sqrt(dt), 0.5 * xp.log(dt)

    def _log_moments(
        self, sde: SDE, t: Array, dt: Array, x: Array, cache: Any
    ) -> tuple[Array, Array]:
        """Mean and standard deviation of the logarithm's change."""
        root = jnp.sqrt(dt) if cache is None else cache[0]
        scale = sde.noise_factor_at(t, x) / x
        return (sde.ito_drift_at(t, x) / x - 0.5 * scale**2) * dt, scale * root

    def log_density(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Float[Array, ""]:
        x, x_next = jnp.asarray(x), jnp.asarray(x_next)
        inside = x_next > 0.0
        x_next = jnp.where(inside, x_next, 1.0)
        x = jnp.where(x > 0.0, x, jnp.nan)
        mean, sd = self._log_moments(sde, t, dt, x, cache)
        z = (log_ratio(x, x_next) - mean) / sd
        value = -0.5 * z**2 - jnp.log(jnp.abs(sd)) - jnp.log(x_next) - _HALF_LOG_2PI
        return jnp.sum(jnp.where(inside | jnp.isnan(x), value, -jnp.inf))

    def step(self, sde: SDE, t: Array, dt: Array, x: Array, z: Array, cache: Any = None) -> Array:
        x = jnp.asarray(x)
        mean, sd = self._log_moments(sde, t, dt, x, cache)
        return grown(x, mean + sd * z)

    def invert(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Array:
        x = jnp.asarray(x)
        mean, sd = self._log_moments(sde, t, dt, x, cache)
        return (log_ratio(x, jnp.asarray(x_next)) - mean) / sd


def grown(x: Array, change: Array) -> Array:
    """`x exp(change)`; what underflows is the smallest number, not 0, which is never reached.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.schemes.log_euler import grown
        >>> bool(grown(jnp.array(1.0), jnp.array(-1e4)) > 0)
        True
    """
    value = x * jnp.exp(change)
    tiny = jnp.finfo(value.dtype).tiny
    return jnp.where((x > 0.0) & (value < tiny), tiny, value)


def log_ratio(x: Array, x_next: Array) -> Array:
    """`log(x_next / x)`, keeping the digits of short steps.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.schemes.log_euler import log_ratio
        >>> round(float(log_ratio(jnp.array(1.0), jnp.array(2.0))), 4)
        0.6931
    """
    # log1p of the relative change keeps the digits of short steps, and has none of a crash.
    change = (x_next - x) / x
    small = jnp.abs(change) < 0.5
    far = jnp.log(jnp.where(small, 1.0, x_next)) - jnp.log(jnp.where(small, 1.0, x))
    return jnp.where(small, jnp.log1p(jnp.where(small, change, 0.0)), far)
