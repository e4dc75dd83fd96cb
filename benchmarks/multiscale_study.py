"""Averaging and homogenisation against the full systems: accuracy, learning, coverage.

    python benchmarks/multiscale_study.py weak       weak errors of the limit against epsilon
    python benchmarks/multiscale_study.py coverage [epsilon]   intervals, with a hidden scale
    python benchmarks/multiscale_study.py learning   a drift learned from one path, three ways

Each takes some minutes of CPU time; tables in docs/multiscale.md come from here.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.contrib.module
import numpyro.distributions as dist
from jax import lax
from numpyro.infer import SVI, Trace_ELBO
from scipy.special import i0

import numpyro_sde as nsde
from numpyro_sde.diagnostics import filtered_estimate, sampling_scale_scan

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "multiscale"))
import systems

# --- Weak errors ------------------------------------------------------------------------------


def weak_error(epsilon, num_paths=200_000, steps_per_scale=20, seed=0):
    """`E X_1^2` of the Landau system S2 less that of its average, and its standard error.

    Both are driven by one Brownian motion, so that their difference has little variance. The
    fast variable is stepped exactly at a frozen slow one; steps shrink with epsilon.
    """
    full = systems.landau(epsilon)
    limit = nsde.average(full)
    steps = round(steps_per_scale / epsilon)
    dt, v, s = 1.0 / steps, systems.LANDAU["v"], systems.LANDAU["s"]
    decay = np.exp(-dt / epsilon)
    slow = full.functions["slow_drift"]

    def step(carry, key):
        x, y, mean = carry
        w, z = jax.random.normal(key, (2, num_paths))
        noise = s * np.sqrt(dt) * w
        after = x + slow(0.0, x, y, full.user_params) * dt + noise
        y = x + (y - x) * decay + np.sqrt(v * (1.0 - decay**2)) * z
        drift = jax.vmap(lambda one: limit.drift_at(0.0, one))(mean)
        return (after, y, mean + drift * dt + noise), None

    def run(key):
        first, rest = jax.random.split(key)
        x = jnp.full(num_paths, 0.5)
        y = x + np.sqrt(v) * jax.random.normal(first, (num_paths,))
        (x, _, mean), _ = lax.scan(step, (x, y, x), jax.random.split(rest, steps))
        gap = x**2 - mean**2
        return jnp.mean(gap), jnp.std(gap) / np.sqrt(num_paths)

    return tuple(float(a) for a in jax.jit(run)(jax.random.key(seed)))


def linear_weak_error(epsilon):
    """The same for S1, `E X_1^2` from `X_0 = 1`, without simulation: both are Gaussian."""
    full = systems.ou_ou(epsilon)
    limit = nsde.average(full)
    linear = nsde.schemes.LocalLinear()
    c, q = systems.OU["c"], systems.OU["q"]
    mean, factor = linear.moments(full, 0.0, 1.0, jnp.array([1.0, c]))
    # The spread of the first fast state, carried along by the linear flow.
    shifted, _ = linear.moments(full, 0.0, 1.0, jnp.array([1.0, c + 1.0]))
    variance = jnp.sum(factor[0] ** 2) + q * (shifted[0] - mean[0]) ** 2
    limit_mean, limit_sd = linear.moments(limit, 0.0, 1.0, jnp.array(1.0))
    return float(mean[0] ** 2 + variance - limit_mean**2 - limit_sd**2)


def slope(epsilons, errors):
    """Least-squares slope in logarithms."""
    return float(np.polyfit(np.log(epsilons), np.log(np.abs(errors)), 1)[0])


def weak():
    epsilons = (0.1, 0.03, 0.01)
    with jax.enable_x64(True):
        exact = [linear_weak_error(eps) for eps in epsilons]
    print(f"S1, exact: {exact}, slope {slope(epsilons, exact):.3f}")
    sampled = [weak_error(eps) for eps in epsilons]
    print(f"S2, sampled (error, standard error): {sampled}")
    print(f"S2 slope {slope(epsilons, [error for error, _ in sampled]):.3f}")


# --- Coverage with a hidden scale -------------------------------------------------------------


def rough_paths(epsilon=0.025, num=96, total=500.0, kept=0.0025, seed=0):
    """Paths of S4 `(num, N)`, and their times.

    Heun steps of a tenth of epsilon squared, of weak order 2: Euler steps of that size make the
    fine wells act hotter than they are, and the limit's coefficients come out 3 per cent high.
    """
    every = round(kept / (0.1 * epsilon**2))
    dt = kept / every

    def force(x):
        return -x + jnp.sin(x / epsilon) / epsilon

    def step(x, z):
        first, shock = force(x), np.sqrt(dt) * z
        return x + 0.5 * dt * (first + force(x + dt * first + shock)) + shock, None

    def keep(x, key):
        x, _ = lax.scan(step, x, jax.random.normal(key, (every, num)))
        return x, x

    def run(key):
        first, rest = jax.random.split(key)
        start = np.sqrt(0.5) * jax.random.normal(first, (num,))
        _, kept_states = lax.scan(keep, start, jax.random.split(rest, round(total / kept)))
        return jnp.concatenate([start[None], kept_states]).T

    with jax.enable_x64(True):
        paths = np.asarray(jax.jit(run)(jax.random.key(seed)))
    return paths, np.arange(paths.shape[1]) * kept


TRUTH = {"A": 1.0 / i0(2.0) ** 2, "Sigma": 0.5 / i0(2.0) ** 2}
# Posteriors of two parameters are evaluated on a grid: no sampler stands between.
AXES = {"A": np.geomspace(0.004, 1.5, 241), "Sigma": np.geomspace(0.03, 0.4, 161)}
PRIOR = dist.LogNormal(jnp.log(jnp.array([0.3, 0.15])), 1.0)


def on_grid(log_likelihood):
    """Weights of the grid's points, of a posterior under wide log-normal priors."""

    def log_posterior(values):
        prior = jnp.sum(PRIOR.log_prob(values) + jnp.log(values))  # a grid in logarithms
        return log_likelihood(values[0], values[1]) + prior

    points = jnp.stack(jnp.meshgrid(*AXES.values(), indexing="ij"), axis=-1)
    logits = lax.map(log_posterior, points.reshape(-1, 2), batch_size=512)
    return jax.nn.softmax(logits).reshape(points.shape[:2])


