"""MCMC of any kernel that may be killed: it goes on where it was, bit by bit the same.

The run is a loop of pieces of one compiled program: a number of iterations, its state in and out.
After a piece the draws go to files and then the state, so that a later process starts from the last
state and makes the draws that the first would have made.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PRNGKeyArray
from numpyro.infer import MCMC
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import is_prng_key
from tqdm.auto import tqdm

from numpyro_sde.infer.draw_files import Progressed, RunFolder

_TOGETHER = 64  # draws mapped to the support at once


class CheckpointedMCMC(MCMC):
    """`numpyro.infer.MCMC` that keeps draws and state in a folder and goes on after an end.

    For runs of hours, on machines that may stop, and for draws that outgrow memory. Run the same
    script again: what is done is not done again, and chains are the same, bit by bit, as without
    the stop (on the same machine and versions). With a larger `num_samples` a finished run goes on
    too. Any kernel serves, NumPyro's and those of `nsde.infer`; warm-up is kept as well. Not for
    short runs: compiling is the same, and files are written.

    Draws stand in files and are read as they are used (`get_samples` gives memory maps); `to_arviz`
    and `to_netcdf` take the run as any `MCMC`.

    Args:
        sampler: the kernel.
        path: the folder, made where missing; one for each run.
        num_warmup: warm-up iterations.
        num_samples: iterations after it.
        num_chains: chains.
        thinning: keep every so many iterations.
        chain_method: "sequential", one after the other, or "vectorized". For chains on several
            devices or machines give each a process, a key and a folder of its own.
        every: draws between two looks at the clock, the size of a piece.
        minutes: least time between two checkpoints; None makes one after each piece.
        postprocess_fn: as for `MCMC`.
        progress_bar: show it.
        jit_model_args: as for `MCMC`: the model's arguments are those of the compiled program, as
            large panels want it, instead of constants of it.

    Raises:
        ValueError: counts as for `MCMC`, another chain method, or a folder of another run.

    Example:
        >>> import tempfile, jax, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model(y):
        ...     a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(a, 1.0), obs=y)
        >>> folder = tempfile.mkdtemp()
        >>> def go(num_samples):
        ...     mcmc = nsde.infer.CheckpointedMCMC(
        ...         numpyro.infer.NUTS(model), folder, num_warmup=20, num_samples=num_samples,
        ...         every=10, progress_bar=False)
        ...     mcmc.run(jax.random.key(0), 0.5)
        ...     return mcmc.get_samples()["a"]
        >>> first = go(20)
        >>> longer = go(40)  # in another process, perhaps
        >>> len(longer), bool((longer[:20] == first).all())
        (40, True)
    """

    def __init__(
        self,
        sampler: MCMCKernel,
        path: str | os.PathLike[str],
        *,
        num_warmup: int,
        num_samples: int,
        num_chains: int = 1,
        thinning: int = 1,
        chain_method: str = "sequential",
        every: int = 100,
        minutes: float | None = None,
        postprocess_fn: Callable[..., Any] | None = None,
        progress_bar: bool = True,
        jit_model_args: bool = False,
    ) -> None:
        if chain_method not in ("sequential", "vectorized"):
            raise ValueError(
                f"chain_method must be 'sequential' or 'vectorized', got {chain_method!r}: for "
                "chains side by side give each a process, a key and a folder of its own"
            )
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every must be a positive number of draws, got {every!r}")
        if minutes is not None and not minutes >= 0:
            raise ValueError(f"minutes must not be negative, got {minutes!r}")
        super().__init__(
            sampler,
            num_warmup=num_warmup,
            num_samples=num_samples,
            num_chains=num_chains,
            thinning=thinning,
            postprocess_fn=postprocess_fn,
            chain_method=chain_method,
            progress_bar=progress_bar,
            jit_model_args=jit_model_args,
        )
        self.folder = RunFolder(path)
        self.every, self.minutes = every, minutes
        self._progressed = Progressed([0] * self._lanes, [None] * self._lanes, {})

    @property
    def num_done(self) -> list[int]:
        """Draws on disk of each chain, by the last checkpoint."""
        per_lane = 1 if self._lanes > 1 else self.num_chains
        done = self._progressed.iterations
        kept = [max(n - self.num_warmup, 0) // self.thinning for n in done]
        return [n for n in kept for _ in range(per_lane)]

    @property
    def _lanes(self) -> int:
        """How many states there are: one for each chain, or one of all."""
        return 1 if self.chain_method == "vectorized" else self.num_chains

    def warmup(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Refused: `run` keeps the warm-up too."""
        raise ValueError("CheckpointedMCMC has no warm-up of its own: call run, which keeps it too")

    def run(
        self,
        rng_key: PRNGKeyArray,
        *args: Any,
        extra_fields: Sequence[str] = (),
        init_params: Any = None,
        **kwargs: Any,
    ) -> None:
        """Run all chains to their ends, from where the folder says that they are.

        Args:
            rng_key: as for `MCMC.run`.
            args: arguments of the model.
            extra_fields: fields of the kernel's state to keep too.
            init_params: as for `MCMC.run`.
            kwargs: keyword arguments of the model.

        Raises:
            ValueError: the folder holds a run with another key, data, kernel or schedule; or
                `post_warmup_state` is set.
        """
        if self._warmup_state is not None:
            raise ValueError(
                "CheckpointedMCMC starts from its folder: leave post_warmup_state unset"
            )
        self._args, self._kwargs = args, kwargs
        keys = rng_key
        if self.num_chains > 1 and is_prng_key(rng_key):
            keys = jax.random.split(rng_key, self.num_chains)
        fields = tuple(dict.fromkeys((self._sample_field, *self._default_fields, *extra_fields)))
        self._progressed = self.folder.load(self._mark(keys, args, kwargs, fields), self._lanes)
        loop = _Loop(self, fields, args, kwargs)
        for lane in range(self._lanes):
            own_key, own_params = keys, init_params
            if self._lanes > 1:
                own_key = keys[lane]
                own_params = jax.tree.map(lambda a, k=lane: a[k], init_params)
            known = self._progressed.states[lane]
            if known is None or lane == 0:  # a kernel learns of the model when it is initialised
                start = self.sampler.init(own_key, self.num_warmup, own_params, args, kwargs)
                self._progressed.states[lane] = start if known is None else known
            if lane == 0:
                loop.prepare(start)
            self._run_lane(lane, loop)
        self._states = loop.files()
        self._states_flat = None
        states = self._progressed.states
        self._last_state = (
            states[0]
            if self._lanes == 1
            else jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(a) for a in leaves]), *states)
        )

    def _run_lane(self, lane: int, loop: _Loop) -> None:
        done, state = self._progressed.iterations[lane], self._progressed.states[lane]
        last = self.num_warmup + self.num_samples // self.thinning * self.thinning
        saved = time.monotonic()
        name = f"chain {lane + 1} of {self._lanes}" if self._lanes > 1 else "sample"
        bar = tqdm(total=last, initial=done, desc=name, disable=not self.progress_bar)
        while done < last:
            warm = done < self.num_warmup
            each = 1 if warm else self.thinning
            rows = min(self.every, (self.num_warmup - done) if warm else (last - done) // each)
            state, block = loop.advance(state, rows, each)
            if not warm:
                loop.keep(lane, (done - self.num_warmup) // self.thinning, rows, block)
            done += rows * each
            bar.update(rows * each)
            self._progressed.iterations[lane] = done
            self._progressed.states[lane] = state
            late = self.minutes is None or time.monotonic() - saved >= 60.0 * self.minutes
            if late or done >= last:
                self.folder.save(self._progressed)
                saved = time.monotonic()
        bar.close()

    def _get_states_flat(self) -> Any:
        # Views of the files: no copy in memory.
        if self._states_flat is None and self._states is not None:
            self._states_flat = jax.tree.map(
                lambda a: np.reshape(a, (a.shape[0] * a.shape[1], *a.shape[2:])), self._states
            )
        return self._states_flat

    def _mark(self, keys: Any, args: Any, kwargs: Any, fields: tuple[str, ...]) -> dict[str, Any]:
        """What tells this run from others; more draws are the same run."""
        if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
            keys = jax.random.key_data(keys)
        digest = 0
        for leaf in jax.tree_util.tree_leaves((args, kwargs)):
            if isinstance(leaf, np.ndarray | jax.Array | int | float):
                data = np.ascontiguousarray(np.asarray(leaf))
                digest = zlib.crc32(data.tobytes(), digest)
        return {
            "kernel": type(self.sampler).__name__,
            "rng_key": np.asarray(keys).tolist(),
            "data": digest,
            "fields": list(fields),
            "num_warmup": self.num_warmup,
            "num_chains": self.num_chains,
            "thinning": self.thinning,
            "chain_method": self.chain_method if self.num_chains > 1 else "sequential",
            "float64": jnp.result_type(float) == jnp.float64,
        }


class _Loop:
    """The two programs of a run, and the files of its draws."""

    def __init__(self, mcmc: CheckpointedMCMC, fields: tuple[str, ...], args: Any, kwargs: Any):
        self.mcmc, self.fields = mcmc, fields
        kernel, every = mcmc.sampler, mcmc.every

        def collect(state: Any) -> Any:
            return tuple(attrgetter(field)(state) for field in fields)

        def advance(state: Any, rows: Any, each: Any, args: Any, kwargs: Any) -> Any:
            shapes = jax.eval_shape(collect, state)
            buffers = jax.tree.map(lambda s: jnp.zeros((every, *s.shape), s.dtype), shapes)

            def row(k: Array, carry: Any) -> Any:
                state, buffers = carry
                state = lax.fori_loop(
                    0, each, lambda _, state: kernel.sample(state, args, kwargs), state
                )
                put = lambda buffer, value: buffer.at[k].set(value)  # noqa: E731
                return state, jax.tree.map(put, buffers, collect(state))

            return lax.fori_loop(0, rows, row, (state, buffers))

        def constrain(values: Any, args: Any, kwargs: Any) -> Any:
            one = mcmc.postprocess_fn or kernel.postprocess_fn(args, kwargs)
            if self.vectorized:
                one = jax.vmap(one)
            return lax.map(one, values, batch_size=_TOGETHER)

        if mcmc._jit_model_args:
            move, show = jax.jit(advance), jax.jit(constrain)
            self._advance = lambda s, rows, each: move(s, rows, each, args, kwargs)
            self._constrain = lambda values: show(values, args, kwargs)
        else:
            self._advance = jax.jit(lambda s, rows, each: advance(s, rows, each, args, kwargs))
            self._constrain = jax.jit(lambda values: constrain(values, args, kwargs))

    @property
    def vectorized(self) -> bool:
        """Whether a state holds all chains."""
        return self.mcmc.num_chains > 1 and self.mcmc.chain_method == "vectorized"

    def prepare(self, state: Any) -> None:
        """Open the files, once what a draw looks like is known."""
        mcmc = self.mcmc
        _, block = jax.eval_shape(self._advance, state, mcmc.every, 1)
        shapes = (jax.eval_shape(self._constrain, block[0]), *block[1:])
        skipped = 2 if self.vectorized else 1  # draws, and chains
        one = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape[skipped:], s.dtype), shapes)
        named, self._treedef = jax.tree_util.tree_flatten_with_path(
            dict(zip(self.fields, one, strict=True))
        )
        names = ["/".join(_part(key) for key in path) for path, _ in named]
        count = mcmc.num_samples // mcmc.thinning
        leaves = [leaf for _, leaf in named]
        self._files = mcmc.folder.open_draws(names, leaves, mcmc.num_chains, count)

    def advance(self, state: Any, rows: int, each: int) -> tuple[Any, Any]:
        """Rows of draws, an iteration or several each, from a state."""
        moved: tuple[Any, Any] = self._advance(state, rows, each)
        return moved

    def keep(self, lane: int, first: int, rows: int, block: Any) -> None:
        """Write the rows of a block to the files."""
        shown = dict(zip(self.fields, (self._constrain(block[0]), *block[1:]), strict=True))
        for file, leaf in zip(self._files, jax.tree_util.tree_leaves(shown), strict=True):
            values = np.asarray(leaf)[:rows]
            if self.vectorized:
                file[:, first : first + rows] = np.swapaxes(values, 0, 1)
            else:
                file[lane, first : first + rows] = values

    def files(self) -> Any:
        """All draws, as memory maps in the shape of the states."""
        count = self.mcmc.num_samples // self.mcmc.thinning
        return jax.tree_util.tree_unflatten(self._treedef, [f[:, :count] for f in self._files])


def _part(key: Any) -> str:
    for name in ("key", "idx", "name"):
        if hasattr(key, name):
            return str(getattr(key, name))
    return str(key)
