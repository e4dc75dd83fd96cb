"""A second call of a public function compiles nothing: not with new data, nor a model made anew."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.util import log_density

import numpyro_sde as nsde
from numpyro_sde.diagnostics import compiled_chain
from numpyro_sde.runtime.clock import Stopwatch
from numpyro_sde.runtime.entry import entry_point

TIMES = np.arange(9.0)
FILTERS = {
    "Kalman": nsde.filters.Kalman,
    "ExtendedKalman": nsde.filters.ExtendedKalman,
    "UnscentedKalman": nsde.filters.UnscentedKalman,
    "MomentMatching": nsde.filters.MomentMatching,
    "EnsembleKalman": lambda: nsde.filters.EnsembleKalman(20),
}


def data(seed):
    return np.random.default_rng(seed).normal(size=len(TIMES))


def path(rate):
    """A law made anew, functions included."""
    sde = nsde.SDE(lambda t, x, p: -p * x, lambda t, x, p: 0.5, params=jnp.asarray(rate))
    return nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 1.0), scheme=nsde.schemes.Euler())


def filtered(make, rate, seed):
    return nsde.filter_path(path(rate), lambda t, x: dist.Normal(x, 0.1), data(seed), method=make())


def programs(call, *args):
    with Stopwatch() as watch:
        result = jax.block_until_ready(call(*args))
    return watch.programs, result


@pytest.mark.parametrize("name", FILTERS)
def test_filter_path_smooth_and_sample(name):
    make = FILTERS[name]

    def run(rate, seed):
        result = filtered(make, rate, seed)
        key = jax.random.key(seed)
        return result.log_likelihood, result.smooth(), result.sample(key, 3)

    assert programs(run, 1.0, 0)[0] > 0
    again, (second, *_) = programs(run, 0.7, 1)
    assert again == 0
    # It is the second model's likelihood of the second data.
    jax.clear_caches()
    np.testing.assert_allclose(second, filtered(make, 0.7, 1).log_likelihood, rtol=1e-5)


def test_what_a_function_reads_counts():
    noise = 0.1

    def run(emission):
        result = nsde.filter_path(path(1.0), emission, data(0), method=nsde.filters.Kalman())
        return result.log_likelihood

    def emission(t, x):
        return dist.Normal(x, noise)

    quiet = run(emission)
    noise = 2.0
    loud = run(emission)
    assert abs(float(loud - quiet)) > 1.0
    expected = run(lambda t, x: dist.Normal(x, 2.0))
    np.testing.assert_allclose(loud, expected, rtol=1e-6)


def test_what_may_change_unseen_is_compiled_again():
    class Settings:
        scale = 1.0

    settings = Settings()

    @entry_point
    def scaled(x, fn):
        return fn(x)

    def fn(x):
        return settings.scale * x

    assert float(scaled(jnp.ones(()), fn)) == 1.0
    settings.scale = 3.0
    assert float(scaled(jnp.ones(()), fn)) == 3.0


def density(rate, x):
    return path(rate).log_prob(x)


def whitened(rate, x):
    z = jnp.asarray(x[1:])
    return jnp.sum(path(rate).forward(jnp.asarray(x[0]), z) ** 2)


def integrated(rate, x):
    def model():
        at = numpyro.sample("x", path(rate))
        nsde.observe("y", at, lambda t, x: dist.Normal(x, 0.1), obs=x)

    marginal = nsde.handlers.marginalize(model, method=nsde.filters.ExtendedKalman())
    return log_density(marginal, (), {}, {})[0]


@pytest.mark.parametrize("fn", [density, whitened, integrated])
def test_a_gradient_outside_jit_compiles_once(fn):
    """NumPyro takes its first gradient so; it need not be operation by operation."""
    gradient = jax.value_and_grad(fn)

    def run(rate, seed):
        return gradient(jnp.asarray(rate), data(seed))

    first, _ = programs(run, 1.0, 0)
    assert first > 0
    again, found = programs(run, 0.7, 1)
    assert again == 0
    expected = jax.jit(gradient)(jnp.asarray(0.7), jnp.asarray(data(1)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_gaps_known_before_tracing_are_gaps():
    y = data(0)
    y[[2, 5]] = np.nan
    expected = nsde.filter_path(
        path(0.7), lambda t, x: dist.Normal(x, 0.1), y, method=nsde.filters.ExtendedKalman()
    ).log_likelihood
    np.testing.assert_allclose(integrated(jnp.asarray(0.7), y), expected, rtol=1e-5)
    np.testing.assert_allclose(
        jax.jit(integrated)(jnp.asarray(0.7), jnp.asarray(y)), expected, rtol=1e-5
    )


def test_a_drift_that_closes_over_a_traced_rate():
    def closed(rate, x):
        sde = nsde.SDE(lambda t, x: -rate * x, lambda t, x: 0.5)
        law = nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 1.0), scheme=nsde.schemes.Euler())
        return law.log_prob(x)

    for rate in (0.7, 1.2):
        found = jax.grad(closed)(jnp.asarray(rate), data(0))
        expected = jax.grad(density)(jnp.asarray(rate), data(0))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_smooth_draws():
    def model(times, y):
        rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
        sde = nsde.SDE(lambda t, x, p: -p * x, lambda t, x, p: 0.5, params=rate)
        x = numpyro.sample("x", nsde.SDEPath(sde, times, dist.Normal(0.0, 1.0)))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)

    def run(seed):
        draws = {"rate": np.random.default_rng(seed).gamma(2.0, size=5)}
        method, key = nsde.filters.Kalman(), jax.random.key(seed)
        return nsde.smooth(model, draws, TIMES, data(seed), method=method, rng_key=key)["x"]

    run(0)
    again, second = programs(run, 1)
    assert again == 0
    # Noise of 0.1: it is the second data that the draws follow.
    assert float(np.abs(second - data(1)).max()) < 0.6


def test_a_second_posterior_compiles_what_numpyro_insists_on():
    guided = numpyro.handlers.reparam(well, config={"x": nsde.reparam.GuidedReparam()})
    kernel = nsde.infer.SplitNUTS(guided)

    def run(seed):
        mcmc = MCMC(kernel, num_warmup=5, num_samples=5, progress_bar=False)
        mcmc.run(jax.random.key(seed), data(seed))
        return mcmc.get_samples()

    run(0)
    again, draws = programs(run, 1)
    assert again <= 2  # the loop over draws, which NumPyro makes anew, and a cast at most
    assert np.all(np.isfinite(draws["x"]))


def well(y):
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    sde = nsde.processes.DoubleWell(1.0, 1.0, scale)
    law = nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 1.0), scheme=nsde.schemes.Euler())
    x = numpyro.sample("x", law)
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)


def white():
    return numpyro.handlers.reparam(well, config={"x": nsde.reparam.InnovationReparam()})


@pytest.mark.parametrize(
    "make",
    [
        lambda: nsde.infer.UnderdampedLangevin(white()),
        pytest.param(lambda: nsde.infer.BlackJAX(white(), "nuts"), marks=pytest.mark.slow),
        lambda: nsde.infer.Tempered(white(), num_levels=3),
        pytest.param(lambda: nsde.infer.PMMH(well, num_particles=8), marks=pytest.mark.slow),
        pytest.param(
            lambda: nsde.infer.ParticleGibbs(well, num_particles=8, proposal="defensive"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["UnderdampedLangevin", "BlackJAX", "Tempered", "PMMH", "ParticleGibbs"],
)
def test_a_second_chain_compiles_numpyros_loop_alone(make):
    kernel = make()

    def run(seed):
        mcmc = MCMC(kernel, num_warmup=5, num_samples=5, progress_bar=False)
        mcmc.run(jax.random.key(seed), data(seed))
        return mcmc.get_samples()["scale"]

    run(0)
    again, draws = programs(run, 1)
    assert again <= 2  # the loop over draws, which NumPyro makes anew, and a cast at most
    assert np.all(np.isfinite(draws))


@pytest.mark.slow
def test_compiled_chain():
    integrated = nsde.handlers.marginalize(well, method=nsde.filters.ExtendedKalman())
    chain = compiled_chain(NUTS(integrated), 5, 5)
    first = chain(jax.random.key(0), data(0))["scale"]
    again, second = programs(lambda: chain(jax.random.key(0), data(1))["scale"])
    assert again == 0
    assert float(np.abs(second - first).max()) > 1e-3


@pytest.mark.slow
def test_guided_metric():
    def metric(seed):
        return nsde.infer.guided_metric(well, data(seed))["inverse_mass_matrix"][("scale",)]

    first = metric(0)
    again, second = programs(metric, 1)
    assert again == 0
    assert float(np.abs(second - first).max()) > 1e-4


@pytest.mark.slow
def test_draws_of_a_path_guide():
    def model(y):
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
        sde = nsde.processes.OrnsteinUhlenbeck(1.0, 0.0, scale)
        x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 1.0)))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)

    guide = nsde.guides.AutoPathGuide(model)
    svi = SVI(model, guide, numpyro.optim.Adam(1e-2), Trace_ELBO())
    params = svi.run(jax.random.key(0), 2, data(0), progress_bar=False).params

    def draw(seed, params):
        key = jax.random.key(seed)
        return guide.sample_posterior(key, params, data(0), sample_shape=(4,))["x"]

    first = draw(0, params)
    moved = jax.tree.map(lambda a: a + 0.1 if isinstance(a, jax.Array) else a, params)
    again, second = programs(draw, 1, moved)
    assert again == 0
    assert float(np.abs(second - first).max()) > 1e-3
