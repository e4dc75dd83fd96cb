"""Particle filters that say when they fail; proposals that choose themselves; kinds of keys."""

import warnings

import jax
import jax.numpy as jnp
import multimodal
import numpy as np
import numpyro.distributions as dist
import pytest

import numpyro_sde as nsde
from numpyro_sde.diagnostics.compare.arviz_compat import smooth_log_weights
from numpyro_sde.filters import Particle, ParticleCollapseWarning, UnreliableFilterWarning
from numpyro_sde.infer.racing import judge
from numpyro_sde.smc.tails import pareto_shape


def run(scale, method, y=None):
    y = multimodal.data("well") if y is None else y
    result = nsde.filter_path(
        multimodal.well_path(scale), multimodal.noisy, y, at=multimodal.WELL_GRID.index,
        method=method,
    )  # fmt: skip
    jax.effects_barrier()
    return result


# Sizes whose tail is a whole number: ArviZ 0.23 rounds it up, ArviZ 1 down.
@pytest.mark.parametrize(("shape", "size"), [(0.2, 65), (0.8, 625), (1.2, 4900)])
def test_the_tail_index_is_arvizs(x64, shape, size):
    pytest.importorskip("arviz")
    weights = np.random.default_rng(0).uniform(size=size) ** -shape
    _, theirs = smooth_log_weights(np.log(weights))
    assert float(pareto_shape(jnp.asarray(weights))) == pytest.approx(float(theirs), abs=1e-5)


@pytest.mark.slow
def test_a_filter_that_misses_says_when_and_what_to_do():
    """At a scale of 0.3 no particle crosses between the wells: 70 nats are missing."""
    with pytest.warns(UnreliableFilterWarning, match=r"at time .*grid index") as caught:
        result = run(0.3, Particle(100, proposal="guided"))
    text = str(caught[0].message)
    assert "proposal='auto'" in text
    assert "proposal='guided'" not in text
    assert result.reliability.khat > 0.7
    assert result.reliability.ess < 0.1
    ou = nsde.processes.OrnsteinUhlenbeck(1.0, 0.0, 1.0)
    path = nsde.SDEPath(ou, np.arange(20.0), init=dist.Normal(0.0, 0.7))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnreliableFilterWarning)
        good = nsde.filter_path(
            path, lambda t, x: dist.Normal(x, 0.5), np.zeros(20),
            method=Particle(1000, proposal="bootstrap"),
        )  # fmt: skip
        jax.effects_barrier()
    assert good.reliability.complaints() == []


def test_a_collapse_does_not_advise_what_is_in_use():
    with pytest.warns(ParticleCollapseWarning) as caught:
        run(1.0, Particle(20, proposal="bootstrap"), np.full(11, 1e30))
    text = str(next(w.message for w in caught if w.category is ParticleCollapseWarning))
    assert "proposal='auto' or 'guided'" in text


@pytest.mark.slow
def test_auto_takes_the_guide_where_it_is_exact_and_races_elsewhere(x64):
    ou = nsde.processes.OrnsteinUhlenbeck(1.0, 0.0, 1.0)
    path = nsde.SDEPath(ou, [0.0, 1.0, 2.0], init=dist.Normal(0.0, 0.7))
    linear = nsde.filter_path(
        path, lambda t, x: dist.Normal(x, 0.5), [0.3, 0.5, -0.1], method=Particle(30)
    )
    exact = nsde.filter_path(
        path, lambda t, x: dist.Normal(x, 0.5), [0.3, 0.5, -0.1], method=nsde.filters.Kalman()
    )
    assert linear.reliability.race is None
    assert float(linear.log_likelihood) == pytest.approx(float(exact.log_likelihood), abs=1e-10)
    neuron = nsde.filter_path(
        multimodal.neuron_path(0.092, 0.278), multimodal.voltage, multimodal.data("fhn"),
        at=multimodal.FHN_GRID.index, method=Particle(300),
    )  # fmt: skip
    raced = neuron.reliability.race
    assert raced.chosen > 0.0  # the guide alone is 10 nats low
    assert raced.log_likelihood[0] < jnp.max(raced.log_likelihood)


@pytest.mark.slow
def test_the_same_key_gives_the_same_result_whatever_its_kind():
    results = [
        run(1.0, Particle(50, key=key)) for key in (jax.random.key(3), jax.random.PRNGKey(3))
    ]
    assert results[0].log_likelihood == results[1].log_likelihood
    kept = run(1.0, Particle(50, key=jax.random.PRNGKey(3), history=True))
    draws = [kept.sample(key, 3) for key in (jax.random.key(1), jax.random.PRNGKey(1))]
    np.testing.assert_array_equal(*draws)
    stretches = Particle(50, key=jax.random.split(jax.random.PRNGKey(0), 4))
    assert np.isfinite(run(1.0, stretches).log_likelihood)
    with pytest.raises(TypeError, match="random key is needed"):
        Particle(50, key=3)


def test_a_race_drops_what_is_confidently_low():
    values = (
        np.random.default_rng(0).normal(size=(3, 4, 8)) * np.array([0.1, 1.0, 0.5])[:, None, None]
    )
    values[0] -= 20.0
    race = judge(("sure", "vague", "good"), values, np.ones(3), np.zeros((4, 1)), 64)
    assert [c.kept for c in race.contestants] == [False, True, True]
    assert race.chosen == "good"
    assert "dropped" in str(race)
    # A candidate that collapses where there is mass is dropped, not excused by its spread.
    values[1, 0] = -np.inf
    assert not judge(("a", "b", "c"), values, np.ones(3), np.zeros((4, 1)), 64).contestants[1].kept


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_levels_that_are_chance_are_raced_again(seed):
    """A neuron seen by its voltage: of 64 particles the estimates differ by dozens of nats."""
    kernel = nsde.infer.PMMH(multimodal.neuron)
    kernel.tune(jax.random.key(seed), multimodal.data("fhn"))
    assert kernel.proposals.num_particles == 512
    assert kernel.proposals.chosen in ("bootstrap", "defensive")
    assert kernel.log_likelihood_sd <= 1.5
    # At the posterior's mean 2,048 bootstrap particles have 0.65, 512 have 1.3 (40 runs).
    assert kernel.num_particles <= 2048
