"""A fit of one model to each of many series, on any executor, kept on disk as they come."""

from __future__ import annotations

import os
import platform
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin

from numpyro_sde.diagnostics.compare.draws import complete_draws, read_fit
from numpyro_sde.grid import TimeGrid
from numpyro_sde.panels.chain import Chain, ChainDraws
from numpyro_sde.panels.store import FitStore, Fitted
from numpyro_sde.runtime.clock import Stopwatch
from numpyro_sde.runtime.executors import (
    ExecutorLike,
    Progress,
    check_executor,
    in_batches,
    pack,
    running,
    unpacked_once,
)

_HOPELESS = 5  # so many failures and no success: the function is wrong, not the series
_GUIDE_DRAWS = 1000


class _Work(NamedTuple):
    """What every worker needs; pickled once."""

    model: Callable[..., Any]
    fit: Callable[..., Any]
    key_data: np.ndarray
    key_impl: str
    x64: bool


class _Batch(NamedTuple):
    """Numbers of some series, and their data with a leading axis for them."""

    numbers: list[int]
    data: Any


class _Fitter:
    """Fits series; lives as long as its process, and so do the programs that it compiled."""

    def __init__(self, work: _Work) -> None:
        self.work = work

    def run(self, batch: _Batch) -> list[Fitted]:
        return [
            self._one(number, jax.tree.map(lambda a, k=k: a[k], batch.data))
            for k, number in enumerate(batch.numbers)
        ]

    def _one(self, number: int, data: Mapping[str, Any]) -> Fitted:
        work = self.work
        start, worker = time.perf_counter(), f"{platform.node()}:{os.getpid()}"
        with jax.enable_x64(work.x64), Stopwatch() as watch:
            try:
                key = jax.random.wrap_key_data(jnp.asarray(work.key_data), impl=work.key_impl)
                draws = self._draws(jax.random.fold_in(key, number), data)
                error = ""
            except Exception as problem:  # one bad series must not lose the others
                draws, error = {}, f"{type(problem).__name__}: {problem}"
        seconds = time.perf_counter() - start
        return Fitted(number, draws, error, seconds, worker, watch.programs)

    def _draws(self, key: PRNGKeyArray, data: Mapping[str, Any]) -> dict[str, np.ndarray]:
        fit_key, draw_key = jax.random.split(key)
        found = self.work.fit(fit_key, self.work.model, data)
        if isinstance(found, ChainDraws):
            draws = found.draws
        else:
            read = read_fit(found)
            if read.guide is not None:
                read = complete_draws(
                    read,
                    num_samples=_GUIDE_DRAWS,
                    rng_key=draw_key,
                    log_likelihood=False,
                    num_times=None,
                )
            draws = read.posterior
        for name, value in draws.items():
            if value.dtype.kind == "f" and value.size and not np.isfinite(value).any():
                raise FloatingPointError(f"no draw of {name!r} is finite")
        return {name: np.asarray(value) for name, value in draws.items()}


def _run_packed(packed: bytes, batch: _Batch) -> list[Fitted]:
    fits: list[Fitted] = unpacked_once(_Fitter, packed).run(batch)
    return fits


def _elsewhere(work: _Work) -> Callable[[_Batch], list[Fitted]]:
    return partial(_run_packed, pack(work, "model and fit"))


