"""Simulation-based calibration of PMMH on a jump-diffusion.

    python benchmarks/calibration_jump_diffusion.py [--replicates 200] [--proposal guided]

A mean-reverting level that leaps: dX = -X dt + scale dW + jumps at a Poisson rate, normal of
standard deviation 1.5; seen twelve times with noise of 0.3, one value missing. The rate of the
jumps and the volatility are unknown. Prints the table of ranks; 300 + 3,000 iterations for each
replicate, every tenth kept, one compiled function of key and data.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist

import numpyro_sde as nsde
from numpyro_sde.diagnostics import compiled_chain, sbc

TIMES = 0.5 * np.arange(12)
PATTERN = np.where(np.arange(TIMES.size) == 5, np.nan, 0.0)


def model(y=None):
    """A level with jumps, noisy observations."""
    jump_rate = numpyro.sample("jump_rate", dist.LogNormal(-0.7, 0.7))
    scale = numpyro.sample("scale", dist.LogNormal(-0.7, 0.5))
    sde = nsde.SDE(
        lambda t, x, p: -x,
        lambda t, x, p: p["scale"],
        params={"jump_rate": jump_rate, "scale": scale},
        jumps=nsde.CompoundPoisson(
            lambda t, x, p: p["jump_rate"], dist.Normal(0.0, 1.5), max_per_step=16
        ),
    )
    x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 1.0)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicates", type=int, default=200)
    parser.add_argument("--particles", type=int, default=32)
    parser.add_argument("--proposal", default="guided")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    kernel = nsde.infer.PMMH(model, arguments.particles, proposal=arguments.proposal)
    # Tuned once, on data of the middle of the prior: one program then serves all replicates.
    middle = numpyro.handlers.condition(model, {"jump_rate": 0.5, "scale": 0.5})
    drawn = numpyro.infer.Predictive(middle, num_samples=1)(jax.random.key(1))["y"][0]
    kernel.tune(jax.random.key(2), np.where(np.isnan(PATTERN), np.nan, drawn))
    run = compiled_chain(kernel, 300, 3000, thinning=10)
    start = time.perf_counter()
    result = sbc(
        model,
        lambda key, data: run(key, data["y"]),
        arguments.replicates,
        model_kwargs={"y": PATTERN},
        path=None if arguments.output is None else arguments.output / "jumps.npz",
    )
    print(f"PMMH, {arguments.proposal}, {time.perf_counter() - start:.0f} s\n{result}")


if __name__ == "__main__":
    nsde.configure_cpu()
    main()
