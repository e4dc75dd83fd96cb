"""Draws carried from old data to new: exact posteriors of one parameter on a grid."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.util import log_density

import numpyro_sde as nsde
from numpyro_sde.infer import ibis

TIMES = 0.5 * np.arange(30)
Y = np.random.default_rng(0).normal(0.0, 0.7, 30)


def plain(times, y):
    log_rate = numpyro.sample("log_rate", dist.Normal(0.0, 1.0))
    rate = numpyro.deterministic("rate", jnp.exp(log_rate))
    ou = nsde.processes.OrnsteinUhlenbeck(rate, 0.0, 1.0)
    x = numpyro.sample("x", nsde.SDEPath(ou, times, dist.Normal(0.0, 1.0)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)


model = nsde.handlers.marginalize(plain, method=nsde.filters.Kalman())


def on_grid(num):
    """Log evidence, mean and sd of the only parameter, by quadrature."""
    grid = jnp.linspace(-5.0, 4.0, 1801)
    logs = jax.jit(
        jax.vmap(lambda v: log_density(model, (TIMES[:num], Y[:num]), {}, {"log_rate": v})[0])
    )(grid)
    logs = np.asarray(logs, float)
    weights = np.exp(logs - logs.max())
    step = float(grid[1] - grid[0])
    mean = np.sum(weights * grid) / weights.sum()
    sd = np.sqrt(np.sum(weights * (grid - mean) ** 2) / weights.sum())
    law = np.cumsum(weights) / weights.sum()
    return logs.max() + np.log(weights.sum() * step), mean, sd, (np.asarray(grid), law)


def old_draws(count, num):
    """Draws of the old posterior, stratified, by its own quantiles."""
    _, _, _, (grid, law) = on_grid(num)
    return {"log_rate": np.interp((np.arange(count) + 0.5) / count, law, grid)}


@pytest.mark.parametrize("num", [10, 25])
def test_new_posterior_and_evidence_of_the_added_data(num):
    # Seed 3; 1,000 draws: Monte Carlo error of a mean 0.03 sd, of an sd 0.022 of it, bounds 4 of
    # them; the log evidence within 4 times sqrt((1 / share - 1) / 1,000) at the most.
    renewed = ibis(
        model,
        old_draws(1000, num),
        (TIMES[:num], Y[:num]),
        {"times": TIMES, "y": Y},
        rng_key=jax.random.key(3),
    )
    before, *_ = on_grid(num)
    after, mean, sd, _ = on_grid(30)
    x = np.asarray(renewed.samples["log_rate"])
    assert abs(x.mean() - mean) < 4 * 0.032 * sd
    assert abs(x.std() / sd - 1.0) < 4 * 0.023
    np.testing.assert_allclose(renewed.samples["rate"], np.exp(x), rtol=1e-5)
    bound = 4.0 * np.sqrt((1.0 / renewed.share - 1.0) / 1000.0)
    assert abs(renewed.log_evidence - (after - before)) < bound + 1e-3
    assert 0.0 < renewed.share < 1.0
    assert renewed.stages > 1
    assert renewed.accept > 0.6


def test_wrong_input():
    old, new = (TIMES[:10], Y[:10]), (TIMES, Y)
    draws, key = old_draws(100, 10), jax.random.key(0)
    with pytest.raises(ValueError, match="latent site 'x' has shape \\(10,\\) under the old data"):
        ibis(plain, {**draws, "x": np.zeros((100, 30))}, old, new, rng_key=key)
    with pytest.raises(ValueError, match="samples lack the latent sites \\['log_rate'\\]"):
        ibis(model, {"rate": np.ones(100)}, old, new, rng_key=key)
    with pytest.raises(TypeError, match="old must be a tuple of the model's arguments"):
        ibis(model, draws, [TIMES, Y], new, rng_key=key)
    with pytest.raises(ValueError, match="not finite at 1 of 100 draws"):
        ibis(
            model,
            {"log_rate": np.r_[np.nan, draws["log_rate"][1:]]},
            old,
            new,
            rng_key=key,
        )
    with pytest.raises(ValueError, match=r"least_share must be in \(0, 1\), got 1\.0"):
        ibis(model, draws, old, new, rng_key=key, least_share=1.0)
    with pytest.raises(ValueError, match=r"must have shape \(N, \*\(\)\)"):
        ibis(model, {"log_rate": np.zeros((100, 2))}, old, new, rng_key=key)
