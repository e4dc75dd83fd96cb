"""A process whose forecasts have closed forms, and how draws are held against them."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist

import numpyro_sde as nsde

RATE, MEAN, SCALE, SD = 0.8, 0.4, 0.9, 0.3
TIMES = np.array([0.0, 0.4, 1.0, 2.3, 3.0])
Y = np.array([0.2, 0.9, np.nan, -0.3, 1.4])
AHEAD = np.array([4.5, 3.2, 7.0])  # in no order
KEY = jax.random.key(0)
NUM = 4000
DRAWS = {"unused": np.zeros(NUM)}


def model(times=TIMES, y=Y):
    numpyro.sample("unused", dist.Normal(0.0, 1.0))
    ou = nsde.processes.OrnsteinUhlenbeck(RATE, MEAN, SCALE)
    x = numpyro.sample("x", nsde.SDEPath(ou, times, dist.Normal(MEAN, SCALE / np.sqrt(2 * RATE))))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, SD), obs=y)


def exact(times=TIMES, y=Y, ahead=AHEAD):
    """Mean and sd of the path at further times given the data."""
    every = np.concatenate([times, ahead])
    cov = SCALE**2 / (2 * RATE) * np.exp(-RATE * np.abs(np.subtract.outer(every, every)))
    seen = np.flatnonzero(~np.isnan(y))
    new = len(times) + np.arange(len(ahead))
    K = cov[np.ix_(seen, seen)] + SD**2 * np.eye(len(seen))
    gain = np.linalg.solve(K, cov[np.ix_(seen, new)])
    mean = MEAN + gain.T @ (y[seen] - MEAN)
    return mean, np.sqrt(np.diag(cov[np.ix_(new, new)] - gain.T @ cov[np.ix_(seen, new)]))


def check(draws, mean, sd, num=NUM):
    """Means and sds within 4 Monte Carlo errors."""
    assert np.all(np.abs(draws.mean(0) - mean) < 4 * sd / np.sqrt(num))
    assert np.all(np.abs(draws.std(0) - sd) < 4 * sd / np.sqrt(2 * num))


def latent_draws(times=TIMES, y=Y):
    """Independent draws of the latent path, by the smoother that is tested elsewhere."""
    return np.asarray(
        nsde.smooth(model, DRAWS, times, y, method=nsde.filters.Kalman(), rng_key=KEY)["x"]
    )
