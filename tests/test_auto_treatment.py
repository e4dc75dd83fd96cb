"""The choice of a treatment for each path."""

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers

import numpyro_sde as nsde
from numpyro_sde.reparam import GuidedReparam, auto

RNG = np.random.default_rng(11)
TIMES = np.cumsum(RNG.uniform(0.1, 0.4, 12))


def several(y=None, tracked=None):
    ou = nsde.processes.OrnsteinUhlenbeck(1.0, 0.0, 0.5)
    well = nsde.processes.DoubleWell(1.0, 1.0, 0.5)
    start = dist.Normal(0.0, 1.0)
    linear = numpyro.sample("linear", nsde.SDEPath(ou, TIMES, start))
    used = numpyro.sample("used", nsde.SDEPath(ou, TIMES, start))
    bistable = numpyro.sample("bistable", nsde.SDEPath(well, TIMES, start))
    numpyro.sample("unseen", nsde.SDEPath(well, TIMES, start))
    hermite = nsde.schemes.HermiteExpansion()
    expansion = nsde.SDEPath(well, TIMES, start, scheme=hermite)
    series = numpyro.sample("expansion", expansion)
    numpyro.sample("tracked", nsde.SDEPath(ou, TIMES, start), obs=tracked)
    for name, x in (("a", linear), ("b", used), ("c", bistable), ("d", series)):
        nsde.observe(name, x, lambda t, x: dist.Normal(x, 0.1), obs=y)
    numpyro.deterministic("end", used[-1])


@pytest.mark.slow
def test_auto_treats_each_path_by_its_structure():
    y = np.linspace(-1.0, 1.0, 12)
    model = auto(several)
    assert model.treatments(y, y) == {
        "linear": "integrated out",
        "used": "guided",
        "bistable": "guided",
        "unseen": "whitened",
        "expansion": "centred",
        "tracked": "observed",
    }
    sites = handlers.trace(handlers.seed(model, 0)).get_trace(y, y)
    assert "linear" not in sites
    assert {"used_guide", "bistable_guide", "unseen_innov", "expansion"} <= set(sites)
    assert auto(several, integrate=False).treatments(y, y)["linear"] == "guided"


def test_auto_names_the_engine():
    y = np.linspace(-1.0, 1.0, 12)
    told = auto(several).engine(y, y)
    assert told.startswith("infer.SplitNUTS; where the guide covers little")
    assert "infer.PMMH and nsde.evidence" in told

    def many(y=None):
        level = numpyro.sample("level", dist.Normal(0.0, 1.0).expand([9]).to_event(1))
        well = nsde.processes.DoubleWell(1.0, 1.0, 0.5)
        x = numpyro.sample("x", nsde.SDEPath(well, TIMES, dist.Normal(level.sum(), 1.0)))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)

    assert "infer.Tempered" in auto(many).engine(y)
    assert "PMMH" not in auto(many).engine(y)

    def unseen():
        well = nsde.processes.DoubleWell(1.0, 1.0, 0.5)
        numpyro.sample("x", nsde.SDEPath(well, TIMES, dist.Normal(0.0, 1.0)))

    assert auto(unseen).engine() == "infer.SplitNUTS"  # whitened

    def linear(y=None):
        ou = nsde.processes.OrnsteinUhlenbeck(1.0, 0.0, 0.5)
        x = numpyro.sample("x", nsde.SDEPath(ou, TIMES, dist.Normal(0.0, 1.0)))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)

    assert auto(linear).engine(y) == "numpyro.infer.NUTS"


def test_auto_needs_a_model():
    with pytest.raises(TypeError, match="auto needs the model, a function, got dict"):
        auto({"x": GuidedReparam()})
