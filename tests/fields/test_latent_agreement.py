"""A latent double well with a learned drift: four engines, one posterior of the drift."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, SVI, Trace_ELBO
from numpyro.infer.gibbs import Gibbs

import numpyro_sde as nsde

PRIOR = nsde.fields.HSGP(dim=1, box=3.0, num=8)
GRID = nsde.TimeGrid(np.arange(41) * 0.25, max_step=0.05)
AT = np.linspace(-1.4, 1.4, 15)


def model(y=None):
    f = PRIOR.register("f", amplitude=dist.LogNormal(1.0, 0.5), length=1.0)
    sde = nsde.SDE(lambda t, x, p: p(x), lambda t, x, p: 1.0, params=f)
    x = numpyro.sample("x", nsde.SDEPath(sde, GRID, dist.Normal(0.0, 1.0)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.2), obs=y, at=GRID.index[1:])


def data():
    sde = nsde.SDE(lambda t, x: 3.0 * (x - x**3), lambda t, x: 1.0)
    fine = nsde.SDEPath(sde, np.arange(4001) * 0.0025, init=1.0).sample(jax.random.key(2))
    noise = jax.random.normal(jax.random.key(3), (40,))
    return np.asarray(fine)[100::100] + 0.2 * np.asarray(noise)


@jax.jit
@jax.vmap
def values(z, amplitude):
    return PRIOR.from_weights(z, amplitude=amplitude, length=1.0).on(jnp.asarray(AT))


def gibbs(y):
    blocks = [
        (nsde.infer.ConditionalSMC(model, num_particles=32), ["x"]),
        (nsde.infer.CollapsedField(model, "f"), None),
    ]
    mcmc = MCMC(Gibbs(blocks), num_warmup=500, num_samples=6000, progress_bar=False)
    mcmc.run(jax.random.key(0), y)
    return mcmc


def split(y):
    guided = numpyro.handlers.reparam(model, config={"x": nsde.reparam.GuidedReparam()})
    mcmc = MCMC(nsde.infer.SplitNUTS(guided), num_warmup=400, num_samples=1500, progress_bar=False)
    mcmc.run(jax.random.key(1), y)
    return mcmc


def by_bound(y):
    guide = nsde.guides.AutoPathGuide(model, path=nsde.guides.ControlledPath((16,)), weights="flow")
    svi = SVI(model, guide, numpyro.optim.Adam(3e-3), Trace_ELBO(num_particles=8))
    fit = nsde.guides.fit_svi(svi, jax.random.key(2), 4000, y, progress_bar=False)
    return guide, fit.params


def by_updates(y):
    """Twelve conjugate updates of the weights, and 600 steps of SVI for the rest."""
    guide = nsde.guides.AutoPathGuide(model, path=nsde.guides.ControlledPath((16,)))
    svi = SVI(model, guide, numpyro.optim.Adam(3e-3), Trace_ELBO(num_particles=8))
    fit = nsde.guides.fit_conjugate(svi, jax.random.key(2), 12, y, progress_bar=False)
    return guide, fit.params


def standard_errors(draws):
    from numpyro.diagnostics import effective_sample_size

    ess = np.array([effective_sample_size(column[None]) for column in draws.T])
    return draws.std(0) / np.sqrt(ess)


@pytest.mark.slow
def test_gibbs_nuts_and_guides_agree_on_the_band():
    """Means within 0.15 posterior sds and 4 standard errors of each other, sds within 15 %."""
    y = data()
    chains = {"Gibbs": gibbs(y), "SplitNUTS": split(y)}
    bands = {
        name: np.asarray(values(d["f/z"], d["f/amplitude"]))
        for name, d in ((name, mcmc.get_samples()) for name, mcmc in chains.items())
    }
    errors = {name: standard_errors(draws) for name, draws in bands.items()}
    for name, fit in (("flow", by_bound), ("conjugate updates", by_updates)):
        guide, params = fit(y)
        drawn = guide.sample_posterior(jax.random.key(3), params, y, sample_shape=(4000,))
        bands[name] = np.asarray(values(drawn["f/z"], drawn["f/amplitude"]))
        errors[name] = bands[name].std(0) / np.sqrt(4000)
    sd = bands["SplitNUTS"].std(0)
    for name, draws in bands.items():
        gap = (draws.mean(0) - bands["SplitNUTS"].mean(0)) / sd
        error = np.hypot(errors[name], errors["SplitNUTS"]) / sd
        ratio = draws.std(0) / sd
        print(
            f"{name}: means off by {np.abs(gap).max():.3f} sds (error {error.max():.3f}), "
            f"sds {ratio.min():.3f} to {ratio.max():.3f}"
        )
        assert np.all(np.abs(gap) < 0.15 + 4 * error)
        assert np.all(np.abs(ratio - 1.0) < 0.15)
