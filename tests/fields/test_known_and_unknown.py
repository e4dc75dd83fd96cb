"""Is there more in the drift than is known? Evidence of the known part alone, and with more."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS

import numpyro_sde as nsde

PRIOR = nsde.fields.HSGP(dim=1, box=2.5, num=16)
TIMES = np.arange(5001) * 0.02


def data(cubic):
    sde = nsde.SDE(lambda t, x: x - cubic * x**3 if cubic else -x, lambda t, x: 0.8)
    fine = nsde.SDEPath(sde, np.arange(50_001) * 0.002, init=0.5)
    return np.asarray(fine.sample(jax.random.key(0)), float)[::10]


def known(x):
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    sde = nsde.SDE(
        lambda t, x, p: -p["rate"] * x,
        lambda t, x, p: p["scale"],
        params={"rate": rate, "scale": scale},
    )
    numpyro.sample("x", nsde.SDEPath(sde, TIMES, init=float(x[0])), obs=x)


def with_unknown(x):
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    f = PRIOR.register("f", amplitude=dist.HalfNormal(3.0), length=dist.InverseGamma(5.0, 5.0))
    sde = nsde.SDE(
        lambda t, x, p: -p["rate"] * x + p["f"](x),
        lambda t, x, p: p["scale"],
        params={"rate": rate, "scale": scale, "f": f},
    )
    numpyro.sample("x", nsde.SDEPath(sde, TIMES, init=float(x[0])), obs=x)


def log_evidence(model, x):
    mcmc = MCMC(NUTS(model), num_warmup=500, num_samples=2000, progress_bar=False)
    mcmc.run(jax.random.key(2), x)
    found = nsde.evidence(mcmc, rng_key=jax.random.key(1))
    return found.log_evidence, found.error


@pytest.mark.slow
@pytest.mark.parametrize(("cubic", "more"), [(1.0, True), (0.0, False)])
def test_evidence_tells_whether_a_part_is_missing(cubic, more):
    """A double well taken for a linear pull, and a linear pull (100 units of time, seed 0)."""
    x = data(cubic)
    (alone, e1), (both, e2) = (
        log_evidence(known, x),
        log_evidence(nsde.handlers.collapse(with_unknown, "f"), x),
    )
    print(
        f"cubic {cubic}: known alone {alone:.2f} +- {e1:.2f}, with a field {both:.2f} +- {e2:.2f}"
    )
    assert (both - alone > 4 * np.hypot(e1, e2)) == more
    if not more:
        assert alone - both < 6.0  # what a field that is not needed costs
