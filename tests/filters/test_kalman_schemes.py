"""Kalman by a chosen scheme, and on coefficients that change with time: dense normal laws."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import state_space as ss
from numpyro.infer.util import log_density
from scipy.integrate import solve_ivp

import numpyro_sde as nsde
from numpyro_sde.filters import kalman
from numpyro_sde.schemes import Euler, LocalLinear, Milstein, Strang
from numpyro_sde.schemes.time_varying import TimeVaryingLinear

TIMES = np.array([0.0, 0.2, 0.25, 0.7, 1.1])
Y = np.array([0.3, -0.2, np.nan, 0.6, 1.1])
A = np.array([[-0.6, 1.0], [-1.2, -0.3]])
B = np.array([0.3, -0.2])
L = np.array([[0.5, 0.0], [0.2, 0.4]])
M0, P0 = np.array([0.5, -1.0]), np.array([[0.7, 0.2], [0.2, 0.5]])
NOISE = 0.3


def value(drift, diffusion, scheme=None, times=TIMES, scalar=False, method=None):
    init = dist.Normal(0.5, 0.8) if scalar else dist.MultivariateNormal(jnp.asarray(M0), P0)
    path = nsde.SDEPath(nsde.SDE(drift, diffusion), times, init, scheme=scheme)
    emission = (lambda t, x: dist.Normal(x, NOISE)) if scalar else _first
    method = nsde.filters.Kalman() if method is None else method

    @jax.jit
    def run(y):
        return nsde.filter_path(path, emission, y, method=method).log_likelihood

    return run(Y)


def _first(t, x):
    return dist.Normal(x[0], NOISE)


def dense(steps, m0=M0, P0=P0):
    C = np.eye(len(m0))[:1]
    return ss.Dense(steps, m0, P0, [(C, np.array([[NOISE**2]]), Y[:, None])]).posterior()[2]


def steps_of(scheme, sde, d, times=TIMES):
    """Transition arrays of a scheme, read off its steps at corners, without derivatives."""
    one = jax.jit(lambda t, h, x, z: scheme.step(sde, t, h, x, z))
    out = []
    for t, h in zip(times, np.diff(times), strict=False):
        shape = jnp.zeros(()) if d == 1 else jnp.zeros(d)

        def step(x, z, t=t, h=h, shape=shape):
            x, z = (jnp.reshape(jnp.asarray(v), shape.shape) for v in (x, z))
            return np.reshape(one(t, h, x, z), d)

        o, eye = np.zeros(d), np.eye(d)
        c = step(o, o)
        F = np.stack([step(e, o) - c for e in eye], 1)
        S = np.stack([step(o, e) - c for e in eye], 1)
        out.append((F, c, S @ S.T))
    return out


def linear(t, x):
    return A @ x + B


def noise(t, x):
    return jnp.asarray(L)


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme", [LocalLinear(), Strang(), Strang(lambda: (jnp.diag(jnp.diag(A)), jnp.ones(2)))]
)
def test_a_chosen_scheme_is_honoured_in_two_dimensions(scheme, x64):
    if isinstance(scheme, Strang) and scheme.linear is not None:
        truth = dense(steps_of(scheme, nsde.SDE(linear, noise), 2))
    else:
        truth = dense(ss.exact_steps(A, B, L, np.diff(TIMES)))
    np.testing.assert_allclose(value(linear, noise, scheme), truth, rtol=1e-7)
    # The solver of Strang's half flow stops at 1e-4 of a standard deviation; the density is exact.


def test_scalar_schemes(x64):
    def drift(t, x):
        return 0.4 - 1.3 * x + 0.5 * jnp.cos(3.0 * t)

    sde = nsde.SDE(drift, lambda t, x: 0.7)
    for scheme in (Strang(), LocalLinear(), Milstein(), Euler()):
        steps = steps_of(scheme, sde, 1)
        got = value(drift, lambda t, x: 0.7, scheme, scalar=True)
        truth = dense(steps, np.array([0.5]), np.array([[0.64]]))
        np.testing.assert_allclose(got, truth, rtol=1e-7)


def changing(t, x):
    turn = jnp.array([[-0.6, 1.0 + jnp.sin(2.0 * t)], [-1.2, -0.3 * t]])
    return turn @ x + jnp.array([jnp.exp(-t), 0.2])


def changing_noise(t, x):
    return jnp.asarray(L) * (1.0 + 0.3 * jnp.sin(t))


@pytest.mark.parametrize("scheme", [LocalLinear(), Euler()])
def test_a_scheme_takes_coefficients_that_change_with_time(scheme, x64):
    steps = steps_of(scheme, nsde.SDE(changing, changing_noise), 2)
    np.testing.assert_allclose(value(changing, changing_noise, scheme), dense(steps), rtol=1e-9)


def ode_steps(times):
    """Moments of the time-varying linear SDE by an adaptive solver of their equations."""

    def rates(t, state):
        F, c, Q = state[:4].reshape(2, 2), state[4:6], state[6:].reshape(2, 2)
        At = np.array([[-0.6, 1.0 + np.sin(2.0 * t)], [-1.2, -0.3 * t]])
        Lt = L * (1.0 + 0.3 * np.sin(t))
        b = np.array([np.exp(-t), 0.2])
        parts = (At @ F).ravel(), At @ c + b, (At @ Q + Q @ At.T + Lt @ Lt.T).ravel()
        return np.concatenate(parts)

    out = []
    for a, b in itertools.pairwise(times):
        start = np.concatenate([np.eye(2).ravel(), np.zeros(6)])
        end = solve_ivp(rates, (a, b), start, method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
        out.append((end[:4].reshape(2, 2), end[4:6], end[6:].reshape(2, 2)))
    return out


@pytest.mark.parametrize("form", ["sequential", "sqrt"])
def test_time_varying_coefficients_are_exact_without_a_scheme(form, x64):
    method = nsde.filters.Kalman(form)
    got = value(changing, changing_noise, method=method)
    np.testing.assert_allclose(got, dense(ode_steps(TIMES)), rtol=2e-8)


def test_time_varying_in_float32():
    got = value(changing, changing_noise)
    np.testing.assert_allclose(got, dense(ode_steps(TIMES)), rtol=2e-6)


def test_a_step_too_long_for_the_change_is_nan_and_the_grid_mends_it(x64):
    def drift(t, x):
        return -x + 5.0 * jnp.sin(80.0 * t)

    one = lambda t, x: 0.7  # noqa: E731
    assert np.isnan(value(drift, one, scalar=True))
    grid = nsde.TimeGrid(TIMES, max_step=0.05)
    path = nsde.SDEPath(nsde.SDE(drift, one), grid, dist.Normal(0.5, 0.8))
    emission = lambda t, x: dist.Normal(x, NOISE)  # noqa: E731
    result = jax.jit(
        lambda y: nsde.filter_path(path, emission, y, method=nsde.filters.Kalman(), at=grid.index)
    )(Y)

    # X = exp(-t) X_0 + integral; that of 5 sin(80 s) against exp(s - t) in closed form
    def offset(h, t):
        def anti(s):
            return np.exp(s) * (np.sin(80 * s) - 80 * np.cos(80 * s)) / 6401

        return 5.0 * np.exp(-(t + h)) * (anti(t + h) - anti(t))

    steps = [
        (
            np.array([[np.exp(-h)]]),
            np.array([offset(h, t)]),
            np.array([[0.245 * (1 - np.exp(-2 * h))]]),
        )
        for t, h in zip(TIMES, np.diff(TIMES), strict=False)
    ]
    truth = dense(steps, np.array([0.5]), np.array([[0.64]]))
    np.testing.assert_allclose(result.log_likelihood, truth, rtol=1e-7)


def test_the_transition_is_of_order_six_and_simulates_what_it_filters(x64):
    scheme, sde = TimeVaryingLinear(), nsde.SDE(changing, changing_noise)
    x = jnp.array([0.4, -0.3])
    mean, S = scheme.moments(sde, jnp.array(0.3), 0.4, x)
    F, c, Q = ode_steps([0.3, 0.7])[0]
    np.testing.assert_allclose(mean, F @ x + c, rtol=1e-8)
    np.testing.assert_allclose(S @ S.T, Q, rtol=1e-8)
    path = nsde.SDEPath(sde, TIMES, jnp.zeros(2))
    assert isinstance(nsde.filters.Kalman().simulator(path).scheme, TimeVaryingLinear)


class Jumps(nsde.schemes.AbstractScheme):
    """Euler's step with a jump of random size, as a user may write it."""

    rate: float

    def log_density(self, sde, t, dt, x, x_next, cache=None):
        mean = x + sde.ito_drift_at(t, x) * dt
        near = dist.Normal(mean, 0.5 * jnp.sqrt(dt)).log_prob(x_next)
        far = dist.Normal(mean, jnp.sqrt(0.25 * dt + 1.0)).log_prob(x_next)
        p = self.rate * dt
        return jnp.logaddexp(jnp.log1p(-p) + near, jnp.log(p) + far)

    def step(self, sde, t, dt, x, z, cache=None):
        return x + sde.ito_drift_at(t, x) * dt + 0.5 * jnp.sqrt(dt) * z

    def invert(self, sde, t, dt, x, x_next, cache=None):
        raise NotImplementedError


