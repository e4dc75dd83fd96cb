"""Stable learned classes: mean squares, bounds, refusals; coupled oscillators."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers

import numpyro_sde as nsde
from numpyro_sde.fields.field import Constant
from numpyro_sde.processes import CoupledOscillators, Geometric, LinearNoise, NeuralLangevin

HSGP, RFF = nsde.fields.HSGP, nsde.fields.RFF


def mlp(out=jax.nn.tanh, activation=jax.nn.tanh, sizes=("scalar", "scalar"), seed=0):
    return eqx.nn.MLP(*sizes, 8, 1, activation, out, key=jax.random.key(seed))


def one_hidden():
    """A network that ends in a linear layer, after bounded units."""
    return eqx.nn.MLP("scalar", "scalar", 8, 1, jax.nn.tanh, key=jax.random.key(0))


def identity(x):
    return x


def registered(prior, **kwargs):
    with handlers.seed(rng_seed=1):
        return prior.register("f", **kwargs)


FIELDS = {
    "HSGP": lambda: registered(HSGP(1, 2.0, 5), amplitude=2.0, length=0.7),
    "HSGP, outputs": lambda: registered(HSGP(2, 2.0, 3, outputs=2), amplitude=2.0, length=0.7),
    "gradient": lambda: registered(
        HSGP(2, (1.0, 2.0), 3, constraint="gradient"), amplitude=2.0, length=1.0
    ),
    "curl": lambda: registered(
        HSGP(2, 2.0, 3, constraint="divergence_free"), amplitude=2.0, length=1.0
    ),
    "curl, 3": lambda: registered(
        HSGP(3, 2.0, 2, constraint="divergence_free"), amplitude=2.0, length=1.0
    ),
    "RFF": lambda: registered(RFF(2, 9, outputs=2), amplitude=2.0, length=0.7),
    "inducing": lambda: registered(
        nsde.fields.InducingGP(np.linspace(-1.5, 1.5, 5)), amplitude=2.0, length=0.7
    ),
    "bounded end": lambda: registered(nsde.fields.Network(mlp())),
    "bounded before": lambda: registered(nsde.fields.Network(one_hidden())),
}
FIELDS["sum"] = lambda: FIELDS["HSGP"]() + 0.5 * FIELDS["inducing"]()
FIELDS["limited"] = lambda: nsde.fields.Bounded(
    registered(nsde.fields.Network(mlp(jax.nn.softplus, jax.nn.relu))), 0.3
)


CHEAP = ("HSGP", "gradient", "bounded end", "bounded before", "sum")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in CHEAP else pytest.mark.slow) for n in FIELDS]
)
def test_no_value_is_above_a_field_s_bound(name):
    field = FIELDS[name]()
    dim = {"curl, 3": 3}.get(name, 2 if name in ("HSGP, outputs", "gradient", "curl", "RFF") else 1)
    points = np.random.default_rng(0).uniform(-3.0, 3.0, (500, dim))
    values = np.abs(np.asarray(field.on(jnp.asarray(points[:, 0] if dim == 1 else points))))
    bound = np.asarray(field.bound())
    assert bound.shape == values.shape[1:]
    assert np.all(values <= bound * (1 + 1e-5))
    # not a bound that is right because it is huge: weights add up at worst
    assert np.all(bound < 30 * values.max(0))


def test_a_bound_that_is_reached():
    f = HSGP(1, 2.0, 3).from_weights(jnp.array([0.0, 0.0, 1.5]), amplitude=1.0, length=1.0)
    values = f.on(jnp.linspace(-1.5, 1.5, 601))
    np.testing.assert_allclose(np.abs(values).max(), f.bound(), rtol=1e-4)


def test_mean_squares_of_constant_nets_in_closed_form():
    """An Ornstein-Uhlenbeck process about `c / rate`; the bound is sharp where `c = 0`."""
    for c in (0.0, 0.7):
        sde = NeuralLangevin(Constant(jnp.array(c)), rate=2.0, scale=0.6)
        ou = nsde.processes.OrnsteinUhlenbeck(rate=2.0, mean=c / 2.0, scale=0.6)
        mean, variance = ou.stationary_moments()
        bound = float(sde.mean_square_bound())
        assert float(mean**2 + variance) <= bound * (1 + 1e-6)
        assert bound == pytest.approx(0.09, rel=1e-5) or c > 0
        assert float(sde.drift_at(0.0, 0.3)) == pytest.approx(float(ou.drift_at(0.0, 0.3)))


@pytest.mark.parametrize(("c", "decay", "scale"), [(0.0, 0.5, 0.8), (0.7, 1.5, 1.2)])
def test_linear_noise_moments_in_closed_form(c, decay, scale):
    """`u = E Z^2` obeys `u' = 2 c m - 2 decay u`, `m' = c - (decay + scale^2 / 2) m`."""
    sde = LinearNoise(Constant(jnp.array(c)), decay=decay, scale=scale)
    x = jnp.array(0.4)
    rate = 2.0 * x * sde.drift_at(0.0, x) + sde.diffusion_at(0.0, x) ** 2
    assert float(rate) == pytest.approx(2 * c * 0.4 - 2 * decay * 0.4**2, rel=1e-5)
    limit = c / decay * c / (decay + scale**2 / 2)  # u where both are at rest
    assert limit <= float(sde.mean_square_bound()) * (1 + 1e-6)


def test_geometric_forms():
    """Growth rates by hand; a fading one decays in mean square whatever the net says."""
    f = FIELDS["HSGP"]()
    saturated, fading = Geometric(f, 0.5, saturation=2.0), Geometric(f, 0.5, decay=0.3)
    x = jnp.array(0.8)
    want = (float(f(x)) - 2.0 * 0.8) * 0.8
    assert float(saturated.drift_at(0.0, x)) == pytest.approx(want, rel=1e-5)
    for x in jnp.linspace(0.01, 4.0, 9):
        growth = 2.0 * fading.drift_at(0.0, x) / x + (fading.diffusion_at(0.0, x) / x) ** 2
        assert float(growth) <= -2 * 0.3 + 1e-5
    assert float(fading.mean_square_bound()) == 0.0


def test_time_is_given_first():
    f = registered(nsde.fields.Network(mlp(sizes=(3, 2)), dim=3, outputs=2))
    decay = jnp.array([1.0, 2.0])
    sde = LinearNoise(f, decay, 0.5 * jnp.ones(2), time=True, event_dim=1)
    x = jnp.array([0.3, -0.2])
    want = f(jnp.array([0.7, 0.3, -0.2])) - (decay + 0.125) * x
    np.testing.assert_allclose(sde.drift_at(0.7, x), want, rtol=1e-5)


def test_one_net_for_each_series_of_a_plate():
    prior = nsde.fields.Network(mlp())

    def model(path=None):
        with numpyro.plate("series", 3):
            sde = NeuralLangevin(prior.register("f"), rate=1.0, scale=0.5)
            numpyro.sample("x", nsde.SDEPath(sde, [0.0, 0.1, 0.2], dist.Normal(0.0, 1.0)), obs=path)

    sites = handlers.trace(handlers.seed(model, 0)).get_trace()
    assert sites["f/layers.0.weight"]["value"].shape == (3, 8, 1)
    assert sites["x"]["value"].shape == (3, 3)


def roll_outs(equation, count, steps, dt, start, dim=1):
    """Largest absolute value along each of `count` paths, each with its own weights."""
    scheme = nsde.schemes.LogEuler() if equation is geometric else nsde.schemes.Euler()

    def one(key):
        key_net, key_path = jax.random.split(key)
        sde = equation(key_net)
        z = jax.random.normal(key_path, (steps,))

        def step(carry, z):
            x, most = carry
            x = scheme.step(sde, 0.0, dt, x, z)
            return (x, jnp.maximum(most, jnp.abs(x))), None

        first = jnp.asarray(start)
        (_, most), _ = jax.lax.scan(step, (first, jnp.abs(first)), z)
        return most / jnp.sqrt(getattr(sde, "mean_square_bound", lambda: jnp.ones(()))())

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), count)))


def drawn(key, out=jax.nn.tanh):
    """A network with weights drawn from its prior."""
    with handlers.seed(rng_seed=key):
        return nsde.fields.Network(mlp(out, jax.nn.relu), prior=dist.Normal(0.0, 1.0)).register("f")


def plain(key):
    f = drawn(key, identity)
    return nsde.SDE(lambda t, x, p: p(x), lambda t, x, p: 0.5, params=f)


def langevin(key):
    return NeuralLangevin(drawn(key), rate=0.5, scale=0.5)


def linear_noise(key):
    return LinearNoise(drawn(key), decay=0.5, scale=0.5)


def geometric(key):
    return Geometric(drawn(key), 0.5, saturation=0.5)


@pytest.mark.parametrize(
    ("count", "horizon"), [(50, 20.0), pytest.param(1000, 100.0, marks=pytest.mark.slow)]
)
def test_long_roll_outs_stay_bounded(count, horizon):
    """All draws stay within 15 root mean square bounds; a plain network's do not (seed 0).

    Horizon 10 is that of the data which such a network would be given; ten times as long.
    """
    dt = 0.02
    for equation in (langevin, linear_noise, geometric) if count == 1000 else (geometric,):
        most = roll_outs(equation, count, int(horizon / dt), dt, 1.0)
        assert np.isfinite(most).all()
        assert most.max() < 15.0, equation.__name__
    most = roll_outs(plain, count, int(horizon / dt), dt, 1.0)
    escaped = ~(most < 1000.0)
    assert escaped.mean() > 0.2


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NeuralLangevin(mlp(), 1.0, 1.0), TypeError, "net must be a field"),
        (lambda: NeuralLangevin(drawn(0, identity), 1.0, 1.0), ValueError, "no bound is known"),
        (lambda: NeuralLangevin(drawn(0), 0.0, 1.0), ValueError, "rate must be positive"),
        (lambda: LinearNoise(drawn(0), -1.0, 1.0), ValueError, "decay must be positive"),
        (lambda: LinearNoise(drawn(0), 1.0, 1.0, event_dim=2), ValueError, "event_dim must be"),
        (lambda: Geometric(drawn(0), 1.0), ValueError, "saturation or decay"),
        (
            lambda: Geometric(drawn(0), 1.0, saturation=1.0, decay=1.0),
            ValueError,
            "saturation or decay",
        ),
        (lambda: nsde.fields.Bounded(drawn(0), 0.0), ValueError, "limit must be positive"),
        (lambda: nsde.fields.Bounded(mlp(), 1.0), TypeError, "field must be one of"),
        (lambda: CoupledOscillators(1.0, 1.0, 0.5), ValueError, r"shape \(reach,\)"),
        (lambda: CoupledOscillators(1.0, 1.0, [-0.5]), ValueError, "must not be negative"),
        (lambda: CoupledOscillators(1.0, 0.0, [0.5]), ValueError, "stiffness must be positive"),
        (lambda: CoupledOscillators(1.0, 1.0, [0.5], extra=mlp()), TypeError, "extra must be"),
    ],
)
def test_what_is_not_stable_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_coupled_oscillators_have_their_gibbs_law(x64):
    """The covariance of `exp(-H / T)` solves Lyapunov's equation of the linear dynamics."""
    stiffness, coupling, mass, temperature = 1.5, np.array([0.7, 0.2]), 2.0, 0.8
    ring = CoupledOscillators(0.6, stiffness, coupling, mass=mass, temperature=temperature)
    d = 5
    A = jax.jacfwd(lambda x: ring.drift_at(0.0, x))(jnp.zeros(2 * d))
    L = ring.diffusion_at(0.0, jnp.zeros(2 * d))
    springs = np.zeros((d, d))
    for i in range(d):
        springs[i, i] += stiffness
        for distance, c in enumerate(coupling, 1):
            j = (i + distance) % d
            springs[i, i] += c
            springs[j, j] += c
            springs[i, j] -= c
            springs[j, i] -= c
    P = np.zeros((2 * d, 2 * d))
    P[:d, :d] = temperature * np.linalg.inv(springs)
    P[d:, d:] = temperature / mass * np.eye(d)
    np.testing.assert_allclose(A @ P + P @ A.T + L @ L.T, 0.0, atol=1e-12)
    x = jnp.arange(2.0 * d)
    want = -0.5 * x @ np.linalg.inv(P) @ x
    np.testing.assert_allclose(ring.stationary_log_density(x), want, rtol=1e-10)


def test_a_learned_part_of_the_energy_is_a_force():
    extra = registered(RFF(3, 6), amplitude=1.0, length=1.0)
    ring = CoupledOscillators(0.6, 1.0, jnp.array([0.5]), extra=extra)
    plain_ring = CoupledOscillators(0.6, 1.0, jnp.array([0.5]))
    x = jnp.array([0.3, -0.2, 0.5, 0.0, 0.1, -0.1])
    got = ring.drift_at(0.0, x) - plain_ring.drift_at(0.0, x)
    want = jnp.concatenate([jnp.zeros(3), -jax.grad(extra)(x[:3])])
    np.testing.assert_allclose(got, want, atol=1e-5)
