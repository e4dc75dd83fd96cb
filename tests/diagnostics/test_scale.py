"""Scans over the sampling step and filtered data, on paths whose limits are known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import i0

import numpyro_sde as nsde
from numpyro_sde.diagnostics import averaged_drift, filtered_estimate, sampling_scale_scan

SLOWING = 1.0 / i0(2.0) ** 2  # S4: A = 0.19244, Sigma = 0.09622


def ou_path(rate, scale, length, dt, seed):
    """Exact Ornstein-Uhlenbeck path by NumPy."""
    rng = np.random.default_rng(seed)
    decay, sd = np.exp(-rate * dt), scale / np.sqrt(2 * rate)
    noise = rng.normal(size=length) * sd * np.sqrt(1 - decay**2)
    x = np.empty(length)
    x[0] = sd * rng.normal()
    for k in range(1, length):
        x[k] = decay * x[k - 1] + noise[k]
    return x, np.arange(length) * dt


@pytest.fixture(scope="module")
def rough_path():
    """S4 at epsilon = 0.1 over T = 500: V = x^2/2, p = cos, temperature 1/2; Euler by NumPy."""
    rng = np.random.default_rng(7)
    dt, every, eps = 1e-3, 20, 0.1
    steps = 500_000
    shock = rng.normal(size=steps) * np.sqrt(dt)
    kept, x = [0.0], 0.0
    for k in range(steps):
        x += (-x + np.sin(x / eps) / eps) * dt + shock[k]
        if (k + 1) % every == 0:
            kept.append(x)
    return np.array(kept), np.arange(len(kept)) * dt * every


def test_one_scale_has_a_plateau_from_the_finest_step():
    path, times = ou_path(0.7, 0.6, 20_000, 0.05, 0)
    ou = nsde.processes.OrnsteinUhlenbeck(rate=1.0, mean=0.1, scale=1.0)
    scan = sampling_scale_scan(path, times, ou, [0.05, 0.2, 0.4])
    assert scan.names == ("mean", "rate", "scale")
    assert not scan.depends_on_step
    assert scan.check() == []
    truth = np.array([0.0, 0.7, 0.6])
    assert np.all(np.abs(scan.estimates - truth) < 4 * scan.standard_errors)
    # Known: the exact regression on equally spaced steps, at the finest one.
    lag = np.polyfit(path[:-1], path[1:], 1)
    assert scan.estimates[0, 1] == pytest.approx(-np.log(lag[0]) / 0.05, rel=2e-3)
    # Asymptotic error of the rate from a long path, sqrt(2 rate / T).
    assert scan.standard_errors[0, 1] == pytest.approx(np.sqrt(1.4 / 1000), rel=0.1)
    qv = 0.36 * (1 - np.exp(-0.7 * scan.steps)) / (0.7 * scan.steps)
    np.testing.assert_allclose(scan.quadratic_variation, qv, rtol=0.08)


def test_features_of_vector_paths_are_fitted_by_least_squares():
    first, times = ou_path(0.7, 0.6, 4000, 0.05, 1)
    second, _ = ou_path(1.5, 0.6, 4000, 0.05, 2)
    path = np.stack([first, second], axis=1)
    scan = sampling_scale_scan(path, times, lambda x: -jnp.diag(x), [0.05, 0.1, 0.15])
    for k, x in enumerate((first, second)):
        want = -np.sum(x[:-1] * np.diff(x)) / np.sum(x[:-1] ** 2) / 0.05
        assert scan.estimates[0, k] == pytest.approx(want, rel=1e-4)
    assert scan.names == ("coefficient[0]", "coefficient[1]")


@pytest.mark.slow
def test_a_rough_potential_shows_in_the_scan(rough_path):
    path, times = rough_path
    ou = nsde.SDE(
        lambda t, x, p: -p["A"] * x,
        lambda t, x, p: jnp.sqrt(2.0 * p["Sigma"]),
        params={"A": 1.0, "Sigma": 0.5},
    )
    scan = sampling_scale_scan(path, times, ou, [0.02, 0.05, 0.1, 0.3, 0.5, 0.7, 1.0])
    assert scan.names == ("A", "Sigma")
    assert scan.depends_on_step
    assert scan.plateau[0] >= 0.3
    middle = scan.estimates[-2]
    errors = scan.standard_errors[-2]
    assert abs(middle[0] - SLOWING) < 4 * errors[0]
    # At this epsilon the plateau of Sigma itself is some per cent high (measured: 0.099).
    assert middle[1] == pytest.approx(SLOWING / 2, rel=0.12)
    with pytest.warns(UserWarning, match="posterior sd of 'A'"):
        messages = scan.check({"A": 0.06})
    assert "plateau" in str(scan)
    assert len(messages) == 1


def test_plot_of_a_scan():
    pytest.importorskip("matplotlib").use("Agg")
    path, times = ou_path(0.7, 0.6, 2000, 0.05, 0)
    panels = sampling_scale_scan(path, times, lambda x: -x, [0.05, 0.1, 0.15]).plot()
    assert [panel.get_xlabel() for panel in panels] == ["sampling step"] * 2


def test_filtered_data_see_the_slow_scale(rough_path):
    path, times = rough_path
    fit = filtered_estimate(path, times, lambda x: -x, width=1.0)
    want = np.array([SLOWING, SLOWING / 2])
    got = np.append(fit.coefficients, fit.diffusivity)
    assert np.all(np.abs(got - want) < 4 * fit.standard_errors)
    # The limit's own error of A: 2 Sigma int Z^2 / (int Z X)^2 with E Z^2 = E Z X = 0.5 / 1.19244.
    assert fit.standard_errors[0] == pytest.approx(
        np.sqrt(2 * SLOWING / 2 * 1.19244 / 0.5 / 500), rel=0.5
    )
    naive = -np.sum(path[:-1] * np.diff(path)) / np.sum(path[:-1] ** 2 * 0.02)
    assert naive > 2 * SLOWING


def test_filtered_estimates_follow_their_formula():
    """A quadratic potential: the paper's formulas, written out."""
    path, times = ou_path(0.7, 0.6, 20_000, 0.05, 3)
    fit = filtered_estimate(path, times, lambda x: -x, width=1.0)
    z = np.zeros_like(path)
    z[0], decay = path[0], np.exp(-0.05)
    for k in range(len(path) - 1):
        z[k + 1] = decay * z[k] + (1 - decay) * path[k]
    rate = -np.sum(z[:-1] * np.diff(path)) / np.sum(z[:-1] * path[:-1] * 0.05)
    assert fit.coefficients[0] == pytest.approx(rate, rel=1e-6)
    paper = np.mean((path - z) ** 2) * (1 + rate)
    assert fit.diffusivity == pytest.approx(paper, rel=0.02)
    assert abs(fit.coefficients[0] - 0.7) < 4 * fit.standard_errors[0]
    assert fit.diffusivity == pytest.approx(0.18, rel=0.06)


