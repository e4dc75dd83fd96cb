"""Strang splitting: exactness on linear SDEs, the inverse of the half flow, refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scheme_oracles import linear_moments

import numpyro_sde as nsde
from numpyro_sde.schemes import LocalLinear, Strang

A = np.array([[0.0, 1.0], [-2.0, -0.6]])
L = np.array([[0.0], [0.7]])


@pytest.mark.parametrize("given", [False, True])
def test_exact_on_linear_sdes(given, x64):
    """No nonlinear part is left: the Gaussian of the linear SDE, whatever the step."""
    scheme = Strang(lambda: (jnp.asarray(A), jnp.zeros(2))) if given else Strang()
    sde = nsde.SDE(lambda t, x: A @ x, lambda t, x: jnp.asarray(L))
    x, h, x_next = np.array([0.9, 0.4]), 1.3, np.array([0.2, -0.5])
    mean, covariance = linear_moments(A, np.zeros(2), L, x, h)
    away = x_next - mean
    want = -0.5 * away @ np.linalg.solve(covariance, away) - 0.5 * np.linalg.slogdet(covariance)[1]
    got = jax.jit(lambda a, b: scheme.log_density(sde, 0.0, h, a, b))(x, x_next)
    assert float(got) == pytest.approx(want - np.log(2 * np.pi), rel=1e-10)


def test_linear_part_of_parameters(x64):
    """`linear` gets the parameters; taken at the state itself it gives the default."""
    params = {"a": jnp.asarray(1.2)}
    sde = nsde.SDE(lambda t, x, p: p["a"] * (x - x**3), lambda t, x, p: 0.5, params=params)
    x = 0.7
    slope, value = 1.2 * (1 - 3 * x**2), 1.2 * (x - x**3)
    given = Strang(lambda p: (p["a"] * (1 - 3 * x**2), x - value / slope))
    got, want = jax.jit(
        lambda y: [s.log_density(sde, 0.0, 0.2, jnp.asarray(x), y) for s in (given, Strang())]
    )(0.9)
    assert float(got) == pytest.approx(float(want), rel=1e-10)


def test_curvature_that_local_linearisation_drops(x64):
    """Third central moment f'' dt^3 of the process: 3/2 of it here, none in LocalLinear.

    To leading order with unit noise: the process adds f''/2 int W_s^2 ds to W_dt, whose
    covariance with W_dt^2 is f'' dt^3 / 3; the half flow adds (dt/2) f''/2 W_dt^2, with f'' dt^3
    / 2. Both errors are of order dt^3.
    """
    sde = nsde.SDE(lambda t, x: x - x**3, lambda t, x: 1.0)
    nodes, weights = np.polynomial.hermite_e.hermegauss(30)
    weights = weights / weights.sum()
    h, x0 = 0.01, 0.8
    third = []
    for scheme in (Strang(), LocalLinear()):
        x = jax.jit(jax.vmap(lambda z, s=scheme: s.step(sde, 0.0, h, jnp.asarray(x0), z)))(nodes)
        third.append(weights @ (x - weights @ x) ** 3)
    assert third[0] == pytest.approx(1.5 * -6 * x0 * h**3, rel=0.05)
    assert abs(third[1]) < 1e-12


@pytest.mark.parametrize("h", [0.1, 1.0, 10.0])
def test_never_a_wrong_innovation(h, x64):
    """Steps far too long for the half flow give NaN or a state that `invert` takes back."""
    sde = nsde.SDE(lambda t, x: x - x**3, lambda t, x: 1.0)
    scheme, x0 = Strang(), jnp.asarray(1.5)
    z = jnp.linspace(-5.0, 5.0, 41)
    x = jax.jit(jax.vmap(lambda e: scheme.step(sde, 0.0, h, x0, e)))(z)
    back = jax.jit(jax.vmap(lambda s: scheme.invert(sde, 0.0, h, x0, s)))(x)
    fine = np.isfinite(x)
    np.testing.assert_allclose(np.asarray(back)[fine], np.asarray(z)[fine], atol=1e-3)
    if h == 0.1:
        assert fine.all()


def test_refusals():
    multiplicative = nsde.SDE(lambda t, x: -x, lambda t, x: 0.1 * x)
    with pytest.raises(ValueError, match="needs additive noise, but diffusion"):
        nsde.SDEPath(multiplicative, [0.0, 1.0], 1.0, scheme=Strang())
    shaped = nsde.SDE(lambda t, x: -x, lambda t, x: 0.1 * jnp.ones_like(x) * (1.0 + t))
    nsde.SDEPath(shaped, [0.0, 1.0], 1.0, scheme=Strang())  # the shape of x alone is no dependence
    with pytest.raises(ValueError, match=r"\(A, b\) of shapes \(2, 2\) and \(2,\).*got \(\(2,\)"):
        nsde.SDEPath(
            shaped, [0.0, 1.0], jnp.ones(2), scheme=Strang(lambda: (jnp.ones(2), jnp.ones(2)))
        )
    with pytest.raises(TypeError, match="linear must be a function"):
        Strang(np.eye(2))
