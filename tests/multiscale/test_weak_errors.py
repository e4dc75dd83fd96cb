"""The full systems tend to their averages, at the rate that the theory says."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))

EPSILONS = (0.1, 0.03, 0.01)


@pytest.mark.slow
def test_weak_error_of_the_linear_system_is_of_order_epsilon(x64):
    from multiscale_study import linear_weak_error, slope

    errors = [linear_weak_error(epsilon) for epsilon in EPSILONS]
    # By hand, from the 2 x 2 system: SciPy's matrix exponential and Lyapunov solution.
    from scipy.linalg import expm, solve_continuous_lyapunov

    a, b, c, q, s = 1.0, 0.6, 0.8, 0.5, 0.4
    rate = a - b * c
    limit = np.exp(-2 * rate) + s**2 * (1 - np.exp(-2 * rate)) / (2 * rate)
    for epsilon, error in zip(EPSILONS, errors, strict=True):
        A = np.array([[-a, b], [c / epsilon, -1 / epsilon]])
        move = expm(A)
        stationary = solve_continuous_lyapunov(A, -np.diag([s**2, 2 * q / epsilon]))
        start = np.diag([0.0, q])
        cov = move @ start @ move.T + stationary - move @ stationary @ move.T
        second = (move @ np.array([1.0, c]))[0] ** 2 + cov[0, 0]
        assert error == pytest.approx(second - limit, rel=1e-6)
    assert slope(EPSILONS, errors) == pytest.approx(1.0, abs=0.3)


@pytest.mark.slow
def test_weak_error_of_the_landau_system_is_of_order_epsilon():
    from multiscale_study import slope, weak_error

    found = [weak_error(epsilon, num_paths=50_000) for epsilon in EPSILONS]
    # The smallest error is some 20 standard errors: the slope is known to 0.03.
    assert min(error / spread for error, spread in found) > 10
    assert slope(EPSILONS, [error for error, _ in found]) == pytest.approx(1.0, abs=0.3)
