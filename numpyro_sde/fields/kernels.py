"""Stationary kernels: covariance and spectral density, unit variance and unit lengths."""

from __future__ import annotations

import math
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

Kernel = Literal["se", "matern32", "matern52"]
HALF_INTEGER = {"matern32": 1.5, "matern52": 2.5}


def check_kernel(kernel: str) -> None:
    """Raise a `ValueError` for a kernel of another name."""
    if kernel not in get_args(Kernel):
        raise ValueError(f"kernel must be one of {get_args(Kernel)}, got {kernel!r}")


def log_spectral_density(kernel: str, squared: Float[Array, " m"], dim: int) -> Float[Array, " m"]:
    """Log spectral density at frequencies of these squared norms, in units of one over length.

    Rasmussen and Williams (2006), equations 4.12 and 4.15; `int S(w) dw = (2 pi)^dim`.

    Example:
        >>> import jax.numpy as jnp
        >>> round(float(log_spectral_density("se", jnp.array(0.0), 1)), 4)  # log sqrt(2 pi)
        0.9189
    """
    if kernel == "se":
        return 0.5 * dim * math.log(2.0 * math.pi) - 0.5 * squared
    nu = HALF_INTEGER[kernel]
    constant = (
        dim * math.log(2.0)
        + 0.5 * dim * math.log(math.pi)
        + math.lgamma(nu + 0.5 * dim)
        - math.lgamma(nu)
        + nu * math.log(2.0 * nu)
    )
    return constant - (nu + 0.5 * dim) * jnp.log(2.0 * nu + squared)


def covariance(kernel: str, squared: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Covariance of values at these squared distances, in units of the length.

    Example:
        >>> import jax.numpy as jnp
        >>> round(float(covariance("se", jnp.array(1.0))), 4)
        0.6065
    """
    if kernel == "se":
        return jnp.exp(-0.5 * squared)
    nu = HALF_INTEGER[kernel]
    # The root has no derivative at 0; the kernels are flat there.
    far = squared > 0
    r = math.sqrt(2.0 * nu) * jnp.where(far, jnp.sqrt(jnp.where(far, squared, 1.0)), 0.0)
    rest = r if kernel == "matern32" else r + r**2 / 3.0
    return (1.0 + rest) * jnp.exp(-r)
