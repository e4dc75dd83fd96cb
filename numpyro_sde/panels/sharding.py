"""Series over devices: one posterior of a panel, computed on all of them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_AXIS = "series"


def shard_panel(mesh: Mesh | int | None, *arrays: Any) -> Any:
    """Lay the series of a panel over devices.

    What is mapped over series then runs on each device for its own ones, and a gradient is summed
    over devices once. Hand the result to the model as arguments of a compiled function, for
    `MCMC` with `jit_model_args=True`; data that a model closes over are copied to all devices and
    nothing is gained. On a machine without accelerators
    `XLA_FLAGS=--xla_force_host_platform_device_count=8` makes 8 devices of its cores; over several
    machines, call `jax.distributed.initialize` first and give every process the same arrays: each
    keeps its own share. Not for series that share nothing: `fit_panel` fits those apart.

    Args:
        mesh: devices as a `jax.sharding.Mesh` whose axis "series", else its first axis, is that of
            the series; a number of devices; None for all of them.
        arrays: arrays with a leading axis for the series, a `TimeGrid` of panel times, or pytrees.

    Returns:
        The arrays in the same order, one alone as itself.

    Raises:
        ValueError: no arrays, leading lengths that differ, or a number of series that the devices
            do not divide.
        TypeError: a mesh of another type.

    Example:
        >>> import numpy as np, numpyro_sde as nsde
        >>> clocks = nsde.TimeGrid(np.cumsum(np.ones((4, 5)), axis=1))
        >>> clocks, y = nsde.shard_panel(1, clocks, np.zeros((4, 5)))
        >>> tuple(y.sharding.spec)
        ('series',)
    """
    mesh, axis = _mesh(mesh)
    if not arrays:
        raise ValueError("shard_panel needs at least one array")
    count = _number_of_series(arrays)
    devices = int(mesh.shape[axis])
    if count % devices:
        raise ValueError(
            f"{count} series do not divide over {devices} devices: leave {count % devices} out, "
            f"add {-count % devices} without data (NaN), or use {_divisor(count, devices)} devices"
        )
    sharding = NamedSharding(mesh, PartitionSpec(axis))

    def place(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype))
        # Each process makes what its own devices hold.
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    placed = tuple(jax.tree.map(place, array) for array in arrays)
    return placed[0] if len(placed) == 1 else placed


def _mesh(mesh: Mesh | int | None) -> tuple[Mesh, str]:
    """A mesh whose arrays XLA lays out by itself, and the axis of the series."""
    if mesh is None or (isinstance(mesh, int) and not isinstance(mesh, bool)):
        devices = jax.devices()
        number = len(devices) if mesh is None else mesh
        if not 1 <= number <= len(devices):
            raise ValueError(f"mesh asks for {number} devices, but there are {len(devices)}")
        return Mesh(np.array(devices[:number]), (_AXIS,)), _AXIS
    if not isinstance(mesh, Mesh):
        raise TypeError(
            "mesh must be a jax.sharding.Mesh, a number of devices or None, got "
            f"{type(mesh).__name__}"
        )
    axis = _AXIS if _AXIS in mesh.axis_names else mesh.axis_names[0]
    # `jax.make_mesh` may ask that sharding be said in every operation; here it is found by XLA.
    return Mesh(mesh.devices, mesh.axis_names), str(axis)


def _number_of_series(arrays: tuple[Any, ...]) -> int:
    leaves = jax.tree_util.tree_leaves(arrays)
    sizes = {np.shape(leaf)[0] if np.ndim(leaf) else 0 for leaf in leaves}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            "arrays must have one leading length, the number of series, got "
            f"{[np.shape(leaf) for leaf in leaves]}"
        )
    return int(sizes.pop())


def _divisor(count: int, most: int) -> int:
    return next(n for n in range(most, 0, -1) if count % n == 0)
