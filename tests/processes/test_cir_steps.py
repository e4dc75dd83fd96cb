"""Positivity-preserving steps of the square-root process: strong order, density, positivity."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import numpyro_sde as nsde
from numpyro_sde.processes import CoxIngersollRoss, OrnsteinUhlenbeck
from numpyro_sde.schemes.cir import DriftImplicitSquareRoot, HighOrderStrang


def coarsen(increment, area):
    """Brownian increments and space-time areas over pairs of steps."""
    total = increment[::2] + increment[1::2]
    mean_area = 0.5 * (area[::2] + area[1::2])
    return total, mean_area + 0.25 * (increment[::2] - increment[1::2])


def strong_order(scheme, scale, *, num_paths=400, finest=12, coarsest=3, end=4.0):
    """Slope of the RMS difference to the same scheme on the same noise, steps a quarter as long.

    The settings of Foster, dos Reis and Strange (2024), section 5: rate = mean = start = 1, end
    at 4, fixed steps; their fitted orders at scale 1.5 are 0.78 and 0.85.
    """
    sde = CoxIngersollRoss(1.0, 1.0, scale)
    keys, n = jax.random.split(jax.random.key(0)), 2**finest
    increment, area = (
        jax.random.normal(k, (n, num_paths)) * np.sqrt(end / n / c)
        for k, c in zip(keys, (1, 12), strict=True)
    )
    ends = {}
    for level in range(finest, coarsest - 1, -1):
        dt = end / 2**level
        z = increment / np.sqrt(dt)
        if isinstance(scheme, HighOrderStrang):
            z = jnp.stack([z, area / np.sqrt(dt / 12)], axis=1)

        @jax.jit
        def run(z, dt=dt):
            return jax.lax.scan(
                lambda x, z: (scheme.step(sde, 0.0, dt, x, z), None), jnp.ones(num_paths), z
            )[0]

        ends[level] = run(z)
        increment, area = coarsen(increment, area)
    levels = range(coarsest, finest - 1)
    errors = [jnp.sqrt(jnp.mean((ends[k] - ends[k + 2]) ** 2)) for k in levels]
    return -np.polyfit(levels, np.log2(errors), 1)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "scale", "published"),
    [
        (HighOrderStrang(), 1.5, 0.78),
        (DriftImplicitSquareRoot(), 1.5, 0.85),
        (HighOrderStrang(), 0.5, 1.5),  # far from zero: the order without degeneracy
        (DriftImplicitSquareRoot(), 0.5, 1.0),
    ],
)
@pytest.mark.usefixtures("x64")
def test_strong_order(scheme, scale, published):
    assert abs(strong_order(scheme, scale) - published) < 0.2


@pytest.mark.parametrize("scale", [0.5, 1.5, 1.95])
@pytest.mark.usefixtures("x64")
def test_drift_implicit_density_is_that_of_its_step(scale):
    """Change of variables, with the derivative of the step itself; and the inverse."""
    sde, scheme = CoxIngersollRoss(1.0, 1.0, scale), DriftImplicitSquareRoot()

    def step(z):
        return scheme.step(sde, 0.0, 0.3, jnp.array(0.4), z)

    def both(z):
        x, slope = jax.value_and_grad(step)(z)
        back = scheme.invert(sde, 0.0, 0.3, jnp.array(0.4), x)
        return x, slope, back, scheme.log_density(sde, 0.0, 0.3, jnp.array(0.4), x)

    z = np.linspace(-5.0, 5.0, 21)
    x, slope, back, density = jax.jit(jax.vmap(both))(z)
    assert np.all(slope > 0.0)
    assert np.all(x > 0.0)
    np.testing.assert_allclose(back, z, rtol=1e-8, atol=1e-9)
    normal = -0.5 * z**2 - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(density, normal - np.log(slope), rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_drift_implicit_density_tends_to_the_exact_one():
    sde, times = CoxIngersollRoss(1.0, 1.0, 0.8), np.array([0.0, 1e-4, 2e-4])
    x = jnp.array([0.7, 0.705, 0.702])

    @jax.jit
    def both(x):
        path = nsde.SDEPath(sde, times, init=0.7)
        return path.log_prob(x), path.replace(scheme=DriftImplicitSquareRoot()).log_prob(x)

    exact, implicit = both(x)
    np.testing.assert_allclose(implicit, exact, atol=1e-3)


def test_no_drift_implicit_density_where_the_step_is_no_bijection():
    scheme, x = DriftImplicitSquareRoot(), jnp.array(0.1)
    sde = CoxIngersollRoss(1.0, 1.0, 2.2)  # 4 rate mean < scale^2
    assert jnp.isnan(scheme.log_density(sde, 0.0, 0.1, x, x))
    assert scheme.log_density(CoxIngersollRoss(1.0, 1.0, 1.0), 0.0, 0.1, x, -x) == -jnp.inf


@pytest.mark.parametrize("scheme", [DriftImplicitSquareRoot(), HighOrderStrang()])
def test_paths_stay_positive_and_have_the_right_law(scheme, key):
    """Mean and variance of the exact law at the end, 4 s.e. and the bias of a step of 1/64."""
    n, rate, mean, scale = 4000, 1.0, 1.0, 1.5
    sde = CoxIngersollRoss(rate, mean, scale)
    path = nsde.SDEPath(sde, np.linspace(0.0, 1.0, 65), init=0.5, scheme=scheme)
    x = np.asarray(jax.jit(lambda k: path.sample(k, (n,)))(key), float)
    assert np.all(x > 0.0)
    decay = np.exp(-rate)
    variance = 0.5 * scale**2 / rate * (0.5 * 2 * (decay - decay**2) + mean * (1 - decay) ** 2)
    exact = mean + (0.5 - mean) * decay
    end = x[:, -1]
    fourth = np.mean((end - end.mean()) ** 4)
    assert abs(end.mean() - exact) < 4 * np.sqrt(variance / n) + 5e-3
    assert abs(end.var() - variance) < 4 * np.sqrt((fourth - variance**2) / n) + 5e-3


@pytest.mark.parametrize("scheme", [DriftImplicitSquareRoot(), HighOrderStrang()])
def test_gradients_stay_finite_where_roots_are_cut(scheme):
    def end(scale):
        sde = CoxIngersollRoss(1.0, 0.2, scale)
        x = jnp.array(0.01)
        for z in (-3.0, -2.0, 0.5):
            x = scheme.step(sde, 0.0, 0.1, x, jnp.full(scheme.innovation_shape(sde, ()), z))
        return x

    value, slope = jax.jit(jax.value_and_grad(end))(1.5)
    assert np.isfinite(value)
    assert np.isfinite(slope)


def test_wrong_use_is_refused():
    one = jnp.ones(())
    cir = CoxIngersollRoss(1.0, 1.0, 1.0)
    for scheme in (DriftImplicitSquareRoot(), HighOrderStrang()):
        with pytest.raises(ValueError, match=r"must be processes\.CoxIngersollRoss, got Ornstein"):
            nsde.SDEPath(OrnsteinUhlenbeck(1.0, 0.0, 1.0), [0.0, 1.0], init=1.0, scheme=scheme)
    path = nsde.SDEPath(cir, [0.0, 1.0], init=1.0, scheme=HighOrderStrang())
    assert path.innovation_shape == (1, 2)
    with pytest.raises(TypeError, match="HighOrderStrang has no transition density"):
        path.log_prob(jnp.ones(2))
    with pytest.raises(TypeError, match="HighOrderStrang has no transition density"):
        HighOrderStrang().log_density(cir, 0.0, 0.1, one, one)
    with pytest.raises(ValueError, match="not unique"):
        HighOrderStrang().invert(cir, 0.0, 0.1, one, one)


def test_another_noise_is_refused():
    class OtherNoise(nsde.noise.AbstractNoise):
        pass

    sde = eqx.tree_at(lambda s: s.noise, CoxIngersollRoss(1.0, 1.0, 1.0), OtherNoise())
    with pytest.raises(ValueError, match=r"driven by noise\.Brownian\(\), got OtherNoise"):
        DriftImplicitSquareRoot().check(sde, ())
    assert sde.exact_transition() is None
