"""Fractional noise made Markov: its fit, and every engine on an SDE that it drives."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.util import log_density
from scipy.linalg import cholesky, solve_triangular, toeplitz

import numpyro_sde as nsde
from numpyro_sde.distributions import FractionalBrownianMotion, FractionalOrnsteinUhlenbeck
from numpyro_sde.noise import MarkovFBM
from numpyro_sde.noise.markov_fbm import law_fit
from numpyro_sde.noise.strong_fit import strong_nodes, strong_system, strong_weights

REFERENCE = json.loads((Path(__file__).parents[1] / "fbm_reference.json").read_text())
INDICES = (0.05, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 0.95)


def _fgn(hurst, length):
    k = np.arange(length, dtype=float)
    e = 2 * hurst
    return 0.5 * ((k + 1) ** e - 2 * k**e + np.abs(k - 1) ** e)


def _autocovariance_of(bank, steps, length):
    """Of the approximation's increments over equal steps, in float64 from its steps."""
    start = np.asarray(bank.start, float)
    decay, loading, variance, gain, _ = (np.asarray(a, float)[0] for a in steps)
    k = np.arange(1, length)
    kept = decay * (start @ loading) + gain
    later = (decay ** (k[:, None] - 1)) @ (loading * kept)
    return np.concatenate([[loading @ start @ loading + variance], later])


def _divergence(autocovariance, hurst):
    """Kullback-Leibler divergence of the approximation from exact fGn, nats."""
    n = len(autocovariance)
    ours = cholesky(toeplitz(autocovariance), lower=True)
    exact = cholesky(toeplitz(_fgn(hurst, n)), lower=True)
    ratio = solve_triangular(ours, exact, lower=True)
    log_det = np.log(np.diag(ours)).sum() - np.log(np.diag(exact)).sum()
    return 0.5 * ((ratio**2).sum() - n) + log_det


@pytest.mark.parametrize(
    ("num_terms", "bound"), [(8, 1e-3), pytest.param(12, 1e-4, marks=pytest.mark.slow)]
)
def test_divergence_from_the_exact_law(num_terms, bound, x64):
    fit = jax.jit(lambda h: MarkovFBM(h, num_terms).on_grid(np.arange(1001.0), np.ones(1000)))
    for hurst in INDICES:
        got = _divergence(_autocovariance_of(*fit(hurst), 1000), hurst)
        assert 0 <= got + 1e-10 < bound


@pytest.mark.slow
def test_divergence_in_float32():
    fit = jax.jit(lambda h: MarkovFBM(h).on_grid(np.arange(1001.0), np.ones(1000)))
    for hurst in (0.05, 0.4, 0.75, 0.95):
        assert _divergence(_autocovariance_of(*fit(hurst), 1000), hurst) < 1e-3


def test_weights_of_the_reference(x64):
    """Without the white term the fit for H < 1/2 is the reference's, negative weights and all."""
    for name, cell in REFERENCE["law_fit_weights"].items():
        hurst, wanted = float(name), np.array(cell["d"])
        rough = hurst < 0.5
        fit = law_fit(hurst, 1000.0, 8, rough=rough, with_white=not rough)
        np.testing.assert_allclose(fit.rates, cell["gamma_dt"], rtol=1e-12)
        got = np.append(fit.weights, fit.white)[: len(wanted)]
        # In units of what each term adds to the variance of an increment, which is 1.
        g = np.array(cell["gamma_dt"])
        share = -np.expm1(-g) if rough else np.append(2 * (g - 1 + np.exp(-g)), 1.0)
        np.testing.assert_allclose(
            got * share, wanted * share, atol=1e-10, rtol=1e-10 if rough else 0
        )
        assert float(fit.slope) == pytest.approx(cell["slope_var"], abs=1e-10)


@pytest.mark.slow
def test_weights_are_positive_and_meet_at_one_half(x64):
    for hurst in (0.05, 0.3, 0.45, 0.499):
        assert np.all(np.asarray(law_fit(hurst, 1000.0, 8, rough=True).weights) > 0)
    below, above = (
        _autocovariance_of(*MarkovFBM(h).on_grid(np.arange(51.0), np.ones(50)), 50)
        for h in (0.5 - 1e-9, 0.5 + 1e-9)
    )
    np.testing.assert_allclose(below, above, atol=1e-7)


