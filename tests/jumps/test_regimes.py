"""Regimes by particles: unbiased likelihoods, smoothing, particle Gibbs, against all sequences."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jumps.test_switching import REF, TIMES, Y, emission, model, switching
from numpyro.infer import MCMC, NUTS
from scipy import stats
from scipy.linalg import expm

import numpyro_sde as nsde
from numpyro_sde.smc import regimes as smc


def path_of(sde=None):
    return nsde.SDEPath(switching() if sde is None else sde, TIMES, dist.Normal(0.0, 1.0))


def filtered(num, **options):
    return nsde.filter_path(
        path_of(), emission, Y, method=nsde.filters.RaoBlackwell(num, **options)
    )


@pytest.fixture(scope="module")
def brute():
    """Evidence, regime probabilities, mean and variance of the path, by all 512 sequences."""
    h, N = REF["gap"], len(Y)
    Q = np.array(REF["generator"])
    Q = Q - np.diag(np.diag(Q)) - np.diag((Q - np.diag(np.diag(Q))).sum(1))
    P, first = expm(Q * h), expm(Q * 1e3)[0]
    total, regimes, mean, second = 0.0, np.zeros((N - 1, 2)), np.zeros(N), np.zeros(N)
    for sequence in itertools.product(range(2), repeat=N - 1):
        prior = first[sequence[0]] * np.prod([P[a, b] for a, b in itertools.pairwise(sequence)])
        A = np.eye(N)
        for k, r in enumerate(sequence):
            decay = np.exp(-REF["theta"][r] * h)
            sd = REF["sigma"][r] * np.sqrt((1 - decay**2) / (2 * REF["theta"][r]))
            A[k + 1] = decay * A[k]
            A[k + 1, k + 1] = sd
        S = A @ A.T
        V = S + REF["obs_sd"] ** 2 * np.eye(N)
        gain = S @ np.linalg.inv(V)
        m, C = gain @ Y, S - gain @ S
        mass = prior * stats.multivariate_normal.pdf(Y, np.zeros(N), V)
        total += mass
        regimes[np.arange(N - 1), list(sequence)] += mass
        mean += mass * m
        second += mass * (np.diag(C) + m**2)
    mean = mean / total
    return np.log(total), regimes / total, mean, second / total - mean**2


@pytest.mark.slow
def test_all_sequences_are_exact(x64, brute):
    result = filtered(512)
    np.testing.assert_allclose(brute[0], REF["exact"], atol=1e-10)
    np.testing.assert_allclose(result.log_likelihood, REF["exact"], atol=1e-8)
    np.testing.assert_allclose(result.regimes[-1, 1], REF["p_last_regime_1"], atol=1e-8)
    np.testing.assert_allclose(result.increments.sum(), result.log_likelihood, atol=1e-10)
    x, regimes = result.sample_with_regimes(jax.random.key(1), 20_000)
    share, truth = np.mean(np.array(regimes)[:, 1:] == 1, axis=0), brute[1][:, 1]
    assert np.all(np.abs(share - truth) <= 4.0 * np.sqrt(truth * (1 - truth) / 20_000) + 1e-12)
    x = np.array(x)[:, :, 0]
    assert np.all(np.abs(x.mean(0) - brute[2]) < 4.0 * np.sqrt(brute[3] / 20_000))
    np.testing.assert_allclose(x.var(0), brute[3], rtol=0.1)


def test_few_sequences_are_unbiased(x64):
    @jax.jit
    def run(keys):
        def one(key):
            method = nsde.filters.RaoBlackwell(2, key=key)
            return nsde.filter_path(path_of(), emission, Y, method=method).log_likelihood

        return jax.lax.map(one, keys)

    ratio = np.exp(np.array(run(jax.random.split(jax.random.key(0), 2000))) - REF["exact"])
    error = ratio.std() / np.sqrt(ratio.size)
    assert 0.0 < error < 0.02
    assert abs(ratio.mean() - 1.0) < 4.0 * error


@pytest.mark.parametrize("weights", [[0.5, 0.2, 0.1, 0.1, 0.06, 0.04], [0.97, 0.01, 0.01, 0.01]])
def test_kept_weights_are_unbiased(x64, weights):
    w, num = jnp.array(weights), 3

    @jax.jit
    def mean(keys, retained):
        def one(key):
            index, kept = smc.keep_sequences(jnp.log(w), jax.random.uniform(key), num, retained)
            return jnp.zeros(w.size).at[index].add(jnp.exp(kept))

        return jax.vmap(one)(keys)

    drawn = np.array(mean(jax.random.split(jax.random.key(0), 20_000), None))
    error = drawn.std(0) / np.sqrt(len(drawn))
    assert np.all(np.abs(drawn.mean(0) - w) <= 4.0 * error + 1e-12)
    np.testing.assert_allclose(drawn.sum(1), 1.0, atol=1e-12)
    # Given one that is kept, the others are as in the draws that keep it by chance.
    last = len(weights) - 1
    given = np.array(mean(jax.random.split(jax.random.key(1), 20_000), last))
    assert np.all(given[:, last] > 0)
    free = drawn[drawn[:, last] > 0]
    error = np.sqrt(free.var(0) / len(free) + given.var(0) / len(given))
    assert np.all(np.abs(free.mean(0) - given.mean(0)) <= 4.0 * error + 1e-12)


def test_particle_gibbs_keeps_the_law_of_the_regimes(x64, brute):
    @partial(jax.jit, static_argnums=1)
    def chain(key, num):
        linear = filtered(1).linear

        def step(regimes, key):
            regimes = smc.conditional_sweep(linear, regimes, key, num)
            return regimes, regimes

        start = jnp.zeros(len(Y) - 1, int)
        return jax.lax.scan(step, start, jax.random.split(key, 6000))[1][500:]

    regimes, truth = np.array(chain(jax.random.key(0), 2), float), brute[1][:, 1]
    open_ones = (truth > 1e-3) & (truth < 1 - 1e-3)  # three steps are certain
    regimes, truth = regimes[:, open_ones], truth[open_ones]
    assert truth.size == 6
    size = numpyro.diagnostics.effective_sample_size(regimes[None])
    error = np.sqrt(truth * (1 - truth) / size)
    assert np.all(size > 500)
    assert np.all(np.abs(regimes.mean(0) - truth) < 4.0 * error)


@pytest.mark.slow
def test_smooth_gives_path_and_regimes(x64, brute):
    num = 2000
    draws = {"sigma": jnp.broadcast_to(jnp.array(REF["sigma"]), (num, 2))}
    method = nsde.filters.RaoBlackwell(64)
    found = nsde.smooth(model, draws, Y, method=method, rng_key=jax.random.key(2))
    assert found["x"].shape == found["x_regime"].shape == (num, len(Y))
    share, truth = np.mean(found["x_regime"][:, 1:] == 1, axis=0), brute[1][:, 1]
    assert np.all(np.abs(share - truth) <= 4.0 * np.sqrt(truth * (1 - truth) / num) + 1e-12)
    error = np.sqrt(brute[3] / num)
    assert np.all(np.abs(np.mean(found["x"], axis=0) - brute[2]) < 4.0 * error)
    later = nsde.smooth(
        model, {"sigma": draws["sigma"][:3]}, Y, method=method, rng_key=jax.random.key(2),
        times=[0.25, 5.0],
    )  # fmt: skip
    assert later["x"].shape == later["x_regime"].shape == (3, 2)
    with pytest.raises(ValueError, match=r"for paths of an nsde\.JumpPath"):
        nsde.smooth(model, draws, Y, method=method, rng_key=jax.random.key(2), at_jumps=True)


@pytest.mark.slow
def test_refusals():
    def refused(sde, likelihood=emission, init=None):
        law = nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 1.0) if init is None else init)
        nsde.filter_path(law, likelihood, Y, method=nsde.filters.RaoBlackwell(4))

    chain = switching().chain
    cubic = nsde.SwitchingSDE(lambda t, x, r: -(x**3), lambda t, x, r: 1.0 + r, chain)
    with pytest.raises(ValueError, match=r"linear and normal in each regime.*use IMM\(\)"):
        refused(cubic)
    with pytest.raises(ValueError, match=r"linear and normal in each regime.*bootstrap"):
        refused(switching(), lambda t, x: dist.StudentT(4.0, x, 0.1))
    with pytest.raises(ValueError, match=r"normal or fixed.*bootstrap"):
        refused(switching(), init=dist.Laplace(0.0, 1.0))
    with pytest.raises(ValueError, match="observed itself"):
        refused(switching(), lambda t, x: dist.Delta(x))
    plain = nsde.processes.OrnsteinUhlenbeck(1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"for the path of an nsde\.SwitchingSDE"):
        refused(plain)
    with pytest.raises(ValueError, match="num_particles"):
        nsde.filters.RaoBlackwell(0)
    marginal = nsde.handlers.marginalize(model, method=nsde.filters.RaoBlackwell(4))
    with pytest.raises(TypeError, match="no useful gradient"):
        jax.grad(lambda s: numpyro.infer.util.log_density(marginal, (Y,), {}, {"sigma": s})[0])(
            jnp.ones(2)
        )


POSTERIOR = {}


def exact_posterior():
    """Mean and standard deviation of log sigma on a grid, by all sequences."""
    marginal = nsde.handlers.marginalize(model, method=nsde.filters.RaoBlackwell(512))
    nodes = np.linspace(-3.2, 1.8, 41)
    grid = jnp.array(np.stack(np.meshgrid(nodes, nodes, indexing="ij"), -1).reshape(-1, 2))

    @jax.jit
    def density(z):
        value = numpyro.infer.util.log_density(marginal, (Y,), {}, {"sigma": jnp.exp(z)})[0]
        return value + jnp.sum(z)

    values = np.array(jax.lax.map(density, grid))
    mass = np.exp(values - values.max())
    mass = mass / mass.sum()
    mean = mass @ np.array(grid)
    return mean, np.sqrt(mass @ (np.array(grid) - mean) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["PMMH", "ParticleGibbs", "IMM"])
def test_engines_find_the_posterior(x64, engine):
    """Against a grid of exact likelihoods; IMM is an approximation, here by less than its error."""
    if not POSTERIOR:
        POSTERIOR["moments"] = exact_posterior()
    mean, sd = POSTERIOR["moments"]
    if engine == "PMMH":
        kernel, warm, num = nsde.infer.PMMH(model), 1000, 20_000
    elif engine == "ParticleGibbs":
        kernel, warm, num = nsde.infer.ParticleGibbs(model, num_particles=4), 300, 3000
    else:
        marginal = nsde.handlers.marginalize(model, method=nsde.filters.IMM())
        kernel, warm, num = NUTS(marginal), 300, 1500
    mcmc = MCMC(kernel, num_warmup=warm, num_samples=num, progress_bar=False)
    mcmc.run(jax.random.key(3), Y)
    z = np.log(np.array(mcmc.get_samples()["sigma"]))
    error = sd / np.sqrt(numpyro.diagnostics.effective_sample_size(z[None]))
    assert np.all(error < 0.15 * sd)
    assert np.all(np.abs(z.mean(0) - mean) < 4.0 * error)


def equal_regimes():
    """Two regimes that are one: the Kalman filter is then the truth."""
    return switching([0.5, 0.5], [0.4, 0.4])


@pytest.mark.slow
@pytest.mark.parametrize("key", [jax.random.key(4), jax.random.PRNGKey(4)], ids=["new", "old"])
def test_panels_missing_data_and_powers(x64, key):
    y = np.stack([Y, Y[::-1]])
    y[0, 3:5] = np.nan

    def panel(sde, y=None):
        numpyro.sample("b", dist.Normal(0.0, 1.0))
        with numpyro.plate("series", 2):
            x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 1.0)))
            with numpyro.handlers.scale(scale=0.5):
                nsde.observe("y", x, emission, obs=y)

    one = nsde.processes.OrnsteinUhlenbeck(rate=0.5, mean=0.0, scale=0.4)
    truth = nsde.handlers.marginalize(panel, method=nsde.filters.Kalman())
    found = nsde.handlers.marginalize(panel, method=nsde.filters.RaoBlackwell(3))
    values = [
        numpyro.infer.util.log_density(numpyro.handlers.seed(m, key), (sde, y), {}, {"b": 0.0})[0]
        for m, sde in ((truth, one), (found, equal_regimes()))
    ]
    np.testing.assert_allclose(*values, atol=1e-8)
    drawn = nsde.smooth(
        panel, {"b": np.zeros(3)}, equal_regimes(), y, method=nsde.filters.RaoBlackwell(3),
        rng_key=key,
    )  # fmt: skip
    assert drawn["x"].shape == drawn["x_regime"].shape == (3, 2, len(Y))


@pytest.mark.slow
def test_the_regimes_of_a_path_that_is_seen(x64):
    path = nsde.SDEPath(switching(), TIMES[:6], dist.Normal(0.0, 1.0))
    x = np.array(path.sample(jax.random.key(0), (3,)))
    law = nsde.regime_law(path, x)
    assert law.filtered.shape == law.smoothed.shape == (3, 6, 2)
    P = np.array(switching().chain.transition_matrix(REF["gap"]))
    first = np.array(switching().chain.stationary_law())
    for one, smoothed, filtered in zip(x, law.smoothed, law.filtered, strict=True):
        masses, last = np.zeros((5, 2)), np.zeros(2)
        for sequence in itertools.product(range(2), repeat=5):
            mass = first[sequence[0]] * np.prod([P[a, b] for a, b in itertools.pairwise(sequence)])
            for k, r in enumerate(sequence):
                decay = np.exp(-REF["theta"][r] * REF["gap"])
                sd = REF["sigma"][r] * np.sqrt((1 - decay**2) / (2 * REF["theta"][r]))
                mass *= stats.norm.pdf(one[k + 1], one[k] * decay, sd)
            masses[np.arange(5), list(sequence)] += mass
            last[sequence[-1]] += mass
        np.testing.assert_allclose(smoothed[1:], masses / masses.sum(1, keepdims=True), atol=1e-9)
        np.testing.assert_allclose(smoothed[0], smoothed[1], atol=1e-12)
        np.testing.assert_allclose(filtered[-1], last / last.sum(), atol=1e-9)
        np.testing.assert_allclose(filtered[0], first, atol=1e-12)
    with pytest.raises(ValueError, match=r"nsde\.SwitchingSDE"):
        nsde.regime_law(nsde.JumpPath(switching().chain, TIMES), np.zeros(10))
    with pytest.raises(ValueError, match="two times"):
        nsde.regime_law(nsde.SDEPath(switching(), [0.0], 0.0), np.zeros(1))


@pytest.mark.slow
def test_vector_states(x64):
    """Two components; against the Kalman filter where the regimes are one, else the merged one."""
    A = np.array([[-0.5, 0.3], [0.0, -1.0]])

    def build(spread):
        return nsde.SwitchingSDE(
            lambda t, x, r: jnp.array(A) @ x,
            lambda t, x, r: jnp.array([0.3, 0.5]) * (1.0 + spread * r),
            nsde.MarkovJumpProcess(np.array(REF["generator"]), 2),
        )

    def run(sde, method):
        law = nsde.SDEPath(sde, TIMES, dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        return nsde.filter_path(law, lambda t, x: dist.Normal(x[0], 0.2), Y, method=method)

    linear = nsde.SDE(lambda t, x: jnp.array(A) @ x, lambda t, x: jnp.array([0.3, 0.5]))
    truth = run(linear, nsde.filters.Kalman())
    same = run(build(0.0), nsde.filters.RaoBlackwell(4))
    np.testing.assert_allclose(same.log_likelihood, truth.log_likelihood, atol=1e-8)
    np.testing.assert_allclose(same.mean, truth.mean, atol=1e-8)
    np.testing.assert_allclose(same.cov, truth.cov, atol=1e-8)
    wide = run(build(1.0), nsde.filters.RaoBlackwell(512))
    merged = run(build(1.0), nsde.filters.GPB(2))
    np.testing.assert_allclose(wide.log_likelihood, merged.log_likelihood, atol=0.02)
    x, _ = wide.sample_with_regimes(jax.random.key(0), 3000)
    m, C = wide.mean[-1], wide.cov[-1]
    assert np.all(np.abs(x[:, -1].mean(0) - m) < 4.0 * np.sqrt(np.diag(C) / 3000))
