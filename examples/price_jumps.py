"""Is it volatility, or are they jumps? Ten years of weekly prices.

A log price that diffuses and, some six times a year, jumps. The transition density is a mixture
over the number of jumps in a week; without jumps in the model the volatility takes them in.
Simulated, so that the truth is known.

:title: Prices that jump
:problem: sudden jumps in a diffusion
:field: finance
:engine: NUTS, jumps summed out in each step
:data: simulated
:tags: jump-diffusion, observed directly
:page: jump_diffusions.md
:run time: 63 s
"""

# ruff: noqa: ARG005
# Functions of one protocol share its arguments, used or not.

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import matplotlib as mpl
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS

import numpyro_sde as nsde

mpl.use("Agg")
import matplotlib.pyplot as plt

VOLATILITY, JUMP_RATE, JUMP_MEAN, JUMP_SD = 0.2, 6.0, -0.08, 0.1  # a year


def prices(times, x):
    """Log prices that diffuse and jump."""
    p = {
        "drift": numpyro.sample("drift", dist.Normal(0.05, 0.2)),
        "volatility": numpyro.sample("volatility", dist.LogNormal(-1.5, 0.5)),
        "jump_rate": numpyro.sample("jump_rate", dist.LogNormal(1.0, 1.0)),
    }
    jumps = nsde.CompoundPoisson(
        lambda t, x, p: p["jump_rate"], dist.Normal(JUMP_MEAN, JUMP_SD), max_per_step=6
    )
    sde = nsde.SDE(
        lambda t, x, p: p["drift"], lambda t, x, p: p["volatility"], params=p, jumps=jumps
    )
    numpyro.sample("x", nsde.SDEPath(sde, times, x[0]), obs=x)


def main(output: Path, quick: bool) -> None:
    """Simulate ten years of weeks and fit them with and without jumps."""
    rng = np.random.default_rng(0)
    weeks = 60 if quick else 520
    times, draws = np.arange(weeks + 1) / 52.0, 20 if quick else 250
    hits = rng.poisson(JUMP_RATE / 52.0, size=weeks)
    leaps = JUMP_MEAN * hits + JUMP_SD * np.sqrt(hits) * rng.normal(size=weeks)
    steps = 0.05 / 52.0 + VOLATILITY * np.sqrt(1.0 / 52.0) * rng.normal(size=weeks) + leaps
    x = np.concatenate([[0.0], np.cumsum(steps)])
    plain = numpyro.handlers.do(prices, data={"jump_rate": 1e-6})
    fits = {}
    for name, model in {"with jumps": prices, "without": plain}.items():
        mcmc = MCMC(NUTS(model), num_warmup=draws, num_samples=draws, progress_bar=False)
        mcmc.run(jax.random.key(0), times, x)
        fits[name] = mcmc.get_samples()["volatility"]
        print(f"volatility {name}: {fits[name].mean():.3f} +- {fits[name].std():.3f}")
        if name == "with jumps":
            rate = mcmc.get_samples()["jump_rate"]
            print(f"jumps a year: {rate.mean():.1f} +- {rate.std():.1f} (true {JUMP_RATE})")
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9.0, 3.2), layout="constrained", width_ratios=(2, 1)
    )
    left.plot(times, x, linewidth=0.9)
    left.plot(times[1:][hits > 0], x[1:][hits > 0], "v", color="C3", markersize=4, label="jumps")
    left.set(xlabel="year", ylabel="log price")
    left.legend(frameon=False)
    for name, values in fits.items():
        right.hist(np.asarray(values), bins=25, density=True, alpha=0.6, label=name)
    right.axvline(VOLATILITY, color="black", linewidth=0.8, label="true")
    right.set(xlabel="volatility")
    right.legend(frameon=False, fontsize="small")
    figure.savefig(output / "price_jumps.png", dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the script")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    nsde.configure_cpu()
    main(options.output, options.quick)
