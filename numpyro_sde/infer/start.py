"""Where chains begin: the mode of a model whose paths are integrated out approximately."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.scipy.optimize import minimize
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro.infer.initialization import init_to_median
from numpyro.infer.util import initialize_model, potential_energy

from numpyro_sde.filters.extended import ExtendedKalman
from numpyro_sde.filters.forward import Forward
from numpyro_sde.filters.regimes import IMM
from numpyro_sde.handlers import marginalize, observed_paths
from numpyro_sde.models.arguments import released, with_data_as_arguments
from numpyro_sde.runtime.entry import entry_point
from numpyro_sde.statespace.model import AbstractFilter, StateSpaceModel

# Scale of a proposal in a direction where the approximation says nothing, unconstrained.
_PLAIN_SCALE = 0.1
# Step of the difference of gradients behind the curvature: unconstrained, so of unit scale.
_DIFFERENCE = 1e-2
# About its minimum a quadratic surface rises by half a nat over one standard deviation; one that
# rises by so much more, or falls by so much, has no curvature to speak of.
_MOST_RISE, _MOST_FALL = 4.0, 1.0


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
    """Find mode and curvature by a filter with a gradient, from the prior's median.

    The extended Kalman filter; that of hidden regimes, or of a Markov jump process, where the paths
    are such. Where all refuse the model, or its likelihood is not finite, the median is the start
    and the covariance a small multiple of the unit matrix. So it is in directions in which the
    likelihood does not rise as its curvature says: a filter that loses a spiking neuron jumps by
    hundreds of nats from one parameter value to the next. It can be traced; outside a trace the
    search runs on the host, for which one gradient is all that has to be compiled.

    Returns:
        The start, and what turns unconstrained draws into constrained ones.

    Raises:
        ValueError: the model observes no latent path.
    """
    if not observed_paths(model, args, kwargs):
        raise ValueError("the model has no latent SDEPath site, nor a JumpPath, that it observes")
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
    flat, _ = ravel_pytree(z)
    found = flat, _PLAIN_SCALE * jnp.eye(flat.shape[0], dtype=flat.dtype)
    for method in (ExtendedKalman(), IMM(ExtendedKalman()), Forward()):
        try:
            search = partial(_search, model, method=method, z=z)
            found = with_data_as_arguments(model, args, kwargs, search)
            break
        except (ValueError, TypeError):
            continue  # refused by name: not a model for this filter
    return Start(ravel_pytree(z)[1](found[0]), found[1]), info.postprocess_fn


@entry_point
def _potential_and_slope(
    model: Callable[..., Any], arguments: Any, method: AbstractFilter, z: dict[str, Array]
) -> tuple[Array, dict[str, Array]]:
    """Minus the log density of unconstrained values with paths integrated out, and its gradient."""
    value, slope = jax.value_and_grad(_potential(model, arguments, method))(z)
    return value, slope


def _potential(
    model: Callable[..., Any], arguments: Any, method: AbstractFilter
) -> Callable[[dict[str, Array]], Array]:
    args, kwargs = released(arguments)
    approximate = marginalize(model, method=method)
    return lambda z: potential_energy(approximate, args, kwargs, z)


def _search(
    model: Callable[..., Any], arguments: Any, method: AbstractFilter, z: dict[str, Array]
) -> tuple[Array, Array]:
    flat, back = ravel_pytree(z)

    def both(flat: Array) -> tuple[Array, Array]:
        value, slope = _potential_and_slope(model, arguments, method, back(flat))
        return value, ravel_pytree(slope)[0]

    if isinstance(both(flat)[0], jax.core.Tracer):
        potential = _potential(model, arguments, method)
        return jax.jit(lambda flat: _descend(lambda x: potential(back(x)), flat))(flat)
    return _descend_on_host(both, flat)


def _descend_on_host(both: Callable[..., Any], flat: Array) -> tuple[Array, Array]:
    start = np.asarray(flat, np.float64)

    def at(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = both(jnp.asarray(x, flat.dtype))
        value = float(value)
        finite = np.isfinite(value)
        return (value if finite else 1e30), np.nan_to_num(np.asarray(slope, np.float64))

    from scipy import optimize  # slow to import

    found = optimize.minimize(at, start, jac=True, method="L-BFGS-B")
    plain = _PLAIN_SCALE * jnp.eye(start.size, dtype=flat.dtype)
    if not (np.isfinite(found.fun) and found.fun < 1e30):
        return flat, plain
    rows = [
        (at(found.x + step)[1] - at(found.x - step)[1]) / (2.0 * _DIFFERENCE)
        for step in _DIFFERENCE * np.eye(start.size)
    ]
    hessian = 0.5 * (np.array(rows) + np.array(rows).T)
    if not np.all(np.isfinite(hessian)):
        return jnp.asarray(found.x, flat.dtype), plain
    mode, covariance = _checked(
        found.x,
        start,
        found.jac,
        hessian,
        lambda x: np.array([at(p)[0] for p in x]) - found.fun,
        np,
    )
    return jnp.asarray(mode, flat.dtype), jnp.asarray(np.linalg.cholesky(covariance), flat.dtype)


def _checked(
    mode: Any, start: Any, slope: Any, hessian: Any, rise: Callable[[Any], Any], xp: Any
) -> tuple[Any, Any]:
    """Mode and covariance; plain in directions in which the surface does not rise as it should.

    Where there is no other direction the mode is a ripple, and the start as good.

    Args:
        mode: where the search ended, `(D,)`.
        start: where it began, `(D,)`.
        slope: gradient of the potential at the mode, `(D,)`.
        hessian: its second derivatives there, `(D, D)`.
        rise: takes points `(K, D)`; returns the potential there less the mode's, NaN or large where
            it is not finite.
        xp: numpy, or jax.numpy in a trace.
    """
    values, vectors = xp.linalg.eigh(hessian)
    # Directions in which the approximation is flat or concave get the prior's unit scale.
    precisions = xp.maximum(values, 1.0)
    steps = (vectors / xp.sqrt(precisions)[None]).T
    rises = rise(xp.concatenate([mode[None] + steps, mode[None] - steps])).reshape(2, -1)
    believed = xp.all((rises <= _MOST_RISE) & (rises >= -_MOST_FALL), axis=0)
    believed &= xp.abs(steps @ slope) <= _MOST_FALL
    variances = xp.where(believed, 1.0 / precisions, _PLAIN_SCALE**2)
    return xp.where(xp.any(believed), mode, start), (vectors * variances[None]) @ vectors.T


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
    lowest, slope = jax.value_and_grad(guarded)(mode)
    hessian = jax.hessian(potential)(mode)
    mode, covariance = _checked(
        mode, flat, slope, hessian, lambda x: jax.vmap(guarded)(x) - lowest, jnp
    )
    factor = jnp.linalg.cholesky(covariance)
    plain = _PLAIN_SCALE * jnp.eye(dim, dtype=flat.dtype)
    return mode, jnp.where(jnp.all(jnp.isfinite(factor)) & better, factor, plain)
