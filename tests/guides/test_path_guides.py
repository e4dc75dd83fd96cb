"""Guides of paths against exact laws: Kalman smoothers, Jacobians by automatic differentiation."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.handlers import block, replay, seed, substitute, trace
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.util import log_density

import numpyro_sde as nsde
from numpyro_sde.guides import (
    AutoFlow,
    AutoPathGuide,
    ConditionalScorePath,
    ControlledPath,
    GaussianMarkovPath,
    fit_score,
    fit_svi,
)

LAWS = {
    "gaussian": GaussianMarkovPath(),
    "controlled": ControlledPath((8,)),
    "amortized": ControlledPath((8,), num_context=2),
    "score": ConditionalScorePath((8,)),
}
TIMES = np.array([0.0, 0.1, 0.3, 0.35, 0.6, 1.0])


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def oscillator(y):
    """Two coupled components, one of them seen, with a gap."""
    A = jnp.array([[-0.5, 1.0], [-1.0, -0.2]])
    sde = nsde.processes.LinearSDE(A, jnp.array([0.1, 0.0]), jnp.array([[0.5, 0.0], [0.2, 0.4]]))
    init = dist.MultivariateNormal(jnp.array([1.0, 0.0]), 0.3 * jnp.eye(2))
    path = nsde.SDEPath(sde, TIMES, init, scheme=nsde.schemes.Euler())
    x = numpyro.sample("x", path)
    nsde.observe("y", x, lambda t, x: dist.Normal(x[0], 0.2), obs=y)


SEEN = jnp.array([1.1, np.nan, 0.8, 0.9, np.nan, 0.2])


def counts(y):
    """A positive process with a start that is not normal, and counts."""
    sde = nsde.processes.CoxIngersollRoss(rate=1.0, mean=4.0, scale=1.0)
    path = nsde.SDEPath(sde, TIMES, dist.Gamma(4.0, 1.0), scheme=nsde.schemes.Euler())
    x = numpyro.sample("x", path)
    nsde.observe("y", x, lambda t, x: dist.Poisson(x), obs=y)


def well(y):
    """A nonlinear drift with matrix noise and one known start."""
    sde = nsde.SDE(
        lambda t, x: jnp.array([2.0 * x[0] * (1 - x[0] ** 2), x[0] - x[1]]),
        lambda t, x: jnp.array([[0.5, 0.0], [0.1, 0.3 + 0.1 * jnp.tanh(x[0])]]),
    )
    x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, jnp.array([-1.0, 0.5])))
    nsde.observe("y", x, lambda t, x: dist.Normal(x[0], 0.3), obs=y)


def fractional(y):
    sde = nsde.SDE(lambda t, x: -x, lambda t, x: 0.5, noise=nsde.noise.MarkovFBM(0.3))
    x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 1.0)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)


MODELS = {
    "oscillator": (oscillator, SEEN),
    "counts": (counts, jnp.array([4, 3, 5, 2, 4, 6])),
    "well": (well, SEEN - 1.5),
    "fractional": (fractional, SEEN - 0.5),
}


def parameters_of(guide, *args):
    """The parameters of a new guide."""
    with trace() as sites, seed(rng_seed=0):
        guide(*args)
    return {name: site["value"] for name, site in sites.items() if site["type"] == "param"}


def perturbed(params):
    """Parameters moved at random: what is learned must count in every density."""
    leaves, form = jax.tree.flatten(params)
    rng = np.random.default_rng(3)
    moved = [leaf + 0.2 * rng.standard_normal(jnp.shape(leaf)) for leaf in leaves]
    return jax.tree.unflatten(form, moved)


@pytest.mark.slow
@pytest.mark.parametrize(
    "law",
    [
        "gaussian",
        pytest.param("controlled", marks=pytest.mark.slow),
        pytest.param("amortized", marks=pytest.mark.slow),
        pytest.param("score", marks=pytest.mark.slow),
    ],
)
def test_a_new_guide_is_the_exact_smoother_of_a_linear_model(law):
    guide = AutoPathGuide(oscillator, path=LAWS[law])
    params = parameters_of(guide, SEEN)
    kalman = nsde.handlers.marginalize(oscillator, method=nsde.filters.Kalman())
    evidence = log_density(kalman, (SEEN,), {}, {})[0]

    def log_weight(key):
        drawn = trace(substitute(seed(guide, key), params)).get_trace(SEEN)
        site = drawn["x"]
        log_q = site["fn"].log_prob(site["value"], site["intermediates"])
        return log_density(oscillator, (SEEN,), {}, {"x": site["value"]})[0] - log_q

    weights = jax.vmap(log_weight)(jax.random.split(jax.random.key(0), 5))
    # p(x, y) / q(x) is the evidence at every path only if q is the smoothing law.
    np.testing.assert_allclose(weights, evidence, atol=1e-9)


@pytest.mark.parametrize(
    ("model", "law"),
    [
        pytest.param("well", "controlled", marks=pytest.mark.slow),
        pytest.param("counts", "gaussian", marks=pytest.mark.slow),
        pytest.param("counts", "controlled", marks=pytest.mark.slow),
        pytest.param("well", "score", marks=pytest.mark.slow),
        pytest.param("well", "gaussian", marks=pytest.mark.slow),
        pytest.param("counts", "score", marks=pytest.mark.slow),
        pytest.param("fractional", "gaussian", marks=pytest.mark.slow),
        pytest.param("fractional", "amortized", marks=pytest.mark.slow),
        pytest.param("oscillator", "controlled", marks=pytest.mark.slow),
    ],
)
def test_log_density_is_that_of_the_map_from_normals(model, law, monkeypatch):
    model, y = MODELS[model]
    guide = AutoPathGuide(model, path=LAWS[law])
    params = perturbed(parameters_of(guide, y))
    normals = []
    real_normal = jax.random.normal

    def draw(flat):
        """The path as a map of all normals, in the order in which they are asked for."""
        used = [0]

        def normal(key, shape=(), dtype=float):
            size = int(np.prod(shape, dtype=int))
            if flat is None:
                normals.append(size)
                return real_normal(key, shape, dtype)
            part = flat[used[0] : used[0] + size]
            used[0] += size
            return part.reshape(shape)

        monkeypatch.setattr(jax.random, "normal", normal)
        drawn = trace(substitute(seed(guide, 1), params)).get_trace(y)["x"]
        monkeypatch.setattr(jax.random, "normal", real_normal)
        return drawn

    draw(None)
    known_start = model is well
    z = jnp.asarray(np.random.default_rng(0).standard_normal(sum(normals)))
    site = draw(z)
    x, log_q = site["value"], site["fn"].log_prob(site["value"], site["intermediates"])
    np.testing.assert_allclose(site["fn"].log_prob(x), log_q, rtol=1e-8)
    skip = x[0].size if known_start else 0
    jacobian = jax.jacfwd(lambda free: draw(jnp.concatenate([z[:skip], free]))["value"].ravel())(
        z[skip:]
    )[skip:]
    sign, log_det = jnp.linalg.slogdet(jacobian)
    assert sign != 0
    expected = jnp.sum(dist.Normal(0.0, 1.0).log_prob(z[skip:])) - log_det
    np.testing.assert_allclose(log_q, expected, rtol=1e-8)


def panel(y=None, batch=None):
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
    with numpyro.plate("series", 4, subsample_size=batch) as i:
        sde = nsde.SDE(lambda t, x, p: -p * x, lambda t, x, p: 0.5, params=rate)
        x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 1.0)))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.2), obs=None if y is None else y[i])


@pytest.fixture(scope="module")
def fitted_panel():
    with jax.enable_x64(True):
        y = trace(seed(panel, 5)).get_trace()["y"]["value"]
        guide = AutoPathGuide(panel, parameters=AutoNormal)
        svi = SVI(panel, guide, numpyro.optim.Adam(1e-2), Trace_ELBO())
        fit = fit_svi(svi, jax.random.key(0), 400, y, window=100, progress_bar=False)
        return guide, svi, fit, y


@pytest.mark.slow
def test_a_panel_is_fitted_and_predicted_from(fitted_panel):
    guide, _, fit, y = fitted_panel
    assert guide.path_sites() == ("x",)
    assert fit.params["x_auto_shift"].shape == (4, 5, 1)
    draws = guide.sample_posterior(jax.random.key(1), fit.params, sample_shape=(300,))
    assert {name: value.shape for name, value in draws.items()} == {
        "rate": (300,),
        "x": (300, 4, 6),
    }
    # Data of sd 0.2 on a process of sd 0.5: the posterior mean lies between the two.
    assert float(jnp.abs(draws["x"].mean(0) - y).max()) < 0.6
    quantiles = guide.quantiles(fit.params, [0.1, 0.9])
    assert jnp.all(quantiles["x"][0] < quantiles["x"][1])
    # A call without data uses those of the fit.
    predict = Predictive(panel, guide=guide, params=fit.params, num_samples=20)
    assert predict(jax.random.key(2))["y"].shape == (20, 4, 6)


@pytest.mark.slow
def test_a_subsampled_plate_scales_its_series(fitted_panel):
    _, _, _, y = fitted_panel
    guide = AutoPathGuide(panel, parameters=AutoNormal)
    params = parameters_of(guide, y, 2)
    assert params["x_auto_shift"].shape == (4, 5, 1)
    drawn = trace(substitute(seed(guide, 3), {**params, "series": jnp.array([0, 2])})).get_trace(
        y, 2
    )
    assert drawn["x"]["value"].shape == (2, 6)
    assert drawn["x"]["scale"] == 2.0
    log_q = drawn["x"]["fn"].log_prob(drawn["x"]["value"])
    model = trace(replay(seed(panel, 0), drawn)).get_trace(y, 2)
    np.testing.assert_array_equal(model["series"]["value"], jnp.array([0, 2]))
    kalman = nsde.handlers.marginalize(panel, method=nsde.filters.ExtendedKalman())
    exact = trace(substitute(seed(kalman, 0), {"rate": drawn["rate"]["value"]})).get_trace(y)
    evidence = exact["y"]["fn"].log_prob(y)[jnp.array([0, 2])]
    weight = model["x"]["fn"].log_prob(drawn["x"]["value"]) - log_q
    weight = weight + model["y"]["fn"].log_prob(y[jnp.array([0, 2])])
    np.testing.assert_allclose(weight, evidence, atol=1e-9)


@pytest.mark.slow
def test_a_guide_takes_as_many_series_as_its_call():
    """Trained on mini-batches, drawn for all, in their order; with one law for all series too."""
    y = jnp.arange(4.0)[:, None] + 0.1 * jnp.arange(6.0)[None]
    for law in ("gaussian", "amortized"):
        guide = AutoPathGuide(panel, parameters=AutoNormal, path=LAWS[law])
        svi = SVI(panel, guide, numpyro.optim.Adam(1e-2), Trace_ELBO())
        state = svi.init(jax.random.key(0), y, 2)
        state, _ = svi.update(state, y, 2)
        params = svi.get_params(state)
        draws = guide.sample_posterior(jax.random.key(1), params, y, sample_shape=(50,))
        assert draws["x"].shape == (50, 4, 6)
        # Series are a unit apart, seen with an sd of 0.2: each draw has them in their order.
        assert jnp.all(jnp.diff(draws["x"].mean(0)[:, 2:], axis=0) > 0.3)
        few = guide.sample_posterior(jax.random.key(1), params, y, batch=3, sample_shape=(2,))
        assert few["x"].shape == (2, 3, 6)


@pytest.mark.slow
def test_fit_svi_goes_on_stops_early_and_survives_an_interrupt(fitted_panel):
    _, svi, fit, y = fitted_panel
    more = fit_svi(
        svi, jax.random.key(0), 50, y, init_state=fit.state, window=50, progress_bar=False
    )
    assert len(more.losses) == 50
    restored = pickle.loads(pickle.dumps(more.params))
    np.testing.assert_array_equal(restored["x_auto_shift"], more.params["x_auto_shift"])
    with pytest.raises(ValueError, match="window must be positive"):
        fit_svi(svi, jax.random.key(0), 50, y, window=0)
    with pytest.raises(ValueError, match="patience"):
        fit_svi(svi, jax.random.key(0), 50, y, patience=0)


@pytest.mark.slow
def test_no_correction_solves_the_backward_equation_of_a_linear_model():
    guide = AutoPathGuide(oscillator, path=LAWS["score"])
    params = parameters_of(guide, SEEN)
    with block(), seed(rng_seed=0), substitute(data=params):
        assert float(guide.score_residual(SEEN)) < 1e-16
    svi = SVI(oscillator, guide, numpyro.optim.Adam(1e-3), Trace_ELBO())
    with pytest.raises(ValueError, match="score_steps must be at least 0"):
        fit_score(svi, jax.random.key(0), 1, SEEN, score_steps=-1)
    plain = SVI(oscillator, AutoPathGuide(oscillator), svi.optim, Trace_ELBO())
    with pytest.raises(TypeError, match="ConditionalScorePath"):
        fit_score(plain, jax.random.key(0), 1)


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="path must be GaussianMarkovPath"):
        AutoPathGuide(oscillator, path="gaussian")
    with pytest.raises(TypeError, match="parameters must make a guide"):
        AutoPathGuide(oscillator, parameters=3)
    with pytest.raises(TypeError, match="parameters must return a guide"):
        AutoPathGuide(oscillator, parameters=lambda model: None)
    with pytest.raises(ValueError, match="init must be"):
        AutoPathGuide(oscillator, init="best")
    with pytest.raises(ValueError, match="gradient must be"):
        AutoPathGuide(oscillator, gradient="reinforce")
    with pytest.raises(ValueError, match="hidden_dims must be positive widths"):
        ControlledPath((0,))
    with pytest.raises(ValueError, match="num_context must be 0 or more"):
        ControlledPath(num_context=-1)
    with pytest.raises(ValueError, match="jump_weight must be positive"):
        ConditionalScorePath(jump_weight=0.0)


@pytest.mark.slow
def test_a_flow_starts_at_a_given_covariance():
    def model():
        numpyro.sample("b", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("a", dist.LogNormal(0.0, 1.0))

    covariance = np.array([[2.0, 0.3, 0.1], [0.3, 1.0, 0.2], [0.1, 0.2, 0.5]])
    guide = AutoFlow(model, num_flows=1, init_scale={("a", "b"): covariance})
    factor = parameters_of(guide)["auto_scale_tril"]
    order = [1, 2, 0] if list(guide._init_locs) == ["b", "a"] else [0, 1, 2]
    np.testing.assert_allclose(factor @ factor.T, covariance[np.ix_(order, order)], rtol=1e-6)
    with pytest.raises(ValueError, match=r"must have each of \['a', 'b'\] once"):
        parameters_of(AutoFlow(model, init_scale={("a",): np.eye(1)}))
    with pytest.raises(ValueError, match=r"must have shape \(3, 3\)"):
        parameters_of(AutoFlow(model, init_scale={("a", "b"): np.eye(2)}))


def test_models_that_cannot_be_guided_are_refused():
    def no_path():
        numpyro.sample("a", dist.Normal(0.0, 1.0))

    def with_scheme(scheme):
        def model(y=None):
            sde = nsde.SDE(lambda t, x: -x, lambda t, x: 0.5 + 0.1 * jnp.tanh(x))
            path = nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 1.0), scheme=scheme)
            x = numpyro.sample("x", path)
            nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.2), obs=y)

        return model

    def call(model, *args):
        seed(AutoPathGuide(model), 0)(*args)

    with pytest.raises(ValueError, match="no latent SDEPath"):
        call(no_path)
    with pytest.raises(ValueError, match="has no data"):
        call(with_scheme(nsde.schemes.Euler()))
    with pytest.raises(ValueError, match="scheme Milstein"):
        call(with_scheme(nsde.schemes.Milstein()), SEEN)


def test_fewer_noises_than_states_are_refused():
    def model(y):
        sde = nsde.SDE(lambda t, x: -x, lambda t, x: jnp.array([[0.0], [1.0]]))
        x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, jnp.zeros(2)))
        nsde.observe("y", x, lambda t, x: dist.Normal(x[0], 0.2), obs=y)

    with pytest.raises(ValueError, match=r"1 noises in a step for states of shape \(2,\)"):
        seed(AutoPathGuide(model), 0)(SEEN)


# A double well with five observations: log evidence -3.8792 by a Crank-Nicolson solution of the
# backward equation on 801 states and 2,000 times.
WELL_TRUTH = -3.8792
WELL_DATA = jnp.array([-1.0, -0.7, 0.9, 1.1, 0.8])
WELL_GRID = nsde.TimeGrid(np.arange(6) * 0.8, max_step=0.01)


def rare_well(y):
    sde = nsde.processes.DoubleWell(linear=2.0, cubic=2.0, scale=1.0)
    scheme = nsde.schemes.LocalLinear()
    x = numpyro.sample("x", nsde.SDEPath(sde, WELL_GRID, jnp.array(-1.0), scheme=scheme))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y, at=WELL_GRID.index[1:])


def importance(guide, params, model, y, num_draws=4000):
    """Bound, importance-weighted evidence and effective share of a path guide."""

    def one(key):
        log_q, drawn = log_density(seed(guide, key), (y,), {}, params)
        return log_density(model, (y,), {}, {"x": drawn["x"]["value"]})[0] - log_q

    keys = jax.random.split(jax.random.key(9), num_draws)
    w = np.asarray(jax.jit(lambda k: jax.lax.map(one, k, batch_size=200))(keys))
    u = np.exp(w - w.max())
    return w.mean(), np.log(u.mean()) + w.max(), u.sum() ** 2 / (u**2).sum() / num_draws


@pytest.mark.slow
def test_controlled_path_on_the_double_well():
    # 4,000 draws with an effective share of 0.9: the evidence has a standard error of 0.005.
    guide = AutoPathGuide(rare_well, path=ControlledPath())
    svi = SVI(
        rare_well,
        guide,
        numpyro.optim.Adam(lambda i: 5e-3 * jnp.exp(-i / 400.0)),
        Trace_ELBO(num_particles=8),
    )
    fit = fit_svi(svi, jax.random.key(1), 1500, WELL_DATA, patience=None, progress_bar=False)
    elbo, evidence, share = importance(guide, fit.params, rare_well, WELL_DATA)
    assert elbo > -4.0
    assert abs(evidence - WELL_TRUTH) < 0.02
    assert share > 0.7


@pytest.mark.slow
def test_the_backward_equation_alone_trains_a_path_law_on_the_double_well():
    guide = AutoPathGuide(rare_well, path=ConditionalScorePath())
    svi = SVI(rare_well, guide, numpyro.optim.Adam(2e-3), Trace_ELBO(num_particles=8))
    fit = fit_score(
        svi,
        jax.random.key(3),
        1,
        WELL_DATA,
        score_steps=3000,
        svi_steps=0,
        progress_bar=False,
    )
    _, evidence, share = importance(guide, fit.params, rare_well, WELL_DATA)
    assert share > 0.5
    # A share of 0.5 of 4,000 draws: a standard error of about 0.016 with weights of this tail.
    assert abs(evidence - WELL_TRUTH) < 4 * 0.016
