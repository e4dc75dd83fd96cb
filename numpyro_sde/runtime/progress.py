"""What is done before a progress bar moves, said where the bar is shown."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from numpyro_sde.runtime.clock import Stopwatch


@contextmanager
def told(what: str, shown: bool) -> Iterator[None]:
    """Say on standard error what begins, and how long it took and compiled when it is done.

    Args:
        what: what is done inside.
        shown: False says nothing.

    Example:
        >>> with told("nothing", shown=False):
        ...     pass
    """
    if not shown:
        yield
        return
    print(f"{what} ...", end="", file=sys.stderr, flush=True)
    with Stopwatch() as watch:
        yield
    compiling = watch.seconds("compile") + watch.seconds("trace")
    print(f" {watch.wall_time:.1f} s, of which {compiling:.1f} s compiling", file=sys.stderr)
