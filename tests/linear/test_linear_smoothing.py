"""Draws of the path against the dense joint law of the states given the data."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import NUM_TIMES, build, error, make
from oracles import dense_gaussian_ssm

from numpyro_sde.linear.kalman import kalman_filter
from numpyro_sde.linear.smoothing import sample_paths, smoother


@partial(jax.jit, static_argnames="num_draws")
def draw(model, y, mask, normals=None, key=None, num_draws=None):
    filtered = kalman_filter(model, y, mask)
    return sample_paths(model, filtered, normals=normals, key=key, num_draws=num_draws)


@pytest.mark.parametrize(
    "name", ["scalar", "d2", "singular", "nearly singular", "hypoelliptic", "very short step"]
)
def test_map_from_normals_has_the_smoothed_law(name, x64):
    # The path is affine in the normals: feeding it zeros and unit vectors gives its exact
    # mean and covariance, without Monte Carlo error.
    arrays = make(name)
    model, y, mask = build(arrays, jnp.float64)
    n = NUM_TIMES * model.state_size
    unit = jnp.concatenate([jnp.zeros((1, n)), jnp.eye(n)]).reshape(n + 1, NUM_TIMES, -1)
    mean, *rest = draw(model, y, mask, unit)
    want = dense_gaussian_ssm(**arrays)
    assert error(mean, want.smoothed_mean) < 1e-8
    columns = np.stack(rest) - mean  # (n, T, d)
    cov = np.einsum("ntd,nte->tde", columns, columns)
    cross = np.einsum("ntd,nte->tde", columns[:, 1:], columns[:, :-1])
    assert error(cov, want.smoothed_cov) < 1e-8
    assert error(cross, want.smoothed_cross) < 1e-8


def test_draws_have_the_smoothed_moments():
    # Monte Carlo: 4,000 draws; standard errors sqrt(P / n) of means and
    # sqrt((P_ii P_jj + P_ij^2) / n) of covariances; bound 4 of them.
    arrays, draws = make("d2 two instruments"), 4000
    model, y, mask = build(arrays, jnp.float32)
    paths = draw(model, y, mask, key=jax.random.key(1), num_draws=draws)
    want = dense_gaussian_ssm(**arrays)
    P = want.smoothed_cov
    variances = np.diagonal(P, axis1=1, axis2=2)
    x = np.asarray(paths, np.float64)
    assert np.all(np.abs(x.mean(0) - want.smoothed_mean) < 4 * np.sqrt(variances / draws))
    centred = x - want.smoothed_mean
    cov = np.einsum("ntd,nte->tde", centred, centred) / draws
    error_of_cov = np.sqrt((variances[:, :, None] * variances[:, None, :] + P**2) / draws)
    assert np.all(np.abs(cov - P) < 4 * error_of_cov)


def test_known_states_stay_known(x64):
    # no noise and a known start: every draw is the deterministic path
    arrays = make("d2")
    arrays["P0"], arrays["Q"] = 0 * arrays["P0"], 0 * arrays["Q"]
    model, y, mask = build(arrays, jnp.float64)
    want = [arrays["m0"]]
    for F, c in zip(arrays["F"], arrays["c"], strict=True):
        want.append(F @ want[-1] + c)
    one, other = draw(model, y, mask, key=jax.random.key(0), num_draws=2)
    np.testing.assert_allclose(one, want, rtol=1e-10)
    np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_smoothed_mean_has_finite_derivatives(x64):
    arrays = make("singular")
    model, y, mask = build(arrays, jnp.float64)

    @jax.jit
    def total(y):
        return smoother(model, kalman_filter(model, y, mask)).mean.sum()

    slope = jax.grad(total)(y)
    step = 1e-4 * jnp.ones_like(y)
    want = (total(y + step) - total(y - step)) / 2e-4
    np.testing.assert_allclose(slope.sum(), want, rtol=1e-6)


def test_sampling_refuses_ambiguous_randomness():
    model, y, mask = build(make("scalar"), jnp.float32)
    filtered = jax.jit(kalman_filter)(model, y, mask)
    with pytest.raises(ValueError, match="both key and num_draws"):
        sample_paths(model, filtered, num_draws=3)
    with pytest.raises(ValueError, match="not both"):
        sample_paths(model, filtered, num_draws=3, normals=jnp.zeros((3, NUM_TIMES, 1)))
    with pytest.raises(ValueError, match="normals must have shape"):
        sample_paths(model, filtered, normals=jnp.zeros((3, 1)))
