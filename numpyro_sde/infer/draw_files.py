"""A run of chains in a folder: draws in files that grow no more, and the state to go on from.

Each site has one `.npy` file `(chain, draw, ...)`, made at the start and filled as draws come, so
that draws need not fit in memory. The state is written last, beside its place and moved there: it
says how far the draws are good. What a killed process wrote behind it is written again, the same.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_STATE, _NAMES = "state.pkl", "draws.json"


class Progressed(NamedTuple):
    """How far each chain, or all at once, has come.

    Attributes:
        iterations: for each lane of chains, iterations done, those of the warm-up included.
        states: for each lane the kernel's state, None where it has not begun.
        mark: what tells this run from others.
    """

    iterations: list[int]
    states: list[Any]
    mark: dict[str, Any]


class _Key(NamedTuple):
    """A random key of the new kind, as numbers."""

    data: np.ndarray
    impl: str


def on_host(state: Any) -> Any:
    """A kernel's state as arrays of NumPy.

    Example:
        >>> on_host({"key": jax.random.key(0), "x": jnp.ones(2)})["x"]
        array([1., 1.], dtype=float32)
    """

    def one(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return _Key(np.asarray(jax.random.key_data(leaf)), str(jax.random.key_impl(leaf)))
        return np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf

    return jax.tree.map(one, state)


def on_device(state: Any) -> Any:
    """Undo `on_host`."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, _Key):
            return jax.random.wrap_key_data(jnp.asarray(leaf.data), impl=leaf.impl)
        return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf

    return jax.tree.map(one, state, is_leaf=lambda leaf: isinstance(leaf, _Key))


class RunFolder:
    """The folder of one run.

    Args:
        path: the folder, made where missing.

    Raises:
        ValueError: the path is a file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser().absolute()
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"path must be a folder, got the file {self.path}")
        self.path.mkdir(parents=True, exist_ok=True)
        self._files: list[np.memmap[Any, Any]] = []

    def load(self, mark: dict[str, Any], lanes: int) -> Progressed:
        """How far the run is; nothing done where the folder is new.

        Raises:
            ValueError: the folder holds another run.
        """
        file = self.path / _STATE
        if not file.exists():
            return Progressed([0] * lanes, [None] * lanes, mark)
        with file.open("rb") as stream:
            known = Progressed(*pickle.load(stream))
        differs = sorted(k for k in {*mark, *known.mark} if known.mark.get(k) != mark.get(k))
        if differs:
            raise ValueError(
                f"path {str(self.path)!r} holds another run: it differs in {', '.join(differs)}. "
                "Take another folder, or delete this one"
            )
        return known._replace(states=[on_device(state) for state in known.states])

    def save(self, progressed: Progressed) -> None:
        """Put draws and state on disk; a process killed at any moment leaves a whole state."""
        for file in self._files:
            file.flush()
        host = progressed._replace(states=[on_host(state) for state in progressed.states])
        partly = self.path / (_STATE + ".part")
        with partly.open("wb") as stream:
            pickle.dump(tuple(host), stream)
            stream.flush()
            os.fsync(stream.fileno())
        partly.replace(self.path / _STATE)

    def open_draws(
        self, names: Sequence[str], shapes: Sequence[Any], chains: int, count: int
    ) -> list[np.memmap[Any, Any]]:
        """Files for `count` draws of each leaf, with what earlier runs left in them.

        Args:
            names: of the leaves, for whoever reads the folder.
            shapes: shape and dtype of one draw of each.
            chains: number of chains.
            count: draws of a chain.
        """
        self._files = []
        for number, leaf in enumerate(shapes):
            file = self.path / f"draws-{number:04d}.npy"
            shape = (chains, count, *leaf.shape)
            old = np.lib.format.open_memmap(file, mode="r+") if file.exists() else None
            if old is None or old.shape[1] < count:
                partly = file.with_name(file.name + ".part")
                new = np.lib.format.open_memmap(partly, mode="w+", dtype=leaf.dtype, shape=shape)
                if old is not None:
                    new[:, : old.shape[1]] = old
                new.flush()
                partly.replace(file)
                old = np.lib.format.open_memmap(file, mode="r+")
            self._files.append(old)
        table = {name: f"draws-{number:04d}.npy" for number, name in enumerate(names)}
        (self.path / _NAMES).write_text(json.dumps(table, indent=1))
        return self._files


def read_draws(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Draws of a run by the names of their leaves, `(chain, draw, ...)`, read as they are used.

    For a process that has not the model: what a `CheckpointedMCMC` has written so far. Draws
    behind the last checkpoint are zeros, or may change: `num_done` of the run tells how many
    are good.

    Args:
        path: the folder.

    Raises:
        FileNotFoundError: no run stands there.

    Example:
        >>> import tempfile, jax, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> folder = tempfile.mkdtemp()
        >>> mcmc = nsde.infer.CheckpointedMCMC(
        ...     numpyro.infer.NUTS(lambda: numpyro.sample("a", dist.Normal())), folder,
        ...     num_warmup=5, num_samples=5, progress_bar=False)
        >>> mcmc.run(jax.random.key(0))
        >>> nsde.infer.read_draws(folder)["z/a"].shape
        (1, 5)
    """
    folder = Path(path).expanduser().absolute()
    table = json.loads((folder / _NAMES).read_text())
    return {name: np.load(folder / file, mmap_mode="r") for name, file in table.items()}
