"""References are checked before they are believed: guides where linearising runs away."""

import jax
import jax.numpy as jnp
import multimodal
import numpy as np
import numpyro.distributions as dist
import pytest

import numpyro_sde as nsde
from numpyro_sde.distributions.observation import Emission
from numpyro_sde.distributions.state_space import ObservedPath
from numpyro_sde.distributions.statement import make_statement
from numpyro_sde.filters import Particle
from numpyro_sde.statespace.reference import believed_guide, kalman_reference


def statement(emission, grid):
    return make_statement(
        Emission(emission, None, None, None, len(grid.index), ()), grid.index, (), ()
    )


def estimate(path, seen, method, repeats):
    """Independent estimates of a log likelihood."""

    def one(key):
        observed = ObservedPath(path, (), (seen,))
        return observed.run(method.with_key(key), lambda m, model: m.log_likelihood(model))

    return jax.lax.map(one, jax.random.split(jax.random.key(1), repeats))


def log_likelihoods(scales, particles, repeats, proposal):
    """Estimates `(scales, repeats)` of the double well's log likelihood."""
    seen = statement(multimodal.noisy, multimodal.WELL_GRID), jnp.asarray(multimodal.data("well"))
    method = Particle(particles, proposal=proposal)

    def run(scale):
        return estimate(multimodal.well_path(scale), seen, method, repeats)

    return np.asarray(jax.jit(lambda s: jax.lax.map(run, s))(jnp.asarray(scales)))


def in_errors(estimates, exact):
    """Mean of the likelihood estimates less the exact one, in Monte Carlo errors, by row."""
    ratios = np.exp(estimates - exact[:, None])
    error = ratios.std(1, ddof=1) / np.sqrt(ratios.shape[1])
    return (ratios.mean(1) - 1.0) / error


@pytest.mark.slow
def test_a_guide_does_not_run_away_between_observations(x64):
    """Along the smoother's own mean they were 200 to 2e11 nats off at 15 of these scales."""
    log_scales, exact = multimodal.exact("well")
    inside = (log_scales > -0.76) & (log_scales < 1.01)
    assert inside.sum() == 61
    estimates = log_likelihoods(np.exp(log_scales[inside]), 64, 8, "guided")
    assert np.all(np.isfinite(estimates))
    assert np.max(np.abs(in_errors(estimates, exact[inside]))) < 4.0
    assert estimates.max() < 11 * dist.Normal(0.0, 0.1).log_prob(0.0)


@pytest.mark.slow
@pytest.mark.parametrize("proposal", ["guided", "defensive"])
def test_particles_without_weight_do_not_take_the_digits_of_others(x64, proposal):
    """Where Euler paths explode the look-ahead of a lost particle was 1e229, and the rest was 0."""
    scales = np.array([5.5, 7.0])
    exact = np.array([multimodal.grid_log_likelihood(s, multimodal.data("well")) for s in scales])
    estimates = log_likelihoods(scales, 64, 16, proposal)
    assert np.max(np.abs(in_errors(estimates, exact))) < 4.0
    assert np.max(estimates - exact[:, None]) < 4.0


def test_what_runs_away_is_found_by_the_guides_own_path(x64):
    seen = statement(multimodal.noisy, multimodal.WELL_GRID), jnp.asarray(multimodal.data("well"))

    def look(scale):
        path = multimodal.well_path(scale)

        def both(model):
            believed = believed_guide(model)
            return kalman_reference(model), believed.guide.reference, believed.log_fit

        return ObservedPath(path, (), (seen,)).map(both)

    log_scales, exact = multimodal.exact("well")
    for scale, true in ((np.exp(log_scales[54]), exact[54]), (np.exp(log_scales[40]), exact[40])):
        smoother, believed, fit = jax.jit(look)(scale)
        runs_away = jnp.max(jnp.abs(smoother)) > 3.0
        assert bool(runs_away) == (scale > 1.0)
        assert jnp.max(jnp.abs(believed)) < 2.0
        # A Laplace approximation by one path of several modes: near, not exact.
        assert abs(fit - true) < 3.0
        if not runs_away:
            np.testing.assert_allclose(smoother, believed, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("proposal", ["guided", "bootstrap"])
def test_a_neuron_seen_by_its_voltage_has_a_likelihood(x64, proposal):
    path = multimodal.neuron_path(0.092, 0.278)
    result = nsde.filter_path(
        path, multimodal.voltage, multimodal.data("fhn"), at=multimodal.FHN_GRID.index,
        method=Particle(300, proposal=proposal),
    )  # fmt: skip
    assert np.isfinite(result.log_likelihood)


class Logistic(dist.Logistic):
    """A law that does not tell its moments."""

    @property
    def mean(self):
        raise NotImplementedError

    variance = mean


@pytest.mark.slow
def test_an_emission_without_moments_guides_by_its_curvature(x64):
    grid, y = nsde.TimeGrid(np.arange(6.0), 0.25), np.array([0.3, 0.1, -0.5, 0.2, 0.9, 0.4])
    path = nsde.SDEPath(
        nsde.processes.OrnsteinUhlenbeck(1.0, 0.0, 1.0), grid, dist.Normal(0.0, 0.7),
        scheme=nsde.schemes.Euler(),
    )  # fmt: skip
    seen = statement(lambda t, x: Logistic(x, 0.2), grid), jnp.asarray(y)
    values = np.array(
        [
            jax.jit(lambda p=p: estimate(path, seen, Particle(400, proposal=p), 12))()
            for p in ("bootstrap", "guided", "auxiliary")
        ]
    )
    means, sds = values.mean(1), values.std(1, ddof=1)
    for k in (1, 2):
        assert abs(means[k] - means[0]) < 4.0 * np.sqrt((sds[k] ** 2 + sds[0] ** 2) / 12.0)
        assert sds[k] < 0.5
