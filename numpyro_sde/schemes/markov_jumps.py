"""The exact transition of a Markov jump process, and the process in the form of an equation.

A path law, its engines and its maps over batches ask dynamics for parameters and a scheme for
steps. `ChainEquation` answers for a Markov jump process, whose state is a number `0..n-1`; it has
no drift and no diffusion, so engines that need them must not take it, which the scheme says.
"""

# ruff: noqa: ARG002
# Methods of one protocol share its arguments, used or not.

from __future__ import annotations

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr
from jaxtyping import Array, Float

from numpyro_sde.describe import describe_entries
from numpyro_sde.dynamics import AbstractDynamics
from numpyro_sde.jumps.chain import MarkovJumpProcess
from numpyro_sde.jumps.sparse import Edges, propagate
from numpyro_sde.noise.brownian import AbstractNoise, Brownian
from numpyro_sde.noise.jumps import AbstractJumps
from numpyro_sde.parameters import broadcast_batch
from numpyro_sde.schemes.base import AbstractScheme


class ChainEquation(AbstractDynamics):
    """A Markov jump process, the law of its start, and what its states stand for.

    Args:
        chain: the process.
        start: probabilities of the first state, `(*batch, n)`.
        values: what each state stands for, shape `(n, d)`, known on the host; None for its number.
        sink: whether the last state stands for all that the others leave out.
    """

    chain: MarkovJumpProcess
    start: Float[Array, "*batch n"]
    values: Any
    sink: bool = eqx.field(static=True)
    noise: AbstractNoise
    jumps: tuple[AbstractJumps, ...]
    inputs: None

    def __init__(
        self, chain: MarkovJumpProcess, start: Array, values: Any = None, *, sink: bool = False
    ) -> None:
        self.chain, self.start, self.values, self.sink = chain, start, values, sink
        # Its jumps are the whole of its law, which the scheme has; nothing else drives it.
        self.noise, self.jumps, self.inputs = Brownian(), (), None

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return broadcast_batch(
            {"params of the chain": self.chain.batch_shape, "init": jnp.shape(self.start)[:-1]}
        )

    def leaf_event_dims(self) -> list[int]:
        dims = [*self.chain.leaf_event_dims(), 1]
        leaves = jax.tree_util.tree_leaves(self)
        return dims + [jnp.ndim(leaf) for leaf in leaves[len(dims) :]]

    def _described(self) -> list[tuple[str, str]]:
        return [("num_states", str(self.chain.num_states)), *describe_entries(self.chain.params)]

    @property
    def edges(self) -> Edges:
        """The generator as edges, of one process."""
        chain = self.chain
        source, target = chain.edge_arrays
        rates = chain.rates_at
        if chain.edges is None:
            rates = rates[source, target]
        return Edges(source, target, rates, chain.num_terms)

    def state_of(self, index: Array) -> Array:
        """What states stand for, from their numbers."""
        if self.values is None:
            return index
        return jnp.asarray(self.values)[jnp.asarray(index, jnp.int32)]


class MarkovJumps(AbstractScheme):
    """Exact law of the next state of a Markov jump process.

    Example:
        >>> from numpyro_sde.schemes.markov_jumps import MarkovJumps
        >>> MarkovJumps.smooth, MarkovJumps.has_density
        (False, True)
    """

    smooth: ClassVar[bool] = False
    counts: ClassVar[bool] = True
    restarts: ClassVar[bool] = True
    taken_by: ClassVar[str] = (
        "filters.Forward(), which is exact and has a gradient, infer.ConditionalForward in a Gibbs "
        "sampler, or filters.Particle(proposal='bootstrap')"
    )

    def check(self, sde: Any, state_shape: tuple[int, ...]) -> None:
        if not isinstance(sde, ChainEquation):
            raise ValueError(
                f"the jumps of a Markov jump process are no scheme for a {type(sde).__name__}: use "
                "nsde.JumpPath"
            )

    def innovation_shape(self, sde: Any, state_shape: tuple[int, ...]) -> tuple[int, ...]:
        return ()

    def prepare(self, sde: Any, times: Any, dt: Any) -> Any:
        return None if sde.chain.matrix_free else sde.chain.transitions(dt)

    def probabilities(self, sde: Any, dt: Array, x: Array, cache: Any) -> Float[Array, " n"]:
        """Probabilities of the next state."""
        n = sde.chain.num_states
        now = jnp.asarray(x, jnp.int32)
        inside = (now >= 0) & (now < n) & (now == x)
        if cache is None:
            one = (jnp.arange(n) == now).astype(jnp.result_type(float))
            edges = sde.edges
            row = propagate(
                edges.source, edges.target, edges.rates, one, dt, num_terms=edges.num_terms
            )
        else:
            row = cache[jnp.clip(now, 0, n - 1)]
        return jnp.where(inside, row, 0.0)

    def log_density(
        self, sde: Any, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Float[Array, ""]:
        row = self.probabilities(sde, dt, x, cache)
        after = jnp.asarray(x_next, jnp.int32)
        inside = (after >= 0) & (after < row.shape[0]) & (after == x_next)
        p = jnp.where(inside, row[jnp.clip(after, 0, row.shape[0] - 1)], 0.0)
        return jnp.where(p == 0.0, -jnp.inf, jnp.log(jnp.where(p == 0.0, 1.0, p)))

    def step(self, sde: Any, t: Array, dt: Array, x: Array, z: Array, cache: Any = None) -> Array:
        row = self.probabilities(sde, dt, x, cache)
        reached = jnp.cumsum(row)
        chosen = jnp.sum(reached < ndtr(z) * reached[-1])
        state = jnp.minimum(chosen, row.shape[0] - 1).astype(jnp.result_type(float))
        return jnp.where(jnp.isfinite(reached[-1]), state, jnp.nan)

    def invert(
        self, sde: Any, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Array:
        raise TypeError("the innovations of a Markov jump process cannot be read off its states")
