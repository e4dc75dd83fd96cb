"""What `numpyro.render_model` draws: paths and instruments as nodes, with what they depend on."""

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.inspect import get_model_relations

import numpyro_sde as nsde


def model(y):
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
    with numpyro.plate("series", 2):
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
        ou = nsde.processes.OrnsteinUhlenbeck(rate, 0.3, scale)
        x = numpyro.sample("x", nsde.SDEPath(ou, np.arange(3.0), dist.Normal(0.0, 1.0)))
        sd = numpyro.sample("sd", dist.HalfNormal(1.0))
        nsde.observe("y", x, lambda t, x, sd: dist.Normal(x, sd), params=sd, obs=y)


def relations(treated):
    return get_model_relations(treated, model_args=(np.zeros((2, 3)),))


def test_a_path_hangs_on_parameters_and_an_instrument_on_the_path():
    found = relations(model)
    assert found["sample_sample"]["x"] == ["rate", "scale"]
    assert found["sample_sample"]["y"] == ["x", "sd"]
    assert found["sample_dist"]["x"] == "SDEPath"
    assert found["observed"] == ["y"]
    assert found["plate_sample"] == {"series": ["scale", "x", "sd", "y"]}


def test_a_whitened_path_hangs_on_its_shocks():
    white = numpyro.handlers.reparam(model, config={"x": nsde.reparam.InnovationReparam()})
    found = relations(white)
    assert found["sample_sample"]["x"] == ["rate", "scale", "x_init", "x_innov"]
    assert found["sample_sample"]["y"] == ["x", "sd"]


@pytest.mark.parametrize(
    "treat",
    [nsde.reparam.auto, lambda m: nsde.handlers.marginalize(m, method=nsde.filters.Kalman())],
    ids=["auto", "marginalize"],
)
def test_an_instrument_of_a_path_integrated_out_hangs_on_parameters(treat):
    found = relations(treat(model))
    assert found["sample_sample"]["y"] == ["rate", "scale", "sd"]
    assert "x" not in found["sample_sample"]
