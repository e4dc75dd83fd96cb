"""Draws of many fits, on disk as they come: a folder of files, each whole or absent.

Every batch of fits is one `.npz` file, written beside its place and moved there, so that a process
that is killed leaves nothing half-written. What is done is what stands in files.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_MARK = "run.json"
_PREFIX = "site/"
_MOST_OPEN = 8  # files whose contents are kept in memory


class Fitted(NamedTuple):
    """What the fit of one series gave.

    Attributes:
        series: its number.
        draws: for each site `(chain, draw, ...)`; empty where it failed.
        error: what went wrong; empty if nothing did.
        seconds: wall time of the fit.
        worker: which process it ran in.
        programs: programs compiled meanwhile, those found in the compilation cache included.
    """

    series: int
    draws: Mapping[str, np.ndarray]
    error: str = ""
    seconds: float = 0.0
    worker: str = ""
    programs: int = 0


class FitStore:
    """Fits by number of the series, in memory or in a folder.

    Args:
        folder: where to keep them; None for memory.
        mark: what tells this run from others, a dictionary that JSON takes.

    Raises:
        ValueError: the folder holds another run, or is a file.

    Example:
        >>> store = FitStore(None, {})
        >>> store.add([Fitted(4, {"a": np.zeros((1, 3))}), Fitted(5, {}, "ValueError: no")])
        >>> store.done, store.failures, store.draws(4)["a"].shape
        ([4], {5: 'ValueError: no'}, (1, 3))
    """

    def __init__(self, folder: str | os.PathLike[str] | None, mark: Mapping[str, Any]) -> None:
        self.failures: dict[int, str] = {}
        self.told: dict[int, tuple[float, str, int]] = {}
        self._memory: dict[int, Mapping[str, np.ndarray]] = {}
        self._place: dict[int, tuple[str, int]] = {}
        self._open: OrderedDict[str, dict[str, np.ndarray]] = OrderedDict()
        self._folder = None if folder is None else Path(folder).expanduser().absolute()
        if self._folder is not None:
            self._begin(self._folder, dict(mark))

    def _begin(self, folder: Path, mark: dict[str, Any]) -> None:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"path must be a folder, got the file {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / _MARK
        text = json.dumps(mark, sort_keys=True)
        if known.exists():
            before = json.loads(known.read_text())
            differs = sorted(k for k in {*before, *mark} if before.get(k) != mark.get(k))
            if differs:
                raise ValueError(
                    f"path {str(folder)!r} holds fits of another run: it differs in "
                    f"{', '.join(differs)}. Take another folder, or delete this one"
                )
        else:
            _write(known, text.encode())
        for part in folder.glob("*.part"):  # of a process that was killed
            part.unlink()
        for file in sorted(folder.glob("fits-*.npz")):
            self._read_index(file)

    def _read_index(self, file: Path) -> None:
        with np.load(file, allow_pickle=False) as saved:
            for row, series in enumerate(saved["series"].tolist()):
                self._place[series] = file.name, row
            about = json.loads(str(saved["about"]))
        self.told |= {int(series): tuple(told) for series, told in about["told"].items()}

    @property
    def done(self) -> list[int]:
        """Numbers of the series that are fitted, in order."""
        return sorted({*self._memory, *self._place})

    def add(self, fits: Sequence[Fitted]) -> None:
        """Keep a batch; once this returns it is on disk."""
        good = [fit for fit in fits if not fit.error]
        for fit in fits:
            self.told[fit.series] = fit.seconds, fit.worker, fit.programs
            if fit.error:
                self.failures[fit.series] = fit.error
            else:
                self.failures.pop(fit.series, None)
        if self._folder is None:
            self._memory |= {fit.series: fit.draws for fit in good}
            return
        if not good:
            return
        numbers = [fit.series for fit in good]
        name = f"fits-{min(numbers):09d}-{max(numbers):09d}-{len(numbers)}.npz"
        told = {str(n): self.told[n] for n in numbers}
        columns: dict[str, Any] = {
            _PREFIX + site: np.stack([fit.draws[site] for fit in good]) for site in good[0].draws
        }
        partly = self._folder / (name + ".part")
        with partly.open("wb") as file:
            np.savez(file, series=numbers, about=json.dumps({"told": told}), **columns)
            file.flush()
            os.fsync(file.fileno())
        partly.replace(self._folder / name)
        self._place |= {series: (name, row) for row, series in enumerate(numbers)}

    def draws(self, series: int) -> dict[str, np.ndarray]:
        """Draws of one series, `(chain, draw, ...)` for each site.

        Raises:
            KeyError: it is not fitted.
        """
        if series in self._memory:
            return dict(self._memory[series])
        if series not in self._place:
            raise KeyError(series)
        name, row = self._place[series]
        return {site: columns[row] for site, columns in self._load(name).items()}

    def batches(self) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
        """Numbers of series and their draws `(series, chain, draw, ...)`, file by file."""
        for series in sorted(self._memory):
            yield [series], {k: np.asarray(v)[None] for k, v in self._memory[series].items()}
        files: dict[str, list[tuple[int, int]]] = {}
        for series, (name, row) in sorted(self._place.items()):
            files.setdefault(name, []).append((series, row))
        for name, members in files.items():
            numbers, rows = zip(*members, strict=True)
            yield list(numbers), {k: v[list(rows)] for k, v in self._load(name).items()}

    def _load(self, name: str) -> dict[str, np.ndarray]:
        if name not in self._open:
            assert self._folder is not None
            with np.load(self._folder / name, allow_pickle=False) as saved:
                columns = {
                    key.removeprefix(_PREFIX): saved[key]
                    for key in saved.files
                    if key.startswith(_PREFIX)
                }
            self._open[name] = columns
            while len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(name)
        return self._open[name]


def _write(path: Path, data: bytes) -> None:
    partly = path.with_name(path.name + ".part")
    partly.write_bytes(data)
    partly.replace(path)
