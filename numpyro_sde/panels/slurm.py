"""Slurm through submitit, as an executor like any other."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any


class SubmititExecutor(Executor):
    """Jobs of Slurm as a `concurrent.futures.Executor`, for `fit_panel`, `sbc` and `compare_fits`.

    A batch is a job (`batch_size=`): make it some minutes of work. Jobs need the folder, the Python
    environment and the module of the model on their machines. Not for many short tasks; there a
    Dask cluster of long-lived workers (`dask-jobqueue`) loses less to the queue.

    Args:
        folder: where submitit keeps its files, on a file system that all machines see.
        cluster: "slurm", "local" (processes of this machine) or None, whichever is there.
        poll: seconds between two looks at the jobs.
        parameters: of `submitit.AutoExecutor.update_parameters`: `timeout_min`, `cpus_per_task`,
            `mem_gb`, `slurm_partition`.

    Raises:
        ImportError: submitit is not installed.

    Example:
        >>> import numpyro_sde as nsde
        >>> def on_slurm(model, series):
        ...     with nsde.SubmititExecutor("jobs", timeout_min=60, mem_gb=4) as executor:
        ...         return nsde.fit_panel(model, series, executor=executor, batch_size=500)
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        cluster: str | None = None,
        poll: float = 1.0,
        **parameters: Any,
    ) -> None:
        try:
            import submitit
        except ImportError as error:
            raise ImportError(
                "SubmititExecutor needs submitit: pip install 'numpyro-sde[slurm]'"
            ) from error
        self._jobs: dict[Future[Any], Any] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._poll = poll
        self._inner = submitit.AutoExecutor(folder=os.fspath(folder), cluster=cluster)
        self._inner.update_parameters(**parameters)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Start a job."""
        if self._stopped.is_set():
            raise RuntimeError("cannot submit to an executor that is shut down")
        future: Future[Any] = Future()
        job = self._inner.submit(fn, *args, **kwargs)
        with self._lock:
            self._jobs[future] = job
        return future

    def _watch(self) -> None:
        while True:
            with self._lock:
                running = list(self._jobs.items())
            for future, job in running:
                if future.cancelled():
                    job.cancel()
                    future.set_running_or_notify_cancel()  # wakes who waits for it
                elif not job.done():
                    continue
                elif future.set_running_or_notify_cancel():
                    _settle(future, job)
                with self._lock:
                    self._jobs.pop(future, None)
            with self._lock:
                if self._stopped.is_set() and not self._jobs:
                    return
            time.sleep(self._poll)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work, and by default wait for what is running."""
        self._stopped.set()
        if cancel_futures:
            with self._lock:
                pending = list(self._jobs)
            for future in pending:
                future.cancel()
        if wait:
            self._watcher.join()


def _settle(future: Future[Any], job: Any) -> None:
    """Give a future what its job came to; a job that the cluster killed is an exception too."""
    try:
        future.set_result(job.result())
    except Exception as error:
        future.set_exception(error)
