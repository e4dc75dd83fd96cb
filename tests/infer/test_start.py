"""Where chains begin, and when an approximation's curvature is not believed."""

import jax
import jax.numpy as jnp
import multimodal
import numpy as np
import pytest

from numpyro_sde.infer.start import _PLAIN_SCALE, _descend, _descend_on_host, approximate_mode


def searched(potential, start):
    """By the host's search and by the traced one."""
    start = jnp.asarray(start)
    traced = jax.jit(lambda x: _descend(potential, x))(start)
    return _descend_on_host(jax.jit(jax.value_and_grad(potential)), start), traced


@pytest.mark.parametrize("which", [0, 1], ids=["host", "traced"])
def test_curvature_of_a_normal_law_is_its_covariance(which):
    covariance = np.array([[0.04, 0.01], [0.01, 0.09]])
    precision, mean = np.linalg.inv(covariance), np.array([1.0, -2.0])
    mode, factor = searched(
        lambda x: 0.5 * (x - mean) @ jnp.asarray(precision) @ (x - mean), np.zeros(2)
    )[which]
    np.testing.assert_allclose(mode, mean, atol=1e-3)
    np.testing.assert_allclose(factor @ factor.T, covariance, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("which", [0, 1], ids=["host", "traced"])
def test_ripples_are_no_curvature(which):
    """Along the second coordinate the surface is a row of kinks, 200 high."""
    mode, factor = searched(
        lambda x: 50.0 * x[0] ** 2 + 200.0 * jnp.abs(jnp.sin(1_000.0 * x[1])),
        np.array([0.0, 3e-4]),
    )[which]
    np.testing.assert_allclose(mode[0], 0.0, atol=1e-2)
    np.testing.assert_allclose(factor @ factor.T, np.diag([0.01, _PLAIN_SCALE**2]), atol=1e-4)


@pytest.mark.parametrize("seed", [2, 4])
def test_a_filter_that_loses_the_neuron_says_nothing(seed):
    """From these medians the extended Kalman filter is finite, and off by hundreds of nats."""
    key = jax.random.split(jax.random.split(jax.random.key(seed), 4)[0], 3)[0]
    y = multimodal.data("fhn")
    start, _ = approximate_mode(multimodal.neuron, (y,), {}, key)
    np.testing.assert_allclose(start.factor, _PLAIN_SCALE * np.eye(2), atol=1e-6)
    for name, (mean, _) in (
        ("epsilon", multimodal.REFERENCE["fhn"]["log_epsilon"]),
        ("scale", multimodal.REFERENCE["fhn"]["log_scale"]),
    ):
        assert abs(start.z[name] - mean) < 0.5, name
