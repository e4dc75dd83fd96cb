"""Racing proposals: short filters say which one knows the likelihood best.

The log of an unbiased estimate is too small on average, by about half its variance, and by all that
a proposal misses: of estimates of one likelihood the one with the highest mean logarithm is the
most precise (the variational bounds of Maddison et al. 2017, "Filtering variational objectives",
and Naesseth, Linderman, Ranganath and Blei 2018). So proposals are told apart by a handful of runs
each, without knowing the truth, and one that is confidently wrong loses.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_sde.smc.defensive import SHARES, Auto, Defensive, is_linear_gaussian
from numpyro_sde.smc.particle_filter import run_filter
from numpyro_sde.smc.proposals import Plan
from numpyro_sde.smc.settings import Setting
from numpyro_sde.statespace.exact import has_exact
from numpyro_sde.statespace.model import StateSpaceModel
from numpyro_sde.statespace.updates import with_valid_inputs

_RUNS = 4
# Place of the mixture among the shares, and by how many nats others must be better.
_MIXTURE, _CLEARLY = 1, 0.1
# Particles of a run in the race: a share of those of the filter, but at least so many.
_SHARE_OF_PARTICLES, _LEAST_PARTICLES = 8, 32


class Race(NamedTuple):
    """What was raced.

    Attributes:
        shares: of the model's own steps among guided ones: 0 guided, 1 bootstrap, `(C,)`.
        log_likelihood: mean log likelihood of its runs, by candidate, `(C,)`; minus infinity where
            one collapsed.
        chosen: the share that ran.
    """

    shares: Float[Array, " C"]
    log_likelihood: Float[Array, " C"]
    chosen: Float[Array, ""]


def race(
    model: StateSpaceModel, setting: Setting, key: PRNGKeyArray
) -> tuple[Setting, Plan | None, Race | None]:
    """The setting with the proposal that the model asks for, where it is "auto", and how it won.

    With it goes the plan that the race made, which is that of the filter too; None where nothing
    was raced.

    Args:
        model: the path and its instruments.
        setting: the filter's setting.
        key: random key, of the race alone.
    """
    decided = has_exact(model) or is_linear_gaussian(model) or not model.scheme.smooth
    if not isinstance(setting.proposal, Auto) or decided:
        return setting.for_model(model), None, None
    size = max(_LEAST_PARTICLES, setting.num_particles // _SHARE_OF_PARTICLES)
    size = min(size, setting.num_particles)
    dtype = model.init_mean.dtype
    shares = jnp.asarray(SHARES, dtype)
    plan = Defensive().plan(with_valid_inputs(model))
    short = model if model.starts is None else model._replace(starts=model.starts[:size])

    def one(share: Array, key: PRNGKeyArray) -> Array:
        tried = setting._replace(num_particles=size, proposal=Defensive(share=share))
        return run_filter(short, tried, key, plan=plan).log_likelihood

    keys = jax.random.split(key, _RUNS)
    runs = lax.map(lambda share: lax.map(lambda key: one(share, key), keys), shares)
    mean = jnp.mean(jnp.where(jnp.isnan(runs), -jnp.inf, runs), axis=1)
    # The mixture where nothing is clearly better: its weights are bounded. So where all collapsed.
    best = jnp.argmax(mean - jnp.where(shares == shares[_MIXTURE], 0.0, _CLEARLY))
    best = jnp.where(jnp.any(jnp.isfinite(mean)), best, _MIXTURE)
    chosen = shares[best]
    won = setting._replace(proposal=Defensive(share=chosen))
    return won, plan, Race(shares, mean, chosen)
