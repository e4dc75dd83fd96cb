"""Paths integrated out: densities against dense Gaussians, every way a model is used, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import Predictive, log_likelihood
from numpyro.infer.util import log_density
from ou_oracle import normal_log_density, ou_moments
from scipy.stats import multivariate_normal

import numpyro_sde as nsde

KALMAN = nsde.filters.Kalman()
TIMES = np.array([0.0, 0.3, 0.35, 1.2, 2.0, 2.1, 4.0])


def ou_model(times, y=None, y2=None, noise=0.1):
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
    sde = nsde.SDE(
        lambda t, x, p: p * (0.5 - x),
        lambda t, x, p: 0.7,
        params=rate,
    )
    x = numpyro.sample("x", nsde.SDEPath(sde, times, init=dist.Normal(0.2, 1.5)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, noise), obs=y)
    if y2 is not None:
        nsde.observe("y2", x, lambda t, x: dist.Normal(2.0 * x + 1.0, 0.3), obs=y2, at=[1, 4])


marginal = nsde.handlers.marginalize(ou_model, method=KALMAN)
Y = np.array([0.3, np.nan, 0.5, 0.1, -0.4, 0.2, 0.9])


def dense_ou(rate, rows, slope, offset, noise):
    """Moments of observations `slope x[rows] + offset + noise`."""
    mean, cov = ou_moments(TIMES, rate, 0.5, 0.7, 0.2, 1.5**2)
    rows = np.asarray(rows)
    cov = np.outer(slope, slope) * cov[np.ix_(rows, rows)] + np.diag(np.square(noise))
    return slope * mean[rows] + offset, cov


@pytest.mark.parametrize("form", ["sequential", "sqrt", "parallel"])
def test_log_prob_equals_the_dense_normal(x64, form):
    model = nsde.handlers.marginalize(ou_model, method=nsde.filters.Kalman(form=form))
    rate = 1.3
    got, _ = log_density(model, (TIMES, Y), {}, {"rate": rate})
    prior = dist.LogNormal(0.0, 1.0).log_prob(rate)
    one = np.ones(7)
    mean, cov = dense_ou(rate, range(7), one, 0.0 * one, 0.1 * one)
    np.testing.assert_allclose(got - prior, normal_log_density(Y, mean, cov), rtol=1e-8)


def test_a_second_instrument_is_conditional_on_the_first(x64):
    y2 = np.array([1.4, 0.3])
    trace = handlers.trace(
        handlers.seed(handlers.substitute(marginal, {"rate": 0.8}), jax.random.key(0))
    ).get_trace(TIMES, Y, y2)
    rows, slope = [*range(7), 1, 4], np.r_[np.ones(7), 2.0, 2.0]
    offset, noise = np.r_[np.zeros(7), 1.0, 1.0], np.r_[0.1 * np.ones(7), 0.3, 0.3]
    mean, cov = dense_ou(0.8, rows, slope, offset, noise)
    both = normal_log_density(np.r_[Y, y2], mean, cov)
    first = normal_log_density(Y, mean[:7], cov[:7, :7])
    site = {name: trace[name]["fn"] for name in ("y", "y2")}
    np.testing.assert_allclose(site["y"].log_prob(Y), first, rtol=1e-8)
    np.testing.assert_allclose(site["y2"].log_prob(y2), both - first, rtol=1e-7)
    for name, data in (("y", Y), ("y2", y2)):
        pointwise = site[name].log_prob_pointwise(data)
        assert pointwise.shape == data.shape
        np.testing.assert_allclose(pointwise.sum(), site[name].log_prob(data), rtol=1e-9)
    assert site["y"].log_prob_pointwise(Y)[1] == 0.0  # missing


def test_increments_are_one_step_ahead_densities(x64):
    law = handlers.trace(
        handlers.seed(handlers.substitute(marginal, {"rate": 0.8}), jax.random.key(0))
    ).get_trace(TIMES, Y)["y"]["fn"]
    one = np.ones(7)
    mean, cov = dense_ou(0.8, range(7), one, 0.0 * one, 0.1 * one)
    upto = [normal_log_density(Y[: k + 1], mean[: k + 1], cov[: k + 1, : k + 1]) for k in range(7)]
    np.testing.assert_allclose(law.log_prob_pointwise(Y), np.diff([0.0, *upto]), atol=1e-9)


def test_vector_linear_sde_with_correlated_noise(x64):
    """d = 2, matrix parameters, multivariate normal emission, components missing."""
    A = np.array([[-1.0, 0.4], [-0.3, -0.5]])
    L = np.array([[0.5, 0.0], [0.3, 0.6]])
    R = np.array([[0.2, 0.05], [0.05, 0.1]])
    P0 = np.array([[1.0, 0.2], [0.2, 0.5]])

    def model(y=None):
        sde = nsde.SDE(
            lambda t, x, p: p["A"] @ x + jnp.array([0.1, 0.0]),
            lambda t, x, p: p["L"],
            params={"A": jnp.asarray(A), "L": jnp.asarray(L)},
            event_dims={"A": 2, "L": 2},
        )
        init = dist.MultivariateNormal(jnp.zeros(2), jnp.asarray(P0))
        x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, init=init))
        emission = lambda t, x: dist.MultivariateNormal(x, jnp.asarray(R))  # noqa: E731
        nsde.observe("y", x, emission, obs=y)

    y = np.random.default_rng(0).normal(size=(7, 2))
    y[2, 0] = y[4] = np.nan
    got, _ = log_density(nsde.handlers.marginalize(model, method=KALMAN), (y,), {}, {})

    import scipy.linalg

    mean, cov = np.zeros((7, 2)), np.zeros((7, 2, 7, 2))
    cov[0, :, 0, :] = P0
    for k, h in enumerate(np.diff(TIMES)):
        block = np.zeros((4, 4))
        block[:2, :2], block[:2, 2:], block[2:, 2:] = -A, L @ L.T, A.T
        e = scipy.linalg.expm(block * h)
        F = e[2:, 2:].T
        Q = F @ e[:2, 2:]
        u = np.zeros((3, 3))
        u[:2, :2], u[:2, 2] = A, [0.1, 0.0]
        mean[k + 1] = F @ mean[k] + scipy.linalg.expm(u * h)[:2, 2]
        cov[k + 1, :, : k + 1] = np.einsum("ij,jkl->ikl", F, cov[k, :, : k + 1])
        cov[: k + 1, :, k + 1] = np.einsum("ikl->kli", cov[k + 1, :, : k + 1])
        cov[k + 1, :, k + 1] = F @ cov[k, :, k] @ F.T + Q
    full = cov.reshape(14, 14) + np.kron(np.eye(7), R)
    want = normal_log_density(y.reshape(-1), mean.reshape(-1), full)
    np.testing.assert_allclose(got, want, rtol=1e-8)


def test_prior_predictive_has_the_marginal_moments():
    """4,000 draws at a fixed rate, seed 0: means and covariances within 4 standard errors."""
    fixed = handlers.substitute(marginal, {"rate": 1.3})
    draws = np.asarray(Predictive(fixed, num_samples=4000)(jax.random.key(0), TIMES)["y"])
    one = np.ones(7)
    mean, cov = dense_ou(1.3, range(7), one, 0.0 * one, 0.1 * one)
    sd = np.sqrt(np.diag(cov))
    np.testing.assert_array_less(np.abs(draws.mean(0) - mean) / (sd / np.sqrt(4000)), 4.0)
    error = np.sqrt((np.outer(sd**2, sd**2) + cov**2) / 4000)
    np.testing.assert_array_less(np.abs(np.cov(draws.T) - cov) / error, 4.0)


@pytest.mark.slow
def test_every_way_to_run_the_model():
    draws = {"rate": jnp.array([0.5, 1.0, 2.0])}
    prior = Predictive(marginal, num_samples=2)(jax.random.key(0), TIMES)
    assert set(prior) == {"rate", "y"}
    assert prior["y"].shape == (2, 7)
    posterior = Predictive(marginal, draws)(jax.random.key(1), TIMES)
    assert posterior["y"].shape == (3, 7)
    for parallel in (False, True):
        terms = log_likelihood(marginal, draws, TIMES, Y, parallel=parallel)["y"]
        assert terms.shape == (3,)
    data = {"y": jnp.asarray(Y)}
    values = {"rate": 1.3}
    want, _ = log_density(marginal, (TIMES, Y), {}, values)
    inside = nsde.handlers.marginalize(handlers.condition(ou_model, data), method=KALMAN)
    for model in (handlers.condition(marginal, data), inside):
        got, trace = log_density(model, (TIMES,), {}, values)
        np.testing.assert_allclose(got, want, rtol=1e-5)
        assert trace["y"]["is_observed"]

    def in_context(times, y):
        with nsde.handlers.marginalize(method=KALMAN):
            ou_model(times, y)

    got, _ = log_density(in_context, (TIMES, Y), {}, values)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.slow
def test_panel_equals_its_series():
    clocks = np.cumsum(np.random.default_rng(0).uniform(0.1, 1.0, (3, 5)), axis=-1)
    y = np.random.default_rng(1).normal(size=(3, 5))
    y[1, 2] = np.nan

    def panel(times, y):
        with numpyro.plate("series", 3):
            rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
            level = numpyro.sample("level", dist.Normal(0.0, 1.0))
            sde = nsde.SDE(lambda t, x, p: -p * x, lambda t, x, p: 0.5, params=rate)
            x = numpyro.sample("x", nsde.SDEPath(sde, times, init=dist.Normal(level, 1.0)))
            emission = lambda t, x, p: dist.Normal(x + p, 0.2)  # noqa: E731
            nsde.observe("y", x, emission, params=level, obs=y)

    def single(times, y, rate, level):
        sde = nsde.SDE(lambda t, x: -rate * x, lambda t, x: 0.5)
        x = numpyro.sample("x", nsde.SDEPath(sde, times, init=dist.Normal(level, 1.0)))
        nsde.observe("y", x, lambda t, x: dist.Normal(x + level, 0.2), obs=y)

    rates, levels = jnp.array([0.5, 1.0, 2.0]), jnp.array([0.1, -0.3, 0.4])
    model = nsde.handlers.marginalize(panel, method=KALMAN)
    trace = handlers.trace(
        handlers.seed(handlers.substitute(model, {"rate": rates, "level": levels}), 0)
    ).get_trace(clocks, y)
    got = trace["y"]["fn"].log_prob(y)
    assert got.shape == (3,)
    one = nsde.handlers.marginalize(single, method=KALMAN)
    want = [log_density(one, (clocks[i], y[i], rates[i], levels[i]), {}, {})[0] for i in range(3)]
    np.testing.assert_allclose(got, jnp.stack(want), rtol=1e-5)


def test_unobserved_paths_stay_latent_and_refined_grids_agree(x64):
    def model(y=None):
        sde = nsde.SDE(lambda t, x: -x, lambda t, x: 0.5)
        hidden = numpyro.sample("hidden", nsde.SDEPath(sde, [0.0, 1.0], dist.Normal(0.0, 1.0)))
        level = numpyro.deterministic("level", hidden[-1])
        x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, dist.Normal(level, 1.0)))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)

    integrated = nsde.handlers.marginalize(model, method=KALMAN)
    trace = handlers.trace(handlers.seed(integrated, 0)).get_trace(Y)
    assert "hidden" in trace
    assert "x" not in trace
    values = {"hidden": jnp.array([0.2, 0.4])}
    want, _ = log_density(integrated, (Y,), {}, values)
    # The exact filter does not depend on the grid, whichever handler is outside.
    values_fine = {"hidden": jnp.array([0.2, 0.3, 0.4])}
    for fine in (
        nsde.handlers.refine(integrated, max_step=0.5),
        nsde.handlers.marginalize(nsde.handlers.refine(model, max_step=0.5), method=KALMAN),
    ):
        trace = handlers.trace(handlers.seed(fine, 0)).get_trace(Y)
        assert trace["hidden"]["value"].shape == (3,)
        got = (
            handlers.trace(handlers.seed(handlers.substitute(fine, values_fine), 0))
            .get_trace(Y)["y"]["fn"]
            .log_prob(Y)
        )
        base = (
            handlers.trace(handlers.seed(handlers.substitute(integrated, values), 0))
            .get_trace(Y)["y"]["fn"]
            .log_prob(Y)
        )
        np.testing.assert_allclose(got, base, rtol=1e-9)
    assert np.isfinite(want)


@pytest.mark.slow
def test_a_chosen_scheme_is_honoured_and_converges(x64):
    """With Euler chosen, the filter is that of the Euler path; refined, it nears the exact one."""
    values = {"rate": 1.3}
    exact, _ = log_density(marginal, (TIMES, Y), {}, values)
    euler = nsde.handlers.discretize(marginal, nsde.schemes.Euler())
    errors = []
    for step in (0.1, 0.05, 0.025):
        got, _ = log_density(nsde.handlers.refine(euler, max_step=step), (TIMES, Y), {}, values)
        errors.append(abs(got - exact))
    slopes = np.diff(np.log2(errors))
    np.testing.assert_allclose(slopes, -1.0, atol=0.2)  # Euler: weak order 1


def test_refine_and_discretize_refuse_to_do_nothing():
    white = handlers.reparam(ou_model, config={"x": nsde.reparam.InnovationReparam()})
    for change in (
        nsde.handlers.refine(white, max_step=0.1),
        nsde.handlers.discretize(white, nsde.schemes.Euler()),
    ):
        with pytest.raises(ValueError, match="saw no SDEPath site"):
            handlers.seed(change, 0)(TIMES)
    inside = handlers.reparam(
        nsde.handlers.refine(ou_model, max_step=0.1),
        config={"x": nsde.reparam.InnovationReparam()},
    )
    trace = handlers.trace(handlers.seed(inside, 0)).get_trace(TIMES)
    assert trace["x"]["value"].shape == (len(nsde.TimeGrid(TIMES, 0.1)),)
    assert trace["y"]["value"].shape == (7,)


def _using(x):
    return [
        lambda: x + 1.0,
        lambda: jnp.sum(x),
        lambda: x[0],
        lambda: x.shape,
        lambda: numpyro.deterministic("d", jnp.exp(x)),
    ]


@pytest.mark.parametrize("use", range(5))
def test_an_integrated_path_has_no_value(use):
    def model(y):
        sde = nsde.SDE(lambda t, x: -x, lambda t, x: 0.5)
        x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 1.0)))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)
        _using(x)[use]()

    with pytest.raises(TypeError, match=r"path 'x' is integrated out by marginalize"):
        handlers.seed(nsde.handlers.marginalize(model, method=KALMAN), 0)(Y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drift": lambda t, x: -(x**3)}, "drift.* is not affine in x"),
        ({"diffusion": lambda t, x: 1.0 + x}, "diffusion.* depends on x"),
        ({"drift": lambda t, x: -t * x**2}, "drift.* is not affine in x"),
        ({"init": dist.Gamma(1.0, 1.0)}, "init must be a normal"),
        ({"emission": lambda t, x: dist.Poisson(jnp.exp(x))}, "statement 1 is not normal"),
        ({"emission": lambda t, x: dist.Normal(x**2, 1.0)}, "mean of the emission .* not affine"),
        (
            {"emission": lambda t, x: dist.Normal(x, jnp.exp(x))},
            "covariance of the emission .* depends on x",
        ),
        ({"scheme": nsde.schemes.Euler(), "drift": lambda t, x: -(x**3)}, "transition of Euler"),
    ],
)
def test_kalman_refuses_what_is_not_linear_gaussian(change, message):
    parts = {
        "drift": lambda t, x: -x,
        "diffusion": lambda t, x: 0.5,
        "init": dist.Normal(0.0, 1.0),
        "emission": lambda t, x: dist.Normal(x, 0.1),
        "scheme": None,
    } | change

    def model(y):
        sde = nsde.SDE(parts["drift"], parts["diffusion"])
        path = nsde.SDEPath(sde, TIMES, parts["init"], scheme=parts["scheme"])
        nsde.observe("y", numpyro.sample("x", path), parts["emission"], obs=y)

    with pytest.raises(ValueError, match=message):
        log_density(nsde.handlers.marginalize(model, method=KALMAN), (np.ones(7),), {}, {})


def test_bad_arguments_of_marginalize():
    with pytest.raises(TypeError, match=r"call it, method=Kalman\(\)"):
        nsde.handlers.marginalize(ou_model, method=nsde.filters.Kalman)
    with pytest.raises(TypeError, match="sites must be a list"):
        nsde.handlers.marginalize(ou_model, method=KALMAN, sites="x")
    with pytest.raises(ValueError, match="site 'rate' in sites is a LogNormal"):
        handlers.seed(nsde.handlers.marginalize(ou_model, method=KALMAN, sites=["rate"]), 0)(TIMES)
    with pytest.raises(ValueError, match="conditioned on outside"):
        handlers.seed(handlers.condition(marginal, {"x": jnp.zeros(7)}), 0)(TIMES)


def test_smooth_draws_the_conditional_path():
    """8,000 draws at one rate, seed 0: moments within 4 standard errors of the dense normal."""
    num = 8000
    draws = nsde.smooth(
        ou_model,
        {"rate": jnp.full(num, 1.3)},
        TIMES,
        Y,
        method=KALMAN,
        rng_key=jax.random.key(0),
        batch_size=2000,
    )["x"]
    later = np.array([0.35, 3.0, 4.0, 5.0])
    ahead = nsde.smooth(
        marginal,
        {"rate": jnp.full(num, 1.3)},
        TIMES,
        Y,
        rng_key=jax.random.key(1),
        times=later,
        batch_size=2000,
    )["x"]
    times = np.unique(np.r_[TIMES, later])
    mean, cov = ou_moments(times, 1.3, 0.5, 0.7, 0.2, 1.5**2)
    rows = np.searchsorted(times, TIMES)[~np.isnan(Y)]
    gain = np.linalg.solve(cov[np.ix_(rows, rows)] + 0.01 * np.eye(rows.size), cov[rows]).T
    mean = mean + gain @ (Y[~np.isnan(Y)] - mean[rows])
    cov = cov - gain @ cov[rows]
    for got, at in ((draws, TIMES), (ahead, later)):
        got = np.asarray(got, dtype=np.float64)
        index = np.searchsorted(times, at)
        m, c = mean[index], cov[np.ix_(index, index)]
        sd = np.sqrt(np.diag(c))
        np.testing.assert_array_less(np.abs(got.mean(0) - m) / (sd / np.sqrt(num)), 4.0)
        error = np.sqrt((np.outer(sd**2, sd**2) + c**2) / num)
        np.testing.assert_array_less(np.abs(np.cov(got.T) - c) / error, 4.0)


def test_bad_arguments_of_smooth():
    draws, key = {"rate": jnp.ones(2)}, jax.random.key(0)
    with pytest.raises(ValueError, match="'y' has no data"):
        nsde.smooth(ou_model, draws, TIMES, method=KALMAN, rng_key=key)
    with pytest.raises(TypeError, match=r"method must be one of nsde\.filters"):
        nsde.smooth(ou_model, draws, TIMES, Y, rng_key=key)
    with pytest.raises(ValueError, match="before the path does"):
        nsde.smooth(ou_model, draws, TIMES, Y, method=KALMAN, rng_key=key, times=[-1.0])
    with pytest.raises(ValueError, match="no latent SDEPath site"):
        nsde.smooth(lambda: None, draws, method=KALMAN, rng_key=key)


def test_filter_path_equals_the_dense_normal(x64):
    """A batch of two rates: log likelihood, filtered and smoothed moments."""
    rates = jnp.array([0.8, 1.3])
    sde = nsde.SDE(lambda t, x, p: p * (0.5 - x), lambda t, x, p: 0.7, params=rates)
    path = nsde.SDEPath(sde, TIMES, init=dist.Normal(0.2, 1.5))
    emission = lambda t, x: dist.Normal(x, 0.1)  # noqa: E731
    both = nsde.filter_path(path, emission, Y, method=KALMAN)
    one = jax.tree.map(lambda a: a[1] if jnp.ndim(a) and a.shape[0] == 2 else a, both)
    mean, cov = ou_moments(TIMES, 1.3, 0.5, 0.7, 0.2, 1.5**2)
    rows = np.flatnonzero(~np.isnan(Y))
    observed = cov[np.ix_(rows, rows)] + 0.01 * np.eye(rows.size)
    want = normal_log_density(Y, mean, cov + 0.01 * np.eye(7))
    np.testing.assert_allclose(one.log_likelihood, want, rtol=1e-8)
    gain = np.linalg.solve(observed, cov[rows]).T
    smoothed_mean, smoothed_cov = one.smooth()
    np.testing.assert_allclose(smoothed_mean[:, 0], mean + gain @ (Y[rows] - mean[rows]), rtol=1e-8)
    np.testing.assert_allclose(smoothed_cov[:, 0, 0], np.diag(cov - gain @ cov[rows]), rtol=1e-8)
    last = one.mean[-1, 0], one.cov[-1, 0, 0]
    np.testing.assert_allclose(last, (smoothed_mean[-1, 0], smoothed_cov[-1, 0, 0]), rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("guided", [False, True])
def test_a_mask_known_only_in_a_trace_refuses_with_the_reason(guided):
    """A path masked out where its data are not: the compiled program says so when it runs."""

    def model(keep):
        with numpyro.plate("series", 2):
            sde = nsde.SDE(lambda t, x: -x, lambda t, x: 0.5)
            with numpyro.handlers.mask(mask=keep):
                x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 1.0)))
            nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=np.stack([Y, Y]))

    values = {}
    treated = nsde.handlers.marginalize(model, method=KALMAN)
    if guided:
        treated = numpyro.handlers.reparam(model, config={"x": nsde.reparam.GuidedReparam()})
        values = {"x_innov": jnp.zeros((2, len(TIMES) - 1)), "x_init_innov": jnp.zeros(2)}
    density = jax.jit(lambda keep: log_density(treated, (keep,), {}, values)[0])
    whole = log_density(treated, (np.array([True, True]),), {}, values)[0]
    np.testing.assert_allclose(density(jnp.array([True, True])), whole, rtol=1e-5)
    kinds = (jax.errors.JaxRuntimeError, ValueError)  # as the version of JAX has it
    with pytest.raises(kinds, match=r"masked out by handlers\.mask"):
        density(jnp.array([True, False])).block_until_ready()


def test_inputs_of_an_emission_on_equal_steps():
    """One transition for all steps, an emission for each time: an offset, taken off the data."""
    rng = np.random.default_rng(0)
    y, offset = rng.normal(size=(2, 3, 6))

    def model(y, offset):
        with numpyro.plate("series", 3):
            ou = nsde.processes.OrnsteinUhlenbeck(1.0, 0.0, 0.5)
            x = numpyro.sample("x", nsde.SDEPath(ou, 0.1 * np.arange(6), dist.Normal(0.0, 0.4)))
            nsde.observe("y", x, lambda t, x, u: dist.Normal(x + u, 0.2), inputs=offset, obs=y)

    marginal = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())
    given, taken_off = (
        log_density(marginal, args, {}, {})[0] for args in ((y, offset), (y - offset, 0.0 * offset))
    )
    times = 0.1 * np.arange(6)
    lag = times[:, None] - times
    # From a start of variance 0.16: what is left of it, and what the noise added since.
    both = np.exp(-times[:, None] - times)
    cov = 0.16 * both + 0.125 * (np.exp(-np.abs(lag)) - both) + 0.04 * np.eye(6)
    expected = multivariate_normal(np.zeros(6), cov).logpdf(y - offset).sum()
    np.testing.assert_allclose([given, taken_off], expected, rtol=1e-5)
