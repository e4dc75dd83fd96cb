"""The law of a Markov jump process's first state, from what a user gives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_sde.jumps.chain import MarkovJumpProcess


def start_law(chain: MarkovJumpProcess, init: Any, name: str = "init") -> Array:
    """Probabilities of the first state, `(*batch, n)`.

    Args:
        chain: the process.
        init: "stationary", a state, or a distribution with `probs` over the states.
        name: what to call it in errors.

    Raises:
        ValueError: an unknown start, or a stationary one of a reducible process.
        TypeError: a start of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> from numpyro_sde.jumps.starts import start_law
        >>> chain = nsde.MarkovJumpProcess(jnp.array([[0.0, 1.0], [3.0, 0.0]]), 2)
        >>> [round(float(p), 2) for p in start_law(chain, "stationary")]
        [0.75, 0.25]
    """
    n = chain.num_states
    if isinstance(init, str):
        if init != "stationary":
            raise ValueError(
                f'{name} must be "stationary", a state or a Categorical, got the string {init!r}'
            )
        if chain.is_reducible():
            raise ValueError(
                f'{name}="stationary" needs a process in which every state can be reached from '
                "every other: this one has no single stationary law. Give a state or a Categorical"
            )
        return _stationary(chain)
    probs = getattr(init, "probs", None)
    if probs is not None or hasattr(init, "log_prob"):
        if probs is None or jnp.ndim(probs) < 1 or init.event_shape != ():
            raise TypeError(
                f"{name} must be a Categorical over the {n} states, got a {type(init).__name__}"
            )
        if probs.shape[-1] != n:
            raise ValueError(
                f"{name} must be a Categorical over the {n} states, got one over {probs.shape[-1]}"
            )
        return jnp.asarray(probs)
    state = jnp.asarray(init)
    if not jnp.issubdtype(state.dtype, jnp.integer):
        raise TypeError(
            f"{name} must be a state, a whole number, got {init!r} of type {state.dtype}"
        )
    if not isinstance(state, jax.core.Tracer):
        known = np.asarray(state)
        if np.any(known < 0) or np.any(known >= n):
            raise ValueError(f"{name} must be a state in 0..{n - 1}, got {init}")
    return jax.nn.one_hot(state, n, dtype=jnp.result_type(float))


def _stationary(chain: MarkovJumpProcess) -> Array:
    lead = chain.batch_shape
    leaves, structure = jax.tree_util.tree_flatten(chain)
    flat = []
    for leaf, dim in zip(leaves, chain.leaf_event_dims(), strict=True):
        event = jnp.shape(leaf)[jnp.ndim(leaf) - dim :]
        flat.append(jnp.reshape(jnp.broadcast_to(leaf, lead + event), (-1, *event)))

    def one(*leaves: Array) -> Array:
        process: MarkovJumpProcess = jax.tree_util.tree_unflatten(structure, leaves)
        return process.stationary_law()

    if not lead:
        return one(*leaves)
    return jax.vmap(one)(*flat).reshape(*lead, chain.num_states)
