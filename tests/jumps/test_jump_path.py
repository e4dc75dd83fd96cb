"""The path of a Markov jump process in models, under every engine that can take it."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jumps.references import REFERENCE
from numpyro.infer import MCMC, NUTS, Predictive
from numpyro.infer.gibbs import Gibbs
from numpyro.infer.util import log_density

import numpyro_sde as nsde
from numpyro_sde import laws

REF = REFERENCE["mjp_two_state"]
TIMES, Y = np.array(REF["t"]), np.array(REF["y"])
EDGES = [(0, 1), (1, 0)]


def chain_of(rates):
    return nsde.MarkovJumpProcess(lambda p: p, 2, edges=EDGES, params=rates, event_dims=1)


def model(y=None):
    log_rates = numpyro.sample("log_rates", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    s = numpyro.sample("s", nsde.JumpPath(chain_of(jnp.exp(log_rates)), TIMES))
    nsde.observe(
        "y",
        s,
        lambda t, s, p: dist.Normal(p["mean"][s], REF["sd"]),
        params={"mean": jnp.arange(2.0)},
        event_dims={"mean": 1},
        obs=y,
    )


MARGINAL = nsde.handlers.marginalize(model, method=nsde.filters.Forward())
TRUE = np.log([REF["a"], REF["b"]])


def test_law(x64):
    chain = chain_of(jnp.array([0.8, 1.5]))
    path = nsde.JumpPath(chain, TIMES)
    s = path.sample(jax.random.key(0), (5,))
    assert s.dtype == jnp.int32
    assert path.is_discrete
    assert s.shape == (5, 8)
    P, law = np.array(chain.transition_matrix(np.diff(TIMES))), np.array(chain.stationary_law())
    by_hand = [
        np.log(law[row[0]]) + sum(np.log(P[k, row[k], row[k + 1]]) for k in range(7))
        for row in np.array(s)
    ]
    np.testing.assert_allclose(path.log_prob(s), by_hand, rtol=1e-10)
    np.testing.assert_allclose(path.log_prob_pointwise(s).sum(-1), by_hand, rtol=1e-10)
    fixed = nsde.JumpPath(chain, TIMES, init=1)
    assert np.all(fixed.sample(jax.random.key(0), (20,))[:, 0] == 1)
    given = nsde.JumpPath(chain, TIMES, init=dist.Categorical(jnp.array([0.0, 1.0])))
    np.testing.assert_allclose(given.log_prob(s), fixed.log_prob(s))
    with pytest.warns(UserWarning, match="Out-of-support"):
        assert path.log_prob(jnp.full(8, 2)) == -jnp.inf


def test_draws_follow_the_law():
    path = nsde.JumpPath(chain_of(jnp.array([0.8, 1.5])), TIMES)
    s = np.array(path.sample(jax.random.key(0), (10_000,)))
    share = 0.8 / 2.3
    error = np.sqrt(share * (1 - share) / 10_000)
    assert np.all(np.abs(s.mean(0) - share) < 4.0 * error)


@pytest.mark.slow
def test_marginal_likelihood_gradient_and_prediction(x64):
    @jax.jit
    def value(z):
        prior = dist.Normal(0.0, 1.0).log_prob(z).sum()
        return log_density(MARGINAL, (Y,), {}, {"log_rates": z})[0] - prior

    got, slope = jax.value_and_grad(value)(jnp.array(TRUE))
    np.testing.assert_allclose(got, REF["log_likelihood"], atol=1e-8)
    np.testing.assert_allclose(slope, REF["grad_log_rates"], atol=1e-8)
    drawn = Predictive(MARGINAL, num_samples=3)(jax.random.key(0))
    assert drawn["y"].shape == (3, 8)
    one = nsde.JumpPath(chain_of(jnp.exp(TRUE)), TIMES)
    result = nsde.filter_path(
        one, lambda t, s: dist.Normal(s, REF["sd"]), Y, method=nsde.filters.Forward()
    )
    np.testing.assert_allclose(result.probabilities[:, 1], REF["filtered_p1"], atol=1e-8)
    np.testing.assert_allclose(result.smoothed()[:, 1], REF["smoothed_p1"], atol=1e-8)
    jumps = result.draw_jumps(jax.random.key(0), 4)
    assert jumps.states.shape[0] == 4
    assert jumps.states.shape[1] == jumps.times.shape[1] + 1
    np.testing.assert_allclose(result.path_statistics().dwell.sum(), TIMES[-1], rtol=1e-8)


@pytest.mark.slow
def test_nuts_finds_the_posterior_known_by_quadrature(x64):
    mcmc = MCMC(NUTS(MARGINAL), num_warmup=200, num_samples=800, progress_bar=False)
    mcmc.run(jax.random.key(0), Y)
    z = np.array(mcmc.get_samples()["log_rates"])
    size = numpyro.diagnostics.effective_sample_size(z[None])
    error = np.array(REF["post_sd_log"]) / np.sqrt(size)
    assert np.all(np.abs(z.mean(0) - REF["post_mean_log"]) < 4.0 * error)


@pytest.mark.slow
def test_smooth_draws_states(x64):
    num = 3000
    draws = {"log_rates": jnp.broadcast_to(jnp.array(TRUE), (num, 2))}
    s = nsde.smooth(model, draws, Y, method=nsde.filters.Forward(), rng_key=jax.random.key(1))["s"]
    assert s.dtype == jnp.int32
    truth = np.array(REF["smoothed_p1"])
    error = np.sqrt(truth * (1 - truth) / num)
    assert np.all(np.abs(np.array(s).mean(0) - truth) < 4.0 * error)


@pytest.mark.slow
def test_gibbs_with_exact_draws_of_the_states():
    block = nsde.infer.ConditionalForward(model)
    kernel = Gibbs([(block, ["s"]), (NUTS(model), None)])
    mcmc = MCMC(kernel, num_warmup=200, num_samples=1500, progress_bar=False)
    mcmc.run(jax.random.key(0), Y)
    samples = mcmc.get_samples()
    z = np.array(samples["log_rates"])
    size = numpyro.diagnostics.effective_sample_size(z[None])
    error = np.array(REF["post_sd_log"]) / np.sqrt(size)
    assert np.all(np.abs(z.mean(0) - REF["post_mean_log"]) < 4.0 * error)
    assert set(np.unique(samples["s"])) <= {0, 1}


@pytest.mark.slow
def test_plates_missing_data_and_clocks_of_their_own(x64):
    rates = jnp.array([[0.8, 1.5], [2.0, 0.5], [1.0, 1.0]])
    times = np.stack([TIMES, TIMES * 1.1, TIMES * 0.9])
    y = np.stack([Y, Y + 0.1, Y - 0.1])
    y[1, 3] = np.nan

    def panel(y=None):
        with numpyro.plate("series", 3):
            s = numpyro.sample("s", nsde.JumpPath(chain_of(rates), times))
            nsde.observe("y", s, lambda t, s: dist.Normal(s, 0.5), obs=y)

    marginal = nsde.handlers.marginalize(panel, method=nsde.filters.Forward())
    total = log_density(marginal, (y,), {}, {})[0]
    each = [
        nsde.filter_path(
            nsde.JumpPath(chain_of(rates[i]), times[i]),
            lambda t, s: dist.Normal(s, 0.5),
            y[i],
            method=nsde.filters.Forward(),
        ).log_likelihood
        for i in range(3)
    ]
    np.testing.assert_allclose(total, sum(each), rtol=1e-10)


def test_particles_agree_with_the_forward_algorithm(x64):
    path = nsde.JumpPath(chain_of(jnp.exp(TRUE)), TIMES)

    @jax.jit
    def run(key):
        method = nsde.filters.Particle(1000, proposal="bootstrap", key=key)
        return nsde.filter_path(
            path, lambda t, s: dist.Normal(s, REF["sd"]), Y, method=method
        ).log_likelihood

    ratio = np.exp([run(jax.random.key(k)) - REF["log_likelihood"] for k in range(10)])
    assert abs(ratio.mean() - 1.0) < 4.0 * ratio.std() / np.sqrt(10)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (nsde.filters.Kalman(), "Kalman is exact"),
        (nsde.filters.ExtendedKalman(), r"use filters\.Forward\(\)"),
        (nsde.filters.UnscentedKalman(), r"use filters\.Forward\(\)"),
        (nsde.filters.MomentMatching(), r"use filters\.Forward\(\)"),
        (nsde.filters.EnsembleKalman(), r"use filters\.Forward\(\)"),
        (nsde.filters.Particle(10, proposal="guided"), "bootstrap"),
        (nsde.filters.IMM(), "SwitchingSDE"),
    ],
)
def test_engines_that_cannot_take_discrete_states(method, message):
    marginal = nsde.handlers.marginalize(model, method=method)
    with pytest.raises((ValueError, TypeError), match=message):
        log_density(marginal, (Y,), {}, {"log_rates": jnp.zeros(2)})


@pytest.mark.parametrize(
    "reparam", [nsde.reparam.InnovationReparam(), nsde.reparam.GuidedReparam()]
)
def test_reparametrisations_refuse_discrete_states(reparam):
    treated = numpyro.handlers.reparam(model, config={"s": reparam})
    with pytest.raises(ValueError, match="smooth maps of their innovations"):
        numpyro.handlers.trace(numpyro.handlers.seed(treated, 0)).get_trace(Y)


def rates_with_gamma_priors(y=None):
    # One element for both rates of the pair, and a constant: 3 q from 1 to 0.
    q = numpyro.sample("q", dist.Gamma(2.0, 1.5))
    r = jnp.array([1.0, 3.0]) * q
    chain = nsde.MarkovJumpProcess(lambda p: p, 2, edges=[(0, 1), (1, 0)], params=r, event_dims=1)
    s = numpyro.sample("s", nsde.JumpPath(chain, TIMES))
    nsde.observe("y", s, lambda t, s, p: dist.Normal(s, 0.4 + 0.1 * p), params=q, obs=y)


@pytest.mark.slow
def test_rates_with_gamma_priors_in_a_gibbs_sampler(x64):
    """Against quadrature; emission and stationary start know of the rate too."""
    block = nsde.infer.ConditionalForward(rates_with_gamma_priors)
    rates = nsde.infer.GammaRates(rates_with_gamma_priors, "q", "s")
    kernel = Gibbs([(block, ["s"]), (rates, ["q"])])
    mcmc = MCMC(kernel, num_warmup=200, num_samples=6000, progress_bar=False)
    mcmc.run(jax.random.key(3), Y, extra_fields=("block_states.1.accept_prob",))
    draws = np.array(mcmc.get_samples()["q"])
    marginal = nsde.handlers.marginalize(rates_with_gamma_priors, method=nsde.filters.Forward())
    grid = jnp.linspace(0.01, 8.0, 400)
    values = jax.jit(jax.vmap(lambda q: log_density(marginal, (Y,), {}, {"q": q})[0]))(grid)
    weights = np.exp(np.array(values) - float(values.max()))
    size = numpyro.diagnostics.effective_sample_size(draws[None])
    assert size > 300
    mean = np.sum(weights * grid) / weights.sum()
    var = np.sum(weights * (grid - mean) ** 2) / weights.sum()
    assert abs(draws.mean() - mean) < 4.0 * np.sqrt(var / size)
    np.testing.assert_allclose(draws.var(), var, rtol=4.0 * np.sqrt(4.0 / size))
    accept = np.array(mcmc.get_extra_fields()["block_states.1.accept_prob"])
    assert 0.5 < accept.mean() < 1.0


def test_rates_that_gamma_priors_do_not_fit():
    def start(model, site="q", path="s", **options):
        kernel = nsde.infer.GammaRates(model, site, path, **options)
        return kernel.init(jax.random.key(0), 0, {site: jnp.ones(())}, (Y,), {})

    def squared(y=None):
        q = numpyro.sample("q", dist.Gamma(2.0, 1.5))
        edges = [(0, 1), (1, 0)]
        chain = nsde.MarkovJumpProcess(
            lambda p: p, 2, edges=edges, params=jnp.stack([q, q**2]), event_dims=1
        )
        s = numpyro.sample("s", nsde.JumpPath(chain, TIMES))
        nsde.observe("y", s, lambda t, s: dist.Normal(s, 0.5), obs=y)

    def normal(y=None):
        q = numpyro.sample("q", dist.LogNormal(0.0, 1.0))
        chain = nsde.MarkovJumpProcess(
            lambda p: p, 2, edges=[(0, 1), (1, 0)], params=jnp.stack([q, q]), event_dims=1
        )
        s = numpyro.sample("s", nsde.JumpPath(chain, TIMES))
        nsde.observe("y", s, lambda t, s: dist.Normal(s, 0.5), obs=y)

    def given(model):
        return numpyro.handlers.condition(model, data={"s": jnp.zeros(len(Y), int)})

    with pytest.raises(ValueError, match="one element of site 'q' times a constant"):
        start(given(squared))
    with pytest.raises(TypeError, match=r"must be a dist\.Gamma, got LogNormal"):
        start(given(normal))
    with pytest.raises(ValueError, match="no site 'x'"):
        start(given(rates_with_gamma_priors), path="x")
    with pytest.raises(ValueError, match=r"block of numpyro\.infer\.gibbs\.Gibbs"):
        nsde.infer.GammaRates(squared, "q", "s").init(jax.random.key(0), 0, None, (Y,), {})


def test_wrong_starts():
    chain = chain_of(jnp.array([1.0, 2.0]))
    one_way = nsde.MarkovJumpProcess(jnp.ones(1), 2, edges=[(0, 1)])
    for arguments, error, message in (
        ((one_way, TIMES, "stationary"), ValueError, "no single stationary law"),
        ((chain, TIMES, "uniform"), ValueError, "the string 'uniform'"),
        ((chain, TIMES, 2), ValueError, r"state in 0\.\.1, got 2"),
        ((chain, TIMES, 0.5), TypeError, "a whole number"),
        ((chain, TIMES, dist.Categorical(jnp.ones(3) / 3)), ValueError, "over the 2 states"),
        ((chain, TIMES, dist.Normal()), TypeError, "must be a Categorical"),
        ((lambda t, x: x, TIMES, 0), TypeError, "chain must be"),
    ):
        with pytest.raises(error, match=message):
            nsde.JumpPath(*arguments)
    with pytest.raises(ValueError, match="no scheme to replace"):
        nsde.JumpPath(chain, TIMES).replace(scheme=nsde.schemes.Euler())
    with pytest.raises(ValueError, match="no scheme for a"):
        nsde.SDEPath(
            nsde.SDE(lambda t, x: x, lambda t, x: 1.0),
            TIMES,
            0.0,
            scheme=nsde.JumpPath(chain, TIMES).scheme,
        )


SIR = REFERENCE["sir_five_laws"]


def sir(law=None, y=None):
    beta = numpyro.sample("beta", dist.LogNormal(0.0, 1.0))
    net = nsde.ReactionNetwork(
        [[1, 0], [1, 1]], [[0, 0], [2, 0]], jnp.stack([beta / 30, 0.6 + 0 * beta])
    )
    x = numpyro.sample("x", nsde.ReactionPath(net, np.arange(9.0), [27.0, 3.0], law=law))
    nsde.observe("y", x, lambda t, x: dist.Normal(x[1], 1.5), obs=y)


def likelihood(model, *args):
    @jax.jit
    def value(beta):
        prior = dist.LogNormal(0.0, 1.0).log_prob(beta)
        return log_density(model, args, {}, {"beta": beta})[0] - prior

    return value


@pytest.mark.slow
def test_finite_state_projection_of_a_network(x64):
    y = np.array([np.nan, *SIR["y"]])
    exact = nsde.handlers.marginalize(sir, method=nsde.filters.Forward(bounds=(27, 30)))
    value = likelihood(exact, laws.Jump(), y)
    np.testing.assert_allclose(value(1.8), SIR["exact"], atol=1e-8)
    numeric = (value(1.8 + 1e-5) - value(1.8 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(value)(1.8), numeric, rtol=1e-6)


@pytest.mark.slow
def test_draws_of_counts_given_the_data(x64):
    y = np.array([np.nan, *SIR["y"]])
    draws = nsde.smooth(
        sir,
        {"beta": jnp.full(400, 1.8)},
        laws.Jump(),
        y,
        method=nsde.filters.Forward(bounds=(27, 30)),
        rng_key=jax.random.key(0),
    )["x"]
    final = np.array(draws[:, -1])
    error = final.std(0) / np.sqrt(400)
    assert np.all(np.abs(final.mean(0) - SIR["filtered_S_I"][-1]) < 4.0 * error)


def test_one_line_changes_the_law(x64):
    y = np.array([np.nan, *SIR["y"]])
    for law, method, reference in (
        (laws.LinearNoise(80), nsde.filters.ExtendedKalman(), SIR["lna_restart"]),
        (laws.MomentClosure(substeps=80), nsde.filters.MomentMatching(), SIR["normal_closure_2"]),
        (laws.Jump(), nsde.filters.Forward(bounds=(27, 30)), SIR["exact"]),
    ):
        other = nsde.handlers.approximate(sir, law=law)
        marginal = nsde.handlers.marginalize(other, method=method)
        np.testing.assert_allclose(likelihood(marginal, None, y)(1.8), reference, atol=1e-7)


def test_counts_from_a_random_start_and_bounds_that_are_too_small(x64):
    exact = REFERENCE["immigration_death_exactly_observed"]
    ref = REFERENCE["immigration_death_noisy"]
    net = nsde.ReactionNetwork([[0, 1]], [[1, 0]], jnp.array([exact["lam"], exact["mu"]]))
    start = dist.Poisson(jnp.full(1, exact["lam"] / exact["mu"])).to_event(1)
    path = nsde.ReactionPath(net, np.array(exact["t"]), start, law=laws.Jump())

    def value(bound):
        return nsde.filter_path(
            path,
            lambda t, x: dist.Normal(x[0], ref["sd"]),
            np.array(ref["y"]),
            method=nsde.filters.Forward(bounds=(bound,)),
        ).log_likelihood

    np.testing.assert_allclose(value(ref["N"]), ref["exact"], atol=1e-8)
    assert np.isnan(value(30))


def test_laws_and_bounds_that_do_not_fit():
    y = np.array([np.nan, *SIR["y"]])
    for method, law, message in (
        (nsde.filters.Forward(), laws.Jump(), "give bounds="),
        (nsde.filters.Forward(bounds=(27,)), laws.Jump(), "largest count of each"),
        (nsde.filters.Forward(bounds=(20, 30)), laws.Jump(), "must hold the start"),
        (nsde.filters.Forward(bounds=(27, 30)), laws.EulerMultinomial(), "finitely many states"),
        (nsde.filters.Forward(bounds=(27, 30)), laws.Langevin(), "finitely many states"),
    ):
        with pytest.raises(ValueError, match=message):
            likelihood(nsde.handlers.marginalize(sir, method=method), law, y)(1.8)
    with pytest.raises(ValueError, match="bounds must be"):
        nsde.filters.Forward(bounds=(1.5,))

    def plain():
        numpyro.sample("x", nsde.SDEPath(nsde.SDE(lambda t, x: x, lambda t, x: 1.0), TIMES, 0.0))

    with pytest.raises(ValueError, match=r"laws are those of an nsde\.ReactionNetwork"):
        numpyro.handlers.seed(nsde.handlers.approximate(plain, law=laws.Jump()), 0)()
    with pytest.raises(TypeError, match="call it"):
        nsde.handlers.approximate(plain, law=laws.Jump)
