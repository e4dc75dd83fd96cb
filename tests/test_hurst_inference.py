"""Inference of the Hurst index: real data, information bound, calibration."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS
from scipy.optimize import minimize

import numpyro_sde as nsde
from numpyro_sde.distributions import FractionalGaussianNoise
from numpyro_sde.linear.toeplitz import toeplitz_quadratic
from numpyro_sde.noise import MarkovFBM
from numpyro_sde.noise.banks import log_likelihood
from numpyro_sde.noise.covariances import fgn_autocovariance
from numpyro_sde.noise.determinant import fgn_log_determinant

REFERENCE = json.loads((Path(__file__).parent / "fbm_reference.json").read_text())
NILE = REFERENCE["nile"]
LEVEL = nsde.datasets.load_nile_minima().level / 100.0
N = len(LEVEL)


def _by_exact_law(hurst, mean, log_scale):
    return FractionalGaussianNoise(N, 1.0, hurst, jnp.exp(log_scale)).log_prob(LEVEL - mean)


def _by_markov_noise(hurst, mean, log_scale, num_terms=12):
    bank, steps = MarkovFBM(hurst, num_terms).on_grid(np.arange(N + 1.0), np.ones(N))
    x = (LEVEL - mean)[:, None] * jnp.exp(-log_scale)
    return log_likelihood(steps, bank.start, x) - N * log_scale


@pytest.mark.parametrize(
    "law", [_by_exact_law, pytest.param(_by_markov_noise, marks=pytest.mark.slow)]
)
def test_maximum_likelihood_of_the_nile_minima(law, x64):
    """H 0.8315, log likelihood 236.52 but for its constant (McLeod, Yu and Krougly 2007)."""
    objective = jax.jit(jax.value_and_grad(lambda p: -law(*p)))
    start = np.array([0.7, 11.5, 0.0])
    fit = minimize(
        lambda p: tuple(np.asarray(v) for v in objective(p)),
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=[(0.02, 0.98), (5.0, 20.0), (-3.0, 3.0)],
        options={"ftol": 1e-14, "gtol": 1e-7},
    )
    near = 1e-4 if law is _by_markov_noise else 2e-6
    assert fit.x[0] == pytest.approx(NILE["H_mle"], abs=near)
    assert fit.x[1] == pytest.approx(NILE["mu"], abs=20 * near)
    assert np.exp(2 * fit.x[2]) == pytest.approx(NILE["sigma2_mle"], abs=10 * near)
    constant = -0.5 * N * (np.log(2 * np.pi) + 1)
    assert -fit.fun - constant == pytest.approx(NILE["loglik_conc"], abs=100 * near)
    assert -fit.fun == pytest.approx(NILE["loglik_full"], abs=100 * near)


def _nile_exact():
    hurst, mean, log_scale = _flat_priors()
    law = FractionalGaussianNoise(N, 1.0, hurst, jnp.exp(log_scale))
    numpyro.factor("y", law.log_prob(LEVEL - mean))


def _nile_markov():
    """The running sums are a fractional walk with drift, seen with next to no noise."""
    hurst, mean, log_scale = _flat_priors()
    sde = nsde.SDE(
        lambda t, x, p: p["mean"],
        lambda t, x, p: p["scale"],
        params={"mean": mean, "scale": jnp.exp(log_scale)},
        noise=MarkovFBM(hurst),
    )
    x = numpyro.sample("x", nsde.SDEPath(sde, np.arange(N + 1.0), init=0.0))
    sums = np.concatenate([[np.nan], np.cumsum(LEVEL)])
    nsde.observe("sums", x, lambda t, x: dist.Normal(x, 1e-3), obs=sums)


def _flat_priors():
    hurst = numpyro.sample("hurst", dist.Uniform(0.02, 0.98))
    mean = numpyro.sample("mean", dist.Uniform(0.0, 25.0))
    log_scale = numpyro.sample("log_scale", dist.Uniform(-4.0, 4.0))
    return hurst, mean, log_scale


@pytest.mark.slow
@pytest.mark.parametrize("by", ["exact law", "Kalman"])
def test_posterior_of_the_nile_minima(by, x64):
    """Mean 0.8382, sd 0.0251 by quadrature; within 4 Monte Carlo standard errors."""
    model = _nile_exact
    if by == "Kalman":
        model = nsde.handlers.marginalize(_nile_markov, method=nsde.filters.Kalman())
    start = {"hurst": jnp.array(0.8), "mean": jnp.array(11.5), "log_scale": jnp.array(-0.1)}
    kernel = NUTS(model, init_strategy=numpyro.infer.init_to_value(values=start))
    mcmc = MCMC(kernel, num_warmup=200, num_samples=600, progress_bar=False)
    mcmc.run(jax.random.key(0))
    draws = np.asarray(mcmc.get_samples()["hurst"])
    size = numpyro.diagnostics.effective_sample_size(draws[None])
    assert size > 100
    error = NILE["post_sd"] / np.sqrt(size)
    assert abs(draws.mean() - NILE["post_mean"]) < 4 * error
    # The sd of a sample of this size has a relative standard error of (2 size)^-1/2.
    assert abs(draws.std() / NILE["post_sd"] - 1) < 4 / np.sqrt(2 * size)


GRID = np.linspace(0.02, 0.98, 481)


def _posteriors(x):
    """Posterior of H on a grid for each series, scale integrated out under a flat log prior."""
    length = x.shape[1]

    def one(hurst):
        column = fgn_autocovariance(length, hurst)
        squares = jax.vmap(lambda x: toeplitz_quadratic(column, x))(x)
        return -0.5 * fgn_log_determinant(length, hurst) - 0.5 * length * jnp.log(squares)

    log_density = np.asarray(jax.lax.map(jax.jit(one), jnp.asarray(GRID))).T
    density = np.exp(log_density - log_density.max(1, keepdims=True))
    return density / density.sum(1, keepdims=True)


@pytest.mark.slow
def test_posterior_sd_is_near_the_information_bound(x64):
    """Mean posterior sd over 20 series of 1,000 points, within 10 % of Cramer and Rao's bound."""
    for hurst in (0.1, 0.3, 0.5, 0.7, 0.9):
        x = FractionalGaussianNoise(1000, 1.0, hurst).sample(jax.random.key(1), (20,))
        p = _posteriors(x)
        mean = p @ GRID
        sd = np.sqrt(p @ GRID**2 - mean**2).mean()
        bound = REFERENCE["fisher"][str(hurst)]["n1000"]["sdH_sigma_unknown"]
        assert abs(sd / bound - 1) < 0.1
        assert abs(mean.mean() - hurst) < 4 * bound / np.sqrt(20)


