"""Simulation-based calibration: is an engine right on average over the prior?

Draw parameters and data from the model, fit the data, and rank the truth among the posterior
draws: if the computation is exact the ranks are uniform. Talts, Betancourt, Simpson, Vehtari and
Gelman (2018), arXiv:1804.06788; quantities that involve the data, Modrak, Moon, Kim, Buerkner,
Huurre, Faltejskova, Gelman and Vehtari (2025), Bayesian Analysis 20, 461-488; bands,
:mod:`numpyro_sde.diagnostics.calibration.uniformity`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from numpyro_sde.describe import html_text
from numpyro_sde.diagnostics.calibration.replicates import (
    Outcome,
    Recipe,
    Replicator,
    run_packed,
)
from numpyro_sde.diagnostics.calibration.uniformity import uniformity_p_value
from numpyro_sde.runtime.executors import ExecutorLike, Progress, in_batches, pack, running

_COLUMNS = ("pit", "truth", "mean", "sd", "num_kept")
_HOPELESS = 5  # so many failures and no success: the function is wrong, not the replicate
_FEW = 0.5  # of the draws a rank should count


@dataclass(frozen=True)
class SBCResult:
    """Ranks of true values among posterior draws; prints as a table.

    Attributes:
        names: The scalar quantities, length Q.
        pit: Where each truth lies among its posterior draws, `(N, Q)` over replicates without
            failure: (rank + uniform) / (number of draws + 1), uniform on [0, 1) if all is right.
        truth: True values, `(N, Q)`, in the quantities' units; so are the next two.
        mean: Posterior means.
        sd: Posterior standard deviations.
        num_kept: Draws that each rank counted, after thinning to the effective size.
        max_rank: Largest rank.
        replicates: Numbers of the replicates, `(N,)`.
        failures: What went wrong, by number of the replicate.
        level: Probability that a right computation is found wrong, over all quantities.

    Example:
        >>> import numpy as np
        >>> from numpyro_sde.diagnostics import SBCResult
        >>> pit = (np.arange(200)[:, None] + 0.5) / 200
        >>> ones = np.ones_like(pit)
        >>> result = SBCResult(("rate",), pit, ones, ones, ones, 63 * ones, 63, np.arange(200), {})
        >>> result.ok, int(result.ranks.max())
        (True, 63)
    """

    names: tuple[str, ...]
    pit: Float[np.ndarray, "N Q"]
    truth: Float[np.ndarray, "N Q"]
    mean: Float[np.ndarray, "N Q"]
    sd: Float[np.ndarray, "N Q"]
    num_kept: Float[np.ndarray, "N Q"]
    max_rank: int
    replicates: Int[np.ndarray, " N"]
    failures: Mapping[int, str]
    level: float = 0.05

    @property
    def ranks(self) -> Int[np.ndarray, "N Q"]:
        """Ranks from 0 to `max_rank`."""
        return np.minimum(self.pit * (self.max_rank + 1), self.max_rank).astype(int)

    @property
    def p_values(self) -> Float[np.ndarray, " Q"]:
        """Of uniform ranks, by the largest departure of their ECDF (exact law)."""
        return np.array([uniformity_p_value(rank, self.max_rank) for rank in self.ranks.T])

    @property
    def z_scores(self) -> Float[np.ndarray, "N Q"]:
        """(Posterior mean - truth) / posterior sd."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return (self.mean - self.truth) / self.sd

    @property
    def ok(self) -> bool:
        """Whether no quantity is out of its band, with Bonferroni's correction for their number.

        A replicate that failed is not counted here: look at `failures` first.
        """
        return bool(self.p_values.min() * len(self.names) >= self.level)

    def coverage(self, prob: float) -> Float[np.ndarray, " Q"]:
        """Share of replicates whose central interval of that probability holds the truth.

        Raises:
            ValueError: If `prob` lies outside (0, 1).
        """
        if not 0.0 < prob < 1.0:
            raise ValueError(f"prob must lie in (0, 1), got {prob}")
        return np.mean(np.abs(self.pit - 0.5) <= prob / 2, axis=0)

    def table(self) -> Any:
        """A pandas data frame with one row for each quantity.

        Columns: `p_value` of uniform ranks; `z_mean` and `z_sd`, mean and standard deviation of
        the z-scores; `coverage_50` and `coverage_90` of central intervals; `draws_ranked`, median
        over replicates.
        """
        import pandas as pd

        z = self.z_scores
        columns = {
            "p_value": self.p_values,
            "z_mean": z.mean(axis=0),
            "z_sd": z.std(axis=0, ddof=1),
            "coverage_50": self.coverage(0.5),
            "coverage_90": self.coverage(0.9),
            "draws_ranked": np.median(self.num_kept, axis=0),
        }
        return pd.DataFrame(columns, index=pd.Index(self.names, name="quantity"))

    def __repr__(self) -> str:  # what an interactive session shows
        return str(self)

    def _repr_html_(self) -> str:
        return html_text(str(self))

    def __str__(self) -> str:
        number = len(self.pit)
        bad = [
            name
            for name, p in zip(self.names, self.p_values, strict=True)
            if p * len(self.names) < self.level
        ]
        lines = [f"Simulation-based calibration, {number} replicates, ranks 0 to {self.max_rank}"]
        if self.failures:
            index, text = next(iter(self.failures.items()))
            lines.append(
                f"{len(self.failures)} REPLICATES FAILED and are not in these numbers, the first "
                f"({index}): {text}"
            )
        lines.append(self.table().to_string(float_format=lambda value: f"{value:.3g}"))
        if bad:
            lines.append(f"Not calibrated (level {self.level:g}): {', '.join(bad)}")
        else:
            lines.append(f"No departure from uniform ranks found (level {self.level:g})")
        return "\n".join(lines)

    def plot(self, names: Iterable[str] | None = None, axes: Any = None) -> list[Any]:
        """Rank histogram and ECDF difference of each quantity, with simultaneous bands.

        Args:
            names: Quantities to draw; None takes the first six.
            axes: Axes to draw on, two for each quantity; None makes a new figure.

        Returns:
            The list of `matplotlib.axes.Axes`.

        Raises:
            ValueError: If a name is unknown, or axes and panels differ in number.
            ImportError: If Matplotlib is not installed.
        """
        from numpyro_sde.diagnostics.compare.rank_plots import plot_ranks

        return plot_ranks(self, names, axes)


