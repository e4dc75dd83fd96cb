"""The Markov jump process: rates, parameters and their batching.

A process on states `0..n-1` that waits an exponential time in state i and jumps to j at rate
`q_ij`. The rates are a function of parameters with declared event dimensions, written for one
process, as the coefficients of an `SDE` are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from numpyro_sde.jumps import generators
from numpyro_sde.jumps.sparse import propagate
from numpyro_sde.jumps.uniformisation import transition_matrices, transition_matrices_on
from numpyro_sde.sde import Code, Parameters, as_function

MAX_DENSE = 2000
"""Most states for which a matrix of rates is accepted."""

MAX_MATRIX = 64
"""Most states for which a process given by its edges is treated by matrices."""


class MarkovJumpProcess(eqx.Module):
    """A continuous-time Markov chain on states `0..num_states - 1`.

    Args:
        rates: jump rates, 1/time: an array, or a function `rates(p)` of the parameters (`rates()`
            without any). Shape `(n, n)` with the rate from i to j at `[i, j]`, its diagonal not
            used; with `edges`, shape `(E,)`, one rate for each edge. Leading dimensions of an
            array are batch dimensions.
        num_states: number n of states.
        edges: pairs `(i, j)` of states with a jump from i to j, known on the host; None for all.
            They make large sparse processes cheap, and tell at construction whether all states
            can be reached.
        params: pytree of arrays, handed to `rates` as `p`; leading dimensions are the batch.
        event_dims: dimensions of each parameter that belong to one process (default 0 each).

    Raises:
        ValueError: rates of another shape, negative or not finite; edges that are no pairs of
            different states, or repeated; more than 2,000 states without edges.
        TypeError: arguments of the wrong kind.

    A rate that is negative or not finite inside a trace makes every probability NaN.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> channel = nsde.MarkovJumpProcess(
        ...     lambda p: jnp.stack([p["open"], p["close"]]), num_states=2,
        ...     edges=[(0, 1), (1, 0)], params={"open": 1.0, "close": 3.0},
        ... )
        >>> channel.generator.tolist(), channel.stationary_law().tolist()
        ([[-1.0, 1.0], [3.0, -3.0]], [0.75, 0.25])
    """

    parameters: Parameters
    rates: Code
    num_states: int = eqx.field(static=True)
    edges: tuple[tuple[int, int], ...] | None = eqx.field(static=True)

    def __init__(
        self,
        rates: Callable[..., Any] | ArrayLike,
        num_states: int | None = None,
        *,
        edges: Sequence[tuple[int, int]] | None = None,
        params: Any = None,
        event_dims: Any = None,
    ) -> None:
        if isinstance(num_states, bool) or not isinstance(num_states, int | np.integer):
            raise TypeError(
                f"num_states must be a whole number, got {type(num_states).__name__} {num_states!r}"
            )
        if num_states < 1:
            raise ValueError(f"num_states must be at least 1, got {num_states}")
        self.num_states = int(num_states)
        self.edges = None if edges is None else _edges(edges, self.num_states)
        if edges is None and num_states > MAX_DENSE:
            raise ValueError(
                f"a process of {num_states} states needs edges=, the list of possible jumps: a "
                f"matrix of rates is accepted up to num_states = {MAX_DENSE}"
            )
        if callable(rates):
            self.parameters = Parameters(params, event_dims)
            arguments = "p" if params is not None else ""
            self.rates = _rate_function(rates, arguments)
        else:
            if params is not None or event_dims is not None:
                raise TypeError("params and event_dims go with rates given as a function of them")
            array = rates if isinstance(rates, jax.Array | np.ndarray) else np.asarray(rates, float)
            dim = len(self._rate_shape)
            if array.ndim < dim:
                raise ValueError(self._shape_error(array.shape))
            self.parameters = Parameters({"rates": array}, {"rates": dim}, owner="rates")
            self.rates = Code(_given)
        self._check_rates()

    @property
    def _rate_shape(self) -> tuple[int, ...]:
        n = self.num_states
        return (n, n) if self.edges is None else (len(self.edges),)

    def _shape_error(self, got: Any) -> str:
        what = (
            "one rate from each state to each other"
            if self.edges is None
            else "one rate for each edge"
        )
        return (
            f"rates must have shape {self._rate_shape}, {what}, got {got}"
            f"{self.parameters.batch_hint if hasattr(self, 'parameters') else ''}"
        )

    def _check_rates(self) -> None:
        leaves, treedef = jax.tree_util.tree_flatten(self)
        dims = self.leaf_event_dims()
        one = jax.tree_util.tree_unflatten(
            treedef,
            [
                jax.ShapeDtypeStruct(jnp.shape(a)[jnp.ndim(a) - dim :], jnp.result_type(a))
                for a, dim in zip(leaves, dims, strict=True)
            ],
        )
        try:
            out = jax.eval_shape(lambda chain: jnp.asarray(chain._call()), one)
        except (TypeError, ValueError, IndexError) as error:
            hint = self.parameters.batch_hint
            if not hint:
                raise
            raise ValueError(f"rates fails on the parameters of one process: {error}{hint}") from (
                error
            )
        if out.shape != self._rate_shape:
            raise ValueError(self._shape_error(out.shape))
        if self.batch_shape or any(isinstance(a, jax.core.Tracer) for a in leaves):
            values = leaves[0] if self.rates.function is _given else None
        else:
            with jax.ensure_compile_time_eval():  # known inside a trace, too
                values = self._call()
        if values is None or isinstance(values, jax.core.Tracer):
            return
        array = np.asarray(values)
        if self.edges is None:
            array = np.where(np.eye(self.num_states, dtype=bool), 0.0, array)
        if not np.all(np.isfinite(array)) or np.any(array < 0.0):
            worst = array[~np.isfinite(array) | (array < 0.0)].ravel()[0]
            raise ValueError(f"rates must be finite and not negative, got {worst}")

    def _call(self) -> Any:
        if self.rates.function is _given:
            return self.params["rates"]
        return self.rates() if self.params is None else self.rates(self.params)

    @property
    def params(self) -> Any:
        """The parameters, in the structure in which they were given."""
        return self.parameters.tree

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Batch shape of the parameters."""
        return self.parameters.batch_shape

    def leaf_event_dims(self) -> list[int]:
        """Event dimensions of each array leaf of this object, in flattening order."""
        leaves = jax.tree_util.tree_leaves(self)
        dims = list(self.parameters.event_dims)
        return dims + [jnp.ndim(leaf) for leaf in leaves[len(dims) :]]

    @property
    def rates_at(self) -> Array:
        """Rates of one process, `(n, n)` or `(E,)`; NaN where one is no rate."""
        values = jnp.asarray(self._call())
        values = values.astype(jnp.result_type(values, float))
        if self.edges is None:
            values = jnp.where(jnp.eye(self.num_states, dtype=bool), 0.0, values)
        valid = jnp.all((values >= 0.0) & jnp.isfinite(values))
        return jnp.where(valid, values, jnp.nan)

    @property
    def generator(self) -> Float[Array, "n n"]:
        """Generator of one process: rates off the diagonal, rows summing to 0."""
        values = self.rates_at
        if self.edges is not None:
            source, target = self.edge_arrays
            n = self.num_states
            values = jnp.zeros((n, n), values.dtype).at[source, target].set(values)
        return generators.generator_matrix(values)

    @property
    def edge_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """States that each edge leaves and enters; all pairs where none were given."""
        if self.edges is None:
            n = self.num_states
            source, target = np.divmod(np.arange(n * n), n)
            keep = source != target
            return source[keep], target[keep]
        pairs = np.array(self.edges, int).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    @property
    def num_terms(self) -> int:
        """Terms of the series for a transition: more than the jumps that may separate states."""
        return 64 if self.edges is None else _num_terms(self.edges, self.num_states)

    @property
    def matrix_free(self) -> bool:
        """Whether probabilities are moved along the edges rather than by matrices."""
        return self.edges is not None and self.num_states > MAX_MATRIX

    def is_reducible(self) -> bool:
        """Whether the host can tell that some state is never reached from another."""
        leaves = jax.tree_util.tree_leaves(self)
        known = not self.batch_shape and not any(isinstance(a, jax.core.Tracer) for a in leaves)
        source, target = self.edge_arrays
        if known:
            with jax.ensure_compile_time_eval():  # known inside a trace, too
                rates = self.rates_at
            if not isinstance(rates, jax.core.Tracer):
                known_rates = np.asarray(rates)
                if self.edges is None:
                    known_rates = known_rates[source, target]
                source, target = source[known_rates > 0.0], target[known_rates > 0.0]
        return not generators.is_irreducible(source, target, self.num_states)

    def transition_matrix(self, t: ArrayLike) -> Float[Array, "*t n n"]:
        """Probabilities of the states after times `t`, one process: `exp(Q t)`.

        Args:
            t: lengths of time, any shape.
        """
        t = jnp.asarray(t, jnp.result_type(float))
        if self.matrix_free:
            one = np.eye(self.num_states)
            rates, (source, target) = self.rates_at, self.edge_arrays

            def row(v: Array, t: Array) -> Array:
                return propagate(source, target, rates, v, t, num_terms=self.num_terms)

            P = jax.vmap(jax.vmap(row, (0, None)), (None, 0))(jnp.asarray(one), t.reshape(-1))
        else:
            P = transition_matrices(self.generator, t.reshape(-1), num_terms=self.num_terms)
        return P.reshape(*t.shape, self.num_states, self.num_states)

    def transitions(self, gaps: Any) -> Float[Array, "G n n"]:
        """Transition matrices over the gaps of a clock, of one process."""
        return transition_matrices_on(self.generator, gaps, num_terms=self.num_terms)

    def stationary_law(self) -> Float[Array, " n"]:
        """Probabilities that the process keeps; NaN where it is reducible."""
        return generators.stationary_law(self.generator)

    def entropy_production(self) -> Float[Array, ""]:
        """Entropy produced per unit time in the stationary state, in nats."""
        return generators.entropy_production(self.generator)

    def mean_first_passage_times(self, targets: ArrayLike) -> Float[Array, " n"]:
        """Mean time from each state until first in one of `targets`."""
        return generators.mean_first_passage_times(self.generator, targets)


