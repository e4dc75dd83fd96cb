"""Names of dimensions stand where plain `arviz.from_numpyro` looks for them."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.handlers import reparam, seed, trace
from numpyro.infer import MCMC, NUTS

import numpyro_sde as nsde


def model(y):
    with numpyro.plate("series", 2):
        rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
        sde = nsde.SDE(lambda t, x, p: -p * x, lambda t, x, p: jnp.ones(2), params=rate)
        init = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
        x = numpyro.sample("x", nsde.SDEPath(sde, np.arange(4.0), init))
        nsde.observe("y", x, lambda t, x: dist.Normal(x[0], 1.0), obs=y)
        two = np.zeros((2, 2, 2))
        nsde.observe("z", x, lambda t, x: dist.Normal(x, 1.0).to_event(1), obs=two, at=[1, 3])
    ou = nsde.processes.OrnsteinUhlenbeck(1.0, 0.0, 1.0)
    w = numpyro.sample("w", nsde.SDEPath(ou, np.arange(6.0), dist.Normal(0.0, 1.0)))
    nsde.observe("v", w, lambda t, x: dist.Normal(x, 1.0), obs=np.zeros(6))


WHITENED = reparam(model, config={"x": nsde.reparam.InnovationReparam()})
MARGINAL = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())
DATA = {"y": ["time"], "z": ["time_z", "z_dim_0"], "v": ["time_v"]}
PATHS = {"x": ["time", "state"], "w": ["time_w"]}  # of another length, so a name of its own


@pytest.mark.parametrize(("treated", "paths"), [(model, PATHS), (WHITENED, PATHS), (MARGINAL, {})])
def test_paths_and_data_name_their_dimensions(treated, paths):
    sites = trace(seed(treated, 0)).get_trace(np.zeros((2, 4)))
    named = {name: site["infer"].get("event_dims") for name, site in sites.items() if name in DATA}
    assert named == DATA
    assert {name: sites[name]["infer"]["event_dims"] for name in paths} == paths


@pytest.mark.slow
def test_plain_from_numpyro_has_times_and_plates():
    arviz = pytest.importorskip("arviz")
    mcmc = MCMC(NUTS(WHITENED, max_tree_depth=2), num_warmup=2, num_samples=3, progress_bar=False)
    mcmc.run(jax.random.key(0), np.zeros((2, 4)))
    tree = arviz.from_numpyro(mcmc)
    assert tree["posterior"]["x"].dims == ("chain", "draw", "series", "time", "state")
    assert tree["observed_data"]["y"].dims == ("series", "time")
