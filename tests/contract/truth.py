"""Independent truth: weighted Gaussian densities of paths and data, in float64 NumPy alone.

NumPyro's joint density of a linear-Gaussian model is a sum of weighted normal log densities, each
of one residual that is linear in the path; `handlers.scale` gives the weights. Such a sum is a
quadratic form, and its integral over the path is closed. Nothing here knows of filters.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

LOG_2PI = np.log(2.0 * np.pi)


class Quadratic:
    """`log f(x) = constant + shift.x - x.precision.x / 2` for a path of `size` numbers."""

    def __init__(self, size: int) -> None:
        self.precision = np.zeros((size, size))
        self.shift = np.zeros(size)
        self.constant = 0.0

    def add(self, row, offset, cov, weight=1.0) -> None:
        """Add `weight * log N(row @ x + offset; 0, cov)`; `row` (p, size), or (size,)."""
        row = np.atleast_2d(np.asarray(row, float))
        offset, cov = np.atleast_1d(np.asarray(offset, float)), np.atleast_2d(cov)
        inverse = np.linalg.inv(cov)
        self.precision += weight * row.T @ inverse @ row
        self.shift -= weight * row.T @ inverse @ offset
        log_det = np.linalg.slogdet(cov)[1]
        quadratic = offset @ inverse @ offset
        self.constant -= 0.5 * weight * (quadratic + log_det + len(offset) * LOG_2PI)

    def at(self, x) -> float:
        """The log joint density at a path."""
        x = np.ravel(np.asarray(x, float))
        return float(self.constant + self.shift @ x - 0.5 * x @ self.precision @ x)

    def free(self) -> np.ndarray:
        """Components of the path on which anything depends (a masked path has none)."""
        return np.flatnonzero(np.abs(self.precision).sum(0) > 0)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of the path under the normalised density."""
        cov = np.linalg.inv(self.precision)
        return cov @ self.shift, cov

    def evidence(self) -> float:
        """Log of the integral over the path; components that nothing depends on are left out."""
        i = self.free()
        if i.size == 0:
            return float(self.constant)
        precision, shift = self.precision[np.ix_(i, i)], self.shift[i]
        sign, log_det = np.linalg.slogdet(precision)
        assert sign > 0
        quadratic = shift @ np.linalg.solve(precision, shift)
        return float(self.constant + 0.5 * (quadratic - log_det + i.size * LOG_2PI))

    def known(self, rows, values) -> Quadratic:
        """The form in the other components, with those in `rows` held at `values`."""
        rows = np.asarray(rows)
        rest = np.setdiff1d(np.arange(self.shift.size), rows)
        new = Quadratic(rest.size)
        new.precision = self.precision[np.ix_(rest, rest)]
        new.shift = self.shift[rest] - self.precision[np.ix_(rest, rows)] @ values
        quadratic = values @ self.precision[np.ix_(rows, rows)] @ values
        new.constant = self.constant + self.shift[rows] @ values - 0.5 * quadratic
        return new


def add_linear_path(q, index, times, A, b, L, m0, P0, weight=1.0) -> None:
    """The law of `dX = (A X + b) dt + L dW` at `times`; `index` (T, d) places it in the form."""
    A, L, P0 = (np.atleast_2d(np.asarray(a, float)) for a in (A, L, P0))
    b, m0 = np.atleast_1d(np.asarray(b, float)), np.atleast_1d(np.asarray(m0, float))
    d, size = len(m0), q.shift.size
    eye = np.eye(size)
    q.add(eye[index[0]], -m0, P0, weight)
    for k, h in enumerate(np.diff(times)):
        # Van Loan's block exponential: transition matrix and covariance of one step.
        block = np.zeros((2 * d, 2 * d))
        block[:d, :d], block[:d, d:], block[d:, d:] = -A, L @ L.T, A.T
        e = scipy.linalg.expm(block * h)
        F = e[d:, d:].T
        affine = np.zeros((d + 1, d + 1))
        affine[:d, :d], affine[:d, d] = A, b
        shift = scipy.linalg.expm(affine * h)[:d, d]
        q.add(eye[index[k + 1]] - F @ eye[index[k]], -shift, F @ e[:d, d:], weight)


def add_observations(q, index, y, slope=1.0, offset=0.0, sd=1.0, weight=1.0) -> None:
    """Normal observations `y ~ N(slope * x[index] + offset, sd)`, arrays broadcast; NaN is none."""
    for i, value, h, c, s, w in np.nditer(
        np.broadcast_arrays(index, np.asarray(y, float), slope, offset, sd, weight)
    ):
        if np.isnan(value) or w == 0:
            continue
        row = np.zeros(q.shift.size)
        row[int(i)] = h
        q.add(row, float(c - value), float(s) ** 2, float(w))


def normal(x, mean, sd) -> float:
    """Sum of normal log densities."""
    z = (np.asarray(x, float) - mean) / sd
    return float(np.sum(-0.5 * z**2 - np.log(sd) - 0.5 * LOG_2PI))
