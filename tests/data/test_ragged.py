"""Series of different lengths as one panel."""

import time

import numpy as np
import pytest

from numpyro_sde.data import from_long, pad_series


def test_series_are_filled_up_and_data_are_missing_there():
    grid, y, z = pad_series(
        [[0.0, 1.0, 1.5, 4.0], [3.0], [1.0, 2.0]],
        [[1.0, 2.0, 3.0, 4.0], [5.0], [6.0, 7.0]],
        [np.ones((4, 2)), np.ones((1, 2)), np.ones((2, 2))],
    )
    np.testing.assert_array_equal(grid.times[1], 3.0 + np.arange(4))  # the median of all gaps
    np.testing.assert_array_equal(grid.times[2], [1.0, 2.0, 3.0, 4.0])
    np.testing.assert_array_equal(y[2], [6.0, 7.0, np.nan, np.nan])
    assert z.shape == (3, 4, 2)
    assert np.isnan(z).sum() == 2 * (3 + 2)


def test_a_longest_step_refines_the_clocks():
    grid, y = pad_series([[0.0, 1.0], [0.0, 0.5]], [[1.0, 2.0], [3.0, 4.0]], max_step=0.5)
    assert grid.times.shape == (2, 3)
    np.testing.assert_array_equal(grid.observation_times, [[0.0, 1.0], [0.0, 0.5]])
    assert y.shape == (2, 2)


@pytest.mark.parametrize(
    ("times", "values", "message"),
    [
        ([], [[]], "at least one series"),
        ([[0.0, 1.0], [2.0, 1.0]], [[0.0, 0.0]] * 2, "times of series 1 must be finite and"),
        ([[0.0], [np.nan]], [[0.0]] * 2, "times of series 1 must be finite"),
        ([[0.0], []], [[0.0], []], "times of series 1 must be numbers of shape"),
        ([[0.0], [1.0]], [[0.0]], "one array for each of the 2 series, got 1"),
        ([[0.0], [1.0]], [[0.0], [1.0, 2.0]], r"of series 1 must have shape \(1,\), got \(2,\)"),
    ],
)
def test_bad_series_are_named(times, values, message):
    with pytest.raises(ValueError, match=message):
        pad_series(times, values)


def test_long_tables_take_time_in_proportion_to_their_rows():
    rng = np.random.default_rng(0)
    count, length = 5000, 10
    table = {
        "id": np.repeat(rng.permutation(count), length),
        "t": np.cumsum(rng.exponential(size=count * length)),
        "y": rng.normal(size=count * length),
        "w": np.repeat(rng.normal(size=count), length),
    }
    shuffled = rng.permutation(count * length)
    table = {name: column[shuffled] for name, column in table.items()}
    start = time.process_time()
    panel = from_long(table, id="id", time="t", value="y", static=["w"], origin="first")
    assert time.process_time() - start < 2.0  # a loop over series of the whole table takes minutes
    assert panel.times.shape == (count, length)
    assert np.all(panel.times[:, 0] == 0.0)
    row = 17
    same = np.flatnonzero(table["id"] == panel.ids[row])
    order = same[np.argsort(table["t"][same])]
    np.testing.assert_array_equal(panel.values[row], table["y"][order])
    np.testing.assert_allclose(panel.times[row], table["t"][order] - table["t"][order[0]])
    assert panel.static["w"][row] == table["w"][same[0]]
