"""Tables of scores: what is averaged, and over what."""

import numpy as np
import pytest

from numpyro_sde.diagnostics import crps, energy_score, score

rng = np.random.default_rng(0)


def test_a_table_of_scalars_and_vectors():
    draws = {"a": rng.normal(size=(300, 5)), "b": rng.normal(size=(300, 4, 2))}
    y = {"a": rng.normal(size=5), "b": rng.normal(size=(4, 2))}
    y["a"][2] = np.nan
    found = score(draws, y, levels=(0.8,), event_dims={"b": 1})
    table = found.table()
    assert table.loc["a", "number"] == 4
    keep = [0, 1, 3, 4]
    expected = crps(draws["a"][:, keep], y["a"][keep], fair=True).mean()
    assert table.loc["a", "crps"] == pytest.approx(expected)
    assert table.loc["b", "energy"] == pytest.approx(
        energy_score(draws["b"], y["b"], fair=True).mean()
    )
    assert np.isnan(table.loc["a", "energy"])
    low, high = np.quantile(draws["a"][:, keep], [0.1, 0.9], axis=0)
    inside = (low <= y["a"][keep]) & (y["a"][keep] <= high)
    assert table.loc["a", "cover_80"] == pytest.approx(inside.mean())
    assert "interval_80" in str(found)


def test_calibrated_intervals_hold_their_share():
    """Seed 0, 2,000 points from the law of the draws: shares within 4 binomial errors."""
    draws, y = rng.gamma(3.0, size=(4000, 2000)), rng.gamma(3.0, size=2000)
    table = score(draws, y).table()
    for level in (0.5, 0.9):
        error = np.sqrt(level * (1 - level) / 2000)
        assert abs(table.loc["y", f"cover_{100 * level:g}"] - level) < 4 * error


def test_what_cannot_be_scored():
    with pytest.raises(ValueError, match="y must give what came"):
        score(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="what came has"):
        score(np.zeros((3, 2)), np.zeros(3))
    with pytest.raises(ValueError, match=r"y names \['z'\]"):
        score({"y": np.zeros((3, 2))}, {"z": np.zeros(2)})
    with pytest.raises(ValueError, match="dictionary of the sites"):
        score({"a": np.zeros((3, 2)), "b": np.zeros((3, 2))}, np.zeros(2))
