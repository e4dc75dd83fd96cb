"""Exact discretisation against block exponentials, closed forms and exact fractions."""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from math import factorial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import van_loan
from scipy.linalg import expm, solve_continuous_lyapunov

from numpyro_sde.linear.discretize import (
    distinct_steps,
    transition,
    transition_sqrt,
    transitions,
)

step = jax.jit(transition)
step_sqrt = jax.jit(transition_sqrt, static_argnames="max_doublings")


def system(d, seed=0):
    rng = np.random.default_rng(seed)
    A = -np.eye(d) + 0.7 * rng.normal(size=(d, d))
    return A, rng.normal(size=d), rng.normal(size=(d, 2))


@pytest.mark.parametrize("h", [1e-9, 0.02, 0.7, 5.0])
@pytest.mark.parametrize("d", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_matrix_equals_block_exponential(d, h, x64):
    A, b, L = system(d)
    F, c, Q = van_loan(A, b, L, h)
    got = step(A, b, L, h)
    root = step_sqrt(A, b, L, h)
    for value, want in ((got.F, F), (got.c, c), (got.Q, Q), (root.F, F), (root.c, c)):
        np.testing.assert_allclose(value, want, rtol=1e-11, atol=1e-11 * np.abs(want).max())
    np.testing.assert_allclose(root.Q @ root.Q.T, Q, rtol=1e-10, atol=1e-11 * np.abs(Q).max())
    np.testing.assert_array_equal(np.triu(root.Q, 1), 0)


@pytest.mark.parametrize("rate", [-2.0, -1e-9, 0.0, 1e-9, 1.5, -1e8])
def test_scalar_and_diagonal_closed_forms(rate, x64):
    h, b, scale = 0.3, 0.7, 1.3
    if abs(rate) < 1e-6:  # Brownian motion with drift, to first order in the rate
        F, c, Q = 1 + rate * h, b * h * (1 + rate * h / 2), scale**2 * h * (1 + rate * h)
    else:
        F, c = np.exp(rate * h), b * np.expm1(rate * h) / rate
        Q = scale**2 * np.expm1(2 * rate * h) / (2 * rate)
    for got in (step(rate, b, scale, h), step_sqrt(rate, b, scale, h)):
        np.testing.assert_allclose(got.F, F, rtol=1e-14)
        np.testing.assert_allclose(got.c, c, rtol=1e-13)
    np.testing.assert_allclose(step(rate, b, scale, h).Q, Q, rtol=1e-13)
    np.testing.assert_allclose(step_sqrt(rate, b, scale, h).Q ** 2, Q, rtol=1e-13)
    many = step(rate, b, jnp.array([0.6, 0.8]) * scale, h)  # two Brownian motions
    np.testing.assert_allclose(many.Q, Q, rtol=1e-13)
    diagonal = step(jnp.array([rate, -1.0]), jnp.array([b, 0.2]), jnp.array([scale, 0.5]), h)
    np.testing.assert_allclose(diagonal.F, np.diag([F, np.exp(-h)]), rtol=1e-14)
    np.testing.assert_allclose(diagonal.c, [c, 0.2 * -np.expm1(-h)], rtol=1e-13)
    np.testing.assert_allclose(diagonal.Q, np.diag([Q, 0.25 * -np.expm1(-2 * h) / 2]), rtol=1e-13)


def test_diagonal_with_shared_noise_equals_matrix(x64):
    A, b, L = np.array([-0.5, 0.2, 0.0]), np.array([1.0, 2.0, 3.0]), system(3)[2]
    for h in (1e-3, 2.0):
        for name, want in zip("FcQ", step(jnp.diag(A), b, L, h), strict=True):
            np.testing.assert_allclose(
                getattr(step(A, b, L, h), name), want, rtol=1e-12, atol=1e-14, err_msg=name
            )
        S = step_sqrt(A, b, L, h).Q
        np.testing.assert_allclose(S @ S.T, step(A, b, L, h).Q, rtol=1e-11)


def chain(d):
    A, L = np.diag(np.ones(d - 1), 1), np.zeros((d, 1))
    L[-1] = 1.0
    return A, L


def exact_chain(d, h):
    """Covariance of an integrator chain over h, and its LDL' factors, as fractions."""
    h = Fraction(h)
    n = d - 1
    Q = [
        [h ** (2 * n - i - j + 1) / ((2 * n - i - j + 1) * factorial(n - i) * factorial(n - j))
         for j in range(d)] for i in range(d)
    ]  # fmt: skip
    L, D = [[Fraction(0)] * d for _ in range(d)], []
    for j in range(d):
        D.append(Q[j][j] - sum(L[j][k] ** 2 * D[k] for k in range(j)))
        for i in range(j, d):
            L[i][j] = (Q[i][j] - sum(L[i][k] * L[j][k] * D[k] for k in range(j))) / D[j]
    return np.array(Q, float), np.array(
        [[float(L[i][j]) * np.sqrt(float(D[j])) for j in range(d)] for i in range(d)]
    )


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float64, 1e-12), (jnp.float32, 2e-4)])
@pytest.mark.parametrize("h", [2.0**-20, 0.5, 8.0])
@pytest.mark.parametrize("d", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_factor_of_an_integrator_chain_keeps_every_pivot(d, h, dtype, bound):
    # The covariance is singular to rounding in float32 for d = 4 (condition after scaling 1e4
    # to 1e5), and its pivots span 60 orders of magnitude for the short step.
    A, L = chain(d)
    Q, S = exact_chain(d, h)
    with jax.enable_x64(dtype == jnp.float64):
        A, L, b = (jnp.asarray(x, dtype) for x in (A, L, np.zeros(d)))
        got = step_sqrt(A, b, L, jnp.asarray(h, dtype)).Q
        np.testing.assert_allclose(got, S, rtol=bound)
        if d == 2 or dtype == jnp.float64 or h > 1e-3:  # else below float32's range
            np.testing.assert_allclose(step(A, b, L, jnp.asarray(h, dtype)).Q, Q, rtol=bound)


def test_one_noise_on_two_rates_over_a_short_step(x64):
    # Q is (1 1; 1 1) h to first order: the second pivot is of third order, (1.3 - 1)^2 h^3 / 12
    h = 1e-4
    S = step_sqrt(jnp.diag(jnp.array([-1.0, -1.3])), jnp.zeros(2), jnp.ones((2, 1)), h).Q
    np.testing.assert_allclose(S[1, 1], 0.3 * h**1.5 / np.sqrt(12), rtol=2e-4)
    np.testing.assert_allclose(S[:, 0], np.sqrt(h), rtol=2e-4)


@pytest.mark.parametrize("h", [1.0, 1e3, 1e6])
def test_stiff_stable_systems_reach_their_stationary_law(h, x64):
    A = np.array([[-5000.0, 10.0], [3.0, -0.5]])
    L, b = np.diag([10.0, 0.3]), np.array([1.0, 2.0])
    stationary = solve_continuous_lyapunov(A, -L @ L.T)
    F = expm(A * h)
    Q = stationary - F @ stationary @ F.T
    c = np.linalg.solve(A, (F - np.eye(2)) @ b)
    got, root = step(A, b, L, h), step_sqrt(A, b, L, h)
    np.testing.assert_allclose(got.F, F, atol=1e-11)
    np.testing.assert_allclose(got.c, c, rtol=1e-9)
    np.testing.assert_allclose(got.Q, Q, rtol=1e-9)
    np.testing.assert_allclose(root.Q @ root.Q.T, Q, rtol=1e-9)


def test_zero_length_and_backward_steps():
    A, b, L = (jnp.asarray(x, jnp.float32) for x in system(2))
    for function in (step, step_sqrt):
        still = function(A, b, L, 0.0)
        np.testing.assert_array_equal(still.F, np.eye(2))
        np.testing.assert_array_equal(still.c, 0)
        np.testing.assert_array_equal(still.Q, 0)
        assert all(np.isnan(x).all() for x in function(A, b, L, -0.1))
        assert all(np.isnan(x).all() for x in function(A[0, 0], b[0], L[0, 0], -0.1))


def _total(A, b, L, h, sqrt, bound):
    F, c, Q = (transition_sqrt if sqrt else transition)(A, b, L, h, max_doublings=bound)
    Q = Q @ Q.T if sqrt else Q
    w = jnp.arange(1.0, 1.0 + Q.size).reshape(Q.shape)
    return (jnp.sin(w) * F).sum() + jnp.cos(c).sum() + (w * Q).sum()


@partial(jax.jit, static_argnames=("sqrt", "bound", "forward"))
def _slopes(A, b, L, h, sqrt=False, bound=None, forward=False):
    derivative = jax.jacfwd if forward else jax.grad
    return derivative(_total, argnums=(0, 1, 2, 3))(A, b, L, h, sqrt, bound)


def _differences(A, b, L, h):
    """Central differences of the same function, by block exponentials."""

    def total(A, b, L, h):
        F, c, Q = van_loan(A, b, L, h)
        w = np.arange(1.0, 1.0 + Q.size).reshape(Q.shape)
        return (np.sin(w) * F).sum() + np.cos(c).sum() + (w * Q).sum()

    args, out = [np.array(x, float) for x in (A, b, L, h)], []
    for i, x in enumerate(args):
        slope = np.zeros_like(x)
        for index in np.ndindex(x.shape):
            size = 1e-5
            up, down = x.copy(), x.copy()
            up[index] += size
            down[index] -= size
            values = [total(*args[:i], y, *args[i + 1 :]) for y in (up, down)]
            slope[index] = (values[0] - values[1]) / (2 * size)
        out.append(slope)
    return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sqrt": True},
        pytest.param({"bound": 6}, marks=pytest.mark.slow),
        pytest.param({"bound": 6, "forward": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_derivatives_equal_differences(options, x64):
    A, b, L = system(2)
    for matrix, h in ((A, 0.1), (A, 3.0), (0 * A, 0.1)):
        want = _differences(matrix, b, L, h)
        for g, w in zip(_slopes(matrix, b, L, h, **options), want, strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-6, atol=1e-6 * np.abs(w).max())


@pytest.mark.parametrize("rate", [0.0, 1e-12, -0.3, 0.5])
def test_scalar_derivatives_are_smooth_through_zero(rate, x64):
    # Q = q (exp(2 a h) - 1) / (2 a): dQ/da = q h^2 (1 + 4 a h / 3 + (a h)^2 + ...)
    h = 0.4
    z = rate * h
    series = sum(2 ** (k + 1) * z**k * (k + 1) / factorial(k + 2) for k in range(25))
    got = jax.grad(lambda a: transition(a, 0.0, 1.0, h).Q)(rate)
    np.testing.assert_allclose(got, h**2 * series, rtol=1e-12)


def test_bound_on_doublings_gives_nan_beyond(x64):
    A, b, L = system(2)
    beyond = jax.jit(transition, static_argnames="max_doublings")
    assert np.isnan(beyond(A, b, L, 100.0, max_doublings=2).F).all()


@pytest.mark.slow
def test_hessian_by_forward_over_reverse(x64):
    A, b, L = system(2)

    def total(t):
        return transition(A * t[0], b, L, t[1]).Q.sum()

    at, size = jnp.array([1.1, 2.0]), 1e-5
    hessian, gradient = jax.jit(jax.hessian(total))(at), jax.jit(jax.grad(total))
    for i, e in enumerate(size * np.eye(2)):
        want = (gradient(at + e) - gradient(at - e)) / (2 * size)
        np.testing.assert_allclose(hessian[i], want, rtol=1e-6)


def test_distinct_steps_groups_up_to_rounding():
    times = 1e4 + np.cumsum(np.tile([0.1, 0.2, 0.1], 50))
    lengths, index = distinct_steps(np.diff(times), tolerance=4 * 2.3e-16 * times.max())
    np.testing.assert_allclose(lengths, [0.1, 0.2], rtol=1e-10)
    assert len(np.unique(np.diff(times))) > 2
    np.testing.assert_allclose(lengths[index], np.diff(times), rtol=1e-9)
    irregular = np.random.default_rng(0).uniform(0.1, 1.0, 40)
    assert len(distinct_steps(irregular)[0]) == 40


@pytest.mark.parametrize(
    ("dt", "sqrt"),
    [
        (np.array([0.5, 0.1, 0.5, 3.0]), False),
        (np.array([0.5, 0.1, 0.5, 3.0]), True),
        (np.full(4, 0.3), False),
        (np.array([0.1, 0.2, 0.3, 4.0]), False),
    ],
)
def test_vectors_of_steps_equal_single_ones(dt, sqrt, x64):
    A, b, L = system(2)
    host = jax.jit(lambda A: transitions(A, b, L, dt, sqrt=sqrt))(A)
    one = step_sqrt if sqrt else step
    for k, h in enumerate(dt):
        for name, want in zip("FcQ", one(A, b, L, h), strict=True):
            np.testing.assert_allclose(getattr(host, name)[k], want, rtol=1e-12, atol=1e-14)


def test_batches_by_vmap_with_traced_steps(x64):
    systems = [system(2, seed) for seed in range(3)]
    A, b, L = (np.stack(x) for x in zip(*systems, strict=True))
    dt = jnp.array([[0.1, 4.0], [1e-3, 0.5], [2.0, 30.0]])
    w = np.arange(1.0, 5.0).reshape(2, 2)

    def total(A, b, L, dt):
        F, c, Q = transitions(A, b, L, dt)
        return (jnp.sin(w) * F).sum() + jnp.cos(c).sum() + (w * Q).sum()

    slopes = jax.jit(jax.vmap(jax.grad(total, argnums=(0, 1, 2))))(A, b, L, dt)
    for k, parts in enumerate(systems[:2]):
        each = [_differences(*parts, h)[:3] for h in np.asarray(dt[k])]
        for got, *want in zip(slopes, *each, strict=True):
            want = sum(want)
            np.testing.assert_allclose(got[k], want, rtol=1e-6, atol=1e-6 * np.abs(want).max())
    assert all(bool(jnp.isfinite(g[2]).all()) for g in slopes)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"A must be a scalar, a diagonal \(d,\) or a matrix"):
        transition(jnp.ones((2, 3)), 0.0, 1.0, 0.1)
    with pytest.raises(ValueError, match=r"b must have shape \(\) or \(2,\)"):
        transition(jnp.eye(2), jnp.ones(3), 1.0, 0.1)
    with pytest.raises(ValueError, match=r"L must have shape"):
        transition(jnp.eye(2), jnp.ones(2), jnp.ones((3, 1)), 0.1)
    with pytest.raises(ValueError, match="L must have shape"):
        transition(1.0, 0.0, jnp.ones((1, 1)), 0.1)
    with pytest.raises(ValueError, match="finite and not negative"):
        distinct_steps(np.array([0.1, -0.1]))
    with pytest.raises(ValueError, match="vector of steps"):
        transitions(1.0, 0.0, 1.0, np.ones((2, 2)))


@pytest.mark.parametrize("h", [0.05, 3.0])
def test_ramp_equals_time_as_a_state(h, x64):
    A, r = np.array([[-0.5, 1.2], [-0.9, 0.1]]), np.array([0.4, -0.7])
    b, L = np.array([0.3, 0.2]), np.array([[0.5], [0.1]])
    wide = np.zeros((3, 3))
    wide[:2, :2], wide[:2, 2] = A, r
    _, c, _ = van_loan(wide, np.append(b, 1.0), np.vstack([L, [[0.0]]]), h)
    for bound in (None, 6):
        got = transition_sqrt(A, b, L, h, ramp=r, max_doublings=bound)
        np.testing.assert_allclose(got.c, c[:2], rtol=1e-12)
    slope = jax.grad(lambda r: transition_sqrt(A, b, L, h, ramp=r).c[0])(r)
    other = transition_sqrt(A, 0 * b, L, h, ramp=np.array([1.0, 0.0])).c[0]
    np.testing.assert_allclose(slope[0], other, rtol=1e-12)  # linear in the ramp


SYSTEMS = {
    "oscillator": (np.array([[0.0, 1.0], [-4.0, -0.6]]), np.array([[0.0], [0.7]])),
    "integrated": (np.array([[0.0, 1.0], [0.0, -0.5]]), np.array([[0.0], [0.7]])),
    "chain": (np.diag([1.0, 1.0], 1), np.array([[0.0], [0.0], [1.0]])),
    "cascade": (np.diag([-1.0, -2.0, -3.0]) + np.diag([2.0, 0.1], -1), 0.3 * np.eye(3)),
}


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_units_of_time_and_state_change_nothing(name, unit):
    """In float32, with the bound on doublings that filters use; 4e-6 is 32 roundings."""
    A, L = SYSTEMS[name]
    d, h = len(A), 2.5
    F, c, Q = van_loan(A, np.ones(d), L, h)
    # A derivative has the unit state / time: positions in one unit, velocities in another.
    state = {"oscillator": [0, 1], "integrated": [0, 1], "chain": [0, 1, 2]}.get(name, [0] * d)
    scale = unit ** -np.array(state, float) * 1e3
    T = np.diag(scale)
    rates = T @ A @ np.linalg.inv(T) / unit
    noise = T @ L / np.sqrt(unit)
    got = step_sqrt(rates, scale / unit, noise, h * unit, max_doublings=10)
    S = np.asarray(got.Q, np.float64)
    sd = np.sqrt(np.diag(Q))
    np.testing.assert_allclose(got.F / np.outer(scale, 1 / scale), F, rtol=4e-6, atol=4e-6)
    np.testing.assert_allclose(got.c / scale, c, rtol=4e-6, atol=4e-6)
    correlation = (S @ S.T) / np.outer(scale * sd, scale * sd)
    np.testing.assert_allclose(correlation, Q / np.outer(sd, sd), atol=4e-6)
