"""Doses and other events: every engine against dense Gaussian laws.

The drug of `pk` has two compartments, doses of 100, 50 and 50 at 0, 6 and 12, an infusion of 75
over 3 hours from 8 on, and a bioavailability of 0.8. Samples are taken at 6 and 12 too: read before
or after the dose they are 74 nats apart.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from dense_laws import Law, stretch
from numpyro.handlers import reparam, seed, trace
from numpyro.infer.util import log_density

import numpyro_sde as nsde

REFERENCE = json.loads((Path(__file__).parent / "shapes_reference.json").read_text())
TIMES = np.array([0.0, *REFERENCE["pk2_obs_t"]])
Y = np.array([np.nan, *REFERENCE["pk2_y"]])
BEFORE, AFTER = REFERENCE["pk2_loglik_predose"], REFERENCE["pk2_loglik_postdose"]
A, L = np.array([[-0.8, 0.25], [0.5, -0.25]]), np.diag([1.5, 0.8])
LOCAL = nsde.schemes.LocalLinear()


def drug(F=0.8):
    return nsde.SDE(
        lambda t, x, p: p["A"] @ x,
        lambda t, x, p: p["L"],
        params={"A": A, "L": np.array([1.5, 0.8]), "F": F},
        event_dims={"A": 2, "L": 1},
    )


def regimen(shift=0.0):
    return nsde.doses(
        np.array([0.0, 6.0, 12.0, 8.0]) + shift,
        [100.0, 50.0, 50.0, 75.0],
        fraction=lambda p: p["F"],
        duration=[0.0, 0.0, 0.0, 3.0],
    )


def pk(side="before", scheme=None, y=Y, max_step=None):
    doses = regimen()
    grid = nsde.TimeGrid(TIMES, max_step, include=doses.breakpoints)
    law = nsde.SDEPath(drug(), grid, jnp.zeros(2), scheme=scheme, events=[doses])
    x = numpyro.sample("x", law)
    emission = lambda t, x: dist.Normal(x[0] / 10.0, 0.4)  # noqa: E731
    nsde.observe("y", x, emission, obs=y, at=grid.index, side=side)


def panel(side="before", scheme=None):
    """The same patient on two clocks, the second an hour late."""
    shift = np.array([[0.0], [1.0]])
    doses = regimen(shift)
    grid = nsde.TimeGrid(TIMES + shift, include=doses.breakpoints)
    sde = drug(np.array([0.8, 0.8]))
    x = numpyro.sample("x", nsde.SDEPath(sde, grid, jnp.zeros(2), scheme=scheme, events=[doses]))
    emission = lambda t, x: dist.Normal(x[0] / 10.0, 0.4)  # noqa: E731
    nsde.observe("y", x, emission, obs=np.stack([Y, Y]), at=grid.index, side=side)


def value_of(method, model, *args, **kwargs):
    model = nsde.handlers.marginalize(model, method=method)
    return float(log_density(model, args, kwargs, {})[0])


@pytest.mark.slow
@pytest.mark.parametrize(("side", "exact"), [("before", BEFORE), ("after", AFTER)])
@pytest.mark.usefixtures("x64")
def test_a_dose_before_or_after_the_sample(side, exact):
    assert value_of(nsde.filters.Kalman(), pk, side) == pytest.approx(exact, abs=1e-10)
    assert value_of(nsde.filters.Kalman(), panel, side) == pytest.approx(2 * exact, abs=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("side", "exact"), [("before", BEFORE), ("after", AFTER)])
def test_float32(side, exact):
    assert value_of(nsde.filters.Kalman(), pk, side) == pytest.approx(exact, rel=1e-4)
    assert value_of(nsde.filters.Kalman(), panel, side) == pytest.approx(2 * exact, rel=1e-4)


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
    assert value_of(method, panel, "before", LOCAL) == pytest.approx(2 * BEFORE, abs=1e-8)


@pytest.mark.usefixtures("x64")
def test_moment_matching_takes_events():
    got = value_of(nsde.filters.MomentMatching(substeps=32), pk)
    assert got == pytest.approx(BEFORE, abs=1e-5)


def short(max_step=0.1):
    """Three doses between four samples, on steps that proposals by Euler's extrapolation need."""
    given = nsde.doses([0.4, 1.0, 1.3], [1.0, 2.0, -0.3], duration=[0.0, 0.0, 0.5])
    sde = nsde.SDE(lambda t, x: 0.5 - x, lambda t, x: 0.4)
    grid = nsde.TimeGrid([0.0, 0.5, 1.0, 1.5, 2.0], max_step, include=given.breakpoints)
    law = nsde.SDEPath(sde, grid, dist.Normal(2.0, 0.3), scheme=LOCAL, events=[given])
    x = numpyro.sample("x", law)
    y = np.array([2.1, 1.4, 3.2, 2.3])
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.2), obs=y, at=grid.index[1:])


