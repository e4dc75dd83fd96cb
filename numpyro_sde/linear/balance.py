"""Units for the states of a linear system in which its matrix is small, and its fastest rate."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from numpyro_sde.linear.small import matmul

_SWEEPS = 4
_MAX_UNIT = 30  # binary digits by which a unit may differ from the mean one


def balancing_units(A: Float[Array, "d d"]) -> Float[Array, " d"]:
    """Powers of 2, one for each state: units in which rows and columns of A weigh the same.

    Osborne's iteration (1960, "On pre-conditioning of matrices"), off the diagonal. A floor of a
    thousandth of |A| serves chains, in which one of the two is empty. With `u` the result,
    `A[i, j] u[j] / u[i]` is the matrix in the new units. It has no derivative.

    Example:
        >>> import jax.numpy as jnp
        >>> A = jnp.array([[0.0, 1.0], [-(2.0**20), 0.0]])  # velocity of a fast oscillator
        >>> balancing_units(A).tolist()
        [0.03125, 32.0]
    """
    d = A.shape[0]
    size = jnp.abs(lax.stop_gradient(A)) * (1 - np.eye(d)).astype(A.dtype)
    log_unit = jnp.zeros(d, A.dtype)
    if d == 1:
        return log_unit + 1
    for _ in range(_SWEEPS):
        scaled = size * jnp.exp2(log_unit[None, :] - log_unit[:, None])
        floor = jnp.maximum(1e-3 * jnp.max(scaled), jnp.finfo(A.dtype).tiny)
        rows, columns = scaled.sum(1) + floor, scaled.sum(0) + floor
        log_unit = log_unit + 0.5 * jnp.log2(rows / columns)
        log_unit = log_unit - jnp.mean(log_unit)
    log_unit = jnp.clip(jnp.round(log_unit), -_MAX_UNIT, _MAX_UNIT)
    return jnp.exp2(jnp.where(jnp.isfinite(log_unit), log_unit, 0))


def fastest_rate(A: Float[Array, "d d"]) -> Float[Array, ""]:
    """A bound on the moduli of the eigenvalues that is close to the largest, `|A^16|^(1/16)`.

    Gelfand's formula in balanced units: no units of the states and no shear make it large.

    Example:
        >>> import jax.numpy as jnp
        >>> round(float(fastest_rate(jnp.diag(jnp.array([-3.0, -1.0])))), 4)
        3.0
    """
    unit = balancing_units(A)
    A = A * (unit[None] / unit[:, None])
    size = jnp.max(jnp.abs(A))
    size = jnp.where(size > 0, size, 1.0)
    power = A / size
    for _ in range(4):
        power = matmul(power, power)
    return size * jnp.sum(power**2) ** (1.0 / 32.0)
