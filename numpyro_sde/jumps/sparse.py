"""Large structured state spaces: probabilities moved along the edges, no matrix formed.

The series of uniformisation applied to one vector: each term adds what flows along the edges,
`v M = v (1 - exits / q) + inflow / q`. Memory is linear in the number of states. All terms are
nonnegative. A long time is cut into parts, so many as the rates ask for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from numpyro_sde.jumps.forward_backward import Forward, condition, scale_emissions
from numpyro_sde.jumps.uniformisation import largest_mean, poisson_weights


class Edges(NamedTuple):
    """A sparse generator: the jumps that are possible, and their rates.

    Attributes:
        source: state that each edge leaves, on the host.
        target: state that it enters.
        rates: rate of each, 1/time.
        num_terms: terms of the series for one part of a time.
        max_parts: parts into which a long time may be cut.
    """

    source: np.ndarray
    target: np.ndarray
    rates: Float[Array, " E"]
    num_terms: int = 64
    max_parts: int = 64


def _series(edges: Edges, v: Array, t: Array, into: np.ndarray, out_of: np.ndarray) -> Array:
    exits = jnp.zeros(v.shape, edges.rates.dtype).at[edges.source].add(edges.rates)
    q = jnp.max(lax.stop_gradient(exits))
    q = jnp.where(q == 0.0, 1.0, q)
    mean, limit = q * t, largest_mean(edges.num_terms)
    parts = jnp.ceil(jnp.clip(lax.stop_gradient(mean) / limit, 1.0, edges.max_parts))
    stay, moves = 1.0 - exits / q, edges.rates / q
    weights = poisson_weights(mean / parts, edges.num_terms)
    count = jnp.where(jnp.isnan(parts), 1.0, parts).astype(jnp.int32)
    moved = _repeated(into, out_of, edges.max_parts)(count, stay, moves, weights, v)
    return jnp.where(mean <= limit * edges.max_parts, moved, jnp.nan)


def _repeated(into: np.ndarray, out_of: np.ndarray, max_parts: int) -> Callable[..., Array]:
    """The map of one part of the time, so often as there are parts: `(parts, ..., v)` to `v`.

    A loop whose length is that of the longest in a batch, its reverse derivative written out:
    branches under `vmap` would all run, and a loop of `max_parts` is up to so many times dearer.
    """

    def whole(stay: Array, moves: Array, weights: Array, v: Array) -> Array:
        def term(carry: tuple[Array, Array], w: Array) -> tuple[tuple[Array, Array], None]:
            u, total = carry
            return ((stay * u).at[into].add(moves * u[out_of]), total + w * u), None

        return lax.scan(term, (v, jnp.zeros_like(v)), weights)[0][1]

    @jax.custom_vjp
    def run(parts: Array, stay: Array, moves: Array, weights: Array, v: Array) -> Array:
        return lax.fori_loop(0, parts, lambda _, u: whole(stay, moves, weights, u), v)

    def ahead(
        parts: Array, stay: Array, moves: Array, weights: Array, v: Array
    ) -> tuple[Array, tuple[Array, ...]]:
        def part(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            u, seen = carry
            return whole(stay, moves, weights, u), seen.at[i].set(u)

        start = v, jnp.zeros((max_parts, *v.shape), v.dtype)
        moved, seen = lax.fori_loop(0, parts, part, start)
        return moved, (parts, stay, moves, weights, seen)

    def back(kept: tuple[Array, ...], slope: Array) -> tuple[Any, ...]:
        parts, *fixed, seen = kept

        def part(k: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            *sums, slope = carry
            *own, slope = jax.vjp(whole, *fixed, seen[parts - 1 - k])[1](slope)
            return *(a + b for a, b in zip(sums, own, strict=True)), slope

        zeros = tuple(jnp.zeros_like(a) for a in fixed)
        found = lax.fori_loop(0, parts, part, (*zeros, slope))
        return np.zeros(np.shape(parts), jax.dtypes.float0), *found

    run.defvjp(ahead, back)
    return run


def propagate(
    source: np.ndarray,
    target: np.ndarray,
    rates: Float[Array, " E"],
    v: Float[Array, " n"],
    t: Float[Array, ""],
    *,
    num_terms: int = 64,
    max_parts: int = 64,
) -> Float[Array, " n"]:
    """Probabilities after a time, `v exp(Q t)`, of a sparse generator.

    Args:
        source: state that each edge leaves, on the host.
        target: state that it enters.
        rates: rate of each edge, 1/time.
        v: probabilities of the states.
        t: length of time.
        num_terms: terms of the series in one part of the time.
        max_parts: parts into which a long time may be cut.

    Returns:
        Probabilities; NaN where the rates are too high for so many parts, or are NaN.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> from numpyro_sde.jumps.sparse import propagate
        >>> v = propagate(np.array([0, 1]), np.array([1, 0]), jnp.array([1.0, 3.0]),
        ...               jnp.array([1.0, 0.0]), 0.5)
        >>> round(float(v[1]), 4)
        0.2162
    """
    edges = Edges(source, target, rates, num_terms, max_parts)
    return _series(edges, v, jnp.asarray(t, v.dtype), target, source)


def look_back(edges: Edges, u: Float[Array, " n"], t: Float[Array, ""]) -> Float[Array, " n"]:
    """Expectation of `u` a time later given each state now, `exp(Q t) u`."""
    return _series(edges, u, t, edges.source, edges.target)


def forward(
    init: Float[Array, " n"],
    edges: Edges,
    gaps: Float[Array, " T-1"],
    log_emission: Float[Array, "T n"],
) -> Forward:
    """Filtered and predicted probabilities, and the terms of the log likelihood.

    Args:
        init: probabilities of the first state.
        edges: the generator.
        gaps: lengths of time between the data.
        log_emission: log density of each datum given each state; 0 where missing.
    """
    weights, top = scale_emissions(log_emission)
    first, total = condition(init, weights[0])

    @jax.checkpoint
    def step(f: Array, now: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array, Array]]:
        gap, weight = now
        predicted = _series(edges, f, gap, edges.target, edges.source)
        f, total = condition(predicted, weight)
        return f, (f, total, predicted)

    gaps = jnp.asarray(gaps, init.dtype)
    _, (rest, totals, predicted) = lax.scan(step, first, (gaps, weights[1:]))
    totals = jnp.concatenate([total[None], totals])
    increments = jnp.log(totals) + top
    return Forward(
        jnp.sum(increments),
        increments,
        jnp.concatenate([first[None], rest]),
        jnp.concatenate([init[None], predicted]),
    )


def smooth(
    passed: Forward, edges: Edges, gaps: Float[Array, " T-1"], log_emission: Float[Array, "T n"]
) -> Float[Array, "T n"]:
    """Probabilities of the state at each time given all data."""
    weights, top = scale_emissions(log_emission)
    totals = jnp.exp(passed.increments - top)
    weights = weights / jnp.where(totals > 0.0, totals, 1.0)[:, None]

    def step(ahead: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        gap, weight = now
        ahead = look_back(edges, weight * ahead, gap)
        return ahead, ahead

    last = jnp.ones_like(weights[0])
    gaps = jnp.asarray(gaps, last.dtype)
    _, rest = lax.scan(step, last, (gaps, weights[1:]), reverse=True)
    product = passed.filtered * jnp.concatenate([rest, last[None]])
    return product / jnp.sum(product, axis=-1, keepdims=True)


def draw_states(
    key: PRNGKeyArray, filtered: Float[Array, "T n"], edges: Edges, gaps: Float[Array, " T-1"]
) -> Int[Array, " T"]:
    """Draw the states at all times given all data: forward filtering, backward sampling."""
    noise = jax.random.gumbel(key, filtered.shape, filtered.dtype)
    last = jnp.argmax(jnp.log(filtered[-1]) + noise[-1])
    places = jnp.arange(filtered.shape[1])

    def step(after: Array, now: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        f, gap, e = now
        arrives = look_back(edges, (places == after).astype(f.dtype), gap)
        state = jnp.argmax(jnp.log(f) + jnp.log(arrives) + e)
        return state, state

    gaps = jnp.asarray(gaps, filtered.dtype)
    _, rest = lax.scan(step, last, (filtered[:-1], gaps, noise[:-1]), reverse=True)
    return jnp.concatenate([rest, last[None]]).astype(jnp.int32)