def sbc(
    model: Callable[..., Any],
    fit: Callable[[PRNGKeyArray, dict[str, Any]], Any],
    num_replicates: int = 200,
    *,
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    data: str | Sequence[str] | Mapping[str, str] | None = None,
    var_names: Iterable[str] | None = None,
    quantities: Mapping[str, Callable[..., Any]] | None = None,
    log_joint: bool = False,
    num_ranks: int = 63,
    num_path_times: int = 3,
    max_size: int = 50,
    independent: bool = False,
    num_samples: int = 1000,
    rng_key: PRNGKeyArray | None = None,
    executor: ExecutorLike = None,
    batch_size: int = 10,
    path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> SBCResult:
    """Simulation-based calibration of an engine: are its posteriors right on average?

    Each replicate draws parameters and data from the model, calls `fit` on the data, and ranks the
    true values among the posterior draws. Draws are thinned to the effective size of each quantity
    first. Replicates have keys of their own, so that the result does not hang on who runs them.

    It says nothing of the one data set that you have, and a test with N replicates sees only
    what changes ranks by some 1/sqrt(N). A posterior that ignores the data altogether passes for
    parameters: rank `log_joint`, or quantities of your own that involve the data, to see it.

    Args:
        model: The model, whose run draws from the prior: no `GuidedReparam` (let `fit` use it).
            `handlers.marginalize` is fine.
        fit: `fit(rng_key, data) -> draws`, where data are the simulated values by site, and
            draws a dictionary of arrays `(draw, ...)` or anything that `to_arviz` takes, such as
            an `MCMC` after `run`. Compile once: :func:`compiled_chain` for a kernel, or a jitted
            function of key and data of your own; `MCMC.run` compiles for seconds each time.
        num_replicates: Number N of replicates.
        model_args: Positional arguments of the model.
        model_kwargs: Its keyword arguments. With data among them, NaNs mark what is missing:
            they are put into the simulated data too.
        data: Names of the observation sites; or a mapping to the keyword arguments by which the
            model takes them (used by `log_joint`). None takes those observed in the model as
            called, each its own keyword.
        var_names: Sites to rank; None takes all latent sites that `fit` returns.
        quantities: Name to a function of `(values, data)`, dictionaries of one draw and of the
            data, that returns a scalar by JAX.
        log_joint: Rank the log joint density of latent sites and data too.
        num_ranks: Largest number of draws that a rank counts; ranks are 0 to this.
        num_path_times: A path is ranked at so many times, evenly spaced, the last among them.
        max_size: Of a larger site, an even choice of so many elements is ranked.
        independent: Draws are independent: do not thin.
        num_samples: Draws from a guide, where `fit` returns a variational fit.
        rng_key: None is `jax.random.key(0)`.
        executor: None runs in this process, the quickest where `fit` is one compiled function.
            `"processes"`, or a number of them, starts a process pool (by "spawn"; call from under
            `if __name__ == "__main__":` in a script). Any `concurrent.futures.Executor` serves
            as well: Dask's `Client.get_executor()`, mpi4py's `MPIPoolExecutor`.
        batch_size: Replicates handed to a worker at a time, and between two savings.
        path: A file (`.npz`) that keeps what is done: a run with the same arguments goes on from
            it, with more replicates if asked, and tries failed ones again. It cannot tell
            whether `model` or `fit` have changed: then take another file.
        progress: Show a line of progress on standard error.

    Raises:
        ValueError: If a count is not positive, a site unknown, the file belongs to another run, or
            functions cannot be pickled for an executor.
        TypeError: If `executor` is of no known kind.
        RuntimeError: If all of the first replicates fail.

    Warns:
        UserWarning: If replicates failed; if ranks count few draws.

    Source: see the module's description.

    Example:
        >>> import jax, numpy as np, numpyro, numpyro.distributions as dist
        >>> from numpyro_sde.diagnostics import sbc
        >>> def model(y=None):
        ...     a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(a, 1.0), obs=y)
        >>> def exact(key, data):
        ...     return {"a": data["y"] / 2 + np.sqrt(0.5) * jax.random.normal(key, (100,))}
        >>> result = sbc(model, exact, 100, data="y", independent=True, progress=False)
        >>> result.ok, result.names
        (True, ('a',))
    """
    counts = {
        "num_replicates": num_replicates,
        "num_ranks": num_ranks,
        "num_path_times": num_path_times,
        "max_size": max_size,
        "num_samples": num_samples,
        "batch_size": batch_size,
    }
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be positive, got {count}")
    if isinstance(data, str):
        data = [data]
    key = jax.random.key(0) if rng_key is None else rng_key
    if not jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    recipe = Recipe(
        model=model,
        model_args=tuple(model_args),
        model_kwargs=dict(model_kwargs or {}),
        fit=fit,
        data=dict(data) if isinstance(data, Mapping) else {name: name for name in data or ()},
        var_names=None if var_names is None else tuple(var_names),
        quantities=dict(quantities or {}),
        log_joint=log_joint,
        max_size=max_size,
        num_path_times=num_path_times,
        num_ranks=num_ranks,
        independent=independent,
        num_samples=num_samples,
        key_data=np.asarray(jax.random.key_data(key)),
        key_impl=str(jax.random.key_impl(key)),
        x64=jnp.result_type(float) == jnp.float64,
    )
    replicator = Replicator(recipe)
    store = _Store(path, recipe, replicator.labels)
    todo = [i for i in range(num_replicates) if i not in store.done]
    told = Progress("sbc", num_replicates, len(store.done), progress)
    elsewhere = partial(_elsewhere, recipe)
    # Closing cancels what is pending, also on an error or an interrupt.
    with (
        running(executor, replicator.run_all, elsewhere) as submit,
        closing(submit(in_batches(todo, batch_size))) as results,
    ):
        for outcomes in results:
            store.add(outcomes)
            store.refuse_hopeless(min(_HOPELESS, num_replicates))
            told.tell(len(store.done), len(store.failures))
    return _result(store, num_replicates, recipe)


class _Store:
    """Outcomes by replicate, in memory and on file."""

    def __init__(
        self, path: str | os.PathLike[str] | None, recipe: Recipe, names: tuple[str, ...]
    ) -> None:
        self.names = names
        self.done: dict[int, Outcome] = {}
        self.failures: dict[int, str] = {}
        self._path = None if path is None else Path(path)
        self._mark = repr((names, recipe.num_ranks, recipe.key_data.tolist(), recipe.x64))
        if self._path is not None and self._path.exists():
            self._load()

    def _load(self) -> None:
        assert self._path is not None
        with np.load(self._path, allow_pickle=False) as saved:
            if str(saved["mark"]) != self._mark:
                raise ValueError(
                    f"path {str(self._path)!r} holds replicates of another run (quantities, "
                    f"num_ranks, rng_key, float64): {saved['mark']}; this one is {self._mark}"
                )
            columns = {name: saved[name] for name in _COLUMNS}
            for k, index in enumerate(saved["index"].tolist()):
                row: dict[str, Any] = {name: column[k] for name, column in columns.items()}
                self.done[index] = Outcome(replicate=index, **row, error="")

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """Keep a batch, and write all to the file, which is whole at any moment."""
        for outcome in outcomes:
            if outcome.error:
                self.failures[outcome.replicate] = outcome.error
            else:
                self.done[outcome.replicate] = outcome
        if self._path is None or not self.done:
            return
        kept = [self.done[index] for index in sorted(self.done)]
        columns = _stack(kept)
        partly = self._path.with_name(self._path.name + ".part")
        with partly.open("wb") as file:
            np.savez(file, mark=self._mark, index=[o.replicate for o in kept], **columns)
        partly.replace(self._path)

    def refuse_hopeless(self, enough: int) -> None:
        """Raise where nothing has succeeded so far."""
        if not self.done and len(self.failures) >= enough:
            index, text = next(iter(self.failures.items()))
            raise RuntimeError(f"all of the first replicates failed, the first ({index}): {text}")


def _stack(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {name: np.stack([getattr(one, name) for one in outcomes]) for name in _COLUMNS}


def _elsewhere(recipe: Recipe) -> Callable[[Sequence[int]], list[Outcome]]:
    return partial(run_packed, pack(recipe, "model, fit and their arguments"))


def _result(store: _Store, num_replicates: int, recipe: Recipe) -> SBCResult:
    kept = [store.done[index] for index in sorted(store.done) if index < num_replicates]
    columns = _stack(kept)
    present = ~np.isnan(columns["pit"]).all(axis=0)  # a path that `fit` integrates out has none
    if not present.any():
        raise ValueError(f"fit returned draws of none of {list(store.names)}")
    columns = {name: value[:, present] for name, value in columns.items()}
    names = tuple(name for name, there in zip(store.names, present, strict=True) if there)
    failures = dict(sorted(store.failures.items()))
    if failures:
        index, text = next(iter(failures.items()))
        warnings.warn(
            f"sbc: {len(failures)} of {num_replicates} replicates failed and are left out, which "
            f"may hide the hard ones; the first ({index}): {text}",
            stacklevel=3,
        )
    few = np.median(columns["num_kept"], axis=0) < _FEW * recipe.num_ranks
    if few.any():
        poor = [name for name, is_few in zip(names, few, strict=True) if is_few]
        warnings.warn(
            f"sbc: ranks of {poor} count fewer than half of num_ranks={recipe.num_ranks} draws, "
            "because the chains' effective sizes are small: draw more, or expect a blunter test",
            stacklevel=3,
        )
    return SBCResult(
        names=names,
        **columns,
        max_rank=recipe.num_ranks,
        replicates=np.array([outcome.replicate for outcome in kept]),
        failures=failures,
    )
