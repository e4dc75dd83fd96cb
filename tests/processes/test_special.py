"""Special functions against high-precision values, SciPy and finite differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from numpyro_sde.processes.special import expm1_ratio, log_bessel_i, log_noncentral_gamma

# (v, shape, u, log density) of Gamma(shape + Poisson(u), 1) at v, by 60-digit arithmetic: ordinary
# points, both tails, shapes near zero, points on either side of the change of expansion, and
# steps so short that u is 1e9.
REFERENCE = np.array(
    [
        (0.5, 0.01, 1e-06, -4.4132151705252586),
        (0.0001, 0.2, 0.3, 5.5442584657760138),
        (3.0, 0.5, 2.0, -1.9157832189026895),
        (1.0, 1.0, 50.0, -39.092204902271448),
        (60.0, 1.0, 50.0, -3.7214461671238644),
        (19.0, 2.5, 18.0, -2.7245894990652093),
        (21.0, 2.5, 20.0, -2.7758801663258813),
        (0.001, 3.0, 40.0, -54.496346548744794),
        (400.0, 0.7, 30.0, -214.91282869278986),
        (35.0, 36.0, 0.001, -2.6990212421081456),
        (45.0, 36.0, 5.0, -3.0910975347197408),
        (300.0, 250.0, 40.0, -4.0003976423186537),
        (0.01, 250.0, 40.0, -2315.219547189125),
        (1200.0, 3.0, 1000.0, -13.693274586557811),
        (20500.0, 500.0, 20000.0, -6.2234762674909696),
        (10001000.0, 4.0, 10000000.0, -9.349433924030577),
        (1000020000.0, 1.5, 1000000000.0, -11.727144041970351),
    ]
)
# Its derivatives in v, shape and u at the same points.
GRADIENTS = np.array(
    [
        (-2.9799000049502, 99.862738526046, 48.997524875616),
        (-7999.5001874744, -3.9220503738354, -0.99950006249148),
        (-0.35026081778826, 0.31859003735205, 0.2246087733176),
        (5.8162950895656, -1.9560115027157, -0.86367409820869),
        (-0.091305334631364, 0.091160778396977, 0.090433598442363),
        (0.0003755849607161, -0.014074707417398, -0.027381326985911),
        (0.0003050164106824, -0.012651083036037, -0.024679732768783),
        (2012.2891245514, -7.8349638020484, -0.99966777188621),
        (-0.727139179781, 1.2965060292501, 2.6481442695867),
        (2.7777047918561e-5, -0.014244697743971, -0.027803322850375),
        (-0.10124286812474, 0.095855413415453, 0.088814186877366),
        (-0.032589822889967, 0.031624303155022, 0.030576328325245),
        (24899.15999898, -10.124636170458, -0.99996000025498),
        (-0.086503714071714, 0.090247699158339, 0.094195543113943),
        (-3.6884402816646e-5, 2.4539246665932e-5, 1.2193487112937e-5),
        (-4.9871262800287e-5, 4.9847507662342e-5, 4.9823750073433e-5),
        (-9.9998500025e-6, 9.9996500038332e-6, 9.9994500005e-6),
    ]
)


def density(v, shape, u):
    return log_noncentral_gamma(v, shape, u, v - u - shape)


@pytest.mark.usefixtures("x64")
def test_noncentral_log_density_in_double_precision():
    v, shape, u, expected = REFERENCE.T
    np.testing.assert_allclose(jax.jit(density)(v, shape, u), expected, rtol=2e-14)


@pytest.mark.usefixtures("x64")
def test_noncentral_gradients_in_double_precision():
    v, shape, u = REFERENCE[:, :3].T
    gradients = jax.jit(jax.vmap(jax.grad(density, (0, 1, 2))))(v, shape, u)
    np.testing.assert_allclose(np.stack(gradients, 1), GRADIENTS, rtol=1e-11, atol=1e-14)


def test_noncentral_log_density_in_single_precision():
    v, shape, u, expected = REFERENCE[:-2].T
    exact = v - u - shape
    got = jax.jit(log_noncentral_gamma)(*(np.float32(a) for a in (v, shape, u, exact)))
    assert got.dtype == jnp.float32
    # v itself is rounded: one rounding of v moves the log density by v |d log p / dv| eps.
    slack = np.abs(v * GRADIENTS[:-2, 0]) * 1.2e-7
    np.testing.assert_array_less(
        np.abs(got - expected), 5e-6 * np.maximum(1, abs(expected)) + slack
    )


@pytest.mark.usefixtures("x64")
def test_noncentral_log_density_against_scipy_on_a_grid():
    df, noncentrality = np.meshgrid([0.1, 1.0, 3.0, 30.0, 200.0], [0.01, 1.0, 20.0, 300.0])
    law = stats.ncx2(df, noncentrality)
    x = np.stack([law.ppf(p) for p in (1e-4, 0.1, 0.5, 0.9, 1.0 - 1e-4)])
    got = jax.jit(density)(x / 2, df / 2, noncentrality / 2) - np.log(2.0)
    usable = x > 1e-200  # the lower quantile underflows for few degrees of freedom
    np.testing.assert_allclose(got[usable], law.logpdf(x)[usable], rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("x64")
def test_no_jump_where_the_expansions_meet():
    z = jnp.array(12.0)
    edge = np.sqrt(40.0**2 - 12.0**2)
    both = jax.jit(jax.value_and_grad(log_bessel_i))
    (below, *slope), (above, other) = both(edge - 1e-9, z), both(edge + 1e-9, z)
    slope = slope[0], other
    np.testing.assert_allclose(above - below, 2e-9 * slope[0], atol=1e-13)
    np.testing.assert_allclose(*slope, rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_log_bessel_against_scipy():
    order, z = np.meshgrid([-0.9, -0.25, 0.0, 0.5, 3.3, 30.0, 60.0], [0.01, 1.0, 25.0, 60.0, 5e3])
    expected = np.log(special.ive(order, z)) + z
    np.testing.assert_allclose(jax.jit(log_bessel_i)(order, z), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_log_bessel_derivative_in_the_argument():
    order, z = np.meshgrid([-0.5, 0.3, 20.0, 60.0], [0.5, 10.0, 45.0])
    order, z = order.ravel(), z.ravel()
    got = jax.jit(jax.vmap(jax.grad(log_bessel_i, 1)))(order, z)
    expected = special.ivp(order, z) / special.iv(order, z)
    np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_outside_the_domain():
    v, shape, u = np.array(
        [
            (-1.0, 2.0, 1.0),
            (0.0, 2.0, 1.0),
            (1.0, -0.5, 1.0),
            (1.0, 2.0, -1.0),
            (np.nan, 2.0, 1.0),
            (-1.0, -2.0, 1.0),
        ]
    ).T
    got = jax.jit(density)(v, shape, u)
    np.testing.assert_array_equal(got, [-np.inf, -np.inf, np.nan, np.nan, np.nan, np.nan])
    got = jax.jit(log_bessel_i)(np.array([-1.5, 1.0]), np.array([1.0, -1.0]))
    assert np.all(np.isnan(got))


def test_gradient_is_finite_at_the_border_of_the_domain():
    v, shape, u = np.array([(1.0, 2.0, 0.0), (-1.0, 2.0, 1.0)]).T
    gradients = jax.jit(jax.vmap(jax.grad(density, (0, 1, 2))))(v, shape, u)
    assert np.all(np.isfinite(gradients))


@pytest.mark.usefixtures("x64")
def test_expm1_ratio_and_its_derivatives():
    h = np.array([-30.0, -1.0, -0.301, -0.299, -1e-9, 0.0, 1e-9, 0.299, 0.301, 1.0, 30.0])
    # (1 - exp(-h)) / h is the confluent hypergeometric function 1F1(1; 2; -h).
    np.testing.assert_allclose(jax.jit(expm1_ratio)(h), special.hyp1f1(1, 2, -h), rtol=3e-15)
    slope = jax.jit(jax.vmap(jax.grad(expm1_ratio)))(h)
    np.testing.assert_allclose(slope, -0.5 * special.hyp1f1(2, 3, -h), rtol=1e-13)
    curvature = jax.jit(jax.vmap(jax.grad(jax.grad(expm1_ratio))))(h)
    np.testing.assert_allclose(curvature, special.hyp1f1(3, 4, -h) / 3.0, rtol=1e-12)
