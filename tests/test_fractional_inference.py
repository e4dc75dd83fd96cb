"""Inference of the Hurst index of latent paths: sparse noisy data, nonlinear drift, volatility.

Monte Carlo errors are standard deviations over roots of effective sizes; bounds are 4 of them.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size
from numpyro.handlers import reparam, seed, substitute, trace
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO, init_to_median
from numpyro.infer.util import log_density

import numpyro_sde as nsde
from numpyro_sde.distributions import FractionalOrnsteinUhlenbeck
from numpyro_sde.distributions.observation import Emission
from numpyro_sde.distributions.state_space import ObservedPath
from numpyro_sde.distributions.statement import make_statement
from numpyro_sde.filters import Kalman, Particle
from numpyro_sde.handlers import drive, marginalize
from numpyro_sde.noise import Brownian, MarkovFBM
from numpyro_sde.reparam import GuidedReparam, InnovationReparam
from numpyro_sde.statespace.guide import observations_along

# --- a linear equation, every third time observed --------------------------------------------

TIMES = np.arange(61) * 0.25
SEEN = np.arange(61) % 3 == 1
RATE, SCALE, ERROR = 0.7, 0.8, 0.1
GRID = np.linspace(0.06, 0.94, 45)


def exact_linear(hurst):
    return FractionalOrnsteinUhlenbeck(TIMES, hurst, RATE, SCALE, start="zero")


def sparse_data():
    x = np.asarray(exact_linear(0.75).sample(jax.random.key(1)))
    return np.where(SEEN, x + ERROR * np.random.default_rng(0).normal(size=61), np.nan)


def linear(y=None):
    hurst = numpyro.sample("hurst", dist.Uniform(0.05, 0.95))
    sde = nsde.SDE(
        lambda t, x, p: -RATE * x, lambda t, x, p: SCALE, params=0.0, noise=MarkovFBM(hurst)
    )
    x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, init=0.0))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, ERROR), obs=y)


def on_grid(log_likelihood):
    """Posterior of H on the grid under a flat prior."""
    values = np.asarray(jax.jit(partial(jax.lax.map, log_likelihood))(jnp.asarray(GRID)))
    density = np.exp(values - values.max())
    return density / density.sum()


def exact_posterior(y):
    def one(hurst):
        cov = exact_linear(hurst).covariance_matrix[np.ix_(SEEN, SEEN)]
        cov = cov + ERROR**2 * jnp.eye(SEEN.sum())
        return dist.MultivariateNormal(0.0, cov).log_prob(y[SEEN])

    return on_grid(one)


def moments(density):
    mean = density @ GRID
    return mean, np.sqrt(density @ GRID**2 - mean**2)


def agree(values, mean, sd, error=0.0):
    """Mean and sd of draws, within 4 Monte Carlo errors."""
    values = np.asarray(values, np.float64)
    size = effective_sample_size(values[None])
    assert size > 50
    assert abs(values.mean() - mean) < 4 * np.hypot(sd / np.sqrt(size), error)
    assert abs(np.log(values.std() / sd)) < 4 / np.sqrt(2 * size)


@pytest.mark.slow
def test_posterior_of_the_index_from_sparse_noisy_data(x64):
    """Path and noise integrated out by Kalman, against the dense covariance of the exact law."""
    y = sparse_data()
    model = marginalize(linear, method=Kalman())
    ours = on_grid(lambda h: log_density(model, (y,), {}, {"hurst": h})[0])
    assert 0.5 * np.abs(ours - exact_posterior(y)).sum() < 0.01


@pytest.mark.slow
def test_nuts_and_a_flow_find_that_posterior(x64):
    y = sparse_data()
    mean, sd = moments(exact_posterior(y))
    model = marginalize(linear, method=Kalman())
    mcmc = MCMC(NUTS(model), num_warmup=200, num_samples=800, progress_bar=False)
    mcmc.run(jax.random.key(0), y)
    agree(mcmc.get_samples()["hurst"], mean, sd)
    guide = nsde.guides.AutoFlow(model)
    # At a constant step size the mean wanders by 0.2 sd from seed to seed, so it falls.
    adam = numpyro.optim.Adam(lambda i: 1e-2 * 0.998**i)
    svi = SVI(model, guide, adam, Trace_ELBO(num_particles=8))
    fit = svi.run(jax.random.key(0), 1500, y, progress_bar=False)
    draws = guide.sample_posterior(jax.random.key(1), fit.params, y, sample_shape=(4000,))
    # A flow is no exact law: its mean within a fifth of a posterior sd, its sd within a fifth.
    assert abs(draws["hurst"].mean() - mean) < 0.2 * sd
    assert abs(draws["hurst"].std() / sd - 1) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("proposal", ["bootstrap", "guided"])
def test_particles_give_the_likelihood_of_the_kalman_filter(proposal, x64):
    """An unbiased estimate: the mean of its exponential over 64 filters, within 4 errors."""
    y = sparse_data()[:31]
    sde = nsde.SDE(lambda t, x: -RATE * x, lambda t, x: SCALE, noise=MarkovFBM(0.75, 5))
    path = nsde.SDEPath(sde, TIMES[:31], init=0.0)
    step = nsde.filters.ExtendedKalman()  # exact for the linear steps of Euler's scheme

    def emission(t, x):
        return dist.Normal(x, 0.3)

    wanted = float(nsde.filter_path(path, emission, y, method=step).log_likelihood)

    def estimate(key):
        method = Particle(100, proposal=proposal).with_key(key)
        return nsde.filter_path(path, emission, y, method=method).log_likelihood

    keys = jax.random.split(jax.random.key(2), 64)
    ratio = np.exp(np.asarray(jax.jit(partial(jax.lax.map, estimate))(keys)) - wanted)
    assert abs(ratio.mean() - 1.0) < 4 * ratio.std() / np.sqrt(len(ratio)) + 1e-9  # rounding
    assert ratio.std() < (1.0 if proposal == "bootstrap" else 1e-6)


def shifted(y):
    """Half the path's error is a shift of all observations."""
    shift = numpyro.sample("shift", dist.Normal(0.0, 1.0))
    sde = nsde.SDE(lambda t, x: -RATE * x, lambda t, x: SCALE, noise=MarkovFBM(0.75, 5))
    x = numpyro.sample("x", nsde.SDEPath(sde, TIMES[:31], init=0.0))
    nsde.observe("y", x, lambda t, x, s: dist.Normal(x + s, 0.3), params=shift, obs=y)


