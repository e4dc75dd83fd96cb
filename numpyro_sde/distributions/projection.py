"""Paths of reaction networks on bounded counts, as paths on finitely many states."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array

from numpyro_sde.distributions.jump_path import JumpPath
from numpyro_sde.distributions.path_law import AbstractPathLaw
from numpyro_sde.filters.forward import Forward
from numpyro_sde.jumps.projection import project
from numpyro_sde.jumps.reactions import ReactionNetwork
from numpyro_sde.schemes import Gillespie
from numpyro_sde.schemes.markov_jumps import ChainEquation


def path_for(method: Any, path: AbstractPathLaw) -> AbstractPathLaw:
    """The law that a method works on: of a network's exact jumps, that on bounded counts.

    Raises:
        ValueError: exact jumps without bounds, or what cannot be projected.
    """
    exact = isinstance(path.scheme, Gillespie) and isinstance(path.sde, ReactionNetwork)
    if not (isinstance(method, Forward) and exact):
        return path
    if method.bounds is None:
        raise ValueError(
            "Forward() works on finitely many states: give bounds=, the largest count of each of "
            f"{', '.join(path.sde.species)}"
        )
    if path.events:
        raise ValueError("Forward() takes no events: use Particle(proposal='bootstrap')")
    return _projected(path, method.bounds)


def _projected(path: AbstractPathLaw, bounds: tuple[int, ...]) -> JumpPath:
    net: Any = path.sde
    start = known_start(path)
    chain, states = project(net, bounds, None if start is None else start.round().astype(int))
    return JumpPath.of_equation(
        ChainEquation(chain, _start(path, states), _with_sink(states), sink=True),
        path.given_times,
    )


def known_start(path: AbstractPathLaw) -> np.ndarray | None:
    """The fixed start of one process, where it is known on the host."""
    law = path.init
    while isinstance(law, dist.ExpandedDistribution):
        law = law.base_dist
    if not isinstance(law, dist.Delta) or isinstance(law.v, jax.core.Tracer) or law.v.ndim != 1:
        return None
    return np.asarray(law.v)


def _with_sink(states: np.ndarray) -> np.ndarray:
    return np.concatenate([states, states[:1]])  # the sink is never said to be seen


def _start(path: AbstractPathLaw, states: np.ndarray) -> Array:
    """Probabilities of the first state, what lies beyond the bounds with the last one."""
    real = jnp.result_type(float)
    fixed = path.fixed_start
    if fixed is not None:
        inside = jnp.all(fixed[..., None, :] == jnp.asarray(states, real), axis=-1).astype(real)
    else:
        batch = (1,) * len(path.init.batch_shape)
        points = jnp.asarray(states.reshape(len(states), *batch, -1))
        inside = jnp.moveaxis(jnp.exp(path.init.log_prob(points)), 0, -1)
    beyond = jnp.maximum(1.0 - jnp.sum(inside, axis=-1, keepdims=True), 0.0)
    rounding = 16.0 * jnp.finfo(inside.dtype).eps * len(states)
    return jnp.concatenate([inside, jnp.where(beyond < rounding, 0.0, beyond)], axis=-1)
