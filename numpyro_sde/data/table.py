"""Long tables, one row a measurement, as the padded arrays that a model takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numpyro_sde.data.calendar import check_unit, read_times, to_array, to_dates
from numpyro_sde.data.ragged import fill_up

_MAX_NAMED = 6  # rows or values to name in an error


@dataclass(frozen=True, eq=False)
class Panel:
    """Series on their own clocks as arrays of one shape; from :func:`from_long`.

    Shorter series are filled up at the end: times go on by the series' median gap, data are NaN,
    which every engine takes as missing.

    Attributes:
        times: Numbers in `unit`, strictly increasing in each series, shape `(series, T)`; `(T,)`
            where there is one series without `id`.
        values: The data, NaN where there are none, shape `(series, T)`, with several
            instruments or value columns `(series, T, instrument)`.
        ids: The series' identifiers in the order of the table, shape `(series,)`, or `()`
            without `id`.
        static: For each column of `static=` one value a series.
        instruments: Names along the last axis of `values`; empty where there is but one.
        lengths: How many of the T times are real, shape `(series,)`.
        unit: Unit of `times`.
        origins: Calendar time of 0 of each series, `datetime64` of shape `(series,)`; None where
            the table has numbers.
        id_name: Name of the `id` column.

    Example:
        >>> from numpyro_sde.data import from_long
        >>> table = {"id": ["a", "a", "b"], "hour": [0.0, 2.0, 1.0], "conc": [1.1, 0.7, 0.9]}
        >>> panel = from_long(table, id="id", time="hour", value="conc", unit="hour")
        >>> panel.times.tolist(), panel.lengths.tolist()
        ([[0.0, 2.0], [1.0, 3.0]], [2, 1])
    """

    times: NDArray[np.float64]
    values: NDArray[np.float64]
    ids: np.ndarray
    static: dict[str, np.ndarray]
    instruments: tuple[Any, ...]
    lengths: NDArray[np.int64]
    unit: str
    origins: np.ndarray | None = None
    id_name: str | None = None

    def index_of(self, instrument: Any) -> int:
        """Position of an instrument on the last axis of `values`.

        Raises:
            ValueError: If there is no such instrument.
        """
        if instrument not in self.instruments:
            raise ValueError(f"instrument must be one of {self.instruments}, got {instrument!r}")
        return self.instruments.index(instrument)

    def of(self, instrument: Any) -> NDArray[np.float64]:
        """Data of one instrument, shape `(series, T)`, NaN where it did not measure."""
        return self.values[..., self.index_of(instrument)]

    @property
    def inside(self) -> np.ndarray:
        """Which times are real and not filling, shape of `times`."""
        return np.arange(self.times.shape[-1]) < np.reshape(self.lengths, (*self.ids.shape, 1))

    @property
    def labels(self) -> np.ndarray:
        """Calendar times where the table had them, else numbers; shape of `times`."""
        return self.times if self.origins is None else self.to_dates(self.times)

    def labels_of(self, times: Any) -> np.ndarray:
        """What to write on an axis for numbers on the series' clocks; filling is at no time.

        Args:
            times: Shape `(series, F)`, or `(F,)`. What lies behind the last real time of a series
                becomes NaN or NaT.
        """
        times = np.asarray(times, np.float64)
        last = np.take_along_axis(
            self.times, np.reshape(self.lengths, (*self.ids.shape, 1)) - 1, -1
        )
        slack = 1e-6 * (np.ptp(self.times) or 1.0)  # of a clock that went through float32
        real = np.where(times <= last + slack, times, np.nan)
        return real if self.origins is None else self.to_dates(real)

    def to_dates(self, times: Any) -> np.ndarray:
        """Numbers on the series' clocks as calendar times, UTC where the table had zones.

        Args:
            times: Numbers in `unit`, shape `(series, F)`, or `(F,)` for all series alike.

        Raises:
            ValueError: If the table had no calendar times.
        """
        if self.origins is None:
            raise ValueError(
                "the table's times were numbers, so there is no calendar to go back to"
            )
        return to_dates(times, self.unit, np.reshape(self.origins, (*self.ids.shape, 1)))

    def __len__(self) -> int:
        return max(self.ids.size, 1)

    def __repr__(self) -> str:
        data = int(np.isfinite(self.values).sum())
        parts = [
            f"{len(self)} series of up to {self.times.shape[-1]} times in {self.unit}s",
            f"{data} measurements",
        ]
        if self.instruments:
            parts.append(f"instruments {', '.join(map(str, self.instruments))}")
        if self.static:
            parts.append(f"static {', '.join(self.static)}")
        if self.origins is not None:
            parts.append(f"from {self.origins.min()}")
        return f"Panel({'; '.join(parts)})"


def from_long(
    table: Any,
    *,
    time: str,
    value: str | Sequence[str],
    id: str | None = None,
    instrument: str | None = None,
    unit: str = "day",
    origin: Any = None,
    static: Sequence[str] = (),
    duplicates: str = "error",
) -> Panel:
    """Lay a long table out as one array of times and one of data, for a plate of series.

    Rows may come in any order. In each series the times are the union of its instruments' times,
    NaN standing where one of them did not measure.

    Args:
        table: A data frame of pandas or polars, a `Dataset` of xarray, or a dictionary of
            columns.
        time: Column of times: dates of any kind that :func:`as_times` takes, or numbers in
            `unit`.
        value: Column of data, or several, which become the last axis of `values` as
            instruments do; missing data are NaN or null.
        id: Column that names the series; None for one series.
        instrument: Column that names the instrument of each row; None for one.
        unit: Unit of the times, as for `as_times`.
        origin: The time of 0; None takes the earliest of the table; `"first"` the first time of
            each series.
        static: Columns that are constant in each series, such as a body weight.
        duplicates: Of several values of one series, instrument and time: `"error"`, `"mean"`, or
            `"keep"`, which makes a second instrument of them (`"name (2)"`).

    Raises:
        ValueError: If a column is missing or of another length, a time is missing, a value is
            repeated (the rows are named), or a static column is not constant in a series.

    Example:
        >>> from numpyro_sde.data import from_long
        >>> table = {
        ...     "who": ["ann", "bob", "ann"],
        ...     "when": ["2026-03-01T14:00", "2026-03-01T08:00", "2026-03-01T08:00"],
        ...     "conc": [0.7, 1.3, 1.1],
        ...     "kg": [61.0, 80.0, 61.0],
        ... }
        >>> panel = from_long(
        ...     table, id="who", time="when", value="conc", unit="hour", static=["kg"])
        >>> panel.ids.tolist(), panel.values.tolist(), panel.static["kg"].tolist()
        (['ann', 'bob'], [[1.1, 0.7], [1.3, nan]], [61.0, 80.0])
    """
    unit = check_unit(unit)
    if duplicates not in ("error", "mean", "keep"):
        raise ValueError(f'duplicates must be "error", "mean" or "keep", got {duplicates!r}')
    wide = [value] if isinstance(value, str) else list(value)
    if instrument is not None and len(wide) != 1:
        raise ValueError(f"value must be one column where instrument= names another, got {wide}")
    columns = _Columns(table)
    ids, series = _codes(np.zeros(len(columns), int) if id is None else columns.plain(id))
    numbers, origins = _clock(columns[time], series, len(ids), unit, origin, time)
    times, place, lengths = _union(series, numbers, len(ids))
    data = np.stack([columns.numbers(name) for name in wide], axis=-1)
    kinds, kind = (
        ([None], np.zeros(len(columns), int))
        if instrument is None
        else _codes(columns.plain(instrument))
    )
    turn = _turns(np.stack([series, place, kind]), data)
    if turn.max() > 0 and duplicates == "error":
        _refuse_repeats(turn, series, place, kind, ids)
    if duplicates == "mean":
        turn = np.zeros_like(turn)
    cells = (series, place, kind, turn)
    values = _mean_by_cell(data, cells, (*times.shape, len(kinds), turn.max() + 1))
    values, names = _named_slots(values, cells, kinds, wide)
    fixed = {name: _static(columns, name, series, ids) for name in static}
    single = len(names) == 1
    panel = Panel(
        times=times,
        values=values[..., 0] if single else values,
        ids=ids,
        static=fixed,
        instruments=() if single else names,
        lengths=lengths,
        unit=unit,
        origins=origins,
        id_name=id,
    )
    return panel if id is not None else _only_series(panel)


def _only_series(panel: Panel) -> Panel:
    """One series without a name: no leading axis."""
    return replace(
        panel,
        times=panel.times[0],
        values=panel.values[0],
        ids=np.asarray(panel.ids[0]),
        static={name: column[0] for name, column in panel.static.items()},
        lengths=panel.lengths[0],
        origins=None if panel.origins is None else panel.origins[0],
    )


class _Columns:
    """The columns of a table of any kind, all of one length."""

    def __init__(self, table: Any) -> None:
        if hasattr(table, "collect") and not hasattr(table, "to_numpy"):
            raise TypeError("table is a lazy frame of polars: hand over table.collect()")
        if hasattr(table, "data_vars") and hasattr(table, "to_dataframe"):
            table = table.to_dataframe().reset_index()  # an xarray data set, on all its coordinates
        columns = getattr(table, "columns", None)
        if isinstance(table, Mapping):
            columns = table.keys()
        if columns is None or not hasattr(table, "__getitem__"):
            raise TypeError(
                "table must be a data frame of pandas or polars, a Dataset of xarray or a "
                f"dictionary of columns, got {type(table).__name__}"
            )
        self._table, self._names = table, [str(name) for name in columns]
        lengths = {name: len(table[name]) for name in self._names}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns of table must have one length, got {lengths}")
        self._length = next(iter(lengths.values()), 0)
        if not self._length:
            raise ValueError("table has no rows")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise ValueError(f"table has no column {name!r}; it has {self._names}")
        return self._table[name]

    def plain(self, name: str) -> np.ndarray:
        """A column of identifiers; a missing one is refused."""
        column = np.asarray(self[name])
        missing = [k for k, v in enumerate(column) if v is None or v != v]
        if missing:
            raise ValueError(f"column {name!r} is missing at rows {missing[:_MAX_NAMED]}")
        return column

    def numbers(self, name: str) -> NDArray[np.float64]:
        """A column of data, missing ones as NaN."""
        column = self[name]
        if isinstance(column, np.ma.MaskedArray):
            return np.asarray(np.ma.filled(column.astype(np.float64), np.nan))
        array = np.asarray(column)
        if array.dtype == object:
            array = np.array([np.nan if _is_missing(v) else v for v in array], object)
        try:
            return array.astype(np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"column {name!r} must be numbers, got dtype {array.dtype}") from None


def _is_missing(value: Any) -> bool:
    return value is None or str(value) in ("<NA>", "NaT")


def _codes(column: np.ndarray) -> tuple[Any, NDArray[np.int64]]:
    """Distinct entries in order of appearance, and the code of each row."""
    _, first, inverse = np.unique(column, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return column[first[order]], rank[inverse.ravel()]


def _clock(
    column: Any, series: np.ndarray, count: int, unit: str, origin: Any, name: str
) -> tuple[NDArray[np.float64], np.ndarray | None]:
    """Times of the rows as numbers, and the origin of each series where they were dates."""
    array, zoned = to_array(column, f"column {name!r}")
    if not (isinstance(origin, str) and origin == "first"):
        times = read_times(array, zoned, unit, origin)
        return times.values, None if times.origin is None else np.repeat(times.origin, count)
    order = np.lexsort((array, series))
    starts = array[order[np.searchsorted(series[order], np.arange(count))]]
    numbers = read_times(array - starts[series], zoned, unit, None).values
    return numbers, starts if array.dtype.kind == "M" else None


def _union(
    series: np.ndarray, numbers: NDArray[np.float64], count: int
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Sorted times of each series, filled up; the place of each row; the real lengths."""
    order = np.lexsort((numbers, series))
    own, sorted_times = series[order], numbers[order]
    new = np.ones(len(order), bool)  # the first row of each time of each series
    new[1:] = (np.diff(own) != 0) | (np.diff(sorted_times) != 0)
    lengths = np.bincount(own[new], minlength=count)
    first = np.cumsum(lengths) - lengths
    place = np.empty(len(series), np.int64)
    place[order] = np.cumsum(new) - 1 - first[own]
    return fill_up(sorted_times[new], lengths), place, lengths