@pytest.mark.slow
def test_conditional_smc_refuses_to_weigh_ancestors():
    kernel = nsde.infer.ConditionalSMC(substitute(shifted, {"shift": 0.0}), num_particles=8)
    with pytest.raises(ValueError, match="renewal='none'"):
        kernel.init(jax.random.key(0), 1, {"x": jnp.zeros(31)}, (sparse_data()[:31],), {})


@pytest.mark.slow
def test_particle_gibbs_by_genealogy(x64):
    """Conditional SMC of a path with a memory, against NUTS with the path integrated out."""
    y = sparse_data()[:31]
    # Exact for the linear steps of Euler's scheme.
    exact = marginalize(shifted, method=nsde.filters.ExtendedKalman())
    nuts = MCMC(NUTS(exact), num_warmup=200, num_samples=4000, progress_bar=False)
    nuts.run(jax.random.key(1), y)
    wanted = np.asarray(nuts.get_samples()["shift"], np.float64)
    kernel = nsde.infer.ParticleGibbs(shifted, 8, renewal="none")
    mcmc = MCMC(kernel, num_warmup=200, num_samples=6000, progress_bar=False)
    mcmc.run(jax.random.key(0), y, extra_fields=(kernel.PATH_RENEWED,))
    error = wanted.std() / np.sqrt(effective_sample_size(wanted[None]))
    agree(mcmc.get_samples()["shift"], wanted.mean(), wanted.std(), error)
    assert mcmc.get_extra_fields()[kernel.PATH_RENEWED]["x"][:, 1:].mean(0).min() > 0.5


@pytest.mark.slow
def test_pmmh(x64):
    """Against the path integrated out exactly."""
    y = sparse_data()[:31]

    def model(y):
        hurst = numpyro.sample("hurst", dist.Uniform(0.05, 0.95))
        sde = nsde.SDE(
            lambda t, x, p: -RATE * x, lambda t, x, p: SCALE, params=0.0, noise=MarkovFBM(hurst, 5)
        )
        x = numpyro.sample("x", nsde.SDEPath(sde, TIMES[:31], init=0.0))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)

    integrated = marginalize(model, method=nsde.filters.ExtendedKalman())
    mean, sd = moments(on_grid(lambda h: log_density(integrated, (y,), {}, {"hurst": h})[0]))
    mcmc = MCMC(nsde.infer.PMMH(model), num_warmup=500, num_samples=4000, progress_bar=False)
    mcmc.run(jax.random.key(2), y)
    agree(mcmc.get_samples()["hurst"], mean, sd)


# --- a double well ---------------------------------------------------------------------------

WELL_GRID = nsde.TimeGrid(np.arange(31) * 0.5, max_step=0.125)


def well(hurst, init):
    sde = nsde.SDE(lambda t, x: 2 * x * (1 - x**2), lambda t, x: 0.7, noise=MarkovFBM(hurst))
    return nsde.SDEPath(sde, WELL_GRID, init=init)


