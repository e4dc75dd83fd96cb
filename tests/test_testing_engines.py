"""`check_filter` and `check_path_law` pass what is right and catch what is wrong on purpose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import numpyro_sde as nsde
from numpyro_sde.testing import check_filter, check_path_law
from numpyro_sde.testing.quadratic import Quadratic, add_linear_path, add_observations


class FillsGaps(nsde.filters.Kalman):
    """Takes what is missing for zeros."""

    def log_likelihood(self, model):
        full = [i._replace(present=np.ones_like(i.present)) for i in model.instruments]
        return super().log_likelihood(model._replace(instruments=tuple(full)))


class HearsOne(nsde.filters.Kalman):
    """Listens to the first instrument alone."""

    def log_likelihood(self, model):
        return super().log_likelihood(model._replace(instruments=model.instruments[:1]))


class TooSure(nsde.filters.Kalman):
    """Right likelihood; draws from a law whose start is too narrow."""

    def filter(self, model):
        return super().filter(model._replace(init_cov=0.5 * model.init_cov))


class Loud(nsde.filters.Particle):
    """Likelihood estimates 1.5 times too high."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)

    def log_likelihood(self, model):
        return super().log_likelihood(model) + np.log(1.5)


class OffByAFactor(nsde.guides.GaussianMarkovPath):
    """Draws as its base does, but misstates their density."""

    def draw(self, *args):
        path, log_q = super().draw(*args)
        return path, log_q - 0.5

    def log_prob(self, *args):
        return super().log_prob(*args) - 0.5


@pytest.mark.slow
def test_a_filter_that_is_right_passes():
    check_filter(
        nsde.filters.Kalman(), ways=["plain", "two instruments", "vector, missing in part"]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "way", "message"),
    [
        (FillsGaps(), "data missing in part", "data missing in part: log likelihood at b = 0.4"),
        (HearsOne(), "two instruments", "two instruments: log likelihood"),
        (TooSure(), "plain", "of the paths drawn must be"),
        (Loud(20), "plain", r"mean of likelihood / truth .* must be 1.0+, got 1\.[45]"),
    ],
    ids=["gaps as zeros", "one instrument", "narrow draws", "biased"],
)
def test_a_filter_that_is_wrong_is_caught(method, way, message):
    with pytest.raises(AssertionError, match=message):
        check_filter(method, ways=[way])


def test_a_wrong_filter_may_be_right_where_its_fault_does_not_show():
    check_filter(FillsGaps(), ways=["plain"], num_draws=0)


@pytest.mark.slow
def test_path_laws():
    check_path_law(nsde.guides.GaussianMarkovPath(), ways=["plain"])
    with pytest.raises(AssertionError, match="plain: mean of weights / evidence"):
        check_path_law(OffByAFactor(), ways=["plain"])


def test_arguments():
    with pytest.raises(TypeError, match="filters"):
        check_filter(nsde.filters.Kalman)
    with pytest.raises(TypeError, match="PathLaw"):
        check_path_law(nsde.filters.Kalman())
    with pytest.raises(ValueError, match=r"ways must be among .*'two instruments'"):
        check_filter(nsde.filters.Kalman(), ways=["twice"])


def test_the_truth_by_a_grid():
    """Weighted densities of a path of two times, integrated by the trapezium rule."""
    joint = Quadratic(2)
    add_linear_path(joint, [[0], [1]], [0.0, 0.7], -1.3, 0.5, 0.8, 0.2, 1.2)
    add_observations(joint, [0, 1], [0.4, 0.9], slope=[1.0, -2.0], sd=0.6, weight=[0.5, 3.0])
    F, c = np.exp(-1.3 * 0.7), 0.5 / 1.3 * (1 - np.exp(-1.3 * 0.7))
    q = 0.64 * (1 - F**2) / 2.6
    x = np.linspace(-8.0, 8.0, 1601)
    a, b = np.meshgrid(x, x, indexing="ij")

    def normal(r, v):
        return -0.5 * (r**2 / v + np.log(2 * np.pi * v))

    log_f = normal(a - 0.2, 1.2) + normal(b - F * a - c, q)
    log_f += 0.5 * normal(0.4 - a, 0.36) + 3.0 * normal(0.9 + 2.0 * b, 0.36)
    grid = np.log(np.trapezoid(np.trapezoid(np.exp(log_f), x), x))
    np.testing.assert_allclose(joint.evidence(), grid, rtol=1e-9)
    np.testing.assert_allclose(joint.at([x[900], x[700]]), log_f[900, 700], rtol=1e-12)
    held = joint.known([1], [x[700]]).evidence()
    np.testing.assert_allclose(held, np.log(np.trapezoid(np.exp(log_f[:, 700]), x)), rtol=1e-9)


def test_checks_leave_the_precision_as_it_was():
    check_filter(nsde.filters.Kalman(), ways=["plain"], num_draws=0)
    assert jnp.zeros(1).dtype == (jnp.float64 if jax.config.jax_enable_x64 else jnp.float32)