def _turns(keys: NDArray[np.int64], data: NDArray[np.float64]) -> NDArray[np.int64]:
    """For each row how many before it fill the same cell; rows without data do not count."""
    turn, seen = np.zeros(keys.shape[1], np.int64), {}  # type: ignore[var-annotated]
    for row in np.flatnonzero(~np.isnan(data).all(-1)):
        key = tuple(keys[:, row])
        turn[row] = seen.get(key, 0)
        seen[key] = turn[row] + 1
    return turn


def _refuse_repeats(
    turn: np.ndarray, series: np.ndarray, place: np.ndarray, kind: np.ndarray, ids: np.ndarray
) -> None:
    row = int(np.flatnonzero(turn)[0])
    same = (series == series[row]) & (place == place[row]) & (kind == kind[row])
    rows = np.flatnonzero(same).tolist()
    raise ValueError(
        f"table has several values of one series, instrument and time: rows {rows[:_MAX_NAMED]} "
        f"(series {ids[series[row]]}), {int((turn > 0).sum())} values too many in all. "
        'duplicates="mean" averages them, "keep" takes them as a second instrument'
    )


def _mean_by_cell(
    data: NDArray[np.float64], cells: tuple[np.ndarray, ...], shape: tuple[int, ...]
) -> NDArray[np.float64]:
    """Values laid out on cells, shape `(*shape, columns)`; the mean where several fall in one."""
    sums, counts = np.zeros((2, *shape, data.shape[1]))
    np.add.at(sums, cells, np.nan_to_num(data))
    np.add.at(counts, cells, ~np.isnan(data))
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, sums / counts, np.nan)


