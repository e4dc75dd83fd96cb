"""What every named process promises: attributes, checks, batching, no retracing, coefficients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import numpyro_sde as nsde
from numpyro_sde import processes
from numpyro_sde.processes import (
    ChemicalLangevin,
    FitzHughNagumo,
    Lorenz63,
    Lorenz96TwoScale,
    LotkaVolterra,
    OverdampedLangevin,
    UnderdampedLangevin,
    mass_action,
)


def quartic(x, p):
    return p * jnp.sum(x**4) / 4


def spring(x):
    return jnp.sum(x**2) / 2


def decay(x, p):
    return p * x


# A process from one of its parameters, the parameter, and a state.
MAKERS = {
    "BrownianMotion": (lambda v: processes.BrownianMotion(0.1, v), "scale", 0.5),
    "GeometricBrownianMotion": (
        lambda v: processes.GeometricBrownianMotion(0.1, v),
        "volatility",
        0.5,
    ),
    "OrnsteinUhlenbeck": (lambda v: processes.OrnsteinUhlenbeck(0.4, 0.0, v), "scale", 0.5),
    "CoxIngersollRoss": (lambda v: processes.CoxIngersollRoss(v, 1.0, 0.5), "rate", 0.5),
    "CKLS": (lambda v: processes.CKLS(0.2, v, 0.5, 1.1), "mean", 0.5),
    "DoubleWell": (lambda v: processes.DoubleWell(1.0, v, 0.5), "cubic", 0.5),
    "FitzHughNagumo": (
        lambda v: FitzHughNagumo(epsilon=v, voltage_scale=0.2),
        "epsilon",
        (0.1, 0.2),
    ),
    "LotkaVolterra": (lambda v: LotkaVolterra(death=v), "death", (50.0, 100.0)),
    "LotkaVolterra, log": (
        lambda v: LotkaVolterra(birth=v, log_coordinates=True),
        "birth",
        (4.0, 4.5),
    ),
    "ChemicalLangevin": (
        lambda v: ChemicalLangevin([[-1]], decay, params=v),
        None,
        (40.0,),
    ),
    "OverdampedLangevin": (
        lambda v: OverdampedLangevin(quartic, temperature=v, params=1.3),
        "temperature",
        (0.4, 0.3),
    ),
    "UnderdampedLangevin": (lambda v: UnderdampedLangevin(spring, v), "friction", (0.4, 0.3)),
    "StochasticVolatility": (
        lambda v: processes.StochasticVolatility(5.0, -3.0, v, leverage=-0.6),
        "scale",
        (0.0, -3.0),
    ),
    "Heston": (lambda v: processes.Heston(v, 0.04, 0.3, leverage=-0.7), "rate", (0.0, 0.05)),
    "GammaOU": (lambda v: processes.GammaOU(0.5, v, 1.5), "shape", 0.5),
    "InverseGaussianOU": (lambda v: processes.InverseGaussianOU(0.5, 1.0, v), "shape", 0.5),
    "Lorenz63": (lambda v: Lorenz63(scale=v), "scale", (1.0, 2.0, 3.0)),
    "Lorenz96TwoScale": (
        lambda v: Lorenz96TwoScale(3, 1, time_ratio=v),
        "time_ratio",
        (1.0, 2.0, 3.0, 0.1, 0.2, 0.3),
    ),
}
makers = pytest.mark.parametrize("name", MAKERS)


def test_every_process_is_covered():
    learned = {"NeuralLangevin", "LinearNoise", "Geometric", "CoupledOscillators"}
    elsewhere = {"LinearSDE", "mass_action"} | learned  # in files of their own
    named = {name.split(",")[0] for name in MAKERS} | elsewhere
    assert named == set(processes.__all__)


@makers
def test_one_trace_serves_all_parameter_values(name):
    make, _, x = MAKERS[name]
    traces = 0

    @jax.jit
    def coefficients(sde, x):
        nonlocal traces
        traces += 1
        return sde.drift_at(0.0, x), sde.diffusion_at(0.0, x)

    x = jnp.asarray(x)
    for value in (0.5, 0.7):
        drift, diffusion = coefficients(make(jnp.array(value)), x)
        assert np.all(np.isfinite(drift))
        assert np.all(np.isfinite(diffusion))
    assert traces == 1


@makers
def test_parameters_are_attributes_and_numbers_are_checked(name):
    make, attribute, _ = MAKERS[name]
    if attribute is None:
        return
    assert float(getattr(make(0.5), attribute)) == 0.5
    assert float(getattr(make(1), attribute)) == 1.0
    assert jnp.issubdtype(getattr(make(1), attribute).dtype, jnp.floating)
    for bad in (-1.0, np.float32(-1.0), jnp.array(-1.0), float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"^{attribute} must"):
            make(bad)
    with pytest.raises(TypeError, match=f"^{attribute} must be a number or an array, got str"):
        make("fast")


@makers
def test_what_is_batched_or_traced_never_raises(name):
    make, *_ = MAKERS[name]
    assert make(jnp.array([-1.0, 2.0])).batch_shape == (2,)
    traced = jax.jit(lambda v: make(v).parameters.leaves)(-1.0)
    assert any(float(leaf) == -1.0 for leaf in traced)


@makers
def test_a_plate_of_paths(name, key):
    """One path for each value, equal to the paths of the processes alone on the same noise."""
    make, _, x = MAKERS[name]
    times, values, x = np.array([0.0, 0.01, 0.02]), jnp.array([0.5, 0.7]), jnp.asarray(x)
    scheme = None if name in ("GammaOU", "InverseGaussianOU") else nsde.schemes.Euler()

    def path(value):
        return nsde.SDEPath(make(value), times, init=x, scheme=scheme)

    together = path(values)
    assert together.batch_shape == (2,)
    z = jax.random.normal(key, (2, *together.innovation_shape))
    start = jnp.broadcast_to(x, (2, *x.shape))
    both = jax.jit(together.forward)(start, z)
    alone = jax.jit(lambda v, z: path(v).forward(x, z))
    for i in range(2):
        np.testing.assert_allclose(both[i], alone(values[i], z[i]), rtol=1e-5)


def test_fitzhugh_nagumo():
    sde = FitzHughNagumo(0.1, 0.2, 1.5, 0.8, 0.3)
    x = jnp.array([0.5, -0.3])
    expected = [(0.5 - 0.125 + 0.3 + 0.2) / 0.1, 1.5 * 0.5 + 0.3 + 0.8]
    np.testing.assert_allclose(sde.drift_at(0.0, x), expected, rtol=1e-6)
    np.testing.assert_allclose(sde.diffusion_at(0.0, x), [[0.0], [0.3]])
    assert sde.voltage_scale is None
    both = FitzHughNagumo(scale=0.3, voltage_scale=0.1)
    np.testing.assert_allclose(both.diffusion_at(0.0, x), [0.1, 0.3])
    batch = FitzHughNagumo(scale=0.3, voltage_scale=jnp.array([0.1, 0.2]))
    assert batch.batch_shape == (2,)
    with pytest.raises(ValueError, match="degenerate"):
        nsde.SDEPath(sde, [0.0, 0.1], init=x).log_prob(jnp.stack([x, x]))
    with pytest.raises(ValueError, match="voltage_scale must be positive"):
        FitzHughNagumo(voltage_scale=0.0)


def test_lorenz63():
    drift = Lorenz63(10.0, 28.0, 8 / 3, 0.5).drift_at(0.0, jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(drift, [10.0, 23.0, -6.0], rtol=1e-6)


def test_lorenz96_two_scale_is_the_indexed_sum():
    K, J, F, h, c, b = 4, 3, 8.0, 0.7, 5.0, 3.0
    sde = Lorenz96TwoScale(
        K, J, forcing=F, coupling=h, time_ratio=c, amplitude_ratio=b, slow_scale=0.1, fast_scale=0.2
    )
    state = np.random.default_rng(0).normal(size=K + K * J)
    X, Y = state[:K], state[K:]
    expected = np.empty_like(state)
    for k in range(K):
        load = sum(Y[J * k + j] for j in range(J))
        expected[k] = -X[k - 1] * (X[k - 2] - X[(k + 1) % K]) - X[k] + F - h * c / b * load
    n = K * J
    for j in range(n):
        expected[K + j] = -c * b * Y[(j + 1) % n] * (Y[(j + 2) % n] - Y[j - 1]) - c * Y[j]
        expected[K + j] += h * c / b * X[j // J]
    np.testing.assert_allclose(sde.drift_at(0.0, jnp.asarray(state)), expected, rtol=1e-4)
    np.testing.assert_allclose(sde.diffusion_at(0.0, jnp.asarray(state)), [0.1] * K + [0.2] * n)
    with pytest.raises(ValueError, match="num_slow must be at least 3, got 2"):
        Lorenz96TwoScale(2, 4)
    with pytest.raises(TypeError, match="fast_per_slow must be an integer, got float"):
        Lorenz96TwoScale(4, 2.0)


def test_lotka_volterra_noise_is_one_brownian_motion_for_each_reaction():
    sde, x = LotkaVolterra(1.0, 0.005, 0.6), jnp.array([50.0, 100.0])
    birth, predation, death = np.sqrt([50.0, 25.0, 60.0])
    expected = [[birth, -predation, 0.0], [0.0, predation, -death]]
    np.testing.assert_allclose(sde.drift_at(0.0, x), [25.0, -35.0], rtol=1e-6)
    np.testing.assert_allclose(sde.diffusion_at(0.0, x), expected, rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_lotka_volterra_in_log_coordinates_is_itos_formula():
    natural = LotkaVolterra(0.9, 0.02, 0.5)
    logs = LotkaVolterra(0.9, 0.02, 0.5, log_coordinates=True)
    x = jnp.array([30.0, 12.0])
    columns = natural.diffusion_at(0.0, x)
    hessian = jax.jacfwd(jax.jacfwd(jnp.log))(x)
    ito = natural.drift_at(0.0, x) / x
    ito = ito + 0.5 * jnp.einsum("ijk,jm,km->i", hessian, columns, columns)
    np.testing.assert_allclose(logs.drift_at(0.0, jnp.log(x)), ito, rtol=1e-12)
    np.testing.assert_allclose(logs.diffusion_at(0.0, jnp.log(x)), columns / x[:, None], rtol=1e-12)


def test_chemical_langevin_of_lotka_volterra_is_lotka_volterra():
    general = ChemicalLangevin(
        [[1, -1, 0], [0, 1, -1]],
        mass_action([[1, 1, 0], [0, 1, 1]]),
        params=jnp.array([1.0, 0.005, 0.6]),
        event_dims=1,
    )
    special = LotkaVolterra(1.0, 0.005, 0.6)
    for x in (jnp.array([50.0, 100.0]), jnp.array([-2.0, 100.0])):
        for at in ("drift_at", "diffusion_at"):
            np.testing.assert_allclose(
                getattr(general, at)(0.0, x), getattr(special, at)(0.0, x), rtol=1e-6
            )
    np.testing.assert_allclose(general.propensities_at(jnp.array([50.0, 100.0])), [50, 25, 60])
    np.testing.assert_array_equal(general.stoichiometry, [[1, -1, 0], [0, 1, -1]])
    assert general.floor == 1e-3


def test_mass_action_orders():
    rates = mass_action([[2, 0, 1], [0, 0, 3]])
    got = rates(jnp.array([3.0, 2.0]), jnp.array([0.5, 0.7, 0.1]))
    np.testing.assert_allclose(got, [0.5 * 9, 0.7, 0.1 * 3 * 8], rtol=1e-6)


@pytest.mark.parametrize("state", [(-3.0, 20.0), (0.0, 0.0)])
def test_gradients_are_finite_below_the_floor(state):
    sde, x = LotkaVolterra(1.0, 0.005, 0.0), jnp.array(state)  # one reaction never fires

    def size(sde, x):
        return jnp.sum(sde.drift_at(0.0, x) ** 2) + jnp.sum(sde.diffusion_at(0.0, x) ** 2)

    by_sde, by_x = jax.jit(jax.grad(size, (0, 1)))(sde, x)
    assert np.all(np.isfinite(by_x))
    assert np.all(np.isfinite(jnp.stack(by_sde.parameters.leaves)))
    root = jax.jit(jax.jacfwd(lambda x: sde.diffusion_at(0.0, x)))(x)
    assert np.all(np.isfinite(root))


def test_negative_propensities_give_nan():
    sde = ChemicalLangevin([[1]], lambda x: -x, floor=0.1)
    assert np.all(np.isnan(sde.diffusion_at(0.0, jnp.array([2.0]))))


def test_langevin_forces_are_gradients():
    sde = OverdampedLangevin(quartic, temperature=0.5, params=2.0)
    x = jnp.array([0.5, -1.0])
    np.testing.assert_allclose(sde.drift_at(0.0, x), -2.0 * x**3, rtol=1e-6)
    assert float(sde.diffusion_at(0.0, x)) == pytest.approx(1.0)
    assert sde.potential is quartic
    sde = UnderdampedLangevin(quartic, 0.3, temperature=0.5, mass=2.0, params=2.0)
    x = jnp.array([0.5, -1.0, 0.2, 0.4])
    drift = sde.drift_at(0.0, x)
    np.testing.assert_allclose(drift[:2], x[2:])
    np.testing.assert_allclose(drift[2:], -(x[:2] ** 3) - 0.3 * x[2:], rtol=1e-6)
    noise = sde.diffusion_at(0.0, x)
    np.testing.assert_allclose(noise[:2], 0.0)
    np.testing.assert_allclose(noise[2:], np.sqrt(2 * 0.3 * 0.5 / 2.0) * np.eye(2), rtol=1e-6)


def test_potential_with_its_own_plate():
    """Matrices of a potential are declared in event_dims; the rest is the batch."""

    def quadratic(x, p):
        return 0.5 * x @ p["K"] @ x

    K = jnp.stack([jnp.eye(2), 2.0 * jnp.eye(2), 3.0 * jnp.eye(2)])

    @jax.jit
    def density(K):
        sde = OverdampedLangevin(quadratic, params={"K": K}, event_dims={"K": 2})
        path = nsde.SDEPath(sde, [0.0, 0.1], init=jnp.ones(2))
        return path.log_prob(jnp.array([[1.0, 1.0], [0.9, 0.8]]))

    assert density(K).shape == (3,)
    np.testing.assert_allclose(density(K)[1], density(K[1]), rtol=1e-5)


def test_closed_over_arrays_are_found_inside_a_potential():
    weights = jnp.ones(3)

    def potential(x):
        return jnp.sum(weights * x**2)

    sde = OverdampedLangevin(potential, temperature=jnp.ones(3))
    with pytest.raises(ValueError, match=r"closes over 'weights' of shape \(3,\)"):
        nsde.SDEPath(sde, [0.0, 1.0], init=jnp.ones(3))


def test_wrong_functions_are_refused():
    with pytest.raises(TypeError, match=r"potential must take \(x, p\) because params was given"):
        OverdampedLangevin(spring, params=1.0)
    with pytest.raises(TypeError, match="potential must be a function"):
        UnderdampedLangevin(3.0, 1.0)
    with pytest.raises(ValueError, match=r"potential must return a scalar, got shape \(2,\)"):
        OverdampedLangevin(lambda x: x**2).drift_at(0.0, jnp.ones(2))
    with pytest.raises(ValueError, match="event_dims was given without params"):
        OverdampedLangevin(spring, event_dims=1)
    with pytest.raises(ValueError, match=r"must have shape \(2 d,\).*got \(3,\)"):
        UnderdampedLangevin(spring, 1.0).drift_at(0.0, jnp.ones(3))


def test_wrong_reaction_networks_are_refused():
    with pytest.raises(ValueError, match=r"\(num_species, num_reactions\), got \(2,\)"):
        ChemicalLangevin([1, -1], decay, params=1.0)
    with pytest.raises(ValueError, match="stoichiometry must hold whole numbers"):
        ChemicalLangevin([[0.5]], decay, params=1.0)
    with pytest.raises(ValueError, match=r"propensities must return shape \(2,\).*got \(1,\)"):
        ChemicalLangevin([[1, -1]], decay, params=1.0).drift_at(0.0, jnp.ones(1))
    with pytest.raises(ValueError, match=r"a state must have shape \(1,\).*got \(3,\)"):
        ChemicalLangevin([[1]], decay, params=1.0).drift_at(0.0, jnp.ones(3))
    with pytest.raises(TypeError, match=r"propensities must take \(x\) because params was not"):
        ChemicalLangevin([[1]], decay)
    with pytest.raises(ValueError, match="floor must be finite and not negative, got -1"):
        LotkaVolterra(floor=-1.0)
    with pytest.raises(TypeError, match="floor must be a number, got str"):
        LotkaVolterra(floor="low")
    with pytest.raises(ValueError, match="reactants must not be negative"):
        mass_action([[-1]])


def test_volatility_with_leverage():
    sde = processes.StochasticVolatility(2.0, -3.0, 0.8, leverage=-0.6, drift=0.1)
    x = jnp.array([1.0, -2.5])
    expected = [0.1 - 0.5 * np.exp(-2.5), 2.0 * (-3.0 + 2.5)]
    np.testing.assert_allclose(sde.drift_at(0.0, x), expected, rtol=1e-6)
    B = sde.diffusion_at(0.0, x)
    spread = np.exp(-1.25)
    covariance = [[spread**2, -0.6 * 0.8 * spread], [-0.6 * 0.8 * spread, 0.64]]
    np.testing.assert_allclose(B @ B.T, covariance, rtol=1e-5)
    with pytest.raises(ValueError, match=r"^leverage must lie between -1 and 1"):
        processes.StochasticVolatility(2.0, -3.0, 0.8, leverage=-1.0)


def test_heston():
    sde = processes.Heston(3.0, 0.04, 0.5, leverage=-0.7, drift=0.02)
    x = jnp.array([0.0, 0.09])
    np.testing.assert_allclose(sde.drift_at(0.0, x), [0.02 - 0.045, 3.0 * -0.05], rtol=1e-5)
    B = sde.diffusion_at(0.0, x)
    covariance = [[0.09, -0.7 * 0.5 * 0.09], [-0.7 * 0.5 * 0.09, 0.25 * 0.09]]
    np.testing.assert_allclose(B @ B.T, covariance, rtol=1e-5)
    below = jnp.array([0.0, -0.01])
    np.testing.assert_allclose(sde.drift_at(0.0, below), [0.02, 0.12], rtol=1e-5)
    assert np.all(np.asarray(sde.diffusion_at(0.0, below)) == 0.0)
    gradient = jax.jacobian(lambda x: sde.diffusion_at(0.0, x))(below)
    assert np.all(np.isfinite(gradient))
