"""Dates of every common kind as numbers of a unit, and back."""

import datetime

import numpy as np
import pytest

import numpyro_sde as nsde
from numpyro_sde.data import as_times

pd = pytest.importorskip("pandas")

STAMPS = ["2026-03-01T00:00:00", "2026-03-01T06:30:00", "2026-03-04T00:00:00"]
HOURS = [0.0, 6.5, 72.0]


def kinds():
    dates = [datetime.datetime.fromisoformat(s) for s in STAMPS]
    yield "strings", STAMPS
    yield "datetimes", dates
    for tick in ("s", "ms", "us", "ns"):
        yield f"datetime64[{tick}]", np.array(STAMPS, f"datetime64[{tick}]")
    yield "pandas index", pd.DatetimeIndex(STAMPS)
    yield "pandas column", pd.Series(pd.to_datetime(STAMPS))
    yield "pandas objects", pd.Series(dates, dtype=object)
    yield "zoned index", pd.DatetimeIndex(STAMPS).tz_localize("Europe/Rome")
    yield "zoned column", pd.Series(pd.DatetimeIndex(STAMPS).tz_localize("Asia/Tokyo"))
    yield "zoned strings", [f"{s}+02:00" for s in STAMPS]
    yield "xarray", pd.Series(pd.to_datetime(STAMPS), name="t").to_xarray()


@pytest.mark.parametrize(
    ("kind", "index"), list(kinds()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_every_kind_of_date_gives_the_same_numbers(kind, index):
    times = as_times(index, unit="hour")
    np.testing.assert_allclose(times.values, HOURS, rtol=1e-15)
    assert times.values.dtype == np.float64
    assert times.zoned == kind.startswith("zoned")


def test_polars_columns_with_and_without_a_zone():
    pl = pytest.importorskip("polars")
    dates = [datetime.datetime.fromisoformat(s) for s in STAMPS]
    for column in (pl.Series(dates), pl.Series(dates).dt.replace_time_zone("Europe/Rome")):
        np.testing.assert_allclose(as_times(column, unit="hour").values, HOURS, rtol=1e-15)


def test_one_second_in_days_survives_a_far_origin():
    stamps = ["2026-01-01T00:00:00", "2026-01-01T00:00:01"]
    near, far = as_times(stamps, unit="day"), as_times(stamps, unit="day", origin="1970-01-01")
    assert abs(np.diff(near.values)[0] - 1 / 86400) < 1e-18
    assert abs(np.diff(far.values)[0] - 1 / 86400) < 1e-11  # float64 at 20,454 days


@pytest.mark.parametrize(
    ("unit", "days"),
    [
        ("second", 1 / 86400),
        ("minutes", 1 / 1440),
        ("week", 7),
        ("month", 30.4375),
        ("year", 365.25),
    ],
)
def test_units(unit, days):
    index = np.array(["2000-01-01", "2004-01-01"], "datetime64[D]")
    assert as_times(index, unit=unit).values[1] == pytest.approx(1461 / days, rel=1e-14)


def test_old_dates_do_not_wrap_round():
    # datetime64[ns] ends in 1678: year 622 against an origin given to the nanosecond.
    origin = np.datetime64("2000-01-01T00:00:00.000000000")
    old = np.array(["0622-01-01"], "datetime64[D]")
    days = (old[0] - np.datetime64("2000-01-01")).astype(int)
    assert as_times(old, unit="day", origin=origin).values[0] == days


def test_the_way_back():
    times = as_times(STAMPS, unit="year")
    expected = np.array(STAMPS, "datetime64[us]")
    assert (times.to_dates() == expected).all()
    back = times.to_dates([0.0, np.nan])
    assert back[0] == expected[0]
    assert np.isnat(back[1])


def test_numbers_and_durations_pass():
    np.testing.assert_allclose(as_times([3, 4, 7], "hour", origin=3).values, [0, 1, 4])
    spans = np.array([30, 90], "timedelta64[m]")
    np.testing.assert_allclose(as_times(spans, unit="hour").values, [0.5, 1.5])
    later = as_times(spans, unit="hour", origin=datetime.timedelta(minutes=30))
    np.testing.assert_allclose(later.values, [0.0, 1.0])
    with pytest.raises(ValueError, match="origin must be a duration"):
        as_times(spans, origin=3)
    with pytest.raises(ValueError, match="no origin"):
        as_times(spans).to_dates()


@pytest.mark.parametrize(
    ("index", "options", "message"),
    [
        (["2026-01-01", "2026-01-01T00:00+01:00"], {}, "time zone at row 1 but none at row 0"),
        (["2026-01-01"], {"origin": "2026-01-01T00:00Z"}, "origin has a time zone"),
        (["2026-01-01", None], {}, r"NaT \(missing\) at row 1"),
        ([0.0, np.nan], {}, "NaN or infinite at row 1"),
        (["yesterday"], {}, "row 0 is .*yesterday.*ISO form"),
        (["2026-01-01"], {"unit": "fortnight"}, "unit must be one of .*week"),
        ([1.0], {"origin": "x"}, "origin must be a number"),
    ],
)
def test_bad_times_are_named(index, options, message):
    with pytest.raises(ValueError, match=message):
        as_times(index, **options)


def test_a_path_says_how_to_turn_dates_into_numbers():
    ou = nsde.processes.OrnsteinUhlenbeck(rate=1.0, mean=0.0, scale=0.5)
    with pytest.raises(ValueError, match=r"nsde.data.as_times\(times, unit="):
        nsde.SDEPath(ou, np.array(STAMPS, "datetime64[s]"), init=0.0)
    masked = np.ma.masked_array([0.0, 1.0, 2.0], [False, True, False])
    with pytest.raises(ValueError, match="masked"):
        nsde.SDEPath(ou, masked, init=0.0)
