"""Cost of the density of a long path: this package, the same formula by hand, and NumPyro.

Run with `make bench`, or `python benchmarks/bench_path.py`. All compute the log density of a
scalar Euler path of 100,000 steps and its gradient in the path and the parameters, in float32.
Calls of the three are interleaved and the lower quartile of wall time is compared: other work on
the machine only ever adds time.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import numpyro_sde as nsde

STEPS = 100_000
RNG = np.random.default_rng(0)
TIMES = np.concatenate([[0.0], np.cumsum(RNG.uniform(0.005, 0.015, STEPS))])
PATH = jnp.asarray(1.0 + 0.05 * np.cumsum(RNG.normal(size=STEPS + 1)) / 30, jnp.float32)
PARAMS = {"rate": jnp.float32(1.0), "mean": jnp.float32(0.9), "scale": jnp.float32(0.5)}

DT = np.diff(TIMES)
H, ROOT = jnp.asarray(DT, jnp.float32), jnp.asarray(np.sqrt(DT), jnp.float32)
HALF_LOG = jnp.asarray(0.5 * np.log(DT), jnp.float32)
SUM_OF_HALF_LOGS = float(0.5 * np.log(DT).sum())
CONSTANT = 0.5 * (STEPS + 1) * float(np.log(2 * np.pi))

DIFFUSIONS = {
    "constant diffusion": lambda x, p: p["scale"],
    "diffusion of the state": lambda x, p: p["scale"] * jnp.sqrt(1.0 + x**2),
}


def package(diffusion, params, path):
    sde = nsde.SDE(
        lambda t, x, p: p["rate"] * (p["mean"] - x), lambda t, x, p: diffusion(x, p), params=params
    )
    return nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 1.0)).log_prob(path)


def by_hand(diffusion, params, path):
    x = path[:-1]
    scale = diffusion(x, params)
    z = (path[1:] - x - params["rate"] * (params["mean"] - x) * H) / (scale * ROOT)
    if scale.ndim:
        log_scale = jnp.sum(jnp.log(scale) + HALF_LOG)
    else:
        log_scale = STEPS * jnp.log(scale) + SUM_OF_HALF_LOGS
    return -0.5 * path[0] ** 2 - 0.5 * jnp.sum(z * z) - log_scale - CONSTANT


def numpyro_own(diffusion, params, path):
    def sde(x, t):
        return params["rate"] * (params["mean"] - x), diffusion(x, params)

    times = jnp.asarray(TIMES, jnp.float32)
    return dist.EulerMaruyama(times, sde, dist.Normal(0.0, 1.0)).log_prob(path)


WAYS = {"numpyro_sde": package, "by hand": by_hand, "numpyro EulerMaruyama": numpyro_own}


def compile_way(way, diffusion):
    def density(params, path):
        return WAYS[way](DIFFUSIONS[diffusion], params, path)

    return jax.jit(jax.value_and_grad(density, (0, 1))).lower(PARAMS, PATH).compile()


def compare(diffusion, rounds=300):
    """Lower quartile of the milliseconds of each way; checks that all compute the same."""
    compiled = {way: compile_way(way, diffusion) for way in WAYS}
    values = {way: float(fn(PARAMS, PATH)[0]) for way, fn in compiled.items()}
    # float32 steps limit EulerMaruyama, which takes them as differences of float32 times.
    np.testing.assert_allclose(values["numpyro_sde"], values["by hand"], rtol=1e-5)
    np.testing.assert_allclose(values["numpyro EulerMaruyama"], values["by hand"], rtol=1e-2)
    taken = {way: [] for way in WAYS}
    shuffle = np.random.default_rng(1)
    for _ in range(rounds):
        # In random order: who comes after the largest program finds the caches empty.
        for way in shuffle.permutation(list(compiled)):
            fn = compiled[way]
            start = time.perf_counter()
            jax.block_until_ready(fn(PARAMS, PATH))
            taken[way].append(time.perf_counter() - start)
    return {way: 1e3 * float(np.quantile(t, 0.25)) for way, t in taken.items()}


def report(diffusion, taken):
    print(f"\nlog density and gradient, scalar Euler path, {STEPS:,} steps, {diffusion}")
    for way, ms in taken.items():
        print(f"  {way:<24}{ms:8.3f} ms{ms / taken['by hand']:8.2f} x by hand")


@pytest.mark.parametrize("diffusion", DIFFUSIONS)
def test_cost_against_hand_written(diffusion):
    taken = compare(diffusion)
    report(diffusion, taken)
    assert taken["numpyro_sde"] <= 1.3 * taken["by hand"]
    assert taken["numpyro_sde"] < taken["numpyro EulerMaruyama"]


@pytest.mark.parametrize("diffusion", DIFFUSIONS)
@pytest.mark.parametrize("way", WAYS)
def test_timing(benchmark, way, diffusion):
    fn = compile_way(way, diffusion)
    benchmark(lambda: jax.block_until_ready(fn(PARAMS, PATH)))


if __name__ == "__main__":
    for name in DIFFUSIONS:
        report(name, compare(name))
