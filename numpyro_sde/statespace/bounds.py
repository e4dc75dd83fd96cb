"""The largest log likelihood that data can have."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_sde.linear.small import cholesky, diagonal
from numpyro_sde.statespace.guide import first_inputs, has_moments
from numpyro_sde.statespace.model import Instrument, StateSpaceModel
from numpyro_sde.statespace.updates import LOG_2PI, covariance_uses_state, drop_missing


def largest_log_likelihood(model: StateSpaceModel) -> Float[Array, ""]:
    """The sum of the emissions' largest log densities: no likelihood can be above it.

    Known for normal emissions whose covariance does not depend on the state, and 0 for discrete
    ones; infinity where any other emission is there.
    """
    dtype = model.init_mean.dtype
    total = jnp.zeros((), dtype)
    for instrument in model.instruments:
        inputs = first_inputs(instrument)
        if _is_discrete(instrument, inputs, model.init_mean):
            continue
        if not _has_fixed_covariance(instrument, inputs, model.init_mean):
            return jnp.full((), jnp.inf, dtype)
        rows = np.asarray(instrument.rows, dtype=int)
        at = jax.tree.map(lambda a, rows=rows: jnp.asarray(a)[rows], instrument.inputs)
        seen = jnp.asarray(instrument.present)[rows]
        peaks = jax.vmap(partial(_peak, instrument, model.init_mean))(at, seen)
        total = total + jnp.sum(peaks).astype(dtype)
    return total


def _has_fixed_covariance(instrument: Instrument, inputs: Any, x: Array) -> bool:
    known = instrument.gaussian and not instrument.powered and has_moments(instrument, inputs, x)
    return known and not covariance_uses_state(instrument, inputs, x)


def _is_discrete(instrument: Instrument, inputs: Any, x: Array) -> bool:
    found: list[bool] = []
    law = instrument.law
    if law is None:
        return False

    def look(x: Array) -> Array:
        found.append(bool(getattr(law(inputs, x).support, "is_discrete", False)))
        return x

    jax.eval_shape(look, x)
    return found[-1]


def _peak(instrument: Instrument, x: Array, inputs: Any, present: Array) -> Array:
    """Log density of a normal observation at its own mean."""
    mean, R = instrument.moments(inputs, x)
    _, _, R = drop_missing(mean, jnp.zeros((mean.shape[0], 1), R.dtype), R, present)
    return -jnp.sum(jnp.log(diagonal(cholesky(R)))) - 0.5 * LOG_2PI * jnp.sum(present)