@lru_cache(maxsize=64)
def _num_terms(edges: tuple[tuple[int, int], ...], num_states: int) -> int:
    source, target = np.array(edges, int).reshape(-1, 2).T
    needed = generators.most_jumps(source, target, num_states) + 32
    return max(64, 32 * ((needed + 31) // 32))


def _given() -> None:
    """Stand for rates that are an array: `MarkovJumpProcess` takes them from its parameters."""


def _rate_function(rates: Callable[..., Any], arguments: str) -> Code:
    if arguments:
        return as_function(rates, "rates", "p", {})
    code = Code(rates)
    try:
        jax.eval_shape(rates)
    except TypeError as error:
        raise TypeError(
            f"rates must be a function of no argument because params was not given: {error}"
        ) from error
    return code


def _edges(edges: Any, num_states: int) -> tuple[tuple[int, int], ...]:
    array = np.asarray(edges)
    if array.ndim != 2 or array.shape[-1] != 2 or array.dtype.kind not in "iu":
        raise ValueError(
            f"edges must be pairs (i, j) of states, got an array of shape {array.shape} and dtype "
            f"{array.dtype}"
        )
    if array.min() < 0 or array.max() >= num_states:
        raise ValueError(
            f"edges must join states in 0..{num_states - 1}, got {array.min()}..{array.max()}"
        )
    pairs = [(int(i), int(j)) for i, j in array]
    loops = [pair for pair in pairs if pair[0] == pair[1]]
    if loops:
        raise ValueError(f"edges must join different states, got {loops[0]}")
    if len(set(pairs)) < len(pairs):
        repeated = next(p for p in pairs if pairs.count(p) > 1)
        raise ValueError(f"edges must be distinct, got {repeated} more than once")
    return cast("tuple[tuple[int, int], ...]", tuple(pairs))
