"""PaRIS while a filter runs: exact sums, memory, errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from particle_models import (
    OU,
    Y,
    dense,
    emission,
    on_model,
    ou_path,
    replicate,
    setting,
    standard_scores,
)

import numpyro_sde as nsde
from numpyro_sde.filters import Particle
from numpyro_sde.smc.backward import Dynamics
from numpyro_sde.smc.online import additive_online
from numpyro_sde.smc.particle_filter import run_filter
from numpyro_sde.smc.smoothers import draw_paths
from numpyro_sde.statespace.reference import smoothed_reference

NUM = 400


def area_and_squares(t, dt, x, x_next):
    return jnp.stack([x[0] * dt, x_next[0] ** 2])


def wanted_sums(fine):
    """Log likelihood, and the expected sums from the exact smoothing moments."""
    log_likelihood, mean, variance = dense(fine)
    dt = np.diff(np.asarray(ou_path(fine)[0].times))
    sums = np.array([np.sum(mean[:-1] * dt), np.sum(mean[1:] ** 2 + variance[1:])])
    return log_likelihood, sums


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fine", "proposal", "threshold"),
    [
        (True, "bootstrap", 0.7),
        pytest.param(False, "bootstrap", 0.7, marks=pytest.mark.slow),
        pytest.param(True, "guided", 1.0, marks=pytest.mark.slow),
        pytest.param(True, "residual_bridge", 0.7, marks=pytest.mark.slow),
    ],
)
def test_sums_are_those_of_the_smoothing_law(fine, proposal, threshold, x64):
    # Weighted by its likelihood a run's estimate is unbiased: its first ancestor has the law of
    # backward sampling, which the moves to others keep.
    chosen = setting(60, proposal, threshold=threshold)

    def one(model, key):
        result = additive_online(model, chosen, key, area_and_squares)
        return result.log_likelihood, result.sums[-1]

    logs, sums = replicate(fine, one, NUM, batch_size=100)
    log_likelihood, wanted = wanted_sums(fine)
    w = np.exp(logs - log_likelihood)[:, None]
    assert np.max(standard_scores(w * (sums - wanted), 0.0)) < 4
    # The model's parameters are in single precision.
    assert abs(w.mean() - 1.0) < 4 * w.std(ddof=1) / np.sqrt(NUM) + 1e-7


def term(t, dt, x, x_next):
    return dt * x[0]


def temporary_bytes(num_times, num_particles, substeps=1):
    grid = nsde.TimeGrid(0.1 * np.arange(num_times), 0.1001 / substeps)
    path = nsde.SDEPath(OU, grid, dist.Normal(0.0, 0.6), scheme=nsde.schemes.Euler())
    method = Particle(num_particles, proposal="bootstrap")

    def run(y):
        return nsde.filter_additive(path, emission, y, term, method=method, at=grid.index)

    y = jax.ShapeDtypeStruct((num_times,), jnp.float32)
    return jax.jit(run).lower(y).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("substeps", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_series(substeps):
    # One copy of the grid and of the data stays: time, length and index of each step, 4 bytes
    # each (the time twice), and the value and presence of an observation: 21 bytes a step in
    # all, where one byte for each particle would be 64.
    num_times = 100_000
    assert temporary_bytes(num_times, 64, substeps) < 24 * substeps * num_times + 100_000


@pytest.mark.slow
def test_growth_has_no_part_of_the_particles():
    few, many = (
        temporary_bytes(20_000, count) - temporary_bytes(1000, count) for count in (50, 500)
    )
    assert abs(few - many) < 1000


@pytest.mark.slow
def test_nonlinear_sums_are_those_of_exact_backward_sampling(x64):
    # Blocks of five steps, a double well, uneven data: bridges are linearised along other lines.
    well = nsde.processes.DoubleWell(linear=1.0, cubic=1.0, scale=0.8)
    times = np.array([0.0, 0.9, 1.8, 3.0])
    grid = nsde.TimeGrid(times, 0.25)
    path = nsde.SDEPath(well, grid, dist.Normal(0.5, 0.5), scheme=nsde.schemes.Euler())
    y = np.array([0.9, 1.2, np.nan, -0.8])
    chosen = setting(100, "bootstrap", threshold=0.7)

    def both(model, key):
        keys = jax.random.split(key, 3)
        online = additive_online(model, chosen, keys[0], area_and_squares)
        run = run_filter(model, chosen, keys[1], history=True)
        law = Dynamics.of(model, smoothed_reference(model))
        paths, _ = draw_paths(law, run.history, keys[2], 20, method="exact")
        dt = jnp.asarray(model.dt)
        sums = jax.vmap(
            lambda x: jnp.sum(jax.vmap(partial(area_and_squares, 0.0))(dt, x[:-1], x[1:]), axis=0)
        )(paths)
        return online, (sums.mean(0), run.log_likelihood)

    keys = jax.random.split(jax.random.key(5), 300)

    def run(model):
        return jax.lax.map(lambda k: both(model, k), keys, batch_size=50)

    online, stored = jax.tree.map(np.asarray, jax.jit(lambda: on_model(path, grid.index, y, run))())

    def estimate(sums, logs):
        # Delta method: mean and standard error of a ratio of weighted means.
        w = np.exp(logs - logs.max())[:, None]
        value = (w * sums).sum(0) / w.sum()
        error = (w * (sums - value)).std(0, ddof=1) / w.mean() / np.sqrt(len(w))
        return value, error

    a, a_error = estimate(online.sums[:, -1], online.log_likelihood)
    b, b_error = estimate(*stored)
    assert np.max(np.abs(a - b) / np.hypot(a_error, b_error)) < 4


def test_a_single_time_has_no_sums():
    path = nsde.SDEPath(OU, [0.0], dist.Normal(0.0, 0.6), scheme=nsde.schemes.Euler())
    result = nsde.filter_additive(path, emission, [0.2], term, method=Particle(10))
    assert result.sums.shape == (0,)
    assert np.isfinite(result.log_likelihood)


def test_what_is_refused():
    path, at = ou_path(True)
    run = partial(nsde.filter_additive, path, emission, Y, term, at=at)
    with pytest.raises(TypeError, match=r"method must be nsde.filters.Particle"):
        run(method=nsde.filters.Kalman())
    with pytest.raises(ValueError, match="num_backward must be at least 2"):
        run(method=Particle(10), num_backward=1)
    with pytest.raises(ValueError, match="one random key"):
        run(method=Particle(10, key=jax.random.split(jax.random.key(0), 3)))
    fhn = nsde.processes.FitzHughNagumo(epsilon=0.1, gamma=1.5, beta=0.8, scale=0.3)
    rough = nsde.SDEPath(fhn, [0.0, 0.1], jnp.array([-0.8, -0.5]), scheme=nsde.schemes.Euler())
    with pytest.raises(ValueError, match="filter_additive weighs transitions"):
        nsde.filter_additive(
            rough, lambda t, x: dist.Normal(x[0], 0.1), [0.1, 0.2], term, method=Particle(10)
        )