@pytest.mark.slow
def test_strong_system_and_weights_of_the_reference(x64):
    for row in REFERENCE["strong_system"]:
        rates = jnp.asarray(row["gamma"])
        args = (rates, row["H"], float(row["T"]), row["type"])
        system = strong_system(*args)
        np.testing.assert_allclose(system.A, row["A"], rtol=1e-14)
        scale = np.abs(row["b"]).max()  # b changes its sign
        np.testing.assert_allclose(system.b, row["b"], rtol=1e-14, atol=1e-15 * scale)
        assert float(system.c) == pytest.approx(row["c"], rel=1e-12)
        weights = np.asarray(strong_weights(*args))
        # Where the condition is 8e6 the reference's own entries, rounded to float64 and solved
        # in rational arithmetic, give its weights to 1.5e-10 of the largest.
        largest = np.abs(row["omega"]).max()
        near = 1e-9 if np.linalg.cond(system.A) > 1e6 else 1e-12
        np.testing.assert_allclose(weights, row["omega"], rtol=0, atol=near * largest)
        # As a path, against the noise itself:
        rest = weights - np.array(row["omega"])
        assert np.sqrt(rest @ np.asarray(system.A) @ rest / float(system.c)) < 1e-10
        rms = np.sqrt((system.c - system.b @ weights) / system.c)
        assert float(rms) == pytest.approx(row["rel_rms"], rel=1e-6)


@pytest.mark.slow
def test_strong_fit_has_the_variance_of_its_kind(x64):
    """Relative error of the path over the horizon with K = 8."""
    bounds = {(1, 0.1): 0.14, (1, 0.75): 0.045, (1, 0.9): 0.18, (2, 0.1): 0.11, (2, 0.9): 0.005}
    for (kind, hurst), bound in bounds.items():
        system = strong_system(strong_nodes(hurst, 8, kind), hurst, 1.0, kind)
        weights = strong_weights(strong_nodes(hurst, 8, kind), hurst, 1.0, kind)
        assert np.sqrt((system.c - system.b @ weights) / system.c) < bound
    times = np.linspace(0.05, 3.0, 60)
    for kind, hurst in ((1, 0.3), (2, 0.3), (2, 0.8)):
        noise = MarkovFBM(hurst, 10, kind=kind, fit="strong")
        sde = nsde.SDE(lambda t, x: 0.0 * x, lambda t, x: 1.0, noise=noise)
        path = nsde.SDEPath(sde, np.concatenate([[0.0], times]), init=0.0)
        ends = path.forward(0.0, np.eye(60)) - path.forward(0.0, np.zeros((60, 60)))
        variance = (np.asarray(ends)[:, 1:] ** 2).sum(0)
        exact = np.asarray(FractionalBrownianMotion(times, hurst, kind=kind).variance)
        np.testing.assert_allclose(variance[20:], exact[20:], rtol=0.06)


@pytest.mark.slow
def test_gradients_are_finite_in_float32():
    def summed(hurst, horizon):
        bank = MarkovFBM(hurst).bank(horizon, 1.0)
        steps = bank.steps(jnp.ones(1))
        return sum(jnp.sum(leaf) for leaf in (*bank, *steps))

    slope = jax.jit(jax.grad(summed))
    for horizon in (10.0, 1e3, 1e6):
        for hurst in np.linspace(0.02, 0.98, 25):
            assert np.isfinite(slope(jnp.float32(hurst), horizon)), (hurst, horizon)


def _walk(hurst, scale=1.0, **kwargs):
    noise = MarkovFBM(hurst, **kwargs)
    return nsde.SDE(lambda t, x, p: 0.0 * x, lambda t, x, p: p, params=scale, noise=noise)


@pytest.mark.slow
def test_path_density_is_near_the_exact_one(x64):
    times = np.arange(301) * 0.02
    for hurst in (0.1, 0.7):
        x = FractionalBrownianMotion(times, hurst, 1.3).sample(jax.random.key(1))
        path = nsde.SDEPath(_walk(hurst, 1.3, num_terms=12), times, init=0.0)
        exact = float(FractionalBrownianMotion(times, hurst, 1.3).log_prob(x))
        assert float(path.log_prob(x)) == pytest.approx(exact, abs=0.01)
        assert float(path.log_prob_pointwise(x).sum()) == pytest.approx(float(path.log_prob(x)))
        start, z = path.inverse(x)
        np.testing.assert_allclose(path.forward(start, z), x, atol=1e-12)


