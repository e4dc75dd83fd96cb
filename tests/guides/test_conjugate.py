"""The conjugate form and update of a drift's weights: exact where data and weights are normal."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO

import numpyro_sde as nsde
from numpyro_sde.guides import AutoConjugate, AutoFlow, AutoPathGuide, fit_conjugate
from numpyro_sde.guides.conjugate import Weights
from numpyro_sde.guides.weight_statistics import (
    WeightStatistics,
    gathered,
    likelihood_of,
    no_moments,
    weight_statistics,
)

TIMES = np.linspace(0.0, 2.0, 9)
SD, NOISE = 0.7, 1.0
PRIOR = dist.Normal(0.5, 2.0)


class Level(eqx.Module):
    """A constant, as a network of one weight: with it data, path and weight are jointly normal."""

    level: jax.Array

    def __call__(self, x):
        return self.level[0] + 0.0 * x


LEVEL = nsde.fields.Network(Level(jnp.zeros(1)), outputs=1, prior=PRIOR)


def constant_drift(y=None, scheme=None, noisy=False):
    f = LEVEL.register("f")
    scale = (lambda t, x, p: SD + p(x)[0] ** 2) if noisy else (lambda t, x, p: SD)
    sde = nsde.SDE(lambda t, x, p: p(x)[0], scale, params=f)
    x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, init=0.2, scheme=scheme))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, NOISE), obs=y)


def constant_drifts(y=None, batch=None):
    f = LEVEL.register("f")
    with numpyro.plate("series", len(y), subsample_size=batch) as i:
        sde = nsde.SDE(lambda t, x, p: p(x)[0], lambda t, x, p: SD, params=f)
        x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, init=0.2))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, NOISE), obs=jnp.asarray(y)[i])


def data(num):
    rng = np.random.default_rng(0)
    steps = 0.8 * 0.25 + SD * 0.5 * rng.normal(size=(num, len(TIMES) - 1))
    x = 0.2 + np.concatenate([np.zeros((num, 1)), np.cumsum(steps, 1)], 1)
    return x + NOISE * rng.normal(size=x.shape)


def exact_likelihood(y):
    """Precision and precision times mean that one series' data give the level: dense normal."""
    cov = SD**2 * np.minimum(TIMES[:, None], TIMES[None]) + NOISE**2 * np.eye(len(TIMES))
    weight = np.linalg.solve(cov, TIMES)
    return weight @ TIMES, weight @ (y - 0.2)


def update(model, y, draws, paths, rounds=1, **options):
    guide = AutoPathGuide(model, weights="conjugate")
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO())
    sizes = {"weight_draws": draws, "num_paths": paths, "svi_steps": 0, "progress_bar": False}
    fit = fit_conjugate(svi, jax.random.key(0), rounds, y, **sizes, **options)
    return guide, fit.params


def check_level(params, y, dof):
    """The likelihood within 4 standard errors, those of what was taken off for unseen paths."""
    precision, pull = (sum(one) for one in zip(*(exact_likelihood(row) for row in y), strict=True))
    seen = len(y) * TIMES[-1] / SD**2
    lost = seen - precision
    assert lost > 0.2 * seen  # the correction is not idle
    found = float(params["auto_weights_root"][0, 0] ** 2)
    assert abs(found - precision) < 4 * lost * np.sqrt(2 / dof)
    # psi is regressed on draws: its error is that of a mean of slopes, and Psi's at the mean
    error = np.sqrt(lost / dof) + abs(pull / precision) * lost * np.sqrt(2 / dof)
    assert abs(float(params["auto_weights_pull"][0]) - pull) < 4 * error


def test_one_update_ends_at_the_exact_law_of_a_linear_model(x64):
    """Data, path and weight jointly normal; the prior's mean is not zero, its sd not one."""
    y = data(1)
    guide, params = update(constant_drift, y[0], 64, 64)
    check_level(params, y, 64 * 63)
    precision, pull = exact_likelihood(y[0])
    draws = guide.sample_posterior(jax.random.key(1), params, y[0], sample_shape=(4000,))
    level = np.asarray(draws["f/level"])
    sd = (precision + 0.25) ** -0.5
    mean = (pull + 0.5 * 0.25) * sd**2
    assert abs(level.mean() - mean) < 4 * sd / np.sqrt(4000) + 0.03 * sd
    assert abs(level.std() / sd - 1.0) < 4 / np.sqrt(8000) + 0.02


