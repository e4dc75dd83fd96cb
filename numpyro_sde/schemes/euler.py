"""Euler-Maruyama: the Gaussian transition with frozen coefficients (Maruyama 1955)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_sde.schemes.base import _HALF_LOG_2PI, GaussianScheme

if TYPE_CHECKING:
    from numpyro_sde.sde import SDE


class Euler(GaussianScheme):
    """Euler-Maruyama: `x' = x + f(t, x) dt + L(t, x) dW`.

    Weak order 1, strong order 1/2 (1 with additive noise): Kloeden and Platen (1992), section
    10.2. A Stratonovich SDE is converted to its Ito drift first. With fewer Brownian motions
    than states the step simulates but has no density. Do not use it on data that are sparse
    against the time scales of the SDE without refining the grid (`TimeGrid`).

    Example:
        >>> import numpyro_sde as nsde
        >>> sde = nsde.SDE(lambda t, x: -x, lambda t, x: 0.5)
        >>> round(float(nsde.schemes.Euler().log_density(sde, 0.0, 0.1, 1.0, 0.9)), 4)
        0.9255
    """

    def prepare(self, sde: SDE, times: Any, dt: Any) -> Any:  # noqa: ARG002
        # On a grid known beforehand the roots and logarithms of the steps are taken once, on
        # the host: they are half the cost of the density of a long path.
        xp: Any = np if isinstance(dt, np.ndarray) else jnp
        return xp.sqrt(dt), 0.5 * xp.log(dt)

    def moments(
        self, sde: SDE, t: Array, dt: Array, x: Array, cache: Any = None
    ) -> tuple[Array, Array]:
        x = jnp.asarray(x)
        root = jnp.sqrt(dt) if cache is None else cache[0]
        mean = x + sde.ito_drift_at(t, x) * dt
        return mean, sde.noise_factor_at(t, x) * root

    def log_density(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Float[Array, ""]:
        x = jnp.asarray(x)
        if sde.noise_factor_at(t, x).ndim > x.ndim:
            return super().log_density(sde, t, dt, x, x_next, cache)
        root, half_log = (jnp.sqrt(dt), 0.5 * jnp.log(dt)) if cache is None else cache
        square, log_scale = _diagonal_terms(sde, t, dt, root, x, x_next)
        return -0.5 * square - log_scale - (half_log + _HALF_LOG_2PI) * x.size

    def log_density_sum(
        self, sde: SDE, times: Any, dt: Any, path: Array, cache: Any
    ) -> Float[Array, ""]:
        if cache is None or sde.structure(path.shape[1:]).kind == "general":
            return super().log_density_sum(sde, times, dt, path, cache)
        root, half_log = cache
        terms = jax.vmap(_diagonal_terms, (None, 0, 0, 0, 0, 0))
        squares, log_scales = terms(sde, times[:-1], dt, root, path[:-1], path[1:])
        # Summed apart: a constant scale then costs nothing, and what depends on the steps alone
        # is one number, on a known grid taken on the host.
        constant = path[0].size * (half_log + _HALF_LOG_2PI).sum()
        return -0.5 * jnp.sum(squares) - jnp.sum(log_scales) - constant


def _diagonal_terms(
    sde: SDE, t: Array, dt: Array, root: Array, x: Array, x_next: Array
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Square of the innovation of one step and log of its scale, the length's own part left out."""
    scale = sde.noise_factor_at(t, x)
    z = (x_next - x - sde.ito_drift_at(t, x) * dt) / (scale * root)
    return jnp.sum(z * z), jnp.sum(jnp.log(jnp.abs(scale)))