@pytest.mark.slow
def test_irregular_times_and_components(x64):
    """Two independent components at irregular times, against the approximation's own covariance."""
    times = np.cumsum(np.random.default_rng(3).uniform(0.1, 0.5, 12))
    noise = MarkovFBM(0.3, 6)
    sde = nsde.SDE(lambda t, x: -0.5 * x, lambda t, x: jnp.array([0.5, 2.0]), noise=noise)
    path = nsde.SDEPath(sde, times, init=jnp.zeros(2))
    basis = path.forward(jnp.zeros((22, 2)), np.eye(22).reshape(22, 11, 2)).reshape(22, 24)
    cov = np.asarray(basis).T @ np.asarray(basis)
    keep = np.arange(2, 24)
    x = path.sample(jax.random.key(0))
    expected = dist.MultivariateNormal(jnp.zeros(22), cov[np.ix_(keep, keep)]).log_prob(
        x.ravel()[2:]
    )
    assert float(path.log_prob(x)) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.slow
def test_batches_of_hurst_indices(x64):
    times, hurst = np.arange(40) * 0.1, jnp.array([0.2, 0.5, 0.8])
    path = nsde.SDEPath(_walk(hurst), times, init=0.0)
    x = path.sample(jax.random.key(0))
    assert x.shape == (3, 40)
    each = [
        float(nsde.SDEPath(_walk(h), times, init=0.0).log_prob(v))
        for h, v in zip(hurst, x, strict=True)
    ]
    np.testing.assert_allclose(path.log_prob(x), each, rtol=1e-10)


def _noisy(times, hurst, rate=0.7, noise=0.1, scheme=None):
    def model(y=None):
        sde = nsde.SDE(
            lambda t, x, p: -p * x, lambda t, x, p: 0.8, params=rate, noise=MarkovFBM(hurst, 10)
        )
        path = nsde.SDEPath(sde, times, init=0.0, scheme=scheme)
        x = numpyro.sample("x", path)
        nsde.observe("y", x, lambda t, x: dist.Normal(x, noise), obs=y)

    return model


def _exact_evidence(times, hurst, y, rate=0.7, noise=0.1):
    law = FractionalOrnsteinUhlenbeck(times[1:], hurst, rate, 0.8, start="zero")
    cov = np.asarray(law.covariance_matrix) + noise**2 * np.eye(len(times) - 1)
    rest = dist.MultivariateNormal(jnp.zeros(len(times) - 1), cov).log_prob(y[1:])
    return float(rest + dist.Normal(0.0, noise).log_prob(y[0]))


@pytest.mark.slow
def test_kalman_gives_the_evidence_of_fractional_ou(x64):
    times = np.arange(121) * 0.05
    for hurst in (0.2, 0.8):
        law = FractionalOrnsteinUhlenbeck(times, hurst, 0.7, 0.8, start="zero")
        y = np.asarray(law.sample(jax.random.key(2))) + 0.1 * np.random.default_rng(0).normal(
            size=121
        )
        model = nsde.handlers.marginalize(_noisy(times, hurst), method=nsde.filters.Kalman())
        got = log_density(model, (y,), {}, {})[0]
        assert float(got) == pytest.approx(_exact_evidence(times, hurst, y), abs=0.02)


def test_smoothing_variances_of_the_reference_bridges(x64):
    """Within 0.5 % of exact, log evidence within 0.01, in all 27 cells (200 steps)."""
    grid = nsde.TimeGrid([0.0, 0.25, 0.5, 1.0, 1.5, 2.0], max_step=0.01)

    @jax.jit
    def bridge(hurst, rate):
        sde = nsde.SDE(
            lambda t, x, p: -p * x, lambda t, x, p: 1.0, params=rate, noise=MarkovFBM(hurst)
        )
        result = nsde.filter_path(
            nsde.SDEPath(sde, grid, init=0.0),
            lambda t, x: dist.Normal(x, 0.1),
            np.array([0.0]),
            at=grid.index[-1:],
            method=nsde.filters.Kalman(),
        )
        return result.smooth()[1][grid.index[1:], 0, 0], result.log_likelihood

    for name, cell in REFERENCE["bridge"].items():
        variance, evidence = bridge(
            *(float(part[1 + k :]) for k, part in enumerate(name.split("_")))
        )
        np.testing.assert_allclose(variance, cell["exact_var"], rtol=5e-3)
        assert float(evidence) == pytest.approx(cell["exact_logev"], abs=0.01)


