"""Long memory of the Nile: the Hurst index of its yearly minima, 622 to 1284.

Maximum likelihood and the posterior under the exact law of fractional Gaussian noise, beside the
published estimates. Run: python examples/nile_minima.py [--draws 1000]

:title: Long memory of the Nile
:problem: a series that forgets slowly
:field: climate
:engine: maximum likelihood and NUTS, exact law
:data: real, 663 years
:tags: fractional noise, Hurst index
:page: fractional.md
:run time: 29 s of processor time
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
from numpyro.infer import MCMC, NUTS
from scipy.optimize import minimize

import numpyro_sde as nsde

mpl.use("Agg")
import matplotlib.pyplot as plt

PUBLISHED = """published: exact maximum likelihood 0.8315, log likelihood 236.52 (McLeod, Yu and
Krougly 2007); Whittle 0.84 (Beran 1994)"""


def noise(hurst, log_scale, length):
    return nsde.distributions.FractionalGaussianNoise(length, 1.0, hurst, jnp.exp(log_scale))


def maximum_likelihood(level):
    @jax.jit
    @jax.value_and_grad
    def objective(p):
        return -noise(p[0], p[2], len(level)).log_prob(level - p[1])

    start = np.array([0.7, level.mean(), np.log(level.std())])
    bounds = [(0.02, 0.98), (0.0, 25.0), (-4.0, 4.0)]
    return minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds)


def model(level):
    hurst = numpyro.sample("hurst", dist.Uniform(0.02, 0.98))
    mean = numpyro.sample("mean", dist.Uniform(0.0, 25.0))
    log_scale = numpyro.sample("log_scale", dist.Uniform(-4.0, 4.0))
    numpyro.factor("level", noise(hurst, log_scale, len(level)).log_prob(level - mean))


def draw(output, times, level, hurst):
    """The series, and the posterior of its index."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9.0, 3.2), layout="constrained", width_ratios=[2.0, 1.0]
    )
    left.plot(times, level, linewidth=0.6)
    left.set(xlabel="year", ylabel="lowest level, metres on the gauge")
    right.hist(hurst, bins=30, density=True)
    right.axvline(0.8315, color="black", linewidth=0.8, label="published")
    right.margins(y=0.2)  # room for the legend
    right.set(xlabel="Hurst index", yticks=[])
    right.legend(frameon=False, fontsize="small")
    figure.savefig(output / "nile_minima.png", dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=Path("output"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    draws = options.draws
    numpyro.enable_x64()
    times, level = nsde.datasets.load_nile_minima()
    level = level / 100.0
    fit = maximum_likelihood(level)
    constant = -0.5 * len(level) * (np.log(2 * np.pi) + 1)
    print(f"maximum likelihood: H {fit.x[0]:.4f}, log likelihood {-fit.fun - constant:.2f}")
    mcmc = MCMC(NUTS(model), num_warmup=draws // 2, num_samples=draws, progress_bar=False)
    mcmc.run(jax.random.key(0), level)
    hurst = np.asarray(mcmc.get_samples()["hurst"])
    print(f"posterior: H {hurst.mean():.3f} +- {hurst.std():.3f}")
    print(PUBLISHED)
    draw(options.output, times, level, hurst)


if __name__ == "__main__":
    main()
