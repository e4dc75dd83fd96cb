"""The Gibbs block of hyperparameters and weights: its refusals, and its weights' law."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC
from numpyro.infer.gibbs import Gibbs

import numpyro_sde as nsde

PRIOR = nsde.fields.HSGP(dim=1, box=3.0, num=3)
TIMES = np.arange(6) * 0.2
X = np.array([0.3, 0.1, -0.2, 0.1, 0.4, 0.5])


def model(y=X):
    f = PRIOR.register("f", amplitude=dist.LogNormal(0.5, 0.3), length=1.0)
    sde = nsde.SDE(lambda t, x, p: p(x), lambda t, x, p: 0.5, params=f)
    x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 0.5)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 1e-3), obs=y)


@pytest.mark.slow
def test_weights_follow_their_law_given_the_path(x64):
    """A path that readings fix: weights and amplitude as NUTS on the collapsed model has them.

    4,000 sweeps and 4,000 draws; means and second moments at 4 standard errors of both.
    """
    blocks = [
        (nsde.infer.ConditionalSMC(model, num_particles=8), ["x"]),
        (nsde.infer.CollapsedField(model, "f"), None),
    ]
    mcmc = MCMC(Gibbs(blocks), num_warmup=300, num_samples=4000, progress_bar=False)
    mcmc.run(jax.random.key(0))
    got = mcmc.get_samples()

    def observed():
        f = PRIOR.register("f", amplitude=dist.LogNormal(0.5, 0.3), length=1.0)
        sde = nsde.SDE(lambda t, x, p: p(x), lambda t, x, p: 0.5, params=f)
        numpyro.sample("x", nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 0.5)), obs=X)

    collapsed = nsde.handlers.collapse(observed, "f")
    exact = MCMC(
        numpyro.infer.NUTS(collapsed), num_warmup=300, num_samples=4000, progress_bar=False
    )
    exact.run(jax.random.key(1))
    want = dict(exact.get_samples())
    want |= nsde.smooth(collapsed, want, rng_key=jax.random.key(2))
    for name in ("f/amplitude", "f/z"):
        for power in (1, 2):
            a, b = (np.asarray(d[name]).reshape(4000, -1) ** power for d in (got, want))
            error = np.sqrt(sum(s.var(0) / _ess(s) for s in (a, b)))
            assert np.all(np.abs(a.mean(0) - b.mean(0)) < 4 * error), (name, power)


def _ess(draws):
    from numpyro.diagnostics import effective_sample_size

    return np.array([effective_sample_size(column[None]) for column in draws.T])


def test_misuse_is_refused():
    with pytest.raises(TypeError, match="HMC or NUTS"):
        nsde.infer.CollapsedField(model, "f", numpyro.infer.SA)
    kernel = nsde.infer.CollapsedField(model, "f")
    with pytest.raises(ValueError, match=r"block of numpyro\.infer\.gibbs\.Gibbs"):
        kernel.init(jax.random.key(0), 1, None, (), {})
    with pytest.raises(TypeError, match="model must be a function"):
        nsde.infer.CollapsedField(jnp.zeros(2), "f")
