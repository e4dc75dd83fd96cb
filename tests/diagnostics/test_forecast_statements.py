"""Forecasts of every kind of statement: transformed paths, events, integrals, noise with memory."""

import itertools

import jax
import jax.numpy as jnp
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
)

import numpyro_sde as nsde


@pytest.mark.slow
@pytest.mark.parametrize("latent", [False, True])
def test_what_is_made_of_the_path_goes_on(latent):
    """The model hands observe a transformed path; 4,000 draws against the exact law."""

    def transformed(y=Y, factor=2.0):
        numpyro.sample("unused", dist.Normal(0.0, 1.0))
        level = numpyro.sample("level", dist.Normal(1.0, 1e-6))
        ou = nsde.processes.OrnsteinUhlenbeck(RATE, MEAN, SCALE)
        x = numpyro.sample("x", nsde.SDEPath(ou, TIMES, dist.Normal(MEAN, 0.7115)))
        seen = factor * x + level
        nsde.observe("y", seen, lambda t, x: dist.Normal(x, 2.0 * SD), obs=2.0 * y + 1.0)

    fit = {**DRAWS, "level": np.ones(NUM)}
    options = {"model": transformed, "rng_key": KEY}
    if latent:
        fit["x"] = latent_draws()
    else:
        options["method"] = nsde.filters.Kalman()
    ahead = nsde.forecast(fit, AHEAD, **options)
    mean, sd = exact()
    check(ahead["x"], mean, sd)
    check(ahead["y"], 2.0 * mean + 1.0, 2.0 * np.hypot(sd, SD))
    seasonal = {"model_args": (Y, np.arange(1.0, 6.0))}
    with pytest.raises(ValueError, match=r"array over the path's own times.*observe_inputs"):
        nsde.forecast(fit, AHEAD, **options, **seasonal)


def test_a_path_whose_law_is_made_of_another_is_refused():
    def chained():
        ou = nsde.processes.OrnsteinUhlenbeck(RATE, MEAN, SCALE)
        x = numpyro.sample("x", nsde.SDEPath(ou, TIMES, dist.Normal(MEAN, 0.7)))
        z = numpyro.sample("z", nsde.SDEPath(ou, TIMES, dist.Normal(x[0], 0.7)))
        nsde.observe("y", z, lambda t, x: dist.Normal(x, SD), obs=Y)

    fit = {"x": np.zeros((3, 5)), "z": np.zeros((3, 5))}
    with pytest.raises(ValueError, match="law of path 'z' depends on path 'x'"):
        nsde.forecast(fit, AHEAD, model=chained, rng_key=KEY)


@pytest.mark.slow
def test_readings_after_doses_of_each_series():
    """Own clocks, and a dose to come: y sees the state before it, or after it."""
    times = np.array([[0.0, 1.0, 2.0], [0.0, 1.5, 2.5]])
    given = nsde.doses(np.array([[1.0], [1.5]]), np.array([[4.0], [6.0]]))
    coming = nsde.doses(np.array([[3.0], [5.0]]), np.array([[1.0], [2.0]]))
    ahead_times = np.array([[3.0, 4.0, 6.0], [3.0, 5.0, 6.0]])

    def dosed(side, events):
        with numpyro.plate("series", 2):
            numpyro.sample("unused", dist.Normal(0.0, 1.0))
            ou = nsde.processes.OrnsteinUhlenbeck(0.5, 0.0, 0.01)
            x = numpyro.sample("x", nsde.SDEPath(ou, times, dist.Normal(8.0, 0.01), events=events))
            data = np.full((2, 3), np.nan)
            nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.01), obs=data, side=side)

    fit = {"unused": np.zeros((50, 2))}
    for events in ([given], []):
        options = {"model": dosed, "method": nsde.filters.Kalman(), "rng_key": KEY}
        found = {
            side: nsde.forecast(
                fit, ahead_times, model_args=(side, events), events=coming, **options
            )
            for side in ("before", "after")
        }
        jump = found["after"]["y"] - found["after"]["x"]
        np.testing.assert_allclose(jump.mean(0), [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]], atol=0.02)
        jump = found["before"]["y"] - found["before"]["x"]
        np.testing.assert_allclose(jump.mean(0), np.zeros((2, 3)), atol=0.02)


AREAS = np.array([0.5, np.nan, 0.1, 1.2])


def metered(missing, since, times=TIMES, y=AREAS):
    def model():
        numpyro.sample("unused", dist.Normal(0.0, 1.0))
        ou = nsde.processes.OrnsteinUhlenbeck(RATE, MEAN, SCALE)
        wide = nsde.accumulate(ou, {"area": lambda t, x, p: x}, since=since, missing=missing)
        start = dist.Normal(MEAN, SCALE / np.sqrt(2 * RATE))
        grid = nsde.TimeGrid(times, include=wide.breakpoints[wide.breakpoints < times[-1]])
        obs = y if missing == "carry" else None
        scheme = nsde.schemes.LocalLinear()
        x = numpyro.sample("x", wide.path(grid, start, obs=obs, scheme=scheme))
        at = None if isinstance(since, str) else grid.index[1:]
        nsde.observe(
            "y", x, lambda t, x, acc: dist.Normal(acc["area"], SD), obs=y, accumulated=wide, at=at
        )

    return model


