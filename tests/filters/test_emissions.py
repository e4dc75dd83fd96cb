"""Emissions that are not Gaussian or not linear, against quadrature on a grid of states."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import state_space as ss
from scipy.optimize import minimize_scalar

from numpyro_sde.distributions.observation import Emission
from numpyro_sde.distributions.statement import (
    Rows,
    Statement,
    stack_replicates,
    with_lead,
)
from numpyro_sde.filters.ensemble import EnsembleKalman
from numpyro_sde.filters.extended import ExtendedKalman
from numpyro_sde.filters.unscented import UnscentedKalman
from numpyro_sde.sde import SDE
from numpyro_sde.statespace.guide import observed_information
from numpyro_sde.statespace.updates import laplace, linear_update

LAWS = {
    "Poisson": lambda x: dist.Poisson(jnp.exp(1.0 + x)),
    "Bernoulli": lambda x: dist.BernoulliLogits(2.0 * x),
    "Student t": lambda x: dist.StudentT(4.0, x, 0.4),
}


def ornstein_uhlenbeck(rate=1.0, scale=0.5):
    return SDE(
        lambda t, x, p: -p["rate"] * x,
        lambda t, x, p: p["scale"],
        params={"rate": rate, "scale": scale},
    )


@functools.cache
def counts(name):
    """Data drawn with NumPy; two of 25 missing."""
    rng = np.random.default_rng(7)
    times = np.cumsum(np.concatenate([[0.0], rng.uniform(0.05, 0.35, 24)]))
    x = [0.3]
    for h in np.diff(times):
        x.append(x[-1] - x[-1] * h + 0.5 * np.sqrt(h) * rng.normal())
    x = np.array(x)
    y = {
        "Poisson": rng.poisson(np.exp(1.0 + x)),
        "Bernoulli": rng.random(25) < 1 / (1 + np.exp(-2.0 * x)),
        "Student t": x + 0.4 * rng.standard_t(4.0, 25),
    }[name].astype(float)
    y[[6, 13]] = np.nan
    return times, y


def model(name, rate=1.0, init_cov=0.2):
    times, y = counts(name)
    device = ss.scalar_instrument(LAWS[name], y)
    return ss.build(ornstein_uhlenbeck(rate), times, [0.0], [[init_cov]], [device], scalar=True)


def laplace_filter(built, law):
    """The same approximation by SciPy: scalar search for the mode, numerical curvature."""
    (device,), m, P = built.instruments, 0.0, float(built.init_cov[0, 0])
    density = jax.jit(lambda x, y: law(x).log_prob(y))
    increments, means, variances = [], [], []
    for k in range(built.num_times):
        if k:
            h = built.dt[k - 1]
            m, P = m - m * h, (1 - h) ** 2 * P + 0.25 * h
        increment = 0.0
        if bool(device.present[k, 0]):
            y = device.values[k, 0]

            def negative(x, y=y, m=m, P=P):
                normal = -0.5 * ((x - m) ** 2 / P + np.log(2 * np.pi * P))
                return -float(density(x, y)) - normal

            bounds = (m - 6 * np.sqrt(P), m + 6 * np.sqrt(P))
            found = minimize_scalar(negative, bounds=bounds, options={"xatol": 1e-9})
            m, e = found.x, 1e-4
            P = e**2 / (negative(m + e) - 2 * negative(m) + negative(m - e))
            increment = -negative(m) + 0.5 * np.log(2 * np.pi * P)
        increments.append(increment)
        means.append(m)
        variances.append(P)
    return np.array(increments), np.array(means), np.array(variances)


@pytest.mark.parametrize(
    "name", ["Poisson", "Student t", pytest.param("Bernoulli", marks=pytest.mark.slow)]
)
@pytest.mark.usefixtures("x64")
def test_laplace_increments(name):
    built = model(name)
    result = jax.jit(lambda rate: UnscentedKalman().filter(model(name, rate)))(1.0)
    increments, means, variances = laplace_filter(built, LAWS[name])
    np.testing.assert_allclose(result.increments, increments, atol=1e-5)
    np.testing.assert_allclose(result.mean[:, 0], means, atol=1e-5)
    np.testing.assert_allclose(result.cov[:, 0, 0], variances, rtol=1e-4)
    assert result.increments[6] == 0.0
    # What Laplace itself costs: some 0.02 nats an observation, a tenth of a standard deviation.
    exact, exact_means, exact_variances = ss.grid_filter(built, LAWS[name], np.linspace(-4, 4, 801))
    sd = np.sqrt(exact_variances)
    assert abs(increments.sum() - exact.sum()) < 0.025 * len(increments)
    assert np.abs((result.mean[:, 0] - exact_means) / sd).max() < 0.2


@pytest.mark.usefixtures("x64")
def test_laplace_error_is_the_next_order_of_its_expansion():
    # With v the posterior variance and g3, g4 derivatives of the log posterior, the error is
    # g4 v^2 / 8 + 5 g3^2 v^3 / 24 (Tierney and Kadane 1986); for a Poisson with log link all
    # derivatives are minus its mean.
    y, width = 4.0, 0.15
    points = np.linspace(-10 * width, 10 * width, 4001)
    law = LAWS["Poisson"](points)
    weights = np.exp(law.log_prob(y) + dist.Normal(0.0, width).log_prob(points))
    exact = np.log(np.sum(weights) * (points[1] - points[0]))

    def emission(z):
        return LAWS["Poisson"](width * z[0]).log_prob(y)

    z, B, log_z = laplace(emission, jnp.zeros(1), 10)
    v, rate = (width / B[0, 0]) ** 2, np.exp(1.0 + width * z[0])
    expected = -rate * v**2 / 8 + 5 * rate**2 * v**3 / 24
    np.testing.assert_allclose(exact - log_z, expected, rtol=0.1)


def poisson_by_moments(built, linear):
    """Filter of counts by their conditional moments, closed form of the log-normal mean."""
    (device,), m, P = built.instruments, 0.0, float(built.init_cov[0, 0])
    increments = []
    for k in range(built.num_times):
        if k:
            h = built.dt[k - 1]
            m, P = m - m * h, (1 - h) ** 2 * P + 0.25 * h
        increments.append(0.0)
        if bool(device.present[k, 0]):
            rate = np.exp(1.0 + m) if linear else np.exp(1.0 + m + 0.5 * P)
            signal = rate**2 * P if linear else rate**2 * np.expm1(P)
            r, S, C = float(device.values[k, 0]) - rate, signal + rate, P * rate
            increments[-1] = -0.5 * (r**2 / S + np.log(2 * np.pi * S))
            m, P = m + C / S * r, P - C**2 / S
    return increments, m, P


@pytest.mark.parametrize(
    ("method", "linear"),
    [(ExtendedKalman(emission="moments"), True), (UnscentedKalman(emission="moments"), False)],
)
@pytest.mark.usefixtures("x64")
def test_counts_by_their_moments(method, linear):
    built = model("Poisson")
    result = jax.jit(lambda rate: method.filter(model("Poisson", rate)))(1.0)
    increments, m, P = poisson_by_moments(built, linear)
    # Sigma points take the moments of e^x with a relative error of order P^2: 0.2^2 / 3.
    tight = {"rtol": 1e-8} if linear else {"atol": 0.05}
    np.testing.assert_allclose(result.increments, increments, **tight)
    np.testing.assert_allclose(result.mean[-1, 0], m, **tight)
    np.testing.assert_allclose(result.cov[-1, 0, 0], P, **tight)
    assert result.increments[6] == 0.0


@pytest.mark.parametrize("emission", ["laplace", pytest.param("moments", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("x64")
def test_ensemble_follows_the_unscented_filter(emission):
    same = UnscentedKalman(emission=emission)
    reference = jax.jit(lambda rate: same.filter(model("Poisson", rate)))(1.0)
    keys = jax.random.split(jax.random.key(0), 30)
    method = EnsembleKalman(1000, emission=emission)
    run = jax.jit(jax.vmap(lambda key: method.filter_with_key(model("Poisson"), key)))
    result = run(keys)
    mean = np.asarray(result.mean[:, :, 0])
    se = mean.std(0, ddof=1) / np.sqrt(30)
    sd = np.sqrt(reference.cov[:, 0, 0])
    if emission == "laplace":  # both take the emission to the same Gaussian
        assert np.abs((mean.mean(0) - reference.mean[:, 0]) / se).max() < 4.0
        total = np.asarray(result.log_likelihood)
        error = total.mean() - reference.log_likelihood
        assert abs(error) < 4.0 * total.std(ddof=1) / np.sqrt(30)
    else:  # sigma points stand for the ensemble
        assert np.abs((mean.mean(0) - reference.mean[:, 0]) / sd).max() < 0.1


@pytest.mark.usefixtures("x64")
def test_laplace_is_exact_for_a_gaussian_emission_with_all_derivatives():
    rng = np.random.default_rng(0)
    m = jnp.asarray(rng.normal(size=2))
    S = jnp.tril(jnp.asarray(rng.normal(size=(2, 2)))) + 2 * jnp.eye(2)
    H, R = jnp.asarray(rng.normal(size=(2, 2))), jnp.diag(jnp.array([0.3, 0.7]))

    def by_laplace(y):
        law = dist.MultivariateNormal(jnp.zeros(2), R)
        z, B, log_z = laplace(lambda z: law.log_prob(y - H @ (m + S @ z)), jnp.zeros(2), 3)
        root = jax.scipy.linalg.solve_triangular(B, S.T, lower=True)
        return m + S @ z, root.T @ root, log_z

    def exact(y):
        return linear_update(m, S @ S.T, y - H @ m, H, R, jnp.array([True, True]))

    y = jnp.array([1.0, -2.0])

    def derivatives(f):
        return jax.jit(lambda y: (f(y), jax.jacrev(f)(y), jax.hessian(lambda y: f(y)[2])(y)))(y)

    got, want = jax.tree.leaves(derivatives(by_laplace)), jax.tree.leaves(derivatives(exact))
    assert len(got) == 7
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("x64")
def test_laplace_finds_far_modes_and_survives_outliers():
    # A count of a million from a belief about one: e^x = 10^6 at the mode, nearly.
    z, _, _ = laplace(lambda z: dist.Poisson(jnp.exp(z[0])).log_prob(1e6), jnp.zeros(1), 20)
    assert abs(1e6 - np.exp(z[0]) - z[0]) < 1e-3

    # An outlier of a heavy tail pulls little and leaves the prior's width.
    def heavy(z):
        return dist.StudentT(2.0, z[0], 0.1).log_prob(50.0)

    z, B, log_z = laplace(heavy, jnp.zeros(1), 10)
    assert abs(z[0] - 3.0 / 50.0) < 0.01
    assert abs(B[0, 0] - 1.0) < 0.01
    assert abs(log_z - heavy(jnp.zeros(1))) < 0.01


@pytest.mark.parametrize("iterations", [1, 4])
@pytest.mark.usefixtures("x64")
def test_nonlinear_gaussian_emission(iterations):
    # y = x^3 / 3 + noise, with a belief at 2 of width 0.3: the iterated update finds the mode.
    def law(x):
        return dist.Normal(x**3 / 3.0, 0.1)

    device = ss.scalar_instrument(law, [3.6, np.nan], gaussian=True)
    built = ss.build(ornstein_uhlenbeck(), [0.0, 0.1], [2.0], [[0.09]], [device], scalar=True)
    method = ExtendedKalman(iterations=iterations)
    result = jax.jit(lambda m: method.filter(built._replace(init_mean=m)))(built.init_mean)
    points = np.linspace(1.0, 3.0, 20001)
    log_p = np.asarray(law(points).log_prob(3.6)) - 0.5 * (points - 2.0) ** 2 / 0.09
    mode = points[np.argmax(log_p)]
    error = abs(float(result.mean[0, 0]) - mode)
    assert error < 1e-3 if iterations == 4 else error > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("scale", [None, "state"])
def test_many_independent_components_need_no_matrix(scale):
    """Their information and score are those by the covariance matrix; one component is missing."""
    gains = jnp.array([0.5, -1.0, 2.0])

    def law(t, x, p):
        if scale is None:
            return dist.Poisson(jnp.exp(0.2 + p * x))
        return dist.Normal(p * x, jnp.exp(0.3 * x))

    emission = Emission(law, gains, None, None, 2, (3,))
    statement = Statement(emission, None, None, Rows(np.arange(2)), emission.structure(()), ())
    stacked, lay_out, _ = stack_replicates(statement, (3,), (1,))
    y = lay_out(np.array([[1.0, 2.0], [0.0, np.nan], [3.0, 1.0]]), 1)
    stacked, y = with_lead(stacked, y, ())
    (instrument,) = stacked.instruments(np.arange(2.0), (), y)
    now = jax.tree.map(lambda a: jnp.asarray(a)[1], (instrument.inputs, instrument.values))
    x = jnp.array([0.4])
    seen = jnp.asarray(instrument.present)[1]
    found = observed_information(instrument, *now, seen, x)
    dense = observed_information(instrument._replace(variances=None), *now, seen, x)
    np.testing.assert_allclose(found[0], dense[0], rtol=2e-5)
    np.testing.assert_allclose(found[1], dense[1], rtol=2e-5)
