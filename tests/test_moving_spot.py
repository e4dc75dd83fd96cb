"""The film of `examples/moving_spot.py`: its parts, and the index of films of known truth."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

import numpyro_sde as nsde

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

pytest.importorskip("matplotlib")
import moving_spot


def test_covariance_out_of_lags_is_that_of_the_law(x64):
    times = np.arange(20.0)
    p = {"hurst": jnp.array(0.7), "rate": jnp.array(0.15), "scale": jnp.array(0.6)}
    law = nsde.distributions.FractionalOrnsteinUhlenbeck(times, **p, start="zero")
    ours = moving_spot.exact_covariance(times, p)
    np.testing.assert_allclose(ours, law.covariance_matrix[1:, 1:], rtol=1e-9, atol=1e-12)


def test_the_picture_holds_the_light_of_the_spot(x64):
    """Photons in all, and their centre, of a spot well inside; against sums."""
    light = moving_spot.image(jnp.array([0.3, -0.4]), 60.0, 0.5)
    rest = np.asarray(light) - 0.5
    assert rest.sum() == pytest.approx(60.0, rel=1e-3)
    centre = rest @ moving_spot.PIXELS / rest.sum()
    np.testing.assert_allclose(centre, [0.3, -0.4], atol=5e-3)


@pytest.mark.slow
def test_films_give_back_the_index_and_the_track(x64):
    """Six films of 60 frames, three at either index by the same normals; bounds: 4 standard errors.

    Squares of (mean - truth) / sd of H add up to less than the chi-squared quantile at 6e-5; the
    two indices are told apart by their means; bands of the track hold 0.9, its error between films
    as measured; each track is nearer than the positions of its frames alone.
    """
    z, means, held = [], {0.3: [], 0.7: []}, []
    for hurst in means:
        for seed in (11, 12, 13):
            times, x, counts = moving_spot.simulate(hurst, 60, seed)
            found, cost = moving_spot.posterior(times, counts, 200)
            assert cost["divergent"] < 10
            h = found["hurst"]
            z.append((h.mean() - hurst) / h.std())
            means[hurst].append(h.mean())
            held.append(moving_spot.inside(found["x"][:, 1:], x[1:]))
            error = np.mean((found["x"].mean(0) - x)[1:] ** 2)
            assert error < np.mean((np.asarray(moving_spot.positions(counts)[0]) - x)[1:] ** 2)
    assert np.sum(np.square(z)) < chi2.isf(6e-5, len(z))
    apart = np.mean(means[0.7]) - np.mean(means[0.3])
    assert apart > 4 * np.sqrt(sum(np.var(m, ddof=1) / 3 for m in means.values()))
    assert abs(np.mean(held) - 0.9) < 4 * np.std(held, ddof=1) / np.sqrt(len(held))
