"""Paths keep their plates and times under every treatment, in results and in pictures."""

import matplotlib as mpl

mpl.use("Agg")

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import numpyro_sde as nsde
from numpyro_sde.data import from_long
from numpyro_sde.diagnostics import plot_paths, to_arviz

HOURS = np.array([[0.0, 1.0, 3.0, 7.5], [0.5, 2.0, 2.5, 4.0], [0.0, 4.0, 8.0, 9.0]])
Y = np.array([[1.0, 0.7, np.nan, 0.2], [0.9, 0.5, 0.6, 0.4], [1.2, 0.6, 0.3, 0.1]])
GRID = nsde.TimeGrid(HOURS, max_step=1.5)


def model(y=Y, log=False):
    """Gut and plasma of three subjects on their own clocks; plasma is seen."""
    numpyro.sample("unused", dist.Normal(0.0, 1.0))
    A = jnp.array([[-1.0, 0.0], [0.8, -0.3]])
    sde = nsde.processes.LinearSDE(A, jnp.zeros(2), 0.1 * jnp.eye(2))
    with numpyro.plate("subject", 3):
        init = dist.MultivariateNormal(jnp.array([1.0, 0.2]), 0.01 * jnp.eye(2))
        path = nsde.SDEPath(sde, GRID, init, scheme=nsde.schemes.LocalLinear())
        x = numpyro.sample("x", path)
        nsde.observe("y", x, lambda t, x: dist.Normal(x[1], 0.1), obs=y, at=GRID.index)


def fit(treatment):
    draws = {"unused": np.zeros(6)}
    if treatment == "integrated":
        treated = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())
        return to_arviz(draws, model=treated, smooth=True)
    treated = model
    if treatment == "whitened":
        config = {"x": nsde.reparam.InnovationReparam()}
        treated = numpyro.handlers.reparam(model, config=config)
    trace = numpyro.handlers.trace(numpyro.handlers.seed(treated, 0)).get_trace()
    sites = {
        n: np.repeat(np.asarray(s["value"])[None], 6, 0)
        for n, s in trace.items()
        if n.startswith("x")
    }
    return to_arviz({**draws, **sites}, model=treated)


@pytest.mark.slow
@pytest.mark.parametrize("treatment", ["latent", "whitened", "integrated"])
def test_plates_and_times_stay(treatment):
    tree = fit(treatment)
    x, y = tree["posterior"]["x"], tree["observed_data"]["y"]
    assert x.dims == ("chain", "draw", "subject", "time", "state")
    np.testing.assert_allclose(x.coords["time_value"], GRID.times, rtol=1e-6)
    assert y.dims == ("subject", "time_y")
    np.testing.assert_allclose(y.coords["time_y_value"], HOURS, rtol=1e-6)
    axes = plot_paths(tree, data="y", state=1)
    assert [axis.get_title() for axis in axes] == [f"subject {k}, state 1" for k in range(3)]
    for k, axis in enumerate(axes):
        points = axis.lines[-1].get_xydata()
        seen = ~np.isnan(Y[k])
        np.testing.assert_allclose(points, np.c_[HOURS[k], Y[k]][seen], rtol=1e-6)
        assert axis.lines[0].get_xdata()[-1] == pytest.approx(HOURS[k, -1])
    plt.close("all")


@pytest.mark.slow
def test_data_belong_to_the_state_that_is_named():
    tree = fit("integrated")
    shown = [len(axis.lines[-1].get_xdata()) for axis in plot_paths(tree, data="y", data_state=1)]
    assert shown == [0, 3, 0, 4, 0, 4]
    plt.close("all")


def test_transform_is_applied_to_draws_not_to_data():
    draws = np.random.default_rng(0).normal(size=(200, 5))
    axis = plot_paths({"x": draws}, times=np.arange(5.0), data=np.ones(5), transform=np.exp)
    median = axis.lines[0].get_ydata()
    np.testing.assert_allclose(median, np.median(np.exp(draws), axis=0))
    np.testing.assert_allclose(axis.lines[-1].get_ydata(), 1.0)
    plt.close("all")


def table():
    return {
        "who": ["ann"] * 4 + ["bob"] * 2,
        "when": [
            "2026-03-01T08:00",
            "2026-03-01T09:00",
            "2026-03-01T12:00",
            "2026-03-02T08:00",
            "2026-03-05T08:00",
            "2026-03-05T10:00",
        ],
        "y": [1.0, 2.0, 3.0, 2.0, 1.0, 2.0],
    }


@pytest.mark.parametrize("dates", [True, False])
def test_a_table_gives_its_calendar_to_every_clock(dates):
    """Also to the path's finer grid; the filling of the shorter series is at no time."""
    rows = table()
    if not dates:
        rows["when"] = [0.0, 1.0, 4.0, 24.0, 0.0, 2.0]
    panel = from_long(rows, id="who", time="when", value="y", unit="hour", origin="first")
    grid = nsde.TimeGrid(panel.times, max_step=1.0)

    def walk(y):
        numpyro.sample("unused", dist.Normal(0.0, 1.0))
        ou = nsde.processes.OrnsteinUhlenbeck(0.3, 1.0, 0.5)
        with numpyro.plate("who", 2):
            x = numpyro.sample("x", nsde.SDEPath(ou, grid, dist.Normal(0.0, 1.0)))
            nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y, at=grid.index)

    treated = nsde.handlers.marginalize(walk, method=nsde.filters.Kalman())
    draws = {"unused": np.zeros(5)}
    tree = to_arviz(draws, model=treated, model_args=(panel.values,), times=panel, smooth=True)
    first, second = plot_paths(tree, data="y")
    assert (first.get_title(), second.get_title()) == ("who ann", "who bob")
    assert first.get_xlabel() == ("time" if dates else "time (hours)")
    values = tree["posterior"]["x"].coords["time_x_value"].values
    bob = values[1][~np.isnat(values[1])] if dates else values[1][~np.isnan(values[1])]
    last = np.datetime64("2026-03-05T10:00") if dates else 2.0
    assert bob[-1] == last
    assert second.lines[-1].get_xdata().shape == (2,)
    for axis in (first, second):
        axis.figure.canvas.draw()  # ticks are made now
    plt.close("all")
