"""Predictions of a path that is observed itself: each state from the one before, or from earlier.

The one-step density is the transition density. The distribution function comes from the
transition's innovation, which is standard normal and increases with the state; a scheme without
innovations is drawn from.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr
from jaxtyping import Array, PRNGKeyArray

from numpyro_sde.diagnostics.prediction.predictive import RowPrediction
from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.distributions.path_law import AbstractPathLaw
from numpyro_sde.schemes.markov_jumps import MarkovJumps

_NUM_RANKED = 1000  # draws that stand for a transition without innovations


def predict_direct(
    path: AbstractPathLaw, value: Any, horizon: int, key: PRNGKeyArray
) -> RowPrediction:
    """Predictions of every state of an observed path, leading axes `(*lead, T)`.

    Args:
        path: The law.
        value: The states, `(*lead, T, *state)`.
        horizon: How many times ahead; the first ones are predicted from the start.
        key: For draws.

    Raises:
        ValueError: If the last state does not tell the next: noise with a memory, a hidden regime.
    """
    if path.scheme.has_memory:
        raise ValueError(
            "a path observed itself whose noise has a memory, or whose regime is hidden, has no "
            "one-step predictions here: observe it with noise and integrate it out"
        )
    lead = jnp.broadcast_shapes(
        path.batch_shape, jnp.shape(value)[: jnp.ndim(value) - path.event_dim]
    )
    value = jnp.broadcast_to(jnp.asarray(value, float), (*lead, *path.event_shape))
    start_key, draw_key, rank_key = jax.random.split(key, 3)
    upper, lower = _transforms(path, value, lead, rank_key)
    first = path.expand(lead).sample(start_key)
    later = _simulate(path, value, horizon, lead, draw_key)
    axis = len(lead)
    head = jnp.take(first, jnp.arange(min(horizon, path.num_times)), axis=axis)
    draw = jnp.concatenate([head, later], axis=axis)
    if horizon == 1:
        score = path.log_prob_pointwise(path.of_states(value))
    else:  # several steps have no density in closed form
        score = jnp.full((*lead, path.num_times), jnp.nan)
        upper = lower = jnp.full(upper.shape, jnp.nan)
    flat = (*lead, path.num_times, -1)
    return RowPrediction(score, upper.reshape(flat), lower.reshape(flat), draw.reshape(flat))


def _transforms(
    path: AbstractPathLaw, value: Array, lead: tuple[int, ...], key: PRNGKeyArray
) -> tuple[Array, Array]:
    """Distribution functions at each state and just below it; NaN at the first time.

    Both of shape `(*lead, T, *state)`, the same for continuous states.
    """
    axis = len(lead)
    if path.num_times == 1:
        return (jnp.full(value.shape, jnp.nan),) * 2
    if isinstance(path.scheme, MarkovJumps):
        return _of_whole_states(path, value, lead)
    square = path.scheme.has_innovations and path.innovation_shape[1:] == path.state_shape
    if square:
        assert isinstance(path, SDEPath)
        pit = ndtr(path.inverse(value)[1])
    elif path.state_shape == ():
        draws = jax.lax.map(
            lambda k: _simulate(path, value, 1, lead, k), jax.random.split(key, _NUM_RANKED)
        )
        below = jnp.sum(draws < jnp.take(value, jnp.arange(1, path.num_times), axis=axis), axis=0)
        pit = (below + 0.5) / (_NUM_RANKED + 1.0)
    else:
        pit = jnp.full((*lead, path.num_times - 1, *path.state_shape), jnp.nan)
    nothing = jnp.full((*lead, 1, *path.state_shape), jnp.nan)
    return (jnp.concatenate([nothing, pit], axis=axis),) * 2


def _of_whole_states(
    path: AbstractPathLaw, value: Array, lead: tuple[int, ...]
) -> tuple[Array, Array]:
    """Distribution functions of whole states at each and below it, from transition matrices."""

    def one(sde: Any, scheme: Any, _: Any, dt: Any, cache: Any, x: Array) -> Any:
        def step(h: Array, x: Array, x_next: Array, cache: Any) -> tuple[Array, Array]:
            p = scheme.probabilities(sde, h, x, cache)
            k = jnp.arange(p.shape[0])
            return jnp.sum(p * (k <= x_next)), jnp.sum(p * (k < x_next))

        upper, lower = jax.vmap(step, (0, 0, 0, None if cache is None else 0))(
            jnp.asarray(dt), x[:-1], x[1:], cache
        )
        nothing = jnp.full(1, jnp.nan)
        return jnp.concatenate([nothing, upper]), jnp.concatenate([nothing, lower])

    found: tuple[Array, Array] = path._map(one, lead, (value,), (1,))
    return found


def _simulate(
    path: AbstractPathLaw, value: Array, horizon: int, lead: tuple[int, ...], key: PRNGKeyArray
) -> Array:
    """A draw of each state from the one `horizon` times before it, `(*lead, T - horizon, ...)`."""
    count = path.num_times - horizon
    if count <= 0:
        return jnp.zeros((*lead, 0, *path.state_shape))
    keys = jax.random.split(key, lead)

    def simulate(
        sde: Any, scheme: Any, times: Any, dt: Any, cache: Any, x: Array, key: PRNGKeyArray
    ) -> Array:
        states = x[:count]
        for step, own in enumerate(jax.random.split(key, horizon)):
            here = jax.tree.map(
                lambda a, step=step: jnp.asarray(a)[step : step + count], (times[:-1], dt, cache)
            )
            each = jax.random.split(own, count)
            states = jax.vmap(lambda k, x, now: scheme.draw(sde, k, now[0], now[1], x, now[2]))(
                each, states, here
            )
        return states

    return path._map(simulate, lead, (value, keys), (path.event_dim, keys.ndim - len(lead)))
