"""Time grids: refinement, panels, and every kind of bad times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import numpyro_sde as nsde


def test_no_step_exceeds_max_step_and_times_are_kept():
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.uniform(0.01, 2.0, 50)) + 1.7e9  # Unix seconds
    grid = nsde.TimeGrid(times, max_step=0.3)
    assert grid.dt.max() <= 0.3 * (1 + 1e-9)
    np.testing.assert_array_equal(grid.times[grid.index], times)
    # Fewer steps would not do: one step less in any interval exceeds max_step.
    counts = np.diff(grid.index)
    gaps = np.diff(times)
    assert np.all(gaps[counts > 1] / (counts[counts > 1] - 1) > 0.3 * (1 - 1e-9))
    np.testing.assert_allclose(np.add.reduceat(grid.dt, grid.index[:-1]), gaps, rtol=1e-12)


def test_steps_are_differences_taken_in_float64():
    times = 1.7e9 + np.arange(5) * 0.001
    grid = nsde.TimeGrid(times)
    np.testing.assert_allclose(grid.dt, 0.001, rtol=1e-3)
    assert grid.dt.dtype == np.float64
    path = nsde.SDEPath(nsde.SDE(lambda t, x: 0.0, lambda t, x: 1.0), grid, init=0.0)
    np.testing.assert_allclose(path.dt, 0.001, rtol=1e-3)


@pytest.mark.parametrize("step", [0.1, 0.3, 1.0 / 3.0])
def test_rounding_does_not_add_a_step(step):
    grid = nsde.TimeGrid(step * np.arange(4.0) * 3, max_step=step)
    assert np.diff(grid.index).tolist() == [3, 3, 3]


def test_panel_gets_one_index_for_all_series():
    times = np.array([[0.0, 1.0, 1.2], [5.0, 5.1, 7.1]])
    grid = nsde.TimeGrid(times, max_step=0.5)
    assert grid.index.tolist() == [0, 2, 6]
    assert grid.times.shape == (2, 7)
    np.testing.assert_allclose(grid.times[:, grid.index], times)
    np.testing.assert_allclose(np.diff(grid.times, axis=-1), grid.dt, rtol=1e-9)
    assert grid.dt.max() <= 0.5


def test_refining_a_grid_keeps_its_observation_times():
    once = nsde.TimeGrid([0.0, 1.0, 3.0], max_step=0.5)
    twice = nsde.TimeGrid(once, max_step=0.25)
    assert twice == nsde.TimeGrid([0.0, 1.0, 3.0], max_step=0.25)
    assert hash(twice) == hash(nsde.TimeGrid([0.0, 1.0, 3.0], max_step=0.25))
    assert once != twice
    assert len(once) == 7


def test_arrays_are_read_only():
    grid = nsde.TimeGrid([0.0, 1.0])
    with pytest.raises(ValueError, match="read-only"):
        grid.times[0] = 3.0


def test_one_time():
    grid = nsde.TimeGrid([2.0], max_step=0.1)
    assert grid.times.tolist() == [2.0]
    assert grid.index.tolist() == [0]


BAD_TIMES = {
    "unsorted": ([0.0, 2.0, 1.0], r"times must be strictly increasing, got unsorted times 2\.0 "),
    "repeated": ([0.0, 1.0, 1.0], r"times must be strictly increasing, got repeated times 1\.0 "),
    "NaN": ([0.0, np.nan, 1.0], r"times must be finite, got nan at index \(1,\)"),
    "infinite": ([0.0, 1.0, np.inf], r"times must be finite, got inf at index \(2,\)"),
    "one series unsorted": (
        [[0.0, 1.0, 2.0], [0.0, 3.0, 2.0]],
        r"unsorted times 3\.0 then 2\.0 at index \(1, 1\)",
    ),
    "scalar": (1.0, r"times must have shape \(\*batch, T\) with T >= 1, got \(\)"),
    "empty": ([], r"times must have shape \(\*batch, T\) with T >= 1, got \(0,\)"),
    "dates": (
        np.array(["2020-01-01", "2020-01-02"], "datetime64[D]"),
        r"times must be numbers in one time unit, got dtype datetime64",
    ),
    "strings": (["a", "b"], r"times must be numbers in one time unit, got dtype <U1"),
    "ragged": ([[0.0, 1.0], [0.0]], r"times must be an array of shape \(\*batch, T\)"),
}


@pytest.mark.parametrize(("times", "message"), BAD_TIMES.values(), ids=BAD_TIMES)
def test_bad_times_are_refused_by_grid_and_path(times, message):
    with pytest.raises(ValueError, match=message):
        nsde.TimeGrid(times)
    with pytest.raises(ValueError, match=message):
        nsde.SDEPath(nsde.SDE(lambda t, x: -x, lambda t, x: 1.0), times, init=0.0)


def test_float32_times_that_collapse_are_refused():
    """Unix seconds in float32 are no longer increasing: the error comes, not a zero step."""
    with pytest.raises(ValueError, match="repeated"):
        nsde.TimeGrid(np.float32(1.7e9) + np.arange(3, dtype=np.float32))


@pytest.mark.parametrize(
    "step", [0.0, -1.0, np.nan, np.inf, -np.inf, [0.1, 0.2], "0.1", True, 1j, int]
)
def test_bad_max_step_is_refused(step):
    with pytest.raises(ValueError, match="max_step must be one positive finite step length, got"):
        nsde.TimeGrid([0.0, 1.0], max_step=step)


def test_a_step_too_small_for_memory_is_refused():
    with pytest.raises(ValueError, match="max_step=1e-300 asks for"):
        nsde.TimeGrid([0.0, 1.0], max_step=1e-300)


def test_a_step_below_the_resolution_of_the_times_is_refused():
    """Steps that vanish in float64 would repeat grid times."""
    with pytest.raises(ValueError, match="below the resolution of float64"):
        nsde.TimeGrid([1e9, 1e9 + 1e-6], max_step=1e-8)


def test_traced_times_are_refused():
    with pytest.raises(ValueError, match="times of a TimeGrid must be known before tracing"):
        jax.jit(lambda t: nsde.TimeGrid(t).times)(jnp.arange(3.0))


def test_traced_max_step_is_refused():
    with pytest.raises(ValueError, match=r"max_step must be .* got a traced value"):
        jax.jit(lambda h: nsde.TimeGrid([0.0, 1.0], max_step=h).times)(0.1)
