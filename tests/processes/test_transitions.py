"""Exact transitions of scalar processes: closed forms, Chapman-Kolmogorov, samples, precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import numpyro_sde as nsde
from numpyro_sde.processes import (
    BrownianMotion,
    CoxIngersollRoss,
    GeometricBrownianMotion,
    OrnsteinUhlenbeck,
)


class Case(NamedTuple):
    make: Callable[..., nsde.SDE]
    parameters: tuple[float, ...]
    start: float
    law: Callable[..., Any]  # SciPy's law of the next state, from parameters, start and step


def brownian(drift, scale, x, dt):
    return stats.norm(x + drift * dt, scale * np.sqrt(dt))


def geometric(drift, volatility, x, dt):
    slope = drift - volatility**2 / 2
    return stats.lognorm(volatility * np.sqrt(dt), scale=x * np.exp(slope * dt))


def ornstein_uhlenbeck(rate, mean, scale, x, dt):
    variance = scale**2 * (1 - np.exp(-2 * rate * dt)) / (2 * rate) if rate else scale**2 * dt
    return stats.norm(mean + (x - mean) * np.exp(-rate * dt), np.sqrt(variance))


def square_root(rate, mean, scale, x, dt):
    c = 2 * rate / (scale**2 * (1 - np.exp(-rate * dt)))
    shape = 2 * rate * mean / scale**2
    return stats.ncx2(2 * shape, 2 * c * x * np.exp(-rate * dt), scale=0.5 / c)


CASES = {
    "Brownian": Case(BrownianMotion, (0.4, 1.3), 0.7, brownian),
    "geometric": Case(GeometricBrownianMotion, (0.3, 0.5), 1.4, geometric),
    "OU": Case(OrnsteinUhlenbeck, (2.0, 0.5, 0.8), 1.5, ornstein_uhlenbeck),
    "OU without pull": Case(OrnsteinUhlenbeck, (0.0, 0.5, 0.8), 1.5, ornstein_uhlenbeck),
    "unstable OU": Case(OrnsteinUhlenbeck, (-0.7, 0.5, 0.8), 1.5, ornstein_uhlenbeck),
    "CIR": Case(CoxIngersollRoss, (0.8, 2.0, 1.0), 1.5, square_root),
    "CIR that touches zero": Case(CoxIngersollRoss, (0.4, 0.6, 1.2), 0.3, square_root),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# One of each kind, where parameters make no difference to the code that runs.
KINDS = ["Brownian", "geometric", "unstable OU", "CIR that touches zero"]
kinds = pytest.mark.parametrize("case", [CASES[k] for k in KINDS], ids=KINDS)


def log_density(case: Case) -> Callable[..., jax.Array]:
    """Log density as a function of the parameters, the step and both states."""

    def one(parameters, dt, x, x_next):
        sde = case.make(*parameters)
        return sde.exact_transition().log_density(sde, jnp.zeros(()), dt, x, x_next)

    return one


@cases
@pytest.mark.usefixtures("x64")
def test_density_is_the_closed_form(case):
    dt = np.array([1e-3, 0.1, 1.0, 5.0])
    law = case.law(*case.parameters, case.start, dt)
    x = np.stack([law.ppf(p) for p in (1e-3, 0.2, 0.5, 0.9, 0.999)])
    dt = np.broadcast_to(dt, x.shape)
    density = jnp.vectorize(log_density(case), excluded=(0, 2))
    got = jax.jit(lambda x: density(case.parameters, dt, case.start, x))(x)
    np.testing.assert_allclose(got, law.logpdf(x), rtol=1e-9, atol=1e-9)


@kinds
@pytest.mark.usefixtures("x64")
def test_chapman_kolmogorov(case):
    first, second = 0.3, 0.5
    end = float(case.law(*case.parameters, case.start, first + second).ppf(0.7))
    middle = case.law(*case.parameters, case.start, first)
    positive = case.make(*case.parameters).positive
    # The trapezoidal rule converges geometrically: in the logarithm of a positive state.
    low, high = (
        (-150.0, np.log(middle.ppf(1 - 1e-15))) if positive else middle.ppf([1e-15, 1 - 1e-15])
    )
    if not positive:
        low, high = low - (high - low), high + (high - low)
    nodes = np.linspace(low, high, 6000)
    y, jacobian = (np.exp(nodes), nodes) if positive else (nodes, 0.0)

    @jax.jit
    def both(y):
        one = log_density(case)
        there = jax.vmap(lambda y: one(case.parameters, first, case.start, y))(y)
        return there + jax.vmap(lambda y: one(case.parameters, second, y, end))(y)

    composed = np.sum(np.exp(both(y) + jacobian)) * (nodes[1] - nodes[0])
    direct = np.exp(case.law(*case.parameters, case.start, first + second).logpdf(end))
    np.testing.assert_allclose(composed, direct, rtol=1e-9)


@kinds
@pytest.mark.usefixtures("x64")
def test_gradient_is_that_of_finite_differences(case):
    def density(flat):
        return log_density(case)(tuple(flat[:-3]), flat[-3], flat[-2], flat[-1])

    at = np.array([*case.parameters, 0.6, case.start, 1.2 * case.start])
    h = 1e-5 * np.eye(len(at))
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(density)))(
        np.stack([at, *(at + h), *(at - h)])
    )
    up, down = np.split(values[1:], 2)
    np.testing.assert_allclose(slopes[0], (up - down) / 2e-5, rtol=2e-7, atol=1e-8)


@kinds
def test_single_precision(case):
    dt = np.float32([1e-6, 1e-3, 0.1, 10.0])
    wide = dt.astype(float)
    mean_and_sd = case.law(*case.parameters, case.start, wide).stats("mv")
    spread = np.sqrt(mean_and_sd[1]) * np.array([-2.0, -0.5, 0.1, 1.0, 3.0])[:, None]
    x = np.float32(np.maximum(mean_and_sd[0] + spread, 0.05 * case.start))
    start, dt = np.float32(case.start), np.broadcast_to(dt, x.shape)

    def all_pairs(dtype):
        density = jnp.vectorize(log_density(case), excluded=(0, 2))
        parameters = tuple(np.float32(p).astype(dtype) for p in case.parameters)
        return jax.jit(density)(parameters, dt.astype(dtype), start.astype(dtype), x.astype(dtype))

    single = all_pairs(np.float32)
    assert single.dtype == jnp.float32
    with jax.enable_x64(True):
        double = all_pairs(np.float64)
    np.testing.assert_allclose(single, double, rtol=1e-4, atol=1e-4)


@cases
def test_samples_follow_the_density(case, key):
    """Probability integral transform: uniform, its first two moments within 4 s.e."""
    n, dt = 20_000, 0.5
    path = nsde.SDEPath(case.make(*case.parameters), [0.0, dt], init=case.start)
    ends = np.asarray(jax.jit(lambda k: path.sample(k, (n,)))(key)[:, 1], float)
    u = case.law(*case.parameters, case.start, dt).cdf(ends)
    for power, mean, variance in ((1, 0.0, 1 / 12), (2, 1 / 12, 1 / 180), (3, 0.0, 1 / 448)):
        error = np.mean((u - 0.5) ** power) - mean
        assert abs(error) < 4 * np.sqrt(variance / n)


@kinds
def test_batch_of_parameters(case):
    """Leading dimensions of one parameter, and of another, make a plate."""
    times = np.array([0.0, 0.2, 0.5, 0.6])
    first, *rest = case.parameters
    batched = case.make(jnp.array([[first], [1.3 * first]]), jnp.array([rest[0]] * 3), *rest[1:])
    assert batched.batch_shape == (2, 3)
    x = jnp.abs(case.start * jnp.array([1.0, 1.1, 0.9, 1.2]))
    together = jax.jit(nsde.SDEPath(batched, times, init=case.start).log_prob)(x)

    @jax.jit
    def alone(value):
        return nsde.SDEPath(case.make(value, *rest), times, init=case.start).log_prob(x)

    expected = np.array([[alone(first)] * 3, [alone(1.3 * first)] * 3])
    np.testing.assert_allclose(together, expected, rtol=2e-5)


@pytest.mark.parametrize("name", KINDS[:3])
def test_innovations_go_there_and_back(name, key):
    case = CASES[name]
    path = nsde.SDEPath(case.make(*case.parameters), np.linspace(0.0, 1.0, 6), init=case.start)
    z = jax.random.normal(key, (4, 5))
    x0, back = path.inverse(path.forward(jnp.full(4, case.start), z))
    np.testing.assert_allclose(x0, case.start, rtol=1e-6)
    np.testing.assert_allclose(back, z, atol=2e-5)


@pytest.mark.usefixtures("x64")
def test_ou_is_smooth_through_a_rate_of_zero():
    def density(rate):
        sde = OrnsteinUhlenbeck(rate, 0.5, 0.8)
        return sde.exact_transition().log_density(sde, 0.0, 0.6, 1.5, jnp.array(1.1))

    rates = np.array([-1e-3, -1e-9, 0.0, 1e-9, 1e-3])
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(density)))(rates)
    z = (1.1 - 1.5) / (0.8 * np.sqrt(0.6))
    # At zero: d mean = -(x - mean) dt, d log variance = -dt.
    slope = -z * (1.5 - 0.5) * 0.6 / (0.8 * np.sqrt(0.6)) - 0.5 * (z**2 - 1) * 0.6
    np.testing.assert_allclose(values[2], stats.norm(1.5, 0.8 * np.sqrt(0.6)).logpdf(1.1))
    np.testing.assert_allclose(slopes[1:4], slope, rtol=1e-7)
    np.testing.assert_allclose(values[::4], values[2] + rates[::4] * slope, atol=1e-6)


@pytest.mark.parametrize("times", [np.arange(8) * 0.1, np.cumsum([0.1, 0.3, 0.2, 0.5])])
@pytest.mark.usefixtures("x64")
def test_what_ou_prepares_for_a_grid_is_what_each_step_needs(times):
    sde = OrnsteinUhlenbeck(0.7, 0.5, 0.8)
    scheme, dt = sde.exact_transition(), np.diff(times)
    cache = scheme.prepare(sde, times, dt)
    traced = jax.jit(lambda h: scheme.prepare(sde, times, h))(dt)
    start, end = jnp.array(1.0), jnp.array(1.3)
    density = jax.jit(jax.vmap(scheme.log_density, (None, 0, 0, None, None, 0)))
    np.testing.assert_allclose(
        density(sde, times[:-1], dt, start, end, cache),
        density(sde, times[:-1], dt, start, end, None),
        rtol=1e-13,
    )
    for known, unknown in zip(cache, traced, strict=True):
        np.testing.assert_allclose(known, unknown, rtol=1e-13)


def test_states_outside_the_support():
    for make in (
        lambda: GeometricBrownianMotion(0.1, 0.2),
        lambda: CoxIngersollRoss(1.0, 1.0, 1.0),
    ):
        sde = make()
        density = jax.jit(sde.exact_transition().log_density)
        assert density(sde, 0.0, 0.1, 1.0, -0.5) == -jnp.inf
        assert jnp.isnan(density(sde, 0.0, 0.1, -1.0, 0.5))


@pytest.mark.parametrize(
    ("make", "bad"),
    [
        (lambda s: GeometricBrownianMotion(0.0, s), -1.0),
        (lambda s: OrnsteinUhlenbeck(1.0, 0.0, s), -1.0),
        (lambda s: CoxIngersollRoss(s, 1.0, 1.0), -1.0),
        (lambda s: CoxIngersollRoss(1.0, s, 1.0), -1.0),
    ],
)
def test_traced_bad_parameters_give_nan(make, bad):
    @jax.jit
    def density(value):
        sde = make(value)
        return sde.exact_transition().log_density(sde, 0.0, 0.1, jnp.array(1.0), jnp.array(1.1))

    assert jnp.isfinite(density(1.0))
    assert jnp.isnan(density(bad))
