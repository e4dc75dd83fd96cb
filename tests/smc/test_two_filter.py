"""Two-filter smoothing against the joint normal law, and against backward sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from particle_models import Y, dense, emission, on_model, ou_path, replicate, setting

import numpyro_sde as nsde
from numpyro_sde.filters import Particle
from numpyro_sde.smc.backward import Dynamics
from numpyro_sde.smc.online import additive_online
from numpyro_sde.smc.particle_filter import run_filter
from numpyro_sde.smc.smoothers import draw_paths
from numpyro_sde.smc.two_filter import two_filter
from numpyro_sde.statespace.reference import smoothed_reference


def scores(values, truth, truth_error=0.0):
    error = np.hypot(values.std(0, ddof=1) / np.sqrt(len(values)), truth_error)
    return np.abs(values.mean(0) - truth) / error


@pytest.mark.parametrize(
    ("fine", "proposal", "join"),
    [
        pytest.param(False, "bootstrap", "all", marks=pytest.mark.slow),
        pytest.param(True, "bootstrap", "all", marks=pytest.mark.slow),
        pytest.param(True, "guided", "all", marks=pytest.mark.slow),
        pytest.param(False, "bootstrap", "pairs", marks=pytest.mark.slow),
        pytest.param(True, "guided", "pairs", marks=pytest.mark.slow),
    ],
)
def test_linear_moments(fine, proposal, join, x64):
    # A self-normalised estimate of M = 200 particles has a bias near sd / M: of 200 runs the
    # error is near sd / sqrt(200 M), equal to 14 such biases.
    chosen = setting(200, proposal)

    def one(model, key):
        result = two_filter(model, chosen, key, join=join)
        return result.mean[:, 0], result.cov[:, 0, 0], result.ess

    mean, cov, ess = replicate(fine, one, 200, batch_size=20)
    _, truth, variance = dense(fine)
    rows = np.asarray(ou_path(fine)[1])
    assert np.max(scores(mean, truth[rows])) < 4
    assert np.max(scores(cov, variance[rows])) < 4
    assert np.min(ess.mean(0)) > (100 if join == "all" else 40)


@pytest.mark.slow
def test_public_function_on_a_linear_model(x64):
    path, at = ou_path(False)
    result = nsde.two_filter(path, emission, Y, method=Particle(2000, seed=1), at=at)
    _, truth, variance = dense(False)
    assert result.rows.tolist() == [0, 1, 2, 3]
    # Error of the mean of weighted particles, forward and backward ones contributing alike.
    error = np.sqrt(2 * variance / result.ess)
    assert np.max(np.abs(result.mean[:, 0] - truth) / error) < 4
    w = np.exp(result.log_weights)
    assert np.allclose(w.sum(-1), 1.0)
    assert np.allclose(np.einsum("km,kmd->kd", w, result.particles), result.mean)


def growth(t, x):
    return x - x**3


def spread(t, x):
    return 0.4 * jnp.sqrt(1.0 + x**2)


def counts(t, x):
    return dist.Poisson(jnp.exp(1.0 + x))


NONLINEAR = {
    # A double well seen through counts, noise that grows with the state, known start.
    "counts": (nsde.SDE(growth, spread), 0.5, counts, np.array([4.0, 7.0, np.nan, 5.0, 1.0])),
    "normal": (
        nsde.processes.DoubleWell(linear=1.0, cubic=1.0, scale=0.8),
        dist.Normal(0.5, 0.5),
        emission,
        np.array([0.9, 1.2, 0.8, np.nan, -0.2]),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NONLINEAR)
def test_nonlinear_moments_are_those_of_backward_sampling(name, x64):
    sde, init, law, y = NONLINEAR[name]
    grid = nsde.TimeGrid(np.array([0.0, 0.5, 1.0, 1.6, 2.2]), 0.16)
    path = nsde.SDEPath(sde, grid, init, scheme=nsde.schemes.Euler())
    chosen = setting(500, "bootstrap")
    rows = np.asarray(grid.index)

    def both(model, key):
        keys = jax.random.split(key, 3)
        ours = two_filter(model, chosen, keys[0])
        run = run_filter(model, chosen, keys[1], history=True)
        steps = Dynamics.of(model, smoothed_reference(model))
        paths, _ = draw_paths(steps, run.history, keys[2], 500, num_moves=3)
        x = paths[:, rows, 0]
        return (ours.mean[:, 0], ours.cov[:, 0, 0]), (x.mean(0), x.var(0)), ours.ess

    keys = jax.random.split(jax.random.key(7), 60)

    def run(model):
        return jax.lax.map(lambda k: both(model, k), keys, batch_size=4)

    # Biases of order 1 / M are an eighth of the standard errors of 60 runs with M = 500.
    found, wanted, ess = jax.tree.map(
        np.asarray, jax.jit(lambda: on_model(path, grid.index, y, run, law))()
    )
    random = slice(1, None) if name == "counts" else slice(None)
    for a, b in zip(found, wanted, strict=True):
        a, b = a[:, random], b[:, random]
        error = b.std(0, ddof=1) / np.sqrt(len(b))
        assert np.max(scores(a, b.mean(0), error)) < 4
    assert np.min(ess.mean(0)) > 50


def test_a_single_time_and_what_is_refused():
    path = nsde.SDEPath(
        nsde.processes.OrnsteinUhlenbeck(1.0, 0.3, 0.7), [0.0], 0.4, scheme=nsde.schemes.Euler()
    )
    one = nsde.two_filter(path, emission, [0.2], method=Particle(5))
    assert np.allclose(one.mean, 0.4)
    with pytest.raises(TypeError, match=r"method must be nsde.filters.Particle"):
        nsde.two_filter(path, emission, [0.2], method=nsde.filters.Kalman())
    with pytest.raises(ValueError, match="join must be"):
        nsde.two_filter(path, emission, [0.2], method=Particle(5), join="none")
    fhn = nsde.processes.FitzHughNagumo(epsilon=0.1, gamma=1.5, beta=0.8, scale=0.3)
    rough = nsde.SDEPath(fhn, [0.0, 0.1], jnp.array([-0.8, -0.5]), scheme=nsde.schemes.Euler())
    with pytest.raises(ValueError, match="two_filter weighs transitions"):
        nsde.two_filter(rough, lambda t, x: dist.Normal(x[0], 0.1), [0.1, 0.2], method=Particle(10))


def rotation_terms(t, dt, x, x_next):
    return dt * x[0] * x[1] + x_next


@pytest.mark.slow
def test_two_states_one_seen(x64):
    # A noisy rotation, one coordinate seen: smoothed moments and a sum of both, from Kalman's.
    sde = nsde.processes.LinearSDE(
        jnp.array([[-0.3, 1.0], [-1.0, -0.3]]), jnp.zeros(2), jnp.array([[0.5, 0.0], [0.3, 0.6]])
    )
    times = np.array([0.0, 0.3, 0.7, 1.1])
    path = nsde.SDEPath(
        sde, times, dist.MultivariateNormal(jnp.ones(2), jnp.eye(2)), scheme=nsde.schemes.Euler()
    )
    y = np.array([0.8, 1.1, np.nan, 0.2])

    def law(t, x):
        return dist.Normal(x[0], 0.3)

    exact = nsde.filter_path(path, law, y, method=nsde.filters.Kalman())
    mean, cov = (np.asarray(a) for a in exact.smooth())
    dt = np.diff(times)[:, None]
    product = (mean[:-1, :1] * mean[:-1, 1:] + cov[:-1, 0, 1:]) * dt
    sums = np.sum(product + mean[1:], axis=0)
    chosen = setting(300, "bootstrap")

    def one(model, key):
        ours = two_filter(model, chosen, key)
        online = additive_online(model, chosen, key, rotation_terms)
        return ours.mean, ours.cov, (online.log_likelihood, online.sums[-1])

    keys = jax.random.split(jax.random.key(3), 200)

    def run(model):
        return jax.lax.map(lambda k: one(model, k), keys, batch_size=10)

    # Biases of order 1 / M are below a tenth of the standard errors of 200 runs.
    m, c, (logs, online) = jax.tree.map(
        np.asarray, jax.jit(lambda: on_model(path, np.arange(4), y, run, law))()
    )
    assert np.max(scores(m, mean)) < 4
    assert np.max(scores(c, cov)) < 4
    w = np.exp(logs - float(exact.log_likelihood))[:, None]
    assert np.max(scores(w * (online - sums), 0.0)) < 4
