"""Posterior means and sds of two fits set side by side, element by element, with their errors.

Differences are in posterior standard deviations of the reference, and so are their Monte Carlo
standard errors: a difference of many errors is one between the fits, not of their finite draws.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin

_OUTER = 0.02  # tails that a side may not lie in
_FEW_BETWEEN = 0.2
_FEWEST = 4  # draws of a chain for which an autocorrelation is estimated


class Moments(NamedTuple):
    """Means and standard deviations of a variable, with Monte Carlo standard errors.

    Attributes:
        mean: Of all draws, shape of one draw; so are the others.
        sd: Standard deviation.
        mean_error: Standard error of `mean`.
        sd_error: Standard error of `sd`.
        ess: Effective sample size behind `mean`.

    Example:
        >>> Moments._fields
        ('mean', 'sd', 'mean_error', 'sd_error', 'ess')
    """

    mean: Float[np.ndarray, "*shape"]
    sd: Float[np.ndarray, "*shape"]
    mean_error: Float[np.ndarray, "*shape"]
    sd_error: Float[np.ndarray, "*shape"]
    ess: Float[np.ndarray, "*shape"]


def moments(values: Float[np.ndarray, "chain draw *shape"], size: float | None = None) -> Moments:
    """Moments of draws.

    The error of an sd is that of the mean square by the delta method, so that tails heavier than
    a normal's count.

    Args:
        values: Draws.
        size: Effective sample size where it is known, as for independent draws; None estimates it
            from autocorrelations, for the mean and for the squares.

    Example:
        >>> draws = np.random.default_rng(0).normal(size=(2, 5000))
        >>> found = moments(draws)
        >>> bool(abs(found.mean) < 4 * found.mean_error), round(float(found.mean_error), 3)
        (True, 0.01)
    """
    values = np.asarray(values, np.float64)
    total = values.shape[0] * values.shape[1]
    mean, sd = values.mean(axis=(0, 1)), values.std(axis=(0, 1), ddof=1)
    centred = np.square(values - mean)
    ess, ess_squares = (
        (_sizes(values, total), _sizes(centred, total)) if size is None else (size, size)
    )
    ess = np.broadcast_to(np.asarray(ess, np.float64), np.shape(mean))
    with np.errstate(invalid="ignore", divide="ignore"):
        kurtosis = np.square(centred).mean(axis=(0, 1)) / sd**4
        relative = np.sqrt(np.maximum(kurtosis - 1.0, 0.0) / (4.0 * ess_squares))
    return Moments(mean, sd, sd / np.sqrt(ess), sd * relative, ess)


def point_moments(values: Float[np.ndarray, "chain draw *shape"]) -> Moments:
    """A point as moments: it has a place and neither spread nor error.

    Example:
        >>> found = point_moments(np.full((1, 1), 2.0))
        >>> float(found.mean), float(found.sd)
        (2.0, nan)
    """
    unknown = np.full(values.shape[2:], np.nan)
    return Moments(values[0, 0], unknown, unknown, unknown, np.ones(values.shape[2:]))


def _sizes(values: Float[np.ndarray, "chain draw *shape"], total: int) -> np.ndarray:
    if values.shape[1] < _FEWEST:
        return np.full(values.shape[2:], float(total))
    with np.errstate(invalid="ignore", divide="ignore"):
        sizes = np.asarray(effective_sample_size(values))
    return np.where(np.isfinite(sizes), np.clip(sizes, 1.0, total), total)


def largest_rhat(values: Float[np.ndarray, "chain draw *shape"]) -> float:
    """Largest split R-hat over the elements of a variable; NaN where there is none.

    Example:
        >>> draws = np.random.default_rng(0).normal(size=(2, 500, 3))
        >>> draws[1, :, 2] += 3.0
        >>> largest_rhat(draws) > 1.5
        True
    """
    if values.shape[1] < _FEWEST:
        return float("nan")
    with np.errstate(invalid="ignore", divide="ignore"):
        rhat = np.asarray(split_gelman_rubin(np.asarray(values, np.float64)))
    rhat = rhat[np.isfinite(rhat)]
    return float(rhat.max()) if rhat.size else float("nan")


class Sides(NamedTuple):
    """How chains change sides where draws of a path lie on two.

    Attributes:
        rhat: Largest split R-hat of the side over the elements that have two; NaN where none has.
        ess: Smallest effective sample size of the side.

    Example:
        >>> Sides(1.0, 800.0).ess
        800.0
    """

    rhat: float
    ess: float


def sides(values: Float[np.ndarray, "chain draw *shape"]) -> Sides:
    """Mixing between two sides of a path, element by element.

    Means and R-hats of the states see little of a rare change between two wells. An element has two
    sides where few draws lie in the middle third between its outer quantiles (42 % of a normal law
    would, 33 % of a uniform one); which side a draw is on is then judged for itself.

    Args:
        values: Draws.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> stuck = rng.normal(size=(4, 500, 2)) * 0.1
        >>> stuck[:2, :, 1] += 1.0
        >>> sides(stuck).rhat > 1.5, bool(np.isnan(sides(rng.normal(size=(4, 500))).rhat))
        (True, True)
    """
    none = Sides(float("nan"), float("nan"))
    if values.shape[1] < _FEWEST:
        return none
    flat = np.asarray(values, np.float64).reshape(*values.shape[:2], -1)
    low, high = np.quantile(flat, [_OUTER, 1.0 - _OUTER], axis=(0, 1))
    third = (high - low) / 3.0
    middle = ((flat > low + third) & (flat < high - third)).mean(axis=(0, 1))
    upper = flat > low + 1.5 * third
    share = upper.mean(axis=(0, 1))
    two = (middle < _FEW_BETWEEN) & (third > 0.0) & (share > _OUTER) & (share < 1.0 - _OUTER)
    if not two.any():
        return none
    chosen = upper[..., two].astype(float)
    ess = _sizes(chosen, chosen.shape[0] * chosen.shape[1])
    # A chain that never changes sides has an R-hat that is not finite.
    with np.errstate(invalid="ignore", divide="ignore"):
        rhat = np.asarray(split_gelman_rubin(chosen))
    rhat = np.where(np.isnan(rhat), np.inf, rhat)
    changes = np.abs(np.diff(chosen, axis=1)).sum(axis=(0, 1))
    # Fewer changes of side than this many cannot be worth more draws than they are.
    return Sides(float(rhat.max()), float(np.minimum(ess, 1.0 + changes).min()))


class Difference(NamedTuple):
    """How the moments of a fit differ from a reference's, in sds of the reference.

    Attributes:
        mean: Difference of means over the reference's sd.
        mean_error: Monte Carlo standard error of it.
        sd: Difference of sds over the reference's sd.
        sd_error: Monte Carlo standard error of it.

    Example:
        >>> zero = np.zeros(2)
        >>> Difference(zero, zero + 0.1, zero + 0.4, zero + 0.1).in_errors.tolist()
        [4.0, 4.0]
    """

    mean: Float[np.ndarray, "*shape"]
    mean_error: Float[np.ndarray, "*shape"]
    sd: Float[np.ndarray, "*shape"]
    sd_error: Float[np.ndarray, "*shape"]

    @property
    def in_errors(self) -> Float[np.ndarray, "*shape"]:
        """The larger of the two differences in their Monte Carlo errors; NaN if undefined."""
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios = np.abs(self.mean) / self.mean_error, np.abs(self.sd) / self.sd_error
        return np.fmax(*ratios)

    @property
    def size(self) -> Float[np.ndarray, "*shape"]:
        """The larger of the two differences."""
        return np.fmax(np.abs(self.mean), np.abs(self.sd))


def difference(fit: Moments, reference: Moments) -> Difference:
    """Difference of a fit from a reference; NaN where the reference is constant.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> exact, wide = rng.normal(size=(1, 20_000)), 2.0 * rng.normal(size=(1, 20_000))
        >>> found = difference(moments(wide), moments(exact))
        >>> bool(abs(found.sd - 1.0) < 4 * found.sd_error)
        True
    """
    scale = np.where(reference.sd > 0, reference.sd, np.nan)
    ratio = fit.sd / scale
    return Difference(
        mean=(fit.mean - reference.mean) / scale,
        mean_error=np.hypot(fit.mean_error, reference.mean_error) / scale,
        sd=ratio - 1.0,
        sd_error=np.hypot(fit.sd_error, ratio * reference.sd_error) / scale,
    )