@pytest.mark.parametrize("name", ["Kalman", "MomentMatching", "ExtendedKalman", "UnscentedKalman"])
def test_a_scheme_that_is_not_normal_is_refused(name):
    with pytest.raises(ValueError, match="Jumps"):
        value(
            lambda t, x: -x,
            lambda t, x: 0.5,
            Jumps(0.3),
            scalar=True,
            method=getattr(nsde.filters, name)(),
        )


@pytest.mark.parametrize(
    ("drift", "diffusion", "scheme"),
    [
        (lambda t, x: -x, lambda t, x: 0.5 * x, Milstein()),
        (lambda t, x: -(x**3), lambda t, x: 0.5, Strang()),
        (lambda t, x: -x, lambda t, x: 0.5, nsde.schemes.HermiteExpansion(2)),
    ],
)
def test_schemes_that_are_normal_for_other_sdes(drift, diffusion, scheme):
    with pytest.raises(ValueError, match=f"scheme={type(scheme).__name__}.*LocalLinear"):
        value(drift, diffusion, scheme, scalar=True)


def test_the_refusal_says_what_the_other_filters_do():
    with pytest.raises(ValueError, match=r"Euler\(\) unless one was chosen, and its error"):
        value(lambda t, x: -(x**3), lambda t, x: 0.5, scalar=True)


