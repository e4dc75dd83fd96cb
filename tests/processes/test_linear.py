"""Linear SDEs against dense matrix exponentials and SciPy's multivariate normal."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, linalg, stats

import numpyro_sde as nsde
from numpyro_sde.processes import LinearSDE, OrnsteinUhlenbeck

# A damped oscillator whose noise enters one state alone and reaches the other through A.
A = np.array([[-0.3, 1.0], [-1.2, -0.5]])
B = np.array([0.3, -0.2])
L = np.array([[0.0], [0.7]])


def dense_law(A, b, L, x, dt):
    """Law of the next state by adaptive quadrature of its definition."""

    def noise(s):
        g = linalg.expm(A * s) @ L
        return g @ g.T

    mean = linalg.expm(A * dt) @ x
    mean = mean + integrate.quad_vec(lambda s: linalg.expm(A * s) @ b, 0.0, dt)[0]
    return stats.multivariate_normal(mean, integrate.quad_vec(noise, 0.0, dt)[0])


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_path_density_on_an_uneven_clock():
    times = np.array([0.0, 0.1, 0.2, 0.9, 1.0, 3.0])
    x = np.random.default_rng(0).normal(size=(6, 2))
    path = nsde.SDEPath(LinearSDE(A, B, L), times, init=x[0])
    expected = sum(
        dense_law(A, B, L, a, dt).logpdf(b)
        for a, b, dt in zip(x[:-1], x[1:], np.diff(times), strict=True)
    )
    np.testing.assert_allclose(jax.jit(path.log_prob)(x), expected, rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_gradient_is_that_of_finite_differences():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 2)))
    times = np.array([0.0, 0.3, 0.5, 1.1])

    def density(flat):
        A, b, L = flat[:4].reshape(2, 2), flat[4:6], flat[6:].reshape(2, 1)
        return nsde.SDEPath(LinearSDE(A, b, L), times, init=x[0]).log_prob(x)

    at = np.concatenate([A.ravel(), B, L.ravel()])
    h = 1e-5 * np.eye(len(at))
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(density)))(
        np.concatenate([[at], at + h, at - h])
    )
    up, down = np.split(np.asarray(values[1:]), 2)
    np.testing.assert_allclose(slopes[0], (up - down) / 2e-5, rtol=1e-6, atol=1e-7)


def test_one_dimension_is_the_scalar_process():
    times = np.array([0.0, 0.5, 0.7])
    x = jnp.array([1.0, 0.4, 0.6])
    scalar = nsde.SDEPath(OrnsteinUhlenbeck(1.2, 0.5, 0.8), times, init=1.0)
    vector = nsde.SDEPath(LinearSDE([[-1.2]], [0.6], [[0.8]]), times, init=jnp.ones(1))
    np.testing.assert_allclose(
        jax.jit(vector.log_prob)(x[:, None]), jax.jit(scalar.log_prob)(x), rtol=1e-5
    )


def test_integrated_brownian_motion_over_a_short_step_in_single_precision():
    """Noise enters the velocity alone; the position's variance is dt^3 / 3."""
    sde = LinearSDE([[0.0, 1.0], [0.0, 0.0]], [0.0, 0.0], [[0.0], [1.0]])
    dt = 1e-3
    _, factor = eqx.filter_jit(sde.exact_transition().moments)(sde, 0.0, dt, jnp.array([1.0, 2.0]))
    expected = np.linalg.cholesky([[dt**3 / 3, dt**2 / 2], [dt**2 / 2, dt]])
    assert factor.dtype == jnp.float32
    np.testing.assert_allclose(factor, expected, rtol=1e-4)


@pytest.mark.usefixtures("x64")
def test_a_long_step_forgets_its_start():
    sde = LinearSDE(A, B, L)
    mean, factor = eqx.filter_jit(sde.exact_transition().moments)(sde, 0.0, 80.0, jnp.ones(2))
    stationary_mean, covariance = eqx.filter_jit(sde.stationary_moments)()
    np.testing.assert_allclose(mean, stationary_mean, rtol=1e-10)
    np.testing.assert_allclose(factor @ factor.T, covariance, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(covariance, linalg.solve_continuous_lyapunov(A, -L @ L.T))
    law = stats.multivariate_normal(mean, covariance)
    x = np.array([0.1, 0.2])
    np.testing.assert_allclose(eqx.filter_jit(sde.stationary_log_density)(x), law.logpdf(x))


@eqx.filter_jit
def moments(sde):
    return sde.stationary_moments()


@pytest.mark.parametrize(
    ("A", "L"),
    [
        ([[0.5, 0.0], [0.0, -1.0]], np.eye(2)),  # unstable
        ([[0.0, 1.0], [-1.0, 0.0]], np.eye(2)),  # neither
        ([[-1.0, 0.0], [0.0, -1.0]], [[1.0], [0.0]]),  # noise does not reach the second state
    ],
)
def test_no_stationary_law(A, L):
    mean, covariance = moments(LinearSDE(A, np.zeros(2), L))
    assert np.all(np.isnan(mean))
    assert np.all(np.isnan(covariance))


def test_batch_of_matrices():
    batch = jnp.stack([jnp.asarray(A), 2.0 * jnp.asarray(A)])
    sde = LinearSDE(batch, B, L)
    assert sde.batch_shape == (2,)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(4, 2)))
    times = np.arange(4) * 0.25

    @jax.jit
    def everything(sde):
        path = nsde.SDEPath(sde, times, init=x[0])
        return path.log_prob(x), *sde.stationary_moments(), sde.stationary_log_density(x[0])

    together = everything(sde)
    assert [part.shape for part in together] == [(2,), (2, 2), (2, 2, 2), (2,)]
    for i in range(2):
        for whole, alone in zip(together, everything(LinearSDE(batch[i], B, L)), strict=True):
            np.testing.assert_allclose(whole[i], alone, rtol=1e-4)


@pytest.mark.usefixtures("x64")
def test_innovations_have_the_dimension_of_the_state(key):
    path = nsde.SDEPath(LinearSDE(A, B, L), np.linspace(0.0, 1.0, 5), init=np.zeros(2))
    assert path.innovation_shape == (4, 2)
    z = jax.random.normal(key, (4, 2))
    back = jax.jit(lambda z: path.inverse(path.forward(jnp.zeros(2), z))[1])(z)
    np.testing.assert_allclose(back, z, atol=1e-8)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"A must have shape \(\*batch, d, d\), got \(2, 3\)"):
        LinearSDE(np.ones((2, 3)), np.ones(2), np.ones((2, 1)))
    with pytest.raises(ValueError, match=r"b must have shape \(\*batch, 2\).*got \(3,\)"):
        LinearSDE(np.eye(2), np.ones(3), np.ones((2, 1)))
    with pytest.raises(ValueError, match=r"L must have shape \(\*batch, 2, m\).*got \(2,\)"):
        LinearSDE(np.eye(2), np.ones(2), np.ones(2))
    with pytest.raises(ValueError, match=r"must have shape \(2,\), got \(3,\)"):
        nsde.SDEPath(LinearSDE(A, B, L), [0.0, 1.0], init=np.ones(3))
    with pytest.raises(TypeError, match="A must be a number or an array"):
        LinearSDE("A", np.ones(2), np.ones((2, 1)))
