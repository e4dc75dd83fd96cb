"""Coefficients of an Ornstein-Uhlenbeck sum that approximates the path of an fBM.

`B_t ~ sum_k w_k (Y_k(t) - Y_k(0))`, `dY_k = -rate_k Y_k dt + dW`, with the W that makes B: the
weights minimise `int_0^T E (B - sum)^2 dt`, a linear system `A w = b` (Daems et al. 2024). Here
for the kernel `(t - u)^(H - 1/2) / Gamma(H + 1/2)`: kind 1 has variance
`t^2H / (Gamma(2H + 1) sin pi H)`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln
from jaxtyping import Array, ArrayLike, Float

from numpyro_sde.linear.small import diagonal
from numpyro_sde.noise.covariances import excess_of_exponential, power

_SERIES_BELOW, _SERIES_TERMS = 2.0, 24
_ODD = np.arange(3.0, 27.0, 2.0)  # (2n + 3)! is the product of _ODD (_ODD - 1)
_SLOWEST = 1e-8  # rate, in 1 / horizon
_PANELS, _NODES = (0.0, 1.0, 3.0, 7.0, 14.0, 40.0), 14


def _scaled_upper_gamma(a: Array, x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """`e^x Gamma(a, x)` for x not near zero: `int_0^inf e^-v (x + v)^(a - 1) dv`."""
    points, mass = np.polynomial.legendre.leggauss(_NODES)
    ends = np.asarray(_PANELS)
    width = np.diff(ends)[:, None]
    v = (ends[:-1, None] + width * (points + 1.0) / 2.0).ravel()
    weight = (width * mass / 2.0).ravel() * np.exp(-v)
    return x ** (a - 1.0) * (
        weight[None] * jnp.exp((a - 1.0) * jnp.log1p(v[None] / x[:, None]))
    ).sum(-1)


class StrongSystem(NamedTuple):
    """`A w = b`; the mean squared error at the optimum is `(c - b . w) / T`."""

    A: Float[Array, "K K"]
    b: Float[Array, " K"]
    c: Float[Array, ""]


def strong_system(
    rates: Float[Array, " K"], hurst: ArrayLike, horizon: ArrayLike, kind: int
) -> StrongSystem:
    """Normal equations of the L2-optimal weights.

    Args:
        rates: mean reversions, 1/time.
        hurst: Hurst index.
        horizon: T.
        kind: 1 or 2.

    Example:
        >>> import jax.numpy as jnp
        >>> system = strong_system(jnp.array([0.1, 1.0, 10.0]), 0.3, 1.0, 1)
        >>> bool(jnp.linalg.solve(system.A, system.b) @ system.b < system.c)
        True
    """
    h, T = jnp.asarray(hurst), jnp.asarray(horizon)
    a, x = h + 0.5, rates * T
    gamma_a = jnp.exp(gammaln(a))
    # The weights magnify errors of the entries by a condition of 1e7 and more: no entry may
    # cancel. Rates slow against the horizon by series, `x^n / Gamma(a + 2 + n)`.
    near = x < _SERIES_BELOW
    s, f = jnp.where(near, x, 1.0), jnp.where(near, _SERIES_BELOW, x)
    n = np.arange(_SERIES_TERMS)
    series = a * (a + 1.0) * gamma_a * jnp.cumprod((a + 1.0 + n).at[0].set(1.0))
    terms = s[:, None] ** n[None] / series[None]
    upper = _scaled_upper_gamma(a, f) / gamma_a
    if kind == 1:
        each = x * excess_of_exponential(x)
        A = (each[:, None] + each[None]) / (x[:, None] + x[None])
        odd = np.cumprod(_ODD * (_ODD - 1.0))[None]
        cubes = s[:, None] ** (2 * n[None, : _ODD.size]) / odd
        slow = terms.sum(-1) - 2.0 * s ** (2.0 - a) * cubes.sum(-1)
        fast = 2.0 * f + jnp.exp(-f) - upper - f**a / (a * gamma_a)
        c = jnp.exp(-gammaln(2.0 * h + 1.0)) / jnp.sin(math.pi * h) / (2 * h + 1)
    else:
        A = excess_of_exponential(x[:, None] + x[None])
        slow = jnp.exp(-s) * (terms * (n[None] + 1.0)).sum(-1)
        upper = jnp.exp(-f) * upper  # regularised, of a
        of_next = 1.0 - upper - jnp.exp(-f) * f**a / (a * gamma_a)  # 1 less that of a + 1
        fast = f * (1.0 - upper) - a * of_next
        c = 1.0 / (2 * h * (2 * h + 1) * gamma_a**2)
    b = jnp.where(near, slow, fast * f ** (-a - 1.0))
    return StrongSystem(T**2 * A, power(T, a + 1.0) * b, power(T, 2 * h + 1) * c)


def strong_weights(
    rates: Float[Array, " K"], hurst: ArrayLike, horizon: ArrayLike, kind: int
) -> Float[Array, " K"]:
    """L2-optimal weights for these rates, of the kernel `u^(H - 1/2) / Gamma(H + 1/2)`.

    Example:
        >>> import jax.numpy as jnp
        >>> strong_weights(jnp.array([0.1, 1.0, 10.0]), 0.3, 1.0, 2).shape
        (3,)
    """
    system = strong_system(rates, hurst, horizon, kind)
    size = jnp.sqrt(diagonal(system.A))
    return jnp.linalg.solve(system.A / (size[:, None] * size[None]), system.b / size) / size


def strong_nodes(hurst: ArrayLike, num_terms: int, kind: int) -> Float[Array, " K"]:
    """Geometric nodes for horizon 1.

    Kind 1: from `e^(-2.6 sqrt(K) / ((1 - H) A))` to `e^(2.6 sqrt(K) / (H A))` with
    `A = sqrt(1/H + 1/(1 - H))`, the form of the rates of convergence, its constant fitted to the
    optimal ends. Kind 2: Bayer and Breneis (2023, the values fitted to observation),
    `0.65 e^(3.1 H) e^(-1.8 sqrt(N) / ((3/2 - H) A))` and `e^(3 H^-0.4) e^(1.8 sqrt(N) / (H A))`
    with `A = sqrt(1/H + 1/(3/2 - H))`, `N = K - 1`; beyond H = 1/2 those of 1/2.

    Example:
        >>> strong_nodes(0.1, 10, 2).shape
        (10,)
    """
    h = jnp.asarray(hurst, jnp.result_type(float))
    share = np.linspace(0.0, 1.0, num_terms)
    if kind == 1:
        spread = jnp.sqrt(1.0 / h + 1.0 / (1.0 - h))
        reach = 2.6 * math.sqrt(num_terms) / spread
        # With slower processes still the weights cancel by more than 1e4.
        first, last = jnp.maximum(-reach / (1.0 - h), math.log(_SLOWEST)), reach / h
    else:
        h, root = jnp.minimum(h, 0.5), math.sqrt(num_terms - 1.0)
        spread = jnp.sqrt(1.0 / h + 1.0 / (1.5 - h))
        first = math.log(0.65) + 3.1 * h - 1.8 * root / ((1.5 - h) * spread)
        last = 3.0 * h**-0.4 + 1.8 * root / (h * spread)
    return jnp.exp(first * (1.0 - share) + last * share)
