"""Milstein's scheme and its transition density (Milstein 1975; Elerian 1998).

One step is a quadratic in one standard normal, so that the next state is a shifted and scaled
noncentral chi-squared variable with one degree of freedom. Its density is a sum over the two
normals that lead to a state; it is written here so that it passes into Euler's without
cancellation as the derivative of the diffusion vanishes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_sde.linear.small import diagonal
from numpyro_sde.schemes.base import _HALF_LOG_2PI, AbstractScheme
from numpyro_sde.schemes.dependence import coupled_component, dependence
from numpyro_sde.schemes.euler import Euler

if TYPE_CHECKING:
    from numpyro_sde.sde import SDE

# Below this the second root is further than 1e5 standard deviations away from zero.
_NO_SECOND_ROOT = 1e-12


class Milstein(AbstractScheme):
    r"""Milstein's scheme: `x' = x + f dt + L dW + 1/2 L L' (dW^2 - dt)`.

    Strong order 1 (Milstein 1975; Kloeden and Platen 1992, section 10.3). For a scalar state,
    or independent noise in which component i is driven with a strength that depends on
    component i alone; other noises need Levy areas. A Stratonovich SDE is converted to its Ito
    drift first.

    With `r = 1/2 L' sqrt(dt)` and `w = (x' - x - f dt) / (L sqrt(dt))` a step is
    `w = z + r (z^2 - 1)`. Its density (Elerian 1998) is singular,
    though integrable, at the edge `w = -r - 1/(4 r)` of its support, beyond which it is zero. Two
    normals lead to each state: `invert` returns the one that becomes Euler's as `r` goes to 0,
    so `step(invert(x')) = x'` always, and `invert(step(z)) = z` where `1 + 2 r z > 0`.

    Example:
        >>> import numpyro_sde as nsde
        >>> sde = nsde.SDE(lambda t, x: 0.1 * x, lambda t, x: 0.4 * x)
        >>> milstein = nsde.schemes.Milstein()
        >>> round(float(milstein.log_density(sde, 0.0, 0.25, 1.0, 1.1)), 4)
        0.5003
    """

    approximates_sde: ClassVar[bool] = True

    def check(self, sde: SDE, state_shape: tuple[int, ...]) -> None:
        """Refuse noise that needs Levy areas.

        Raises:
            ValueError: shared Brownian motions, or a component's noise that depends on another
                component (found where the parameters are concrete; else the density is NaN).
        """
        structure = sde.structure(state_shape)
        if structure.kind != "diagonal":
            raise ValueError(
                "Milstein() needs independent noise in each component, got a diffusion of shape "
                f"{structure.diffusion_shape}: shared Brownian motions need Levy areas. Use "
                "Euler() (the same scheme where the noise is additive), LocalLinear() or "
                "DiffraxSolver()"
            )
        coupled = coupled_component(sde, state_shape)
        if coupled is not None:
            raise ValueError(
                f"Milstein() needs noise in component i that depends on component i alone, but "
                f"diffusion[{coupled[0]}] depends on x[{coupled[1]}]: that needs Levy areas. Use "
                "Euler() or DiffraxSolver()"
            )

    def gaussian_form(self, sde: SDE, state_shape: tuple[int, ...]) -> Euler | None:
        return None if dependence(sde, "diffusion", state_shape).state else Euler()

    def log_density(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Float[Array, ""]:
        del cache
        mean, scale, r = _quadratic(sde, t, dt, x)
        outside, root, z = _euler_root((x_next - mean) / scale, r)
        # The other root is further out: its share is exp(-root / (2 r^2)) of the first one's.
        has_second = r**2 > _NO_SECOND_ROOT
        exponent = root / (2.0 * jnp.where(has_second, r**2, 1.0))
        second = jnp.where(has_second, jnp.log1p(jnp.exp(-exponent)), 0.0)
        log_p = -0.5 * z**2 + second - jnp.log(root) - jnp.log(jnp.abs(scale)) - _HALF_LOG_2PI
        return jnp.sum(jnp.where(outside, -math.inf, log_p))

    def step(self, sde: SDE, t: Array, dt: Array, x: Array, z: Array, cache: Any = None) -> Array:
        del cache
        mean, scale, r = _quadratic(sde, t, dt, x)
        return mean + scale * (z + r * (z**2 - 1.0))

    def invert(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Array:
        del cache
        mean, scale, r = _quadratic(sde, t, dt, x)
        outside, _, z = _euler_root((x_next - mean) / scale, r)
        return jnp.where(outside, math.nan, z)


def _quadratic(sde: SDE, t: Array, dt: Array, x: Array) -> tuple[Array, Array, Array]:
    """Mean and scale of Euler's step, and the relative weight `r` of the quadratic term."""
    x = jnp.asarray(x)
    root_dt = jnp.sqrt(dt)
    if x.ndim == 0:
        scale, slope = jax.jvp(lambda s: sde.noise_factor_at(t, s), (x,), (jnp.ones_like(x),))
    else:
        scale = sde.noise_factor_at(t, x)
        jacobian = jax.jacfwd(lambda s: sde.noise_factor_at(t, s))(x)
        slope = diagonal(jacobian)
        coupled = jnp.any((jacobian != 0.0) & ~jnp.eye(x.size, dtype=bool), axis=1)
        slope = jnp.where(coupled, math.nan, slope)
    mean = x + sde.ito_drift_at(t, x) * dt
    return mean, scale * root_dt, 0.5 * slope * root_dt


def _euler_root(w: Array, r: Array) -> tuple[Array, Array, Array]:
    """Solve `w = z + r (z^2 - 1)`: whether no root exists, `|1 + 2 r z|`, and Euler's root."""
    discriminant = 1.0 + 4.0 * r * (r + w)
    outside = discriminant <= 0.0
    root = jnp.sqrt(jnp.where(outside, 1.0, discriminant))
    return outside, root, 2.0 * (r + w) / (1.0 + root)
