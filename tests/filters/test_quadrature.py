"""Quadrature rules against the moments of the standard normal law."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from numpyro_sde.statespace.quadrature import cubature, gauss_hermite, unscented

RULES = {
    "cubature": (cubature, 3),
    "unscented": (unscented, 3),
    "unscented, wide": (lambda d: unscented(d, alpha=0.7, beta=1.0, kappa=3.0), 3),
    "Gauss-Hermite 2": (lambda d: gauss_hermite(d, 2), 3),
    "Gauss-Hermite 4": (lambda d: gauss_hermite(d, 4), 7),
}


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("name", RULES)
def test_exact_up_to_its_degree(name, d):
    make, degree = RULES[name]
    rule = make(d)
    for powers in itertools.product(range(degree + 1), repeat=d):
        if sum(powers) > degree:
            continue
        exact = math.prod(0 if p % 2 else math.prod(range(p - 1, 0, -2)) for p in powers)
        got = rule.weights @ np.prod(rule.points**powers, axis=1)
        assert abs(got - exact) < 1e-12
    cov = (rule.points * rule.cov_weights[:, None]).T @ rule.points
    np.testing.assert_allclose(cov, np.eye(d), atol=1e-12)


def test_default_unscented_rule_has_the_variance_of_a_square():
    rule = unscented(1)
    square = rule.points[:, 0] ** 2
    mean = rule.weights @ square
    assert abs(mean - 1.0) < 1e-12
    assert abs(rule.cov_weights @ (square - mean) ** 2 - 2.0) < 1e-12


def test_points_lie_at_the_root_of_d_plus_lambda():
    # alpha = 0.5, kappa = 1, d = 3: lambda = 1 - 3, distance sqrt(1)
    rule = unscented(3, alpha=0.5, kappa=1.0)
    assert np.allclose(np.linalg.norm(rule.points[1:], axis=1), 1.0)
    assert np.allclose(rule.weights, [-2.0, *[0.5] * 6])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: unscented(2, alpha=0.0), "alpha must be positive, got 0.0"),
        (lambda: unscented(2, kappa=-2.0), "kappa must exceed -d = -2"),
        (lambda: gauss_hermite(2, 1), "order must be at least 2, got 1"),
        (lambda: gauss_hermite(8, 5), "390625 points"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
