"""The path of a Markov jump process between grid times, given the states there.

Jumps of the uniformised process on `[0, t]`, from a to b: their number has probability
proportional to `Poisson(n; q t) (M^n)_ab`, the states follow backward through
`(M^(k-1))_aj M_jb`, the times are uniform order statistics; jumps to the same state are dropped
(Hobolth and Stone 2009, Annals of Applied Statistics 3, section 2.3). Independent, exact draws.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

from numpyro_sde.jumps.forward_backward import log_likelihood
from numpyro_sde.jumps.uniformisation import (
    largest_mean,
    matrix_powers,
    poisson_weights,
    transition_matrices_on,
    uniform_rate,
)
from numpyro_sde.linear.small import diagonal


class JumpTimes(NamedTuple):
    """Jumps of paths in continuous time.

    Attributes:
        times: times of the jumps, increasing, NaN after the last, `(*lead, J)`.
        states: the state before the first jump and after each, the last one repeated, shape
            `(*lead, J + 1)`.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.jumps import JumpTimes
        >>> blink = JumpTimes(jnp.array([0.4, 0.9, jnp.nan]), jnp.array([0, 1, 0, 0]))
        >>> int(jnp.sum(~jnp.isnan(blink.times)))
        2
    """

    times: Float[Array, "*lead J"]
    states: Int[Array, "*lead J+1"]


def _bridge(
    key: PRNGKeyArray, powers: Array, M: Array, mean: Array, ends: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Jumps between two times: fractions of the gap, NaN for none, and the states entered."""
    start, end = ends
    num_terms = powers.shape[0]
    key_number, key_states, key_times = jax.random.split(key, 3)
    weights = poisson_weights(mean, num_terms) * powers[:, start, end]
    number = jax.random.categorical(key_number, jnp.log(weights))
    noise = jax.random.gumbel(key_states, (num_terms, M.shape[0]), M.dtype)

    def back(after: Array, now: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        k, power, e = now  # the jump number k + 1 enters `after`
        chosen = jnp.argmax(jnp.log(power[start]) + jnp.log(M[:, after]) + e)
        before = jnp.where(k < number, chosen.astype(after.dtype), after)
        return before, (after, before != after)

    inputs = (jnp.arange(num_terms), powers, noise)
    _, (entered, real) = lax.scan(back, end, inputs, reverse=True)
    return _fractions(key_times, number, real, M.dtype), entered


class _Chances(NamedTuple):
    """The stochastic matrix M of a sparse generator: its edges, and what stays.

    Attributes:
        source: state that each edge leaves.
        target: state that it enters.
        stay: diagonal of M, `(n,)`.
        moves: entry of each edge, `(E,)`.
    """

    source: Int[Array, " E"]
    target: Int[Array, " E"]
    stay: Float[Array, " n"]
    moves: Float[Array, " E"]


def _sparse_bridge(
    key: PRNGKeyArray, chance: _Chances, mean: Array, ends: Any, num_terms: int
) -> tuple[Array, Array]:
    """The same along the edges, forward in time: vectors `M^k e_end` in the place of powers.

    A state is left for j with probability `M_ij (M^(n - k - 1))_jb`, over those that it leads to.
    """
    start, end = ends
    source, target, stay, moves = chance
    key_number, key_states, key_times = jax.random.split(key, 3)

    def back(u: Array, _: None) -> tuple[Array, Array]:
        return (stay * u).at[source].add(moves * u[target]), u

    last = (jnp.arange(stay.size) == end).astype(stay.dtype)
    _, ahead = lax.scan(back, last, None, num_terms)
    weights = poisson_weights(mean, num_terms) * ahead[:, start]
    number = jax.random.categorical(key_number, jnp.log(weights))

    def forward(state: Array, now: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        k, key = now
        u = ahead[jnp.maximum(number - k - 1, 0)]
        leads = jnp.where(source == state, moves * u[target], 0.0)
        weights = jnp.concatenate([(stay * u)[state][None], leads])
        chosen = jax.random.categorical(key, jnp.log(weights))
        new = jnp.where(chosen == 0, state, target[jnp.maximum(chosen - 1, 0)].astype(state.dtype))
        new = jnp.where(k < number, new, state)
        return new, (new, new != state)

    steps = (jnp.arange(num_terms), jax.random.split(key_states, num_terms))
    _, (entered, real) = lax.scan(forward, start, steps)
    return _fractions(key_times, number, real, stay.dtype), entered


def _fractions(key: PRNGKeyArray, number: Array, real: Array, dtype: Any) -> Array:
    """Places of the jumps in a gap, uniform order statistics; NaN for those that are none."""
    uniform = jax.random.uniform(key, real.shape, dtype)
    active = jnp.arange(real.shape[0]) < number
    ordered = jnp.sort(jnp.where(active, uniform, jnp.inf))
    return jnp.where(real & active, ordered, jnp.nan)


@partial(jax.jit, static_argnames=("num_states", "num_terms"))
def draw_sparse_jumps(
    key: PRNGKeyArray,
    edges: tuple[Int[Array, " E"], Int[Array, " E"], Float[Array, " E"]],
    times: Float[Array, " T"],
    states: Int[Array, " T"],
    *,
    num_states: int,
    num_terms: int = 64,
) -> JumpTimes:
    """`draw_jumps` for large structured spaces: no matrix, one gap after the other.

    Args:
        key: random key.
        edges: states that edges leave, that they enter, and their rates.
        times: increasing times.
        states: states there.
        num_states: number of states.
        num_terms: most jumps of the uniformised process in a gap.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sde.jumps.bridges import draw_sparse_jumps, trim
        >>> edges = (jnp.array([0, 1]), jnp.array([1, 0]), jnp.array([1.0, 3.0]))
        >>> jumps = draw_sparse_jumps(
        ...     jax.random.key(0), edges, jnp.arange(2.0), jnp.array([0, 1]), num_states=2)
        >>> int(trim(jumps).states[-1])
        1
    """
    source, target, rates = edges
    exits = jnp.zeros(num_states, rates.dtype).at[source].add(rates)
    q = jnp.max(exits)
    q = jnp.where(q == 0.0, 1.0, q)
    chance = _Chances(source, target, jnp.maximum(1.0 - exits / q, 0.0), rates / q)
    gaps, states = jnp.diff(times), jnp.asarray(states, jnp.int32)

    def one(now: Any) -> tuple[Array, Array]:
        key, gap, ends = now
        return _sparse_bridge(key, chance, q * gap, ends, num_terms)

    keys = jax.random.split(key, gaps.shape[0])
    drawn = lax.map(one, (keys, gaps, (states[:-1], states[1:])))
    held = jnp.max(q * gaps) <= largest_mean(num_terms)
    return _joined(times, states, drawn, held)


def _joined(times: Array, states: Array, drawn: tuple[Array, Array], held: Array) -> JumpTimes:
    """The jumps of all gaps, `(G, K)` each, one after the other."""
    fractions, entered = drawn
    flat = (times[:-1, None] + fractions * jnp.diff(times)[:, None]).reshape(-1)
    order = jnp.argsort(flat)  # NaN last
    jump_times, entered = flat[order], entered.reshape(-1)[order]
    entered = jnp.where(jnp.isnan(jump_times), states[-1], entered)
    return JumpTimes(jnp.where(held, jump_times, jnp.nan), jnp.concatenate([states[:1], entered]))


@partial(jax.jit, static_argnames="num_terms")
def draw_jumps(
    key: PRNGKeyArray,
    Q: Float[Array, "n n"],
    times: Float[Array, " T"],
    states: Int[Array, " T"],
    *,
    num_terms: int = 64,
) -> JumpTimes:
    """Draw the jumps of a path given its states at some times.

    Args:
        key: random key.
        Q: generator, 1/time.
        times: increasing times.
        states: states there.
        num_terms: most jumps of the uniformised process in one gap, `terms_for(q * gap)`.

    Returns:
        All jumps, shape `(J,)` with `J = (T - 1) num_terms`; NaN throughout where a gap needs
        more terms. `trim` cuts the padding.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sde.jumps.bridges import draw_jumps, trim
        >>> Q = jnp.array([[-1.0, 1.0], [3.0, -3.0]])
        >>> jumps = trim(draw_jumps(jax.random.key(0), Q, jnp.array([0.0, 1.0]), jnp.array([0, 1])))
        >>> int(jumps.states[0]), int(jumps.states[-1])
        (0, 1)
    """
    q = uniform_rate(Q)
    M = jnp.maximum(jnp.eye(Q.shape[0], dtype=Q.dtype) + Q / q, 0.0)
    powers = matrix_powers(M, num_terms)
    gaps = jnp.diff(times)
    states = jnp.asarray(states, jnp.int32)
    keys = jax.random.split(key, gaps.shape[0])
    draw = jax.vmap(_bridge, (0, None, None, 0, 0))
    drawn = draw(keys, powers, M, q * gaps, (states[:-1], states[1:]))
    held = jnp.max(q * gaps) <= largest_mean(num_terms)
    return _joined(times, states, drawn, held)


def trim(jumps: JumpTimes) -> JumpTimes:
    """Cut the padding that no path needs, on the host."""
    count = int(np.max(np.sum(~np.isnan(np.asarray(jumps.times)), axis=-1), initial=0))
    return JumpTimes(jumps.times[..., :count], jumps.states[..., : count + 1])


def states_at(jumps: JumpTimes, times: Float[Array, " K"]) -> Int[Array, " K"]:
    """State of a path in continuous time at given times; right-continuous.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.jumps import JumpTimes, states_at
        >>> blink = JumpTimes(jnp.array([0.4, 0.9, jnp.nan]), jnp.array([0, 1, 0, 0]))
        >>> states_at(blink, jnp.array([0.0, 0.4, 2.0])).tolist()
        [0, 1, 0]
    """
    padded = jnp.where(jnp.isnan(jumps.times), jnp.inf, jumps.times)
    return jumps.states[jnp.searchsorted(padded, times, side="right")]


class PathStatistics(NamedTuple):
    """Statistics of a path: expected ones given data, or those of a path that is known.

    Attributes:
        jumps: number of jumps from i to j, `(n, n)`.
        dwell: time in each state, `(n,)`.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.jumps import PathStatistics
        >>> stats = PathStatistics(jnp.array([[0.0, 4.0], [3.0, 0.0]]), jnp.array([2.0, 6.0]))
        >>> (stats.jumps / stats.dwell[:, None])[0, 1].item()  # a step of the EM algorithm
        2.0
    """

    jumps: Float[Array, "n n"]
    dwell: Float[Array, " n"]


def path_totals(
    jumps: JumpTimes, start: ArrayLike, end: ArrayLike, num_states: int
) -> PathStatistics:
    """Numbers of jumps and times in states of paths in continuous time.

    Args:
        jumps: the paths, any leading dimensions.
        start: when they begin.
        end: when they end.
        num_states: number n of states.

    Returns:
        Jumps `(*lead, n, n)` and times `(*lead, n)`.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.jumps import JumpTimes, path_totals
        >>> blink = JumpTimes(jnp.array([0.5, 0.75, jnp.nan]), jnp.array([0, 1, 0, 0]))
        >>> totals = path_totals(blink, 0.0, 2.0, 2)
        >>> totals.jumps.tolist(), totals.dwell.tolist()
        ([[0.0, 1.0], [1.0, 0.0]], [1.75, 0.25])
    """
    times, states = jnp.asarray(jumps.times), jnp.asarray(jumps.states)
    real = ~jnp.isnan(times)
    lead = times.shape[:-1]
    first = jnp.broadcast_to(jnp.asarray(start, times.dtype), lead)[..., None]
    last = jnp.broadcast_to(jnp.asarray(end, times.dtype), lead)[..., None]
    edges = jnp.concatenate([first, jnp.where(real, times, last), last], axis=-1)
    state = jnp.arange(num_states).reshape(*(1,) * states.ndim, num_states)
    inside = jnp.asarray(states[..., None] == state, times.dtype)
    dwell = jnp.sum(jnp.diff(edges, axis=-1)[..., None] * inside, axis=-2)
    left = inside[..., :-1, :] * real[..., None]
    return PathStatistics(jnp.einsum("...ji,...jk->...ik", left, inside[..., 1:, :]), dwell)


def path_statistics(
    Q: Float[Array, "n n"],
    init: Float[Array, " n"],
    gaps: Float[Array, " T-1"],
    log_emission: Float[Array, "T n"],
    *,
    num_terms: int = 64,
) -> PathStatistics:
    """Expected numbers of jumps and dwell times given all data.

    By Fisher's identity for the law of a path, whose log density is
    `sum_ij N_ij log Q_ij + sum_i T_i Q_ii`: taken as free entries of the matrix, the derivative
    of the log likelihood by `Q_ij` is `E[N_ij] / Q_ij`, by `Q_ii` it is `E[T_i]`. One gradient.

    Args:
        Q: generator, 1/time.
        init: probabilities of the first state, held fixed.
        gaps: lengths of time between the data.
        log_emission: log density of each datum given each state.
        num_terms: as for `transition_matrices`.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.jumps.bridges import path_statistics
        >>> Q = jnp.array([[-1.0, 1.0], [3.0, -3.0]])
        >>> law = jnp.array([0.75, 0.25])
        >>> nothing_seen = jnp.zeros((2, 2))
        >>> stats = path_statistics(Q, law, jnp.array([2.0]), nothing_seen)
        >>> [round(float(t), 4) for t in stats.dwell]
        [1.5, 0.5]
    """

    def value(Q: Array) -> Array:
        P = transition_matrices_on(Q, gaps, num_terms=num_terms)
        return log_likelihood(init, P, log_emission)

    slope = jax.grad(value)(Q)
    dwell = diagonal(slope)
    jumps = jnp.where(jnp.eye(Q.shape[0], dtype=bool), 0.0, Q * slope)
    return PathStatistics(jumps, dwell)
