"""Profile likelihoods known with Monte Carlo error, and intervals that allow for it.

Source: Ionides, Bretó, Park, Smith and King (2017), "Monte Carlo profile confidence intervals for
dynamic systems", Journal of the Royal Society Interface 14, 20170126.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Float
from scipy.special import chdtri

_GRID = 1000


class AdjustedProfile(NamedTuple):
    """A smoothed profile and its interval.

    Attributes:
        estimate: where the smoothed profile is largest.
        interval: ends of the interval; an end of the values' range where the profile does not fall
            far enough before it.
        cutoff: how far below its largest value the smoothed profile may be.
        standard_error: total standard error of the estimate.
        statistical_error: its part that more data would lower.
        monte_carlo_error: its part that more particles would lower.
        grid: values of the parameter.
        smoothed: the smoothed profile there.

    Example:
        >>> import numpy as np, numpyro_sde as nsde
        >>> x = np.linspace(-4.0, 4.0, 41)
        >>> found = nsde.infer.adjusted_profile(x, -0.5 * x**2)
        >>> [round(float(end), 1) for end in found.interval]
        [-2.0, 2.0]
    """

    estimate: float
    interval: tuple[float, float]
    cutoff: float
    standard_error: float
    statistical_error: float
    monte_carlo_error: float
    grid: Float[np.ndarray, " G"]
    smoothed: Float[np.ndarray, " G"]


def adjusted_profile(
    values: Float[ArrayLike, " n"],
    log_likelihood: Float[ArrayLike, " n"],
    *,
    level: float = 0.95,
    span: float = 0.75,
) -> AdjustedProfile:
    """Monte Carlo adjusted profile: smooth it, and widen its interval by its own noise.

    The profile is smoothed by local quadratics; a quadratic `-a phi^2 + b phi + c`, weighted about
    the maximum, gives the curvature, `1/(2 a)` the statistical variance, and the variance of
    `b/(2 a)` by its regression that of the Monte Carlo error. The smoothed profile is cut at
    `chi2_level (a se_mc^2 + 1/2)` below its maximum (equation 15 of the source).

    Args:
        values: values of the parameter, at least 4 different ones.
        log_likelihood: profile log likelihood at each, with independent errors.
        level: of the interval.
        span: share of the points that each local fit uses.

    Raises:
        ValueError: too few points, or a level or span out of range.

    Returns:
        The smoothed profile, its maximum and interval. Where the quadratic opens upwards, errors
        are NaN and the interval is the whole range.

    Example:
        >>> import numpy as np, numpyro_sde as nsde
        >>> x = np.linspace(-4.0, 4.0, 33)
        >>> noisy = -0.5 * x**2 + 0.3 * np.random.default_rng(0).normal(size=33)
        >>> nsde.infer.adjusted_profile(x, noisy).monte_carlo_error < 0.2
        True
    """
    x, y = np.asarray(values, float), np.asarray(log_likelihood, float)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(
            f"values and log_likelihood must be vectors of one length, got {x.shape} and {y.shape}"
        )
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    if np.unique(x).size < 4:
        raise ValueError(
            f"values must have 4 different ones with a finite likelihood, got {np.unique(x)}"
        )
    if not 0.0 < level < 1.0 or not 0.0 < span <= 1.0:
        raise ValueError(f"level and span must be between 0 and 1, got {level} and {span}")
    grid = np.linspace(x.min(), x.max(), _GRID)
    smoothed = _local_quadratics(x, y, grid, span)
    estimate = float(grid[np.argmax(smoothed)])
    near = _tricube(np.abs(x - estimate), span)
    design = np.stack([-((x - estimate) ** 2), x - estimate, np.ones_like(x)], axis=1)
    (a, b, _), cov = _least_squares(design, y, near)
    if a > 0:
        ratio = b / a
        var_mc = (cov[1, 1] - 2.0 * ratio * cov[0, 1] + ratio**2 * cov[0, 0]) / (4.0 * a**2)
        var_stat = 1.0 / (2.0 * a)
        cutoff = float(chdtri(1, 1.0 - level) * (a * var_mc + 0.5))
    else:
        var_mc = var_stat = np.nan
        cutoff = np.inf
    inside = grid[np.max(smoothed) - smoothed < cutoff]
    return AdjustedProfile(
        estimate,
        (float(inside.min()), float(inside.max())),
        cutoff,
        float(np.sqrt(var_mc + var_stat)),
        float(np.sqrt(var_stat)),
        float(np.sqrt(var_mc)),
        grid,
        smoothed,
    )


def _tricube(distance: Float[np.ndarray, "*G n"], span: float) -> Float[np.ndarray, "*G n"]:
    """Weights of the nearest share of points, falling to zero at the furthest of them."""
    number = distance.shape[-1]
    count = min(max(int(np.ceil(span * number)), 4), number)
    width = np.sort(distance, axis=-1)[..., count - 1 : count]
    width = np.where(width > 0, width * (1.0 + 1e-9), 1.0)
    return np.clip(1.0 - (distance / width) ** 3, 0.0, None) ** 3


def _local_quadratics(x: np.ndarray, y: np.ndarray, grid: np.ndarray, span: float) -> np.ndarray:
    """At each point of the grid, the value of a quadratic fitted to the points about it."""
    ahead = (x - grid[:, None]) / np.ptp(x)
    weights = _tricube(np.abs(ahead), span)
    moments = [np.sum(weights * ahead**k, axis=1) for k in range(5)]
    A = np.stack([np.stack([moments[i + j] for j in range(3)], -1) for i in range(3)], -2)
    b = np.stack([np.sum(weights * y * ahead**k, axis=1) for k in range(3)], -1)
    return (np.linalg.pinv(A, hermitian=True) @ b[..., None])[:, 0, 0]


def _least_squares(
    design: np.ndarray, y: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted regression: coefficients, and their covariance by the residual variance."""
    used = weights > 0
    A, y, w = design[used], y[used], weights[used]
    root = np.sqrt(w)
    scale = np.maximum(np.max(np.abs(A), axis=0), 1e-300)
    scaled = A / scale * root[:, None]
    coefficients = np.linalg.lstsq(scaled, y * root, rcond=None)[0]
    freedom = max(len(y) - 3, 1)
    variance = np.sum(w * (y - A / scale @ coefficients) ** 2) / freedom
    cov = variance * np.linalg.pinv(scaled.T @ scaled) / np.outer(scale, scale)
    return coefficients / scale, cov


