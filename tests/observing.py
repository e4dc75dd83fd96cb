"""An observation site on a path held at known states."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers

import numpyro_sde as nsde

TIMES = np.array([0.0, 0.2, 0.5, 0.9, 1.0])
PATH = np.array([0.3, -0.2, 0.5, 1.1, 0.7])
PAIRS = np.stack([PATH, -0.5 * PATH], -1)
NAN = np.nan


def scalar_sde():
    return nsde.SDE(lambda t, x: -x, lambda t, x: 0.5)


def site(emission, obs=None, path=PATH, times=TIMES, params=None, x_of=lambda x: x, **kwargs):
    """The observation site on a path held at `path`."""
    d = np.ndim(path) - np.ndim(times)
    init = dist.Normal(0.0, 1.0)
    init = init.expand(np.shape(path)[-1:]).to_event(1) if d else init

    def model():
        x = numpyro.sample("x", nsde.SDEPath(scalar_sde(), times, init=init))
        nsde.observe("y", x_of(x), emission, params=params, obs=obs, **kwargs)

    conditioned = handlers.condition(model, {"x": jnp.asarray(path)})
    return handlers.trace(handlers.seed(conditioned, 0)).get_trace()["y"]


def log_prob(*args, **kwargs):
    y = site(*args, **kwargs)
    return y["fn"].log_prob(y["value"])
