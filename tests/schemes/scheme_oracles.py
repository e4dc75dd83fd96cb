"""Transition laws and pathwise solutions in closed form, in NumPy and SciPy only.

Nothing here uses the package, so that its schemes are measured against independent formulas.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.linalg import expm
from scipy.special import ive


def normal_logpdf(x, mean, variance):
    return -0.5 * (np.log(2 * np.pi * variance) + (x - mean) ** 2 / variance)


def gbm_logpdf(x, x0, h, drift, volatility):
    """Log-normal: Karlin and Taylor (1981), section 15.2."""
    mean = np.log(x0) + (drift - 0.5 * volatility**2) * h
    return normal_logpdf(np.log(x), mean, volatility**2 * h) - np.log(x)


def ou_moments(x0, h, rate, mean, scale):
    decay = np.exp(-rate * h)
    return mean + (x0 - mean) * decay, scale**2 * -np.expm1(-2 * rate * h) / (2 * rate)


@dataclasses.dataclass(frozen=True)
class Cir:
    """`dX = rate (mean - X) dt + scale sqrt(X) dW`; Cox, Ingersoll and Ross (1985), eq. 18."""

    rate: float = 1.5
    mean: float = 0.8
    scale: float = 0.5

    @property
    def degree(self):
        return 2 * self.rate * self.mean / self.scale**2 - 1

    def logpdf(self, x, x0, h):
        decay = np.exp(-self.rate * h)
        c = 2 * self.rate / (self.scale**2 * (1 - decay))
        u, v = c * x0 * decay, c * x
        z = 2 * np.sqrt(u * v)
        q = self.degree
        return np.log(c) - u - v + 0.5 * q * np.log(v / u) + np.log(ive(q, z)) + z

    def moments(self, x0, h):
        decay = np.exp(-self.rate * h)
        spread = self.scale**2 / self.rate
        variance = x0 * spread * (decay - decay**2) + 0.5 * self.mean * spread * (1 - decay) ** 2
        return self.mean + (x0 - self.mean) * decay, variance

    # The same process in y = 2 sqrt(x) / scale: unit diffusion and a nonlinear drift.
    def root(self, x):
        return 2 * np.sqrt(x) / self.scale

    def root_drift(self, y):
        return (self.degree + 0.5) / y - 0.5 * self.rate * y

    def root_logpdf(self, y, y0, h):
        x, x0 = (0.5 * self.scale * y) ** 2, (0.5 * self.scale * y0) ** 2
        return self.logpdf(x, x0, h) + np.log(0.5 * self.scale**2 * y)

    def root_moments(self, y0, h):
        """Mean and variance by Gauss-Legendre quadrature of the density over 10 sd."""
        nodes, weights = np.polynomial.legendre.leggauss(300)
        reach = 10 * np.sqrt(h)
        y = y0 + reach * nodes
        mass = reach * weights * np.exp(self.root_logpdf(y, y0, h))
        assert abs(mass.sum() - 1) < 1e-10
        mean = mass @ y
        return mean, mass @ (y - mean) ** 2


def linear_moments(A, b, L, x0, h):
    """Mean and covariance of `dX = (A X + b) dt + L dW`; Van Loan (1978)."""
    d = len(b)
    drift = expm(np.block([[A, b[:, None]], [np.zeros((1, d + 1))]]) * h)
    noise = expm(np.block([[-A, L @ L.T], [np.zeros((d, d)), A.T]]) * h)
    transition = noise[d:, d:].T
    return drift[:d, :d] @ x0 + drift[:d, d], transition @ noise[:d, d:]


@dataclasses.dataclass(frozen=True)
class BentOscillator:
    """A kinetic Ornstein-Uhlenbeck process (q, v) seen as (Q, v) with Q = sinh(q).

    `dQ = sqrt(1 + Q^2) v dt`, `dv = -(stiffness asinh(Q) + friction v) dt + scale dW`: a
    nonlinear hypoelliptic SDE with one additive noise, whose law is a transformed Gaussian.
    """

    stiffness: float = 2.0
    friction: float = 0.6
    scale: float = 0.7

    @property
    def matrices(self):
        A = np.array([[0.0, 1.0], [-self.stiffness, -self.friction]])
        return A, np.zeros(2), np.array([[0.0], [self.scale]])

    def _gaussian(self, x0, h):
        return linear_moments(*self.matrices, np.array([np.arcsinh(x0[0]), x0[1]]), h)

    def moments(self, x0, h):
        m, C = self._gaussian(x0, h)
        lift = np.exp(0.5 * C[0, 0])
        mean = np.array([np.sinh(m[0]) * lift, m[1]])
        spread = 0.5 * (np.cosh(2 * m[0]) * np.exp(2 * C[0, 0]) - 1) - mean[0] ** 2
        cross = C[0, 1] * np.cosh(m[0]) * lift
        return mean, np.array([[spread, cross], [cross, C[1, 1]]])

    def standard_points(self, x0, h, z):
        """States at the given standardised Gaussian coordinates, and their log density."""
        m, C = self._gaussian(x0, h)
        q = m + z @ np.linalg.cholesky(C).T
        log_p = -0.5 * (z**2).sum(1) - np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(C)[1]
        return np.stack([np.sinh(q[:, 0]), q[:, 1]], axis=1), log_p - np.log(np.cosh(q[:, 0]))


class BrownianSteps:
    """Brownian paths on [0, 1] known finely, with their space-time Levy areas at coarse steps.

    Over a step of length h, `H = (1/h) int (B_r - (r/h) W) dr` with B started at zero
    (Foster, Lyons and Oberhauser 2020).
    """

    def __init__(self, num_paths, num_fine, seed):
        rng = np.random.default_rng(seed)
        self.h = 1.0 / num_fine
        self.W = rng.normal(size=(num_paths, num_fine)) * np.sqrt(self.h)
        self.H = rng.normal(size=(num_paths, num_fine)) * np.sqrt(self.h / 12)

    def normals(self, num_steps):
        """Standard normals behind (W, H) of equal steps, shape `(paths, steps, 2)`."""
        paths, fine = self.W.shape
        per = fine // num_steps
        W = self.W.reshape(paths, num_steps, per)
        H = self.H.reshape(paths, num_steps, per)
        h = 1.0 / num_steps
        start = np.cumsum(W, axis=2) - W
        total = W.sum(axis=2)
        area = self.h * (start + 0.5 * W + H).sum(axis=2) / h - 0.5 * total
        return np.stack([total / np.sqrt(h), area / np.sqrt(h / 12)], axis=2)

    def integral_of_exponential(self, a, s):
        """`int_0^1 exp(a r + s B_r) dr` for each path, with an error of order `h^1.5`.

        Within a fine step the exponential is expanded to second order; the integral of B^2 is
        replaced by its mean given the increment, `h W^2 / 3 + h^2 / 6`.
        """
        start = np.cumsum(self.W, axis=1) - self.W
        time = self.h * np.arange(self.W.shape[1])
        first = self.h * (0.5 * self.W + self.H)
        second = self.h * self.W**2 / 3 + self.h**2 / 6
        inner = self.h + 0.5 * a * self.h**2 + s * first + 0.5 * s**2 * second
        return np.sum(np.exp(a * time + s * start) * inner, axis=1)


@dataclasses.dataclass(frozen=True)
class Verhulst:
    """Stochastic logistic growth `dX = X (growth - crowding X) dt + noise X dW`.

    Solved path by path: Kloeden and Platen (1992), section 4.4. Its logarithm has
    additive noise and a nonlinear drift.
    """

    growth: float = 1.5
    crowding: float = 1.2
    noise: float = 0.6

    def solve(self, x0, brownian):
        a = self.growth - 0.5 * self.noise**2
        end = np.exp(a + self.noise * brownian.W.sum(axis=1))
        total = brownian.integral_of_exponential(a, self.noise)
        return x0 * end / (1 + self.crowding * x0 * total)
