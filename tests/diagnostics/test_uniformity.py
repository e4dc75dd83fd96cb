"""Simultaneous bands of ranks against simulation and scipy."""

import numpy as np
import pytest
from scipy.stats import binom, multinomial

from numpyro_sde.diagnostics.calibration.uniformity import (
    bin_edges,
    ecdf_band,
    ecdf_counts,
    histogram_band,
    uniformity_p_value,
)


@pytest.mark.parametrize(
    ("number", "top", "prob"), [(200, 63, 0.95), (50, 300, 0.9), (300, 7, 0.8)]
)
def test_bands_hold_simultaneously(number, top, prob):
    """4,000 sets of uniform ranks, seed 0: coverage at least `prob`, and not much more."""
    ranks = np.random.default_rng(0).integers(0, top + 1, (4000, number))
    band = ecdf_band(number, top, prob)
    counts = np.array([ecdf_counts(row, top) for row in ranks])
    share = np.mean(np.all((counts >= band.lower) & (counts <= band.upper), axis=1))
    error = np.sqrt(prob * (1 - prob) / 4000)
    assert prob - 4 * error < share < prob + 4 * error + 0.02  # counts are discrete
    bins = min(8, top + 1)
    histogram = histogram_band(number, top, bins, prob)
    edges = bin_edges(top, bins)
    heights = np.array([np.histogram(row, edges)[0] for row in ranks])
    inside = np.all((heights >= histogram.lower) & (heights <= histogram.upper), axis=1)
    assert prob - 4 * error < inside.mean() < prob + 4 * error + 0.05
    np.testing.assert_allclose(histogram.expected.sum(), number)


def test_recursion_is_the_multinomial_probability():
    """Three ranks, few values: all counts added up by hand."""
    number, top = 6, 2
    for band, sums in ((ecdf_band(number, top, 0.7), True), (histogram_band(6, 2, 3, 0.7), False)):
        total = 0.0
        for a in range(number + 1):
            for b in range(number + 1 - a):
                counts = [a, b, number - a - b]
                seen = np.cumsum(counts)[:2] if sums else np.array(counts)
                if np.all((seen >= band.lower) & (seen <= band.upper)):
                    total += multinomial.pmf(counts, number, [1 / 3] * 3)
        assert total >= 0.7
        # One step tighter at every point would hold less.
        assert total < 1.0


def test_p_value_of_one_point_is_binomial():
    """Ranks 0 and 1: the ECDF has one point, and the statistic's law is a binomial's."""
    number, ones = 30, 8
    ranks = np.r_[np.ones(ones, int), np.zeros(number - ones, int)]
    law, counts = binom(number, 0.5), np.arange(number + 1)
    tail = 2 * np.minimum(law.cdf(counts), law.sf(counts - 1))
    expected = law.pmf(counts)[tail <= tail[number - ones]].sum()
    assert uniformity_p_value(ranks, 1) == pytest.approx(expected, rel=1e-9)


def test_p_values_are_uniform_and_agree_with_the_band():
    """300 sets of 100 ranks, seed 1; a discrete p-value is at most a level that often."""
    ranks = np.random.default_rng(1).integers(0, 64, (300, 100))
    p = np.array([uniformity_p_value(row, 63) for row in ranks])
    for level in (0.05, 0.2, 0.5):
        error = np.sqrt(level * (1 - level) / 300)
        assert level - 4 * error - 0.02 < np.mean(p < level) < level + 4 * error
    band = ecdf_band(100, 63, 0.9)
    counts = np.array([ecdf_counts(row, 63) for row in ranks])
    inside = np.all((counts >= band.lower) & (counts <= band.upper), axis=1)
    np.testing.assert_array_equal(inside, p >= 0.1)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="num_values and max_rank must be positive"):
        ecdf_band(0, 63)
    with pytest.raises(ValueError, match=r"prob must lie in \(0, 1\)"):
        ecdf_band(10, 63, 1.0)
    with pytest.raises(ValueError, match="num_bins must be from 1 to 10"):
        histogram_band(100, 9, 20)
    with pytest.raises(ValueError, match=r"ranks must lie in 0\.\.9"):
        uniformity_p_value([0, 10], 9)
