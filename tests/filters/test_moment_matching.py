"""Moment matching against closed forms, and the check of its closure."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import state_space as ss
from scipy.linalg import expm, solve_continuous_lyapunov

import numpyro_sde as nsde
from numpyro_sde.filters.closure import closure_check
from numpyro_sde.filters.extended import ExtendedKalman
from numpyro_sde.filters.moment_matching import MomentMatching
from numpyro_sde.filters.unscented import UnscentedKalman
from numpyro_sde.sde import SDE

BENES = SDE(lambda t, x: jnp.tanh(x), lambda t, x: 1.0)
DOUBLE_WELL = SDE(lambda t, x: 2.0 * x * (1.0 - x**2), lambda t, x: 0.7)


def propagate(sde, x0, times, method):
    built = ss.build(sde, times, [x0], [[0.0]], scalar=True)
    return jax.jit(lambda m: method.filter(built._replace(init_mean=m)))(jnp.asarray([x0]))


@pytest.mark.usefixtures("x64")
def test_geometric_brownian_motion_is_exact():
    # dX = mu X dt + sigma X dW: mean e^{mu t}, second moment e^{(2 mu + sigma^2) t}
    mu, sigma, times = 0.1, 0.3, np.array([0.0, 0.7, 4.0])
    sde = SDE(lambda t, x: mu * x, lambda t, x: sigma * x)
    for quadrature in ("cubature", "unscented", "gauss_hermite"):
        result = propagate(sde, 1.0, times, MomentMatching(quadrature, order=2, substeps=64))
        mean = np.exp(mu * times)
        variance = np.exp((2 * mu + sigma**2) * times) - mean**2
        np.testing.assert_allclose(result.mean[:, 0], mean, rtol=1e-8)
        np.testing.assert_allclose(result.cov[:, 0, 0], variance, rtol=1e-7)


@pytest.mark.usefixtures("x64")
def test_benes_moments():
    # dX = tanh(X) dt + dW: mean x0 + t tanh x0, variance t + t^2 / cosh^2 x0 (Benes 1981).
    # The Gaussian closure is right to the order of t^2 and drifts off later.
    x0, times = 0.5, np.array([0.0, 0.05, 0.1, 0.2, 1.0, 4.0])
    result = propagate(BENES, x0, times, MomentMatching("gauss_hermite", order=60, substeps=20))
    mean = x0 + times * np.tanh(x0)
    variance = times + times**2 / np.cosh(x0) ** 2
    early = times <= 0.2
    np.testing.assert_allclose(result.mean[early, 0], mean[early], rtol=1e-4)
    np.testing.assert_allclose(result.cov[early, 0, 0], variance[early], rtol=2e-3)
    # An independent integration of the closed equations.
    got = np.stack([result.mean[:, 0], result.cov[:, 0, 0]], 1)
    np.testing.assert_allclose(got[-2:], closed_moments(x0, times[-2:]), rtol=1e-3)


def closed_moments(x0, ends):
    """Euler in steps of 1/20,000 on dm = E f, dP = 2 E f (X - m) + 1, 60-point quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights, m, P, h, out = weights / weights.sum(), x0, 0.0, 5e-5, []
    for k in range(1, round(ends[-1] / h) + 1):
        f = np.tanh(m + np.sqrt(P) * nodes)
        m, P = m + h * weights @ f, P + h * (2 * np.sqrt(P) * weights @ (f * nodes) + 1.0)
        if np.isclose(k * h, ends).any():
            out.append((m, P))
    return np.array(out)


@pytest.mark.usefixtures("x64")
def test_error_falls_with_the_fourth_power_of_the_step():
    exact = propagate(BENES, 0.5, [0.0, 0.8], MomentMatching(substeps=64))
    errors = []
    for substeps in (4, 8):
        result = propagate(BENES, 0.5, [0.0, 0.8], MomentMatching(substeps=substeps))
        errors.append(abs(float(result.cov[-1, 0, 0] - exact.cov[-1, 0, 0])))
    assert 12.0 < errors[0] / errors[1] < 20.0


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_stiff_drift_is_integrated_within_its_stability_or_not_at_all():
    # One step of 39 relaxation times of the fast state, one of the slow one.
    A, L = np.array([[0.0, 1.0], [-30.0, -40.0]]), np.array([[0.0], [1.0]])
    built = ss.build(ss.linear_sde(A, np.zeros(2), L), [0.0, 1.0], np.ones(2), np.zeros((2, 2)))

    def last(substeps, scale=1.0):
        model = built._replace(sde=ss.linear_sde(scale * A, np.zeros(2), L))
        result = jax.jit(
            lambda m: MomentMatching(substeps=substeps).filter(model._replace(init_mean=m))
        )(built.init_mean)
        return np.asarray(result.mean[-1]), np.asarray(result.cov[-1])

    F, stationary = expm(A), solve_continuous_lyapunov(A, -L @ L.T)
    Q = stationary - F @ stationary @ F.T
    mean, cov = last(4)
    np.testing.assert_allclose(mean, F @ np.ones(2), rtol=1e-3)
    np.testing.assert_allclose(cov, Q, rtol=1e-3, atol=1e-3 * Q.max())
    assert np.linalg.eigvalsh(cov).min() > 0.0
    assert np.isnan(last(1)[1]).all()  # 49 steps of a quarter of a relaxation time are not enough
    assert np.isnan(last(4, 10.0)[1]).all()


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_substeps_follow_the_stiffest_series_of_a_batch_and_differentiate():
    def log_likelihood(rate, method=None):
        sde = SDE(lambda t, x, p: -p * x, lambda t, x, p: jnp.sqrt(p), params=rate)
        y = np.array([[0.4], [-0.2], [0.5]])
        devices = [ss.linear_instrument(np.eye(1), np.array([[0.09]]), y)]
        built = ss.build(sde, [0.0, 1.0, 2.0], np.ones(1), np.eye(1), devices, scalar=True)
        return (MomentMatching() if method is None else method).log_likelihood(built)

    def exact(rate):
        F, Q = jnp.exp(-rate), 0.5 * -jnp.expm1(-2 * rate)
        m, P, total = 1.0, 1.0, 0.0
        for k, y in enumerate((0.4, -0.2, 0.5)):
            if k:
                m, P = F * m, F**2 * P + Q
            S = P + 0.09
            total += -0.5 * ((y - m) ** 2 / S + jnp.log(2 * jnp.pi * S))
            m, P = m + P / S * (y - m), P * 0.09 / S
        return total

    rates = jnp.array([0.3, 5.0, 45.0, 1e3])
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(log_likelihood)))(rates)
    wanted, wanted_slopes = jax.jit(jax.vmap(jax.value_and_grad(exact)))(rates)
    np.testing.assert_allclose(values[:3], wanted[:3], rtol=2e-4)
    np.testing.assert_allclose(slopes[:3], wanted_slopes[:3], rtol=1e-2, atol=2e-4)
    assert np.isnan(values[3])


