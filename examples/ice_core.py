"""When does the climate flip? Abrupt warmings in an ice core.

In the last ice age Greenland warmed by some ten degrees within decades, again and again
(Dansgaard-Oeschger events), and the oxygen isotopes of an ice core show it as two levels. A state
in a double well, seen through a noisy core, with a century between the samples: the extended Kalman
filter integrates the path out, NUTS samples the parameters, and these say how long a climate lasts
and how likely the next thousand years are to hold a flip.

The record is simulated, so that the truth is known. Your own goes in as
`python examples/ice_core.py --data GISP2.csv`: columns `Age [yr BP]` and `d18O [permil]`, as public
archives have the core GISP2 (Grootes and Stuiver 1997, J. Geophys. Res. 102, 26455-26470); it is
averaged over centuries between 20,000 and 50,000 years before present.
Source of the model: Ditlevsen (1999), Geophys. Res. Lett. 26, 1441-1444.

:title: An ice core
:problem: two states that a climate flips between, seen through noise
:field: climate
:engine: NUTS, path integrated out by ExtendedKalman
:data: simulated, or a record of yours
:tags: two wells, nonlinear, first passage, forecast
:page: integrated_out.md
:run time: 22 s of processor time
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
from numpyro.infer import MCMC, NUTS, init_to_median

import numpyro_sde as nsde

mpl.use("Agg")
import matplotlib.pyplot as plt

# Pull of a well (1/kyr), noise of the state, permil: mid-level, half the distance of levels, noise.
TRUE = {"pull": 5.0, "scale": 1.5, "level": -41.0, "half": 2.0, "noise": 0.6}
CENTURY = 0.1  # kyr


def core(grid, y=None):
    """A state with wells at -1 (cold) and 1 (warm), and isotopes that show it."""
    pull = numpyro.sample("pull", dist.LogNormal(np.log(4.0), 0.7))
    scale = numpyro.sample("scale", dist.LogNormal(np.log(1.5), 0.5))
    level = numpyro.sample("level", dist.Normal(-41.0, 1.0))
    half = numpyro.sample("half", dist.LogNormal(np.log(2.0), 0.3))
    noise = numpyro.sample("noise", dist.LogNormal(np.log(0.5), 0.5))
    well = nsde.processes.DoubleWell(pull, pull, scale)
    x = numpyro.sample("x", nsde.SDEPath(well, grid, init=dist.Normal(0.0, 1.0)))
    nsde.observe(
        "y",
        x,
        lambda t, x, p: dist.Normal(p["level"] + p["half"] * x, p["noise"]),
        params={"level": level, "half": half, "noise": noise},
        obs=y,
        at=grid.index,
    )


def simulated(num):
    """Centuries and isotopes of a core, simulated with steps of a year or two."""
    times = CENTURY * np.arange(num)
    fixed = numpyro.handlers.substitute(core, data=TRUE)
    fine = nsde.TimeGrid(times, 0.002)
    drawn = numpyro.handlers.trace(numpyro.handlers.seed(fixed, 2)).get_trace(fine)
    return times, np.asarray(drawn["y"]["value"])


def read(path, first=20.0, last=50.0):
    """Means over centuries; NaN where a century has no sample. Time runs towards the present."""
    table = np.genfromtxt(path, delimiter=",", names=True, deletechars="", replace_space=" ")
    kyr, isotopes = table["Age [yr BP]"] / 1000.0, table["d18O [permil]"]
    kept = (kyr >= first) & (kyr < last) & np.isfinite(isotopes)
    place = np.floor((last - kyr[kept]) / CENTURY).astype(int)
    num = round((last - first) / CENTURY)
    count = np.bincount(place, minlength=num)[:num]
    total = np.bincount(place, isotopes[kept], minlength=num)[:num]
    return CENTURY * np.arange(num), np.where(count > 0, total / np.maximum(count, 1), np.nan)


def residence(pull, scale):
    """Mean time from the bottom of one well to that of the other, kyr.

    Twice the integral of exp(2 V / s^2) times that of exp(-2 V / s^2) up to there, over s^2.
    """
    x = np.linspace(-4.0, 1.0, 4001)
    potential = pull * (x**4 / 4.0 - x**2 / 2.0)
    inner = np.cumsum(np.exp(-2.0 * potential / scale**2)) * (x[1] - x[0])
    outer = np.where(x >= -1.0, np.exp(2.0 * potential / scale**2) * inner, 0.0)
    return 2.0 / scale**2 * outer.sum() * (x[1] - x[0])


def flips(samples, last, num):
    """Share of futures of one kyr that reach the other well, from the last state of each draw."""
    times = np.linspace(0.0, 1.0, 501)

    @jax.jit
    def one(pull, scale, x, key):
        well = nsde.processes.DoubleWell(pull, pull, scale)
        path = nsde.SDEPath(well, times, init=x, scheme=nsde.schemes.Euler()).sample(key)
        return jnp.any(path * jnp.sign(x) < -1.0)

    keys = jax.random.split(jax.random.key(3), num)
    chosen = (samples["pull"][:num], samples["scale"][:num], last[:num], keys)
    return np.asarray(jax.lax.map(lambda args: one(*args), chosen)).mean()


def draw(output, times, y, x, lasting, truth):
    """The record with its path, and the posterior of the time that a climate lasts."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10.0, 3.6), layout="constrained", width_ratios=[3.0, 1.0]
    )
    low, middle, high = np.quantile(x, [0.05, 0.5, 0.95], axis=0)
    left.plot(times, y, "k.", markersize=3, label="core")
    left.fill_between(times, low, high, alpha=0.4, linewidth=0, label="climate, 90 %")
    left.plot(times, middle, linewidth=0.9)
    left.set(xlabel="thousands of years", ylabel="oxygen isotopes, permil")
    left.legend(frameon=False, fontsize="small")
    right.hist(lasting, bins=30, density=True)
    if truth is not None:
        right.axvline(truth, color="black", linewidth=0.8, label="truth")
        right.legend(frameon=False, fontsize="small")
    right.set(xlabel="a climate lasts, kyr", yticks=[])
    figure.savefig(output / "ice_core.png", dpi=100)


