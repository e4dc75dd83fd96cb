"""Weights integrated out: against the integral of the joint density, in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density

import numpyro_sde as nsde
from numpyro_sde.distributions.step_check import CoarseStepWarning

HSGP = nsde.fields.HSGP
TIMES = np.array([0.0, 0.1, 0.25, 0.3, 0.5, 0.6, 0.8])
RNG = np.random.default_rng(0)
X = 0.4 * RNG.normal(size=(2, TIMES.size))
AMPLITUDE = {"f/amplitude": jnp.array(1.5)}


def one_path(x=X[0], scheme=None, noise=lambda t, x, p: 0.5, of=lambda f, x: f(x), num=3):
    prior = HSGP(1, 2.5, num)

    def model():
        f = prior.register("f", amplitude=dist.HalfNormal(3.0), length=0.8)
        sde = nsde.SDE(
            lambda t, x, p: of(p["f"], x) - p["c"] * x**3, noise, params={"f": f, "c": 1.0}
        )
        path = nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 0.5), scheme=scheme)
        return numpyro.sample("x", path, obs=x)

    return model


def panel(shared):
    prior = HSGP(1, 2.5, 2)

    def model():
        if shared:
            f = prior.register("f", amplitude=dist.HalfNormal(3.0), length=0.8)
        with numpyro.plate("series", 2):
            if not shared:
                f = prior.register("f", amplitude=1.5, length=0.8)
            sde = nsde.SDE(lambda t, x, p: p(x), lambda t, x, p: 0.5, params=f)
            numpyro.sample("x", nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 0.5)), obs=X)

    return model


def vectors():
    prior = HSGP(2, 2.5, 2, constraint="gradient")

    def model():
        f = prior.register("f", amplitude=dist.HalfNormal(3.0), length=0.8)
        mix = jnp.array([[0.5, 0.0], [0.2, 0.3]])
        sde = nsde.SDE(lambda t, x, p: p(x) - x, lambda t, x, p: mix, params=f)
        init = dist.Normal(jnp.zeros(2), 0.5).to_event(1)
        numpyro.sample("x", nsde.SDEPath(sde, TIMES, init), obs=X.T)

    return model


def by_dense_algebra(model, values, size):
    """`log int p(x | z) p(z) dz` and the moments of z, from the log density's own second order."""

    def density(z):
        return log_density(model, (), {}, {**values, "f/z": z.reshape(shape)})[0]

    shape = handlers.trace(handlers.seed(model, 0)).get_trace()["f/z"]["value"].shape
    zero = jnp.zeros(size)
    H = -jax.hessian(density)(zero)
    g = jax.grad(density)(zero)
    mean = jnp.linalg.solve(H, g)
    log_z = density(zero) + 0.5 * g @ mean - 0.5 * jnp.linalg.slogdet(H / (2 * jnp.pi))[1]
    return float(log_z), np.asarray(mean), np.asarray(jnp.linalg.inv(H))


CASES = {
    "scalar": (one_path(), AMPLITUDE, 3),
    "state-dependent noise": (one_path(noise=lambda t, x, p: 0.3 + x**2), AMPLITUDE, 3),
    "known factor": (one_path(of=lambda f, x: 2.0 * f(x) * jnp.cos(x)), AMPLITUDE, 3),
    "vector, shared noises": (vectors(), AMPLITUDE, 4),
    "shared by a panel": (panel(True), AMPLITUDE, 2),
    "one for each series": (panel(False), {}, 4),
    "random features": (None, {}, 3),
    "zero at a rest point": (None, AMPLITUDE, 4),
}


SLOW = (
    *("state-dependent noise", "known factor", "random features", "shared by a panel"),
    "zero at a rest point",
)


def random_features():
    prior = nsde.fields.RFF(1, 3)
    f = prior.register("f", amplitude=2.0, length=0.8)
    sde = nsde.SDE(lambda t, x, p: p(x), lambda t, x, p: 0.5, params=f)
    numpyro.sample("x", nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 0.5)), obs=X[0])


def resting():
    prior = HSGP(1, 2.5, 4, zero_at=[0.0])
    f = prior.register("f", amplitude=dist.HalfNormal(3.0), length=0.8)
    sde = nsde.SDE(lambda t, x, p: p(x), lambda t, x, p: 0.5, params=f)
    numpyro.sample("x", nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 0.5)), obs=X[0])


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES],
)
def test_density_and_draws_are_those_of_the_joint_normal_law(x64, name):
    """A joint density that is quadratic in the weights: its integral and moments in closed form."""
    model, values, size = CASES[name]
    if model is None:
        model = random_features if name == "random features" else resting
    log_z, mean, cov = by_dense_algebra(model, values, size)
    collapsed = nsde.handlers.collapse(model, "f")
    got = jax.jit(lambda v: log_density(collapsed, (), {}, v)[0])(values)
    np.testing.assert_allclose(got, log_z, rtol=1e-10)
    # 20,000 draws, seed 0: means and covariances at 4 standard errors.
    count = 20_000
    samples = {k: np.broadcast_to(v, (count,)) for k, v in values.items()}
    samples = samples or {"nothing": np.zeros(count)}
    draws = nsde.smooth(collapsed, samples, rng_key=jax.random.key(0), batch_size=count)["f/z"]
    draws = np.asarray(draws).reshape(count, -1)
    sd = np.sqrt(np.diag(cov))
    assert np.all(np.abs(draws.mean(0) - mean) < 4 * sd / np.sqrt(count))
    error = np.sqrt((np.outer(sd, sd) ** 2 + cov**2) / count)
    assert np.all(np.abs(np.cov(draws.T) - cov) < 4 * error)


