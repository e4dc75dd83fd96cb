"""Estimates of one likelihood again and again: random numbers kept in part, spread and level."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray
from scipy.special import logsumexp

from numpyro_sde.infer.racing import (
    LikelihoodEstimator,
    RegimeEstimator,
    estimated_log_density,
)
from numpyro_sde.models.arguments import released
from numpyro_sde.runtime.entry import Held, entry_point


def spread_and_level(
    values: Float[np.ndarray, "J R 2"],
) -> tuple[Float[np.ndarray, " J"], Float[np.ndarray, " J"]]:
    """Standard deviation of an estimate at each point, and the log of its mean likelihood."""
    with np.errstate(invalid="ignore", divide="ignore"):
        sds = np.sqrt(np.mean(np.diff(values, axis=2) ** 2, axis=(1, 2)) / 2.0)
        levels = logsumexp(values, axis=(1, 2)) - np.log(values[0].size)
    return np.where(np.isfinite(sds), sds, np.inf), levels


def fresh(key: PRNGKeyArray, correlation: float) -> PRNGKeyArray:
    """Random numbers of an estimate, by stretches of time."""
    if correlation == 0:
        return key
    # As many stretches as keep the wanted share when about one of them is renewed.
    return jax.random.split(key, int(np.ceil(1.0 / (1.0 - correlation))))


def renewed(
    key: PRNGKeyArray, kept: PRNGKeyArray, fresh: PRNGKeyArray, correlation: float
) -> PRNGKeyArray:
    """Random numbers of a proposal: all fresh, or some stretches of them."""
    if correlation == 0:
        return fresh
    renew = jax.random.bernoulli(key, 1.0 - correlation, fresh.shape)
    fresh, kept = jax.random.key_data(fresh), jax.random.key_data(kept)
    return jax.random.wrap_key_data(jnp.where(renew[:, None], fresh, kept))


@entry_point
def pairs(
    model: Callable[..., Any],
    arguments: Any,
    method: LikelihoodEstimator | RegimeEstimator,
    correlation: Held,
    points: dict[str, Array],
    keys: PRNGKeyArray,
) -> Float[Array, "J 2"]:
    """Two estimates at each point that could follow one another in a chain."""
    args, kwargs = released(arguments)

    def pair(point: dict[str, Array], key: PRNGKeyArray) -> Array:
        keep_key, *two = jax.random.split(key, 3)
        first, other = (fresh(k, correlation.value) for k in two)
        second = renewed(keep_key, first, other, correlation.value)
        each = [method.with_key(k) for k in (first, second)]
        return jnp.stack([estimated_log_density(model, m, point, args, kwargs) for m in each])

    return lax.map(lambda a: pair(*a), (points, keys))
