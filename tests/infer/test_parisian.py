"""Parisian particle Gibbs against exact smoothing."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import numpyro_sde as nsde

OU = nsde.processes.OrnsteinUhlenbeck(1.0, 0.3, 0.7)
GRID = nsde.TimeGrid([0.0, 0.5, 1.0, 1.6], 0.21)
Y = np.array([0.5, -0.6, np.nan, 0.9])


def emission(t, x):
    return dist.Normal(x, 0.4)


def term(t, dt, x, x_next):
    return jnp.stack([x[0] * dt, x_next[0] ** 2])


@pytest.mark.slow
@pytest.mark.parametrize("proposal", ["guided", "bootstrap"])
def test_sums_along_the_path(proposal, x64):
    path = nsde.SDEPath(OU, GRID, dist.Normal(0.0, 0.6), scheme=nsde.schemes.Euler())
    mean, cov = nsde.filter_path(
        path, emission, Y, method=nsde.filters.Kalman(), at=GRID.index
    ).smooth()
    mean, cov = np.asarray(mean)[:, 0], np.asarray(cov)[:, 0, 0]
    wanted = [np.sum(mean[:-1] * GRID.dt), np.sum(mean[1:] ** 2 + cov[1:])]
    got = nsde.infer.parisian_gibbs(
        path,
        emission,
        Y,
        term,
        rng_key=jax.random.key(0),
        num_particles=4,  # few: the bias of one smoother would show
        num_iterations=20_000,
        proposal=proposal,
        at=GRID.index,
    )
    assert np.all(np.abs(got.mean - np.array(wanted)) < 4 * got.standard_error)
    assert np.all(got.standard_error < 0.02)


def test_what_it_refuses():
    path = nsde.SDEPath(OU, GRID, dist.Normal(0.0, 0.6))
    with pytest.raises(ValueError, match="burn_in must be below num_iterations = 10, got 10"):
        nsde.infer.parisian_gibbs(
            path,
            emission,
            Y,
            term,
            rng_key=jax.random.key(0),
            num_iterations=10,
            burn_in=10,
            at=GRID.index,
        )
    batch = nsde.SDEPath(OU, GRID, dist.Normal(jnp.zeros(3), 0.6))
    with pytest.raises(ValueError, match="batch of shape"):
        nsde.infer.parisian_gibbs(batch, emission, Y, term, rng_key=jax.random.key(0))
