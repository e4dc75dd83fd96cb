"""The same model in other units of state and time, in float32: values and gradients stay.

Bounds: 1e-4 of the log likelihood and 1e-3 of its gradient against float64 in plain units. A log
density in other units differs by the logarithms of the units.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import numpyro_sde as nsde
from numpyro_sde import filters, schemes

TIMES = np.array([0.0, 0.1, 0.2, 0.35, 0.5, 0.6])
Y = np.array([0.06, -0.07, 0.32, 0.05, -0.27, 0.18])
V = np.array([0.65, 0.47, -0.35, -0.63, -0.31, 0.02])
UNITS = [(1e-6, 1e6), (1e6, 1e-6), (1e-6, 1e-6), (1e-9, 1.0)]  # of the state and of time


def well(p, s, u):
    scale = {"a": p / u, "b": 1.0 / (s**2 * u), "noise": 0.5 * s / np.sqrt(u)}
    return nsde.SDE(
        lambda t, x, q: q["a"] * x - q["b"] * x**3, lambda t, x, q: q["noise"], params=scale
    )


def reverting(p, s, u):
    scale = {"a": p / u, "b": 0.3 * s / u, "noise": 0.5 * s / np.sqrt(u)}
    return nsde.SDE(lambda t, x, q: q["b"] - q["a"] * x, lambda t, x, q: q["noise"], params=scale)


def oscillator(p, s, u):
    """Position and velocity; noise in the velocity alone."""
    scale = {"k": p / u**2, "g": 0.5 / u, "c": 1.0 / (s * u) ** 2, "noise": 0.5 * s / u**1.5}
    return nsde.SDE(
        lambda t, x, q: jnp.stack([x[1], -q["k"] * x[0] - q["g"] * x[1] - q["c"] * x[0] ** 3]),
        lambda t, x, q: jnp.array([[0.0], [1.0]]) * q["noise"],
        params=scale,
    )


def path(sde, s, u, scheme):
    two = sde is oscillator
    widths = np.array([0.3 * s, 0.3 * s / u]) if two else np.array(0.3 * s)
    init = dist.Normal(jnp.zeros(widths.shape), jnp.asarray(widths, float))
    return lambda p: nsde.SDEPath(
        sde(p, s, u), TIMES * u, init.to_event(1) if two else init, scheme=scheme
    )


def density(sde, scheme):
    def both(s, u):
        law = path(sde, s, u, scheme)
        x = np.stack([Y * s, V * s / u], 1) if sde is oscillator else Y * s
        shift = 6 * np.log(s) + (6 * np.log(s / u) if sde is oscillator else 0.0)
        return lambda p: law(p).log_prob(jnp.asarray(x, float)), shift

    return both


def likelihood(sde, method, scheme=None):
    def both(s, u):
        law = path(sde, s, u, scheme)

        def seen(t, x):
            return dist.Normal(x[0] if sde is oscillator else x, 0.2 * s)

        def run(p):
            y = jnp.asarray(Y * s, float)
            return nsde.filter_path(law(p), seen, y, method=method).log_likelihood

        return run, 6 * np.log(s)

    return both


LOCAL = schemes.LocalLinear()
CASES = {
    "Euler": density(well, schemes.Euler()),
    "LocalLinear": density(well, LOCAL),
    "Kalman": likelihood(reverting, filters.Kalman()),
}
SLOW = {
    "moments": likelihood(well, filters.MomentMatching()),
    "extended, oscillator": likelihood(oscillator, filters.ExtendedKalman(), LOCAL),
    "LocalLinear, oscillator": density(oscillator, LOCAL),
    "Milstein": density(well, schemes.Milstein()),
    "Strang": density(well, schemes.Strang()),
    "Kessler": density(well, schemes.Kessler()),
    "Hermite": density(well, schemes.HermiteExpansion(2)),
    "Strang, oscillator": density(oscillator, schemes.Strang()),
    "extended": likelihood(well, filters.ExtendedKalman()),
    "unscented": likelihood(well, filters.UnscentedKalman()),
    "unscented, oscillator": likelihood(oscillator, filters.UnscentedKalman(), LOCAL),
}


@pytest.mark.parametrize(
    "case",
    [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_float32_in_any_unit(case):
    make = (CASES | SLOW)[case]
    with jax.enable_x64(True):
        plain, _ = make(1.0, 1.0)
        value, slope = (float(v) for v in jax.jit(jax.value_and_grad(plain))(1.3))
    for s, u in UNITS if case in SLOW else UNITS[:2]:
        run, shift = make(s, u)
        got, got_slope = jax.jit(jax.value_and_grad(run))(jnp.float32(1.3))
        assert got.dtype == jnp.float32
        assert float(got) == pytest.approx(value - shift, rel=1e-4, abs=1e-4)
        assert float(got_slope) == pytest.approx(slope, rel=1e-3, abs=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_ensemble_is_the_same_in_any_unit():
    """In one precision: float32 draws other normals than float64."""
    make = likelihood(oscillator, filters.EnsembleKalman(50), LOCAL)
    plain, _ = make(1.0, 1.0)
    value, slope = jax.jit(jax.value_and_grad(plain))(1.3)
    for s, u in UNITS:
        run, shift = make(s, u)
        got, got_slope = jax.jit(jax.value_and_grad(run))(1.3)
        assert float(got) == pytest.approx(float(value) - shift, rel=1e-4, abs=1e-4)
        assert float(got_slope) == pytest.approx(float(slope), rel=1e-3, abs=1e-3)
