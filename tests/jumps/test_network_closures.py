"""Moment closures of reaction networks: against references, and where they fail."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jumps.references import REFERENCE

import numpyro_sde as nsde
from numpyro_sde.jumps.closure import _slopes
from numpyro_sde.jumps.projection import project


@pytest.mark.slow
def test_closure_of_a_dimerisation_says_where_it_fails(x64):
    for omega, end in REFERENCE["dimer_normal_closure_2"]["ode_from_zero"].items():
        omega = float(omega)
        net = nsde.ReactionNetwork(
            [[0, 2]], [[1, 0]], lambda x, p: jnp.stack([p, x[0] * (x[0] - 1) / p]), params=omega
        )
        last = 200.0 if omega > 2 else 3.0
        moments = nsde.jumps.moment_closure(net, np.linspace(0.0, last, 401), [0.0])
        assert bool(moments.valid[-1]) == (omega > 2)
        if omega > 2:
            got = [moments.mean[-1, 0], moments.cov[-1, 0, 0]]
            np.testing.assert_allclose(got, end["end"], rtol=1e-7)


def test_closure_of_a_bistable_network_depends_on_its_start(x64):
    k1, k2, k3, k4 = REFERENCE["schloegl_normal_closure_2"]["k"]

    def rates(x, p):
        n = x[0]
        return jnp.stack([k1 * n * (n - 1) / p, k2 * n * (n - 1) * (n - 2) / p**2, k3 * p, k4 * n])

    rows = {row["Omega"]: row for row in REFERENCE["schloegl_normal_closure_2"]["rows"]}
    for omega, start, side in (
        (100, 50.0, "from_low"),
        (100, 400.0, "from_high"),
        (5, 15.0, "from_low"),
    ):
        net = nsde.ReactionNetwork([[2, 3, 0, 1]], [[3, 2, 1, 0]], rates, params=float(omega))
        times = np.linspace(0.0, 30.0, 601)
        moments = nsde.jumps.moment_closure(net, times, [start], [[start]], substeps=20)
        got = [moments.mean[-1, 0], moments.cov[-1, 0, 0]]
        np.testing.assert_allclose(got, rows[omega][side][0], rtol=1e-5)


def closed(net, times, start):
    """A network under the normal closure as filters take it."""
    return nsde.filters.StateSpaceModel(
        sde=net,
        scheme=nsde.schemes.MomentClosure(20),
        scheme_chosen=True,
        times=times,
        dt=np.diff(times),
        cache=None,
        init_mean=jnp.array([start]),
        init_cov=jnp.zeros((1, 1)),
        init_gaussian=True,
        scalar=False,
        instruments=(),
    )


def dimers(omega):
    return nsde.ReactionNetwork(
        [[0, 2]], [[1, 0]], lambda x, p: jnp.stack([p, x[0] * (x[0] - 1) / p]), params=omega
    )


def schloegl(omega):
    k1, k2, k3, k4 = REFERENCE["schloegl_normal_closure_2"]["k"]

    def rates(x, p):
        n = x[0]
        return jnp.stack([k1 * n * (n - 1) / p, k2 * n * (n - 1) * (n - 2) / p**2, k3 * p, k4 * n])

    return nsde.ReactionNetwork([[2, 3, 0, 1]], [[3, 2, 1, 0]], rates, params=omega)


@pytest.mark.slow
def test_the_closure_check_of_networks_names_what_is_wrong(x64):
    check = functools.partial(nsde.filters.closure_check, num_paths=1000)
    fine = check(closed(dimers(10.0), np.linspace(0.0, 3.0, 16), 0.0))
    assert fine.ok, fine.reasons
    small = check(closed(dimers(1.0), np.linspace(0.0, 5.0, 26), 0.0))
    assert any("negative" in reason for reason in small.reasons)
    two = check(closed(schloegl(0.5), np.linspace(0.0, 8.0, 41), 0.0), starts=[[0.0], [3.0]])
    assert any("depends on the start" in reason for reason in two.reasons)
    one = check(closed(schloegl(5.0), np.linspace(0.0, 3.0, 16), 15.0))
    assert any("a mean is off" in reason for reason in one.reasons)


def stationary_moments(net, bound):
    """Mean and variance of the counts by finite-state projection."""
    chain, states = project(net, (bound,))
    Q = np.array(chain.generator)[:-1, :-1]
    Q = Q - np.diag(Q.sum(1))  # what would leave stays: its mass is below rounding
    law = np.linalg.solve(
        np.vstack([Q.T[:-1], np.ones(len(Q))]), np.append(np.zeros(len(Q) - 1), 1.0)
    )
    n = states[:, 0]
    return law @ n, law @ n**2 - (law @ n) ** 2


def fixed_points(make):
    """Mean and variance at which the closed equations of a network stand still, and the Jacobian.

    A function of the volume and of a first guess, compiled once.
    """

    def slopes(v, omega):
        dm, dC, _ = _slopes(make(omega).with_floor(None), v[:1], v[1:, None])
        return jnp.concatenate([dm, dC[0]])

    J = jax.jacfwd(slopes)

    @jax.jit
    def find(omega, guess):
        def newton(_, v):
            return v - jnp.linalg.solve(J(v, omega), slopes(v, omega))

        v = jax.lax.fori_loop(0, 30, newton, guess)
        return v, J(v, omega)

    return find


@pytest.mark.slow
def test_stationary_moments_of_the_references(x64):
    find = fixed_points(dimers)
    for row in REFERENCE["dimer_normal_closure_2"]["rows"]:
        net = dimers(row["Omega"])
        exact = stationary_moments(net, 60)
        np.testing.assert_allclose(exact, [row["exact_mean"], row["exact_var"]], atol=1e-8)
        for *known, stable in row["closure"]:
            found, J = find(row["Omega"], jnp.array(known))
            np.testing.assert_allclose(found, known, rtol=1e-8)
            assert np.all(np.linalg.eigvals(np.array(J)).real < 0) == stable
        # Linear noise about the fixed point of the rates a_1 = Omega, a_2 = n^2 / Omega.
        mean = row["Omega"] / np.sqrt(2.0)
        drift = -4.0 * mean / row["Omega"]
        variance = (row["Omega"] + 4.0 * mean**2 / row["Omega"]) / (-2.0 * drift)
        np.testing.assert_allclose([mean, variance], [row["lna_mean"], row["lna_var"]], rtol=1e-8)
    find = fixed_points(schloegl)
    for row in REFERENCE["schloegl_normal_closure_2"]["rows"]:
        net = schloegl(row["Omega"])
        exact = stationary_moments(net, 60 if row["Omega"] < 3 else int(60 + 12 * row["Omega"]))
        np.testing.assert_allclose(exact, [row["exact_mean"], row["exact_var"]], rtol=1e-7)
        for *known, stable in row["closure_fixed_points_mean_var_stable"]:
            found, J = find(row["Omega"], jnp.array(known))
            np.testing.assert_allclose(found, known, rtol=1e-8)
            assert np.all(np.linalg.eigvals(np.array(J)).real < 0) == stable