def covers(weights, level=0.9):
    """Whether central intervals hold the truth, and the posterior means."""
    inside, means = [], []
    for axis, (name, values) in enumerate(AXES.items()):
        marginal = np.asarray(weights).sum(axis=1 - axis)
        assert max(marginal[0], marginal[-1]) < 1e-4, "the grid cuts the posterior"
        below = np.interp(TRUTH[name], values, np.cumsum(marginal) - 0.5 * marginal)
        inside.append(bool(abs(below - 0.5) <= level / 2))
        means.append(float(np.sum(values * marginal)))
    return inside, means


def coverage(epsilon=0.025, num=96, step=1.0, scans=3):
    """Coverage of 90 per cent intervals for filtered, subsampled and naive fits."""
    paths, times = rough_paths(epsilon, num, kept=4.0 * epsilon**2)
    stride = round(step / (times[1] - times[0]))
    coarse = times[::stride]

    @jax.jit
    def subsampled(x):
        def log_likelihood(A, Sigma):
            ou = nsde.processes.OrnsteinUhlenbeck(A, 0.0, jnp.sqrt(2.0 * Sigma))
            return nsde.SDEPath(ou, coarse, init=x[0]).log_prob(x)

        return on_grid(log_likelihood)

    found = {"filtered": [], "subsampled": [], "naive": []}
    for path in paths:
        fit = filtered_estimate(path, times, lambda x: -x, width=1.0)
        found["filtered"].append(covers(on_grid(fit.log_likelihood)))
        found["subsampled"].append(covers(subsampled(jnp.asarray(path[::stride]))))
        found["naive"].append(naive(path, times[1] - times[0]))
    print(f"{num} paths, T = 500, epsilon = {epsilon}; truth {TRUTH}")
    for name, rows in found.items():
        inside = np.mean([row[0] for row in rows], axis=0)
        means = np.array([row[1] for row in rows])
        print(
            f"  {name:12} coverage A {inside[0]:.3f}, Sigma {inside[1]:.3f}; means "
            f"{means.mean(axis=0).round(4).tolist()} sd {means.std(axis=0).round(4).tolist()}",
            flush=True,
        )
    warned = 0
    for path in paths[:scans]:
        scan = sampling_scale_scan(
            path, times, slow_sde(), [times[1], 0.01, 0.03, 0.1, 0.3, 0.5, 1.0, 1.5]
        )
        warned += scan.depends_on_step
        print(scan)
    print(f"  the scan says that the answer depends on the step: {warned} of {scans}")
    return found, warned


