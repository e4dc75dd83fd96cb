"""Start and metric for NUTS on guided paths."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS
from numpyro.infer.util import log_density

import numpyro_sde as nsde

Y = np.array([0.8, 0.9, 0.5, 0.7, 0.1, 0.0, -0.3, 0.2])


def model(y=None):
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
    sde = nsde.SDE(lambda t, x, p: -p * x, lambda t, x, p: 0.5, params=rate)
    times = np.arange(8) * 0.2
    path = nsde.SDEPath(sde, times, dist.Normal(0.0, 1.0), scheme=nsde.schemes.Euler())
    x = numpyro.sample("x", path)
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)


@pytest.mark.slow
def test_mode_and_curvature_are_those_of_the_marginal_model():
    with jax.enable_x64(True):
        options = nsde.infer.guided_metric(model, Y)
        exact = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())
        u = np.linspace(-3.0, 2.0, 2001)

        def log_joint(u):
            log_p, _ = log_density(exact, (Y,), {}, {"rate": jnp.exp(u)})
            return log_p + u

        values = np.asarray(jax.jit(lambda u: jax.lax.map(log_joint, u))(jnp.asarray(u)))
    best = int(np.argmax(values))
    mode = options["init_strategy"].keywords["values"]["rate"]
    assert abs(np.log(float(mode)) - u[best]) <= u[1] - u[0]
    step = 40  # of 0.0025: differences of 0.1
    curvature = (2 * values[best] - values[best - step] - values[best + step]) / 0.1**2
    np.testing.assert_allclose(options["inverse_mass_matrix"][("rate",)], 1 / curvature, rtol=0.02)
    assert options["dense_mass"] == [("rate",)]
    assert not options["adapt_mass_matrix"]


@pytest.mark.slow
def test_nuts_runs_with_them():
    guided = numpyro.handlers.reparam(model, config={"x": nsde.reparam.GuidedReparam()})
    kernel = NUTS(guided, **nsde.infer.guided_metric(model, Y))
    mcmc = MCMC(kernel, num_warmup=200, num_samples=2000, progress_bar=False)
    mcmc.run(jax.random.key(0), Y, extra_fields=("diverging",))
    exact = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())
    reference = MCMC(NUTS(exact), num_warmup=200, num_samples=2000, progress_bar=False)
    reference.run(jax.random.key(1), Y)
    a, b = (np.log(np.asarray(m.get_samples()["rate"])) for m in (mcmc, reference))
    ess = [float(numpyro.diagnostics.effective_sample_size(v[None])) for v in (a, b)]
    error = np.sqrt(a.var() / ess[0] + b.var() / ess[1])
    assert abs(a.mean() - b.mean()) < 4 * error
    assert int(mcmc.get_extra_fields()["diverging"].sum()) == 0


def test_a_model_without_parameters_is_refused():
    def known(y):
        sde = nsde.SDE(lambda t, x: -x, lambda t, x: 0.5)
        x = numpyro.sample("x", nsde.SDEPath(sde, [0.0, 0.1], dist.Normal(0.0, 1.0)))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)

    with pytest.raises(ValueError, match="no parameters besides its paths"):
        nsde.infer.guided_metric(known, Y[:2])
