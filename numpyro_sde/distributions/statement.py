"""One observation statement on a path, bound to times of it: data, emission, and what weighs it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array
from numpyro.distributions.batch_util import promote_batch_shape

from numpyro_sde.checks.closures import refuse_closures
from numpyro_sde.distributions.batching import describe_batch, map_batch
from numpyro_sde.distributions.missing import log_prob_of_present
from numpyro_sde.distributions.moments import mean_and_cov
from numpyro_sde.distributions.observation import Emission, EmissionStructure
from numpyro_sde.linear.rows import put_rows
from numpyro_sde.linear.small import cholesky, diagonal
from numpyro_sde.statespace.model import Instrument
from numpyro_sde.statespace.updates import LOG_2PI


class Rows:
    """Indices into a path, hashable so that they can be static."""

    def __init__(self, index: Any) -> None:
        self.index = np.asarray(index, dtype=np.int64)
        self._key = self.index.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __len__(self) -> int:
        return int(self.index.size)


class Statement(eqx.Module):
    """One observation statement on a path.

    Its data have shape `(*lead, *replicates, K, *observation)`, `lead` the batch of paths:
    replicates are several instruments of one path, stacked as components of one emission.

    Attributes:
        emission: the observation law at one time; leaves `(*batch, *replicates, *event)`.
        power: power that the likelihood is raised to (`handlers.scale`), `(*batch, *replicates)`;
            None for 1.
        view: what the model did to the path before it observed it, a `TimewiseMap`; None for
            nothing.
        rows: times of the path that are observed.
        structure: what the emission returns at one time.
        replicates: shape of the instruments that observe one path alike.
    """

    emission: Emission
    power: Any
    view: Any
    rows: Rows = eqx.field(static=True)
    structure: EmissionStructure = eqx.field(static=True)
    replicates: tuple[int, ...] = eqx.field(static=True)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of the data of one path, `(*replicates, K, *observation)`."""
        return (*self.replicates, len(self.rows), *self.structure.shape)

    def leaf_event_dims(self) -> list[int]:
        """Event dimensions of each array leaf of this object, in flattening order."""
        more = len(self.replicates)
        num_fn = len(jax.tree_util.tree_leaves(self.emission.fn))
        dims = self.emission.leaf_event_dims()
        power = [] if self.power is None else [more]
        view = [] if self.view is None else self.view.leaf_event_dims()
        return [*dims[:num_fn], *(d + more for d in dims[num_fn:]), *power, *view]

    def moved(self, rows: Any) -> Statement:
        """The same statement at other indices of a path."""
        return Statement(
            self.emission, self.power, self.view, Rows(rows), self.structure, self.replicates
        )

    def instruments(self, times: Any, state_shape: tuple[int, ...], y: Array) -> list[Instrument]:
        """Lay unbatched data out on a path's grid.

        Times that occur twice in the statement go to separate instruments.
        """
        rounds: list[list[int]] = []
        seen: dict[int, int] = {}
        num_times = np.shape(times)[0]
        for position, row in enumerate(self.rows.index % num_times):
            turn = seen.get(int(row), 0)
            seen[int(row)] = turn + 1
            if turn == len(rounds):
                rounds.append([])
            rounds[turn].append(position)
        return [self._instrument(times, state_shape, y, np.asarray(r)) for r in rounds]

    def _instrument(
        self, times: Any, state_shape: tuple[int, ...], y: Array, take: np.ndarray
    ) -> Instrument:
        num_times, more = np.shape(times)[0], len(self.replicates)
        rows = self.rows.index[take] % num_times
        whole = rows.size == num_times and bool(np.all(np.diff(rows) > 0))

        def spread(a: Any) -> Any:
            """Values at the statement's times, `(*replicates, K, ...)`, on the grid, time first."""
            xp: Any = np if isinstance(a, np.ndarray) else jnp
            a = xp.moveaxis(a, more, 0)
            if len(take) != a.shape[0]:
                a = a[take]
            if whole:
                return a
            if isinstance(a, np.ndarray):
                out = np.zeros((num_times, *a.shape[1:]), a.dtype)
                out[rows] = a
                return out
            return put_rows(a, rows, num_times)

        # Data known before tracing stay on the host: filters then see that none is missing.
        xp: Any = np if isinstance(y, np.ndarray) else jnp
        floating = jnp.issubdtype(y.dtype, jnp.floating)
        known = ~xp.isnan(y) if floating else xp.ones(y.shape, bool)
        values = spread(xp.where(known, y, 0).astype(jnp.result_type(float)))
        present = spread(known)
        view = None
        if self.view is not None:
            view = self.view.on_grid(num_times)
        inputs = (jnp.asarray(times), jax.tree.map(spread, self.emission.inputs), view)
        return self._laid_out(inputs, values, present, np.sort(rows), state_shape)

    def _laid_out(
        self, inputs: Any, values: Any, present: Any, rows: np.ndarray, state_shape: tuple[int, ...]
    ) -> Instrument:
        shape, replicates = self.structure.shape, self.replicates
        num_times = values.shape[0]
        emission, power, view = self.emission, self.power, self.view
        input_dims = [d - 1 for d in emission.input_dims]

        def at(inputs: Any, x: Array, fn: Callable[..., Any], *arrays: Array) -> Any:
            """`fn(law, power, *arrays)` of each replicate's law at one time."""
            t, u, now = inputs
            state = x[0] if state_shape == () else x[: state_shape[0]]
            if view is not None:
                state = view.apply(state, now)

            def one(emission: Emission, u: Any, power: Any, *arrays: Array) -> Any:
                return fn(emission.at(t, state, u), power, *arrays)

            dims = (emission.leaf_event_dims(), input_dims, 0, *(len(shape) for _ in arrays))
            return map_batch(one, replicates, (emission, u, power, *arrays), dims)

        def moments(inputs: Any, x: Array) -> tuple[Array, Array]:
            def of_law(law: dist.Distribution, power: Any) -> tuple[Array, Array]:
                mean, cov = mean_and_cov(law, len(shape))
                return mean, cov if power is None else cov / power

            mean, cov = at(inputs, x, of_law)
            return (mean, cov) if not replicates else _stacked(mean, cov)

        def variances(inputs: Any, x: Array) -> tuple[Array, Array]:
            def of_law(law: dist.Distribution, power: Any) -> tuple[Array, Array]:
                mean, spread = (jnp.broadcast_to(a, shape) for a in (law.mean, law.variance))
                return mean, spread if power is None else spread / power

            mean, spread = at(inputs, x, of_law)
            return jnp.ravel(mean), jnp.ravel(spread)

        def log_prob(inputs: Any, x: Array, y: Array, present: Array) -> Array:
            def of_law(law: dist.Distribution, power: Any, y: Array) -> Array:
                value = log_prob_of_present(law, y)
                return value if power is None else power * value

            marked = jnp.where(present, y, jnp.nan).reshape((*replicates, *shape))
            return jnp.sum(at(inputs, x, of_law, marked))

        def law_of_all(inputs: Any, x: Array) -> dist.Distribution:
            """A batch of the replicates' laws."""
            law: dist.Distribution = at(inputs, x, _law)
            return promote_batch_shape(law) if replicates else law

        size = math.prod(replicates) * math.prod(shape)
        flat = (num_times, size)
        values, present = values.reshape(flat), present.reshape(flat)
        if power is not None:  # to the power of zero nothing is said
            count = values.shape[1] // max(math.prod(replicates), 1)
            said = jnp.broadcast_to(jnp.asarray(power), replicates).reshape(-1) > 0
            present = jnp.asarray(present) & jnp.repeat(said, count)[None]
        instrument = Instrument(
            inputs=inputs,
            values=values,
            present=present,
            moments=moments,
            log_prob=log_prob,
            gaussian=self.structure.gaussian,
            rows=rows,
            diagonal=self.structure.diagonal,
            exact=self.structure.exact,
            variances=variances if self.structure.diagonal and not self.structure.exact else None,
            has_moments=self.structure.has_moments,
            law=None if power is not None else law_of_all,
            powered=power is not None,
        )
        if power is None or not self.structure.gaussian:
            return instrument
        every = jnp.broadcast_to(jnp.asarray(power, jnp.result_type(float)), replicates).reshape(-1)
        every = jnp.repeat(every, values.shape[1] // every.size)
        return instrument._replace(log_scale=lambda x: _powers_of_normals(instrument, every, x))


def _law(law: dist.Distribution, _: Any) -> dist.Distribution:
    return law


def _stacked(mean: Array, cov: Array) -> tuple[Array, Array]:
    """Moments `(*replicates, p)` of independent replicates as those of one vector."""
    size = mean.shape[-1]
    blocks = cov.reshape(-1, size, size)
    count = blocks.shape[0]
    together = jnp.einsum("rij,rs->risj", blocks, jnp.eye(count, dtype=cov.dtype))
    return mean.reshape(-1), together.reshape(count * size, count * size)


def _powers_of_normals(instrument: Instrument, power: Array, x: Array) -> Array:
    """Log of `N(y; m, R)^s / N(y; m, R / s)` at each time, `(N,)`, R not depending on the state.

    The second factor is what filters compute with, given moments `m` and `R / s`.
    """

    def at(inputs: Any, present: Array) -> Array:
        _, cov = instrument.moments(inputs, x)
        scaled = cov * jnp.sqrt(power[:, None] * power[None, :])  # R again: blocks of equal power
        both = present[:, None] & present[None, :]
        L = cholesky(jnp.where(both, scaled, jnp.eye(power.shape[0], dtype=cov.dtype)))
        log_pivots = jnp.where(present, jnp.log(diagonal(L)), 0.0)
        ours = (1.0 - power) * (log_pivots + 0.5 * LOG_2PI) - 0.5 * jnp.log(power)
        return jnp.sum(jnp.where(present, ours, 0.0))

    return jax.vmap(at)(instrument.inputs, instrument.present)


def make_statement(
    emission: Emission, rows: Any, state_shape: tuple[int, ...], batch_shape: tuple[int, ...]
) -> Statement:
    """Check an emission and bind it to indices of a path."""
    refuse_closures(emission.fn.function, "emission", describe_batch(batch_shape))
    return Statement(emission, None, None, Rows(rows), emission.structure(state_shape), ())


def stack_replicates(
    statement: Statement, batch_shape: tuple[int, ...], lead: tuple[int, ...], power: Any = None
) -> tuple[Statement, Callable[[Any, int], Any], Callable[[tuple[int, ...]], tuple[int, ...]]]:
    """Tell the batch dimensions of a statement that are its path's from instruments of one path.

    Args:
        statement: a statement without replicates yet.
        batch_shape: batch shape of the whole statement, plates included.
        lead: batch shape of the path.
        power: power of the likelihood, broadcasting with `batch_shape`; None for 1.

    Returns:
        The statement with its replicates; what lays an array `(..., *batch, *event)` of
        `event_dim` event dimensions out as `(..., *lead, *replicates, *event)`; and what puts a 1
        in place of each replicate in a batch shape.
    """
    rank = len(batch_shape)
    padded = (0,) * (rank - len(lead)) + lead[max(len(lead) - rank, 0) :]
    axes = [
        axis
        for axis, (size, own) in enumerate(zip(batch_shape, padded, strict=True))
        if size > 1 and own != size
    ]
    replicates = tuple(batch_shape[axis] for axis in axes)

    def without(shape: tuple[int, ...]) -> tuple[int, ...]:
        extra = len(shape) - rank
        return tuple(1 if i - extra in axes else size for i, size in enumerate(shape))

    def lay_out(array: Any, event_dim: int) -> Any:
        if not axes:
            return array
        xp: Any = np if isinstance(array, np.ndarray) else jnp
        array = xp.asarray(array)
        missing = rank - (array.ndim - event_dim)
        array = array.reshape((1,) * max(missing, 0) + array.shape)
        extra = array.ndim - event_dim - rank
        source = [extra + axis for axis in axes]
        target = [array.ndim - event_dim - len(axes) + i for i in range(len(axes))]
        moved = xp.moveaxis(array, source, target)
        for axis in axes:
            moved = xp.expand_dims(moved, extra + axis)
        return moved

    leaves, treedef = jax.tree_util.tree_flatten(statement.emission)
    num_fn = len(jax.tree_util.tree_leaves(statement.emission.fn))
    laid = [
        leaf if i < num_fn else lay_out(leaf, dim)
        for i, (leaf, dim) in enumerate(
            zip(leaves, statement.emission.leaf_event_dims(), strict=True)
        )
    ]
    emission = jax.tree_util.tree_unflatten(treedef, laid)
    if power is not None:
        power = lay_out(
            jnp.broadcast_to(jnp.asarray(power, jnp.result_type(float)), batch_shape), 0
        )
    together = Statement(
        emission, power, statement.view, statement.rows, statement.structure, replicates
    )
    return together, lay_out, without


def with_lead(statement: Statement, y: Any, lead: tuple[int, ...]) -> tuple[Statement, Any]:
    """A statement and its data without the unit dimensions before the batch of the path.

    Where replicates were taken out of a batch of more dimensions than the path's, ones stand in
    their place.
    """

    def cut(array: Any, event_dim: int) -> Any:
        excess = np.ndim(array) - event_dim - len(lead)
        return array.reshape(np.shape(array)[excess:]) if excess > 0 else array

    leaves, treedef = jax.tree_util.tree_flatten(statement)
    dims = statement.leaf_event_dims()
    laid = [cut(leaf, dim) for leaf, dim in zip(leaves, dims, strict=True)]
    together = jax.tree_util.tree_unflatten(treedef, laid)
    return together, cut(y, len(statement.event_shape))


def broadcast_lead(y: Any, batch_shape: tuple[int, ...], event_dim: int) -> Any:
    """Data broadcast to the batch of their statement, where it has instruments of one path."""
    shape = np.shape(y)
    lead = jnp.broadcast_shapes(batch_shape, shape[: len(shape) - event_dim])
    xp: Any = np if isinstance(y, np.ndarray) else jnp
    return xp.broadcast_to(y, lead + shape[len(shape) - event_dim :])


def missing_where_masked(y: Any, mask: Any, batch_shape: tuple[int, ...], event_dim: int) -> Any:
    """Data with NaN for what a mask takes out."""
    if mask is True or (isinstance(mask, bool | np.bool_) and bool(mask)):
        return y if isinstance(y, np.ndarray) else jnp.asarray(y)
    on_host = isinstance(y, np.ndarray) and isinstance(mask, bool | np.ndarray | np.bool_)
    xp: Any = np if on_host else jnp
    keep = xp.broadcast_to(mask, jnp.broadcast_shapes(np.shape(mask), batch_shape))
    keep = xp.reshape(keep, np.shape(keep) + (1,) * event_dim)
    floats = xp.asarray(y, jnp.result_type(float, np.asarray(y).dtype if on_host else y))
    return xp.where(keep, floats, xp.asarray(np.nan, floats.dtype))
