"""A step too long for Euler is said so once, on the data's own path."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import numpyro_sde as nsde
from numpyro_sde.distributions import step_check
from numpyro_sde.distributions.step_check import CoarseStepWarning, rate_times_step


@pytest.fixture(autouse=True)
def forget():
    step_check._seen.clear()


def well(dt, scheme=None, n=400):
    """A double well that relaxes at 8 in the wells: `4 (x - x^3)`, slope -8 at 1 and -1."""
    sde = nsde.processes.DoubleWell(linear=4.0, cubic=4.0, scale=1.0)
    return nsde.SDEPath(sde, dt * np.arange(n), 1.0, scheme=scheme)


def data(dt, n=400):
    """A path of the process itself, by Euler at a tenth of the step."""
    fine = well(dt / 10, n=10 * n).sample(jax.random.key(1))
    return np.asarray(fine)[::10]


def told(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if issubclass(w.category, CoarseStepWarning)]


@pytest.mark.parametrize(("dt", "fires"), [(0.02, True), (0.002, False)])
def test_it_fires_on_the_double_well_where_bands_of_the_drift_fail(dt, fires):
    path, x = well(dt), data(dt)
    largest = float(np.max(np.abs(4.0 * (1.0 - 3.0 * x[:-1] ** 2))) * dt)
    assert rate_times_step(path, x) == pytest.approx(largest, rel=1e-4)
    assert (largest > 0.05) == fires
    messages = told(lambda: path.log_prob(x))
    assert len(messages) == int(fires)
    if fires:
        assert "LocalLinear()" in messages[0]
        assert "max_step=0.00" in messages[0]
    assert told(lambda: path.log_prob(x)) == []  # once


def test_it_is_silent_under_other_schemes_and_under_tracing():
    x = data(0.02)
    assert told(lambda: well(0.02, nsde.schemes.LocalLinear()).log_prob(x)) == []
    assert told(lambda: jax.jit(well(0.02).log_prob)(x)) == []
    assert (
        told(
            lambda: jax.grad(
                lambda s: nsde.SDEPath(
                    nsde.SDE(lambda t, x, p: -p * x, lambda t, x, p: 1.0, params=s), [0.0, 1.0], 0.0
                ).log_prob(jnp.array([0.0, 1.0]))
            )(5.0)
        )
        == []
    )


def test_filters_that_go_by_the_scheme_say_it():
    path, y = well(0.02, n=50), data(0.02, n=50)
    emission = lambda t, x: dist.Normal(x, 0.1)  # noqa: E731
    for method, count in ((nsde.filters.ExtendedKalman(), 1), (nsde.filters.MomentMatching(), 0)):
        step_check._seen.clear()
        run = lambda m=method: nsde.filter_path(path, emission, y, method=m)  # noqa: E731
        assert len(told(run)) == count


def test_it_takes_the_rate_of_several_states_in_any_units():
    """A damped oscillator of period 1/1000: rates of modulus 2 pi 1000, positions in millionths."""
    w = 2e3 * np.pi
    A = jnp.array([[0.0, 1e-6], [-(w**2) * 1e6, -0.1 * w]])
    sde = nsde.SDE(lambda t, x: A @ x, lambda t, x: 0.1 * x)
    path = nsde.SDEPath(sde, [0.0, 1e-4, 2e-4], jnp.ones(2))
    assert rate_times_step(path, jnp.ones((3, 2))) == pytest.approx(w * 1e-4, rel=0.2)
    (message,) = told(lambda: step_check.warn_coarse_step(path, jnp.ones((3, 2))))
    assert "Kessler()" in message


def test_panels_with_their_own_clocks():
    sde = nsde.SDE(lambda t, x, p: -p * x, lambda t, x, p: 1.0, params=jnp.array([1.0, 30.0]))
    path = nsde.SDEPath(sde, np.array([[0.0, 0.01], [0.0, 0.02]]), 0.0)
    assert rate_times_step(path, jnp.zeros((2, 2))) == pytest.approx(0.6, rel=1e-4)
