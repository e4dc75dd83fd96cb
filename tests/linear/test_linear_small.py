"""Small-matrix operations against NumPy, unrolled (d <= 6) and dense (d = 8)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_sde.linear import small

SIZES = (1, 2, 4, 8)


def spd(d, n=3, seed=0):
    B = np.random.default_rng(seed + d).normal(size=(n, d, d))
    return B @ np.swapaxes(B, 1, 2) + 0.5 * np.eye(d)


@pytest.mark.parametrize("d", SIZES)
def test_factorisations_and_solves_equal_numpy(d, x64):
    A, rng = spd(d), np.random.default_rng(d)
    B, G = rng.normal(size=(3, d, 2)), rng.normal(size=(3, d, d))

    @jax.jit
    def ours(A, B, G):
        L = small.cholesky(A)
        return {
            "cholesky": L,
            "lower": small.solve_lower(L, B),
            "upper": small.solve_lower(L, B, transposed=True),
            "cho_solve": small.cho_solve(L, B),
            "spd_solve": small.spd_solve(A, B),
            "spd_inverse": small.spd_inverse(A),
            "logdet": small.spd_logdet(A),
            "solve": small.solve(G, B),
            "one_plus": small.inverse_one_plus(A, small.matmul(G, small.transpose(G))),
            "congruence": small.congruence(G, A),
            "matvec": small.matvec(G, B[..., 0]),
            "outer": small.outer(B[..., 0], B[..., 1]),
            "tria": small.tria(jnp.concatenate([G, A], axis=-1)),
            "psd_factor": small.psd_factor(A),
        }

    got = ours(A, B, G)
    L = np.linalg.cholesky(A)
    Gt = np.swapaxes(G, 1, 2)
    want = {
        "cholesky": L,
        "lower": np.linalg.solve(L, B),
        "upper": np.linalg.solve(np.swapaxes(L, 1, 2), B),
        "cho_solve": np.linalg.solve(A, B),
        "spd_solve": np.linalg.solve(A, B),
        "spd_inverse": np.linalg.inv(A),
        "logdet": np.linalg.slogdet(A)[1],
        "solve": np.linalg.solve(G, B),
        "one_plus": np.linalg.inv(np.eye(d) + A @ G @ Gt),
        "congruence": G @ A @ Gt,
        "matvec": (G @ B[..., :1])[..., 0],
        "outer": B[..., :1] * B[:, None, :, 1],
        "tria": np.linalg.cholesky(G @ Gt + A @ A),
        "psd_factor": L,
    }
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-8, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("d", [2, 8])
def test_products_of_single_matrices_and_of_stacks_agree(d, x64):
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(3, d, d)), rng.normal(size=(3, d, 5))
    stacked = small.matmul(jnp.asarray(A), jnp.asarray(B))
    np.testing.assert_allclose(stacked, A @ B, rtol=1e-12)
    single = small.matmul(jnp.asarray(A[0]), jnp.asarray(B[0]))
    np.testing.assert_allclose(single, A[0] @ B[0], rtol=1e-12)
    wide = rng.normal(size=(20, 20))
    np.testing.assert_allclose(
        small.matmul(jnp.asarray(wide), jnp.asarray(wide)), wide @ wide, rtol=1e-10
    )


@pytest.mark.parametrize("d", [3, 8])
def test_derivatives_equal_those_of_lapack(d, x64):
    A, B = spd(d, 1)[0], np.random.default_rng(d).normal(size=(d, 2))

    def total(cholesky, solve, logdet, A):
        A = 0.5 * (A + A.T)
        return jnp.sin(cholesky(A)).sum() + jnp.cos(solve(A, B)).sum() + logdet(A)

    def ours(A):
        return total(small.cholesky, small.solve, small.spd_logdet, A)

    def lapack(A):
        return total(jnp.linalg.cholesky, jnp.linalg.solve, lambda A: jnp.linalg.slogdet(A)[1], A)

    want = jax.jit(jax.grad(lapack))(A)
    np.testing.assert_allclose(jax.jit(jax.grad(ours))(A), want, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(ours))(A), want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("d", [2, 8])
def test_not_positive_definite_gives_nan(d):
    indefinite = jnp.eye(d).at[1, 1].set(-1.0)
    singular = jnp.ones((d, d))
    logdet, solve, factor = map(jax.jit, (small.spd_logdet, small.spd_solve, small.psd_factor))
    for A in (indefinite, singular * (1 if d == 2 else -1)):
        assert not bool(jnp.isfinite(logdet(A)))
        assert not bool(jnp.isfinite(solve(A, jnp.ones((d, 1)))).all())
    assert bool(jnp.isnan(factor(indefinite)).any())


def test_semidefinite_factors_are_exact_and_have_finite_derivatives(x64):
    v = jnp.array([1.0, 2.0, -1.0])

    def root(v):
        return small.psd_factor(small.outer(v, v))

    value, slope = jax.jit(root)(v), jax.jit(jax.jacrev(root))(v)
    np.testing.assert_allclose(value[:, 0], v, rtol=1e-14)
    np.testing.assert_array_equal(value[:, 1:], 0)
    # d/dv of the first column is the identity
    np.testing.assert_allclose(slope[:, 0], np.eye(3), atol=1e-14)


def test_tria_of_dependent_rows_and_of_tiny_ones():
    A = jnp.array([[1.0, 1.0], [2.0, 2.0], [0.0, 1e-25]])
    L = np.asarray(jax.jit(small.tria)(A), np.float64)
    assert L[1, 1] == 0.0
    A = np.asarray(A, np.float64)
    np.testing.assert_allclose(L @ L.T, A @ A.T, rtol=1e-6)
    slope = jax.jit(jax.grad(lambda A: small.tria(A).sum()))(jnp.asarray(A, jnp.float32))
    assert bool(jnp.isfinite(slope).all())


def test_packing_is_inverted():
    P = jnp.asarray(spd(4, 2), jnp.float32)
    assert small.pack(P).shape == (2, 10)
    np.testing.assert_array_equal(small.unpack(small.pack(P)), 0.5 * (P + jnp.swapaxes(P, 1, 2)))
    np.testing.assert_array_equal(small.unpack(small.pack(P), symmetric=False), jnp.tril(P))


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="A must be a square matrix"):
        small.cholesky(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="triangle has"):
        small.unpack(jnp.ones(4))
    with pytest.raises(ValueError, match="inner dimensions differ"):
        small.matmul(jnp.ones((2, 3)), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="inner dimensions differ"):
        small.matvec(jnp.ones((2, 3)), jnp.ones(2))
    with pytest.raises(ValueError, match="B must have shape"):
        small.solve(jnp.eye(2), jnp.ones((3, 1)))
    with pytest.raises(ValueError, match="B must have shape"):
        small.solve_lower(jnp.eye(2), jnp.ones(2))
