"""NUTS with the innovations' free motion done exactly: integrator, trees, posteriors."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.flatten_util import ravel_pytree
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS
from numpyro.infer.hmc_util import IntegratorState, euclidean_kinetic_energy, velocity_verlet

import numpyro_sde as nsde
from numpyro_sde.infer.split_nuts import _turning, split_step

SITES = ("x_innov",)


def bent(z):
    """Not Gaussian, coupled."""
    coupling = jnp.sum(jnp.sin(z["a"]) * z["x_innov"][:2])
    return 0.5 * jnp.sum(z["x_innov"] ** 2) + jnp.sum(jnp.cosh(z["a"])) + coupling


def state_of(potential, z, r):
    value, gradient = jax.value_and_grad(potential)(z)
    return IntegratorState(z, r, value, gradient)


def point(seed):
    draw = np.random.default_rng(seed).normal
    return {"a": jnp.asarray(draw(size=2)), "x_innov": jnp.asarray(draw(size=3))}


INVERSE_MASS = {("a",): np.array([[1.5, 0.4], [0.4, 0.7]]), SITES: np.ones(3)}


def test_a_standard_normal_is_moved_exactly(x64):
    z, r = (point(seed)["x_innov"] for seed in (0, 1))
    potential = lambda z: 0.5 * jnp.sum(z["x_innov"] ** 2)  # noqa: E731
    before = state_of(potential, {"x_innov": z}, {"x_innov": r})
    after = split_step(potential, SITES)(0.9, {SITES: jnp.ones(3)}, before)
    np.testing.assert_allclose(after.z["x_innov"], np.cos(0.9) * z + np.sin(0.9) * r, atol=1e-14)
    np.testing.assert_allclose(after.r["x_innov"], np.cos(0.9) * r - np.sin(0.9) * z, atol=1e-14)


def test_a_step_is_reversible_and_keeps_volume(x64):
    step = split_step(bent, SITES)
    both, back = ravel_pytree((point(0), point(1)))

    def move(flat, size):
        after = step(size, INVERSE_MASS, state_of(bent, *back(flat)))
        return ravel_pytree((after.z, after.r))[0]

    there = move(both, 0.4)
    assert np.max(np.abs(there - both)) > 0.1
    np.testing.assert_allclose(move(there, -0.4), both, atol=1e-13)
    np.testing.assert_allclose(jnp.linalg.det(jax.jacobian(move)(both, 0.4)), 1.0, atol=1e-12)


@pytest.mark.parametrize("forward", [False, True])
def test_without_innovations_it_is_the_leapfrog_step(forward, x64):
    start = state_of(bent, point(0), point(1))
    ours = split_step(bent, (), forward)(0.3, INVERSE_MASS, start)
    theirs = velocity_verlet(bent, euclidean_kinetic_energy)[1](0.3, INVERSE_MASS, start)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-14)


def test_trees_see_that_they_turn():
    """A tree on a circle turns where sin(N h) < 0; doubling must not step over that half."""
    for step in np.linspace(0.06, 2.0, 500):
        h = float(_turning(jnp.asarray(step)))
        spans = h * (2.0 ** np.arange(1, 7) - 1)
        first = spans[spans > np.pi][0]
        assert first < 2 * np.pi * 0.96
        assert h <= 1.2 + 1e-6
        assert h / min(step, 1.2) < 1.3


def linear(y):
    """A Gaussian posterior: theta and 200 innovations of which the data see little."""
    theta = numpyro.sample("theta", dist.Normal(0.0, 10.0))
    z = numpyro.sample("x_innov", dist.Normal(jnp.zeros(200), 1.0))
    numpyro.deterministic("twice", 2.0 * theta)
    numpyro.sample("y", dist.Normal(theta + 0.1 * z.sum() / np.sqrt(200), 0.5), obs=y)


@pytest.fixture(scope="module")
def fitted():
    y = jnp.array([1.0, 2.0, 0.5])
    mcmc = MCMC(
        nsde.infer.SplitNUTS(linear),
        num_warmup=300,
        num_samples=1000,
        num_chains=2,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), y, extra_fields=("num_steps", "diverging"))
    return mcmc, y


def test_gaussian_posterior_and_short_trees(fitted):
    mcmc, y = fitted
    draws = mcmc.get_samples(group_by_chain=True)
    theta = np.asarray(draws["theta"])
    # y mean = theta + 0.1 s + noise, s standard normal: conjugate.
    variance = 1.0 / (1.0 / 100.0 + 1.0 / (0.25 / 3 + 0.01))
    mean = variance * float(jnp.mean(y)) / (0.25 / 3 + 0.01)
    ess = effective_sample_size(theta)
    assert abs(theta.mean() - mean) < 4 * np.sqrt(variance / ess)
    ess = effective_sample_size((theta - mean) ** 2)
    assert abs(np.mean((theta - mean) ** 2) / variance - 1) < 4 * np.sqrt(2 / ess)
    z = np.asarray(draws["x_innov"])
    # Means of 200 nearly independent normals over at least 500 effective draws each.
    assert np.max(np.abs(z.mean((0, 1)))) < 5 / np.sqrt(500)
    assert abs(z.var() - 1) < 4 * np.sqrt(2 / (200 * 500))
    fields = mcmc.get_extra_fields()
    assert np.max(fields["num_steps"]) <= 7
    assert not np.any(fields["diverging"])
    np.testing.assert_allclose(draws["twice"], 2 * theta, rtol=1e-6)


@pytest.mark.slow
def test_goes_on_after_pickling(fitted):
    mcmc, y = fitted
    again = pickle.loads(pickle.dumps(mcmc))
    again.post_warmup_state = again.last_state
    again.num_samples = 50
    again.run(jax.random.key(1), y, extra_fields=("adapt_state.step_size", "i"))
    assert again.get_samples()["theta"].shape == (100,)
    size = np.asarray(again.get_extra_fields()["adapt_state.step_size"])
    np.testing.assert_array_equal(size[0], size[-1])
    assert np.abs(again.get_samples()["theta"].mean() - mcmc.get_samples()["theta"].mean()) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.01, 0.1, 1.0])
def test_innovations_of_a_linear_model_are_standard_normal_and_trees_short(noise):
    """The guide of a linear model is exact: 1,000 observations, trees of at most seven steps."""
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.uniform(0.05, 0.15, 1000))
    truth = nsde.processes.OrnsteinUhlenbeck(1.0, 0.3, 0.7)
    states = nsde.SDEPath(truth, times, dist.Normal(0.3, 0.5)).sample(jax.random.key(1))
    y = np.asarray(states) + noise * rng.normal(size=1000)

    def model(y):
        rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.7))
        scale = numpyro.sample("scale", dist.LogNormal(-0.5, 0.7))
        sde = nsde.processes.OrnsteinUhlenbeck(rate, 0.3, scale)
        x = numpyro.sample("x", nsde.SDEPath(sde, times, dist.Normal(0.3, 1.0)))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, noise), obs=y)

    guided = numpyro.handlers.reparam(model, config={"x": nsde.reparam.GuidedReparam()})
    mcmc = MCMC(nsde.infer.SplitNUTS(guided), num_warmup=300, num_samples=1000, progress_bar=False)
    mcmc.run(jax.random.key(0), y, extra_fields=("num_steps",))
    assert np.max(mcmc.get_extra_fields()["num_steps"]) <= 7
    draws = {name: np.asarray(value) for name, value in mcmc.get_samples().items()}
    z = draws["x_innov"]
    ess = float(np.median([effective_sample_size(z[None, :, i]) for i in range(0, 999, 50)]))
    assert abs(z.mean()) < 4 / np.sqrt(z.shape[1] * ess)
    squares = [effective_sample_size(z[None, :, i] ** 2) for i in range(0, 999, 50)]
    assert abs(np.mean(z**2) - 1) < 4 * np.sqrt(2 / (z.shape[1] * np.median(squares)))
    exact = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())
    reference = MCMC(NUTS(exact), num_warmup=300, num_samples=2000, progress_bar=False)
    reference.run(jax.random.key(1), y)
    for name, other in reference.get_samples().items():
        a, b = np.log(draws[name]), np.log(np.asarray(other))
        sizes = [float(effective_sample_size(v[None])) for v in (a, b)]
        assert abs(a.mean() - b.mean()) < 4 * np.sqrt(a.var() / sizes[0] + b.var() / sizes[1])


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="model must be a function"):
        nsde.infer.SplitNUTS(3)
    with pytest.raises(TypeError, match="surplus"):
        nsde.infer.SplitNUTS(linear, surplus=1)
    for options in ({"innovations": ("z",)}, {"innovations": ()}):
        kernel = nsde.infer.SplitNUTS(linear, **options)
        with pytest.raises(ValueError, match="no latent sites of the model, which has"):
            kernel.init(jax.random.key(0), 10, None, (1.0,), {})


@pytest.mark.slow
def test_progress_says_what_comes_before_the_bar(capsys, monkeypatch):
    for name in ("CI", "PYTEST_XDIST_WORKER"):  # there NumPyro shows no bar
        monkeypatch.delenv(name, raising=False)

    def model(y):
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
        sde = nsde.processes.OrnsteinUhlenbeck(1.0, 0.0, scale)
        x = numpyro.sample("x", nsde.SDEPath(sde, np.arange(4.0), dist.Normal(0.0, 1.0)))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)

    guided = numpyro.handlers.reparam(model, config={"x": nsde.reparam.GuidedReparam()})
    for shown in (False, True):
        kernel = nsde.infer.SplitNUTS(guided)
        mcmc = MCMC(kernel, num_warmup=2, num_samples=2, progress_bar=shown)
        mcmc.run(jax.random.key(0), np.array([0.5, 0.1, -0.2, 0.3]))
        told = capsys.readouterr().err
        assert ("looking for the mode along guided paths ... " in told) == shown
        assert ("compiling the sampler" in told) == shown