def main(output: Path, quick: bool, data: Path | None) -> None:
    """Fit the record, say how long a climate lasts, draw it."""
    times, y = simulated(300) if data is None else read(data)
    if quick:
        times, y = times[:40], y[:40]
    grid = nsde.TimeGrid(times, 0.05)
    marginal = nsde.handlers.marginalize(core, method=nsde.filters.ExtendedKalman())
    draws = 20 if quick else 250
    kernel = NUTS(marginal, init_strategy=init_to_median)
    mcmc = MCMC(kernel, num_warmup=draws, num_samples=draws, progress_bar=False)
    mcmc.run(jax.random.key(0), grid, y)
    samples = {name: np.asarray(value) for name, value in mcmc.get_samples().items()}
    for name, true in TRUE.items():
        known = f" (true {true})" if data is None else ""
        print(f"{name:6} {samples[name].mean():.2f} +- {samples[name].std():.2f}{known}")
    pairs = zip(samples["pull"], samples["scale"], strict=True)
    lasting = np.array([residence(*pair) for pair in pairs])
    truth = residence(TRUE["pull"], TRUE["scale"]) if data is None else None
    low, middle, high = np.quantile(lasting, [0.05, 0.5, 0.95])
    known = "" if truth is None else f" (true {truth:.2f})"
    print(f"a climate lasts {middle:.2f} kyr, 90 %: {low:.2f} to {high:.2f}{known}")
    x = np.asarray(nsde.smooth(marginal, samples, grid, y, rng_key=jax.random.key(1))["x"])
    x = x[:, grid.index]
    chance = flips(samples, x[:, -1], draws)
    print(f"a flip in the next thousand years: {chance:.2f}")
    shown = samples["level"][:, None] + samples["half"][:, None] * x
    draw(output, times, y, shown, lasting, truth)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output"))
    parser.add_argument("--data", type=Path, help="a record of yours; simulated without")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the script")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    nsde.configure_cpu()
    main(options.output, options.quick, options.data)
