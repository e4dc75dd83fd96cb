"""Where the seconds of a fit went.

NumPyro's `MCMC` and `SVI` record no times. JAX reports what it compiles, and the searches of this
package report themselves (`numpyro_sde.runtime.clock`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from numpyro.infer import MCMC

from numpyro_sde.runtime.clock import Stopwatch, import_seconds


class Timing(NamedTuple):
    """Seconds that a fit took, by what was done in them.

    Attributes:
        wall_time: From start to finished result, everything below but the import included.
        compile_time: XLA compiled, or read compiled programs from its cache.
        trace_time: JAX traced Python functions and lowered them.
        search_time: A start or a reference path was searched for before sampling; what was
            compiled for that counts as compiling.
        import_time: The import of the package, with JAX and NumPyro where it was the first to
            import them; once for a process, and not part of `wall_time`.

    Example:
        >>> from numpyro_sde.diagnostics import Timing
        >>> Timing(wall_time=5.0, compile_time=2.0, trace_time=0.5).run_time
        2.5
    """

    wall_time: float
    compile_time: float
    trace_time: float = 0.0
    search_time: float = 0.0
    import_time: float = 0.0

    @property
    def run_time(self) -> float:
        """Seconds of sampling or training proper: wall time less the rest."""
        return self.wall_time - self.compile_time - self.trace_time - self.search_time

    def attributes(self) -> dict[str, float]:
        """What a fit notes of its times; ArviZ's schema calls the time of sampling so."""
        rest = ("compile_time", "trace_time", "search_time", "import_time")
        return {"sampling_time": self.run_time, **{name: getattr(self, name) for name in rest}}


def timed(fit: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Timing]:
    """Call a fitting function, wait for its arrays, and time it.

    Warm-up and everything else inside the call counts as run time. Times of compiling cover all
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
    with Stopwatch() as watch:
        result = fit(*args, **kwargs)
        jax.block_until_ready(result)
        owner = getattr(fit, "__self__", None)
        if isinstance(owner, MCMC):  # `run` returns None and leaves the draws on the object
            jax.block_until_ready(owner.get_samples())
        wall = time.perf_counter() - watch.start
    phases = (watch.seconds("compile"), watch.seconds("trace"), watch.seconds("search"))
    return result, Timing(wall, *phases, import_seconds())
