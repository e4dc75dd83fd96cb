"""Fits of the slow drift from filtered data: no subsampling rate to choose.

Data with a fast scale spoil `-int V'(X) dX / int V'(X)^2 dt`, because the fine structure of `dX`
is correlated with that of `X`. Replace one of the two by its exponential average
`dZ = (X - Z)/width dt`: Abdulle, Garegnani, Pavliotis, Stuart and Zanoni (2023), Found. Comput.
Math. 23, 33-84. A posterior from that quasi-likelihood alone is not calibrated: here its width is
the sandwich, from sums over blocks of the path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float
from scipy.special import stdtrit

from numpyro_sde.diagnostics.scales.scan import _feature_names, _features, _regular


class FilteredEstimate(NamedTuple):
    """Drift coefficients and diffusivity from filtered data.

    Attributes:
        names: names of the coefficients, then "diffusivity".
        coefficients: of the drift features, shape `(k,)`.
        diffusivity: `Sigma` of `sqrt(2 Sigma) dW`.
        covariance: of all of them, by the sandwich formula, shape `(k + 1, k + 1)`.
        num_blocks: blocks of the path behind the covariance.
        width: time constant of the filter.

    Example:
        >>> import jax, numpy as np, numpyro_sde as nsde
        >>> ou = nsde.processes.OrnsteinUhlenbeck(rate=1.0, mean=0.0, scale=1.0)
        >>> times = np.arange(8000) * 0.05
        >>> path = nsde.SDEPath(ou, times, init=0.0).sample(jax.random.key(0))
        >>> fit = nsde.diagnostics.filtered_estimate(path, times, lambda x: -x, width=1.0)
        >>> low, high = fit.interval(0.99)
        >>> bool(low[0] < 1.0 < high[0])
        True
    """

    names: tuple[str, ...]
    coefficients: np.ndarray
    diffusivity: float
    covariance: np.ndarray
    num_blocks: int
    width: float

    @property
    def standard_errors(self) -> Float[np.ndarray, " k+1"]:
        """Of the coefficients, then of the diffusivity."""
        return np.sqrt(np.diag(self.covariance))

    def interval(self, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Central intervals of coefficients and diffusivity, by Student's t.

        Raises:
            ValueError: a level outside (0, 1).
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level must lie in (0, 1), got {level}")
        centre = np.append(self.coefficients, self.diffusivity)
        reach = stdtrit(self.num_blocks - 1, 0.5 + 0.5 * level) * self.standard_errors
        return centre - reach, centre + reach

    def log_likelihood(self, coefficients: ArrayLike, diffusivity: ArrayLike) -> Float[Array, ""]:
        """Filtered log likelihood, up to a constant, for use in a model.

        A multivariate t in the coefficients and in the logarithm of the diffusivity, with the
        sandwich covariance and as many degrees of freedom as its blocks leave: a normal law would
        take the covariance as known. `numpyro.factor("data", fit.log_likelihood(A, sigma))`.

        Args:
            coefficients: shape `(k,)`, or a scalar for one.
            diffusivity: positive.
        """
        scale = np.append(np.ones(len(self.coefficients)), self.diffusivity)
        precision = np.linalg.inv(self.covariance / np.outer(scale, scale))
        first = jnp.atleast_1d(jnp.asarray(coefficients)) - self.coefficients
        second = jnp.log(diffusivity) - np.log(self.diffusivity)
        gap = jnp.append(first, second)
        freedom = self.num_blocks - 1
        distance = gap @ jnp.asarray(precision) @ gap
        return -0.5 * (freedom + len(gap)) * jnp.log1p(distance / freedom)


def filtered_estimate(
    path: ArrayLike,
    times: ArrayLike,
    features: Callable[..., Any],
    width: float,
    *,
    num_blocks: int = 25,
) -> FilteredEstimate:
    r"""Estimate a drift linear in its coefficients, and the diffusivity, from filtered data.

    With Z the filtered path and f the features, `coefficients = (int f(Z) f(X)' dt)^-1
    int f(Z) dX`. In the stationary state `d (X - Z)^2` has mean zero, which gives
    `Sigma = mean((X - Z)^2) / width - mean((X - Z) drift(X))`; for a linear drift of rate A this
    is the paper's `mean((X - Z)^2) / width` times `1 + A width`.

    Args:
        path: scalar states, shape `(N,)`, without noise, sampled finely.
        times: equally spaced, shape `(N,)`.
        features: function of one state: shape `()`, or `(k,)` for k coefficients. For a known
            potential up to a factor, `lambda x: -x` for `x^2 / 2`.
        width: time constant of the filter, of the order of the slow time scale; it must
            exceed the fast scale by far.
        num_blocks: blocks for the covariance; each must be longer than the path's memory.

    Raises:
        ValueError: a vector path; times that are not equally spaced; a width below ten steps
            or above a tenth of the path; too few or too many blocks.

    Example:
        >>> import jax, numpy as np, numpyro_sde as nsde
        >>> ou = nsde.processes.OrnsteinUhlenbeck(rate=1.0, mean=0.0, scale=1.0)
        >>> times = np.arange(8000) * 0.05
        >>> path = nsde.SDEPath(ou, times, init=0.0).sample(jax.random.key(0))
        >>> fit = nsde.diagnostics.filtered_estimate(path, times, lambda x: -x, width=1.0)
        >>> bool(abs(fit.diffusivity - 0.5) < 4 * fit.standard_errors[1])
        True
    """
    states, dt = _regular(path, times)
    if states.shape[1] != 1:
        raise ValueError(f"path must be scalar, shape (N,), got {states.shape}")
    length = len(states) - 1
    if not 10 * dt <= width <= 0.1 * length * dt:
        raise ValueError(
            f"width must be from 10 steps, {10 * dt:.3g}, to a tenth of the path, "
            f"{0.1 * length * dt:.3g}, got {width}"
        )
    if not 5 <= num_blocks <= length // 10:
        raise ValueError(f"num_blocks must be from 5 to {length // 10}, got {num_blocks}")
    from scipy.signal import lfilter  # slow to import

    x = states[:, 0]
    decay = np.exp(-dt / width)
    z, _ = lfilter([0.0, 1.0 - decay], [1.0, -decay], x, zi=[x[0]])
    z[0] = x[0]
    at_x = _features(features, x[:-1, None])[:, 0]
    at_z = _features(features, z[:-1, None])[:, 0]
    dx, gap = np.diff(x), (x - z)[:-1]
    gram = at_z.T @ at_x * dt
    coefficients = np.linalg.solve(gram, at_z.T @ dx)
    drift = at_x @ coefficients
    rate = gap**2 / width - gap * drift
    diffusivity = float(rate.mean())
    # What each step adds to the estimates, to first order.
    by_step = (at_z * (dx - drift * dt)[:, None]) @ np.linalg.inv(gram).T
    slope = -(gap[:, None] * at_x).mean(axis=0)
    last = (rate - diffusivity) / length + by_step @ slope
    influence = np.column_stack([by_step, last])
    blocks = np.stack([block.sum(axis=0) for block in np.array_split(influence, num_blocks)])
    covariance = blocks.T @ blocks * num_blocks / (num_blocks - 1)
    names = (*_feature_names(len(coefficients)), "diffusivity")
    return FilteredEstimate(names, coefficients, diffusivity, covariance, num_blocks, float(width))
