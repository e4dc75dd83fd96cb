"""Filters on their own: one path, one instrument, given parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike

from numpyro_sde.checks.data import as_data
from numpyro_sde.distributions.observation import Emission
from numpyro_sde.distributions.path_law import AbstractPathLaw
from numpyro_sde.distributions.state_space import ObservedPath, Readings
from numpyro_sde.distributions.statement import Statement, make_statement
from numpyro_sde.distributions.step_check import warn_coarse_step
from numpyro_sde.filters.ensemble import EnsembleKalman
from numpyro_sde.filters.extended import ExtendedKalman
from numpyro_sde.filters.particle import Particle
from numpyro_sde.filters.unscented import UnscentedKalman
from numpyro_sde.observe import check_data, check_indices
from numpyro_sde.runtime.entry import entry_point
from numpyro_sde.smc.online import OnlineSums
from numpyro_sde.smc.two_filter import TwoFilterResult
from numpyro_sde.statespace.model import AbstractFilter, FilterResult, StateSpaceModel


def filter_path(
    path: AbstractPathLaw,
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
    statement, lead, y = _checked(path, emission, obs, method, params, event_dims, inputs, at)
    if isinstance(method, Particle):  # its result holds the model
        return _run_particles(path, statement, jnp.asarray(y), method, lead)
    result = _run(path, statement, _readings(statement, y), method, _filter, lead)
    if isinstance(method, ExtendedKalman | UnscentedKalman | EnsembleKalman):
        states = result.mean if path.state_shape else result.mean[..., 0]
        warn_coarse_step(path, states)
    # Times of the host stay as they are.
    return (
        eqx.tree_at(lambda r: r.times, result, path.times) if np.ndim(path.times) == 1 else result
    )


def filter_additive(
    path: AbstractPathLaw,
    emission: Callable[..., dist.Distribution],
    obs: ArrayLike,
    functional: Callable[[Array, Array, Array, Array], Array],
    *,
    method: Particle,
    num_backward: int = 2,
    params: Any = None,
    event_dims: Any = None,
    inputs: Any = None,
    at: ArrayLike | None = None,
) -> OnlineSums:
    """Smoothed sums along a path while a particle filter runs, in constant memory: PaRIS.

    The expectation of `sum_k functional(t_k, dt_k, x_k, x_{k+1})` given the data up to each
    observed time. Every particle carries an estimate of its sum, updated at each observation by
    `num_backward` backward draws (Olsson and Westerborn 2017): nothing is kept of the past, so
    beyond the data and the estimates memory is that of the particles between two observations,
    however long the series. The guided proposal keeps its plan too, some `d x d` matrices for each
    grid time; "bootstrap" does not. When the filter's history fits in memory and several sums or
    paths are wanted, `ParticleResult.additive` and `sample` serve as well.

    Args:
        path: the law of the path, its parameters given; a batch gives a batch of results.
        emission: as in `observe`.
        obs: the data, shape `(*batch, K, *observation)`; NaN marks what is missing.
        functional: the term of one grid step, states `(d,)`; any shape.
        method: `filters.Particle`; its `history` is not looked at.
        num_backward: ancestors drawn for each particle, at least 2.
        params: as in `observe`.
        event_dims: as in `observe`.
        inputs: as in `observe`.
        at: indices into the path of the K times observed; None for all.

    Returns:
        `sums`, `(*batch, blocks, ...)`: the expected sum up to the end of each block between
        observed times (the first and the last time of the path count as such), given the data up
        to there, the last given all data; and `log_likelihood`.

    Raises:
        TypeError: a method that is not `filters.Particle`, or an emission of the wrong kind.
        ValueError: data that do not fit, a transition without density, fewer than 2 ancestors, or
            a filter with several random keys.

    Source: Olsson and Westerborn (2017), "Efficient particle-based online smoothing in general
    hidden Markov models: the PaRIS algorithm".

    Example:
        >>> import numpy as np, numpyro.distributions as dist, numpyro_sde as nsde
        >>> ou = nsde.processes.OrnsteinUhlenbeck(rate=1.0, mean=0.0, scale=1.0)
        >>> path = nsde.SDEPath(ou, [0.0, 1.0, 2.0], init=dist.Normal(0.0, 0.7))
        >>> area = nsde.filter_additive(
        ...     path, lambda t, x: dist.Normal(x, 0.5), np.array([0.3, np.nan, -0.1]),
        ...     lambda t, dt, x, x_next: 0.5 * dt * (x + x_next)[0],
        ...     method=nsde.filters.Particle(100, proposal="bootstrap"),
        ... )
        >>> area.sums.shape  # up to the second and up to the third time
        (2,)
    """
    _require_particles(method)
    statement, lead, y = _checked(path, emission, obs, method, params, event_dims, inputs, at)

    run = partial(_sums, functional=functional, num_backward=num_backward)
    return _run(path, statement, _readings(statement, y), method, run, lead)


def two_filter(
    path: AbstractPathLaw,
    emission: Callable[..., dist.Distribution],
    obs: ArrayLike,
    *,
    method: Particle,
    params: Any = None,
    event_dims: Any = None,
    inputs: Any = None,
    at: ArrayLike | None = None,
    join: str = "all",
) -> TwoFilterResult:
    """Smoothed marginals at the observed times, by particles that run forward and backward.

    A backward filter carries the later observations, under artificial normal laws of the state that
    have the moments of the forward particles, and is joined at each observed time to the forward
    filter, all particles with all: O(M^2) for each time. Weights are exact whatever those laws, so
    the result is consistent as particles grow in number; where the filtering laws are far from
    normal, backward particles are poor, which `ess` shows. The join weighs one grid step: the
    finer the grid, the fewer of the forward particles can have made it, and the larger the error.
    Where paths are wanted, grids are fine or particles many, take `ParticleResult.sample` or
    `smooth`, which draw bridges at linear cost.

    Args:
        path: the law of the path, its parameters given; a batch gives a batch of results.
        emission: as in `observe`.
        obs: the data, shape `(*batch, K, *observation)`; NaN marks what is missing.
        method: `filters.Particle`: number of particles each way, resampling, and the proposal of
            those that run forward; its `history` is not looked at.
        params: as in `observe`.
        event_dims: as in `observe`.
        inputs: as in `observe`.
        at: indices into the path of the K times observed; None for all.
        join: "all" as above; "pairs" draws states at each observed time between one forward and
            one backward particle, paired at random and weighed exactly: O(M), but fewer effective
            particles.

    Returns:
        `rows` (grid indices of the observed times, the first and the last), `mean`, `cov`,
        weighted `particles` of each marginal with `log_weights`, and `ess` of these weights.

    Raises:
        TypeError: a method that is not `filters.Particle`, or an emission of the wrong kind.
        ValueError: an unknown `join`, data that do not fit, a transition without density, or a
            filter with several random keys.

    Source: Briers, Doucet and Maskell (2010), "Smoothing algorithms for state-space models";
    Fearnhead, Wyncoll and Tawn (2010), "A sequential smoothing algorithm with linear computational
    cost", for pairs and normal artificial laws.

    Example:
        >>> import numpy as np, numpyro.distributions as dist, numpyro_sde as nsde
        >>> ou = nsde.processes.OrnsteinUhlenbeck(rate=1.0, mean=0.0, scale=1.0)
        >>> path = nsde.SDEPath(ou, [0.0, 1.0, 2.0], init=dist.Normal(0.0, 0.7))
        >>> smoothed = nsde.two_filter(
        ...     path, lambda t, x: dist.Normal(x, 0.5), np.array([0.3, 0.5, -0.1]),
        ...     method=nsde.filters.Particle(100),
        ... )
        >>> smoothed.mean.shape, smoothed.particles.shape
        ((3, 1), (3, 100, 1))
    """
    _require_particles(method)
    statement, lead, y = _checked(path, emission, obs, method, params, event_dims, inputs, at)

    run = partial(_both_ways, join=join)
    return _run(path, statement, _readings(statement, y), method, run, lead)


@entry_point
def _run(
    path: AbstractPathLaw,
    statement: Statement,
    readings: Readings,
    method: AbstractFilter,
    fn: Callable[[Any, StateSpaceModel], Any],
    lead: tuple[int, ...],
) -> Any:
    """Map `fn(method, model)` over the batch; compiled once for a structure."""
    return ObservedPath(path, lead, ((statement, readings),)).run(method, fn)


@entry_point
def _run_particles(
    path: AbstractPathLaw, statement: Statement, y: Array, method: Particle, lead: tuple[int, ...]
) -> Any:
    """The result of a particle filter, with the model in it; compiled once for its code."""
    return ObservedPath(path, lead, ((statement, y),)).run(method, _filter)


def _filter(method: AbstractFilter, model: StateSpaceModel) -> FilterResult:
    return method.filter(model)


def _sums(
    method: Particle, model: StateSpaceModel, functional: Callable[..., Array], num_backward: int
) -> OnlineSums:
    return method.additive(model, functional, num_backward=num_backward)


def _both_ways(method: Particle, model: StateSpaceModel, join: str) -> TwoFilterResult:
    return method.two_filter(model, join=join)


def _readings(statement: Statement, y: Any) -> Readings:
    """Data as an argument; other gaps, of new data, are no reason to compile anew."""
    return Readings.of(statement, y, gaps=False)


def _require_particles(method: Any) -> None:
    if not isinstance(method, Particle):
        raise TypeError(f"method must be nsde.filters.Particle(...), got {method!r}")


def state_space_model(
    path: AbstractPathLaw,
    emission: Callable[..., dist.Distribution],
    obs: ArrayLike,
    *,
    params: Any = None,
    event_dims: Any = None,
    inputs: Any = None,
    at: ArrayLike | None = None,
) -> StateSpaceModel:
    """One path and its data as filters take them, for what works on that itself.

    `filters.closure_check`, say, or a filter of your own.

    Args:
        path: the law of the path, its parameters given, without a batch.
        emission: as in `observe`.
        obs: the data, shape `(K, *observation)`; NaN marks what is missing.
        params: as in `observe`.
        event_dims: as in `observe`.
        inputs: as in `observe`.
        at: indices into the path of the K times observed; None for all.

    Raises:
        ValueError: data that do not fit, or a batch of paths or data.
        TypeError: a path that is none.

    Example:
        >>> import numpy as np, numpyro.distributions as dist, numpyro_sde as nsde
        >>> wells = nsde.processes.DoubleWell(linear=2.0, cubic=2.0, scale=0.3)
        >>> path = nsde.SDEPath(wells, np.arange(4.0), dist.Normal(1.0, 0.1))
        >>> model = nsde.state_space_model(path, lambda t, x: dist.Normal(x, 0.2), np.ones(4))
        >>> nsde.filters.closure_check(model, num_paths=500).ok
        True
    """
    statement, lead, y = _checked(
        path, emission, obs, ExtendedKalman(), params, event_dims, inputs, at
    )
    if lead:
        raise ValueError(f"state_space_model is that of one path, got a batch of shape {lead}")
    model: StateSpaceModel = ObservedPath(path, lead, ((statement, y),)).map(lambda model: model)
    return model


def _checked(
    path: AbstractPathLaw,
    emission: Callable[..., dist.Distribution],
    obs: ArrayLike,
    method: AbstractFilter,
    params: Any,
    event_dims: Any,
    inputs: Any,
    at: ArrayLike | None,
) -> tuple[Statement, tuple[int, ...], Any]:
    """The observation statement, leading shape and data of one path and its filter."""
    if not isinstance(path, AbstractPathLaw):
        raise TypeError(f"path must be a path law, SDEPath or JumpPath, got {type(path).__name__}")
    if not isinstance(method, AbstractFilter):
        raise TypeError(f"method must be one of nsde.filters, got {method!r}")
    rows = np.arange(path.num_times) if at is None else check_indices("y", at, path.num_times)
    emissions = Emission(
        emission,
        params,
        event_dims,
        inputs,
        len(rows),
        path.batch_shape,
        whole=path.whole_states,
    )
    statement = make_statement(emissions, rows, path.state_shape, path.batch_shape)
    y = as_data("obs", obs)
    check_data("y", y, path.batch_shape, statement.event_shape, statement.structure)
    lead = jnp.broadcast_shapes(
        path.batch_shape,
        emissions.batch_shape,
        np.shape(y)[: np.ndim(y) - len(statement.event_shape)],
    )
    return statement, lead, y
