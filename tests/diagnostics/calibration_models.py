"""A conjugate model with its exact posterior, wrong posteriors, and how they are drawn.

Module-level functions, so that other processes can import them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import numpyro_sde as nsde

NUM_OBS = 4
NUM_DRAWS = 150


def conjugate(y=None):
    """theta ~ N(0, 1), four y_i ~ N(theta, 1), NaN where not recorded."""
    theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
    with numpyro.plate("obs", NUM_OBS):
        seen = True if y is None else ~jnp.isnan(y)
        filled = None if y is None else jnp.nan_to_num(y)
        numpyro.sample("y", dist.Normal(theta, 1.0).mask(seen), obs=filled)


@jax.jit
def _exact(key, y):
    seen = ~jnp.isnan(y)
    precision = 1.0 + seen.sum()
    mean = jnp.where(seen, y, 0.0).sum() / precision
    return mean, precision**-0.5, jax.random.normal(key, (NUM_DRAWS,))


def exact(key, data):
    mean, sd, z = _exact(key, data["y"])
    return {"theta": mean + sd * z}


def narrow(key, data):
    """Overconfident: two thirds of the posterior's sd."""
    mean, sd, z = _exact(key, data["y"])
    return {"theta": mean + sd * z / 1.5}


def shifted(key, data):
    """Biased by half a posterior sd."""
    mean, sd, z = _exact(key, data["y"])
    return {"theta": mean + 0.5 * sd + sd * z}


def prior(key, data):
    """Ignores the data."""
    return {"theta": jax.random.normal(key, (NUM_DRAWS,))}


def autocorrelated(key, data):
    """Exact, by a first-order autoregression of coefficient 0.9."""
    key, last = jax.random.split(key)
    mean, sd, _ = _exact(key, data["y"])
    noise = np.asarray(jax.random.normal(last, (2000,)))
    chain = np.empty(2000)
    chain[0] = noise[0]
    for k in range(1, 2000):
        chain[k] = 0.9 * chain[k - 1] + np.sqrt(1 - 0.81) * noise[k]
    return {"theta": np.asarray(mean + sd * chain)}


def sometimes_fails(key, data):
    if float(data["y"][0]) > 1.5:
        raise ArithmeticError("no step size")
    return exact(key, data)


def always_fails(key, data):
    raise ArithmeticError("no step size")


def path_model(times, y=None):
    """One Ornstein-Uhlenbeck path of known coefficients."""
    sde = nsde.processes.OrnsteinUhlenbeck(1.0, 0.0, 0.7)
    x = numpyro.sample("x", nsde.SDEPath(sde, times, init=dist.Normal(0.0, 1.0)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)
