"""to_arviz: groups, names of dimensions, pointwise log likelihood, missing data, round trip."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from diagnostic_models import (
    CONJUGATE_DATA,
    conjugate,
    conjugate_posterior,
    fit,
    panel,
    plane,
    walk,
)
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoNormal
from scipy.stats import norm

from numpyro_sde.diagnostics import SVIFit, Timing, to_arviz
from numpyro_sde.diagnostics.compare.arviz_compat import get_group, list_groups, load_arviz
from numpyro_sde.reparam import InnovationReparam

TIMES = np.array([0.0, 0.5, 1.0, 2.0, 2.5, 4.0])
WALK_DATA = np.array([0.1, -0.2, np.nan, 0.4, 0.9, 0.5])
PANEL_DATA = np.where(
    np.arange(18).reshape(3, 6) % 7 == 3, np.nan, np.sin(np.arange(18.0)).reshape(3, 6)
)


def dims(tree, group):
    return {str(k): v.dims for k, v in get_group(tree, group).data_vars.items()}


def whitened_draws():
    """Values for the whitened walk: a converter takes any, so no sampler need run."""
    rng = np.random.default_rng(0)
    return {
        "rate": rng.gamma(4.0, 0.25, size=(2, 40)),
        "x_init": rng.normal(size=(2, 40)),
        "x_innov": rng.normal(size=(2, 40, 5)),
    }


@pytest.fixture(scope="module")
def walk_tree():
    model = handlers.reparam(walk, config={"x": InnovationReparam()})
    options = {"model": model, "model_args": (TIMES,), "model_kwargs": {"y": WALK_DATA}}
    return to_arviz(
        whitened_draws(),
        times=TIMES,
        prior=30,
        posterior_predictive=20,
        group_by_chain=True,
        **options,
    )


@pytest.fixture(scope="module")
def conjugate_mcmc():
    return fit(conjugate, y=CONJUGATE_DATA)


@pytest.fixture(scope="module")
def conjugate_svi():
    svi = SVI(conjugate, AutoNormal(conjugate), numpyro.optim.Adam(0.05), Trace_ELBO())
    return svi, svi.run(jax.random.key(0), 300, y=CONJUGATE_DATA, progress_bar=False)


def gaussian(path, y, scale=0.3):
    return norm.logpdf(y, path, scale)


@pytest.mark.slow
def test_groups_dims_and_coords_of_a_reparametrised_path(walk_tree):
    expected = {
        *("posterior", "log_likelihood", "observed_data"),
        *("posterior_predictive", "prior", "prior_predictive"),
    }
    assert set(list_groups(walk_tree)) == expected
    assert dims(walk_tree, "posterior") == {
        "rate": ("chain", "draw"),
        "x": ("chain", "draw", "time"),
        "x_init": ("chain", "draw"),
        "x_innov": ("chain", "draw", "time_step"),
    }
    posterior = get_group(walk_tree, "posterior")
    assert dict(posterior.sizes) == {"chain": 2, "draw": 40, "time": 6, "time_step": 5}
    np.testing.assert_array_equal(posterior["time"], TIMES)
    np.testing.assert_array_equal(posterior["time_step"], TIMES[1:])
    # The path is what the law makes of these values: x' = x + rate (0 - x) dt + 0.7 sqrt(dt) z.
    draws, path = whitened_draws(), [posterior["x_init"].values]
    for k, dt in enumerate(np.diff(TIMES)):
        step = draws["x_innov"][..., k] * 0.7 * np.sqrt(dt)
        path.append(path[-1] * (1 - draws["rate"] * dt) + step)
    np.testing.assert_allclose(posterior["x"], np.stack(path, axis=-1), rtol=1e-4, atol=1e-5)
    # Labels are usable as such.
    assert posterior["x"].sel(time=2.5).shape == (2, 40)
    assert dims(walk_tree, "posterior_predictive") == {"y": ("chain", "draw", "time")}
    assert get_group(walk_tree, "posterior_predictive")["y"].shape == (2, 10, 6)
    assert get_group(walk_tree, "prior")["x"].shape == (1, 30, 6)
    assert get_group(walk_tree, "prior_predictive")["y"].shape == (1, 30, 6)
    assert not np.isnan(get_group(walk_tree, "posterior_predictive")["y"]).any()


@pytest.mark.slow
def test_mcmc_knows_its_model_data_and_statistics(conjugate_mcmc):
    tree = to_arviz(conjugate_mcmc)
    posterior, stats = get_group(tree, "posterior"), get_group(tree, "sample_stats")
    samples = conjugate_mcmc.get_samples(group_by_chain=True)
    np.testing.assert_array_equal(posterior["theta"], samples["theta"])
    assert (posterior.attrs["method"], posterior.attrs["engine"]) == ("mcmc", "NUTS")
    extra = conjugate_mcmc.get_extra_fields(group_by_chain=True)
    np.testing.assert_array_equal(stats["lp"], -np.asarray(extra["potential_energy"]))
    np.testing.assert_array_equal(stats["n_steps"], extra["num_steps"])
    assert np.all(2 ** stats["tree_depth"] > stats["n_steps"])
    assert stats["diverging"].dtype == bool
    log_lik = get_group(tree, "log_likelihood")["y"]
    assert log_lik.dims == ("chain", "draw", "obs")
    expected = norm.logpdf(CONJUGATE_DATA, np.asarray(samples["theta"])[..., None])
    np.testing.assert_allclose(log_lik, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_log_likelihood_leaves_missing_times_out(walk_tree):
    log_lik = get_group(walk_tree, "log_likelihood")["y"]
    path = get_group(walk_tree, "posterior")["x"].values
    seen = ~np.isnan(WALK_DATA)
    np.testing.assert_allclose(log_lik, gaussian(path, WALK_DATA)[..., seen], rtol=2e-4, atol=1e-5)
    np.testing.assert_array_equal(log_lik["time_observed_y"], TIMES[seen])
    np.testing.assert_array_equal(get_group(walk_tree, "observed_data")["y"], WALK_DATA)
    loo = load_arviz().loo(walk_tree)
    assert loo.n_data_points == 5


def test_predictions_are_drawn_about_the_thinned_paths(walk_tree):
    predicted = get_group(walk_tree, "posterior_predictive")["y"]
    path = get_group(walk_tree, "posterior")["x"].sel(draw=predicted["draw"])
    residual = (predicted - path).values.ravel() / 0.3
    n = residual.size
    assert abs(residual.mean()) < 4 / np.sqrt(n)
    assert abs(residual.var() - 1) < 4 * np.sqrt(2 / n)


def test_netcdf_round_trip(walk_tree, tmp_path):
    walk_tree.to_netcdf(tmp_path / "fit.nc")
    import xarray

    again = xarray.open_dataset(tmp_path / "fit.nc", group="posterior", engine="h5netcdf")
    np.testing.assert_array_equal(again["x"], get_group(walk_tree, "posterior")["x"])
    assert again.attrs["method"] == "draws"
    again.close()


def test_panel_with_a_clock_for_each_series():
    clocks = TIMES + np.array([[0.0], [0.1], [0.7]])
    rng = np.random.default_rng(0)
    draws = {
        "centre": rng.normal(size=15),
        "rate": rng.gamma(4.0, 0.25, size=(15, 3)),
        "x": rng.normal(size=(15, 3, 6)),
    }
    tree = to_arviz(draws, model=panel, model_args=(clocks,), model_kwargs={"y": PANEL_DATA})
    assert dims(tree, "posterior") == {
        "centre": ("chain", "draw"),
        "rate": ("chain", "draw", "series"),
        "x": ("chain", "draw", "series", "time"),
    }
    posterior = get_group(tree, "posterior")
    np.testing.assert_array_equal(posterior["time"], np.arange(6))
    assert posterior["time_value"].dims == ("series", "time")
    np.testing.assert_allclose(posterior["time_value"], clocks, rtol=1e-6)
    log_lik = get_group(tree, "log_likelihood")["y"]
    seen = ~np.isnan(PANEL_DATA)
    expected = gaussian(posterior["x"].values, PANEL_DATA)[:, :, seen]
    np.testing.assert_allclose(log_lik, expected, rtol=2e-4, atol=1e-5)
    series, _ = np.nonzero(seen)
    np.testing.assert_array_equal(log_lik["y_series"], series)
    np.testing.assert_allclose(log_lik["y_time_value"], clocks[seen], rtol=1e-6)


def test_state_dimension_user_coords_and_exclude():
    y = np.zeros(6)
    draws = {"rate": np.ones(4), "x": np.random.default_rng(0).normal(size=(4, 6, 2))}
    options = {"model": plane, "model_args": (TIMES,), "model_kwargs": {"y": y}}
    tree = to_arviz(draws, coords={"state": ["seen", "hidden"]}, **options)
    assert dims(tree, "posterior")["x"] == ("chain", "draw", "time", "state")
    assert get_group(tree, "posterior")["x"].sel(state="seen").shape == (1, 4, 6)
    expected = gaussian(draws["x"][..., 0], y)
    np.testing.assert_allclose(get_group(tree, "log_likelihood")["y"][0], expected, rtol=1e-4)
    short = to_arviz(draws, exclude=("x",), **options)
    assert list(dims(short, "posterior")) == ["rate"]
    np.testing.assert_allclose(get_group(short, "log_likelihood")["y"][0], expected, rtol=1e-4)
    own = to_arviz(draws, dims={"x": ["when", "which"]}, **options)
    assert dims(own, "posterior")["x"] == ("chain", "draw", "when", "which")


def test_observations_at_some_times_have_their_own_clock():
    at = np.array([1, 3, 5])
    draws = {"rate": np.ones(3), "x": np.zeros((3, 6))}
    options = {"model": walk, "model_args": (TIMES,), "model_kwargs": {"y": np.ones(3), "at": at}}
    tree = to_arviz(draws, **options)
    log_lik = get_group(tree, "log_likelihood")["y"]
    assert log_lik.dims == ("chain", "draw", "time_y")
    np.testing.assert_array_equal(log_lik["time_y"], TIMES[at])
    # Labels such as dates carry over to the subset.
    dates = np.array([f"2020-01-0{day}" for day in range(1, 7)], "datetime64[ns]")
    dated = to_arviz(draws, times=dates, **options)
    np.testing.assert_array_equal(get_group(dated, "posterior")["time"], dates)
    np.testing.assert_array_equal(get_group(dated, "log_likelihood")["time_y"], dates[at])


def test_svi_draws_weights_and_attributes(conjugate_svi):
    svi, result = conjugate_svi
    timing = Timing(wall_time=3.0, compile_time=2.0)
    whole = SVIFit(svi, result, model_kwargs={"y": CONJUGATE_DATA}, timing=timing)
    tree = to_arviz(whole, num_samples=2000)
    posterior = get_group(tree, "posterior")
    assert posterior["theta"].dims == ("chain", "draw")
    assert dict(posterior.sizes) == {"chain": 1, "draw": 2000}
    assert posterior.attrs["method"] == "variational"
    assert (posterior.attrs["sampling_time"], posterior.attrs["compile_time"]) == (1.0, 2.0)
    theta = posterior["theta"].values[0]
    loc, scale = (np.asarray(result.params[f"theta_auto_{k}"]) for k in ("loc", "scale"))
    assert abs(theta.mean() - loc) < 4 * scale / np.sqrt(2000)
    stats = get_group(tree, "sample_stats")
    log_p = norm.logpdf(theta) + norm.logpdf(CONJUGATE_DATA[:, None], theta).sum(axis=0)
    np.testing.assert_allclose(stats["log_p"][0], log_p, rtol=1e-5)
    np.testing.assert_allclose(stats["log_q"][0], norm.logpdf(theta, loc, scale), atol=1e-4)
    log_lik = get_group(tree, "log_likelihood")["y"]
    assert log_lik.dims == ("chain", "draw", "obs")
    np.testing.assert_allclose(
        log_lik[0], norm.logpdf(CONJUGATE_DATA, theta[:, None]), rtol=1e-4, atol=1e-5
    )


def test_tuple_guide_function_and_point_guide(conjugate_svi):
    svi, result = conjugate_svi
    kwargs = {"model_kwargs": {"y": CONJUGATE_DATA}, "num_samples": 50}
    one = to_arviz((svi, result), **kwargs)
    two = to_arviz((svi.guide, result.params), **kwargs)
    theta = get_group(one, "posterior")["theta"]
    np.testing.assert_array_equal(theta, get_group(two, "posterior")["theta"])
    mean, sd, log_z = conjugate_posterior()

    def guide(y=None):
        numpyro.sample("theta", dist.Normal(numpyro.param("loc", 0.0), sd))

    exact = to_arviz((guide, {"loc": mean}), model=conjugate, **kwargs)
    stats = get_group(exact, "sample_stats")
    # With the exact posterior as guide every weight is the evidence.
    np.testing.assert_allclose(stats["log_p"] - stats["log_q"], log_z, rtol=1e-5)
    svi = SVI(conjugate, AutoDelta(conjugate), numpyro.optim.Adam(0.05), Trace_ELBO())
    result = svi.run(jax.random.key(0), 300, y=CONJUGATE_DATA, progress_bar=False)
    point = to_arviz((svi, result), **kwargs)
    np.testing.assert_allclose(get_group(point, "posterior")["theta"], mean, atol=0.02)
    assert "sample_stats" not in list_groups(point)
    assert get_group(point, "log_likelihood")["y"].shape == (1, 50, 6)


def test_dictionary_of_draws_with_and_without_chains():
    grouped = {"a": np.zeros((2, 5)), "x": np.zeros((2, 5, 6))}
    tree = to_arviz(grouped, times=TIMES, group_by_chain=True)
    assert dims(tree, "posterior") == {"a": ("chain", "draw"), "x": ("chain", "draw", "time")}
    assert list_groups(tree) == ["posterior"]
    flat = to_arviz({"a": np.zeros(5)})
    assert get_group(flat, "posterior")["a"].shape == (1, 5)


def test_draws_of_the_data_do_not_replace_the_data():
    draws = {"theta": np.zeros(4), "y": np.full((4, 6), 99.0)}
    tree = to_arviz(draws, model=conjugate, model_kwargs={"y": CONJUGATE_DATA})
    np.testing.assert_allclose(
        get_group(tree, "log_likelihood")["y"][0, 0], norm.logpdf(CONJUGATE_DATA), rtol=1e-5
    )


@pytest.mark.parametrize("wrap", ["to_event", "mask", "expand", "law"])
def test_pointwise_density_through_wrappers(wrap):
    """NumPyro's own wrappers about independent noise, and a law observed as a path."""
    y = np.array([[0.0, 1.0, 2.0], [0.5, np.nan, 0.1]]) if wrap == "mask" else np.ones((2, 3))
    present = ~np.isnan(y)
    present[:, 0] &= wrap != "law"

    class Law(dist.Distribution):
        support = dist.constraints.real_vector

        def __init__(self):
            self.times = np.array([0.0, 1.0, 3.0])
            super().__init__((2,), (3,))

        def log_prob_pointwise(self, value):
            # A path from a fixed start: its first state has no density.
            return dist.Normal(0.0, 1.0).log_prob(value).at[..., 0].set(0.0)

        def log_prob(self, value):
            return self.log_prob_pointwise(value).sum(-1)

        def sample(self, key, sample_shape=()):
            return jax.random.normal(key, (*sample_shape, 2, 3))

    laws = {
        "to_event": lambda: dist.Normal(jnp.zeros((2, 3)), 1.0).to_event(1),
        "mask": lambda: dist.Normal(jnp.zeros((2, 3)), 1.0).mask(present),
        "expand": lambda: dist.Normal(jnp.zeros(3), 1.0).to_event(1).expand([2]),
        "law": Law,
    }

    def model():
        numpyro.sample("a", dist.Normal(0.0, 1.0))
        with numpyro.plate("series", 2, dim=-2 if wrap == "mask" else -1):
            numpyro.sample("y", laws[wrap](), obs=np.nan_to_num(y))

    tree = to_arviz({"a": np.zeros(2)}, model=model, times=None if wrap == "law" else np.arange(3))
    log_lik = get_group(tree, "log_likelihood")["y"]
    np.testing.assert_allclose(log_lik.values.reshape(2, -1)[0], norm.logpdf(y)[present], rtol=1e-5)
    if wrap == "law":
        assert log_lik.dims == ("chain", "draw", "series", "time_observed_y")
        np.testing.assert_array_equal(log_lik["time_observed_y"], [1.0, 3.0])
    elif wrap != "mask":
        assert log_lik.dims == ("chain", "draw", "series", "time")


