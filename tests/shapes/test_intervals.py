"""Interval observations: averages of an OU process against their dense Gaussian law.

The mean over an interval of length h has variance `s^2/(2r) 2 (rh - 1 + e^-rh) / (rh)^2`, two of
them a gap apart covariance `s^2/(2r) e^(-r gap) (1 - e^(-r h1)) (1 - e^(-r h2)) / (r^2 h1 h2)`.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.handlers import reparam, seed, trace
from numpyro.infer.util import log_density
from scipy.stats import multivariate_normal

import numpyro_sde as nsde

REFERENCE = json.loads((Path(__file__).parent / "shapes_reference.json").read_text())
TIMES, Y = np.array(REFERENCE["avg_times"]), np.array(REFERENCE["avg_y"])
LOST = np.where(np.arange(7) == 2, np.nan, Y)
EXACT, EXACT_LOST = REFERENCE["ou_average_loglik"], REFERENCE["ou_average_loglik_third_missing"]
RATE, MEAN, SCALE, NOISE = 0.8, 1.0, 0.5, 0.05
START = dist.Normal(MEAN, SCALE / np.sqrt(2 * RATE))
LOCAL = nsde.schemes.LocalLinear()


def averages(y, scheme=None, missing="reset", times=TIMES, rate=RATE, max_step=None):
    ou = nsde.processes.OrnsteinUhlenbeck(rate=rate, mean=MEAN, scale=SCALE)
    wide = nsde.accumulate(ou, {"area": lambda t, x, p: x}, missing=missing)
    grid = nsde.TimeGrid(times, max_step)
    x = numpyro.sample("x", wide.path(grid, START, scheme=scheme, obs=y))
    nsde.observe(
        "y",
        x,
        lambda t, x, acc, width: dist.Normal(acc["area"] / width, NOISE),
        obs=y,
        accumulated=wide,
        inputs=np.diff(times, axis=-1),
    )


def panel(scheme=None):
    """The same data on two clocks of their own, the second one from 1 on."""
    averages(np.stack([Y, LOST]), scheme, times=np.stack([TIMES, TIMES + 1]), rate=np.full(2, RATE))


def value_of(method, model, *args, **kwargs):
    model = nsde.handlers.marginalize(model, method=method)
    return float(log_density(model, args, kwargs, {})[0])


def dense(ends, starts, y):
    """Log density of the averages over given intervals."""
    h, variance = ends - starts, SCALE**2 / (2 * RATE)
    n = len(h)
    cov = np.zeros((n, n))
    for i in range(n):
        z = RATE * h[i]
        cov[i, i] = variance * 2 * (z - 1 + np.exp(-z)) / z**2 + NOISE**2
        for j in range(i + 1, n):
            both = (1 - np.exp(-z)) * (1 - np.exp(-RATE * h[j])) / (RATE**2 * h[i] * h[j])
            cov[i, j] = cov[j, i] = variance * np.exp(-RATE * (starts[j] - ends[i])) * both
    return multivariate_normal(np.full(n, MEAN), cov).logpdf(y)


@pytest.mark.usefixtures("x64")
def test_the_reference():
    kalman = nsde.filters.Kalman()
    assert value_of(kalman, averages, Y) == pytest.approx(EXACT, abs=1e-10)
    assert value_of(kalman, averages, LOST) == pytest.approx(EXACT_LOST, abs=1e-10)
    assert value_of(kalman, panel) == pytest.approx(EXACT + EXACT_LOST, abs=1e-10)
    fine = nsde.handlers.refine(averages, max_step=0.2)
    assert value_of(kalman, fine, LOST) == pytest.approx(EXACT_LOST, abs=1e-10)
    assert value_of(kalman, averages, Y, max_step=0.2) == pytest.approx(EXACT, abs=1e-10)


@pytest.mark.slow
def test_float32():
    assert value_of(nsde.filters.Kalman(), panel) == pytest.approx(EXACT + EXACT_LOST, rel=1e-4)


@pytest.mark.usefixtures("x64")
def test_a_meter_that_runs_on():
    """The reading after a missing one holds both intervals."""
    double = np.delete(TIMES, 3)
    ends, starts = double[1:], double[:-1]
    h, w = ends - starts, np.delete(np.diff(TIMES), 2)
    # Density of the readings acc / w, from that of the averages acc / h with its own noise.
    variance = SCALE**2 / (2 * RATE)
    cov = np.zeros((6, 6))
    for i in range(6):
        z = RATE * h[i]
        cov[i, i] = variance * 2 * (z - 1 + np.exp(-z)) / z**2
        for j in range(i + 1, 6):
            both = (1 - np.exp(-z)) * (1 - np.exp(-RATE * h[j])) / (RATE**2 * h[i] * h[j])
            cov[i, j] = cov[j, i] = variance * np.exp(-RATE * (starts[j] - ends[i])) * both
    g = h / w
    law = multivariate_normal(MEAN * g, cov * np.outer(g, g) + NOISE**2 * np.eye(6))
    exact = law.logpdf(np.delete(LOST, 2))
    got = value_of(nsde.filters.Kalman(), averages, LOST, missing="carry")
    assert got == pytest.approx(exact, abs=1e-10)


ENGINES = {
    "EKF": nsde.filters.ExtendedKalman(),
    "UKF": nsde.filters.UnscentedKalman(),
    "guided particles": nsde.filters.Particle(8),
}


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(m, id=n, marks=pytest.mark.slow if "particles" in n else ())
        for n, m in ENGINES.items()
    ],
)
@pytest.mark.usefixtures("x64")
def test_engines_on_local_linear_steps(method):
    assert value_of(method, averages, LOST, LOCAL) == pytest.approx(EXACT_LOST, abs=1e-9)


@pytest.mark.usefixtures("x64")
def test_moment_matching():
    got = value_of(nsde.filters.MomentMatching(substeps=32), averages, Y)
    assert got == pytest.approx(EXACT, abs=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_guided_log_weight_is_the_likelihood():
    guided = reparam(averages, config={"x": nsde.reparam.GuidedReparam()})
    run = trace(seed(guided, 3)).get_trace(LOST, LOCAL)
    z = {name: run[name]["value"] for name in ("x_init_innov", "x_innov")}
    total = log_density(guided, (LOST, LOCAL), {}, z)[0]
    total = total - sum(jnp.sum(dist.Normal(0, 1).log_prob(v)) for v in z.values())
    assert float(total) == pytest.approx(EXACT_LOST, abs=1e-9)


@pytest.mark.usefixtures("x64")
def test_exposures_shorter_than_the_gaps():
    """Motion blur: the shutter opens a while before each reading."""
    starts, ends = np.array([0.3, 1.2, 2.5]), np.array([0.8, 2.0, 3.0])
    y = np.array([0.9, 1.3, 0.7])

    def model():
        ou = nsde.processes.OrnsteinUhlenbeck(rate=RATE, mean=MEAN, scale=SCALE)
        wide = nsde.accumulate(ou, {"light": lambda t, x, p: x}, since=starts)
        grid = nsde.TimeGrid([0.0, *ends], include=wide.breakpoints)
        x = numpyro.sample("x", wide.path(grid, START))
        nsde.observe(
            "y",
            x,
            lambda t, x, acc, w: dist.Normal(acc["light"] / w, NOISE),
            obs=y,
            accumulated=wide,
            inputs=ends - starts,
            at=grid.index[1:],
        )

    exact = dense(ends, starts, y)
    assert value_of(nsde.filters.Kalman(), model) == pytest.approx(exact, abs=1e-10)


def test_a_nonlinear_count_by_the_grid():
    """Births since the last visit: Poisson in the integral of e^x, x the log population."""

    def model(y=None):
        sde = nsde.SDE(lambda t, x: 0.5 - x, lambda t, x: 0.3)
        wide = nsde.accumulate(sde, {"births": lambda t, x: jnp.exp(x)})
        x = numpyro.sample("x", wide.path(nsde.TimeGrid([0.0, 1.0, 2.0, 4.0], 0.1), 0.5))
        return nsde.observe(
            "y", x, lambda t, x, acc: dist.Poisson(acc["births"]), obs=y, accumulated=wide
        )

    draws = jax.vmap(lambda key: seed(model, key)())(jax.random.split(jax.random.key(0), 4000))
    # E e^X of the stationary law about 0.5, nearly reached: the mean grows with the interval.
    steps = 0.5 * 0.3**2 * (1 - np.exp(-2 * np.arange(0.05, 4.0, 0.1))) / 2
    rate = np.exp(0.5 + steps)
    means = [rate[:10].sum() * 0.1, rate[10:20].sum() * 0.1, rate[20:].sum() * 0.1]
    sd = np.asarray(draws).std(axis=0) / np.sqrt(4000)
    assert np.all(np.abs(np.asarray(draws).mean(axis=0) - means) < 4 * sd + 0.005 * np.array(means))


@pytest.mark.slow
def test_errors_say_what_is_needed():
    ou = nsde.processes.OrnsteinUhlenbeck(rate=RATE, mean=MEAN, scale=SCALE)
    wide = nsde.accumulate(ou, {"area": lambda t, x, p: x})
    with pytest.raises(ValueError, match="missing must be 'reset' or 'carry'"):
        nsde.accumulate(ou, {"area": lambda t, x, p: x}, missing="skip")
    with pytest.raises(TypeError, match=r"integrand 'area' must take \(t, x, p\)"):
        nsde.accumulate(ou, {"area": lambda t, x: x})
    with pytest.raises(ValueError, match="reading at the path's first time"):
        observed(wide.path(TIMES, START), at=[0, 1], accumulated=wide)
    with pytest.raises(ValueError, match="made by its own"):
        observed(nsde.SDEPath(ou, TIMES, START), accumulated=wide)
    with pytest.raises(TypeError, match=r"emission must take \(t, x, acc\)"):
        observed(wide.path(TIMES, START), lambda t, x: dist.Normal(x, 1.0), accumulated=wide)
    path = wide.path(TIMES, START)
    draw = path.sample(jax.random.key(0))
    with pytest.raises(ValueError, match="no density"):
        path.log_prob(draw)


def observed(path, emission=lambda t, x, acc: dist.Normal(acc["area"], 1.0), **options):
    def model():
        nsde.observe("y", numpyro.sample("x", path), emission, **options)

    seed(model, 0)()
