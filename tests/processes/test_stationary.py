"""Stationary laws: the Fokker-Planck equation, quadrature, and the limit of the transition."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from numpyro_sde.processes import (
    CKLS,
    CoxIngersollRoss,
    DoubleWell,
    LinearSDE,
    OrnsteinUhlenbeck,
    OverdampedLangevin,
    UnderdampedLangevin,
)


def bumpy(x, p):
    return p["stiffness"] * jnp.sum(x**4) / 4 + jnp.sum(jnp.sin(x)) + jnp.prod(x) / 3


def stationary_cases():
    """Process and a state; made within the test, so in its precision."""
    spring = {"stiffness": 1.3}
    linear = LinearSDE([[-1.0, 0.5], [-0.4, -0.3]], [0.2, 0.1], [[0.4, 0.0], [0.1, 0.6]])
    plane = jnp.array([0.4, -0.7])
    return {
        "OU": (OrnsteinUhlenbeck(1.3, 0.4, 0.7), 0.9),
        "CIR that touches zero": (CoxIngersollRoss(0.4, 0.6, 1.2), 0.2),
        "CKLS 0.5": (CKLS(0.8, 2.0, 1.0, 0.5), 1.1),
        "CKLS 1": (CKLS(0.8, 2.0, 1.0, 1.0), 1.1),
        "CKLS 1.5": (CKLS(0.8, 2.0, 1.0, 1.5), 1.1),
        "double well": (DoubleWell(1.2, 0.7, 0.9), 0.6),
        "linear": (linear, plane),
        "overdamped, scalar": (OverdampedLangevin(bumpy, temperature=0.6, params=spring), 0.8),
        "overdamped": (OverdampedLangevin(bumpy, temperature=0.6, params=spring), plane),
        "underdamped": (
            UnderdampedLangevin(bumpy, 0.7, temperature=0.6, mass=1.7, params=spring),
            plane,
        ),
        "underdamped in the plane": (
            UnderdampedLangevin(bumpy, 0.7, temperature=0.6, mass=1.7, params=spring),
            jnp.array([0.4, -0.7, 0.3, 1.1]),
        ),
    }


@pytest.mark.parametrize("name", stationary_cases())
@pytest.mark.usefixtures("x64")
def test_fokker_planck(name):
    """-div(f p) + 1/2 sum_ij d_i d_j ((L L')_ij p) = 0, term by term of order one."""
    sde, x = stationary_cases()[name]
    x = jnp.asarray(x)
    shape, flat = x.shape, x.reshape(-1)

    def terms(flat):
        top = sde.stationary_log_density(x)

        def density(v):
            return jnp.exp(sde.stationary_log_density(v.reshape(shape)) - top)

        def drift(v):
            return sde.drift_at(0.0, v.reshape(shape)).reshape(-1) * density(v)

        def spread(v):
            columns = sde.diffusion_columns_at(0.0, v.reshape(shape)).reshape(flat.size, -1)
            return columns @ columns.T * density(v)

        second = jax.jacfwd(jax.jacfwd(spread))(flat)
        return jnp.diag(jax.jacfwd(drift)(flat)), 0.5 * jnp.einsum("ijij->i", second)

    advection, diffusion = jax.jit(terms)(flat)
    size = float(jnp.sum(jnp.abs(advection)))
    assert size > 0.1
    assert abs(float(jnp.sum(diffusion) - jnp.sum(advection))) < 1e-11 * size


@pytest.mark.parametrize("name", ["OU", "CIR that touches zero", "double well"])
@pytest.mark.usefixtures("x64")
def test_density_is_normalised_and_has_the_stated_moments(name):
    sde, _ = stationary_cases()[name]
    positive = sde.positive
    nodes = np.linspace(-80.0, 4.5, 4000) if positive else np.linspace(-9.0, 9.0, 4000)
    x, jacobian = (np.exp(nodes), nodes) if positive else (nodes, 0.0)
    weight = np.exp(np.asarray(eqx.filter_jit(sde.stationary_log_density)(x)) + jacobian)
    moments = [np.sum(weight * x**k) * (nodes[1] - nodes[0]) for k in range(3)]
    mean, variance = eqx.filter_jit(sde.stationary_moments)()
    np.testing.assert_allclose(moments[0], 1.0, rtol=1e-8)
    np.testing.assert_allclose(moments[1], mean, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(moments[2] - moments[1] ** 2, variance, rtol=1e-8)


@pytest.mark.parametrize("name", ["OU", "CIR that touches zero"])
@pytest.mark.usefixtures("x64")
def test_a_long_step_forgets_its_start(name):
    sde, x = stationary_cases()[name]
    density = jax.jit(sde.exact_transition().log_density)
    for start in (0.5, 3.0):
        got = density(sde, 0.0, 100.0, jnp.array(start), jnp.array(x))
        np.testing.assert_allclose(got, sde.stationary_log_density(x), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_double_well_against_adaptive_quadrature():
    @jax.jit
    def both(well):
        return well.stationary_log_density(0.0), well.stationary_moments()

    for parameters in ((1.0, 1.0, 0.7), (1.0, 1.0, 0.25), (0.05, 2.0, 1.0)):
        linear, cubic, scale = parameters

        def weight(x, power, linear=linear, cubic=cubic, scale=scale):
            return x**power * np.exp((linear * x**2 - cubic * x**4 / 2) / scale**2)

        norm, second = (2 * integrate.quad(weight, 0, 6, (k,), epsabs=0)[0] for k in (0, 2))
        density, (_, variance) = both(DoubleWell(*parameters))
        np.testing.assert_allclose(density, -np.log(norm), rtol=1e-9)
        np.testing.assert_allclose(variance, second / norm, rtol=1e-8)


def test_ckls_reduces_to_the_square_root_process():
    x = jnp.array([0.2, 1.0, 3.0])
    gap = CKLS(0.8, 2.0, 1.0, 0.5).stationary_log_density(x)
    gap = gap - CoxIngersollRoss(0.8, 2.0, 1.0).stationary_log_density(x)
    np.testing.assert_allclose(gap, gap[0], rtol=1e-5)


def test_no_stationary_law():
    for rate in (0.0, -0.5):
        assert np.all(np.isnan(OrnsteinUhlenbeck(rate, 0.0, 1.0).stationary_moments()))
    traced = jax.jit(lambda r: CoxIngersollRoss(r, 1.0, 1.0).stationary_log_density(1.0))
    assert np.isfinite(traced(1.0))
    assert np.isnan(traced(-1.0))
    assert CoxIngersollRoss(1.0, 1.0, 1.0).stationary_log_density(-1.0) == -jnp.inf


def test_moments_of_a_batch():
    mean, variance = OrnsteinUhlenbeck(jnp.array([1.0, 2.0]), 0.5, 1.0).stationary_moments()
    np.testing.assert_allclose(mean, [0.5, 0.5])
    np.testing.assert_allclose(variance, [0.5, 0.25])
    moments = jax.jit(lambda scale: DoubleWell(scale=scale).stationary_moments())
    _, variance = moments(jnp.array([0.7, 1.0]))
    np.testing.assert_allclose(variance[0], moments(0.7)[1], rtol=1e-6)