class PanelFits:
    """Fits of many series: from `fit_panel`. Draws stay on disk until they are asked for.

    Attributes:
        ids: identifiers of all series, those that failed included.
        failures: what went wrong, by identifier.

    Example:
        >>> import numpy as np, numpyro_sde as nsde
        >>> def fit(key, model, data):
        ...     return {"level": data["y"].mean() + np.zeros(10)}
        >>> fits = nsde.fit_panel(None, {"y": np.arange(6.0).reshape(3, 2)}, fit, progress=False)
        >>> len(fits), float(fits[2]["level"].mean()), fits.failures
        (3, 4.5, {})
    """

    def __init__(self, store: FitStore, ids: Sequence[Any]) -> None:
        self._store, self.ids = store, list(ids)
        self._number = {one: number for number, one in enumerate(self.ids)}
        self.failures = {self.ids[k]: text for k, text in sorted(store.failures.items())}

    def __len__(self) -> int:
        """Number of series that are fitted."""
        return len(self._store.done)

    def __getitem__(self, series: Any) -> dict[str, np.ndarray]:
        """Draws of one series by its identifier, `(chain, draw, ...)` for each site."""
        if series not in self._number:
            raise KeyError(f"no series {series!r}")
        try:
            return self._store.draws(self._number[series])
        except KeyError:
            reason = self.failures.get(series, "it was not run")
            raise KeyError(f"series {series!r} is not fitted: {reason}") from None

    def __iter__(self) -> Iterator[Any]:
        """Identifiers of the series that are fitted."""
        return iter([self.ids[number] for number in self._store.done])

    def items(self) -> Iterator[tuple[Any, dict[str, np.ndarray]]]:
        """Identifier and draws of each series, a file in memory at a time."""
        for numbers, draws in self._store.batches():
            for row, number in enumerate(numbers):
                yield self.ids[number], {name: value[row] for name, value in draws.items()}

    def draws(self, *names: str, thin: int = 1) -> dict[str, np.ndarray]:
        """Draws of all series that are fitted, chains joined: `(series, draw, ...)` for each site.

        Args:
            names: sites; none for all.
            thin: keep every so many draws.

        Raises:
            KeyError: a site that the fits have not.
        """
        found: dict[int, dict[str, np.ndarray]] = {}
        for numbers, draws in self._store.batches():
            if lost := [name for name in names if name not in draws]:
                raise KeyError(f"the fits have no {lost}, but {list(draws)}")
            for row, number in enumerate(numbers):
                found[number] = {
                    name: draws[name][row].reshape(-1, *draws[name].shape[3:])[::thin]
                    for name in (names or draws)
                }
        order = sorted(found)
        sites = found[order[0]] if order else {}
        return {name: np.stack([found[number][name] for number in order]) for name in sites}

    def summary(self, *names: str) -> dict[str, dict[str, np.ndarray]]:
        """For each site the `mean`, `sd`, `ess` and `rhat` of every fitted series, `(series, ...)`.

        Args:
            names: sites; none for all.
        """
        parts: dict[str, list[dict[str, np.ndarray]]] = {}
        order: list[int] = []
        for numbers, draws in self._store.batches():
            order += numbers
            for name in names or draws:
                parts.setdefault(name, []).append(_summary(draws[name]))
        place = np.argsort(order)
        return {
            name: {
                what: np.concatenate([part[what] for part in of_site])[place] for what in of_site[0]
            }
            for name, of_site in parts.items()
        }

    @property
    def seconds(self) -> dict[Any, float]:
        """Wall time of each fit, by identifier."""
        return {self.ids[k]: told[0] for k, told in sorted(self._store.told.items())}

    @property
    def programs(self) -> dict[str, int]:
        """Programs compiled (or taken from the compilation cache) by each worker."""
        total: dict[str, int] = {}
        for _, worker, programs in self._store.told.values():
            total[worker] = total.get(worker, 0) + programs
        return total

    def __repr__(self) -> str:
        failed = f", {len(self.failures)} failed" if self.failures else ""
        return f"PanelFits({len(self)} of {len(self.ids)} series{failed})"


