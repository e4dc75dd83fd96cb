"""Log determinant of the covariance of fractional Gaussian noise, in O(1) of its Hurst index.

For a spectral density that behaves as `l^(1 - 2H)` at zero, the theorem of Szego as extended by
Fisher and Hartwig gives, with m(H) the mean of `log 2 pi f`,

    log det C_N = N m(H) + (H - 1/2)^2 log N + R_N(H),   R_N -> E(H).

R_N is found at Chebyshev nodes of the logit of H, by the recursion of Levinson and Durbin in
float64 on the host, and interpolated. Beyond `_LONGEST` points R_N is extrapolated at each node by
its expansion in powers `N^-(i + 2 j H)`, which the singularity `l^(2H + 1)` of the next order
in f leads to: fitted to the recursion's own values.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln, logit
from jaxtyping import Array, ArrayLike, Float
from scipy.special import zeta

HURST_RANGE = (0.01, 0.99)
"""Hurst indices for which the interpolant holds; outside it is NaN."""

_NODES = 56
_LONGEST = 2048
_FITTED = np.unique(np.round(np.geomspace(100, _LONGEST, 60)).astype(int))
_MEAN_POINTS = 200


def fgn_log_determinant(length: int, hurst: ArrayLike) -> Float[Array, "*batch"]:
    """Log determinant of the covariance matrix of `length` points of unit fGn.

    Accurate to 1e-12 of itself, and NaN outside `HURST_RANGE`. The first call for a length takes
    the host up to half a second.

    Args:
        length: number of points N.
        hurst: Hurst index, any shape.

    Example:
        >>> round(float(fgn_log_determinant(2, 0.75)), 3)  # log(1 - 0.414^2)
        -0.188
    """
    if length == 1:
        return jnp.zeros(jnp.shape(hurst))
    hurst = jnp.asarray(hurst)
    low, high = HURST_RANGE
    inside = (hurst >= low) & (hurst <= high)
    hurst = jnp.where(inside, hurst, 0.5)
    u = logit(hurst) / math.log(high / low)
    remainder, mean = _coefficients(length)
    log_power = gammaln(2.0 * hurst + 1.0) + jnp.log(jnp.sin(math.pi * hurst))
    total = length * (_chebyshev(mean, u) + log_power) + _chebyshev(remainder, u)
    total = total + (hurst - 0.5) ** 2 * math.log(length)
    return jnp.where(inside, total, jnp.nan)


def _chebyshev(coefficients: np.ndarray, u: Array) -> Array:
    """Sum of a Chebyshev series (Clenshaw)."""
    b1 = b2 = jnp.zeros_like(u)
    for c in coefficients[:0:-1]:
        b1, b2 = 2.0 * u * b1 - b2 + c, b1
    return u * b1 - b2 + coefficients[0]


def _node_angles() -> np.ndarray:
    return (np.arange(_NODES) + 0.5) * math.pi / _NODES


def _node_hurst() -> np.ndarray:
    low, high = HURST_RANGE
    return 1.0 / (1.0 + np.exp(-math.log(high / low) * np.cos(_node_angles())))


def _series(values: np.ndarray) -> np.ndarray:
    """Coefficients of the Chebyshev interpolant through values at the nodes."""
    k = np.arange(_NODES)
    c = 2.0 / _NODES * np.cos(k[:, None] * _node_angles()) @ values
    c[0] *= 0.5
    return c


@functools.lru_cache(maxsize=64)
def _coefficients(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Chebyshev coefficients of `R_N` and of m less its factor `Gamma(2H + 1) sin(pi H)`."""
    hurst, (plain, mean) = _node_hurst(), _means()
    if length <= _LONGEST:
        sums = _log_determinants(length)[:, length - 1]
        rest = sums - length * plain - (hurst - 0.5) ** 2 * math.log(length)
        return _series(rest), _series(mean)
    sums = _log_determinants(_LONGEST)
    rest = np.empty(_NODES)
    for i, h in enumerate(hurst):
        known = sums[i, _FITTED - 1] - _FITTED * plain[i] - (h - 0.5) ** 2 * np.log(_FITTED)
        basis = _expansion(_FITTED, h)
        size = np.linalg.norm(basis, axis=0)
        fit = np.linalg.lstsq(basis / size, known, rcond=1e-15)[0] / size
        rest[i] = (_expansion(np.array([length]), h) @ fit)[0]
    return _series(rest), _series(mean)


def _expansion(length: np.ndarray, h: float) -> np.ndarray:
    """Powers of N in the expansion of the remainder."""
    powers = [0, 1, 2, 3, 4, 1 + 2 * h, 2 + 2 * h, 3 + 2 * h, 2 + 4 * h, 3 + 4 * h, 3 + 6 * h]
    return np.stack([length ** (-float(p)) for p in powers], axis=-1)


@functools.cache
def _means() -> tuple[np.ndarray, np.ndarray]:
    """Mean of `log 2 pi f` at the nodes, and without the factor `Gamma(2H + 1) sin(pi H)`."""
    x, w = np.polynomial.legendre.leggauss(_MEAN_POINTS)
    s = (x + 1.0) / 2.0
    # Graded towards zero, where the integrand has a term of power 2H + 1.
    x, w = math.pi * s**4, w / 2.0 * 4.0 * s**3
    h = _node_hurst()[:, None]
    p = 2.0 * h + 1.0
    shift = x / (2.0 * math.pi)
    images = (2.0 * math.pi) ** (-p) * (zeta(p, 1.0 + shift) + zeta(p, 1.0 - shift))
    # The logarithm of its power at zero is taken out and its mean put back.
    smooth = np.log(4.0 * np.sin(x / 2.0) ** 2 * (x ** (-p) + images)) - (1.0 - 2.0 * h) * np.log(x)
    mean = (smooth * w).sum(1) + (1.0 - 2.0 * h[:, 0]) * (math.log(math.pi) - 1.0)
    factor = np.log([math.gamma(z) for z in p[:, 0]]) + np.log(np.sin(math.pi * h[:, 0]))
    return mean + factor, mean


@functools.lru_cache(maxsize=8)
def _log_determinants(length: int) -> np.ndarray:
    """Log determinants of all leading blocks up to `length`, shape `(nodes, length)`."""
    r = _autocovariance(_node_hurst()[:, None], np.arange(length, dtype=float))
    a, v = np.zeros_like(r), r[:, 0].copy()
    logs = np.empty_like(r)
    logs[:, 0] = np.log(v)
    for k in range(1, length):
        phi = (r[:, k] - np.sum(a[:, : k - 1] * r[:, k - 1 : 0 : -1], axis=1)) / v
        a[:, : k - 1] = a[:, : k - 1] - phi[:, None] * a[:, : k - 1][:, ::-1]
        a[:, k - 1] = phi
        v = v * (1.0 - phi**2)
        logs[:, k] = np.log(v)
    return np.cumsum(logs, axis=1)


def _autocovariance(h: np.ndarray, lag: np.ndarray) -> Any:
    """Autocovariance of fGn in float64, shape `(nodes, lags)`."""
    near = 0.5 * ((lag + 1) ** (2 * h) - 2 * lag ** (2 * h) + np.abs(lag - 1) ** (2 * h))
    k = np.maximum(lag, 8.0)
    binomial, far = np.ones_like(h), np.zeros_like(near)
    for j in range(1, 11):
        binomial = binomial * (2 * h - 2 * j + 2) * (2 * h - 2 * j + 1) / ((2 * j - 1) * 2 * j)
        far = far + binomial * k ** (-2.0 * j)
    return np.where(lag >= 8, k ** (2 * h) * far, near)
