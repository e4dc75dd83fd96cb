"""Standard normals in number: the transform of Box and Muller, in arithmetic that vectorises.

A particle filter spends most of its time on them. JAX inverts the normal distribution function,
60 multiplications and a logarithm for each; two uniform numbers make two normals by a logarithm, a
square root, a sine and a cosine, and here the arguments of these are such that short series give
them to the last digits: the logarithm of a number next to one, angles within an eighth of a turn,
the other angles by symmetry. Exponents are taken from the bits.

In float64 numbers reach 8.6 standard deviations (JAX: 8.2), in float32 5.8 (JAX: 5.4); beyond
there is 1e-17 and 1e-8 of the law.

Source: Box and Muller (1958), "A note on the generation of random normal deviates".
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray


class _Format(NamedTuple):
    """A floating-point format: its types, bits of the fraction, and lengths of the series."""

    floats: Any
    bits: Any
    integers: Any
    fraction: int
    log_terms: int
    sine_terms: int


_SINGLE = _Format(np.float32, np.uint32, np.int32, 23, 5, 5)
_DOUBLE = _Format(np.float64, np.uint64, np.int64, 52, 11, 9)


def normals(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> Float[Array, "..."]:
    """Draw independent standard normals.

    Args:
        key: random key.
        shape: shape of the result.
        dtype: its type.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> z = normals(jax.random.key(0), (3, 100_000), jnp.float32)
        >>> z.shape, bool(abs(z.var() - 1.0) < 0.01)
        ((3, 100000), True)
    """
    form = _DOUBLE if jnp.dtype(dtype) == np.float64 else _SINGLE
    number = math.prod(shape)
    half = (number + 1) // 2
    bits = jax.random.bits(key, (2 * half,), form.bits)
    radius = _radius(form, bits[:half])
    sine, cosine = _direction(form, bits[half:])
    # Without the barrier both halves would be computed for either.
    halves = lax.optimization_barrier((radius * cosine, radius * sine))
    return jnp.concatenate(halves)[:number].reshape(shape).astype(dtype)


def _between_one_and_two(form: _Format, bits: Array) -> Array:
    """The leading bits as the fraction of a number in [1, 2)."""
    one = np.asarray(1.0, form.floats).view(form.bits)
    width = form.bits(0).nbytes * 8
    return lax.bitcast_convert_type((bits >> form.bits(width - form.fraction)) | one, form.floats)


def _radius(form: _Format, bits: Array) -> Array:
    """Root of `-2 log u`, `u` uniform in (0, 1) at odd multiples of half the spacing."""
    least = form.floats(2.0 ** -(form.fraction + 1))
    u = _between_one_and_two(form, bits) - (form.floats(1.0) - least)
    # u = m 2^e with m between the roots of 1/2 and 2; log m = 2 artanh((m - 1) / (m + 1)).
    whole = lax.bitcast_convert_type(u, form.integers)
    low = np.asarray(math.sqrt(0.5), form.floats).view(form.integers)
    e = (whole - low) >> form.integers(form.fraction)
    m = lax.bitcast_convert_type(whole - (e << form.integers(form.fraction)), form.floats)
    s = (m - 1.0) / (m + 1.0)
    series = _horner(form, [1.0 / (2 * k + 1) for k in range(form.log_terms)], s * s)
    log_u = e.astype(form.floats) * form.floats(math.log(2.0)) + 2.0 * s * series
    return jnp.sqrt(-2.0 * log_u)


def _direction(form: _Format, bits: Array) -> tuple[Array, Array]:
    """Sine and cosine of a uniform angle; the two last bits choose its quarter."""
    x = (_between_one_and_two(form, bits) - form.floats(1.5)) * form.floats(0.5 * math.pi)
    square = x * x
    signs = [(-1.0) ** k for k in range(form.sine_terms + 1)]
    odd = [s / math.factorial(2 * k + 1) for k, s in enumerate(signs[:-1])]
    even = [s / math.factorial(2 * k) for k, s in enumerate(signs)]
    sine, cosine = x * _horner(form, odd, square), _horner(form, even, square)
    swap = (bits & form.bits(1)) != 0
    sign = jnp.where((bits & form.bits(2)) != 0, form.floats(-1.0), form.floats(1.0))
    return sign * jnp.where(swap, cosine, sine), sign * jnp.where(swap, sine, cosine)


def _horner(form: _Format, coefficients: list[float], x: Array) -> Array:
    value = jnp.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * x + form.floats(coefficient)
    return value
