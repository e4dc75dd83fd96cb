"""Wall time of a fit, with the seconds that JAX spent compiling set apart.

NumPyro's `MCMC` and `SVI` record no times. JAX reports how long each tracing, lowering and
compilation took through `jax.monitoring`; traces nest, so the reports are joined as intervals
of the clock rather than added up.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.monitoring
from numpyro.infer import MCMC

_COMPILE_EVENTS = "/jax/core/compile/"
_running: list[list[tuple[float, float]]] = []
_listening: list[bool] = []


class Timing(NamedTuple):
    """Seconds that a fit took.

    Attributes:
        wall_time: From start to finished result, compilation included.
        compile_time: The part in which JAX traced, lowered or compiled.

    Example:
        >>> from numpyro_sde.diagnostics import Timing
        >>> Timing(wall_time=5.0, compile_time=2.0).run_time
        3.0
    """

    wall_time: float
    compile_time: float

    @property
    def run_time(self) -> float:
        """Seconds of computation: wall time less compile time."""
        return self.wall_time - self.compile_time


def _on_duration(event: str, duration_secs: float, **_: Any) -> None:
    if _running and event.startswith(_COMPILE_EVENTS):
        end = time.perf_counter()
        for intervals in _running:
            intervals.append((end - duration_secs, end))


def _covered(intervals: list[tuple[float, float]], start: float) -> float:
    """Length of the union of intervals, none counted before `start`."""
    total, reached = 0.0, start
    for begin, end in sorted(intervals):
        if end > reached:
            total += end - max(begin, reached)
            reached = end
    return total


def timed(fit: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Timing]:
    """Call a fitting function, wait for its arrays, and time it.

    Warm-up and everything else inside the call counts as run time. Compile time covers all
    threads of the process, so do not compile something else meanwhile.

    Args:
        fit: For example `mcmc.run` or `svi.run`.
        *args: Its positional arguments.
        **kwargs: Its keyword arguments.

    Returns:
        What the function returned, and a :class:`Timing` to hand to :func:`to_arviz`.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.diagnostics import timed
        >>> result, timing = timed(lambda x: x + 1.0, jnp.zeros(3))
        >>> timing.wall_time >= timing.compile_time >= 0.0
        True
    """
    if not _listening:
        # JAX has no public call to remove one listener: register once, idle outside `timed`.
        jax.monitoring.register_event_duration_secs_listener(_on_duration)
        _listening.append(True)
    intervals: list[tuple[float, float]] = []
    _running.append(intervals)
    start = time.perf_counter()
    try:
        result = fit(*args, **kwargs)
        jax.block_until_ready(result)
        owner = getattr(fit, "__self__", None)
        if isinstance(owner, MCMC):  # `run` returns None and leaves the draws on the object
            jax.block_until_ready(owner.get_samples())
        wall = time.perf_counter() - start
    finally:
        _running[:] = [other for other in _running if other is not intervals]
    return result, Timing(wall, min(_covered(intervals, start), wall))
