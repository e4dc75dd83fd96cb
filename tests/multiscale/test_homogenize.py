"""Effective coefficients under large mean-free forces, against closed forms and simulation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import systems
from scipy.special import i0

import numpyro_sde as nsde
from numpyro_sde.multiscale import CellProblem, GaussHermite, GreenKubo, ScalarFast

STATES = np.array([-1.2, 0.4, 0.8])


def coefficients(sde, states=STATES):
    """Ito drift and total square of the diffusion at every state."""

    def at(x):
        return sde.ito_drift_at(0.0, x), jnp.sum(sde.diffusion_at(0.0, x) ** 2)

    return [np.asarray(a) for a in jax.jit(jax.vmap(at))(jnp.asarray(states))]


def test_rough_potential_slows_drift_and_diffusivity_alike(x64):
    slowing = 1.0 / i0(2.0) ** 2
    assert slowing == pytest.approx(0.19244, abs=5e-6)
    drift, square = coefficients(nsde.homogenize(systems.rough_potential()))
    np.testing.assert_allclose(drift, -slowing * STATES, rtol=1e-6)
    np.testing.assert_allclose(square, 2.0 * slowing * 0.5, rtol=1e-6)


@pytest.mark.slow
def test_slowing_of_another_fluctuation_and_period(x64):
    """A sawtooth of two harmonics and period 3, against SciPy's quadrature."""
    from scipy.integrate import quad

    def fine(y):
        return 0.3 * np.sin(2 * np.pi * y / 3) + 0.2 * np.cos(4 * np.pi * y / 3)

    rough = nsde.multiscale.TwoScaleLangevin(
        lambda x: x**4,
        lambda y: 0.3 * jnp.sin(2 * jnp.pi * y / 3) + 0.2 * jnp.cos(4 * jnp.pi * y / 3),
        epsilon=0.1,
        temperature=0.2,
        period=3.0,
    )
    ends = [quad(lambda y, s=s: np.exp(s * fine(y) / 0.2), 0, 3)[0] for s in (-1, 1)]
    assert float(rough.slowing) == pytest.approx(9.0 / (ends[0] * ends[1]), rel=1e-8)


def test_triad_by_the_cell_problem(x64):
    limit = nsde.homogenize(systems.triad())
    drift, square = coefficients(limit)
    want = systems.triad_limit(STATES)
    assert limit.interpretation == "ito"
    np.testing.assert_allclose(drift, want[0], rtol=1e-6)
    np.testing.assert_allclose(square, want[1], rtol=1e-6)


@pytest.mark.slow
def test_cell_problems_on_a_table(x64):
    table = coefficients(nsde.homogenize(systems.triad(), table=(-2.0, 2.0, 16)))
    np.testing.assert_allclose(table[0], systems.triad_limit(STATES)[0], rtol=1e-6)
    np.testing.assert_allclose(table[1], systems.triad_limit(STATES)[1], rtol=1e-6)


def test_coloured_noise_becomes_a_stratonovich_equation(x64):
    want = systems.coloured_noise_limit(STATES)
    limit = nsde.homogenize(systems.coloured_noise())
    assert limit.interpretation == "stratonovich"
    assert "Stratonovich" in limit.limit
    np.testing.assert_allclose(coefficients(limit), want, rtol=1e-6)
    ito = nsde.homogenize(systems.coloured_noise(), CellProblem(2))
    assert ito.interpretation == "ito"
    np.testing.assert_allclose(coefficients(ito), want, rtol=1e-6)


@pytest.mark.slow
def test_cell_problem_of_nonlinear_fast_dynamics(x64):
    """A scalar cell problem is solved by two integrations; here on a fine grid."""
    full = nsde.SlowFastSDE(
        lambda t, x, y: -x,
        lambda t, x, y: 0.3,
        lambda t, x, y: -(y**3),
        lambda t, x, y: 1.0,
        0.1,
        scaling="homogenization",
        slow_forcing=lambda t, x, y: x * y,
    )
    limit = nsde.homogenize(full, CellProblem(15), invariant=ScalarFast(-4.0, 4.0))

    y = np.linspace(-5.0, 5.0, 400_001)
    density = np.exp(-(y**4) / 2)
    # Phi' = 2 / pi(y) int_y^inf z pi(z) dz, and E Phi y = E Phi'^2 / 2 by parts.
    slope = 2.0 * np.cumsum((y * density)[::-1])[::-1] * (y[1] - y[0]) / density
    power = np.sum((slope**2 * density)[np.abs(y) < 3.0]) / density.sum()
    drift, square = coefficients(limit)
    np.testing.assert_allclose(square, 0.09 + power * STATES**2, rtol=1e-6)
    np.testing.assert_allclose(drift, -STATES + 0.5 * power * STATES, rtol=1e-6)


