"""Linear-Gaussian models the tests of the linear engine run over, as NumPy arrays."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from oracles import van_loan
from scipy.linalg import expm, solve_continuous_lyapunov

from numpyro_sde.linear.kalman import LinearGaussian

NUM_TIMES = 12


def _irregular(rng, scale):
    return rng.uniform(0.2, 1.8, NUM_TIMES - 1) * scale


def _from_sde(A, b, L, dt):
    parts = [van_loan(A, b, L, h) for h in dt]
    return tuple(np.stack(x) for x in zip(*parts, strict=True))


def _chain(d):
    """Integrator chain: noise enters the last component only."""
    A = np.diag(np.ones(d - 1), 1)
    L = np.zeros((d, 1))
    L[-1] = 1.0
    return A, L


def make(name: str) -> dict:
    """Arrays of one model: m0, P0, F, c, Q, C, R (covariances), e, y, mask."""
    rng = np.random.default_rng(sum(map(ord, name)))
    d, p, A, L, dt, P0, R, C = 2, 1, None, None, _irregular(rng, 0.3), None, None, None
    if name == "scalar":
        d, A, L = 1, np.array([[-0.8]]), np.array([[0.6]])
    elif name == "scalar two instruments":
        d, p, A, L = 1, 2, np.array([[-0.8]]), np.array([[0.6]])
    elif name in ("d2", "d4", "d7"):
        d = int(name[1])
        A = -np.eye(d) + 0.4 * rng.normal(size=(d, d))
        L = 0.5 * np.eye(d) + 0.1 * rng.normal(size=(d, d))
    elif name in ("d2 two instruments", "d4 two instruments"):
        d, p = int(name[1]), 2
        A, L = -np.eye(d) + 0.3 * rng.normal(size=(d, d)), 0.5 * np.eye(d)
    elif name == "correlated noise":
        d, p, A, L = 2, 3, -np.eye(2), np.eye(2)
        B = rng.normal(size=(3, 3))
        R = B @ B.T + 0.2 * np.eye(3)
    elif name == "unstable":
        A, L = np.array([[0.9, 0.3], [0.0, 0.5]]), 0.3 * np.eye(2)
    elif name == "nearly singular":  # one noise, two rates: Q has correlation 1 - O(dt^2)
        A, L, dt = np.diag([-1.0, -1.3]), np.array([[1.0], [1.0]]), _irregular(rng, 0.05)
        P0 = np.eye(2) * 0.5
    elif name == "singular":  # a state without noise, a state known at the start
        A, L = np.array([[0.0, 1.0], [0.0, 0.0]]), np.zeros((2, 1))
        P0 = np.diag([0.0, 1.0])
    elif name == "very short step":
        d = 4
        A, L = _chain(4)
        dt = _irregular(rng, 1e-4)
    elif name == "hypoelliptic":
        A, L = _chain(2)
        dt = _irregular(rng, 1e-3)
    elif name == "stiff":
        A, L = np.array([[-200.0, 1.0], [0.5, -0.1]]), np.diag([10.0, 0.3])
    else:
        raise KeyError(name)
    if name == "stiff":  # the block exponential overflows here: stationary fast part by hand
        stationary = solve_continuous_lyapunov(A, -L @ L.T)
        F = np.stack([expm(A * h) for h in dt])
        Q = np.stack([stationary - f @ stationary @ f.T for f in F])
        c = np.zeros((len(dt), d))
    else:
        F, c, Q = _from_sde(A, rng.normal(size=d), L, dt)
        Q = (Q + np.swapaxes(Q, 1, 2)) / 2
    if P0 is None:
        B = rng.normal(size=(d, d))
        P0 = B @ B.T / d + 0.2 * np.eye(d)
    C = np.eye(p, d) + 0.3 * rng.normal(size=(p, d)) if C is None else C
    R = np.diag(rng.uniform(0.05, 0.3, p)) if R is None else R
    y = rng.normal(size=(NUM_TIMES, p))
    mask = rng.uniform(size=(NUM_TIMES, p)) > 0.25
    mask[3] = False  # a time at which nothing is seen
    offsets, start = rng.normal(size=p), rng.normal(size=d)
    return {
        "m0": start, "P0": P0, "F": F, "c": c, "Q": Q, "C": C, "R": R, "e": offsets,
        "y": y, "mask": mask,
    }  # fmt: skip


NAMES = (
    "scalar",
    "scalar two instruments",
    "d2",
    "d4",
    "d7",
    "d2 two instruments",
    "d4 two instruments",
    "correlated noise",
    "unstable",
    "nearly singular",
    "singular",
    "very short step",
    "hypoelliptic",
    "stiff",
)


def build(arrays: dict, dtype):
    """`(LinearGaussian, y, mask)` of a model; `R` as variances where it is diagonal."""
    diagonal = not np.any(arrays["R"] - np.diag(np.diag(arrays["R"])))
    R = np.diag(arrays["R"]) if diagonal else arrays["R"]
    parts = {k: jnp.asarray(arrays[k], dtype) for k in ("m0", "P0", "F", "c", "Q", "C", "e")}
    model = LinearGaussian(**parts, R=jnp.asarray(R, dtype), correlated=not diagonal)
    return model, jnp.asarray(arrays["y"], dtype), jnp.asarray(arrays["mask"])


def error(got, want) -> float:
    """Largest error, relative to the largest element."""
    got, want = np.asarray(got, np.float64), np.asarray(want)
    assert got.shape == want.shape
    if not want.size:
        return 0.0
    return float(np.max(np.abs(got - want)) / np.max(np.abs(want)))
