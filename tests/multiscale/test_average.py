"""Averaged coefficients against closed forms and independent quadrature."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import systems
from numpyro.distributions import Distribution

import numpyro_sde as nsde
from numpyro_sde.multiscale import (
    Coordinatewise,
    ErgodicAverage,
    GaussHermite,
    MonteCarlo,
    QuasiMonteCarlo,
    ScalarFast,
    Table,
    UnnormalizedDensity,
)

STATES = np.linspace(-1.5, 1.5, 13)


def coefficients(sde, states=STATES):
    """Drift and square of the diffusion at every state."""
    both = jax.vmap(lambda x: (sde.drift_at(0.0, x), sde.diffusion_at(0.0, x) ** 2))
    return [np.asarray(a) for a in jax.jit(both)(jnp.asarray(states))]


def close(got, want, tolerance):
    """Largest error against the largest value."""
    error = np.max(np.abs(got - want)) / np.max(np.abs(want))
    assert error < tolerance, error


def landau_law(x, p):
    return dist.Normal(x, jnp.sqrt(p["v"]))


def landau_density(x, y, p):
    return -((y - x) ** 2) / (2.0 * p["v"])


CASES = {
    "S1 linear": (systems.ou_ou, None, systems.ou_ou_drift),
    "S2 linear": (systems.landau, None, systems.landau_drift),
    "S2 known law": (systems.landau, landau_law, systems.landau_drift),
    "S2 density": (
        systems.landau,
        UnnormalizedDensity(landau_density, -6.0, 6.0),
        systems.landau_drift,
    ),
    "S2 scalar": (systems.landau, ScalarFast(-6.0, 6.0), systems.landau_drift),
    "S3 scalar": (systems.bimodal, ScalarFast(-4.0, 4.0), systems.bimodal_drift),
}


@pytest.mark.parametrize("table", [None, (-1.6, 1.6, 96)], ids=["direct", "table"])
@pytest.mark.parametrize("case", CASES)
def test_averaged_drift_with_known_laws(case, table, x64):
    make, invariant, drift = CASES[case]
    limit = nsde.average(make(), invariant, table=table)
    close(coefficients(limit)[0], drift(STATES), 1e-6)


def test_averaged_diffusion_is_the_root_of_the_averaged_square(x64):
    for table in (None, (-2.0, 2.0, 32)):
        drift, square = coefficients(nsde.average(systems.noisy(), landau_law, table=table))
        close(square, systems.noisy_square(STATES), 1e-6)
        close(drift, -STATES, 1e-6)


def test_many_bath_particles(x64):
    limit = nsde.average(systems.tagged_particle(), quadrature=Coordinatewise(32))
    close(coefficients(limit)[0], systems.tagged_particle_drift(STATES), 1e-6)
    # 1024 points of quasi-Monte Carlo in ten dimensions: no closed error, a part in a hundred.
    limit = nsde.average(systems.tagged_particle(), quadrature=QuasiMonteCarlo(1024))
    close(coefficients(limit)[0], systems.tagged_particle_drift(STATES), 1e-2)


SIMULATED = {
    "S1": (systems.ou_ou, systems.ou_ou_drift, 0),
    "S2": (systems.landau, systems.landau_drift, 0),
    "S2b": (systems.noisy, systems.noisy_square, 1),
}


@pytest.mark.parametrize("name", SIMULATED)
def test_simulated_average_is_within_two_per_cent(name):
    # 30,720 nodes a state: standard errors below 0.4 per cent, and the step's own error.
    law = ErgodicAverage(num_chains=2048, length=30.0, every=2.0)
    make, want, which = SIMULATED[name]
    states = STATES[::3]
    close(coefficients(nsde.average(make(), law), states)[which], want(states), 0.02)


@pytest.mark.slow
def test_simulated_average_of_a_bimodal_law_is_within_two_per_cent():
    # 524,288 nodes a state, for a standard error of 0.3 per cent of a small drift.
    law = ErgodicAverage(num_chains=65_536, length=20.0, every=2.5, step=0.025)
    states = STATES[::3]
    got = coefficients(nsde.average(systems.bimodal(), law), states)[0]
    close(got, systems.bimodal_drift(states), 0.02)


def test_simulated_average_of_many_bath_particles():
    # The fastest mode relaxes at rate 4.9: a tenth of that time is one step.
    law = ErgodicAverage(num_chains=1024, length=10.0, every=2.0, step=0.02)
    got = coefficients(nsde.average(systems.tagged_particle(), law), STATES[::3])[0]
    close(got, systems.tagged_particle_drift(STATES[::3]), 0.02)


@pytest.mark.parametrize(
    ("law", "moment"),
    [
        (dist.LogNormal(0.2, 0.3), np.exp(2 * 0.2 + 2 * 0.3**2)),
        (dist.Exponential(2.0), 0.5),
        (dist.Uniform(-1.0, 2.0), 1.0),
        (dist.Delta(0.7), 0.49),
        (dist.Normal(0.3, 0.5).expand([]), 0.34),
        (
            dist.MixtureSameFamily(
                dist.Categorical(probs=jnp.array([0.3, 0.7])),
                dist.Normal(jnp.array([-1.0, 2.0]), jnp.array([0.5, 0.1])),
            ),
            0.3 * 1.25 + 0.7 * 4.01,
        ),
    ],
    ids=lambda law: type(law).__name__,
)
def test_second_moment_of_other_laws(law, moment):
    assert isinstance(law, Distribution)
    full = nsde.SlowFastSDE(
        lambda t, x, y: y**2, lambda t, x, y: 1.0, lambda t, x, y: -y, lambda t, x, y: 1.0, 0.1
    )
    assert float(nsde.average(full, lambda x: law).drift_at(0.0, 0.0)) == pytest.approx(
        moment, rel=1e-4
    )


def vector_system(**kwargs):
    return nsde.SlowFastSDE(
        lambda t, x, y, p: jnp.stack([y[0] * y[1] - x[0], y[0] + x[0] * x[1]]),
        lambda t, x, y, p: jnp.stack([jnp.stack([1.0, y[1]]), jnp.stack([0.0, p["s"]])]),
        lambda t, x, y, p: p["A"] @ (y - x),
        lambda t, x, y, p: jnp.eye(2),
        0.1,
        params={"A": jnp.array([[-1.0, 0.5], [0.0, -2.0]]), "s": 0.7},
        event_dims={"A": 2},
        slow_dim=2,
        fast_dim=2,
        **kwargs,
    )


@pytest.mark.slow
def test_vector_slow_and_fast_states(x64):
    # Lyapunov by hand: C11 = 11/24, C12 = 1/24, C22 = 1/4 for this A and unit noise.
    x = jnp.array([0.3, -0.4])
    want_drift = np.array([1 / 24 + x[0] * x[1] - x[0], x[0] + x[0] * x[1]])
    want_square = np.array([[1 + 0.25 + 0.16, -0.4 * 0.7], [-0.4 * 0.7, 0.49]])
    for table in (None, Table((-1.0, -1.0), (1.0, 1.0), 24)):
        limit = nsde.average(vector_system(), table=table)
        drift, factor = jax.jit(lambda x, s=limit: (s.drift_at(0.0, x), s.diffusion_at(0.0, x)))(x)
        np.testing.assert_allclose(drift, want_drift, rtol=1e-6)
        np.testing.assert_allclose(factor @ factor.T, want_square, rtol=1e-6)


def test_a_batch_of_parameters_has_a_table_each():
    v = jnp.array([0.1, 0.3, 0.6])
    times = np.arange(5) * 0.1
    path = jnp.asarray([0.5, 0.6, 0.55, 0.7, 0.65])

    def averaged(v):
        limit = nsde.average(systems.landau(v=v), table=(-2.0, 2.0, 64))
        assert limit.batch_shape == (3,)
        return nsde.SDEPath(limit, times, init=0.5).log_prob(path)

    def closed(v):
        sde = nsde.SDE(lambda t, x, p: (1.0 - p) * x - x**3, lambda t, x, p: 0.3, params=v)
        return nsde.SDEPath(sde, times, init=0.5).log_prob(path)

    np.testing.assert_allclose(jax.jit(averaged)(v), jax.jit(closed)(v), rtol=1e-4)


def test_a_batch_shares_the_random_numbers_of_a_simulation():
    law = ErgodicAverage(num_chains=4, burn_in=0.0, length=0.2, every=0.1, step=0.1)
    limit = nsde.average(systems.landau(v=jnp.array([0.3, 0.3])), law)
    path = nsde.SDEPath(limit, [0.0, 0.1, 0.2], init=0.5)
    density = jax.jit(path.log_prob)(jnp.array([0.5, 0.6, 0.4]))
    assert density.shape == (2,)
    assert density[0] == density[1]


def test_a_batch_refuses_arrays_that_a_density_closes_over():
    centres = jnp.array([0.1, 0.2, 0.3])
    law = UnnormalizedDensity(lambda x, y, p: -((y - centres[0]) ** 2), -6.0, 6.0)
    limit = nsde.average(systems.landau(v=jnp.array([0.1, 0.2, 0.3])), law)
    with pytest.raises(ValueError, match="closes over 'centres'"):
        nsde.SDEPath(limit, [0.0, 0.1], init=0.5)


def test_outside_the_table_is_nan():
    limit = nsde.average(systems.landau(), table=(-1.0, 1.0, 32))
    drift, _ = coefficients(limit, [-1.1, -1.0, 1.0, 1.1])
    assert np.isnan(drift).tolist() == [True, False, False, True]


def test_gradient_through_a_table_is_that_of_the_closed_form(x64):
    times = np.arange(50) * 0.1
    path = jnp.sin(times)

    def averaged(v):
        limit = nsde.average(systems.landau(v=v), table=(-1.1, 1.1, 64))
        return nsde.SDEPath(limit, times, init=0.0).log_prob(path)

    def closed(v):
        sde = nsde.SDE(lambda t, x: (1.0 - v) * x - x**3, lambda t, x: 0.3)
        return nsde.SDEPath(sde, times, init=0.0).log_prob(path)

    got, want = (jax.jit(jax.value_and_grad(fn))(0.3) for fn in (averaged, closed))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def sampled_log_prob(key, scheme=None):
    """Log likelihood estimate of a fixed path, with 8 fresh draws."""
    times = np.arange(11) * 0.2
    limit = nsde.average(
        systems.ou_ou(),
        lambda x, p: dist.Normal(p["c"] * x, jnp.sqrt(p["q"])),
        MonteCarlo(8, key),
    )
    return nsde.SDEPath(limit, times, init=1.0, scheme=scheme).log_prob(jnp.cos(times))


@pytest.fixture
def exact_log_prob():
    times = np.arange(11) * 0.2
    drift = systems.ou_ou_drift(1.0)
    sde = nsde.SDE(lambda t, x: float(drift) * x, lambda t, x: systems.OU["s"])
    law = nsde.SDEPath(sde, times, init=1.0, scheme=nsde.schemes.Euler())
    return float(law.log_prob(jnp.cos(times)))


def test_two_halves_make_the_likelihood_unbiased(exact_log_prob, x64):
    """The mean over many draws of 8 nodes against the closed form of the averaged drift."""
    keys = jax.random.split(jax.random.key(0), 5_000)
    draws = np.asarray(jax.jit(jax.vmap(sampled_log_prob))(keys))
    error = draws.std() / np.sqrt(len(draws))
    assert abs(draws.mean() - exact_log_prob) < 4 * error


@pytest.mark.slow
def test_plugging_in_the_mean_of_draws_is_biased_as_stated(exact_log_prob, x64):
    """It loses `dt Var(b) / (2 L s^2)` a step."""
    keys = jax.random.split(jax.random.key(0), 20_000)
    euler = nsde.schemes.Euler()
    plugged = np.asarray(jax.jit(jax.vmap(lambda key: sampled_log_prob(key, euler)))(keys))
    bias = -10 * 0.2 * 0.6**2 * 0.5 / (2 * 8 * 0.4**2)
    error = plugged.std() / np.sqrt(len(plugged))
    assert abs(plugged.mean() - exact_log_prob - bias) < 4 * error
    assert abs(bias) > 8 * error


@pytest.mark.slow
def test_an_averaged_sde_serves_every_engine():
    limit = nsde.average(systems.ou_ou())
    times = np.linspace(0.0, 2.0, 9)
    law = nsde.SDEPath(limit, times, init=dist.Normal(0.0, 1.0))
    rate = OU_RATE
    ou = nsde.processes.OrnsteinUhlenbeck(rate, 0.0, 0.4)
    data = jnp.sin(jnp.arange(9.0))
    results = [
        nsde.filter_path(
            nsde.SDEPath(sde, times, init=dist.Normal(0.0, 1.0), scheme=scheme),
            lambda t, x: dist.Normal(x, 0.1),
            data,
            method=nsde.filters.Kalman(),
        ).log_likelihood
        for sde, scheme in ((limit, nsde.schemes.LocalLinear()), (ou, None))
    ]
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4)
    assert law.sample(jax.random.key(0), (3,)).shape == (3, 9)


OU_RATE = systems.OU["a"] - systems.OU["b"] * systems.OU["c"]


def by_time(t, x, y, p):
    return -x * (1.0 + t)


@pytest.mark.parametrize(
    "invariant",
    [
        lambda x: dist.Normal(x, 0.5),
        lambda x, p: dist.Normal(x, 0.5),
        UnnormalizedDensity(lambda x, y: -2.0 * (y - x) ** 2, -6.0, 6.0),
        UnnormalizedDensity(lambda x, y, p: -2.0 * (y - x) ** 2, -6.0, 6.0),
    ],
)
def test_without_params_laws_may_take_them_or_not(invariant):
    full = nsde.SlowFastSDE(
        lambda t, x, y: y**2, lambda t, x, y: 1.0, lambda t, x, y: -y, lambda t, x, y: 1.0, 0.1
    )
    limit = nsde.average(full, invariant)
    assert float(limit.drift_at(0.0, 1.0)) == pytest.approx(1.25, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"slow_fast": nsde.SDE(lambda t, x: x, lambda t, x: x)}, TypeError, "slow_fast must be"),
        ({"invariant": lambda p: p, "slow_fast": systems.ou_ou()}, TypeError, r"take \(x, p\)"),
        ({"invariant": lambda x, p: x}, TypeError, "must return a NumPyro distribution"),
        ({"invariant": lambda x, p: dist.Normal(jnp.zeros(2), 1.0)}, ValueError, r"got \(2,\)"),
        ({"invariant": lambda x, p: dist.Poisson(1.0)}, TypeError, "no fixed nodes"),
        ({"quadrature": 1}, ValueError, "order must be at least 2"),
        ({"quadrature": "gauss"}, TypeError, "quadrature must be a number of nodes"),
        ({"quadrature": GaussHermite(8), "invariant": ScalarFast(-1, 1)}, ValueError, "own nodes"),
        ({"table": (1.0, -1.0, 8)}, ValueError, "low < high"),
        ({"table": (-1.0, 1.0, 3)}, ValueError, "at least 4 states"),
        ({"table": np.array([0.0, 1.0, 3.0, 4.0])}, ValueError, "equally spaced"),
        ({"table": ((-1.0, 0.0), (1.0, 1.0), 8)}, ValueError, "1 slow coordinate"),
        ({"slow_fast": systems.bimodal()}, ValueError, "invariant=None needs fast dynamics"),
    ],
)
def test_wrong_arguments_are_refused(change, error, match):
    arguments = {"slow_fast": systems.landau(), **change}
    with pytest.raises(error, match=match):
        nsde.average(**arguments)


def test_a_table_cannot_hold_time():
    full = nsde.SlowFastSDE(
        by_time, lambda t, x, y, p: p, lambda t, x, y, p: x - y, lambda t, x, y, p: p, 0.1, 1.0
    )
    assert float(nsde.average(full).drift_at(1.0, 1.0)) == pytest.approx(-2.0)
    with pytest.raises(ValueError, match="slow_drift depends on the time"):
        nsde.average(full, table=(-1.0, 1.0, 8))