@pytest.mark.slow
def test_two_slow_coordinates_and_a_levy_area(x64):
    """`dX = Y/eps`, Y a rotating OU: the square is `A^-1 B B' A^-T` of Pavliotis and Stuart."""
    A = np.array([[1.0, 0.7], [-0.7, 1.0]])
    full = nsde.SlowFastSDE(
        lambda t, x, y, p: jnp.zeros(2),
        lambda t, x, y, p: 0.0,
        lambda t, x, y, p: -p["A"] @ y,
        lambda t, x, y, p: 1.0,
        0.1,
        params={"A": jnp.asarray(A)},
        event_dims={"A": 2},
        slow_dim=2,
        fast_dim=2,
        scaling="homogenization",
        slow_forcing=lambda t, x, y, p: jnp.stack([y[0], x[0] * y[1]]),
    )
    x = jnp.array([0.5, 0.1])
    limit = nsde.homogenize(full)
    inverse = np.diag([1.0, 0.5]) @ np.linalg.inv(A)
    factor = limit.diffusion_at(0.0, x)
    np.testing.assert_allclose(factor @ factor.T, inverse @ inverse.T, rtol=1e-6, atol=1e-12)
    # d_x Phi F: the second row of A^-1 times C = I/2 gives (A^-1)_{2.} with d/dx0 of x0.
    drift = [0.0, 0.5 * np.linalg.inv(A)[1, 0]]
    np.testing.assert_allclose(limit.drift_at(0.0, x), drift, rtol=1e-6, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["triad", "coloured noise"])
def test_green_kubo_is_within_three_per_cent(name):
    # Standard errors at this size: 0.3 per cent of the drift, 0.5 of the square (six seeds).
    make, want, window = {
        "triad": (systems.triad, systems.triad_limit, 2.5),
        "coloured noise": (systems.coloured_noise, systems.coloured_noise_limit, 6.0),
    }[name]
    got = coefficients(nsde.homogenize(make(), GreenKubo(65_536, window=window)), [0.8])
    np.testing.assert_allclose(np.ravel(got), np.ravel(want(0.8)), rtol=0.03)


@pytest.mark.slow
def test_green_kubo_of_a_rough_potential_is_within_three_per_cent():
    # One run has a standard error of 1.4 per cent (five seeds), the mean of four 0.7.
    want = 1.0 / i0(2.0) ** 2
    runs = [GreenKubo(65_536, window=12.0, seed=seed) for seed in range(4)]
    rough = systems.rough_potential()
    sampled = [float(rough.sampled_slowing(method)) for method in runs]
    assert np.mean(sampled) == pytest.approx(want, rel=0.03)
    drift, square = coefficients(nsde.homogenize(rough, runs[0]), [1.0])
    assert -float(drift[0]) == pytest.approx(sampled[0], rel=1e-5)
    assert float(square[0]) == pytest.approx(sampled[0], rel=1e-5)


@pytest.mark.slow
def test_green_kubo_on_a_table():
    method = GreenKubo(1024, window=3.0, burn_in=3.0, step=0.1)
    limit = nsde.homogenize(systems.triad(), method, table=(-1.0, 1.0, 4))
    drift, square = coefficients(limit, [-0.7, 0.7])
    want = systems.triad_limit(0.7)
    # A rough answer from few chains: 4 standard errors of 3 and 6 per cent.
    assert drift[0] == pytest.approx(-drift[1], rel=0.2)
    assert drift[1] == pytest.approx(want[0], rel=0.12)
    assert square[1] == pytest.approx(want[1], rel=0.24)


def test_a_force_with_a_mean_has_no_limit():
    full = nsde.SlowFastSDE(
        lambda t, x, y: -x,
        lambda t, x, y: 1.0,
        lambda t, x, y: 1.0 - y,
        lambda t, x, y: 1.0,
        0.1,
        scaling="homogenization",
        slow_forcing=lambda t, x, y: y,
    )
    assert np.isnan(coefficients(nsde.homogenize(full), [1.0])[1])
    assert np.isnan(coefficients(nsde.homogenize(full, CellProblem(2)), [1.0])).all()


def test_homogenised_sde_is_an_ordinary_one():
    limit = nsde.homogenize(systems.rough_potential())
    ou = nsde.SDE(lambda t, x: -0.19243688 * x, lambda t, x: jnp.sqrt(0.19243688))
    times, path = np.linspace(0.0, 1.0, 4), jnp.array([0.1, 0.3, 0.2, -0.1])
    got, want = (
        jax.jit(nsde.SDEPath(sde, times, init=dist.Normal(0.0, 1.0)).log_prob)(path)
        for sde in (limit, ou)
    )
    assert float(got) == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((nsde.SDE(lambda t, x: x, lambda t, x: x),), TypeError, "system must be"),
        ((systems.landau(),), ValueError, "scaling='averaging'"),
        ((systems.rough_potential(), "wong_zakai"), ValueError, "not used with a TwoScale"),
        ((systems.triad(), "wong_zakai"), ValueError, "several fast coordinates"),
        ((systems.triad(), "magic"), ValueError, "method must be"),
        ((systems.triad(), GaussHermite(3)), TypeError, "method must be"),
        ((systems.triad(), CellProblem(20)), ValueError, "degree 20 needs"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        nsde.homogenize(*arguments)


def test_simulation_without_noise_is_refused_with_its_reason():
    still = nsde.SlowFastSDE(
        lambda t, x, y: -x,
        lambda t, x, y: 0.1,
        lambda t, x, y: jnp.stack([y[1], -y[0]]),
        lambda t, x, y: jnp.zeros(2),
        0.1,
        fast_dim=2,
        scaling="homogenization",
        slow_forcing=lambda t, x, y: y[0],
    )
    with pytest.raises(ValueError, match="fast_diffusion zero they stay one and the same"):
        nsde.homogenize(still, GreenKubo(64))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_chains": 1}, "num_chains must be at least 2"),
        ({"window": 0.01}, "step must not exceed window"),
        ({"step": 0.0}, "step must be a positive"),
    ],
)
def test_wrong_simulations_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        GreenKubo(**change)
