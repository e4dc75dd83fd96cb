"""Where chains begin: the mode of a model whose paths are integrated out approximately."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.scipy.optimize import minimize
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro.infer.initialization import init_to_median
from numpyro.infer.util import initialize_model, potential_energy

from numpyro_sde.filters.extended import ExtendedKalman
from numpyro_sde.filters.model import AbstractFilter, StateSpaceModel
from numpyro_sde.handlers import marginalize, observed_paths

# Scale of a proposal in a direction where the approximation says nothing, unconstrained.
_PLAIN_SCALE = 0.1


class _NoData(AbstractFilter):
    """Makes nothing of the data: enough to find a model's sites, supports and prior medians."""

    def log_likelihood(self, model: StateSpaceModel) -> Float[Array, ""]:
        return jnp.zeros((), model.init_mean.dtype)


class Start(NamedTuple):
    """Where to begin, in unconstrained coordinates.

    Attributes:
        z: values by site, paths left out.
        factor: lower Cholesky factor of a covariance there, the sites in the order of
            `ravel_pytree(z)`.
    """

    z: dict[str, Array]
    factor: Float[Array, "D D"]


def approximate_mode(
    model: Callable[..., Any], args: Any, kwargs: Any, key: PRNGKeyArray
) -> tuple[Start, Callable[..., Any]]:
    """Find mode and curvature by the extended Kalman filter, from the prior's median.

    Where the filter refuses the model, or its likelihood is not finite, the median is the start
    and the covariance a small multiple of the unit matrix. All of it can be traced.

    Returns:
        The start, and what turns unconstrained draws into constrained ones.

    Raises:
        ValueError: the model observes no latent path.
    """
    if not observed_paths(model, args, kwargs):
        raise ValueError("the model has no latent SDEPath site that it observes")
    info = initialize_model(
        key,
        marginalize(model, method=_NoData()),
        init_strategy=init_to_median(num_samples=15),
        dynamic_args=True,
        model_args=args,
        model_kwargs=kwargs,
        validate_grad=False,
    )
    z = info.param_info.z
    flat, back = ravel_pytree(z)
    approximate = marginalize(model, method=ExtendedKalman())

    def potential(flat: Array) -> Array:
        return potential_energy(approximate, args, kwargs, back(flat))

    try:
        mode, factor = jax.jit(lambda flat: _descend(potential, flat))(flat)
    except (ValueError, TypeError):
        mode, factor = flat, _PLAIN_SCALE * jnp.eye(flat.shape[0], dtype=flat.dtype)
    return Start(back(mode), factor), info.postprocess_fn


def _descend(potential: Callable[[Array], Array], flat: Array) -> tuple[Array, Array]:
    dim = flat.shape[0]

    def guarded(x: Array) -> Array:
        value = potential(x)
        return jnp.where(jnp.isfinite(value), value, jnp.inf)

    first = guarded(flat)
    # Scaled, so that the first step of the search, along the gradient, is not huge.
    scale = 1.0 + jnp.linalg.norm(jax.grad(guarded)(flat))
    scale = jnp.where(jnp.isfinite(scale), scale, 1.0)
    found = minimize(lambda x: guarded(x) / scale, flat, method="BFGS", options={"maxiter": 200})
    better = jnp.isfinite(found.fun) & jnp.all(jnp.isfinite(found.x)) & (found.fun * scale <= first)
    mode = jnp.where(better, found.x, flat)
    values, vectors = jnp.linalg.eigh(jax.hessian(potential)(mode))
    # Directions in which the approximation is flat or concave get the prior's unit scale.
    covariance = (vectors / jnp.maximum(values, 1.0)) @ vectors.T
    factor = jnp.linalg.cholesky(covariance)
    plain = _PLAIN_SCALE * jnp.eye(dim, dtype=flat.dtype)
    return mode, jnp.where(jnp.all(jnp.isfinite(factor)) & better, factor, plain)
