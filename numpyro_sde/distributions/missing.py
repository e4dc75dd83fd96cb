"""Log density of an observation with missing components, marked by NaN."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

from numpyro_sde.linear.small import diagonal

_LOG_2PI = 1.8378770664093453


def peel(d: dist.Distribution) -> dist.Distribution:
    """Remove wrappers that only move batch dimensions into the event."""
    while isinstance(d, dist.Independent):
        d = d.base_dist
    return d


def tolerates_partial(d: dist.Distribution) -> bool:
    """Whether single components of one event of `d` may be missing."""
    base = peel(d)
    return base.event_dim == 0 or isinstance(base, dist.MultivariateNormal)


def log_prob_of_present(d: dist.Distribution, y: Array) -> Float[Array, ""]:
    """Log density of the components of `y` that are there, the others integrated out.

    Args:
        d: the law of one observation, batch and event shape together the shape of `y`.
        y: the observation; NaN marks a missing component.

    Returns:
        The log density, 0 where nothing was observed. Where one event of a multivariate law
        other than the normal is missing in part, NaN.
    """
    base = peel(d)
    if not jnp.issubdtype(y.dtype, jnp.floating):
        return jnp.sum(base.log_prob(y))
    missing = jnp.isnan(y)
    if base.event_dim == 0:
        filled = jnp.where(missing, base.support.feasible_like(y), y)
        return jnp.sum(jnp.where(missing, 0.0, _float_log_prob(base, filled)))
    if isinstance(base, dist.MultivariateNormal):
        return jnp.sum(_normal_of_present(base, y, missing))
    axes = tuple(range(-base.event_dim, 0))
    none, some = jnp.all(missing, axis=axes), jnp.any(missing, axis=axes)
    feasible = base.support.feasible_like(y)
    each = base.log_prob(jnp.where(missing, feasible, y))
    return jnp.sum(jnp.where(none, 0.0, jnp.where(some, jnp.nan, each)))


def _float_log_prob(d: dist.Distribution, y: Array) -> Array:
    """Density of counts and labels that came as floats, as columns with NaN do."""
    if not getattr(d.support, "is_discrete", False):
        return d.log_prob(y)
    whole = jnp.round(y)
    return jnp.where(whole == y, d.log_prob(whole.astype(int)), -jnp.inf)


def _normal_of_present(d: Any, y: Array, missing: Array) -> Array:
    # A missing row and column of the covariance becomes that of an independent standard
    # normal observed at its mean; its constant is taken back.
    keep = ~missing
    both = keep[..., :, None] & keep[..., None, :]
    covariance = jnp.where(both, d.covariance_matrix, jnp.eye(y.shape[-1]))
    tril = jnp.linalg.cholesky(covariance)
    residual = jnp.where(keep, y - d.loc, 0.0)
    z = solve_triangular(tril, residual[..., None], lower=True)[..., 0]
    log_det = jnp.sum(jnp.log(diagonal(tril)), -1)
    count = jnp.sum(keep, -1)
    return -0.5 * jnp.sum(z**2, -1) - log_det - 0.5 * _LOG_2PI * count
