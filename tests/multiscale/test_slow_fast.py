"""The full coupled system: its coefficients, its steps, its filters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import systems

import numpyro_sde as nsde


def make(**kwargs):
    arguments = {
        "slow_drift": lambda t, x, y, p: -x + y,
        "slow_diffusion": lambda t, x, y, p: p["s"],
        "fast_drift": lambda t, x, y, p: x - 2.0 * y,
        "fast_diffusion": lambda t, x, y, p: 3.0,
        "epsilon": 0.01,
        "params": {"s": 0.5},
    }
    return nsde.SlowFastSDE(**{**arguments, **kwargs})


def test_averaging_scales_the_fast_terms():
    sde = make()
    state = sde.join(1.0, 2.0)
    np.testing.assert_allclose(sde.drift_at(0.0, state), [1.0, -300.0], rtol=1e-6)
    np.testing.assert_allclose(sde.diffusion_at(0.0, state), [0.5, 30.0], rtol=1e-6)


def test_homogenization_scales_forcing_and_fast_terms():
    sde = make(
        scaling="homogenization",
        slow_forcing=lambda t, x, y, p: x * y,
        fast_forcing=lambda t, x, y, p: x,
    )
    state = sde.join(1.0, 2.0)
    np.testing.assert_allclose(sde.drift_at(0.0, state), [1 + 200.0, -3e4 + 100.0], rtol=1e-6)
    np.testing.assert_allclose(sde.diffusion_at(0.0, state), [0.5, 300.0], rtol=1e-6)


def test_vector_parts_and_their_own_noises():
    sde = make(
        slow_drift=lambda t, x, y, p: -x,
        slow_diffusion=lambda t, x, y, p: jnp.array([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]]),
        fast_drift=lambda t, x, y, p: -y,
        fast_diffusion=lambda t, x, y, p: jnp.ones(3),
        epsilon=0.25,
        slow_dim=2,
        fast_dim=3,
    )
    L = sde.diffusion_at(0.0, jnp.zeros(5))
    assert L.shape == (5, 6)
    np.testing.assert_allclose(L[2:, 3:], 2.0 * np.eye(3))
    assert not np.any(L[:2, 3:])
    assert not np.any(L[2:, :3])
    assert sde.coordinates == ("slow[0]", "slow[1]", "fast[0]", "fast[1]", "fast[2]")
    states = jnp.arange(20.0).reshape(4, 5)
    assert sde.slow(states).shape == (4, 2)
    np.testing.assert_array_equal(sde.fast(states), states[:, 2:])


def test_coordinates_of_a_path_are_named():
    sde = make()
    assert sde.coordinates == ("slow", "fast")
    law = nsde.SDEPath(sde, [0.0, 0.1, 0.2], init=jnp.zeros(2), scheme=nsde.schemes.Euler())
    path = law.sample(jax.random.key(0))
    assert sde.slow(path).shape == sde.fast(path).shape == (3,)


def test_functions_without_params_take_three_or_four_arguments():
    three = make(
        slow_drift=lambda t, x, y: -x,
        slow_diffusion=lambda t, x, y: 1.0,
        fast_drift=lambda t, x, y, p: -y,
        fast_diffusion=lambda t, x, y: 1.0,
        params=None,
    )
    np.testing.assert_allclose(three.drift_at(0.0, jnp.ones(2)), [-1.0, -100.0], rtol=1e-6)
    assert three.user_params is None


@pytest.mark.slow
def test_default_step_is_exact_for_linear_dynamics_however_stiff(x64):
    """One step of 20 epsilon against SciPy: covariance C - e^{A h} C e^{A' h}, C stationary."""
    from scipy.linalg import expm, solve_continuous_lyapunov

    sde = systems.ou_ou(epsilon=0.01)
    law = nsde.SDEPath(sde, [0.0, 0.2], init=jnp.array([1.0, -0.5]))
    A = np.array([[-1.0, 0.6], [80.0, -100.0]])
    mean, factor = law.scheme.moments(sde, 0.0, 0.2, jnp.array([1.0, -0.5]))
    np.testing.assert_allclose(mean, expm(0.2 * A) @ np.array([1.0, -0.5]), rtol=1e-8)
    noise = np.diag([0.16, 100.0])
    stationary, move = solve_continuous_lyapunov(A, -noise), expm(0.2 * A)
    want = stationary - move @ stationary @ move.T
    np.testing.assert_allclose(factor @ factor.T, want, rtol=1e-8)


@pytest.mark.slow
def test_the_full_system_is_filtered_from_its_slow_part():
    """The Kalman likelihood tends to that of the averaged system, at rate epsilon."""
    times, data = np.arange(8) * 0.25, jnp.sin(jnp.arange(8.0))

    def log_likelihood(sde, init, slow):
        return nsde.filter_path(
            nsde.SDEPath(sde, times, init=init),
            lambda t, x: dist.Normal(slow(x), 0.2),
            data,
            method=nsde.filters.Kalman(),
        ).log_likelihood

    rate = systems.OU["a"] - systems.OU["b"] * systems.OU["c"]
    ou = nsde.processes.OrnsteinUhlenbeck(rate, 0.0, systems.OU["s"])
    limit = log_likelihood(ou, dist.Normal(0.0, 0.5), lambda x: x)
    init = dist.MultivariateNormal(jnp.zeros(2), jnp.diag(jnp.array([0.25, 0.5])))
    errors = [
        abs(log_likelihood(systems.ou_ou(eps), init, lambda x: x[0]) - limit)
        for eps in (0.02, 0.002)
    ]
    assert errors[1] < 0.2 * errors[0] < 0.2 * abs(limit)


def test_grid_resolves_the_fast_scale():
    assert make().grid([0.0, 1.0], steps_per_scale=4).dt.max() == pytest.approx(0.0025, rel=1e-4)
    sde = make(scaling="homogenization", slow_forcing=lambda t, x, y, p: y, epsilon=0.1)
    assert sde.grid([0.0, 1.0]).dt.max() == pytest.approx(0.002, rel=1e-4)
    with pytest.raises(ValueError, match="steps_per_scale"):
        make().grid([0.0, 1.0], 0)


def test_a_batch_of_separations():
    sde = make(epsilon=jnp.array([0.1, 0.01]))
    law = nsde.SDEPath(sde, [0.0, 0.001], init=jnp.array([0.0, 1.0]), scheme=nsde.schemes.Euler())
    assert law.batch_shape == (2,)
    # One Euler step without noise: y (1 - 2 dt / epsilon).
    moved = law.forward(jnp.array([0.0, 1.0]), jnp.zeros((1, 2)))
    np.testing.assert_allclose(moved[:, 1, 1], [0.98, 0.8], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"epsilon": 0.0}, ValueError, "epsilon must be positive"),
        ({"epsilon": "small"}, TypeError, "epsilon must be a number"),
        ({"slow_drift": 1.0}, TypeError, "slow_drift must be a function"),
        ({"fast_drift": lambda t, y: y}, TypeError, r"fast_drift must take \(t, x, y, p\)"),
        ({"scaling": "both"}, ValueError, "scaling must be"),
        ({"slow_forcing": lambda t, x, y, p: y}, ValueError, "scaling='homogenization'"),
        ({"scaling": "homogenization"}, ValueError, "needs slow_forcing"),
        ({"fast_dim": 0}, ValueError, "fast_dim must be at least 1"),
        ({"slow_dim": 1.5}, TypeError, "slow_dim must be an integer"),
        ({"params": None, "event_dims": {"s": 0}}, ValueError, "without params"),
    ],
)
def test_wrong_arguments_are_refused(change, error, match):
    with pytest.raises(error, match=match):
        make(**change)


@pytest.mark.parametrize(
    ("change", "size", "match"),
    [
        ({"fast_dim": 2}, 2, "1 slow and 2 fast"),
        ({"slow_drift": lambda t, x, y, p: jnp.ones(2)}, 2, "slow_drift must return the shape"),
        ({"fast_diffusion": lambda t, x, y, p: jnp.ones((3, 2))}, 2, "fast_diffusion must return"),
    ],
)
def test_wrong_shapes_are_refused(change, size, match):
    with pytest.raises(ValueError, match=match):
        nsde.SDEPath(make(**change), [0.0, 0.1], init=jnp.zeros(size))
