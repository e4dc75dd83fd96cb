"""First two moments of NumPyro distributions, as vectors and matrices."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, PRNGKeyArray
from numpyro.distributions import constraints

from numpyro_sde.distributions.missing import peel
from numpyro_sde.linear.ranks import equal_rank

_WIDTH = 1e3  # of a guide's start where nothing tells a scale


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


def is_flat(d: dist.Distribution) -> bool:
    """Whether `d` is the improper law of density 1 on all of space."""
    core, support = _core(d), d.support
    while isinstance(support, type(constraints.independent(constraints.real, 1))):
        support = support.base_constraint
    return isinstance(core, dist.ImproperUniform) and support in (
        constraints.real,
        constraints.real_vector,
    )


def draw_start(
    d: dist.Distribution, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()
) -> Array:
    """Draw first states. A flat law has none: an error, or NaN where the key is traced.

    A traced run may only look at shapes, as the search for a model's paths does.

    Raises:
        ValueError: a flat law.
    """
    if not is_flat(d):
        return jnp.asarray(d.sample(key, sample_shape))
    if not isinstance(key, jax.core.Tracer):
        raise ValueError(
            "init is flat (ImproperUniform), so no path can be drawn from it: give init a proper "
            "law to simulate, or draw the path given data"
        )
    return jnp.full(sample_shape + d.batch_shape + d.event_shape, jnp.nan)


def has_moments(d: dist.Distribution) -> bool | None:
    """Whether `d` has a mean and a variance: None where parameters that are traced decide it."""
    core = _core(d)
    if is_gaussian(d):
        return True
    if isinstance(core, dist.Cauchy | dist.HalfCauchy | dist.ImproperUniform):
        return False
    with jax.ensure_compile_time_eval():
        try:
            found = [core.mean, core.variance]
        except (NotImplementedError, AttributeError):
            return False
        freedom: Any = getattr(core, "df", 3.0)  # Student's t has a variance above two degrees
        if isinstance(freedom, jax.core.Tracer):
            return None
        known = [v for v in found if not isinstance(v, jax.core.Tracer)]
        return bool(np.all(freedom > 2)) and all(bool(np.all(np.isfinite(v))) for v in known)


StartKind = Literal["normal", "flat", "moments", "none"]
"""What is known of a first state: its normal law, a fixed one among these; nothing, all states
being alike; a mean and a covariance; a law without them."""


def start_kind(d: dist.Distribution) -> StartKind:
    """Of what kind the law of a first state is."""
    if is_gaussian(d):
        return "normal"
    if is_flat(d):
        return "flat"
    return "none" if has_moments(d) is False else "moments"


def start_moments(d: dist.Distribution, event_dim: int, kind: StartKind) -> tuple[Array, Array]:
    """Mean and covariance of a first state; of a law without, a place and a width for a guide."""
    if kind in ("normal", "moments"):
        return mean_and_cov(d, event_dim)
    shape = d.batch_shape + d.event_shape
    center, width = jnp.zeros(shape), jnp.full(shape, _WIDTH)
    core: Any = _core(d)
    if hasattr(core, "loc") and hasattr(core, "scale"):
        center, width = (jnp.broadcast_to(v, shape) for v in (core.loc, core.scale))
    vector = center if event_dim else center[..., None]
    sd = width if event_dim else width[..., None]
    variance, one = equal_rank(sd[..., :, None] ** 2, jnp.eye(sd.shape[-1]))
    return vector, variance * one


def is_exact(d: dist.Distribution) -> bool:
    """Whether `d` is a point mass."""
    return isinstance(_core(d), dist.Delta)


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
    rows, eye = equal_rank(variance[..., :, None], jnp.eye(size, dtype=variance.dtype))
    return mean, rows * eye
