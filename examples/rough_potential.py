"""A particle in a rough potential: three posteriors of one path, one of them far off.

`dX = -X dt + sin(X/eps)/eps dt + dW`: above the scale `eps` of the roughness this is an
Ornstein-Uhlenbeck process, slowed down to the rate A = 0.192 and the diffusivity Sigma = 0.096
(`nsde.homogenize`). Fitted at the sampling step of the data, that same model gives A near 1,
with a small standard deviation. A scan over the step shows it; coarser data, or filtered
data, repair it.

    python examples/rough_potential.py --output multiscale_output

:title: A rough potential
:problem: a diffusion whose estimate hangs on the sampling step
:field: physics
:engine: NUTS, homogenised equation
:data: simulated
:tags: multiscale, homogenisation
:page: multiscale.md
:run time: 33 s of processor time
:picture: rough_potential.png
"""

# ruff: noqa: ARG005
# Functions of one protocol share its arguments, used or not.

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS

import numpyro_sde as nsde
from numpyro_sde.diagnostics import filtered_estimate, sampling_scale_scan

matplotlib.use("Agg")
import matplotlib.pyplot as plt

EPSILON, STEP = 0.1, 0.004


def rough():
    """The full equation."""
    return nsde.multiscale.TwoScaleLangevin(
        lambda x: x**2 / 2, jnp.cos, epsilon=EPSILON, temperature=0.5
    )


def simulate(total: float):
    """A path of the full equation by Euler steps that resolve `eps^2`, kept every 0.004."""
    times = STEP * np.arange(round(total / STEP) + 1)
    grid = nsde.TimeGrid(times, max_step=0.1 * EPSILON**2)
    path = nsde.SDEPath(rough(), grid, init=0.0, scheme=nsde.schemes.Euler())
    return times, np.asarray(jax.jit(path.sample)(jax.random.key(3)))[grid.index]


def slow_sde(A, Sigma):
    """The model of the slow scale."""
    return nsde.SDE(
        lambda t, x, p: -p["A"] * x,
        lambda t, x, p: jnp.sqrt(2.0 * p["Sigma"]),
        params={"A": A, "Sigma": Sigma},
    )


def priors():
    """Wide priors of rate and diffusivity."""
    A = numpyro.sample("A", dist.LogNormal(np.log(0.3), 1.0))
    Sigma = numpyro.sample("Sigma", dist.LogNormal(np.log(0.15), 1.0))
    return A, Sigma


def from_path(times, x):
    """The slow model of a path, at the steps it comes with; its exact transition density."""
    A, Sigma = priors()
    ou = nsde.processes.OrnsteinUhlenbeck(A, 0.0, jnp.sqrt(2.0 * Sigma))
    numpyro.sample("x", nsde.SDEPath(ou, times, init=x[0]), obs=x)


def from_filtered(fit):
    """The slow model of filtered data."""
    numpyro.factor("data", fit.log_likelihood(*priors()))


def main() -> None:
    """Simulate, scan, fit three ways, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("multiscale_output"), help="a folder")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the script")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    total, draws = (60.0, 20) if arguments.quick else (500.0, 1000)

    times, x = simulate(total)
    limit = nsde.homogenize(rough())
    truth = {
        "A": -float(limit.drift_at(0.0, 1.0)),
        "Sigma": float(limit.diffusion_at(0, 0)) ** 2 / 2,
    }
    print(f"homogenised: A = {truth['A']:.5f}, Sigma = {truth['Sigma']:.5f}")

    scan = sampling_scale_scan(
        x, times, slow_sde(0.5, 0.2), [0.004, 0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 1.0, 1.5]
    )
    print(scan)
    fit = filtered_estimate(x, times, lambda x: -x, width=1.0)
    stride = round(1.0 / STEP)
    problems = {
        "every step": (from_path, (times, x)),
        "every time unit": (from_path, (times[::stride], x[::stride])),
        "filtered data": (from_filtered, (fit,)),
    }
    posteriors = {}
    for name, (model, data) in problems.items():
        mcmc = MCMC(NUTS(model), num_warmup=draws // 2, num_samples=draws, progress_bar=False)
        mcmc.run(jax.random.key(0), *data)
        posteriors[name] = mcmc.get_samples()
        parts = []
        for key, value in truth.items():
            mean, sd = np.mean(posteriors[name][key]), np.std(posteriors[name][key])
            parts.append(f"{key} {mean:.4f} +- {sd:.4f} ({(mean - value) / sd:+.1f} sd)")
        print(f"{name:16} {', '.join(parts)}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scan.check({k: float(np.std(v)) for k, v in posteriors["every step"].items()})
    for warning in caught:
        print(f"warning: {warning.message}")

    figure, axes = plt.subplots(2, 2, figsize=(10.0, 7.0), layout="constrained")
    panels = scan.plot([axes[0, 0], axes[0, 1], axes[1, 0]])
    for axis, value in zip(panels, truth.values(), strict=False):
        axis.axhline(value, color="black", linestyle=":", label="homogenised")
    panels[-1].axhline(2.0 * truth["Sigma"], color="black", linestyle=":")
    panels[0].legend(frameon=False, fontsize="small", loc="lower left")
    for (name, draws_of), colour in zip(posteriors.items(), ("C3", "C0", "C2"), strict=True):
        axes[1, 1].plot(
            draws_of["A"], draws_of["Sigma"], ".", markersize=2, color=colour, label=name
        )
    axes[1, 1].plot(*truth.values(), "k+", markersize=12, label="homogenised")
    axes[1, 1].set(xlabel="A", ylabel="Sigma", xscale="log", yscale="log")
    axes[1, 1].legend(frameon=False, fontsize="small")
    figure.savefig(arguments.output / "rough_potential.png", dpi=120)
    print(f"wrote {arguments.output / 'rough_potential.png'}")


if __name__ == "__main__":
    main()
