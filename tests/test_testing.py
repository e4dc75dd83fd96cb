"""The contract checks find what they are there to find: each is shown a law that breaks it."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from numpyro.distributions.batch_util import promote_batch_shape

from numpyro_sde import testing


class Broken(dist.Distribution):
    """A normal law with one defect."""

    arg_constraints: ClassVar = {"loc": constraints.real}
    reparametrized_params: ClassVar = ["loc"]
    support = constraints.real

    def __init__(self, loc, defect=""):
        self.loc, self.defect = jnp.asarray(loc), defect
        super().__init__(jnp.shape(loc), ())

    def tree_flatten(self):
        label = object() if self.defect == "retraces" else None
        return (self.loc,), (self.defect, self.batch_shape, label)

    @classmethod
    def tree_unflatten(cls, aux, leaves):
        law = cls.__new__(cls)
        law.loc, law.defect, law._batch_shape, law._event_shape = leaves[0], aux[0], aux[1], ()
        return law

    @property
    def has_rsample(self):
        return self.defect != "rsample"

    def rsample(self, key, sample_shape=()):
        return self.sample(key, sample_shape)

    def sample(self, key, sample_shape=()):
        if self.defect == "sample shape":
            sample_shape = (*sample_shape, 1)
        scale = 1.1 if self.defect == "scale of draws" else 1.0
        loc = jax.lax.stop_gradient(self.loc) if self.defect == "draw gradient" else self.loc
        return loc + scale * jax.random.normal(key, sample_shape + self.batch_shape)

    def log_prob(self, value):
        loc = jax.lax.stop_gradient(self.loc) if self.defect == "density gradient" else self.loc
        if self.defect == "value gradient":
            value = jax.lax.stop_gradient(value)
        density = dist.Normal(loc, 1.0).log_prob(value)
        if self.defect == "constant":
            return density + 0.05
        return jnp.sum(density) if self.defect == "density shape" else density


@promote_batch_shape.register
def _promote(law: Broken):
    new = Broken(law.loc, law.defect)
    new._batch_shape = () if law.defect == "promotion" else jnp.shape(law.loc)
    return new


FOUND = {
    "sample shape": (testing.check_shapes, r"sample\(key, \(\)\) must have shape \(3,\)"),
    "density shape": (
        testing.check_shapes,
        r"log_prob of sample_shape \(\) must have shape \(3,\)",
    ),
    "retraces": (testing.check_pytree, "as an argument of jit the law retraces"),
    "rsample": (testing.check_rsample, "rsample works although has_rsample is False"),
}


@pytest.mark.parametrize("defect", FOUND)
def test_defects_of_the_object(defect, key):
    check, message = FOUND[defect]
    check(Broken(jnp.zeros(3)), key)
    with pytest.raises(AssertionError, match=message):
        check(Broken(jnp.zeros(3), defect), key)


MADE = {
    "value gradient": (testing.check_value_gradient, r"the derivative of log_prob in its value"),
    "density gradient": (testing.check_parameter_gradient, "derivative of log_prob in argument 0"),
    "draw gradient": (testing.check_sample_gradient, "the derivative of a draw in argument 0"),
    "promotion": (testing.check_vmap, r"promote_batch_shape"),
}


@pytest.mark.parametrize("defect", MADE)
def test_defects_of_the_constructor(defect, key):
    check, message = MADE[defect]
    args = (jnp.array([0.1, 0.2]),)
    check(Broken, key, args=args)
    with pytest.raises(AssertionError, match=message):
        check(lambda loc: Broken(loc, defect), key, args=args)


@pytest.mark.parametrize("defect", ["scale of draws", "constant"])
def test_defects_of_the_density(defect, key):
    testing.check_samples_match_density(Broken(0.3), key, num_samples=20_000)
    with pytest.raises(AssertionError, match=r"E\[.*standard error .*; estimated"):
        testing.check_samples_match_density(Broken(0.3, defect), key, num_samples=20_000)


def test_a_discrete_law_whose_draws_do_not_fit(key):
    class Shifted(dist.Poisson):
        def log_prob(self, value):
            return super().log_prob(value + 1)

    testing.check_samples_match_density(dist.Poisson(2.0), key)
    with pytest.raises(AssertionError, match=r"P\(.*\) is .*; drawn"):
        testing.check_samples_match_density(Shifted(2.0), key)


def test_numpyros_own_euler_maruyama_does_not_return_from_jit(key):
    """The limit that a path of this package must not share."""

    def law(rate):
        return dist.EulerMaruyama(
            jnp.arange(3.0), lambda x, t: (-rate * x, jnp.ones_like(x)), dist.Normal(0.0, 1.0)
        )

    with pytest.raises(jax.errors.UnexpectedTracerError):
        testing.check_construction_in_jit(law, key, args=(jnp.array(1.0),))
