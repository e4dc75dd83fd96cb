"""Differences of smoothing means and sds over time, in units and errors that are known."""

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

from numpyro_sde.diagnostics import compare_fits, plot_fits, to_arviz
from numpyro_sde.diagnostics.compare.path_distances import difference, largest_rhat, moments

TIMES = np.linspace(0.0, 3.0, 7)
SHIFT = np.linspace(0.0, 0.6, 7)
SCALE = np.linspace(1.0, 1.5, 7)


@pytest.fixture(scope="module")
def fits():
    rng = np.random.default_rng(0)
    first = {"rate": rng.normal(size=4000), "x": 2.0 * rng.normal(size=(4000, 7))}
    second = {
        "rate": rng.normal(size=3000),
        "x": 2.0 * (SHIFT + SCALE * rng.normal(size=(3000, 7))),
    }
    return {"NUTS": to_arviz(first, times=TIMES), "other": to_arviz(second, times=TIMES)}


@pytest.fixture(scope="module")
def table(fits):
    return compare_fits(fits)


def test_differences_over_time(table):
    found = table.over_time["x"]
    assert found["mean_difference"].dims == ("fit", "time")
    np.testing.assert_allclose(found["time"], TIMES)
    one = found.sel(fit="other")
    error = np.sqrt(1 / 4000 + SCALE**2 / 3000)
    # Effective sizes of independent draws are estimated to some per cent.
    np.testing.assert_allclose(one["mean_error"], error, rtol=0.15)
    # The reference's own sd, in which all is measured, has an error too.
    assert np.all(np.abs(one["mean_difference"] - SHIFT) < 4 * (error + SHIFT / np.sqrt(8000)))
    error = SCALE * np.sqrt(1 / 8000 + 1 / 6000)
    np.testing.assert_allclose(one["sd_error"], error, rtol=0.15)
    assert np.all(np.abs(one["sd_difference"] - (SCALE - 1)) < 4 * error)
    assert "NUTS" not in found["fit"]
    assert found.attrs["reference"] == "NUTS"


def test_rows_of_paths_hold_the_worst(table):
    row, found = table.paths.loc[("x", "other")], table.over_time["x"].sel(fit="other")
    assert row["mean_difference"] == pytest.approx(float(np.abs(found["mean_difference"]).max()))
    assert row["sd_difference"] == pytest.approx(float(np.abs(found["sd_difference"]).max()))
    assert row["in_errors"] > 10
    assert row["rhat"] < 1.01
    assert row["ess"] > 2000
    assert np.isnan(table.paths.loc[("x", "NUTS"), "in_errors"])
    text = str(table)
    assert "mean_difference" in text
    assert "num_elements" not in text
    assert "do not trust these parameters: x (0." in table.verdicts["other"]


def test_errors_count_autocorrelation():
    """A first-order autoregression of coefficient 0.8 is worth a ninth of its draws."""
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(4, 20_000))
    chain = np.empty_like(noise)
    chain[:, 0] = noise[:, 0]
    for k in range(1, chain.shape[1]):
        chain[:, k] = 0.8 * chain[:, k - 1] + 0.6 * noise[:, k]
    found = moments(chain)
    assert float(found.mean_error) == pytest.approx(np.sqrt(9 / 80_000), rel=0.1)
    # Squares of it have autocorrelations 0.64^k: (1 + 0.64) / (1 - 0.64) = 4.6.
    assert float(found.sd_error) == pytest.approx(np.sqrt(4.6 / 160_000), rel=0.1)
    assert abs(found.mean) < 4 * found.mean_error
    assert abs(found.sd - 1) < 4 * found.sd_error


def test_errors_are_those_of_replicates():
    """400 pairs of samples of a t law, heavy-tailed: in_errors has the spread of a normal's."""
    rng = np.random.default_rng(2)
    draws = rng.standard_t(8, size=(2, 1, 500, 400))
    found = difference(moments(draws[0], 500.0), moments(draws[1], 500.0))
    for ratio in (found.mean / found.mean_error, found.sd / found.sd_error):
        assert abs(ratio.mean()) < 4 / np.sqrt(400)
        # Kurtosis is estimated low from 500 draws of a t law: some per cent more spread.
        assert 1 - 4 / np.sqrt(800) < ratio.std() < 1.1 + 4 / np.sqrt(800)


def test_constants_have_no_distance():
    found = difference(moments(np.ones((1, 50))), moments(np.ones((1, 50))))
    assert np.isnan(found.mean)
    assert np.isnan(found.in_errors)
    assert np.isnan(largest_rhat(np.ones((2, 50, 3))))


def test_the_plot_shows_differences(fits, table):
    axes = plot_fits(fits, paths=["x"])
    assert [axis.get_xlabel() for axis in axes] == ["rate", "time", "time"]
    for axis, name in zip(axes[1:], ("mean_difference", "sd_difference"), strict=True):
        line = next(line for line in axis.lines if line.get_label() == "other")
        np.testing.assert_allclose(line.get_xdata(), TIMES)
        np.testing.assert_allclose(line.get_ydata(), table.over_time["x"][name].values[0])
    only = plot_fits(fits, [], paths=["x"], reference="other")
    assert len(only) == 2
    assert "NUTS" in [line.get_label() for line in only[0].lines]
    with pytest.raises(ValueError, match="paths names 'z'"):
        plot_fits(fits, paths=["z"])
    with pytest.raises(ValueError, match="'rate' has dimensions"):
        plot_fits(fits, paths=["rate"])
    with pytest.raises(ValueError, match="reference names 'z'"):
        plot_fits(fits, paths=["x"], reference="z")
    plt.close("all")


def test_times_are_taken_from_the_fit_that_knows_them(fits, table):
    """A path under a reparametrisation is a deterministic site without times."""
    posterior = fits["NUTS"]["posterior"]
    plain = {name: posterior[name].values[0] for name in ("rate", "x")}
    mixed = {"NUTS": to_arviz(plain), "other": fits["other"]}
    again = compare_fits(mixed)
    assert list(again.paths.index) == list(table.paths.index)
    np.testing.assert_allclose(again.over_time["x"]["time"], TIMES)
    assert again.paths.loc[("x", "other"), "where"].startswith("time=")
    assert len(plot_fits(mixed, [], paths=["x"])) == 2
