"""Rough volatility: the Hurst index of a log volatility that nobody observes.

Log variances follow an Ornstein-Uhlenbeck equation driven by fractional Brownian motion,
`dv = rate (mean - v) dt + scale dB_H`. Twice: seen through realised variances of a few returns a
day, simulated from the exact law, and through one return a month, the changes of a US Treasury
yield. SplitNUTS runs on the guided path where the data say much of each state, else on the whitened
one. Beside its posterior stands the quasi likelihood of Harvey, Ruiz and Shephard (1994), a dense
Gaussian computation that shares nothing with it but the model. No estimate of H is published for
the Treasury series.
Run: python examples/rough_volatility.py [--draws 100]

:title: Rough volatility
:problem: how rough is a volatility that no one sees?
:field: finance
:engine: SplitNUTS on guided and whitened paths
:data: simulated and real
:tags: fractional noise, stochastic volatility
:run time: 141 s of processor time
:page: fractional.md
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
from numpyro.infer import MCMC
from scipy.linalg import cho_factor, cho_solve, toeplitz
from scipy.optimize import minimize
from scipy.special import polygamma, psi

import numpyro_sde as nsde

mpl.use("Agg")
import matplotlib.pyplot as plt

DAYS, RETURNS_A_DAY = 250, 20
TRUTH = {"hurst": 0.15, "rate": 0.05, "mean": -1.0, "scale": 0.5}


def log_volatility(times):
    """The latent path about its mean, and the mean."""
    hurst = numpyro.sample("hurst", dist.Uniform(0.02, 0.98))
    rate = numpyro.sample("rate", dist.LogNormal(-3.0, 1.0))
    scale = numpyro.sample("scale", dist.LogNormal(-1.0, 0.7))
    mean = numpyro.sample("mean", dist.Normal(0.0, 3.0))
    sde = nsde.SDE(
        lambda t, x, p: -p["rate"] * x,
        lambda t, x, p: p["scale"],
        params={"rate": rate, "scale": scale},
        noise=nsde.noise.MarkovFBM(hurst),
    )
    v = numpyro.sample("v", nsde.SDEPath(sde, times, init=dist.Normal(0.0, 1.0)))
    return v, mean


def realised(variance, count):
    """Realised variances: means of `count` squared returns a day."""
    v, mean = log_volatility(np.arange(len(variance), dtype=float))
    nsde.observe(
        "variance",
        v,
        lambda t, v, m: dist.Gamma(count / 2, count / 2 * jnp.exp(-m - v)),
        params=mean,
        obs=variance,
    )


def returns(r):
    """One return for each time."""
    v, mean = log_volatility(np.arange(len(r), dtype=float))
    nsde.observe("r", v, lambda t, v, m: dist.Normal(0.0, jnp.exp((m + v) / 2)), params=mean, obs=r)


def simulated_variances(rng):
    """From the exact fractional Ornstein-Uhlenbeck law."""
    law = nsde.distributions.FractionalOrnsteinUhlenbeck(
        np.arange(float(DAYS)), TRUTH["hurst"], TRUTH["rate"], TRUTH["scale"], TRUTH["mean"]
    )
    v = np.asarray(law.sample(jax.random.key(5)))
    return np.exp(v) * rng.chisquare(RETURNS_A_DAY, DAYS) / RETURNS_A_DAY


def treasury_returns():
    """Monthly changes of the log of the one-year yield, in per cent."""
    treasury = nsde.datasets.load_us_treasury()
    return 100.0 * np.diff(np.log(treasury.yields[:, 0]))


def posterior(model, data, draws, seed, treatment, **options):
    treated = numpyro.handlers.reparam(model, config={"v": treatment})
    kernel = nsde.infer.SplitNUTS(treated, **options)
    mcmc = MCMC(kernel, num_warmup=draws, num_samples=draws, progress_bar=False)
    mcmc.run(jax.random.key(seed), *data, extra_fields=("num_steps", "diverging"))
    extra = mcmc.get_extra_fields()
    hurst = np.asarray(mcmc.get_samples()["hurst"])
    size = numpyro.diagnostics.effective_sample_size(hurst[None])
    print(
        f"  posterior: H {hurst.mean():.3f} +- {hurst.std():.3f}, effective size {size:.0f} of "
        f"{len(hurst)}, {np.mean(extra['num_steps']):.1f} gradients a draw, "
        f"{np.sum(extra['diverging'])} divergences",
        flush=True,
    )
    return hurst


def quasi_likelihood(log_square, count):
    """Maximise the Gaussian likelihood of log squares, the stationary law under chi-squared noise.

    The log of a mean of `count` squared normals has mean `psi(count / 2) + log(2 / count)` and
    variance `psi'(count / 2)`. NaN, from changes that rounding makes zero, counts as missing.
    """
    seen = ~np.isnan(log_square)
    y = log_square[seen] - psi(count / 2) - np.log(2 / count)
    noise = float(polygamma(1, count / 2))
    lags = np.arange(1.0, len(log_square))

    @jax.jit
    def autocovariance(hurst, rate, scale):
        pairs = np.stack([np.zeros_like(lags), lags], axis=1)  # one law of two times for each lag
        law = nsde.distributions.FractionalOrnsteinUhlenbeck(pairs, hurst, rate, scale)
        cov = law.covariance_matrix
        return jnp.append(cov[:1, 0, 0], cov[:, 0, 1])

    def minus(p):
        cov = toeplitz(np.asarray(autocovariance(p[0], np.exp(p[1]), np.exp(p[2]))))
        factor = cho_factor(cov[np.ix_(seen, seen)] + noise * np.eye(seen.sum()), lower=True)
        rest = y - p[3]
        log_det = np.log(np.diag(factor[0])).sum()
        return 0.5 * rest @ cho_solve(factor, rest) + log_det

    bounds = [(0.03, 0.97), (-8.0, 2.0), (-4.0, 2.0), (None, None)]
    fits = [
        minimize(minus, np.array([h, -3.0, -1.0, y.mean()]), method="Nelder-Mead", bounds=bounds)
        for h in (0.15, 0.6)
    ]
    best = min(fits, key=lambda fit: fit.fun)
    print(f"  quasi likelihood: H {best.x[0]:.3f}", flush=True)
    return best.x[0]


def draw(output, variance, hurst, quasi):
    """The simulated variances, and what two methods say of their index."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9.0, 3.2), layout="constrained", width_ratios=[2.0, 1.0]
    )
    left.semilogy(variance, linewidth=0.8)
    left.set(xlabel="day", ylabel="realised variance")
    right.hist(hurst, bins=20, density=True, label="posterior")
    right.axvline(TRUTH["hurst"], color="black", linewidth=0.8, label="truth")
    right.axvline(quasi, color="C3", linewidth=0.8, label="quasi likelihood")
    right.set(xlabel="Hurst index", yticks=[])
    right.legend(frameon=False, fontsize="small")
    figure.savefig(output / "rough_volatility.png", dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("output"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    draws = options.draws
    numpyro.enable_x64()
    variance = simulated_variances(np.random.default_rng(0))
    print(f"simulated, {DAYS} days of {RETURNS_A_DAY} returns, true H {TRUTH['hurst']}")
    guided, whitened = nsde.reparam.GuidedReparam(), nsde.reparam.InnovationReparam()
    hurst = posterior(realised, (variance, RETURNS_A_DAY), draws, 1, guided)
    quasi = quasi_likelihood(np.log(variance), RETURNS_A_DAY)
    draw(options.output, variance, hurst, quasi)
    r = treasury_returns()
    print(f"one-year Treasury yield, {len(r)} monthly changes")
    # Given so little, index, rate, scale and mean are strongly correlated: a poor sample, which the
    # effective size says.
    posterior(returns, (r,), 2 * draws, 2, whitened, target_accept_prob=0.8)
    quasi_likelihood(np.log(r**2, where=r != 0, out=np.full(len(r), np.nan)), 1)


if __name__ == "__main__":
    main()
