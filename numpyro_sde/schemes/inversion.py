"""Binomial and Poisson numbers by inversion from their mode, one uniform number for each.

Probabilities are taken off the uniform number in the order mode, mode + 1, mode - 1, mode + 2, ...
until it is used up: an exact draw whose cost is a few standard deviations of the law, all lanes of
a batch together, by the recursion of the probabilities (Kemp 1986, Computational Statistics and
Data Analysis 4, "A modal method for generating binomial variables").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.scipy.special import gammaln
from jaxtyping import Array, Float


def _search(
    u: Array, mode: Array, at_mode: Array, up: Callable[[Array], Array], down: Callable
) -> Array:
    """Find the outcome; `up(k)` and `down(k)` are ratios of probabilities of k + 1, k - 1 to k."""

    def more(carry: Any) -> Array:
        left, above, below, *_ = carry
        return (left >= 0.0) & ((above > 0.0) | (below > 0.0))

    def step(carry: Any) -> Any:
        left, above, below, high, low, found = carry
        above, below = above * up(high), below * down(low)
        high, low = high + 1.0, low - 1.0
        after = left - above
        found = jnp.where(after < 0.0, high, jnp.where(after < below, low, found))
        return after - below, above, below, high, low, found

    start = (u - at_mode, at_mode, at_mode, mode, mode, mode)
    return lax.while_loop(more, step, start)[-1]


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
    log_ways = gammaln(trials + 1.0) - gammaln(mode + 1.0) - gammaln(trials - mode + 1.0)
    log_pmf = log_ways + mode * jnp.log(chance) + (trials - mode) * jnp.log1p(-chance)
    odds = chance / (1.0 - chance)
    found = _search(
        u,
        mode,
        jnp.exp(log_pmf),
        lambda k: jnp.maximum(trials - k, 0.0) / (k + 1.0) * odds,
        lambda k: jnp.maximum(k, 0.0) / ((trials - k + 1.0) * odds),
    )
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
    at_mode = jnp.exp(mode * jnp.log(rate) - rate - gammaln(mode + 1.0))
    found = _search(
        u, mode, at_mode, lambda k: rate / (k + 1.0), lambda k: jnp.maximum(k, 0.0) / rate
    )
    return jnp.where(inside, found, 0.0 * mean)
