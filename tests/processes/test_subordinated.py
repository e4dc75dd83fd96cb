"""Ornstein-Uhlenbeck processes driven by subordinators: transforms, densities, engines."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.util import log_density
from scipy import integrate, special, stats

import numpyro_sde as nsde

NUM = 20_000


def drawn(sde, x0, dt, num=NUM):
    path = nsde.SDEPath(sde, [0.0, dt], x0)
    return np.array(path.sample(jax.random.key(0), (num,)))[:, 1]


def gamma_transform(s, x0, c, shape, scale):
    return np.exp(-s * c * x0) * ((1 + c * s * scale) / (1 + s * scale)) ** shape


def inverse_gaussian_transform(s, x0, c, mean, shape):
    delta, gamma = np.sqrt(shape), np.sqrt(shape) / mean
    exponent = delta * (np.sqrt(gamma**2 + 2 * s) - np.sqrt(gamma**2 + 2 * c * s))
    return np.exp(-s * c * x0 - exponent)


@pytest.mark.slow
@pytest.mark.parametrize("dt", [0.1, 1.0, 7.0])
def test_draws_have_the_laplace_transforms_of_the_laws(x64, dt):
    rate, x0 = 0.6, 1.3
    c = np.exp(-rate * dt)
    cases = (
        (nsde.processes.GammaOU(rate, 2.5, 0.8), gamma_transform, (2.5, 0.8)),
        (nsde.processes.InverseGaussianOU(rate, 1.2, 3.0), inverse_gaussian_transform, (1.2, 3.0)),
    )
    for sde, transform, parameters in cases:
        x = drawn(sde, x0, dt)
        assert np.all(x >= c * x0 * (1 - 1e-12))
        for s in (0.2, 1.0, 4.0):
            values = np.exp(-s * x)
            error = values.std() / np.sqrt(NUM)
            assert abs(values.mean() - transform(s, x0, c, *parameters)) < 4.0 * error


@pytest.mark.slow
def test_long_times_end_in_the_stationary_laws(x64):
    x = drawn(nsde.processes.GammaOU(2.0, 2.5, 0.8), 50.0, 100.0)
    assert stats.kstest(x, stats.gamma(2.5, scale=0.8).cdf).pvalue > 0.001
    x = drawn(nsde.processes.InverseGaussianOU(2.0, 1.2, 3.0), 50.0, 100.0)
    assert stats.kstest(x, stats.invgauss(1.2 / 3.0, scale=3.0).cdf).pvalue > 0.001
    sde = nsde.processes.InverseGaussianOU(2.0, 1.2, 3.0)
    np.testing.assert_allclose(
        sde.stationary_log_density(0.7), stats.invgauss(1.2 / 3.0, scale=3.0).logpdf(0.7)
    )
    np.testing.assert_allclose(sde.stationary_moments(), [1.2, 1.2**3 / 3.0])
    gamma = nsde.processes.GammaOU(2.0, 2.5, 0.8)
    np.testing.assert_allclose(
        gamma.stationary_log_density(0.7), stats.gamma(2.5, scale=0.8).logpdf(0.7)
    )


@pytest.mark.parametrize(("shape", "dt"), [(0.7, 0.3), (2.5, 1.0), (12.0, 2.0), (2.5, 14.0)])
def test_density_of_the_gamma_process(x64, shape, dt):
    rate, scale, x0 = 0.6, 0.8, 1.3
    c = np.exp(-rate * dt)
    sde = nsde.processes.GammaOU(rate, shape, scale)
    step = sde.exact_transition()
    one = jax.jit(lambda w: step.log_density(sde, 0.0, dt, x0, c * x0 + w))
    # Kummer's function by scipy, and the mass of the atom.
    for w in (0.05, 0.9, 4.0):
        z = (1 - c) * w / (scale * c)
        known = shape * np.log(c) + np.log(shape * (1 - c) / (scale * c)) - w / (scale * c)
        if z < 500:
            known += np.log(special.hyp1f1(shape + 1, 2, z))
        else:  # by Kummer's transformation
            known += z + np.log(float(special.hyp1f1(1 - shape, 2, -z)))
        np.testing.assert_allclose(one(w), known, rtol=1e-9)
    mass = integrate.quad(lambda w: np.exp(float(one(w))), 1e-12, 60.0, limit=200)[0]
    np.testing.assert_allclose(mass + c**shape, 1.0, atol=1e-6)
    np.testing.assert_allclose(one(0.0), shape * np.log(c))
    assert one(-0.1) == -np.inf

    def of_shape(a):
        other = nsde.processes.GammaOU(rate, a, scale)
        return step.log_density(other, 0.0, dt, x0, c * x0 + 0.9)

    numeric = (of_shape(shape + 1e-5) - of_shape(shape - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(of_shape)(shape), numeric, rtol=1e-5)


@pytest.mark.parametrize(
    ("mean", "shape", "decays"), [(1.2, 3.0, 0.1), (0.5, 0.2, 1.0), (1.0, 50.0, 0.3)]
)
def test_density_of_the_inverse_gaussian_process(x64, mean, shape, decays):
    x0, c = 1.3, np.exp(-decays)
    sde = nsde.processes.InverseGaussianOU(1.0, mean, shape)
    step = sde.exact_transition()
    one = jax.jit(jax.vmap(lambda w: step.log_density(sde, 0.0, decays, x0, c * x0 + w)))
    # Its Laplace transform, by Gauss and Legendre on panels of the logarithm of what is added.
    nodes, weights = np.polynomial.legendre.leggauss(20)
    ends = np.linspace(-25.0, np.log(60.0 * mean + 100.0 * mean**2 / shape), 61)
    half = 0.5 * np.diff(ends)[:, None]
    w = np.exp(ends[:-1, None] + half * (1.0 + nodes)).ravel()
    mass = np.exp(np.array(one(jnp.array(w)))) * w * (half * weights).ravel()
    for s in (0.0, 0.3, 2.0, 20.0):
        known = inverse_gaussian_transform(s, 0.0, c, mean, shape)
        np.testing.assert_allclose(np.sum(mass * np.exp(-s * w)), known, rtol=1e-9)
    assert one(jnp.array([-0.1])) == -np.inf

    def of_shape(a):
        other = nsde.processes.InverseGaussianOU(1.0, mean, a)
        return step.log_density(other, 0.0, decays, x0, c * x0 + 0.4 * mean)

    numeric = (of_shape(shape * (1 + 1e-6)) - of_shape(shape * (1 - 1e-6))) / (2e-6 * shape)
    np.testing.assert_allclose(jax.grad(of_shape)(shape), numeric, rtol=1e-5)


def test_inverse_gaussian_density_after_a_long_time_and_in_single_precision(x64):
    sde = nsde.processes.InverseGaussianOU(2.0, 1.2, 3.0)
    step, law = sde.exact_transition(), stats.invgauss(1.2 / 3.0, scale=3.0)
    for x in (0.05, 0.7, 4.0, 15.0):
        found = step.log_density(sde, 0.0, 30.0, 1.3, jnp.array(x))
        np.testing.assert_allclose(found, law.logpdf(x), rtol=1e-10)
    exact = step.log_density(sde, 0.0, 0.2, 1.3, jnp.array(1.4))
    with jax.enable_x64(False):
        single = nsde.processes.InverseGaussianOU(2.0, 1.2, 3.0)
        found = step.log_density(single, 0.0, 0.2, 1.3, jnp.array(1.4, jnp.float32))
        np.testing.assert_allclose(found, exact, rtol=1e-4)


def model(sde, y=None):
    x = numpyro.sample("x", nsde.SDEPath(sde, np.arange(4.0), dist.Gamma(2.0, 1.0)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.5), obs=y)


@pytest.mark.slow
def test_particles_take_them_and_others_refuse(x64):
    sde, y = nsde.processes.GammaOU(0.5, 2.0, 1.0), np.array([1.5, 2.2, 1.4, 3.0])

    def at(method):
        return log_density(nsde.handlers.marginalize(model, method=method), (sde, y), {}, {})[0]

    # The likelihood by quadrature of the exact densities.
    grid = np.linspace(1e-3, 16.0, 1200)
    width, c = grid[1] - grid[0], np.exp(-0.5)
    w = grid[None, :] - c * grid[:, None]
    up = np.maximum(w, 0.0) / c
    K = c**2 * 2 * (1 - c) / c * np.exp(-up) * special.hyp1f1(3.0, 2.0, (1 - c) * up) * (w > 0)
    f = stats.gamma(2.0).pdf(grid)
    total = 0.0
    for k, value in enumerate(y):
        if k:
            smooth = f @ K * width
            atom = np.interp(grid / c, grid, f, right=0.0) / c * c**2.0
            f = smooth + atom
        f = f * stats.norm.pdf(value, grid, 0.5)
        total, f = total + np.log(f.sum() * width), f / (f.sum() * width)
    run = jax.jit(lambda key: at(nsde.filters.Particle(2000, proposal="bootstrap", key=key)))
    values = np.array([run(jax.random.key(k)) for k in range(8)])
    error = values.std(ddof=1) / np.sqrt(8)
    assert abs(values.mean() - total) < 4.0 * error + 3e-3  # and the quadrature
    for method in (
        nsde.filters.Kalman(),
        nsde.filters.ExtendedKalman(),
        nsde.filters.EnsembleKalman(),
        nsde.filters.MomentMatching(),
        nsde.filters.Particle(10, proposal="guided"),
    ):
        with pytest.raises((ValueError, TypeError), match=r"jump|bootstrap|Gaussian|scheme"):
            at(method)
    with pytest.raises(ValueError, match="would leave out the jumps of GammaOU"):
        nsde.SDEPath(sde, [0.0, 1.0], 1.0, scheme=nsde.schemes.Euler())
    with pytest.raises(ValueError, match="shape must be positive"):
        nsde.processes.GammaOU(0.5, 0.0, 1.0)
    panel = nsde.SDEPath(
        nsde.processes.InverseGaussianOU(jnp.array([0.5, 1.0]), 1.0, 2.0), [0.0, 1.0], 1.0
    )
    assert panel.sample(jax.random.key(0), (3,)).shape == (3, 2, 2)
