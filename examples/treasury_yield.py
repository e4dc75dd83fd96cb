"""Long memory of an interest rate: the one-year US Treasury yield, monthly, 1953 to 1999.

A fractional walk, `dX = drift dt + scale dB_H`, seen directly. Maximum likelihood under the exact
law of its increments, and the posterior with the noise made Markov, `SDEPath` with `MarkovFBM`.
The econometricians' order of integration d is `H + 1/2` of this walk; the semiparametric
estimator that the published figure is by, Robinson's (1995), is computed here too, for it depends
on how many frequencies are used. Run: python examples/treasury_yield.py [--draws 1000]

:title: Long memory of a yield
:problem: is a walk rougher or smoother than Brownian?
:field: finance
:engine: maximum likelihood and NUTS, MarkovFBM
:data: real, monthly 1953 to 1999
:tags: fractional noise, Hurst index
:page: fractional.md
:run time: 41 s of processor time
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
from numpyro.infer import MCMC, NUTS
from scipy.optimize import minimize, minimize_scalar

import numpyro_sde as nsde

mpl.use("Agg")
import matplotlib.pyplot as plt

PUBLISHED = """published, of the nearest series: order of integration of monthly US interest rates
"oscillating around 1.23" by Robinson's estimator, that is H 0.73 (Gil-Alana 2004, "Estimation of
the order of integration in the UK and the US interest rates using fractionally integrated
semiparametric techniques", European Research Studies Journal 7, 29-40; from its abstract, which
names neither maturity nor years). Treasury rates "I(1) in most cases", the order falling with
maturity (Caporale and Gil-Alana 2010, "Fractional cointegration in US term spreads", DIW
discussion paper 981)"""


def maximum_likelihood(changes):
    """H of the changes, their mean and scale free."""

    @jax.jit
    @jax.value_and_grad
    def objective(p):
        noise = nsde.distributions.FractionalGaussianNoise(len(changes), 1.0, p[0], jnp.exp(p[2]))
        return -noise.log_prob(changes - p[1])

    start = np.array([0.6, changes.mean(), np.log(changes.std())])
    bounds = [(0.02, 0.98), (-1.0, 1.0), (-5.0, 3.0)]
    return minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds).x[0]


def local_whittle(changes, num_frequencies):
    """Order of integration of the sums: Robinson's (1995) Gaussian semiparametric estimate."""
    n = len(changes)
    frequency = 2.0 * np.pi * np.arange(1, num_frequencies + 1) / n
    power = np.abs(np.fft.fft(changes)[1 : num_frequencies + 1]) ** 2

    def objective(d):
        return np.log(np.mean(frequency ** (2 * d) * power)) - 2 * d * np.log(frequency).mean()

    return 1.0 + minimize_scalar(objective, bounds=(-0.49, 0.99), method="bounded").x


def model(times, rate):
    hurst = numpyro.sample("hurst", dist.Uniform(0.02, 0.98))
    drift = numpyro.sample("drift", dist.Normal(0.0, 0.1))
    scale = numpyro.sample("scale", dist.LogNormal(-1.0, 1.0))
    sde = nsde.SDE(
        lambda t, x, p: p["drift"],
        lambda t, x, p: p["scale"],
        params={"drift": drift, "scale": scale},
        noise=nsde.noise.MarkovFBM(hurst),
    )
    numpyro.sample("rate", nsde.SDEPath(sde, times, init=rate[0]), obs=rate)


def draw(output, times, rate, hurst, best):
    """The series, and the posterior of its index."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9.0, 3.2), layout="constrained", width_ratios=[2.0, 1.0]
    )
    left.plot(times, rate, linewidth=0.8)
    left.set(xlabel="year", ylabel="one-year yield, per cent")
    right.hist(hurst, bins=30, density=True)
    right.axvline(best, color="black", linewidth=0.8, label="maximum likelihood")
    right.axvline(0.5, color="C3", linewidth=0.8, label="Brownian motion")
    right.set(xlabel="Hurst index", yticks=[])
    right.margins(y=0.35)  # room for the legend
    right.legend(framealpha=1.0, edgecolor="none", fontsize="small")
    figure.savefig(output / "treasury_yield.png", dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=Path("output"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    draws = options.draws
    numpyro.enable_x64()
    treasury = nsde.datasets.load_us_treasury()
    rate = treasury.yields[:, 0]
    changes = np.diff(rate)
    n = len(changes)
    print(f"{n} monthly changes; d = H + 1/2")
    best = maximum_likelihood(changes)
    print(f"maximum likelihood: H {best:.3f}, d {best + 0.5:.3f}")
    mcmc = MCMC(NUTS(model), num_warmup=draws // 2, num_samples=draws, progress_bar=False)
    mcmc.run(jax.random.key(0), np.arange(len(rate), dtype=float), rate)
    hurst = np.asarray(mcmc.get_samples()["hurst"])
    print(f"posterior: H {hurst.mean():.3f} +- {hurst.std():.3f}, d {hurst.mean() + 0.5:.3f}")
    for count in (int(n**0.5), int(n**0.6), int(n**0.7), int(n**0.8), n // 2):
        order = local_whittle(changes, count)
        print(f"Robinson's estimate, {count} lowest frequencies: d {order:.3f}")
    print(PUBLISHED)
    draw(options.output, treasury.times, rate, hurst, best)


if __name__ == "__main__":
    main()
