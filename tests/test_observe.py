"""The observation statement: densities, missing data, instruments, clocks, and bad input."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from jax.test_util import check_grads
from numpyro import handlers
from observing import NAN, PAIRS, PATH, TIMES, log_prob, scalar_sde, site

import numpyro_sde as nsde

# -- densities ------------------------------------------------------------------------------


def test_normal_with_time_params_and_inputs(x64):
    data = np.array([0.1, 0.2, NAN, 0.4, 0.5])
    u = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    got = log_prob(
        lambda t, x, p, u: dist.Normal(x * u + t, p["scale"]), data, params={"scale": 0.3}, inputs=u
    )
    truth = np.nansum(scipy.stats.norm(PATH * u + TIMES, 0.3).logpdf(data))
    np.testing.assert_allclose(got, truth, rtol=1e-12)


def test_pytrees_of_inputs_and_vector_inputs(x64):
    u = {"design": np.arange(10.0).reshape(5, 2), "offset": np.arange(5.0)}
    got = log_prob(
        lambda t, x, u: dist.Normal(x * u["design"].sum() + u["offset"], 1.0), np.ones(5), inputs=u
    )
    mean = PATH * u["design"].sum(-1) + u["offset"]
    np.testing.assert_allclose(got, scipy.stats.norm(mean, 1.0).logpdf(1.0).sum(), rtol=1e-12)


def test_poisson_counts_as_integers_and_as_floats_with_missing(x64):
    rate = np.exp(PATH)
    counts = np.array([0, 2, 1, 3, 0])
    emission = lambda t, x: dist.Poisson(jnp.exp(x))  # noqa: E731
    truth = scipy.stats.poisson(rate).logpmf(counts)
    np.testing.assert_allclose(log_prob(emission, counts), truth.sum(), rtol=1e-10)
    missing = np.where([0, 1, 0, 0, 1], NAN, counts)
    expected = truth[[0, 2, 3]].sum()
    np.testing.assert_allclose(log_prob(emission, missing), expected, rtol=1e-10)
    assert np.isneginf(log_prob(emission, counts + 0.5))


@pytest.mark.slow
def test_binomial_with_totals_as_inputs(x64, key):
    totals = np.array([3, 5, 2, 8, 4])
    emission = lambda t, x, u: dist.Binomial(u, logits=x)  # noqa: E731
    counts = np.array([1, 5, 0, 3, 2])
    truth = scipy.stats.binom(totals, 1 / (1 + np.exp(-PATH))).logpmf(counts).sum()
    np.testing.assert_allclose(log_prob(emission, counts, inputs=totals), truth, rtol=1e-10)
    law = site(emission, counts, inputs=totals)["fn"]
    assert law.is_discrete
    assert np.all(law.sample(key, (50,)) <= totals)
    assert np.all(law.support(law.sample(key, (3,))))


def test_a_categorical_emission(x64):
    emission = lambda t, x: dist.Categorical(logits=jnp.stack([x, -x, 0.0]))  # noqa: E731
    labels = np.array([0, 1, 2, 0, 1])
    logits = np.stack([PATH, -PATH, 0 * PATH], -1)
    truth = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(5), labels].sum()
    np.testing.assert_allclose(log_prob(emission, labels), truth, rtol=1e-10)


def test_a_support_that_moves_with_the_state(key):
    emission = lambda t, x: dist.Uniform(x, x + 1.0)  # noqa: E731
    np.testing.assert_allclose(log_prob(emission, PATH + 0.5), 0.0, atol=1e-5)
    assert np.isneginf(log_prob(emission, PATH - 0.5))
    y = site(emission)
    assert np.all((y["value"] >= PATH) & (y["value"] <= PATH + 1))
    support = y["fn"].support
    assert support(y["value"])
    assert not support(PATH - 0.5)
    mapped = dist.biject_to(support)(jnp.linspace(-9.0, 9.0, 5))
    assert np.all((mapped >= PATH) & (mapped <= PATH + 1))


TRIL = np.array([[0.5, 0.0, 0.0], [0.2, 0.7, 0.0], [-0.3, 0.1, 0.9]])
WEIGHTS = np.array([1.0, -2.0, 0.5])


def three(t, x):
    return dist.MultivariateNormal(WEIGHTS * x, scale_tril=TRIL)


def test_missing_components_are_those_of_the_marginal_normal(x64):
    rng = np.random.default_rng(1)
    data = rng.normal(size=(5, 3))
    data[rng.uniform(size=(5, 3)) < 0.4] = NAN
    data[2] = NAN
    cov, truth = TRIL @ TRIL.T, 0.0
    for k in range(5):
        keep = ~np.isnan(data[k])
        if keep.any():
            law = scipy.stats.multivariate_normal(
                (WEIGHTS * PATH[k])[keep], cov[np.ix_(keep, keep)]
            )
            truth += law.logpdf(data[k][keep])
    np.testing.assert_allclose(log_prob(three, data), truth, rtol=1e-10)


def test_missing_components_of_independent_ones(x64):
    data = np.where(np.arange(10).reshape(5, 2) % 3 == 0, NAN, 0.4)
    truth = np.nansum(scipy.stats.norm(PAIRS, 0.3).logpdf(data))
    for emission in (
        lambda t, x: dist.Normal(x, 0.3).to_event(1),
        lambda t, x: dist.Normal(x, 0.3),
        lambda t, x: dist.MultivariateNormal(x, 0.09 * jnp.eye(2)),
    ):
        np.testing.assert_allclose(log_prob(emission, data, PAIRS), truth, rtol=1e-10)


def test_gradients_with_missing_data_are_finite_and_right(x64):
    data = np.array([[0.1, NAN, 0.3], [NAN, NAN, NAN], [1.0, 2.0, 3.0], [NAN, 0.0, NAN], [0.0] * 3])

    def density(path, tril):
        def model():
            x = numpyro.sample("x", nsde.SDEPath(scalar_sde(), TIMES, init=dist.Normal(0.0, 1.0)))
            nsde.observe(
                "y",
                x,
                lambda t, x, p: dist.MultivariateNormal(WEIGHTS * x, scale_tril=p),
                params=tril,
                event_dims=2,
                obs=data,
            )

        held = handlers.condition(handlers.seed(model, 0), {"x": path})
        y = handlers.trace(held).get_trace()["y"]
        return y["fn"].log_prob(y["value"])

    with numpyro.validation_enabled(False):  # differences leave the triangular matrices
        check_grads(density, (jnp.asarray(PATH), jnp.asarray(TRIL)), 1, ["rev"])


def test_all_missing_is_no_information(x64):
    data = np.full(5, NAN)
    assert log_prob(lambda t, x: dist.Normal(x, 0.1), data) == 0.0
    assert log_prob(three, np.full((5, 3), NAN)) == 0.0
    assert (
        log_prob(lambda t, x: dist.Dirichlet(jnp.exp(x) * jnp.ones(3)), np.full((5, 3), NAN)) == 0
    )


def test_whole_observations_of_any_law_may_be_missing(x64):
    data = np.tile([0.2, 0.3, 0.5], (5, 1))
    data[[1, 3]] = NAN
    alpha = np.exp(PATH)[:, None] * np.ones(3)
    truth = sum(scipy.stats.dirichlet(alpha[k]).logpdf(data[k]) for k in (0, 2, 4))
    got = log_prob(lambda t, x: dist.Dirichlet(jnp.exp(x) * jnp.ones(3)), data)
    np.testing.assert_allclose(got, truth, rtol=1e-10)


def test_pointwise_terms_add_up():
    y = site(lambda t, x: dist.Normal(x, 0.3), np.array([0.1, NAN, 0.2, 0.3, NAN]))
    terms = y["fn"].log_prob_pointwise(y["value"])
    assert terms.shape == (5,)
    assert terms[1] == terms[4] == 0.0
    np.testing.assert_allclose(terms.sum(), y["fn"].log_prob(y["value"]), rtol=1e-6)


def test_a_masked_emission(x64):
    keep = np.array([True, False, True, True, False])
    got = log_prob(lambda t, x, u: dist.Normal(x, 0.3).mask(u), np.zeros(5), inputs=keep)
    truth = scipy.stats.norm(PATH, 0.3).logpdf(0.0)[keep].sum()
    np.testing.assert_allclose(got, truth, rtol=1e-10)


# -- which times ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "at",
    [
        [0, 3],
        np.array([3, 0]),
        np.array([4, 2, 0], np.uint8),
        [1, 1, 4],
        [-1],
        [-4, -2],
        (2,),
        jnp.array([0, 4]),
    ],
)
def test_at_takes_states_and_times_together(at, x64):
    rows = np.asarray(at)
    data = np.linspace(0.0, 1.0, len(rows))
    truth = scipy.stats.norm(PATH[rows] + 10 * TIMES[rows], 0.3).logpdf(data).sum()
    got = log_prob(lambda t, x: dist.Normal(x + 10 * t, 0.3), data, at=at)
    np.testing.assert_allclose(got, truth, rtol=1e-10)
    vector = log_prob(lambda t, x: dist.Normal(x[0] + 10 * t, 0.3), data, PAIRS, at=at)
    np.testing.assert_allclose(vector, truth, rtol=1e-10)


def test_a_grid_observed_at_its_index(key):
    grid = nsde.TimeGrid([0.0, 1.0, 1.5], max_step=0.3)

    def model(y=None):
        x = numpyro.sample("x", nsde.SDEPath(scalar_sde(), grid, init=0.0))
        return nsde.observe("y", x, lambda t, x: dist.Normal(x, 1e-4), obs=y, at=grid.index)

    trace = handlers.trace(handlers.seed(model, key)).get_trace()
    np.testing.assert_allclose(trace["y"]["value"], trace["x"]["value"][grid.index], atol=1e-3)
    np.testing.assert_allclose(trace["y"]["fn"].times, [0.0, 1.0, 1.5])


def two_instruments(precise=None, coarse=None):
    x = numpyro.sample("x", nsde.SDEPath(scalar_sde(), TIMES, init=0.0))
    nsde.observe("precise", x, lambda t, x: dist.Normal(x, 0.1), obs=precise, at=[0, 2, 4])
    nsde.observe("coarse", x, lambda t, x: dist.Normal(2 * x + t, 0.5), obs=coarse)


def test_two_instruments_on_two_clocks(key, x64):
    path = PATH - PATH[0]
    precise, coarse = np.array([0.0, 0.1, 0.2]), np.array([0.5, NAN, 0.4, NAN, 0.3])
    held = handlers.condition(handlers.seed(two_instruments, key), {"x": jnp.asarray(path)})
    trace = handlers.trace(held).get_trace(precise, coarse)
    truth = {
        "precise": scipy.stats.norm(path[[0, 2, 4]], 0.1).logpdf(precise).sum(),
        "coarse": np.nansum(scipy.stats.norm(2 * path + TIMES, 0.5).logpdf(coarse)),
    }
    for name, expected in truth.items():
        got = trace[name]["fn"].log_prob(trace[name]["value"])
        np.testing.assert_allclose(got, expected, rtol=1e-10)


def timed(t, x):
    return dist.Normal(x + t, 1e-3)


def two_paths(y=None):
    """Two paths of one length on two clocks: each statement must find its own."""
    one = numpyro.sample("one", nsde.SDEPath(scalar_sde(), TIMES, init=0.0))
    two = numpyro.sample("two", nsde.SDEPath(scalar_sde(), TIMES + 100.0, init=0.0))
    nsde.observe("y_one", one, timed, obs=y)
    nsde.observe("y_two", two, timed, obs=y)


ZERO = {"one": np.zeros(5, np.float32), "two": np.zeros(5, np.float32)}
HELD = {
    "drawn": lambda: handlers.seed(two_paths, 0),
    "conditioned": lambda: handlers.condition(handlers.seed(two_paths, 0), ZERO),
    "substituted": lambda: handlers.substitute(handlers.seed(two_paths, 0), ZERO),
    "substituted inside": lambda: handlers.seed(handlers.substitute(two_paths, ZERO), 0),
    "scoped": lambda: handlers.scope(handlers.seed(two_paths, 0), "a"),
    "whitened": lambda: handlers.seed(
        handlers.reparam(
            two_paths,
            config={n: nsde.reparam.InnovationReparam() for n in ("one", "two")},
        ),
        0,
    ),
}


@pytest.mark.parametrize("how", HELD)
def test_each_path_keeps_its_clock(how):
    trace = handlers.trace(HELD[how]()).get_trace()
    prefix = "a/" if how == "scoped" else ""
    np.testing.assert_allclose(trace[prefix + "y_one"]["fn"].times, TIMES)
    np.testing.assert_allclose(trace[prefix + "y_two"]["fn"].times, TIMES + 100.0)


def test_without_a_trace_a_replaced_value_is_found_by_shape_or_refused():
    def one_path():
        x = numpyro.sample("x", nsde.SDEPath(scalar_sde(), TIMES + 7.0, init=0.0))
        return nsde.observe("y", x, timed)

    for _ in range(2):  # paths of earlier runs of other models are not candidates
        handlers.seed(two_paths, 0)()
        for handler in (handlers.substitute, handlers.condition, handlers.do):
            y = handlers.seed(handler(one_path, {"x": jnp.zeros(5)}), 0)()
            np.testing.assert_allclose(y, TIMES + 7.0, atol=0.01)
    with pytest.raises(ValueError, match="several paths on different clocks would fit it"):
        handlers.seed(handlers.substitute(two_paths, ZERO), 0)()


def test_an_array_that_is_no_path_is_refused_also_after_other_models():
    handlers.seed(two_paths, 0)()

    def no_path():
        nsde.observe("y", jnp.zeros(5), timed)

    for run in (handlers.seed(no_path, 0), lambda: nsde.observe("y", PATH, timed)):
        with pytest.raises(
            ValueError,
            match=r"observe\('y'\): x of shape \(5,\) is not the value of an SDEPath site, and no "
            r"path would fit it",
        ):
            run()


def test_a_transformed_path_keeps_the_clock_of_the_only_path():
    y = site(lambda t, x: dist.Normal(x, 0.1), np.zeros(5), x_of=jnp.exp)
    np.testing.assert_allclose(y["fn"].states, np.exp(PATH), rtol=1e-6)
    np.testing.assert_allclose(y["fn"].times, TIMES)


def test_times_can_be_given():
    def model():
        nsde.observe("y", jnp.zeros((2, 5)), timed, times=TIMES, obs=np.zeros((2, 5)))
        nsde.observe("z", jnp.zeros((5, 2)), lambda t, x: dist.Normal(x, 1.0), times=TIMES)

    trace = handlers.trace(handlers.seed(model, 0)).get_trace()
    assert trace["y"]["fn"].batch_shape == (2,)
    assert trace["z"]["value"].shape == (5, 2)


def test_observing_a_path_given_as_data(x64):
    """A directly observed path may be observed by another instrument too."""

    def model(x):
        x = numpyro.sample("x", nsde.SDEPath(scalar_sde(), TIMES, init=0.0), obs=x)
        numpyro.sample("other", nsde.SDEPath(scalar_sde(), TIMES + 5.0, init=0.0))
        nsde.observe("y", x, timed, obs=np.zeros(5))

    trace = handlers.trace(handlers.seed(model, 0)).get_trace(PATH)
    np.testing.assert_allclose(trace["y"]["fn"].times, TIMES)


# -- panels ---------------------------------------------------------------------------------


def test_a_panel_equals_a_loop(key, x64):
    """Own clocks, parameters of a series, inputs shared and of a series, missing data."""
    rng = np.random.default_rng(0)
    clocks = np.cumsum(rng.uniform(0.1, 1.0, (3, 5)), -1)
    paths, data = rng.normal(size=(2, 3, 5))
    data[rng.uniform(size=(3, 5)) < 0.3] = NAN
    scale, shared, own = np.array([0.3, 0.5, 0.9]), rng.normal(size=5), rng.normal(size=(3, 5))

    def emission(t, x, p, u):
        return dist.Normal(x * u[0] + u[1] + t, p)

    def model():
        with numpyro.plate("series", 3):
            law = nsde.SDEPath(scalar_sde(), clocks, init=dist.Normal(0.0, 1.0))
            x = numpyro.sample("x", law)
            nsde.observe("y", x, emission, params=scale, inputs=(shared, own), obs=data)

    held = handlers.condition(handlers.seed(model, key), {"x": jnp.asarray(paths)})
    y = handlers.trace(held).get_trace()["y"]
    assert y["fn"].batch_shape == (3,)
    mean = paths * shared + own + clocks
    truth = np.nansum(scipy.stats.norm(mean, scale[:, None]).logpdf(data), axis=-1)
    np.testing.assert_allclose(y["fn"].log_prob(y["value"]), truth, rtol=1e-10)


def test_a_panel_as_large_as_the_observation_is_not_mixed_up_with_it(x64):
    """Two series of two-dimensional states: `scale` of shape (2,) belongs to the series."""
    paths, scale = np.stack([PAIRS, 2 * PAIRS]), np.array([0.3, 2.0])

    def model():
        with numpyro.plate("series", 2):
            init = dist.Normal(jnp.zeros(2), 1.0).to_event(1)
            x = numpyro.sample("x", nsde.SDEPath(scalar_sde(), TIMES, init=init))
            nsde.observe(
                "y", x, lambda t, x, p: dist.Normal(x, p).to_event(1), params=scale,
                obs=np.zeros((2, 5, 2)),
            )  # fmt: skip

    held = handlers.condition(handlers.seed(model, 0), {"x": jnp.asarray(paths)})
    y = handlers.trace(held).get_trace()["y"]
    truth = scipy.stats.norm(paths, scale[:, None, None]).logpdf(0.0).sum((-1, -2))
    np.testing.assert_allclose(y["fn"].log_prob(y["value"]), truth, rtol=1e-10)


def test_a_module_may_be_an_emission(x64):
    class Instrument(eqx.Module):
        gain: jax.Array
        scale: float

        def __call__(self, t, x):
            return dist.Normal(self.gain * x, self.scale)

    truth = scipy.stats.norm(2 * PATH, 0.5).logpdf(0.0).sum()
    got = log_prob(Instrument(jnp.asarray(2.0), 0.5), np.zeros(5))
    np.testing.assert_allclose(got, truth, rtol=1e-10)


def test_partly_missing_traced_data_give_nan_not_a_number():
    """Under jit the pattern is unknown: no density is better than a wrong one."""

    @jax.jit
    def density(data):
        y = site(lambda t, x: dist.Dirichlet(jnp.ones(3)), data)
        return y["fn"].log_prob(y["value"])

    whole = np.full((5, 3), 1 / 3)
    assert np.isfinite(density(whole))
    assert np.isfinite(density(np.where(np.arange(5)[:, None] == 2, NAN, whole)))
    assert np.isnan(density(np.where(np.arange(15).reshape(5, 3) == 4, NAN, whole)))
