"""Whole fits against quadrature: the same posterior whichever way the path is treated."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS
from numpyro.infer.hmc import hmc
from numpyro.infer.util import log_density
from ou_oracle import normal_log_density, ou_moments

import numpyro_sde as nsde
from numpyro_sde.diagnostics.calibration.uniformity import uniformity_p_value

RNG = np.random.default_rng(7)
TIMES = np.cumsum(RNG.uniform(0.1, 0.6, 25))
NOISE = 0.3


def model(times, y=None):
    """Noisy OU with unknown rate and scale; its marginal likelihood is a dense normal."""
    log_rate = numpyro.sample("log_rate", dist.Normal(0.0, 0.7))
    log_scale = numpyro.sample("log_scale", dist.Normal(0.0, 0.7))
    sde = nsde.processes.OrnsteinUhlenbeck(jnp.exp(log_rate), 0.0, jnp.exp(log_scale))
    x = numpyro.sample("x", nsde.SDEPath(sde, times, init=dist.Normal(0.0, 1.0)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, NOISE), obs=y)


def draw_data(key, log_rate, log_scale):
    values = {"log_rate": jnp.asarray(log_rate), "log_scale": jnp.asarray(log_scale)}
    seeded = handlers.seed(handlers.substitute(model, values), key)
    return handlers.trace(seeded).get_trace(TIMES)["y"]["value"]


@pytest.fixture(scope="module")
def data():
    return np.asarray(draw_data(jax.random.key(3), 0.0, 0.0), dtype=np.float64)


@pytest.fixture(scope="module")
def truth(data):
    """Posterior means and sds by quadrature on a 61 x 61 grid of +- 4 prior sds."""
    grid = np.linspace(-2.8, 2.8, 61)
    log_post = np.empty((61, 61))
    for i, a in enumerate(grid):
        for j, b in enumerate(grid):
            mean, cov = ou_moments(TIMES, np.exp(a), 0.0, np.exp(b), 0.0, 1.0)
            likelihood = normal_log_density(data, mean, cov + NOISE**2 * np.eye(TIMES.size))
            log_post[i, j] = likelihood - 0.5 * (a**2 + b**2) / 0.7**2
    weight = np.exp(log_post - log_post.max())
    weight /= weight.sum()
    out = {}
    for name, w in (("log_rate", weight.sum(1)), ("log_scale", weight.sum(0))):
        mean = w @ grid
        out[name] = mean, np.sqrt(w @ (grid - mean) ** 2)
    return out


def assert_agrees(draws, truth):
    """Means and sds within 4 Monte Carlo standard errors (an sd's taken as 1.5 normal ones)."""
    for name, (mean, sd) in truth.items():
        chain = np.asarray(draws[name], dtype=np.float64)
        ess = float(effective_sample_size(chain[None]))
        assert abs(chain.mean() - mean) < 4.0 * sd / np.sqrt(ess), name
        assert abs(chain.std() / sd - 1.0) < 4.0 * 1.5 / np.sqrt(2.0 * ess), name


def fit(target, data, seed, num_warmup=300, num_samples=1000):
    mcmc = MCMC(NUTS(target), num_warmup=num_warmup, num_samples=num_samples, progress_bar=False)
    mcmc.run(jax.random.key(seed), TIMES, data)
    return mcmc.get_samples()


@pytest.mark.slow
def test_integrated_out(data, truth):
    """Seed 0, 1,000 draws of NUTS on the marginal likelihood."""
    marginal = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())
    assert_agrees(fit(marginal, data, 0), truth)


@pytest.mark.slow
@pytest.mark.parametrize("treatment", ["centred", "whitened"])
def test_latent(data, truth, treatment):
    """Seed 1, 4,000 draws with the path latent: the same posterior as integrated out."""
    target = model
    if treatment == "whitened":
        target = handlers.reparam(model, config={"x": nsde.reparam.InnovationReparam()})
    assert_agrees(fit(target, data, 1, 1000, 4000), truth)


@pytest.mark.slow
def test_calibration_of_the_integrated_model():
    """Simulation-based calibration (Talts et al. 2018), 200 replicates, seeds 0..199.

    Ranks of the truth among 63 thinned draws must lie inside the simultaneous band of 99 %.
    """
    marginal = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())
    times = jnp.asarray(TIMES)
    names = ("log_rate", "log_scale")

    def rank(seed):
        """All of one replicate, so that one compiled program serves the 200."""
        key_prior, key_data, key_fit = jax.random.split(jax.random.key(seed), 3)
        truth = dict(zip(names, 0.7 * jax.random.normal(key_prior, (2,)), strict=True))
        y = draw_data(key_data, *truth.values())
        init, step = hmc(lambda theta: -log_density(marginal, (times, y), {}, theta)[0])
        state = init(dict.fromkeys(names, jnp.zeros(())), 200, rng_key=key_fit)

        def advance(state, _):
            state = step(state)
            return state, state.z

        _, draws = jax.lax.scan(advance, state, None, 200 + 63 * 6)
        return {name: jnp.sum(draws[name][200::6] < truth[name]) for name in names}

    ranks = jax.jit(lambda seeds: jax.lax.map(rank, seeds))(jnp.arange(200))
    for name, values in ranks.items():
        assert uniformity_p_value(values, 63) > 0.01, name
