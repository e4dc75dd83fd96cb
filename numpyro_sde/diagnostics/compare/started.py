"""Fits that have not run yet: functions, started here or on an executor, as ArviZ groups."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_sde.diagnostics.compare.arviz_compat import is_tree
from numpyro_sde.diagnostics.compare.convert import to_arviz
from numpyro_sde.diagnostics.compare.timing import timed
from numpyro_sde.runtime.executors import ExecutorLike, check_executor, pack, running, unpack


def run_starts(
    fits: Mapping[str, Any], executor: ExecutorLike, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Fits with those that are functions run and converted; one that fails is left out.

    Args:
        fits: name to fit, or to a function without arguments that returns one.
        executor: as for `fit_panel`; used for the functions alone.
        options: keyword arguments of `to_arviz`.

    Raises:
        ValueError: every function failed, or one cannot be pickled.

    Warns:
        UserWarning: a function failed.

    Example:
        >>> import numpy as np
        >>> kept = run_starts({"a": {"x": np.zeros(9)}}, None, {})
        >>> list(kept)
        ['a']
    """
    check_executor(executor)
    starts = {name: fit for name, fit in fits.items() if callable(fit)}
    if not starts:
        return dict(fits)
    x64 = jnp.result_type(float) == jnp.float64
    works = [_Work(name, start, dict(options), x64) for name, start in starts.items()]
    found: dict[str, Any] = {}
    here: Callable[[Any], tuple[str, Any, str]] = _run
    handed: list[Any] = works
    if not (executor is None or isinstance(executor, ThreadPoolExecutor)):
        handed = [pack(work, "fits") for work in works]
    with running(executor, here, lambda: _run_packed) as submit:
        for name, tree, error in submit(handed):
            if error:
                warnings.warn(
                    f"compare_fits: fit {name!r} failed and is left out: {error}", stacklevel=3
                )
            else:
                found[name] = tree
    left = [name for name in fits if name not in starts or name in found]
    kept = {name: found.get(name, fits[name]) for name in left}
    if not kept:
        raise ValueError(f"every fit failed: {', '.join(starts)}")
    return kept


class _Work(NamedTuple):
    """One function, and how to convert what it returns."""

    name: str
    start: Callable[[], Any]
    options: dict[str, Any]
    x64: bool


def _run(work: _Work) -> tuple[str, Any, str]:
    with jax.enable_x64(work.x64):
        try:
            fit, timing = timed(work.start)
            if not is_tree(fit):
                fit = to_arviz(fit, timing=timing, **work.options)
        except Exception as error:  # one bad fit must not lose the others
            return work.name, None, f"{type(error).__name__}: {error}"
    return work.name, fit, ""


def _run_packed(packed: bytes) -> tuple[str, Any, str]:
    return _run(unpack(packed))
