"""Resampling: which particles have how many offspring.

Every scheme maps a key and weights to the index of each slot's ancestor, unbiased: the
expected number of offspring of a particle is its normalised weight times the number of slots.
None sorts. Systematic, stratified and residual resampling turn running sums of the weights into
running counts of offspring, and those into ancestors by a histogram and a running sum, linear in
the number of particles; running sums go in blocks, as products with a triangular matrix.

The conditional form of a scheme is its law given that slot 0 descends from particle 0, the slots
being shuffled (systematic: shifted round) so that each has the same law: conditional sequential
Monte Carlo keeps its path there. In each scheme a point drawn uniformly in the stretch of particle
0 says which of its offspring is kept; the others follow as usual.

Sources: Douc, Cappe and Moulines (2005), "Comparison of resampling schemes for particle filters";
Chopin and Singh (2015), "On particle Gibbs sampling", section 5 (conditional forms); Gerber, Chopin
and Whiteley (2019), "Negative association, ordering and convergence of resampling methods" (SSP);
Karppinen, Singh and Vihola (2022), "Conditional particle filters with bridge backward sampling"
(killing).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

Ancestors = Int[Array, " M"]


class Resampling(eqx.Module):
    """A way to resample that a user writes: `Particle(resampling=MyScheme())`.

    Called with a key and weights `(M,)` of any scale, it returns the index of each slot's ancestor,
    `(M,)`; the expected number of offspring of each particle must be its normalised weight times M,
    else likelihoods are biased. With `conditional=True`, which conditional filters alone ask for,
    the same law given that slot 0 descends from particle 0, every slot having the same law before.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro_sde as nsde
        >>> class Independent(nsde.filters.Resampling):
        ...     def __call__(self, key, weights, *, conditional=False):
        ...         draws = jax.random.categorical(key, jnp.log(weights), shape=weights.shape)
        ...         return draws.at[0].set(0) if conditional else draws
        >>> nsde.filters.Particle(100, resampling=Independent()).resampling
        Independent()
    """

    @abstractmethod
    def __call__(
        self, key: PRNGKeyArray, weights: Float[Array, " M"], *, conditional: bool = False
    ) -> Ancestors:
        """Ancestors of all slots."""


_BLOCK = 16


def running_sum(x: Float[Array, " M"]) -> Float[Array, " M"]:
    """Cumulative sums by blocks, each a sum under a triangular mask.

    Example:
        >>> import jax.numpy as jnp
        >>> running_sum(jnp.arange(4.0)).tolist()
        [0.0, 1.0, 3.0, 6.0]
    """
    n = x.shape[0]
    if n <= _BLOCK:
        return jnp.cumsum(x)
    blocks = -(-n // _BLOCK)
    table = jnp.pad(x, (0, blocks * _BLOCK - n)).reshape(blocks, _BLOCK)
    ones = jnp.triu(jnp.ones((_BLOCK, _BLOCK), x.dtype))
    within = (table[:, :, None] * ones[None]).sum(1)
    before = running_sum(within[:, -1]) - within[:, -1]
    return (within + before[:, None]).reshape(-1)[:n]


def effective_size(weights: Float[Array, " M"]) -> Float[Array, ""]:
    """Effective sample size `(sum w)^2 / sum w^2`; 0 where all weights are zero.

    Source: Kong, Liu and Wong (1994).

    Example:
        >>> import jax.numpy as jnp
        >>> float(effective_size(jnp.array([0.5, 0.5, 0.0])))
        2.0
    """
    total = jnp.sum(weights)
    return jnp.where(total > 0, total**2 / jnp.maximum(jnp.sum(weights**2), 1e-30), 0.0)


def _shares(weights: Array) -> Array:
    """The weights; equal ones where all are zero, so that nothing is NaN."""
    return jnp.where(jnp.sum(weights) > 0, weights, 1.0)


def _scaled_sums(w: Array) -> Array:
    """Running sums of the weights, scaled to end at their number exactly."""
    sums = running_sum(w)
    return sums * (w.shape[0] / sums[-1])


def _descend(counts: Array) -> Ancestors:
    """Ancestors, in order, from running counts of offspring `(M,)` that end at M."""
    M = counts.shape[0]
    # Slot i descends from the first particle whose running count passes i.
    return _first_beyond(counts, jnp.arange(M, dtype=counts.dtype))


def _pick(sums: Array, uniforms: Array) -> Ancestors:
    """Independent draws of particles, from running sums of any scale."""
    return _first_beyond(sums, uniforms * sums[-1])


def _first_beyond(sums: Array, points: Array) -> Ancestors:
    """Index of the first of the running sums above each point, the last one at most.

    By halving, each step written out: jaxlib 0.12 makes no kernel of a filter's loop that counts by
    scattering, and 32 particles then take twice the time.
    """
    found = jnp.searchsorted(sums, points, side="right", method="scan_unrolled")
    return jnp.minimum(found, sums.shape[0] - 1).astype(jnp.int32)


def _swap_to_front(ancestors: Ancestors, slot: Array) -> Ancestors:
    first, chosen = ancestors[0], ancestors[slot]
    return ancestors.at[slot].set(first).at[0].set(chosen)


def systematic(
    key: PRNGKeyArray, weights: Float[Array, " M"], *, conditional: bool = False
) -> Ancestors:
    """Points `(i + u) / M` with one uniform `u` (Carpenter, Clifford and Fearnhead 1999).

    Args:
        key: random key.
        weights: weights, of any scale; their logarithms less the largest are safe in float32.
        conditional: condition on slot 0 descending from particle 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> systematic(jax.random.key(0), jnp.array([0.5, 0.0, 0.25, 0.25])).tolist()
        [0, 0, 2, 3]
    """
    uniform = jax.random.uniform(key, (), weights.dtype)
    sums = _scaled_sums(_shares(weights))
    if not conditional:
        return _descend(jnp.ceil(sums - uniform).astype(jnp.int32))
    # A point uniform in the stretch of particle 0: its place among the offspring, and `u`.
    point = uniform * sums[0]
    rank = jnp.floor(point)
    ancestors = _descend(jnp.ceil(sums - (point - rank)).astype(jnp.int32))
    return jnp.roll(ancestors, -rank.astype(jnp.int32))


def stratified(
    key: PRNGKeyArray, weights: Float[Array, " M"], *, conditional: bool = False
) -> Ancestors:
    """Points `(i + u_i) / M` with independent uniforms (Kitagawa 1996).

    Args:
        key: random key.
        weights: weights, of any scale; their logarithms less the largest are safe in float32.
        conditional: condition on slot 0 descending from particle 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> stratified(jax.random.key(0), jnp.array([0.5, 0.0, 0.25, 0.25])).tolist()
        [0, 0, 2, 3]
    """
    M = weights.shape[0]
    sums = _scaled_sums(_shares(weights))
    points_key, kept_key = jax.random.split(key)
    u = jax.random.uniform(points_key, (M,), sums.dtype)
    slot = jnp.zeros((), jnp.int32)
    if conditional:
        point = jax.random.uniform(kept_key, (), sums.dtype) * sums[0]
        slot = jnp.minimum(jnp.floor(point).astype(jnp.int32), M - 1)
        u = u.at[slot].set(point - slot)
    whole = jnp.floor(sums).astype(jnp.int32)
    below = u[jnp.minimum(whole, M - 1)] < sums - whole
    ancestors = _descend(whole + below.astype(jnp.int32))
    return _swap_to_front(ancestors, slot) if conditional else ancestors


def multinomial(
    key: PRNGKeyArray, weights: Float[Array, " M"], *, conditional: bool = False
) -> Ancestors:
    """Independent ancestors.

    Args:
        key: random key.
        weights: weights, of any scale; their logarithms less the largest are safe in float32.
        conditional: condition on slot 0 descending from particle 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> multinomial(jax.random.key(0), jnp.array([0.0, 0.0, 1.0])).tolist()
        [2, 2, 2]
    """
    sums = running_sum(_shares(weights))
    u = jax.random.uniform(key, weights.shape, sums.dtype)
    ancestors = _pick(sums, u)
    return ancestors.at[0].set(0) if conditional else ancestors


def residual(
    key: PRNGKeyArray, weights: Float[Array, " M"], *, conditional: bool = False
) -> Ancestors:
    """The whole part of `M w` offspring for certain, the rest at random (Liu and Chen 1998).

    Args:
        key: random key.
        weights: weights, of any scale; their logarithms less the largest are safe in float32.
        conditional: condition on slot 0 descending from particle 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> residual(jax.random.key(0), jnp.array([0.5, 0.0, 0.25, 0.25])).tolist()
        [0, 0, 2, 3]
    """
    w = _shares(weights)
    expected = w * (w.shape[0] / jnp.sum(w))
    whole, rest = _split_whole(expected)
    ancestors = _descend(jnp.cumsum(whole))
    certain = jnp.sum(whole)
    draw_key, kept_key = jax.random.split(key)
    u = jax.random.uniform(draw_key, w.shape, w.dtype)
    slots = jnp.arange(w.shape[0])
    ancestors = jnp.where(slots < certain, ancestors, _pick(running_sum(rest), u))
    if not conditional:
        return ancestors
    kept_is_certain = jax.random.uniform(kept_key, (), w.dtype) * expected[0] < whole[0]
    slot = jnp.where(kept_is_certain, 0, jnp.minimum(certain, w.shape[0] - 1))
    return _swap_to_front(ancestors.at[slot].set(0), slot)


def _split_whole(expected: Array) -> tuple[Array, Array]:
    """Whole and fractional parts of expected counts, sums of weights being rounded."""
    tolerance = 4.0 * jnp.finfo(expected.dtype).eps * (1.0 + expected)
    whole = jnp.floor(expected + tolerance)
    rest = jnp.maximum(expected - whole, 0.0)
    return whole.astype(jnp.int32), rest


def ssp(key: PRNGKeyArray, weights: Float[Array, " M"], *, conditional: bool = False) -> Ancestors:
    """Srinivasan's sampling process: fractions of offspring fight in pairs, one after another.

    Counts differ from their expectations by less than one, as in systematic resampling, but are
    negatively associated, which makes the filter consistent whatever the order of the particles
    (Gerber, Chopin and Whiteley 2019). A loop over particles: slower than the others.

    Args:
        key: random key.
        weights: weights, of any scale; their logarithms less the largest are safe in float32.
        conditional: condition on slot 0 descending from particle 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> ssp(jax.random.key(0), jnp.array([0.5, 0.0, 0.25, 0.25])).tolist()
        [0, 0, 2, 3]
    """
    M = weights.shape[0]
    w = _shares(weights)
    expected = w * (M / jnp.sum(w))
    whole, rest = _split_whole(expected)
    fight_key, kept_key = jax.random.split(key)
    u = jax.random.uniform(fight_key, (M,), w.dtype)
    force = jnp.zeros((), bool)
    if conditional:
        # Either the kept offspring is one of the certain ones, or particle 0 must win its fraction.
        force = jax.random.uniform(kept_key, (), w.dtype) * expected[0] >= whole[0]

    def fight(open_one: tuple[Array, Array], now: tuple[Array, Array, Array]) -> Any:
        (a, i), (b, j, u) = open_one, now
        total = a + b
        both = jnp.maximum(total, 1e-30)
        # Below one the winner takes all; above, the winner is complete and the other goes on.
        complete = total >= 1.0
        p_first = jnp.where(complete, (1.0 - b) / jnp.maximum(2.0 - total, 1e-30), a / both)
        # Given that particle 0 wins in the end, chances are reweighted by its next fraction.
        p_forced = jnp.where(complete, p_first / jnp.maximum(a, 1e-30), 1.0)
        first = u < jnp.where(force & (i == 0), p_forced, p_first)
        winner, loser = jnp.where(first, i, j), jnp.where(first, j, i)
        left = jnp.where(complete, total - 1.0, total)
        return (left, jnp.where(complete, loser, winner)), jnp.where(complete, winner, M)

    numbers = jnp.arange(M, dtype=jnp.int32)
    (_, last), winners = lax.scan(fight, (rest[0], numbers[0]), (rest[1:], numbers[1:], u[1:]))
    counts = whole.at[winners].add(1, mode="drop")
    # What the last one standing has left is 0 or 1, up to rounding: what the others miss.
    counts = counts.at[last].add(M - jnp.sum(counts, dtype=counts.dtype))
    return _descend(jnp.cumsum(counts))


def killing(
    key: PRNGKeyArray, weights: Float[Array, " M"], *, conditional: bool = False
) -> Ancestors:
    """A particle stays with probability `w / max w`, else its slot takes a draw (Del Moral 2004).

    Slots of equal weights do not move at all: the scheme for weights that hardly differ, as on
    fine grids.

    Args:
        key: random key.
        weights: weights, of any scale; their logarithms less the largest are safe in float32.
        conditional: condition on slot 0 descending from particle 0.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> killing(jax.random.key(0), jnp.ones(4)).tolist()
        [0, 1, 2, 3]
    """
    M = weights.shape[0]
    w = _shares(weights)
    stay_key, draw_key, kept_key = jax.random.split(key, 3)
    stays = w / jnp.max(w)
    survive = jax.random.uniform(stay_key, (M,), w.dtype) < stays
    drawn = _pick(running_sum(w), jax.random.uniform(draw_key, (M,), w.dtype))
    ancestors = jnp.where(survive, jnp.arange(M, dtype=jnp.int32), drawn)
    if not conditional:
        return ancestors
    # The kept offspring stands in slot s with the chance that this slot descends from particle 0.
    share = w[0] / jnp.sum(w)
    chances = (1.0 - stays) * share
    chances = chances.at[0].add(stays[0])
    slot = _pick(running_sum(chances), jax.random.uniform(kept_key, (), w.dtype))
    return _swap_to_front(ancestors.at[slot].set(0), slot)


SCHEMES: dict[str, Callable[..., Ancestors]] = {
    "systematic": systematic,
    "stratified": stratified,
    "residual": residual,
    "multinomial": multinomial,
    "ssp": ssp,
    "killing": killing,
}
"""The schemes by name."""
