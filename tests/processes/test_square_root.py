"""The square-root process on data, its draws over extreme steps, and constant elasticity."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import numpyro_sde as nsde
from numpyro_sde.datasets import load_us_tbill
from numpyro_sde.processes import CKLS, CoxIngersollRoss, OrnsteinUhlenbeck


@pytest.mark.parametrize(
    ("process", "estimate", "published"),
    [
        (CoxIngersollRoss, (0.0397, 3.98, 0.6666), -214.4892),
        (OrnsteinUhlenbeck, (0.1727, 5.021, 1.760), -256.5205),
    ],
)
@pytest.mark.usefixtures("x64")
def test_maximum_likelihood_of_the_treasury_bill_rate(process, estimate, published):
    """Quarterly US rate, dt = 0.25 years, given the first observation."""
    rate = load_us_tbill().rate
    times = 0.25 * np.arange(len(rate))

    def log_likelihood(parameters):
        return nsde.SDEPath(process(*parameters), times, init=rate[0]).log_prob(jnp.asarray(rate))

    value, slope = jax.jit(jax.value_and_grad(log_likelihood))(np.array(estimate))
    assert abs(value - published) < 1e-3
    # The estimates have four figures: the likelihood would gain next to nothing by moving.
    assert np.all(np.abs(slope * np.array(estimate)) < 0.1)


@jax.jit
def draw(sde, keys, dt, x):
    return jax.vmap(lambda k: sde.exact_transition().draw(sde, k, 0.0, dt, x))(keys)


@pytest.mark.parametrize(
    ("scale", "dt"),
    [(1.0, 1e-7), (1.0, 30.0), (3.0, 1e-7), (3.0, 1e-2), (3.0, 30.0)],
)
def test_draws_over_extreme_steps_have_the_exact_moments(scale, dt, key):
    """A quarter of a degree of freedom (scale 3), and means of the Poisson variable to 1e6."""
    rate, mean, start, n = 0.5, 1.1, 0.9, 20_000
    sde = CoxIngersollRoss(rate, mean, scale)
    x = np.asarray(draw(sde, jax.random.split(key, n), dt, start), float)
    assert np.all(x >= 0.0)
    c = 2 * rate / (scale**2 * -np.expm1(-rate * dt))
    law = stats.ncx2(4 * rate * mean / scale**2, 2 * c * start * np.exp(-rate * dt), scale=0.5 / c)
    m, v, skew, excess = (float(a) for a in law.stats("mvsk"))
    z = (x - m) / np.sqrt(v)
    # Standard errors of the mean, and of the second moment from the fourth; a short step in
    # single precision also rounds the state itself.
    rounding = 6e-8 * start / np.sqrt(v)
    assert abs(z.mean()) < 4 / np.sqrt(n) + rounding
    assert abs((z**2).mean() - 1) < 4 * np.sqrt((excess + 2) / n) + rounding
    if dt < 1e-3:
        assert abs((z**3).mean() - skew) < 4 * np.sqrt(15 / n) + rounding


def test_no_map_of_innovations():
    sde = CoxIngersollRoss(1.0, 1.0, 1.0)
    scheme = sde.exact_transition()
    one = jnp.ones(())
    with pytest.raises(TypeError, match="not a map of normal innovations"):
        scheme.step(sde, 0.0, 0.1, one, one)
    with pytest.raises(TypeError, match="not a map of normal innovations"):
        scheme.invert(sde, 0.0, 0.1, one, one)


def test_support_is_positive():
    path = nsde.SDEPath(CoxIngersollRoss(1.0, 1.0, 1.0), [0.0, 1.0], init=1.0)
    assert path.support(jnp.array([1.0, 0.5]))
    assert not path.support(jnp.array([1.0, -0.5]))


@pytest.mark.parametrize("sde", [CoxIngersollRoss(1.0, 1.0, 0.7), CKLS(1.0, 1.0, 0.7, 1.5)])
def test_noise_is_cut_below_zero_without_breaking_gradients(sde):
    """Full truncation: simulation goes on, and a density there is not a finite wrong number."""
    value, slope = jax.value_and_grad(lambda x: sde.diffusion_at(0.0, x))(-0.1)
    assert value == 0.0
    assert slope == 0.0
    assert float(sde.drift_at(0.0, -0.1)) == pytest.approx(1.1)
    assert not np.isfinite(nsde.schemes.Euler().log_density(sde, 0.0, 0.1, -0.1, 0.1))


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 1.5])
def test_ckls_volatility(exponent):
    sde = CKLS(0.2, 5.0, 0.3, exponent)
    assert float(sde.diffusion_at(0.0, 4.0)) == pytest.approx(0.3 * 4.0**exponent, rel=1e-6)
    assert float(sde.drift_at(0.0, 4.0)) == pytest.approx(0.2, rel=1e-6)
    assert sde.exact_transition() is None


@pytest.mark.slow
@pytest.mark.parametrize("df", [0.5, 2.0, 3.0])
@pytest.mark.parametrize("validate", [False, True])
def test_density_at_exactly_zero_is_the_limit_from_above(df, validate, x64):
    """SciPy's noncentral chi-squared a little above 0, and the three limits."""
    cir = CoxIngersollRoss(rate=1.0, mean=df / 4.0, scale=1.0)
    path = nsde.SDEPath(cir, [0.0, 0.5], 0.3, validate_args=validate)
    c = 2.0 / (1.0 - np.exp(-0.5))
    near = stats.ncx2.logpdf(2 * c * 1e-9, df, 2 * c * 0.3 * np.exp(-0.5)) + np.log(2 * c)
    at_zero, above = (float(path.log_prob(jnp.array([0.3, x]))) for x in (0.0, 1e-9))
    assert above == pytest.approx(near, rel=1e-6)
    if df == 2.0:
        assert at_zero == pytest.approx(near, rel=1e-6)
    else:
        assert at_zero == (np.inf if df < 2.0 else -np.inf)
    stationary = float(cir.stationary_log_density(0.0))
    assert stationary == pytest.approx({0.5: np.inf, 2.0: np.log(2.0), 3.0: -np.inf}[df])
    assert np.isfinite(jax.grad(lambda x: path.log_prob(jnp.array([0.3, x])))(0.0))


@pytest.mark.parametrize("df", [0.02, 0.2, 1.0])
def test_draws_in_float32_are_never_zero_and_have_a_density(df):
    """With 0.02 degrees of freedom most of the law lies below the smallest float32."""
    cir = CoxIngersollRoss(rate=1.0, mean=df / 4.0, scale=1.0)
    path = nsde.SDEPath(cir, np.linspace(0.0, 2.0, 5), 1e-3)
    draws = jax.jit(lambda k: path.sample(k, (2000,)))(jax.random.key(0))
    assert draws.dtype == jnp.float32
    assert float(draws.min()) > 0.0
    assert np.isfinite(jax.jit(path.log_prob)(draws)).all()


def test_prices_that_underflow_are_not_zero():
    gbm = nsde.processes.GeometricBrownianMotion(drift=0.0, volatility=12.0)
    path = nsde.SDEPath(gbm, [0.0, 1.0, 2.0], 1.0)
    draws = jax.jit(lambda k: path.sample(k, (200,)))(jax.random.key(1))
    assert float(draws.min()) > 0.0
    assert np.isfinite(jax.jit(path.log_prob)(draws)).all()
