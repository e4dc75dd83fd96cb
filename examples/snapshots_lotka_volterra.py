"""Two snapshot problems of the literature: Lotka-Volterra and the repressilator, simulated.

Every second cloud is held out. A Brownian reference and one refined within its family are judged by
the earth mover's distance of their bridges to the held-out clouds, beside fresh draws of the truth.
Shen, Berlinghieri and Broderick (2024), arXiv:2408.06277, section 5.

    python examples/snapshots_lotka_volterra.py --output snapshots [--quick]

:title: Snapshots of two species
:problem: clouds of individuals, nobody seen twice
:field: cell biology
:engine: Schrodinger bridges, a refined reference
:data: simulated
:tags: snapshots, bridges
:run time: 146 s of processor time
:page: snapshots.md
"""

from __future__ import annotations

import argparse
import warnings
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS, init_to_median
from scipy.optimize import linear_sum_assignment

import numpyro_sde as nsde

SIGMA = 0.1


def lotka_volterra(t, x, p):  # noqa: ARG001
    eaten = x[0] * x[1]
    return jnp.stack(
        [p["alpha"] * x[0] - p["beta"] * eaten, p["delta"] * eaten - p["gamma"] * x[1]]
    )


def repressilator(t, x, p):  # noqa: ARG001
    above = jnp.maximum(jnp.roll(x, 1), 1e-3) / p["k"]
    return p["beta"] / (1.0 + above ** p["power"]) - p["gamma"] * x


def noise(t, x, p):  # noqa: ARG001
    return SIGMA


PROBLEMS = {
    "lotka_volterra": {
        "drift": lotka_volterra,
        "truth": {"alpha": 1.0, "beta": 0.4, "gamma": 0.4, "delta": 0.1},
        "start": np.array([5.0, 4.0]),
        "times": np.arange(9.0),
        "labels": ["prey", "predators"],
    },
    "repressilator": {
        "drift": repressilator,
        "truth": {"beta": 10.0, "k": 1.0, "power": 3.0, "gamma": 1.0},
        "start": np.array([1.0, 1.0, 2.0]),
        "times": np.arange(11.0),
        "labels": ["gene 1", "gene 2", "gene 3"],
    },
}


@partial(jax.jit, static_argnums=0)
def euler(path, key, x0):
    """Paths from each start; jitted here, so that it compiles once for a problem."""
    return path(x0).sample(key)


def simulate(problem, key, num_cells):
    """Fresh cells at each time: each cell has a path of its own and is seen once."""
    times = problem["times"]
    first, own = jax.random.split(key)
    shape = (len(times), num_cells, problem["start"].size)
    x0 = jnp.asarray(problem["start"]) + 0.1 * jax.random.uniform(first, shape)
    grid = nsde.TimeGrid(times, 0.005)
    paths = euler(problem["path"], own, x0)
    return np.stack([np.asarray(paths[k, :, row]) for k, row in enumerate(grid.index)])


def path_law(drift, truth, times):
    """The law of paths from given starts, by Euler steps of 0.005."""
    sde, grid = nsde.SDE(drift, noise, params=truth), nsde.TimeGrid(times, 0.005)

    def law(x0):
        return nsde.SDEPath(sde, grid, dist.Delta(x0, event_dim=1), scheme=nsde.schemes.Euler())

    return law


def family(snapshots, problem, times):
    """The mechanism with its parameters unknown, each within a factor of some around the truth."""
    params = {
        name: numpyro.sample(name, dist.LogNormal(float(np.log(value)) + 0.2, 0.4))
        for name, value in problem["truth"].items()
    }
    sde = nsde.SDE(problem["drift"], noise, params=params)
    law = nsde.SnapshotLaw(sde, nsde.TimeGrid(times, 0.1), snapshots[0])
    numpyro.sample("cells", law, obs=snapshots)


