"""Long tables as padded arrays: hand-written results, every kind of table, every refusal."""

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import numpyro_sde as nsde
from numpyro_sde.data import from_long
from numpyro_sde.diagnostics import to_arviz

pd = pytest.importorskip("pandas")
NAN = np.nan

# Two subjects, two instruments, rows out of order; "b" comes first in the table.
TABLE = {
    "who": ["b", "a", "b", "a", "a", "b"],
    "when": [
        "2026-03-01T12:00",
        "2026-03-01T10:00",
        "2026-03-01T09:00",
        "2026-03-01T08:00",
        "2026-03-01T10:00",
        "2026-03-01T10:00",
    ],
    "what": ["fast", "slow", "slow", "fast", "fast", "fast"],
    "y": [3.0, 20.0, 10.0, 1.0, 2.0, NAN],
    "kg": [80, 61, 80, 61, 61, 80],
}
CALL = {"id": "who", "time": "when", "value": "y", "instrument": "what", "unit": "hour"}


def frames():
    yield "dictionary", TABLE
    yield "pandas", pd.DataFrame(TABLE)
    yield "pandas dates", pd.DataFrame(TABLE).assign(when=lambda f: pd.to_datetime(f["when"]))
    yield "xarray", pd.DataFrame(TABLE).to_xarray()


@pytest.mark.parametrize(
    ("kind", "table"), list(frames()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_shuffled_subjects_and_instruments(kind, table):
    panel = from_long(table, static=["kg"], **CALL)
    assert panel.ids.tolist() == ["b", "a"]
    assert panel.instruments == ("fast", "slow")
    # The earliest time, 8 h, is 0. "b" at 1, 2 (a missing reading), 4; "a" at 0, 2, filled by
    # its gap of 2 hours.
    assert panel.times.tolist() == [[1.0, 2.0, 4.0], [0.0, 2.0, 4.0]]
    assert panel.lengths.tolist() == [3, 2]
    assert panel.inside.tolist() == [[True, True, True], [True, True, False]]
    np.testing.assert_array_equal(panel.of("fast"), [[NAN, NAN, 3.0], [1.0, 2.0, NAN]])
    np.testing.assert_array_equal(panel.of("slow"), [[10.0, NAN, NAN], [NAN, 20.0, NAN]])
    assert panel.values.shape == (2, 3, 2)
    assert panel.static["kg"].tolist() == [80, 61]
    assert str(panel.labels[1, 1]) == "2026-03-01T10:00:00.000000"


def test_polars():
    pl = pytest.importorskip("polars")
    panel = from_long(pl.DataFrame(TABLE), **CALL)
    assert panel.times.tolist() == [[1.0, 2.0, 4.0], [0.0, 2.0, 4.0]]


def test_each_series_from_its_own_first_time():
    panel = from_long(TABLE, origin="first", **CALL)
    assert panel.times.tolist() == [[0.0, 1.0, 3.0], [0.0, 2.0, 4.0]]
    assert [str(o)[11:16] for o in panel.origins] == ["09:00", "08:00"]
    assert str(panel.to_dates([1.0])[1, 0])[11:16] == "09:00"


def test_one_series_and_several_columns():
    table = {"t": [2.0, 0.0, 1.0], "prey": [3, 1, 2], "predators": [6.0, 4.0, None]}
    panel = from_long(table, time="t", value=["prey", "predators"], unit="year")
    assert panel.times.tolist() == [0.0, 1.0, 2.0]
    np.testing.assert_array_equal(panel.values, [[1, 4], [2, NAN], [3, 6]])
    assert len(panel) == 1
    assert panel.inside.all()


def test_repeated_values():
    table = {"id": [7, 7, 7], "t": [0.0, 1.0, 1.0], "y": [1.0, 2.0, 4.0]}
    call = {"id": "id", "time": "t", "value": "y"}
    with pytest.raises(ValueError, match=r"rows \[1, 2\] \(series 7\)"):
        from_long(table, **call)
    assert from_long(table, duplicates="mean", **call).values.tolist() == [[1.0, 3.0]]
    kept = from_long(table, duplicates="keep", **call)
    assert kept.instruments == ("y", "y (2)")
    np.testing.assert_array_equal(kept.values, [[[1.0, NAN], [2.0, 4.0]]])


@pytest.mark.parametrize(
    ("change", "call", "message"),
    [
        ({}, {"value": "z"}, "no column 'z'; it has"),
        ({}, {"static": ["y"]}, "static column 'y' is not constant in series b"),
        ({"when": [*TABLE["when"][:5], None]}, {}, "column 'when' is NaT .* row 5"),
        ({"who": [*TABLE["who"][:5], None]}, {}, r"column 'who' is missing at rows \[5\]"),
        ({"y": ["low"] * 6}, {}, "column 'y' must be numbers"),
        ({"kg": [1]}, {}, "one length"),
        ({}, {"duplicates": "last"}, "duplicates must be"),
        ({}, {"value": ["y", "kg"]}, "value must be one column"),
    ],
)
def test_bad_tables_are_named(change, call, message):
    with pytest.raises(ValueError, match=message):
        from_long({**TABLE, **change}, **{**CALL, **call})


def test_results_carry_dates_and_names():
    """A plate called as the id column gets its names; the filling of a series is at no time."""
    panel = from_long(TABLE, **{**CALL, "instrument": None}, duplicates="mean")
    ou = nsde.processes.OrnsteinUhlenbeck(rate=1.0, mean=0.0, scale=0.5)

    def model(y):
        level = numpyro.sample("level", dist.Normal(0.0, 1.0))
        with numpyro.plate("who", 2):
            path = nsde.SDEPath(ou, panel.times, dist.Normal(0.0, 1.0))
            x = numpyro.sample("x", path)
            nsde.observe("y", x, lambda t, x: dist.Normal(x, 1.0), obs=y)
        return level

    draws = {"level": np.zeros(3), "x": np.zeros((3, 2, 3))}
    tree = to_arviz(
        draws, model=model, model_args=(panel.values,), times=panel, log_likelihood=False
    )
    x = tree["posterior"]["x"]
    assert x.dims == ("chain", "draw", "who", "time")
    assert x.coords["who"].values.tolist() == ["b", "a"]
    value = x.coords["time_value"]
    assert np.isnat(value.values).tolist() == [[False] * 3, [False, False, True]]
    assert str(value.values[1, 1])[:16] == "2026-03-01T10:00"