def exact_areas(intervals, y, ahead):
    """Mean and sd of further integrals given earlier ones, by a fine sum of the exact law."""
    every = [*intervals, *ahead]
    fine = np.linspace(0.0, 7.0, 1401)
    middle = 0.5 * (fine[1:] + fine[:-1])
    weights = np.stack([((middle > a) & (middle < b)) * np.diff(fine) for a, b in every])
    cov = SCALE**2 / (2 * RATE) * np.exp(-RATE * np.abs(np.subtract.outer(middle, middle)))
    cov, mean = weights @ cov @ weights.T, MEAN * weights.sum(1)
    seen = np.flatnonzero(~np.isnan(y))
    new = len(intervals) + np.arange(len(ahead))
    K = cov[np.ix_(seen, seen)] + SD**2 * np.eye(len(seen))
    gain = np.linalg.solve(K, cov[np.ix_(seen, new)])
    mean = mean[new] + gain.T @ (y[seen] - mean[seen])
    var = np.diag(cov[np.ix_(new, new)] - gain.T @ cov[np.ix_(seen, new)])
    return mean, np.sqrt(var + SD**2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "y", "intervals", "ahead"),
    [
        # The last interval was lost: the meter starts anew at its end.
        ("reset", [0.5, np.nan, 0.1, np.nan], "rows", [(3.0, 3.2), (3.2, 4.5), (4.5, 7.0)]),
        # The meter ran on: the next reading holds the interval that is missing at the end.
        ("carry", [0.5, np.nan, 0.9, np.nan], "carried", [(2.3, 3.2), (3.2, 4.5), (4.5, 7.0)]),
    ],
)
def test_integrals_since_the_reading_before(missing, y, intervals, ahead):
    y = np.array(y)
    rows = list(itertools.pairwise(TIMES))
    if intervals == "carried":
        rows = [(0.0, 0.4), (0.4, 1.0), (0.4, 2.3), (2.3, 3.0)]
    found = nsde.forecast(
        DRAWS,
        [3.2, 4.5, 7.0],
        model=metered(missing, "observation", y=y),
        method=nsde.filters.Kalman(),
        rng_key=KEY,
    )
    check(found["y"], *exact_areas(rows, y, ahead))


@pytest.mark.slow
def test_exposures_to_come_are_those_that_since_names():
    since = np.array([0.1, 0.7, 2.0, 2.8, 4.0, 6.0])
    begins = [(0.1, 0.4), (0.7, 1.0), (2.0, 2.3), (2.8, 3.0)]
    found = nsde.forecast(
        DRAWS,
        [4.5, 7.0],
        model=metered("reset", since),
        method=nsde.filters.Kalman(),
        rng_key=KEY,
    )
    check(found["y"], *exact_areas(begins, AREAS, [(4.0, 4.5), (6.0, 7.0)]))


@pytest.mark.slow
def test_a_latent_meter_goes_on_from_its_last_reading():
    """Draws of the wide path, by the smoother that is tested elsewhere."""
    model = metered("reset", "observation")
    paths = nsde.smooth(model, DRAWS, method=nsde.filters.Kalman(), rng_key=KEY)["x"]
    fit = {**DRAWS, "x": np.asarray(paths)}
    found = nsde.forecast(fit, [3.2, 4.5], model=model, rng_key=jax.random.key(1))
    rows = list(itertools.pairwise(TIMES))
    check(found["y"], *exact_areas(rows, AREAS, [(3.0, 3.2), (3.2, 4.5)]))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [None, nsde.schemes.LocalLinear()])
def test_noise_with_a_memory_goes_on_from_all_known_states(scheme):
    """A latent path of fractional noise: its future given its past, against a dense normal law."""
    grid, known = np.arange(8.0) * 0.25, np.array([0.0, 0.3, 0.1, -0.4, -0.2, 0.5, 0.9, 1.1])
    noise = nsde.noise.MarkovFBM(0.8, num_terms=6)

    def rough():
        numpyro.sample("unused", dist.Normal(0.0, 1.0))
        sde = nsde.SDE(lambda t, x: -0.5 * x, lambda t, x: 0.7, noise=noise)
        numpyro.sample("x", nsde.SDEPath(sde, grid, init=0.0, scheme=scheme))

    fit = {**DRAWS, "x": np.broadcast_to(known, (NUM, 8))}
    found = nsde.forecast(fit, [2.0, 2.25], model=rough, rng_key=KEY)["x"]
    # The law of all ten states is a map of normals: its covariance by the map's columns.
    sde = nsde.SDE(lambda t, x: -0.5 * x, lambda t, x: 0.7, noise=noise)
    path = nsde.SDEPath(sde, np.arange(10.0) * 0.25, init=0.0, scheme=scheme)
    columns = jax.vmap(lambda z: path.forward(jnp.zeros(()), z))(jnp.eye(9))[:, 1:]
    cov = np.asarray(columns.T @ columns, np.float64)
    gain = np.linalg.solve(cov[:7, :7], cov[:7, 7:])
    mean = gain.T @ known[1:]
    check(found, mean, np.sqrt(np.diag(cov[7:, 7:] - cov[7:, :7] @ gain)))
