"""Paths by their marginals: exact on linear equations, densities that belong to the draws."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import SVI

import numpyro_sde as nsde
from numpyro_sde.guides import AutoPathGuide, GaussianMarkovPath, MatchedELBO, MatchedPath

VAGUE = 1e4


def rotating(y=None):
    """A stationary process that turns, hardly observed: its law is its prior."""
    a, w, scale = 0.8, 1.5, 0.6
    A = jnp.array([[-a, -w], [w, -a]])
    sde = nsde.SDE(lambda t, x, p: p @ x, lambda t, x, p: scale, params=A, event_dims=2)
    init = dist.Normal(jnp.zeros(2), scale / np.sqrt(2 * a)).to_event(1)
    x = numpyro.sample("x", nsde.SDEPath(sde, np.linspace(0.0, 0.6, 4), init))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, VAGUE).to_event(1), obs=y)


def stationary(y=None):
    """The same without the turn, one component."""
    init = dist.Normal(0.0, 0.6 / np.sqrt(1.6))
    sde = nsde.SDE(lambda t, x: -0.8 * x, lambda t, x: 0.6)
    x = numpyro.sample("x", nsde.SDEPath(sde, np.linspace(0.0, 0.6, 4), init))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, VAGUE), obs=y)


@pytest.mark.slow
def test_a_stationary_law_has_no_gap(x64):
    """Constant marginals: the bound is the evidence, whatever the times and draws."""
    y = jnp.zeros(4)
    guide = AutoPathGuide(stationary, path=MatchedPath(0))
    with handlers.trace() as recorded, handlers.seed(rng_seed=0):
        guide(y)
    params = {k: v["value"] for k, v in recorded.items() if v["type"] == "param"}
    params["x_auto_root"] += np.log(1.0 / np.sqrt(1.6 * 0.15))
    loss = jax.jit(lambda key, params: MatchedELBO(50).loss(key, params, stationary, guide, y))
    losses = [float(loss(jax.random.key(k), params)) for k in (0, 1)]
    evidence = -4 * (np.log(VAGUE) + 0.5 * np.log(2 * np.pi))
    np.testing.assert_allclose(losses, -evidence, atol=1e-5)
    params["x_auto_root"] += 0.3
    wrong = float(loss(jax.random.key(0), params))
    assert wrong > -evidence + 0.02


@pytest.mark.slow
def test_a_law_that_turns_has_no_gap(x64):
    """Marginals `c R(w t)`: the bound is the evidence, whatever the times and draws.

    The turn is a cubic in `tan(w t / 2)` between knots, which leaves 1e-6.
    """
    y = jnp.zeros((4, 2))
    guide = AutoPathGuide(rotating, path=MatchedPath(0))
    knots = np.linspace(0.0, 0.6, 4)
    gap = 0.6 / 4  # mean time between observations, as the law counts it
    with handlers.trace() as recorded, handlers.seed(rng_seed=0):
        guide(y)
    params = {k: v["value"] for k, v in recorded.items() if v["type"] == "param"}
    size = 0.6 / np.sqrt(2 * 0.8) / (0.6 * np.sqrt(gap))
    half = 0.5 * 1.5 * knots
    root = np.zeros((4, 2, 2))
    root[:, 0, 0] = root[:, 1, 1] = np.log(size)
    root[:, 0, 1] = -np.tan(half)
    slope = np.zeros((3, 2, 2, 2))
    step = -0.5 * 1.5 / np.cos(half) ** 2 * 0.2
    slope[:, 0, 0, 1], slope[:, 1, 0, 1] = step[:-1], step[1:]
    slope[..., 0, 1] -= np.diff(root[:, 0, 1])[:, None]
    params |= {"x_auto_root": jnp.asarray(root), "x_auto_root_slope": jnp.asarray(slope)}
    losses = [
        float(MatchedELBO(8).loss(jax.random.key(k), params, rotating, guide, y)) for k in (0, 1)
    ]
    evidence = -8 * (np.log(VAGUE) + 0.5 * np.log(2 * np.pi))
    np.testing.assert_allclose(losses, -evidence, atol=1e-5)


TIMES = np.array([0.0, 0.3, 0.7, 1.0])


def well(y=None, init=-1.0):
    sde = nsde.processes.DoubleWell(linear=2.0, cubic=2.0, scale=0.8)
    x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, init=init))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)


def growth(y=None):
    f = nsde.fields.HSGP(1, (0.0, 4.0), 3).from_weights(jnp.ones(3), amplitude=0.5, length=1.0)
    sde = nsde.processes.Geometric(f, 0.3, saturation=1.0)
    init = dist.LogNormal(0.0, 0.3)
    x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, init, scheme=nsde.schemes.LogEuler()))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)


def by_hand(guide, params, model):
    """Means and standard deviations at the observations, in the free coordinate."""
    reference = np.asarray(guide._plans["x"].reference)[:, 0]
    gap, noise = TIMES[-1] / len(TIMES), 0.8 if model is well else 0.3
    base = np.log(reference) if model is growth else reference
    mean = base + np.sqrt(gap) * noise * np.asarray(params["x_auto_mean"])[::2, 0]
    sd = np.sqrt(gap) * noise * np.exp(np.asarray(params["x_auto_root"])[::2, 0, 0])
    if model is well:
        mean[0], sd = -1.0, sd * np.sqrt(-np.expm1(-TIMES / gap))
    return mean, sd


@pytest.mark.parametrize(
    ("model", "y"),
    [
        pytest.param(well, jnp.array([-1.0, -0.7, -0.2, 0.4]), marks=pytest.mark.slow),
        pytest.param(growth, jnp.array([1.0, 0.9, 1.1, 0.8]), marks=pytest.mark.slow),
        pytest.param(rotating, jnp.zeros((4, 2)), marks=pytest.mark.slow),
    ],
    ids=["known start", "positive", "vectors"],
)
@pytest.mark.parametrize("num_context", [0, 3], ids=["own", "encoded"])
def test_draws_come_with_their_density(x64, model, y, num_context):
    """Density recomputed from the path; marginals of 20,000 draws at 4 standard errors."""
    guide = AutoPathGuide(model, path=MatchedPath(num_context=num_context))
    with handlers.trace() as recorded, handlers.seed(rng_seed=0):
        guide(y)
    rng = np.random.default_rng(0)
    values = {k: v["value"] for k, v in recorded.items() if v["type"] == "param"}
    params = jax.tree.map(lambda a: a + 0.3 * rng.normal(size=np.shape(a)), values)

    def one(key):
        with handlers.trace() as tr, handlers.seed(rng_seed=key), handlers.substitute(data=params):
            guide(y)
        site = tr["x"]
        return site["value"], site["intermediates"][0], site["fn"].log_prob(site["value"])

    keys = jax.random.split(jax.random.key(1), 20_000)
    x, came, again = jax.jit(jax.vmap(one))(keys)
    np.testing.assert_allclose(came, again, rtol=1e-7, atol=1e-7)
    if model is not rotating and not num_context:
        mean, sd = by_hand(guide, params, model)
        values = np.log(np.asarray(x)) if model is growth else np.asarray(x)
        count = np.sqrt(len(values))
        assert np.all(np.abs(values.mean(0) - mean) <= 4 * sd / count + 1e-12)
        assert np.all(np.abs(values.std(0) - sd) <= 4 * sd / (np.sqrt(2) * count) + 1e-12)
    # E[q'(x) / q(x)] is one for another law q' of the family: log q is normalised
    other = jax.tree.map(lambda a: a + 0.02 * rng.normal(size=np.shape(a)), params)

    def density(x):
        with handlers.trace() as tr, handlers.seed(rng_seed=0), handlers.substitute(data=other):
            guide(y)
        return tr["x"]["fn"].log_prob(x)

    ratio = np.exp(np.asarray(jax.jit(jax.vmap(density))(x)) - np.asarray(again))
    assert ratio.std() > 0
    assert abs(ratio.mean() - 1.0) < 4 * ratio.std() / np.sqrt(len(ratio))


def linear(y=None, rate=None):
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5)) if rate is None else rate
    sde = nsde.processes.OrnsteinUhlenbeck(rate=rate, mean=0.3, scale=0.7)
    x = numpyro.sample("x", nsde.SDEPath(sde, np.arange(12) * 0.4, init=dist.Normal(0.0, 0.5)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.25), obs=y)


def data():
    rng = np.random.default_rng(3)
    return jnp.asarray(np.sin(0.4 * np.arange(12)) + 0.25 * rng.normal(size=12))


def trained(model, y, steps, num_times=64, rate=1e-2, **kwargs):
    import optax

    guide = AutoPathGuide(model, path=MatchedPath(1), **kwargs)
    schedule = optax.cosine_decay_schedule(rate, steps)
    svi = SVI(model, guide, optax.adam(schedule), MatchedELBO(num_times))
    fit = svi.run(jax.random.key(0), steps, y, progress_bar=False)
    return guide, fit.params


@pytest.mark.slow
def test_training_finds_the_linear_truth(x64):
    """Known parameters: bound within 0.01 nats of the evidence, marginals those of Kalman's."""
    y = data()
    guide, params = trained(lambda y: linear(y, 1.2), y, 6000)
    model = guide.model
    bound = -np.mean(
        [
            float(MatchedELBO(2000).loss(jax.random.key(k), params, model, guide, y))
            for k in range(20)
        ]
    )
    sde = nsde.processes.OrnsteinUhlenbeck(rate=1.2, mean=0.3, scale=0.7)
    path = nsde.SDEPath(sde, np.arange(12) * 0.4, init=dist.Normal(0.0, 0.5))
    exact = nsde.filter_path(
        path, lambda t, x: dist.Normal(x, 0.25), y, method=nsde.filters.Kalman()
    )
    mean, cov = exact.smooth()
    assert bound < float(exact.log_likelihood) + 0.01
    assert bound > float(exact.log_likelihood) - 0.02
    draws = guide.sample_posterior(jax.random.key(1), params, y, sample_shape=(20_000,))["x"]
    sd = np.sqrt(np.asarray(cov)[:, 0, 0])
    np.testing.assert_allclose((draws.mean(0) - mean[:, 0]) / sd, 0.0, atol=0.05)
    np.testing.assert_allclose(np.asarray(draws).std(0) / sd, 1.0, atol=0.05)


