"""New paths of a switching SDE given data and parameters, through its regimes.

One sweep takes a path `x` to another and leaves the law of `x` given the data as it is:

1. regimes given the path, exactly, by forward filtering and backward sampling over them;
2. regimes given the data alone, the state integrated out, by a filter over sequences that keeps
   those of step 1 (Whiteley, Andrieu and Doucet 2010);
3. the path given regimes and data, exactly, by a Kalman filter.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from numpyro_sde.filters.rao_blackwell import switching_linear
from numpyro_sde.jumps import forward_backward
from numpyro_sde.smc import regimes as smc
from numpyro_sde.statespace.model import StateSpaceModel


def first_path(model: StateSpaceModel, num_kept: int, key: PRNGKeyArray) -> Float[Array, "N d"]:
    """A path drawn given the data by a filter over regimes."""
    linear = switching_linear(model)
    filter_key, regime_key, state_key = jax.random.split(key, 3)
    run = smc.regime_filter(linear, filter_key, num_kept)
    regimes = smc.draw_regimes(linear, run.sequences, regime_key)
    return smc.draw_states(linear, regimes, state_key)


def sweep(
    model: StateSpaceModel, path: Float[Array, "N *d"], num_kept: int, key: PRNGKeyArray
) -> tuple[Float[Array, "N d"], Bool[Array, " N"], Float[Array, " N"]]:
    """The next path, whether each state changed, and the effective number of sequences."""
    scheme: Any = model.scheme
    sde: Any = model.sde
    linear = switching_linear(model)
    given_key, filter_key, regime_key, state_key = jax.random.split(key, 4)
    steps = scheme.in_regimes(sde, model.times, model.dt, path)
    passed = forward_backward.forward(sde.start, model.cache[:-1], steps)
    regimes = forward_backward.draw_states(given_key, passed.filtered, model.cache[:-1])
    run = smc.regime_filter(linear, filter_key, num_kept, retained=regimes)
    regimes = smc.draw_regimes(linear, run.sequences, regime_key)
    new = smc.draw_states(linear, regimes, state_key)
    sizes = 1.0 / jnp.sum(jnp.exp(2.0 * run.sequences.log_weights), axis=1)
    ess = jnp.concatenate([jnp.ones(1, sizes.dtype), sizes])
    renewed = jnp.any(new != jnp.reshape(path, new.shape), axis=1)
    return new, renewed, ess
