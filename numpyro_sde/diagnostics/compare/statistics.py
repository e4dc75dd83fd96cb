"""Distances and importance-sampling statistics of posterior draws, on NumPy arrays."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp

from numpyro_sde.diagnostics.compare.arviz_compat import smooth_log_weights

_CHUNK = 512  # columns of a path that are sorted and gathered at once


def wasserstein(
    first: Float[np.ndarray, "n *shape"], second: Float[np.ndarray, "m *shape"]
) -> Float[np.ndarray, "*shape"]:
    """1-Wasserstein distance between two samples, for every scalar along the first axis.

    The area between the two empirical quantile functions, exact for samples of unequal size.

    Args:
        first: Draws of one law, first axis.
        second: Draws of the other, same shape after the first axis.

    Example:
        >>> import numpy as np
        >>> float(wasserstein(np.array([0.0, 1.0]), np.array([3.0, 4.0])))
        3.0
    """
    shape = first.shape[1:]
    first = np.asarray(first, np.float64).reshape(len(first), -1)
    second = np.asarray(second, np.float64).reshape(len(second), -1)
    n, m = len(first), len(second)
    levels = np.union1d(np.arange(1, n + 1) / n, np.arange(1, m + 1) / m)
    widths = np.diff(levels, prepend=0.0)
    middle = levels - widths / 2
    rows = np.minimum((middle * n).astype(int), n - 1), np.minimum((middle * m).astype(int), m - 1)
    distance = np.empty(first.shape[1])
    for start in range(0, first.shape[1], _CHUNK):
        part = slice(start, start + _CHUNK)
        a, b = np.sort(first[:, part], axis=0), np.sort(second[:, part], axis=0)
        distance[part] = widths @ np.abs(a[rows[0]] - b[rows[1]])
    return distance.reshape(shape)


class LeaveOneOut(NamedTuple):
    """Result of :func:`leave_one_out`.

    Attributes:
        elpd: Expected log predictive density of each data point, shape ``(n,)``.
        num_effective: The effective number of parameters p_loo.
        khat: Pareto shape of each data point, shape ``(n,)``.
        threshold: k-hat above which a point's estimate is unreliable for this many draws.
    """

    elpd: Float[np.ndarray, " n"]
    num_effective: float
    khat: Float[np.ndarray, " n"]
    threshold: float


def khat_threshold(num_draws: int) -> float:
    """Largest trustworthy k-hat for a number of draws: min(1 - 1/log10(S), 0.7).

    Source: Vehtari, Simpson, Gelman, Yao and Gabry (2024), Journal of Machine Learning Research
    25 (72), section 3.2.4.

    Example:
        >>> round(khat_threshold(1000), 3), khat_threshold(10_000)
        (0.667, 0.7)
    """
    return min(1.0 - 1.0 / math.log10(max(num_draws, 2)), 0.7)


def leave_one_out(
    log_likelihood: Float[np.ndarray, "draw n"], relative_efficiency: float = 1.0
) -> LeaveOneOut:
    """Leave-one-out predictive densities by Pareto-smoothed importance sampling.

    Source: Vehtari, Gelman and Gabry (2017), Statistics and Computing 27, 1413-1432.

    Args:
        log_likelihood: Log density of each data point under each draw.
        relative_efficiency: Effective over actual number of draws.

    Example:
        >>> import numpy as np
        >>> constant = leave_one_out(np.full((100, 3), -1.5))
        >>> float(constant.elpd.sum())
        -4.5
    """
    draws = np.asarray(log_likelihood, np.float64).T
    if np.ptp(draws, axis=1).max(initial=0.0) == 0.0:
        # Every draw predicts alike: uniform weights, and no tail to fit.
        elpd, khat = draws[:, 0], np.full(len(draws), -np.inf)
    else:
        weights, khat = smooth_log_weights(-draws, relative_efficiency)
        elpd = logsumexp(weights + draws, axis=1)
    in_sample = logsumexp(draws, axis=1) - np.log(draws.shape[1])
    return LeaveOneOut(elpd, float(np.sum(in_sample - elpd)), khat, khat_threshold(draws.shape[1]))


class FitWeights(NamedTuple):
    """Result of :func:`fit_weights`.

    Attributes:
        elbo: Evidence lower bound, the mean of log p - log q.
        elbo_se: Monte Carlo standard error of ``elbo``.
        log_evidence: Importance-weighted log evidence, with smoothed weights.
        efficiency: Effective share of the draws as an importance sample, in (0, 1].
        khat: Pareto shape of the weights; above 0.7 the fit is no usable proposal.
    """

    elbo: float
    elbo_se: float
    log_evidence: float
    efficiency: float
    khat: float


def fit_weights(log_ratio: Float[np.ndarray, " draw"]) -> FitWeights:
    """Judge a variational fit by the weights log p(y, z) - log q(z) of draws z from q.

    Source: Yao, Vehtari, Simpson and Gelman (2018), Yes, but did it work?: evaluating
    variational inference, ICML.

    Args:
        log_ratio: Log of the unnormalised target density over the fit's density.

    Example:
        >>> import numpy as np
        >>> perfect = fit_weights(np.full(1000, -3.5))
        >>> perfect.elbo, perfect.khat
        (-3.5, -inf)
    """
    log_ratio = np.asarray(log_ratio, np.float64)
    n = len(log_ratio)
    with np.errstate(invalid="ignore"):  # a draw that the model forbids has log p = -inf
        elbo, elbo_se = float(np.mean(log_ratio)), float(np.std(log_ratio, ddof=1) / np.sqrt(n))
    possible = np.isfinite(log_ratio)
    if np.any(np.isnan(log_ratio) | (log_ratio == np.inf)) or not possible.any():
        return FitWeights(elbo, elbo_se, np.nan, np.nan, np.inf)
    if np.ptp(log_ratio[possible]) == 0.0:
        share = float(possible.mean())
        return FitWeights(elbo, elbo_se, log_ratio[possible][0] + np.log(share), share, -np.inf)
    weights, khat = smooth_log_weights(log_ratio)
    # Smoothing changes the tail alone: the bulk's normaliser carries over to the evidence.
    bulk = log_ratio <= np.median(log_ratio[possible])
    shift = logsumexp(log_ratio[bulk]) - logsumexp(weights[bulk])
    efficiency = float(np.exp(-logsumexp(2 * weights)) / n)
    return FitWeights(elbo, elbo_se, float(shift - np.log(n)), efficiency, float(khat))
