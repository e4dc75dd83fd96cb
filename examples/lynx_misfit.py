"""Is the model good enough? The lynx cycle as a process that returns to its mean.

114 years of trapped lynx. The engine is right, the model is not: `nsde.check` approves the one and
names the misfit of the other, a cycle that is left in the one-step residuals.

:title: The lynx, misfitted
:problem: is my model good enough for these data?
:field: ecology
:engine: NUTS, path integrated out by Kalman, checked by nsde.check
:data: real, 114 years
:tags: check, residuals, misfit
:page: check.md
"""

# ruff: noqa: ARG005
# Functions of one protocol share its arguments, used or not.

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpyro
import numpyro.distributions as dist

import numpyro_sde as nsde

mpl.use("Agg")
import matplotlib.pyplot as plt


def returns(times, y):
    """Logs of the numbers trapped, around a process that returns to its mean."""
    rate = numpyro.sample("rate", dist.LogNormal(-1.0, 1.0))
    mean = numpyro.sample("mean", dist.Normal(6.5, 1.0))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
    ou = nsde.processes.OrnsteinUhlenbeck(rate, mean, scale)
    start = dist.Normal(mean, scale / (2.0 * rate) ** 0.5)
    x = numpyro.sample("x", nsde.SDEPath(ou, times, init=start))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.2), obs=y)


def main(output: Path, quick: bool) -> None:
    """Check the model, write the page, draw what is left in the residuals."""
    lynx = nsde.datasets.load_lynx()
    report = nsde.check(
        returns,
        lynx.times,
        np.log(lynx.trappings),
        time_budget=20.0 if quick else 170.0,
        report=output / "lynx_misfit.html",
        progress=False,
    )
    print(report)
    axes = report["one-step residuals"].result.plot()
    figure = axes[0].figure
    figure.suptitle("One-step residuals of the lynx: a cycle is left")
    figure.savefig(output / "lynx_misfit.png", dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the script")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    nsde.configure_cpu()
    main(options.output, options.quick)
