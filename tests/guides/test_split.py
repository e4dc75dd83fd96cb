"""A flow over ordinary parameters, a normal law of low rank over weights of fields."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import SVI, Trace_ELBO

import numpyro_sde as nsde
from numpyro_sde.guides import AutoConjugate, AutoFlow, AutoPathGuide, AutoSplit

TIMES = np.array([0.0, 0.1, 0.2, 0.3])
Y = jnp.array([0.3, 0.1, 0.2, 0.4])


def latent(num, scheme=None):
    prior = nsde.fields.HSGP(1, 3.0, num)

    def model(y=None):
        f = prior.register("f", amplitude=dist.HalfNormal(1.0), length=1.0)
        sde = nsde.SDE(lambda t, x, p: p(x), lambda t, x, p: 0.5, params=f)
        x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 0.5), scheme=scheme))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)

    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num", "weights", "kind"),
    [(60, "low_rank", AutoSplit), (10, "flow", AutoFlow), (60, "auto", AutoConjugate)],
)
def test_path_guides_treat_weights_apart(num, weights, kind):
    """Whatever their law, started at the mode; posterior draws have all sites."""
    model = latent(num)
    guide = AutoPathGuide(model, weights=weights)
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO())
    fit = svi.run(jax.random.key(0), 20, Y, progress_bar=False)
    assert isinstance(guide.parameters, kind)
    assert np.isfinite(fit.losses).all()
    draws = guide.sample_posterior(jax.random.key(1), fit.params, Y, sample_shape=(3,))
    assert draws["f/z"].shape == (3, num)
    assert draws["f/amplitude"].shape == (3,)


@pytest.mark.slow
@pytest.mark.parametrize(("num", "kind"), [(60, AutoSplit), (10, AutoFlow)])
def test_what_is_not_linear_has_a_flow_or_a_law_of_low_rank(num, kind):
    """A scheme whose mean is not linear in the weights: above 50 of them a law of low rank."""
    guide = AutoPathGuide(latent(num, nsde.schemes.LocalLinear()))
    with numpyro.handlers.seed(rng_seed=0):
        guide(Y)
    assert isinstance(guide.parameters, kind)


def test_names_that_are_no_sites_are_refused():
    with pytest.raises(ValueError, match="weights must be a list"):
        AutoSplit(latent(3), "f/z")
    guide = AutoSplit(lambda: numpyro.sample("a", dist.Normal(0.0, 1.0)), ["f/z"])
    with pytest.raises(ValueError, match="are no latent sites"), numpyro.handlers.seed(rng_seed=0):
        guide()
