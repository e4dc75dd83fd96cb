"""Fits with the path integrated out: one-step-ahead terms, smoothed paths on request."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS, log_likelihood

import numpyro_sde as nsde

TIMES = np.array([0.0, 0.4, 1.0, 1.1, 2.5, 3.0])
Y = np.array([0.1, -0.2, np.nan, 0.5, 0.2, 0.0])


def model(y=None):
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
    sde = nsde.SDE(lambda t, x, p: -p * x, lambda t, x, p: 0.5, params=rate)
    x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, init=dist.Normal(0.0, 1.0)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)


@pytest.fixture(scope="module")
def mcmc():
    marginal = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())
    fit = MCMC(
        NUTS(marginal),
        num_warmup=50,
        num_samples=40,
        num_chains=2,
        chain_method="vectorized",
        progress_bar=False,
    )
    fit.run(jax.random.key(0), Y)
    return fit


@pytest.mark.slow
def test_pointwise_terms_sum_to_the_marginal_likelihood(mcmc):
    tree = nsde.diagnostics.to_arviz(mcmc)
    terms = tree["log_likelihood"]["y"]
    assert terms.dims == ("chain", "draw", "time_observed_y")
    np.testing.assert_allclose(terms["time_observed_y"], TIMES[~np.isnan(Y)])
    marginal = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())
    whole = log_likelihood(marginal, mcmc.get_samples(), Y)["y"]
    np.testing.assert_allclose(np.asarray(terms).sum(-1).reshape(-1), whole, rtol=1e-4, atol=1e-4)
    assert "x" not in tree["posterior"]


@pytest.mark.slow
def test_smoothed_paths_on_request(mcmc):
    tree = nsde.diagnostics.to_arviz(mcmc, smooth=True)
    path = tree["posterior"]["x"]
    assert path.dims == ("chain", "draw", "time")
    np.testing.assert_allclose(path["time"], TIMES)
    # The data pin the path to 0.1; the prior alone would leave it at about 0.4.
    seen = ~np.isnan(Y)
    assert np.abs(np.asarray(path).mean((0, 1)) - Y)[seen].max() < 0.15
    assert np.asarray(path).std((0, 1))[seen].max() < 0.2
