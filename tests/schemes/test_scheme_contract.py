"""One set of checks that every scheme passes: density, map, draws, gradients, batches."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import numpyro_sde as nsde
from numpyro_sde.schemes import (
    Euler,
    HermiteExpansion,
    Kessler,
    LocalLinear,
    Milstein,
    Strang,
)

PARAMS = {"a": 1.2, "s": 0.4}
T, H, X = 0.3, 0.1, 0.7


def drift(t, x, p):
    return p["a"] * (x - x**3)


def multiplicative(t, x, p):
    return p["s"] * jnp.sqrt(1.0 + x**2)


def additive(t, x, p):
    return p["s"]


def scalar_sde(scheme, params=None, **kwargs):
    diffusion = additive if isinstance(scheme, Strang) else multiplicative
    return nsde.SDE(drift, diffusion, params=PARAMS if params is None else params, **kwargs)


SLOW = pytest.mark.slow
SCALAR = [
    pytest.param(Euler(), id="Euler"),
    pytest.param(Milstein(), id="Milstein"),
    pytest.param(LocalLinear(), id="LocalLinear"),
    pytest.param(Kessler(2), id="Kessler2"),
    pytest.param(Kessler(3), id="Kessler3", marks=SLOW),
    pytest.param(Strang(), id="Strang"),
    pytest.param(Strang(lambda p: (-p["a"], 1.0)), id="Strang, given linear part", marks=SLOW),
    pytest.param(HermiteExpansion(1), id="Hermite1"),
    pytest.param(HermiteExpansion(2), id="Hermite2"),
]
ONE_EACH = [p for p in SCALAR if not p.marks and p.id != "Hermite2"]
WITH_MAP = [p for p in SCALAR if p.values[0].has_innovations]


def density(scheme, sde):
    """States and masses under the log density, by Gauss-Legendre quadrature over 16 sd."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    reach = 8.0 * float(sde.noise_factor_at(T, X)) * np.sqrt(H)
    states = X + reach * nodes
    log_p = jax.jit(jax.vmap(lambda s: scheme.log_density(sde, T, H, jnp.asarray(X), s)))(states)
    return states, np.exp(np.asarray(log_p)) * reach * weights


@pytest.mark.parametrize("scheme", SCALAR)
def test_density_integrates_to_one_and_draws_follow_it(scheme, x64):
    """Mean and variance of 20,000 draws against quadrature, within 4 standard errors.

    Ait-Sahalia's expansion is a density only up to its own error, O(dt^(order + 1)); draws follow
    it normalised.
    """
    sde = scalar_sde(scheme)
    states, mass = density(scheme, sde)
    error = 1e-8 if scheme.has_innovations else H ** (scheme.order + 1) / 4
    assert mass.sum() == pytest.approx(1.0, abs=error)
    mass = mass / mass.sum()
    mean = mass @ states
    variance, fourth = mass @ (states - mean) ** 2, mass @ (states - mean) ** 4
    n = 20_000
    keys = jax.random.split(jax.random.key(1), n)
    x = np.asarray(jax.jit(jax.vmap(lambda k: scheme.draw(sde, k, T, H, jnp.asarray(X))))(keys))
    assert abs(x.mean() - mean) < 4 * np.sqrt(variance / n)
    assert abs(x.var() - variance) < 4 * np.sqrt((fourth - variance**2) / n)


@pytest.mark.parametrize("scheme", WITH_MAP)
def test_map_inverse_and_density(scheme, x64):
    """`invert` undoes `step`, and `log p(x') = log N(z) + log |dz/dx'|`.

    For Milstein's scheme a second normal leads to each state; at these states its share is below
    rounding.
    """
    sde = scalar_sde(scheme)
    x = jnp.asarray(X)

    @jax.jit
    @jax.vmap
    def evaluate(z):
        x_next, rate = jax.jvp(lambda e: scheme.step(sde, T, H, x, e), (z,), (1.0,))
        log_p = scheme.log_density(sde, T, H, x, x_next)
        return scheme.invert(sde, T, H, x, x_next), log_p, jnp.log(rate)

    z = jnp.linspace(-4.0, 4.0, 9)
    back, log_p, log_rate = evaluate(z)
    np.testing.assert_allclose(back, z, atol=1e-10)
    np.testing.assert_allclose(log_p, -0.5 * z**2 - 0.5 * np.log(2 * np.pi) - log_rate, rtol=1e-10)


@pytest.mark.parametrize("scheme", ONE_EACH)
def test_float32_value_and_gradient(scheme):
    """Within 1e-4 of float64, and finite gradients in parameters and states, short steps too."""

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0, 0))
    @functools.partial(jax.value_and_grad, argnums=(0, 2))
    def value(params, h, x_next):
        sde = scalar_sde(scheme, params)
        return scheme.log_density(sde, jnp.zeros(()), h, jnp.asarray(X, x_next.dtype), x_next)

    h = np.array([1e-4, 1e-2, 0.1, 0.1])
    x_next = np.array([0.7, 0.75, 0.7, 0.2])
    got, gradient = value(jax.tree.map(jnp.float32, PARAMS), np.float32(h), np.float32(x_next))
    assert got.dtype == jnp.float32
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    with jax.enable_x64(True):
        exact, slope = value(
            jax.tree.map(np.float64, PARAMS),
            np.float64(np.float32(h)),
            np.float64(np.float32(x_next)),
        )
    np.testing.assert_allclose(got, exact, rtol=1e-4)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(slope), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3 * np.abs(theirs).max())