@pytest.mark.slow
@pytest.mark.parametrize("method", [ExtendedKalman(), UnscentedKalman(), MomentMatching()])
@pytest.mark.usefixtures("x64")
def test_double_well_observed_often(method):
    rng = np.random.default_rng(2)
    times = np.linspace(0.0, 6.0, 301)
    x, values = [-1.0], np.full(301, np.nan)
    for h in np.diff(times):
        x.append(x[-1] + 2 * x[-1] * (1 - x[-1] ** 2) * h + 0.7 * np.sqrt(h) * rng.normal())
    values[::10] = np.array(x)[::10] + 0.2 * rng.normal(size=31)

    def law(x):
        return dist.Normal(x, 0.2)

    device = ss.scalar_instrument(law, values, gaussian=True)
    built = ss.build(DOUBLE_WELL, times, [-1.0], [[0.1]], [device], scalar=True)
    increments, means, variances = ss.grid_filter(built, law, np.linspace(-3, 3, 601), substeps=1)
    result = jax.jit(lambda m: method.filter(built._replace(init_mean=m)))(jnp.array([-1.0]))
    # Observed every 0.2, the belief stays within one well: all three are near the truth, to
    # 0.03 nats an observation.
    assert abs(result.log_likelihood - increments.sum()) < 0.03 * 31
    assert np.abs((result.mean[:, 0] - means) / np.sqrt(variances)).max() < 0.5


@pytest.mark.slow
def test_closure_check_of_a_path_is_that_of_its_model():
    times, y = np.linspace(0.0, 3.0, 7), np.linspace(2.0, 0.5, 7)
    decay = nsde.SDE(lambda t, x: -0.5 * x, lambda t, x: 0.2)
    path = nsde.SDEPath(decay, times, dist.Normal(2.0, 0.3))
    plain = closure_check(path, num_paths=500)
    assert plain.ok
    model = nsde.state_space_model(path, lambda t, x: dist.Normal(x, 0.1), y)
    assert len(model.instruments) == 1
    found = closure_check(model, num_paths=500)
    assert found.ok
    # With data the paths start again from what the filter believes: they are closer.
    assert found.mean_gap[0] != plain.mean_gap[0]
    np.testing.assert_allclose(
        closure_check(model._replace(instruments=()), num_paths=500).mean_gap, plain.mean_gap
    )
    with pytest.raises(TypeError, match="takes an SDEPath"):
        closure_check(decay)
    two = nsde.SDEPath(decay, times, dist.Normal(jnp.zeros(2), 0.3))
    with pytest.raises(ValueError, match="that of one path"):
        closure_check(two)
    with pytest.raises(ValueError, match="that of one path"):
        nsde.state_space_model(two, lambda t, x: dist.Normal(x, 0.1), y)


def test_closure_check_accepts_and_refuses():
    decay = SDE(lambda t, x: -x, lambda t, x: 0.5)
    fine = closure_check(ss.build(decay, np.linspace(0, 3, 7), [2.0], [[0.1]], scalar=True))
    assert fine.ok
    assert fine.reasons == ()
    # Simulation noise: skewness has s.e. sqrt(6 / 4000) = 0.039, kurtosis 0.077.
    assert fine.skewness.max() < 5 * 0.039
    assert fine.kurtosis.max() < 5 * 0.077
    two = closure_check(ss.build(DOUBLE_WELL, np.linspace(0, 4, 9), [0.2], [[0.0]], scalar=True))
    assert not two.ok
    assert any("standard deviations" in reason or "variance" in reason for reason in two.reasons)


def test_closure_check_sees_divergence():
    # Dimerisation at a copy number below one: Schnoerr, Sanguinetti and Grima (2014).
    omega = 0.3
    sde = SDE(
        lambda t, x: jnp.stack([omega - 2.0 * x[0] * (x[0] - 1.0) / omega]),
        lambda t, x: jnp.sqrt(jnp.abs(omega + 4.0 * x * (x - 1.0) / omega))[:, None],
    )
    report = closure_check(ss.build(sde, np.linspace(0, 5, 51), [1.0], [[0.0]]), substeps=2)
    assert not report.ok
