"""What a step of a check found: a level, words, a table, pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

Level = Literal["good", "look", "bad", "not done"]

MARKS: dict[Level, str] = {"good": "ok", "look": "look", "bad": "FAILED", "not done": "not done"}
# Of finding fault with a right model and engine, in one step.
LEVEL = 0.01


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a check; prints as a block.

    Attributes:
        name: The step.
        level: `"good"`; `"look"`, which is no failure; `"bad"`; `"not done"`.
        words: What was found.
        table: The numbers behind it, a pandas data frame, or None.
        result: The object that the step made, such as a `Residuals`.
        draw: Makes the picture, a Matplotlib figure; None where there is none.
        code: Python that does the step alone.
        seconds: What it took.

    Example:
        >>> from numpyro_sde.checking import Step
        >>> Step("fit", "good", "use it")
        [ok] fit: use it
    """

    name: str
    level: Level
    words: str
    table: Any = None
    result: Any = None
    draw: Callable[[], Any] | None = None
    code: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing was found wrong; a step that was not done says nothing."""
        return self.level in ("good", "look")

    def __repr__(self) -> str:  # what an interactive session shows
        return str(self)

    def __str__(self) -> str:
        head = f"[{MARKS[self.level]}] {self.name}: {self.words}"
        return head if self.table is None else f"{head}\n{show_table(self.table)}"

    def _repr_html_(self) -> str:
        table = "" if self.table is None else self.table.to_html(float_format=_three_digits)
        head = f"<b>{escape(MARKS[self.level])}, {escape(self.name)}</b>: {escape(self.words)}"
        return f"<p>{head}</p>{table}"


def show_table(table: Any) -> str:
    """A data frame as text, numbers with three digits.

    Example:
        >>> import pandas as pd
        >>> print(show_table(pd.DataFrame({"mean": [0.12345]}, index=["rate"])))
              mean
        rate 0.123
    """
    return table.to_string(float_format=_three_digits)


def _three_digits(value: float) -> str:
    return f"{value:.3g}"


class Budget:
    """Seconds for a whole check, and what is left of them.

    Args:
        seconds: The budget.

    Raises:
        ValueError: A budget that is not positive.

    Example:
        >>> 0.0 < Budget(60.0).left <= 60.0
        True
    """

    def __init__(self, seconds: float) -> None:
        if not seconds > 0.0:
            raise ValueError(f"time_budget must be a positive number of seconds, got {seconds!r}")
        self.seconds, self._start = float(seconds), time.perf_counter()

    @property
    def left(self) -> float:
        """Seconds left; negative once it is overdrawn."""
        return self.seconds - (time.perf_counter() - self._start)

    def part(self, share: float) -> Budget:
        """A budget that is a share of what is left."""
        return Budget(max(share * self.left, 1e-3))


@contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """Seconds since the block began, as a function.

    Example:
        >>> with stopwatch() as seconds:
        ...     pass
        >>> seconds() >= 0.0
        True
    """
    start = time.perf_counter()
    yield lambda: time.perf_counter() - start
