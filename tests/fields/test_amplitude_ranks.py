"""Calibration of a learned drift's amplitude: 200 data sets of the prior, weights collapsed."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import NUTS

import numpyro_sde as nsde

PRIOR = nsde.fields.HSGP(dim=1, box=3.0, num=10)
TIMES = np.arange(301) * 0.05


def model(x=None):
    """A double well whose unknown part has an unknown amplitude; `x - x^3` is known."""
    f = PRIOR.register("f", amplitude=dist.LogNormal(0.5, 0.5), length=1.0)
    scale = numpyro.sample("scale", dist.LogNormal(-0.3, 0.2))
    sde = nsde.SDE(
        lambda t, x, p: p["f"](x) + x - x**3, lambda t, x, p: p["s"], params={"f": f, "s": scale}
    )
    path = nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 0.5))
    numpyro.sample("x", path, obs=x)


@pytest.mark.slow
def test_ranks_of_the_amplitude_are_uniform():
    """Simulation-based calibration: 200 replicates (key 0), one compiled chain of 300 + 600 draws.

    Data are drawn with their weights, by the model itself; NUTS sees the amplitude and the noise
    alone. The test of uniformity is the library's, at its level of 0.05.
    """
    collapsed = nsde.handlers.collapse(model, "f")
    run = nsde.diagnostics.compiled_chain(NUTS(collapsed), 300, 600)

    def fit(key, data):
        return run(key, jnp.asarray(data["x"]))

    result = nsde.diagnostics.sbc(
        model, fit, 200, data="x", var_names=["f/amplitude", "scale"], progress=False
    )
    print(result.table())
    assert result.ok
    assert not len(result.failures)
