"""Covariances and spectra of fractional Brownian motion and its relatives.

Conventions: kind 1 (Mandelbrot and Van Ness 1968) has stationary increments and unit variance
at time 1, `Cov(B_s, B_t) = (s^2H + t^2H - |t - s|^2H) / 2`; kind 2 (Riemann-Liouville, Levy
1953) is `B_t = int_0^t (t - u)^(H - 1/2) dW_u / Gamma(H + 1/2)`.

All functions are differentiable, any number of times, in the Hurst index and every other real
argument, and are written for float32 as well: differences of nearly equal powers are summed as
series instead.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import gammaln
from jaxtyping import Array, ArrayLike, Float

# Centres of two increments this many half-lengths apart: the series beats the difference.
_FAR, _FAR_TERMS = 8.0, 10
_IMAGES = 8  # aliased copies of the spectrum that are summed one by one
# B_2k / (2k)! of the Euler-Maclaurin formula.
_EULER_MACLAURIN = (
    *(1 / 12, -1 / 720, 1 / 30240, -1 / 1209600),
    *(1 / 47900160, -691 / 1307674368000),
)


def power(x: ArrayLike, exponent: ArrayLike) -> Array:
    """`x^exponent` for `x >= 0`, zero at zero with a derivative of zero.

    Example:
        >>> float(power(0.0, 0.6)), float(power(4.0, 0.5))
        (0.0, 2.0)
    """
    x = jnp.asarray(x)
    inside = x > 0
    return jnp.where(inside, jnp.exp(exponent * jnp.log(jnp.where(inside, x, 1.0))), 0.0)


def _last(values: Any, x: Array) -> Any:
    """A vector along an axis after those of x."""
    return values.reshape(*(1,) * x.ndim, -1)


def excess_of_exponential(x: Array) -> Array:
    """`(x - 1 + e^-x) / x^2` for `x >= 0`, which is 1/2 at zero.

    Example:
        >>> float(excess_of_exponential(jnp.array(0.0)))
        0.5
    """
    near = x < 0.5
    s, f = jnp.where(near, x, 0.0), jnp.where(near, 1.0, x)
    k = np.arange(14)
    series = jnp.zeros_like(x)
    for c in ((-1.0) ** k / np.cumprod(np.arange(1, 20.0))[k + 1])[::-1]:
        series = series * s + c
    return jnp.where(near, series, (f + jnp.expm1(-f)) / f**2)


@jax.jit
def increment_covariance(
    first: tuple[Array, Array], second: tuple[Array, Array], hurst: ArrayLike
) -> Float[Array, "*n"]:
    """Covariance of the increments of kind-1 fBM, of unit scale, over two intervals.

    Args:
        first: start and end of the first interval.
        second: those of the second; it is the same, or does not overlap with the first.
        hurst: Hurst index H in (0, 1).

    Example:
        >>> import jax.numpy as jnp
        >>> t = jnp.arange(3.0)
        >>> round(float(increment_covariance((t[0], t[1]), (t[1], t[2]), 0.75)), 4)  # 2^0.5 - 1
        0.4142
    """
    (s, u), (v, w) = first, second
    e = 2.0 * jnp.asarray(hurst)
    # Differences of end points: those of touching intervals are exactly zero, as they must be,
    # since a small power of a rounding error is not small.
    near = (
        power(jnp.abs(w - s), e)
        + power(jnp.abs(v - u), e)
        - power(jnp.abs(w - u), e)
        - power(jnp.abs(v - s), e)
    )
    distance = 0.5 * jnp.abs(w + v - u - s)
    p, q = 0.5 * (w - v + u - s), 0.5 * (w - v - u + s)
    is_far = distance >= _FAR * p
    d = jnp.where(is_far, distance, 1.0)
    x, y = jnp.where(is_far, p / d, 0.0) ** 2, jnp.where(is_far, q / d, 0.0) ** 2
    j = np.arange(1, _FAR_TERMS + 1)
    binomial = jnp.cumprod((e - 2 * j + 2) * (e - 2 * j + 1) / ((2 * j - 1) * (2 * j)))
    far = jnp.zeros_like(d)
    px, py = x, y
    for i in range(_FAR_TERMS):
        far = far + binomial[i] * (px - py)
        px, py = px * x, py * y
    return jnp.where(is_far, power(d, e) * far, 0.5 * near)


@functools.partial(jax.jit, static_argnums=0)
def fgn_autocovariance(length: int, hurst: ArrayLike) -> Float[Array, " N"]:
    """Autocovariance of unit fractional Gaussian noise at lags 0, ..., length - 1.

    Example:
        >>> [round(float(r), 3) for r in fgn_autocovariance(3, 0.75)]
        [1.0, 0.414, 0.27]
    """
    lags = jnp.asarray(np.arange(length), jnp.result_type(float))
    zero = jnp.zeros_like(lags)
    return increment_covariance((zero, zero + 1.0), (lags, lags + 1.0), hurst)


@jax.jit
def increments_covariance(times: Float[Array, " T"], hurst: ArrayLike) -> Float[Array, "T T"]:
    """Covariance matrix of the increments of kind-1 fBM over `[0, t_1], [t_1, t_2], ...`.

    `times` are positive and increasing. Better conditioned than that of the values, of which it
    is a linear map of determinant one.
    """
    start = jnp.concatenate([jnp.zeros_like(times[:1]), times[:-1]])
    return increment_covariance((start[:, None], times[:, None]), (start[None], times[None]), hurst)


@jax.jit
def fgn_spectral_density(frequency: Float[Array, "*n"], hurst: ArrayLike) -> Float[Array, "*n"]:
    """Spectral density of unit fractional Gaussian noise, `int_-pi^pi f = 1`.

    `f(l) = Gamma(2H + 1) sin(pi H) (1 - cos l) / pi sum_j |l + 2 pi j|^(-2H - 1)` (Sinai 1976;
    Beran 1994, section 2.3), the sum by the Euler-Maclaurin formula.

    Args:
        frequency: in (0, pi].
        hurst: Hurst index H in (0, 1).

    Example:
        >>> import jax.numpy as jnp
        >>> round(float(fgn_spectral_density(jnp.array(1.0), 0.5)), 4)  # white: 1 / (2 pi)
        0.1592
    """
    hurst = jnp.asarray(hurst)
    s = 2.0 * hurst + 1.0
    both = jnp.stack([frequency, -frequency], axis=-1)
    images = 2 * math.pi * np.arange(1, _IMAGES)
    total = power(frequency, -s) + power(both[..., None] + _last(images, both), -s).sum((-1, -2))
    x = 2 * math.pi * _IMAGES + both
    rest = 0.5 + x / (2 * math.pi * (s - 1.0))
    slope, rising = 2 * math.pi / x, s
    for k, weight in enumerate(_EULER_MACLAURIN):
        rest = rest + weight * rising * slope ** (2 * k + 1)
        rising = rising * (s + 2 * k + 1) * (s + 2 * k + 2)
    total = total + (power(x, -s) * rest).sum(-1)
    constant = jnp.exp(gammaln(s)) * jnp.sin(math.pi * hurst) * 2 / math.pi
    return constant * jnp.sin(0.5 * frequency) ** 2 * total


# --- kind 2 -----------------------------------------------------------------------------------

_RL_SPLIT, _RL_TERMS, _RL_NODES = 0.125, 18, 48
_ROWS_AT_ONCE = 64


@jax.jit
def riemann_liouville_covariance(
    s: Float[Array, "*n"], t: Float[Array, "*n"], hurst: ArrayLike
) -> Float[Array, "*n"]:
    """Covariance of kind-2 fBM at positive times.

    `Gamma(a)^2 Cov = int_0^s v^(a-1) (t - s + v)^(a-1) dv` for `s < t` and `a = H + 1/2`: a
    binomial series where `v` is below an eighth of `t - s`, Gauss-Legendre quadrature in
    `log v` beyond.

    Example:
        >>> import jax.numpy as jnp
        >>> round(float(riemann_liouville_covariance(jnp.array(1.0), jnp.array(2.0), 0.5)), 4)
        1.0
    """
    s, t = jnp.minimum(s, t), jnp.maximum(s, t)
    a = jnp.asarray(hurst) + 0.5
    gap = t - s
    apart = gap > 0
    # One scale for both: Y is how often the gap fits into s.
    gap = jnp.where(apart, gap, s)
    reach = s / gap
    split = jnp.minimum(reach, _RL_SPLIT)
    k = np.arange(_RL_TERMS)
    binomial = jnp.cumprod(jnp.concatenate([jnp.ones(1), (a - k[1:]) / k[1:]]))
    k, binomial = _last(k, split), _last(binomial, split)
    series = (binomial * split[..., None] ** k / (a + k)).sum(-1) * power(split, a)
    points, mass = np.polynomial.legendre.leggauss(_RL_NODES)
    width = jnp.log(jnp.maximum(reach, _RL_SPLIT) / _RL_SPLIT)
    x = math.log(_RL_SPLIT) + width[..., None] * _last(points + 1, width) / 2
    integrand = jnp.exp(a * x + (a - 1) * jnp.log1p(jnp.exp(x)))
    rest = 0.5 * width * (integrand * _last(mass, width)).sum(-1)
    total = jnp.where(
        apart, power(gap, 2 * a - 1) * (series + rest), power(s, 2 * a - 1) / (2 * a - 1)
    )
    return total * jnp.exp(-2 * gammaln(a))


@jax.jit
def riemann_liouville_matrix(times: Float[Array, " T"], hurst: ArrayLike) -> Float[Array, "T T"]:
    """Covariance matrix of kind-2 fBM at positive times, some rows at a time."""

    def row(t: Array) -> Array:
        return riemann_liouville_covariance(t, times, hurst)

    return lax.map(row, times, batch_size=_ROWS_AT_ONCE)


# --- fractional Ornstein-Uhlenbeck ------------------------------------------------------------

_FOU_SERIES_BELOW, _FOU_SERIES_TERMS = 2.0, 14
_FOU_ASYMPTOTIC_FROM, _FOU_ASYMPTOTIC_TERMS = 32.0, 14
_FOU_PANELS = (0.0, 1.0, 3.0, 7.0, 14.0, 40.0)
_FOU_NODES, _FOU_TAIL_TERMS = 14, 60


def _growing_part(x: Array, e: Array) -> Array:
    """`x^e sum_k x^2k / ((e + 1) ... (e + 2k))`, for small x."""
    k = np.arange(1, _FOU_SERIES_TERMS)
    rising = jnp.cumprod((e + 2 * k - 1) * (e + 2 * k))
    series = (x * x)[..., None] ** _last(k, x) / _last(rising, x)
    return power(x, e) * (1.0 + series.sum(-1))


def _quadrature(x: Array, e: Array) -> Array:
    """`int_0^inf e^-v ((x + v)^e + |x - v|^e - 2 x^e) dv / 2`, for x from 2 to 32."""
    points, mass = np.polynomial.legendre.leggauss(_FOU_NODES)
    v = np.concatenate([a + (b - a) * (points + 1) / 2 for a, b in itertools.pairwise(_FOU_PANELS)])
    weight = np.concatenate([mass * (b - a) / 2 for a, b in itertools.pairwise(_FOU_PANELS)])
    v, weight = _last(v, x), _last(weight, x)
    scale = power(x, e)
    # From above: (x + v)^e - x^e over all v; from below, (x - v)^e - x^e over v < x / 2.
    above = jnp.expm1(e * jnp.log1p(v / x[..., None]))
    half = 0.5 * x
    u = half[..., None] * v / _FOU_PANELS[-1]
    below = jnp.expm1(e * jnp.log1p(-u / x[..., None])) * jnp.exp(-u)
    middle = (above * np.exp(-v) * weight).sum(-1)
    middle = middle + (below * weight).sum(-1) * half / _FOU_PANELS[-1]
    # Nearer to v = x: e^(w - x) w^e over w = x - v < x / 2, a series of positive terms.
    k = np.arange(_FOU_TAIL_TERMS)
    factorial = _last(np.array([math.lgamma(i + 1.0) for i in k]), x)
    k = _last(k, x)
    terms = jnp.exp(k * jnp.log(half)[..., None] - factorial - x[..., None]) / (e + 1 + k)
    near = terms.sum(-1) * power(half, e + 1)
    # Beyond: v > x gives e^-x Gamma(e + 1); -x^e over v > x / 2 gives -x^e e^(-x/2).
    beyond = jnp.exp(gammaln(e + 1) - x) - scale * jnp.exp(-half)
    return 0.5 * (scale * middle + near + beyond)


@jax.jit
def fou_shape(x: Float[Array, "*n"], hurst: ArrayLike) -> Float[Array, "*n"]:
    """Autocovariance g of stationary fractional OU at lag `x` in relaxation times.

    `rho(t) = scale^2 rate^(-2H) g(rate t) / 2` with
    `g(x) = int_0^inf e^-v ((x + v)^2H + |x - v|^2H - 2 x^2H) dv / 2`, which is the covariance of
    `int e^(-rate (t - u)) dB_u` integrated by parts (Cheridito, Kawaguchi and Maejima 2003). A
    power series up to x = 2, quadrature to 32, the asymptotic series beyond.

    Example:
        >>> import jax.numpy as jnp
        >>> round(float(fou_shape(jnp.array(1.0), 0.5)), 4)  # e^-1
        0.3679
    """
    x, e = jnp.asarray(x), 2.0 * jnp.asarray(hurst)
    is_small, is_large = x < _FOU_SERIES_BELOW, x > _FOU_ASYMPTOTIC_FROM
    small = jnp.where(is_small, x, _FOU_SERIES_BELOW)
    series = jnp.exp(gammaln(e + 1)) * jnp.cosh(small) - _growing_part(small, e)
    middle = _quadrature(jnp.where(is_small | is_large, 4.0, x), e)
    large = jnp.where(is_large, x, _FOU_ASYMPTOTIC_FROM)
    n = np.arange(1, _FOU_ASYMPTOTIC_TERMS + 1)
    falling = jnp.cumprod((e - 2 * n + 2) * (e - 2 * n + 1))
    terms = _last(falling, large) * large[..., None] ** _last(-2.0 * n, large)
    asymptotic = power(large, e) * terms.sum(-1)
    return jnp.where(is_small, series, jnp.where(is_large, asymptotic, middle))


@jax.jit
def fou_autocovariance(
    lag: Float[Array, "*n"], hurst: ArrayLike, rate: ArrayLike, scale: ArrayLike = 1.0
) -> Float[Array, "*n"]:
    """Autocovariance of stationary `dX = -rate X dt + scale dB`, B of kind 1.

    Args:
        lag: time lag, not negative.
        hurst: Hurst index H in (0, 1).
        rate: positive, 1/time.
        scale: positive, state/time^H.

    Example:
        >>> import jax.numpy as jnp
        >>> float(fou_autocovariance(jnp.array(0.0), 0.5, 2.0, 1.0))  # scale^2 / (2 rate)
        0.25
    """
    variance = 0.5 * jnp.square(scale) * jnp.exp(-2.0 * jnp.asarray(hurst) * jnp.log(rate))
    return variance * fou_shape(rate * lag, hurst)


@jax.jit
def fou_zero_start_covariance(
    s: Float[Array, "*n"],
    t: Float[Array, "*n"],
    hurst: ArrayLike,
    rate: ArrayLike,
    scale: ArrayLike = 1.0,
) -> Float[Array, "*n"]:
    """Covariance of `dX = -rate X dt + scale dB` started at `X_0 = 0`.

    `rho(t - s) - e^(-rate t) rho(s) - e^(-rate s) rho(t) + e^(-rate (s + t)) rho(0)`. Where both
    times are short the growing parts of rho, whose hyperbolic cosines cancel, are left out.

    Example:
        >>> import jax.numpy as jnp
        >>> t = jnp.array(1.0)
        >>> round(float(fou_zero_start_covariance(t, t, 0.5, 1.0)), 4)  # (1 - e^-2) / 2
        0.4323
    """
    e = 2.0 * jnp.asarray(hurst)
    x, y = jnp.asarray(rate * s), jnp.asarray(rate * t)
    # Not |x - y|: fused into one rounding in one place and two in another, a lag at the edge of a
    # branch below would be taken to lie on both sides of it.
    lag = jnp.asarray(rate * jnp.abs(s - t))
    short = jnp.maximum(x, y) < _FOU_SERIES_BELOW

    def combine(g: Any, x: Array, y: Array, lag: Array) -> Array:
        return g(lag) - jnp.exp(-y) * g(x) - jnp.exp(-x) * g(y)

    a, b, c = (jnp.asarray(jnp.where(short, v, 1.0)) for v in (x, y, lag))
    near = -combine(lambda v: _growing_part(v, e), a, b, c)
    far = combine(lambda v: fou_shape(v, hurst), x, y, lag)
    far = far + jnp.exp(gammaln(e + 1) - x - y)
    return 0.5 * jnp.square(scale) * jnp.exp(-e * jnp.log(rate)) * jnp.where(short, near, far)
