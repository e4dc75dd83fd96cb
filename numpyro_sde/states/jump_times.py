"""Paths of Markov jump processes in continuous time, given data: the times of their jumps."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_sde.distributions.jump_path import JumpPath
from numpyro_sde.distributions.state_space import ObservedPath
from numpyro_sde.filters.forward import Forward
from numpyro_sde.jumps.bridges import JumpTimes, trim
from numpyro_sde.jumps.uniformisation import terms_for
from numpyro_sde.statespace.model import AbstractFilter, StateSpaceModel

_MOST_TERMS = 8192


class JumpSizes(NamedTuple):
    """How much room draws of jumps have.

    Attributes:
        num_terms: most jumps of the uniformised process between two grid times.
        most: most jumps of a path.
    """

    num_terms: int = 32
    most: int = 64


class Drawn(NamedTuple):
    """Jumps of one path for each element of a batch, and the room that they need.

    Attributes:
        jumps: the jumps.
        number: of them, `(*lead,)`.
        mean: largest mean number of jumps of the uniformised process in a gap, `(*lead,)`.
    """

    jumps: JumpTimes
    number: Array
    mean: Float[Array, "*lead"]


def draw_jumps(
    observed: ObservedPath, method: AbstractFilter, sizes: JumpSizes, key: PRNGKeyArray
) -> Drawn:
    """Draw the jumps of one path for each element of the batch, given the data.

    Raises:
        ValueError: a path that is of no Markov jump process.
    """
    path = observed.path
    if not isinstance(path, JumpPath):
        raise ValueError(
            f"smooth(at_jumps=True) is for paths of an nsde.JumpPath, but {observed.name!r} is a "
            f"{type(path).__name__}: leave at_jumps out for its states at times"
        )
    if not isinstance(method, Forward):
        raise ValueError(
            f"smooth(at_jumps=True) draws exactly by method=filters.Forward(), got {method!r}"
        )
    keys = jax.random.split(key, observed.lead)

    def one(model: StateSpaceModel, key: PRNGKeyArray) -> Drawn:
        method.check(model)
        result = method.filter(model)
        jumps = result.draw_jumps_padded(key, num_terms=sizes.num_terms)
        source, _, rates, *_ = result.equation.edges
        leaving = jnp.zeros(result.equation.chain.num_states, rates.dtype).at[source].add(rates)
        mean = jnp.max(leaving) * (jnp.max(jnp.asarray(model.dt)) if np.size(model.dt) else 0.0)
        count = jnp.sum(~jnp.isnan(jumps.times))
        short = JumpTimes(jumps.times[: sizes.most], jumps.states[: sizes.most + 1])
        return Drawn(short, count, mean)

    drawn: Drawn = observed.map(one, (keys,), (keys.ndim - len(observed.lead),))
    return drawn


def fitted_jumps(run: Callable[[JumpSizes], dict[str, Drawn]]) -> dict[str, JumpTimes]:
    """Draw with as much room as is needed: again with more where there was too little.

    Raises:
        ValueError: rates so high that a path jumps thousands of times between two grid times.
    """
    sizes = JumpSizes()
    while True:
        drawn = run(sizes)
        mean = max(float(np.max(one.mean)) for one in drawn.values())
        count = max(int(np.max(one.number)) for one in drawn.values())
        if not np.isfinite(mean):
            raise ValueError("smooth(at_jumps=True): some draws have rates that are not finite")
        terms = max(sizes.num_terms, terms_for(mean))
        if terms > _MOST_TERMS:
            raise ValueError(
                f"smooth(at_jumps=True): rates times the longest gap are {mean:.3g}, so that a "
                "path jumps thousands of times between two grid times: give the JumpPath a finer "
                "TimeGrid"
            )
        if terms == sizes.num_terms and count <= sizes.most:
            return {name: trim(one.jumps) for name, one in drawn.items()}
        most = max(sizes.most, 2 ** int(np.ceil(np.log2(max(count, 1)))))
        sizes = JumpSizes(terms, most)