@pytest.mark.slow
def test_updates_of_mini_batches_average_to_that_of_all_series(x64):
    """Two of six series at a time: statistics count three times, and are averaged over rounds.

    With a step of 1/60 all rounds have equal shares; the draw of series adds an error, that of a
    total of six estimated from 120 of its terms, of the size of their spread.
    """
    y = data(6)
    _, params = update(constant_drifts, y, 2, 32, rounds=60, step_size=1 / 60, batch=2)
    precision = 6 * exact_likelihood(y[0])[0]
    found = float(params["auto_weights_root"][0, 0] ** 2)
    lost = 6 * TIMES[-1] / SD**2 - precision
    assert abs(found - precision) < 4 * lost * np.sqrt(2 * 3 / (60 * 2 * 31 * 2))
    pulls = np.array([exact_likelihood(row)[1] for row in y])
    error = 6 * np.hypot(pulls.std() / np.sqrt(120), np.sqrt(lost / 6 / 120))
    assert abs(float(params["auto_weights_pull"][0]) - pulls.sum()) < 4 * error


def test_statistics_are_those_of_the_regression(x64):
    """Sums over steps in NumPy, for a field with sines and a known part, in weights' units."""
    prior = nsde.fields.HSGP(1, 3.0, 5)
    rng = np.random.default_rng(1)
    x, h = rng.normal(size=(4, 2, len(TIMES))), np.diff(TIMES)
    z, c, D = jnp.asarray(rng.normal(size=5)), 0.4, 0.6**2

    def law_of(z):
        f = prior.from_weights(z, amplitude=1.5, length=0.8)
        sde = nsde.SDE(
            lambda t, x, p: p["f"](x) - p["c"] * x,
            lambda t, x, p: 0.6,
            params={"f": f, "c": jnp.full((2,), c)},
        )
        return nsde.SDEPath(sde, TIMES, init=dist.Normal(0.0, 1.0))

    sd = prior.from_weights(z, amplitude=1.5, length=0.8).weight_sd
    weights = Weights(jnp.zeros(5), jnp.ones(5), sd)
    found = weight_statistics(law_of, jnp.zeros(0), z, weights, jnp.asarray(x), 3.0)
    phi = np.asarray(jax.vmap(lambda x: prior.features(x, ()))(jnp.asarray(x.reshape(-1, 1))))
    phi = phi.reshape(*x.shape, 5)[..., :-1, :]
    rest = np.diff(x) - h * (-c * x[..., :-1]) - h * (phi @ np.asarray(sd * z))
    slope = np.einsum("ksn,ksnm->ksm", rest, phi) / D
    np.testing.assert_allclose(found.at, sd * z, rtol=1e-12)
    np.testing.assert_allclose(found.slope, 3 * slope.mean(0).sum(0), rtol=1e-9)
    seen = np.einsum("n,ksni,ksnj->ij", h, phi, phi) / 4 / D
    np.testing.assert_allclose(found.seen, 3 * seen, rtol=1e-9, atol=1e-9)
    lost = sum(np.cov(slope[:, s], rowvar=False) for s in range(2))
    np.testing.assert_allclose(found.lost, 3 * lost, rtol=1e-9, atol=1e-9)


def test_the_likelihood_is_regressed_from_running_means(x64):
    """Slopes that are linear give back psi_0, G and Psi; a draw that is not finite is left out."""
    rng = np.random.default_rng(2)
    m, p = 4, 2
    A = rng.normal(size=(m, m))
    Psi, pull, slope = A @ A.T, rng.normal(size=m), rng.normal(size=(m, p))
    moments = no_moments(m, p)
    for _ in range(200):
        rest, w = rng.normal(size=(40, p)) + 0.3, rng.normal(size=(40, m))
        t = np.concatenate([np.ones((40, 1)), rest], 1)
        g = pull + rest @ slope.T - w @ Psi
        g[0] = np.nan
        lost = np.broadcast_to(np.eye(m), (40, m, m))
        one = WeightStatistics(*(jnp.asarray(a) for a in (t, w, g, Psi + lost, lost)))
        moments = gathered(moments, one, 0.01)
    found = likelihood_of(moments)
    np.testing.assert_allclose(found.root @ found.root.T, Psi, atol=1e-8)
    # held to zero by a ridge of p over the draws; 39 of a round count, 3,861 of them evenly, then
    # with weights that come to be worth 39 (2 - 0.01) / 0.01
    assert 3861 < float(moments.worth) < 39 * 1.99 / 0.01
    np.testing.assert_allclose(found.slope, slope, rtol=p / 3861)
    np.testing.assert_allclose(found.pull, pull, atol=0.3 * 2 * p / 3861 * np.abs(slope).max())


