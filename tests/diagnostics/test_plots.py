"""Plots: what is drawn, on which axes."""

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from diagnostic_models import panel, plane
from scipy.special import ndtr, ndtri

from numpyro_sde.diagnostics import plot_fits, plot_paths, to_arviz

TIMES = np.array([0.0, 0.5, 1.0, 2.0, 2.5, 4.0])


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def bands(axis):
    """Lower and upper edge of every band, widest first."""
    edges = []
    for collection in axis.collections:
        vertices = collection.get_paths()[0].vertices
        edges.append([vertices[vertices[:, 0] == t, 1] for t in np.unique(vertices[:, 0])])
    return [np.array([[v.min() for v in edge], [v.max() for v in edge]]) for edge in edges]


def test_bands_are_quantiles_and_the_line_is_the_median():
    draws = np.random.default_rng(0).normal(size=(400, 6)).cumsum(axis=1)
    data = draws[0].copy()
    data[2] = np.nan
    _, given = plt.subplots()
    axis = plot_paths({"x": draws}, times=TIMES, data=data, ax=given, intervals=(0.5, 0.9), draws=7)
    assert axis is given
    wide, tight = bands(axis)
    np.testing.assert_allclose(wide, np.quantile(draws, [0.05, 0.95], axis=0))
    np.testing.assert_allclose(tight, np.quantile(draws, [0.25, 0.75], axis=0))
    median, *singles, points = axis.lines
    np.testing.assert_allclose(median.get_xydata()[:, 0], TIMES)
    np.testing.assert_allclose(median.get_ydata(), np.median(draws, axis=0))
    assert len(singles) == 7
    np.testing.assert_allclose(points.get_xydata(), np.c_[TIMES, data][[0, 1, 3, 4, 5]])
    legend = [text.get_text() for text in axis.get_legend().get_texts()]
    assert legend == ["90 %", "50 %", "x median", "draws", "data"]


def test_panels_for_series_on_their_own_clocks():
    clocks = TIMES + np.array([[0.0], [0.1], [0.7]])
    y = np.arange(18.0).reshape(3, 6)
    y[1, 2] = np.nan
    rng = np.random.default_rng(0)
    draws = {"centre": np.zeros(20), "rate": np.ones((20, 3)), "x": rng.normal(size=(20, 3, 6))}
    tree = to_arviz(draws, model=panel, model_args=(clocks,), model_kwargs={"y": y})
    axes = plot_paths(tree, data="y")
    assert [axis.get_title() for axis in axes] == ["series 0", "series 1", "series 2"]
    points = axes[1].lines[-1].get_xydata()
    seen = [0, 1, 3, 4, 5]
    np.testing.assert_allclose(points, np.c_[clocks[1], y[1]][seen], rtol=1e-6)
    one = plot_paths(tree, data=y, series=2)
    np.testing.assert_allclose(one.lines[-1].get_xydata(), np.c_[clocks[2], y[2]], rtol=1e-6)


def test_state_components_and_data_of_the_first():
    draws = {"rate": np.ones(5), "x": np.random.default_rng(0).normal(size=(5, 6, 2))}
    options = {"model": plane, "model_args": (TIMES,), "model_kwargs": {"y": np.ones(6)}}
    tree = to_arviz(draws, **options)
    first, second = plot_paths(tree, data="y")
    assert (first.get_title(), second.get_title()) == ("state 0", "state 1")
    assert len(first.lines[-1].get_xdata()) == 6
    assert len(second.lines[-1].get_xdata()) == 0
    hidden = plot_paths(tree, state=1)
    np.testing.assert_allclose(hidden.lines[0].get_ydata(), np.median(draws["x"][..., 1], axis=0))


def test_marginals_integrate_to_one_and_carry_names():
    rng = np.random.default_rng(0)
    fits = {
        "NUTS": {"a": rng.normal(size=800), "b": rng.gamma(2.0, size=(800, 2))},
        "SVI": {"a": rng.normal(size=900) + 1.0, "b": rng.gamma(3.0, size=(900, 2))},
    }
    axes = plot_fits(fits)
    assert [axis.get_xlabel() for axis in axes] == ["a", "b[0]", "b[1]"]
    for axis in axes:
        assert len(axis.lines) == 2
        assert len({(line.get_color(), line.get_linestyle()) for line in axis.lines}) == 2
        for line in axis.lines:
            x, density = line.get_data()
            assert np.trapezoid(density, x) == pytest.approx(1.0, abs=0.01)
    low = fits["NUTS"]["b"][:, 0].min()
    assert axes[1].lines[0].get_xdata()[0] == pytest.approx(low)
    assert [t.get_text() for t in axes[0].get_legend().get_texts()] == ["NUTS", "SVI"]
    _, own = plt.subplots(1, 1)
    assert plot_fits(fits, var_names=["a"], axes=own) == [own]


def test_paths_are_no_marginals():
    draws = {"rate": np.random.default_rng(0).normal(size=30), "x": np.zeros((30, 6))}
    axes = plot_fits({"one": to_arviz(draws, times=TIMES)})
    assert [axis.get_xlabel() for axis in axes] == ["rate"]


def test_errors_name_the_argument():
    tree = to_arviz({"x": np.zeros((4, 6)), "a": np.zeros(4)}, times=TIMES)
    with pytest.raises(ValueError, match=r"intervals must lie in \(0, 1\)"):
        plot_paths(tree, intervals=(50, 90))
    with pytest.raises(ValueError, match=r"'z' is not in group 'posterior'"):
        plot_paths(tree, "z")
    with pytest.raises(ValueError, match=r"'a' has dimensions .*none of them time"):
        plot_paths(tree, "a")
    with pytest.raises(ValueError, match="1 axes are needed"):
        plot_paths(tree, ax=plt.subplots(1, 2)[1])
    with pytest.raises(ValueError, match="series and state must be positions below 1"):
        plot_paths(tree, series=3)
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_fits({"a": {"p": np.zeros(3)}, "b": {"q": np.zeros(3)}})
    with pytest.raises(ValueError, match=r"var_names must be in every fit"):
        plot_fits({"a": {"p": np.zeros(3)}, "b": {"q": np.zeros(3)}}, var_names=["p"])


def test_a_density_is_reflected_only_where_it_has_not_ended():
    u = (np.arange(2_000) + 0.5) / 2_000
    draws = {"normal": ndtri(u), "exponential": -np.log1p(-u)}
    axes = plot_fits({"fit": draws}, ["normal", "exponential"])
    normal, exponential = (axis.lines[0].get_ydata() for axis in axes)
    assert np.all(np.diff(normal[-20:]) < 0.0)  # no turn up at the last draw
    assert normal[-1] < 0.01
    width = (0.75 * len(u)) ** -0.2 * draws["exponential"].std(ddof=1)  # Silverman's
    smoothed = 2.0 * np.exp(0.5 * width**2) * ndtr(-width)  # of the even law, at zero
    assert exponential[0] == pytest.approx(smoothed, rel=0.01)
