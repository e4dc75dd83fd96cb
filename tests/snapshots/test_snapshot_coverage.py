"""Intervals of `SnapshotLaw` under NUTS hold the truth as often as they say: 60 data sets."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import NUTS

import numpyro_sde as nsde

TRUTH = np.array([1.0, 0.4, 0.4, 0.1])
TIMES = np.arange(5) * 2.0
GRID = nsde.TimeGrid(TIMES, 0.2)
WARMUP, SAMPLES = 200, 300


def drift(t, x, p):
    a, b, c, d = p
    return jnp.stack([a * x[0] - b * x[0] * x[1], d * x[0] * x[1] - c * x[1]])


def simulate(key, num_cells=50, dt=0.002):
    """Fresh cells at each time, by Euler steps written here."""

    def at(key, steps):
        first, later = jax.random.split(key)
        x = jax.random.uniform(first, (num_cells, 2)) * 0.1 + jnp.array([5.0, 4.0])

        def step(x, key):
            f = jax.vmap(lambda s: drift(0.0, s, TRUTH))(x)
            return x + dt * f + 0.1 * jnp.sqrt(dt) * jax.random.normal(key, x.shape), None

        return jax.lax.scan(step, x, jax.random.split(later, steps))[0] if steps else x

    keys = jax.random.split(key, len(TIMES))
    return jnp.stack([at(k, round(t / dt)) for k, t in zip(keys, TIMES, strict=True)])


def model(y):
    p = numpyro.sample("p", dist.LogNormal(-0.5, 1.0).expand([4]).to_event(1))
    sde = nsde.SDE(drift, lambda t, x, p: 0.1, params=tuple(p[i] for i in range(4)))
    numpyro.sample("cells", nsde.SnapshotLaw(sde, GRID, y[0]), obs=y)


def posterior(key, y):
    start = numpyro.infer.init_to_value(values={"p": jnp.array([0.8, 0.5, 0.5, 0.12])})
    kernel = NUTS(model, init_strategy=start, max_tree_depth=5)

    def step(state, _):
        state = kernel.sample(state, (y,), {})
        return state, state.z["p"]

    return jax.lax.scan(step, kernel.init(key, WARMUP, None, (y,), {}), None, WARMUP + SAMPLES)[1]


@pytest.mark.slow
def test_ninety_percent_intervals_of_four_rates():
    keys = jax.random.split(jax.random.key(2026), 60)
    draws = np.asarray(jax.jit(jax.vmap(posterior))(keys, jax.jit(jax.vmap(simulate))(keys)))
    low, high = np.quantile(draws[:, WARMUP:], [0.05, 0.95], axis=1)
    coverage = ((low <= np.log(TRUTH)) & (np.log(TRUTH) <= high)).mean(0)
    # The standard error of 60 is 0.039; the first cloud's own error is left out by design.
    assert coverage.min() >= 0.80, coverage
    assert coverage.max() <= 0.97, coverage
