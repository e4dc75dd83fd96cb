"""Run a model with its paths integrated out, and hand out what stands for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from numpyro.handlers import block, trace

from numpyro_sde.distributions.marginal import IntegratedPath
from numpyro_sde.handlers import marginalize
from numpyro_sde.models.survey import Survey, survey
from numpyro_sde.statespace.model import AbstractFilter


class _Keeping(marginalize):
    """Integrates out paths that the model computes with, and keeps what stands for them."""

    kept: Mapping[str, IntegratedPath]

    def _look(self, args: Any, kwargs: Any) -> Survey:
        # Sites made of a path, deterministic ones, are of no interest here: nobody reads them.
        assert self.fn is not None
        found = survey(self.fn, args, kwargs)
        found.refuse_other_uses()
        return found

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        self.kept = self.paths
        super().__exit__(exc_type, exc_value, traceback)


def run_integrated(
    model: Callable[..., Any],
    args: Any,
    kwargs: Any,
    *,
    method: AbstractFilter,
    sites: frozenset[str],
    transformed: bool,
) -> tuple[Mapping[str, IntegratedPath], dict[str, Any]]:
    """Run a model with some paths integrated out.

    Args:
        model: the model, with values for its other sites.
        args: its positional arguments.
        kwargs: its keyword arguments.
        method: the filter.
        sites: the paths.
        transformed: whether the model computes with one of them before it observes it.

    Returns:
        What stands for each path, with what was said of it, and the trace of the other sites.
    """
    if transformed:
        keeping = _Keeping(model, method=method, sites=sites)
        with block(), trace() as recorded:
            keeping(*args, **kwargs)
        return keeping.kept, recorded
    reader = marginalize(method=method, sites=sites)
    with block(), trace() as recorded, reader:
        model(*args, **kwargs)
    return reader.paths, recorded
