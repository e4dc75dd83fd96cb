"""Densities from characteristic functions, by a contour that passes near the saddle point.

The density at a point is an integral of `exp(F(s))` along a line parallel to the imaginary axis,
F the log of a moment generating function less `s` times the point. Anywhere on the real axis will
do; near the minimum of F there, the saddle point, nothing cancels, so that densities far out in
the tails keep their relative accuracy, and the trapezoidal rule converges geometrically
(Weideman and Trefethen 2007, "Parabolic and hyperbolic contours for computing the Bromwich
integral"; Daniels 1954, "Saddlepoint approximations in statistics", whose first term is all that
one node gives).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Complex, Float

CUT = 8.5
"""Standard deviations after which a normal factor of an integrand is below rounding."""

_HALVINGS = 40


def enough(dtype: Any) -> float:
    """Nats by which the error of the rule must lie below the integral: nearly all digits.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.schemes.contour import enough
        >>> round(enough(jnp.float32), 1)
        13.9
    """
    return -math.log(float(jnp.finfo(dtype).eps)) - 2.0


def saddle(slope: Callable[[Array], Array], low: Array, high: Array) -> Array:
    """Where an increasing function crosses zero, to a part in 1e12 of the bracket.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.schemes.contour import saddle
        >>> round(float(saddle(lambda s: s**3 - 8.0, jnp.array(0.0), jnp.array(5.0))), 6)
        2.0
    """

    def halve(_: Array, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = 0.5 * (low + high)
        below = slope(middle) < 0.0
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    low, high = lax.fori_loop(0, _HALVINGS, halve, (low, high))
    return 0.5 * (low + high)


def log_integral(at_real: Array, ratios: Complex[Array, " J"], step: Array) -> Float[Array, ""]:
    """Log of `exp(at_real) / 2 pi` times an integral along the line, by the trapezoidal rule.

    Args:
        at_real: log of the integrand on the real axis.
        ratios: integrand over that at the nodes `step, 2 step, ...`; it is even in its real part.
        step: distance of the nodes.

    Example:
        >>> import jax.numpy as jnp, math
        >>> from numpyro_sde.schemes.contour import log_integral
        >>> u = 0.5 * jnp.arange(1.0, 20.0)  # of the standard normal law, at its mean
        >>> value = log_integral(jnp.zeros(()), jnp.exp(-0.5 * u**2 + 0j), jnp.array(0.5))
        >>> abs(float(value + 0.5 * math.log(2 * math.pi))) < 1e-6
        True
    """
    return at_real + jnp.log(step / math.pi * (0.5 + jnp.sum(jnp.real(ratios))))
