"""First two moments of NumPyro distributions, as vectors and matrices."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array

from numpyro_sde.distributions.missing import peel


def _core(d: Any) -> Any:
    while isinstance(d, dist.Independent | dist.ExpandedDistribution):
        d = d.base_dist
    return d


def is_gaussian(d: dist.Distribution) -> bool:
    """Whether `d` is normal, or a point mass."""
    core = _core(d)
    return isinstance(
        core,
        dist.Normal | dist.MultivariateNormal | dist.LowRankMultivariateNormal | dist.Delta,
    )


def has_independent_components(d: dist.Distribution) -> bool:
    """Whether the components of one event are independent."""
    return peel(_core(d)).event_dim == 0 or isinstance(_core(d), dist.Delta)


def mean_and_cov(d: dist.Distribution, event_dim: int) -> tuple[Array, Array]:
    """Mean and covariance of `d`, the last `event_dim` dimensions flattened into a vector.

    Args:
        d: a distribution with mean and variance; correlated ones must be multivariate normal.
        event_dim: how many trailing dimensions of batch and event shape are one vector, 0
            (a vector of length 1) or 1.

    Returns:
        Mean of shape `(*batch, p)` and covariance of shape `(*batch, p, p)`.
    """
    shape = d.batch_shape + d.event_shape
    lead = shape[: len(shape) - event_dim]
    size = 1
    for n in shape[len(shape) - event_dim :]:
        size *= n
    mean = jnp.broadcast_to(jnp.asarray(d.mean), shape).reshape((*lead, size))
    core = _core(d)
    if core.event_dim == 1 and hasattr(core, "covariance_matrix"):
        cov = jnp.asarray(core.covariance_matrix)
        block = core.event_shape[0]
        if block != size:
            raise ValueError(
                f"an observation of shape {shape} is several multivariate normals; write one "
                "multivariate normal, or several observe statements"
            )
        return mean, jnp.broadcast_to(cov, (*lead, size, size))
    variance = jnp.broadcast_to(jnp.asarray(d.variance), shape).reshape((*lead, size))
    return mean, variance[..., :, None] * jnp.eye(size, dtype=variance.dtype)
