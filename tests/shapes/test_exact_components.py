"""Components seen without noise: a position seen, its velocity latent."""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.handlers import reparam, seed, trace
from numpyro.infer.util import initialize_model, log_density

import numpyro_sde as nsde
from numpyro_sde.statespace.exact import Readings, condition, condition_linear

REFERENCE = json.loads((Path(__file__).parent / "shapes_reference.json").read_text())
TIMES, Y = np.array(REFERENCE["langevin_times"]), np.array(REFERENCE["langevin_y"])
EXACT = REFERENCE["langevin_exact_position_loglik"]
A = np.array([[0.0, 1.0], [-1.0, -0.5]])
LOCAL = nsde.schemes.LocalLinear()
KALMAN = nsde.filters.Kalman()


def langevin(y, scheme=None, times=TIMES, matrix=A, max_step=None):
    """A damped oscillator started in equilibrium; noise on the velocity alone."""
    sde = nsde.SDE(
        lambda t, x, p: jnp.asarray(p) @ x,
        lambda t, x, p: jnp.array([[0.0], [0.6]]),
        params=matrix,
        event_dims=2,
    )
    start = dist.MultivariateNormal(jnp.zeros(2), 0.36 * jnp.eye(2))
    grid = nsde.TimeGrid(times, max_step)
    x = numpyro.sample("x", nsde.SDEPath(sde, grid, start, scheme=scheme))
    nsde.observe("y", x, lambda t, x: dist.Delta(x[0]), obs=y, at=grid.index)


def panel(scheme=None):
    clocks = np.stack([TIMES, TIMES + 2.0])
    langevin(np.stack([Y, Y]), scheme, clocks, np.stack([A, A]))


def value_of(method, model, *args, **kwargs):
    model = nsde.handlers.marginalize(model, method=method)
    return float(log_density(model, args, kwargs, {})[0])


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_kalman():
    assert value_of(KALMAN, langevin, Y) == pytest.approx(EXACT, abs=1e-10)
    assert value_of(KALMAN, panel) == pytest.approx(2 * EXACT, abs=1e-10)
    assert value_of(KALMAN, langevin, Y, max_step=0.25) == pytest.approx(EXACT, abs=1e-10)


@pytest.mark.slow
def test_float32():
    assert value_of(KALMAN, panel) == pytest.approx(2 * EXACT, abs=1e-4 * 2 * EXACT)
    local = value_of(nsde.filters.Particle(4), langevin, Y, LOCAL)
    assert local == pytest.approx(EXACT, abs=1e-3)


