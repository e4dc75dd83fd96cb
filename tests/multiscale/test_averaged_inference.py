"""An averaged SDE in the engines: posteriors of its parameters, direct and through noise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import systems
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO

import numpyro_sde as nsde
from numpyro_sde.multiscale import ScalarFast

TIMES = np.arange(401) * 0.1
TABLE = (-3.0, 3.0, 48)


def averaged(v, s):
    full = nsde.SlowFastSDE(**systems.landau().functions, epsilon=0.01, params={"s": s, "v": v})
    return nsde.average(full, ScalarFast(-7.0, 7.0), table=TABLE)


def closed(v, s):
    return nsde.SDE(
        lambda t, x, p: (1.0 - p["v"]) * x - x**3,
        lambda t, x, p: p["s"],
        params={"v": v, "s": s},
    )


def direct(make, x):
    v = numpyro.sample("v", dist.Uniform(0.0, 1.0))
    s = numpyro.sample("s", dist.LogNormal(-1.0, 1.0))
    numpyro.sample("x", nsde.SDEPath(make(v, s), TIMES, init=0.5), obs=x)


def noisy(make, y):
    v = numpyro.sample("v", dist.Uniform(0.0, 1.0))
    x = numpyro.sample("x", nsde.SDEPath(make(v, 0.3), TIMES[:81], init=dist.Normal(0.5, 0.1)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)


def potential_and_gradient(model, *args, value):
    """Log density and gradient of a model at one point."""

    def log_density(value):
        return numpyro.infer.util.log_density(model, args, {}, value)[0]

    return jax.jit(jax.value_and_grad(log_density))(value)


@pytest.mark.slow
def test_nuts_and_a_flow_have_the_posterior_of_the_closed_form():
    path = nsde.SDEPath(closed(0.3, 0.3), TIMES, init=0.5).sample(jax.random.key(2))
    draws = {}
    for make in (averaged, closed):
        mcmc = MCMC(NUTS(direct), num_warmup=300, num_samples=1000, progress_bar=False)
        mcmc.run(jax.random.key(0), make, path)
        draws[make] = mcmc.get_samples()
    guide = nsde.guides.AutoFlow(direct)
    svi = SVI(direct, guide, numpyro.optim.Adam(5e-3), Trace_ELBO(num_particles=4))
    params = svi.run(jax.random.key(0), 1000, averaged, path, progress_bar=False).params
    draws["flow"] = guide.sample_posterior(
        jax.random.key(1), params, averaged, path, sample_shape=(1000,)
    )
    for name in ("v", "s"):
        want = np.asarray(draws[closed][name])
        error = want.std() / np.sqrt(200)  # 1000 draws, a fifth of them effective at worst
        for key in (averaged, "flow"):
            got = np.asarray(draws[key][name])
            # A trained flow adds its own error, allowed a quarter of a standard deviation.
            slack = 4 * error if key is averaged else 4 * error + 0.25 * want.std()
            assert abs(got.mean() - want.mean()) < slack
            assert got.std() == pytest.approx(want.std(), rel=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("treatment", ["marginalize", "guided", "whitened"])
def test_noisy_sparse_data_have_the_likelihood_of_the_closed_form(treatment):
    """Values and gradients, under each treatment of the latent path."""
    full = nsde.SDEPath(closed(0.3, 0.3), TIMES[:81], init=0.5).sample(jax.random.key(3))
    y = jnp.where(jnp.arange(81) % 10 == 0, full, jnp.nan)
    treat = {
        "marginalize": lambda m: nsde.handlers.marginalize(m, method=nsde.filters.ExtendedKalman()),
        "guided": lambda m: numpyro.handlers.reparam(m, config={"x": nsde.reparam.GuidedReparam()}),
        "whitened": lambda m: numpyro.handlers.reparam(
            m, config={"x": nsde.reparam.InnovationReparam()}
        ),
    }[treatment]
    model = treat(noisy)
    trace = numpyro.handlers.trace(numpyro.handlers.seed(model, 0)).get_trace(closed, y)
    value = {
        k: s["value"]
        for k, s in trace.items()
        if s["type"] == "sample" and not s["is_observed"] and k != "x"
    }
    value["v"] = jnp.asarray(0.35)
    got = potential_and_gradient(model, averaged, y, value=value)
    want = potential_and_gradient(model, closed, y, value=value)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-3)
    for name in want[1]:
        np.testing.assert_allclose(got[1][name], want[1][name], rtol=0.02, atol=0.02)


def test_the_averaged_drift_is_reported_from_draws():
    rng = np.random.default_rng(0)
    draws = {"v": rng.normal(0.3, 0.02, 200), "s": rng.normal(0.3, 0.01, 200)}
    states = np.linspace(-1.0, 1.0, 5)
    bands = nsde.diagnostics.averaged_drift(
        draws, lambda s: averaged(s["v"], s["s"]), states, path=np.array([0.5])
    )
    np.testing.assert_allclose(bands.median, systems.landau_drift(states), atol=0.01)
    assert "Not identified" in bands.note
