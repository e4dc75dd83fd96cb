"""A reaction network on the counts within bounds, as a Markov jump process.

Finite-state projection: Munsky and Khammash (2006), J. Chem. Phys. 124. States are those that can
be reached from the start without leaving the bounds; jumps that leave them go to one more state,
from which nothing returns, so that the probability left out is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_sde.jumps.chain import MarkovJumpProcess
from numpyro_sde.jumps.reactions import ReactionNetwork

MAX_STATES = 100_000


@dataclass(frozen=True, eq=False)
class _Lattice:
    """States within bounds and the jumps among them, known on the host; made once.

    Attributes:
        states: counts, `(n, d)`.
        edges: jumps between the numbers of states, n standing for all beyond the bounds.
        source: number of the state that each possible reaction starts from.
        reaction: which reaction it is.
        edge: the edge that it is part of; two reactions may join the same states.
    """

    states: np.ndarray
    edges: tuple[tuple[int, int], ...]
    source: np.ndarray
    reaction: np.ndarray
    edge: np.ndarray


@lru_cache(maxsize=32)
def _lattice(
    changes: tuple[tuple[int, ...], ...],
    reactants: tuple[tuple[int, ...], ...],
    bounds: tuple[int, ...],
    start: tuple[int, ...] | None,
) -> _Lattice:
    limit, needed = np.array(bounds), np.array(reactants)
    steps = np.array(changes)
    size = tuple(limit + 1)
    if start is None:
        found = np.ones(int(np.prod(size)), bool)
        states = np.stack(np.unravel_index(np.arange(found.size), size), axis=1)
    else:
        states = _reached(steps, needed, limit, np.array(start))
    if len(states) > MAX_STATES:
        raise ValueError(
            f"{len(states)} states lie within bounds={bounds}, more than {MAX_STATES}: lower the "
            "bounds, or use Particle(proposal='bootstrap')"
        )
    place = np.full(int(np.prod(size)), -1)
    place[np.ravel_multi_index(tuple(states.T), size)] = np.arange(len(states))
    sink = len(states)
    source, after, reaction = [], [], []
    for r in range(steps.shape[1]):
        possible = np.flatnonzero(np.all(states >= needed[:, r], axis=1))
        moved = states[possible] + steps[:, r]
        inside = np.all((moved >= 0) & (moved <= limit), axis=1)
        target = np.full(possible.size, sink)
        target[inside] = place[np.ravel_multi_index(tuple(moved[inside].T), size)]
        moves = possible != target
        source.append(possible[moves])
        after.append(target[moves])
        reaction.append(np.full(int(moves.sum()), r))
    pairs = np.stack([np.concatenate(source), np.concatenate(after)], axis=1)
    edges, edge = np.unique(pairs, axis=0, return_inverse=True)
    return _Lattice(
        states,
        tuple((int(i), int(j)) for i, j in edges),
        pairs[:, 0],
        np.concatenate(reaction),
        edge.ravel(),
    )


def _reached(steps: np.ndarray, needed: np.ndarray, limit: np.ndarray, start: np.ndarray) -> Any:
    size = tuple(limit + 1)
    seen = np.zeros(int(np.prod(size)), bool)
    front = start[None]
    seen[np.ravel_multi_index(tuple(start), size)] = True
    while front.size:
        following = [
            (front[np.all(front >= needed[:, r], axis=1)] + steps[:, r])
            for r in range(steps.shape[1])
        ]
        after = np.concatenate(following)
        after = after[np.all((after >= 0) & (after <= limit), axis=1)]
        numbers = np.unique(np.ravel_multi_index(tuple(after.T), size))
        numbers = numbers[~seen[numbers]]
        seen[numbers] = True
        front = np.stack(np.unravel_index(numbers, size), axis=1)
    return np.stack(np.unravel_index(np.flatnonzero(seen), size), axis=1)


def project(
    net: ReactionNetwork, bounds: tuple[int, ...], start: np.ndarray | None = None
) -> tuple[MarkovJumpProcess, np.ndarray]:
    """The process of a network's counts within bounds, the last state for all beyond them.

    Args:
        net: the network.
        bounds: largest count of each species.
        start: counts from which states must be reached; None for all within the bounds.

    Returns:
        The process, and the counts of its states, `(n - 1, d)`.

    Raises:
        ValueError: bounds that do not fit the species or the start; too many states; accumulators.

    Example:
        >>> import jax.numpy as jnp, numpy as np, numpyro_sde as nsde
        >>> from numpyro_sde.jumps.projection import project
        >>> decay = nsde.ReactionNetwork([[1]], [[0]], jnp.array([0.5]))
        >>> chain, states = project(decay, (5,), np.array([3]))
        >>> states[:, 0].tolist(), chain.num_states
        ([0, 1, 2, 3], 5)
    """
    if net.accumulated:
        raise ValueError(
            "finite-state projection has no accumulators: a flux is no function of bounded counts. "
            "Use Particle(proposal='bootstrap'), or add the products of the reaction as a species"
        )
    if len(bounds) != net.num_species:
        raise ValueError(
            f"bounds must give the largest count of each of {', '.join(net.species)}, got {bounds}"
        )
    known = None if start is None else tuple(int(v) for v in start)
    if known is not None and any(v > b for v, b in zip(known, bounds, strict=True)):
        raise ValueError(f"bounds {bounds} must hold the start {known}")
    changes = tuple(map(tuple, net.stoichiometry.tolist()))
    lattice = _lattice(changes, net.reactants, bounds, known)
    leaves, structure = jax.tree_util.tree_flatten(net)
    names = [f"leaf {k}" for k in range(len(leaves))]
    chain = MarkovJumpProcess(
        _EdgeRates(lattice, structure),
        len(lattice.states) + 1,
        edges=lattice.edges,
        params=dict(zip(names, leaves, strict=True)),
        event_dims=dict(zip(names, net.leaf_event_dims(), strict=True)),
    )
    return chain, lattice.states


@dataclass(frozen=True)
class _EdgeRates:
    """Rates of the edges, from a network's propensities at their sources."""

    lattice: _Lattice
    structure: Any

    def __call__(self, p: dict[str, Array]) -> Array:
        """One rate for each edge."""
        leaves = [p[f"leaf {k}"] for k in range(len(p))]
        net = jax.tree_util.tree_unflatten(self.structure, leaves)
        lattice = self.lattice
        every = jax.vmap(net.counted_rates)(jnp.asarray(lattice.states, jnp.result_type(float)))
        one = every[lattice.source, lattice.reaction]
        return jnp.zeros(len(lattice.edges), one.dtype).at[lattice.edge].add(one)