def slow_sde():
    """The slow model for a scan."""
    return nsde.SDE(
        lambda t, x, p: -p["A"] * x,
        lambda t, x, p: jnp.sqrt(2.0 * p["Sigma"]),
        params={"A": 0.5, "Sigma": 0.2},
    )


def naive(path, dt):
    """Flat-prior posterior of the slow model at the finest step: Gaussian in A, narrow in Sigma."""
    x, dx = path[:-1], np.diff(path)
    information = np.sum(x**2) * dt
    A, Sigma = -np.sum(x * dx) / information, np.mean(dx**2) / (2 * dt)
    errors = np.array([np.sqrt(2 * Sigma / information), Sigma * np.sqrt(2 / len(dx))])
    best = np.array([A, Sigma])
    inside = np.abs(best - np.array(list(TRUTH.values()))) <= 1.645 * errors
    return inside.tolist(), best.tolist()


# --- Learning a drift from one path -----------------------------------------------------------

SIZES = (100, 1_000, 15_000)
STEP = 0.05
GRID = np.linspace(-2.0, 2.0, 201)


def tagged_paths(num, epsilon=0.002, substeps=125, seed=0):
    """Slow paths of the full system S8, `(num, 15001)`: exact bath, Euler steps of the particle."""
    precision = np.linalg.inv(systems.bath_covariance())
    rates, modes = np.linalg.eigh(precision)
    h = STEP / substeps
    decay = np.exp(-rates * h / epsilon)
    spread = np.sqrt((1.0 - decay**2) / rates)
    force = jax.vmap(lambda x, y: systems.bath_force(0.0, x, y, None))

    def substep(carry, key):
        x, u = carry
        w, z = jax.random.split(key)
        moved = x + h * force(x, u @ modes.T) + 0.5 * np.sqrt(h) * jax.random.normal(w, (num,))
        return (moved, u * decay + spread * jax.random.normal(z, u.shape)), None

    def step(carry, key):
        carry, _ = lax.scan(substep, carry, jax.random.split(key, substeps))
        return carry, carry[0]

    def run(key):
        first, rest = jax.random.split(key)
        bath = jax.random.normal(first, (num, len(rates))) / np.sqrt(rates)
        carry = (jnp.zeros(num), bath)
        _, x = lax.scan(step, carry, jax.random.split(rest, SIZES[-1]))
        return jnp.concatenate([jnp.zeros((1, num)), x]).T

    return np.asarray(jax.jit(run)(jax.random.key(seed)))


def departure(module, start):
    """Squared distance of weights from where they started: minus twice a Gaussian log prior."""
    pairs = zip(jax.tree.leaves(module), jax.tree.leaves(start), strict=True)
    return sum(jnp.sum((a - b) ** 2) for a, b in pairs)


