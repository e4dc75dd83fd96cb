"""The exact score against automatic differentiation of a plain matrix filter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import build, make

from numpyro_sde.linear.kalman import LinearGaussian, log_likelihood
from numpyro_sde.linear.small import cholesky

LEAVES = ("m0", "P0", "F", "c", "Q", "C", "R", "e")


def plain(leaves, y, mask):
    """Vector observations, LAPACK Cholesky and solves, one `lax.scan`, no custom derivative."""

    def update(m, P, y, seen):
        C = jnp.where(seen[:, None], leaves["C"], 0)
        R = jnp.where(seen[:, None] & seen, jnp.diag(leaves["R"]), jnp.eye(len(y)))
        S = C @ P @ C.T + R
        v = jnp.where(seen, y - leaves["e"], 0) - C @ m
        K = jax.scipy.linalg.solve(S, C @ P, assume_a="pos").T
        log_density = -0.5 * (v @ jnp.linalg.solve(S, v) + jnp.linalg.slogdet(S)[1])
        log_density = log_density - 0.5 * seen.sum() * jnp.log(2 * jnp.pi)
        return m + K @ v, P - K @ S @ K.T, log_density

    def step(carry, x):
        F, c, Q, y, seen = x
        m, P = carry
        m, P, log_density = update(F @ m + c, F @ P @ F.T + Q, y, seen)
        return (m, P), log_density

    m, P, first = update(leaves["m0"], leaves["P0"], y[0], mask[0])
    xs = (leaves["F"], leaves["c"], leaves["Q"], y[1:], mask[1:])
    return first + lax.scan(step, (m, P), xs)[1].sum()


def ours(leaves, y, mask, form):
    return log_likelihood(LinearGaussian(**leaves), y, mask, form=form)


plain_score = jax.jit(jax.grad(plain, argnums=(0, 1)))
score = jax.jit(jax.grad(ours, argnums=(0, 1)), static_argnums=3)


def symmetric(leaves):
    """Derivatives by symmetric matrices, the same for every way to spread them."""
    return {
        k: 0.5 * (v + jnp.swapaxes(v, -1, -2)) if k in ("P0", "Q") else v for k, v in leaves.items()
    }


def parts(name):
    model, y, mask = build(make(name), jnp.float64)
    return {k: getattr(model, k) for k in LEAVES}, y, mask


_CASES = [
    pytest.param(n, f, marks=() if quick else pytest.mark.slow)
    for f in ("sequential", "sqrt", "parallel")
    for n, quick in (
        ("unstable", True),
        ("singular", True),
        ("nearly singular", True),
        ("stiff", True),
        ("d2 two instruments", f == "sequential"),
        ("scalar", False),
        ("d4 two instruments", False),
        ("d7", False),
    )
]


@pytest.mark.parametrize(("name", "form"), _CASES)
def test_score_equals_autodiff_of_a_matrix_scan(name, form, x64):
    leaves, y, mask = parts(name)
    want, got = plain_score(leaves, y, mask), score(leaves, y, mask, form)
    for k, v in symmetric(want[0]).items():
        scale = float(jnp.abs(v).max())
        np.testing.assert_allclose(symmetric(got[0])[k], v, atol=1e-8 * scale, err_msg=k)
    np.testing.assert_allclose(got[1], want[1], atol=1e-8 * float(jnp.abs(want[1]).max()))


def test_correlated_noise_score_equals_finite_differences(x64):
    model, y, mask = build(make("correlated noise"), jnp.float64)
    direction = jnp.asarray([[0.3, 0.1, -0.2], [0.1, -0.4, 0.2], [-0.2, 0.2, 0.5]])

    @jax.jit
    def value(t):
        noise = model.R + t * direction
        return log_likelihood(
            LinearGaussian(
                m0=model.m0, P0=model.P0, F=model.F, c=model.c, Q=model.Q, C=model.C,
                R=noise, e=model.e, correlated=True,
            ),
            y, mask,
        )  # fmt: skip

    step = 1e-5
    want = (value(step) - value(-step)) / (2 * step)
    np.testing.assert_allclose(jax.jit(jax.grad(value))(0.0), want, rtol=1e-7)


def _by_two_parameters(t):
    leaves, y, mask = parts("d2")
    scaled = leaves | {"Q": leaves["Q"] * jnp.exp(t[0]), "F": leaves["F"] * jnp.exp(t[1])}
    return ours(scaled, y, mask, "sequential")


def test_forward_mode_agrees_with_reverse_mode(x64):
    at = jnp.array([0.1, -0.2])
    forward = jax.jit(jax.jacfwd(_by_two_parameters))(at)
    np.testing.assert_allclose(forward, jax.jit(jax.grad(_by_two_parameters))(at), rtol=1e-12)


@pytest.mark.slow
def test_hessian_equals_differences_of_the_score(x64):
    at, step = jnp.array([0.1, -0.2]), 1e-5
    gradient = jax.jit(jax.grad(_by_two_parameters))
    hessian = jax.jit(jax.hessian(_by_two_parameters))(at)
    for i, shift in enumerate(step * jnp.eye(2)):
        want = (gradient(at + shift) - gradient(at - shift)) / (2 * step)
        np.testing.assert_allclose(hessian[i], want, rtol=1e-6)


def test_factors_carry_the_derivative_in_the_square_root_form(x64):
    leaves, y, mask = parts("d2")

    def value(t, form, factors):
        B = cholesky(leaves["Q"]) * jnp.exp(0.5 * t)
        B0 = cholesky(leaves["P0"]) * jnp.exp(0.5 * t)
        extra = {"Q_factor": B, "P0_factor": B0} if factors else {}
        scaled = leaves | {"Q": leaves["Q"] * jnp.exp(t), "P0": leaves["P0"] * jnp.exp(t)}
        return ours(scaled | extra, y, mask, form)

    slope = jax.jit(jax.grad(value), static_argnums=(1, 2))
    want = slope(0.0, "sequential", False)
    for form in ("sequential", "sqrt"):
        np.testing.assert_allclose(slope(0.0, form, True), want, rtol=1e-10)


def test_float32_score_is_close():
    name = "unstable"
    with jax.enable_x64(True):
        leaves, y, mask = parts(name)
        want, _ = plain_score(leaves, y, mask)
        want = {k: np.asarray(v) for k, v in symmetric(want).items()}
    model, y, mask = build(make(name), jnp.float32)
    got, _ = score({k: getattr(model, k) for k in LEAVES}, y, mask, "sequential")
    for k, v in want.items():
        assert got[k].dtype == jnp.float32
        np.testing.assert_allclose(
            symmetric(got)[k], v, atol=1e-3 * float(np.abs(v).max()), err_msg=k
        )
