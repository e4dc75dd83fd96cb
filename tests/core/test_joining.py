"""Clocks joined with further times: where the old and the new ones stand, in panels too."""

import numpy as np
import pytest

from numpyro_sde.joining import join_clocks


def test_every_time_is_where_it_is_said_to_be():
    rng = np.random.default_rng(0)
    for _ in range(20):
        old = np.cumsum(rng.uniform(0.1, 2.0, size=(3, 6)), axis=-1)
        span = old[:, -1:] - old[:, :1]
        new = old[:, :1] + span * rng.uniform(0.0, 1.6, size=(3, 5))
        new[0, 2] = old[0, 3]  # a time that is there already
        for max_step in (None, 0.3):
            joined = join_clocks(old, new, max_step)
            assert np.all(np.diff(joined.grid.times, axis=-1) > 0)
            np.testing.assert_allclose(joined.grid.times[:, joined.old], old)
            found = np.take_along_axis(joined.grid.times, joined.place, axis=-1)
            np.testing.assert_allclose(found, new)
            if max_step:
                assert joined.grid.dt.max() <= max_step * (1 + 1e-9)


def test_one_clock_for_all():
    joined = join_clocks([0.0, 1.0], [[0.5, 2.0], [0.25, 1.5]])
    assert joined.grid.times.shape == (2, 4)
    assert joined.place.tolist() == [[1, 3], [1, 3]]
    same = join_clocks(np.array([[0.0, 1.0], [0.0, 3.0]]), [4.0])
    assert same.place.tolist() == [[2], [2]]


def test_bad_times():
    with pytest.raises(ValueError, match="before the path does at 0"):
        join_clocks([0.0, 1.0], [-1.0])
    with pytest.raises(ValueError, match="does not fit"):
        join_clocks(np.zeros((2, 1)), np.ones((3, 1)))
