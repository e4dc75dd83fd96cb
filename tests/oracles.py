"""Reference computations that share no code with the package: plain NumPy in float64.

`dense_gaussian_ssm` conditions the joint normal law of all states and observations of a
linear-Gaussian model. It is cubic in the number of observations: for short series.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.linalg


class DenseResult(NamedTuple):
    """Log likelihood and moments from the joint law; T times, d states."""

    log_likelihood: float
    increments: np.ndarray  # (T,) log p(y_k | y_0..y_{k-1})
    filtered_mean: np.ndarray  # (T, d)
    filtered_cov: np.ndarray  # (T, d, d)
    predicted_mean: np.ndarray  # (T, d)
    predicted_cov: np.ndarray  # (T, d, d)
    smoothed_mean: np.ndarray  # (T, d)
    smoothed_cov: np.ndarray  # (T, d, d)
    smoothed_cross: np.ndarray  # (T - 1, d, d): Cov(x_{k+1}, x_k | all)


def joint_states(m0, P0, F, c, Q) -> tuple[np.ndarray, np.ndarray]:
    """Mean (T d,) and covariance (T d, T d) of x_0, ..., x_{T-1} stacked."""
    m0, P0, F, c, Q = (np.asarray(a, np.float64) for a in (m0, P0, F, c, Q))
    T, d = len(F) + 1, len(m0)
    mean, cov = np.zeros((T, d)), np.zeros((T, d, T, d))
    mean[0], cov[0, :, 0, :] = m0, P0
    for k in range(T - 1):
        mean[k + 1] = F[k] @ mean[k] + c[k]
        row = np.einsum("ij,jtl->itl", F[k], cov[k])  # Cov(x_{k+1}, x_t) for t <= k
        cov[k + 1, :, : k + 1, :] = row[:, : k + 1, :]
        cov[: k + 1, :, k + 1, :] = np.transpose(row[:, : k + 1, :], (1, 2, 0))
        cov[k + 1, :, k + 1, :] = F[k] @ cov[k, :, k, :] @ F[k].T + Q[k]
    return mean.reshape(-1), cov.reshape(T * d, T * d)


def _condition(mean, cov, H, noise, y):
    """Moments of x ~ N(mean, cov) given y = H x + N(0, noise), and log p(y)."""
    if len(y) == 0:
        return mean, cov, 0.0
    S = H @ cov @ H.T + noise
    L = scipy.linalg.cholesky(S, lower=True)
    z = scipy.linalg.solve_triangular(L, y - H @ mean, lower=True)
    W = scipy.linalg.solve_triangular(L, H @ cov, lower=True)
    log_density = -0.5 * z @ z - np.log(np.diag(L)).sum() - 0.5 * len(y) * np.log(2 * np.pi)
    return mean + W.T @ z, cov - W.T @ W, log_density


def dense_gaussian_ssm(m0, P0, F, c, Q, C, R, y, e=None, mask=None) -> DenseResult:
    """Condition the joint law of a linear-Gaussian state-space model.

    Shapes: m0 (d,), P0 (d, d), F (T-1, d, d), c (T-1, d), Q (T-1, d, d), C (p, d) or
    (T, p, d), R (p, p) or (T, p, p) covariances, y (T, p), e (p,) or (T, p), mask (T, p) True
    where observed.
    """
    y = np.asarray(y, np.float64)
    T, p = y.shape
    d = len(m0)
    C = np.broadcast_to(np.asarray(C, np.float64), (T, p, d))
    R = np.broadcast_to(np.asarray(R, np.float64), (T, p, p))
    e = np.zeros((T, p)) if e is None else np.broadcast_to(np.asarray(e, np.float64), (T, p))
    seen = np.ones((T, p), bool) if mask is None else np.asarray(mask, bool)
    mean, cov = joint_states(m0, P0, F, c, Q)

    H = np.zeros((T, p, T, d))
    noise = np.zeros((T, p, T, p))
    for k in range(T):
        H[k, :, k, :] = C[k]
        noise[k, :, k, :] = R[k]
    H, noise = H.reshape(T * p, T * d), noise.reshape(T * p, T * p)

    def given(last: int):
        """Moments of all states given the observations at times up to `last`."""
        keep = (seen & (np.arange(T) <= last)[:, None]).reshape(-1)
        value = (y - e).reshape(-1)[keep]
        m, P, log_density = _condition(mean, cov, H[keep], noise[np.ix_(keep, keep)], value)
        return m.reshape(T, d), P.reshape(T, d, T, d), log_density

    results = [given(k) for k in range(-1, T)]
    totals = np.array([r[2] for r in results])
    m, P, _ = results[-1]
    diagonal = range(T)
    return DenseResult(
        log_likelihood=float(totals[-1]),
        increments=np.diff(totals),
        filtered_mean=np.stack([results[k + 1][0][k] for k in diagonal]),
        filtered_cov=np.stack([results[k + 1][1][k, :, k, :] for k in diagonal]),
        predicted_mean=np.stack([results[k][0][k] for k in diagonal]),
        predicted_cov=np.stack([results[k][1][k, :, k, :] for k in diagonal]),
        smoothed_mean=m,
        smoothed_cov=np.stack([P[k, :, k, :] for k in diagonal]),
        smoothed_cross=np.stack([P[k + 1, :, k, :] for k in range(T - 1)])
        if T > 1
        else np.zeros((0, d, d)),
    )


def van_loan(A, b, L, h) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(F, c, Q) of dX = (A X + b) dt + L dW over h, by block exponentials (Van Loan, 1978)."""
    A, b, L = (np.asarray(a, np.float64) for a in (A, b, L))
    d = len(A)
    block = np.zeros((2 * d, 2 * d))
    block[:d, :d], block[:d, d:], block[d:, d:] = A, L @ L.T, -A.T
    E = scipy.linalg.expm(block * h)
    F = E[:d, :d]
    drift = np.zeros((d + 1, d + 1))
    drift[:d, :d], drift[:d, d] = A, b
    return F, scipy.linalg.expm(drift * h)[:d, d], E[:d, d:] @ F.T
