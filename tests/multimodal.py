"""Models whose paths have several modes, with exact answers: a double well seen rarely.

`multimodal_reference.json` has their data and, from a grid filter of the Euler kernel, log
likelihoods at 81 scales, evidence, and what a path did between two observations.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import numpyro_sde as nsde

REFERENCE = json.loads((Path(__file__).parent / "multimodal_reference.json").read_text())
WELL_GRID = nsde.TimeGrid(4.0 * np.arange(11), 0.05)
ABS_GRID = nsde.TimeGrid(1.0 * np.arange(16), 0.05)
PRIOR = dist.LogNormal(-0.2, 0.5)


def data(name):
    return np.array(REFERENCE[name]["y"])


def exact(name):
    """Log scales and log likelihoods there."""
    return (np.array(REFERENCE[name][k]) for k in ("grid_log_scale", "log_likelihood"))


def well_path(scale):
    sde = nsde.processes.DoubleWell(2.0, 2.0, scale)
    return nsde.SDEPath(sde, WELL_GRID, dist.Normal(-1.0, 0.3))


def noisy(t, x):
    return dist.Normal(x, 0.1)


def well(y=None):
    x = numpyro.sample("x", well_path(numpyro.sample("scale", PRIOR)))
    nsde.observe("y", x, noisy, obs=y, at=WELL_GRID.index)


def grid_log_likelihood(scale, y, cells=1600, wide=25.0):
    """Of the double well's data, by the Euler kernel on a grid: for scales off the table."""
    x, dt = np.linspace(-wide, wide, cells), 0.05
    width, sd = x[1] - x[0], scale * np.sqrt(dt)
    ahead = (x[None] - (x + (2.0 * x - 2.0 * x**3) * dt)[:, None]) / sd
    kernel = np.exp(-0.5 * ahead**2) / (sd * np.sqrt(2.0 * np.pi)) * width
    gap = np.linalg.matrix_power(kernel, 80)
    p, total = np.exp(-0.5 * ((x + 1.0) / 0.3) ** 2) / (0.3 * np.sqrt(2.0 * np.pi)) * width, 0.0
    for k, value in enumerate(y):
        p = p @ gap if k else p
        p = p * np.exp(-0.5 * ((value - x) / 0.1) ** 2) / (0.1 * np.sqrt(2.0 * np.pi))
        total += np.log(p.sum())
        p = p / p.sum()
    return total


def absolute(t, x):
    return dist.Normal(jnp.abs(x), 0.1)


def folded(y=None):
    """The same, seen without its sign: every posterior is symmetric."""
    sde = nsde.processes.DoubleWell(2.0, 2.0, numpyro.sample("scale", PRIOR))
    x = numpyro.sample("x", nsde.SDEPath(sde, ABS_GRID, dist.Normal(0.0, 1.0)))
    nsde.observe("y", x, absolute, obs=y, at=ABS_GRID.index)


FHN_GRID = nsde.TimeGrid(0.5 * np.arange(41), 0.05)


def neuron_path(epsilon, scale):
    sde = nsde.processes.FitzHughNagumo(epsilon=epsilon, gamma=1.5, beta=0.8, scale=scale)
    start = dist.Normal(jnp.array([-0.8, -0.5]), 0.2).to_event(1)
    return nsde.SDEPath(sde, FHN_GRID, start, scheme=nsde.schemes.Euler())


def voltage(t, x):
    return dist.Normal(x[0], 0.05)


def neuron(y=None):
    """A neuron seen by its voltage alone; noise in the recovery only."""
    epsilon = numpyro.sample("epsilon", dist.LogNormal(-2.2, 0.5))
    scale = numpyro.sample("scale", dist.LogNormal(-1.2, 0.5))
    x = numpyro.sample("x", neuron_path(epsilon, scale))
    nsde.observe("y", x, voltage, obs=y, at=FHN_GRID.index)