def panel(y, batch=None):
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
    with numpyro.plate("series", len(y), subsample_size=batch) as i:
        sde = nsde.processes.OrnsteinUhlenbeck(rate=rate, mean=0.3, scale=0.7)
        x = numpyro.sample("x", nsde.SDEPath(sde, np.arange(12) * 0.4, dist.Normal(0.0, 0.5)))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.25), obs=y[i])


@pytest.mark.slow
def test_an_encoder_serves_series_that_it_never_saw():
    """Trained on mini-batches of a panel; the bound of other series is near their evidence.

    A new encoded guide is off by some nats a series; 1,500 steps bring it within 0.5.
    """
    key = jax.random.key(0)
    sde = nsde.processes.OrnsteinUhlenbeck(rate=1.2, mean=0.3, scale=0.7)
    path = nsde.SDEPath(sde, np.arange(12) * 0.4, init=dist.Normal(0.0, 0.5))
    x = path.sample(key, (60,))
    y = x + 0.25 * jax.random.normal(jax.random.key(1), x.shape)

    def model(y, batch=None):
        with numpyro.plate("series", len(y), subsample_size=batch) as i:
            x = numpyro.sample("x", path)
            nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.25), obs=y[i])

    guide = AutoPathGuide(model, path=MatchedPath(num_context=8))
    svi = SVI(model, guide, numpyro.optim.Adam(5e-3), MatchedELBO(32))
    fit = svi.run(jax.random.key(2), 1500, y[:40], batch=10, progress_bar=False)
    unseen = y[40:]
    exact = sum(
        float(
            nsde.filter_path(
                path, lambda t, x: dist.Normal(x, 0.25), one, method=nsde.filters.Kalman()
            ).log_likelihood
        )
        for one in unseen
    )
    fresh = AutoPathGuide(model, path=MatchedPath(num_context=8))
    with handlers.seed(rng_seed=0):
        fresh(unseen)
    loss = jax.jit(lambda key, p: MatchedELBO(400).loss(key, p, model, fresh, unseen))
    gap = exact + np.mean([float(loss(jax.random.key(k), fit.params)) for k in range(10)])
    print(f"bound below the evidence by {gap / 20:.3f} nats a series")
    assert -0.05 < gap / 20 < 0.5


