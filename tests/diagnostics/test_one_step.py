"""One-step and k-step predictions against dense Gaussian conditionals and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.stats import norm, poisson

import numpyro_sde as nsde
from numpyro_sde.diagnostics import k_step, residuals

NAN = np.nan
RATE, MEAN, SCALE, SD = 0.8, 0.4, 0.9, 0.3
TIMES = np.array([0.0, 0.4, 1.0, 1.1, 2.3, 3.0, 3.9])
Y = np.array([0.2, 0.9, NAN, 0.1, -0.3, 1.4, 0.6])
NOTHING = {"unused": np.zeros(3)}  # three draws of a parameter that nothing depends on


def ou_model(times=TIMES, y=Y, y2=None, counts=None, rows=None):
    numpyro.sample("unused", dist.Normal(0.0, 1.0))
    ou = nsde.processes.OrnsteinUhlenbeck(RATE, MEAN, SCALE)
    x = numpyro.sample("x", nsde.SDEPath(ou, times, dist.Normal(MEAN, SCALE / np.sqrt(2 * RATE))))
    if counts is not None:
        nsde.observe("n", x, lambda t, x: dist.Poisson(jnp.exp(x)), obs=counts)
    if y is not None:
        nsde.observe("y", x, lambda t, x: dist.Normal(x, SD), obs=y)
    if y2 is not None:
        nsde.observe("y2", x, lambda t, x: dist.Normal(2.0 * x, 0.5), obs=y2, at=rows)


def dense(times=TIMES):
    """Stationary covariance of the path."""
    gap = np.abs(np.subtract.outer(times, times))
    return SCALE**2 / (2 * RATE) * np.exp(-RATE * gap)


def conditional(y, cov, mean, k, known):
    """Mean and variance of y[k] given the entries `known`."""
    if not len(known):
        return mean[k], cov[k, k]
    gain = np.linalg.solve(cov[np.ix_(known, known)], cov[known, k])
    return mean[k] + gain @ (y[known] - mean[known]), cov[k, k] - gain @ cov[known, k]


def oracle(horizon, y=Y):
    cov, mean = dense() + SD**2 * np.eye(len(TIMES)), np.full(len(TIMES), MEAN)
    out = []
    for k in range(len(TIMES)):
        known = [j for j in range(k - horizon + 1) if not np.isnan(y[j])]
        m, v = conditional(y, cov, mean, k, known)
        out.append((norm.cdf(y[k], m, np.sqrt(v)), norm.logpdf(y[k], m, np.sqrt(v))))
    return np.array(out).T


GAUSSIAN = [
    nsde.filters.Kalman(),
    nsde.filters.ExtendedKalman(),
    nsde.filters.UnscentedKalman(),
    nsde.filters.MomentMatching(substeps=16),  # its own Runge-Kutta steps
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", GAUSSIAN, ids=lambda m: type(m).__name__)
def test_one_step_of_a_linear_model(method):
    tolerance = 1e-10 if isinstance(method, nsde.filters.Kalman) else 1e-6
    model = nsde.handlers.discretize(ou_model, nsde.schemes.LocalLinear())
    found = residuals(NOTHING, model=model, method=method)
    pit, _ = oracle(1)
    np.testing.assert_allclose(found.pit["y"], pit, atol=tolerance)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_k_steps_of_a_linear_model(horizon):
    found = k_step(NOTHING, horizon, model=ou_model, method=nsde.filters.Kalman())
    pit, score = oracle(horizon)
    np.testing.assert_allclose(found.sites["y"].upper, pit, atol=1e-10)
    present = ~np.isnan(Y)
    np.testing.assert_allclose(found.log_scores["x"][present], score[present], atol=1e-10)
    assert found.log_scores["x"][2] == 0.0
    assert found["y"].shape == (3, len(TIMES))


@pytest.mark.slow
@pytest.mark.parametrize("horizon", [1, 3])
def test_particles_move_without_an_update(horizon):
    """Seeds 0 to 19, 1,000 particles: the mean within 4 standard errors of the exact values."""
    method = nsde.filters.Particle(1000)
    draws = {"unused": np.zeros(20)}
    found = k_step(draws, horizon, model=ou_model, method=method, num_draws=None)
    pit, score = oracle(horizon)
    present = ~np.isnan(Y)
    per_draw = found.scores["x"].per_draw[:, present]
    error = per_draw.std(0, ddof=1) / np.sqrt(20)
    assert error.max() < 0.05
    assert np.all(np.abs(per_draw.mean(0) - score[present]) < 4 * error + 2e-3)
    np.testing.assert_allclose(found.sites["y"].upper[present], pit[present], atol=0.02)


@pytest.mark.usefixtures("x64")
def test_two_instruments_are_read_in_order():
    """The second component at a time is predicted given the first; a repeated row counts twice."""
    rows = [1, 3, 3]
    y2 = np.array([1.9, 0.4, 0.1])
    found = residuals(
        NOTHING, model=ou_model, model_kwargs={"y2": y2, "rows": rows}, method=nsde.filters.Kalman()
    )
    order = [
        (0, "y", 0),
        (1, "y", 1),
        (1, "y2", 0),
        (2, "y", 2),
        (3, "y", 3),
        (3, "y2", 1),
        (3, "y2", 2),
        (4, "y", 4),
        (5, "y", 5),
        (6, "y", 6),
    ]
    at = np.array([row for row, _, _ in order])
    gain = np.array([1.0 if site == "y" else 2.0 for _, site, _ in order])
    noise = np.array([SD if site == "y" else 0.5 for _, site, _ in order])
    data = np.array([{"y": Y, "y2": y2}[site][k] for _, site, k in order])
    cov = dense()[np.ix_(at, at)] * np.outer(gain, gain) + np.diag(noise**2)
    for k, (_, site, place) in enumerate(order):
        known = [j for j in range(k) if not np.isnan(data[j])]
        m, v = conditional(data, cov, gain * MEAN, k, known)
        expected = norm.cdf(data[k], m, np.sqrt(v))
        np.testing.assert_allclose(found.pit[site][place], expected, atol=1e-10)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_counts_by_quadrature():
    """At the first time the prediction is a Poisson mixture over the stationary normal law."""
    counts = np.array([2, 0, 1, 5, 1, 3, 0])
    call = {"model_kwargs": {"y": None, "counts": counts}, "method": nsde.filters.ExtendedKalman()}
    found = k_step(NOTHING, model=ou_model, **call)
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    rates = np.exp(MEAN + SCALE / np.sqrt(2 * RATE) * nodes)
    weights = weights / weights.sum()
    site = found.sites["n"]
    np.testing.assert_allclose(site.upper[0], weights @ poisson.cdf(2, rates), atol=1e-8)
    np.testing.assert_allclose(site.lower[0], weights @ poisson.cdf(1, rates), atol=1e-8)
    np.testing.assert_allclose(site.lower[1], 0.0, atol=1e-9)
    pit = residuals(NOTHING, model=ou_model, **call).pit["n"]
    assert np.all((site.lower <= pit) & (pit <= site.upper))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_vectors_with_a_component_missing():
    """Two correlated components: the second given the first, alone where the first is missing."""
    times = np.array([0.0, 0.7])
    y = np.array([[0.3, -0.2], [NAN, 0.5]])
    R = np.array([[0.3, 0.1], [0.1, 0.2]])

    def model():
        sde = nsde.processes.LinearSDE(-jnp.eye(2), jnp.zeros(2), jnp.eye(2))
        init = dist.MultivariateNormal(jnp.zeros(2), 0.5 * jnp.eye(2))
        x = numpyro.sample("x", nsde.SDEPath(sde, times, init))
        nsde.observe("y", x, lambda t, x: dist.MultivariateNormal(x, R), obs=y)

    found = residuals(NOTHING, model=model, method=nsde.filters.Kalman()).pit["y"]
    assert np.isnan(found[1, 0])
    path = np.exp(-np.abs(np.subtract.outer(times, times))) / 2
    cov = np.kron(path, np.eye(2)) + np.kron(np.eye(2), R)
    flat, zero = y.ravel(), np.zeros(4)
    for k, known in ((0, []), (1, [0]), (3, [0, 1])):
        m, v = conditional(flat, cov, zero, k, known)
        np.testing.assert_allclose(found.ravel()[k], norm.cdf(flat[k], m, np.sqrt(v)), atol=1e-10)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_panel_with_own_clocks():
    """Each series alone gives what the panel gives."""
    times, data = np.stack([TIMES, 1.3 * TIMES]), np.stack([Y, Y[::-1]])

    def panel(times, y):
        with numpyro.plate("series", 2):
            ou_model(times, y)

    samples = {"unused": np.zeros((3, 2))}
    call = {"method": nsde.filters.Kalman()}
    both = residuals(samples, model=panel, model_args=(times, data), **call)
    assert both.pit["y"].shape == (2, len(TIMES))
    assert both.times["y"].shape == (2, len(TIMES))
    for k in range(2):
        alone = residuals(NOTHING, model=ou_model, model_args=(times[k], data[k]), **call)
        np.testing.assert_allclose(both.pit["y"][k], alone.pit["y"], atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_several_instruments_under_a_plate():
    """A plate inside: three sensors of one path, each predicted given those before it."""
    times = np.array([0.0, 0.7])
    y = np.array([[0.3, -0.2], [0.1, 0.5], [NAN, 0.2]])

    def model():
        numpyro.sample("unused", dist.Normal(0.0, 1.0))
        ou = nsde.processes.OrnsteinUhlenbeck(RATE, 0.0, SCALE)
        x = numpyro.sample("x", nsde.SDEPath(ou, times, dist.Normal(0.0, 0.8)))
        with numpyro.plate("sensor", 3):
            nsde.observe("y", x, lambda t, x: dist.Normal(x, SD), obs=y)

    found = residuals(NOTHING, model=model, method=nsde.filters.Kalman()).pit["y"]
    assert found.shape == (3, 2)
    decay = np.exp(-RATE * 0.7)
    late = 0.64 * decay**2 + SCALE**2 / (2 * RATE) * (1 - decay**2)
    path = np.array([[0.64, 0.64 * decay], [0.64 * decay, late]])
    order = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]
    at = [time for _, time in order]
    cov = path[np.ix_(at, at)] + SD**2 * np.eye(6)
    data = np.array([y[place] for place in order])
    for k, place in enumerate(order):
        known = [j for j in range(k) if not np.isnan(data[j])]
        m, v = conditional(data, cov, np.zeros(6), k, known)
        np.testing.assert_allclose(found[place], norm.cdf(data[k], m, np.sqrt(v)), atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "emission",
    [
        lambda t, x, p: dist.Poisson(jnp.exp(p + x)),
        pytest.param(lambda t, x, p: dist.Gamma(2.0, jnp.exp(p - x)), marks=pytest.mark.slow),
    ],
    ids=["counts", "rates"],
)
def test_counts_of_several_under_a_plate(emission):
    """A plate of neurons on one path, and the same data as one vector."""
    rates = np.array([0.1, 0.5, -0.4])
    y = np.array([[1.0, 2.0, NAN, 4.0], [3.0, 1.0, 2.0, 1.0], [2.0, NAN, 1.0, 2.0]])

    def path():
        numpyro.sample("unused", dist.Normal(0.0, 1.0))
        ou = nsde.processes.OrnsteinUhlenbeck(0.8, 0.0, 0.7)
        return numpyro.sample("x", nsde.SDEPath(ou, np.arange(4.0), dist.Normal(0.0, 0.5)))

    def plated(y):
        x = path()
        with numpyro.plate("neuron", 3):
            nsde.observe("y", x, emission, params=rates, obs=y)

    def vector(y):
        def law(t, x, p):
            return emission(t, x, p).to_event(1)

        nsde.observe("y", path(), law, params=rates, event_dims=1, obs=y.T)

    call = {"model_args": (y,), "method": nsde.filters.ExtendedKalman()}
    draws = {"unused": np.zeros(2)}
    one, other = (k_step(draws, k=1, model=model, **call) for model in (plated, vector))
    for what in ("upper", "lower"):
        got, want = getattr(one.sites["y"], what), getattr(other.sites["y"], what)
        np.testing.assert_allclose(got, want.T, atol=2e-5)
    np.testing.assert_allclose(
        one.scores["x"].per_draw[:, 0], other.scores["x"].per_draw, rtol=2e-5, atol=2e-5
    )
    assert one.sites["y"].draws.shape == (2, *y.shape)
    pit = residuals(draws, model=plated, **call).pit["y"]
    assert np.array_equal(np.isnan(pit), np.isnan(y))


def test_a_likelihood_to_a_power_predicts_nothing():
    def model():
        numpyro.sample("unused", dist.Normal(0.0, 1.0))
        ou = nsde.processes.OrnsteinUhlenbeck(RATE, 0.0, SCALE)
        x = numpyro.sample("x", nsde.SDEPath(ou, TIMES, dist.Normal(0.0, 0.8)))
        with numpyro.handlers.scale(scale=0.5):
            nsde.observe("y", x, lambda t, x: dist.Normal(x, SD), obs=Y)

    with pytest.raises(ValueError, match=r"handlers\.scale"):
        residuals(NOTHING, model=model, method=nsde.filters.Kalman())


@pytest.mark.usefixtures("x64")
def test_a_path_seen_itself():
    x = np.array([0.2, 0.9, -0.4, 0.1, 1.3, 0.8, 0.3])

    def model(exact):
        numpyro.sample("unused", dist.Normal(0.0, 1.0))
        sde = nsde.processes.OrnsteinUhlenbeck(RATE, MEAN, SCALE)
        scheme = None if exact else nsde.schemes.HermiteExpansion()
        numpyro.sample("x", nsde.SDEPath(sde, TIMES, MEAN, scheme=scheme), obs=x)

    decay = np.exp(-RATE * np.diff(TIMES))
    mean, sd = MEAN + (x[:-1] - MEAN) * decay, SCALE * np.sqrt((1 - decay**2) / (2 * RATE))
    found = k_step(NOTHING, model=model, model_args=(True,))
    np.testing.assert_allclose(found.sites["x"].upper[1:], norm.cdf(x[1:], mean, sd), atol=1e-10)
    assert np.isnan(found.sites["x"].upper[0])
    np.testing.assert_allclose(found.log_scores["x"][1:], norm.logpdf(x[1:], mean, sd), atol=1e-10)


def test_a_right_model_passes_and_a_wrong_one_fails():
    """Seed 0, 200 data simulated from the model; then judged with a tenth of the noise."""
    times = 0.5 * np.arange(200.0)
    rng = np.random.default_rng(0)
    y = np.linalg.cholesky(dense(times)) @ rng.normal(size=200) + SD * rng.normal(size=200) + MEAN

    def model(factor):
        ou = nsde.processes.OrnsteinUhlenbeck(RATE, MEAN, factor * SCALE)
        level = numpyro.sample("unused", dist.Normal(0.0, 1.0))
        init = dist.Normal(MEAN + 0.0 * level, SCALE / np.sqrt(2 * RATE))
        x = numpyro.sample("x", nsde.SDEPath(ou, times, init))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, SD), obs=y)

    call = {"model": model, "method": nsde.filters.Kalman()}
    right = residuals(NOTHING, model_args=(1.0,), **call)
    wrong = residuals(NOTHING, model_args=(0.3,), **call)
    assert right.ok
    assert "No departure" in str(right)
    assert not wrong.ok
    assert "serial" in str(wrong)


def test_refusals_name_the_remedy():
    with pytest.raises(ValueError, match=r"path x was kept latent.*Give method="):
        residuals(NOTHING, model=ou_model)
    with pytest.raises(TypeError, match=r"nsde\.filters"):
        residuals(NOTHING, model=ou_model, method="kalman")
    with pytest.raises(ValueError, match="no draws of"):
        residuals({"other": np.zeros(3)}, model=ou_model, method=nsde.filters.Kalman())
    with pytest.raises(ValueError, match="k must be"):
        k_step(NOTHING, 0, model=ou_model, method=nsde.filters.Kalman())
    with pytest.raises(ValueError, match="observes no SDEPath"):
        residuals({"a": np.zeros(3)}, model=lambda: numpyro.sample("a", dist.Normal(0.0, 1.0)))


def test_a_whitened_or_guided_fit_is_read_by_its_parameters():
    """The treatment around a model is taken off: its draws hold the parameters."""
    config = {"x": nsde.reparam.InnovationReparam()}
    whitened = numpyro.handlers.reparam(ou_model, config=config)
    draws = {**NOTHING, "x": np.zeros((3, 7)), "x_innov": np.zeros((3, 6))}
    found = residuals(draws, model=whitened, method=nsde.filters.Kalman())
    plain = residuals(NOTHING, model=ou_model, method=nsde.filters.Kalman())
    np.testing.assert_allclose(found.pit["y"], plain.pit["y"])
    assert jax.config.jax_enable_x64 is False