@pytest.mark.parametrize("scheme", WITH_MAP)
def test_gradient_of_a_step(scheme, x64):
    """Reverse derivatives of `step` against central differences."""

    @jax.jit
    def end(a, z):
        params = {"a": a, "s": jnp.asarray(0.4)}
        return scheme.step(scalar_sde(scheme, params), T, 0.3, jnp.asarray(X), z)

    at = (jnp.asarray(1.2), jnp.asarray(0.8))
    got = jax.jit(jax.grad(end, argnums=(0, 1)))(*at)
    e = 1e-6
    want = (
        (end(at[0] + e, at[1]) - end(at[0] - e, at[1])) / (2 * e),
        (end(at[0], at[1] + e) - end(at[0], at[1] - e)) / (2 * e),
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("scheme", ONE_EACH)
def test_panels(scheme):
    """A path law with batched parameters and one clock a series is the series one by one."""
    rates = jnp.array([0.5, 1.0, 2.0])
    times = np.cumsum(np.array([[0.1, 0.2, 0.1], [0.3, 0.1, 0.2], [0.1, 0.1, 0.4]]), axis=1)

    def law(rate, clock):
        sde = scalar_sde(scheme, {"a": rate, "s": 0.4})
        return nsde.SDEPath(sde, clock, dist.Normal(0.5, 0.1), scheme=scheme)

    @jax.jit
    def panel(key):
        paths = law(rates, times).sample(key, (2,))
        return paths, law(rates, times).log_prob(paths)

    paths, together = panel(jax.random.key(0))
    assert paths.shape == (2, 3, 3)
    assert np.isfinite(paths).all()
    one = jax.jit(lambda rate, clock, path: law(rate, clock).log_prob(path))
    for i in range(3):
        np.testing.assert_allclose(
            together[:, i], one(rates[i], jnp.asarray(times[i]), paths[:, i]), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("scheme", ONE_EACH)
def test_stratonovich(scheme, x64):
    """A Stratonovich SDE is the Ito SDE with drift `f + 1/2 L L'`."""
    stratonovich = scalar_sde(scheme, interpretation="stratonovich")

    def ito_drift(t, x, p):
        correction = 0.0 if isinstance(scheme, Strang) else 0.5 * p["s"] ** 2 * x
        return drift(t, x, p) + correction

    ito = nsde.SDE(ito_drift, stratonovich.diffusion.function, params=PARAMS)
    got, want = jax.jit(
        lambda x: [scheme.log_density(s, T, H, jnp.asarray(X), x) for s in (stratonovich, ito)]
    )(0.8)
    assert float(got) == pytest.approx(float(want), rel=1e-12)


def full_noise(t, x, p):
    return p["s"] * jnp.array([[1.0, 0.3, 0.2], [0.1, 0.8, -0.4]])


def varying_full_noise(t, x, p):
    return full_noise(t, x, p) * (1.0 + 0.1 * x[:, None] ** 2)


def varying_noise(t, x, p):
    return p["s"] * jnp.sqrt(1.0 + x**2)


def one_noise(t, x, p):
    return jnp.array([[0.0], [1.0]]) * p["s"]


def vector_drift(t, x, p):
    return jnp.stack([x[1], p["a"] * (x[0] - x[0] ** 3) - 0.3 * x[1]])


VECTOR = [
    pytest.param(Euler(), varying_full_noise, id="Euler"),
    pytest.param(Milstein(), varying_noise, id="Milstein"),
    pytest.param(Kessler(2), varying_full_noise, id="Kessler2"),
    pytest.param(Kessler(3), varying_noise, id="Kessler3, diagonal", marks=SLOW),
    pytest.param(LocalLinear(), varying_full_noise, id="LocalLinear", marks=SLOW),
    pytest.param(LocalLinear(), varying_noise, id="LocalLinear, diagonal", marks=SLOW),
    pytest.param(LocalLinear(), one_noise, id="LocalLinear, hypoelliptic"),
    pytest.param(Strang(), full_noise, id="Strang", marks=SLOW),
    pytest.param(Strang(), one_noise, id="Strang, hypoelliptic", marks=SLOW),
]


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "diffusion"), VECTOR)
def test_vector_states(scheme, diffusion, x64):
    """Map, inverse and density agree: `log p(x') = log N(z) + log |det dz/dx'|`."""
    sde = nsde.SDE(vector_drift, diffusion, params=PARAMS)
    x = jnp.array([0.6, -0.2])
    z = jnp.array([0.9, -1.1])
    scheme.check(sde, (2,))
    assert scheme.innovation_shape(sde, (2,)) == (2,)

    @jax.jit
    def evaluate(z):
        x_next, pull = jax.vjp(lambda e: scheme.step(sde, T, H, x, e), z)
        jacobian = jax.vmap(pull)(jnp.eye(2))[0]
        back = scheme.invert(sde, T, H, x, x_next)
        return x_next, back, jnp.linalg.slogdet(jacobian)[1]

    @jax.jit
    @jax.value_and_grad
    def log_density(params, x_next):
        changed = nsde.SDE(vector_drift, diffusion, params=params)
        return scheme.log_density(changed, T, H, x, x_next)

    x_next, back, log_det = evaluate(z)
    log_p, gradient = log_density(jax.tree.map(jnp.asarray, PARAMS), x_next)
    np.testing.assert_allclose(back, z, atol=1e-9)
    # Milstein's second root adds its share, here far below rounding.
    want = -0.5 * z @ z - np.log(2 * np.pi) - log_det
    assert float(log_p) == pytest.approx(float(want), abs=1e-9)
    assert all(np.isfinite(g) for g in gradient.values())