def test_a_latent_path_keeps_its_density_without_the_weights(x64):
    model = one_path(x=None)
    log_z, *_ = by_dense_algebra(model, {**AMPLITUDE, "x": X[0]}, 3)
    got = log_density(nsde.handlers.collapse(model, "f"), (), {}, {**AMPLITUDE, "x": X[0]})[0]
    np.testing.assert_allclose(got, log_z, rtol=1e-10)


@pytest.mark.slow
def test_the_gradient_for_the_hyperparameters_is_that_of_the_integral(x64):
    collapsed = nsde.handlers.collapse(one_path(), "f")

    def density(a):
        return log_density(collapsed, (), {}, {"f/amplitude": a})[0]

    got = jax.grad(density)(1.5)
    step = 1e-4
    up, down = (by_dense_algebra(one_path(), {"f/amplitude": 1.5 + s}, 3)[0] for s in (step, -step))
    np.testing.assert_allclose(got, (up - down) / (2 * step), rtol=1e-6)


def test_float32_agrees_with_float64():
    collapsed = nsde.handlers.collapse(one_path(), "f")
    got = log_density(collapsed, (), {}, AMPLITUDE)[0]
    with jax.enable_x64(True):
        want = log_density(collapsed, (), {}, {"f/amplitude": jnp.array(1.5)})[0]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_prior_draws_have_their_own_weights():
    """Variance of the first increment, 4,000 draws, seeds 0 and 1, at 4 standard errors."""
    model = one_path(x=None, of=lambda f, x: 20.0 * f(0.3))
    collapsed = nsde.handlers.collapse(model, "f")
    known = {"f/amplitude": jnp.full(4000, 1.5)}
    draws, plain = (
        numpyro.infer.Predictive(m, posterior_samples=known)(jax.random.key(k))["x"]
        for k, m in enumerate([collapsed, model])
    )
    a, b = (np.var(np.diff(np.asarray(d)[:, :2], axis=1)) for d in (draws, plain))
    assert abs(a - b) < 4 * np.sqrt(2 * (a**2 + b**2) / 4000)


def elsewhere():
    f = HSGP(1, 2.5, 3).register("f", amplitude=1.0, length=0.8)
    sde = nsde.SDE(lambda t, x, p: p(x), lambda t, x, p: 0.5, params=f)
    numpyro.sample("x", nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 0.5)), obs=X[0])
    numpyro.deterministic("at zero", f(0.0))


def twice():
    f = HSGP(1, 2.5, 3).register("f", amplitude=1.0, length=0.8)
    sde = nsde.SDE(lambda t, x, p: p(x), lambda t, x, p: 0.5, params=f)
    for i in range(2):
        numpyro.sample(f"x{i}", nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 0.5)), obs=X[i])


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        (one_path(scheme=nsde.schemes.LocalLinear()), "f", "step of LocalLinear whose mean"),
        (one_path(scheme=nsde.schemes.HermiteExpansion()), "f", "steps that are normal"),
        (one_path(of=lambda f, x: f(x) ** 2), "f", "mean is linear in the weights"),
        (one_path(noise=lambda t, x, p: 0.5 + p["f"](x) ** 2), "f", "noise that does not depend"),
        (one_path(), "g", "no site 'g/z' nor 'g'"),
        (elsewhere, "f", "site 'at zero'"),
        (twice, "f", "the drift of 'x0' and site 'x1'"),
        (lambda: numpyro.sample("f/z", dist.Gamma(1.0, 1.0)), "f", "is Gamma"),
        (lambda: numpyro.sample("f/z", dist.Normal(0.0, 1.0)), "f", "no path whose drift uses"),
    ],
)
def test_what_cannot_be_collapsed_is_refused_by_name(model, name, message):
    with pytest.raises(ValueError, match=message):
        handlers.seed(nsde.handlers.collapse(model, name), 0)()


def test_weights_drawn_back_say_that_steps_are_too_long():
    """A drift that relaxes at 20 per unit of time, steps of 0.1 and more."""
    times = np.arange(30) * 0.1
    x = 0.1 * np.random.default_rng(1).normal(size=30)
    prior = HSGP(1, 2.5, 3)

    def model():
        f = prior.register("f", amplitude=dist.HalfNormal(3.0), length=0.8)
        sde = nsde.SDE(lambda t, x, p: p(x) - 20.0 * x, lambda t, x, p: 0.5, params=f)
        numpyro.sample("x", nsde.SDEPath(sde, times, 0.0), obs=x)

    collapsed = nsde.handlers.collapse(model, "f")
    with pytest.warns(CoarseStepWarning, match="LocalLinear"):
        nsde.smooth(collapsed, {"f/amplitude": np.ones(2)}, rng_key=jax.random.key(0))
