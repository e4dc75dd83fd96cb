"""Particle smoothers: draws of whole paths, and expectations of sums along them.

- `genealogy`: the ancestral lines of the last particles; free, but all share their beginning.
- `draw_paths`: backward sampling by MCMC moves, exactly, or by rejection.
- `fixed_lag`: means given the data up to some steps later.
- `additive`: PaRIS, sums along paths, from the particles of a filter (`smc.online`: while it runs).

Sources: Kitagawa (1996); Godsill, Doucet and West (2004); Douc, Garivier, Moulines and Olsson
(2011) (rejection); Olsson and Westerborn (2017), "Efficient particle-based online smoothing in
general hidden Markov models: the PaRIS algorithm"; Dau and Chopin (2023) (MCMC).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_sde.smc.backward import (
    Block,
    Dynamics,
    Piece,
    Pool,
    blocks_of,
    choose_piece,
    make_pool,
    move_piece,
    weigh_bridge,
)
from numpyro_sde.smc.particle_filter import History
from numpyro_sde.statespace.model import StateSpaceModel

LookAhead = Callable[[Any, Array], Array | None]
"""`look_ahead(k, x)`: log of the function by which candidates at grid index k are favoured."""


def genealogy(history: History) -> Float[Array, "M N d"]:
    """Ancestral lines of the last particles, to be weighted by their last weights."""
    M = history.log_weights.shape[1]

    def back(index: Array, now: Any) -> tuple[Array, Array]:
        x, ancestors = now
        index = ancestors[index]
        return index, x[:, index]

    last = history.particles[-1]
    _, rest = lax.scan(
        back,
        jnp.arange(M, dtype=jnp.int32),
        (history.particles[:-1], history.ancestors),
        reverse=True,
    )
    return jnp.transpose(jnp.concatenate([rest, last[None]]), (2, 0, 1))


def fixed_lag(history: History, lag: int) -> tuple[Float[Array, "N d"], Float[Array, "N d d"]]:
    """Means and covariances of each state given the data up to `lag` grid steps later.

    Ancestral lines are followed over `lag` steps only, before they have merged (Kitagawa and Sato
    2001): a bias that vanishes as the lag grows, against the variance of a whole genealogy.

    Args:
        history: particles of a filter.
        lag: number of grid steps.
    """
    N, M = history.log_weights.shape
    identity = jnp.arange(M, dtype=history.ancestors.dtype)
    padded = jnp.concatenate([history.ancestors, jnp.tile(identity, (max(lag, 1), 1))])

    def one(k: Array) -> tuple[Array, Array]:
        def back(j: Array, index: Array) -> Array:
            return padded[k + lag - 1 - j][index]

        index = lax.fori_loop(0, lag, back, identity)
        later = jnp.minimum(k + lag, N - 1)
        w = jax.nn.softmax(history.log_weights[later])
        x = history.particles[k][:, index]
        mean = x @ w
        centred = x - mean[:, None]
        return mean, (centred * w[None]) @ centred.T

    return lax.map(one, jnp.arange(N))


def update_sums(
    model: StateSpaceModel,
    block: Block,
    pool: Pool,
    piece: Piece,
    sums: Float[Array, "M ..."],
    end: Float[Array, "M d"],
    key: PRNGKeyArray,
    functional: Callable[[Array, Array, Array, Array], Array],
    num_backward: int,
) -> Float[Array, "M ..."]:
    """Take particles' estimated sums from the start of a block to its end: one step of PaRIS.

    Args:
        model: the path law.
        block: the block.
        pool: particles at its start.
        piece: the part that each particle at its end came by.
        sums: estimates of the particles at its start.
        end: particles at its end.
        key: random key.
        functional: the term of one grid step.
        num_backward: number of ancestors over which to take the mean.
    """
    t, dt = (
        jnp.concatenate([inner, last[None]])
        for inner, last in zip(block.inner[:2], block.last[:2], strict=True)
    )
    real = jnp.concatenate([block.real, jnp.ones(1, bool)])

    def inside(piece: Piece, end: Array) -> Array:
        points = jnp.concatenate([piece.start[None], piece.states, end[None]])
        terms = jax.vmap(functional)(t, dt, points[:-1], points[1:])
        return jnp.tensordot(jnp.where(real, 1.0, 0.0).astype(terms.dtype), terms, 1)

    total = jnp.zeros_like(sums)
    for i, part in enumerate(jax.random.split(key, num_backward)):
        if i > 0:
            piece = _refresh(model, block, pool, piece, end, part, "mcmc", 1)
        total = total + sums[piece.ancestor] + jax.vmap(inside)(piece, end)
    return total / num_backward


def check_backward(num_backward: int) -> None:
    """Refuse too few ancestors for PaRIS."""
    if num_backward < 2:
        raise ValueError(
            f"num_backward must be at least 2 (with 1 the variance grows as a genealogy's), got "
            f"{num_backward}"
        )


def no_sums(
    functional: Callable[[Array, Array, Array, Array], Array], x: Float[Array, "d M"]
) -> Float[Array, "M ..."]:
    """Sums of particles before the first step."""
    shape = jax.eval_shape(functional, 0.0, 0.0, x[:, 0], x[:, 0])
    return jnp.zeros((x.shape[1], *shape.shape), x.dtype)


def current_piece(
    model: StateSpaceModel, block: Block, history: History, index: Array, end: Array
) -> Piece:
    """The part that a particle at the block's end came by."""
    ancestor = history.ancestors[block.start][index]
    start = history.particles[block.start][:, ancestor]
    states = history.particles[block.rows, :, index]
    # Padding repeats the state before it, so that the last of them leads to the end.
    states = pad_forward(states, block.real, start)
    ratio = weigh_bridge(model, block, start, states, end)
    return Piece(ancestor, start, states, ratio)


