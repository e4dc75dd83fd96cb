"""How well is the house insulated? Heat dynamics of a building from one thermometer.

Two temperatures, of the air and of the walls; the weather and the heating are inputs, and one
thermometer hangs inside. The model is linear, so Kalman integrates both states out exactly, and
NUTS samples capacities and resistances. Simulated, so that the truth is known.

:title: Heat of a building
:problem: a system driven by inputs, one of its states unseen
:field: engineering
:engine: NUTS, path integrated out by Kalman
:data: simulated
:tags: inputs, partly seen, linear
:page: inputs_and_doses.md
:run time: 133 s
"""

# ruff: noqa: ARG001, ARG005
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

# Heat capacities (kWh/K), resistances (K/kW): a light interior in a heavy envelope.
TRUE = {"inside": 1.0, "envelope": 3.5, "to_envelope": 1.2, "to_outside": 5.3, "noise": 0.05}


def house(grid, weather, y=None, scale=0.1):
    """Temperature inside, measured, and of the envelope, which no one measures."""
    p = {
        "inside": numpyro.sample("inside", dist.LogNormal(0.0, 0.5)),
        "envelope": numpyro.sample("envelope", dist.LogNormal(1.0, 0.5)),
        "to_envelope": numpyro.sample("to_envelope", dist.LogNormal(0.0, 0.5)),
        "to_outside": numpyro.sample("to_outside", dist.LogNormal(1.5, 0.5)),
    }
    noise = numpyro.sample("noise", dist.LogNormal(-3.0, 0.5))

    def drift(t, x, p, u):
        between = (x[1] - x[0]) / p["to_envelope"]
        leak = (u["outside"] - x[1]) / p["to_outside"]
        heated = (between + u["heat"]) / p["inside"]
        return jnp.stack([heated, (leak - between) / p["envelope"]])

    sde = nsde.SDE(drift, lambda t, x, p, u: jnp.array([scale, scale]), params=p, inputs=weather)
    init = dist.Normal(jnp.array([20.0, 17.0]), jnp.array([1.0, 2.0])).to_event(1)
    # Exact for a linear equation: an hour is a long step for the air.
    scheme = nsde.schemes.LocalLinear()
    x = numpyro.sample("x", nsde.SDEPath(sde, grid, init, scheme=scheme))
    nsde.observe("y", x, lambda t, x, sd: dist.Normal(x[0], sd), params=noise, obs=y, at=grid.index)


def main(output: Path, quick: bool) -> None:
    """Simulate three days of hours, fit, and draw both temperatures."""
    hours = np.arange(12.0 if quick else 72.0)
    outside = 5.0 + 4.0 * np.sin(2.0 * np.pi * (hours - 9.0) / 24.0)
    heat = np.where((hours % 24 > 5) & (hours % 24 < 22), 3.0, 0.5)  # kW
    weather = {
        "outside": nsde.Input(hours, outside, order="linear"),
        "heat": nsde.Input(hours, heat),
    }
    grid = nsde.TimeGrid(hours, 1.0)
    fixed = numpyro.handlers.substitute(house, data=TRUE)
    drawn = numpyro.handlers.trace(numpyro.handlers.seed(fixed, 4)).get_trace(grid, weather)
    y, truth = np.asarray(drawn["y"]["value"]), np.asarray(drawn["x"]["value"])
    marginal = nsde.handlers.marginalize(house, method=nsde.filters.Kalman())
    draws = 20 if quick else 250
    mcmc = MCMC(NUTS(marginal), num_warmup=draws, num_samples=draws, progress_bar=False)
    mcmc.run(jax.random.key(0), grid, weather, y)
    samples = mcmc.get_samples()
    for name, true in TRUE.items():
        print(f"{name:12} {samples[name].mean():.2f} +- {samples[name].std():.2f} (true {true})")
    x = nsde.smooth(marginal, samples, grid, weather, y, rng_key=jax.random.key(1))["x"]
    figure, axis = plt.subplots(figsize=(8.0, 3.4), layout="constrained")
    for k, name in enumerate(("inside", "envelope, not measured")):
        low, high = np.quantile(np.asarray(x)[..., k], [0.05, 0.95], axis=0)
        axis.fill_between(grid.times, low, high, color=f"C{k}", alpha=0.35, linewidth=0, label=name)
        axis.plot(grid.times, truth[:, k], color="black", linewidth=0.6)
    axis.plot(hours, outside, color="C2", linewidth=0.9, label="outside")
    axis.set(xlabel="hour", ylabel="degrees Celsius")
    axis.legend(frameon=False, ncols=3, fontsize="small")
    figure.savefig(output / "building_heat.png", dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the script")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    nsde.configure_cpu()
    main(options.output, options.quick)
