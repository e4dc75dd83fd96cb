"""Binomial and Poisson numbers by inversion from their mode, one uniform number for each.

Probabilities are taken off the uniform number in the order mode, mode + 1, mode - 1, mode + 2, ...
until it is used up: an exact draw whose cost is a few standard deviations of the law, all lanes of
a batch together, by the recursion of the probabilities (Kemp 1986, Computational Statistics and
Data Analysis 4, "A modal method for generating binomial variables").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# Outcomes looked at between two questions whether all lanes of a batch are done.
_STRIDE = 2
_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
# log k! less Stirling's formula for it, where a series in 1 / k is not accurate.
_ERRORS = [0.0] + [
    math.lgamma(k + 1.0) - (k + 0.5) * math.log(k) + k - _HALF_LOG_2PI for k in range(1, 16)
]


def _search(
    u: Array, mode: Array, at_mode: Array, ratios: Callable[[Array, Array], tuple[Array, Array]]
) -> Array:
    """Find the outcome, by the ratios of probabilities of high + 1 to high and low - 1 to low."""

    def more(carry: Any) -> Array:
        left, above, below, *_ = carry
        return (left >= 0.0) & ((above > 0.0) | (below > 0.0))

    def look(carry: Any) -> Any:
        left, above, below, high, low, found = carry
        up, down = ratios(high, low)
        above, below = above * up, below * down
        high, low = high + 1.0, low - 1.0
        after = left - above
        now = jnp.where(after < 0.0, high, jnp.where(after < below, low, found))
        return after - below, above, below, high, low, jnp.where(left < 0.0, found, now)

    def stride(carry: Any) -> Any:
        for _ in range(_STRIDE):
            carry = look(carry)
        return carry

    start = (u - at_mode, at_mode, at_mode, mode, mode, mode)
    return lax.while_loop(more, stride, start)[-1]


def _stirling_error(k: Array) -> Array:
    """`log k!` less Stirling's formula; 0 at 0."""
    known = jnp.asarray(_ERRORS, k.dtype)[jnp.clip(k, 0.0, 15.0).astype(jnp.int32)]
    r = 1.0 / jnp.maximum(k, 1.0)
    square = r * r
    series = r * (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square / 1680)))
    return jnp.where(k < 16.0, known, series)


def _deviance(k: Array, mean: Array) -> Array:
    """`k log(k / mean) + mean - k`, without the cancellation where both are close."""
    d = jnp.maximum((k - mean) / mean, -1.0)
    log = jnp.log1p(jnp.where(d > -1.0, d, 0.0))
    return mean * jnp.where(d > -1.0, (1.0 + d) * log - d, 1.0)


def binomial(u: Float[Array, ""], n: Float[Array, ""], p: Float[Array, ""]) -> Float[Array, ""]:
    """A binomial number from a uniform one.

    Args:
        u: uniform number in [0, 1).
        n: number of trials, a whole number.
        p: probability, in [0, 1].

    Returns:
        A whole number as a float; NaN where n or p is.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.schemes.inversion import binomial
        >>> [float(binomial(jnp.array(u), 4.0, 0.5)) for u in (0.1, 0.5, 0.99)]
        [2.0, 3.0, 0.0]
    """
    u, n, p = (jnp.asarray(v, jnp.result_type(u)) for v in (u, n, p))
    inside = (p > 0.0) & (p < 1.0) & (n > 0.0)
    chance = jnp.where(inside, p, 0.5)
    trials = jnp.where(inside, n, 1.0)
    mode = jnp.floor((trials + 1.0) * chance)
    rest = trials - mode
    # By Loader (2000), "Fast and accurate computation of binomial probabilities": no digits are
    # lost to the size of log n!.
    error = _stirling_error(trials) - _stirling_error(mode) - _stirling_error(rest)
    deviance = _deviance(mode, trials * chance) + _deviance(rest, trials * (1.0 - chance))
    both = (mode > 0.0) & (rest > 0.0)
    spread = jnp.where(both, trials / (2.0 * math.pi * jnp.where(both, mode * rest, 1.0)), 1.0)
    odds = chance / (1.0 - chance)

    def ratios(high: Array, low: Array) -> tuple[Array, Array]:
        above, below = high + 1.0, (trials - low + 1.0) * odds
        inverse = 1.0 / (above * below)
        up = jnp.maximum(trials - high, 0.0) * odds * below * inverse
        return up, jnp.maximum(low, 0.0) * above * inverse

    at_mode = jnp.exp(error - deviance) * jnp.sqrt(spread)
    found = _search(u, mode, at_mode, ratios)
    return jnp.where(inside, found, jnp.where(p > 0.0, n * p, 0.0 * n * p))


def poisson(u: Float[Array, ""], mean: Float[Array, ""]) -> Float[Array, ""]:
    """A Poisson number from a uniform one.

    Args:
        u: uniform number in [0, 1).
        mean: its mean, not negative.

    Returns:
        A whole number as a float; NaN where the mean is.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.schemes.inversion import poisson
        >>> [float(poisson(jnp.array(u), 2.5)) for u in (0.1, 0.3, 0.999)]
        [2.0, 3.0, 9.0]
    """
    u, mean = jnp.asarray(u), jnp.asarray(mean, jnp.result_type(u))
    inside = mean > 0.0
    rate = jnp.where(inside, mean, 1.0)
    mode = jnp.floor(rate)
    spread = jnp.where(mode > 0.0, 2.0 * math.pi * mode, 1.0)
    at_mode = jnp.exp(-_stirling_error(mode) - _deviance(mode, rate)) / jnp.sqrt(spread)

    def ratios(high: Array, low: Array) -> tuple[Array, Array]:
        return rate / (high + 1.0), jnp.maximum(low, 0.0) / rate

    found = _search(u, mode, at_mode, ratios)
    return jnp.where(inside, found, 0.0 * mean)
