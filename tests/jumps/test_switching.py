"""SDEs with hidden regimes: exact densities, merging filters, particles."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jumps.references import REFERENCE
from scipy import stats

import numpyro_sde as nsde

REF = REFERENCE["regime_switching"]
Y = np.array(REF["y"])
TIMES = REF["gap"] * np.arange(len(Y))


def switching(theta=REF["theta"], sigma=REF["sigma"]):
    return nsde.SwitchingSDE(
        lambda t, x, r, p: -p["theta"][r] * x,
        lambda t, x, r, p: p["sigma"][r],
        nsde.MarkovJumpProcess(np.array(REF["generator"]), 2),
        params={"theta": jnp.asarray(theta), "sigma": jnp.asarray(sigma)},
        event_dims={"theta": 1, "sigma": 1},
    )


def emission(t, x):
    return dist.Normal(x, REF["obs_sd"])


@pytest.mark.parametrize(
    ("method", "reference"),
    [
        (nsde.filters.IMM(), REF["imm"]),
        (nsde.filters.IMM(nsde.filters.Kalman()), REF["imm"]),
        (nsde.filters.GPB(2), REF["gpb2"]),
    ],
)
def test_merging_filters(x64, method, reference):
    path = nsde.SDEPath(switching(), TIMES, dist.Normal(0.0, 1.0))
    result = nsde.filter_path(path, emission, Y, method=method)
    np.testing.assert_allclose(result.log_likelihood, reference[0], atol=1e-8)
    np.testing.assert_allclose(result.regimes[-1, 1], reference[1], atol=1e-8)


def test_equal_regimes_are_one(x64):
    one = nsde.processes.OrnsteinUhlenbeck(rate=0.5, mean=0.0, scale=0.4)
    truth = nsde.filter_path(
        nsde.SDEPath(one, TIMES, dist.Normal(0.0, 1.0)), emission, Y, method=nsde.filters.Kalman()
    )
    path = nsde.SDEPath(switching([0.5, 0.5], [0.4, 0.4]), TIMES, dist.Normal(0.0, 1.0))
    for method in (nsde.filters.IMM(), nsde.filters.GPB(1), nsde.filters.GPB(2)):
        result = nsde.filter_path(path, emission, Y, method=method)
        np.testing.assert_allclose(result.log_likelihood, truth.log_likelihood, atol=1e-9)
        np.testing.assert_allclose(result.mean, truth.mean, atol=1e-9)
        np.testing.assert_allclose(result.cov, truth.cov, atol=1e-9)


@pytest.mark.slow
def test_an_observed_path_by_all_sequences_of_regimes(x64):
    path = nsde.SDEPath(switching(), TIMES[:7], dist.Normal(0.0, 1.0))
    x = np.array(path.sample(jax.random.key(0)))
    chain = switching().chain
    P, first = np.array(chain.transition_matrix(REF["gap"])), np.array(chain.stationary_law())
    total = 0.0
    for regimes in itertools.product(range(2), repeat=6):
        weight = first[regimes[0]] * np.prod([P[a, b] for a, b in itertools.pairwise(regimes)])
        for k, r in enumerate(regimes):
            theta, sigma = REF["theta"][r], REF["sigma"][r]
            decay = np.exp(-theta * REF["gap"])
            sd = sigma * np.sqrt((1 - decay**2) / (2 * theta))
            weight *= stats.norm.pdf(x[k + 1], x[k] * decay, sd)
        total += weight
    exact = np.log(total) + stats.norm.logpdf(x[0])
    np.testing.assert_allclose(path.log_prob(x), exact, atol=1e-9)
    np.testing.assert_allclose(path.log_prob_pointwise(x).sum(), exact, atol=1e-9)


@pytest.mark.slow
def test_particles_are_unbiased(x64):
    path = nsde.SDEPath(switching(), TIMES, dist.Normal(0.0, 1.0))

    @jax.jit
    def run(key):
        method = nsde.filters.Particle(4000, proposal="bootstrap", key=key)
        return nsde.filter_path(path, emission, Y, method=method).log_likelihood

    likelihood = np.exp([run(jax.random.key(k)) - REF["exact"] for k in range(16)])
    error = likelihood.std() / np.sqrt(likelihood.size)
    assert error < 0.15
    assert abs(likelihood.mean() - 1.0) < 4.0 * error


def model(y=None):
    sigma = numpyro.sample("sigma", dist.LogNormal(jnp.zeros(2), 0.5).to_event(1))
    x = numpyro.sample("x", nsde.SDEPath(switching(sigma=sigma), TIMES, dist.Normal(0.0, 1.0)))
    nsde.observe("y", x, emission, obs=y)


@pytest.mark.slow
def test_gradient_and_prediction(x64):
    marginal = nsde.handlers.marginalize(model, method=nsde.filters.IMM())

    @jax.jit
    def value(sigma):
        return numpyro.infer.util.log_density(marginal, (Y,), {}, {"sigma": sigma})[0]

    at = jnp.array([0.3, 0.9])
    slope = jax.grad(value)(at)
    for i in range(2):
        move = 1e-5 * np.eye(2)[i]
        numeric = (value(at + move) - value(at - move)) / 2e-5
        np.testing.assert_allclose(slope[i], numeric, rtol=1e-5)
    drawn = numpyro.infer.Predictive(marginal, num_samples=3)(jax.random.key(0))
    assert drawn["y"].shape == (3, len(Y))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (nsde.filters.Kalman(), "Kalman is exact"),
        (nsde.filters.ExtendedKalman(), "Gaussian transition"),
        (nsde.filters.MomentMatching(), "uses no scheme"),
        (nsde.filters.EnsembleKalman(), "bootstrap"),
        (nsde.filters.Particle(10, proposal="guided"), "bootstrap"),
        (nsde.filters.Forward(), "finitely many states"),
    ],
)
def test_engines_that_would_drop_the_regimes_refuse(method, message):
    marginal = nsde.handlers.marginalize(model, method=method)
    with pytest.raises((ValueError, TypeError), match=message):
        numpyro.infer.util.log_density(marginal, (Y,), {}, {"sigma": jnp.ones(2)})


def test_other_paths_and_other_arguments_are_refused():
    plain = nsde.SDEPath(nsde.SDE(lambda t, x: -x, lambda t, x: 1.0), TIMES, 0.0)
    with pytest.raises(ValueError, match=r"is for the path of an nsde\.SwitchingSDE"):
        nsde.filter_path(plain, emission, Y, method=nsde.filters.IMM())
    with pytest.raises(ValueError, match="must be Gaussian"):
        nsde.SDEPath(switching(), TIMES, 0.0, scheme=nsde.schemes.Milstein())
    with pytest.raises(TypeError, match=r"drift must take \(t, x, r\)"):
        nsde.SwitchingSDE(lambda t, x: x, lambda t, x, r: 1.0, switching().chain)
    with pytest.raises(ValueError, match="first_regime must be a state"):
        nsde.SwitchingSDE(lambda t, x, r: x, lambda t, x, r: 1.0, switching().chain, first_regime=2)
    with pytest.raises(TypeError, match="inner must be"):
        nsde.filters.IMM(nsde.filters.Particle(10, proposal="guided"))
    with pytest.raises(ValueError, match="order must be 1 or 2"):
        nsde.filters.GPB(3)
