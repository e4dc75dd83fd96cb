"""Are ranks uniform? Exact simultaneous bands for their ECDF and their histogram.

If a computation is right, the rank of the truth among L posterior draws is uniform on 0, ..., L.
Of N such ranks the count at or below r is binomial for each r, and the counts at increasing r are
a Markov chain: given the count so far, what comes next is binomial again. A forward recursion over
that chain gives the probability that all counts stay inside given limits, exactly, and so limits
of one pointwise level whose *simultaneous* level is the one asked for: Saeilynoja, Buerkner and
Vehtari (2022), Statistics and Computing 32, 32, whose simulation and optimisation the recursion
replaces. The histogram's counts are treated alike.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Float, Int
from scipy.special import bdtr, bdtrc, gammaln

_MAX_POINTS = 100  # at which an ECDF is looked at
_BISECTIONS = 40


class Band(NamedTuple):
    """Limits that counts of uniform ranks stay in, all at once, with the probability asked for.

    Attributes:
        points: For an ECDF the probabilities P(rank <= r) at which it is looked at; for a
            histogram the first rank of each bin.
        lower: Smallest count inside the band, at each point.
        upper: Largest count inside the band.
        expected: Expected count.

    Example:
        >>> Band(np.array([0.5]), np.array([40]), np.array([60]), np.array([50.0])).upper
        array([60])
    """

    points: Float[np.ndarray, " K"]
    lower: Int[np.ndarray, " K"]
    upper: Int[np.ndarray, " K"]
    expected: Float[np.ndarray, " K"]


def ecdf_band(num_values: int, max_rank: int, prob: float = 0.95) -> Band:
    """Band of the number of ranks at or below r, for r = 0, ..., max_rank - 1.

    With many ranks it is taken at 100 of them, evenly spaced.

    Args:
        num_values: Number N of ranks.
        max_rank: Largest possible rank.
        prob: Probability that uniform ranks stay inside everywhere (at least; counts are
            discrete).

    Raises:
        ValueError: If a count is not positive or `prob` lies outside (0, 1).

    Example:
        >>> band = ecdf_band(200, 63)
        >>> bool((band.lower <= band.expected).all()), band.points.shape
        (True, (63,))
    """
    _check(num_values, max_rank, prob)
    points = (_ecdf_ranks(max_rank) + 1) / (max_rank + 1)
    return _band(num_values, tuple(points), prob, cumulative=True)


def histogram_band(num_values: int, max_rank: int, num_bins: int, prob: float = 0.95) -> Band:
    """Band of the counts of a histogram of ranks, its bins as equal as `max_rank` permits.

    Args:
        num_values: Number N of ranks.
        max_rank: Largest possible rank.
        num_bins: Number of bins, at most `max_rank + 1`.
        prob: As for :func:`ecdf_band`.

    Raises:
        ValueError: As for :func:`ecdf_band`, and for more bins than ranks.

    Example:
        >>> band = histogram_band(200, 63, 16)
        >>> band.expected[0], bool(band.lower[0] < 12.5 < band.upper[0])
        (np.float64(12.5), True)
    """
    _check(num_values, max_rank, prob)
    edges = bin_edges(max_rank, num_bins)
    ends = tuple(edges[1:] / (max_rank + 1))
    return _band(num_values, ends, prob, cumulative=False)._replace(points=edges[:-1].astype(float))


def bin_edges(max_rank: int, num_bins: int) -> Int[np.ndarray, " bins+1"]:
    """First rank of each bin, and one past the last rank.

    Example:
        >>> bin_edges(9, 5).tolist()
        [0, 2, 4, 6, 8, 10]
    """
    if not 1 <= num_bins <= max_rank + 1:
        raise ValueError(f"num_bins must be from 1 to {max_rank + 1}, got {num_bins}")
    return np.linspace(0, max_rank + 1, num_bins + 1).round().astype(int)


def ecdf_counts(ranks: ArrayLike, max_rank: int) -> Int[np.ndarray, " K"]:
    """Number of ranks at or below each rank at which :func:`ecdf_band` looks.

    Example:
        >>> ecdf_counts([0, 0, 3, 2], max_rank=3).tolist()
        [2, 2, 3]
    """
    return np.searchsorted(np.sort(np.asarray(ranks)), _ecdf_ranks(max_rank), side="right")


def uniformity_p_value(ranks: ArrayLike, max_rank: int) -> float:
    """Probability that uniform ranks leave the most improbable point as improbable as these.

    The statistic is the smallest two-sided binomial p-value of the ECDF over its points; its law
    is computed exactly. The value is below `1 - prob` if and only if the ECDF leaves
    :func:`ecdf_band` of that `prob`.

    Args:
        ranks: Shape `(N,)`, integers from 0 to `max_rank`.
        max_rank: Largest possible rank.

    Raises:
        ValueError: If there are no ranks, or one is out of range.

    Example:
        >>> uniformity_p_value(np.arange(64).repeat(4), 63) > 0.99
        True
        >>> uniformity_p_value(np.arange(32).repeat(8), 63) < 1e-6
        True
    """
    ranks = np.asarray(ranks)
    _check(ranks.size, max_rank, 0.5)
    if ranks.min() < 0 or ranks.max() > max_rank:
        raise ValueError(f"ranks must lie in 0..{max_rank}, got {ranks.min()} to {ranks.max()}")
    points = tuple((_ecdf_ranks(max_rank) + 1) / (max_rank + 1))
    table = _tail_table(ranks.size, points)
    seen = table[np.arange(len(points)), ecdf_counts(ranks, max_rank)].min()
    return 1.0 - _coverage(ranks.size, points, float(seen), True)


def _check(num_values: int, max_rank: int, prob: float) -> None:
    if num_values < 1 or max_rank < 1:
        raise ValueError(
            f"num_values and max_rank must be positive, got {num_values} and {max_rank}"
        )
    if not 0.0 < prob < 1.0:
        raise ValueError(f"prob must lie in (0, 1), got {prob}")


def _ecdf_ranks(max_rank: int) -> Int[np.ndarray, " K"]:
    return np.unique(np.linspace(0, max_rank - 1, min(max_rank, _MAX_POINTS)).round().astype(int))


def _band(num_values: int, points: tuple[float, ...], prob: float, *, cumulative: bool) -> Band:
    level = _pointwise_level(num_values, points, prob, cumulative)
    lower, upper = _limits(num_values, points, level, cumulative)
    ends = np.asarray(points)
    shares = ends if cumulative else np.diff(ends, prepend=0.0)
    return Band(ends, lower, upper, num_values * shares)


@lru_cache(maxsize=64)
def _pointwise_level(
    num_values: int, points: tuple[float, ...], prob: float, cumulative: bool
) -> float:
    """Largest pointwise level whose band holds everywhere with the probability asked for."""
    low, high = 0.0, 1.0 - prob
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if _coverage(num_values, points, middle, cumulative) >= prob:
            low = middle
        else:
            high = middle
    return low


@lru_cache(maxsize=8)
def _tail_table(
    num_values: int, points: tuple[float, ...], cumulative: bool = True
) -> Float[np.ndarray, "K N+1"]:
    """Two-sided p-value of every count at every point."""
    ends = np.asarray(points)
    shares = ends if cumulative else np.diff(ends, prepend=0.0)
    counts = np.arange(num_values + 1)
    shares = np.minimum(shares, 1.0)[:, None]
    at_least = bdtrc(np.maximum(counts - 1, 0), num_values, shares)
    at_least = np.where(counts > 0, at_least, 1.0)
    return 2.0 * np.minimum(bdtr(counts, num_values, shares), at_least)


def _limits(
    num_values: int, points: tuple[float, ...], level: float, cumulative: bool
) -> tuple[np.ndarray, np.ndarray]:
    inside = _tail_table(num_values, points, cumulative) > level
    lower = inside.argmax(axis=1)
    upper = num_values - inside[:, ::-1].argmax(axis=1)
    empty = ~inside.any(axis=1)
    return np.where(empty, 1, lower), np.where(empty, 0, upper)


def _coverage(num_values: int, points: tuple[float, ...], level: float, cumulative: bool) -> float:
    """Probability that counts of uniform ranks have pointwise p-values above a level everywhere."""
    lower, upper = _limits(num_values, points, level, cumulative)
    if np.any(upper < lower):
        return 0.0
    log_factorial = gammaln(np.arange(num_values + 1) + 1.0)
    reached, mass, before = np.array([0]), np.array([1.0]), 0.0
    for end, low, high in zip(points, lower, upper, strict=True):
        share = min((end - before) / (1.0 - before), 1.0)
        before = end
        least, most = (low, high) if cumulative else (reached[0] + low, reached[-1] + high)
        following = np.arange(least, min(most, num_values) + 1)
        step = following[None, :] - reached[:, None]
        left = num_values - reached[:, None]
        allowed = (step >= 0) & (step <= left)
        if not cumulative:
            allowed &= (step >= low) & (step <= high)
        step = np.where(allowed, step, 0)
        log_pmf = (
            log_factorial[left]
            - log_factorial[step]
            - log_factorial[left - step]
            + step * np.log(share)
        )
        if share < 1.0:
            log_pmf = log_pmf + (left - step) * np.log1p(-share)
        else:
            allowed &= step == left
        mass = mass @ np.where(allowed, np.exp(log_pmf), 0.0)
        reached = following
    return float(min(mass.sum(), 1.0))