def _summary(draws: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of draws `(series, chain, draw, ...)`."""
    chains = np.moveaxis(np.asarray(draws, np.float64), 0, 2)  # (chain, draw, series, ...)
    enough = chains.shape[1] >= 4
    nothing = np.full(chains.shape[2:], np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "mean": chains.mean((0, 1)),
            "sd": chains.std((0, 1)),
            "ess": effective_sample_size(chains) if enough else nothing,
            "rhat": split_gelman_rubin(chains) if enough else nothing,
        }


def fit_panel(
    model: Callable[..., Any] | None,
    series: Mapping[str, Any],
    fit: Callable[..., Any] | None = None,
    *,
    executor: ExecutorLike = None,
    path: str | os.PathLike[str] | None = None,
    ids: Sequence[Any] | None = None,
    rng_key: PRNGKeyArray | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> PanelFits:
    """Fit a model to each of many series by itself.

    For series that share nothing, and for the first stage of a population (`two_stage`). Each
    worker compiles once, because all series have one shape (`data.pad_series`, `data.from_long`);
    `enable_compilation_cache()` before the call makes the workers share what they compile. A
    series that fails is reported and the others are kept. Not for one posterior of all series: put
    them into a plate of one model, over devices by `shard_panel`.

    Args:
        model: the model of one series; its keyword arguments are the names in `series`.
        series: for each argument an array with a leading axis for the series, a `TimeGrid` of
            panel times, or a pytree of arrays.
        fit: function of a key, the model and the data of one series (a dictionary), that returns
            a dictionary of draws `(draw, ...)` or anything that `to_arviz` takes. None is
            `Chain()`: NUTS, 500 and 500 iterations. It pickles if it stands at the top of a module.
        executor: None runs in this process; `"processes"` or a number starts so many processes (by
            "spawn": call from under `if __name__ == "__main__":` in a script). Any
            `concurrent.futures.Executor` serves as well: Dask's `Client.get_executor()`, mpi4py's
            `MPIPoolExecutor`, `SubmititExecutor` for Slurm.
        path: a folder that keeps the draws as they come. A run with the same arguments goes on
            from what stands there, and tries failed series again. It cannot tell whether `model`
            or `fit` have changed: then take another folder.
        ids: identifiers of the series; None for their numbers.
        rng_key: None is `jax.random.key(0)`. Each series has a key of its own by its number, so
            that draws depend neither on the executor nor on `batch_size`.
        batch_size: series handed to a worker at a time, and between two savings.
        progress: show a line of progress on standard error.

    Returns:
        A `PanelFits`.

    Raises:
        ValueError: no series, arrays that disagree in their number, identifiers that are not
            unique, a folder of another run, or functions that cannot be pickled.
        TypeError: an executor of no known kind.
        RuntimeError: all of the first series fail.

    Warns:
        UserWarning: series failed.

    Example:
        >>> import numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model(times, y):
        ...     rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
        ...     ou = nsde.processes.OrnsteinUhlenbeck(rate, 0.0, 1.0)
        ...     x = numpyro.sample("x", nsde.SDEPath(ou, times, init=dist.Normal(0.0, 1.0)))
        ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)
        >>> marginal = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())
        >>> clocks = nsde.TimeGrid(np.cumsum(np.ones((3, 5)), axis=1))
        >>> fits = nsde.fit_panel(
        ...     marginal, {"times": clocks, "y": np.zeros((3, 5))},
        ...     nsde.Chain(num_warmup=10, num_samples=20), progress=False,
        ... )
        >>> fits.draws("rate")["rate"].shape
        (3, 20)
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    check_executor(executor)
    data, count = _checked_series(series)
    names = list(range(count)) if ids is None else [_plain(one) for one in ids]
    if len(names) != count or len(set(names)) != count:
        raise ValueError(f"ids must name each of the {count} series once, got {len(set(names))}")
    key = jax.random.key(0) if rng_key is None else rng_key
    if not jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    work = _Work(
        model=model,  # type: ignore[arg-type]
        fit=Chain() if fit is None else fit,
        key_data=np.asarray(jax.random.key_data(key)),
        key_impl=str(jax.random.key_impl(key)),
        x64=jnp.result_type(float) == jnp.float64,
    )
    store = FitStore(path, _mark(work, data, count))
    known = {*store.done}
    todo = [number for number in range(count) if number not in known]
    batches = (
        _Batch(list(numbers), jax.tree.map(lambda a, n=numbers: a[np.asarray(n)], data))
        for numbers in in_batches(todo, batch_size)
    )
    told = Progress("fit_panel", count, len(known), progress)
    elsewhere = partial(_elsewhere, work)
    # Closing cancels what is pending, also on an error or an interrupt.
    with (
        running(executor, _Fitter(work).run, elsewhere) as submit,
        closing(submit(batches)) as results,
    ):
        for fits in results:
            store.add(fits)
            if not store.done and len(store.failures) >= min(_HOPELESS, count):
                number, text = next(iter(store.failures.items()))
                raise RuntimeError(
                    f"all of the first series failed, the first ({names[number]}): {text}"
                )
            told.tell(len(store.done), len(store.failures))
    result = PanelFits(store, names)
    if result.failures:
        first, text = next(iter(result.failures.items()))
        warnings.warn(
            f"fit_panel: {len(result.failures)} of {count} series failed; the first ({first}): "
            f"{text}",
            stacklevel=2,
        )
    return result


def _plain(one: Any) -> Any:
    return one.item() if isinstance(one, np.generic) else one


def _checked_series(series: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The data on the host, and the number of series."""
    if not isinstance(series, Mapping):
        raise TypeError(
            "series must be a dictionary of the model's arguments, each with a leading axis for "
            f"the series, as {{'times': panel.times, 'y': panel.values}}; got "
            f"{type(series).__name__}"
        )
    data = {name: jax.tree.map(np.asarray, value) for name, value in series.items()}
    sizes: dict[str, set[int]] = {}
    for name, value in data.items():
        if isinstance(value, TimeGrid) and np.ndim(value.times) == 1:
            raise ValueError(
                f"series[{name!r}] is a TimeGrid of one clock: give times of shape (series, T)"
            )
        leaves = jax.tree_util.tree_leaves(value)
        sizes[name] = {np.shape(leaf)[0] if np.ndim(leaf) else 0 for leaf in leaves}
    counts = set().union(*sizes.values()) if sizes else set()
    if len(counts) != 1 or 0 in counts:
        shown = {name: sorted(size) for name, size in sizes.items()}
        raise ValueError(
            f"series must hold arrays of one leading length, the number of series; got {shown}"
        )
    return data, counts.pop()


def _mark(work: _Work, data: Any, count: int) -> dict[str, Any]:
    """What tells this run from others."""
    digest = 0
    for leaf in jax.tree_util.tree_leaves(data):
        digest = zlib.crc32(np.ascontiguousarray(leaf).view(np.uint8).data, digest)
    return {
        "num_series": count,
        "arguments": sorted(data),
        "data": digest,
        "rng_key": work.key_data.tolist(),
        "float64": bool(work.x64),
    }
