"""Calendar times as numbers in a unit, and numbers back as calendar times.

The unit is the modeller's to choose, because it fixes what a rate means: 0.1 per hour is 2.4 per
day. The origin is subtracted in whole ticks before anything becomes a float: seconds since 1970
in float32 are good to two minutes only.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Nanoseconds in each unit. Months and years are no fixed spans: these are the mean ones of the
# Julian calendar, 365.25 days a year.
_DAY = 86_400 * 10**9
_UNITS = {
    "nanosecond": 1,
    "microsecond": 10**3,
    "millisecond": 10**6,
    "second": 10**9,
    "minute": 60 * 10**9,
    "hour": 3600 * 10**9,
    "day": _DAY,
    "week": 7 * _DAY,
    "month": _DAY * 1461 // 48,
    "year": _DAY * 1461 // 4,
}
# Nanoseconds in one tick of NumPy's dates, for those that have a fixed length.
_TICKS = {
    "W": 7 * _DAY,
    "D": _DAY,
    "h": 3600 * 10**9,
    "m": 60 * 10**9,
    "s": 10**9,
    "ms": 10**6,
    "us": 10**3,
    "ns": 1,
}


@dataclass(frozen=True)
class Times:
    """Times as numbers in a unit since an origin; from :func:`as_times`.

    `SDEPath`, `TimeGrid` and `to_arviz` take `values`; `to_arviz(times=...)` takes the object
    itself too, and then labels the results with calendar times.

    Attributes:
        values: Numbers, float64.
        unit: What they count, such as "hour".
        origin: The calendar time of 0, UTC where a zone was given; None where the input was
            numbers or durations.
        zoned: Whether the input named time zones, so that `origin` is UTC.

    Example:
        >>> from numpyro_sde.data import as_times
        >>> times = as_times(["2026-03-01", "2026-03-02T12:00"], unit="day")
        >>> times.values.tolist(), str(times.to_dates([2.0])[0])[:16]
        ([0.0, 1.5], '2026-03-03T00:00')
    """

    values: NDArray[np.float64]
    unit: str
    origin: np.datetime64 | None = None
    zoned: bool = False

    def to_dates(self, values: Any = None) -> np.ndarray:
        """Numbers of this clock as calendar times, `datetime64`, to the microsecond.

        Args:
            values: Numbers in `unit` since `origin`, any shape; None takes `values`. NaN gives
                NaT.

        Raises:
            ValueError: If there is no origin.
        """
        if self.origin is None:
            raise ValueError("these times have no origin: they were given as numbers or durations")
        return to_dates(self.values if values is None else values, self.unit, self.origin)

    @property
    def labels(self) -> np.ndarray:
        """What to write on an axis: calendar times where there is an origin, else the numbers."""
        return self.values if self.origin is None else self.to_dates()

    def labels_of(self, times: Any) -> np.ndarray:
        """The same for any numbers on this clock."""
        return np.asarray(times, np.float64) if self.origin is None else self.to_dates(times)

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        since = "" if self.origin is None else f" since {self.origin}{' UTC' * self.zoned}"
        shape, values = self.values.shape, self.values
        span = f", {values.min():g} to {values.max():g}" if values.size else ""
        return f"Times({shape}, {self.unit}s{since}{span})"


def as_times(index: Any, unit: str = "day", origin: Any = None) -> Times:
    """Turn dates of any common kind into numbers of a unit.

    Taken are `datetime64` arrays, ISO strings, `datetime` objects, the indices and columns of
    pandas, polars and xarray, durations (`timedelta64`, then without origin), and plain numbers,
    which are taken to be in `unit` already.

    Args:
        index: The times, any shape; in any order.
        unit: "second", "minute", "hour", "day", "week", "month", "year" or a fraction of a
            second down to "nanosecond"; a plural is understood. A month is 30.4375 days and a
            year 365.25 days: calendar months have no fixed length.
        origin: The time of 0, of the same kind as `index`; None takes the earliest date, and 0
            for numbers and durations.

    Raises:
        ValueError: If the unit is unknown, a time is missing (its position is named), or zones
            are given for a part of the times only.
        TypeError: If the times are of no known kind.

    Example:
        >>> import numpy as np
        >>> from numpyro_sde.data import as_times
        >>> stamps = np.array(["2026-01-01T00:00:00", "2026-01-01T00:00:01"], "datetime64[s]")
        >>> as_times(stamps, unit="hour").values * 3600
        array([0., 1.])
    """
    return read_times(*to_array(index, "index"), unit, origin)


def read_times(array: np.ndarray, zoned: bool, unit: str, origin: Any) -> Times:
    """What :func:`as_times` does with times that :func:`to_array` has read.

    Example:
        >>> read_times(np.array([1.0, 3.0]), False, "hour", 1.0).values.tolist()
        [0.0, 2.0]
    """
    unit = check_unit(unit)
    if array.dtype.kind == "f":
        return Times(array - (0.0 if origin is None else _number_origin(origin)), unit)
    if array.dtype.kind == "m":
        if origin is None:
            return Times(_count(array, unit), unit)
        at, _ = to_array(origin, "origin")
        if at.dtype.kind != "m":
            raise ValueError(f"origin must be a duration where index has durations, got {origin!r}")
        return Times(_count(array - at, unit), unit)
    if origin is None:
        if not array.size:
            raise ValueError("index has no times, so origin must be given")
        start: Any = array.min()
    else:
        at, origin_zoned = to_array(origin, "origin")
        if at.dtype.kind != "M" or at.ndim:
            raise ValueError(f"origin must be one date where index has dates, got {origin!r}")
        if origin_zoned != zoned:
            raise ValueError(
                f"origin {'has a' if origin_zoned else 'has no'} time zone, index "
                f"{'has one' if zoned else 'has none'}: give both with a zone or both without"
            )
        start = at[()]
    return Times(_since(array, start, unit), unit, start, zoned)


def check_unit(unit: str) -> str:
    """The unit's name in the singular, or a `ValueError` that lists those known.

    Example:
        >>> check_unit("hours")
        'hour'
    """
    name = unit.lower().removesuffix("s") if isinstance(unit, str) else unit
    if name not in _UNITS:
        raise ValueError(f"unit must be one of {', '.join(_UNITS)}, got {unit!r}")
    return name


def to_dates(values: Any, unit: str, origin: Any) -> np.ndarray:
    """Numbers since an origin as `datetime64[us]`; NaN as NaT; origins may be one for each row.

    Example:
        >>> to_dates([0.5], "day", np.datetime64("2026-01-01")).tolist()
        [datetime.datetime(2026, 1, 1, 12, 0)]
    """
    values = np.asarray(values, np.float64)
    ticks = np.round(values * (_UNITS[unit] / 1e3))
    missing = ~np.isfinite(ticks)
    delta = np.where(missing, 0, ticks).astype(np.int64).astype("timedelta64[us]")
    dates = np.asarray(origin).astype("datetime64[us]") + delta
    return np.where(missing, np.datetime64("NaT", "us"), dates)


def _since(dates: np.ndarray, start: np.datetime64, unit: str) -> NDArray[np.float64]:
    """Numbers of a unit since a date, subtracted in whole ticks."""
    if dates.dtype == np.asarray(start).dtype:
        return _count(dates - start, unit)
    # A date of days beside one of nanoseconds: NumPy would wrap round outside 1678 to 2262.
    whole = (dates.astype("datetime64[s]") - start.astype("datetime64[s]")).astype(np.int64)
    rest = _below_second(dates) - _below_second(np.asarray(start))
    return (whole * (10**9 / _UNITS[unit])) + rest / _UNITS[unit]


def _below_second(dates: np.ndarray) -> np.ndarray:
    """Nanoseconds after the last whole second."""
    part = dates - dates.astype("datetime64[s]").astype(dates.dtype)
    tick = np.datetime_data(dates.dtype)
    return part.astype(np.int64) * (_TICKS[tick[0]] * tick[1] if tick[0] in _TICKS else 0)


def _count(spans: np.ndarray, unit: str) -> NDArray[np.float64]:
    """Spans of time, `timedelta64`, as numbers of a unit; a missing one as NaN."""
    name, factor = np.datetime_data(spans.dtype)
    if name not in _TICKS:
        raise ValueError(f"spans of {name} have no fixed length: give dates, or spans of days")
    tick, size = _TICKS[name] * factor, _UNITS[unit]
    common = np.gcd(tick, size)
    counts = spans.astype(np.int64) * (tick // common) / (size // common)
    return np.where(np.isnat(spans), np.nan, counts)


def _number_origin(origin: Any) -> float:
    try:
        return float(origin)
    except (TypeError, ValueError):
        raise ValueError(
            f"origin must be a number where index has numbers, got {origin!r}"
        ) from None


def to_array(index: Any, name: str) -> tuple[np.ndarray, bool]:
    """Times as float64, `timedelta64` or `datetime64` (UTC where zoned), and whether zoned.

    Example:
        >>> to_array(["2026-01-01T02:00+02:00"], "index")
        (array(['2026-01-01T00:00:00.000000'], dtype='datetime64[us]'), True)
    """
    if isinstance(index, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array: leave the masked times out")
    zone = _zone_of_column(index)
    values = _plain(index)
    if zone is not None and values.dtype.kind == "M":
        return _finite(values, name), True
    if values.dtype.kind in "OUST":
        values, zoned = _parse(values, name)
    else:
        zoned = False
    if values.dtype.kind in "iu":
        values = values.astype(np.float64)
    if values.dtype.kind not in "fmM":
        raise TypeError(f"{name} must be dates, durations or numbers, got dtype {values.dtype}")
    if values.dtype.kind == "M" and np.datetime_data(values.dtype)[0] in ("Y", "M"):
        values = values.astype("datetime64[D]")
    return _finite(values, name), zoned


def _finite(values: np.ndarray, name: str) -> np.ndarray:
    bad = ~np.isfinite(values) if values.dtype.kind == "f" else np.isnat(values)
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0]) if values.ndim else ()
        where = f" at row {at[0] if len(at) == 1 else at}" if at else ""
        kind = "NaN or infinite" if values.dtype.kind == "f" else "NaT (missing)"
        raise ValueError(f"{name} is {kind}{where}: every time must be known")
    return values if values.dtype.kind != "f" else values.astype(np.float64)


def _zone_of_column(index: Any) -> Any:
    """The time zone that a column of pandas or polars declares for all its entries."""
    dtype = getattr(index, "dtype", None)
    return getattr(dtype, "tz", None) or getattr(dtype, "time_zone", None)


def _plain(index: Any) -> np.ndarray:
    """A column, an index or a list as a NumPy array; a zoned column as UTC."""
    if getattr(getattr(index, "dtype", None), "tz", None) is not None:
        stamps = index.dt if hasattr(index, "dt") else index  # a pandas column, or its index
        utc = stamps.tz_convert("UTC")
        return np.asarray((utc.dt if hasattr(utc, "dt") else utc).tz_localize(None))
    if hasattr(index, "to_timestamp") and "period" in str(getattr(index, "dtype", "")):
        return np.asarray(index.to_timestamp())  # the start of each period
    if hasattr(index, "to_numpy"):
        return np.asarray(index.to_numpy())
    if hasattr(index, "values") and not callable(index.values):
        return np.asarray(index.values)
    return np.asarray(index)


def _parse(values: np.ndarray, name: str) -> tuple[np.ndarray, bool]:
    """Strings and `datetime` objects one by one; a zone on some of them only is refused."""
    flat = values.ravel()
    if flat.size and all(isinstance(v, datetime.timedelta) for v in flat):
        return np.array(flat, "timedelta64[us]").reshape(values.shape), False
    found = [_parse_one(value, name, row) for row, value in enumerate(flat)]
    zones = [aware for _, aware in found]
    if any(zones) and not all(zones):
        raise ValueError(
            f"{name} has a time zone at row {zones.index(True)} but none at row "
            f"{zones.index(False)}: give a zone to all times or to none"
        )
    dates = np.array([date for date, _ in found], "datetime64[us]")
    return dates.reshape(values.shape), any(zones)


def _parse_one(value: Any, name: str, row: int) -> tuple[np.datetime64, bool]:
    if isinstance(value, np.datetime64):
        return value, False
    if value is None or (isinstance(value, float) and np.isnan(value)) or str(value) == "NaT":
        return np.datetime64("NaT", "us"), False
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, str):
        try:
            value = datetime.datetime.fromisoformat(value.strip())
        except ValueError:
            raise ValueError(
                f"{name} at row {row} is {value!r}, which is no date in ISO form "
                "(2026-03-01 or 2026-03-01T12:00:00+01:00)"
            ) from None
    if isinstance(value, datetime.datetime):
        if value.tzinfo is None or value.utcoffset() is None:
            return np.datetime64(value, "us"), False
        return np.datetime64(value.astimezone(datetime.UTC).replace(tzinfo=None), "us"), True
    if isinstance(value, datetime.date):
        return np.datetime64(value, "us"), False
    raise TypeError(
        f"{name} at row {row} is {value!r} of type {type(value).__name__}: dates, ISO strings, "
        "durations or numbers are taken"
    )
