"""Paths that start at a given state: support, bijection, and inference."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, log_likelihood
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.util import initialize_model
from oracles import joint_states

import numpyro_sde as nsde

TIMES = np.array([0.0, 0.2, 0.5, 0.9, 1.0])
DATA = np.array([0.1, 0.4, np.nan, 0.8, 0.6])
RATE, SCALE, NOISE = 1.0, 0.5, 0.2


def ou():
    return nsde.SDE(lambda t, x: -RATE * x, lambda t, x: SCALE)


def model(y=None):
    x = numpyro.sample("x", nsde.SDEPath(ou(), TIMES, init=0.7))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, NOISE), obs=y)


def latent_start(y=None):
    start = numpyro.sample("start", dist.Normal(0.0, 1.0))
    x = numpyro.sample("x", nsde.SDEPath(ou(), TIMES, init=start))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, NOISE), obs=y)


def smoothed(m0, P0):
    """Posterior mean and covariance of the Euler chain given DATA, by the dense normal law."""
    dt = np.diff(TIMES)[:, None, None]
    mean, cov = joint_states([m0], [[P0]], 1 - RATE * dt, 0 * dt[:, :, 0], SCALE**2 * dt)
    seen = ~np.isnan(DATA)
    gain = cov[:, seen] @ np.linalg.inv(cov[np.ix_(seen, seen)] + NOISE**2 * np.eye(seen.sum()))
    return mean + gain @ (DATA - mean)[seen], cov - gain @ cov[seen]


def assert_moments(draws, mean, cov):
    """Means and sds within 4 Monte Carlo standard errors, by each component's own ESS."""
    draws = np.asarray(draws, np.float64)
    ess = np.array([numpyro.diagnostics.effective_sample_size(c[None]) for c in draws.T])
    sd = np.sqrt(np.diag(cov))
    assert np.all(np.abs(draws.mean(0) - mean) < 4 * sd / np.sqrt(ess))
    assert np.all(np.abs(draws.std(0) / sd - 1) < 4 * 1.5 / np.sqrt(2 * ess))


def test_bijection_round_trip_and_jacobian(x64):
    start = jnp.array([[0.7, -0.3], [1.0, 2.0]])
    law = nsde.SDEPath(ou(), TIMES, init=dist.Delta(start, event_dim=1))
    bijection = dist.biject_to(law.support)
    free = jax.random.normal(jax.random.key(0), (2, 4, 2))
    path = bijection(free)
    assert path.shape == (2, 5, 2)
    np.testing.assert_array_equal(path[:, 0], start)
    np.testing.assert_allclose(bijection.inv(path), free)
    assert bijection.inverse_shape((2, 5, 2)) == free.shape
    assert bijection.forward_shape(free.shape) == (2, 5, 2)
    jacobian = bijection.log_abs_det_jacobian(free, path)
    np.testing.assert_array_equal(jacobian, jnp.zeros(2))
    assert np.all(law.support(path))
    moved = path.at[1, 0, 0].add(0.1)
    assert law.support(moved).tolist() == [True, False]
    assert np.isneginf(law.log_prob(moved)[1])
    feasible = law.support.feasible_like(path)
    assert np.all(law.support(feasible))
    leaves, treedef = jax.tree.flatten(law.support)
    assert np.all(jax.tree.unflatten(treedef, leaves)(path))


def test_the_first_state_is_not_a_free_coordinate(key):
    info = initialize_model(key, model, model_args=(DATA,))
    assert info.param_info.z["x"].shape == (4,)
    assert info.postprocess_fn(info.param_info.z)["x"][0] == jnp.float32(0.7)


def test_prior_draws_start_there(key):
    draws = Predictive(model, num_samples=7)(key)
    np.testing.assert_array_equal(draws["x"][:, 0], np.full(7, 0.7, np.float32))
    assert len(np.unique(np.asarray(draws["x"][:, 1]))) == 7
    draws = Predictive(latent_start, num_samples=7)(key)
    np.testing.assert_array_equal(draws["x"][:, 0], draws["start"])


