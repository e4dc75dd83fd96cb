"""Ait-Sahalia's expansion against the closed forms of its coefficients for OU and CIR."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scheme_oracles import Cir
from scipy import stats

import numpyro_sde as nsde
from numpyro_sde.schemes import Euler, HermiteExpansion

CIR = Cir()


def cir_sde():
    return nsde.SDE(lambda t, x: CIR.rate * (CIR.mean - x), lambda t, x: CIR.scale * jnp.sqrt(x))


def log_density(scheme, sde, h, x, x_next):
    return jax.jit(jax.vmap(lambda s: scheme.log_density(sde, 0.0, h, jnp.asarray(x), s)))(x_next)


@pytest.mark.parametrize("order", [1, 2])
def test_ornstein_uhlenbeck_coefficients(order, x64):
    """In units of the noise, with drift -k y: C0 = -k (y^2 - y0^2) / 2,

    C1 = k/2 - k^2 (y^2 + y y0 + y0^2) / 6, C2 = -k^2 / 6 (Ait-Sahalia 1999).
    """
    k, mean, scale, h, x0 = 1.3, 0.4, 0.7, 0.3, 1.1
    x = np.array([0.1, 1.1, 1.4])
    y, y0 = (x - mean) / scale, (x0 - mean) / scale
    want = -0.5 * np.log(2 * np.pi * h) - np.log(scale) - (y - y0) ** 2 / (2 * h)
    want += -0.5 * k * (y**2 - y0**2) + h * (0.5 * k - k**2 * (y**2 + y * y0 + y0**2) / 6)
    if order == 2:
        want -= 0.5 * h**2 * k**2 / 6
    sde = nsde.SDE(lambda t, x: k * (mean - x), lambda t, x: scale)
    got = log_density(HermiteExpansion(order, num_nodes=4), sde, h, x0, x)
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2])
def test_cox_ingersoll_ross_coefficients(order, x64):
    """In y = 2 sqrt(x) / scale the drift is (q + 1/2) / y - k y / 2 with q the Bessel index.

    Its potential is -((q^2 - 1/4) / y^2 - k (q + 1) + k^2 y^2 / 4) / 2, whose averages along the
    step are elementary (Ait-Sahalia 1999).
    """
    k, q, h, x0 = CIR.rate, CIR.degree, 0.2, 1.1
    x = np.array([0.5, 1.1, 1.6])
    y, y0 = CIR.root(x), CIR.root(x0)
    want = -0.5 * np.log(2 * np.pi * h) - np.log(CIR.scale * np.sqrt(x)) - (y - y0) ** 2 / (2 * h)
    want += (q + 0.5) * np.log(y / y0) - 0.25 * k * (y**2 - y0**2)
    level = (q**2 - 0.25) / (y * y0) - k * (q + 1)
    want += -0.5 * h * (level + k**2 * (y**2 + y * y0 + y0**2) / 12)
    if order == 2:
        want += -0.25 * h**2 * ((q**2 - 0.25) / (y * y0) ** 2 + k**2 / 12)
    got = log_density(HermiteExpansion(order, num_nodes=16), cir_sde(), h, x0, x)
    np.testing.assert_allclose(got, want, rtol=1e-10)


def test_default_quadrature_is_enough(x64):
    """Eight nodes against sixteen on steps of up to three standard deviations."""
    x = 0.3 + np.array([-0.15, 0.05, 0.2])
    eight, sixteen = (
        log_density(HermiteExpansion(2, num_nodes=n), cir_sde(), 0.05, 0.3, x) for n in (8, 16)
    )
    np.testing.assert_allclose(eight, sixteen, atol=1e-6)


def test_monthly_interest_rates_are_nearly_exact(x64):
    """The setting of Ait-Sahalia (1999): a month, with errors far below Euler's."""
    rates = Cir(rate=0.5, mean=0.06, scale=0.15)
    sde = nsde.SDE(
        lambda t, x: rates.rate * (rates.mean - x), lambda t, x: rates.scale * jnp.sqrt(x)
    )
    x = np.array([0.04, 0.055, 0.06, 0.065, 0.085])
    exact = rates.logpdf(x, 0.06, 1 / 12)
    errors = [
        np.abs(log_density(s, sde, 1 / 12, 0.06, x) - exact).max()
        for s in (Euler(), HermiteExpansion(1), HermiteExpansion(2))
    ]
    assert errors[0] > 0.05
    assert errors[1] < 1e-3
    assert errors[2] < 1e-4


def test_draws_of_a_square_root_process_near_its_boundary(x64):
    """Kolmogorov-Smirnov against the noncentral chi-squared law; 4,000 draws."""
    x0, h = 0.15, 0.05
    sde, scheme = cir_sde(), HermiteExpansion(2)
    keys = jax.random.split(jax.random.key(3), 4000)
    x = jax.jit(jax.vmap(lambda k: scheme.draw(sde, k, 0.0, h, jnp.asarray(x0))))(keys)
    decay = np.exp(-CIR.rate * h)
    c = 2 * CIR.rate / (CIR.scale**2 * (1 - decay))
    law = stats.ncx2(2 * CIR.degree + 2, 2 * c * x0 * decay)
    assert np.all(np.asarray(x) > 0)
    # The statistic has mean 0.87 and sd 0.26 in units of n^(-1/2): the bound is 4 sd out.
    assert stats.kstest(2 * c * np.asarray(x), law.cdf).statistic < 1.91 / np.sqrt(4000)


def test_sign_of_the_diffusion_does_not_matter(x64):
    up = nsde.SDE(lambda t, x: -x, lambda t, x: 0.3 * jnp.sqrt(1 + x**2))
    down = nsde.SDE(lambda t, x: -x, lambda t, x: -0.3 * jnp.sqrt(1 + x**2))
    x = np.array([0.2, 0.9])
    got, want = (log_density(HermiteExpansion(), s, 0.2, 0.5, x) for s in (up, down))
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_refusals():
    vector = nsde.SDE(lambda t, x: -x, lambda t, x: 1.0)
    with pytest.raises(ValueError, match=r"scalar processes, got a state of shape \(2,\)"):
        nsde.SDEPath(vector, [0.0, 1.0], jnp.ones(2), scheme=HermiteExpansion())
    for role, sde in {
        "drift": nsde.SDE(lambda t, x: jnp.sin(t) - x, lambda t, x: 1.0),
        "diffusion": nsde.SDE(lambda t, x: -x, lambda t, x: 1.0 + t),
    }.items():
        with pytest.raises(ValueError, match=f"{role} uses t"):
            nsde.SDEPath(sde, [0.0, 1.0], 0.0, scheme=HermiteExpansion())
    with pytest.raises(ValueError, match="order of HermiteExpansion must be 1 or 2, got 3"):
        HermiteExpansion(3)
    with pytest.raises(ValueError, match="num_nodes"):
        HermiteExpansion(num_nodes=1)


def test_no_whitening():
    path = nsde.SDEPath(simple_sde(), [0.0, 1.0], 0.0, scheme=HermiteExpansion())
    assert not path.has_rsample
    with pytest.raises(TypeError, match="not a map of Gaussian innovations"):
        path.forward(jnp.zeros(()), jnp.zeros(1))
    for method in ("step", "invert"):
        with pytest.raises(TypeError, match="Use Euler"):
            getattr(HermiteExpansion(), method)(simple_sde(), 0.0, 0.1, 0.0, 0.0)


def simple_sde():
    return nsde.SDE(lambda t, x: -x, lambda t, x: 1.0)