# Standard deviations over 20 keys, measured: 0.32, 0.22, 0.25 and 0.03.
SAMPLERS = {
    "bootstrap": (nsde.filters.Particle(2000, proposal="bootstrap"), 0.32),
    "auxiliary": (nsde.filters.Particle(2000, proposal="auxiliary"), 0.22),
    "modified bridge": (nsde.filters.Particle(2000, proposal="modified_bridge"), 0.25),
    "residual bridge": (nsde.filters.Particle(2000, proposal="residual_bridge"), 0.03),
}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "error"), SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.usefixtures("x64")
def test_sampled_engines(method, error):
    exact = value_of(nsde.filters.Kalman(), short)
    assert abs(value_of(method, short) - exact) < 4 * error


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_ensemble():
    """Standard deviation over 8 seeds, measured: 0.011."""
    got = value_of(nsde.filters.EnsembleKalman(4000), pk, scheme=LOCAL)
    assert abs(got - BEFORE) < 4 * 0.011


@pytest.mark.slow
@pytest.mark.parametrize(("side", "exact"), [("before", BEFORE), ("after", AFTER)])
@pytest.mark.usefixtures("x64")
def test_guided_log_weight_is_the_likelihood(side, exact):
    guided = reparam(pk, config={"x": nsde.reparam.GuidedReparam()})
    run = trace(seed(guided, 7)).get_trace(side, LOCAL)
    z = {"x_innov": run["x_innov"]["value"]}
    total = log_density(guided, (side, LOCAL), {}, z)[0]
    total = total - jnp.sum(dist.Normal(0, 1).log_prob(z["x_innov"]))
    assert float(total) == pytest.approx(exact, abs=1e-8)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_handlers_keep_the_events():
    kalman = nsde.filters.Kalman()
    fine = nsde.handlers.refine(pk, max_step=0.25)
    assert value_of(kalman, fine) == pytest.approx(BEFORE, abs=1e-9)
    assert value_of(kalman, fine, "after") == pytest.approx(AFTER, abs=1e-9)
    other = nsde.handlers.discretize(pk, LOCAL)
    assert value_of(nsde.filters.ExtendedKalman(), other) == pytest.approx(BEFORE, abs=1e-8)
    inside = nsde.handlers.refine(nsde.handlers.marginalize(pk, method=kalman), max_step=0.25)
    assert float(log_density(inside, ("after",), {}, {})[0]) == pytest.approx(AFTER, abs=1e-9)
    with pytest.raises(ValueError, match="driven by Brownian motion, got noise MarkovFBM"):
        value_of(kalman, nsde.handlers.drive(pk, nsde.noise.MarkovFBM(0.3)))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_centred_density_and_whitening():
    doses = regimen()
    grid = nsde.TimeGrid(TIMES, include=doses.breakpoints)
    path = nsde.SDEPath(drug(), grid, jnp.zeros(2), scheme=LOCAL, events=[doses])
    x = path.sample(jax.random.key(1))
    total = 0.0
    for k, (t, h) in enumerate(zip(grid.times, grid.dt, strict=False)):
        b = np.array([20.0 if 8.0 <= t < 11.0 else 0.0, 0.0])
        F, c, Q = stretch(A, b, np.zeros(2), L, h)
        start = x[k] + np.array([{0.0: 80.0, 6.0: 40.0, 12.0: 40.0}.get(t, 0.0), 0.0])
        total += dist.MultivariateNormal(F @ start + c, Q).log_prob(x[k + 1])
    assert float(path.log_prob(x)) == pytest.approx(float(total), abs=1e-9)
    np.testing.assert_allclose(path.forward(*path.inverse(x)), x, atol=1e-9)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_smooth_draws_have_the_jump():
    y = np.where(TIMES == 18.0, Y, np.nan)
    draws = nsde.smooth(
        lambda: (numpyro.sample("unused", dist.Normal(0, 1)), pk(y=y)),
        {"unused": np.zeros(2000)},
        method=nsde.filters.Kalman(),
        rng_key=jax.random.key(0),
    )["x"]
    law = Law(np.zeros(2), np.zeros((2, 2)))
    law.jump(np.eye(2), [80.0, 0.0])
    law.move(*stretch(A, np.zeros(2), np.zeros(2), L, 0.5))
    law.mark()
    mean, cov = law.moments()
    assert abs(float(jnp.mean(draws[:, 1, 0])) - mean[2]) < 4 * np.sqrt(cov[2, 2] / 2000)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_steady_state():
    law = nsde.steady_state(drug(), nsde.doses(0.0, 50.0, fraction=lambda p: p["F"]), interval=8.0)
    np.testing.assert_allclose(law.mean, REFERENCE["pk2_ss_trough_mean"], atol=1e-8)
    np.testing.assert_allclose(law.covariance_matrix, REFERENCE["pk2_ss_trough_cov"], atol=1e-8)
    many = nsde.steady_state(
        drug(np.array([0.8, 0.4])),
        nsde.doses(2.0, 50.0, fraction=lambda p: p["F"], interval=8.0, additional=5),
        interval=8.0,
    )
    np.testing.assert_allclose(many.mean[0], REFERENCE["pk2_ss_trough_mean"], atol=1e-8)
    np.testing.assert_allclose(many.mean[1], 0.5 * np.asarray(many.mean[0]), atol=1e-8)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_steady_state_of_an_infusion_is_that_of_a_long_run():
    doses = nsde.doses([0.0, 3.0], [50.0, 30.0], duration=[0.0, 2.0])
    law = nsde.steady_state(drug(), doses, interval=8.0)
    m, P = np.zeros(2), np.zeros((2, 2))
    for _ in range(60):
        m = m + np.array([50.0, 0.0])
        for h, rate in ((3.0, 0.0), (2.0, 15.0), (3.0, 0.0)):
            F, c, Q = stretch(A, np.array([rate, 0.0]), np.zeros(2), L, h)
            m, P = F @ m + c, F @ P @ F.T + Q
    np.testing.assert_allclose(law.mean, m, atol=1e-8)
    np.testing.assert_allclose(law.covariance_matrix, P, atol=1e-8)


