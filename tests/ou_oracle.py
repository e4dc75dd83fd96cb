"""Dense Gaussian truth for Ornstein-Uhlenbeck paths, in NumPy float64."""

import numpy as np


def ou_moments(times, rate, mean, scale, init_mean, init_var):
    """Mean and covariance of an OU process started from a normal, by its closed form."""
    s = times - times[0]
    decay = np.exp(-rate * s)
    first = np.minimum(s[:, None], s[None, :])
    gap = np.abs(s[:, None] - s[None, :])
    stationary = scale**2 / (2.0 * rate)
    cov = stationary * (np.exp(-rate * gap) - np.exp(-rate * (gap + 2.0 * first)))
    return mean + decay * (init_mean - mean), cov + init_var * np.outer(decay, decay)


def normal_log_density(y, mean, cov):
    """Log density of the components of `y` that are not NaN."""
    keep = ~np.isnan(y)
    y, mean, cov = y[keep], mean[keep], cov[np.ix_(keep, keep)]
    _, log_det = np.linalg.slogdet(cov)
    r = y - mean
    return -0.5 * (r @ np.linalg.solve(cov, r) + log_det + y.size * np.log(2.0 * np.pi))
