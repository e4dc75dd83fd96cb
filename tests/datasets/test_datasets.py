"""The shipped data: counts, units, and published fits that reproduce from the arrays."""

import numpy as np
import pytest
from repeated_doses import simulate
from scipy.integrate import solve_ivp
from scipy.linalg import cho_factor, cho_solve, toeplitz
from scipy.optimize import least_squares, minimize, minimize_scalar
from scipy.stats import ncx2, norm

from numpyro_sde import datasets
from numpyro_sde.datasets.files import read_columns

LOADERS = [getattr(datasets, name) for name in datasets.__all__ if name.startswith("load_")]


@pytest.mark.parametrize("load", LOADERS, ids=lambda load: load.__name__)
def test_arrays_are_float64_finite_and_fresh(load):
    data, again = load(), load()
    for name, array in data._asdict().items():
        assert array.dtype == np.float64, name
        assert np.all(np.isfinite(array)), name
        array += 1.0  # a caller who writes into an array must not change the next load
        assert not np.any(array == getattr(again, name)), name
    assert np.all(np.diff(again.times, axis=-1) > 0)


@pytest.mark.parametrize(
    ("load", "start", "end", "shape"),
    [
        (datasets.load_nile_minima, 622, 1284, (663,)),
        (datasets.load_us_treasury, 1953 + 3 / 12, 1999 + 8 / 12, (558,)),
        (datasets.load_lotka_volterra, 0, 30, (16,)),
        (datasets.load_lynx, 1821, 1934, (114,)),
        (datasets.load_hare_lynx, 1900, 1920, (21,)),
        (datasets.load_us_tbill, 1959, 2009.5, (203,)),
        (datasets.load_nile_flow, 1871, 1970, (100,)),
        (datasets.load_elnino_sst, 1950, 2010 + 11 / 12, (732,)),
        (datasets.load_boarding_school_flu, 1, 14, (14,)),
        (datasets.load_dacca_cholera, 1891 + 1 / 12, 1941, (600,)),
    ],
)
def test_counts_and_span(load, start, end, shape):
    data = load()
    assert data.times.shape == shape
    assert data[1].shape[0] == shape[0]
    np.testing.assert_allclose(data.times[[0, -1]], [start, end], atol=1e-9)
    np.testing.assert_allclose(np.diff(data.times), (end - start) / (shape[0] - 1), atol=1e-9)


def test_myoblasts_are_the_cells_of_four_snapshots():
    data = datasets.load_myoblasts()
    # Cells at each time as the data package counts them; sums over its table, in log10(FPKM + 1).
    assert [(data.hours == t).sum() for t in data.times] == [69, 74, 79, 49]
    assert data.cycle.shape == (271, 7)
    assert data.muscle.shape == (271, 9)
    np.testing.assert_allclose(data.cycle.sum() + data.muscle.sum(), 2572.693, atol=0.05)
    cycle, muscle = data.cycle.mean(axis=1), data.muscle.mean(axis=1)
    means = [[score[data.hours == t].mean() for t in data.times] for score in (cycle, muscle)]
    expected = [[0.7878, 0.1786, 0.1799, 0.3065], [0.3585, 0.8455, 0.8948, 1.0728]]
    np.testing.assert_allclose(means, expected, atol=2e-4)
    # Components are centred and uncorrelated over all cells, up to their rounding.
    covariance = np.cov(data.components.T, bias=True)
    np.testing.assert_allclose(data.components.mean(axis=0), 0.0, atol=5e-3)
    assert abs(covariance[0, 1]) < 0.05 < 10.0 < covariance[1, 1] < covariance[0, 0]


def test_theophylline_is_a_balanced_panel_in_mg_and_hours():
    data = datasets.load_theophylline()
    assert data.times.shape == data.concentration.shape == (12, 11)
    assert np.all(data.times[:, 0] < 1.0)
    assert np.all((data.times[:, -1] > 23.0) & (data.times[:, -1] < 25.0))
    # All subjects but the ninth took 320 mg, rounded through mg/kg.
    np.testing.assert_allclose(np.delete(data.dose * data.weight, 8), 320.0, atol=1.5)
    np.testing.assert_allclose([data.weight[0], data.dose[0]], [79.6, 4.02])


def test_lotka_volterra_prey_alone_is_the_same_path():
    both, prey = datasets.load_lotka_volterra(), datasets.load_lotka_volterra(prey_only=True)
    np.testing.assert_array_equal(both.counts[:, 0], prey.counts)
    np.testing.assert_array_equal(both.times, prey.times)
    # The first count is the start with N(0, 10^2) noise.
    assert np.all(np.abs(both.counts[0] - both.start) < 4 * both.noise_scale)


def test_lynx_matches_r_summary():
    trappings = datasets.load_lynx().trappings
    summary = [trappings.min(), np.median(trappings), round(trappings.mean()), trappings.max()]
    assert summary == [39, 771, 1538, 6991]


def test_treasury_peak_and_columns():
    data = datasets.load_us_treasury()
    peak = data.yields[:, 0].argmax()
    np.testing.assert_allclose(data.times[peak], 1981 + 7 / 12)
    # The peak of August 1981 was in an inverted curve: longer maturities paid less.
    assert np.all(np.diff(data.yields[peak]) < 0)
    assert data.maturities.shape == data.yields.shape[1:]