def double_well(y=None):
    hurst = numpyro.sample("hurst", dist.Uniform(0.05, 0.95))
    x = numpyro.sample("x", well(hurst, dist.Normal(1.0, 0.2)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.15), obs=y, at=WELL_GRID.index)


@pytest.mark.slow
def test_every_treatment_of_a_double_well_finds_one_posterior(x64):
    """NUTS on guided and on whitened paths, against particle filters on a grid of indices."""
    simulate = substitute(double_well, {"hurst": jnp.array(0.75)})
    y = np.asarray(trace(seed(simulate, 3)).get_trace()["y"]["value"])

    def likelihood(hurst):
        def one(key):
            return nsde.filter_path(
                well(hurst, dist.Normal(1.0, 0.2)),
                lambda t, x: dist.Normal(x, 0.15),
                y,
                method=Particle(400).with_key(key),
                at=WELL_GRID.index,
            ).log_likelihood

        estimates = jax.lax.map(one, jax.random.split(jax.random.key(5), 4))
        return jax.scipy.special.logsumexp(estimates)

    mean, sd = moments(on_grid(likelihood))
    for treatment in (GuidedReparam(), InnovationReparam()):
        model = reparam(double_well, config={"x": treatment})
        kernel = NUTS(model, init_strategy=init_to_median)
        mcmc = MCMC(kernel, num_warmup=200, num_samples=500, progress_bar=False)
        mcmc.run(jax.random.key(0), y)
        agree(mcmc.get_samples()["hurst"], mean, sd)
    model = reparam(double_well, config={"x": GuidedReparam()})
    guide = nsde.guides.AutoFlow(model)
    svi = SVI(model, guide, numpyro.optim.Adam(1e-2), Trace_ELBO(num_particles=2))
    fit = svi.run(jax.random.key(0), 1000, y, progress_bar=False)
    draws = guide.sample_posterior(jax.random.key(1), fit.params, y, sample_shape=(2000,))
    assert abs(draws["hurst"].mean() - mean) < 0.4 * sd


# --- rough volatility ------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.3, pytest.param(3.0, marks=pytest.mark.slow)])
def test_a_guide_sees_an_emission_whose_variance_is_the_state(spread, x64):
    """Returns given their log variance: information 1/2 a return, score (r^2 e^-v - 1) / 2."""
    r = spread * np.random.default_rng(0).normal(size=4)
    sde = nsde.SDE(lambda t, x: -x, lambda t, x: 0.5)
    path = nsde.SDEPath(sde, np.arange(4.0), dist.Normal(0.0, 1.0))
    v = np.array([0.1, -0.3, 0.2, 0.0])

    emission = Emission(lambda t, v: dist.Normal(0.0, jnp.exp(v / 2)), None, None, None, 4, ())
    observed = ObservedPath(path, (), ((make_statement(emission, np.arange(4), (), ()), r),))
    J, s = observed.map(lambda model: observations_along(model, jnp.asarray(v)[:, None]))
    np.testing.assert_allclose(J[:, 0, 0], 0.5, rtol=1e-12)
    np.testing.assert_allclose(s[:, 0], 0.5 * (r**2 * np.exp(-v) - 1.0), rtol=1e-9)


# --- which noise? ----------------------------------------------------------------------------


@pytest.mark.slow
def test_cross_validation_prefers_the_right_noise(x64):
    """`drive` and leave-one-out on data of long memory."""
    pytest.importorskip("arviz")
    times = np.arange(200.0)
    law = FractionalOrnsteinUhlenbeck(times, 0.85, 0.3, 1.0)
    y = np.asarray(law.sample(jax.random.key(7))) + 0.3 * np.random.default_rng(2).normal(size=200)

    def model(y=None):
        rate = numpyro.sample("rate", dist.LogNormal(-1.0, 1.0))
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
        ou = nsde.processes.OrnsteinUhlenbeck(rate, 0.0, scale)
        x = numpyro.sample("x", nsde.SDEPath(ou, times, dist.Normal(0.0, 2.0)))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)

    fits = {}
    for name, noise in {"Brownian": Brownian(), "fractional": MarkovFBM(0.85)}.items():
        driven = marginalize(drive(model, noise), method=Kalman())
        mcmc = MCMC(NUTS(driven), num_warmup=200, num_samples=400, progress_bar=False)
        mcmc.run(jax.random.key(0), y)
        fits[name] = nsde.diagnostics.to_arviz(mcmc)
    table = nsde.diagnostics.compare_fits(fits).fits
    assert table["elpd"].astype(float).idxmax() == "fractional"
