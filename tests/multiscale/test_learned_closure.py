"""The closure of `examples/learned_closure.py`: what it reads, and what it is good for."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))

pytest.importorskip("matplotlib")
import learned_closure


def test_u_is_read_off_two_states():
    """A run whose U is known, constant and large: what two readings miss each other by is U."""
    u = np.linspace(-8.0, 12.0, learned_closure.SLOW)
    x = [jnp.asarray(np.random.default_rng(0).normal(4.0, 4.0, size=learned_closure.SLOW))]
    steps = 20
    for _ in range(30 * steps):
        h = learned_closure.SEEN / steps
        x.append(learned_closure.runge_kutta(lambda x: learned_closure.advection(x) - u, x[-1], h))
    read = np.asarray(learned_closure.missed(jnp.stack(x[::steps]))[1])
    assert read.shape == (learned_closure.SLOW, 30)
    assert np.abs(read - u[:, None]).max() < 0.02 * np.abs(u).max()


@pytest.mark.slow
def test_closures_in_their_order():
    """The example's own run, 20 forecasts of 40 members; bounds are 4 standard errors.

    CRPS at a lead of 2.0, start by start: the learned closure is better than none, than a line and
    than a polynomial without noise, and not worse than the polynomial with noise. Its 90 per cent
    intervals hold their share of 160 values. Its climate has the full system's mean, and its sd to
    3 per cent. Of U in a run that nobody saw its 90 per cent band holds 0.85 to 0.95.
    """
    found = learned_closure.experiment(500, 20, 40, 100, 150, 8000)
    crps = {name: row["crps"][:, -1] for name, row in found["scores"].items()}
    for name in ("no closure", "a line", "quartic", "quartic, noise"):
        more = crps["learned"] - crps[name]
        error = more.std(ddof=1) / np.sqrt(len(more))
        assert more.mean() < (4 * error if name == "quartic, noise" else -4 * error)
    held = found["scores"]["learned"]["held"][-1]
    assert abs(held - 0.9) < 4 * np.sqrt(0.09 / 160)
    (x, u), (own, own_u) = found["later"], found["climate"]["learned"]
    blocks = [block.mean() for block in np.array_split(x, 10)]
    members = own.mean(axis=(1, 2))
    error = np.hypot(np.std(blocks, ddof=1) / np.sqrt(10), members.std(ddof=1) / np.sqrt(40))
    assert abs(own.mean() - x.mean()) < 4 * error
    assert abs(own.std() / x.std() - 1) < 0.03
    inside, _ = learned_closure.against_the_unseen(found["draws"], (own, own_u), x, u)
    assert 0.85 < inside < 0.95
