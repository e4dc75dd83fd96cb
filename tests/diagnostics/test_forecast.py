"""Forecasts against closed forms: every treatment, panels, inputs, events, refusals."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from forecast_models import (
    AHEAD,
    DRAWS,
    KEY,
    MEAN,
    NUM,
    RATE,
    SCALE,
    SD,
    TIMES,
    Y,
    check,
    exact,
    latent_draws,
    model,
)
from numpyro.infer import MCMC, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

import numpyro_sde as nsde
from numpyro_sde.data import as_times
from numpyro_sde.diagnostics import SVIFit, plot_paths, score


@pytest.mark.slow
@pytest.mark.parametrize("treatment", ["integrated", "latent", "whitened", "method given"])
def test_every_treatment_gives_the_exact_law(treatment):
    fit, options = DRAWS, {"model": model}
    if treatment == "integrated":
        options["model"] = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())
    elif treatment == "method given":
        options["method"] = nsde.filters.Kalman()
    else:
        fit = {**DRAWS, "x": latent_draws()}
    if treatment == "whitened":
        config = {"x": nsde.reparam.InnovationReparam()}
        options["model"] = numpyro.handlers.reparam(model, config=config)
    ahead = nsde.forecast(fit, AHEAD, rng_key=jax.random.key(1), **options)
    mean, sd = exact()
    check(ahead["x"], mean, sd)
    check(ahead["y"], mean, np.hypot(sd, SD))
    # One path a draw: neighbours in time keep their correlation.
    assert np.corrcoef(ahead["x"][:, 1], ahead["x"][:, 0])[0, 1] > 0.2


@pytest.mark.slow
def test_between_the_data_by_a_filter_only():
    between = np.array([0.7, 2.9])
    ahead = nsde.forecast(DRAWS, between, model=model, method=nsde.filters.Kalman(), rng_key=KEY)
    check(ahead["x"], *exact(ahead=between))
    with pytest.raises(ValueError, match=r"kept latent and goes on from its last datum at 3.*0\.7"):
        nsde.forecast({**DRAWS, "x": latent_draws()}, between, model=model, rng_key=KEY)


@pytest.mark.slow
@pytest.mark.parametrize("latent", [False, True])
def test_panels_with_own_clocks(latent):
    times, data = np.stack([TIMES, 1.5 * TIMES]), np.stack([Y, Y[::-1]])
    ahead_times = np.stack([AHEAD, [5.0, 9.0, 6.0]])

    def panel(times, y):
        with numpyro.plate("series", 2):
            model(times, y)

    samples = {"unused": np.zeros((NUM, 2))}
    options = {"model": panel, "model_args": (times, data)}
    if latent:
        paths = nsde.smooth(panel, samples, times, data, method=nsde.filters.Kalman(), rng_key=KEY)
        samples = {**samples, "x": np.asarray(paths["x"])}
    else:
        options["method"] = nsde.filters.Kalman()
    ahead = nsde.forecast(samples, ahead_times, rng_key=jax.random.key(1), **options)
    assert ahead["x"].shape == (NUM, 2, 3)
    for k in range(2):
        mean, sd = exact(times[k], data[k], ahead_times[k])
        check(ahead["x"][:, k], mean, sd)
    tree = ahead.to_arviz()
    x = tree["predictions"]["x"]
    assert x.dims == ("chain", "draw", "series", "time")
    np.testing.assert_allclose(x.coords["time_value"], ahead_times)


def test_smooth_on_a_finer_clock_for_panels():
    """Each series at times of its own, between and past its data; 4,000 draws."""
    times, data = np.stack([TIMES, 1.5 * TIMES]), np.stack([Y, Y[::-1]])
    finer = np.array([[0.2, 0.4, 2.0, 3.5], [0.1, 1.0, 4.0, 5.5]])

    def panel(times, y):
        with numpyro.plate("series", 2):
            model(times, y)

    samples = {"unused": np.zeros((NUM, 2))}
    found = nsde.smooth(
        panel, samples, times, data, method=nsde.filters.Kalman(), rng_key=KEY, times=finer
    )["x"]
    assert found.shape == (NUM, 2, 4)
    for k in range(2):
        order = np.array([0, 1, 2, 3])
        if k == 0:  # a time of the data themselves
            order = np.array([0, 2, 3])
        check(np.asarray(found)[:, k, order], *exact(times[k], data[k], finer[k, order]))


@pytest.mark.slow
def test_a_latent_path_starts_at_its_last_datum_not_at_its_filling():
    """The last two rows have no data: the forecast may begin there, and is the same law."""
    times = np.concatenate([TIMES, [4.0, 5.0]])
    y = np.concatenate([Y, [np.nan, np.nan]])
    fit = {**DRAWS, "x": latent_draws(times, y)}
    ahead = nsde.forecast(fit, AHEAD, model=model, model_args=(times, y), rng_key=KEY)
    check(ahead["x"], *exact())


def test_a_path_that_plain_statements_see_goes_on_from_its_end():
    """Which of its times another likelihood has seen is not known: none is drawn again."""

    def plain():
        numpyro.sample("unused", dist.Normal(0.0, 1.0))
        ou = nsde.processes.OrnsteinUhlenbeck(RATE, MEAN, SCALE)
        x = numpyro.sample("x", nsde.SDEPath(ou, TIMES, dist.Normal(MEAN, 0.7)))
        numpyro.sample("end", dist.Normal(x[-1], 0.1), obs=0.3)
        nsde.observe("y", x, lambda t, x: dist.Normal(x, SD), obs=np.full(5, np.nan))

    fit = {**DRAWS, "x": np.full((NUM, 5), 0.3)}
    ahead = nsde.forecast(fit, AHEAD, model=plain, rng_key=KEY)
    decay = np.exp(-RATE * (AHEAD - 3.0))
    check(ahead["x"], MEAN + (0.3 - MEAN) * decay, SCALE * np.sqrt((1 - decay**2) / (2 * RATE)))
    with pytest.raises(ValueError, match="goes on from its last datum at 3"):
        nsde.forecast(fit, [1.0], model=plain, rng_key=KEY)


@pytest.mark.slow
def test_particles_and_approximate_filters():
    for method in (nsde.filters.ExtendedKalman(), nsde.filters.Particle(200)):
        num = 400 if isinstance(method, nsde.filters.Particle) else NUM
        fit = {"unused": np.zeros(num)}
        options = {"model": nsde.handlers.marginalize(model, method=method)}
        ahead = nsde.forecast(fit, AHEAD, rng_key=jax.random.key(2), **options)
        check(ahead["x"], *exact(), num=num)


@pytest.mark.slow
def test_particle_samplers_are_taken_as_they_are():
    """PMMH brings its filter, particle Gibbs its paths; parameters known, so laws are exact."""
    for kernel in (
        nsde.infer.PMMH(model, num_particles=32),
        nsde.infer.ParticleGibbs(model, num_particles=16),
    ):
        mcmc = MCMC(kernel, num_warmup=50, num_samples=300, progress_bar=False)
        mcmc.run(jax.random.key(3))
        ahead = nsde.forecast(mcmc, AHEAD, rng_key=jax.random.key(4))
        mean, sd = exact()
        # Successive paths of particle Gibbs depend on each other: a third of the draws count.
        assert np.all(np.abs(ahead["x"].mean(0) - mean) < 4 * sd / np.sqrt(100))
        assert ahead["y"].shape == (300, 3)


@pytest.mark.slow
def test_a_variational_fit_brings_its_own_draws():
    guide = AutoNormal(model)
    svi = SVI(model, guide, numpyro.optim.Adam(0.05), Trace_ELBO())
    result = svi.run(jax.random.key(0), 50, progress_bar=False)
    ahead = nsde.forecast(SVIFit(svi, result), AHEAD, num_samples=60, rng_key=KEY)
    assert ahead["y"].shape == (60, 3)


def test_a_path_seen_itself_goes_on_from_its_end():
    x = np.array([0.2, 0.9, -0.4, 0.1, 1.3])

    def seen():
        numpyro.sample("unused", dist.Normal(0.0, 1.0))
        ou = nsde.processes.OrnsteinUhlenbeck(RATE, MEAN, SCALE)
        numpyro.sample("x", nsde.SDEPath(ou, TIMES, 0.2), obs=x)

    ahead = nsde.forecast(DRAWS, AHEAD, model=seen, rng_key=KEY)
    decay = np.exp(-RATE * (AHEAD - 3.0))
    check(ahead["x"], MEAN + (1.3 - MEAN) * decay, SCALE * np.sqrt((1 - decay**2) / (2 * RATE)))


def heated(u, events=()):
    """Linear decay driven by an input, all noise small; so the mean is what matters."""

    def driven():
        numpyro.sample("unused", dist.Normal(0.0, 1.0))
        sde = nsde.SDE(
            lambda t, x, p, u: -0.5 * x + u["heat"],
            lambda t, x, p, u: 0.01,
            params=0.0,
            inputs={"heat": u},
        )
        grid = nsde.TimeGrid([0.0, 1.0, 2.0], 0.05, include=sde.breakpoints)
        path = nsde.SDEPath(
            sde, grid, dist.Normal(1.0, 0.01), scheme=nsde.schemes.LocalLinear(), events=events
        )
        x = numpyro.sample("x", path)
        nsde.observe(
            "y", x, lambda t, x: dist.Normal(x, 0.01), obs=np.full(3, np.nan), at=grid.index
        )

    return driven


@pytest.mark.slow
@pytest.mark.parametrize("integrated", [True, False])
def test_scenarios_of_inputs_and_doses(integrated):
    fitted = nsde.Input([0.0, 2.0], [1.0, 1.0], order="hold")
    scenario = nsde.Input([0.0, 2.0, 3.0, 5.0], [1.0, 4.0, 0.0, 0.0], order="hold")
    dose = nsde.doses(times=[3.5], amount=[2.0])
    fit, options = {"unused": np.zeros(200)}, {"model": heated(fitted)}
    if integrated:
        options["method"] = nsde.filters.ExtendedKalman()
    else:
        start = 2.0 - np.exp(-0.5 * 0.05 * np.arange(41))
        fit["x"] = np.broadcast_to(start, (200, 41))
    ahead = nsde.forecast(
        fit, [2.5, 3.0, 4.0], inputs={"heat": scenario}, events=dose, rng_key=KEY, **options
    )
    at_2 = 2.0 - np.exp(-1.0)
    at_25 = 8.0 + (at_2 - 8.0) * np.exp(-0.25)
    at_3 = 8.0 + (at_2 - 8.0) * np.exp(-0.5)
    at_4 = (at_3 * np.exp(-0.25) + 2.0) * np.exp(-0.25)
    np.testing.assert_allclose(ahead["x"].mean(0), [at_25, at_3, at_4], atol=0.02)
    other = nsde.Input([0.0, 2.0, 5.0], [2.0, 4.0, 0.0], order="hold")
    with pytest.raises(ValueError, match="scenario 'heat' must be what drove path 'x'"):
        nsde.forecast(fit, [3.0], inputs={"heat": other}, rng_key=KEY, **options)
    with pytest.raises(ValueError, match=r"inputs names \['cold'\]"):
        nsde.forecast(
            fit, [3.0], inputs={"heat": scenario, "cold": scenario}, rng_key=KEY, **options
        )


def test_inputs_of_emissions():
    width = np.array([0.1, 0.2, 0.1, 0.3, 0.1])

    def widths(y=Y):
        numpyro.sample("unused", dist.Normal(0.0, 1.0))
        ou = nsde.processes.OrnsteinUhlenbeck(RATE, MEAN, SCALE)
        x = numpyro.sample("x", nsde.SDEPath(ou, TIMES, dist.Normal(MEAN, 0.7)))
        nsde.observe("y", x, lambda t, x, u: dist.Normal(x, u), inputs=width, obs=y)

    call = {"model": widths, "method": nsde.filters.Kalman(), "rng_key": KEY}
    with pytest.raises(ValueError, match=r"observe_inputs=\{'y'"):
        nsde.forecast(DRAWS, AHEAD, **call)
    ahead = nsde.forecast(DRAWS, AHEAD, observe_inputs={"y": np.array([5.0, 0.1, 0.1])}, **call)
    assert ahead["y"][:, 0].std() > 4.0
    assert ahead["y"][:, 1].std() < 2.0


def test_scores_of_a_forecast():
    """The log score of the mixture against the exact normal law; 4,000 draws."""
    ahead = nsde.forecast(DRAWS, AHEAD, model=model, method=nsde.filters.Kalman(), rng_key=KEY)
    y = np.array([0.6, np.nan, -0.2])
    mean, sd = exact()
    table = score(ahead, {"y": y})
    expected = np.asarray(dist.Normal(mean, np.hypot(sd, SD)).log_prob(y))
    found = table.pointwise["y"]["log_score"]
    np.testing.assert_allclose(found[[0, 2]], expected[[0, 2]], atol=0.06)
    assert np.isnan(found[1])
    assert table.table().loc["y", "number"] == 2


def test_dates_go_through():
    ahead_times = as_times(["2026-03-05", "2026-03-07"], unit="day", origin="2026-03-01")
    ahead = nsde.forecast(
        DRAWS, ahead_times, model=model, method=nsde.filters.Kalman(), rng_key=KEY
    )
    tree = ahead.to_arviz()
    assert str(tree["predictions"]["y"].coords["time"].values[1])[:10] == "2026-03-07"
    import matplotlib as mpl

    mpl.use("Agg")
    axis = plot_paths(tree, "y", group="predictions")
    assert len(axis.lines[0].get_xdata()) == 2
