"""BlackJAX's samplers under `numpyro.infer.MCMC`."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS

import numpyro_sde as nsde
from numpyro_sde.infer import BlackJAX

blackjax = pytest.importorskip("blackjax")

SCALES = np.array([0.1, 1.0, 20.0])


def gaussian():
    """Three unknowns of unequal scales, the first two correlated by 0.6, and a positive one."""
    numpyro.sample("x", dist.MultivariateNormal(jnp.arange(3.0), covariance()))
    numpyro.sample("s", dist.LogNormal(0.0, 0.5))


def covariance():
    cor = np.array([[1.0, 0.6, 0.0], [0.6, 1.0, 0.0], [0.0, 0.0, 1.0]])
    return cor * np.outer(SCALES, SCALES)


def run(kernel, draws, warmup=500, seed=0, args=(), **options):
    mcmc = MCMC(kernel, num_warmup=warmup, num_samples=draws, progress_bar=False, **options)
    fields = ("accept_prob", "num_steps", "adaptation.tuning.step_size")
    mcmc.run(jax.random.key(seed), *args, extra_fields=fields)
    return mcmc


def has_the_law(draws, bias=0.0):
    """Means and variances within 4 Monte Carlo errors, and a share of the variance for bias."""
    x = (np.asarray(draws["x"], np.float64) - np.arange(3.0)) / SCALES
    u = np.log(np.asarray(draws["s"], np.float64)) / 0.5
    for value in (*x.T, u):
        for moment, truth in ((value, 0.0), (value**2, 1.0)):
            error = moment.std() / np.sqrt(effective_sample_size(moment[None]))
            assert abs(moment.mean() - truth) < 4 * error + bias


def walk(f):
    scales = jnp.array([0.5, 0.1, 0.9, 20.0])  # of s and x
    return blackjax.additive_step_random_walk(f, blackjax.mcmc.random_walk.normal(scales))


SLOW = [
    (BlackJAX(gaussian), 2000, 0.0),
    (BlackJAX(gaussian, "hmc", num_steps=8), 4000, 0.0),
    (BlackJAX(gaussian, "nuts", dense_mass=True), 4000, 0.0),
    (BlackJAX(gaussian, blackjax.multinomial_hmc, num_steps=8), 4000, 0.0),
    (BlackJAX("adjusted_mclmc", gaussian, num_steps=4), 8000, 0.0),
    (BlackJAX(gaussian, walk, steps_per_draw=20), 8000, 0.0),
]


@pytest.mark.parametrize(
    ("kernel", "draws", "bias"),
    [
        (BlackJAX(gaussian, "mclmc", steps_per_draw=5), 8000, 0.05),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW),
    ],
    ids=lambda value: str(value.algorithm)[:16] if isinstance(value, BlackJAX) else "",
)
def test_draws_have_the_law_of_the_model(kernel, draws, bias):
    mcmc = run(kernel, draws, 1000)
    has_the_law(mcmc.get_samples(), bias)
    sizes = mcmc.get_extra_fields()["adaptation.tuning.step_size"]
    assert jnp.all(sizes == sizes[0])  # nothing adapts after warm-up


def test_adaptation_draw_by_draw_is_that_of_blackjax(x64):
    """Step size and mass matrix of BlackJAX's own warm-up with the same random numbers."""
    from numpyro_sde.interop.blackjax import make_adaptation, make_algorithm

    def log_density(x):
        return -0.5 * jnp.sum((x / SCALES) ** 2)

    key, start = jax.random.key(3), jnp.ones(3)
    theirs = blackjax.window_adaptation(blackjax.nuts, log_density, target_acceptance_rate=0.7)
    (_, wanted), _ = theirs.run(key, start, 150)
    algorithm = make_algorithm("nuts")
    adaptation = make_adaptation(algorithm, 150, None, False, 0.7)

    def step(now, inputs):
        inner, state = now
        key, i = inputs
        inner, report = algorithm.step(key, inner, log_density, state.tuning)
        return (inner, adaptation.update(state, i, inner.position, report)), None

    first = algorithm.init(start, log_density, key), adaptation.init(3, start.dtype)
    keys = jax.random.split(key, 150)
    (_, state), _ = jax.jit(lambda: jax.lax.scan(step, first, (keys, jnp.arange(150))))()
    np.testing.assert_allclose(state.tuning.step_size, wanted["step_size"], rtol=1e-3)
    mass = wanted["inverse_mass_matrix"]
    np.testing.assert_allclose(state.tuning.inverse_mass, mass, rtol=1e-3)


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped_also_after_pickling():
    kernel = BlackJAX(gaussian, "nuts")
    whole = run(kernel, 40, 50).get_samples()["x"]
    first = run(kernel, 20, 50)
    state, kernel = pickle.loads(pickle.dumps((first.last_state, kernel)))
    later = MCMC(kernel, num_warmup=50, num_samples=20, progress_bar=False)
    later.post_warmup_state = state
    later.run(state.rng_key)
    both = jnp.concatenate([first.get_samples()["x"], later.get_samples()["x"]])
    np.testing.assert_allclose(both, whole, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["nuts", "mclmc"])