@dataclass(frozen=True)
class Profile:
    """A profile likelihood of one parameter.

    Attributes:
        site: the parameter.
        values: where it was held, `(n,)`.
        log_likelihood: largest log likelihood found with it there, `(n,)`.
        standard_errors: Monte Carlo errors of these.
        estimates: all parameters there, by site.
        level: of the interval.

    Example:
        >>> import numpy as np, numpyro_sde as nsde
        >>> x = np.linspace(0.5, 1.5, 15)
        >>> profile = nsde.infer.Profile("rate", x, -50 * (x - 1.0)**2, np.zeros(15), {}, 0.95)
        >>> [round(end, 1) for end in profile.interval]
        [0.8, 1.2]
    """

    site: str
    values: Float[np.ndarray, " n"]
    log_likelihood: Float[np.ndarray, " n"]
    standard_errors: Float[np.ndarray, " n"]
    estimates: dict[str, Any]
    level: float

    @cached_property
    def adjusted(self) -> AdjustedProfile:
        """The smoothed profile, its maximum, errors and interval."""
        return adjusted_profile(self.values, self.log_likelihood, level=self.level)

    @property
    def interval(self) -> tuple[float, float]:
        """The Monte Carlo adjusted interval."""
        return self.adjusted.interval

    def __str__(self) -> str:
        found = self.adjusted
        return (
            f"{self.site}: {found.estimate:.5g}, {100 * self.level:g} % interval "
            f"({found.interval[0]:.5g}, {found.interval[1]:.5g}); statistical error "
            f"{found.statistical_error:.3g}, Monte Carlo error {found.monte_carlo_error:.3g}"
        )
