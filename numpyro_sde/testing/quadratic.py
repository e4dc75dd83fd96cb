"""Truth that shares no code with the engines: weighted normal densities, in float64 NumPy alone.

The joint density of a linear model of normal laws is a sum of weighted normal log densities, each
of a residual that is linear in the path; `handlers.scale` gives the weights. Such a sum is a
quadratic form, whose integral over the path is closed. Nothing here knows of filters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.linalg
from jaxtyping import Float

_LOG_2PI = np.log(2.0 * np.pi)


class Quadratic:
    """`log f(x) = constant + shift.x - x.precision.x / 2` for a path of `size` numbers.

    Args:
        size: how many numbers a path has.

    Example:
        >>> from numpyro_sde.testing.quadratic import Quadratic
        >>> joint = Quadratic(1)
        >>> joint.add([1.0], 0.0, 1.0)  # x ~ N(0, 1)
        >>> joint.add([1.0], -2.0, 0.25, weight=0.5)  # half of y = 2 ~ N(x, 0.5)
        >>> round(joint.evidence(), 4)
        -1.9955
    """

    def __init__(self, size: int) -> None:
        self.precision = np.zeros((size, size))
        self.shift = np.zeros(size)
        self.constant = 0.0

    @property
    def size(self) -> int:
        """How many numbers a path has."""
        return int(self.shift.size)

    def add(self, row: Any, offset: Any, cov: Any, weight: float = 1.0) -> None:
        """Add `weight * log N(row @ x + offset; 0, cov)`, `row` of shape `(p, size)`."""
        row = np.atleast_2d(np.asarray(row, float))
        offset, cov = np.atleast_1d(np.asarray(offset, float)), np.atleast_2d(cov)
        inverse = np.linalg.inv(cov)
        self.precision += weight * row.T @ inverse @ row
        self.shift -= weight * row.T @ inverse @ offset
        log_det = np.linalg.slogdet(cov)[1]
        quadratic = offset @ inverse @ offset
        self.constant -= 0.5 * weight * (quadratic + log_det + len(offset) * _LOG_2PI)

    def at(self, x: Any) -> float:
        """The log joint density at a path."""
        x = np.ravel(np.asarray(x, float))
        return float(self.constant + self.shift @ x - 0.5 * x @ self.precision @ x)

    def free(self) -> np.ndarray:
        """Numbers of the path on which anything depends (of a masked path none)."""
        return np.flatnonzero(np.abs(self.precision).sum(0) > 0)

    def moments(self) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "n n"]]:
        """Mean and covariance of the free numbers under the normalised density."""
        i = self.free()
        cov = np.linalg.inv(self.precision[np.ix_(i, i)])
        return cov @ self.shift[i], cov

    def evidence(self) -> float:
        """Log of the integral over the path; numbers that nothing depends on are left out."""
        i = self.free()
        if i.size == 0:
            return float(self.constant)
        mean, _ = self.moments()
        log_det = np.linalg.slogdet(self.precision[np.ix_(i, i)])[1]
        return float(self.constant + 0.5 * (mean @ self.shift[i] - log_det + i.size * _LOG_2PI))

    def known(self, rows: Any, values: Any) -> Quadratic:
        """The form in the other numbers, those in `rows` held at `values`."""
        rows, values = np.asarray(rows), np.asarray(values, float)
        rest = np.setdiff1d(np.arange(self.size), rows)
        new = Quadratic(rest.size)
        new.precision = self.precision[np.ix_(rest, rest)]
        new.shift = self.shift[rest] - self.precision[np.ix_(rest, rows)] @ values
        quadratic = values @ self.precision[np.ix_(rows, rows)] @ values
        new.constant = self.constant + self.shift[rows] @ values - 0.5 * quadratic
        return new


def add_linear_path(
    joint: Quadratic,
    index: Any,
    times: Any,
    A: Any,
    b: Any,
    L: Any,
    mean: Any,
    cov: Any,
    weight: float = 1.0,
) -> None:
    """Add the law of `dX = (A X + b) dt + L dW` at `times`; `index` `(T, d)` places the path."""
    A, L, cov = (np.atleast_2d(np.asarray(a, float)) for a in (A, L, cov))
    b, mean = np.atleast_1d(np.asarray(b, float)), np.atleast_1d(np.asarray(mean, float))
    d, eye = len(mean), np.eye(joint.size)
    joint.add(eye[index[0]], -mean, cov, weight)
    for k, h in enumerate(np.diff(times)):
        # One exponential for transition matrix and covariance of a step (Van Loan 1978).
        block = np.zeros((2 * d, 2 * d))
        block[:d, :d], block[:d, d:], block[d:, d:] = -A, L @ L.T, A.T
        e = scipy.linalg.expm(block * h)
        F = e[d:, d:].T
        affine = np.zeros((d + 1, d + 1))
        affine[:d, :d], affine[:d, d] = A, b
        shift = scipy.linalg.expm(affine * h)[:d, d]
        joint.add(eye[index[k + 1]] - F @ eye[index[k]], -shift, F @ e[:d, d:], weight)


def add_observations(
    joint: Quadratic,
    index: Any,
    y: Any,
    slope: Any = 1.0,
    offset: Any = 0.0,
    sd: Any = 1.0,
    weight: Any = 1.0,
) -> None:
    """Add `y ~ N(slope * x[index] + offset, sd)`; arrays broadcast, NaN is no datum."""
    arrays = (index, np.asarray(y, float), slope, offset, sd, weight)
    for i, value, h, c, s, w in zip(*map(np.ravel, np.broadcast_arrays(*arrays)), strict=True):
        if np.isnan(value) or w == 0:
            continue
        row = np.zeros(joint.size)
        row[int(i)] = h
        joint.add(row, c - value, s**2, float(w))
