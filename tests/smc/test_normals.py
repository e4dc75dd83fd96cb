"""Standard normals: arithmetic against that of long doubles, law against the normal one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from numpyro_sde.smc.normals import normals

NUM = 200_000


@pytest.fixture(params=["float32", pytest.param("float64", marks=pytest.mark.slow)])
def dtype(request):
    if request.param == "float64":
        request.getfixturevalue("x64")
    return jnp.dtype(request.param)


def leading(bits, fraction):
    """The first bits as a number in [0, 1)."""
    top = bits >> bits.dtype.type(bits.dtype.itemsize * 8 - fraction)
    return top.astype(np.longdouble) * np.longdouble(2.0) ** -fraction


def test_law_and_arithmetic(dtype):
    key = jax.random.key(3)
    z = np.asarray(jax.jit(lambda: normals(key, (NUM,), dtype))())
    assert z.dtype == dtype
    # Kolmogorov and Smirnov's statistic and squares and products of pairs; 4 standard errors of
    # the former are near 2 / sqrt(NUM).
    assert scipy.stats.kstest(z.astype(np.float64), "norm").statistic < 2.0 / np.sqrt(NUM)
    wide = z.astype(np.float64)
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (4, 3, 96), (6, 15, 10_170)):
        assert abs(np.mean(wide**power) - mean) < 4 * np.sqrt(variance / NUM)
    first, second = wide[: NUM // 2], wide[NUM // 2 :]
    for a, b in ((first, second), (first**2 - 1, second**2 - 1), (wide[1:], wide[:-1])):
        error = a.std() * b.std() / np.sqrt(a.size)
        assert abs(np.mean(a * b)) < 4 * error
    # The same numbers by library functions, in long doubles.
    fraction = jnp.finfo(dtype).nmant
    bits = np.asarray(jax.random.bits(key, (NUM,), f"uint{dtype.itemsize * 8}"))
    first, second = bits[: NUM // 2], bits[NUM // 2 :]
    u = leading(first, fraction) + np.longdouble(2.0) ** -(fraction + 1)
    radius = np.sqrt(-2 * np.log(u)) * np.where(second & 2 == 2, -1, 1)
    angle = (leading(second, fraction) - 0.5) * (2 * np.arctan(np.longdouble(1)))
    turns = (np.sin(angle), np.cos(angle))
    for got, wanted in ((z[: NUM // 2], turns), (z[NUM // 2 :], turns[::-1])):
        exact = radius * np.where(second & 1 == 1, *wanted)
        assert np.all(np.abs(got - exact) <= 6 * jnp.finfo(dtype).eps * np.abs(exact))


def test_shapes_and_types():
    key = jax.random.key(0)
    for shape in ((), (3, 5), (0, 2)):
        made = jax.eval_shape(lambda shape=shape: normals(key, shape, jnp.bfloat16))
        assert (made.shape, made.dtype) == (shape, jnp.bfloat16)
