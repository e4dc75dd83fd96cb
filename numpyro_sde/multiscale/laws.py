"""Nodes and weights of a NumPyro distribution, so that an average over it is a finite sum.

Laws made from normal variables map a rule's points for the standard normal law; a mixture takes
the nodes of its components; any other scalar law with a quantile function maps a rule on (0, 1).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array

from numpyro_sde.linear.ranks import equal_rank
from numpyro_sde.multiscale.rules import AbstractRule, Coordinatewise, MonteCarlo, default_rule


def law_nodes(law: Any, rule: AbstractRule | None) -> tuple[Array, Array]:
    """Points `(L, *event)` and weights `(L,)` that average functions of one variable of this law.

    Args:
        law: a distribution of batch shape `()`.
        rule: a rule, or None for the default of the law's dimension.

    Raises:
        TypeError: not a distribution, or one of a kind that has no nodes with this rule.
        ValueError: a law with batch dimensions.

    Example:
        >>> import numpyro.distributions as dist
        >>> from numpyro_sde.multiscale.laws import law_nodes
        >>> y, weights = law_nodes(dist.Exponential(2.0), None)
        >>> round(float((weights * y**2).sum()), 3)  # 2 / 2^2
        0.5
    """
    if not isinstance(law, dist.Distribution):
        raise TypeError(f"invariant must return a NumPyro distribution, got {type(law).__name__}")
    if law.batch_shape:
        raise ValueError(
            f"invariant must return the law of one fast state, with batch shape (), got "
            f"{law.batch_shape}: use to_event for a vector"
        )
    if isinstance(rule, MonteCarlo):
        if not law.has_rsample:
            raise TypeError(
                f"{type(law).__name__} has no reparametrised draws, so that gradients would not "
                "reach its parameters: use fixed nodes (quadrature=32)"
            )
        draws = law.rsample(rule.key, (rule.num_draws,))
        return draws, jnp.full(rule.num_draws, 1.0 / rule.num_draws, draws.dtype)
    return _nodes(law, rule)


def _nodes(law: Any, rule: AbstractRule | None) -> tuple[Array, Array]:
    """Nodes of shape `(L, *batch, *event)`: coordinates of a batch are taken jointly."""
    if isinstance(law, dist.Independent):
        return _nodes(law.base_dist, rule)
    if isinstance(law, dist.ExpandedDistribution):
        # The coordinates of an expanded law are independent: the joint nodes need all of them.
        if isinstance(law.base_dist, dist.Normal):
            base = law.base_dist
            loc, scale = (jnp.broadcast_to(a, law.batch_shape) for a in (base.loc, base.scale))
            return _nodes(dist.Normal(loc, scale), rule)
        if not law.batch_shape:
            return _nodes(law.base_dist, rule)
    if isinstance(law, dist.Delta):
        return jnp.asarray(law.v)[None], jnp.ones(1, jnp.result_type(float))
    if isinstance(law, dist.Normal):
        points, weights = _standard(law.batch_shape, rule)
        loc, scale, points = equal_rank(jnp.asarray(law.loc), jnp.asarray(law.scale), points)
        return loc + scale * points, weights
    if isinstance(law, dist.MultivariateNormal) and not law.batch_shape:
        points, weights = _standard(law.event_shape, rule)
        chosen = default_rule(law.event_shape[0]) if rule is None else rule
        return law.loc + chosen.spread(points, law.scale_tril), weights
    if isinstance(law, dist.TransformedDistribution):
        if isinstance(rule, Coordinatewise) and math.prod(law.event_shape) > 1:
            raise TypeError(
                "quadrature=Coordinatewise is for normal laws, whose marginals it knows: use "
                "QuasiMonteCarlo for a transformed one"
            )
        points, weights = _nodes(law.base_dist, rule)
        for transform in law.transforms:
            points = transform(points)
        return points, weights
    if isinstance(law, dist.MixtureSameFamily) and law.component_distribution.event_shape == ():
        return _mixture(law, rule)
    if law.batch_shape == law.event_shape == () and not law.is_discrete:
        return _quantiles(law, rule)
    raise TypeError(
        f"invariant returns a {type(law).__name__}, which has no fixed nodes: give a law made from "
        "normal variables, a scalar law with a quantile function, or "
        "quadrature=nsde.multiscale.MonteCarlo(...)"
    )


def _standard(shape: tuple[int, ...], rule: AbstractRule | None) -> tuple[Array, Array]:
    size = math.prod(shape)
    points, weights = (default_rule(size) if rule is None else rule).normal(size)
    dtype = jnp.result_type(float)
    return jnp.asarray(points.reshape(-1, *shape), dtype), jnp.asarray(weights, dtype)


def _mixture(law: Any, rule: AbstractRule | None) -> tuple[Array, Array]:
    component = law.component_distribution
    one = [jax.tree.map(lambda a, i=i: a[i], component) for i in range(law.mixture_size)]
    for law_of_one in one:
        law_of_one._batch_shape = ()
    parts = [_nodes(c, rule) for c in one]
    probs = law.mixing_distribution.probs
    points = jnp.concatenate([y for y, _ in parts])
    return points, jnp.concatenate([probs[i] * w for i, (_, w) in enumerate(parts)])


def _quantiles(law: Any, rule: AbstractRule | None) -> tuple[Array, Array]:
    unit, weights = (default_rule(1) if rule is None else rule).unit()
    dtype = jnp.result_type(float)
    # Nodes nearer to an end than the dtype resolves carry no weight that matters.
    edge = jnp.finfo(dtype).eps
    try:
        points = law.icdf(jnp.clip(jnp.asarray(unit, dtype), edge, 1.0 - edge))
    except (NotImplementedError, ImportError):  # some quantile functions need another package
        raise TypeError(
            f"invariant returns a {type(law).__name__}, which has no quantile function: give "
            "nsde.multiscale.UnnormalizedDensity(log_density, low, high)"
        ) from None
    return points, jnp.asarray(weights, dtype)
