"""Energy exchange among three modes: two fast ones make the slow one a diffusion.

The triad of Majda, Timofeyev and Vanden-Eijnden: `dX = (B1/eps) Y1 Y2 dt`, with fast modes that are
damped, driven, and feel the slow one, `B1 + B2 + B3 = 0`. The force on X has mean zero, so
averaging gives no motion at all; homogenisation gives a linear drift and a constant noise, here
from the cell problem (exact) and from a simulation of the fast modes alone (Green-Kubo), and
both are set against the full system.

    python examples/triad.py --output multiscale_output

:title: Energy among three modes
:problem: a closure for fast modes of turbulence
:field: physics
:engine: homogenisation, Green-Kubo
:data: simulated
:tags: multiscale, turbulence closure
:page: multiscale.md
:run time: 36 s of processor time
"""

# ruff: noqa: ARG005
# Functions of one protocol share its arguments, used or not.

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import numpyro_sde as nsde
from numpyro_sde.multiscale import GreenKubo

matplotlib.use("Agg")
import matplotlib.pyplot as plt

START = 1.5


def triad(epsilon):
    """The full system: one slow mode, two fast ones."""
    return nsde.SlowFastSDE(
        slow_drift=lambda t, x, y, p: 0.0 * x,
        slow_diffusion=lambda t, x, y, p: 0.0,
        fast_drift=lambda t, x, y, p: -p["gamma"] * y,
        fast_diffusion=lambda t, x, y, p: p["sigma"],
        epsilon=epsilon,
        params={
            "B": jnp.array([-1.0, 0.4, 0.6]),
            "gamma": jnp.array([1.0, 2.0]),
            "sigma": jnp.array([1.0, 1.0]),
        },
        event_dims={"B": 1, "gamma": 1, "sigma": 1},
        fast_dim=2,
        scaling="homogenization",
        slow_forcing=lambda t, x, y, p: p["B"][0] * y[0] * y[1],
        fast_forcing=lambda t, x, y, p: x * jnp.stack([p["B"][1] * y[1], p["B"][2] * y[0]]),
    )


def draw(sde, times, init, num_paths, seed):
    """Slow paths, by Euler steps on the times given."""
    law = nsde.SDEPath(sde, times, init=init, scheme=nsde.schemes.Euler())
    paths = jax.jit(lambda key: law.sample(key, (num_paths,)))(jax.random.key(seed))
    return np.asarray(paths[..., 0] if paths.ndim == 3 else paths)


def main() -> None:
    """Compare the full system with its limit, by both methods."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("multiscale_output"), help="a folder")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the script")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    num_paths, chains = (50, 256) if arguments.quick else (4_000, 65_536)

    full = triad(0.1)
    exact = nsde.homogenize(full)
    simulated = nsde.homogenize(full, GreenKubo(chains, window=2.5, burn_in=5.0))
    print("limit               drift at x = 1   diffusion   (closed form -0.13333, 0.28868)")
    for name, limit in (("cell problem", exact), ("Green-Kubo", simulated)):
        drift, diffusion = limit.drift_at(0.0, 1.0), limit.diffusion_at(0.0, 1.0)
        print(f"{name:18} {float(drift):15.5f} {float(diffusion):11.5f}")

    times = np.linspace(0.0, 3.0, 31)
    grid = full.grid(times, steps_per_scale=20)
    start = jnp.array([START, 0.0, 0.0])
    paths = {
        "full system": draw(full, grid, start, num_paths, 0)[:, grid.index],
        "homogenised": draw(exact, nsde.TimeGrid(times, 0.02), START, num_paths, 1)[:, ::5],
    }
    for name, x in paths.items():
        mean, error = x[:, 10].mean(), x[:, 10].std() / np.sqrt(num_paths)
        print(f"{name:18} at t = 1: mean {mean:.4f} +- {error:.4f}, variance {x[:, 10].var():.4f}")

    figure, axes = plt.subplots(1, 2, figsize=(10.0, 4.0), layout="constrained")
    for (name, x), colour, style in zip(paths.items(), ("C1", "C0"), ("-", "--"), strict=True):
        axes[0].plot(times, x[:8].T, color=colour, linewidth=0.6)
        low, high = np.quantile(x, [0.05, 0.95], axis=0)
        axes[1].fill_between(times, low, high, color=colour, alpha=0.2, linewidth=0)
        axes[1].plot(times, x.mean(axis=0), style, color=colour, label=name)
    axes[1].axhline(START, color="black", linestyle=":", label="averaged: no motion")
    axes[0].set(xlabel="time", ylabel="slow mode, eight paths each")
    axes[1].set(xlabel="time", ylabel="slow mode, mean and 90 per cent")
    axes[1].legend(frameon=False, fontsize="small")
    figure.savefig(arguments.output / "triad.png", dpi=120)
    print(f"wrote {arguments.output / 'triad.png'}")


if __name__ == "__main__":
    main()
