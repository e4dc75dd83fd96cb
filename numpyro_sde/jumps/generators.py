"""Functions of a generator: stationary law, entropy production, mean first passage times."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, dijkstra


def generator_matrix(rates: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """The generator of rates off the diagonal: rows sum to 0.

    Args:
        rates: `rates[i, j]` from i to j, 1/time; the diagonal is not used.

    Returns:
        `Q`; NaN throughout where a rate is negative or not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.jumps.generators import generator_matrix
        >>> generator_matrix(jnp.array([[0.0, 2.0], [1.0, 0.0]])).tolist()
        [[-2.0, 2.0], [1.0, -1.0]]
    """
    n = rates.shape[-1]
    off = jnp.where(jnp.eye(n, dtype=bool), 0.0, rates)
    valid = jnp.all((off >= 0.0) & jnp.isfinite(off))
    Q = off - jnp.diag(jnp.sum(off, axis=1))
    return jnp.where(valid, Q, jnp.nan)


def reachable(Q: Float[Array, "n n"]) -> Bool[Array, "n n"]:
    """Whether state j can be reached from state i, 0 jumps included."""
    n = Q.shape[0]
    within = (Q > 0.0) | jnp.eye(n, dtype=bool)
    for _ in range(math.ceil(math.log2(max(n, 2)))):
        within = jnp.matmul(within.astype(jnp.float32), within.astype(jnp.float32)) > 0.0
    return within


def is_irreducible(source: np.ndarray, target: np.ndarray, num_states: int) -> bool:
    """Whether every state can be reached from every other along the edges, on the host.

    Example:
        >>> import numpy as np
        >>> from numpyro_sde.jumps.generators import is_irreducible
        >>> is_irreducible(np.array([0, 1]), np.array([1, 2]), 3)
        False
    """
    graph = csr_array((np.ones(source.size), (source, target)), shape=(num_states, num_states))
    return int(connected_components(graph, connection="strong")[0]) == 1


def most_jumps(source: np.ndarray, target: np.ndarray, num_states: int) -> int:
    """Most jumps that the shortest way between two states takes, on the host.

    Beyond 1,000 states the ways from and to a hundred of them stand for all.

    Example:
        >>> import numpy as np
        >>> from numpyro_sde.jumps.generators import most_jumps
        >>> most_jumps(np.array([0, 1]), np.array([1, 2]), 3)
        2
    """
    if source.size == 0:
        return 0
    graph = csr_array((np.ones(source.size), (source, target)), shape=(num_states, num_states))
    few = min(num_states, 1000 if num_states <= 1000 else 100)
    starts = np.unique(np.linspace(0, num_states - 1, few).astype(int))
    ways = [dijkstra(g, indices=starts, unweighted=True) for g in (graph, graph.T)]
    return int(max(w[np.isfinite(w)].max() for w in ways))


def stationary_law(Q: Float[Array, "n n"]) -> Float[Array, " n"]:
    """The law that the process keeps: `pi Q = 0`.

    Args:
        Q: generator of an irreducible process, 1/time.

    Returns:
        Probabilities; NaN where some state cannot be reached from another.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.jumps.generators import stationary_law
        >>> Q = jnp.array([[-1.0, 1.0], [3.0, -3.0]])
        >>> [round(float(p), 4) for p in stationary_law(Q)]
        [0.75, 0.25]
    """
    n = Q.shape[0]
    scale = jax.lax.stop_gradient(jnp.max(jnp.abs(Q)))
    # pi (Q + c 1 1') = c 1' has one solution where pi Q = 0 has one direction.
    A = Q.T / jnp.where(scale > 0.0, scale, 1.0) + jnp.ones((n, n), Q.dtype)
    pi = jnp.linalg.solve(A, jnp.ones(n, Q.dtype))
    return jnp.where(jnp.all(reachable(Q)), pi, jnp.nan)


def entropy_production(
    Q: Float[Array, "n n"], law: Float[Array, " n"] | None = None
) -> Float[Array, ""]:
    """Entropy produced per unit time, in nats: how far a process is from being reversible.

    `1/2 sum_ij (p_i q_ij - p_j q_ji) log(p_i q_ij / (p_j q_ji))` (Schnakenberg 1976, equation
    7.6): 0 for detailed balance, infinite with a transition that has no way back.

    Args:
        Q: generator, 1/time.
        law: probabilities `p`; None for the stationary ones.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.jumps.generators import entropy_production
        >>> ring = jnp.array([[-3.0, 2.0, 1.0], [1.0, -3.0, 2.0], [2.0, 1.0, -3.0]])
        >>> round(float(entropy_production(ring)), 4)  # (2 - 1) log 2
        0.6931
    """
    law = stationary_law(Q) if law is None else law
    n = Q.shape[0]
    flux = jnp.where(jnp.eye(n, dtype=bool), 0.0, law[:, None] * Q)
    back = flux.T
    both = (flux > 0.0) & (back > 0.0)
    ratio = jnp.log(jnp.where(both, flux, 1.0)) - jnp.log(jnp.where(both, back, 1.0))
    one_way = jnp.any((flux > 0.0) & (back == 0.0))
    rate = 0.5 * jnp.sum((flux - back) * ratio)
    return jnp.where(one_way, jnp.inf, jnp.where(jnp.all(jnp.isfinite(flux)), rate, jnp.nan))


def mean_first_passage_times(Q: Float[Array, "n n"], targets: ArrayLike) -> Float[Array, " n"]:
    """Mean time until the process first enters one of some states, from each state.

    Args:
        Q: generator, 1/time.
        targets: a state, or a list of them.

    Returns:
        Mean times, 0 in the targets; infinite from where the process may never get there.

    Raises:
        ValueError: targets that are no states.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.jumps.generators import mean_first_passage_times
        >>> Q = jnp.array([[-1.0, 1.0], [3.0, -3.0]])
        >>> [round(float(t), 4) for t in mean_first_passage_times(Q, 0)]
        [0.0, 0.3333]
    """
    n = Q.shape[0]
    states = np.atleast_1d(np.asarray(targets))
    if states.dtype.kind not in "iu" or states.size == 0 or states.min() < 0 or states.max() >= n:
        raise ValueError(f"targets must be states in 0..{n - 1}, got {targets}")
    inside = np.zeros(n, bool)
    inside[states] = True
    within = reachable(jnp.where(inside[:, None], 0.0, Q))
    hits = jnp.any(within & inside[None], axis=1)
    # Sure to get there: no state without a way to the targets can be reached.
    sure = ~jnp.any(within & ~hits[None, :], axis=1)
    fixed = inside | ~sure
    # States left aside must not enter the equations of the others: none of those leads there.
    A = jnp.where(fixed[:, None], jnp.eye(n, dtype=Q.dtype), -Q)
    times = jnp.linalg.solve(A, jnp.where(fixed, 0.0, 1.0).astype(Q.dtype))
    times = jnp.where(inside, 0.0, jnp.where(sure, times, jnp.inf))
    return jnp.where(jnp.all(jnp.isfinite(Q)), times, jnp.nan)