def fields(scale=None):
    f = nsde.fields.HSGP(1, 2.0, 3).register("f", amplitude=dist.HalfNormal(1.0), length=0.7)
    numpyro.sample("c", dist.LogNormal(0.0, 0.5))
    g = LEVEL.register("g")
    numpyro.sample("y", dist.Normal(f(0.3) + g(0.3)[0], 0.1), obs=0.5)


def test_the_guide_is_prior_times_likelihood(x64):
    """Two fields, one joint law: density of a draw against NumPy's, at any other parameters."""
    guide = AutoConjugate(fields, ["f/z", "g/level"])
    rng = np.random.default_rng(3)
    with handlers.seed(rng_seed=0), handlers.trace() as start:
        guide()
    values = {k: s["value"] for k, s in start.items() if s["type"] == "param"}
    A = rng.normal(size=(4, 4))
    pull, slope = rng.normal(size=4), rng.normal(size=(4, 2))
    new = {"pull": pull, "slope": slope, "root": A}
    values |= {f"auto_weights_{k}": jnp.asarray(v) for k, v in new.items()}
    with handlers.seed(rng_seed=1), handlers.trace() as run, handlers.substitute(data=values):
        drawn = guide()
    sites = {k: s for k, s in run.items() if s["type"] == "sample"}
    own = ["_auto_weights", "f/z", "g/level"]
    density = sum(float(sites[k]["fn"].log_prob(sites[k]["value"])) for k in own)
    unit = nsde.fields.HSGP(1, 2.0, 3).from_weights(
        jnp.zeros(3), amplitude=drawn["f/amplitude"], length=0.7
    )
    unit = np.append(np.asarray(unit.weight_sd), 1.0)
    rest = np.log([drawn["f/amplitude"], drawn["c"]])
    rest = rest - np.asarray(guide._rest_start)
    prior = np.array([1.0, 1.0, 1.0, 2.0]) ** -2
    precision = np.diag(prior) + np.outer(unit, unit) * (A @ A.T)
    natural = prior * np.array([0.0, 0.0, 0.0, 0.5]) + unit * (pull + slope @ rest)
    law = dist.MultivariateNormal(np.linalg.solve(precision, natural), precision_matrix=precision)
    value = np.append(drawn["f/z"], drawn["g/level"])
    np.testing.assert_allclose(density, float(law.log_prob(value)), rtol=1e-9)
    assert guide.median(values)["f/z"].shape == (3,)


def observed_by_field(y=None):
    f = LEVEL.register("f")
    sde = nsde.SDE(lambda t, x, p: p(x)[0], lambda t, x, p: SD, params=f)
    x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, init=0.2))
    nsde.observe("y", x, lambda t, x, p: dist.Normal(p(x)[0], NOISE), params=f, obs=y)


def two_paths(y=None):
    f = LEVEL.register("f")
    for name in "ab":
        sde = nsde.SDE(lambda t, x, p: p(x)[0], lambda t, x, p: SD, params=f)
        x = numpyro.sample(name, nsde.SDEPath(sde, TIMES, init=0.2))
        nsde.observe(f"y{name}", x, lambda t, x: dist.Normal(x, NOISE), obs=y)


def without_field(y=None):
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
    sde = nsde.SDE(lambda t, x, p: -p * x, lambda t, x, p: SD, params=rate)
    x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, init=0.2))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, NOISE), obs=y)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (constant_drift, {"noisy": True}, "noise that does not depend on the weights"),
        (observed_by_field, {}, "used in the drift of the one path"),
        (two_paths, {}, "used in the drift of the one path"),
        (without_field, {}, "needs a model with a field"),
    ],
)
def test_what_the_update_cannot_do_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message), handlers.seed(rng_seed=0):
        AutoPathGuide(model, weights="conjugate")(data(1)[0], **options)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="weights must be"):
        AutoPathGuide(constant_drift, weights="exact")
    with pytest.raises(ValueError, match="not both"):
        AutoPathGuide(constant_drift, weights="flow", parameters=AutoFlow)
    svi = SVI(
        constant_drift,
        AutoPathGuide(constant_drift, weights="conjugate"),
        numpyro.optim.Adam(1e-2),
        Trace_ELBO(),
    )
    with pytest.raises(ValueError, match="step_size must be"):
        fit_conjugate(svi, jax.random.key(0), 1, data(1)[0], step_size=0.0)
    with pytest.raises(ValueError, match="num_paths"):
        fit_conjugate(svi, jax.random.key(0), 1, data(1)[0], num_paths=1)
    other = SVI(constant_drift, AutoFlow(constant_drift), svi.optim, svi.loss)
    with pytest.raises(TypeError, match="fit_conjugate needs the guide"):
        fit_conjugate(other, jax.random.key(0), 1, data(1)[0])
