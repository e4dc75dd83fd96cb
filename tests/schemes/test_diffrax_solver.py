"""Diffrax solvers as maps of innovations: the same law whatever calculus the solver is for."""

from __future__ import annotations

import builtins
import importlib
import sys

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import numpyro_sde as nsde
from numpyro_sde.schemes import DiffraxSolver, Euler, Milstein

GROWTH, NOISE = 0.4, 0.6


def gbm(kind):
    correction = 0.5 * NOISE**2 if kind == "stratonovich" else 0.0
    return nsde.SDE(
        lambda t, x: (GROWTH - correction) * x, lambda t, x: NOISE * x, interpretation=kind
    )


@pytest.mark.parametrize("kind", ["ito", "stratonovich"])
@pytest.mark.parametrize(
    "solver",
    [
        diffrax.Euler(),
        diffrax.Heun(),
        pytest.param(diffrax.SlowRK(), marks=pytest.mark.slow),
        pytest.param(diffrax.ItoMilstein(), marks=pytest.mark.slow),
    ],
)
def test_mean_of_geometric_brownian_motion(solver, kind, x64):
    """`E X_1 = exp(growth)` in both calculi, for Ito and Stratonovich solvers.

    20,000 paths of 10 steps: Monte Carlo standard error 0.0068, bound 4 of them; the bias of a
    solver in the wrong calculus would be 0.25 or more. The weak error of the Ito
    solvers, the largest, is removed by comparing with their own mean, (1 + growth / 10)^10.
    """
    scheme = DiffraxSolver(solver)
    path = nsde.SDEPath(gbm(kind), np.linspace(0, 1, 11), 1.0, scheme=scheme)
    x = jax.jit(lambda k: path.sample(k, (20_000,)))(jax.random.key(0))[:, -1]
    euler = isinstance(solver, diffrax.Euler | diffrax.ItoMilstein)
    want = (1 + GROWTH / 10) ** 10 if euler else np.exp(GROWTH)
    error = np.sqrt(np.exp(2 * GROWTH) * (np.exp(NOISE**2) - 1) / 20_000)
    assert abs(np.mean(x) - want) < 4 * error


def general_sde(kind="ito"):
    """Two states, three noises that do not commute; linear, so its Ito mean is known."""
    columns = np.array(
        [[[0.3, 0.1], [0.0, 0.2]], [[0.0, -0.3], [0.3, 0.0]], [[0.1, 0.0], [0.2, 0.4]]]
    )
    A = np.array([[-0.5, 0.4], [0.1, -0.2]])
    half = 0.5 * sum(M @ M for M in columns)
    return nsde.SDE(
        lambda t, x: (A - (half if kind == "stratonovich" else 0.0)) @ x,
        lambda t, x: jnp.stack([M @ x for M in columns], axis=1),
        interpretation=kind,
    ), A


@pytest.mark.parametrize("kind", ["ito", "stratonovich"])
def test_drift_conversion_for_general_noise(kind, x64):
    """One step of Heun's and of Euler's rule have the same mean, `x + A x dt + O(dt^2)`.

    The mean over the innovations is by Gauss-Hermite quadrature, so there is no Monte Carlo
    error; a missing correction would be 0.5 sum_j M_j^2 x, of size 0.06 relative to dt.
    """
    sde, A = general_sde(kind)
    x, h = jnp.array([1.0, -0.5]), 1e-4
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    weights = weights / weights.sum()
    z = np.stack(np.meshgrid(*[nodes] * 3, indexing="ij"), -1).reshape(-1, 3)
    w = np.multiply.outer(np.multiply.outer(weights, weights), weights).ravel()
    for solver in (diffrax.Euler(), diffrax.Heun()):
        scheme = DiffraxSolver(solver)
        assert scheme.innovation_shape(sde, (2,)) == (3,)
        step = jax.jit(jax.vmap(lambda e, s=scheme: s.step(sde, 0.0, h, x, e)))
        rate = (w @ np.asarray(step(jnp.asarray(z))) - x) / h
        np.testing.assert_allclose(rate, A @ x, atol=1e-3)


NOISES = {
    "scalar": (lambda t, x: 0.3 * jnp.sqrt(1 + x**2) + t, 0.7),
    "two noises on a scalar": (lambda t, x: jnp.stack([0.3 * x, 0.4 * x]), 0.7),
    "diagonal": (lambda t, x: 0.3 * jnp.sqrt(1 + x**2), [0.7, -0.4]),
    "shared scalar": (lambda t, x: 0.3, [0.7, -0.4]),
}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(
    ("solver", "scheme"), [(diffrax.Euler(), Euler()), (diffrax.ItoMilstein(), Milstein())]
)
def test_same_step_as_our_own(solver, scheme, noise, x64):
    """Diffrax's Euler and Milstein steps are ours, to rounding, at a late time."""
    diffusion, x = NOISES[noise][0], jnp.array(NOISES[noise][1])
    sde = nsde.SDE(lambda t, x: jnp.sin(t) - x, diffusion)
    t, h, z = 7.3, 0.1, 1.1 * jnp.ones(x.shape)
    ours, theirs = jax.jit(
        lambda z: [s.step(sde, t, h, x, z) for s in (scheme, DiffraxSolver(solver))]
    )(z)
    np.testing.assert_allclose(theirs, ours, rtol=1e-12)


