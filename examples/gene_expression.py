"""How fast is a protein made and lost? Molecules of one cell, seen through their light.

The molecules jump; they are simulated exactly, by Gillespie's algorithm. They are fitted by the
linear noise approximation, a Gaussian law that the extended Kalman filter integrates out, and NUTS
finds both rates. Simulated, so that the truth is known.

:title: Proteins of one cell
:problem: numbers of molecules, seen through a measurement
:field: cell biology
:engine: NUTS, path integrated out by ExtendedKalman
:data: simulated
:tags: reaction network, linear noise
:page: reaction_networks.md
:run time: 103 s
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

MAKES, DECAYS = 20.0, 0.5  # molecules a minute; 1/minute
GAIN, ERROR = 0.7, 4.0  # light of a molecule; of the camera


def expression(times, light=None):
    """Proteins made and lost, seen through their light."""
    makes = numpyro.sample("makes", dist.LogNormal(3.0, 0.7))
    decays = numpyro.sample("decays", dist.LogNormal(-0.7, 0.7))
    net = nsde.ReactionNetwork(
        reactants=[[0, 1]],  # nothing -> protein, protein -> nothing
        products=[[1, 0]],
        rates=jnp.stack([makes, decays]),
        species=["protein"],
        reactions=["made", "lost"],
    )
    x = numpyro.sample("x", nsde.ReactionPath(net, times, [0.0], law=nsde.laws.LinearNoise()))
    nsde.observe("y", x, lambda t, x: dist.Normal(GAIN * x[0], ERROR), obs=light)


def main(output: Path, quick: bool) -> None:
    """Simulate the jumps exactly, fit by linear noise, compare with the truth."""
    times = np.linspace(0.0, 20.0, 9 if quick else 41)
    net = nsde.ReactionNetwork([[0, 1]], [[1, 0]], jnp.array([MAKES, DECAYS]), species=["protein"])
    jumps = nsde.ReactionPath(net, times, [0.0], law=nsde.laws.Jump())
    truth = np.asarray(jumps.sample(jax.random.key(2)))[:, 0]
    light = GAIN * truth + ERROR * np.random.default_rng(0).normal(size=truth.shape)
    marginal = nsde.handlers.marginalize(expression, method=nsde.filters.ExtendedKalman())
    draws = 20 if quick else 250
    mcmc = MCMC(NUTS(marginal), num_warmup=draws, num_samples=draws, progress_bar=False)
    mcmc.run(jax.random.key(0), times, light)
    samples = mcmc.get_samples()
    for name, true in (("makes", MAKES), ("decays", DECAYS)):
        print(f"{name:7} {samples[name].mean():.2f} +- {samples[name].std():.2f} (true {true})")
    x = nsde.smooth(marginal, samples, times, light, rng_key=jax.random.key(1))["x"]
    low, high = np.quantile(np.asarray(x)[..., 0], [0.05, 0.95], axis=0)
    figure, axis = plt.subplots(figsize=(7.0, 3.4), layout="constrained")
    axis.fill_between(times, low, high, alpha=0.4, label="proteins, 90 %")
    axis.step(times, truth, "k", linewidth=0.8, where="mid", label="true")
    axis.plot(times, light / GAIN, ".", color="C3", label="light")
    axis.set(xlabel="minutes", ylabel="molecules")
    axis.legend(frameon=False)
    figure.savefig(output / "gene_expression.png", dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the script")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    nsde.configure_cpu()
    main(options.output, options.quick)
