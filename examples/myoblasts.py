"""How fast do muscle precursors stop dividing? Single cells at four times, none of them twice.

Sequencing destroys a cell, so there are four clouds and no path. The first two principal components
of each cell's genes, of which one tells muscle from fibroblasts and one leads out of the cell
cycle, follow a linear equation; `SnapshotLaw` makes its posterior out of all four clouds. Then
the cells at 48 hours are held out, and a Schrodinger bridge under the fitted equation is asked for
them, beside a bridge under Brownian motion: how far from half of the held-out cells is each, and
how far is the other half? Not scores of single genes, many of which are zero in many cells: a
normal transition can put a spike on zeros, and then fits nothing else.

:title: Muscle out of single cells
:problem: cells sequenced at four times, nobody seen twice
:field: cell biology
:engine: NUTS on the law of snapshots, Schrodinger bridges
:data: real, 271 cells
:tags: snapshots, bridges, linear, held out
:page: snapshots.md
:run time: 66 s of processor time
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS, init_to_median
from scipy.optimize import linear_sum_assignment

import numpyro_sde as nsde

mpl.use("Agg")
import matplotlib.pyplot as plt

NAMES = ["muscle", "out of the cycle"]
UNIT = 5.0  # of the components, so that all are of order one


def read(quick):
    """Days, and the clouds."""
    data = nsde.datasets.load_myoblasts()
    clouds = [data.components[data.hours == t] / UNIT for t in data.times]
    return data.times / 24.0, [cloud[:15] for cloud in clouds] if quick else clouds


def equation(rate, rest, scale):
    """Each component goes to its rest, at a rate and with a noise of its own."""
    eye = jnp.eye(2)
    return nsde.processes.LinearSDE(-rate[..., None] * eye, rate * rest, scale[..., None] * eye)


def model(days, clouds):
    """The cells of the first day are the start of all others."""
    rate = numpyro.sample("rate", dist.LogNormal(jnp.zeros(2), 1.0).to_event(1))  # 1/day
    rest = numpyro.sample("rest", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    scale = numpyro.sample("scale", dist.LogNormal(jnp.zeros(2), 0.7).to_event(1))
    law = nsde.SnapshotLaw(equation(rate, rest, scale), days, init=clouds[0])
    numpyro.sample("cells", law, obs=clouds)


def fit(days, clouds, draws):
    """Posterior draws."""
    kernel = NUTS(model, init_strategy=init_to_median)
    mcmc = MCMC(kernel, num_warmup=draws, num_samples=draws, progress_bar=False)
    mcmc.run(jax.random.key(0), days, nsde.snapshots.stack_snapshots(clouds))
    return mcmc.get_samples()


def bridge_paths(sde, days, clouds, number):
    """Paths through the clouds."""
    bridge = nsde.schrodinger_bridge(sde, days, nsde.snapshots.stack_snapshots(clouds))
    return bridge.sample_paths(jax.random.key(1), number, max_step=0.05)


def earth_mover(a, b):
    """Mean distance of the best matching of two clouds of the same size."""
    cost = np.linalg.norm(a[:, None] - b[None], axis=-1)
    return cost[linear_sum_assignment(cost)].mean()


def judge(candidates, held, splits):
    """Distances to random halves of the held-out cells; the other half is the best there is."""
    rng, half = np.random.default_rng(0), len(held) // 2
    found = {"the other half": [], **{name: [] for name in candidates}}
    for _ in range(splits):
        cells = rng.permutation(held)
        found["the other half"].append(earth_mover(cells[half : 2 * half], cells[:half]))
        for name, cloud in candidates.items():
            pick = rng.choice(len(cloud), half, replace=len(cloud) < half)
            found[name].append(earth_mover(cloud[pick], cells[:half]))
    return {name: (np.mean(row), np.std(row)) for name, row in found.items()}


def hold_out(days, clouds, draws, quick):
    """Leave 48 hours out; fit, bridge, compare."""
    kept = [0, 1, 3]
    rest = [clouds[k] for k in kept]
    samples = fit(days[kept], rest, draws)
    rate, middle, scale = (samples[name].mean(axis=0) for name in ("rate", "rest", "scale"))
    number = 40 if quick else 200
    references = {
        "bridge, fitted equation": equation(rate, middle, scale),
        "bridge, Brownian": equation(jnp.zeros(2), middle, scale),
    }
    clouds_at = {"cells of 24 hours": clouds[1], "cells of 72 hours": clouds[3]}
    for name, sde in references.items():
        paths = bridge_paths(sde, days[kept], rest, number)
        row = int(np.argmin(np.abs(np.asarray(paths.times) - days[2])))
        clouds_at[name] = np.asarray(paths.paths[:, row])
    return judge(clouds_at, clouds[2], 5 if quick else 50)


def draw(days, clouds, samples, output):
    """Clouds with paths of the bridge, in the plane and over time."""
    sde = equation(*(samples[name].mean(axis=0) for name in ("rate", "rest", "scale")))
    paths = bridge_paths(sde, days, clouds, 40)
    figure = plt.figure(figsize=(10.0, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.0, 1.1])
    nsde.snapshots.plot_snapshots(days, clouds, paths, labels=NAMES, axes=left.subplots())
    nsde.snapshots.plot_snapshots(
        days, clouds, paths, over="time", labels=NAMES, axes=right.subplots(2, 1, sharex=True)
    )
    figure.savefig(output / "myoblasts.png", dpi=100)


def main(output: Path, quick: bool) -> None:
    """Posterior of all clouds, then the test on 48 hours."""
    days, clouds = read(quick)
    draws = 20 if quick else 200
    samples = fit(days, clouds, draws)
    for k, name in enumerate(NAMES):
        low, median, high = np.quantile(np.asarray(samples["rate"][:, k]), [0.05, 0.5, 0.95])
        hours = 24.0 * np.log(2.0) / np.array([high, median, low])
        print(
            f"{name}: half of the way in {hours[1]:.1f} hours ({hours[0]:.1f} to {hours[2]:.1f}), "
            f"to {samples['rest'][:, k].mean():.2f} +- {samples['rest'][:, k].std():.2f}"
        )
    print("held out, 48 hours: mean distance to half of the cells, and its spread over halves")
    for name, (mean, spread) in hold_out(days, clouds, draws, quick).items():
        print(f"  {name:24} {mean:.3f} +- {spread:.3f}")
    draw(days, clouds, samples, output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the script")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    nsde.configure_cpu()
    main(options.output, options.quick)
