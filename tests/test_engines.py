"""One model function, untouched, under every engine and effect handler of NumPyro.

A plate of 200 series, each on its own clock, with missing data, and an input to the emission.
The numbers that come out are compared with each other and with NumPy; whole posteriors are
compared with exact ones in test_posteriors.py and test_direct_likelihood.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceGraph_ELBO, log_likelihood
from numpyro.infer.autoguide import AutoDelta, AutoNormal
from numpyro.infer.inspect import get_dependencies, get_model_relations
from numpyro.infer.util import log_density

import numpyro_sde as nsde

SERIES, LENGTH = 200, 4
RNG = np.random.default_rng(11)
CLOCKS = np.cumsum(RNG.uniform(0.1, 0.6, (SERIES, LENGTH)), axis=-1).astype(np.float32)
GAIN = RNG.uniform(0.5, 1.5, LENGTH).astype(np.float32)


def panel(times, gain, y=None):
    """Noisy mean-reverting series with rates of their own."""
    centre = numpyro.sample("centre", dist.Normal(0.0, 1.0))
    noise = numpyro.sample("noise", dist.LogNormal(-1.0, 0.5))
    with numpyro.plate("series", times.shape[0]):
        rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.3))
        sde = nsde.SDE(
            lambda t, x, p: p["rate"] * (p["centre"] - x),
            lambda t, x, p: 0.5,
            params={"rate": rate, "centre": centre},
        )
        x = numpyro.sample("x", nsde.SDEPath(sde, times, init=dist.Normal(centre, 0.5)))
        nsde.observe(
            "y", x, lambda t, x, p, u: dist.Normal(u * x, p), params=noise, inputs=gain, obs=y
        )


def make_data():
    seeded = handlers.seed(panel, jax.random.key(5))
    y = np.array(handlers.trace(seeded).get_trace(CLOCKS, GAIN)["y"]["value"])
    y[RNG.uniform(size=y.shape) < 0.2] = np.nan
    return y


@pytest.fixture(scope="module")
def data():
    return make_data()


SHAPES = {"centre": (), "noise": (), "rate": (SERIES,), "x": (SERIES, LENGTH)}


def assert_draws(draws, num):
    for name, shape in SHAPES.items():
        assert draws[name].shape == (num, *shape), name
        assert np.all(np.isfinite(draws[name])), name
        assert np.std(np.asarray(draws[name]), axis=0).min() > 0, name


@pytest.fixture(scope="module")
def fitted(data):
    kernel = NUTS(panel, max_tree_depth=5)
    mcmc = MCMC(kernel, num_warmup=20, num_samples=10, progress_bar=False)
    mcmc.run(jax.random.key(0), CLOCKS, GAIN, y=data)
    return mcmc


def numpy_log_likelihood(draws, data, i):
    mean = GAIN * np.asarray(draws["x"][i])
    return np.nansum(scipy.stats.norm(mean, float(draws["noise"][i])).logpdf(data), axis=-1)


def test_prior_predictive(key):
    draws = Predictive(panel, num_samples=3)(key, CLOCKS, GAIN)
    assert_draws(draws, 3)
    assert draws["y"].shape == (3, SERIES, LENGTH)


def test_nuts(fitted):
    assert_draws(fitted.get_samples(), 10)


@pytest.mark.parametrize("parallel", [False, True])
def test_posterior_predictive_and_log_likelihood(fitted, data, key, parallel):
    draws = fitted.get_samples()
    replicated = Predictive(panel, draws, parallel=parallel)(key, CLOCKS, GAIN)["y"]
    assert replicated.shape == (10, SERIES, LENGTH)
    assert np.all(np.isfinite(replicated))
    residual = (replicated - GAIN * draws["x"]) / draws["noise"][:, None, None]
    # 8,000 standard normals: mean within 4 / sqrt(8000), variance within 4 sqrt(2 / 8000)
    assert abs(float(residual.mean())) < 0.045
    assert abs(float(residual.var()) - 1) < 0.064
    each = log_likelihood(panel, draws, CLOCKS, GAIN, y=data, parallel=parallel)["y"]
    assert each.shape == (10, SERIES)
    for i in (0, 9):
        np.testing.assert_allclose(each[i], numpy_log_likelihood(draws, data, i), rtol=2e-4)


@pytest.mark.slow
def test_chains_side_by_side_with_traced_arguments(data):
    """`jit_model_args` hands the clocks over as traced arrays."""
    mcmc = MCMC(
        NUTS(panel, max_tree_depth=3),
        num_warmup=3,
        num_samples=3,
        num_chains=2,
        chain_method="vectorized",
        jit_model_args=True,
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0), CLOCKS, GAIN, y=data)
    assert_draws(mcmc.get_samples(), 6)


@pytest.mark.parametrize(
    ("guide_class", "elbo"),
    [(AutoNormal, Trace_ELBO(num_particles=2)), (AutoDelta, TraceGraph_ELBO())],
)
def test_svi(data, guide_class, elbo):
    guide = guide_class(panel)
    svi = SVI(panel, guide, numpyro.optim.Adam(0.05), elbo)
    result = svi.run(jax.random.key(1), 60, CLOCKS, GAIN, y=data, progress_bar=False)
    losses = np.asarray(result.losses)
    assert np.all(np.isfinite(losses))
    assert losses[-10:].mean() < losses[:10].mean()
    draws = guide.sample_posterior(jax.random.key(2), result.params, sample_shape=(3,))
    assert {name: d.shape for name, d in draws.items()} == {
        name: (3, *shape) for name, shape in SHAPES.items()
    }
    replicated = Predictive(panel, guide=guide, params=result.params, num_samples=3)
    assert replicated(jax.random.key(3), CLOCKS, GAIN)["y"].shape == (3, SERIES, LENGTH)


@pytest.mark.slow
def test_gradient_of_the_elbo_goes_through_the_path():
    """`has_rsample` lets TraceGraph_ELBO use path gradients: far less noise than scores."""

    def model():
        x = numpyro.sample("x", nsde.SDEPath(_ou(1.0), np.arange(5.0), init=0.0))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.5), obs=np.ones(5))

    def guide():
        rate = numpyro.param("rate", 0.5)
        numpyro.sample("x", nsde.SDEPath(_ou(rate), np.arange(5.0), init=0.0))

    def gradients(elbo):
        def loss(rate, key):
            return elbo.loss(key, {"rate": rate}, model, guide)

        keys = jax.random.split(jax.random.key(0), 200)
        return np.asarray(jax.vmap(jax.grad(loss), (None, 0))(0.5, keys))

    graph, plain = gradients(TraceGraph_ELBO()), gradients(Trace_ELBO())
    np.testing.assert_allclose(graph, plain, rtol=1e-3, atol=1e-4)


def _ou(rate):
    return nsde.SDE(lambda t, x, p: -p * x, lambda t, x, p: 0.5, params=rate)


# -- effect handlers ------------------------------------------------------------------------

TIMES = np.array([0.0, 0.3, 0.5, 1.0])
VALUE = jnp.array([0.2, 0.1, -0.3, 0.4])


def small(y=None):
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.3))
    x = numpyro.sample("x", nsde.SDEPath(_ou(rate), TIMES, init=dist.Normal(0.0, 1.0)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)
    return x


def total(fn, params, *args):
    return float(log_density(fn, args, {}, params)[0])


def truth(rate, x, y):
    steps = np.diff(TIMES)
    moves = scipy.stats.norm(x[:-1] - rate * x[:-1] * steps, 0.5 * np.sqrt(steps))
    return (
        scipy.stats.lognorm(0.3).logpdf(rate)
        + scipy.stats.norm(0, 1).logpdf(x[0])
        + moves.logpdf(x[1:]).sum()
        + np.nansum(scipy.stats.norm(x, 0.3).logpdf(y))
    )


DATA = np.array([0.0, np.nan, 0.2, 0.3])


def test_condition_and_substitute_in_any_order(key):
    expected = truth(1.3, np.asarray(VALUE), DATA)
    held, rate = {"x": VALUE}, {"rate": jnp.array(1.3)}
    for fn, params in (
        (small, {**held, **rate}),
        (handlers.condition(small, held), rate),
        (handlers.condition(handlers.substitute(small, rate), held), {}),
        (handlers.substitute(handlers.condition(small, held), rate), {}),
        (handlers.seed(handlers.condition(small, {**held, **rate}), key), {}),
        (handlers.condition(handlers.seed(small, key), {**held, **rate}), {}),
        (handlers.condition(handlers.seed(small, key), {**held, "y": DATA}), rate),
    ):
        data = () if "y" in getattr(fn, "data", {}) else (DATA,)
        np.testing.assert_allclose(total(fn, params, *data), expected, rtol=1e-5)


def test_mask_scope_block_and_lift(key):
    params = {"x": VALUE, "rate": jnp.array(1.3)}
    whole = truth(1.3, np.asarray(VALUE), DATA)
    np.testing.assert_allclose(total(handlers.mask(small, mask=False), params, DATA), 0.0)
    scaled = handlers.scale(small, scale=2.0)
    np.testing.assert_allclose(total(scaled, params, DATA), 2 * whole, rtol=1e-5)
    scoped = {f"a/{name}": v for name, v in params.items()}
    got = total(handlers.scope(small, "a"), scoped, DATA)
    np.testing.assert_allclose(got, whole, rtol=1e-5)
    hidden = handlers.block(handlers.seed(small, key), hide=["x"])
    assert set(handlers.trace(hidden).get_trace(DATA)) == {"rate", "y"}


def test_do_cuts_the_path_from_its_parameters(key):
    cut = handlers.do(handlers.seed(small, key), {"x": VALUE})
    trace = handlers.trace(cut).get_trace()
    np.testing.assert_allclose(trace["y"]["fn"].states, VALUE)
    far = handlers.do(handlers.seed(small, key), {"x": VALUE + 100.0})
    assert np.all(handlers.trace(far).get_trace()["y"]["value"] > 90)


def test_uncondition_makes_data_latent_again(key):
    free = handlers.uncondition(handlers.seed(small, key))
    y = handlers.trace(free).get_trace(np.full(4, 50.0))["y"]
    assert not y["is_observed"]
    assert np.all(np.abs(y["value"]) < 20)


def test_replay_and_collapse_of_prior_draws(key):
    first = handlers.trace(handlers.seed(small, key)).get_trace()
    again = handlers.trace(handlers.replay(handlers.seed(small, jax.random.key(9)), first))
    np.testing.assert_array_equal(again.get_trace()["x"]["value"], first["x"]["value"])


def test_obs_mask_of_directly_observed_paths(key):
    """Series not seen are drawn; the others keep their density."""
    seen = np.array([True, False, True])
    paths = np.stack([np.asarray(VALUE)] * 3)

    def model():
        with numpyro.plate("series", 3):
            law = nsde.SDEPath(_ou(1.0), TIMES, init=dist.Normal(0.0, 1.0))
            return numpyro.sample("x", law, obs=paths, obs_mask=seen)

    trace = handlers.trace(handlers.seed(model, key)).get_trace()
    value = trace["x"]["value"]
    np.testing.assert_allclose(value[seen], paths[seen])
    assert not np.allclose(value[1], paths[1])
    drawn = trace["x_unobserved"]["value"]
    np.testing.assert_allclose(value[1], drawn[1])


def test_the_model_is_rendered():
    relations = get_model_relations(small, model_args=(DATA,))
    assert relations["sample_sample"] == {"rate": [], "x": ["rate"], "y": ["x"]}
    assert relations["sample_dist"] == {"rate": "LogNormal", "x": "SDEPath", "y": "EmissionPath"}
    assert relations["observed"] == ["y"]
    dependencies = get_dependencies(small, (DATA,))["prior_dependencies"]
    assert set(dependencies["y"]) == {"x", "y"}
    panel_relations = get_model_relations(panel, model_args=(CLOCKS, GAIN))
    assert panel_relations["plate_sample"] == {"series": ["rate", "x", "y"]}


def test_drawing_the_graph():
    pytest.importorskip("graphviz")
    graph = numpyro.render_model(panel, model_args=(CLOCKS, GAIN), render_distributions=True)
    assert "SDEPath" in graph.source


def test_the_model_differentiates_and_vectorises_over_parameters():
    def density(rate):
        return log_density(small, (DATA,), {}, {"rate": rate, "x": VALUE})[0]

    rates = jnp.array([0.5, 1.0, 2.0])
    batched = jax.jit(jax.vmap(density))(rates)
    expected = [truth(float(r), np.asarray(VALUE), DATA) for r in rates]
    np.testing.assert_allclose(batched, expected, rtol=1e-5)
    slope = jax.grad(density)(1.0)
    step = 1e-3
    difference = (truth(1 + step, VALUE, DATA) - truth(1 - step, VALUE, DATA)) / (2 * step)
    np.testing.assert_allclose(slope, difference, rtol=1e-3)


def test_subsampled_plates(key):
    """A minibatch of series scales their densities."""

    def model():
        with numpyro.plate("series", 20, subsample_size=5) as rows:
            law = nsde.SDEPath(_ou(1.0), TIMES, init=dist.Normal(0.0, 1.0))
            x = numpyro.sample("x", law, obs=jnp.stack([VALUE] * 20)[rows])
            nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=np.zeros((20, 4))[rows])

    got = float(log_density(handlers.seed(model, key), (), {}, {})[0])
    law = nsde.SDEPath(_ou(1.0), TIMES, init=dist.Normal(0.0, 1.0))
    one = float(law.log_prob(VALUE)) + scipy.stats.norm(VALUE, 0.3).logpdf(0).sum()
    np.testing.assert_allclose(got, 20 * one, rtol=1e-5)


def test_nested_plates(key):
    def model():
        with numpyro.plate("labs", 2, dim=-2), numpyro.plate("series", 3, dim=-1):
            rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.3))
            x = numpyro.sample("x", nsde.SDEPath(_ou(rate), TIMES, init=dist.Normal(0.0, 1.0)))
            nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3))

    trace = handlers.trace(handlers.seed(model, key)).get_trace()
    assert trace["y"]["value"].shape == (2, 3, 4)
    x, rate = trace["x"]["value"], trace["rate"]["value"]
    got = trace["x"]["fn"].log_prob(x)
    for i in range(2):
        for j in range(3):
            law = nsde.SDEPath(_ou(rate[i, j]), TIMES, init=dist.Normal(0.0, 1.0))
            np.testing.assert_allclose(got[i, j], law.log_prob(x[i, j]), rtol=1e-4)


def test_the_law_as_a_site_of_scan(key):
    """A site of `contrib.control_flow.scan` is stacked over the loop's steps."""
    from numpyro.contrib.control_flow import scan

    def model():
        def body(carry, rate):
            law = nsde.SDEPath(_ou(rate), TIMES, init=dist.Normal(carry, 1.0))
            x = numpyro.sample("x", law)
            return x[-1], x

        return scan(body, 0.0, jnp.array([0.5, 1.0, 2.0]))

    trace = handlers.trace(handlers.seed(model, key)).get_trace()
    x = trace["x"]["value"]
    assert x.shape == (3, 4)
    got = trace["x"]["fn"].log_prob(x)
    for i, (rate, start) in enumerate(zip([0.5, 1.0, 2.0], [0.0, x[0, -1], x[1, -1]], strict=True)):
        law = nsde.SDEPath(_ou(rate), TIMES, init=dist.Normal(start, 1.0))
        np.testing.assert_allclose(got[i], law.log_prob(x[i]), rtol=1e-4)
