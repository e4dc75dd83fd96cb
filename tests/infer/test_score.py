"""The score by smoothing against the Kalman filter's gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import numpyro_sde as nsde

GRID = nsde.TimeGrid(np.arange(6.0) * 0.5, 0.26)
Y = np.array([[0.3, -0.2, np.nan, 0.5, 1.0, 0.1], [0.0, 0.4, 0.2, -0.9, -1.2, -0.3]])


def panel(y=None):
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    noise = numpyro.sample("noise", dist.LogNormal(-1.0, 0.5))
    with numpyro.plate("series", 2):
        sde = nsde.processes.OrnsteinUhlenbeck(rate, 0.0, scale)
        path = nsde.SDEPath(sde, GRID, dist.Normal(0.0, 1.0), scheme=nsde.schemes.Euler())
        x = numpyro.sample("x", path)
        nsde.observe("y", x, lambda t, x, s: dist.Normal(x, s), params=noise, obs=y, at=GRID.index)


@pytest.mark.slow
def test_score_of_a_panel(x64):
    at = {"rate": 0.8, "scale": 1.3, "noise": 0.4}
    marginal = nsde.handlers.marginalize(panel, method=nsde.filters.Kalman())

    def log_likelihood(values):
        sites = numpyro.handlers.trace(
            numpyro.handlers.substitute(marginal, data=values)
        ).get_trace(Y)
        return jnp.sum(sites["y"]["fn"].log_prob(Y))

    truth = jax.grad(log_likelihood)({k: jnp.asarray(v) for k, v in at.items()})
    method = nsde.filters.Particle(500)
    got = nsde.infer.score(
        panel, at, Y, rng_key=jax.random.key(0), method=method, num_draws=10_000, num_filters=20
    )
    for name in at:
        assert abs(got.mean[name] - truth[name]) < 4 * got.standard_error[name]
        assert got.standard_error[name] < 0.25


def test_what_it_refuses():
    with pytest.raises(TypeError, match=r"method must be a filters.Particle"):
        nsde.infer.score(panel, {}, Y, rng_key=jax.random.key(0), method=nsde.filters.Kalman())
