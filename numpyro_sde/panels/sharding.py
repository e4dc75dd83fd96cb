"""Series and chains over devices: one posterior of a panel, computed on all of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray
from numpyro.infer.mcmc import MCMCKernel

_AXIS, _CHAIN = "series", "chain"


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


class ShardedChains(MCMCKernel):
    """A kernel whose chains run on different devices: see `shard_chains`.

    Example:
        >>> import jax, numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> from jax.sharding import Mesh
        >>> from numpyro.infer import NUTS
        >>> def model():
        ...     numpyro.sample("a", dist.Normal(0.0, 1.0))
        >>> mesh = Mesh(np.array(jax.devices()[:1]), ("chain",))
        >>> nsde.shard_chains(NUTS(model), mesh).sample_field
        'z'
    """

    def __init__(self, kernel: MCMCKernel, mesh: Mesh) -> None:
        self._kernel = kernel
        self._layout = NamedSharding(mesh, PartitionSpec(_CHAIN))
        self._devices = int(mesh.shape[_CHAIN])
        self._num_chains = 0

    def __getattr__(self, name: str) -> Any:
        # Looked up on the kernel: what a class of NumPyro's offers beyond the protocol.
        if name.startswith("__") or "_kernel" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._kernel, name)

    @property
    def model(self) -> Any:
        """The model of the kernel."""
        return self._kernel.model

    @property
    def sample_field(self) -> str:
        return str(self._kernel.sample_field)

    @property
    def default_fields(self) -> tuple[str, ...]:
        return tuple(self._kernel.default_fields)

    @property
    def is_ensemble_kernel(self) -> bool:
        return bool(self._kernel.is_ensemble_kernel)

    def get_diagnostics_str(self, state: Any) -> str:
        return str(self._kernel.get_diagnostics_str(state))

    def postprocess_fn(self, model_args: Any, model_kwargs: Any) -> Any:
        return self._kernel.postprocess_fn(model_args, model_kwargs)

    def get_constrain_fn(self, model_args: Any, model_kwargs: Any) -> Any:
        return self._kernel.get_constrain_fn(model_args, model_kwargs)

    def init(
        self,
        rng_key: PRNGKeyArray,
        num_warmup: int,
        init_params: Any,
        model_args: Any,
        model_kwargs: Any,
    ) -> Any:
        typed = jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key)
        lead = rng_key.shape if typed else rng_key.shape[:-1]
        if len(lead) != 1 or lead[0] % self._devices:
            raise ValueError(
                f"shard_chains lays chains over {self._devices} devices: give MCMC a multiple of "
                f"{self._devices} chains and chain_method='vectorized', got chains of shape {lead}"
            )
        self._num_chains = lead[0]
        state = self._kernel.init(rng_key, num_warmup, init_params, model_args, model_kwargs)
        return self._laid_out(state)

    def sample(self, state: Any, model_args: Any, model_kwargs: Any) -> Any:
        new = self._kernel.sample(self._laid_out(state), model_args, model_kwargs)
        return self._laid_out(new)

    def _laid_out(self, state: Any) -> Any:
        def lay(leaf: Any) -> Any:
            of_chains = jnp.ndim(leaf) > 0 and leaf.shape[0] == self._num_chains
            return lax.with_sharding_constraint(leaf, self._layout) if of_chains else leaf

        return jax.tree.map(lay, state)


def shard_chains(kernel: MCMCKernel, mesh: Mesh) -> ShardedChains:
    """Lay the chains of a kernel over the devices of a mesh, beside its series or without them.

    Each device then moves its own chains, on its own series where `shard_panel` has laid these over
    another axis of the same mesh: four devices do a quarter of the arithmetic each. Chains move in
    step, so that one with deep trees holds up the others: independent jobs
    (`chain_method="parallel"` with one device a chain and series undivided, or `fit_panel`) have
    no such limit.

    Args:
        kernel: any kernel that NumPyro runs with `chain_method="vectorized"`, which is to be given
            to `MCMC`, with a number of chains that the devices divide.
        mesh: devices, one axis of it named "chain".

    Returns:
        The kernel to hand to `MCMC`.

    Raises:
        TypeError: no kernel, or no mesh.
        ValueError: a mesh without an axis "chain"; when run, a number of chains that its devices do
            not divide.

    Example:
        >>> import jax, numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> from jax.sharding import Mesh
        >>> from numpyro.infer import MCMC, NUTS
        >>> def model():
        ...     numpyro.sample("a", dist.Normal(0.0, 1.0))
        >>> mesh = Mesh(np.array(jax.devices()[:1]), ("chain",))
        >>> mcmc = MCMC(nsde.shard_chains(NUTS(model), mesh), num_warmup=20, num_samples=10,
        ...             num_chains=2, chain_method="vectorized", progress_bar=False)
        >>> mcmc.run(jax.random.key(0))
        >>> tuple(mcmc.last_state.z["a"].sharding.spec)
        ('chain',)
    """
    if not isinstance(kernel, MCMCKernel):
        raise TypeError(f"kernel must be a kernel of numpyro.infer.MCMC, got {kernel!r}")
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}")
    if _CHAIN not in mesh.axis_names:
        raise ValueError(f"mesh must have an axis named {_CHAIN!r}, got axes {mesh.axis_names}")
    return ShardedChains(kernel, Mesh(mesh.devices, mesh.axis_names))
