"""Checks of options and models that the approximate filters share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from numpyro_sde.schemes.base import GaussianScheme
from numpyro_sde.schemes.markov_jumps import ChainEquation
from numpyro_sde.statespace.model import StateSpaceModel

EMISSIONS = ("laplace", "moments")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise a `ValueError` for an option that is not one of `choices`.

    Example:
        >>> check_choice("emission", "laplace", EMISSIONS)
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise for a count that is not an integer of at least `least`.

    Raises:
        TypeError: not an integer.
        ValueError: too small.

    Example:
        >>> check_count("substeps", 4)
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__} {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def typed_key(key: Any) -> PRNGKeyArray:
    """A random key of the new kind, from one of either kind, or an array of them.

    Raises:
        TypeError: no random key.

    Example:
        >>> import jax
        >>> typed_key(jax.random.PRNGKey(0)).shape, typed_key(jax.random.key(0)).shape
        ((), ())
    """
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    if isinstance(key, jax.Array | np.ndarray) and key.dtype == np.uint32 and key.ndim:
        return jax.random.wrap_key_data(jnp.asarray(key))
    raise TypeError(
        f"a random key is needed, as jax.random.key(0) makes, got {type(key).__name__} {key!r}"
    )


def check_brownian(model: StateSpaceModel, method: str, *, continuous: bool = False) -> None:
    """Raise a `ValueError` where the noise has a memory that would be ignored.

    A model that carries the memory in its state will do, but not for a `continuous` method, which
    asks for drift and diffusion.
    """
    carried = model.state_shape is not None and not continuous
    if not (model.sde.noise.independent or carried):
        raise ValueError(
            f"{method} needs an SDE driven by Brownian motion, got noise "
            f"{type(model.sde.noise).__name__}, whose increments depend on the past: use Kalman() "
            "where the SDE is linear, else ExtendedKalman() or Particle()"
        )


def check_gaussian_scheme(model: StateSpaceModel, method: str) -> None:
    """Raise a `ValueError` where the scheme's transition is not Gaussian."""
    if not isinstance(model.scheme, GaussianScheme):
        otherwise = (
            "give the path scheme=Euler(), LocalLinear() or Kessler(), or use MomentMatching() or "
            "EnsembleKalman()"
        )
        raise ValueError(
            f"{method} propagates the mean and covariance of a Gaussian transition, which "
            f"{type(model.scheme).__name__} has not: {model.scheme.remedy(otherwise)}"
        )


def check_moments(model: StateSpaceModel, method: str, emission: str = "laplace") -> None:
    """Raise a `ValueError` where a filter would need moments that a law has not.

    Args:
        model: the model.
        method: what to call the filter.
        emission: what it does with emissions that are not normal, one of `EMISSIONS`.
    """
    if isinstance(model.sde, ChainEquation):
        raise ValueError(
            f"{method} follows the mean and the covariance of real states, which the states of a "
            f"JumpPath are not: {model.scheme.remedy('use Forward()')}"
        )
    if model.init_kind == "flat":
        raise ValueError(
            f"{method} starts from a mean and a covariance, which a flat init (ImproperUniform) "
            "has not: Kalman() takes one exactly, other filters need a proper law such as "
            "dist.Normal(guess, spread)"
        )
    if model.init_kind == "none":
        raise ValueError(
            f"{method} starts from a mean and a covariance, which the law of init has not (a "
            "Cauchy law, Student's t of df <= 2): give init another law, or use Particle()"
        )
    for number, instrument in enumerate(model.instruments):
        if emission == "moments" and instrument.has_moments is False:
            raise ValueError(
                f"{method} with emission='moments' needs the mean and the variance of every "
                f"emission; that of observe statement {number + 1} has none (a Cauchy law, "
                "Student's t of df <= 2): use emission='laplace'"
            )
