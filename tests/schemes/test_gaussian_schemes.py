"""LocalLinear and Kessler: exactness on linear SDEs, several noises, positivity, refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scheme_oracles import BentOscillator, linear_moments, ou_moments

import numpyro_sde as nsde
from numpyro_sde.schemes import Euler, Kessler, LocalLinear

A = np.array([[-1.0, 0.6], [-0.4, -0.5]])
B = np.array([0.3, -0.2])
L = np.array([[0.5, 0.1, 0.0], [-0.2, 0.3, 0.4]])
X = np.array([0.7, -1.2])


def linear_sde(L):
    return nsde.SDE(lambda t, x: A @ x + B, lambda t, x: jnp.asarray(L))


def moments(scheme, sde, h, x):
    mean, factor = jax.jit(lambda h, x: scheme.moments(sde, jnp.zeros(()), h, x))(h, x)
    return np.asarray(mean), np.asarray(factor @ factor.T if factor.ndim == 2 else factor**2)


@pytest.mark.parametrize(
    "noise",
    [
        pytest.param(L, id="three noises", marks=pytest.mark.slow),
        pytest.param(L[:, :1], id="one noise"),
    ],
)
def test_local_linear_is_exact_on_linear_sdes(noise, x64):
    """Whatever the step, with fewer noises than states too."""
    mean, covariance = moments(LocalLinear(), linear_sde(noise), 1.7, X)
    want = linear_moments(A, B, noise, X, 1.7)
    np.testing.assert_allclose(mean, want[0], rtol=1e-12)
    np.testing.assert_allclose(covariance, want[1], rtol=1e-12)


@pytest.mark.parametrize("rate", [-3.0, -1e-9, 0.0, 0.2, 0.9, 40.0])
def test_local_linear_scalar_closed_form(rate):
    """A drift linear in state and time, in float32, through the series near rate zero."""
    sde = nsde.SDE(lambda t, x: 0.5 - rate * x + 0.8 * t, lambda t, x: 0.7)
    mean, variance = moments(LocalLinear(), sde, 0.6, jnp.float32(1.1))
    want = linear_moments(
        np.array([[-rate, 0.8], [0.0, 0.0]]),
        np.array([0.5, 1.0]),
        np.array([[0.7], [0.0]]),
        np.array([1.1, 0.0]),
        0.6,
    )
    assert float(mean) == pytest.approx(want[0][0], rel=1e-5)
    assert float(variance) == pytest.approx(want[1][0, 0], rel=1e-5)


def test_local_linear_oscillator_in_float32():
    """Short steps of a hypoelliptic system: variances of very different sizes stay accurate."""
    p = BentOscillator()
    matrix, _, noise = p.matrices
    sde = nsde.SDE(lambda t, x: jnp.asarray(matrix, x.dtype) @ x, lambda t, x: jnp.asarray(noise))
    x, h = np.array([0.9, 0.4]), 1e-3
    scheme = LocalLinear()
    x_next = x + np.array([4e-4, -0.02])
    got = jax.jit(lambda a, b: scheme.log_density(sde, 0.0, np.float32(h), a, b))(
        jnp.asarray(x, jnp.float32), jnp.asarray(x_next, jnp.float32)
    )
    exact_x, exact_next = (np.float64(np.float32(a)) for a in (x, x_next))
    mean, covariance = linear_moments(matrix, np.zeros(2), noise, exact_x, h)
    away = exact_next - mean
    want = -0.5 * away @ np.linalg.solve(covariance, away) - 0.5 * np.linalg.slogdet(covariance)[1]
    want -= np.log(2 * np.pi)
    # One rounding of the position (6e-8) is 4e-3 of its standard deviation here.
    assert float(got) == pytest.approx(want, abs=0.05)


def test_state_that_no_noise_reaches_has_no_density():
    sde = nsde.SDE(lambda t, x: -x, lambda t, x: jnp.array([0.0, 0.5]))
    value = jax.jit(lambda x: LocalLinear().log_density(sde, 0.0, 0.1, x, 0.9 * x))
    assert not np.isfinite(value(jnp.ones(2)))


def test_kessler_expansions_of_a_linear_sde(x64):
    """Order J agrees with the exact moments to dt^J, for correlated noise in two dimensions."""
    steps = np.array([0.04, 0.02, 0.01])
    exact = [linear_moments(A, B, L, X, h) for h in steps]
    got = [moments(Kessler(2), linear_sde(L), h, X) for h in steps]
    for k in range(2):
        errors = [np.abs(g[k] - e[k]).max() for g, e in zip(got, exact, strict=True)]
        assert np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(3, abs=0.1)


def test_kessler_of_order_one_is_euler(x64):
    got, want = (moments(s, linear_sde(L), 0.3, X) for s in (Kessler(1), Euler()))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-13)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-13)


@pytest.mark.parametrize("order", [2, 3])
def test_kessler_variance_stays_positive(order):
    """Far beyond its range the variance is wrong, but at least half of Euler's."""
    sde = nsde.SDE(lambda t, x: -5.0 * x, lambda t, x: 0.5)
    for h in (0.01, 0.2, 1.0, 5.0):
        _, variance = moments(Kessler(order), sde, h, jnp.asarray(1.0))
        assert variance >= 0.5 * 0.25 * h
    _, variance = moments(Kessler(order), sde, 0.01, jnp.asarray(1.0))
    assert float(variance) == pytest.approx(ou_moments(1.0, 0.01, 5.0, 0.0, 0.5)[1], rel=2e-3)


def test_kessler_refuses_fewer_noises_than_states():
    sde = nsde.SDE(lambda t, x: -x, lambda t, x: jnp.ones((2, 1)))
    with pytest.raises(ValueError, match=r"as many Brownian motions as states.*\(2, 1\).*Strang"):
        nsde.SDEPath(sde, [0.0, 1.0], jnp.ones(2), scheme=Kessler())
    with pytest.raises(ValueError, match="order of Kessler must be 1, 2 or 3, got 4"):
        Kessler(4)