@pytest.mark.slow
def test_prior_draws_of_the_marginal_model_follow_its_density(x64):
    """Under the law -2 log p + const of y is chi-squared: 500 draws of 30 times."""
    times = np.concatenate([[0.0], np.cumsum(np.random.default_rng(0).uniform(0.2, 0.6, 30))])
    model = nsde.handlers.marginalize(_noisy(times, 0.25), method=nsde.filters.Kalman())
    sites = numpyro.handlers.trace(numpyro.handlers.seed(model, 0)).get_trace()
    law = sites["y"]["fn"]
    draws = law.sample(jax.random.key(1), (500,))
    squares = 2 * (law.log_prob(jnp.zeros(31)) - law.log_prob(draws)).sum()
    assert abs(float(squares) - 500 * 31) < 4 * np.sqrt(2 * 500 * 31)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["extended", "unscented", "Kalman on the grid"])
def test_filters_agree_on_a_linear_model(method, x64):
    """On the scheme's own law all Gaussian filters are exact; compare with the dense one."""
    times = np.arange(31) * 0.1
    path = nsde.SDEPath(
        nsde.SDE(lambda t, x: -0.7 * x, lambda t, x: 0.8, noise=MarkovFBM(0.3, 6)), times, init=0.0
    )
    basis = np.asarray(path.forward(jnp.zeros(30), np.eye(30)))
    cov = basis.T @ basis + 0.01 * np.eye(31)
    y = np.random.default_rng(1).normal(size=31) * 0.3
    expected = float(dist.MultivariateNormal(jnp.zeros(31), cov).log_prob(y))
    filters = {
        "extended": nsde.filters.ExtendedKalman(),
        "unscented": nsde.filters.UnscentedKalman(),
        "Kalman on the grid": nsde.filters.Kalman(),
    }
    if method == "Kalman on the grid":
        path = path.replace(scheme=nsde.schemes.Euler())
    got = nsde.filter_path(path, lambda t, x: dist.Normal(x, 0.1), y, method=filters[method])
    assert float(got.log_likelihood) == pytest.approx(expected, rel=1e-8)
    mean, _ = got.smooth()
    gain = (basis.T @ basis) @ np.linalg.solve(cov, y)
    np.testing.assert_allclose(mean[:, 0], gain, atol=1e-7)


@pytest.mark.slow
def test_unscented_filter_is_the_extended_for_every_index(x64):
    """The covariances carried have a rank that rounding alone decides."""
    times, y = np.arange(31) * 0.1, np.random.default_rng(1).normal(size=31) * 0.3

    @jax.jit
    def evidence(hurst):
        noise = MarkovFBM(hurst, 6)
        sde = nsde.SDE(lambda t, x: -0.7 * x, lambda t, x: 0.8, noise=noise)
        path = nsde.SDEPath(sde, times, init=0.0)
        methods = nsde.filters.UnscentedKalman(), nsde.filters.ExtendedKalman()
        return [
            nsde.filter_path(path, lambda t, x: dist.Normal(x, 0.1), y, method=m).log_likelihood
            for m in methods
        ]

    for hurst in np.linspace(0.05, 0.95, 19):
        unscented, extended = evidence(hurst)
        assert float(unscented) == pytest.approx(float(extended), rel=1e-7)


@pytest.mark.slow
def test_guided_posterior_of_a_linear_model_is_standard_normal(x64):
    """Guide and likelihood cancel: the density of z is that of N(0, I) and a constant."""
    times = np.arange(21) * 0.1
    y = np.random.default_rng(2).normal(size=21) * 0.3
    guided = numpyro.handlers.reparam(
        _noisy(times, 0.3), config={"x": nsde.reparam.GuidedReparam()}
    )
    values = []
    for seed in range(3):
        z = np.random.default_rng(seed).normal(size=20)
        joint = log_density(guided, (y,), {}, {"x_innov": jnp.asarray(z)})[0]
        values.append(float(joint) - float(dist.Normal(0, 1).log_prob(z).sum()))
    assert np.ptp(values) < 1e-8
    # and the constant is the evidence of the scheme's own law
    path = nsde.SDEPath(
        nsde.SDE(lambda t, x: -0.7 * x, lambda t, x: 0.8, noise=MarkovFBM(0.3, 10)), times, init=0.0
    )
    result = nsde.filter_path(
        path, lambda t, x: dist.Normal(x, 0.1), y, method=nsde.filters.ExtendedKalman()
    )
    assert values[0] == pytest.approx(float(result.log_likelihood), rel=1e-8)


