"""How mobile is each molecule? Single-particle tracks with localisation error and lost frames.

Twelve tracks of free diffusion, each with a mobility of its own, drawn from a population. The error
of localisation is shared, a tenth of the frames is lost. Kalman integrates every path out in a
plate, NUTS samples the population. Simulated, so that the truth is known.

:title: Single-particle tracks
:problem: many short tracks, each particle its own mobility
:field: physics
:engine: NUTS, paths integrated out by Kalman in a plate
:data: simulated
:tags: panel, random effects, missing data
:page: batching.md
:run time: 57 s
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

TRACKS, FRAMES, STEP = 12, 40, 0.05  # seconds between frames
CENTRE, SPREAD, ERROR = -1.0, 0.5, 0.08  # log um/root s; um


def tracks(times, y):
    """Free diffusion of each particle, and an error of localisation that all share."""
    centre = numpyro.sample("centre", dist.Normal(-1.0, 1.0))
    spread = numpyro.sample("spread", dist.HalfNormal(1.0))
    error = numpyro.sample("error", dist.LogNormal(-2.5, 0.7))
    with numpyro.plate("track", y.shape[0]):
        mobility = nsde.random_effects("mobility", centre, spread)  # log-normal
        walk = nsde.processes.BrownianMotion(0.0, mobility)
        x = numpyro.sample("x", nsde.SDEPath(walk, times, init=dist.Normal(0.0, 1.0)))
        nsde.observe("y", x, lambda t, x, sd: dist.Normal(x, sd), params=error, obs=y)


def main(output: Path, quick: bool) -> None:
    """Simulate tracks with lost frames, fit all of them together."""
    rng = np.random.default_rng(3)
    number, frames, draws = (3, 12, 20) if quick else (TRACKS, FRAMES, 250)
    times = np.arange(frames) * STEP
    mobility = np.exp(CENTRE + SPREAD * rng.normal(size=number))
    moves = mobility[:, None] * np.sqrt(STEP) * rng.normal(size=(number, frames - 1))
    x = np.concatenate([np.zeros((number, 1)), np.cumsum(moves, axis=1)], axis=1)
    y = np.where(rng.uniform(size=x.shape) < 0.1, np.nan, x + ERROR * rng.normal(size=x.shape))
    marginal = nsde.handlers.marginalize(tracks, method=nsde.filters.Kalman())
    mcmc = MCMC(NUTS(marginal), num_warmup=draws, num_samples=draws, progress_bar=False)
    mcmc.run(jax.random.key(0), times, y)
    samples = mcmc.get_samples()
    for name, true in (("centre", CENTRE), ("spread", SPREAD), ("error", ERROR)):
        print(f"{name:7} {samples[name].mean():.3f} +- {samples[name].std():.3f} (true {true})")
    found = np.asarray(samples["mobility"])
    low, middle, high = np.quantile(found, [0.05, 0.5, 0.95], axis=0)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.4), layout="constrained")
    left.plot(times, y.T, linewidth=0.8)
    left.set(xlabel="seconds", ylabel="position, um")
    right.errorbar(mobility, middle, [middle - low, high - middle], fmt="o", markersize=4)
    right.axline((0.4, 0.4), slope=1.0, color="black", linewidth=0.7)
    right.set(xlabel="true mobility, um per root second", ylabel="mobility, 90 per cent")
    figure.savefig(output / "particle_tracks.png", dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the script")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    nsde.configure_cpu()
    main(options.output, options.quick)
