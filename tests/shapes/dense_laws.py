"""Dense Gaussian laws of linear SDEs under inputs and events, by scipy alone.

Each stretch between two times at which something changes is discretised by one matrix exponential
of the augmented system (Van Loan 1978); the joint law of all states is written out, and data are a
linear map of it. No filter, nothing of the package.
"""

import numpy as np
from scipy.linalg import block_diag, expm
from scipy.stats import multivariate_normal


def stretch(A, b0, b1, L, h):
    """`F, c, Q` of `dX = (A X + b0 + b1 s) ds + L dW` over h."""
    A, L = np.atleast_2d(A), np.atleast_2d(L)
    d = A.shape[0]
    M = np.zeros((d + 2, d + 2))
    M[:d, :d], M[:d, d], M[:d, d + 1], M[d, d + 1] = A, b1, b0, 1.0
    big = expm(M * h)
    V = expm(np.block([[-A, L @ L.T], [np.zeros((d, d)), A.T]]) * h)
    F = V[d:, d:].T
    return F, big[:d, d + 1], F @ V[:d, d:]


class Law:
    """Joint law of the states at increasing times, one after the other."""

    def __init__(self, m0, P0):
        self.mean = [np.atleast_1d(np.asarray(m0, float))]
        self.cov = [[np.atleast_2d(np.asarray(P0, float))]]
        self.now = (np.eye(len(self.mean[0])), 0 * self.mean[0], 0 * self.cov[0][0])

    def move(self, F, c, Q):
        F0, c0, Q0 = self.now
        self.now = F @ F0, F @ c0 + c, F @ Q0 @ F.T + Q

    def jump(self, G, d):
        G, d = np.atleast_2d(G), np.atleast_1d(d)
        F0, c0, Q0 = self.now
        self.now = G @ F0, G @ c0 + d, G @ Q0 @ G.T

    def mark(self):
        """A state whose law is wanted."""
        F, c, Q = self.now
        self.mean.append(F @ self.mean[-1] + c)
        column = [F @ block for block in self.cov[-1]]
        self.cov.append([*column, F @ self.cov[-1][-1] @ F.T + Q])
        d = len(c)
        self.now = (np.eye(d), np.zeros(d), np.zeros((d, d)))

    def moments(self):
        n, d = len(self.mean), len(self.mean[0])
        cov = np.zeros((n * d, n * d))
        for i, row in enumerate(self.cov):
            for j, block in enumerate(row):
                cov[i * d : i * d + d, j * d : j * d + d] = block
                cov[j * d : j * d + d, i * d : i * d + d] = block.T
        return np.concatenate(self.mean), cov

    def log_density(self, y, C, e, R):
        """Of data `y[k] = C[k] x[k] + e[k] + N(0, R[k])` at the marked states, NaN missing."""
        mean, cov = self.moments()
        H = block_diag(*[np.atleast_2d(c) for c in C])
        y, e = np.ravel(y), np.ravel(e)
        total = H @ cov @ H.T + block_diag(*[np.atleast_2d(r) for r in R])
        seen = ~np.isnan(y)
        law = multivariate_normal((H @ mean + e)[seen], total[np.ix_(seen, seen)])
        return law.logpdf(y[seen])


def held(times, values, t, order):
    """Value and slope of an input just after t."""
    times, values = np.asarray(times), np.asarray(values)
    i = np.searchsorted(times, t + 1e-9, side="right") - 1
    i = min(max(i, 0), len(times) - 1)
    if order == "hold":
        return values[i], 0.0
    if order == "hold_next":
        return values[min(i + 1, len(times) - 1)], 0.0
    i = min(i, len(times) - 2)
    slope = (values[i + 1] - values[i]) / (times[i + 1] - times[i])
    return values[i] + slope * (t - times[i]), slope
