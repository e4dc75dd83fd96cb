"""Panels as data: clocks are arguments, long batches go in parts, numbers stay the same."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.util import log_density

import numpyro_sde as nsde
from numpyro_sde.distributions import parts
from numpyro_sde.distributions.batching import map_batch

SERIES, TIMES = 7, 4
RNG = np.random.default_rng(0)
CLOCKS = 1e5 + np.cumsum(RNG.exponential(0.3, size=(SERIES, TIMES)) + 0.01, axis=1)
DATA = np.where(RNG.uniform(size=(SERIES, TIMES)) < 0.2, np.nan, RNG.normal(size=(SERIES, TIMES)))
LEVEL = RNG.normal(size=SERIES)
PARAMS = {"rate": 1.3, "scale": 0.8}


def model(times, y, level):
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with numpyro.plate("series", SERIES):
        ou = nsde.processes.OrnsteinUhlenbeck(rate, level, scale)
        x = numpyro.sample("x", nsde.SDEPath(ou, times, init=dist.Normal(0.0, 1.0)))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)


INTEGRATED = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())


def density(params, *args):
    return log_density(INTEGRATED, args, {}, params)[0]


def dense(params):
    """The same log density by dense Gaussians of NumPy."""
    rate, scale = params["rate"], params["scale"]
    total = sum(
        -0.5 * np.log(v) ** 2 - np.log(v) - 0.5 * np.log(2 * np.pi) for v in params.values()
    )
    for times, y, level in zip(CLOCKS, DATA, LEVEL, strict=True):
        t = times - times[0]
        decay = np.exp(-rate * t)
        grown = scale**2 / (2 * rate)
        apart = np.exp(-rate * np.abs(t[:, None] - t[None, :]))
        cov = (
            grown * (apart - np.outer(decay, decay)) + np.outer(decay, decay) + 0.09 * np.eye(TIMES)
        )
        seen = ~np.isnan(y)
        away = (y - level * (1.0 - decay))[seen]
        cov = cov[np.ix_(seen, seen)]
        total -= 0.5 * (away @ np.linalg.solve(cov, away) + np.linalg.slogdet(2 * np.pi * cov)[1])
    return total


def test_a_grid_as_an_argument_is_exact_in_one_program(x64):
    programs = []

    @jax.jit
    def value(params, *args):
        programs.append(1)
        return density(params, *args)

    grid = nsde.TimeGrid(CLOCKS)
    np.testing.assert_allclose(float(value(PARAMS, grid, DATA, LEVEL)), dense(PARAMS), rtol=1e-10)
    later = nsde.TimeGrid(CLOCKS + 1.0)
    np.testing.assert_allclose(float(value(PARAMS, later, DATA, LEVEL)), dense(PARAMS), rtol=1e-9)
    assert len(programs) == 1


def test_steps_keep_their_digits_in_float32():
    found = jax.jit(density)(PARAMS, nsde.TimeGrid(CLOCKS), DATA, LEVEL)
    # Differences of float32 times near 1e5 are off by up to 0.008, and so is the bare array's.
    np.testing.assert_allclose(float(found), dense(PARAMS), rtol=2e-5)


@pytest.mark.parametrize("width", [1, 3])
def test_parts_change_neither_value_nor_gradient(x64, monkeypatch, width):
    whole = jax.value_and_grad(density)(PARAMS, CLOCKS, DATA, jnp.asarray(LEVEL))
    monkeypatch.setattr(parts, "_FEWEST", width)
    monkeypatch.setattr(parts, "PART_BYTES", 1)
    grid = nsde.TimeGrid(CLOCKS)
    both = jax.jit(jax.value_and_grad(density, argnums=(0, 3)))
    value, (slope, of_level) = both(PARAMS, grid, DATA, LEVEL)
    assert "while" in both.lower(PARAMS, grid, DATA, LEVEL).as_text()
    np.testing.assert_allclose(float(value), float(whole[0]), rtol=1e-12)
    for name in PARAMS:
        np.testing.assert_allclose(float(slope[name]), float(whole[1][name]), rtol=1e-9)
    eps = 1e-6
    for k in (0, SERIES - 1):
        ends = [density(PARAMS, grid, DATA, LEVEL + s * eps * np.eye(SERIES)[k]) for s in (1, -1)]
        np.testing.assert_allclose(float(of_level[k]), (ends[0] - ends[1]) / (2 * eps), rtol=1e-5)


def test_mapping_in_parts_pads_and_keeps_order(monkeypatch):
    monkeypatch.setattr(parts, "_FEWEST", 2)
    monkeypatch.setattr(parts, "PART_BYTES", 1)
    x = jnp.arange(15.0).reshape(5, 3)
    found = map_batch(lambda x, a: {"sum": x.sum() * a, "x": x}, (5,), (x, 2.0), (1, 0), None, 1)
    np.testing.assert_array_equal(found["sum"], 2.0 * x.sum(-1))
    np.testing.assert_array_equal(found["x"], x)


def test_a_bad_budget_is_refused(monkeypatch):
    monkeypatch.setenv("NUMPYRO_SDE_PART_BYTES", "much")
    with pytest.raises(ValueError, match="must be a positive whole number of bytes, got 'much'"):
        parts.elements_in_part(1, 1)
    monkeypatch.setenv("NUMPYRO_SDE_PART_BYTES", "4096")
    assert parts.elements_in_part(1, 1) == 4096 * jax.device_count()


def test_a_refined_grid_as_an_argument_is_exact_between_its_observations(x64):
    fine = nsde.TimeGrid(CLOCKS, max_step=0.25)

    def refined(times, y, level):
        rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with numpyro.plate("series", SERIES):
            ou = nsde.processes.OrnsteinUhlenbeck(rate, level, scale)
            x = numpyro.sample("x", nsde.SDEPath(ou, times, init=dist.Normal(0.0, 1.0)))
            nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y, at=times.index)

    integrated = nsde.handlers.marginalize(refined, method=nsde.filters.Kalman())
    found = jax.jit(lambda p, *a: log_density(integrated, a, {}, p)[0])(PARAMS, fine, DATA, LEVEL)
    np.testing.assert_allclose(float(found), dense(PARAMS), rtol=1e-10)
