"""Where the seconds of a call go: tracing, compiling, searching, the rest.

JAX reports how long each trace, lowering and compilation took through `jax.monitoring`. Traces
nest, and small programs compile inside them: reports are joined as intervals of the clock rather
than added up.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import jax
import jax.monitoring

from numpyro_sde.runtime.began import BEGAN

Phase = Literal["trace", "compile", "search"]

_EVENTS: dict[str, Phase] = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "trace",
    "/jax/core/compile/backend_compile_duration": "compile",
}
_running: list[Stopwatch] = []
_listening: list[bool] = []
_imported: list[float] = []


class Stopwatch:
    """Collect what is reported while it runs; a context manager.

    Example:
        >>> import jax
        >>> with Stopwatch() as watch:
        ...     _ = jax.jit(lambda x: 3.25 * x)(1.0)
        >>> watch.programs, 0.0 < watch.seconds("compile") < watch.wall_time
        (1, True)
    """

    def __init__(self) -> None:
        self.intervals: dict[Phase, list[tuple[float, float]]] = {}
        self.programs = 0
        self.start = self.wall_time = 0.0

    def __enter__(self) -> Stopwatch:
        if not _listening:
            # JAX has no public call to remove one listener: register once, idle but for watches.
            jax.monitoring.register_event_duration_secs_listener(_on_duration)
            _listening.append(True)
        _running.append(self)
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        self.wall_time = time.perf_counter() - self.start
        _running[:] = [other for other in _running if other is not self]

    def seconds(self, phase: Phase) -> float:
        """Seconds in a phase: compiling inside a trace is compiling, both in a search as well."""
        inner = {"compile": (), "trace": ("compile",), "search": ("compile", "trace")}
        less: list[tuple[float, float]] = []
        for other in inner[phase]:
            less += self.intervals.get(other, [])  # type: ignore[call-overload]
        own = self.intervals.get(phase, [])
        return covered(less + own, self.start) - covered(less, self.start)


def covered(intervals: list[tuple[float, float]], start: float) -> float:
    """Length of the union of intervals, none counted before `start`.

    Example:
        >>> covered([(1.0, 4.0), (2.0, 3.0), (3.5, 5.0), (7.0, 8.0)], 2.0)
        4.0
    """
    total, reached = 0.0, start
    for begin, end in sorted(intervals):
        if end > reached:
            total += end - max(begin, reached)
            reached = end
    return total


def import_seconds() -> float:
    """Seconds that importing the package took, with what it imported first."""
    return _imported[0] if _imported else 0.0


def finish_import() -> None:
    """Note that the package is imported; its `__init__` calls this last."""
    _imported.append(time.perf_counter() - BEGAN)


@contextmanager
def searching() -> Iterator[None]:
    """Mark what runs inside as the search for a start or a reference, not as sampling."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        _record("search", begin, time.perf_counter())


def _record(phase: Phase, begin: float, end: float) -> None:
    for watch in _running:
        watch.intervals.setdefault(phase, []).append((begin, end))


def _on_duration(event: str, duration_secs: float, **_: Any) -> None:
    phase = _EVENTS.get(event)
    if phase is None or not _running:
        return
    end = time.perf_counter()
    _record(phase, end - duration_secs, end)
    if phase == "compile":
        for watch in _running:
            watch.programs += 1
