"""Guided paths: densities, exactness in linear models, posteriors against truth, refusals."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, init_to_median
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.util import log_density

import numpyro_sde as nsde
from numpyro_sde.distributions.observation import Emission
from numpyro_sde.distributions.state_space import ObservedPath
from numpyro_sde.distributions.statement import make_statement
from numpyro_sde.reparam import GuidedReparam, InnovationReparam
from numpyro_sde.statespace.guide import guided_path, guided_start, make_guide
from numpyro_sde.statespace.reference import data_reference, smoothed_reference

RNG = np.random.default_rng(11)
TIMES = np.cumsum(RNG.uniform(0.1, 0.4, 12))


def guided(model, **options):
    return handlers.reparam(model, config={"x": GuidedReparam(**options)})


# --- the guide itself ---------------------------------------------------------------------------

A = np.array([[-1.0, 0.6], [-0.4, -0.3]])
COLUMN = np.array([[0.0], [0.8]])  # one noise, two states
PATHS = {
    "scalar, exact": lambda: nsde.SDEPath(
        nsde.processes.OrnsteinUhlenbeck(1.0, 0.3, 0.7), TIMES, dist.Normal(0.2, 1.0)
    ),
    "hypoelliptic, Euler": lambda: nsde.SDEPath(
        nsde.SDE(lambda t, x: A @ x, lambda t, x: COLUMN),
        TIMES,
        dist.Normal(jnp.zeros(2), jnp.array([1.0, 0.5])).to_event(1),
        scheme=nsde.schemes.Euler(),
    ),
    "hypoelliptic, local linear": lambda: nsde.SDEPath(
        nsde.SDE(lambda t, x: A @ x, lambda t, x: COLUMN),
        TIMES,
        dist.Normal(jnp.zeros(2), 1.0).to_event(1),
        scheme=nsde.schemes.LocalLinear(),
    ),
    "correlated noise": lambda: nsde.SDEPath(
        nsde.SDE(lambda t, x: A @ x, lambda t, x: jnp.array([[0.5, 0.0, 0.2], [0.3, 0.4, 0.0]])),
        TIMES,
        dist.MultivariateNormal(jnp.zeros(2), jnp.array([[1.0, 0.5], [0.5, 2.0]])),
    ),
    "not a Gaussian scheme": lambda: nsde.SDEPath(
        nsde.SDE(lambda t, x: A @ x, lambda t, x: jnp.array([0.5, 0.9])),
        TIMES,
        dist.Normal(jnp.zeros(2), 1.0).to_event(1),
        scheme=nsde.schemes.Strang(),
    ),
}


def statements(path, seed=0):
    """Two instruments: one component at all times but two, and a sum at a few."""
    rng = np.random.default_rng(seed)
    scalar = path.state_shape == ()
    y = rng.normal(size=12)
    y[[2, 7]] = np.nan
    first = Emission(lambda t, x: dist.Normal(x if scalar else x[0], 0.1), None, None, None, 12, ())
    rows = np.array([1, 5, 9])
    second = Emission(lambda t, x: dist.Normal(jnp.sum(x), 0.3), None, None, None, 3, ())
    return [
        (make_statement(first, np.arange(12), path.state_shape, ()), y),
        (make_statement(second, rows, path.state_shape, ()), rng.normal(size=3)),
    ]


def log_terms(model, path):
    """Log density of all observations given a path."""
    return sum(
        jnp.sum(jax.vmap(i.log_prob)(i.inputs, path, i.values, i.present))
        for i in model.instruments
    )


QUICK = ("scalar, exact", "hypoelliptic, Euler")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in PATHS]
)
def test_weights_of_a_linear_model_are_its_likelihood(x64, name):
    """One guided path, whatever its innovations and the reference: the exact log likelihood."""
    path = PATHS[name]()

    def weigh(model, start, z, reference):
        guide = make_guide(model, reference)
        x0, first = guided_start(model, guide, start)
        states, rest = guided_path(model, guide, x0, z)
        gaussian = model
        if name == "not a Gaussian scheme":  # Strang is the exact flow of this linear system
            gaussian = model._replace(scheme=nsde.schemes.Exact(), scheme_chosen=False)
            return first + rest + log_terms(model, states), jnp.zeros(())
        exact = nsde.filters.ExtendedKalman().log_likelihood(gaussian)
        return first + rest + log_terms(model, states), exact

    dims = (1, len(path.innovation_shape), 2)
    compiled = jax.jit(
        lambda *a: ObservedPath(path, (), tuple(statements(path))).map(weigh, a, dims)
    )
    totals = []
    d = max(1, len(path.state_shape) and path.state_shape[0])
    for seed in range(3):
        rng = np.random.default_rng(seed)
        arrays = (
            jnp.asarray(rng.normal(size=d)),
            jnp.asarray(rng.normal(size=path.innovation_shape)),
            jnp.asarray(rng.normal(size=(12, d))),
        )
        total, exact = compiled(*arrays)
        totals.append(float(total))
        if name != "not a Gaussian scheme":
            np.testing.assert_allclose(total, exact, rtol=1e-9)
    np.testing.assert_allclose(totals, totals[0], rtol=1e-9)


@pytest.mark.slow
def test_references_pass_through_precise_data(x64):
    path = PATHS["scalar, exact"]()
    y = np.sin(TIMES)
    y[4] = np.nan
    emission = Emission(lambda t, x: dist.Normal(x, 1e-3), None, None, None, 12, ())
    data = [(make_statement(emission, np.arange(12), (), ()), y)]
    seen = ~np.isnan(y)
    for find in (data_reference, smoothed_reference):
        reference = ObservedPath(path, (), tuple(data)).map(find)[:, 0]
        np.testing.assert_allclose(reference[seen], y[seen], atol=5e-3)
    between = ObservedPath(path, (), tuple(data)).map(data_reference)[4, 0]
    share = (TIMES[4] - TIMES[3]) / (TIMES[5] - TIMES[3])
    np.testing.assert_allclose(between, y[3] + share * (y[5] - y[3]), atol=5e-3)


def test_data_reference_solves_a_nonlinear_emission_and_leaves_the_rest(x64):
    path = PATHS["correlated noise"]()
    counts = np.array([3, 8, 20, 55, 150, 400, 150, 55, 20, 8, 3, 1])
    emission = Emission(lambda t, x: dist.Poisson(jnp.exp(x[0])), None, None, None, 12, ())
    data = [(make_statement(emission, np.arange(12), (2,), ()), counts)]
    reference = jax.jit(lambda: ObservedPath(path, (), tuple(data)).map(data_reference))()
    np.testing.assert_allclose(reference[:, 0], np.log(counts), atol=0.02)
    np.testing.assert_array_equal(reference[:, 1], 0.0)


# --- the reparametrisation ----------------------------------------------------------------------

WELL = np.array([-0.8, -0.9, -0.2, 0.7, 1.1, 0.9, 1.0, 0.8, np.nan, 0.9, 1.2, 1.0])


def well_model(y=None):
    """Nonlinear drift, noise that depends on the state, two instruments."""
    scale = numpyro.sample("scale", dist.LogNormal(-0.5, 0.5))
    sde = nsde.SDE(
        lambda t, x, p: 2.0 * x - 2.0 * x**3,
        lambda t, x, p: p * jnp.sqrt(1.0 + 0.5 * x**2),
        params=scale,
    )
    x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 1.0)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)
    later = None if y is None else jnp.array([1.0, 1.3])
    nsde.observe("u", x, lambda t, x: dist.Normal(x**2, 0.2), obs=later, at=[8, 11])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}]
    + [
        pytest.param(o, marks=pytest.mark.slow)
        for o in ({"frozen": True}, {"reference": "data"}, {"follow": 2})
    ],
)
def test_density_is_that_of_the_path(x64, options):
    """log p(z) = log p(x(z)) + log |dx/dz|, the Jacobian by automatic differentiation."""
    model = guided(well_model, **options)
    rng = np.random.default_rng(0)
    values = {"scale": 0.6, "x_init_innov": rng.normal(), "x_innov": rng.normal(size=11)}
    log_z, trace = log_density(model, (WELL,), {}, values)

    def to_path(flat):
        moved = {"scale": 0.6, "x_init_innov": flat[0], "x_innov": flat[1:]}
        seeded = handlers.substitute(handlers.seed(model, 0), moved)
        return handlers.trace(seeded).get_trace(WELL)["x"]["value"]

    flat = jnp.append(values["x_init_innov"], values["x_innov"])
    _, log_det = jnp.linalg.slogdet(jax.jacobian(to_path)(flat))
    centred = {"scale": 0.6, "x": to_path(flat)}
    log_x, _ = log_density(well_model, (WELL,), {}, centred)
    np.testing.assert_allclose(log_z, log_x + log_det, rtol=1e-9)
    np.testing.assert_allclose(trace["x"]["value"], centred["x"], rtol=1e-10)


@pytest.mark.slow
def test_float32_is_close_to_float64():
    values = {"scale": 0.6, "x_init_innov": 0.3, "x_innov": np.full(11, -0.4)}
    options = {"at": {"scale": 0.5}}
    low = log_density(guided(well_model, **options), (WELL,), {}, values)[0]
    with jax.enable_x64(True):
        high = log_density(guided(well_model, **options), (WELL,), {}, values)[0]
    np.testing.assert_allclose(low, high, rtol=1e-4)


def test_without_data_it_is_the_prior():
    sites = handlers.trace(handlers.seed(guided(well_model), 0)).get_trace()
    assert list(sites) == ["scale", "x_init_innov", "x_innov", "x", "y", "u"]
    innovations = {k: sites[k]["value"] for k in ("scale", "x_innov")}
    white = handlers.reparam(well_model, config={"x": InnovationReparam()})
    same = handlers.substitute(white, {**innovations, "x_init": sites["x_init_innov"]["value"]})
    path = handlers.trace(handlers.seed(same, 0)).get_trace()["x"]["value"]
    np.testing.assert_allclose(path, sites["x"]["value"], rtol=1e-5)


@pytest.mark.slow
def test_data_by_condition_guide_as_data_by_obs():
    y = {"y": WELL, "u": jnp.array([1.0, 1.3])}
    by_condition = handlers.condition(guided(well_model, at={"scale": 0.5}), y)
    values = {"scale": 0.6, "x_init_innov": 0.0, "x_innov": np.zeros(11)}
    one, first = log_density(by_condition, (), {}, values)
    two, second = log_density(guided(well_model, at={"scale": 0.5}), (WELL,), {}, values)
    np.testing.assert_allclose(first["x"]["value"], second["x"]["value"], rtol=1e-6)
    np.testing.assert_allclose(one, two, rtol=1e-5)


@pytest.mark.slow
def test_masked_observations_do_not_guide():
    keep = jnp.asarray([True, False])
    y = np.stack([WELL, WELL])

    def model():
        with numpyro.plate("series", 2):
            sde = nsde.SDE(lambda t, x: -x, lambda t, x: 0.5)
            x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 1.0)))
            with handlers.mask(mask=keep):
                nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.01), obs=y)

    values = {"x_init_innov": jnp.zeros(2), "x_innov": jnp.zeros((2, 11))}
    _, sites = log_density(guided(model), (), {}, values)
    path = np.asarray(sites["x"]["value"])
    seen = ~np.isnan(WELL)
    np.testing.assert_allclose(path[0, seen], WELL[seen], atol=0.05)
    np.testing.assert_array_equal(path[1], 0.0)


@pytest.mark.slow
def test_a_refined_grid_is_guided_at_its_own_times():
    y = np.where(np.isnan(WELL), 0.9, WELL)

    def model():
        sde = nsde.SDE(lambda t, x: -x, lambda t, x: 0.5)
        x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 1.0)))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.01), obs=y[3:], at=np.arange(3, 12))

    fine = nsde.TimeGrid(TIMES, max_step=0.05)
    values = {"x_init_innov": 0.0, "x_innov": jnp.zeros(fine.times.size - 1)}
    _, sites = log_density(guided(nsde.handlers.refine(model, 0.05)), (), {}, values)
    path = np.asarray(sites["x"]["value"])
    if path.size == fine.times.size:
        path = path[fine.index]
    np.testing.assert_allclose(path[3:], y[3:], atol=0.05)


@pytest.mark.slow
def test_a_start_that_is_not_normal_and_a_fixed_one():
    def model(y, init):
        sde = nsde.processes.GeometricBrownianMotion(0.1, 0.3)
        x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, init))
        nsde.observe("y", x, lambda t, x: dist.Poisson(20.0 * x), obs=y)

    y = np.array([20, 22, 25, 19, 30, 33, 31, 40, 38, 36, 45, 50])
    for init, site in ((dist.LogNormal(0.0, 0.2), {"x_init"}), (1.0, set())):
        seeded = handlers.seed(guided(model), 0)
        sites = handlers.trace(seeded).get_trace(y, init)
        assert set(sites) == {"x_innov", "x_guide", "x", "y"} | site
        assert np.all(sites["x"]["value"] > 0)


@functools.cache
def quadrature():
    """Posterior of the scale in `well_model` by a grid filter: states on 400 points."""
    grid = np.linspace(-3.2, 3.2, 400)
    scales = np.exp(np.linspace(-1.6, 1.0, 53))

    def normal(x, mean, sd):
        return np.exp(-0.5 * ((x - mean) / sd) ** 2) / (sd * np.sqrt(2 * np.pi))

    def likelihood(scale):
        belief = normal(grid, 0.0, 1.0) * (grid[1] - grid[0])
        total = 0.0
        for k in range(12):
            if k:
                dt = TIMES[k] - TIMES[k - 1]
                mean = grid + (2.0 * grid - 2.0 * grid**3) * dt
                sd = scale * np.sqrt(1.0 + 0.5 * grid**2) * np.sqrt(dt)
                kernel = normal(grid[:, None], mean[None], sd[None])
                belief = (kernel @ belief) * (grid[1] - grid[0])
            if not np.isnan(WELL[k]):
                belief = belief * normal(WELL[k], grid, 0.1)
            if k in (8, 11):
                belief = belief * normal({8: 1.0, 11: 1.3}[k], grid**2, 0.2)
            mass = belief.sum()
            total, belief = total + np.log(mass), belief / mass
        return total

    log_post = np.array([likelihood(s) for s in scales])
    u = np.log(scales)
    log_post = log_post - 0.5 * ((u + 0.5) / 0.5) ** 2
    weight = np.exp(log_post - log_post.max())
    weight /= weight.sum()
    mean = weight @ u
    return mean, np.sqrt(weight @ (u - mean) ** 2)


@pytest.fixture(scope="module")
def fit():
    model = guided(well_model)
    mcmc = MCMC(
        NUTS(model, init_strategy=init_to_median()),
        num_warmup=300,
        num_samples=1500,
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), WELL, extra_fields=("num_steps", "diverging"))
    return model, mcmc


@pytest.mark.slow
def test_posterior_is_that_of_a_grid_filter(fit):
    """Seed 0, 1,500 draws: mean and sd of log scale within 4 Monte Carlo errors."""
    _, mcmc = fit
    mean, sd = quadrature()
    draws = np.log(np.asarray(mcmc.get_samples()["scale"], np.float64))
    ess = numpyro.diagnostics.effective_sample_size(draws[None])
    spread = numpyro.diagnostics.effective_sample_size(((draws - draws.mean()) ** 2)[None])
    assert int(mcmc.get_extra_fields()["diverging"].sum()) == 0
    assert abs(draws.mean() - mean) < 4 * sd / np.sqrt(ess)
    assert abs(draws.std() - sd) < 4 * sd / np.sqrt(2 * spread)


@pytest.mark.slow
def test_posterior_innovations_are_close_to_standard_normal(fit):
    z = np.asarray(fit[1].get_samples()["x_innov"])
    assert abs(z.std() - 1.0) < 0.1
    assert np.abs(z.mean(0)).max() < 0.4


@pytest.mark.slow
def test_draws_predict_with_the_guided_model(fit):
    model, mcmc = fit
    draws = {k: v[:5] for k, v in mcmc.get_samples().items()}
    again = Predictive(model, draws, return_sites=["x", "y"])(jax.random.key(0))
    np.testing.assert_allclose(again["x"].shape, (5, 12))


@pytest.mark.slow
def test_refreshed_guides_are_exact_too(fit):
    """The same density of the path whatever the guide: at the draws, log p(z) + log |dz/dx|."""
    _, mcmc = fit
    fresh = GuidedReparam(frozen=True).refreshed("x", mcmc.get_samples())
    np.testing.assert_allclose(fresh.at["scale"], mcmc.get_samples()["scale"].mean(), rtol=1e-6)
    model = handlers.reparam(well_model, config={"x": fresh})
    quality = nsde.diagnostics.guide_quality(
        model, mcmc.get_samples(), WELL, rng_key=jax.random.key(1), num_points=2, num_draws=400
    )
    usual = nsde.diagnostics.guide_quality(
        fit[0], mcmc.get_samples(), WELL, rng_key=jax.random.key(2), num_points=2, num_draws=400
    )
    # Two importance samples of the same two likelihoods.
    se = np.sqrt((1 / quality.efficiency + 1 / usual.efficiency - 2) / 400)
    assert np.all(np.abs(quality.log_likelihood - usual.log_likelihood) < 4 * se + 1e-4)
    assert np.all(usual.khat < 0.7)
    assert np.all(usual.efficiency > 0.3)


@pytest.mark.slow
def test_traced_data_fall_back_on_the_current_parameters():
    model = guided(well_model)
    svi = SVI(model, AutoNormal(model), numpyro.optim.Adam(1e-2), Trace_ELBO())
    state = svi.init(jax.random.key(0), WELL)
    _, loss = jax.jit(svi.update)(state, WELL)
    assert np.isfinite(loss)


def test_a_guide_survives_pickling():
    guide = GuidedReparam("data", at={"scale": 0.5}, frozen=True)
    copy = pickle.loads(pickle.dumps(guide))
    assert (copy.reference, copy.frozen, copy.at) == ("data", True, {"scale": 0.5})


def test_refusals():
    with pytest.raises(ValueError, match="reference must be 'smoother', 'data' or an array"):
        GuidedReparam("kalman")
    with pytest.raises(TypeError, match="at must map names of sites to values, got float"):
        GuidedReparam(at=0.5)
    with pytest.raises(ValueError, match="give one of them"):
        GuidedReparam(frozen=True, follow=1)
    with pytest.raises(TypeError, match="follow must be an integer"):
        GuidedReparam(follow=True)
    with pytest.raises(ValueError, match=r"samples must hold draws of 'x', got \['scale'\]"):
        GuidedReparam().refreshed("x", {"scale": np.ones(3)})
    short = guided(well_model, reference=np.zeros(5))
    with pytest.raises(ValueError, match=r"reference has shape \(5,\), but path 'x' has shape"):
        handlers.seed(short, 0)(WELL)
    with (
        pytest.raises(ValueError, match="it must wrap the model"),
        handlers.seed(rng_seed=0),
        handlers.reparam(config={"x": GuidedReparam()}),
    ):
        well_model(WELL)
    with pytest.raises(ValueError, match="site 'x' is conditioned on"):
        handlers.seed(handlers.condition(guided(well_model), {"x": jnp.zeros(12)}), 0)(WELL)


EXACT = nsde.schemes.LocalLinear()


@pytest.mark.slow
def test_a_reference_that_follows_the_parameters_leaves_innovations_alone(x64):
    """Counts whose gain scales the whole path: innovations are pulled as standard normals are."""
    counts = np.random.default_rng(3).poisson(np.exp(1.5 + np.sin(TIMES * 2.0)))

    def model(y=None):
        gain = numpyro.sample("gain", dist.LogNormal(0.0, 0.7))
        ou = nsde.processes.OrnsteinUhlenbeck(1.0, 0.0, 1.4)
        x = numpyro.sample("x", nsde.SDEPath(ou, TIMES, dist.Normal(0.0, 1.0)))
        nsde.observe("y", x, lambda t, x, g: dist.Poisson(jnp.exp(1.5 + g * x)), params=gain, obs=y)

    rng = np.random.default_rng(4)
    z = {"x_init_innov": rng.normal(), "x_innov": rng.normal(size=11)}

    def pull(follow, gain):
        reparam = GuidedReparam(follow=follow, at={"gain": 1.0})
        treated = handlers.reparam(model, config={"x": reparam})
        slope = jax.grad(lambda z: log_density(treated, (counts,), {}, {"gain": gain, **z})[0])(z)
        return np.linalg.norm(slope["x_innov"] + z["x_innov"])

    still, once = (pull(follow, 2.5) for follow in (0, 1))
    assert once < 0.3 * still


@pytest.mark.slow
def test_parameters_of_an_emission_drawn_after_the_path_guide_it():
    """Linear and normal: the whitened posterior is standard normal, wherever the gain is drawn."""

    def model(y):
        sde = nsde.SDE(lambda t, x: -x, lambda t, x: 0.5)
        law = nsde.SDEPath(sde, np.arange(5.0), dist.Normal(0.0, 1.0), scheme=EXACT)
        x = numpyro.sample("x", law)
        gain = numpyro.sample("gain", dist.LogNormal(0.0, 1.0))
        nsde.observe("y", x, lambda t, x, g: dist.Normal(g * x, 0.1), params=gain, obs=y)

    y = np.array([1.5, 0.4, -0.2, 0.9, 0.3])
    z = np.random.default_rng(0).normal(size=5)
    marginal = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())
    for gain in (0.7, 3.0):
        values = {"gain": gain, "x_init_innov": z[0], "x_innov": z[1:]}
        joint = log_density(guided(model, at={"gain": 1.0}), (y,), {}, values)[0]
        expected = log_density(marginal, (y,), {}, {"gain": gain})[0]
        normals = np.sum(dist.Normal(0.0, 1.0).log_prob(z))
        np.testing.assert_allclose(joint - normals, expected, rtol=2e-4)
