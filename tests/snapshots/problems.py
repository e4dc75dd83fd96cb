"""Snapshot problems of the literature, simulated: Lotka-Volterra and the repressilator.

Shen, Berlinghieri and Broderick (2024), arXiv:2408.06277, section 5: additive noise 0.1, starts
uniform on a square of side 0.1, 50 fresh cells at each time.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy.optimize import linear_sum_assignment

import numpyro_sde as nsde

LV_TIMES = np.arange(9.0)
LV_TRUTH = {"alpha": 1.0, "beta": 0.4, "gamma": 0.4, "delta": 0.1}
REPRESSILATOR_TIMES = np.arange(11.0)
REPRESSILATOR_TRUTH = {"beta": 10.0, "k": 1.0, "power": 3.0, "gamma": 1.0}
STARTS = {2: np.array([5.0, 4.0]), 3: np.array([1.0, 1.0, 2.0])}


def lv_drift(t, x, p):
    eaten = x[0] * x[1]
    return jnp.stack(
        [p["alpha"] * x[0] - p["beta"] * eaten, p["delta"] * eaten - p["gamma"] * x[1]]
    )


def repressilator_drift(t, x, p):
    above = jnp.maximum(jnp.roll(x, 1), 1e-3) / p["k"]
    return p["beta"] / (1.0 + above ** p["power"]) - p["gamma"] * x


def noise(t, x, p):
    return p["sigma"]


def lotka_volterra(sigma=0.1, **params):
    return nsde.SDE(lv_drift, noise, params={**LV_TRUTH, **params, "sigma": sigma})


def repressilator(sigma=0.1, **params):
    return nsde.SDE(
        repressilator_drift, noise, params={**REPRESSILATOR_TRUTH, **params, "sigma": sigma}
    )


def brownian_like(dim, sigma):
    return nsde.processes.LinearSDE(np.zeros((dim, dim)), np.zeros(dim), sigma * np.eye(dim))


@partial(jax.jit, static_argnums=(0, 4))
def _euler(drift, params, key, x0, steps, dt):
    """Euler steps by hand for all cells of all snapshots; `(K, K, n, d)`, the time first."""

    def step(carry, _):
        t, x, key = carry
        key, own = jax.random.split(key)
        f = jax.vmap(jax.vmap(lambda x: drift(t, x, params)))(x)
        x = x + dt * f + params["sigma"] * jnp.sqrt(dt) * jax.random.normal(own, x.shape)
        return (t + dt, x, key), None

    def gap(carry, _):
        carry, _ = jax.lax.scan(step, carry, None, steps)
        return carry, carry[1]

    start = (jnp.zeros(()), x0, key)
    _, later = jax.lax.scan(gap, start, None, x0.shape[0] - 1)
    return jnp.concatenate([x0[None], later])


def simulate(sde, key, times, num_cells, max_step=0.005):
    """Fresh cells at each of equally spaced times, `(K, num_cells, d)`."""
    drift, params = sde.drift.function, dict(sde.params)
    low = STARTS[2 if drift is lv_drift else 3]
    start, own = jax.random.split(key)
    shape = (len(times), num_cells, low.size)
    x0 = jnp.asarray(low) + 0.1 * jax.random.uniform(start, shape)
    steps = int(np.ceil((times[1] - times[0]) / max_step))
    everything = _euler(drift, params, own, x0, steps, (times[1] - times[0]) / steps)
    return np.stack([np.asarray(everything[k, k]) for k in range(len(times))])


def lv_family(snapshots, sigma, times=LV_TIMES[::2]):
    names = list(LV_TRUTH)
    p = {name: numpyro.sample(name, dist.LogNormal(-0.7, 0.7)) for name in names}
    law = nsde.SnapshotLaw(lotka_volterra(sigma, **p), times, snapshots[0])
    numpyro.sample("cells", law, obs=snapshots)


def repressilator_family(snapshots, sigma, times=REPRESSILATOR_TIMES[::2]):
    beta = numpyro.sample("beta", dist.LogNormal(2.0, 0.5))
    k = numpyro.sample("k", dist.LogNormal(0.0, 0.5))
    gamma = numpyro.sample("gamma", dist.LogNormal(0.0, 0.5))
    power = numpyro.sample("power", dist.LogNormal(1.0, 0.3))
    sde = repressilator(sigma, beta=beta, k=k, gamma=gamma, power=power)
    law = nsde.SnapshotLaw(sde, nsde.TimeGrid(times, 0.05), snapshots[0])
    numpyro.sample("cells", law, obs=snapshots)


def earth_mover(a, b):
    """Mean distance of the best matching of two clouds of one size."""
    cost = np.sqrt(((np.asarray(a)[:, None] - np.asarray(b)[None]) ** 2).sum(-1))
    return cost[linear_sum_assignment(cost)].mean()
