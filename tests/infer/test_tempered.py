"""Parallel tempering: modes and evidence against closed forms, the ladder, runs that go on."""

import pickle

import jax
import jax.numpy as jnp
import multimodal
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC
from scipy import stats

import numpyro_sde as nsde
from numpyro_sde.infer import ladder, rotation
from numpyro_sde.infer.tempering_report import TemperingReport

DIM, APART, NARROW, SHARE = 3, 2.0, 0.2, 0.3


def two_modes():
    """A mixture of two normal likelihoods under a wide normal prior."""
    x = numpyro.sample("x", dist.Normal(0.0, 2.0).expand([DIM]).to_event(1))
    rate = numpyro.sample("rate", dist.Gamma(3.0, 2.0))
    sides = [dist.Normal(m, NARROW).log_prob(x).sum() for m in (-APART, APART)]
    logs = jnp.log(jnp.array([SHARE, 1.0 - SHARE]))
    numpyro.factor("data", jax.nn.logsumexp(jnp.stack(sides) + logs))
    numpyro.sample("count", dist.Poisson(rate), obs=4)


def exact_log_evidence():
    wide = np.sqrt(4.0 + NARROW**2)
    path = DIM * stats.norm(0.0, wide).logpdf(APART)
    return path + stats.nbinom(3, 2.0 / 3.0).logpmf(4)  # a gamma mixture of Poissons


@pytest.fixture(scope="module")
def ran():
    """Two chains side by side, each with a ladder of its own."""
    kernel = nsde.infer.Tempered(two_modes, num_levels=8)
    mcmc = MCMC(
        kernel, num_warmup=400, num_samples=3000, num_chains=2, chain_method="vectorized",
        progress_bar=False,
    )  # fmt: skip
    mcmc.run(jax.random.PRNGKey(0))
    return mcmc


def test_both_modes_are_found_in_their_shares(ran):
    report = ran.sampler.report(ran)
    assert report.round_trips > 100
    x = np.asarray(ran.get_samples()["x"])
    lower = x[:, 0] < 0.0
    assert np.all((x < 0.0).all(1) == lower)
    error = np.sqrt(SHARE * (1.0 - SHARE) / report.round_trips)
    assert abs(lower.mean() - SHARE) < 4.0 * error
    spread = np.abs(x[:, 0]).std()
    shrunk = NARROW * 2.0 / np.sqrt(4.0 + NARROW**2)
    by_chain = np.asarray(ran.get_samples(group_by_chain=True)["x"])[..., 0]
    size = numpyro.diagnostics.effective_sample_size(np.abs(by_chain))
    assert abs(spread - shrunk) < 4.0 * shrunk / np.sqrt(2.0 * size)
    rate = np.asarray(ran.get_samples()["rate"])
    by_chain = np.asarray(ran.get_samples(group_by_chain=True)["rate"])
    size = numpyro.diagnostics.effective_sample_size(by_chain)
    # A gamma posterior with shape 7 and rate 3.
    assert abs(rate.mean() - 7.0 / 3.0) < 4.0 * np.sqrt(7.0) / 3.0 / np.sqrt(size)


def test_the_evidence_is_right(ran):
    report = ran.sampler.report(ran)
    assert 0.0 < report.error < 0.1
    assert abs(report.log_evidence - exact_log_evidence()) < 4.0 * report.error
    assert not report.complaints()


def test_levels_and_steps_chose_themselves(ran):
    report = ran.sampler.report(ran)
    assert ran.last_state.betas.shape == (2, 8)
    assert report.betas[0] == 0.0
    assert report.betas[-1] == 1.0
    assert np.all(np.diff(report.betas) > 0.0)
    # Equal rejections, up to what a warm-up of 400 sweeps can see.
    assert report.rejections.max() < report.rejections.mean() + 0.15
    assert report.acceptance.min() > 0.6
    assert "round trips" in str(report)