@pytest.mark.slow
def test_ranks_of_the_true_index_are_uniform(x64):
    """240 series of 300 points with H from its prior: Kolmogorov-Smirnov at level 6e-5 (4 sd)."""
    from scipy.stats import kstest

    hurst = np.random.default_rng(0).uniform(GRID[0], GRID[-1], 240)
    keys = jax.random.split(jax.random.key(2), 240)
    draw = jax.jit(jax.vmap(lambda k, h: FractionalGaussianNoise(300, 1.0, h).sample(k)))
    p = _posteriors(draw(keys, hurst))
    below = np.cumsum(p, axis=1) - 0.5 * p
    ranks = np.array([np.interp(h, GRID, row) for h, row in zip(hurst, below, strict=True)])
    assert kstest(ranks, "uniform").pvalue > 6e-5


def _observed_walk(x):
    hurst = numpyro.sample("hurst", dist.Uniform(0.02, 0.98))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    sde = nsde.SDE(lambda t, x, p: 0.0 * x, lambda t, x, p: p, params=scale, noise=MarkovFBM(hurst))
    numpyro.sample("x", nsde.SDEPath(sde, np.arange(129.0), init=0.0), obs=x)


@pytest.mark.slow
def test_nuts_is_calibrated(x64):
    """240 fractional walks of 128 steps with H and scale from their priors, one NUTS chain each.

    Simulation-based calibration, ranks among 31 draws: uniform at level 6e-5 (4 sd) for H, scale
    and the log joint density; posterior z scores have mean 0 and mean square 1 within 4 standard
    errors (of 240: 0.065; of the square, were they normal, 0.091).
    """
    kernel = NUTS(_observed_walk, init_strategy=numpyro.infer.init_to_median)
    run = nsde.diagnostics.compiled_chain(kernel, 150, 250)
    result = nsde.diagnostics.sbc(
        _observed_walk,
        lambda key, data: run(key, data["x"]),
        240,
        model_kwargs={"x": np.zeros(129)},
        log_joint=True,
        num_ranks=31,
        progress=False,
    )
    assert not result.failures
    assert {"hurst", "scale"} <= set(result.names)
    assert result.p_values.min() > 6e-5
    z = result.z_scores[:, [result.names.index("hurst"), result.names.index("scale")]]
    assert np.all(np.abs(z.mean(0)) < 4 * 0.065)
    assert np.all(np.abs((z**2).mean(0) - 1.0) < 4 * 0.091)
