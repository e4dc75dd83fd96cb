"""The backward information filter against dense normal algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_sde.linear.information import (
    LinearizedSteps,
    backward_information,
    guided_innovations,
    innovation_precision,
    log_weight,
)

N = 6


def steps(d, m, seed, diagonal=False):
    """A model with information at some times only, of low rank."""
    rng = np.random.default_rng(seed)
    B = rng.normal(size=(N - 1, d)) if diagonal else rng.normal(size=(N - 1, d, m))
    C = rng.normal(size=(N, 1, d)) * (rng.random((N, 1, 1)) < 0.7)
    return LinearizedSteps(
        A=jnp.asarray(np.eye(d) + 0.3 * rng.normal(size=(N - 1, d, d))),
        c=jnp.asarray(rng.normal(size=(N - 1, d))),
        B=jnp.asarray(B),
        J=jnp.asarray(C.swapaxes(1, 2) @ C),
        s=jnp.asarray((C.swapaxes(1, 2) @ rng.normal(size=(N, 1, 1)))[..., 0]),
    )


def log_likelihood(model, k, d):
    """Log of the expected exp(-x'Jx/2 + s'x), from time k on, given the deviation d at k.

    By integrating the innovations out of the joint quadratic form at once.
    """
    B = np.asarray(model.B)
    B = np.stack([np.diag(b) for b in B]) if B.ndim == 2 else B
    m, rest = B.shape[-1], N - 1 - k
    mean, gain = np.asarray(d), np.zeros((len(d), rest * m))
    H, r, value = np.eye(rest * m), np.zeros(rest * m), 0.0
    for j in range(k, N):
        J, s = np.asarray(model.J[j]), np.asarray(model.s[j])
        value += -0.5 * mean @ J @ mean + s @ mean
        H, r = H + gain.T @ J @ gain, r + gain.T @ (s - J @ mean)
        if j < N - 1:
            A = np.asarray(model.A[j])
            mean, gain = A @ mean + np.asarray(model.c[j]), A @ gain
            gain[:, (j - k) * m : (j - k + 1) * m] += B[j]
    if rest:
        value += 0.5 * r @ np.linalg.solve(H, r) - 0.5 * np.linalg.slogdet(H)[1]
    return value


@pytest.mark.parametrize(
    ("d", "m", "diagonal"),
    [(1, 1, True), (2, 2, False), (3, 1, False), (4, 4, True), (8, 2, False)],
)
def test_information_is_that_of_the_integrated_innovations(x64, d, m, diagonal):
    model = steps(d, m, seed=d, diagonal=diagonal)
    H, e = jax.jit(backward_information)(model)
    rng = np.random.default_rng(0)
    for k in range(N):
        points = rng.normal(size=(3, d))
        expected = [log_likelihood(model, k, x) for x in points]
        got = [-0.5 * x @ H[k] @ x + e[k] @ x for x in points]
        np.testing.assert_allclose(np.diff(got), np.diff(expected), rtol=1e-9, atol=1e-9)


def test_precise_observations_keep_the_information_positive_in_float32():
    """Noise of 1e-3 against steps of 1: the plain form loses all digits, and the sign."""
    d = 2
    A = jnp.tile(jnp.array([[1.0, 0.1], [0.0, 1.0]]), (200, 1, 1))
    B = jnp.tile(jnp.array([[0.0], [1.0]]), (200, 1, 1))
    J = jnp.zeros((201, d, d)).at[:, 0, 0].set(1e6)
    model = LinearizedSteps(A, jnp.zeros((200, d)), B, J, jnp.zeros((201, d)))
    H, _ = backward_information(model)
    eigenvalues = np.linalg.eigvalsh(np.asarray(H, np.float64))
    assert np.all(np.isfinite(eigenvalues))
    assert np.all(eigenvalues > -1e-6 * eigenvalues[:, -1:])


@pytest.mark.parametrize("diagonal", [True, False])
def test_guided_innovations_have_the_tilted_law(x64, diagonal):
    """The affine map against the normal law proportional to N(w; 0, I) h(ahead + B w)."""
    rng = np.random.default_rng(1)
    d, m = 3, 3 if diagonal else 2
    root = rng.normal(size=(d, d))
    H, e, ahead = root @ root.T, rng.normal(size=d), rng.normal(size=d)
    B = rng.normal(size=d) if diagonal else rng.normal(size=(d, m))
    full = np.diag(B) if diagonal else B
    P = np.eye(m) + full.T @ H @ full
    np.testing.assert_allclose(innovation_precision(H, jnp.asarray(B)), P, rtol=1e-12)
    mean = np.linalg.solve(P, full.T @ (e - H @ ahead))
    w0, log_det = guided_innovations(H, e, ahead, jnp.asarray(B), jnp.zeros(m))
    np.testing.assert_allclose(w0, mean, rtol=1e-10)
    np.testing.assert_allclose(log_det, 0.5 * np.linalg.slogdet(P)[1], rtol=1e-12)
    columns = [
        guided_innovations(H, e, ahead, jnp.asarray(B), jnp.asarray(z))[0] - w0 for z in np.eye(m)
    ]
    factor = np.stack(columns, axis=1)
    np.testing.assert_allclose(factor @ factor.T, np.linalg.inv(P), rtol=1e-9)


def test_log_weight_is_the_ratio_of_the_two_laws(x64):
    rng = np.random.default_rng(2)
    z, ahead = rng.normal(size=2), rng.normal(size=2)
    H, e, B = np.diag([2.0, 0.5]), rng.normal(size=2), np.array([0.7, 1.3])
    w, log_det = guided_innovations(*map(jnp.asarray, (H, e, ahead, B, z)))
    P = np.eye(2) + H * np.outer(B, B)
    mean = np.linalg.solve(P, B * (e - H @ ahead))
    prior = -0.5 * w @ w
    guided = -0.5 * (w - mean) @ P @ (w - mean) + 0.5 * np.linalg.slogdet(P)[1]
    np.testing.assert_allclose(log_weight(w, jnp.asarray(z), log_det), prior - guided, rtol=1e-10)


def test_nothing_observed_changes_nothing():
    model = steps(2, 2, seed=0)._replace(J=jnp.zeros((N, 2, 2)), s=jnp.zeros((N, 2)))
    H, e = backward_information(model)
    z = jnp.array([0.3, -1.0])
    w, log_det = guided_innovations(H[1], e[1], model.c[0], model.B[0], z)
    np.testing.assert_array_equal(w, z)
    assert float(log_det) == 0.0
    assert float(log_weight(w, z, log_det)) == 0.0
