"""How contagious was it? Influenza in a boarding school of 763 boys.

A reaction network with two reactions under the linear noise approximation; the extended Kalman
filter integrates the path out, NUTS samples contact rate, recovery and the error of the count.

:title: Influenza in a school
:problem: an epidemic counted day by day
:field: epidemics
:engine: NUTS, path integrated out by ExtendedKalman
:data: real, 14 days
:tags: reaction network, linear noise, counts
:page: reaction_networks.md
:run time: 133 s
"""

# ruff: noqa: ARG005
# Functions of one protocol share its arguments, used or not.

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS

import numpyro_sde as nsde

mpl.use("Agg")
import matplotlib.pyplot as plt

BOYS = 763


def outbreak(days, confined=None):
    """Susceptible and ill boys; those in bed are counted with an error."""
    contact = numpyro.sample("contact", dist.LogNormal(jnp.log(1.7), 0.5))  # 1/day
    recovery = numpyro.sample("recovery", dist.LogNormal(jnp.log(0.5), 0.5))  # 1/day
    noise = numpyro.sample("noise", dist.LogNormal(jnp.log(10.0), 0.7))  # boys
    net = nsde.ReactionNetwork(
        reactants=[[1, 0], [1, 1]],  # rows S, I: infection and recovery
        products=[[0, 0], [2, 0]],
        rates=jnp.stack([contact / BOYS, recovery]),
        species=["S", "I"],
        reactions=["infection", "recovery"],
    )
    start = [BOYS - 1.0, 1.0]
    x = numpyro.sample("x", nsde.ReactionPath(net, days, start, law=nsde.laws.LinearNoise()))
    nsde.observe("y", x, lambda t, x, sd: dist.Normal(x[1], sd), params=noise, obs=confined)


def main(output: Path, quick: bool) -> None:
    """Fit the outbreak and draw it."""
    flu = nsde.datasets.load_boarding_school_flu()
    days = np.concatenate([[0.0], flu.times])
    confined = np.concatenate([[np.nan], flu.confined])
    marginal = nsde.handlers.marginalize(outbreak, method=nsde.filters.ExtendedKalman())
    draws = 20 if quick else 500
    mcmc = MCMC(NUTS(marginal), num_warmup=draws, num_samples=draws, progress_bar=False)
    mcmc.run(jax.random.key(0), days, confined)
    samples = mcmc.get_samples()
    number = samples["contact"] / samples["recovery"]
    print(f"one boy infects {number.mean():.2f} +- {number.std():.2f} others")
    x = nsde.smooth(marginal, samples, days, confined, rng_key=jax.random.key(1))["x"]
    figure, axis = plt.subplots(figsize=(7.0, 3.6), layout="constrained")
    for k, (name, color) in enumerate((("susceptible", "C0"), ("ill", "C3"))):
        low, middle, high = np.quantile(np.asarray(x)[..., k], [0.05, 0.5, 0.95], axis=0)
        axis.fill_between(days, low, high, color=color, alpha=0.25, linewidth=0)
        axis.plot(days, middle, color=color, label=name)
    axis.plot(flu.times, flu.confined, "k.", label="confined to bed")
    axis.set(xlabel="day", ylabel="boys")
    axis.legend(frameon=False)
    figure.savefig(output / "flu_outbreak.png", dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the script")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    nsde.configure_cpu()
    main(options.output, options.quick)
