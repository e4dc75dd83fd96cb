"""Where a population starts: a law of cells, or the cells of the first snapshot."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float

from numpyro_sde.checks.data import as_data
from numpyro_sde.distributions.moments import is_exact, is_gaussian, mean_and_cov
from numpyro_sde.linear.small import cholesky, psd_factor, transpose
from numpyro_sde.snapshots.cells import check_whole, filled


class Starts(NamedTuple):
    """Starts of a population, in batches.

    Attributes:
        points: `(*batch, M, d)`.
        cov: covariance around each, `(*batch, d, d)`; zero where they are cells.
        log_weights: `(*batch, M)`, normalised.
        first: law of the first snapshot, measurement noise included; None where the cells of the
            first snapshot are the start.
        cells: these cells, `(m, d)`, NaN where there is none; None where there is a law.
    """

    points: Array
    cov: Array
    log_weights: Array
    first: dist.Distribution | None
    cells: Array | None = None


def cells_as_starts(cells: Any, weights: Any) -> tuple[Starts, tuple[int, ...], int]:
    """Cells of the first snapshot as starts, the shape of a state and how many there are.

    Args:
        cells: shape `(m, d)`, or `(m,)` for scalar states; NaN rows are no cells.
        weights: relative weights `(*batch, m)`, or None.

    Raises:
        ValueError: a wrong shape, no cell, cells missing in part, negative weights.
    """
    array = as_data("init", cells)
    if array.ndim not in (1, 2) or array.shape[0] == 0:
        raise ValueError(
            "init must be a distribution over the first state, or the cells of the first "
            f"snapshot, an array (m, d), or (m,) for scalar states; got shape {array.shape}"
        )
    values = jnp.asarray(array, jnp.result_type(float)).reshape(array.shape[0], -1)
    here = ~jnp.any(jnp.isnan(values), axis=-1)
    if not isinstance(values, jax.core.Tracer):
        check_whole(np.asarray(values))
        if not np.asarray(here).any():
            raise ValueError("init must hold at least one cell, got only NaN")
    shares = here.astype(values.dtype)
    if weights is not None:
        given = jnp.asarray(weights, values.dtype)
        if given.ndim < 1 or given.shape[-1] != array.shape[0]:
            raise ValueError(
                f"weights must have shape (*batch, {array.shape[0]}), one for each cell of init, "
                f"got {given.shape}"
            )
        if not isinstance(given, jax.core.Tracer) and np.any(np.asarray(given) < 0):
            raise ValueError("weights must not be negative")
        shares = jnp.where(here.reshape(*(1,) * (given.ndim - 1), -1), given, 0.0)
    total = jnp.sum(shares, axis=-1, keepdims=True)
    positive = shares > 0
    logs = jnp.where(positive, jnp.log(jnp.where(positive, shares, 1.0)), -jnp.inf)
    d = values.shape[1]
    cov = jnp.zeros((d, d), values.dtype)
    starts = Starts(filled(values, here), cov, logs - jnp.log(total), None, values)
    return starts, array.shape[1:], array.shape[0]


def law_as_starts(
    init: dist.Distribution, num_starts: int, noise: Array | None, *, one_normal: bool
) -> Starts:
    """A law of the first state as a mixture of starts.

    A normal law is one start where the transition is exact for normal laws; else it is split
    into `num_starts` narrower ones at quasi-random points, with its mean and covariance.

    Args:
        init: the law.
        num_starts: how many.
        noise: covariance of the measurement noise `(*batch, d, d)`, or None.
        one_normal: whether a normal law stays whole.

    Raises:
        ValueError: a law from which points cannot be made as a smooth map of its parameters.
    """
    state_dim = init.event_dim
    if is_exact(init):
        mean, cov = mean_and_cov(init, state_dim)
        points, cov = mean[..., None, :], jnp.zeros_like(cov)
    elif is_gaussian(init):
        mean, cov = mean_and_cov(init, state_dim)
        if one_normal:
            points = mean[..., None, :]
        else:
            d = mean.shape[-1]
            share = float(num_starts) ** (-2.0 / (d + 4.0))  # of the variance, within a start
            z = jnp.asarray(np.sqrt(1.0 - share) * normal_points(num_starts, d), mean.dtype)
            z = z.reshape(*(1,) * (mean.ndim - 1), num_starts, d)
            points = mean[..., None, :] + jnp.matmul(z, transpose(psd_factor(cov)))
            cov = share * cov
    else:
        points = _points_of(init, num_starts)
        d = points.shape[-1]
        cov = jnp.zeros((d, d), points.dtype)
    real = jnp.result_type(float)
    points, cov = points.astype(real), cov.astype(real)
    logs = jnp.full(points.shape[-2], -np.log(points.shape[-2]), real)
    return Starts(points, cov, logs, _first_law(init, points, cov, noise))


def _points_of(init: dist.Distribution, num_starts: int) -> Float[Array, "*batch M d"]:
    if not init.has_rsample:
        raise ValueError(
            f"init: points of a {type(init).__name__} are no smooth map of its parameters, so "
            "derivatives would be wrong: give a normal law, another law with has_rsample, or draws "
            "of it as cells, init=law.sample(key, (200,))"
        )
    draws = init.rsample(jax.random.key(0), (num_starts,))
    points = jnp.moveaxis(draws, 0, len(init.batch_shape))
    return points if init.event_dim else points[..., None]


def _first_law(
    init: dist.Distribution, points: Array, cov: Array, noise: Array | None
) -> dist.Distribution:
    """Law of the first snapshot."""
    if noise is None:
        return init
    if is_gaussian(init):
        mean, own = mean_and_cov(init, init.event_dim)
        total = own + noise
        if init.event_dim == 0:
            return dist.Normal(mean[..., 0], jnp.sqrt(total[..., 0, 0]))
        return dist.MultivariateNormal(mean, scale_tril=cholesky(total))
    tril = cholesky((cov + noise)[..., None, :, :])
    count = points.shape[-2]
    which = dist.Categorical(probs=jnp.full(count, 1.0 / count))
    each: Any
    if init.event_dim == 0:
        each = dist.Normal(points[..., 0], tril[..., 0, 0])
    else:
        each = dist.MultivariateNormal(points, scale_tril=tril)
    return dist.MixtureSameFamily(which.expand(each.batch_shape[:-1]), each)


@lru_cache(maxsize=32)
def normal_points(count: int, dim: int) -> Float[np.ndarray, "count dim"]:
    """Quasi-random standard normals with exactly the mean 0 and the covariance I.

    Scrambled Sobol points (Owen 1998) by the quantile function, then standardised.
    """
    from scipy.special import ndtri
    from scipy.stats import qmc

    power = max(int(np.ceil(np.log2(count))), 1)
    z = ndtri(qmc.Sobol(dim, rng=0).random_base2(power)[:count])
    z = z - z.mean(0)
    return np.linalg.solve(np.linalg.cholesky(z.T @ z / count), z.T).T
