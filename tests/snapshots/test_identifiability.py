"""What snapshots cannot tell is found, and what they can is not called in question."""

import numpy as np
import numpyro.distributions as dist
import pytest
from scipy.stats import energy_distance

import numpyro_sde as nsde
from numpyro_sde.snapshots.identifiability import energy_test


def test_energy_test_has_its_level_and_agrees_with_scipy_on_order():
    rng = np.random.default_rng(0)
    values = [
        energy_test(rng.normal(size=(30, 1)), rng.normal(size=(30, 1)), rng, 99) for _ in range(200)
    ]
    # Level 0.1: 4 standard errors of a share of 200 are 0.085.
    assert abs(np.mean(np.array(values) <= 0.1) - 0.1) < 0.085
    a, b = rng.normal(size=30), rng.normal(1.0, 1.0, 30)
    shuffled = []
    both = np.concatenate([a, b])
    for _ in range(200):
        order = rng.permutation(60)
        shuffled.append(energy_distance(both[order[:30]], both[order[30:]]))
    expected = np.mean(np.array(shuffled) >= energy_distance(a, b))
    found = energy_test(a[:, None], b[:, None], rng, 400)
    assert abs(found - expected) < 4 * np.sqrt(0.25 / 200)


def test_stationary_and_moving_populations():
    rng = np.random.default_rng(1)
    times = [0.0, 1.0, 2.0]
    start = rng.exponential(size=(3, 120, 2)) * np.array([1.0, 3.0])
    assert not nsde.snapshots.identifiability(times, start).ok
    moving = start + np.arange(3)[:, None, None]
    report = nsde.snapshots.identifiability(times, moving)
    assert report.ok, report.reasons
    assert report.change.max() < 0.05
    many = np.concatenate([moving] * 5)  # as many tests as times: they are allowed for
    assert nsde.snapshots.identifiability(np.arange(15.0), many, num_permutations=20).ok


def test_a_normal_start_is_symmetric_in_every_plane():
    rng = np.random.default_rng(2)
    mix = np.array([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [0.1, -0.3, 2.0]])
    clouds = np.stack([rng.normal(size=(150, 3)) @ mix.T + k for k in range(2)])
    report = nsde.snapshots.identifiability([0.0, 1.0], clouds)
    assert report.rotation.shape == (3,)
    assert "rotation" in report.reasons[0]
    scalar = nsde.snapshots.identifiability([0.0, 1.0], clouds[..., 0])
    assert scalar.rotation.size == 0
    assert scalar.ok


@pytest.mark.slow
def test_symmetry_is_what_hides_a_circulation():
    # The theorem behind the warning: two drifts, one of which circulates, move a normal start
    # about its rest point alike, and a start off it differently.
    still = nsde.processes.LinearSDE(-np.eye(2), np.zeros(2), np.sqrt(2) * np.eye(2))
    turn = np.array([[-1.0, -2.0], [2.0, -1.0]])
    round_ = nsde.processes.LinearSDE(turn, np.zeros(2), np.sqrt(2) * np.eye(2))
    rng = np.random.default_rng(3)
    y = rng.normal(size=(2, 20, 2))

    def density(sde, mean):
        init = dist.MultivariateNormal(np.full(2, mean), 0.3 * np.eye(2))
        return float(nsde.SnapshotLaw(sde, [0.0, 0.7], init, num_cells=20).log_prob(y))

    assert density(still, 0.0) == pytest.approx(density(round_, 0.0), abs=1e-2)
    assert abs(density(still, 3.0) - density(round_, 3.0)) > 0.3