def test_steady_state_of_what_grows_or_bends_is_refused():
    def growing(rate):
        sde = nsde.SDE(lambda t, x, p: p * x, lambda t, x, p: 1.0, params=rate)
        return nsde.steady_state(sde, nsde.doses(0.0, 1.0), interval=1.0, state_shape=())

    with pytest.raises(ValueError, match="does not forget its start"):
        growing(0.1)
    assert np.isnan(jax.jit(lambda rate: growing(rate).mean)(0.1))
    bent = nsde.SDE(lambda t, x: -(x**3), lambda t, x: 1.0)
    with pytest.raises(ValueError, match="drift is not affine in x"):
        nsde.steady_state(bent, nsde.doses(0.0, 1.0), interval=1.0, state_shape=())
    with pytest.raises(ValueError, match="state_shape="):
        nsde.steady_state(bent, nsde.doses(0.0, 1.0), interval=1.0)


@pytest.mark.usefixtures("x64")
def test_events_of_one_time_act_in_the_order_of_the_list():
    sde = nsde.SDE(lambda t, x: 0.0 * x, lambda t, x: 1.0)
    double = nsde.Events([1.0], lambda x, a, p: 2.0 * x)
    more = nsde.Events([1.0], lambda x, a, p: x + a, amounts=[3.0])
    for events, mean in (([double, more], 2.0 * 5.0 + 3.0), ([more, double], 2.0 * (5.0 + 3.0))):
        path = nsde.SDEPath(sde, [0.0, 1.0, 2.0], init=5.0, events=events)
        x = jnp.array([5.0, 5.0, mean])
        assert float(path.log_prob(x)) == pytest.approx(-np.log(2 * np.pi), abs=1e-12)