def pad_forward(states: Array, real: Array, start: Array) -> Array:
    """Repeat the last state inside a block in its padding."""
    if states.shape[0] == 0:
        return states
    count = jnp.sum(real)
    last = jnp.where(count > 0, states[jnp.maximum(count - 1, 0)], start)
    return jnp.where(real[:, None], states, last)


def draw_paths(
    law: Dynamics,
    history: History,
    key: PRNGKeyArray,
    num_draws: int,
    *,
    method: str = "mcmc",
    num_moves: int = 1,
    look_ahead: LookAhead | None = None,
) -> tuple[Float[Array, "draws N d"], Float[Array, " blocks"]]:
    """Draw paths from the smoothing law: forward filtering, backward sampling.

    Args:
        law: the path law, and which times were observed.
        history: particles of a filter of it.
        key: random key.
        num_draws: number of paths.
        method: "mcmc" (`num_moves` Metropolis-Hastings moves from the ancestor that was), "exact"
            (all particles weighed), "rejection" (grids without times between observations only),
            or "genealogy".
        num_moves: moves a block.
        look_ahead: which candidates are proposed more often.

    Returns:
        The paths, and the share of them that changed ancestor in each block.
    """
    first_key, key = jax.random.split(key)
    last = jax.random.categorical(first_key, history.log_weights[-1], shape=(num_draws,))
    if len(law.nodes) == 1:
        return history.particles[-1][:, last].T[:, None], jnp.zeros(0)
    if method == "genealogy":
        lines = genealogy(history)[last]
        return lines, jnp.zeros(len(law.nodes) - 1, lines.dtype)
    blocks = blocks_of(law)
    model = law.model
    ahead = look_ahead or (lambda k, x: None)  # noqa: ARG005

    def back(carry: tuple[Array, Array], now: Any) -> tuple[Any, Any]:
        index, end = carry
        block, key = now
        x = history.particles[block.start]
        pool = make_pool(x, history.log_weights[block.start], ahead(block.start, x))
        piece = jax.vmap(partial(current_piece, model, block, history))(index, end)
        moved = _refresh(model, block, pool, piece, end, key, method, num_moves)
        changed = jnp.mean(moved.ancestor != piece.ancestor)
        return (moved.ancestor, moved.start), (moved.start, moved.states, changed)

    keys = jax.random.split(key, len(law.nodes) - 1)
    end = history.particles[-1][:, last].T
    _, (starts, states, changed) = lax.scan(
        back, (last.astype(history.ancestors.dtype), end), (blocks, keys), reverse=True
    )
    return assemble(blocks, law, starts, states, end), changed


def assemble(
    blocks: Block, law: Dynamics, starts: Array, states: Array, end: Array
) -> Float[Array, "draws N d"]:
    """Put starts `(blocks, draws, d)`, states inside and the end together."""
    pieces = jnp.concatenate([starts[:, None], jnp.swapaxes(states, 1, 2)], axis=1)
    # Where each grid time is: a gather, which needs no loop over the rows as a scatter does.
    rows = np.arange(law.nodes[-1])
    block = np.searchsorted(blocks.start, rows, side="right") - 1
    path = pieces[block, rows - blocks.start[block]]
    return jnp.swapaxes(jnp.concatenate([path, end[None]]), 0, 1)