def test_the_reference_has_the_quantiles_of_the_prior():
    def model():
        tau = numpyro.sample("tau", dist.HalfCauchy(1.0))
        numpyro.sample("z_innov", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("level", dist.Normal(3.0, 0.5 + 0.0 * tau))

    centre, reference = rotation.prior_reference(model, (), {}, jax.random.key(0))
    assert sorted(centre) == ["level", "tau", "z_innov"]  # as a pytree joins them
    logs = np.log(stats.halfcauchy.ppf([0.158655, 0.5, 0.841345]))
    np.testing.assert_allclose(reference.loc, [3.0, logs[1], 0.0, 0.0], atol=0.3)
    np.testing.assert_allclose(
        reference.spread, [0.5, 0.5 * (logs[2] - logs[0]), 1.0, 1.0], rtol=0.25
    )


def test_the_reference_alone_is_a_quarter_turn():
    steps = 5

    def flat(x):
        return rotation.Place(x, jnp.zeros(()), jnp.zeros(()), jnp.zeros_like(x))

    start = flat(jnp.ones(3))

    angle = rotation.quarter_turn(steps)
    end, accept = rotation.rotate(
        flat, steps, start, jnp.zeros(()), jnp.asarray(angle), jnp.ones(3), jax.random.key(2)
    )
    momentum = jax.random.normal(jax.random.split(jax.random.key(2))[0], (3,))
    np.testing.assert_allclose(end.x, momentum, atol=1e-5)
    assert accept == pytest.approx(1.0, abs=1e-5)


def test_moves_keep_a_normal_law():
    """Target N(1, 1/2) by a tilted reference: means and variances after one move, 4 errors."""

    def target(x):
        value = -0.5 * jnp.sum(x**2) + 2.0 * jnp.sum(x)
        return rotation.Place(x, value, jnp.zeros(()), -x + 2.0)

    keys = jax.random.split(jax.random.key(3), 2)
    x = 1.0 + np.sqrt(0.5) * jax.random.normal(keys[0], (4000, 2))
    start = jax.vmap(target)(x)

    def move(place, key):
        scale = jnp.array([0.5, 1.0])
        return rotation.rotate(target, 3, place, jnp.ones(()), jnp.asarray(0.9), scale, key)

    end, accept = jax.jit(jax.vmap(move))(start, jax.random.split(keys[1], 4000))
    moved = np.asarray(end.x)
    assert 0.5 < accept.mean() < 0.999
    assert np.all(np.abs(moved.mean(0) - 1.0) < 4.0 * np.sqrt(0.5 / 4000))
    assert np.all(np.abs(moved.var(0) - 0.5) < 4.0 * 0.5 * np.sqrt(2.0 / 4000))


@pytest.mark.slow
def test_levels_hold_the_same_path_in_their_own_coordinates(x64):
    """A path carried from a weak guide to a strong one keeps states and log ratio."""
    y = jnp.array([1.0, 0.2, 0.9])

    def model():
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
        well = nsde.processes.DoubleWell(2.0, 2.0, scale)
        path = nsde.SDEPath(well, [0.0, 0.3, 0.6, 0.9, 1.2], dist.Normal(0.0, 1.0))
        x = numpyro.sample("x", path)
        nsde.observe("y", x, multimodal.absolute, obs=y, at=np.array([0, 2, 4]))

    guided = numpyro.handlers.reparam(model, config={"x": nsde.reparam.GuidedReparam()})
    centre, reference = rotation.prior_reference(guided, (), {}, jax.random.key(0))
    back = jax.flatten_util.ravel_pytree(centre)[1]
    tempered = rotation.TemperedModel(guided, (), {}, back, reference, from_prior=True)
    start, weak, strong = (tempered.level(jnp.asarray(b)) for b in (0.0, 0.3, 1.0))
    x = jax.random.normal(jax.random.key(1), reference.loc.shape)

    carry, look = jax.jit(tempered.carry), jax.jit(tempered.look)
    there = carry(x, start, weak)
    further = carry(there, weak, strong)
    again = carry(further, strong, start)
    prior, middle, posterior = look(x, start), look(there, weak), look(further, strong)
    np.testing.assert_allclose(again, x, atol=1e-8)
    np.testing.assert_allclose(prior.pull, 0.0, atol=1e-10)
    np.testing.assert_allclose([middle.log_ratio, posterior.log_ratio], prior.log_ratio, rtol=1e-9)
    assert np.abs(posterior.x - x).max() > 1.0
    # The prior is drawn as it is, so that the ratio is the likelihood and what the parameters add.
    values = {**back(reference.place(x))}
    path = numpyro.handlers.substitute(guided, data={
        name: jnp.exp(v) if name == "scale" else v
        for name, v in back(reference.place(posterior.x)).items()
    })  # fmt: skip
    states = numpyro.handlers.trace(path).get_trace()["x"]["value"]
    likelihood = dist.Normal(jnp.abs(states[::2]), 0.1).log_prob(y).sum()
    u = values["scale"]
    prior_ratio = dist.Normal(0.0, 0.5).log_prob(u) - dist.Normal(
        reference.loc[0], reference.spread[0]
    ).log_prob(u)
    np.testing.assert_allclose(prior.log_ratio, likelihood + prior_ratio, rtol=1e-7)
    # The posterior's own density is that of the model.
    own = -numpyro.infer.util.potential_energy(guided, (), {}, back(reference.place(posterior.x)))
    against = dist.Normal(reference.loc, reference.spread).log_prob(reference.place(posterior.x))
    np.testing.assert_allclose(posterior.log_ratio + posterior.pull, own - against.sum(), rtol=1e-9)


def test_bennett_is_exact_for_normal_tilts():
    """Levels of N(x; 0, 1) exp(b (2 x - x^2 / 2)): log Z = 2 b^2 / (1 + b) - log(1 + b) / 2."""
    rng = np.random.default_rng(0)
    betas = np.array([0.0, 0.4, 1.0])
    x = 2.0 * betas / (1.0 + betas) + rng.normal(size=(4000, 3)) / np.sqrt(1.0 + betas)
    ratios = 2.0 * x - 0.5 * x**2
    found, error = ladder.log_evidence(betas, ratios), ladder.batch_error(betas, ratios)
    assert abs(found - (1.0 - 0.5 * np.log(2.0))) < 4.0 * error
    uneven = ladder.bennett(ratios[:1000, 2], ratios[:, 1], 0.6)
    truth = 1.0 - 0.5 * np.log(2.0) - (0.32 / 1.4 - 0.5 * np.log(1.4))
    assert abs(uneven - truth) < 0.1


def test_the_error_of_dependent_draws_is_larger():
    rng = np.random.default_rng(1)
    slow = np.repeat(rng.normal(size=(100, 2)), 40, axis=0)
    fast = rng.normal(size=(4000, 2))
    betas = np.array([0.0, 1.0])
    assert ladder.batch_error(betas, slow) > 3.0 * ladder.batch_error(betas, fast)


def test_levels_are_spaced_by_rejection():
    betas = jnp.array([0.0, 0.5, 1.0])
    np.testing.assert_allclose(ladder.respaced(betas, jnp.array([0.6, 0.2])), [0.0, 1 / 3, 1.0])
    rejections = ladder.exchange_rejections(betas, jnp.array([0.0, 2.0, -100.0]))
    np.testing.assert_allclose(rejections, [1.0 - np.exp(-1.0), 0.0], atol=1e-6)
    order = ladder.exchange_order(jnp.zeros(4), jnp.ones(4), jnp.array(1))
    np.testing.assert_array_equal(order, [0, 2, 1, 4, 3])
    order = ladder.exchange_order(jnp.array([0.0, 0.0, 1.0, 1.0]), jnp.full(4, 0.5), jnp.array(0))
    np.testing.assert_array_equal(order, [1, 0, 2, 3, 4])


def test_a_bad_run_is_told():
    bad = TemperingReport(
        -3.0, 0.5, (-3.4, -2.6), 3, 8.0, np.array([0.0, 1.0]), np.array([0.9]),
        np.array([1.0, 0.3]), np.array([0.2, 0.1]),
    )  # fmt: skip
    told = bad.complaints()
    assert len(told) == 4
    assert "num_levels=18" in told[-1]


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="num_levels must be at least 2"):
        nsde.infer.Tempered(two_modes, num_levels=1)
    with pytest.raises(TypeError, match="num_steps must be an integer"):
        nsde.infer.Tempered(two_modes, num_steps=1.5)

    def discrete():
        numpyro.sample("k", dist.Poisson(2.0))

    def improper():
        numpyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))

    for model, words in ((discrete, "'k' is discrete"), (improper, "a proper law")):
        mcmc = MCMC(nsde.infer.Tempered(model), num_warmup=2, num_samples=2, progress_bar=False)
        with pytest.raises(ValueError, match=words):
            mcmc.run(jax.random.key(0))
    kernel = nsde.infer.Tempered(two_modes)
    with pytest.raises(TypeError, match="cannot be a block"):
        kernel.refresh(None, (), {})
    with pytest.raises(ValueError, match="needs an MCMC"):
        kernel.report(MCMC(kernel, num_warmup=1, num_samples=1))


