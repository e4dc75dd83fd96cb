"""Fifty neurons that share a latent drive: Poisson counts in 2,000 bins.

Each neuron fires with rate `exp(level + gain x)`, x an Ornstein-Uhlenbeck process that all of them
see. Levels and gains of 50 neurons, two parameters of the process and its 2,000 states: NUTS along
the guided path, whose reference follows the parameters: they move level and size of the whole path.
Counts are simulated, so that the truth is known. The data know gain times drive; how large each
is, the prior says, under which the drive has standard deviation one. This one has 1.11: it is drawn
in, and the gains come out too large by one factor.
Run: python examples/neurons.py [--quick] [--output folder]

:title: Fifty neurons, one drive
:problem: spikes of many neurons that share an input
:field: neuroscience
:engine: SplitNUTS on the guided path
:data: simulated, 2,000 bins
:tags: counts, many instruments
:page: missing_data.md
:run time: 101 s of processor time
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

NEURONS, BINS, WIDTH = 50, 2_000, 0.01  # seconds
RATE, LEVEL, GAIN = 3.0, -2.0, 0.6  # 1/s; log counts a bin; log counts a unit of x


def population(counts):
    """Counts `(neuron, bin)`; the process has stationary standard deviation one."""
    rate = numpyro.sample("rate", dist.LogNormal(1.0, 0.7))
    gain_mean = numpyro.sample("gain_mean", dist.Normal(0.5, 0.5))
    gain_sd = numpyro.sample("gain_sd", dist.HalfNormal(0.5))
    drive = nsde.processes.OrnsteinUhlenbeck(rate, 0.0, jnp.sqrt(2.0 * rate))
    times = np.arange(counts.shape[-1]) * WIDTH
    x = numpyro.sample("x", nsde.SDEPath(drive, times, init=dist.Normal(0.0, 1.0)))
    with numpyro.plate("neuron", counts.shape[0]):
        level = numpyro.sample("level", dist.Normal(-2.0, 1.0))
        gain = numpyro.sample("gain", dist.Normal(gain_mean, gain_sd))
        nsde.observe(
            "counts",
            x,
            lambda t, x, p: dist.Poisson(jnp.exp(p["level"] + p["gain"] * x)),
            params={"level": level, "gain": gain},
            obs=counts,
        )


def simulated(neurons, bins):
    """Counts, the drive, and each neuron's gain."""
    rng = np.random.default_rng(7)
    decay = np.exp(-RATE * WIDTH)
    x = np.zeros(bins)
    x[0] = rng.normal()
    for k in range(1, bins):
        x[k] = decay * x[k - 1] + np.sqrt(1.0 - decay**2) * rng.normal()
    level = LEVEL + 0.5 * rng.normal(size=(neurons, 1))
    gain = GAIN + 0.3 * rng.normal(size=(neurons, 1))
    return rng.poisson(np.exp(level + gain * x)).astype(float), x, gain[:, 0]


def main() -> None:
    """Fit, and draw the drive and the gains beside the truth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("neurons_output"), help="a folder")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the script")
    parser.add_argument("--draws", type=int, nargs=2, default=(100, 500), help="warm-up, draws")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    neurons, bins = (5, 60) if options.quick else (NEURONS, BINS)
    counts, truth, gains = simulated(neurons, bins)
    warmup, draws = (15, 15) if options.quick else options.draws

    guide = nsde.reparam.GuidedReparam(follow=2)
    guided = numpyro.handlers.reparam(population, config={"x": guide})
    mcmc = MCMC(
        nsde.infer.SplitNUTS(guided),
        num_warmup=warmup,
        num_samples=draws,
        progress_bar=False,
    )
    clocks = time.perf_counter(), time.process_time()
    mcmc.run(jax.random.key(0), counts, extra_fields=("num_steps", "diverging"))
    samples = jax.block_until_ready(mcmc.get_samples())
    seconds, cpu = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
    fields = mcmc.get_extra_fields()
    table = summary(
        {k: np.asarray(samples[k])[None] for k in ("rate", "gain_mean", "gain_sd", "gain", "level")}
    )
    least = {k: float(np.min(row["n_eff"])) for k, row in table.items()}
    x = np.asarray(samples["x"])
    print(
        f"{seconds:.0f} s, {cpu:.0f} s of processor time, compilation included; "
        f"{float(fields['num_steps'].mean()):.0f} steps a draw, "
        f"{int(fields['diverging'].sum())} divergences; min ESS "
        + ", ".join(f"{k} {v:.0f}" for k, v in least.items())
    )
    low, high = np.quantile(x, [0.05, 0.95], axis=0)
    print(
        f"rate {samples['rate'].mean():.2f} (true {RATE}), mean gain "
        f"{samples['gain_mean'].mean():.2f} (true {gains.mean():.2f}); the drive lies in its 90 "
        f"per cent band {np.mean((truth > low) & (truth < high)):.0%} of the time"
    )

    figure, axes = plt.subplots(
        1, 2, figsize=(13.0, 4.0), layout="constrained", width_ratios=(3, 1)
    )
    times = np.arange(bins) * WIDTH
    plot_paths({"x": x}, times=times, ax=axes[0], intervals=(0.9,), label="drive")
    axes[0].plot(times, truth, color="black", linewidth=0.7, label="true")
    axes[0].set(xlabel="seconds", ylabel="shared drive")
    axes[0].legend(frameon=False)
    low, middle, high = np.quantile(np.asarray(samples["gain"]), [0.05, 0.5, 0.95], axis=0)
    axes[1].errorbar(gains, middle, [middle - low, high - middle], fmt="o", markersize=3)
    axes[1].axline((GAIN, GAIN), slope=1.0, color="black", linewidth=0.7)
    axes[1].set(xlabel="true gain", ylabel="gain, 90 per cent")
    figure.savefig(options.output / "neurons.png", dpi=110)
    print(f"wrote {options.output / 'neurons.png'}")


if __name__ == "__main__":
    numpyro.enable_x64()
    nsde.configure_cpu()
    main()
