"""A directly observed Ornstein-Uhlenbeck path: NUTS against quadrature of the exact likelihood."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal

import numpyro_sde as nsde

RNG = np.random.default_rng(21)
TIMES = np.concatenate([[0.0], np.cumsum(RNG.uniform(0.05, 0.5, 80))])
RATE, MEAN, SCALE = 1.0, 0.5, 0.8
PRIOR = {"log_rate": (0.0, 0.7), "mean": (0.0, 1.0), "log_scale": (0.0, 0.7)}


def transition(x, dt, rate, mean, scale):
    """Mean and sd of the exact transition (Karlin and Taylor 1981, chapter 15)."""
    decay = np.exp(-rate * dt)
    return mean + decay * (x - mean), scale * np.sqrt(-np.expm1(-2 * rate * dt) / (2 * rate))


def simulate():
    path = [0.2]
    for dt in np.diff(TIMES):
        loc, sd = transition(path[-1], dt, RATE, MEAN, SCALE)
        path.append(loc + sd * RNG.normal())
    return np.array(path)


PATH = simulate()


def model(path):
    rate = jnp.exp(numpyro.sample("log_rate", dist.Normal(*PRIOR["log_rate"])))
    mean = numpyro.sample("mean", dist.Normal(*PRIOR["mean"]))
    scale = jnp.exp(numpyro.sample("log_scale", dist.Normal(*PRIOR["log_scale"])))
    sde = nsde.processes.OrnsteinUhlenbeck(rate, mean, scale)
    numpyro.sample("x", nsde.SDEPath(sde, TIMES, init=dist.Normal(0.0, 1.0)), obs=path)


def exact_log_likelihood(rate, mean, scale):
    loc, sd = transition(PATH[:-1], np.diff(TIMES), rate, mean, scale)
    start = scipy.stats.norm.logpdf(PATH[0])
    return start + scipy.stats.norm.logpdf(PATH[1:], loc, sd).sum(-1)


@pytest.fixture(scope="module")
def truth():
    """Posterior means and sds by quadrature on a 50 x 71 x 41 grid about the mode.

    What the grid leaves out is checked; its step is a quarter of a posterior sd or less, at which
    the trapezium rule on a smooth, vanishing integrand is exact to many digits.
    """
    axes = {
        "log_rate": np.linspace(-4.0, 2.2, 50),
        "mean": np.linspace(-3.2, 4.2, 71),
        "log_scale": np.linspace(-0.8, 0.5, 41),
    }
    a, m, b = np.meshgrid(*axes.values(), indexing="ij")
    log_post = exact_log_likelihood(*(v[..., None] for v in (np.exp(a), m, np.exp(b))))
    for grid, (loc, sd) in zip((a, m, b), PRIOR.values(), strict=True):
        log_post = log_post - 0.5 * ((grid - loc) / sd) ** 2
    weight = np.exp(log_post - log_post.max())
    weight /= weight.sum()
    out = {}
    for i, (name, grid) in enumerate(axes.items()):
        w = weight.sum(axis=tuple(j for j in range(3) if j != i))
        assert max(w[0], w[-1]) < 1e-5 * w.max()  # nothing is cut off
        mean = w @ grid
        out[name] = mean, np.sqrt(w @ (grid - mean) ** 2)
        assert np.diff(grid)[0] < 0.5 * out[name][1]
    return out


def test_density_is_the_exact_one(x64):
    sde = nsde.processes.OrnsteinUhlenbeck(1.3, 0.4, 0.7)
    law = nsde.SDEPath(sde, TIMES, init=dist.Normal(0.0, 1.0))
    np.testing.assert_allclose(law.log_prob(PATH), exact_log_likelihood(1.3, 0.4, 0.7), rtol=1e-10)


@pytest.mark.slow
def test_nuts_gives_the_posterior_of_the_exact_likelihood(truth):
    """Seed 0, 4,000 draws: means and sds within 4 Monte Carlo standard errors.

    The standard error of an sd is taken as that of a normal law, sd / sqrt(2 ess).
    """
    mcmc = MCMC(NUTS(model), num_warmup=500, num_samples=4000, progress_bar=False)
    mcmc.run(jax.random.key(0), PATH)
    assert int(mcmc.get_extra_fields()["diverging"].sum()) == 0
    for name, (mean, sd) in truth.items():
        draws = np.asarray(mcmc.get_samples()[name], np.float64)
        ess = float(effective_sample_size(draws[None]))
        spread = float(effective_sample_size(((draws - draws.mean()) ** 2)[None]))
        assert abs(draws.mean() - mean) < 4 * sd / np.sqrt(ess), name
        assert abs(draws.std() - sd) < 4 * sd / np.sqrt(2 * spread), name


@pytest.mark.slow
def test_svi_on_the_same_model_is_close(truth):
    """A full-rank normal guide: means within 0.25 and log sds within 0.25 posterior sds.

    An approximation, not an estimator: the bound is its own error, not a Monte Carlo one.
    """
    guide = AutoMultivariateNormal(model)
    svi = SVI(model, guide, numpyro.optim.Adam(0.02), Trace_ELBO(num_particles=8))
    result = svi.run(jax.random.key(0), 2000, PATH, progress_bar=False)
    draws = guide.sample_posterior(jax.random.key(1), result.params, sample_shape=(4000,))
    for name, (mean, sd) in truth.items():
        assert abs(float(draws[name].mean()) - mean) < 0.25 * sd, name
        assert abs(np.log(float(draws[name].std()) / sd)) < 0.25, name
