"""Exact laws of fractional processes, against reference numbers and dense matrices."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import toeplitz

import numpyro_sde as nsde
from numpyro_sde.distributions import (
    FractionalBrownianMotion,
    FractionalGaussianNoise,
    FractionalOrnsteinUhlenbeck,
)
from numpyro_sde.noise.covariances import fgn_autocovariance, fgn_spectral_density
from numpyro_sde.noise.determinant import fgn_log_determinant

REFERENCE = json.loads((Path(__file__).parents[1] / "fbm_reference.json").read_text())
H_RANGE = (0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97)


@pytest.fixture(
    params=[pytest.param(False, marks=pytest.mark.slow), True], ids=["float32", "float64"]
)
def relative(request):
    """The accuracy asked for, in either precision."""
    with jax.enable_x64(request.param):
        yield 1e-10 if request.param else 1e-5


def _dense_fbm(times, hurst):
    """Covariance of kind-1 fBM in float64, straight from its definition."""
    t = np.asarray(times, float)
    lag = np.abs(t[:, None] - t)
    return 0.5 * (t[:, None] ** (2 * hurst) + t ** (2 * hurst) - lag ** (2 * hurst))


def _normal(cov, x):
    sign, log_det = np.linalg.slogdet(cov)
    assert sign > 0
    return -0.5 * (x @ np.linalg.solve(cov, x) + log_det + len(x) * np.log(2 * np.pi))


def test_covariances_of_both_kinds(relative):
    for row in REFERENCE["cov"]:
        times = np.array([row["s"], row["t"]])
        first = FractionalBrownianMotion(times, row["H"]).covariance_matrix
        second = FractionalBrownianMotion(times, row["H"], kind=2).covariance_matrix
        assert float(first[0, 1]) == pytest.approx(row["typeI"], rel=relative)
        assert float(second[0, 1]) == pytest.approx(row["typeII"], rel=relative)
        assert float(second[1, 1]) == pytest.approx(row["typeII_var_t"], rel=relative)


def test_stationary_fou_autocovariance(relative):
    rows = REFERENCE["fou_stationary"]
    lag, hurst, rate = (np.array([r[k] for r in rows]) for k in ("t", "H", "theta"))
    times = np.stack([np.zeros_like(lag), lag + (lag == 0)], axis=-1)
    law = FractionalOrnsteinUhlenbeck(times, hurst, rate)
    cov = np.where(lag == 0, law.variance[:, 0], law.covariance_matrix[:, 0, 1])
    # Autocovariances cross zero and decay to 1e-36: errors are in units of the variance.
    error = np.abs(cov - np.array([r["rho"] for r in rows])) / np.asarray(law.variance[:, 0])
    assert error.max() < relative


def test_zero_start_fou_covariance(relative):
    rows = REFERENCE["fou_zero_start"]
    times = np.stack([[r["s"], r["t"]] for r in rows])
    hurst, rate = (np.array([r[k] for r in rows]) for k in ("H", "theta"))
    law = FractionalOrnsteinUhlenbeck(times, hurst, rate, start="zero")
    cov, variance = law.covariance_matrix, np.asarray(law.variance)
    expected = np.array([r["cov"] for r in rows])
    assert np.max(np.abs(cov[:, 0, 1] - expected) / variance[:, 0]) < relative
    np.testing.assert_allclose(variance[:, 0], [r["var_s"] for r in rows], rtol=relative)


@pytest.mark.parametrize("hurst", [0.3, 0.55, 0.7])
def test_zero_start_fou_on_equal_steps(hurst, relative):
    """Lags at the edge of a branch, 20 steps of 0.1 relaxation times: all pairs by the formula."""
    times, rate = np.arange(80.0), 0.1
    rho = np.asarray(FractionalOrnsteinUhlenbeck(times, hurst, rate).covariance_matrix)[0]
    kept, index = np.exp(-rate * times), np.arange(80)
    expected = rho[np.abs(index[:, None] - index)] + rho[0] * np.outer(kept, kept)
    expected -= np.outer(kept, rho) + np.outer(rho, kept)
    law = FractionalOrnsteinUhlenbeck(times, hurst, rate, start="zero")
    assert np.abs(np.asarray(law.covariance_matrix) - expected).max() < relative * rho[0]


@pytest.mark.slow
def test_zero_start_fou_of_short_times_is_fbm(x64):
    """Rate times time of 1e-6: the covariance is that of fBM, digits and all."""
    times = np.array([0.5, 1.3])
    for hurst in H_RANGE:
        law = FractionalOrnsteinUhlenbeck(times, hurst, rate=1e-6, start="zero")
        np.testing.assert_allclose(law.covariance_matrix, _dense_fbm(times, hurst), rtol=5e-6)


@pytest.mark.slow
def test_bridges_of_the_reference(relative):
    """Variance at four times given y(2) = 0 with noise 0.1, and the evidence of y."""
    index = [4]
    for name, cell in REFERENCE["bridge"].items():
        hurst, rate = (float(part[1 + k :]) for k, part in enumerate(name.split("_")))
        times = np.array([0.25, 0.5, 1.0, 1.5, 2.0])
        if rate == 0:
            law = FractionalBrownianMotion(times, hurst)
        else:
            law = FractionalOrnsteinUhlenbeck(times, hurst, rate, start="zero")
        mean, cov = law.bridge_moments(index, [0.0], noise=0.1)
        # In float32 a variance of 0.01 is left of one of 1.15: the digits are those of the latter.
        scale = np.asarray(law.variance).max()
        error = np.abs(np.diagonal(cov) - cell["exact_var"]) / scale
        assert error.max() < relative
        evidence = _normal(np.asarray(law.covariance_matrix)[4:, 4:] + 0.01, np.zeros(1))
        assert evidence == pytest.approx(cell["exact_logev"], rel=10 * relative)
        assert not np.any(mean)


@pytest.mark.parametrize("kind", [1, 2])
def test_density_at_irregular_times_is_the_dense_one(kind, x64):
    rng = np.random.default_rng(1)
    times = np.cumsum(rng.uniform(0.05, 1.0, 12))
    for hurst in (0.1, 0.5, 0.8):
        law = FractionalBrownianMotion(times, hurst, scale=1.7, kind=kind)
        x = rng.normal(size=12)
        if kind == 1:
            expected = _normal(1.7**2 * _dense_fbm(times, hurst), x)
        else:
            expected = _normal(np.asarray(law.covariance_matrix), x)
        assert float(law.log_prob(x)) == pytest.approx(expected, rel=1e-10)


def test_a_first_time_of_zero_says_nothing(x64):
    times, x = np.arange(6.0) * 0.3, np.array([0.0, 0.4, 0.1, -0.2, 0.3, 0.9])
    whole = FractionalBrownianMotion(times, 0.3).log_prob(x)
    assert float(whole) == pytest.approx(
        float(FractionalBrownianMotion(times[1:], 0.3).log_prob(x[1:]))
    )
    assert float(FractionalBrownianMotion(times, 0.3).log_prob(x + 0.1)) == -np.inf
    law = FractionalOrnsteinUhlenbeck(times, 0.3, 2.0, mean=0.5, start="zero")
    rest = FractionalOrnsteinUhlenbeck(times[1:], 0.3, 2.0, mean=0.5, start="zero")
    assert float(law.log_prob(x)) == pytest.approx(float(rest.log_prob(x[1:])), rel=1e-12)
    assert law.sample(jax.random.key(0)).shape == (6,)


def test_log_densities_of_the_reference_series(relative):
    for series in REFERENCE["fgn_samples"]:
        x = np.array(series["x"])
        for row in series["loglik"]:
            if "H" not in row:
                continue
            law = FractionalGaussianNoise(64, 1.0, row["H"], row["sigma"])
            assert float(law.log_prob(x)) == pytest.approx(row["loglik"], rel=relative)
            motion = FractionalBrownianMotion(np.arange(1, 65) * 0.5, row["H"], row["sigma"])
            jump = 64 * row["H"] * np.log(0.5)
            y = np.cumsum(x) * 0.5 ** row["H"]
            # The two terms nearly cancel: digits are those of the terms.
            digits = relative * abs(row["loglik"])
            assert float(motion.log_prob(y)) == pytest.approx(row["loglik"] - jump, abs=digits)


def test_log_determinants_of_the_reference(relative):
    for length, expected in REFERENCE["log_determinants"].items():
        got = fgn_log_determinant(int(length), jnp.asarray(0.7))
        assert float(got) == pytest.approx(expected, rel=relative)


@pytest.mark.slow
def test_log_determinant_over_its_range(x64):
    """By Cholesky, and at a length at which the remainder is extrapolated, as at any H."""
    for hurst in (0.011, 0.02, 0.063, 0.31, 0.52, 0.77, 0.96, 0.988):
        column = np.asarray(fgn_autocovariance(2500, hurst))
        expected = 2 * np.log(np.diag(np.linalg.cholesky(toeplitz(column)))).sum()
        assert float(fgn_log_determinant(2500, hurst)) == pytest.approx(expected, rel=1e-10)
    assert np.isnan(fgn_log_determinant(2500, 0.995))


def test_spectral_density_is_that_of_the_autocovariance(x64):
    from scipy.special import gamma, zeta

    frequency = np.geomspace(1e-4, np.pi, 9)
    for hurst in H_RANGE:
        p, x = 2 * hurst + 1, frequency / (2 * np.pi)
        series = (2 * np.pi) ** -p * (zeta(p, x) + zeta(p, 1 - x))
        expected = gamma(p) * np.sin(np.pi * hurst) * (1 - np.cos(frequency)) / np.pi * series
        got = fgn_spectral_density(jnp.asarray(frequency), hurst)
        np.testing.assert_allclose(got, expected, rtol=1e-8)


@pytest.mark.slow
def test_fast_route_is_cholesky(x64):
    """600 points, beyond the dense route: value and gradients by every argument."""
    rng = np.random.default_rng(2)
    lag = np.abs(np.arange(600)[:, None] - np.arange(600))
    x = jnp.asarray(rng.normal(size=600))

    def dense(hurst, scale, x):
        L = jnp.linalg.cholesky(scale**2 * fgn_autocovariance(600, hurst)[lag])
        z = jax.scipy.linalg.solve_triangular(L, x, lower=True)
        return -0.5 * z @ z - jnp.log(jnp.diagonal(L)).sum() - 300 * jnp.log(2 * jnp.pi)

    def fast(hurst, scale, x):
        return FractionalGaussianNoise(600, 1.0, hurst, scale).log_prob(x)

    slow = jax.jit(jax.value_and_grad(dense, (0, 1, 2)))
    quick = jax.jit(jax.value_and_grad(fast, (0, 1, 2)))
    for hurst in (0.05, 0.3, 0.8, 0.96):
        for a, b in zip(
            *map(jax.tree.leaves, (quick(hurst, 1.3, x), slow(hurst, 1.3, x))), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.slow
def test_stationary_fou_on_a_grid_is_cholesky(x64):
    rng = np.random.default_rng(3)
    times, x = np.arange(300) * 0.05, jnp.asarray(rng.normal(size=300))

    def fast(theta):
        return FractionalOrnsteinUhlenbeck(times, *theta).log_prob(x)

    def dense(theta):
        law = FractionalOrnsteinUhlenbeck(times, *theta[:3])
        L = jnp.linalg.cholesky(law.covariance_matrix)
        z = jax.scipy.linalg.solve_triangular(L, x - theta[4], lower=True)
        scale = theta[3]
        log_det = jnp.log(jnp.diagonal(L)).sum() + 300 * jnp.log(scale)
        return -0.5 * z @ z / scale**2 - log_det - 150 * jnp.log(2 * jnp.pi)

    for hurst in (0.2, 0.8):
        theta = [hurst, 1.5, 0.7, 0.3]
        theta = [jnp.asarray(v) for v in theta]
        got = jax.value_and_grad(fast)(theta)
        expected = jax.value_and_grad(dense)(
            [theta[0], theta[1], jnp.asarray(1.0), theta[2], theta[3]]
        )
        flat = jax.tree.leaves(expected[1])
        assert float(got[0]) == pytest.approx(float(expected[0]), rel=1e-9)
        for a, b in zip(got[1], [flat[0], flat[1], flat[3], flat[4]], strict=True):
            assert float(a) == pytest.approx(float(b), rel=1e-6)


@pytest.mark.slow
def test_fast_route_in_float32(key):
    x = FractionalGaussianNoise(4000, 1.0, 0.7).sample(key)
    low = FractionalGaussianNoise(4000, 1.0, 0.72, 1.1).log_prob(x)
    slope = jax.grad(lambda h: FractionalGaussianNoise(4000, 1.0, h, 1.1).log_prob(x))(0.72)
    assert low.dtype == jnp.float32
    with jax.enable_x64(True):
        x = np.asarray(x, float)
        high = FractionalGaussianNoise(4000, 1.0, 0.72, 1.1).log_prob(x)
        exact = jax.grad(lambda h: FractionalGaussianNoise(4000, 1.0, h, 1.1).log_prob(x))(0.72)
    assert float(low) == pytest.approx(float(high), rel=1e-5)
    assert float(slope) == pytest.approx(float(exact), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "law",
    [
        FractionalGaussianNoise(6, 0.5, 0.2, 1.5),
        FractionalBrownianMotion(np.arange(1, 6) * 0.5, 0.8, 2.0),
        FractionalBrownianMotion(np.array([0.0, 0.3, 1.0, 1.2]), 0.3),
        FractionalBrownianMotion(np.array([0.3, 1.0, 1.2]), 0.7, kind=2),
        FractionalOrnsteinUhlenbeck(np.arange(5) * 0.4, 0.3, 1.5, 0.7, 2.0),
        FractionalOrnsteinUhlenbeck(np.array([0.0, 0.4, 1.0]), 0.8, 1.5, start="zero", mean=1.0),
    ],
    ids=["noise", "grid", "from zero", "kind 2", "stationary", "zero start"],
)
def test_draws_have_the_moments_of_the_law(law, key):
    """Means and covariances of 40,000 draws, each within 4 of its Monte Carlo standard errors."""
    draws = np.asarray(law.sample(key, (40_000,)), float)
    cov, sd = np.asarray(law.covariance_matrix), np.sqrt(np.asarray(law.variance))
    error = np.sqrt(40_000)
    assert np.all(np.abs(draws.mean(0) - np.asarray(law.mean)) <= 4 * sd / error + 1e-6)
    spread = np.sqrt(cov**2 + np.outer(sd, sd) ** 2)
    assert np.all(np.abs(np.cov(draws.T) - cov) <= 4 * spread / error + 1e-6)


@pytest.mark.slow
def test_long_draws_by_circulant_embedding(x64):
    """Sums of squares under the exact law are chi-squared: 2,000 points, 20 draws, each H."""
    for hurst in H_RANGE:
        law = FractionalGaussianNoise(2000, 0.1, hurst, 1.3)
        draws = law.sample(jax.random.key(4), (20,))
        log_peak = law.log_prob(jnp.zeros(2000))
        squares = 2 * (log_peak - law.log_prob(draws)).sum()
        assert abs(float(squares) - 40_000) < 4 * np.sqrt(2 * 40_000)
    law = FractionalOrnsteinUhlenbeck(np.arange(1000) * 0.02, 0.3, 1.5)
    draws = law.sample(jax.random.key(5), (20,))
    squares = 2 * (law.log_prob(jnp.zeros(1000)) - law.log_prob(draws)).sum()
    assert abs(float(squares) - 20_000) < 4 * np.sqrt(2 * 20_000)


@pytest.mark.slow
def test_drawn_bridges_have_the_bridge_moments(key):
    law = FractionalBrownianMotion(np.arange(1, 9) * 0.25, 0.3, 1.2)
    at, values = [3, 7], jnp.array([0.5, -0.4])
    draws = np.asarray(law.sample_bridge(key, at, values, noise=0.1, sample_shape=(40_000,)), float)
    mean, cov = (np.asarray(m) for m in law.bridge_moments(at, values, noise=0.1))
    sd = np.sqrt(np.diagonal(cov))
    assert np.all(np.abs(draws.mean(0) - mean) < 4 * sd / 200)
    assert np.all(np.abs(np.cov(draws.T) - cov) < 4 * np.sqrt(cov**2 + np.outer(sd, sd) ** 2) / 200)
    # Gaussian conditioning of the dense matrix, and an exact bridge
    full = 1.2**2 * _dense_fbm(np.arange(1, 9) * 0.25, 0.3)
    expected = full[:, at] @ np.linalg.solve(full[np.ix_(at, at)] + 0.01 * np.eye(2), values)
    np.testing.assert_allclose(mean, expected, atol=1e-5)
    exact = law.sample_bridge(key, at, values, sample_shape=(3,))
    np.testing.assert_allclose(exact[:, at], np.broadcast_to(values, (3, 2)), atol=1e-5)


def test_information_on_hurst_and_scale(x64):
    """Expected information by automatic differentiation of the covariance, n = 100."""
    for name, row in REFERENCE["fisher"].items():
        hurst = float(name)
        lag = np.abs(np.arange(100)[:, None] - np.arange(100))
        cov = np.asarray(fgn_autocovariance(100, hurst))[lag]
        slope = np.asarray(jax.jacfwd(lambda h: fgn_autocovariance(100, h))(hurst))[lag]
        whitened = np.linalg.solve(cov, slope)
        assert 0.5 * np.trace(whitened @ whitened) == pytest.approx(row["n100"]["IHH"], rel=1e-9)
        assert 0.5 * np.trace(whitened) == pytest.approx(row["n100"]["IHs"], rel=1e-9)


def test_shapes_batches_and_errors():
    law = FractionalBrownianMotion(np.arange(1.0, 5.0), jnp.array([0.3, 0.7]), jnp.ones((3, 1)))
    assert law.batch_shape == (3, 2)
    assert law.event_shape == (4,)
    assert law.log_prob(jnp.zeros(4)).shape == (3, 2)
    assert law.covariance_matrix.shape == (3, 2, 4, 4)
    assert nsde.distributions.FractionalBrownianMotion is FractionalBrownianMotion
    with pytest.raises(ValueError, match=r"hurst must be between 0 and 1, got 1.2"):
        FractionalBrownianMotion(np.arange(1.0, 4.0), 1.2)
    with pytest.raises(ValueError, match="kind must be 1 or 2"):
        FractionalBrownianMotion(np.arange(1.0, 4.0), 0.3, kind=3)
    with pytest.raises(ValueError, match="times must be >= 0"):
        FractionalBrownianMotion([-1.0, 2.0], 0.3)
    with pytest.raises(ValueError, match="length must be an integer"):
        FractionalGaussianNoise(0, 1.0, 0.5)
    with pytest.raises(ValueError, match="scale must be positive"):
        FractionalGaussianNoise(3, 1.0, 0.5, -1.0)
    with pytest.raises(ValueError, match="start must be"):
        FractionalOrnsteinUhlenbeck([0.0, 1.0], start="warm")
    with pytest.raises(ValueError, match="at must hold distinct indices"):
        law.bridge_moments([0, 0], [1.0, 1.0])
    with pytest.raises(ValueError, match="values must have shape"):
        law.bridge_moments([0, 1], [1.0])
    nan = jax.jit(lambda h: FractionalGaussianNoise(4, 1.0, h).log_prob(jnp.zeros(4)))(1.3)
    assert np.isnan(nan)
