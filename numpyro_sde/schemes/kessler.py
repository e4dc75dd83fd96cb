"""Kessler's Gaussian transition: moments by an Ito-Taylor expansion.

Kessler (1997), Scandinavian Journal of Statistics 24, 211-229.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from numpyro_sde.linear import small
from numpyro_sde.schemes.base import GaussianScheme
from numpyro_sde.schemes.generator import Function, as_point, generator

if TYPE_CHECKING:
    from numpyro_sde.sde import SDE


class Kessler(GaussianScheme):
    r"""Gaussian transition with the mean and covariance of the SDE to a chosen order in `dt`.

    With the generator `G`, `E[g(X_{t+dt})] = sum_j dt^j/j! G^j g(x) + O(dt^{J+1})` (Florens-Zmirou
    1989; Kessler 1997) gives the mean, and the covariance `V = dt L (I + E') L' +
    O(dt^{J+1})`, `E'` a polynomial in `dt`. Its local errors are `O(dt^{J+1})` in both moments;
    `order=1` is Euler's scheme. The law stays Gaussian: of a nonlinear SDE no skewness is kept.

    The truncated `I + E'` need not be positive. Kessler expands its logarithm and its inverse
    instead, which is no probability density; here the covariance is
    `dt L (I + E + E^2/2) L'`, with `E` the expansion of `log(I + E')` to the same order: it agrees
    with the expansion to the order that is kept, is never less than half of Euler's covariance,
    and grows no faster than a polynomial where `dt` is too long for an expansion.

    Time derivatives of the coefficients are included. Do not use it where `dt` is long against
    the time scales of the drift: an expansion in powers of `dt` diverges there, `LocalLinear`
    does not.

    Args:
        order: J, 1 to 3. Each further order differentiates the coefficients twice more.

    Raises:
        ValueError: an order that is not 1, 2 or 3.

    Example:
        >>> import numpyro_sde as nsde
        >>> sde = nsde.SDE(lambda t, x: -x, lambda t, x: 0.5)
        >>> mean, sd = nsde.schemes.Kessler(order=3).moments(sde, 0.0, 0.1, 1.0)
        >>> round(float(mean), 4), round(float(sd), 4)  # exact: 0.9048, 0.1505
        (0.9048, 0.1505)
    """

    order: int = eqx.field(static=True)

    def __init__(self, order: int = 2) -> None:
        if order not in (1, 2, 3):
            raise ValueError(f"order of Kessler must be 1, 2 or 3, got {order!r}")
        self.order = int(order)

    def check(self, sde: SDE, state_shape: tuple[int, ...]) -> None:
        """Refuse fewer noises than states.

        Raises:
            ValueError: the noise of one step does not reach every state.
        """
        structure = sde.structure(state_shape)
        if structure.innovation_shape != state_shape:
            raise ValueError(
                f"Kessler() needs at least as many Brownian motions as states, got a diffusion of "
                f"shape {structure.diffusion_shape}: its expansion starts from Euler's "
                "covariance, which is singular. Use LocalLinear() or Strang()"
            )

    def moments(
        self, sde: SDE, t: Array, dt: Array, x: Array, cache: Any = None
    ) -> tuple[Array, Array]:
        del cache
        t, x = as_point(t, x)
        first, second = _moment_coefficients(sde, t, x, self.order)
        mean = x + sum(c * dt**j for j, c in enumerate(first, start=1))
        factor = sde.noise_factor_at(t, x)
        if self.order == 1:
            return mean, factor * jnp.sqrt(dt)
        # Relative to Euler's covariance: I + sum_k relative[k] dt^(k+1).
        relative = [_whiten(factor, v) for v in second[1:]]
        exponent = jnp.asarray(sum(e * dt**k for k, e in enumerate(_log_series(relative), start=1)))
        if x.ndim == 0:
            growth = 1.0 + exponent + 0.5 * exponent**2
            return mean, factor * jnp.sqrt(dt * growth)
        growth = jnp.eye(x.size) + exponent + 0.5 * exponent @ exponent
        wide = _as_matrix(factor) @ small.cholesky(growth)
        if factor.ndim == 1:  # diagonal times lower triangular: triangular already
            return mean, wide * jnp.sqrt(dt)
        return mean, small.cholesky(wide @ wide.T) * jnp.sqrt(dt)


def _moment_coefficients(
    sde: SDE, t: Array, x: Array, order: int
) -> tuple[list[Array], list[Array]]:
    """Coefficients of dt, dt^2, ... in the mean's increment and in the covariance.

    Second moments are taken around the present state, where they are small: around zero the
    covariance would be a difference of large numbers.
    """

    def second_moment_rate(s: Array, y: Array) -> Array:
        f = sde.ito_drift_at(s, y)
        mixed = jnp.multiply.outer(y - x, f)
        if x.ndim == 0:
            return 2.0 * mixed + sde.noise_factor_at(s, y) ** 2
        columns = sde.diffusion_columns_at(s, y)
        return mixed + mixed.T + columns @ columns.T

    first_fns: list[Function] = [sde.ito_drift_at]
    second_fns: list[Function] = [second_moment_rate]
    for _ in range(order - 1):
        first_fns.append(generator(sde, first_fns[-1]))
        second_fns.append(generator(sde, second_fns[-1]))
    first = [fn(t, x) / math.factorial(j) for j, fn in enumerate(first_fns, start=1)]
    second = [fn(t, x) / math.factorial(j) for j, fn in enumerate(second_fns, start=1)]
    for k in range(1, order):  # the covariance: less the product of the means
        for i in range(k):
            second[k] = second[k] - jnp.multiply.outer(first[i], first[k - 1 - i])
    return first, second


def _whiten(factor: Array, v: Array) -> Array:
    """`L^-1 v L'^-1`, for scalars `v / L^2`."""
    if v.ndim == 0:
        return v / factor**2
    if factor.ndim == 1:
        return v / jnp.multiply.outer(factor, factor)
    return small.solve_lower(factor, small.solve_lower(factor, v).T).T


def _log_series(a: list[Array]) -> list[Array]:
    """Coefficients of `log(I + sum_k a[k] h^(k+1))` to second order in h."""
    if len(a) == 1:
        return a
    square = a[0] ** 2 if a[0].ndim == 0 else a[0] @ a[0]
    return [a[0], a[1] - 0.5 * square]


def _as_matrix(factor: Array) -> Array:
    return jnp.diag(factor) if factor.ndim == 1 else factor
