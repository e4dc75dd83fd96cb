"""Filtering, smoothing and drawing of a hidden discrete state: the forward-backward algorithm.

Baum, Petrie, Soules and Weiss (1970). Probabilities are normalised at each time, so nothing
underflows over long series, and the gradient is written out: the derivative of the log likelihood
by a transition matrix or an emission is a smoothed probability, which one backward pass gives.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

_UNROLL = 4


class Forward(NamedTuple):
    """What the forward pass knows.

    Attributes:
        log_likelihood: log density of all data.
        increments: its terms, `log p(y_k | y_1..y_k-1)`, `(T,)`.
        filtered: probabilities given the data up to each time, `(T, n)`.
        predicted: probabilities before the datum of the same time, `(T, n)`.
    """

    log_likelihood: Float[Array, ""]
    increments: Float[Array, " T"]
    filtered: Float[Array, "T n"]
    predicted: Float[Array, "T n"]


def scale_emissions(
    log_emission: Float[Array, "T n"],
) -> tuple[Float[Array, "T n"], Float[Array, " T"]]:
    """Emissions relative to the largest over states, and its log; 0 where all are impossible."""
    top = jnp.max(log_emission, axis=-1)
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    return jnp.exp(log_emission - top[:, None]), top


def condition(predicted: Array, weight: Array) -> tuple[Array, Array]:
    """Probabilities given one more datum, and its density; impossible data keep the prediction."""
    joint = predicted * weight
    total = jnp.sum(joint)
    # Impossible data give -inf, not NaN: the pass goes on from the prediction.
    possible = total > 0.0
    filtered = jnp.where(possible, joint / jnp.where(possible, total, 1.0), predicted)
    # NaN (a rate out of bounds) must not be taken for an impossible datum.
    return jnp.where(jnp.isnan(total), jnp.nan, filtered), total


def _forward(init: Array, P: Array, weights: Array) -> tuple[Array, Array, Array]:
    first, total = condition(init, weights[0])

    def step(f: Array, now: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array, Array]]:
        P, weight = now
        predicted = jnp.sum(f[:, None] * P, axis=0)
        f, total = condition(predicted, weight)
        return f, (f, total, predicted)

    _, (rest, totals, predicted) = lax.scan(step, first, (P, weights[1:]), unroll=_UNROLL)
    return (
        jnp.concatenate([first[None], rest]),
        jnp.concatenate([total[None], totals]),
        jnp.concatenate([init[None], predicted]),
    )


@jax.custom_vjp
def _log_likelihood(init: Array, P: Array, weights: Array) -> Array:
    return jnp.sum(jnp.log(_forward(init, P, weights)[1]))


def _log_likelihood_fwd(init: Array, P: Array, weights: Array) -> tuple[Array, tuple[Array, ...]]:
    filtered, totals, predicted = _forward(init, P, weights)
    return jnp.sum(jnp.log(totals)), (P, weights, filtered, totals, predicted)


def _log_likelihood_bwd(
    residuals: tuple[Array, ...], cotangent: Array
) -> tuple[Array, Array, Array]:
    P, weights, filtered, totals, predicted = residuals
    safe = jnp.where(totals > 0.0, totals, 1.0)
    scaled = jnp.where((totals > 0.0)[:, None], weights / safe[:, None], 1.0)
    ahead = _look_ahead(P, scaled)
    message = scaled * ahead
    dP = filtered[:-1, :, None] * message[1:, None, :]
    dweights = predicted * ahead / safe[:, None]
    return cotangent * message[0], cotangent * dP, cotangent * dweights


_log_likelihood.defvjp(_log_likelihood_fwd, _log_likelihood_bwd)


def _look_ahead(P: Array, scaled: Array) -> Array:
    """Likelihood of the data after each time given the state there, over its mean: `(T, n)`."""

    def step(ahead: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        P, scaled = now
        ahead = jnp.sum(P * (scaled * ahead)[None], axis=1)
        return ahead, ahead

    last = jnp.ones_like(scaled[0])
    _, rest = lax.scan(step, last, (P, scaled[1:]), reverse=True, unroll=_UNROLL)
    return jnp.concatenate([rest, last[None]])


def log_likelihood(
    init: Float[Array, " n"], P: Float[Array, "T-1 n n"], log_emission: Float[Array, "T n"]
) -> Float[Array, ""]:
    """Log density of data of a hidden Markov chain, with a gradient by one backward pass.

    Args:
        init: probabilities of the first state.
        P: transition matrices, `P[k, i, j]` from i at time k to j at time k + 1.
        log_emission: log density of each datum given each state; 0 where missing.

    Returns:
        The log density; `-inf` where the data are impossible, NaN where `P` is.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.jumps.forward_backward import log_likelihood
        >>> P = jnp.array([[[0.9, 0.1], [0.2, 0.8]]])
        >>> seen = jnp.log(jnp.array([[1.0, 0.0], [0.0, 1.0]]))  # states 0, then 1
        >>> round(float(jnp.exp(log_likelihood(jnp.array([0.5, 0.5]), P, seen))), 4)
        0.05
    """
    weights, top = scale_emissions(log_emission)
    return _log_likelihood(init, P, weights) + jnp.sum(top)


def forward(
    init: Float[Array, " n"], P: Float[Array, "T-1 n n"], log_emission: Float[Array, "T n"]
) -> Forward:
    """Filtered and predicted probabilities, and the terms of the log likelihood."""
    weights, top = scale_emissions(log_emission)
    filtered, totals, predicted = _forward(init, P, weights)
    increments = jnp.log(totals) + top
    return Forward(jnp.sum(increments), increments, filtered, predicted)


def smooth(
    init: Float[Array, " n"], P: Float[Array, "T-1 n n"], log_emission: Float[Array, "T n"]
) -> Float[Array, "T n"]:
    """Probabilities of the state at each time given all data."""
    weights, _ = scale_emissions(log_emission)
    filtered, totals, _ = _forward(init, P, weights)
    safe = jnp.where(totals > 0.0, totals, 1.0)
    product = filtered * _look_ahead(P, weights / safe[:, None])
    return product / jnp.sum(product, axis=-1, keepdims=True)


def draw_states(
    key: PRNGKeyArray, filtered: Float[Array, "T n"], P: Float[Array, "T-1 n n"]
) -> Int[Array, " T"]:
    """Draw the states at all times given all data: forward filtering, backward sampling."""
    noise = jax.random.gumbel(key, filtered.shape, filtered.dtype)
    last = jnp.argmax(jnp.log(filtered[-1]) + noise[-1])

    def step(after: Array, now: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        f, P, e = now
        state = jnp.argmax(jnp.log(f) + jnp.log(P[:, after]) + e)
        return state, state

    _, rest = lax.scan(step, last, (filtered[:-1], P, noise[:-1]), reverse=True)
    return jnp.concatenate([rest, last[None]]).astype(jnp.int32)
