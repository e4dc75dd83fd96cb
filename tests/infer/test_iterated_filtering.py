"""Iterated filtering: maxima known in closed form, profiles, panels, resuming, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.util import log_density
from scipy.optimize import minimize, minimize_scalar

import numpyro_sde as nsde
from numpyro_sde.infer.likelihood_fit import log_mean_exp
from numpyro_sde.infer.parameter_space import ParameterSpace

TIMES = 0.5 * np.arange(40)


def model(y=None):
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    ou = nsde.processes.OrnsteinUhlenbeck(rate, 0.0, scale)
    x = numpyro.sample("x", nsde.SDEPath(ou, TIMES, dist.Normal(0.0, 1.0)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)


@pytest.fixture(scope="module")
def y():
    given = numpyro.handlers.condition(model, {"rate": 1.0, "scale": 1.0})
    with jax.enable_x64(True):
        return np.array(numpyro.infer.Predictive(given, num_samples=1)(jax.random.key(3))["y"][0])


def exact_log_likelihood(y):
    """Of log rate and log scale, by the Kalman filter."""
    marginal = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())

    def value(u):
        rate, scale = jnp.exp(u)
        at = {"rate": rate, "scale": scale}
        prior = sum(dist.LogNormal(0.0, 0.5).log_prob(v) for v in (rate, scale))
        return log_density(marginal, (y,), {}, at)[0] - prior

    return jax.jit(jax.value_and_grad(value))


def search(**options):
    given = {"num_iterations": 80, "num_starts": 6, "perturbation": 0.1, "cooling": 0.2, **options}
    return nsde.infer.IteratedFiltering(model, 300, progress_bar=False, **given)


@pytest.mark.slow
def test_the_maximum_of_a_linear_model_and_its_profile(x64, y):
    value = exact_log_likelihood(y)

    def negative(u):
        v, slope = value(jnp.asarray(u))
        return -float(v), -np.asarray(slope)

    exact = minimize(negative, np.zeros(2), jac=True)
    fit = search().run(jax.random.key(0), y)
    found = np.log(np.stack([fit.starts["rate"], fit.starts["scale"]], axis=1))
    error = found.std(0, ddof=1) / np.sqrt(len(found))
    assert np.all(error < 0.15)
    assert np.all(np.abs(found.mean(0) - exact.x) < 4.0 * error)
    # What it says of the likelihood there is what the Kalman filter says.
    best = np.log([fit.params["rate"], fit.params["scale"]])
    assert abs(fit.log_likelihood + negative(best)[0]) < 4.0 * fit.standard_error
    assert -exact.fun - 0.5 < -negative(best)[0] <= -exact.fun
    assert fit.trace["rate"].shape == (81, 6)
    assert fit.trace_log_likelihood.shape == (80, 6)

    grid = np.exp(np.linspace(-1.8, 1.6, 18))
    profile = search(num_iterations=50).profile(jax.random.key(1), fit, "rate", grid, num_starts=1)
    np.testing.assert_allclose(profile.estimates["rate"], grid, rtol=1e-12)
    fine = np.exp(np.linspace(-1.8, 1.6, 200))
    height = [
        -minimize_scalar(
            lambda s, r=r: negative([np.log(r), s])[0], bounds=(-2, 2), method="bounded"
        ).fun
        for r in fine
    ]
    inside = fine[np.array(height) > np.max(height) - 1.92]
    # The adjusted interval covers the exact one but for the smoothing's bias.
    assert profile.interval[0] < inside[0] + 0.15
    assert profile.interval[1] > inside[-1] - 0.15
    assert profile.interval[1] < 2.0 * inside[-1]
    assert "rate" in str(profile)
    assert "best of 6 starts" in str(fit)


@pytest.mark.slow
def test_resuming_goes_on(x64, y):
    short = search(num_iterations=2, num_starts=2)
    fit = short.run(jax.random.key(0), y)
    more = short.resume(jax.random.key(1), fit, 3)
    assert more.num_iterations == 5
    assert more.trace["rate"].shape == (6, 2)
    np.testing.assert_array_equal(more.trace["rate"][:3], fit.trace["rate"])
    again = short.resume(jax.random.key(1), fit, 3)
    np.testing.assert_array_equal(again.params["rate"], more.params["rate"])
    # A single start, and parameters that are held.
    held = search(num_iterations=2, perturbation={"rate": 0.0, "scale": 0.1})
    one = held.run(jax.random.key(0), y, init_params={"rate": 0.7, "scale": 1.0})
    np.testing.assert_allclose(one.starts["rate"], [0.7])
    assert one.starts["scale"] != 1.0
    value, error = held.log_likelihood(jax.random.key(2), one.params, y)
    assert abs(value - one.log_likelihood) < 4.0 * np.hypot(error, one.standard_error)


def panel(y=None, extra=None):
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with numpyro.plate("series", 3):
        mean = numpyro.sample("mean", dist.Normal(0.0, 3.0))
        ou = nsde.processes.OrnsteinUhlenbeck(2.0, mean, scale)
        x = numpyro.sample("x", nsde.SDEPath(ou, TIMES[:20], dist.Normal(0.0, 1.0)))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)
    numpyro.sample("extra", dist.Normal(scale, 0.01), obs=extra)


@pytest.mark.slow
def test_a_panel_with_parameters_of_its_series(x64):
    truth = {"scale": 0.8, "mean": jnp.array([-2.0, 0.0, 3.0])}
    given = numpyro.handlers.condition(panel, truth)
    y = np.array(numpyro.infer.Predictive(given, num_samples=1)(jax.random.key(0))["y"][0])
    space = ParameterSpace(panel, (y, 0.8), {})
    np.testing.assert_array_equal(space.belonging("x", (1,)), [False, True, False, True])
    fit = nsde.infer.IteratedFiltering(
        panel, 200, num_iterations=30, num_starts=4, perturbation=0.05, progress_bar=False
    ).run(jax.random.key(1), y, 0.8)
    # Each series' mean is near that of its data; the other datum holds the scale near 0.8.
    found, error = fit.starts["mean"].mean(0), fit.starts["mean"].std(0, ddof=1) / 2.0
    assert np.all(np.abs(found - y[:, 4:].mean(1)) < 0.3 + 4.0 * error)
    assert abs(fit.params["scale"] - 0.8) < 0.05


@pytest.mark.slow
def test_counts_and_parameters_of_the_start(x64):
    def epidemic(y=None):
        beta = numpyro.sample("beta", dist.LogNormal(0.5, 0.3))
        first = numpyro.sample("first", dist.LogNormal(2.0, 0.3))
        net = nsde.ReactionNetwork(
            [[1, 0], [1, 1]], [[0, 0], [2, 0]], jnp.stack([beta / 200, jnp.asarray(0.5)])
        )
        start = dist.Independent(dist.Poisson(jnp.stack([jnp.asarray(200.0), first])), 1)
        x = numpyro.sample(
            "x",
            nsde.ReactionPath(net, np.arange(9.0), start, law=nsde.laws.EulerMultinomial(4)),
        )
        nsde.observe("y", x, lambda t, x: dist.Poisson(0.5 * x[1] + 1e-3), obs=y)

    given = numpyro.handlers.condition(epidemic, {"beta": 1.8, "first": 8.0})
    y = np.array(numpyro.infer.Predictive(given, num_samples=1)(jax.random.key(0))["y"][0])
    kernel = nsde.infer.IteratedFiltering(
        epidemic,
        200,
        num_iterations=20,
        num_starts=3,
        perturbation={"first": 0.1, "beta": 0.03},
        initial=["first"],
        num_replicates=4,
        progress_bar=False,
    )
    fit = kernel.run(jax.random.key(1), y)
    at_truth, error = kernel.log_likelihood(jax.random.key(2), {"beta": 1.8, "first": 8.0}, y)
    assert fit.log_likelihood > at_truth - 4.0 * np.hypot(error, fit.standard_error)
    assert np.isfinite(fit.log_likelihood)


def test_adjusted_intervals_of_a_noisy_quadratic():
    rng = np.random.default_rng(0)
    x, covered, widths = np.linspace(-4.0, 4.0, 33), 0, []
    for _ in range(100):
        # The maximum varies as an estimate does: the interval covers 0 in 95 of 100 cases.
        centre = rng.normal()
        found = nsde.infer.adjusted_profile(
            x, -0.5 * (x - centre) ** 2 + 0.5 * rng.normal(size=x.size)
        )
        covered += found.interval[0] <= 0.0 <= found.interval[1]
        widths.append(found.monte_carlo_error)
    assert 100 * 0.95 - 4.0 * np.sqrt(100 * 0.95 * 0.05) <= covered
    assert 0.03 < np.mean(widths) < 0.3
    quiet = nsde.infer.adjusted_profile(x, -0.5 * x**2)
    np.testing.assert_allclose(quiet.interval, (-1.96, 1.96), atol=0.02)
    np.testing.assert_allclose(quiet.standard_error, 1.0, rtol=1e-6)


def test_log_mean_exp():
    value, error = log_mean_exp(np.array([0.0, 0.0, 0.0]))
    assert value == 0.0
    assert error == 0.0
    assert log_mean_exp(np.array([-np.inf, -np.inf])) == (-np.inf, np.inf)


def hierarchy(y=None):
    level = numpyro.sample("level", dist.Normal(0.0, 1.0))
    own = numpyro.sample("own", dist.Normal(level, 1.0))
    ou = nsde.processes.OrnsteinUhlenbeck(1.0, own, 1.0)
    x = numpyro.sample("x", nsde.SDEPath(ou, TIMES, dist.Normal(0.0, 1.0)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)


def seen_exactly(y=None):
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
    ou = nsde.processes.OrnsteinUhlenbeck(1.0, 0.0, scale)
    x = numpyro.sample("x", nsde.SDEPath(ou, TIMES, dist.Normal(0.0, 1.0)))
    nsde.observe("y", x, lambda t, x: dist.Delta(x), obs=y)


def no_path(y=None):
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(0.0, scale), obs=y)


def discrete(y=None):
    regime = numpyro.sample("regime", dist.Bernoulli(0.5))
    ou = nsde.processes.OrnsteinUhlenbeck(1.0, 1.0 * regime, 1.0)
    x = numpyro.sample("x", nsde.SDEPath(ou, TIMES, dist.Normal(0.0, 1.0)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)


@pytest.mark.parametrize(
    ("statement", "options", "message"),
    [
        (hierarchy, {}, "law of site 'own' depends on site 'level'"),
        (seen_exactly, {}, "exactly"),
        (no_path, {}, "no latent SDEPath"),
        (discrete, {}, "'regime' is discrete"),
        (model, {"initial": ["start"]}, "name \\['start'\\]"),
        (model, {"perturbation": {"x": 0.1}}, "name \\['x'\\]"),
    ],
)
def test_models_that_are_refused(y, statement, options, message):
    kernel = nsde.infer.IteratedFiltering(statement, 10, progress_bar=False, **options)
    with pytest.raises(ValueError, match=message):
        kernel.run(jax.random.key(0), y)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_iterations": 0}, ValueError, "num_iterations"),
        ({"num_starts": 2.0}, TypeError, "num_starts"),
        ({"cooling": 0.0}, ValueError, "cooling"),
        ({"perturbation": -0.1}, ValueError, "perturbation"),
        ({"initial": "rate"}, TypeError, "list of names"),
        ({"num_replicates": 1}, ValueError, "num_replicates"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        nsde.infer.IteratedFiltering(model, **options)


def test_wrong_starts_and_sites(y):
    kernel = search(num_iterations=1)
    with pytest.raises(ValueError, match="must give the parameters"):
        kernel.run(jax.random.key(0), y, init_params={"rate": 1.0})
    with pytest.raises(ValueError, match="outside"):
        kernel.run(jax.random.key(0), y, init_params={"rate": -1.0, "scale": 1.0})
    with pytest.raises(TypeError, match="model inside"):
        nsde.infer.IteratedFiltering(nsde.handlers.marginalize(model, method=nsde.filters.Kalman()))


def test_a_maximum_beside_a_posterior(x64):
    rng = np.random.default_rng(0)
    space = ParameterSpace(model, (np.zeros(40),), {})
    point = np.asarray(space.flat({"rate": 1.0, "scale": 0.9}))[None]
    fit = nsde.infer.LikelihoodFit.of(
        space,
        np.array([-60.0]),
        np.array([0.2]),
        [point],
        [np.array([-60.1])],
        point[:, :, None],
        0,
    )
    grid = np.linspace(0.6, 1.4, 15)
    profile = nsde.infer.Profile("rate", grid, -50.0 * (grid - 1.0) ** 2, np.zeros(15), {}, 0.95)
    posterior = {"rate": rng.normal(1.1, 0.1, 2000), "scale": rng.normal(0.5, 0.1, 2000)}
    table = nsde.diagnostics.compare_fits(
        {"NUTS": posterior, "IF2": fit.with_profiles(profile)}, model=None
    )
    row = table.parameters.loc[("rate", "IF2")]
    np.testing.assert_allclose([row["mean"], row["sd"]], [1.0, 0.1], rtol=1e-6)
    np.testing.assert_allclose(row["difference"], 1.0, rtol=0.1)
    assert np.isnan(table.parameters.loc[("scale", "IF2"), "sd"])
    assert table.fits.loc["IF2", "log_likelihood"] == -60.0
    verdict = table.verdicts["IF2"]
    assert "log likelihood -60.00 (se 0.20)" in verdict
    assert "rate (0.80" in verdict
    assert "away from the mean of NUTS: scale (4" in verdict
    assert "maximum likelihood" in str(table)
    alone = nsde.diagnostics.compare_fits({"IF2": fit, "NUTS": posterior})
    assert np.isnan(alone.parameters.loc[("rate", "NUTS"), "distance"])