def earth_mover(a, b):
    """Mean distance of the best matching of two clouds."""
    cost = np.sqrt(((np.asarray(a)[:, None] - np.asarray(b)[None]) ** 2).sum(-1))
    return cost[linear_sum_assignment(cost)].mean()


def held_out_distance(paths, times, clouds):
    """Distance of a bridge's paths to each held-out cloud."""
    rows = [int(np.argmin(np.abs(paths.times - t))) for t in times]
    return [
        earth_mover(np.asarray(paths.paths[:, row]), cloud)
        for row, cloud in zip(rows, clouds, strict=True)
    ]


def study(name, problem, quick, output):
    """Fit, judge and plot one problem."""
    num_cells = 20 if quick else 50
    times, key = problem["times"], jax.random.key(7)
    clouds = simulate(problem, key, num_cells)
    kept, held = slice(0, None, 2), slice(1, None, 2)
    fit = nsde.refine_reference(
        family, clouds[kept], problem, times[kept], rounds=5 if quick else 100
    )
    print(f"{name}: {fit}")
    d = problem["start"].size
    plain = nsde.processes.LinearSDE(np.zeros((d, d)), np.zeros(d), SIGMA * np.eye(d))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rough = nsde.schrodinger_bridge(
            plain, times[kept], clouds[kept], max_iterations=200 if quick else 20_000
        )
    fresh = [simulate(problem, k, num_cells) for k in jax.random.split(key, 2 if quick else 20)]
    floor = [
        np.mean([earth_mover(one[k], clouds[k]) for one in fresh]) for k in range(1, len(times), 2)
    ]
    step = 0.2 if quick else 0.02
    paths = fit.bridge.sample_paths(jax.random.key(1), num_cells, max_step=step)
    lines = rough.sample_paths(jax.random.key(2), num_cells, max_step=step)
    rows = {
        "refined": held_out_distance(paths, times[held], clouds[held]),
        "Brownian": held_out_distance(lines, times[held], clouds[held]),
        "fresh draws": floor,
    }
    for label, row in rows.items():
        print(f"  {label:12s}" + "".join(f"{value:8.3f}" for value in row))
    draw(name, problem, clouds, paths, output)


def draw(name, problem, clouds, paths, output):
    """Clouds and paths, in the plane and over time; held-out clouds as crosses."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    times = problem["times"]
    for over in ("state", "time"):
        axes = nsde.snapshots.plot_snapshots(
            times[::2],
            clouds[::2],
            paths,
            over=over,
            components=(0, 1, 2)[: problem["start"].size] if over == "time" else (0, 1),
            labels=problem["labels"],
            held_out=(times[1::2], clouds[1::2]),
        )
        figure = np.ravel(axes)[0].figure
        figure.tight_layout()
        figure.savefig(output / f"{name}_{over}.png", dpi=110)
        plt.close(figure)


def posterior(problem, quick):
    """The mechanism's parameters by NUTS, all clouds used."""
    clouds = simulate(problem, jax.random.key(7), 20 if quick else 50)
    steps = 20 if quick else 150
    mcmc = MCMC(
        NUTS(family, init_strategy=init_to_median),
        num_warmup=steps,
        num_samples=steps,
        progress_bar=False,
    )
    mcmc.run(jax.random.key(3), clouds, problem, problem["times"])
    for name, draws in mcmc.get_samples().items():
        low, middle, high = np.quantile(np.asarray(draws), [0.05, 0.5, 0.95])
        truth = problem["truth"][name]
        print(f"  {name:6s} {middle:.3f} ({low:.3f} to {high:.3f}), truth {truth}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("snapshots"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    arguments = parser.parse_args()
    nsde.configure_cpu()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.problems:
        problem = PROBLEMS[name]
        problem["path"] = path_law(problem["drift"], problem["truth"], problem["times"])
        study(name, problem, arguments.quick, arguments.output)
        print(f"{name}: posterior, median and 90 % interval")
        posterior(problem, arguments.quick)


if __name__ == "__main__":
    main()
