"""Models and fits that `bench_first_posterior.py` times, each in a process of its own."""

from __future__ import annotations

import numpy as np

# Stochastic Lotka-Volterra in log coordinates: 40 observations of both species, 400 Euler steps.
LV_TRUTH = {"birth": 0.5, "predation": 0.6, "growth": 0.5, "death": 0.3, "scale": 0.15}
LV_NOISE, LV_STEP, LV_SUBSTEPS = 0.1, 0.1, 10


def lv_drift(t, x, p):
    import jax.numpy as jnp

    prey, predators = jnp.exp(x[0]), jnp.exp(x[1])
    return jnp.stack([p["birth"] - p["predation"] * predators, p["growth"] * prey - p["death"]])


def lv_diffusion(t, x, p):
    return p["scale"]


def lv_data(seed):
    """Simulate by Euler's scheme, plain NumPy."""
    rng = np.random.default_rng(seed)
    p, x, seen = LV_TRUTH, np.zeros(2), []
    for _ in range(40):
        for _ in range(LV_SUBSTEPS):
            prey, predators = np.exp(x)
            drift = [p["birth"] - p["predation"] * predators, p["growth"] * prey - p["death"]]
            x = x + LV_STEP * np.array(drift) + p["scale"] * np.sqrt(LV_STEP) * rng.normal(size=2)
        seen.append(x + LV_NOISE * rng.normal(size=2))
    return np.array(seen)


def lv_parameters():
    import numpyro
    import numpyro.distributions as dist

    return {
        name: numpyro.sample(name, dist.LogNormal(np.log(value), 0.5))
        for name, value in LV_TRUTH.items()
    }


def lv_model(y=None):
    import numpyro
    import numpyro.distributions as dist

    import numpyro_sde as nsde

    grid = nsde.TimeGrid(np.arange(41.0), max_step=1.0001 / LV_SUBSTEPS)
    sde = nsde.SDE(lv_drift, lv_diffusion, params=lv_parameters())
    init = dist.Normal(np.zeros(2), 0.3).to_event(1)
    x = numpyro.sample("x", nsde.SDEPath(sde, grid, init))
    law = lambda t, x: dist.Normal(x, LV_NOISE).to_event(1)  # noqa: E731
    nsde.observe("y", x, law, obs=y, at=grid.index[1:])