def test_a_solve_against_the_state_is_not_linear():
    def drift(t, x):
        return jax.scipy.linalg.solve_triangular(jnp.eye(2) + jnp.diag(x**0 + x), x, lower=True)

    with pytest.raises(ValueError, match=r"drift.* is not affine in x"):
        value(drift, noise)


class _Told(nsde.filters.Kalman):
    """What becomes of the arrays of a model, in place of their log likelihood."""

    def log_likelihood(self, model):
        model = kalman._discretized(model)
        arrays = kalman.linear_arrays(model, kalman._observed_rows(model), shared=True)
        linear, d = arrays.model, arrays.model.coupled
        assert d == np.prod(model.state_shape, dtype=int) < linear.state_size
        off = linear.F * (1.0 - jnp.eye(linear.state_size))
        dense = dataclasses.replace(linear, coupled=None)
        values = [
            kalman.kalman.log_likelihood(m, arrays.y, arrays.present, form=self.form)
            for m in (linear, dense)
        ]
        return values[0] - values[1] + 1e3 * jnp.sum(jnp.abs(off[:, d:]))


@pytest.mark.parametrize("scheme", [None, Euler(), LocalLinear()], ids=["none", "Euler", "linear"])
@pytest.mark.parametrize("d", [1, 2])
def test_a_bank_that_is_not_read_across_changes_nothing(scheme, d, x64):
    """Fractional noise: the rows of a transition behind the state's own are diagonal."""

    def model(rate):
        drift = (lambda t, x, p: -p * x) if d == 1 else (lambda t, x, p: p * (A @ x) + B)
        diffusion = (lambda t, x, p: 0.5) if d == 1 else (lambda t, x, p: L)
        noise = nsde.noise.MarkovFBM(0.3, num_terms=4)
        sde = nsde.SDE(drift, diffusion, noise=noise, params=rate)
        init = dist.Normal(0.5, 0.8) if d == 1 else dist.MultivariateNormal(jnp.asarray(M0), P0)
        x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, init, scheme=scheme))
        emission = (lambda t, x: dist.Normal(x, NOISE)) if d == 1 else _first
        nsde.observe("y", x, emission, obs=Y)

    told = nsde.handlers.marginalize(model, method=_Told("sequential"))
    assert abs(log_density(told, (1.3,), {}, {})[0]) < 1e-11
    usual = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())
    assert abs(log_density(usual, (1.3,), {}, {})[0]) > 1.0
