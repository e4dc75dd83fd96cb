"""Particle smoothers against the Rauch-Tung-Striebel smoother."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from particle_models import Y, emission, exact, ou_path, replicate, setting, standard_scores

import numpyro_sde as nsde
from numpyro_sde.filters import Particle
from numpyro_sde.smc.backward import Dynamics
from numpyro_sde.smc.particle_filter import run_filter
from numpyro_sde.smc.smoothers import additive, draw_paths, fixed_lag
from numpyro_sde.statespace.reference import smoothed_reference

NUM = 400


def smoothed_moments(fine):
    mean, cov = exact(fine).smooth()
    return np.asarray(mean)[:, 0], np.asarray(cov)[:, 0, 0]


def moments_of(model, key, chosen, method):
    """Weight of one filter, and first and second moments of paths drawn from it."""
    filter_key, draw_key = jax.random.split(key)
    run = run_filter(model, chosen, filter_key, history=True)
    law = Dynamics.of(model, smoothed_reference(model))
    paths, _ = draw_paths(law, run.history, draw_key, 10, method=method)
    return run.log_likelihood, paths[..., 0].mean(0), (paths[..., 0] ** 2).mean(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fine", "proposal", "method"),
    [
        (True, "bootstrap", "mcmc"),
        *[
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (False, "bootstrap", "mcmc"),
                (False, "bootstrap", "rejection"),
                (False, "bootstrap", "exact"),
                (True, "guided", "mcmc"),
                (True, "bootstrap", "exact"),
                (True, "bootstrap", "genealogy"),
            )
        ],
    ],
)
def test_paths_have_the_smoothing_law(fine, proposal, method, x64):
    # Weighted by its likelihood, a run's mean of a function of the path is unbiased up to that
    # of the number of backward moves; with 60 particles far below the error here.
    chosen = setting(60, proposal, threshold=0.7)
    one = partial(moments_of, chosen=chosen, method=method)
    logs, first, second = replicate(fine, one, NUM, batch_size=100)
    mean, variance = smoothed_moments(fine)
    w = np.exp(logs - float(exact(fine).log_likelihood))[:, None]
    assert np.max(standard_scores(w * (first - mean), 0.0)) < 4
    assert np.max(standard_scores(w * (second - mean**2 - variance), 0.0)) < 4


@pytest.mark.slow
def test_additive_functional(x64):
    # The area below the path and the sum of its squares, from the exact smoothing moments.
    chosen = setting(60, "bootstrap", threshold=0.7)
    path, _ = ou_path(True)
    dt = np.diff(np.asarray(path.times))
    mean, variance = smoothed_moments(True)
    wanted = np.array([np.sum(mean[:-1] * dt), np.sum(mean[1:] ** 2 + variance[1:])])

    def term(t, dt, x, x_next):
        return jnp.stack([x[0] * dt, x_next[0] ** 2])

    def one(model, key):
        filter_key, sum_key = jax.random.split(key)
        run = run_filter(model, chosen, filter_key, history=True)
        law = Dynamics.of(model, smoothed_reference(model))
        return run.log_likelihood, additive(law, run.history, sum_key, term)[-1]

    logs, sums = replicate(True, one, NUM, batch_size=100)
    w = np.exp(logs - float(exact(True).log_likelihood))[:, None]
    assert np.max(standard_scores(w * (sums - wanted), 0.0)) < 4


@pytest.mark.slow
def test_fixed_lag_of_the_whole_series_is_the_genealogy(x64):
    path, at = ou_path(True)
    result = nsde.filter_path(path, emission, Y, method=Particle(200, history=True), at=at)
    lines, log_weights = result.genealogies()
    mean, cov = fixed_lag(result.history, path.num_times)
    w = np.exp(log_weights)
    wanted = np.einsum("k,kni->ni", w, lines)
    assert np.allclose(mean, wanted)
    assert np.allclose(cov[:, 0, 0], (w @ (lines[..., 0] - wanted[:, 0]) ** 2))
    filtered, _ = fixed_lag(result.history, 0)
    assert np.allclose(filtered, result.mean)


@pytest.mark.slow
def test_result_of_a_guided_filter_smooths(x64):
    path, at = ou_path(True)
    method = Particle(2000, history=True, seed=2)
    result = nsde.filter_path(path, emission, Y, method=method, at=at)
    mean, cov = result.smooth()
    truth, variance = smoothed_moments(True)
    # 2,000 paths, nearly independent: sd of a mean is sd / sqrt(2000), doubled for ancestors.
    assert np.all(np.abs(mean[:, 0] - truth) < 4 * 2 * np.sqrt(variance / 2000))
    assert np.allclose(cov[:, 0, 0], variance, rtol=0.25)


@pytest.mark.slow
def test_smoothers_say_what_they_cannot_do():
    path, at = ou_path(True)
    result = nsde.filter_path(path, emission, Y, method=Particle(20, history=True), at=at)
    with pytest.raises(ValueError, match="between observed times"):
        result.sample(jax.random.key(0), method="rejection")
    with pytest.raises(ValueError, match="method must be one of"):
        result.sample(jax.random.key(0), method="best")
    with pytest.raises(ValueError, match="num_backward must be at least 2"):
        result.additive(jax.random.key(0), lambda t, dt, x, y: x, num_backward=1)
    with pytest.raises(TypeError, match="no Gaussian backward kernel"):
        result.backward_kernel()


@pytest.mark.slow
def test_degenerate_noise_leaves_the_genealogy():
    fhn = nsde.processes.FitzHughNagumo(epsilon=0.1, gamma=1.5, beta=0.8, scale=0.3)
    rough = nsde.SDEPath(
        fhn, [0.0, 0.05, 0.1], jnp.array([-0.8, -0.5]), scheme=nsde.schemes.Euler()
    )
    result = nsde.filter_path(
        rough,
        lambda t, x: dist.Normal(x[0], 0.1),
        np.array([np.nan, np.nan, -0.8]),
        method=Particle(20, history=True),
    )
    with pytest.raises(ValueError, match="no density"):
        result.sample(jax.random.key(0), method="mcmc")
    assert result.sample(jax.random.key(0), 5).shape == (5, 3, 2)
