"""Weights integrated out or sampled: one posterior of the hyperparameters, at unequal cost."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS

import numpyro_sde as nsde

PRIOR = nsde.fields.HSGP(dim=1, box=2.5, num=16)
SITES = ("f/amplitude", "f/length", "scale")


def model(x):
    f = PRIOR.register("f", amplitude=dist.HalfNormal(10.0), length=dist.InverseGamma(5.0, 5.0))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    sde = nsde.SDE(lambda t, x, p: p["f"](x), lambda t, x, p: p["s"], params={"f": f, "s": scale})
    numpyro.sample("x", nsde.SDEPath(sde, np.arange(len(x)) * 0.02, init=float(x[0])), obs=x)


def double_well(count):
    sde = nsde.SDE(lambda t, x: 4.0 * (x - x**3), lambda t, x: 1.0)
    fine = nsde.SDEPath(sde, np.arange(10 * count) * 0.002, init=1.0)
    return np.array(fine.sample(jax.random.key(0)))[::10]


def chain(model, x, num_samples, accept):
    kernel = NUTS(model, target_accept_prob=accept)
    mcmc = MCMC(kernel, num_warmup=500, num_samples=num_samples, progress_bar=False)
    mcmc.run(jax.random.key(1), x, extra_fields=("num_steps", "diverging"))
    extra = {name: np.asarray(value) for name, value in mcmc.get_extra_fields().items()}
    return {k: np.asarray(mcmc.get_samples()[k], float) for k in SITES}, extra


def mean_and_error(draws):
    return draws.mean(), draws.std() / float(effective_sample_size(draws[None])) ** 0.5


@pytest.mark.slow
def test_the_hyperparameters_have_one_posterior():
    """A double well, 1,000 points, 16 sines: means and squares at 4 Monte Carlo standard errors.

    At NUTS's own target the weights and their amplitude are a funnel, whose neck it does not enter;
    the reference has a target of 0.99. Logarithms, whose tails are light.
    """
    x = double_well(1000)
    ours, few = chain(nsde.handlers.collapse(model, "f"), x, 4000, 0.8)
    theirs, many = chain(model, x, 6000, 0.99)
    for site in SITES:
        for power in (1, 2):
            (a, e), (b, f) = (mean_and_error(np.log(d[site]) ** power) for d in (ours, theirs))
            gap = abs(a - b) / np.hypot(e, f)
            print(f"log {site}, power {power}: {a:.4f} and {b:.4f}, {gap:.1f} errors apart")
            assert gap < 4
    assert few["diverging"].sum() == 0
    per_gradient = [
        float(effective_sample_size(jnp.log(d["f/amplitude"])[None])) / e["num_steps"].sum()
        for d, e in ((ours, few), (theirs, many))
    ]
    print(
        f"divergences {few['diverging'].sum()} and {many['diverging'].sum()}, effective draws a "
        f"gradient {per_gradient[0]:.4f} and {per_gradient[1]:.5f}"
    )
    assert per_gradient[0] > 10 * per_gradient[1]