ENGINES = {
    "EKF": nsde.filters.ExtendedKalman(),
    "UKF": nsde.filters.UnscentedKalman(),
    "guided particles": nsde.filters.Particle(8),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", ENGINES.values(), ids=ENGINES)
@pytest.mark.usefixtures("x64")
def test_engines_on_local_linear_steps(method):
    """Two series, each on a clock of its own."""
    assert value_of(method, panel, LOCAL) == pytest.approx(2 * EXACT, abs=1e-9)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_moment_matching():
    got = value_of(nsde.filters.MomentMatching(substeps=16), langevin, Y)
    assert got == pytest.approx(EXACT, abs=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_guided_log_weight_is_the_likelihood_and_the_path_meets_the_data():
    guided = reparam(langevin, config={"x": nsde.reparam.GuidedReparam()})
    missing = np.where(np.arange(8) == 3, np.nan, Y)
    for y, step in ((Y, None), (missing, 0.25)):
        exact = value_of(KALMAN, langevin, y)
        run = trace(seed(guided, 5)).get_trace(y, LOCAL, max_step=step)
        z = {name: run[name]["value"] for name in ("x_init_innov", "x_innov")}
        total = log_density(guided, (y, LOCAL), {"max_step": step}, z)[0]
        total = total - sum(jnp.sum(dist.Normal(0, 1).log_prob(v)) for v in z.values())
        assert float(total) == pytest.approx(exact, abs=1e-9)
        at = nsde.TimeGrid(TIMES, step).index
        seen = ~np.isnan(y)
        np.testing.assert_allclose(run["x"]["value"][at, 0][seen], y[seen], atol=1e-12)


def smoothed(method, key=0, draws=2000):
    path = nsde.SDEPath(
        nsde.SDE(lambda t, x: jnp.asarray(A) @ x, lambda t, x: jnp.array([[0.0], [0.6]])),
        TIMES,
        dist.MultivariateNormal(jnp.zeros(2), 0.36 * jnp.eye(2)),
        scheme=LOCAL,
    )
    result = nsde.filter_path(path, lambda t, x: dist.Delta(x[0]), Y, method=method)
    return result, result.sample(jax.random.key(key), draws)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [KALMAN, nsde.filters.Particle(200, history=True)], ids=["Kalman", "particles"]
)
@pytest.mark.usefixtures("x64")
def test_the_velocity_given_the_positions(method):
    mean, sd = (np.array(REFERENCE[f"langevin_velocity_{what}"]) for what in ("mean", "sd"))
    result, draws = smoothed(method)
    np.testing.assert_allclose(draws[..., 0], np.broadcast_to(Y, (2000, 8)), atol=1e-7)
    if method is KALMAN:
        smooth_mean, smooth_cov = result.smooth()
        np.testing.assert_allclose(smooth_mean[:, 1], mean, atol=1e-8)
        np.testing.assert_allclose(np.sqrt(smooth_cov[:, 1, 1]), sd, atol=1e-8)
        count = 2000
    else:
        count = 200  # draws share particles: as many are independent as there are of these
    error = sd / np.sqrt(count)
    assert np.all(np.abs(draws[..., 1].mean(axis=0) - mean) < 4 * error)
    assert np.all(np.abs(draws[..., 1].std(axis=0) - sd) < 4 * error)


def force(x):
    return jnp.array([x[1], x[0] - x[0] ** 3 - 0.5 * x[1]])


NOISE = np.array([0.2, 0.7])
STEPS = np.arange(0.0, 2.01, 0.2)
SEEN = np.array([-1.1, -0.92, -0.75, -0.3, 0.1, 0.35, 0.8, 0.72, 1.02, 1.2, 0.95])


def bistable(y, scheme=None):
    """A bistable oscillator with noise on both components, by Euler steps."""
    sde = nsde.SDE(lambda t, x: force(x), lambda t, x: jnp.asarray(NOISE))
    start = dist.Normal(jnp.array([-1.0, 0.0]), jnp.array([0.3, 0.5])).to_event(1)
    x = numpyro.sample("x", nsde.SDEPath(sde, STEPS, start, scheme=scheme))
    nsde.observe("y", x, lambda t, x: dist.Delta(x[0]), obs=y)


def by_quadrature():
    """The likelihood with the velocity integrated out on a grid, step by step."""
    v = np.linspace(-7.0, 7.0, 2001)
    width = v[1] - v[0]

    def normal(x, mean, sd):
        return np.exp(-0.5 * ((x - mean) / sd) ** 2) / (sd * np.sqrt(2 * np.pi))

    belief = normal(SEEN[0], -1.0, 0.3) * normal(v, 0.0, 0.5)
    h = 0.2
    for now, then in itertools.pairwise(SEEN):
        moved = belief * normal(then, now + h * v, NOISE[0] * np.sqrt(h))
        mean = v + h * (now - now**3 - 0.5 * v)
        belief = normal(v[:, None], mean, NOISE[1] * np.sqrt(h)) @ moved * width
    return np.log(belief.sum() * width)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_nonlinear_model_against_quadrature():
    """Given the positions the velocity is linear here, so that every guided weight is exact."""
    exact = by_quadrature()
    assert value_of(nsde.filters.Particle(4), bistable, SEEN) == pytest.approx(exact, abs=1e-6)
    guided = reparam(bistable, config={"x": nsde.reparam.GuidedReparam()})
    run = trace(seed(guided, 5)).get_trace(SEEN)
    z = {name: run[name]["value"] for name in ("x_init_innov", "x_innov")}
    total = log_density(guided, (SEEN,), {}, z)[0]
    total = total - sum(jnp.sum(dist.Normal(0, 1).log_prob(v)) for v in z.values())
    assert float(total) == pytest.approx(exact, abs=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_volatility_with_leverage_against_quadrature():
    """Log price seen exactly, log volatility latent, noises correlated: weights vary."""
    dt, n = 0.1, 8
    price = 0.3 * np.cumsum([0.0, 0.2, -0.4, 0.5, -0.9, 1.3, 0.1, -0.2])
    rho, mean_v, rate, vol = -0.6, -1.0, 1.0, 0.8

    def model(y):
        def diffusion(t, x):
            s = jnp.exp(x[1])
            return jnp.array([[s, 0.0], [vol * rho, vol * np.sqrt(1 - rho**2)]])

        sde = nsde.SDE(lambda t, x: jnp.array([0.0, rate * (mean_v - x[1])]), diffusion)
        start = dist.Normal(jnp.array([0.0, mean_v]), jnp.array([0.1, 0.5])).to_event(1)
        x = numpyro.sample("x", nsde.SDEPath(sde, dt * np.arange(n), start))
        nsde.observe("y", x, lambda t, x: dist.Delta(x[0]), obs=y)

    v = np.linspace(-5.0, 3.0, 1601)
    width = v[1] - v[0]

    def normal(x, mean, sd):
        return np.exp(-0.5 * ((x - mean) / sd) ** 2) / (sd * np.sqrt(2 * np.pi))

    belief = normal(price[0], 0.0, 0.1) * normal(v, mean_v, 0.5)
    for change in np.diff(price):
        sd = np.exp(v) * np.sqrt(dt)
        shock = change / sd
        center = v + dt * rate * (mean_v - v) + vol * rho * np.sqrt(dt) * shock
        spread = vol * np.sqrt((1 - rho**2) * dt)
        belief = normal(v[:, None], center, spread) @ (belief * normal(change, 0.0, sd)) * width
    exact = np.log(belief.sum() * width)
    values = [value_of(nsde.filters.Particle(500, seed=s), model, price) for s in range(6)]
    error = np.std(values, ddof=1) / np.sqrt(6)
    assert abs(np.mean(values) - exact) < 4 * max(error, 1e-3)
    assert np.std(values) < 0.2


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_conditional_particles_leave_the_law_of_the_velocity():
    """Particle Gibbs on the linear model: 1,500 sweeps against the exact moments."""
    from numpyro.infer import MCMC, NUTS
    from numpyro.infer.gibbs import Gibbs

    def model(y):
        numpyro.sample("idle", dist.Normal(0.0, 1.0))
        langevin(y, LOCAL)

    block = nsde.infer.ConditionalSMC(model, ["x"], num_particles=16)
    mcmc = MCMC(
        Gibbs([(block, ["x"]), (NUTS(model), None)]),
        num_warmup=50,
        num_samples=1500,
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), Y)
    velocity = np.asarray(mcmc.get_samples()["x"])[..., 1]
    mean, sd = (np.array(REFERENCE[f"langevin_velocity_{what}"]) for what in ("mean", "sd"))
    assert np.all(np.abs(velocity.mean(axis=0) - mean) < 4 * sd / np.sqrt(700))


@pytest.mark.usefixtures("x64")
def test_conditioning_of_one_step():
    """Against the formulas for the joint normal law of the next state and the reading."""
    rng = np.random.default_rng(0)
    B, C, mean, v = rng.normal(size=(3, 3)), rng.normal(size=(2, 3)), rng.normal(size=3), [0.3, -1]
    M, c, ref = rng.normal(size=(3, 3)), rng.normal(size=3), rng.normal(size=3)
    seen = Readings(jnp.asarray(C), jnp.asarray(v), jnp.array([True, True]))
    Q = B @ B.T
    S, K = C @ Q @ C.T, Q @ C.T @ np.linalg.inv(C @ Q @ C.T)
    given = condition(jnp.asarray(mean), jnp.asarray(B), seen)
    np.testing.assert_allclose(given.mean, mean + K @ (v - C @ mean), atol=1e-12)
    np.testing.assert_allclose(given.factor @ given.factor.T, Q - K @ C @ Q, atol=1e-12)
    law = dist.MultivariateNormal(C @ mean, S)
    assert float(given.log_density) == pytest.approx(float(law.log_prob(jnp.asarray(v))), abs=1e-10)
    F, offset, _, J, s = condition_linear(*map(jnp.asarray, (M, c, B)), seen, jnp.asarray(ref))
    deviation = v - C @ ref
    np.testing.assert_allclose(F, (np.eye(3) - K @ C) @ M, atol=1e-12)
    np.testing.assert_allclose(offset, c + K @ (deviation - C @ c), atol=1e-12)
    half = M.T @ C.T @ np.linalg.inv(S)
    np.testing.assert_allclose(J, half @ C @ M, atol=1e-10)
    np.testing.assert_allclose(s, half @ (deviation - C @ c), atol=1e-10)


ONES = np.ones(3)


def curved(y, scheme=None):
    sde = nsde.SDE(lambda t, x: -x, lambda t, x: 0.5)
    x = numpyro.sample("x", nsde.SDEPath(sde, np.arange(3.0), dist.Normal(1.0, 0.3), scheme=scheme))
    nsde.observe("y", x, lambda t, x: dist.Delta(jnp.exp(x)), obs=y)


def twice():
    """Two instruments without noise on one component."""
    ou = nsde.processes.OrnsteinUhlenbeck(1.0, 0.0, 0.5)
    x = numpyro.sample("x", nsde.SDEPath(ou, np.arange(3.0), dist.Normal(0.0, 1.0)))
    nsde.observe("y", x, lambda t, x: dist.Delta(x), obs=ONES)
    nsde.observe("z", x, lambda t, x: dist.Delta(2.0 * x), obs=2.0 * ONES)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", [KALMAN, nsde.filters.Particle(4)], ids=["Kalman", "particles"])
def test_a_reading_of_a_known_start_says_only_whether_it_agrees(method):
    """The start is fixed and read: the density is that of the later states, or zero."""
    states = np.array([0.3, 0.1, -0.2])
    ou = nsde.processes.OrnsteinUhlenbeck(1.0, 0.0, 0.5)

    def model(y):
        x = numpyro.sample("x", nsde.SDEPath(ou, np.arange(3.0), init=0.3))
        nsde.observe("y", x, lambda t, x: dist.Delta(x), obs=y)

    expected = float(nsde.SDEPath(ou, np.arange(3.0), init=0.3).log_prob(states))
    assert value_of(method, model, states) == pytest.approx(expected, abs=1e-10)
    assert value_of(method, model, states + np.array([0.1, 0.0, 0.0])) == -np.inf


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda: value_of(nsde.filters.EnsembleKalman(), langevin, Y),
            r"EnsembleKalman\(\): states",
        ),
        (
            lambda: value_of(nsde.filters.Particle(8, proposal="bootstrap"), langevin, Y, LOCAL),
            "Bootstrap: states that are drawn without regard",
        ),
        (
            lambda: value_of(
                nsde.filters.Particle(8, proposal="modified_bridge"), langevin, Y, LOCAL
            ),
            "ModifiedBridge: states",
        ),
        (
            lambda: seed(nsde.guides.AutoPathGuide(langevin), 0)(Y, LOCAL),
            "AutoPathGuide: states",
        ),
        (
            lambda: value_of(nsde.filters.ExtendedKalman(), curved, ONES),
            "affine in the state",
        ),
        (lambda: value_of(nsde.filters.Particle(8), curved, ONES), "affine in the state"),
        (lambda: value_of(KALMAN, curved, ONES), "is not affine in x"),
        (lambda: guide(curved, ONES), "affine in the state"),
        (
            lambda: guide(lambda y: langevin(y, nsde.schemes.Strang()), Y),
            "needs a normal transition",
        ),
        (
            lambda: guide(lambda y: langevin(y, nsde.schemes.Euler()), Y),
            "step of Euler brings no noise to it: use LocalLinear",
        ),
        (
            lambda: value_of(nsde.filters.Particle(8), langevin, Y, nsde.schemes.Euler()),
            "step of Euler brings no noise to it",
        ),
        (lambda: value_of(KALMAN, twice), "2 readings without noise .* of one component"),
        (
            lambda: initialize_model(jax.random.key(0), langevin, model_args=(Y, LOCAL)),
            "latent as it stands",
        ),
        (
            lambda: initialize_model(
                jax.random.key(0),
                reparam(langevin, config={"x": nsde.reparam.InnovationReparam()}),
                model_args=(Y, LOCAL),
            ),
            r"path that is whitened meets the data nowhere.*GuidedReparam",
        ),
    ],
)
def test_what_cannot_be_conditioned_on_is_refused(run, message):
    with pytest.raises(ValueError, match=message):
        run()


def guide(model, y):
    seed(reparam(model, config={"x": nsde.reparam.GuidedReparam()}), 0)(y)


@pytest.mark.slow
def test_a_path_that_does_not_meet_the_data_has_density_zero():
    path = trace(seed(langevin, 0)).get_trace(Y)["x"]["value"]
    assert log_density(langevin, (Y, LOCAL), {}, {"x": path})[0] == -np.inf
    met = path.at[:, 0].set(Y)
    assert np.isfinite(log_density(langevin, (Y, LOCAL), {}, {"x": met})[0])