@pytest.mark.slow
def test_whitened_path_of_a_model(key):
    white = numpyro.handlers.reparam(
        _noisy(np.arange(11) * 0.1, 0.3), config={"x": nsde.reparam.InnovationReparam()}
    )
    sites = numpyro.handlers.trace(numpyro.handlers.seed(white, key)).get_trace()
    assert sites["x_innov"]["value"].shape == (10,)
    assert sites["x"]["value"].shape == (11,)


@pytest.mark.slow
def test_smooth_draws_the_users_path(x64):
    """Draws of the bridge at the middle: variance of the reference, 2,000 draws."""
    cell = REFERENCE["bridge"]["H0.3_th1.0"]
    grid = nsde.TimeGrid([0.0, 1.0, 2.0], max_step=0.05)

    def model(y):
        rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
        sde = nsde.SDE(
            lambda t, x, p: -p * x, lambda t, x, p: 1.0, params=rate, noise=MarkovFBM(0.3)
        )
        x = numpyro.sample("x", nsde.SDEPath(sde, grid, init=0.0))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y, at=grid.index[-1:])

    draws = nsde.smooth(
        model,
        {"rate": np.ones(2000)},
        np.array([0.0]),
        method=nsde.filters.Kalman(),
        rng_key=jax.random.key(0),
    )["x"]
    assert draws.shape == (2000, 41)
    middle = float(jnp.var(draws[:, grid.index[1]]))
    exact = cell["exact_var"][2]
    assert abs(middle - exact) < 4 * exact * np.sqrt(2 / 2000) + 0.005 * exact


@pytest.mark.slow
def test_state_dependent_diffusion_is_read_by_stratonovich(x64):
    """Geometric: log X is fBM scaled, whatever H; the trapezoid's error falls with the step."""
    for hurst in (0.4, 0.7):
        errors = []
        for count in (50, 200, 800):
            times = np.linspace(0.0, 1.0, count + 1)
            sde = nsde.SDE(
                lambda t, x: 0.0 * x,
                lambda t, x: 0.5 * x,
                noise=MarkovFBM(hurst),
                interpretation="stratonovich",
            )
            path = nsde.SDEPath(sde, times, init=1.0)
            z = jax.random.normal(jax.random.key(0), (count,))
            walk = nsde.SDEPath(_walk(hurst), times, init=0.0).forward(0.0, z)
            x = path.forward(1.0, z)
            errors.append(float(jnp.max(jnp.abs(jnp.log(x) - 0.5 * walk))))
            _, back = path.inverse(x)
            np.testing.assert_allclose(back, z, atol=1e-6)
        assert errors[2] < 0.02
        assert errors[2] < errors[0]
        exact = FractionalBrownianMotion(times[1:], hurst).log_prob(2.0 * jnp.log(x[1:]))
        jacobian = jnp.sum(jnp.log(2.0 / x[1:]))
        # The density of the path is that of its logarithm, to the discretisation's accuracy.
        assert float(path.log_prob(x)) == pytest.approx(float(exact + jacobian), abs=0.5)


@pytest.mark.slow
def test_ito_with_a_rough_noise_is_refused():
    def sde(noise, interpretation="ito"):
        return nsde.SDE(
            lambda t, x: -x, lambda t, x: 0.3 * x, noise=noise, interpretation=interpretation
        )

    with pytest.raises(ValueError, match="interpretation='stratonovich'"):
        nsde.SDEPath(sde(MarkovFBM(0.4)), np.arange(4.0), init=1.0)
    smooth = nsde.SDEPath(sde(MarkovFBM(0.6)), np.arange(4.0) * 0.1, init=1.0)
    x = jnp.array([1.0, 1.1, 1.0, 0.9])
    assert np.isfinite(smooth.log_prob(x))

    def traced(h):
        return nsde.SDEPath(sde(MarkovFBM(h)), np.arange(4.0) * 0.1, init=1.0).log_prob(x)

    assert np.isnan(jax.jit(traced)(0.4))
    assert np.isfinite(jax.jit(traced)(0.6))


