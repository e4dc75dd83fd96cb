"""Markov jump processes in diagnostics: conversion, forecasts, residuals, calibration."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS
from numpyro.infer.gibbs import Gibbs
from scipy.linalg import expm

import numpyro_sde as nsde
from numpyro_sde import diagnostics
from numpyro_sde.diagnostics import to_arviz

TIMES = np.array([0.0, 0.3, 0.7, 1.6, 1.9, 3.4, 3.5, 5.0])
Y = np.array([0.1, -0.4, 1.3, 0.8, 1.4, 0.2, -0.1, 0.9])
STATES = np.array([0, 0, 1, 1, 1, 0, 0, 1])
Q = np.array([[-0.8, 0.8], [1.5, -1.5]])
FORWARD = nsde.filters.Forward()


def chain_of(rates):
    return nsde.MarkovJumpProcess(
        lambda p: p, 2, edges=[(0, 1), (1, 0)], params=rates, event_dims=1
    )


def model(y=None):
    rates = numpyro.sample("rates", dist.LogNormal(jnp.zeros(2), 1.0).to_event(1))
    s = numpyro.sample("s", nsde.JumpPath(chain_of(rates), TIMES))
    nsde.observe(
        "y",
        s,
        lambda t, s, p: dist.Normal(p["mean"][s], 0.5),
        params={"mean": jnp.arange(2.0)},
        event_dims={"mean": 1},
        obs=y,
    )


def direct(s=None):
    rates = numpyro.sample("rates", dist.LogNormal(jnp.zeros(2), 1.0).to_event(1))
    numpyro.sample("s", nsde.JumpPath(chain_of(rates), TIMES), obs=s)


MARGINAL = nsde.handlers.marginalize(model, method=FORWARD)
DRAWS = {"rates": np.tile([0.8, 1.5], (400, 1))}
KEY = jax.random.key(0)


@pytest.mark.slow
def test_to_arviz_names_the_times_of_states():
    draws = {**DRAWS, "s": np.tile(STATES, (400, 1))}
    data = to_arviz(draws, model=model, model_args=(Y,))
    assert data["posterior"]["s"].dims == ("chain", "draw", "time")
    np.testing.assert_array_equal(data["posterior"]["s"]["time"], TIMES)
    assert data["posterior"]["s"].dtype.kind == "i"
    found = to_arviz(DRAWS, model=MARGINAL, model_args=(Y,))["log_likelihood"]["y"]
    known = nsde.filter_path(
        nsde.JumpPath(chain_of(jnp.array([0.8, 1.5])), TIMES),
        lambda t, s: dist.Normal(s, 0.5),
        Y,
        method=FORWARD,
    ).increments
    np.testing.assert_allclose(found.values[0, 0], known, rtol=1e-4)


@pytest.mark.slow
def test_forecasts_are_whole_and_follow_the_law():
    """Shares of the predicted state against matrix exponentials."""
    ahead = nsde.forecast(DRAWS, [1.0, 6.0, 7.5], model=MARGINAL, model_args=(Y,), rng_key=KEY)
    s = np.asarray(ahead["s"])
    assert s.shape == np.asarray(ahead["y"]).shape == (400, 3)
    assert s.dtype.kind == "i"
    result = nsde.filter_path(
        nsde.JumpPath(chain_of(jnp.array([0.8, 1.5])), TIMES),
        lambda t, s: dist.Normal(s, 0.5),
        Y,
        method=FORWARD,
    )
    last = np.array(result.probabilities[-1], float)
    for place, gap in ((1, 1.0), (2, 2.5)):
        p = (last @ expm(Q * gap))[1]
        assert abs(s[:, place].mean() - p) < 4.0 * np.sqrt(p * (1 - p) / 400)
    latent = {**DRAWS, "s": np.tile(STATES, (400, 1))}
    ahead = nsde.forecast(latent, [6.0], model=model, model_args=(Y,), rng_key=KEY)
    p = expm(Q * 1.0)[1, 1]
    assert np.asarray(ahead["s"]).dtype.kind == "i"
    assert abs(np.asarray(ahead["s"]).mean() - p) < 4.0 * np.sqrt(p * (1 - p) / 400)
    seen = nsde.forecast(DRAWS, [6.0], model=direct, model_args=(STATES,), rng_key=KEY)
    assert abs(np.asarray(seen["s"]).mean() - p) < 4.0 * np.sqrt(p * (1 - p) / 400)


@pytest.mark.slow
def test_residuals_of_observed_states_have_exact_distribution_functions():
    one = {"rates": DRAWS["rates"][:2]}
    found = diagnostics.k_step(one, 1, model=direct, model_args=(STATES,), rng_key=KEY).sites["s"]
    rows = np.stack([expm(Q * gap)[a] for gap, a in zip(np.diff(TIMES), STATES[:-1], strict=True)])
    upper = np.cumsum(rows, axis=1)[np.arange(7), STATES[1:]]
    lower = upper - rows[np.arange(7), STATES[1:]]
    np.testing.assert_allclose(np.ravel(found.upper)[1:], upper, atol=1e-5)
    np.testing.assert_allclose(np.ravel(found.lower)[1:], lower, atol=1e-5)
    residuals = diagnostics.residuals(DRAWS, model=MARGINAL, model_args=(Y,), rng_key=KEY)
    assert "No departure" in str(residuals)


@pytest.mark.slow
def test_fits_by_gibbs_and_by_nuts_agree_in_compare_fits():
    nuts = MCMC(NUTS(MARGINAL), num_warmup=200, num_samples=1000, progress_bar=False)
    nuts.run(jax.random.key(0), Y)
    block = nsde.infer.ConditionalForward(model)
    gibbs = MCMC(
        Gibbs([(block, ["s"]), (NUTS(model), None)]),
        num_warmup=200,
        num_samples=2000,
        progress_bar=False,
    )
    gibbs.run(jax.random.key(1), Y)
    fits = {
        "integrated out": to_arviz(nuts, model=MARGINAL, model_args=(Y,)),
        "Gibbs": to_arviz(gibbs, model=model, model_args=(Y,)),
    }
    compared = diagnostics.compare_fits(fits)
    assert "rates" in str(compared)
    a, b = (np.log(fit["posterior"]["rates"].values[0]) for fit in fits.values())
    errors = [
        x.std(0) / np.sqrt(numpyro.diagnostics.effective_sample_size(x[None])) for x in (a, b)
    ]
    assert np.all(np.abs(a.mean(0) - b.mean(0)) < 4.0 * np.hypot(*errors))


@pytest.mark.slow
def test_auto_integrates_them_out():
    assert nsde.reparam.auto(model).treatments(Y) == {"s": "integrated out"}
    value = [
        numpyro.infer.util.log_density(m, (Y,), {}, {"rates": jnp.array([0.8, 1.5])})[0]
        for m in (nsde.reparam.auto(model), MARGINAL)
    ]
    np.testing.assert_allclose(*value, rtol=1e-6)


@pytest.mark.slow
def test_calibrated():
    """200 replicates, seed 0: ranks and coverages within 4 standard errors."""
    run = diagnostics.compiled_chain(NUTS(MARGINAL), 300, 400)
    result = diagnostics.sbc(
        MARGINAL,
        lambda key, data: run(key, data["y"]),
        200,
        data="y",
        log_joint=True,
        progress=False,
    )
    assert result.names == ("rates[0]", "rates[1]", "log_joint")
    assert np.all(result.p_values > 6.3e-5), str(result)
    for prob in (0.5, 0.9):
        error = np.sqrt(prob * (1 - prob) / 200)
        assert np.all(np.abs(result.coverage(prob) - prob) < 4.0 * error), str(result)
