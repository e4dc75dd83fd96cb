"""Which equation moves the interest rate? Vasicek against the square-root process.

The three-month rate of the United States, 1959 to 2009, seen as it is. Both equations have exact
transition densities; they are compared by what they predict, and then asked by their residuals
whether the better one is good enough. It is not.

:title: Which equation for a rate
:problem: two models of one series, which is better?
:field: finance
:engine: NUTS, exact transition densities
:data: real, 203 quarters
:tags: model comparison, residuals, observed directly
:page: comparing_models.md
:run time: 175 s of processor time
"""

# Functions of one protocol share its arguments, used or not.

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import matplotlib as mpl
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS, init_to_value

import numpyro_sde as nsde
from numpyro_sde.diagnostics import compare_models, residuals, to_arviz

mpl.use("Agg")
import matplotlib.pyplot as plt


def short_rate(times, rate, kind):
    """The rate itself, seen without noise, under one of two equations."""
    speed = numpyro.sample("speed", dist.LogNormal(-2.0, 1.0))
    mean = numpyro.sample("mean", dist.LogNormal(1.5, 0.5))
    scale = numpyro.sample("scale", dist.LogNormal(-0.5, 1.0))
    make = {
        "Vasicek": nsde.processes.OrnsteinUhlenbeck,
        "square root": nsde.processes.CoxIngersollRoss,
    }
    path = nsde.SDEPath(make[kind](speed, mean, scale), times, init=rate[0])
    numpyro.sample("rate", path, obs=rate)


def main(output: Path, quick: bool) -> None:
    """Fit both, compare their predictions, draw the residuals."""
    bill = nsde.datasets.load_us_tbill()
    length = 40 if quick else len(bill.rate)
    draws = 20 if quick else 250
    fits = {}
    for kind in ("Vasicek", "square root"):
        start = init_to_value(values={"speed": 0.2, "mean": 5.0, "scale": 0.7})
        kernel = NUTS(short_rate, init_strategy=start)
        mcmc = MCMC(kernel, num_warmup=draws, num_samples=draws, progress_bar=False)
        mcmc.run(jax.random.key(0), bill.times[:length], bill.rate[:length], kind)
        fits[kind] = mcmc
    table = compare_models({name: to_arviz(fit) for name, fit in fits.items()})
    print(table)
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.2), sharey=True, layout="constrained")
    for axis, (kind, fit) in zip(axes, fits.items(), strict=True):
        found = residuals(fit)
        print(kind, found, sep="\n")
        axis.axhline(0.0, color="0.7", linewidth=0.7)
        axis.plot(bill.times[:length], found.scores["rate"], ".", markersize=3)
        axis.set(title=kind, xlabel="year")
    axes[0].set(ylabel="one-step residual, sd")
    figure.savefig(output / "interest_rates.png", dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the script")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    nsde.configure_cpu()
    main(options.output, options.quick)
