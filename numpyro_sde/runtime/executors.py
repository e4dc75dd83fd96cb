"""Independent pieces of work on whatever runs them: this process, a pool, a cluster.

The one protocol is `concurrent.futures.Executor`, which process pools, Dask
(`Client.get_executor()`), mpi4py (`MPIPoolExecutor`) and `SubmititExecutor` speak. Work is pickled
once, by content; a process that meets it builds what it needs a single time, so that whatever
compiles does so once for each process, or comes from the compilation cache that the caller uses.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from contextlib import contextmanager
from functools import lru_cache, partial
from multiprocessing import get_context
from typing import Any, TypeVar

import jax

from numpyro_sde.runtime.cache import enable_compilation_cache

Batch = TypeVar("Batch")
Result = TypeVar("Result")
ExecutorLike = Executor | int | str | None

_IN_FLIGHT = 1024  # batches handed over and not back yet: enough for any cluster, bounded memory


def check_executor(executor: Any) -> None:
    """Raise where `executor=` is none of what is taken.

    Raises:
        ValueError: a number of processes below 1, or a string other than "processes".
        TypeError: anything else that is no executor.
    """
    if executor is None or hasattr(executor, "submit"):
        return
    if isinstance(executor, bool) or not isinstance(executor, int | str):
        raise TypeError(
            "executor must be None, 'processes', a number of processes or a "
            f"concurrent.futures.Executor, got {type(executor).__name__}"
        )
    if isinstance(executor, int) and executor < 1:
        raise ValueError(f"executor must be a positive number of processes, got {executor}")
    if isinstance(executor, str) and executor != "processes":
        raise ValueError(f"executor must be 'processes' where it is a string, got {executor!r}")


def pack(work: Any, what: str) -> bytes:
    """Pickle work, by cloudpickle where installed, which also takes notebooks' functions.

    With it goes where compiled programs are kept, and whether numbers have 64 bits.

    Args:
        work: anything.
        what: its parts, for the error.

    Raises:
        ValueError: a function that cannot be pickled.

    Example:
        >>> unpack(pack({"a": 1}, "work"))
        {'a': 1}
    """
    dumps = pickle.dumps
    with contextlib.suppress(ImportError):
        from cloudpickle import dumps  # type: ignore[no-redef]
    folder = getattr(jax.config, "jax_compilation_cache_dir", None)
    try:
        body = dumps(work)
    except Exception as error:
        raise ValueError(
            f"{what} must be picklable to run in other processes: define the functions at the top "
            "of a module (or install cloudpickle), or use executor=None. "
            f"{type(error).__name__}: {error}"
        ) from error
    return pickle.dumps((os.getpid(), folder, bool(jax.config.read("jax_enable_x64")), body))


def unpack(packed: bytes) -> Any:
    """Undo `pack`, in another process with the settings of the first."""
    owner, folder, x64, body = pickle.loads(packed)
    if owner != os.getpid():
        jax.config.update("jax_enable_x64", x64)
        if folder and folder != getattr(jax.config, "jax_compilation_cache_dir", None):
            enable_compilation_cache(folder)
    return pickle.loads(body)


@lru_cache(maxsize=4)
def unpacked_once(build: Callable[[Any], Any], packed: bytes) -> Any:
    """What `build` makes of packed work: once in a process, so that what it compiled lives on."""
    return build(unpack(packed))


@contextmanager
def running(
    executor: ExecutorLike,
    here: Callable[[Batch], Result],
    elsewhere: Callable[[], Callable[[Batch], Result]],
) -> Iterator[Callable[[Iterable[Batch]], Generator[Result]]]:
    """What turns batches of work into results, as they come.

    Args:
        executor: None is this process; "processes" or a number starts a pool of them, by "spawn";
            or any executor.
        here: treats a batch in this process, and in its threads.
        elsewhere: makes what treats a batch in another process, and pickles.
    """
    check_executor(executor)
    if executor is None:
        yield lambda batches: (here(batch) for batch in batches)
    elif isinstance(executor, ThreadPoolExecutor):
        yield partial(_submit, executor, here)
    elif isinstance(executor, str | int):
        # A forked copy of a process in which JAX has threads running may hang.
        workers = executor if isinstance(executor, int) else os.cpu_count()
        run = elsewhere()
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            yield partial(_submit, pool, run)
    else:
        yield partial(_submit, executor, elsewhere())


def _submit(
    pool: Executor, run: Callable[[Batch], Result], batches: Iterable[Batch]
) -> Generator[Result]:
    """Results in the order in which they come; closing cancels what is pending."""
    waiting = iter(batches)
    pending = {pool.submit(run, batch) for batch in itertools.islice(waiting, _IN_FLIGHT)}
    try:
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            pending |= {pool.submit(run, b) for b in itertools.islice(waiting, len(done))}
            for future in done:
                yield future.result()
    finally:
        for future in pending:
            future.cancel()


def in_batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Consecutive pieces of a sequence, `size` long, the last one perhaps shorter.

    Example:
        >>> in_batches([1, 2, 3], 2)
        [[1, 2], [3]]
    """
    return [items[k : k + size] for k in range(0, len(items), size)]


class Progress:
    """A line on standard error: how many are done, how many failed, how long the rest takes.

    Args:
        name: what is running.
        total: how many there are.
        first: how many were done before.
        shown: False says nothing.

    Example:
        >>> progress = Progress("sbc", total=3, first=0, shown=False)
        >>> progress.tell(done=1, failed=0)
    """

    def __init__(self, name: str, total: int, first: int, shown: bool) -> None:
        self.name, self.total, self.first, self.shown = name, total, first, shown
        self.start = time.perf_counter()

    def tell(self, done: int, failed: int) -> None:
        """Write the line anew."""
        if not self.shown:
            return
        seen = done + failed
        rate = (time.perf_counter() - self.start) / max(seen - self.first, 1)
        left = rate * max(self.total - seen, 0)
        text = f"\r{self.name}: {done} of {self.total} done, {failed} failed, {left:.0f} s left  "
        sys.stderr.write(text + ("\n" if seen >= self.total else ""))
        sys.stderr.flush()
