"""Inputs to drift and diffusion: every engine against dense Gaussian laws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from dense_laws import Law, held, stretch
from numpyro.handlers import reparam, seed, trace
from numpyro.infer.util import log_density
from scipy.integrate import quad

import numpyro_sde as nsde

TIMES = np.array([[0.0, 0.7, 1.6, 3.1, 4.0], [0.0, 0.5, 2.0, 2.6, 3.9]])
KNOTS = np.array([[0.0, 1.0, 2.5, 4.0], [-0.2, 0.9, 1.6, 4.1]])
VALUES = np.array([[1.0, 2.0, -1.0, 0.5], [0.4, -0.8, 1.1, 0.9]])
Y = np.array([[0.3, 1.0, 0.5, -1.0, 0.2], [0.1, np.nan, -0.5, 0.4, 0.9]])
RATE, SCALE, NOISE = np.array([0.8, 1.3]), 0.5, 0.3
LOCAL = nsde.schemes.LocalLinear()


def scalar_model(order, role="drift", series=slice(None), scheme=None, y=Y, values=VALUES):
    """One or two series: heat added to the drift, or as its rate, or as its diffusion."""
    drift, diffusion = {
        "drift": (lambda t, x, p, u: u["heat"] - p * x, lambda t, x, p, u: SCALE),
        "rate": (lambda t, x, p, u: (1.5 + u["heat"]) * (p - x), lambda t, x, p, u: SCALE),
        "noise": (lambda t, x, p, u: -p * x, lambda t, x, p, u: SCALE * jnp.exp(u["heat"])),
    }[role]
    heat = nsde.Input(KNOTS[series], values[series], order=order)
    sde = nsde.SDE(drift, diffusion, params=jnp.asarray(RATE[series]), inputs={"heat": heat})
    grid = nsde.TimeGrid(TIMES[series], include=sde.breakpoints)
    x = numpyro.sample("x", nsde.SDEPath(sde, grid, dist.Normal(0.2, 1.0), scheme=scheme))
    return nsde.observe("y", x, lambda t, x: dist.Normal(x, NOISE), obs=y[series], at=grid.index)


def coefficients(role, heat, slope, p):
    if role == "drift":
        return -p, heat, slope, SCALE
    if role == "rate":
        return -(1.5 + heat), (1.5 + heat) * p, 0.0, SCALE
    return -p, 0.0, 0.0, SCALE * np.exp(heat)


def dense(order, role, s):
    law = Law(0.2, 1.0)
    cuts = np.union1d(TIMES[s], KNOTS[s])
    cuts = cuts[(cuts >= TIMES[s][0]) & (cuts <= TIMES[s][-1])]
    for t, end in itertools.pairwise(cuts):
        heat, slope = held(KNOTS[s], VALUES[s], t, order)
        A, b0, b1, L = coefficients(role, heat, slope, RATE[s])
        law.move(*stretch(A, b0, b1, L, end - t))
        if end in TIMES[s]:
            law.mark()
    n = TIMES.shape[1]
    return law.log_density(Y[s], [1.0] * n, np.zeros(n), [NOISE**2] * n)


def value_of(method, *args, **kwargs):
    model = nsde.handlers.marginalize(scalar_model, method=method)
    return float(log_density(model, args, kwargs, {})[0])


CASES = [
    ("hold", "drift"),
    ("linear", "drift"),
    ("hold_next", "drift"),
    ("hold", "rate"),
    ("hold", "noise"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("order", "role"), CASES)
@pytest.mark.usefixtures("x64")
def test_kalman_is_exact_for_one_series_and_a_panel_of_two_clocks(order, role):
    exact = [dense(order, role, s) for s in (0, 1)]
    assert value_of(nsde.filters.Kalman(), order, role, 0) == pytest.approx(exact[0], abs=1e-10)
    assert value_of(nsde.filters.Kalman(), order, role) == pytest.approx(sum(exact), abs=1e-10)


@pytest.mark.parametrize(("order", "role"), [CASES[1], CASES[3]])
def test_float32(order, role):
    exact = sum(dense(order, role, s) for s in (0, 1))
    assert value_of(nsde.filters.Kalman(), order, role) == pytest.approx(exact, abs=1e-4)


ENGINES = {
    "EKF": nsde.filters.ExtendedKalman(),
    "UKF": nsde.filters.UnscentedKalman(),
    "guided particles": nsde.filters.Particle(8),
    "Kalman on the scheme": nsde.filters.Kalman(),
}


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(m, id=n, marks=pytest.mark.slow if "particles" in n else ())
        for n, m in ENGINES.items()
    ],
)
@pytest.mark.usefixtures("x64")
def test_engines_on_local_linear_steps(method):
    exact = sum(dense("linear", "drift", s) for s in (0, 1))
    assert value_of(method, "linear", scheme=LOCAL) == pytest.approx(exact, abs=1e-9)


@pytest.mark.usefixtures("x64")
def test_moment_matching_sees_the_pieces():
    exact = dense("hold", "drift", 0)
    got = value_of(nsde.filters.MomentMatching(substeps=16), "hold", "drift", 0)
    assert got == pytest.approx(exact, abs=1e-6)


# Standard deviations over 30 keys (the ensemble's over 8 seeds), measured.
SAMPLERS = {
    "bootstrap": (nsde.filters.Particle(4000, proposal="bootstrap"), 0.06),
    "auxiliary": (nsde.filters.Particle(4000, proposal="auxiliary"), 0.055),
    "modified bridge": (nsde.filters.Particle(4000, proposal="modified_bridge"), 0.085),
    "residual bridge": (nsde.filters.Particle(4000, proposal="residual_bridge"), 0.03),
    "ensemble": (nsde.filters.EnsembleKalman(4000), 0.044),
}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "error"), SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.usefixtures("x64")
def test_sampled_engines(method, error):
    exact = dense("linear", "drift", 0)
    assert abs(value_of(method, "linear", "drift", 0, LOCAL) - exact) < 4 * error


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_guided_log_weight_is_the_likelihood():
    series = slice(None)
    guided = reparam(scalar_model, config={"x": nsde.reparam.GuidedReparam()})
    exact = sum(dense("linear", "drift", s) for s in (0, 1))
    run = trace(seed(guided, 7)).get_trace("linear", "drift", series, LOCAL)
    z = {name: run[name]["value"] for name in ("x_init_innov", "x_innov")}
    total = log_density(guided, ("linear", "drift", series, LOCAL), {}, z)[0]
    total = total - sum(jnp.sum(dist.Normal(0, 1).log_prob(v)) for v in z.values())
    assert float(total) == pytest.approx(exact, abs=1e-9)


@pytest.mark.usefixtures("x64")
def test_centred_density_and_whitening_agree_with_the_law():
    heat = nsde.Input(KNOTS, VALUES, order="linear")
    sde = nsde.SDE(
        lambda t, x, p, u: u["heat"] - p * x,
        lambda t, x, p, u: SCALE,
        params=jnp.asarray(RATE),
        inputs={"heat": heat},
    )
    grid = nsde.TimeGrid(TIMES, include=sde.breakpoints)
    path = nsde.SDEPath(sde, grid, dist.Normal(0.2, 1.0), scheme=LOCAL)
    x = path.sample(jax.random.key(1))
    for s in (0, 1):
        total = dist.Normal(0.2, 1.0).log_prob(x[s, 0])
        for k, (t, h) in enumerate(zip(grid.times[s], grid.dt[s], strict=False)):
            value, slope = held(KNOTS[s], VALUES[s], t, "linear")
            F, c, Q = stretch(-RATE[s], value, slope, SCALE, h)
            total += dist.Normal(F[0, 0] * x[s, k] + c[0], np.sqrt(Q[0, 0])).log_prob(x[s, k + 1])
        assert float(path.log_prob(x)[s]) == pytest.approx(float(total), abs=1e-10)
    np.testing.assert_allclose(path.forward(*path.inverse(x)), x, atol=1e-10)


def two_state_model(order, y, with_input=True):
    A = np.array([[-1.2, 0.7], [0.3, -0.6]])
    p = {"A": A, "b": np.array([1.0, 0.2]), "L": np.array([[0.4, 0.0], [0.1, 0.3]])}
    dims = {"A": 2, "b": 1, "L": 2}
    if with_input:
        knots = np.arange(0.0, 21.0, 2.0)
        heat = nsde.Input(knots, np.sin(knots), order=order)
        sde = nsde.SDE(
            lambda t, x, p, u: p["A"] @ x + p["b"] * u["heat"],
            lambda t, x, p, u: p["L"],
            params=p,
            event_dims=dims,
            inputs={"heat": heat},
        )
    else:
        sde = nsde.SDE(
            lambda t, x, p: p["A"] @ x + p["b"], lambda t, x, p: p["L"], params=p, event_dims=dims
        )
    start = dist.MultivariateNormal(jnp.zeros(2), 0.5 * jnp.eye(2))
    x = numpyro.sample("x", nsde.SDEPath(sde, np.arange(21.0), start))
    nsde.observe("y", x, lambda t, x: dist.Normal(x[0], 0.2), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["hold", "linear", "hold_next"])
@pytest.mark.usefixtures("x64")
def test_two_states(order):
    y = np.cos(np.arange(21.0))
    knots = np.arange(0.0, 21.0, 2.0)
    A, L = np.array([[-1.2, 0.7], [0.3, -0.6]]), np.array([[0.4, 0.0], [0.1, 0.3]])
    law = Law(np.zeros(2), 0.5 * np.eye(2))
    for t in np.arange(20.0):
        value, slope = held(knots, np.sin(knots), t, order)
        b = np.array([1.0, 0.2])
        law.move(*stretch(A, b * value, b * slope, L, 1.0))
        law.mark()
    exact = law.log_density(y, [[1.0, 0.0]] * 21, np.zeros(21), [0.04] * 21)
    model = nsde.handlers.marginalize(two_state_model, method=nsde.filters.Kalman())
    assert float(log_density(model, (order, y), {}, {})[0]) == pytest.approx(exact, abs=1e-10)


@pytest.mark.usefixtures("x64")
def test_values_may_be_inferred():
    def value(v):
        return log_density(
            nsde.handlers.marginalize(scalar_model, method=nsde.filters.Kalman()),
            ("linear", "drift", 0),
            {"values": jnp.stack([v, v])},
            {},
        )[0]

    v, h = jnp.asarray(VALUES[0]), 1e-5
    slope = jax.grad(value)(v)
    finite = (value(v.at[1].add(h)) - value(v.at[1].add(-h))) / (2 * h)
    assert float(slope[1]) == pytest.approx(float(finite), rel=1e-6)


def test_smooth_draws_paths_that_follow_the_input():
    y = np.full((2, 5), np.nan)
    draws = nsde.smooth(
        lambda: (
            numpyro.sample("unused", dist.Normal(0, 1)),
            scalar_model("linear", y=y),
        ),
        {"unused": np.zeros(4000)},
        method=nsde.filters.Kalman(),
        rng_key=jax.random.key(0),
        batch_size=500,
    )["x"]
    law = Law(0.2, 1.0)
    value, slope = held(KNOTS[0], VALUES[0], 0.0, "linear")
    law.move(*stretch(-RATE[0], value, slope, SCALE, 0.7))
    law.mark()
    mean, cov = law.moments()
    error = np.sqrt(cov[1, 1] / 4000)
    assert abs(float(jnp.mean(draws[:, 0, 1])) - mean[1]) < 4 * error


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nsde.Input([0.0, 1.0], [1.0, 2.0], order="cubic"), "order must be one of"),
        (lambda: nsde.Input([0.0, 1.0], [1.0, np.nan]), "values of an Input must be finite"),
        (lambda: nsde.Input([1.0, 0.0], [1.0, 2.0]), "times of an Input must be strictly"),
        (lambda: nsde.Input([0.0, 1.0], [1.0, 2.0, 3.0]), r"shape \(\*batch, 2\)"),
        (lambda: nsde.Input(np.arange(3.0), np.ones((3, 3))), "event_dim=0 or 1"),
        (
            lambda: nsde.SDE(
                lambda t, x, p: x,
                lambda t, x, p: 1.0,
                params=1.0,
                inputs={"heat": nsde.Input([0.0, 1.0], [0.0, 1.0])},
            ),
            r"drift must take \(t, x, p, u\)",
        ),
        (
            lambda: nsde.SDE(lambda t, x, u: x, lambda t, x, u: 1.0, inputs={"heat": np.ones(3)}),
            r"inputs\['heat'\] must be an nsde.Input",
        ),
        (lambda: path_over([0.0, 2.0], [0.0, 1.0]), "is given from 0 to 1, but the path runs"),
        (lambda: path_over([0.0, 1.0], [0.0, 0.5, 1.0]), "breakpoint at 0.5, inside the step"),
        (
            lambda: path_over([[0.0, 1.0], [0.0, 1.5]], [[0.0, 1.0], [0.0, 1.0]]),
            "path of series 1 runs from 0 to 1.5",
        ),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def path_over(times, knots, **options):
    heat = nsde.Input(knots, np.ones(np.shape(knots)), **options)
    sde = nsde.SDE(lambda t, x, u: u["heat"] - x, lambda t, x, u: 1.0, inputs={"heat": heat})
    return nsde.SDEPath(sde, times, init=dist.Normal(0.0, 1.0))


def test_beyond_its_times_an_input_may_be_held():
    path = path_over([-1.0, 0.0, 1.0, 2.0], [0.0, 1.0], order="linear", beyond="hold")
    assert np.isfinite(path.log_prob(path.sample(jax.random.key(0))))


def test_traced_times_that_are_not_covered_give_nan():
    heat = nsde.Input([0.0, 1.0, 2.0], [1.0, 2.0, 3.0])
    sde = nsde.SDE(lambda t, x, u: u["heat"] - x, lambda t, x, u: 1.0, inputs={"heat": heat})

    @jax.jit
    def value(times):
        return nsde.SDEPath(sde, times, init=dist.Normal(0.0, 1.0)).log_prob(jnp.zeros(3))

    assert np.isfinite(value(jnp.array([0.0, 0.5, 1.0])))
    assert np.isnan(value(jnp.array([0.0, 0.5, 2.5])))  # past the last time
    assert np.isnan(value(jnp.array([0.0, 0.5, 1.5])))  # a breakpoint inside a step


def test_a_grid_contains_the_times_of_all_series():
    grid = nsde.TimeGrid([[0.0, 1.0, 2.0], [0.0, 2.0, 3.0]], include=[[0.3, 0.6], [2.5, np.nan]])
    assert grid.index.tolist() == [0, 3, 5]
    np.testing.assert_allclose(grid.times[0], [0.0, 0.3, 0.6, 1.0, 1.5, 2.0])
    assert {0.0, 2.0, 2.5, 3.0} <= set(grid.times[1].tolist())
    np.testing.assert_allclose(np.diff(grid.times), grid.dt)


@pytest.mark.slow
def test_the_gradient_costs_little_more_than_without_an_input():
    """The same program but for the offsets: counted in operations, which no other process slows."""

    def cost(model, *args):
        marginal = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())

        def value(y):
            return log_density(marginal, (*args, y), {}, {})[0]

        return jax.jit(jax.grad(value)).lower(jnp.zeros(21)).compile().cost_analysis()["flops"]

    with_input = cost(two_state_model, "linear")
    without = cost(lambda order, y: two_state_model(order, y, with_input=False), "linear")
    assert with_input < 2.5 * without


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a linear input as the rate", "a rate of time itself"])
@pytest.mark.usefixtures("x64")
def test_kalman_integrates_what_multiplies_the_state(kind):
    """A time-dependent rate, with a dose inside a gap, against quadrature of the exact law."""
    times, y = np.arange(4.0), np.array([0.3, 1.0, 0.5, 1.2])
    knots, values = np.array([0.0, 1.5, 3.0]), np.array([1.0, 2.0, 0.5])

    def rate(t):
        return np.interp(t, knots, values) if "input" in kind else 1.0 + 0.5 * np.sin(t)

    def model():
        dose = nsde.doses([0.5], [1.0])
        if "input" in kind:
            sde = nsde.SDE(
                lambda t, x, u: -u["rate"] * x,
                lambda t, x, u: 0.4,
                inputs={"rate": nsde.Input(knots, values, order="linear")},
            )
        else:
            sde = nsde.SDE(lambda t, x: -(1.0 + 0.5 * jnp.sin(t)) * x, lambda t, x: 0.4)
        grid = nsde.TimeGrid(times, 0.25, include=[sde.breakpoints, dose.breakpoints])
        x = numpyro.sample("x", nsde.SDEPath(sde, grid, dist.Normal(0.0, 1.0), events=[dose]))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.2), obs=y, at=grid.index)

    def integral(a, b):
        return quad(rate, a, b, points=[1.5] if a < 1.5 < b else None, epsabs=1e-12)[0]

    law = Law(0.0, 1.0)
    for a, b in itertools.pairwise([0.0, 0.5, 1.0, 1.5, 2.0, 3.0]):
        if a == 0.5:
            law.jump(1.0, 1.0)
        Q = quad(lambda s, b=b: 0.16 * np.exp(-2 * integral(s, b)), a, b, epsabs=1e-12)[0]
        law.move(np.array([[np.exp(-integral(a, b))]]), np.zeros(1), np.array([[Q]]))
        if b in times:
            law.mark()
    exact = law.log_density(y, [1.0] * 4, np.zeros(4), [0.04] * 4)
    marginal = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())
    assert float(log_density(marginal, (), {}, {})[0]) == pytest.approx(exact, abs=1e-7)