def test_chains_in_one_program_are_different_draws_of_one_law(algorithm):
    kernel = BlackJAX(gaussian, algorithm)
    mcmc = run(kernel, 400, 300, num_chains=3, chain_method="vectorized")
    x = np.asarray(mcmc.get_samples(group_by_chain=True)["x"])
    assert x.shape == (3, 400, 3)
    assert len(np.unique(x[:, -1, 0])) == 3
    if algorithm == "nuts":
        assert numpyro.diagnostics.split_gelman_rubin(x).max() < 1.1


@pytest.mark.slow
def test_chains_one_after_another():
    mcmc = run(BlackJAX(gaussian), 100, 100, num_chains=2, chain_method="sequential")
    assert mcmc.get_samples(group_by_chain=True)["s"].shape == (2, 100)


@pytest.mark.slow
def test_a_path_model_agrees_with_nuts_of_numpyro():
    """Posterior means of an Ornstein-Uhlenbeck model, its path guided, 4 Monte Carlo errors."""
    times = np.arange(15.0) * 0.5
    y = np.random.default_rng(0).normal(size=15)

    def model(y):
        rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
        sde = nsde.processes.OrnsteinUhlenbeck(rate, 0.0, 1.0)
        x = numpyro.sample("x", nsde.SDEPath(sde, times, dist.Normal(0.0, 1.0)))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.5), obs=y)

    guided = numpyro.handlers.reparam(model, config={"x": nsde.reparam.GuidedReparam()})
    ours = run(BlackJAX(guided), 3000, args=(y,)).get_samples()
    theirs = MCMC(NUTS(guided), num_warmup=500, num_samples=3000, progress_bar=False)
    theirs.run(jax.random.key(1), y)
    assert ours["x"].shape == (3000, 15)
    for name in ("rate", "x"):
        a, b = (
            np.asarray(d[name], np.float64).reshape(3000, -1) for d in (ours, theirs.get_samples())
        )
        errors = [v.std(0) / np.sqrt([effective_sample_size(c[None]) for c in v.T]) for v in (a, b)]
        assert np.all(np.abs(a.mean(0) - b.mean(0)) < 4 * np.hypot(*errors))


@pytest.mark.slow
def test_a_block_of_gibbs_sees_what_other_blocks_did():
    """A correlated pair, each half updated by its own kernel."""
    from numpyro.infer.gibbs import Gibbs

    def pair():
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        numpyro.sample("b", dist.Normal(0.8 * a, 0.6))

    kernel = Gibbs([(BlackJAX(pair), ["a"]), (NUTS(pair), ["b"])])
    mcmc = MCMC(kernel, num_warmup=300, num_samples=6000, progress_bar=False)
    mcmc.run(jax.random.key(0))
    a, b = (np.asarray(mcmc.get_samples()[n], np.float64) for n in "ab")
    for value, truth in ((a * a, 1.0), (b * b, 1.0), (a * b, 0.8)):
        error = value.std() / np.sqrt(effective_sample_size(value[None]))
        assert abs(value.mean() - truth) < 4 * error


def test_a_potential_instead_of_a_model():
    kernel = BlackJAX(potential_fn=lambda z: 0.5 * jnp.sum(z**2), algorithm="nuts")
    mcmc = MCMC(kernel, num_warmup=100, num_samples=100, progress_bar=False)
    mcmc.run(jax.random.key(0), init_params=jnp.zeros(2))
    assert mcmc.get_samples().shape == (100, 2)
    with pytest.raises(ValueError, match="init_params"):
        mcmc.run(jax.random.key(0))


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((gaussian, "gibbs"), {}, ValueError, "algorithm must be one of"),
        ((gaussian, 3), {}, TypeError, "algorithm must be one of"),
        ((gaussian, blackjax.rmh), {}, TypeError, "algorithm must be one of"),
        (("mclmc",), {}, ValueError, "one of model and potential_fn"),
        ((gaussian,), {"step_size": -1.0}, ValueError, "step_size"),
        ((gaussian,), {"target_accept_prob": 1.5}, ValueError, "target_accept_prob"),
        ((gaussian,), {"steps_per_draw": 0}, ValueError, "steps_per_draw"),
        ((gaussian, "mclmc"), {"dense_mass": True}, ValueError, "dense_mass"),
    ],
)
def test_what_it_refuses(args, options, error, message):
    with pytest.raises(error, match=message):
        BlackJAX(*args, **options)


def test_one_unknown_is_too_few_for_microcanonical_algorithms():
    kernel = BlackJAX(lambda: numpyro.sample("x", dist.Normal(0.0, 1.0)), "mclmc")
    with pytest.raises(ValueError, match="at least 2 unknowns"):
        run(kernel, 10, 10)