@pytest.mark.slow
def test_mini_batches_are_unbiased(x64):
    """The loss of batches of 2 averages to the whole panel's, 1,500 keys, 4 standard errors."""
    y = jnp.stack([data(), -data(), data()[::-1], 0.5 * data()])
    guide = AutoPathGuide(panel, path=MatchedPath(0))
    with handlers.trace() as recorded, handlers.seed(rng_seed=0):
        guide(y, 4)
    params = {k: v["value"] for k, v in recorded.items() if v["type"] == "param"}
    keys = jax.random.split(jax.random.key(0), 1500)
    loss = MatchedELBO(4)
    all_, some = (
        np.asarray(jax.jit(jax.vmap(lambda k, b=b: loss.loss(k, params, panel, guide, y, b)))(keys))
        for b in (None, 2)
    )
    error = np.sqrt((all_.var() + some.var()) / len(keys))
    assert abs(all_.mean() - some.mean()) < 4 * error


def two_paths(y=None):
    for name in ("a", "b"):
        x = numpyro.sample(name, nsde.SDEPath(nsde.processes.DoubleWell(), TIMES, init=0.0))
        nsde.observe(f"y_{name}", x, lambda t, x: dist.Normal(x, 0.3), obs=y)


def test_what_it_cannot_treat_is_refused():
    y = jnp.zeros(4)
    guide = AutoPathGuide(well, path=GaussianMarkovPath())
    with pytest.raises(TypeError, match="MatchedELBO needs the guide"):
        MatchedELBO().loss(jax.random.key(0), {}, well, guide, y)
    with pytest.raises(ValueError, match="num_inner must be at least 0"):
        MatchedPath(-1)
    with pytest.raises(ValueError, match="num_times must be at least 1"):
        MatchedELBO(0)


