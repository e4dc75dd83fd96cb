"""Models whose posteriors or log densities are known in closed form, and small path models."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS
from scipy.stats import norm

from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.observe import observe
from numpyro_sde.sde import SDE

CONJUGATE_DATA = np.array([0.3, -0.8, 1.1, 0.4, 2.0, -0.1])


def conjugate(y=None):
    """theta ~ N(0, 1), y_i ~ N(theta, 1)."""
    theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
    with numpyro.plate("obs", len(CONJUGATE_DATA)):
        numpyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def conjugate_posterior():
    """Mean and sd of theta, and the log evidence."""
    n, total = len(CONJUGATE_DATA), CONJUGATE_DATA.sum()
    mean, sd = total / (n + 1), 1.0 / np.sqrt(n + 1)
    at = norm.logpdf(CONJUGATE_DATA).sum() + norm.logpdf(0.0)
    return mean, sd, at - norm.logpdf(0.0, mean, sd)


def ou(rate, mean, scale):
    """Ornstein-Uhlenbeck process by its coefficients."""
    return SDE(
        lambda t, x, p: p["rate"] * (p["mean"] - x),
        lambda t, x, p: p["scale"],
        params={"rate": rate, "mean": mean, "scale": scale},
    )


def walk(times, y=None, at=None):
    """One latent path, observed with known noise."""
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
    x = numpyro.sample("x", SDEPath(ou(rate, 0.0, 0.7), times, init=dist.Normal(0.0, 1.0)))
    observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y, at=at)


def panel(times, y=None):
    """Three series of their own rates under a plate."""
    centre = numpyro.sample("centre", dist.Normal(0.0, 0.5))
    with numpyro.plate("series", 3):
        rate = numpyro.sample("rate", dist.LogNormal(centre, 0.5))
        x = numpyro.sample("x", SDEPath(ou(rate, 0.0, 0.7), times, init=dist.Normal(0.0, 1.0)))
        observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)


def plane(times, y=None):
    """A two-dimensional state of which the first component is seen."""
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
    init = dist.Normal(jnp.zeros(2), 1.0).to_event(1)
    x = numpyro.sample("x", SDEPath(ou(rate, 0.0, 0.7), times, init=init))
    observe("y", x, lambda t, x: dist.Normal(x[0], 0.3), obs=y)


def fit(model, *args, num_samples=40, num_chains=2, **kwargs):
    """A short NUTS run: the shapes matter, not the quality."""
    mcmc = MCMC(
        NUTS(model, max_tree_depth=5),
        num_warmup=20,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method="sequential",
        progress_bar=False,
    )
    mcmc.run(
        np.array([0, 1], np.uint32), *args, extra_fields=("potential_energy", "num_steps"), **kwargs
    )
    return mcmc