def test_elnino_is_flattened_by_month():
    data = datasets.load_elnino_sst()
    by_month = data.temperature.reshape(61, 12).mean(axis=0)
    # The sea off Peru is warmest in March and coldest in September.
    assert (by_month.argmax(), by_month.argmin()) == (2, 8)
    np.testing.assert_allclose(data.temperature[[0, 12]], [23.11, 24.19])


def test_tbill_vasicek_and_cir_published_likelihoods():
    rate = datasets.load_us_tbill().rate
    before, after, dt = rate[:-1], rate[1:], 0.25

    def vasicek(p):
        speed, mean, scale = p
        sd = scale * np.sqrt(-np.expm1(-2 * speed * dt) / (2 * speed))
        return norm.logpdf(after, mean + (before - mean) * np.exp(-speed * dt), sd).sum()

    def cir(p):
        speed, mean, scale = p
        c = 2 * speed / (scale**2 * -np.expm1(-speed * dt))
        dof, shift = 4 * speed * mean / scale**2, 2 * c * before * np.exp(-speed * dt)
        return np.sum(np.log(2 * c) + ncx2.logpdf(2 * c * after, dof, shift))

    fit = minimize(lambda p: -vasicek(np.exp(p)), np.log([0.3, 6.0, 1.5]), method="Nelder-Mead")
    np.testing.assert_allclose(-fit.fun, -256.5205, atol=1e-4)
    np.testing.assert_allclose(np.exp(fit.x), [0.1727, 5.021, 1.760], rtol=1e-3)
    np.testing.assert_allclose(cir([0.0397, 3.98, 0.6666]), -214.4892, atol=1e-4)


def test_nile_minima_published_hurst_index():
    level = datasets.load_nile_minima().level / 100.0
    n = len(level)
    lag = np.arange(n, dtype=float)

    def concentrated(hurst):
        power = 2 * hurst
        cov = 0.5 * ((lag + 1) ** power - 2 * lag**power + np.abs(lag - 1) ** power)
        factor = cho_factor(toeplitz(cov), lower=True)
        ones = cho_solve(factor, np.ones(n))
        centred = level - ones @ level / ones.sum()
        variance = centred @ cho_solve(factor, centred) / n
        return -0.5 * n * np.log(variance) - np.log(np.diag(factor[0])).sum()

    fit = minimize_scalar(
        lambda hurst: -concentrated(hurst),
        bounds=(0.7, 0.95),
        method="bounded",
        options={"xatol": 1e-4},
    )
    np.testing.assert_allclose([fit.x, -fit.fun], [0.8315, 236.52], atol=6e-3)


def test_nile_flow_published_local_level_likelihood():
    flow = datasets.load_nile_flow().flow
    mean, variance, loglik = 0.0, 1e6, 0.0
    for year, value in enumerate(flow):
        total, error = variance + 15078.0, value - mean
        if year:
            loglik -= 0.5 * (np.log(2 * np.pi * total) + error**2 / total)
        mean += variance / total * error
        variance *= 15078.0 / total
        variance += 1478.8
    np.testing.assert_allclose(loglik, -632.538, atol=1e-3)


def test_unknown_column_is_named():
    with pytest.raises(ValueError, match=r"volumes.*nile_flow\.csv"):
        read_columns("nile_flow.csv", "year", "volumes")


def test_hare_and_lynx_give_the_published_fit():
    """Least squares of logs under the ODE; published means and posterior sds by Carpenter 2018."""
    data = datasets.load_hare_lynx()
    logs, years = np.log(data.pelts), data.times - 1900.0

    def residuals(q):
        birth, predation, death, growth = np.exp(q[:4])

        def drift(_, z):
            return [birth - predation * np.exp(z[1]), growth * np.exp(z[0]) - death]

        found = solve_ivp(drift, (0.0, 20.0), q[4:], t_eval=years, rtol=1e-6, atol=1e-8)
        return (found.y.T - logs).ravel() if found.success else np.full(42, 10.0)

    start = np.concatenate([np.log([0.5, 0.03, 0.9, 0.03]), logs[0]])
    fit = least_squares(residuals, start)
    published = [0.55, 0.028, 0.80, 0.024]
    np.testing.assert_allclose(np.exp(fit.x[:4]), published, atol=0.0, rtol=0.12)
    # The published sds, 0.06 to 0.09 of 0.55 and 0.80, allow 12 %.
    assert 0.2 < np.sqrt(np.mean(fit.fun**2)) < 0.3


def test_repeated_doses_are_the_simulation_that_they_are_said_to_be():
    data = datasets.load_repeated_doses()
    rows = np.array(simulate())
    np.testing.assert_allclose(data.times, rows[:, 2].reshape(24, 10), atol=1e-9)
    np.testing.assert_allclose(data.concentration, rows[:, 3].reshape(24, 10), atol=1e-3)
    np.testing.assert_allclose(data.weight, rows[::10, 1], atol=1e-9)
