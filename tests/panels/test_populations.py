"""Populations: two stages against the closed form and NUTS; the amortised guide against NUTS."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO

import numpyro_sde as nsde

WIDE = 3.0


def normal_draws(seed=0, series=300, draws=400):
    """Exact first-stage draws: levels around 1 with sd 0.6, each known to 0.4, prior N(0, 3)."""
    rng = np.random.default_rng(seed)
    level = rng.normal(1.0, 0.6, size=series)
    y = level + rng.normal(0.0, 0.4, size=series)
    precision = 1 / 0.16 + 1 / WIDE**2
    mean = y / 0.16 / precision
    return y, {
        "level": mean[:, None] + rng.normal(size=(series, draws)) / np.sqrt(precision),
    }


def test_the_likelihood_of_a_population_is_the_integral(x64):
    """Differences between populations, against the normal integral; the correction is needed."""
    y, draws = normal_draws()
    stage = nsde.SeriesDraws(draws, {"level": dist.Normal(0.0, WIDE)})

    def exact(mean, sd):
        return dist.Normal(mean, np.sqrt(sd**2 + 0.16)).log_prob(y)

    def found(mean, sd):
        return stage.log_likelihood({"level": dist.Normal(mean, sd)})

    ours = found(1.1, 0.55) - found(0.9, 0.65)
    theirs = exact(1.1, 0.55) - exact(0.9, 0.65)
    each = np.asarray(ours - theirs)
    error = each.std(ddof=1) * np.sqrt(each.size)
    assert abs(each.sum()) < 4 * error
    # Over a wide range the bias of logarithms adds up: without the correction it is seen.
    far = np.asarray(found(1.0, 0.3) - found(1.0, 0.9)) - np.asarray(
        exact(1.0, 0.3) - exact(1.0, 0.9)
    )
    assert abs(far.sum()) < 4 * far.std(ddof=1) * np.sqrt(far.size)
    sizes = np.asarray(stage.effective_size({"level": dist.Normal(1.0, 0.6)}))
    assert np.median(sizes) > 300
    assert sizes.min() < 50  # of a series far from the others: its few good draws are told
    assert sizes.max() <= 400 + 1e-6


@pytest.mark.slow
def test_series_are_drawn_anew_from_their_posterior(x64):
    y, draws = normal_draws(series=200)
    stage = nsde.SeriesDraws(draws, {"level": dist.Normal(0.0, WIDE)})
    laws = {"level": dist.Normal(1.0, 0.6)}
    keys = jax.random.split(jax.random.key(0), 300)
    found = np.asarray(jax.vmap(lambda key: stage.redraw(laws, key)["level"])(keys))
    precision = 1 / 0.16 + 1 / 0.36
    away = (found.mean(0) - (y / 0.16 + 1.0 / 0.36) / precision) * np.sqrt(precision)
    # Errors of 300 draws from a pool of some 300 effective ones: variance 1/300 + 1/300 each.
    sizes = np.asarray(stage.effective_size(laws))
    scaled = away / np.sqrt(1 / 300 + 1 / sizes)
    assert abs(np.mean(scaled**2) - 1.0) < 4 * np.sqrt(2 / 200)


@pytest.mark.slow
def test_plates_subsets_vectors_and_functions():
    rng = np.random.default_rng(0)
    draws = {"a": rng.normal(size=(6, 8, 2)), "b": rng.normal(size=(6, 8))}
    weight = jnp.arange(6.0)

    def laws(weight):
        return {"a": dist.Normal(0.0, 2.0), "b": dist.Normal(0.1 * weight, 2.0)}

    def joint(values):
        both = jnp.concatenate([values["a"], values["b"][:, None]], axis=-1)
        return dist.MultivariateNormal(jnp.zeros(3), jnp.eye(3)).log_prob(both)

    stage = nsde.SeriesDraws(draws, {"a": dist.Normal(0.0, 1.0), "b": dist.Normal(0.0, 1.0)})
    np.testing.assert_allclose(stage.log_likelihood(joint), 0.0, atol=1e-5)
    some = jnp.array([4, 1])
    np.testing.assert_allclose(
        stage[some].log_likelihood(laws(weight[some])),
        stage.log_likelihood(laws(weight))[some],
        rtol=1e-5,
    )

    def model(stage):
        with numpyro.plate("series", 6, subsample_size=3) as i:
            stage[i].reweigh("draws", laws(weight[i]))

    sites = numpyro.handlers.trace(numpyro.handlers.seed(model, 0)).get_trace(stage)
    assert sites["draws"]["scale"] == 2.0
    with pytest.raises(ValueError, match=r"laws must have a law of each of \['a', 'b'\]"):
        stage.log_likelihood({"a": dist.Normal()})
    with pytest.raises(ValueError, match=r"prior must have a law of each"):
        nsde.SeriesDraws(draws, {"a": dist.Normal()}, sites=["a", "b"])
    with pytest.raises(ValueError, match=r"draws have no \['c'\]"):
        nsde.SeriesDraws(draws, {"c": dist.Normal()})
    with pytest.raises(ValueError, match="one leading shape"):
        nsde.SeriesDraws({"a": np.ones((3, 2)), "b": np.ones((3, 4))}, None)
    with pytest.raises(ValueError, match="thin must be"):
        nsde.SeriesDraws(draws, None, thin=0)
    with pytest.raises(ValueError, match="has event shape"):
        nsde.SeriesDraws(draws, None).log_likelihood(
            {"a": dist.MultivariateNormal(jnp.zeros(3), jnp.eye(3)), "b": dist.Normal()}
        )


SERIES, TIMES = 200, 12


def panel():
    rng = np.random.default_rng(3)
    times = np.cumsum(rng.exponential(0.4, size=(SERIES, TIMES)) + 0.05, axis=1)
    level = rng.normal(0.5, 0.7, size=SERIES)
    x = np.empty((SERIES, TIMES))
    x[:, 0] = level + rng.normal(size=SERIES) * 0.5
    for k in range(1, TIMES):
        decay = np.exp(-1.5 * (times[:, k] - times[:, k - 1]))
        noise = np.sqrt(0.64 / 3.0 * (1 - decay**2)) * rng.normal(size=SERIES)
        x[:, k] = level + decay * (x[:, k - 1] - level) + noise
    return nsde.TimeGrid(times), x + 0.3 * rng.normal(size=x.shape)


def one(times, y):
    level = numpyro.sample("level", dist.Normal(0.0, WIDE))
    path_of(level, times, y)


def path_of(level, times, y):
    ou = nsde.processes.OrnsteinUhlenbeck(1.5, level, 0.8)
    x = numpyro.sample("x", nsde.SDEPath(ou, times, init=dist.Normal(level, 0.5)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)


def shared():
    mean = numpyro.sample("mean", dist.Normal(0.0, 2.0))
    sd = numpyro.sample("sd", dist.HalfNormal(2.0))
    return mean, sd


def whole(times, y, size=None):
    mean, sd = shared()
    with numpyro.plate("series", SERIES, subsample_size=size) as i:
        level = numpyro.sample("level", dist.Normal(mean, sd))
        path_of(level, jax.tree.map(lambda a: jnp.asarray(a)[i], times), jnp.asarray(y)[i])


def population(stage):
    mean, sd = shared()
    stage.reweigh("series", {"level": dist.Normal(mean, sd)})


def nuts(model, *args):
    mcmc = MCMC(
        NUTS(model), num_warmup=500, num_samples=4000, progress_bar=False, jit_model_args=True
    )
    mcmc.run(jax.random.key(0), *args)
    return {name: np.asarray(mcmc.get_samples()[name]) for name in ("mean", "sd")}


@pytest.mark.slow
def test_both_ways_agree_with_nuts_on_200_series(x64):
    """Posterior means and sds of the population within 0.1 posterior sds of the full posterior."""
    integrated = {
        f: nsde.handlers.marginalize(f, method=nsde.filters.Kalman()) for f in (one, whole)
    }
    times, y = panel()
    full = nuts(integrated[whole], jax.tree.map(jnp.asarray, times), jnp.asarray(y))
    fits = nsde.fit_panel(
        integrated[one],
        {"times": times, "y": y},
        nsde.Chain(num_warmup=300, num_samples=2000, thinning=4),
        progress=False,
    )
    stage = nsde.SeriesDraws(fits, {"level": dist.Normal(0.0, WIDE)})
    two_stage = nuts(population, stage)

    def mini(times, y):
        return integrated[whole](times, y, size=50)

    guide = nsde.guides.AmortizedGuide(
        mini, "series", nsde.guides.panel_features(times, y), hidden=(32,)
    )
    schedule = numpyro.optim.optax_to_numpyro(_adam(6000))
    svi = SVI(mini, guide, schedule, Trace_ELBO(num_particles=2))
    result = svi.run(jax.random.key(0), 6000, times, y, progress_bar=False)
    loc = guide.shared_draws(jax.random.key(1), result.params, 4000)
    amortised = {name: np.asarray(loc[name]) for name in ("mean", "sd")}
    for name, truth in full.items():
        spread = truth.std()
        for found in (two_stage[name], amortised[name]):
            assert abs(found.mean() - truth.mean()) < 0.1 * spread
            assert abs(found.std() / spread - 1.0) < 0.1


def _adam(steps):
    import optax

    return optax.adam(optax.cosine_decay_schedule(5e-3, steps, alpha=0.01))


def test_the_guide_says_what_it_cannot():
    def nested():
        with numpyro.plate("series", 4), numpyro.plate("inner", 2):
            numpyro.sample("a", dist.Normal())

    def plain():
        with numpyro.plate("series", 4):
            numpyro.sample("y", dist.Normal(), obs=jnp.zeros(4))

    def moving():
        top = numpyro.sample("top", dist.HalfNormal(1.0))
        with numpyro.plate("series", 4):
            numpyro.sample("a", dist.Uniform(0.0, top))

    features = np.zeros((4, 2))
    cases = {
        nested: "is in plates",
        plain: "no latent site in plate",
        moving: "must be continuous with one support for all series",
    }
    for model, message in cases.items():
        guide = nsde.guides.AmortizedGuide(model, "series", features)
        with pytest.raises(ValueError, match=message), numpyro.handlers.seed(rng_seed=0):
            guide()
    with (
        pytest.raises(ValueError, match="model has no plate 'other'"),
        numpyro.handlers.seed(rng_seed=0),
    ):
        nsde.guides.AmortizedGuide(plain, "other", features)()
    with (
        pytest.raises(ValueError, match="features are of 3 series, plate 'series' has 4"),
        numpyro.handlers.seed(rng_seed=0),
    ):
        nsde.guides.AmortizedGuide(plain, "series", np.zeros((3, 2)))()
    with pytest.raises(ValueError, match=r"features must have shape \(series, F\)"):
        nsde.guides.AmortizedGuide(plain, "series", np.zeros(3))
