"""Exact steps of linear equations with jumps that come at any time and decay from then on."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from jumps.references import REFERENCE
from scipy import stats

import numpyro_sde as nsde

REF, MERTON = REFERENCE["ou_jump"], REFERENCE["merton"]
SCHEME = nsde.schemes.JumpLinear()


def reverting(rate=REF["lam"], most=8):
    return nsde.SDE(
        lambda t, x: -REF["theta"] * x,
        lambda t, x: REF["sigma"],
        jumps=nsde.CompoundPoisson(rate, dist.Normal(REF["mj"], REF["sj"]), max_per_step=most),
    )


def log_density(sde, dt, x0, values, scheme=SCHEME):
    one = jax.jit(jax.vmap(lambda y: scheme.log_density(sde, 0.0, dt, jnp.array(x0), y)))
    return np.array(one(jnp.asarray(values)))


def test_mean_reversion_with_jumps_by_one_step(x64):
    found = log_density(reverting(), REF["d"], REF["x0"], REF["x"])
    np.testing.assert_allclose(found, REF["log_density"], atol=1e-8)
    grid = np.linspace(-3.0, 3.0, 3001)
    density = np.exp(log_density(reverting(), REF["d"], REF["x0"], grid))
    mean = np.trapezoid(grid * density, grid)
    np.testing.assert_allclose(np.trapezoid(density, grid), 1.0, atol=1e-10)
    np.testing.assert_allclose(mean, REF["mean"], atol=1e-8)
    var = np.trapezoid((grid - mean) ** 2 * density, grid)
    np.testing.assert_allclose(var, REF["var"], atol=1e-8)
    # Two steps are one: Chapman and Kolmogorov.
    half = SCHEME.log_density
    to = np.linspace(-2.0, 2.0, 801)
    first = np.exp(log_density(reverting(), REF["d"] / 2, REF["x0"], to))
    second = jax.jit(
        jax.vmap(lambda x: half(reverting(), 0.0, REF["d"] / 2, x, jnp.array(REF["x"][1])))
    )
    both = np.trapezoid(first * np.exp(np.array(second(jnp.array(to)))), to)
    np.testing.assert_allclose(np.log(both), REF["log_density"][1], atol=1e-8)


@pytest.mark.slow
def test_without_reversion_it_is_the_mixture_in_the_tails_too(x64):
    def brownian(sigma, size, most):
        return nsde.SDE(
            lambda t, x: MERTON["mu"] + 0.0 * x,
            lambda t, x: sigma,
            jumps=nsde.CompoundPoisson(MERTON["lam"], size, max_per_step=most),
        )

    usual = dist.Normal(MERTON["mj"], MERTON["sj"])
    sde = brownian(MERTON["sigma"], usual, 8)
    found = log_density(sde, MERTON["d"], 0.0, MERTON["x"])
    np.testing.assert_allclose(found, MERTON["log_density"], atol=1e-10)
    # Sixteen orders of magnitude down, and where jumps are far longer than the noise is wide.
    far = [-5.0, -3.0, 2.0, 5.0]
    cases = [(MERTON["sigma"], usual, MERTON["d"], far), (0.01, usual, 1 / 252, [0.0, 0.15, -1.0])]
    for sigma, size, dt, values in cases:
        series = nsde.schemes.JumpEuler()
        known = log_density(brownian(sigma, size, 60), dt, 0.0, values, series)
        found = log_density(brownian(sigma, size, 8), dt, 0.0, values)
        np.testing.assert_allclose(found, known, rtol=1e-11)
    # What needs more nodes is no number, and is one with them.
    sharp = brownian(0.001, dist.Normal(0.5, 0.05), 60)
    assert np.isnan(log_density(sharp, 1 / 252, 0.0, [1.0]))
    known = log_density(sharp, 1 / 252, 0.0, [1.0], nsde.schemes.JumpEuler())
    found = log_density(sharp, 1 / 252, 0.0, [1.0], nsde.schemes.JumpLinear(2048))
    np.testing.assert_allclose(found, known, rtol=1e-9)


@pytest.mark.slow
def test_derivatives_and_draws(x64):
    def of(rate):
        return SCHEME.log_density(reverting(rate), 0.0, REF["d"], REF["x0"], 0.1)

    numeric = (of(3.0 + 1e-5) - of(3.0 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(of)(3.0), numeric, rtol=1e-6)
    path = nsde.SDEPath(reverting(most=20), [0.0, REF["d"]], REF["x0"], scheme=SCHEME)
    x = np.array(path.sample(jax.random.key(0), (20_000,)))[:, 1]
    grid = np.linspace(-2.5, 2.5, 2001)
    density = np.exp(log_density(reverting(), REF["d"], REF["x0"], grid))
    cdf = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]))]) * 2.5e-3
    assert stats.kstest(x, lambda v: np.interp(v, grid, cdf)).pvalue > 0.001
    with jax.enable_x64(False):
        single = log_density(reverting(), REF["d"], REF["x0"], np.array(REF["x"], np.float32))
        np.testing.assert_allclose(single, REF["log_density"], atol=2e-5)


def test_what_it_refuses():
    normal = dist.Normal(0.0, 1.0)

    def at(drift, jumps, start=0.0):
        sde = nsde.SDE(drift, lambda t, x: 0.2, jumps=jumps)
        path = nsde.SDEPath(sde, [0.0, 1.0], start, scheme=SCHEME)
        return path.log_prob(jnp.broadcast_to(jnp.asarray(start), path.event_shape))

    plain = nsde.CompoundPoisson(1.0, normal)
    with pytest.raises(ValueError, match="drift is not affine"):
        at(lambda t, x: -(x**3), plain)
    with pytest.raises(ValueError, match="diffusion, rate or size depends on x"):
        at(lambda t, x: -x, nsde.CompoundPoisson(lambda t, x: x**2, normal))
    with pytest.raises(ValueError, match="depends on t"):
        at(lambda t, x: -x + jnp.sin(t), plain)
    with pytest.raises(ValueError, match="scalar process"):
        at(lambda t, x: -x, plain, jnp.zeros(2))
    with pytest.raises(ValueError, match="for an SDE with jumps"):
        nsde.SDEPath(nsde.SDE(lambda t, x: -x, lambda t, x: 1.0), [0.0, 1.0], 0.0, scheme=SCHEME)
    with pytest.raises(TypeError, match="normal sizes have"):
        at(lambda t, x: -x, nsde.CompoundPoisson(1.0, dist.Exponential(1.0)))
    with pytest.raises(ValueError, match="num_nodes must be at least 16"):
        nsde.schemes.JumpLinear(4)