def test_filtered_likelihood_is_centred_and_as_wide_as_the_errors():
    path, times = ou_path(0.7, 0.6, 4000, 0.05, 4)
    fit = filtered_estimate(path, times, lambda x: -x, width=1.0)
    best = fit.log_likelihood(fit.coefficients, fit.diffusivity)
    assert float(best) == pytest.approx(0.0, abs=1e-6)
    sd = fit.standard_errors
    curvature = jax.jit(jax.hessian(lambda v: fit.log_likelihood(v[0], v[1])))(
        jnp.array([fit.coefficients[0], fit.diffusivity])
    )
    # A t of 24 degrees of freedom in two dimensions is narrower by 24/26 at its mode.
    np.testing.assert_allclose(np.linalg.inv(-curvature), fit.covariance * 24 / 26, rtol=1e-3)
    low, high = fit.interval(0.9)
    np.testing.assert_allclose((high - low) / (2 * 1.711 * sd), 1.0, rtol=1e-3)  # t of 24


def test_bands_of_the_averaged_drift_and_the_ridge():
    rng = np.random.default_rng(0)
    rate = np.exp(rng.normal(0.0, 0.5, 400))
    samples = {"gain": rate, "loss": 2.0 / rate * np.exp(rng.normal(0.0, 0.01, 400))}

    def make(s):
        return nsde.SDE(lambda t, x: -s["gain"] * s["loss"] * x, lambda t, x: 1.0)

    states = np.linspace(-1.0, 1.0, 5)
    with pytest.warns(UserWarning, match="'gain' and 'loss' have posterior correlation -1.000"):
        bands = averaged_drift(samples, make, states, path=np.array([0.4, 0.6, -0.1]))
    low, high = bands.band(0.9)
    np.testing.assert_allclose(bands.median, -2.0 * states, atol=0.01)
    # The drift is known to a per cent, its two factors to a half.
    assert high[-1] - low[-1] == pytest.approx(2 * 1.645 * 0.02, rel=0.2)
    np.testing.assert_allclose(bands.visited, [0.0, 0.0, 1 / 3, 2 / 3, 0.0])
    assert "Not identified: the invariant law" in str(bands)
    pytest.importorskip("matplotlib").use("Agg")
    assert bands.plot(truth=-2.0 * states).get_ylabel() == "averaged drift"


PATH, TIMES = np.sin(np.arange(100.0)), np.arange(100) * 0.1


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"path": PATH[:50]}, ValueError, "path must have shape"),
        ({"path": np.full(100, np.nan)}, ValueError, "path must be finite"),
        ({"times": TIMES**2}, ValueError, "equally spaced"),
        ({"steps": [0.1]}, ValueError, "at least 2"),
        ({"steps": [0.01, 0.1]}, ValueError, "not be below that of the data"),
        ({"steps": [0.1, 5.0]}, ValueError, "leave 10 increments"),
        ({"model": 3.0}, TypeError, "model must be an nsde.SDE"),
        ({"scheme": nsde.schemes.Euler()}, ValueError, "scheme is not used"),
        ({"model": nsde.SDE(lambda t, x: x, lambda t, x: 1.0)}, ValueError, "scalar parameters"),
    ],
)
def test_wrong_scans_are_refused(change, error, match):
    arguments = {"path": PATH, "times": TIMES, "model": lambda x: -x, "steps": [0.1, 0.2]}
    with pytest.raises(error, match=match):
        sampling_scale_scan(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"width": 0.1}, "width must be from 10 steps"),
        ({"width": 5.0}, "width must be from 10 steps"),
        ({"num_blocks": 2}, "num_blocks must be from 5"),
        ({"path": np.zeros((400, 2))}, "path must be scalar"),
    ],
)
def test_wrong_filters_are_refused(change, match):
    times = np.arange(400) * 0.05
    arguments = {"path": np.sin(times), "times": times, "features": lambda x: -x, "width": 1.0}
    with pytest.raises(ValueError, match=match):
        filtered_estimate(**{**arguments, **change})


def test_wrong_bands_are_refused():
    with pytest.raises(ValueError, match="one number of draws"):
        averaged_drift({"a": np.ones(3), "b": np.ones(4)}, lambda s: None, [0.0, 1.0])
    with pytest.raises(TypeError, match="make_sde must return"):
        averaged_drift({"a": np.ones(3)}, lambda s: None, [0.0, 1.0])