def _named_slots(
    values: NDArray[np.float64],
    cells: tuple[np.ndarray, ...],
    kinds: Sequence[Any],
    wide: Sequence[str],
) -> tuple[NDArray[np.float64], tuple[Any, ...]]:
    """Instruments, repeats and columns on one axis with names; slots that no row fills go."""
    kept, names = [], []
    used = set(zip(cells[2].tolist(), cells[3].tolist(), strict=True))
    for k, name in enumerate(kinds):
        for turn in range(values.shape[3]):
            if (k, turn) not in used:
                continue
            for j, column in enumerate(wide):
                base = column if name is None else name
                names.append(f"{base} ({turn + 1})" if turn else base)
                kept.append(values[:, :, k, turn, j])
    plain = [name.item() if isinstance(name, np.generic) else name for name in names]
    return np.stack(kept, axis=-1), tuple(plain)


def _static(columns: _Columns, name: str, series: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """One value a series of a column that does not change in it."""
    column = np.asarray(columns[name])
    first = np.unique(series, return_index=True)[1]
    differs = (column != column[first][series]) & ~_both_missing(column, column[first][series])
    if differs.any():
        row = int(np.flatnonzero(differs)[0])
        found = sorted({str(v) for v in column[series == series[row]]})
        raise ValueError(
            f"static column {name!r} is not constant in series {ids[series[row]]}: "
            f"{found[:_MAX_NAMED]}"
        )
    return column[first]


def _both_missing(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a != a) & (b != b)