def _refresh(
    model: StateSpaceModel,
    block: Block,
    pool: Pool,
    piece: Piece,
    end: Array,
    key: PRNGKeyArray,
    method: str,
    num_moves: int,
) -> Piece:
    """New pieces for many paths at once."""
    count = end.shape[0]
    if method == "exact":
        choose = partial(choose_piece, model, block, pool)
        return lax.map(
            lambda a: choose(*a)[0], (piece, end, jax.random.split(key, count)), batch_size=64
        )
    if method == "rejection":
        return _reject(model, block, pool, piece, end, key)
    move = jax.vmap(partial(move_piece, model, block, pool))
    for part in jax.random.split(key, num_moves):
        piece, _ = move(piece, end, jax.random.split(part, count))
    return piece


_TRIES = 32


def _reject(
    model: StateSpaceModel, block: Block, pool: Pool, piece: Piece, end: Array, key: PRNGKeyArray
) -> Piece:
    """Backward sampling by rejection under the transition's bound, exactly after some tries."""
    count, M = end.shape[0], pool.x.shape[0]
    t, dt, cache = block.last

    def density(x: Array, end: Array) -> Array:
        return model.scheme.log_density(
            model.sde, t, dt, model.to_state(x), model.to_state(end), cache
        )

    def highest(x: Array) -> Array:
        mean = model.scheme.step(
            model.sde, t, dt, model.to_state(x), jnp.zeros_like(model.to_state(x)), cache
        )
        return density(x, jnp.reshape(mean, (model.dim,)))

    bound = jnp.max(jax.vmap(highest)(pool.x))
    weights = jnp.exp(pool.log_weights - jnp.max(pool.log_weights))

    def attempt(state: Any) -> Any:
        tries, key, index, done = state
        key, choice_key, accept_key = jax.random.split(key, 3)
        proposed = jax.random.choice(choice_key, M, (count,), p=weights / jnp.sum(weights))
        ratio = jax.vmap(density)(pool.x[proposed], end) - bound
        accept = jnp.log(jax.random.uniform(accept_key, (count,), end.dtype)) < ratio
        index = jnp.where(done, index, proposed.astype(index.dtype))
        return tries + 1, key, index, done | accept

    loop_key, exact_key = jax.random.split(key)
    state = (0, loop_key, piece.ancestor, jnp.zeros(count, bool))
    _, _, index, done = lax.while_loop(lambda s: (s[0] < _TRIES) & ~jnp.all(s[3]), attempt, state)

    def exact(_: Any) -> Array:
        scores = jax.vmap(lambda e: jax.vmap(lambda x: density(x, e))(pool.x))(end)
        scores = scores + pool.log_weights[None]
        return jax.random.categorical(exact_key, scores).astype(index.dtype)

    chosen = lax.cond(jnp.all(done), lambda _: index, exact, None)
    index = jnp.where(done, index, chosen)
    return piece._replace(ancestor=index, start=pool.x[index])


def additive(
    law: Dynamics,
    history: History,
    key: PRNGKeyArray,
    functional: Callable[[Array, Array, Array, Array], Array],
    *,
    num_backward: int = 2,
    look_ahead: LookAhead | None = None,
) -> Float[Array, "blocks ..."]:
    """PaRIS: smoothed sums along the path, after each observation time.

    Every particle carries its estimate of the sum so far; at the end of a block it takes the mean
    over `num_backward` ancestors, the one it had and others by MCMC moves from it, of theirs plus
    the block's own terms. The cost is linear in the number of particles, and the error grows
    linearly in time where that of a genealogy grows quadratically.

    Args:
        law: the path law, and which times were observed.
        history: particles of a filter of it.
        key: random key.
        functional: `functional(t, dt, x, x_next)`, the term of one grid step, states `(d,)`.
        num_backward: draws of an ancestor for each particle, at least 2 (Olsson and Westerborn
            2017, section 3).
        look_ahead: which candidates are proposed more often.

    Returns:
        Estimates of the expected sum up to each node, given the data up to it.
    """
    check_backward(num_backward)
    blocks, model = blocks_of(law), law.model
    M = history.log_weights.shape[1]
    ahead = look_ahead or (lambda k, x: None)  # noqa: ARG005
    zero = no_sums(functional, history.particles[0])

    def forward(sums: Array, now: Any) -> tuple[Array, Array]:
        block, key = now
        x = history.particles[block.start]
        pool = make_pool(x, history.log_weights[block.start], ahead(block.start, x))
        end = history.particles[block.end].T
        piece = jax.vmap(partial(current_piece, model, block, history))(jnp.arange(M), end)
        sums = update_sums(model, block, pool, piece, sums, end, key, functional, num_backward)
        w = jax.nn.softmax(history.log_weights[block.end])
        return sums, jnp.tensordot(w, sums, 1)

    keys = jax.random.split(key, len(law.nodes) - 1)
    _, means = lax.scan(forward, zero, (blocks, keys))
    return means
