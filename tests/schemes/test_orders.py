"""Each scheme has the order of convergence that the literature states.

Every test measures an error against a process with a known law or pathwise solution at four or
more step sizes, and compares the slope of log error against log step with the stated order,
within 0.2. Where it can be, the measure is deterministic: one-step moments, or the log density.
Pathwise (strong) errors are Monte Carlo; the standard error of the slope, over ten batches of
paths, is asserted to be below 0.05.
"""

from __future__ import annotations

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scheme_oracles import BentOscillator, BrownianSteps, Cir, Verhulst, ou_moments

import numpyro_sde as nsde
from numpyro_sde.schemes import (
    DiffraxSolver,
    Euler,
    HermiteExpansion,
    Kessler,
    LocalLinear,
    LogEuler,
    Milstein,
    Strang,
)

pytestmark = pytest.mark.usefixtures("x64_module")

CIR = Cir()
VERHULST = Verhulst(growth=0.5, crowding=0.5, noise=1.0)
OSCILLATOR = BentOscillator()


def cir_sde():
    return nsde.SDE(lambda t, x: CIR.rate * (CIR.mean - x), lambda t, x: CIR.scale * jnp.sqrt(x))


def root_sde():
    """Unit diffusion and a nonlinear drift."""
    return nsde.SDE(lambda t, y: CIR.root_drift(y), lambda t, y: 1.0)


def oscillator_sde():
    p = OSCILLATOR

    def drift(t, x):
        return jnp.stack(
            [
                jnp.sqrt(1 + x[0] ** 2) * x[1],
                -p.stiffness * jnp.arcsinh(x[0]) - p.friction * x[1],
            ]
        )

    return nsde.SDE(drift, lambda t, x: jnp.array([[0.0], [p.scale]]))


def slope(steps, errors):
    return np.polyfit(np.log(steps), np.log(errors), 1)[0]


def halvings(longest, count=5):
    return longest * 0.5 ** np.arange(count)


