"""Expectations under a Gaussian as weighted sums over a few points.

A rule is a set of points `xi_i` and weights for the standard normal law in d dimensions;
for `N(m, S S')` the points are `m + S xi_i`. Rules are NumPy arrays, made before tracing.

Sources: Arasaratnam and Haykin (2009), "Cubature Kalman filters", equation 20; Julier and
Uhlmann (2004), "Unscented filtering and nonlinear estimation", with the scaling of Wan and
van der Merwe (2000); Gauss-Hermite products as in Särkkä and Solin (2019), "Applied Stochastic
Differential Equations", section 9.2.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

MAX_POINTS = 20_000
"""Most points that a product rule may have."""


class QuadratureRule(NamedTuple):
    """Points and weights for the standard normal law in d dimensions.

    The weighted points have mean 0, and covariance I under both sets of weights.

    Attributes:
        points: shape `(n, d)`.
        weights: weights of expectations, shape `(n,)`; they sum to 1.
        cov_weights: weights of covariances about the mean; they differ from `weights` at the
            centre of the unscented rule only.
    """

    points: Float[np.ndarray, "n d"]
    weights: Float[np.ndarray, " n"]
    cov_weights: Float[np.ndarray, " n"]


def cubature(d: int) -> QuadratureRule:
    """Third-degree spherical cubature: `2 d` points at distance `sqrt(d)`, equal weights.

    Example:
        >>> cubature(1).points.tolist()
        [[1.0], [-1.0]]
    """
    axes = math.sqrt(d) * np.eye(d)
    weights = np.full(2 * d, 0.5 / d)
    return QuadratureRule(np.concatenate([axes, -axes]), weights, weights)


def unscented(d: int, alpha: float = 1.0, beta: float = 2.0, kappa: float = 0.0) -> QuadratureRule:
    """Scaled unscented rule: the centre and `2 d` points at distance `sqrt(d + lambda)`.

    With `lambda = alpha^2 (d + kappa) - d` the outer points weigh `1 / (2 (d + lambda))` each;
    the centre weighs `lambda / (d + lambda)` in means, and `1 - alpha^2 + beta` more in
    covariances.

    Args:
        d: dimension.
        alpha: spread of the points. The usual 1e-3 makes weights of order 1e6 that cancel:
            useless in float32.
        beta: weight of the centre in covariances; 2 gives the variance of a square exactly for
            `d = 1`, `alpha = 1`, `kappa = 0`.
        kappa: second spread parameter.

    Raises:
        ValueError: `alpha` that is not positive, or `d + kappa` that is not.

    Example:
        >>> unscented(1, alpha=1.0, beta=2.0, kappa=2.0).weights.round(4).tolist()
        [0.6667, 0.1667, 0.1667]
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    spread = alpha**2 * (d + kappa)  # d + lambda: the square of the distance, rooted once
    if not spread > 0:
        raise ValueError(f"kappa must exceed -d = {-d} in d = {d} dimensions, got {kappa}")
    axes = math.sqrt(spread) * np.eye(d)
    points = np.concatenate([np.zeros((1, d)), axes, -axes])
    weights = np.full(2 * d + 1, 0.5 / spread)
    weights[0] = 1.0 - d / spread
    cov_weights = weights.copy()
    cov_weights[0] += 1.0 - alpha**2 + beta
    return QuadratureRule(points, weights, cov_weights)


def gauss_hermite(d: int, order: int) -> QuadratureRule:
    """Product Gauss-Hermite rule: `order ** d` points, exact to degree `2 order - 1`.

    Args:
        d: dimension.
        order: points for each dimension.

    Raises:
        ValueError: an order below 2, or more than `MAX_POINTS` points.

    Example:
        >>> gauss_hermite(1, 3).weights.round(4).tolist()
        [0.1667, 0.6667, 0.1667]
    """
    if order < 2:
        raise ValueError(f"order must be at least 2, got {order}")
    if order**d > MAX_POINTS:
        raise ValueError(
            f"a Gauss-Hermite rule of order {order} in {d} dimensions has {order**d} points, "
            f"more than {MAX_POINTS}: use quadrature='cubature' or 'unscented'"
        )
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    weights = weights / weights.sum()
    points = np.array(list(itertools.product(nodes, repeat=d)))
    product = np.array([math.prod(w) for w in itertools.product(weights, repeat=d)])
    return QuadratureRule(points, product, product)