@pytest.mark.slow
def test_a_hurst_index_that_changes_in_time(x64):
    """A constant function is the constant; a step gives each part its own index."""
    times = np.arange(41) * 0.1
    x = jnp.asarray(np.random.default_rng(0).normal(size=41)).at[0].set(0.0)
    fixed = nsde.SDEPath(_walk(0.3), times, init=0.0).log_prob(x)
    moving = nsde.SDEPath(_walk(lambda t: 0.3 + 0.0 * t), times, init=0.0).log_prob(x)
    assert float(moving) == pytest.approx(float(fixed), rel=1e-10)

    def step(t):
        return jnp.where(t < 2.0, 0.3, 0.8)

    path = nsde.SDEPath(_walk(step), times, init=0.0)
    basis = np.asarray(path.forward(jnp.zeros(40), np.eye(40)))
    increments = np.diff(basis, axis=1)
    cov = increments.T @ increments
    for part, hurst in ((slice(0, 20), 0.3), (slice(20, 40), 0.8)):
        exact = toeplitz(0.1 ** (2 * hurst) * _fgn(hurst, 20))
        np.testing.assert_allclose(cov[part, part], exact, rtol=0.02, atol=2e-4 * exact[0, 0])


@pytest.mark.slow
def test_driving_a_model_by_another_noise(x64):
    def model(x):
        ou = nsde.processes.OrnsteinUhlenbeck(rate=0.0 + 1e-12, mean=0.0, scale=1.0)
        numpyro.sample("x", nsde.SDEPath(ou, np.arange(51) * 0.1, init=0.0), obs=x)

    x = FractionalBrownianMotion(np.arange(51) * 0.1, 0.2).sample(jax.random.key(0))
    rough = nsde.handlers.drive(model, MarkovFBM(0.2, 12))
    got = float(log_density(rough, (x,), {}, {})[0])
    exact = float(FractionalBrownianMotion(np.arange(51) * 0.1, 0.2).log_prob(x))
    assert got == pytest.approx(exact, abs=0.01)
    back = nsde.handlers.drive(rough, nsde.noise.Brownian())
    plain = float(log_density(model, (x,), {}, {})[0])
    assert float(log_density(back, (x,), {}, {})[0]) == pytest.approx(plain, rel=1e-6)
    with pytest.raises(TypeError, match="noise must be one of"):
        nsde.handlers.drive(model, 0.3)


def test_what_cannot_be_driven_is_refused():
    walk, times = _walk(0.3), np.arange(4.0)
    with pytest.raises(TypeError, match="Milstein is for Brownian motion"):
        nsde.SDEPath(walk, times, init=0.0, scheme=nsde.schemes.Milstein())
    wide = nsde.SDE(lambda t, x: -x, lambda t, x: jnp.ones((2, 3)), noise=MarkovFBM(0.3))
    with pytest.raises(ValueError, match="no more noises than"):
        nsde.SDEPath(wide, times, init=jnp.zeros(2))
    with pytest.raises(ValueError, match="hurst must be between 0 and 1"):
        MarkovFBM(1.0)
    with pytest.raises(ValueError, match="fit='law' is for kind=1"):
        MarkovFBM(0.3, kind=2)
    with pytest.raises(ValueError, match="num_terms must be at least 2"):
        MarkovFBM(0.3, num_terms=1)
    with pytest.raises(ValueError, match="needs an SDE driven by Brownian motion"):
        nsde.filter_path(
            nsde.SDEPath(walk, times, init=0.0),
            lambda t, x: dist.Normal(x, 1.0),
            np.zeros(4),
            method=nsde.filters.MomentMatching(),
        )
    bridge = nsde.reparam.BridgeReparam(np.zeros(2), at=[0, 3])

    def model():
        return numpyro.sample("x", nsde.SDEPath(walk, times, dist.Normal(0.0, 1.0)))

    bridged = numpyro.handlers.seed(numpyro.handlers.reparam(model, config={"x": bridge}), 0)
    with pytest.raises(ValueError, match="which remembers"):
        bridged()
