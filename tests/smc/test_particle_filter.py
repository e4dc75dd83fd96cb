"""Particle filters against the Kalman filter: unbiased likelihoods, moments, error estimates."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from particle_models import (
    OU,
    TIMES,
    Y,
    emission,
    exact,
    on_model,
    ou_path,
    replicate,
    setting,
    standard_scores,
)

import numpyro_sde as nsde
from numpyro_sde.filters import Particle, ParticleCollapseWarning
from numpyro_sde.smc.hilbert import hilbert_order
from numpyro_sde.smc.particle_filter import run_filter
from numpyro_sde.smc.resampling import SCHEMES
from numpyro_sde.smc.settings import PROPOSALS

NUM = 4000


def ratios(fine, chosen, num=NUM, seed=0):
    """Likelihood estimates over the exact likelihood."""
    logs = replicate(fine, lambda m, k: run_filter(m, chosen, k).log_likelihood, num, seed)
    return np.exp(logs - float(exact(fine).log_likelihood))


def some(names, *quick):
    """All of `names`, those not `quick` in the long runs only."""
    return [pytest.param(n, marks=() if n in quick else pytest.mark.slow) for n in names]


@pytest.mark.parametrize("scheme", some(SCHEMES, "systematic"))
def test_unbiased_for_every_resampling_scheme(scheme, x64):
    assert standard_scores(ratios(False, setting(10, "bootstrap", scheme, 1.0)), 1.0) < 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "proposal", some([p for p in PROPOSALS if p != "guided"], "residual_bridge")
)
def test_unbiased_for_every_proposal_with_steps_between(proposal, x64):
    assert standard_scores(ratios(True, setting(10, proposal, threshold=0.7)), 1.0) < 4


@pytest.mark.slow
@pytest.mark.parametrize("proposal", [p for p in PROPOSALS if p != "guided"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_unbiased_for_all_combinations(proposal, scheme, threshold, x64):
    values = ratios(True, setting(10, proposal, scheme, threshold), 20_000)
    assert standard_scores(values, 1.0) < 4


@pytest.mark.parametrize("fine", some([False, True], True))
def test_guided_is_exact_with_one_particle(fine, x64):
    values = ratios(fine, setting(1, "guided"), num=8)
    assert np.allclose(values, 1.0, atol=1e-9)


@pytest.mark.slow
def test_guided_is_unbiased_where_the_model_is_not_linear(x64):
    # Double well with a skewed emission, against a bootstrap filter of many particles.
    sde = nsde.processes.DoubleWell(linear=2.0, cubic=2.0, scale=0.8)
    path = nsde.SDEPath(sde, nsde.TimeGrid(TIMES, 0.21), dist.Normal(0.5, 0.6))
    at, y = path.grid.index, np.array([0.4, np.nan, 1.8, 0.9])

    def law(t, x):
        return dist.Gumbel(x, 0.4)

    def logs(chosen, num):
        keys = jax.random.split(jax.random.key(4), num)
        one = lambda m: jax.lax.map(  # noqa: E731
            lambda k: run_filter(m, chosen, k).log_likelihood, keys, batch_size=500
        )
        return np.asarray(jax.jit(lambda: on_model(path, at, y, one, law))())

    many = np.exp(logs(setting(4000, "bootstrap"), 50))
    few = np.exp(logs(setting(20, "guided"), 2000))
    error = np.hypot(many.std() / np.sqrt(50), few.std() / np.sqrt(2000))
    assert abs(many.mean() - few.mean()) < 4 * error
    assert few.std() / few.mean() < 0.5


@pytest.mark.slow
def test_moments_and_increments(x64):
    truth = exact(True)
    path, at = ou_path(True)
    result = nsde.filter_path(
        path, emission, Y, method=Particle(10_000, proposal="bootstrap", seed=3), at=at
    )
    sd = np.sqrt(np.asarray(truth.cov)[:, 0, 0])
    # Standard errors of a bootstrap filter's mean are sd / sqrt(M) times a factor below 3 here.
    assert np.all(np.abs(result.mean - truth.mean)[:, 0] < 4 * 3 * sd / np.sqrt(10_000))
    assert np.allclose(result.cov[:, 0, 0], sd**2, rtol=0.06)
    assert np.allclose(result.predicted_mean, truth.predicted_mean, atol=0.03)
    assert np.allclose(result.increments.sum(), result.log_likelihood)
    assert np.allclose(result.increments, truth.increments, atol=0.05)
    assert result.particles is None


@pytest.mark.slow
def test_variance_estimate(x64):
    # The mean of the estimate, weighted by the squared likelihoods, is the variance (Lee and
    # Whiteley 2018); multinomial resampling.
    chosen = setting(50, "bootstrap", "multinomial", 1.0)

    def one(m, k):
        run = run_filter(m, chosen, k, variance=True)
        return run.log_likelihood, run.variance

    logs, estimates = replicate(False, one, NUM)
    z = np.exp(logs - float(exact(False).log_likelihood))
    actual = (z - 1.0) ** 2
    error = np.sqrt((actual.var() + (estimates * z**2).var()) / NUM)
    assert abs(actual.mean() - (estimates * z**2).mean()) < 4 * error


def test_collapse_is_minus_infinity_and_named():
    path = nsde.SDEPath(OU, TIMES, dist.Normal(0.0, 0.6))
    method = Particle(10, proposal="bootstrap")
    with pytest.warns(ParticleCollapseWarning, match="weight zero"):
        result = _run_to_the_end(path, lambda t, x: dist.Uniform(x - 1, x + 1), method)
    assert result.log_likelihood == -np.inf
    assert result.increments[0] == -np.inf
    assert np.all(np.isfinite(result.mean))


def _run_to_the_end(path, law, method):
    result = jax.block_until_ready(nsde.filter_path(path, law, Y + 1e3, method=method))
    jax.effects_barrier()
    return result


@pytest.mark.slow
def test_precise_data_far_away_in_float32():
    # Log weights of -1e15 and below: the likelihood is tiny, not zero, and never NaN.
    path = nsde.SDEPath(OU, TIMES, dist.Normal(0.0, 0.6))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ParticleCollapseWarning)
        method = Particle(10, proposal="bootstrap")
        result = _run_to_the_end(path, lambda t, x: dist.Normal(x, 1e-4), method)
    assert np.isfinite(result.log_likelihood)
    assert result.log_likelihood < -1e12


@pytest.mark.slow
def test_start_that_is_not_normal(x64):
    # A start of two values: the likelihood is the mean of two Kalman likelihoods.
    ends = jnp.array([-1.0, 1.5])
    init = dist.MixtureSameFamily(dist.Categorical(jnp.array([0.5, 0.5])), dist.Normal(ends, 1e-3))
    exact_logs = [
        nsde.filter_path(
            nsde.SDEPath(OU, TIMES, dist.Normal(end, 1e-3), scheme=nsde.schemes.Euler()),
            emission,
            Y,
            method=nsde.filters.Kalman(),
        ).log_likelihood
        for end in ends
    ]
    path = nsde.SDEPath(OU, TIMES, init, scheme=nsde.schemes.Euler())
    for proposal in ("guided",):
        result = nsde.filter_path(
            path, emission, Y, method=Particle(20_000, proposal=proposal, seed=1)
        )
        error = np.sqrt(float(result.variance))
        wanted = float(jax.nn.logsumexp(jnp.stack(exact_logs)) - np.log(2.0))
        assert abs(float(result.log_likelihood) - wanted) < 4 * error
        assert error < 0.05


@pytest.mark.slow
def test_one_time(x64):
    path = nsde.SDEPath(OU, [0.0], dist.Normal(0.0, 0.6))
    truth = nsde.filter_path(path, emission, np.array([0.5]), method=nsde.filters.Kalman())
    result = nsde.filter_path(path, emission, np.array([0.5]), method=Particle(8))
    assert np.isclose(result.log_likelihood, truth.log_likelihood)


@pytest.mark.slow
def test_keys_of_stretches_of_time(x64):
    chosen = setting(20, "bootstrap")
    path, at = ou_path(True)
    keys = jax.random.split(jax.random.key(7), 4000).reshape(1000, 4)

    def run(m):
        def one(k):
            other = k.at[3].set(jax.random.fold_in(k[3], 1))
            return tuple(run_filter(m, chosen, x).log_likelihood for x in (k, other))

        return jax.lax.map(one, keys, batch_size=500)

    same, near = np.asarray(jax.jit(lambda: on_model(path, at, Y, run))())
    z = np.exp(same - float(exact(True).log_likelihood))
    assert standard_scores(z, 1.0) < 4
    assert np.corrcoef(same, near)[0, 1] > 0.6


def test_hilbert_order_keeps_neighbours_together():
    grid = np.stack(np.meshgrid(np.arange(16), np.arange(16)), -1).reshape(-1, 2).astype(float)
    # Uniform in the cells of the curve: quantiles of a normal law.
    points = jax.scipy.stats.norm.ppf((jnp.asarray(grid) + 0.5) / 16).T
    order = np.asarray(hilbert_order(points, bits=4))
    steps = np.abs(np.diff(grid[order], axis=0)).sum(1)
    assert sorted(order.tolist()) == list(range(256))
    assert np.mean(steps == 1) > 0.95  # cells by the sample's own spread: near all, not all


@pytest.mark.slow
def test_options_are_checked():
    with pytest.raises(ValueError, match="proposal must be one of"):
        Particle(10, proposal="magic")
    with pytest.raises(ValueError, match="num_particles must be at least 1, got 0"):
        Particle(0)
    with pytest.raises(TypeError, match="num_particles must be an integer"):
        Particle(1.5)
    with pytest.raises(ValueError, match="ess_threshold must be between 0 and 1, got 2"):
        Particle(10, ess_threshold=2)
    path, at = ou_path(True)
    with pytest.raises(ValueError, match="kept no history"):
        nsde.filter_path(path, emission, Y, method=Particle(4), at=at).sample(jax.random.key(0))


def spread_of_weights(grid, sde, init, law, y, num_particles):
    """Log likelihood, and by observation the squared coefficient of variation of the weights."""
    path = nsde.SDEPath(sde, grid, init)
    chosen = setting(num_particles, "guided", threshold=1.0)

    def run(model):
        found = run_filter(model, chosen, jax.random.key(0), diagnose=True)
        return found.log_likelihood, found.ess

    log, ess = jax.jit(lambda: on_model(path, grid.index, y, run, law))()
    return float(log), num_particles / np.asarray(ess)[np.asarray(grid.index)] - 1.0


def wide(t, x):
    return 0.8 * jnp.sqrt(1.0 + x**2)


@pytest.mark.slow
def test_guided_noise_is_matched_to_the_particle(x64):
    # Precise data, noise that grows with the state; the likelihood from a table of states.
    num, size = 20, 2000
    grid = nsde.TimeGrid(np.array([0.0, 1.0, 2.0]), 1.0001 / num)
    sde = nsde.SDE(lambda t, x: -0.5 * x, wide)
    y = np.array([np.nan, 2.5, 0.3])
    log, spread = spread_of_weights(grid, sde, 1.0, lambda t, x: dist.Normal(x, 0.05), y, size)
    v, dt = np.arange(-10.0, 12.0, 0.02), 1 / num

    def density(x, mean, sd):
        return np.exp(-0.5 * ((x - mean) / sd) ** 2) / (sd * np.sqrt(2 * np.pi))

    def step(x):
        return density(v, x * (1 - 0.5 * dt), 0.8 * np.sqrt(dt * (1 + x**2)))

    table, later = 0.02 * step(v[:, None]), density(0.3, v, 0.05)
    for k in range(2 * num - 1):
        later = (table @ later) * (density(2.5, v, 0.05) if k == num - 1 else 1.0)
    wanted = np.log(0.02 * np.sum(step(1.0) * later))
    # Without matching the weights' spread is 1.3 at the first observation.
    assert np.max(spread) < 0.6
    assert abs(log - wanted) < 4 * np.sqrt(np.sum(spread) / size)


@pytest.mark.slow
def test_guided_weights_do_not_widen_on_finer_grids(x64):
    times = np.arange(41.0)
    sde = nsde.processes.LotkaVolterra(0.5, 0.0025, 0.3)
    start = jnp.array([71.0, 79.0])
    fine = nsde.TimeGrid(times, 0.01)
    states = np.asarray(nsde.SDEPath(sde, fine, start).sample(jax.random.key(3)))[fine.index]
    y = states + np.random.default_rng(0).normal(size=states.shape)
    y[0] = np.nan
    sums = []
    for steps in (10, 100):
        grid = nsde.TimeGrid(times, 1.0001 / steps)
        law = lambda t, x: dist.Normal(x, 1.0).to_event(1)  # noqa: E731
        _, spread = spread_of_weights(grid, sde, start, law, y, 2000)
        sums.append(np.sum(spread))
    # Variance of the log likelihood: this over the number of particles. Measured: 0.47 and 0.40.
    assert max(sums) < 0.8
    assert sums[1] < 1.2 * sums[0]
