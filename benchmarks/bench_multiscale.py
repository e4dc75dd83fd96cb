"""Cost of averaging: gradients of a path's density, and simulation of the limit.

Run with `make bench`, or `python benchmarks/bench_multiscale.py`. CPU time, compile time apart.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from measure import compiled, cpu_ms, report

import numpyro_sde as nsde
from numpyro_sde.multiscale import ScalarFast

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "multiscale"))

STEPS = 4_000
TIMES = 0.05 * np.arange(STEPS + 1)
PARAMS = {"v": jnp.float32(0.3), "s": jnp.float32(0.3)}


def slow_path():
    """A path of the averaged Landau system, by NumPy."""
    rng = np.random.default_rng(0)
    x = np.zeros(STEPS + 1)
    for k in range(STEPS):
        x[k + 1] = x[k] + 0.05 * (0.7 * x[k] - x[k] ** 3) + 0.3 * np.sqrt(0.05) * rng.normal()
    return jnp.asarray(x, jnp.float32)


def closed_form(params):
    return nsde.SDE(
        lambda t, x, p: (1.0 - p["v"]) * x - x**3, lambda t, x, p: p["s"], params=params
    )


def full_system(params, epsilon=0.1):
    return nsde.SlowFastSDE(
        lambda t, x, y, p: x * (1.0 - y**2),
        lambda t, x, y, p: p["s"],
        lambda t, x, y, p: x - y,
        lambda t, x, y, p: jnp.sqrt(2.0 * p["v"]),
        epsilon,
        params=params,
    )


def known_law(x, p):
    return dist.Normal(x, jnp.sqrt(p["v"]))


WAYS = {
    "closed form": closed_form,
    "known law, 32 nodes, table of 32": lambda p: nsde.average(
        full_system(p), known_law, 32, (-1.6, 1.6, 32)
    ),
    "known law, 32 nodes, table of 128": lambda p: nsde.average(
        full_system(p), known_law, 32, (-1.6, 1.6, 128)
    ),
    "fast density, 32 nodes, table of 32": lambda p: nsde.average(
        full_system(p), ScalarFast(-4.0, 4.0, 32), table=(-1.6, 1.6, 32)
    ),
    "known law, 32 nodes, no table": lambda p: nsde.average(full_system(p), known_law, 32),
}


def gradient_costs(wrt):
    """Milliseconds of the density and its gradient, for each way."""
    path = slow_path()

    def density(make, params, path):
        return nsde.SDEPath(make(params), TIMES, dist.Normal(0.0, 1.0)).log_prob(path)

    rows = []
    for name, make in WAYS.items():
        fn, seconds = compiled(
            jax.value_and_grad(lambda p, x, make=make: density(make, p, x), wrt), PARAMS, path
        )
        rows.append((name, cpu_ms(fn, PARAMS, path, repeats=300), seconds))
    return rows


def simulation_costs(epsilon=0.01, num=100):
    """Milliseconds to draw paths over 10 time units, for the full system and its average."""
    times = np.linspace(0.0, 10.0, 101)
    full = full_system(PARAMS, epsilon)
    euler = nsde.schemes.Euler()
    # Ten steps for each fast relaxation time, ten for each slow one.
    fine = full.grid(times, steps_per_scale=10)
    laws = {
        "averaged": nsde.SDEPath(nsde.average(full), times, 0.5, scheme=euler),
        "averaged, table": nsde.SDEPath(
            nsde.average(full, table=(-3.0, 3.0, 64)), times, 0.5, scheme=euler
        ),
        "full system": nsde.SDEPath(full, fine, jnp.array([0.5, 0.5]), scheme=euler),
    }
    rows = []
    for name, law in laws.items():
        fn, seconds = compiled(lambda key, law=law: law.sample(key, (num,)), jax.random.key(0))
        rows.append((name, cpu_ms(fn, jax.random.key(0), repeats=10), seconds))
    return rows


def test_a_table_costs_at_most_four_closed_forms():
    for wrt, title in ((0, "in the parameters"), ((0, 1), "in parameters and path")):
        rows = gradient_costs(wrt)
        report(f"gradient {title}, {STEPS} steps", rows)
        assert rows[1][1] <= 4.0 * rows[0][1]


def test_simulating_the_average_is_fifty_times_faster():
    rows = simulation_costs()
    report("100 paths over 10 time units, epsilon = 0.01", rows)
    assert rows[-1][1] >= 50.0 * rows[0][1]


if __name__ == "__main__":
    test_a_table_costs_at_most_four_closed_forms()
    test_simulating_the_average_is_fifty_times_faster()
