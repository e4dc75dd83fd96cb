"""One place where functions of one process are mapped over batch dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions.batch_util import promote_batch_shape
from numpyro.primitives import _PYRO_STACK, plate

from numpyro_sde.distributions.parts import (
    as_constant,
    elements_in_part,
    map_in_parts,
    number_of_groups,
)


def map_batch(
    fn: Callable[..., Any],
    batch_shape: tuple[int, ...],
    args: Sequence[Any],
    event_dims: Sequence[Any],
    at: Any = None,
    num_bytes: int | None = None,
) -> Any:
    """Map `fn`, written for unbatched arguments, over a batch shape.

    Leading dimensions of each leaf broadcast to `batch_shape`. A leaf that does not vary along
    a dimension is passed unmapped, so nothing is materialised.

    Args:
        fn: function of the unbatched arguments; returns a pytree of arrays.
        batch_shape: the batch shape of the result.
        args: pytrees, one for each argument of `fn`.
        event_dims: for each argument an int, or a list of ints for its leaves in order.
        at: indices, one for each batch dimension, of the one element to treat; None for all.
        num_bytes: what `fn` needs for one element, roughly; a long batch is then treated in parts
            (`distributions.parts`), so that memory does not grow with it. None: all at once.

    Returns:
        The result of `fn`, each leaf with `batch_shape` in front; without it for one element.
    """
    leaves: list[Any] = []
    dims: list[int] = []
    treedefs: list[Any] = []
    for arg, declared in zip(args, event_dims, strict=True):
        flat, treedef = jax.tree_util.tree_flatten(arg)
        treedefs.append(treedef)
        leaves += [_in_precision(leaf) for leaf in flat]
        dims += [declared] * len(flat) if isinstance(declared, int) else list(declared)
    if len(dims) != len(leaves):
        raise ValueError(f"got {len(dims)} event dimensions for {len(leaves)} leaves")

    def call(flat: Sequence[Any]) -> Any:
        unflattened, start = [], 0
        for treedef in treedefs:
            stop = start + treedef.num_leaves
            unflattened.append(jax.tree_util.tree_unflatten(treedef, flat[start:stop]))
            start = stop
        return fn(*unflattened)

    def recurse(shape: tuple[int, ...], flat: list[Any]) -> Any:
        if not shape:
            return call(flat)
        axes: list[int | None] = []
        reduced = []
        for leaf, dim in zip(flat, dims, strict=True):
            varies = jnp.ndim(leaf) - dim == len(shape)
            if varies and jnp.shape(leaf)[0] != shape[0]:
                leaf, varies = leaf[0], False  # broadcast from size 1
            if varies and not isinstance(leaf, jax.core.Tracer):
                leaf = as_constant(leaf)
            axes.append(0 if varies else None)
            reduced.append(leaf)
        if all(axis is None for axis in axes):
            inner = recurse(shape[1:], reduced)
            return jax.tree.map(lambda a: jnp.broadcast_to(a, (shape[0], *jnp.shape(a))), inner)
        inside = partial(_listed, recurse, shape[1:])
        most = elements_in_part(num_bytes, math.prod(shape[1:]))
        over_devices = num_bytes is not None and number_of_groups(shape[0]) > 1
        if shape[0] > most or over_devices:
            return map_in_parts(inside, shape[0], most, reduced, axes)
        return jax.vmap(inside, in_axes=tuple(axes))(*reduced)

    if at is not None:
        return call([_element(leaf, dim, at) for leaf, dim in zip(leaves, dims, strict=True)])
    return recurse(tuple(batch_shape), leaves)


def _listed(fn: Callable[..., Any], shape: tuple[int, ...], *flat: Any) -> Any:
    return fn(shape, list(flat))


def _in_precision(leaf: Any) -> Any:
    """A host array in the precision that JAX computes in.

    Its constants are not cast where a loop in a compiled function is batched (JAX 0.10).
    """
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind == "f":
        return leaf.astype(jax.dtypes.canonicalize_dtype(leaf.dtype), copy=False)
    return leaf


def _element(leaf: Any, event_dim: int, at: Sequence[Any]) -> Any:
    """One element of a leaf whose leading dimensions broadcast to the batch."""
    lead = jnp.shape(leaf)[: jnp.ndim(leaf) - event_dim]
    if not lead:
        return leaf
    own = at[len(at) - len(lead) :]
    index = tuple(0 if size == 1 else i for size, i in zip(lead, own, strict=True))
    return jnp.asarray(leaf)[index]


def leading_dims(tree: Any, event_dims: Sequence[int]) -> tuple[int, ...]:
    """Number of batch dimensions of each leaf."""
    leaves = jax.tree_util.tree_leaves(tree)
    return tuple(jnp.ndim(leaf) - dim for leaf, dim in zip(leaves, event_dims, strict=True))


def align_new_axes(
    tree: Any, event_dims: Sequence[int], lead_dims: Sequence[int], rank: int
) -> tuple[Any, tuple[int, ...]]:
    """Line up the axes that `vmap` put in front of the leaves of a law.

    A leaf of fewer batch dimensions than the law broadcasts against the law's last ones; an
    axis that a transformation added in front belongs before all of them, so unit axes go in
    between. Without them a parameter that varies over the new axis would be read as varying
    over a batch dimension, without an error where the sizes agree.

    Args:
        tree: pytree of arrays.
        event_dims: event dimensions of each leaf.
        lead_dims: batch dimensions that each leaf had when the law was made.
        rank: number of batch dimensions of the law when it was made.

    Returns:
        The tree, and its leaves' batch dimensions now.
    """
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    aligned = []
    for leaf, dim, lead in zip(leaves, event_dims, lead_dims, strict=True):
        new = jnp.ndim(leaf) - dim - lead
        unit = tuple(range(new, new + rank - lead)) if new > 0 else ()
        aligned.append(jnp.expand_dims(leaf, unit) if unit else leaf)
    return jax.tree_util.tree_unflatten(treedef, aligned), leading_dims(aligned, event_dims)


def promote_inner(law: dist.Distribution, rank: int) -> dist.Distribution:
    """Promote a law held by another of `rank` batch dimensions, aligning its new axes."""
    promoted = promote_batch_shape(law)
    new = len(promoted.batch_shape) - len(law.batch_shape)
    gap = rank - len(law.batch_shape)
    if new <= 0 or gap <= 0:
        return promoted
    aligned = jax.tree.map(lambda a: jnp.expand_dims(a, tuple(range(new, new + gap))), promoted)
    inner = aligned
    while isinstance(inner, dist.Distribution):
        shape = inner.batch_shape
        inner._batch_shape = (*shape[:new], *(1,) * gap, *shape[new:])
        inner = getattr(inner, "base_dist", None)
    return aligned


def undeclared_dims(own: tuple[int, ...], others: tuple[int, ...]) -> frozenset[int]:
    """Batch dimensions of parameters that neither a plate nor `others` has, in a model's run.

    Args:
        own: batch shape of the parameters.
        others: batch shape of all else.

    Returns:
        The dimensions, counted from the right; none outside of a model.
    """
    if not _PYRO_STACK:
        return frozenset()
    plates = {h.dim for h in _PYRO_STACK if isinstance(h, plate)}
    return frozenset(
        dim
        for dim in range(-len(own), 0)
        if own[dim] > 1 and dim not in plates and not (len(others) >= -dim and others[dim] > 1)
    )


def describe_batch(batch_shape: tuple[int, ...]) -> str:
    """Say in words what makes a law a batch; empty for one process outside every plate.

    A plate expands an unbatched law later, so its dimensions are not in the batch shape yet.
    """
    plates = [f"{h.name!r} of size {h.size}" for h in _PYRO_STACK if isinstance(h, plate)]
    if plates:
        return f"in plate {', '.join(plates)}"
    return f"in a law of batch shape {batch_shape}" if batch_shape else ""