@pytest.mark.usefixtures("x64")
def test_nonlinear_events_and_events_of_some_series_only():
    """A harvest of half of what is above 1 in the second series alone, by particles and UKF."""
    sde = nsde.SDE(lambda t, x: 0.0 * x, lambda t, x: 0.01)
    cut = nsde.Events(
        [[np.nan], [1.0]], lambda x, a, p: jnp.where(x > a, a + 0.5 * (x - a), x), amounts=1.0
    )
    path = nsde.SDEPath(sde, [0.0, 1.0, 2.0], init=3.0, events=[cut])
    assert path.batch_shape == (2,)
    x = path.sample(jax.random.key(0))
    np.testing.assert_allclose(x[:, 2], [3.0, 2.0], atol=0.1)
    with pytest.raises(ValueError, match=r"events\[0\] of the path is not affine"):
        nsde.filter_path(
            path, lambda t, x: dist.Normal(x, 1.0), np.zeros((2, 3)), method=nsde.filters.Kalman()
        )


def simple(events, times=(0.0, 1.0, 2.0), sde=None, **options):
    sde = nsde.SDE(lambda t, x: -x, lambda t, x: 1.0) if sde is None else sde
    return nsde.SDEPath(sde, times, init=0.0, events=events, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: simple([nsde.doses(0.5, 1.0)]), "time 0.5 is not on the path's grid"),
        (lambda: simple([nsde.doses(2.0, 1.0)]), "at or after the path's last time 2"),
        (lambda: simple([nsde.doses(-1.0, 1.0)]), "before the path's first time 0"),
        (lambda: simple([nsde.doses(0.0, 1.0, duration=0.5)]), "infusion ending at time 0.5"),
        (lambda: simple([nsde.doses(0.0, 1.0, to=1)]), "doses go to=1, but the state"),
        (lambda: simple([nsde.Events([1.0], lambda x, a, p: jnp.ones(2))]), "shape of the state"),
        (lambda: simple(["dose"]), "events must be a list of nsde.Events"),
        (lambda: nsde.doses(0.0, 1.0, duration=-1.0), "duration of doses must be finite and >= 0"),
        (lambda: nsde.doses(0.0, 1.0, additional=2), "repeats doses every interval="),
        (lambda: nsde.doses(0.0, np.nan), "amount of doses must be finite"),
        (lambda: nsde.doses([0.0, 1.0], [1.0, 2.0, 3.0]), r"must have shape \(\*batch, 2\)"),
        (lambda: nsde.Events([1.0, 1.0], lambda x, a, p: x), "hold 1 twice"),
        (lambda: nsde.Events([1.0], lambda x: x), r"apply must take \(x, a, p\)"),
        (
            lambda: jax.jit(lambda t: nsde.doses(0.0, 1.0, lag=t).times)(1.0),
            "transit compartments",
        ),
        (
            lambda: simple(
                [nsde.doses(0.0, 1.0, duration=1.0)],
                sde=nsde.processes.OrnsteinUhlenbeck(1.0, 0.0, 1.0),
                scheme=nsde.schemes.Exact(),
            ),
            "infusions add to the drift",
        ),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_events_beside_random_jumps_are_refused():
    jumps = nsde.CompoundPoisson(1.0, dist.Normal(0.0, 1.0))
    sde = nsde.SDE(lambda t, x: -x, lambda t, x: 1.0, jumps=jumps)
    with pytest.raises(ValueError, match="jumps or switches by chance"):
        simple([nsde.doses(1.0, 1.0)], sde=sde)
    with pytest.raises(ValueError, match="accumulate needs a diffusion"):
        nsde.accumulate(sde, {"area": lambda t, x: x})


def test_bridges_refuse_events():
    def model():
        numpyro.sample("x", simple([nsde.doses(1.0, 1.0)]))

    bridge = nsde.reparam.BridgeReparam(np.array([0.0, 1.0]), at=[0, 2])
    with pytest.raises(ValueError, match="has events"):
        seed(reparam(model, config={"x": bridge}), 0)()