def test_a_run_goes_on_from_its_last_state(ran):
    state = pickle.loads(pickle.dumps(jax.device_get(ran.last_state)))
    assert isinstance(pickle.loads(pickle.dumps(ran.sampler)), nsde.infer.Tempered)
    ran.post_warmup_state = state
    ran.run(state.rng_key[0])
    np.testing.assert_array_equal(ran.last_state.betas, state.betas)
    assert ran.last_state.i.tolist() == [6400, 6400]
    report = ran.sampler.report(ran)
    assert abs(report.log_evidence - exact_log_evidence()) < 4.0 * report.error


@pytest.mark.slow
def test_the_double_well_seen_rarely(x64):
    found, report = tempered_case("well", seed=0)
    reference = multimodal.REFERENCE["well"]
    assert abs(report.log_evidence - reference["log_evidence"]) < 4.0 * report.error + 0.05
    assert abs(found["scale"].mean() - reference["scale_mean"]) < 0.1 * reference["scale_sd"]


def tempered_case(name, seed, num_warmup=600, num_samples=4000, **options):
    model = {"well": multimodal.well, "abs": multimodal.folded, "fhn": multimodal.neuron}[name]
    guided = numpyro.handlers.reparam(model, config={"x": nsde.reparam.GuidedReparam()})
    kernel = nsde.infer.Tempered(guided, **options)
    mcmc = MCMC(kernel, num_warmup=num_warmup, num_samples=num_samples, progress_bar=False)
    mcmc.run(jax.random.key(seed), multimodal.data(name))
    return mcmc.get_samples(), kernel.report(mcmc)
