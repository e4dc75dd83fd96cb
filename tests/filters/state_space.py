"""State-space models built by hand, and independent answers to compare filters with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from scipy.linalg import expm
from scipy.special import logsumexp

from numpyro_sde.schemes.euler import Euler
from numpyro_sde.sde import SDE
from numpyro_sde.statespace.model import Instrument, StateSpaceModel


def build(sde, times, init_mean, init_cov, instruments=(), scheme=None, scalar=False):
    """A model on a grid; `init_mean` a vector, also for scalar processes."""
    scheme = Euler() if scheme is None else scheme
    times = np.array(times, float)
    dt = np.diff(times)
    return StateSpaceModel(
        sde=sde,
        scheme=scheme,
        scheme_chosen=True,
        times=times,
        dt=dt,
        cache=scheme.prepare(sde, times, dt),
        init_mean=jnp.asarray(init_mean, float),
        init_cov=jnp.asarray(init_cov, float),
        init_gaussian=True,
        scalar=scalar,
        instruments=tuple(instruments),
    )


def instrument(moments, log_prob, gaussian, values, inputs=None):
    """An instrument on the whole grid; NaN in `values` marks what is missing."""
    values = np.asarray(values, float)
    present = ~np.isnan(values)
    return Instrument(
        inputs=inputs,
        values=jnp.asarray(np.where(present, values, 0.0), float),
        present=jnp.asarray(present),
        moments=moments,
        log_prob=log_prob,
        gaussian=gaussian,
        rows=np.flatnonzero(present.any(1)),
    )


def linear_instrument(C, R, values):
    """`y = C x + N(0, R)`."""

    def moments(inputs, x):
        return jnp.asarray(C, float) @ x, jnp.asarray(R, float)

    def log_prob(inputs, x, y, present):
        raise AssertionError("a Gaussian emission needs moments only")

    return instrument(moments, log_prob, True, values)


def scalar_instrument(law, values, gaussian=False):
    """One observation `law(x)` of a scalar state."""

    def moments(inputs, x):
        d = law(x[0])
        return jnp.reshape(d.mean, (1,)), jnp.reshape(d.variance, (1, 1))

    def log_prob(inputs, x, y, present):
        return jnp.where(present[0], law(x[0]).log_prob(y[0]), 0.0)

    return instrument(moments, log_prob, gaussian, np.reshape(values, (-1, 1)))


def linear_sde(A, b, L):
    return SDE(
        lambda t, x, p: p["A"] @ x + p["b"],
        lambda t, x, p: p["L"],
        params={"A": jnp.asarray(A, float), "b": jnp.asarray(b, float), "L": jnp.asarray(L, float)},
        event_dims={"A": 2, "b": 1, "L": 2},
    )


def euler_steps(A, b, L, dt):
    """Transition matrices, offsets and covariances of the Euler scheme."""
    d = len(b)
    return [(np.eye(d) + A * h, b * h, L @ L.T * h) for h in dt]


def exact_steps(A, b, L, dt):
    """Those of the exact discretisation, by the matrix exponentials of Van Loan (1978)."""
    d = len(b)
    steps = []
    for h in dt:
        F = expm(A * h)
        block = expm(np.block([[-A, L @ L.T], [np.zeros((d, d)), A.T]]) * h)
        Q = block[d:, d:].T @ block[:d, d:]
        shift = expm(np.block([[A, b[:, None]], [np.zeros((1, d + 1))]]) * h)[:d, d]
        steps.append((F, shift, Q))
    return steps


class Dense:
    """The joint normal law of all states and observations, as one vector."""

    def __init__(self, steps, m0, P0, observations):
        """`observations`: pairs (C, R, values (N, p) with NaN where missing)."""
        self.d, self.n = len(m0), len(steps) + 1
        d, n = self.d, self.n
        mean, cov = np.zeros(n * d), np.zeros((n * d, n * d))
        mean[:d], cov[:d, :d] = m0, P0
        for k, (F, c, Q) in enumerate(steps):
            now, new = slice(k * d, (k + 1) * d), slice((k + 1) * d, (k + 2) * d)
            mean[new] = F @ mean[now] + c
            cov[new, : (k + 1) * d] = F @ cov[now, : (k + 1) * d]
            cov[: (k + 1) * d, new] = cov[new, : (k + 1) * d].T
            cov[new, new] = F @ cov[now, now] @ F.T + Q
        self.mean, self.cov = mean, cov
        rows, noise, y, time = [], [], [], []
        for C, R, values in observations:
            start = len(rows)
            for k in range(n):
                for i in range(len(C)):
                    row = np.zeros(n * d)
                    row[k * d : (k + 1) * d] = C[i]
                    rows.append(row)
                    y.append(values[k, i])
                    time.append(k)
            noise.append((start, np.kron(np.eye(n), R)))
        total = len(rows)
        self.H, self.R = np.array(rows), np.zeros((total, total))
        for start, block in noise:
            size = len(block)
            self.R[start : start + size, start : start + size] = block
        self.y, self.time = np.array(y), np.array(time)

    def posterior(self, until=None):
        """Mean, covariance and log density given the observations up to a time index."""
        keep = ~np.isnan(self.y)
        if until is not None:
            keep &= self.time <= until
        H, R, y = self.H[keep], self.R[np.ix_(keep, keep)], self.y[keep]
        if not len(y):
            return self.mean.reshape(self.n, self.d), self._blocks(self.cov), 0.0
        S = H @ self.cov @ H.T + R
        r = y - H @ self.mean
        gain = np.linalg.solve(S, H @ self.cov).T
        log_density = -0.5 * (
            r @ np.linalg.solve(S, r) + np.linalg.slogdet(S)[1] + len(y) * np.log(2 * np.pi)
        )
        mean = (self.mean + gain @ r).reshape(self.n, self.d)
        return mean, self._blocks(self.cov - gain @ H @ self.cov), log_density

    def _blocks(self, cov):
        d = self.d
        return np.array([cov[k * d : (k + 1) * d, k * d : (k + 1) * d] for k in range(self.n)])

    def filtered(self):
        laws = [self.posterior(k) for k in range(self.n)]
        return (
            np.array([m[k] for k, (m, _, _) in enumerate(laws)]),
            np.array([P[k] for k, (_, P, _) in enumerate(laws)]),
            np.diff([0.0] + [law[2] for law in laws]),
        )


def grid_filter(model, law, points, substeps=1):
    """Scalar filter by brute force: densities on a grid of points, Euler in small steps.

    Returns:
        Increments of the log likelihood, filtered means and variances.
    """
    points = np.asarray(points)
    width = points[1] - points[0]
    sde = model.sde
    drift = np.asarray(jax.vmap(lambda x: sde.ito_drift_at(0.0, x))(points))
    scale = np.asarray(jax.vmap(lambda x: sde.noise_factor_at(0.0, x))(points))
    (device,) = model.instruments
    p = dist.Normal(model.init_mean[0], jnp.sqrt(model.init_cov[0, 0])).log_prob(points)
    weights = np.exp(np.asarray(p)) * width
    increments, means, variances, kernels = [], [], [], {}
    for k in range(model.num_times):
        if k:
            h = round(float(model.dt[k - 1]) / substeps, 12)
            if h not in kernels:
                z = (points[:, None] - (points + drift * h)) / (np.abs(scale) * np.sqrt(h))
                kernel = np.exp(-0.5 * z**2)
                # Each column a law over the points, whose mass beyond the ends is put back.
                kernels[h] = np.linalg.matrix_power(kernel / kernel.sum(0), substeps)
            weights = kernels[h] @ weights
        increment = 0.0
        if bool(device.present[k, 0]):
            y = device.values[k, 0]
            log_p = np.asarray(jax.vmap(lambda x, y: law(x).log_prob(y), (0, None))(points, y))
            with np.errstate(divide="ignore"):
                log_w = np.log(weights) + log_p
            increment = logsumexp(log_w)
            weights = np.exp(log_w - increment)
        increments.append(increment)
        mean = weights @ points
        means.append(mean)
        variances.append(weights @ (points - mean) ** 2)
    return np.array(increments), np.array(means), np.array(variances)
