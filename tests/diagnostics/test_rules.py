"""Scoring rules against closed forms, reference numbers, and the package scoringrules."""

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from numpyro_sde.diagnostics import crps, energy_score
from numpyro_sde.diagnostics.prediction.rules import (
    crps_normal,
    interval_hit,
    interval_score,
    log_score,
)

ENSEMBLE = [-0.2, 0.1, 0.4, 0.9, 1.7]
NAN = np.nan


def test_crps_reference_numbers():
    assert float(crps(ENSEMBLE, 1.0)) == pytest.approx(0.332, abs=1e-14)
    assert float(crps(ENSEMBLE, 1.0, fair=True)) == pytest.approx(0.24, abs=1e-14)
    assert float(crps_normal(0.3, 1.2, 1.0)) == pytest.approx(0.43886862529099196, rel=1e-13)


def test_crps_is_the_integral_of_its_definition():
    """CRPS = integral of (F(z) - 1{z >= y})^2 (Gneiting and Raftery 2007, equation 20)."""
    mean, sd, y = -0.4, 0.7, 0.9
    below = quad(lambda z: norm.cdf(z, mean, sd) ** 2, -12, y)[0]
    above = quad(lambda z: norm.sf(z, mean, sd) ** 2, y, 12)[0]
    assert float(crps_normal(mean, sd, y)) == pytest.approx(below + above, rel=1e-8)
    steps = np.sort(ENSEMBLE)
    grid = np.sort([*steps, y])
    share = np.searchsorted(steps, grid[:-1], side="right") / len(steps)
    exact = np.sum(np.diff(grid) * (share - (grid[:-1] >= y)) ** 2)
    assert float(crps(ENSEMBLE, y)) == pytest.approx(exact, rel=1e-13)


def test_crps_of_arrays_and_missing_data():
    rng = np.random.default_rng(0)
    draws, y = rng.normal(size=(30, 4, 3)), rng.normal(size=(4, 3))
    y[1, 2] = NAN
    pairs = np.abs(draws[:, None] - draws[None]).sum((0, 1))
    error = np.abs(draws - y).mean(0)
    np.testing.assert_allclose(crps(draws, y), error - pairs / (2 * 30**2), rtol=1e-12)
    np.testing.assert_allclose(crps(draws, y, fair=True), error - pairs / (2 * 30 * 29), rtol=1e-12)
    assert np.isnan(crps(draws, y)).sum() == 1


def test_fair_crps_does_not_depend_on_the_number_of_draws():
    """Seed 1, 20,000 ensembles of 3 normal draws: mean within 4 standard errors of the law's."""
    draws = np.random.default_rng(1).normal(size=(3, 20_000))
    values = crps(draws, np.full(20_000, 0.8), fair=True)
    assert abs(values.mean() - crps_normal(0.0, 1.0, 0.8)) < 4 * values.std() / np.sqrt(20_000)


def test_energy_score():
    rng = np.random.default_rng(2)
    draws, y = rng.normal(size=(40, 5, 2)), rng.normal(size=(5, 2))
    distance = np.linalg.norm(draws[:, None] - draws[None], axis=-1).sum((0, 1))
    error = np.linalg.norm(draws - y, axis=-1).mean(0)
    np.testing.assert_allclose(energy_score(draws, y), error - distance / (2 * 40**2), rtol=1e-12)
    fair = error - distance / (2 * 40 * 39)
    np.testing.assert_allclose(energy_score(draws, y, fair=True), fair, rtol=1e-12)
    # Of vectors of length one it is the CRPS.
    one = energy_score(draws[..., :1], y[..., :1])
    np.testing.assert_allclose(one, crps(draws[..., 0], y[..., 0]), rtol=1e-12)


def test_log_score_of_a_mixture():
    density = np.array([[0.2, 1e-300], [0.4, 3e-300]])
    np.testing.assert_allclose(log_score(np.log(density)), np.log([0.3, 2e-300]), rtol=1e-12)


def test_intervals():
    draws = np.linspace(-1.0, 1.0, 2001)[:, None].repeat(4, 1)
    y = np.array([0.0, 0.79, 0.81, NAN])
    np.testing.assert_array_equal(interval_hit(draws, y, 0.8), [1.0, 1.0, 0.0, NAN])
    np.testing.assert_allclose(interval_score(draws, y, 0.8)[:3], [1.6, 1.6, 1.6 + 10 * 0.01])


def test_scoringrules_agrees():
    sr = pytest.importorskip("scoringrules")
    rng = np.random.default_rng(3)
    draws, y = rng.gamma(2.0, size=(50, 6)), rng.gamma(2.0, size=6)
    np.testing.assert_allclose(crps(draws, y), sr.crps_ensemble(y, draws.T, estimator="nrg"))
    fair = sr.crps_ensemble(y, draws.T, estimator="fair")
    np.testing.assert_allclose(crps(draws, y, fair=True), fair)
    np.testing.assert_allclose(crps_normal(0.3, 1.2, y), sr.crps_normal(y, 0.3, 1.2))
    vectors, target = rng.normal(size=(40, 5, 2)), rng.normal(size=(5, 2))
    found = sr.energy_score(target, np.moveaxis(vectors, 0, 1))
    np.testing.assert_allclose(energy_score(vectors, target), found)
    low, high = np.quantile(draws, [0.1, 0.9], axis=0)
    found = sr.interval_score(y, low, high, 0.2)
    np.testing.assert_allclose(interval_score(draws, y, 0.8), found)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="behind a first axis of draws"):
        crps(np.zeros((5, 3)), np.zeros(4))
    with pytest.raises(ValueError, match="prob"):
        interval_hit(np.zeros((5, 3)), np.zeros(3), 1.0)
