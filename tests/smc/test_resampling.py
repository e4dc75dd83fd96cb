"""Resampling: unbiased, and its conditional form is its law given that particle 0 survives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_sde.smc.resampling import SCHEMES, effective_size, running_sum

WEIGHTS = np.array([0.37, 0.08, 0.25, 0.28, 0.02])
NUM = 40_000


def counts_of(scheme, conditional, seed):
    """Numbers of offspring in many runs."""
    fn = SCHEMES[scheme]
    keys = jax.random.split(jax.random.key(seed), NUM)
    ancestors = jax.jit(
        jax.vmap(lambda k: fn(k, jnp.asarray(3.0 * WEIGHTS), conditional=conditional))
    )(keys)
    ancestors = np.asarray(ancestors)
    return ancestors, (ancestors[:, :, None] == np.arange(5)).sum(1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_expected_offspring_is_the_weight(scheme):
    _, counts = counts_of(scheme, False, 1)
    error = counts.std(0) / np.sqrt(NUM) + 1e-9
    assert np.all(counts.sum(1) == 5)
    assert np.max(np.abs(counts.mean(0) - 5 * WEIGHTS) / error) < 4
    if scheme in ("systematic", "ssp", "residual"):
        # These differ from the expectation by less than one (residual: not below its whole part).
        assert np.all(counts >= np.floor(5 * WEIGHTS))
    if scheme in ("systematic", "ssp"):
        assert np.all(counts <= np.ceil(5 * WEIGHTS))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_conditional_form_is_biased_by_the_size_of_the_first_family(scheme):
    # Given that a slot drawn at random descends from particle 0, counts have the scheme's law
    # weighted by the size of that family: means and second moments are compared.
    _, free = counts_of(scheme, False, 2)
    ancestors, kept = counts_of(scheme, True, 3)
    assert np.all(ancestors[:, 0] == 0)
    weight = free[:, 0] / free[:, 0].mean()
    for moment in (lambda c: c, lambda c: (c[:, :, None] * c[:, None, :]).reshape(NUM, -1)):
        wanted, got = moment(free) * weight[:, None], moment(kept)
        error = np.sqrt((wanted.var(0) + got.var(0)) / NUM) + 1e-9
        assert np.max(np.abs(wanted.mean(0) - got.mean(0)) / error) < 4


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("conditional", [False, True])
def test_extreme_weights(scheme, conditional):
    fn = jax.jit(lambda w: SCHEMES[scheme](jax.random.key(0), w, conditional=conditional))
    alone = fn(jnp.array([1.0, 0.0, 0.0, 0.0]))
    assert alone.tolist() == [0, 0, 0, 0]
    assert alone.dtype == jnp.int32
    nothing = np.asarray(fn(jnp.zeros(4)))  # after a collapse: any ancestors, but indices
    assert np.all((nothing >= 0) & (nothing < 4))
    even = np.asarray(fn(jnp.full(4, 1e-30)))
    assert np.all((even >= 0) & (even < 4))


def test_many_particles_in_float32():
    # Running sums of a million weights: every particle of equal weight has one offspring.
    ancestors = np.asarray(SCHEMES["systematic"](jax.random.key(0), jnp.ones(1_000_000)))
    assert np.abs(ancestors - np.arange(1_000_000)).max() <= 1


def test_running_sum_and_effective_size():
    x = np.random.default_rng(0).uniform(size=1037)
    assert np.allclose(running_sum(jnp.asarray(x)), np.cumsum(x), rtol=1e-5)
    assert float(effective_size(jnp.zeros(3))) == 0.0
    assert np.isclose(float(effective_size(jnp.asarray(x))), x.sum() ** 2 / (x**2).sum())
