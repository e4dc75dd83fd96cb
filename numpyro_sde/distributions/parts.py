"""Long batches in parts, so that memory grows with the data and not with what is made of them.

A gradient over many series keeps arrays for every time of every series: some twenty times the
data. In parts, one after the other in one compiled loop, only the data and the result stay; a part
is computed again on the way back, a third more arithmetic, which costs less than moving what would
have been kept through memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

PART_BYTES = 2**25
"""What a part of a batch may need in memory: about what the caches of a processor hold."""

_FEWEST = 256  # elements at once: with fewer, loops over time are too short a work for each step
_LARGE = 2**16  # numbers of a constant that XLA should not try to fold


def part_bytes() -> int:
    """Memory that a part of a batch may need, from `NUMPYRO_SDE_PART_BYTES` where set.

    Raises:
        ValueError: the variable is no positive whole number.
    """
    text = os.environ.get("NUMPYRO_SDE_PART_BYTES")
    if text is None:
        return PART_BYTES
    if not text.isdigit() or int(text) < 1:
        raise ValueError(
            f"NUMPYRO_SDE_PART_BYTES must be a positive whole number of bytes, got {text!r}"
        )
    return int(text)


def elements_in_part(num_bytes: int | None, inner: int) -> int | float:
    """How many elements of a batch axis to treat at once.

    Args:
        num_bytes: what one element of the whole batch needs; None for no bound.
        inner: how many of these one element of the axis holds.

    Example:
        >>> elements_in_part(None, 5), elements_in_part(2**21, 2)
        (inf, 128)
    """
    if num_bytes is None:
        return math.inf
    share = part_bytes() // max(num_bytes * inner, 1)
    return max(_FEWEST // inner, share, 1) * jax.device_count()


def as_constant(leaf: np.ndarray | Array) -> Array:
    """An array that is known stays out of XLA's way: not folded into what is made of it."""
    # A batched array of NumPy as a constant of a root finder in a loop is an assertion error of
    # JAX 0.10.
    with jax.ensure_compile_time_eval():
        array = jnp.asarray(leaf)
    large = array.size > _LARGE and not jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return lax.optimization_barrier(array) if large else array


def map_in_parts(
    fn: Callable[..., Any],
    size: int,
    most: int | float,
    leaves: Sequence[Any],
    axes: Sequence[int | None],
) -> Any:
    """`jax.vmap(fn, axes)(*leaves)` over an axis of length `size`, at most `most` at once.

    On several devices each part takes its share of every device's elements, so that an axis that
    is sharded (`shard_panel`) stays where it is. What all elements share is first given to each
    device, so that a derivative is summed on each and over them once.

    Args:
        fn: function of one element's leaves.
        size: length of the mapped axis.
        most: elements to treat at once.
        leaves: arrays or constants.
        axes: 0 for a leaf that is mapped, None for one that is not.

    Returns:
        As `vmap` would have it.

    Example:
        >>> import jax.numpy as jnp
        >>> map_in_parts(lambda a, b: a * b, 5, 2, [jnp.arange(5), 3], [0, None]).tolist()
        [0, 3, 6, 9, 12]
    """
    groups = number_of_groups(size)
    own = -(-size // groups)  # elements of a device
    count = max(1, math.ceil(own * groups / most))
    width = -(-own // count)
    own = count * width
    shared = _Shared(leaves, axes, groups)

    def laid_out(leaf: Any) -> Array:
        """`(size, ...)` as `(count, groups, width, ...)`, the last element as filling."""
        leaf = jnp.asarray(leaf)
        lacking = own * groups - size
        if lacking:
            filling = jnp.broadcast_to(leaf[-1:], (lacking, *leaf.shape[1:]))
            leaf = jnp.concatenate([leaf, filling])
        parts = leaf.reshape(groups, count, width, *leaf.shape[1:])
        return jnp.swapaxes(parts, 0, 1)

    mapped = [laid_out(leaf) for leaf, axis in zip(leaves, axes, strict=True) if axis is not None]

    def part(now: list[Array]) -> Any:
        def of_group(packed: Array | None, own: list[Array]) -> Any:
            rest = iter(own)
            filled = [next(rest) if axis == 0 else leaf for leaf, axis in shared.with_(packed)]
            return jax.vmap(fn, in_axes=tuple(axes))(*filled)

        return jax.vmap(of_group)(shared.packed, now)

    if count == 1:
        out = jax.tree.map(lambda a: a[None], part([leaf[0] for leaf in mapped]))
    else:
        out = lax.map(jax.checkpoint(part, prevent_cse=False), mapped)

    def joined(leaf: Array) -> Array:
        whole = jnp.swapaxes(leaf, 0, 1).reshape(own * groups, *leaf.shape[3:])
        return whole if own * groups == size else whole[:size]

    return jax.tree.map(joined, out)


def number_of_groups(size: int) -> int:
    """Into how many shares an axis falls that may lie over devices.

    Example:
        >>> number_of_groups(jax.device_count()) == jax.device_count()
        True
    """
    devices = jax.device_count()
    return devices if size % devices == 0 else 1


class _Shared:
    """Leaves that do not vary over an axis; those that are differentiated, once for each group."""

    def __init__(self, leaves: Sequence[Any], axes: Sequence[int | None], groups: int) -> None:
        self.leaves, self.axes = list(leaves), list(axes)
        self.chosen = [
            k
            for k, (leaf, axis) in enumerate(zip(leaves, axes, strict=True))
            if groups > 1
            and axis is None
            and isinstance(leaf, jax.core.Tracer)
            and jnp.issubdtype(leaf.dtype, jnp.floating)
        ]
        self.packed: Array | None = None
        if self.chosen:
            flat = jnp.concatenate([jnp.ravel(self.leaves[k]) for k in self.chosen])
            self.packed = jnp.broadcast_to(flat[None], (groups, flat.size))

    def with_(self, packed: Array | None) -> list[tuple[Any, int | None]]:
        """Leaves and axes, those of the group out of its own copy."""
        leaves, start = list(self.leaves), 0
        for k in self.chosen:
            leaf = self.leaves[k]
            assert packed is not None
            leaves[k] = packed[start : start + leaf.size].reshape(leaf.shape).astype(leaf.dtype)
            start += leaf.size
        return list(zip(leaves, self.axes, strict=True))
