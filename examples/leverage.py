"""Stochastic volatility with leverage: 1,000 daily log prices seen exactly, two engines.

The log price is a component of the state that is seen without noise, the log variance is latent,
and their noises are correlated. Guided SplitNUTS walks along paths that meet every price; particle
Gibbs draws such paths by particles that meet them. They share the model and nothing else, and must
agree within their Monte Carlo errors. Data are simulated from known parameters.
Run: python examples/leverage.py [--quick] [--output folder]

:title: Volatility with leverage
:problem: prices seen exactly, a volatility that no one sees
:field: finance
:engine: SplitNUTS on the guided path, particle Gibbs
:data: simulated, 1,000 days
:tags: partly seen, stochastic volatility, particles
:page: partly_seen.md
:run time: 129 s of processor time
:picture: leverage.png
"""

# ruff: noqa: ARG005
# Functions of one protocol share its arguments, used or not.

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.diagnostics import summary
from numpyro.infer import MCMC

import numpyro_sde as nsde
from numpyro_sde.diagnostics import plot_paths

mpl.use("Agg")
import matplotlib.pyplot as plt

DAYS = 1_000
YEAR = 252.0
TRUTH = {"rate": 5.0, "mean": -3.2, "scale": 1.8, "leverage": -0.6, "drift": 0.08}


def volatility(price):
    """A log price at the end of each day, and its log variance (of a year)."""
    rate = numpyro.sample("rate", dist.LogNormal(1.5, 0.7))
    mean = numpyro.sample("mean", dist.Normal(-3.0, 1.0))
    scale = numpyro.sample("scale", dist.LogNormal(0.5, 0.5))
    leverage = numpyro.sample("leverage", dist.Uniform(-1.0, 1.0))
    drift = numpyro.sample("drift", dist.Normal(0.05, 0.2))
    sde = nsde.processes.StochasticVolatility(rate, mean, scale, leverage, drift)
    spread = scale / jnp.sqrt(2.0 * rate)
    init = dist.Normal(
        jnp.stack([jnp.asarray(price[0]), mean]), jnp.stack([1e-3 + 0 * mean, spread])
    )
    path = nsde.SDEPath(sde, np.arange(len(price)) / YEAR, init.to_event(1))
    x = numpyro.sample("x", path)
    nsde.observe("price", x, lambda t, x: dist.Delta(x[0]), obs=price)


def simulated(days):
    """Log prices by ten Euler steps a day, so that the model's daily step is an approximation."""
    rng, fine = np.random.default_rng(3), 10
    h = 1.0 / (YEAR * fine)
    x, v = np.zeros(days * fine), np.full(days * fine, TRUTH["mean"])
    for k in range(1, days * fine):
        z = rng.normal(size=2)
        own = np.sqrt(1.0 - TRUTH["leverage"] ** 2)
        x[k] = x[k - 1] + (TRUTH["drift"] - 0.5 * np.exp(v[k - 1])) * h
        x[k] += np.exp(0.5 * v[k - 1]) * np.sqrt(h) * z[0]
        noise = TRUTH["leverage"] * z[0] + own * z[1]
        v[k] = v[k - 1] + TRUTH["rate"] * (TRUTH["mean"] - v[k - 1]) * h
        v[k] += TRUTH["scale"] * np.sqrt(h) * noise
    return x[::fine], v[::fine]


def kernels():
    """The two engines."""
    guided = numpyro.handlers.reparam(volatility, config={"x": nsde.reparam.GuidedReparam()})
    return {
        "guided SplitNUTS": nsde.infer.SplitNUTS(guided),
        "particle Gibbs": nsde.infer.ParticleGibbs(volatility, num_particles=24),
    }


def main() -> None:
    """Fit by both engines and hold their means against each other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("leverage_output"), help="a folder")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the script")
    parser.add_argument("--draws", type=int, nargs=2, default=(600, 4_000))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    days = 60 if options.quick else DAYS
    price, truth = simulated(days)
    draws = (20, 40) if options.quick else options.draws
    found, paths = {}, {}
    for (name, kernel), number in zip(kernels().items(), draws, strict=True):
        mcmc = MCMC(
            kernel, num_warmup=min(number // 2, 1_000), num_samples=number, progress_bar=False
        )
        clocks = time.perf_counter(), time.process_time()
        mcmc.run(jax.random.key(1), price)
        samples = jax.block_until_ready(mcmc.get_samples())
        seconds, cpu = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
        table = summary({k: np.asarray(samples[k])[None] for k in TRUTH})
        print(f"{name}: {seconds:.0f} s, {cpu:.0f} s of processor time, compilation included")
        found[name] = table
        paths[name] = np.asarray(samples["x"][..., 1])
        for key, row in table.items():
            print(
                f"  {key:9} {row['mean']:7.3f} sd {row['std']:.3f} ESS {row['n_eff']:5.0f} "
                f"(true {TRUTH[key]})",
                flush=True,
            )
    one, other = found.values()
    for key in TRUTH:
        error = np.hypot(*(t[key]["std"] / np.sqrt(t[key]["n_eff"]) for t in (one, other)))
        away = (one[key]["mean"] - other[key]["mean"]) / error
        print(f"{key:9} the engines differ by {away:+.1f} Monte Carlo errors")

    times = np.arange(days) / YEAR
    figure, axes = plt.subplots(2, 1, figsize=(11.0, 7.0), sharex=True, layout="constrained")
    axes[0].plot(times, price, color="black", linewidth=0.8)
    axes[0].set(ylabel="log price")
    for (name, v), colour in zip(paths.items(), ("C0", "C1"), strict=True):
        volatilities = np.exp(0.5 * v)
        plot_paths(
            {"v": volatilities},
            "v",
            times=times,
            ax=axes[1],
            intervals=(0.9,),
            color=colour,
            label=name,
        )
    axes[1].plot(times, np.exp(0.5 * truth), color="black", linewidth=0.8, label="true")
    axes[1].set(ylabel="volatility of a year", xlabel="years")
    axes[1].legend(frameon=False)
    figure.savefig(options.output / "leverage.png", dpi=110)
    print(f"wrote {options.output / 'leverage.png'}")


if __name__ == "__main__":
    numpyro.enable_x64()
    nsde.configure_cpu()
    main()
