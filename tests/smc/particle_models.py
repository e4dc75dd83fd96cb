"""Small models with exact answers, as the particle engine takes them."""

from __future__ import annotations

import jax
import numpy as np
import numpyro.distributions as dist

import numpyro_sde as nsde
from numpyro_sde.distributions.observation import Emission
from numpyro_sde.distributions.state_space import ObservedPath
from numpyro_sde.distributions.statement import make_statement
from numpyro_sde.smc.resampling import SCHEMES
from numpyro_sde.smc.settings import PROPOSALS, Setting

OU = nsde.processes.OrnsteinUhlenbeck(1.0, 0.3, 0.7)
TIMES = np.array([0.0, 0.5, 1.0, 1.6])
Y = np.array([0.5, -0.6, np.nan, 0.9])


def emission(t, x):
    return dist.Normal(x, 0.4)


def setting(num_particles, proposal="bootstrap", scheme="systematic", threshold=0.5):
    return Setting(num_particles, PROPOSALS[proposal](), SCHEMES[scheme], threshold)


def ou_path(fine: bool):
    """Four times, the third not observed; with `fine`, steps between them too."""
    grid = nsde.TimeGrid(TIMES, 0.21) if fine else TIMES
    path = nsde.SDEPath(OU, grid, dist.Normal(0.0, 0.6), scheme=nsde.schemes.Euler())
    return path, (grid.index if fine else np.arange(4))


def on_model(path, at, y, fn, law=emission):
    """Apply `fn` to the state-space model of one path and its data."""
    statement = make_statement(
        Emission(law, None, None, None, len(at), ()), at, path.state_shape, ()
    )
    return ObservedPath(path, (), ((statement, y),)).map(fn)


def exact(fine: bool):
    """Kalman filter and smoother of the same discretised model."""
    path, at = ou_path(fine)
    return nsde.filter_path(path, emission, Y, method=nsde.filters.Kalman(), at=at)


def dense(fine: bool):
    """Log likelihood, smoothed means and variances by the joint normal law of all states."""
    path, at = ou_path(fine)
    times = np.asarray(path.times, np.float64)
    mean, cov = np.zeros(len(times)), np.zeros((len(times), len(times)))
    cov[0, 0] = 0.6**2
    for k, dt in enumerate(np.diff(times)):
        shrink = 1.0 - 1.0 * dt
        mean[k + 1] = shrink * mean[k] + 0.3 * dt
        cov[k + 1, : k + 1] = cov[: k + 1, k + 1] = shrink * cov[k, : k + 1]
        cov[k + 1, k + 1] = shrink**2 * cov[k, k] + 0.7**2 * dt
    seen = np.asarray(at)[~np.isnan(Y)]
    y = Y[~np.isnan(Y)] - mean[seen]
    S = cov[np.ix_(seen, seen)] + 0.4**2 * np.eye(len(seen))
    gain = np.linalg.solve(S, cov[seen]).T
    log_likelihood = -0.5 * (y @ np.linalg.solve(S, y) + np.linalg.slogdet(2 * np.pi * S)[1])
    return log_likelihood, mean + gain @ y, np.diag(cov - gain @ cov[seen])


def replicate(fine, one, num, seed=0, batch_size=1000):
    """`one(model, key)` for `num` keys, compiled once."""
    path, at = ou_path(fine)
    keys = jax.random.split(jax.random.key(seed), num)

    def run(model):
        return jax.lax.map(lambda k: one(model, k), keys, batch_size=batch_size)

    return jax.tree.map(np.asarray, jax.jit(lambda: on_model(path, at, Y, run))())


def standard_scores(values, truth):
    """Deviations of means over the first axis from the truth, in standard errors."""
    values = np.asarray(values, np.float64)
    error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
    return np.abs(values.mean(axis=0) - np.asarray(truth)) / (error + 1e-12)