def test_nuts_with_a_fixed_start(key):
    mcmc = MCMC(NUTS(model), num_warmup=300, num_samples=1500, progress_bar=False)
    mcmc.run(key, DATA)
    draws = np.asarray(mcmc.get_samples()["x"])
    np.testing.assert_array_equal(draws[:, 0], np.full(1500, 0.7, np.float32))
    mean, cov = smoothed(0.7, 0.0)
    assert_moments(draws[:, 1:], mean[1:], cov[1:, 1:])


@pytest.mark.slow
def test_nuts_with_a_latent_start(key):
    """Each draw of the path begins at its own draw of the start."""
    mcmc = MCMC(NUTS(latent_start), num_warmup=300, num_samples=1500, progress_bar=False)
    mcmc.run(key, DATA)
    draws = mcmc.get_samples()
    np.testing.assert_array_equal(draws["x"][:, 0], draws["start"])
    assert len(np.unique(np.asarray(draws["start"]))) > 1000
    mean, cov = smoothed(0.0, 1.0)
    assert_moments(draws["x"], mean, cov)
    pointwise = log_likelihood(latent_start, draws, y=DATA)["y"]
    assert np.all(np.isfinite(pointwise))
    replicated = Predictive(latent_start, draws)(key)["y"]
    assert replicated.shape == (1500, 5)


@pytest.mark.slow
def test_chains_side_by_side(key):
    mcmc = MCMC(NUTS(latent_start), num_warmup=5, num_samples=5, num_chains=2,
                chain_method="vectorized", progress_bar=False)  # fmt: skip
    mcmc.run(key, DATA)
    draws = mcmc.get_samples(group_by_chain=True)
    np.testing.assert_array_equal(draws["x"][..., 0], draws["start"])


def elbo_guide(fn, key):
    guide = AutoNormal(fn)
    result = SVI(fn, guide, numpyro.optim.Adam(0.02), Trace_ELBO()).run(
        key, 50, DATA, progress_bar=False
    )
    return result.losses, guide.sample_posterior(key, result.params, sample_shape=(6,))


def test_auto_normal_with_a_fixed_start(key):
    losses, draws = elbo_guide(model, key)
    assert np.all(np.isfinite(losses))
    np.testing.assert_array_equal(draws["x"][:, 0], np.full(6, 0.7, np.float32))


@pytest.mark.slow
def test_auto_normal_with_a_latent_start(key):
    """NumPyro's autoguides keep the support of their first trace: infinite loss, no wrong fit.

    Whitened, the path has no support that moves.
    """
    losses, _ = elbo_guide(latent_start, key)
    assert np.all(np.isposinf(losses))
    config = {"x": nsde.reparam.InnovationReparam()}
    losses, _ = elbo_guide(handlers.reparam(latent_start, config=config), key)
    assert np.all(np.isfinite(losses))
    assert losses[-10:].mean() < losses[:10].mean()


def test_a_plate_of_fixed_starts(key):
    starts = np.array([0.1, 0.2, 0.3], np.float32)

    def panel():
        with numpyro.plate("series", 3):
            init = dist.Delta(jnp.asarray(starts))
            numpyro.sample("x", nsde.SDEPath(ou(), TIMES, init=init))

    info = initialize_model(key, panel)
    assert info.param_info.z["x"].shape == (3, 4)
    np.testing.assert_array_equal(info.postprocess_fn(info.param_info.z)["x"][:, 0], starts)


def test_one_start_expanded_by_a_plate(key):
    def panel(y=None):
        with numpyro.plate("series", 3):
            x = numpyro.sample("x", nsde.SDEPath(ou(), TIMES, init=0.7))
            nsde.observe("y", x, lambda t, x: dist.Normal(x, NOISE), obs=y)

    info = initialize_model(key, panel, model_args=(np.zeros((3, 5)),))
    assert info.param_info.z["x"].shape == (3, 4)
    assert info.postprocess_fn(info.param_info.z)["x"].shape == (3, 5)
    drawn = handlers.trace(handlers.seed(panel, key)).get_trace()["x"]["value"]
    assert len(np.unique(np.asarray(drawn[:, -1]))) == 3


def test_conditioning_on_a_path_that_starts_elsewhere_has_no_density(key):
    conditioned = handlers.condition(handlers.seed(model, key), {"x": jnp.zeros(5)})
    site = handlers.trace(conditioned).get_trace()["x"]
    assert np.isneginf(site["fn"].log_prob(site["value"]))