def test_full_noise_is_used_as_given(x64):
    sde = nsde.SDE(lambda t, x: -x, lambda t, x: jnp.array([[0.5, 0.1, 0.2], [0.0, 0.3, -0.4]]))
    x, z = jnp.array([0.7, -0.4]), jnp.array([1.0, -2.0, 0.5])
    got = DiffraxSolver(diffrax.Euler()).step(sde, 0.0, 0.1, x, z)
    want = x - 0.1 * x + np.sqrt(0.1) * sde.diffusion_at(0.0, x) @ z
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_levy_area_has_its_variance(x64):
    """Integrated Brownian motion `dX = V dt, dV = dW`: exact from W and H, so from H ~ N(0, h/12).

    With W alone the variance of the position would be h^3 / 4 in place of h^3 / 3.
    """
    sde = nsde.SDE(
        lambda t, x: jnp.stack([x[1], 0.0 * x[1]]), lambda t, x: jnp.array([[0.0], [1.0]])
    )
    scheme = DiffraxSolver(diffrax.ShARK())
    assert scheme.innovation_shape(sde, (2,)) == (2,)
    h = 0.3
    step = jax.jit(jax.vmap(lambda z: scheme.step(sde, 0.0, h, jnp.zeros(2), z)))
    factor = np.asarray(step(jnp.eye(2))).T
    want = [[h**3 / 3, h**2 / 2], [h**2 / 2, h]]
    np.testing.assert_allclose(factor @ factor.T, want, rtol=1e-12)


def test_substeps_are_steps(x64):
    """Two substeps are two steps of half the length, on concatenated innovations."""
    sde = nsde.SDE(lambda t, x: jnp.sin(t) - x, lambda t, x: 0.3 * jnp.sqrt(1 + x**2) + t)
    two, one = (DiffraxSolver(diffrax.SPaRK(), substeps=n) for n in (2, 1))
    assert two.innovation_shape(sde, ()) == (4,)
    z = jnp.array([0.3, -1.0, 0.7, 2.0])

    @jax.jit
    def ends(z):
        middle = one.step(sde, 0.5, 0.1, jnp.asarray(0.7), z[:2])
        return two.step(sde, 0.5, 0.2, jnp.asarray(0.7), z), one.step(sde, 0.6, 0.1, middle, z[2:])

    np.testing.assert_allclose(*ends(z), rtol=1e-12)


def test_whitened_path_under_jit_vmap_and_grad():
    """Batched parameters, derivatives in both modes, float32, at a late time."""
    times = 1e5 + np.array([0.0, 0.1, 0.25])

    def end(scale, z):
        sde = nsde.SDE(lambda t, x, p: -x, lambda t, x, p: p, params=scale)
        scheme = DiffraxSolver(diffrax.ShARK(), substeps=2)
        path = nsde.SDEPath(sde, times, 1.0, scheme=scheme)
        return path.forward(jnp.ones(()), z)[..., -1]

    scales = jnp.array([0.2, 0.4])
    z = jax.random.normal(jax.random.key(0), (2, 2, 4))
    got = jax.jit(end)(scales, z)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(
        got, [jax.jit(end)(s, e) for s, e in zip(scales, z, strict=True)], rtol=1e-6
    )
    # The end is linear in the scale: the slope is the end less its value without noise.
    slope = jax.jit(jax.vmap(jax.grad(end)))(scales, z)
    forward = jax.jit(lambda s: jax.jvp(lambda s: end(s, z), (s,), (jnp.ones(2),))[1])(scales)
    np.testing.assert_allclose(slope, forward, rtol=1e-5)
    still = jax.jit(end)(0.0 * scales, z)
    np.testing.assert_allclose(still, np.exp(-0.25), rtol=1e-3)
    np.testing.assert_allclose(scales * slope, got - still, rtol=1e-4)


def test_no_density():
    path = nsde.SDEPath(gbm("ito"), [0.0, 1.0], 1.0, scheme=DiffraxSolver(diffrax.Heun()))
    assert path.has_rsample
    with pytest.raises(TypeError, match="DiffraxSolver has no transition density"):
        path.log_prob(jnp.ones(2))
    with pytest.raises(TypeError, match="maps innovations to states only"):
        path.inverse(jnp.ones(2))


def test_refusals():
    with pytest.raises(TypeError, match=r"call it, ShARK\(\)"):
        DiffraxSolver(diffrax.ShARK)
    with pytest.raises(TypeError, match=r"Ito or Stratonovich solver such as .* got Tsit5"):
        DiffraxSolver(diffrax.Tsit5())
    with pytest.raises(TypeError, match="underdamped Langevin equation only"):
        DiffraxSolver(diffrax.QUICSORT(0.1))
    with pytest.raises(ValueError, match="substeps must be a positive integer, got 0"):
        DiffraxSolver(diffrax.Heun(), substeps=0)
    with pytest.raises(ValueError, match=r"ShARK.*needs additive noise.*GeneralShARK"):
        nsde.SDEPath(gbm("ito"), [0.0, 1.0], 1.0, scheme=DiffraxSolver(diffrax.ShARK()))


def test_missing_diffrax_is_explained(monkeypatch):
    real = builtins.__import__

    def without_diffrax(name, *args, **kwargs):
        if name == "diffrax":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    solver = diffrax.Heun()
    interop = importlib.import_module("numpyro_sde.interop")
    loaded = importlib.import_module("numpyro_sde.interop.diffrax")
    monkeypatch.setattr(builtins, "__import__", without_diffrax)
    monkeypatch.delitem(sys.modules, "numpyro_sde.interop.diffrax")
    monkeypatch.delattr(interop, "diffrax")
    with pytest.raises(ImportError, match=r"pip install 'numpyro-sde\[diffrax\]'"):
        DiffraxSolver(solver)
    interop.diffrax = loaded
