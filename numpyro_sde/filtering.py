"""Filters on their own: one path, one instrument, given parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import ArrayLike

from numpyro_sde.distributions.observation import Emission
from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.distributions.state_space import make_statement, run_method
from numpyro_sde.filters.model import AbstractFilter, FilterResult
from numpyro_sde.observe import check_data, check_indices


def filter_path(
    path: SDEPath,
    emission: Callable[..., dist.Distribution],
    obs: ArrayLike,
    *,
    method: AbstractFilter,
    params: Any = None,
    event_dims: Any = None,
    inputs: Any = None,
    at: ArrayLike | None = None,
) -> FilterResult:
    """Run a filter on a path law and data, outside of any model.

    Args:
        path: the law of the path, its parameters given; a batch gives a batch of results.
        emission: as in `observe`.
        obs: the data, shape `(*batch, K, *observation)`; NaN marks what is missing.
        method: the filter, one of `nsde.filters`.
        params: as in `observe`.
        event_dims: as in `observe`.
        inputs: as in `observe`.
        at: indices into the path of the K times observed; None for all.

    Returns:
        Filtered moments on the path's grid, log likelihood and its increments; `smooth()` and
        `sample(key, num_draws)` of an unbatched result give the smoothing law.

    Raises:
        TypeError: a method that is no filter, or an emission of the wrong kind.
        ValueError: data that do not fit, or a model that the method cannot treat.

    Example:
        >>> import numpy as np, numpyro.distributions as dist, numpyro_sde as nsde
        >>> ou = nsde.processes.OrnsteinUhlenbeck(rate=1.0, mean=0.0, scale=1.0)
        >>> path = nsde.SDEPath(ou, [0.0, 1.0, 2.0], init=dist.Normal(0.0, 0.7))
        >>> result = nsde.filter_path(
        ...     path, lambda t, x: dist.Normal(x, 0.5), np.array([0.3, np.nan, -0.1]),
        ...     method=nsde.filters.Kalman(),
        ... )
        >>> result.mean.shape, result.smooth()[1].shape
        ((3, 1), (3, 1, 1))
    """
    if not isinstance(path, SDEPath):
        raise TypeError(f"path must be an SDEPath, got {type(path).__name__}")
    if not isinstance(method, AbstractFilter):
        raise TypeError(f"method must be one of nsde.filters, got {method!r}")
    rows = np.arange(path.num_times) if at is None else check_indices("y", at, path.num_times)
    emissions = Emission(emission, params, event_dims, inputs, len(rows), path.batch_shape)
    statement = make_statement(emissions, rows, path.state_shape, path.batch_shape)
    check_data("y", obs, path.batch_shape, statement.event_shape, statement.structure)
    y = obs if isinstance(obs, np.ndarray) else jnp.asarray(obs)
    lead = jnp.broadcast_shapes(
        path.batch_shape,
        emissions.batch_shape,
        np.shape(y)[: np.ndim(y) - len(statement.event_shape)],
    )

    return run_method(
        path, lead, [(statement, y)], method, lambda method, model: method.filter(model)
    )
