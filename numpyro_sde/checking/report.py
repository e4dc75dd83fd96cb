"""What a whole check found: printed, in notebooks, and as one self-contained page."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from numpyro_sde.checking.page import render
from numpyro_sde.checking.steps import MARKS, Step


@dataclass(frozen=True, eq=False)
class CheckReport:
    """The verdicts of a check; prints as a block, and writes itself as a page.

    Attributes:
        title: Name of the model.
        steps: The steps in order, by name.
        fit: The `CheckedFit`.
        code: Python that repeats the check.
        seconds: What all of it took.
        about: Facts of the run: versions, seeds, treatments.

    Example:
        >>> from numpyro_sde.checking import CheckReport, Step
        >>> report = CheckReport("model", {"fit": Step("fit", "good", "use it")}, None)
        >>> print(report)
        model: use it (0 s)
          [ok] fit: use it
    """

    title: str
    steps: Mapping[str, Step]
    fit: Any
    code: str = ""
    seconds: float = 0.0
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.failures

    @property
    def failures(self) -> list[str]:
        """Names of the steps that found something wrong."""
        return [name for name, step in self.steps.items() if step.level == "bad"]

    @property
    def verdict(self) -> str:
        """The answer in a line."""
        if self.failures:
            return f"do not use it as it is: {', '.join(self.failures)}"
        missing = [name for name, step in self.steps.items() if step.level == "not done"]
        notes = [name for name, step in self.steps.items() if step.level == "look"]
        parts = ["use it"]
        if notes:
            parts.append(f"look at {', '.join(notes)}")
        if missing:
            parts.append(f"not done: {', '.join(missing)}")
        return "; ".join(parts)

    @property
    def tree(self) -> Any:
        """The posterior for ArviZ."""
        return self.fit.tree

    def __getitem__(self, name: str) -> Step:
        return self.steps[name]

    def __repr__(self) -> str:  # what an interactive session shows
        return str(self)

    def __str__(self) -> str:
        lines = [f"{self.title}: {self.verdict} ({self.seconds:.0f} s)"]
        lines += [f"  [{MARKS[s.level]}] {name}: {s.words}" for name, s in self.steps.items()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{escape(MARKS[step.level])}</td><th>{escape(name)}</th>"
            f"<td style='text-align:left'>{escape(step.words)}</td></tr>"
            for name, step in self.steps.items()
        )
        return f"<b>{escape(self.title)}: {escape(self.verdict)}</b><table>{rows}</table>"

    def to_html(self) -> str:
        """The page, with its pictures inside.

        Raises:
            ImportError: If Matplotlib is not installed.
        """
        return render(self)

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to a file.

        Raises:
            ImportError: If Matplotlib is not installed.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.to_html(), encoding="utf-8")
        return target
