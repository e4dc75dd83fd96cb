"""Arrays that a drift reaches by itself are found and refused by name in a batched model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import numpyro_sde as nsde
from numpyro_sde.checks.closures import closed_over_arrays

TIMES = np.array([0.0, 0.1, 0.25, 0.5])
GLOBAL_ARRAY = jnp.arange(3.0)
GLOBAL_NUMBER = jnp.asarray(2.0)


def minus(t, x):
    return -x


def one(t, x):
    return 1.0


def vector(d):
    return dist.Normal(jnp.zeros(d), 1.0).to_event(1)


def path(drift, diffusion, init):
    return nsde.SDEPath(nsde.SDE(drift, diffusion), TIMES, init)


def closing_over(array, how):
    """Functions that use `array`, each in another way."""
    if how == "closure":
        return lambda t, x: array * x
    if how == "nested closure":

        def inner(x):
            return array * x

        return lambda t, x: inner(x)
    if how == "default":
        return lambda t, x, array=array: array * x
    if how == "keyword default":

        def with_keyword(t, x, *, array=array):
            return array * x

        return with_keyword
    if how == "partial":
        return functools.partial(lambda a, t, x: a * x, array)
    if how == "partial keyword":
        return functools.partial(lambda t, x, array: array * x, array=array)
    if how == "dict":
        held = {"array": array}
        return lambda t, x: held["array"] * x
    if how == "dict in a default":
        return lambda t, x, held={"array": array}: held["array"] * x
    if how == "object":

        class Holder:
            def __init__(self):
                self.array = array

        holder = Holder()
        return lambda t, x: holder.array * x
    if how == "method":

        class Model:
            def __init__(self):
                self.array = array

            def drift(self, t, x):
                return self.array * x

        return Model().drift
    if how == "callable object":

        class Drift:
            def __init__(self):
                self.array = array

            def __call__(self, t, x):
                return self.array * x

        return Drift()
    if how == "jit":
        return jax.jit(lambda t, x: array * x)
    if how == "decorated":

        @functools.wraps(minus)
        def wrapped(t, x):
            return array * x

        return wrapped
    if how == "inner lambda in code":
        return lambda t, x: (lambda y: array * y)(x)
    raise AssertionError(how)


WAYS = [
    "closure", "nested closure", "default", "keyword default", "partial", "partial keyword",
    "dict", "dict in a default", "object", "method", "callable object", "jit", "decorated",
    "inner lambda in code",
]  # fmt: skip


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("role", ["drift", "diffusion"])
def test_closed_over_arrays_in_a_batch_are_refused_by_name(how, role):
    """Also where state and plate size agree: the case that would broadcast without an error."""
    fn = closing_over(jnp.ones(2), how)
    functions = (fn, one) if role == "drift" else (minus, fn)
    with (
        numpyro.handlers.seed(rng_seed=0),
        numpyro.plate("series", 2),
        pytest.raises(
            ValueError,
            match=rf"(?s){role} closes over .*of shape \(2,\) in plate 'series' of size 2",
        ),
    ):
        path(*functions, vector(2))
    with pytest.raises(ValueError, match=rf"{role} closes over .* batch shape \(2,\)"):
        path(*functions, dist.Normal(jnp.zeros((2, 2)), 1.0).to_event(1))


def drift_of_a_global(t, x):
    return GLOBAL_ARRAY * x


def drift_of_a_function_of_a_global(t, x):
    return drift_of_a_global(t, x)


def scaled_by_a_global_number(t, x):
    return -GLOBAL_NUMBER * x


@pytest.mark.parametrize("fn", [drift_of_a_global, drift_of_a_function_of_a_global])
def test_globals_in_a_batch_are_refused_by_name(fn):
    with pytest.raises(ValueError, match="drift closes over 'GLOBAL_ARRAY' of shape"):
        path(fn, one, dist.Normal(jnp.zeros((3, 3)), 1.0).to_event(1))


def test_closed_over_numbers_and_unbatched_closures_are_fine():
    number = jnp.asarray(2.0)
    path(lambda t, x: -number * x, one, dist.Normal(jnp.zeros(3), 1.0))
    path(scaled_by_a_global_number, one, dist.Normal(jnp.zeros(3), 1.0))
    matrix = -jnp.eye(2)
    assert path(lambda t, x: matrix @ x, one, vector(2)).batch_shape == ()


def test_traced_closed_over_arrays_are_refused():
    def density(array):
        return path(lambda t, x: -array * x, one, dist.Normal(jnp.zeros(3), 1.0)).log_prob(TIMES)

    with pytest.raises(ValueError, match="drift closes over 'array' of shape"):
        jax.jit(density)(jnp.ones(3))


T = np.arange(4.0)


def test_an_attribute_with_the_name_of_a_global_array_is_not_taken_for_it():
    assert list(closed_over_arrays(lambda t, x: x.T)) == []
    assert [name for name, _ in closed_over_arrays(lambda t, x: x + T)] == ["T"]
    assert [name for name, _ in closed_over_arrays(lambda t, x: (lambda y: y + T)(x))] == ["T"]


def test_libraries_are_not_searched():
    import jax.scipy.special

    special = jax.scipy.special.zeta
    assert list(closed_over_arrays(lambda t, x: special(x, 2.0) + dist.Normal(x, 1.0).mean)) == []


def test_a_recursive_function_does_not_hang_the_search():
    def recursive(t, x, depth=0):
        return x if depth > 1 else recursive(t, x, depth + 1)

    assert list(closed_over_arrays(recursive)) == []
    path(recursive, one, dist.Normal(jnp.zeros(3), 1.0))


def test_modules_used_in_a_drift_are_not_searched():
    """`jnp` and `np` are globals of every drift."""
    path(lambda t, x: jnp.sin(x) + np.pi, one, dist.Normal(jnp.zeros(3), 1.0))
