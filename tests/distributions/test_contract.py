"""The contract that NumPyro's suite holds its own distributions to, for path and data laws.

Like NumPyro's suite, warnings are errors here. The quick run checks every law on everything that
needs few compilations and a few laws on everything; the slow run checks every law on everything.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from laws import EMISSIONS, PATHS, TIMES
from numpyro.distributions.batch_util import promote_batch_shape

import numpyro_sde as nsde
from numpyro_sde import testing

pytestmark = [
    pytest.mark.filterwarnings("error"),
    # The laws here are small, their steps too long on purpose.
    pytest.mark.filterwarnings("ignore::numpyro_sde.distributions.step_check.CoarseStepWarning"),
]

LAWS = {**PATHS, **EMISSIONS}
QUICK = {"batch by params", "fixed vector start", "Poisson"}

every_law = pytest.mark.parametrize("name", LAWS)
some_laws = pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in LAWS]
)


def _law(name):
    case = LAWS[name]
    return case.make(*case.args)


@pytest.mark.slow
@some_laws
def test_shapes_and_support(name, key):
    testing.check_shapes(_law(name), key)


@every_law
def test_has_rsample(name, key):
    testing.check_rsample(_law(name), key)


@every_law
def test_parameter_gradient(name, key):
    testing.check_parameter_gradient(LAWS[name].make, key, args=LAWS[name].args)


@some_laws
def test_expand(name, key):
    testing.check_expand(_law(name), key)


@some_laws
def test_mask_and_to_event(name, key):
    testing.check_wrappers(_law(name), key)


@some_laws
def test_pytree(name, key):
    testing.check_pytree(_law(name), key)


@pytest.mark.slow
@some_laws
def test_site_of_a_model(name, key):
    testing.check_model(_law(name), key)


@some_laws
def test_value_gradient(name, key):
    if _law(name).is_discrete:
        pytest.skip("a discrete value has no gradient")
    testing.check_value_gradient(LAWS[name].make, key, args=LAWS[name].args)


@some_laws
def test_sample_gradient(name, key):
    if name in ("Student", "gamma"):
        pytest.skip("JAX differentiates gamma draws implicitly: right in law, not at a fixed key")
    testing.check_sample_gradient(LAWS[name].make, key, args=LAWS[name].args)


@some_laws
def test_construction_in_jit(name, key):
    testing.check_construction_in_jit(LAWS[name].make, key, args=LAWS[name].args)


@some_laws
def test_vmap(name, key):
    case = LAWS[name]
    testing.check_vmap(case.make, key, args=case.args, fields=case.fields)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in LAWS if not _law(n).batch_shape])
def test_draws_follow_the_density(name, key):
    testing.check_samples_match_density(_law(name), key, num_samples=40_000)


def test_args_attributes():
    for name in LAWS:
        for constraint in _law(name).arg_constraints.values():
            assert constraint.event_dim >= 0
            assert not constraint.is_discrete


def test_infer_shapes():
    sde = nsde.SDE(lambda t, x, p: -p * x, lambda t, x, p: 1.0, params=jnp.ones((3, 1)))
    for init in (dist.Normal(jnp.zeros(4), 1.0), dist.Normal(jnp.zeros((4, 2)), 1.0).to_event(1)):
        law = nsde.SDEPath(sde, TIMES, init)
        inferred = nsde.SDEPath.infer_shapes(sde, TIMES.shape, init)
        assert inferred == (law.batch_shape, law.event_shape)
    assert nsde.SDEPath.infer_shapes((5,), (5, 7), (2,)) == ((5,), (7, 2))


def test_stacked_laws_do_not_mix_the_new_axis_with_a_batch_axis(key):
    """Batch size and number of stacked laws agree: a mix-up would raise no error."""
    rates, scales = jnp.array([0.5, 3.0]), jnp.array([0.2, 2.0])

    def law(scale, loc):
        sde = nsde.SDE(
            lambda t, x, p: -p["rate"] * x,
            lambda t, x, p: p["scale"],
            params={"rate": rates, "scale": scale},
        )
        return nsde.SDEPath(sde, TIMES, init=dist.Normal(loc, scale))

    stacked = promote_batch_shape(jax.vmap(law)(scales, scales))
    assert stacked.batch_shape == (2, 2)
    value = law(scales[0], scales[0]).sample(key)
    expected = jnp.stack([law(s, s).log_prob(value) for s in scales])
    np.testing.assert_allclose(stacked.log_prob(value), expected, rtol=1e-5)
    draws = jnp.stack([law(s, s).sample(key) for s in scales])
    assert stacked.sample(key).shape == draws.shape


def test_network_weights_stack(key):
    """Arrays inside a callable are one event each, also after stacking."""

    class Network(nsde.noise.brownian.AbstractNoise):  # any Equinox module
        weights: jax.Array

        def __call__(self, t, x):
            return jnp.sum(self.weights * x)

    def law(weights):
        sde = nsde.SDE(Network(weights), lambda t, x: 0.5)
        return nsde.SDEPath(sde, TIMES, init=dist.Normal(0.0, 1.0))

    weights = jnp.array([[0.1, 0.2, 0.3], [-1.0, 2.0, 0.5]])
    value = law(weights[0]).sample(key)
    stacked = promote_batch_shape(jax.vmap(law)(weights))
    expected = jnp.stack([law(w).log_prob(value) for w in weights])
    assert stacked.batch_shape == (2,)
    np.testing.assert_allclose(stacked.log_prob(value), expected, rtol=1e-5)
