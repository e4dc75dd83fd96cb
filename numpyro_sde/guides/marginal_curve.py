"""Normal marginals as functions of time, and a rule for expectations under them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_sde.linear.small import diagonal, solve_lower, transpose


def cubic_rule(key: Array, size: int) -> tuple[Float[Array, "points d"], Float[Array, " points"]]:
    """Points and weights for a normal expectation: random, unbiased, exact for cubic functions.

    The stochastic spherical-radial rule of degree 3 (Genz and Monahan 1998): the centre, and the
    ends of a random orthogonal frame of a random size.

    Example:
        >>> import jax
        >>> from numpyro_sde.guides.marginal_curve import cubic_rule
        >>> points, weights = cubic_rule(jax.random.key(0), 2)
        >>> points.shape, bool(abs(weights @ points[:, 0] ** 2 - 1.0) < 1e-5)
        ((5, 2), True)
    """
    key_size, key_frame = jax.random.split(key)
    square = 2.0 * jax.random.gamma(key_size, 0.5 * size + 1.0)
    frame = jnp.eye(size)
    if size > 1:
        frame = jnp.linalg.qr(jax.random.normal(key_frame, (size, size)))[0]
    ends = jnp.sqrt(square) * jnp.concatenate([frame, -frame])
    weights = jnp.concatenate([1.0 - size / square[None], jnp.full(2 * size, 0.5 / square)])
    return jnp.concatenate([jnp.zeros((1, size)), ends]), weights


class Marginal(NamedTuple):
    """The law at one time: mean, factor of the covariance and its inverse."""

    mean: Array
    factor: Array
    inverse: Array


class Curve(NamedTuple):
    """Normal marginals as functions of time.

    Attributes:
        knots: times of the knots.
        mean: means there; `steps`: slopes at both ends of each interval, times its length.
        root: coordinates of the factors there, log diagonals, lower parts and, above, turns.
        unit: factor of the noise in a unit of time; `gap`: mean time between observations.
        fixed: whether the path begins at a known state.
    """

    knots: Array
    mean: Array
    steps: Array
    root: Array
    turns: Array
    unit: Array
    gap: Array
    fixed: bool

    def at(self, t: Array) -> Marginal:
        """The marginal at a time."""
        i = jnp.clip(jnp.searchsorted(self.knots, t, side="right") - 1, 0, len(self.knots) - 2)
        s = (t - self.knots[i]) / (self.knots[i + 1] - self.knots[i])
        mean = _cubic(s, self.mean[i], self.mean[i + 1], self.steps[i])
        root = _cubic(s, self.root[i], self.root[i + 1], self.turns[i])
        size = jnp.sqrt(self.gap)
        if self.fixed:
            since = (t - self.knots[0]) / self.gap
            share = -jnp.expm1(-since)
            size = size * jnp.sqrt(jnp.where(share > 0, share, jnp.finfo(share.dtype).tiny))
        L = jnp.tril(root, -1) + jnp.diag(jnp.exp(diagonal(root)))
        eye = jnp.eye(len(L), dtype=L.dtype)
        K = jnp.triu(root, 1)
        K = K - transpose(K)
        turn = eye if len(L) == 1 else jnp.linalg.solve(eye - K, eye + K)
        factor = size * self.unit @ L @ turn
        inverse = transpose(turn) @ solve_lower(L, solve_lower(self.unit, eye)) / size
        return Marginal(mean, factor, inverse)


def _cubic(s: Array, left: Array, right: Array, slopes: Array) -> Array:
    """Hermite's cubic between two values; slopes times the length of the interval."""
    a, b = (1.0 + 2.0 * s) * (1.0 - s) ** 2, s * (1.0 - s) ** 2
    c, d = s**2 * (3.0 - 2.0 * s), s**2 * (s - 1.0)
    return a * left + b * slopes[0] + c * right + d * slopes[1]
