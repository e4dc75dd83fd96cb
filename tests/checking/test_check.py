"""A check approves a right model, names a poor guide, and the misfit of a wrong model."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.autoguide import AutoNormal

import numpyro_sde as nsde

pytestmark = pytest.mark.slow
BUDGET = 170.0  # seconds; each must end within three minutes


def level_model(times, flow):
    rate = numpyro.sample("rate", dist.LogNormal(np.log(0.1), 0.7))
    mean = numpyro.sample("mean", dist.Normal(9.0, 1.0))
    scale = numpyro.sample("scale", dist.LogNormal(np.log(0.5), 0.7))
    noise = numpyro.sample("noise", dist.LogNormal(0.0, 0.5))
    ou = nsde.processes.OrnsteinUhlenbeck(rate, mean, scale)
    start = dist.Normal(mean, scale / (2.0 * rate) ** 0.5)
    x = numpyro.sample("x", nsde.SDEPath(ou, times, init=start))
    nsde.observe("y", x, lambda t, x, sd: dist.Normal(x, sd), params=noise, obs=flow)


def well_model(grid, y):
    pull = numpyro.sample("pull", dist.LogNormal(0.0, 0.5))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    sde = nsde.processes.DoubleWell(pull, pull, scale)
    path = nsde.SDEPath(sde, grid, init=dist.Normal(0.0, 1.0), scheme=nsde.schemes.Euler())
    x = numpyro.sample("x", path)
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.2), obs=y, at=grid.index)


def white(model):
    reparam = nsde.reparam.InnovationReparam()
    return numpyro.handlers.reparam(model, config={"x": reparam, "again/x": reparam})


def test_approves_the_nile(tmp_path):
    nile = nsde.datasets.load_nile_flow()
    page = tmp_path / "nile.html"
    report = nsde.check(
        level_model, nile.times, nile.flow / 100.0, time_budget=BUDGET, report=page, progress=False
    )
    assert report.ok, report
    assert report["posterior calibration"].level == "good"
    assert report["sensitivity to grid"].words == "the transition is exact, whatever the step"
    assert report.seconds < 180.0
    assert "Use it" in page.read_text()


def test_names_a_poor_guide():
    grid = nsde.TimeGrid(np.arange(20.0), 0.1)
    law = nsde.SDEPath(nsde.processes.DoubleWell(1.0, 1.0, 0.7), grid, init=1.0)
    seen = np.asarray(law.sample(jax.random.key(5)))[grid.index]
    y = seen + 0.2 * np.random.default_rng(0).normal(size=seen.shape)
    report = nsde.check(
        well_model, grid, y, engine=AutoNormal, treat=white, time_budget=BUDGET, progress=False
    )
    assert not report.ok
    assert report["fit"].level == "bad"
    assert "k-hat" in report["fit"].words
    assert report["posterior calibration"].level == "bad"
    assert report["one-step residuals"].ok  # the model is right
    assert report.seconds < 180.0


def test_names_the_misfit_of_a_wrong_model():
    """The lynx cycle: a process that returns to its mean does not oscillate."""

    def model(times, y):
        rate = numpyro.sample("rate", dist.LogNormal(-1.0, 1.0))
        mean = numpyro.sample("mean", dist.Normal(6.5, 1.0))
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ou = nsde.processes.OrnsteinUhlenbeck(rate, mean, scale)
        start = dist.Normal(mean, scale / (2.0 * rate) ** 0.5)
        x = numpyro.sample("x", nsde.SDEPath(ou, times, init=start))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.2), obs=y)

    lynx = nsde.datasets.load_lynx()
    report = nsde.check(
        model, lynx.times, np.log(lynx.trappings), time_budget=BUDGET, progress=False
    )
    assert report["fit"].ok  # the engine is right
    assert report["posterior calibration"].ok
    assert report.failures == ["one-step residuals"]
    assert "serial dependence" in report["one-step residuals"].words
    assert report.seconds < 180.0
