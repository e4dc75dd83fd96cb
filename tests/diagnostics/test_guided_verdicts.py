"""Chains along guided paths with several modes: the verdict flags what is wrong."""

import jax
import multimodal
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC

import numpyro_sde as nsde
from numpyro_sde.diagnostics import compare_fits, to_arviz

CASES = {"well": multimodal.well, "abs": multimodal.folded, "fhn": multimodal.neuron}


def guided_fit(name, seed, chains=1, draws=300):
    guided = numpyro.handlers.reparam(CASES[name], config={"x": nsde.reparam.GuidedReparam()})
    mcmc = MCMC(
        nsde.infer.SplitNUTS(guided, max_tree_depth=7), num_warmup=150, num_samples=draws,
        num_chains=chains, chain_method="vectorized", progress_bar=False,
    )  # fmt: skip
    mcmc.run(jax.random.key(seed), multimodal.data(name), extra_fields=("diverging",))
    return mcmc


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_no_wrong_fit_is_called_good(name):
    mcmc = guided_fit(name, seed=0)
    tree = to_arviz(mcmc, log_likelihood=False)
    text = compare_fits({"guided": tree}).verdicts["guided"]
    reference = multimodal.REFERENCE[name]
    scale = np.asarray(mcmc.get_samples()["scale"])
    if name == "abs":
        x = np.asarray(mcmc.get_samples()["x"])[:, multimodal.ABS_GRID.index]
        assert (x[:, 3] > 0).mean() in (0.0, 1.0)  # one half alone, where the truth is 0.5
        wrong = True
    elif name == "well":
        wrong = abs(scale.mean() - reference["scale_mean"]) > 0.1 * reference["scale_sd"]
    else:
        mean, sd = reference["scale"]
        wrong = abs(scale.mean() - mean) > 0.1 * sd
    assert not wrong or text.startswith(("check it by another engine", "do not trust"))


@pytest.mark.slow
def test_a_guide_that_covers_is_called_good():
    """A double well seen often, on one side: one mode, and nearly linear there."""
    y = 1.0 + 0.15 * np.random.default_rng(0).normal(size=12)

    def often(y=None):
        scale = numpyro.sample("scale", dist.LogNormal(-1.0, 0.3))
        well = nsde.processes.DoubleWell(1.0, 1.0, scale)
        x = numpyro.sample("x", nsde.SDEPath(well, 0.25 * np.arange(12), dist.Normal(1.0, 0.2)))
        nsde.observe("y", x, multimodal.noisy, obs=y)

    guided = numpyro.handlers.reparam(often, config={"x": nsde.reparam.GuidedReparam()})
    mcmc = MCMC(nsde.infer.SplitNUTS(guided), num_warmup=300, num_samples=1000, progress_bar=False)
    mcmc.run(jax.random.key(0), y)
    tree = to_arviz(mcmc, log_likelihood=False)
    attrs = tree["posterior"].attrs
    assert attrs["guide_efficiency"] > 0.3
    assert attrs["guide_khat"] < 0.7
    assert compare_fits({"guided": tree}).verdicts["guided"].startswith("use it")
