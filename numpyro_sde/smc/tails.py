"""How heavy the tail of importance weights is."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

# Fewer weights than this in the tail tell nothing of it.
_LEAST = 5


def pareto_shape(weights: Float[Array, " M"]) -> Float[Array, ""]:
    """Shape k of a generalised Pareto law fitted to the largest weights: their tail index.

    Below 0.5 their variance is finite, above 0.7 an estimate made of them is not to be trusted
    however large its effective size looks. 0 where all weights are equal, NaN for fewer than 25.

    Source: Zhang and Stephens (2009) for the fit; Vehtari, Simpson, Gelman, Yao and Gabry (2024),
    "Pareto smoothed importance sampling", for the size of the tail and the prior.

    Args:
        weights: weights of any scale, `(M,)`.

    Example:
        >>> import jax
        >>> u = jax.random.uniform(jax.random.key(0), (100_000,))
        >>> bool(abs(pareto_shape(u**-0.8) - 0.8) < 0.2)  # P(w > t) = t^(-1 / 0.8)
        True
    """
    M = weights.shape[0]
    n = math.ceil(min(0.2 * M, 3.0 * math.sqrt(M)))
    if n < _LEAST:
        return jnp.full((), jnp.nan, weights.dtype)
    ordered = jnp.sort(weights)
    largest = ordered[-1]
    scale = jnp.where(largest > 0, largest, 1.0)
    x = (ordered[M - n :] - ordered[M - n - 1]) / scale
    even = x[-1] <= 0
    x = jnp.where(even, 1.0, jnp.maximum(x, jnp.finfo(x.dtype).tiny))
    grid = 30 + math.isqrt(n)
    j = jnp.arange(1, grid + 1, dtype=x.dtype)
    b = (1.0 - jnp.sqrt(grid / (j - 0.5))) / (3.0 * x[math.floor(n / 4 + 0.5) - 1]) + 1.0 / x[-1]
    k = jnp.mean(jnp.log1p(-b[:, None] * x[None]), axis=1)
    profile = n * (jnp.log(-b / k) - k - 1.0)
    profile = jnp.where(jnp.isnan(profile), -jnp.inf, profile)
    share = jnp.exp(profile - jnp.max(profile))
    at = jnp.sum(b * share) / jnp.sum(share)
    shape = (n * jnp.mean(jnp.log1p(-at * x)) + 5.0) / (n + 10.0)
    return jnp.where(even, 0.0, shape)
