"""On linear-Gaussian models every approximate filter is exact: dense normal law as the truth."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import state_space as ss

from numpyro_sde.filters.ensemble import EnsembleKalman
from numpyro_sde.filters.extended import ExtendedKalman
from numpyro_sde.filters.moment_matching import MomentMatching
from numpyro_sde.filters.unscented import UnscentedKalman

A = np.array([[-0.6, 1.0], [-1.2, -0.3]])
B = np.array([0.3, -0.2])
L = np.array([[0.5, 0.0], [0.2, 0.4]])
M0 = np.array([0.5, -1.0])
P0 = np.array([[0.7, 0.2], [0.2, 0.5]])
C1, R1 = np.array([[1.0, 0.0], [0.5, 1.0]]), np.array([[0.2, 0.05], [0.05, 0.1]])
C2, R2 = np.array([[0.0, 1.0]]), np.array([[0.3]])

# Runge-Kutta error with 64 substeps: step 0.01, rate 1.3, (0.01)^4 1.3^5 / 120 < 1e-9 a unit.
FILTERS = {
    "extended": (ExtendedKalman(), "euler"),
    "unscented": (UnscentedKalman(), "euler"),
    "wide unscented": (UnscentedKalman(alpha=1.2, kappa=1.0), "euler"),
    "cubature": (MomentMatching("cubature", substeps=64), "exact"),
    "Gauss-Hermite": (MomentMatching("gauss_hermite", order=3, substeps=64), "exact"),
}


@functools.cache
def data():
    """Irregular times, two instruments, components and whole times missing."""
    rng = np.random.default_rng(3)
    times = np.cumsum(np.concatenate([[0.0], rng.uniform(0.02, 0.6, 11)]))
    y1, y2 = rng.normal(size=(12, 2)), rng.normal(size=(12, 1))
    y1[3, 0] = y1[4] = y1[7, 1] = np.nan
    y2[[0, 2, 4, 5, 9, 11]] = np.nan
    return times, y1, y2


def model(m0, P0):
    times, y1, y2 = data()
    devices = [ss.linear_instrument(C1, R1, y1), ss.linear_instrument(C2, R2, y2)]
    return ss.build(ss.linear_sde(A, B, L), times, m0, P0, devices)


def truth(kind, P0=P0):
    times, y1, y2 = data()
    steps = (ss.euler_steps if kind == "euler" else ss.exact_steps)(A, B, L, np.diff(times))
    return ss.Dense(steps, M0, P0, [(C1, R1, y1), (C2, R2, y2)])


@functools.cache
def runner(name, x64):
    """The filter compiled once for both starts."""
    return jax.jit(lambda m0, P0: FILTERS[name][0].filter(model(m0, P0)))


smooth = jax.jit(lambda result: result.smooth())


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.usefixtures("x64")
def test_equals_the_dense_normal_law(name):
    for start_cov in (P0, np.zeros((2, 2))):
        result = runner(name, True)(M0, start_cov)
        means, covs = smooth(result)
        dense = truth(FILTERS[name][1], start_cov)
        filtered_mean, filtered_cov, increments = dense.filtered()
        smoothed_mean, smoothed_cov, log_density = dense.posterior()
        tight = {"rtol": 1e-8, "atol": 1e-8}
        np.testing.assert_allclose(result.log_likelihood, log_density, **tight)
        np.testing.assert_allclose(result.increments, increments, **tight)
        np.testing.assert_allclose(result.mean, filtered_mean, **tight)
        np.testing.assert_allclose(result.cov, filtered_cov, **tight)
        np.testing.assert_allclose(means, smoothed_mean, **tight)
        np.testing.assert_allclose(covs, smoothed_cov, **tight)
        # Nothing was observed at the fifth time: no change, and log density 0, exactly.
        assert result.increments[4] == 0.0
        assert np.array_equal(result.mean[4], result.predicted_mean[4])
        assert np.array_equal(result.cov[4], result.predicted_cov[4])


@pytest.mark.parametrize("name", ["extended", "unscented", "Gauss-Hermite"])
@pytest.mark.usefixtures("x64")
def test_draws_have_the_smoothed_moments(name):
    n = 20_000
    draws = np.asarray(draw(runner(name, True)(M0, P0), jax.random.key(1), n))
    mean, cov, _ = truth(FILTERS[name][1]).posterior()
    sd = np.sqrt(np.diagonal(cov, axis1=1, axis2=2))
    z = (draws.mean(0) - mean) / (sd / np.sqrt(n))
    assert np.abs(z).max() < 4.0
    # s.e. of a sample covariance of normals: sqrt((P_ii P_jj + P_ij^2) / n)
    got = np.einsum("nki,nkj->kij", draws - mean, draws - mean) / n
    se = np.sqrt((sd[:, :, None] ** 2 * sd[:, None, :] ** 2 + cov**2) / n)
    assert np.abs((got - cov) / se).max() < 4.0


draw = jax.jit(lambda result, key, n: result.sample(key, n), static_argnums=2)


@pytest.mark.parametrize("name", ["extended", "unscented", "cubature"])
def test_float32_is_close_to_float64(name):
    result = runner(name, False)(M0, P0)
    means, covs = smooth(result)
    assert result.mean.dtype == jnp.float32
    mean, cov, log_density = truth(FILTERS[name][1]).posterior()
    np.testing.assert_allclose(result.log_likelihood, log_density, rtol=1e-4)
    np.testing.assert_allclose(means, mean, atol=1e-3)
    np.testing.assert_allclose(covs, cov, atol=1e-3)


@pytest.mark.usefixtures("x64")
def test_ensemble_within_monte_carlo_error():
    # 40 ensembles of 2,000: the bias, of order 1/2,000, is below the standard error of their
    # mean, of order 1/sqrt(80,000).
    method, keys = EnsembleKalman(2000), jax.random.split(jax.random.key(5), 40)
    result = jax.jit(jax.vmap(lambda k: method.filter_with_key(model(M0, P0), k)))(keys)
    dense = truth("euler")
    mean, cov, increments = dense.filtered()
    smoothed = jax.vmap(smooth)(result)[0]
    pairs = (
        (result.increments, increments),
        (result.mean, mean),
        (result.cov, cov),
        (smoothed, dense.posterior()[0]),
    )
    for values, exact in pairs:
        values = np.asarray(values)
        error = values.mean(0) - exact
        se = values.std(0, ddof=1) / np.sqrt(40)
        moving = se > 0
        assert np.all(error[~moving] == 0)
        assert np.abs(error[moving] / se[moving]).max() < 4.0


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_ensemble_is_a_fixed_function_of_its_seed():
    method = EnsembleKalman(50, seed=3)
    run = jax.jit(jax.vmap(lambda k: method.filter_with_key(model(M0, P0), k).log_likelihood))
    same, other = run(jnp.stack([jax.random.key(3), jax.random.key(4)]))
    by_seed = jax.jit(lambda m0: method.log_likelihood(model(m0, P0)))(M0)
    np.testing.assert_allclose(by_seed, same, rtol=1e-12)
    assert abs(other - same) > 1e-3