@pytest.mark.slow
def test_models_it_cannot_treat_are_refused():
    y = jnp.zeros(4)
    guide = AutoPathGuide(two_paths, path=MatchedPath())
    with pytest.raises(ValueError, match="in a model of one path"):
        MatchedELBO().loss(jax.random.key(0), {}, two_paths, guide, y)

    def squared(y=None):
        x = numpyro.sample("x", nsde.SDEPath(nsde.processes.DoubleWell(), TIMES, init=0.0))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)
        numpyro.factor("f", -jnp.sum(x**2))

    guide = AutoPathGuide(squared, path=MatchedPath())
    with pytest.raises(ValueError, match="density of other sites uses it"):
        MatchedELBO().loss(jax.random.key(0), {}, squared, guide, y)


def levelled(power):
    """A stationary process of a level that is optimised, its readings raised to a power."""

    def model(y=None):
        level = numpyro.param("level", 0.0)
        init = dist.Normal(level, 0.6 / np.sqrt(1.6))
        sde = nsde.SDE(lambda t, x, p: -0.8 * (x - p), lambda t, x, p: 0.6, params=level)
        x = numpyro.sample("x", nsde.SDEPath(sde, np.linspace(0.0, 0.6, 4), init))
        with handlers.scale(scale=power):
            nsde.observe("y", x, lambda t, x: dist.Normal(x, VAGUE), obs=y)

    return model


@pytest.mark.slow
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_the_bound_is_that_of_the_model_handed_over(x64, power):
    """Parameters that are optimised and powers of the model that the loss is given count.

    With the law that is the model's own at a level of 0.9 the bound is the evidence there.
    """
    y = jnp.zeros(4)
    guide = AutoPathGuide(levelled(1.0), path=MatchedPath(0))
    with handlers.trace() as recorded, handlers.seed(rng_seed=0):
        guide(y)
    params = {k: v["value"] for k, v in recorded.items() if v["type"] == "param"}
    shift = 0.9 - np.asarray(guide._plans["x"].reference)[:, 0]
    params |= {
        "level": jnp.asarray(0.9),
        "x_auto_root": params["x_auto_root"] + np.log(1.0 / np.sqrt(1.6 * 0.15)),
        "x_auto_mean": jnp.asarray(shift[:, None] / (0.6 * np.sqrt(0.15))),
    }
    loss = jax.jit(lambda key: MatchedELBO(50).loss(key, params, levelled(power), guide, y))
    evidence = -4 * power * (np.log(VAGUE) + 0.5 * np.log(2 * np.pi))
    np.testing.assert_allclose(float(loss(jax.random.key(0))), -evidence, atol=1e-4)