def one_step_moments(scheme, sde, x0, steps):
    """Mean and covariance of one step, by Gauss-Hermite quadrature over the innovations."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    weights = weights / weights.sum()
    d = np.ndim(x0) and len(x0)
    z = np.stack(np.meshgrid(*[nodes] * d, indexing="ij"), -1).reshape(-1, d) if d else nodes
    w = functools.reduce(np.multiply.outer, [weights] * max(d, 1)).ravel()

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def states(h, z):
        return scheme.step(sde, jnp.zeros(()), h, jnp.asarray(x0), z)

    x = np.asarray(states(jnp.asarray(steps), jnp.asarray(z)))
    mean = np.einsum("k,nk...->n...", w, x)
    away = (x - mean[:, None]).reshape(*x.shape[:2], -1)
    covariance = np.einsum("k,nki,nkj->nij", w, away, away)
    return mean, covariance if d else covariance[:, 0, 0]


@pytest.mark.parametrize(
    ("scheme", "mean_order", "variance_order"),
    [
        pytest.param(Euler(), 2, 2, id="Euler"),
        pytest.param(LocalLinear(), 3, 3, id="LocalLinear"),
        pytest.param(LocalLinear(ito_term=False), 2, 3, id="LocalLinear, no Ito term"),
        pytest.param(Strang(), 3, 3, id="Strang"),
        pytest.param(
            Strang(lambda: (-1.5, 4.0)),
            3,
            3,
            id="Strang, given linear part",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_one_step_moments_with_additive_noise(scheme, mean_order, variance_order):
    """Local error of mean and variance on the square root of a CIR process.

    Euler: dt^2 in both (weak order 1; Kloeden and Platen 1992, theorem 14.5.2 and section 10.2).
    LocalLinear: dt^3 in both (weak order 2; Carbonell, Jimenez and Biscay 2006); without the Ito
    term the mean of a curved drift is wrong at dt^2. Strang: dt^3 (one-step prediction error,
    Pilipovic, Samson and Ditlevsen 2024).
    """
    y0, steps = float(CIR.root(1.1)), halvings(0.1)
    mean, variance = one_step_moments(scheme, root_sde(), y0, steps)
    true_mean, true_variance = np.array([CIR.root_moments(y0, h) for h in steps]).T
    assert slope(steps, np.abs(mean - true_mean)) == pytest.approx(mean_order, abs=0.2)
    assert slope(steps, np.abs(variance - true_variance)) == pytest.approx(variance_order, abs=0.2)


@pytest.mark.parametrize("scheme", [LocalLinear(), Strang()], ids=["LocalLinear", "Strang"])
def test_one_step_moments_of_a_hypoelliptic_system(scheme):
    """A nonlinear oscillator with noise on its velocity only: local errors of order dt^3.

    The same statements as with noise in all components; for Strang that is the point of
    Buckwar, Samson, Tamborrino and Tubikanec (2022) and of Pilipovic et al. (2024). Measured
    for both means and the covariance. The variance of the velocity, which noise reaches at
    once, is better than that here; that of the position is itself of order dt^3 and must be
    right to the next order.
    """
    x0, steps = np.array([0.9, 0.4]), halvings(0.02, 4)
    mean, covariance = one_step_moments(scheme, oscillator_sde(), x0, steps)
    truth = [OSCILLATOR.moments(x0, h) for h in steps]
    mean_error = np.abs(mean - np.array([m for m, _ in truth]))
    error = np.abs(covariance - np.array([C for _, C in truth]))
    assert slope(steps, mean_error[:, 0]) == pytest.approx(3, abs=0.2)
    assert slope(steps, mean_error[:, 1]) == pytest.approx(3, abs=0.2)
    assert slope(steps, error[:, 0, 1]) == pytest.approx(3, abs=0.2)
    assert slope(steps, error[:, 1, 1]) > 2.8
    assert slope(steps, error[:, 0, 0]) > 3.8


@pytest.mark.parametrize("order", [1, 2, 3])
def test_kessler_moments(order):
    """Local error dt^(J+1) in mean and variance, on CIR (Kessler 1997)."""
    x0, steps = 1.1, halvings(0.02)
    mean, variance = one_step_moments(Kessler(order), cir_sde(), x0, steps)
    true_mean, true_variance = np.array([CIR.moments(x0, h) for h in steps]).T
    assert slope(steps, np.abs(mean - true_mean)) == pytest.approx(order + 1, abs=0.2)
    assert slope(steps, np.abs(variance - true_variance)) == pytest.approx(order + 1, abs=0.2)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("process", ["CIR", "OU"])
def test_hermite_log_density(order, process):
    """Log density in error by dt^(K+1) at fixed standardised increments, order K.

    Ait-Sahalia (2002, 2008): the remainder of the series to dt^K.
    """
    z = np.array([-2.0, -1.0, 0.3, 1.0, 2.0])
    steps = halvings(0.05)
    x0 = 1.1
    if process == "CIR":
        sde, local_scale = cir_sde(), CIR.scale * np.sqrt(x0)
        exact = CIR.logpdf
    else:
        sde, local_scale = nsde.SDE(lambda t, x: 1.3 * (0.4 - x), lambda t, x: 0.7), 0.7

        def exact(x, x0, h):
            mean, variance = ou_moments(x0, h, 1.3, 0.4, 0.7)
            return -0.5 * (np.log(2 * np.pi * variance) + (x - mean) ** 2 / variance)

    scheme = HermiteExpansion(order)

    @jax.jit
    @jax.vmap
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def log_density(h, x):
        return scheme.log_density(sde, jnp.zeros(()), h, jnp.asarray(x0), x)

    x = x0 + local_scale * np.sqrt(steps)[:, None] * z
    error = np.abs(np.asarray(log_density(steps, x)) - exact(x, x0, steps[:, None]))
    assert slope(steps, error.max(axis=1)) == pytest.approx(order + 1, abs=0.2)


PATHS = 1000
STRONG_STEPS = (32, 64, 128, 256)


@functools.cache
def brownian():
    return BrownianSteps(PATHS, 4096, seed=0)


def strong_slope(scheme, sde, x0, truth, steps=STRONG_STEPS, normals=None):
    """Slope of the root mean square error at time 1, and its standard error over batches."""

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def simulate(z, n):
        def step(i, x):
            return scheme.step(sde, i / n, jnp.reciprocal(n * 1.0), x, z[i])

        return jax.lax.fori_loop(0, n, step, jnp.asarray(x0))

    scalar = scheme.innovation_shape(sde, ()) == ()
    squares = []
    for n in steps:
        z = np.zeros((PATHS, max(steps), 2))
        z[:, :n] = (normals or brownian().normals)(n)
        end = np.asarray(simulate(z[..., 0] if scalar else z, n))
        squares.append((end - truth) ** 2)
    h = 1 / np.array(steps)
    batches = np.array(squares).reshape(len(steps), 10, -1).mean(axis=2)
    slopes = [slope(h, np.sqrt(batch)) for batch in batches.T]
    return slope(h, np.sqrt(np.mean(squares, axis=1))), np.std(slopes, ddof=1) / np.sqrt(10)


def solver(name):
    return DiffraxSolver(getattr(diffrax, name)())


@pytest.mark.parametrize(
    ("make", "order"),
    [
        pytest.param(Euler, 0.5, id="Euler"),
        pytest.param(Milstein, 1.0, id="Milstein"),
        pytest.param(LogEuler, 1.0, id="LogEuler"),
        pytest.param(lambda: solver("ItoMilstein"), 1.0, id="diffrax.ItoMilstein"),
        pytest.param(lambda: solver("Heun"), 1.0, id="diffrax.Heun"),
        pytest.param(lambda: solver("SlowRK"), 1.5, id="diffrax.SlowRK"),
        pytest.param(lambda: solver("GeneralShARK"), 1.0, id="diffrax.GeneralShARK"),
        *[
            pytest.param(functools.partial(solver, name), 1.0, marks=pytest.mark.slow, id=name)
            for name in ("EulerHeun", "StratonovichMilstein", "SPaRK", "Midpoint")
        ],
    ],
)
def test_strong_order_with_multiplicative_noise(make, order):
    """Root mean square error at time 1 on stochastic logistic growth, solved path by path.

    Euler 1/2, Milstein 1 (Kloeden and Platen 1992, theorems 10.2.2 and 10.3.5); LogEuler 1, as
    Euler with the additive noise that the logarithm has; Heun's and the
    midpoint rule 1 with one Brownian motion (Ruemelin 1982); SlowRK 3/2, GeneralShARK and SPaRK 1
    with commutative noise (Foster, dos Reis and Strange 2024; Diffrax's own statement).
    SlowRK's error is of order 2 until the steps are short, so it has shorter ones.
    """
    p = VERHULST
    sde = nsde.SDE(lambda t, x: x * (p.growth - p.crowding * x), lambda t, x: p.noise * x)
    steps = (128, 256, 512, 1024) if order == 1.5 else STRONG_STEPS
    got, error = strong_slope(make(), sde, 1.0, p.solve(1.0, brownian()), steps)
    assert error < 0.05
    assert got == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize(
    ("make", "order"),
    [
        pytest.param(Euler, 1.0, id="Euler"),
        pytest.param(lambda: solver("ShARK"), 1.5, id="diffrax.ShARK"),
        pytest.param(lambda: solver("SRA1"), 1.5, id="diffrax.SRA1"),
        pytest.param(lambda: solver("SEA"), 1.0, id="diffrax.SEA"),
        *[
            pytest.param(functools.partial(solver, name), 1.5, marks=pytest.mark.slow, id=name)
            for name in ("GeneralShARK", "SPaRK")
        ],
    ],
)
def test_strong_order_with_additive_noise(make, order):
    """Root mean square error at time 1 on the logarithm of stochastic logistic growth.

    Euler 1 (Kloeden and Platen 1992, section 10.2); SRA1 3/2 (Roessler 2010); SEA 1, ShARK,
    GeneralShARK and SPaRK 3/2 (Foster, dos Reis and Strange 2024).
    """
    p = VERHULST
    sde = nsde.SDE(
        lambda t, y: p.growth - 0.5 * p.noise**2 - p.crowding * jnp.exp(y), lambda t, y: p.noise
    )
    truth = np.log(p.solve(1.0, brownian()))
    got, error = strong_slope(make(), sde, 0.0, truth)
    assert error < 0.05
    assert got == pytest.approx(order, abs=0.2)


def test_strong_order_of_strang():
    """Root mean square error at time 1: order 1 (Pilipovic, Samson and Ditlevsen 2024, in L^p).

    On the logarithm of stochastic logistic growth, with the drift split into -y and the rest,
    so that the innovations are those of an Ornstein-Uhlenbeck process on the same Brownian path.
    """
    p, rate = VERHULST, -1.0

    def normals(n):
        h, fine, path = 1 / n, brownian().h, brownian()
        to_end = h - fine * np.arange(1, path.W.shape[1] // n + 1)
        step = path.W + rate * fine * (0.5 * path.W + path.H)
        driven = (step.reshape(PATHS, n, -1) * np.exp(rate * to_end)).sum(axis=2)
        z = driven / np.sqrt(np.expm1(2 * rate * h) / (2 * rate))
        return np.stack([z, 0 * z], axis=2)

    sde = nsde.SDE(
        lambda t, y: p.growth - 0.5 * p.noise**2 - p.crowding * jnp.exp(y), lambda t, y: p.noise
    )
    truth = np.log(p.solve(1.0, brownian()))
    scheme = Strang(lambda: (rate, 0.0))
    got, error = strong_slope(scheme, sde, 0.0, truth, normals=normals)
    assert error < 0.05
    assert got == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize(
    "scheme", [LocalLinear(), Kessler(2), Strang()], ids=["LocalLinear", "Kessler", "Strang"]
)
def test_coefficients_that_change_in_time(scheme):
    """`dX = (sin(3 t) - X) dt + exp(t) dW`: moments still in error by dt^3 (weak order 2)."""
    t, x0, steps = 0.4, 1.1, halvings(0.1)
    sde = nsde.SDE(lambda t, x: jnp.sin(3 * t) - x, lambda t, x: jnp.exp(t))
    step = jax.jit(jax.vmap(lambda h, z: scheme.step(sde, t, h, jnp.asarray(x0), z)))
    ends = np.array([step(steps, np.full(len(steps), z)) for z in (-1.0, 1.0)])
    nodes, weights = np.polynomial.legendre.leggauss(20)
    s = steps[:, None] * (nodes + 1) / 2
    weights = weights * steps[:, None] / 2
    decay = np.exp(-(steps[:, None] - s))
    mean = x0 * np.exp(-steps) + np.sum(weights * decay * np.sin(3 * (t + s)), axis=1)
    variance = np.sum(weights * decay**2 * np.exp(2 * (t + s)), axis=1)
    mean_error = np.abs(ends.mean(axis=0) - mean)
    variance_error = np.abs(ends.std(axis=0) ** 2 - variance)
    assert slope(steps, mean_error) == pytest.approx(3, abs=0.2)
    assert slope(steps, variance_error) == pytest.approx(3, abs=0.2)
