"""Truth of a nonlinear model: its joint density on a grid of all states, summed in NumPy alone."""

from __future__ import annotations

import numpy as np
import scipy.special
import scipy.stats

# Bounds and spacing: densities vanish at the first to 1e-12, and vary slowly over the second, so
# that sums are integrals to nine digits.
AXIS = np.linspace(-4.0, 4.0, 97)


class GridTruth:
    """The joint density of a scalar path of three times and its data.

    Offers what `numpyro_sde.testing.quadratic.Quadratic` does, for laws that are not normal.
    """

    size = 3

    def __init__(self, start, steps, seen):
        self._start, self._steps, self._seen = start, steps, seen
        self.shift = np.zeros(self.size)

    def _joint(self, a, b, c):
        path = np.stack(np.broadcast_arrays(a, b, c), -1)
        first, second = self._steps
        return self._start(a) + first(a, b) + second(b, c) + self._seen(path)

    def at(self, x):
        """The log joint density at a path."""
        return float(self._joint(*np.ravel(x)))

    def _table(self):
        return self._joint(AXIS[:, None, None], AXIS[None, :, None], AXIS[None, None, :])

    def evidence(self):
        """Log of the integral over the path."""
        return float(scipy.special.logsumexp(self._table()) + self.size * np.log(np.diff(AXIS)[0]))

    def free(self):
        """All numbers of the path have a law."""
        return np.arange(self.size)

    def _shares(self):
        table = self._table()
        return np.exp(table - scipy.special.logsumexp(table)).ravel()

    def _points(self):
        return np.stack(np.meshgrid(AXIS, AXIS, AXIS, indexing="ij"), -1).reshape(-1, self.size)

    def moments(self):
        """Mean and covariance of the path given the data."""
        shares, points = self._shares(), self._points()
        mean = shares @ points
        away = points - mean
        return mean, (away * shares[:, None]).T @ away

    def draw(self, rng, count):
        """Paths given the data: a point of the grid, and where in its cell."""
        shares = self._shares()
        points = self._points()[rng.choice(shares.size, count, p=shares)]
        return points + rng.uniform(-0.5, 0.5, points.shape) * np.diff(AXIS)[0]


def normal(x, mean, sd):
    """Normal log density."""
    return scipy.stats.norm.logpdf(x, mean, sd)
