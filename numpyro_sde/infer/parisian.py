"""Parisian particle Gibbs: expectations of sums along a path, with a bias that vanishes fast."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from numpyro_sde.distributions.observation import Emission
from numpyro_sde.distributions.path_law import AbstractPathLaw
from numpyro_sde.distributions.state_space import (
    ObservedPath,
    draw_starts,
    with_starts,
)
from numpyro_sde.distributions.statement import make_statement
from numpyro_sde.observe import check_data, check_indices
from numpyro_sde.smc.backward import invertible
from numpyro_sde.smc.conditional import conditional_smc, first_path
from numpyro_sde.smc.proposals import Proposal
from numpyro_sde.smc.settings import Setting, make_setting, with_own_steps
from numpyro_sde.smc.smoothers import additive
from numpyro_sde.statespace.checks import check_brownian, check_count, typed_key
from numpyro_sde.statespace.model import StateSpaceModel


class ParisianEstimate(NamedTuple):
    """What `parisian_gibbs` returns.

    Attributes:
        mean: the expected sum given all data.
        standard_error: its Monte Carlo error, from the spread of the iterations' estimates in
            batches.
        trace: each iteration's estimate, `(num_iterations, ...)`.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.infer.ParisianEstimate(mean=1.2, standard_error=0.1, trace=[1.1, 1.3]).mean
        1.2
    """

    mean: Array
    standard_error: Array
    trace: Float[Array, "iterations ..."]


def parisian_gibbs(
    path: AbstractPathLaw,
    emission: Callable[..., dist.Distribution],
    obs: ArrayLike,
    functional: Callable[[Array, Array, Array, Array], Array],
    *,
    rng_key: PRNGKeyArray,
    num_particles: int = 64,
    num_iterations: int = 200,
    burn_in: int = 20,
    num_backward: int = 2,
    proposal: str | Proposal = "auto",
    params: Any = None,
    event_dims: Any = None,
    inputs: Any = None,
    at: ArrayLike | None = None,
) -> ParisianEstimate:
    """Estimate the expected sum of a functional along a path, given data and parameters.

    Conditional SMC with backward sampling moves a path; at each iteration PaRIS runs along all its
    particles, and their estimates are averaged after `burn_in` iterations. The bias falls
    geometrically in `burn_in`, where that of one particle smoother falls like the inverse of the
    number of particles.

    Args:
        path: the law of one path, its parameters given.
        emission: as in `observe`.
        obs: the data, `(K, *observation)`; NaN marks what is missing.
        functional: `functional(t, dt, x, x_next)`, the term of one grid step, states `(d,)`.
        rng_key: random key.
        num_particles: number of particles, at least 2.
        num_iterations: iterations, those of `burn_in` included.
        burn_in: iterations that are not averaged.
        num_backward: ancestors drawn for each particle, at least 2.
        proposal: as in `ConditionalSMC`.
        params: as in `observe`.
        event_dims: as in `observe`.
        inputs: as in `observe`.
        at: indices into the path of the K times observed; None for all.

    Returns:
        Mean, standard error and trace.

    Raises:
        ValueError: a batch of paths, an option out of range, data that do not fit, or a transition
            without density.
        TypeError: a path that is none, or a count that is no integer.

    Source: Cardoso, El Moujahid, Le Corff, Moulines and Olsson (2023), "State and parameter
    learning with Parisian particle Gibbs".

    Example:
        >>> import jax, numpyro.distributions as dist, numpyro_sde as nsde
        >>> ou = nsde.processes.OrnsteinUhlenbeck(rate=1.0, mean=0.0, scale=1.0)
        >>> path = nsde.SDEPath(ou, [0.0, 1.0, 2.0], init=dist.Normal(0.0, 0.7))
        >>> area = nsde.infer.parisian_gibbs(
        ...     path, lambda t, x: dist.Normal(x, 0.5), [0.3, 0.4, -0.1],
        ...     lambda t, dt, x, x_next: 0.5 * dt * (x + x_next)[0],
        ...     rng_key=jax.random.key(0), num_particles=16, num_iterations=60,
        ... )
        >>> area.mean.shape, area.trace.shape
        ((), (60,))
    """
    if not isinstance(path, AbstractPathLaw):
        raise TypeError(f"path must be a path law, SDEPath or JumpPath, got {type(path).__name__}")
    if path.batch_shape:
        raise ValueError(f"path must be one path, got a batch of shape {path.batch_shape}")
    for name, value, least in (
        ("num_iterations", num_iterations, 2),
        ("burn_in", burn_in, 0),
        ("num_backward", num_backward, 2),
    ):
        check_count(name, value, least)
    if burn_in >= num_iterations:
        raise ValueError(f"burn_in must be below num_iterations = {num_iterations}, got {burn_in}")
    setting = make_setting(num_particles, proposal, "systematic", 0.5, least=2, retraced=True)
    rows = np.arange(path.num_times) if at is None else check_indices("y", at, path.num_times)
    emissions = Emission(emission, params, event_dims, inputs, len(rows), ())
    statement = make_statement(emissions, rows, path.state_shape, ())
    check_data("y", obs, (), statement.event_shape, statement.structure)
    y = obs if isinstance(obs, np.ndarray) else jnp.asarray(obs)
    start_key, rng_key = jax.random.split(typed_key(rng_key))
    starts = draw_starts(path, (), num_particles, start_key)
    run = _Iterations(setting, functional, num_iterations, num_backward)
    trace = _compiled(run, path, statement, y, rng_key, starts)
    kept = trace[burn_in:]
    batches = max(2, int(np.sqrt(kept.shape[0])))
    size = kept.shape[0] // batches
    means = jnp.reshape(kept[: batches * size], (batches, size, *kept.shape[1:])).mean(axis=1)
    error = jnp.std(means, axis=0, ddof=1) / np.sqrt(batches)
    return ParisianEstimate(jnp.mean(kept, axis=0), error, trace)


class _Iterations(NamedTuple):
    """What is done with a model: static, so that it is compiled once."""

    setting: Setting
    functional: Callable[..., Array]
    num_iterations: int
    num_backward: int

    def __call__(self, model: StateSpaceModel, key: PRNGKeyArray, *starts: Array) -> Array:
        model = with_starts(model, *starts)
        check_brownian(model, "parisian_gibbs")
        reason = invertible(model)
        if reason:
            raise ValueError(f"parisian_gibbs weighs transitions of the path, but {reason}")
        own = with_own_steps(self.setting, model, None)
        return _iterate(model, own, self.functional, key, self.num_iterations, self.num_backward)


@partial(jax.jit, static_argnums=0)
def _compiled(
    run: Any, path: AbstractPathLaw, statement: Any, y: Array, key: PRNGKeyArray, starts: Any
) -> Array:
    dims = (0, *(1 + len(path.state_shape) for _ in starts))
    return ObservedPath(path, (), ((statement, y),)).map(run, (key, *starts), dims)


def _iterate(
    model: StateSpaceModel,
    setting: Setting,
    functional: Callable[..., Array],
    key: PRNGKeyArray,
    num_iterations: int,
    num_backward: int,
) -> Array:
    first_key, key = jax.random.split(key)
    start = first_path(model, setting, first_key)

    def step(path: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
        move_key, sum_key = jax.random.split(key)
        sweep = conditional_smc(model, setting, path, move_key)
        sums = additive(sweep.law, sweep.history, sum_key, functional, num_backward=num_backward)
        return sweep.path, sums[-1]

    return lax.scan(step, start, jax.random.split(key, num_iterations))[1]
