"""Twelve patients on clocks of their own, one dose each: the log density against dense laws."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.util import log_density

import numpyro_sde as nsde

AT = json.loads((Path(__file__).parent / "shapes_reference.json").read_text())[
    "theophylline_loglik_at"
]


def theophylline(data):
    """Absorption with random effects on the rates; system noise on the concentration."""
    mu = numpyro.sample("mu", dist.Normal(jnp.array(AT["mu"]), 1.0))
    omega = numpyro.sample("omega", dist.HalfNormal(1.0).expand([3]))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    with numpyro.plate("subject", len(data.dose)):
        eta = numpyro.sample("eta", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
        ka, clearance, volume = jnp.moveaxis(jnp.exp(mu + omega * eta), -1, 0)
        sde = nsde.SDE(
            lambda t, x, p: jnp.stack([-p["ka"] * x[0], p["ka"] * x[0] / p["V"] - p["ke"] * x[1]]),
            lambda t, x, p: jnp.stack([jnp.zeros(()), p["sigma"]]),
            params={"ka": ka, "ke": clearance / volume, "V": volume, "sigma": sigma},
        )
        dose = nsde.doses(data.times[:, :1], data.dose[:, None])
        path = nsde.SDEPath(sde, data.times, init=jnp.zeros(2), events=[dose])
        x = numpyro.sample("x", path)
        nsde.observe(
            "y",
            x,
            lambda t, x, p: dist.Normal(x[1], p),
            params=noise,
            obs=data.concentration,
        )


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_the_log_density_of_all_patients():
    model = nsde.handlers.marginalize(theophylline, method=nsde.filters.Kalman())
    values = {name: jnp.asarray(AT[name]) for name in ("mu", "omega", "sigma", "noise", "eta")}
    log_joint, sites = log_density(model, (nsde.datasets.load_theophylline(),), {}, values)
    y = sites["y"]
    assert float(y["fn"].log_prob(y["value"]).sum()) == pytest.approx(AT["loglik"], abs=1e-10)
    assert float(log_joint) == pytest.approx(AT["log_joint"], abs=1e-10)