def with_flow(full, start, times, path):
    """The averaged drift of a learned bath law: penalised likelihood, fixed nodes."""
    pi = start.register("pi")
    low, high = float(GRID[0]) - 1.0, float(GRID[-1]) + 1.0
    limit = nsde.average(full, pi, nsde.multiscale.QuasiMonteCarlo(512), (low, high, 48))
    scheme = nsde.schemes.LocalLinear()
    numpyro.sample("x", nsde.SDEPath(limit, times, path[0], scheme=scheme), obs=path)
    numpyro.factor("penalty", -1e-4 * pi.moment() - 1.5 * departure(pi, start))


def with_network(start, strength, times, path):
    """A network for the drift, its weights held near their start as the flow's are, or free."""
    net = numpyro.contrib.module.eqx_module("net", start)
    sde = nsde.SDE(lambda t, x: net(x), lambda t, x: 0.5)
    # Euler's step: a flexible drift with a free slope runs away under a local-linear one.
    scheme = nsde.schemes.Euler()
    numpyro.sample("x", nsde.SDEPath(sde, times, path[0], scheme=scheme), obs=path)
    arrays = [eqx.filter(module, eqx.is_inexact_array) for module in (net, start)]
    numpyro.factor("penalty", -strength * departure(*arrays))


def errors(drift, path):
    """Mean squared errors: over the states of the path, and uniform on [-2, 2]."""
    on_path = np.asarray(drift(jnp.asarray(path))) - systems.tagged_particle_drift(path)
    uniform = np.asarray(drift(jnp.asarray(GRID))) - systems.tagged_particle_drift(GRID)
    return float(np.mean(on_path**2)), float(np.mean(uniform**2))


def optimise(model, data, steps, rate):
    """Adam with a rate that falls to zero over the second half."""
    schedule = numpyro.optim.Adam(lambda i: rate * jnp.minimum(1.0, 2.0 * (1.0 - i / steps)))
    svi = SVI(model, lambda *_: None, schedule, Trace_ELBO())
    return svi.run(jax.random.key(1), steps, *data, progress_bar=False).params


def learning(num_seeds=7):
    """Table of errors of the learned drift. Settings were chosen on other paths (seed 100)."""
    full = systems.tagged_particle()
    flow = nsde.ConditionalFlow(10, 0, kind="affine", num_layers=2, hidden_dims=(32,))
    network = eqx.nn.MLP("scalar", "scalar", 64, 2, jax.nn.silu, key=jax.random.key(0))
    paths = tagged_paths(num_seeds)

    @jax.jit
    def flow_drift(pi, states):
        limit = nsde.average(full, pi, nsde.multiscale.QuasiMonteCarlo(2048), (-3.0, 3.0, 96))
        return jax.vmap(lambda x: limit.drift_at(0.0, x))(states)

    start = [errors(lambda x: flow_drift(flow, x), path) for path in paths]
    print(f"the flow before training: {np.median(start, axis=0).round(4).tolist()}")
    for size in SIZES:
        times = STEP * np.arange(size + 1)
        rows = {"flow": [], "network": [], "network, penalised": []}
        begun = time.perf_counter()
        for long in paths:
            path = jnp.asarray(long[: size + 1], jnp.float32)
            model = partial(with_flow, full, flow, times)
            found = optimise(model, (path,), 800, 5e-3)["pi$params"]
            rows["flow"].append(errors(partial(flow_drift, found), path))
            for name, strength in (("network", 0.0), ("network, penalised", 1.5)):
                model = partial(with_network, network, strength, times)
                found = optimise(model, (path,), 1500, 3e-3)["net$params"]
                rows[name].append(errors(jax.vmap(eqx.combine(found, network)), path))
        for name, values in rows.items():
            median = np.median(values, axis=0).round(5).tolist()
            print(
                f"{size:6} {name:8} medians {median} on the path: "
                f"{[round(v[0], 4) for v in values]}",
                flush=True,
            )
        print(f"       {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    started = time.perf_counter()
    study = {"weak": weak, "coverage": coverage, "learning": learning}[sys.argv[1]]
    study(*(float(argument) for argument in sys.argv[2:]))
    print(f"{time.perf_counter() - started:.0f} s")