def test_factor_is_no_observation():
    def model():
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        numpyro.factor("penalty", -(a**2))

    assert list_groups(to_arviz({"a": np.zeros(3)}, model=model)) == ["posterior"]


def test_errors_name_the_argument(conjugate_svi):
    with pytest.raises(TypeError, match=r"fit must be an MCMC.*got str"):
        to_arviz("fit")
    with pytest.raises(ValueError, match=r"\(draw, \.\.\.\).*'b': \(4,\)"):
        to_arviz({"a": np.zeros(3), "b": np.zeros(4)})
    with pytest.raises(ValueError, match=r"times has 5 entries.*'x': \(6,\)"):
        to_arviz({"x": np.zeros((4, 6))}, times=np.arange(5.0))
    with pytest.raises(ValueError, match=r"dims\['x'\] must name 1 dimensions"):
        to_arviz({"x": np.zeros((4, 6))}, dims={"x": ["a", "b"]})
    with pytest.raises(ValueError, match=r"coords\['time'\] must have 6 entries, got 2"):
        to_arviz({"x": np.zeros((4, 6))}, times=TIMES, coords={"time": [0, 1]})
    with pytest.raises(TypeError, match="give model="):
        to_arviz((lambda: None, {}))
    mcmc = numpyro.infer.MCMC(numpyro.infer.NUTS(conjugate), num_warmup=1, num_samples=1)
    with pytest.raises(ValueError, match="has not run"):
        to_arviz(mcmc)
