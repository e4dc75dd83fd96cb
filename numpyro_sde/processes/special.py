"""Scalar functions that the exact transition laws need, accurate in both limits.

`expm1_ratio` is the integral of an exponential over a step; `log_bessel_i` and
`log_noncentral_chi2` are the Bessel function and the density behind the square-root process.
All are elementwise and differentiable in every argument. Sources: NIST Digital Library of
Mathematical Functions, 10.25.2 (power series of I) and 10.41.3, 10.41.9-10 (Debye expansion).
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import gammaln
from jaxtyping import Array, ArrayLike, Float

_LOG_2PI = math.log(2.0 * math.pi)
_RATIO_TERMS = 12


def expm1_ratio(h: ArrayLike) -> Float[Array, "..."]:
    """`(1 - exp(-h)) / h`, equal to 1 at `h = 0`, with its derivatives.

    The mean of `exp(-s)` over `0 < s < h`: it carries rates through zero.

    Args:
        h: any real numbers (no unit: a rate times a time).

    Example:
        >>> from numpyro_sde.processes.special import expm1_ratio
        >>> float(expm1_ratio(0.0))
        1.0
    """
    h = jnp.asarray(h)
    small = jnp.abs(h) < 0.3
    far = jnp.where(small, 1.0, h)
    near = jnp.where(small, h, 0.0)
    series = jnp.ones_like(near)
    for k in range(_RATIO_TERMS, 0, -1):
        series = 1.0 - near / (k + 1) * series
    return jnp.where(small, series, -jnp.expm1(-far) / far)


class _Accuracy(NamedTuple):
    """How far each expansion of the Bessel function is carried, by precision."""

    switch: float  # root(order^2 + z^2) from which the Debye expansion is used
    series_terms: int
    debye_terms: int
    atanh_terms: int


_DOUBLE = _Accuracy(switch=40.0, series_terms=80, debye_terms=10, atanh_terms=11)
_SINGLE = _Accuracy(switch=16.0, series_terms=36, debye_terms=4, atanh_terms=5)


def _accuracy(dtype: np.dtype) -> _Accuracy:
    return _DOUBLE if jnp.finfo(dtype).bits > 32 else _SINGLE


@cache
def _debye_coefficients(terms: int) -> tuple[tuple[float, ...], ...]:
    """Coefficients of `V_k(w)`, ascending in `w = p^2`, where `U_k(p) = p^k V_k(p^2)`.

    By the recursion DLMF 10.41.9 in exact rational arithmetic:
    `U_{k+1} = p^2 (1 - p^2) U_k' / 2 + integral of (1 - 5 s^2) U_k / 8 from 0 to p`.
    """
    u = {0: Fraction(1)}
    rows: list[tuple[float, ...]] = [(1.0,)]
    for k in range(1, terms + 1):
        new: dict[int, Fraction] = {}
        for power, c in u.items():
            up = Fraction(power, 2) + Fraction(1, 8 * (power + 1))
            new[power + 1] = new.get(power + 1, Fraction(0)) + c * up
            down = Fraction(power, 2) + Fraction(5, 8 * (power + 3))
            new[power + 3] = new.get(power + 3, Fraction(0)) - c * down
        u = new
        rows.append(tuple(float(u[k + 2 * j]) for j in range(k + 1)))
    return tuple(rows)


def _debye_sum(order: Array, s: Array, terms: int) -> Array:
    """`sum_k U_k(order / s) / order^k`, a series in `1 / s` with coefficients in `(order/s)^2`."""
    w = (order / s) ** 2
    total = jnp.zeros_like(s)
    for row in reversed(_debye_coefficients(terms)):
        inner = jnp.full_like(w, row[-1])
        for c in row[-2::-1]:
            inner = inner * w + c
        total = total / s + inner
    return total


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _log_power_series(order: Array, w: Array, terms: int) -> Array:
    """Log of `sum_k w^k Gamma(order+1) / (k! Gamma(k+order+1))`: all terms positive."""

    def add(i: Any, total: Array) -> Array:
        k = terms - i
        return 1.0 + w / (k * (k + order)) * total

    return jnp.log(lax.fori_loop(0, terms, add, jnp.ones_like(w)))


@_log_power_series.defjvp
def _log_power_series_jvp(
    terms: int, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    # Both partial derivatives go along in the same loop: differentiating the unrolled sum
    # takes seconds to compile, differentiating the loop stores every term.
    order, w = primals

    def add(i: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        total, by_order, by_w = carry
        k = terms - i
        inverse = 1.0 / (k * (k + order))
        ratio = w * inverse
        return (
            1.0 + ratio * total,
            ratio * (by_order - total / (k + order)),
            ratio * by_w + inverse * total,
        )

    start = (jnp.ones_like(w), jnp.zeros_like(w), jnp.zeros_like(w))
    total, by_order, by_w = lax.fori_loop(0, terms, add, start)
    tangent = (by_order * tangents[0] + by_w * tangents[1]) / total
    return jnp.log(total), tangent


def log_bessel_i(order: ArrayLike, z: ArrayLike) -> Float[Array, "..."]:
    """Log of the modified Bessel function of the first kind, `log I_order(z)`.

    Power series where `order^2 + z^2` is small, Debye's uniform expansion elsewhere. Both are
    exact to rounding where they meet, so derivatives in order and argument are as well.

    Args:
        order: real order above -1.
        z: positive argument; broadcasts with `order`.

    Returns:
        The logarithm; NaN for an order of -1 or less or an argument of 0 or less.

    Example:
        >>> from numpyro_sde.processes.special import log_bessel_i
        >>> round(float(log_bessel_i(0.5, 2.0)), 4)  # sqrt(1 / pi) sinh(2)
        0.716
    """
    order, z = _as_floats(order, z)
    valid = (order > -1.0) & (z > 0.0)
    order, z = jnp.where(valid, order, 0.0), jnp.where(valid, z, 1.0)
    accuracy = _accuracy(z.dtype)
    near = order**2 + z**2 < accuracy.switch**2
    q, x = jnp.where(near, order, 0.0), jnp.where(near, z, 1.0)
    series = q * jnp.log(0.5 * x) - gammaln(q + 1.0)
    series += _log_power_series(q, 0.25 * x**2, accuracy.series_terms)
    q, x = jnp.where(near, 0.0, order), jnp.where(near, accuracy.switch, z)
    s = jnp.sqrt(q**2 + x**2)
    debye = s - q * jnp.arcsinh(q / x) - 0.5 * (_LOG_2PI + jnp.log(s))
    debye += jnp.log(_debye_sum(q, s, accuracy.debye_terms))
    return jnp.where(valid, jnp.where(near, series, debye), jnp.nan)


def _as_floats(*values: ArrayLike) -> list[Array]:
    dtype = jnp.result_type(float, *values)
    return list(jnp.broadcast_arrays(*(jnp.asarray(value, dtype) for value in values)))


def log_noncentral_gamma(
    v: ArrayLike, shape: ArrayLike, u: ArrayLike, gap: ArrayLike
) -> Float[Array, "..."]:
    """Log density at `v` of `Gamma(shape + N, 1)` with `N ~ Poisson(u)`.

    Twice such a variable is noncentral chi-squared with `2 shape` degrees of freedom and
    noncentrality `2 u`. With `q = shape - 1`, `s = root(q^2 + 4 u v)` and `k = (s - q) / 2`
    (the most likely `N`), the leading exponent `s - u - v + q log(2 v / (s + q))` is minus the
    sum of two positive terms `u h(k / u) + v h(u / k)`, `h(r) = 1 - r + r log r`. Written in
    `y = (k - u) / (k + u) = (v - u - q) / (v + u + s)` nothing cancels, however small the
    time step from which huge `u` and `v` come.

    Args:
        v: where to evaluate the density, positive.
        shape: positive shape.
        u: nonnegative mean of the mixing Poisson variable.
        gap: `v - u - shape`, which the caller may know better than the difference of the
            rounded arguments; derivatives reach it as an argument of its own.

    Returns:
        The log density; NaN for `shape <= 0` or `u < 0`, -inf for `v < 0`. At `v = 0` its limit
        from above: infinite below a shape of 1 (two degrees of freedom), `-u` at 1, -inf above.

    Example:
        >>> from numpyro_sde.processes.special import log_noncentral_gamma
        >>> round(float(log_noncentral_gamma(1.5, 2.0, 0.0, -0.5)), 4)  # Gamma(2, 1)
        -1.0945
    """
    v, shape, u, gap = _as_floats(v, shape, u, gap)
    valid = (shape > 0.0) & (u >= 0.0) & ~jnp.isnan(v)
    inside, at_zero = valid & (v > 0.0), v == 0.0
    edge = jnp.where(shape < 1.0, jnp.inf, jnp.where(shape == 1.0, -u, -jnp.inf))
    v, shape, u = (jnp.where(inside, a, b) for a, b in ((v, 1.0), (shape, 1.0), (u, 1.0)))
    gap = jnp.where(inside, gap, -1.0)
    accuracy = _accuracy(v.dtype)
    q = shape - 1.0
    near = q**2 + 4.0 * u * v < accuracy.switch**2
    series = _series_log_density(v, shape, u, near, accuracy)
    debye = _debye_log_density(v, q, u, gap, ~near, accuracy)
    value = jnp.where(near, series, debye)
    outside = jnp.where(at_zero, edge, -jnp.inf)
    return jnp.where(inside, value, jnp.where(valid, outside, jnp.nan))


def _series_log_density(v: Array, shape: Array, u: Array, use: Array, accuracy: _Accuracy) -> Array:
    v, shape, u = (jnp.where(use, a, 1.0) for a in (v, shape, u))
    q = shape - 1.0
    total = _log_power_series(q, u * v, accuracy.series_terms)
    return q * jnp.log(v) - u - v - gammaln(shape) + total


def _debye_log_density(
    v: Array, q: Array, u: Array, gap: Array, use: Array, accuracy: _Accuracy
) -> Array:
    big = accuracy.switch
    v, u = jnp.where(use, v, big), jnp.where(use, u, big)
    q, gap = jnp.where(use, q, 0.0), jnp.where(use, gap, -1.0)
    s = jnp.sqrt(q**2 + 4.0 * u * v)
    y = (gap + 1.0) / (u + v + s)
    central = jnp.abs(y) < 0.25
    a = jnp.where(central, y, 0.0)
    # atanh(a) = a + a^3 tail
    tail = jnp.zeros_like(a)
    for j in range(accuracy.atanh_terms, -1, -1):
        tail = tail * a**2 + 1.0 / (2 * j + 3)
    bulk = u * (1.0 + (1.0 + a) * a * tail) / (1.0 - a) + v * (1.0 - (1.0 - a) * a * tail) / (
        1.0 + a
    )
    ratio = jnp.where(central, 1.0, 2.0 * v / (s + q))
    exponent = jnp.where(central, -2.0 * a**2 * bulk, s - u - v + q * jnp.log(ratio))
    correction = jnp.log(_debye_sum(q, s, accuracy.debye_terms))
    return exponent - 0.5 * (_LOG_2PI + jnp.log(s)) + correction
