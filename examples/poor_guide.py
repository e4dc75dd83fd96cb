"""Can I trust this guide? A mean-field guide of a path with two wells, found out.

`nsde.check` fits a double well by an engine that does not suit it and says so: the k-hat of its
weights, and intervals that do not hold what they promise on data drawn from the posterior. The
model is right, and its residuals say that too. Simulated data.

:title: A guide found out
:problem: is my variational fit right?
:field: physics
:engine: AutoNormal, checked by nsde.check
:data: simulated
:tags: check, variational, calibration, double well
:page: check.md
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
from numpyro.infer.autoguide import AutoNormal

import numpyro_sde as nsde

mpl.use("Agg")
import matplotlib.pyplot as plt


def well(grid, y):
    """A particle in two wells, seen now and then."""
    pull = numpyro.sample("pull", dist.LogNormal(0.0, 0.5))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    sde = nsde.processes.DoubleWell(pull, pull, scale)
    path = nsde.SDEPath(sde, grid, init=dist.Normal(0.0, 1.0), scheme=nsde.schemes.Euler())
    x = numpyro.sample("x", path)
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.2), obs=y, at=grid.index)


def white(model):
    """The path as a map of standard normal shocks."""
    shocks = nsde.reparam.InnovationReparam()
    return numpyro.handlers.reparam(model, config={"x": shocks, "again/x": shocks})


def main(output: Path, quick: bool) -> None:
    """Check a mean-field guide, and write the page."""
    grid = nsde.TimeGrid(np.arange(20.0), 0.1)
    law = nsde.SDEPath(nsde.processes.DoubleWell(1.0, 1.0, 0.7), grid, init=1.0)
    truth = np.asarray(law.sample(jax.random.key(5)))
    rng = np.random.default_rng(0)
    y = truth[grid.index] + 0.2 * rng.normal(size=grid.index.size)
    report = nsde.check(
        well,
        grid,
        y,
        engine=AutoNormal,
        treat=white,
        time_budget=20.0 if quick else 170.0,
        report=output / "poor_guide.html",
        progress=False,
    )
    print(report)
    x = np.asarray(report.tree["posterior"]["x"])[0]
    low, middle, high = np.nanquantile(x, [0.05, 0.5, 0.95], axis=0)
    figure, axis = plt.subplots(figsize=(8.0, 3.2), layout="constrained")
    axis.fill_between(grid.times, low, high, alpha=0.3, linewidth=0, label="the guide's path, 90 %")
    axis.plot(grid.times, middle, linewidth=0.8)
    axis.plot(grid.times, truth, color="black", linewidth=0.6, label="true path")
    axis.plot(grid.times[grid.index], y, "k.", label="data")
    axis.set(xlabel="time", ylabel="position", title=f"check: {report['fit'].words.split(':')[0]}")
    axis.legend(frameon=False, fontsize="small", ncols=3)
    figure.savefig(output / "poor_guide.png", dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the script")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    nsde.configure_cpu()
    main(options.output, options.quick)
