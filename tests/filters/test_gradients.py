"""Derivatives by finite differences, NaN-free in float32, batches, options, refusals."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import state_space as ss

from numpyro_sde.filters.ensemble import EnsembleKalman
from numpyro_sde.filters.extended import ExtendedKalman
from numpyro_sde.filters.moment_matching import MomentMatching
from numpyro_sde.filters.unscented import UnscentedKalman
from numpyro_sde.schemes import HermiteExpansion
from numpyro_sde.sde import SDE

METHODS = {
    "extended": ExtendedKalman(iterations=2),
    "unscented": UnscentedKalman(),
    "matching": MomentMatching("cubature", substeps=2),
    "ensemble": EnsembleKalman(30, inflation=1.02),
}


def model(theta):
    """A noisy oscillator with a fixed start, one noise for two states, seen by two devices.

    The first device is normal with partly missing components; the second, with heavy tails,
    sees half the times, and its inputs are useless where it sees nothing.
    """
    rng = np.random.default_rng(1)
    times = np.linspace(0.0, 2.0, 13)
    sde = SDE(
        lambda t, x, p: jnp.stack([x[1], -p["k"] * jnp.sin(x[0]) - 0.5 * x[1]]),
        lambda t, x, p: p["s"] * jnp.array([[0.0], [1.0]]),
        params={"k": theta[0], "s": theta[1]},
    )
    y = rng.normal(size=(13, 2))
    y[2, 0] = y[5] = y[8, 1] = np.nan
    heavy = np.full((13, 1), np.nan)
    heavy[1::2] = rng.standard_cauchy((6, 1))
    widths = np.where(np.isnan(heavy[:, 0]), 0.0, 1.0)

    def moments(inputs, x):
        return x + 0.1 * x**2, jnp.diag(jnp.stack([theta[2], 0.3]) ** 2)

    def heavy_moments(u, x):
        return x[:1], jnp.eye(1)

    def log_prob(u, x, y, present):
        law = dist.StudentT(2.5, x[0], u * theta[2])
        return jnp.where(present[0], law.log_prob(y[0]), 0.0)

    devices = [
        ss.instrument(moments, None, True, y),
        ss.instrument(heavy_moments, log_prob, False, heavy, inputs=jnp.asarray(widths, float)),
    ]
    return ss.build(sde, times, [0.5, 0.0], np.zeros((2, 2)), devices)


THETA = np.array([2.0, 0.6, 0.4])


def quick(*names):
    """All methods, those not named as slow: the compiler takes some seconds for each."""
    return [pytest.param(n, marks=() if n in names else pytest.mark.slow) for n in METHODS]


@pytest.mark.slow
@pytest.mark.parametrize("name", quick("unscented"))
@pytest.mark.usefixtures("x64")
def test_gradient_by_finite_differences(name):
    method = METHODS[name]
    value = jax.jit(jax.value_and_grad(lambda theta: method.log_likelihood(model(theta))))
    _, gradient = value(jnp.asarray(THETA))
    for i in range(3):
        step = 1e-5 * np.eye(3)[i]
        difference = (value(THETA + step)[0] - value(THETA - step)[0]) / 2e-5
        np.testing.assert_allclose(gradient[i], difference, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_float32_in_batches(name):
    method = METHODS[name]
    run = jax.jit(jax.vmap(jax.value_and_grad(lambda theta: method.log_likelihood(model(theta)))))
    thetas = jnp.asarray(np.stack([THETA, [0.01, 1e-3, 1.0], [30.0, 3.0, 0.02]]), jnp.float32)
    values, gradients = run(thetas)
    assert values.dtype == jnp.float32
    assert np.isfinite(values).all()
    assert np.isfinite(gradients).all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ExtendedKalman(iterations=0), ValueError, "iterations must be at least 1, got 0"),
        (lambda: ExtendedKalman(iterations=1.5), TypeError, "iterations must be an integer"),
        (lambda: ExtendedKalman(emission="probit"), ValueError, "emission must be one of"),
        (lambda: UnscentedKalman(alpha=0.0), ValueError, "alpha must be positive, got 0.0"),
        (lambda: UnscentedKalman(newton_steps=0), ValueError, "newton_steps must be at least 1"),
        (lambda: MomentMatching("gauss"), ValueError, "quadrature must be one of"),
        (lambda: MomentMatching(order=1), ValueError, "order must be at least 2, got 1"),
        (lambda: MomentMatching(substeps=0), ValueError, "substeps must be at least 1, got 0"),
        (lambda: EnsembleKalman(1), ValueError, "num_members must be at least 3, got 1"),
        (lambda: EnsembleKalman(inflation=0.0), ValueError, "inflation must be positive, got 0.0"),
    ],
)
def test_options_are_checked(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


def test_models_are_checked():
    scalar = SDE(lambda t, x: -x, lambda t, x: 1.0 + 0.1 * x)
    built = ss.build(scalar, [0.0, 1.0], [0.0], [[1.0]], scalar=True)
    hermite = built._replace(scheme=HermiteExpansion())
    for method in (ExtendedKalman(), UnscentedKalman()):
        with pytest.raises(ValueError, match="HermiteExpansion has not: give the path scheme"):
            method.check(hermite)
    with pytest.raises(ValueError, match=re.escape("kappa must exceed -d = -1")):
        UnscentedKalman(kappa=-1.0).check(built)
    wide = built._replace(init_mean=jnp.zeros(9))
    with pytest.raises(ValueError, match="1953125 points"):
        MomentMatching("gauss_hermite").check(wide)
    MomentMatching().check(wide)
    with pytest.raises(ValueError, match=re.escape("at least d + 2 = 11 for 9 states")):
        EnsembleKalman(10).check(wide)
