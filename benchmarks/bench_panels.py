"""What many series cost: gradients, devices, separate fits, populations.

Run: python benchmarks/bench_panels.py [gradient devices fits population], all without arguments.

- gradient: the marginal likelihood of 1e3 to 1e5 series of 50 irregular points, own clocks, under
  `Kalman`, clocks and data as arguments: time and memory of a gradient, time to compile.
- devices: 2,000 and 20,000 series over one and over two forced host devices: time of a gradient.
- fits: 1,000 separate fits by one and by two worker processes.
- population: 1e5 series simulated from a known population; two stages and the amortised guide.
"""

from __future__ import annotations

import functools
import os
import resource
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from measure import compiled, cpu_ms
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoLaplaceApproximation
from numpyro.infer.util import log_density

import numpyro_sde as nsde

PARAMS = {"rate": 1.3, "mean": 0.1, "scale": 0.8}
MEAN, SD = 0.5, 0.7  # of the population


AMORTISED_STEPS = 10_000


def simulate(series: int, times: int, level=0.0, seed: int = 0):
    """Ornstein-Uhlenbeck processes seen with noise, each on its own clock."""
    rng = np.random.default_rng(seed)
    clocks = np.cumsum(rng.exponential(0.4, size=(series, times)) + 0.05, axis=1)
    level = np.broadcast_to(level, series)
    x = np.empty((series, times))
    x[:, 0] = level + 0.5 * rng.normal(size=series)
    for k in range(1, times):
        decay = np.exp(-1.5 * (clocks[:, k] - clocks[:, k - 1]))
        noise = np.sqrt(0.64 / 3.0 * (1.0 - decay**2)) * rng.normal(size=series)
        x[:, k] = level + decay * (x[:, k - 1] - level) + noise
    return nsde.TimeGrid(clocks), x + 0.3 * rng.normal(size=x.shape)


def common(times, y):
    """All series share their parameters."""
    p = {name: numpyro.sample(name, dist.Normal(value, 1.0)) for name, value in PARAMS.items()}
    ou = nsde.processes.OrnsteinUhlenbeck(p["rate"], p["mean"], p["scale"])
    with numpyro.plate("series", len(y)):
        x = numpyro.sample("x", nsde.SDEPath(ou, times, init=dist.Normal(0.0, 1.0)))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)


def oscillators(times, y):
    """Positions of damped oscillators, two numbers a state."""
    p = {name: numpyro.sample(name, dist.Normal(value, 1.0)) for name, value in PARAMS.items()}
    A = jnp.stack([jnp.array([0.0, 1.0]), -jnp.stack([p["rate"], 0.4 + p["mean"]])])
    L = jnp.stack([jnp.zeros(1), p["scale"][None]])
    sde = nsde.processes.LinearSDE(A, jnp.zeros(2), L)
    init = dist.Normal(jnp.zeros(2), 1.0).to_event(1)
    with numpyro.plate("series", len(y)):
        x = numpyro.sample("x", nsde.SDEPath(sde, times, init=init))
        nsde.observe("y", x, lambda t, x: dist.Normal(x[0], 0.3), obs=y)


def path_of(level, times, y):
    """One path, or a batch, around its level."""
    ou = nsde.processes.OrnsteinUhlenbeck(1.5, level, 0.8)
    x = numpyro.sample("x", nsde.SDEPath(ou, times, init=dist.Normal(level, 0.5)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)


def alone(times, y):
    """One series under a wide prior."""
    path_of(numpyro.sample("level", dist.Normal(0.0, 3.0)), times, y)


def shared():
    """Parameters of the population."""
    mean = numpyro.sample("mean", dist.Normal(0.0, 2.0))
    return mean, numpyro.sample("sd", dist.HalfNormal(2.0))


def of_draws(stage, series, size):
    """The population model of the second stage, by mini-batches."""
    mean, sd = shared()
    with numpyro.plate("series", series, subsample_size=size) as i:
        stage[i].reweigh("draws", {"level": dist.Normal(mean, sd)})


def of_series(times, y, size):
    """The population model of the data, by mini-batches."""
    mean, sd = shared()
    with numpyro.plate("series", len(y), subsample_size=size) as i:
        level = numpyro.sample("level", dist.Normal(mean, sd))
        path_of(level, jax.tree.map(lambda a: a[i], times), y[i])


def integrated(model):
    """The model with its path integrated out."""
    return nsde.handlers.marginalize(model, method=nsde.filters.Kalman())


def value_of(params, times, y, model=common):
    """Value and gradient of the log density."""
    model = integrated(model)
    return jax.value_and_grad(lambda p: log_density(model, (times, y), {}, p)[0])(params)


def memory() -> float:
    """Largest memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def gradient() -> None:
    """Cost by the number of series."""
    print("\ngradient: series of 50 points, CPU time")
    print(f"  {'series':>8}{'ms':>10}{'us a series':>13}{'compile s':>11}{'peak MB':>10}")
    params = jax.tree.map(jnp.asarray, PARAMS)
    for series in (1_000, 10_000, 100_000):
        args = jax.tree.map(jnp.asarray, simulate(series, 50))
        run, seconds = compiled(value_of, params, *args)
        ms = cpu_ms(run, params, *args, repeats=5)
        row = f"{series:>8}{ms:>10.1f}{1e3 * ms / series:>13.2f}{seconds:>11.2f}{memory():>10.0f}"
        print(f"  {row}", flush=True)
    args = jax.tree.map(jnp.asarray, simulate(10_000, 50))
    run, seconds = compiled(functools.partial(value_of, model=oscillators), params, *args)
    ms = cpu_ms(run, params, *args, repeats=3)
    print(f"  10,000 oscillators, d = 2: {ms:.0f} ms, compile {seconds:.1f} s", flush=True)


def devices() -> None:
    """Wall time of a gradient over devices, each number in a process of its own.

    XLA spreads the larger operations of a single CPU device over all cores already, so that devices
    made of cores are set against one device on one core too.
    """
    cores = sorted(os.sched_getaffinity(0))
    for number, own in ((1, cores[:1]), (1, cores), (2, cores)):
        flags = os.environ.get("XLA_FLAGS", "")
        flags = f"{flags} --xla_force_host_platform_device_count={number}"
        env = {**os.environ, "XLA_FLAGS": flags}
        print(f"{number} device(s), {len(own)} core(s)", flush=True)
        subprocess.run(
            [sys.executable, __file__, "one_process"],
            env=env,
            check=True,
            preexec_fn=functools.partial(os.sched_setaffinity, 0, own),
        )


def one_process() -> None:
    """Wall time of a gradient over the devices of this process."""
    for series in (2_000, 20_000):
        args = nsde.shard_panel(None, *simulate(series, 50))
        params = jax.tree.map(jnp.asarray, PARAMS)
        run, _ = compiled(value_of, params, *args)
        taken = []
        for _ in range(30):
            start = time.perf_counter()
            jax.block_until_ready(run(params, *args))
            taken.append(time.perf_counter() - start)
        sums = run.as_text().count(" all-reduce(")
        text = f"{1e3 * min(taken):.2f} ms, {sums} sums over devices"
        print(f"devices: {series} series over {jax.device_count()}: {text}", flush=True)


def fits() -> None:
    """A thousand fits by one worker and by two, from an empty compilation cache.

    Each worker imports and compiles for some seconds first: shorter fits gain less than long ones.
    """
    times, y = simulate(1_000, 200, np.random.default_rng(1).normal(MEAN, SD, size=1_000))
    for chains in (1, 4):
        taken = [fit_by(workers, times, y, chains) for workers in (1, 2)]
        ratio = f"{taken[0] / taken[1]:.2f} times as fast by two"
        print(f"fits: {chains} chains each: {ratio}", flush=True)


def fit_by(workers: int, times, y, chains: int) -> float:
    """Wall time of all fits by so many workers."""
    chain = nsde.Chain(num_warmup=1_000, num_samples=1_000, num_chains=chains)
    with tempfile.TemporaryDirectory() as folder:
        nsde.enable_compilation_cache(folder)
        start = time.perf_counter()
        data = {"times": times, "y": y}
        found = nsde.fit_panel(
            integrated(alone), data, chain, executor=workers, batch_size=20, progress=False
        )
        wall = time.perf_counter() - start
    each = 1e3 * float(np.median(list(found.seconds.values())))
    text = f"{wall:.1f} s in all, {each:.1f} ms a fit, programs {found.programs}"
    print(f"fits: {len(found)} by {workers} workers: {text}", flush=True)
    return wall


def population(series: int = 100_000) -> None:
    """Two stages and the amortised guide on a population with known truth."""
    level = np.random.default_rng(2).normal(MEAN, SD, size=series)
    times, y = simulate(series, 12, level)
    print(f"population: {series} series of 12 points, truth mean {MEAN}, sd {SD}", flush=True)
    start = time.perf_counter()
    draws = first_stage(times, y, num_draws=50)
    first = time.perf_counter() - start
    stage = nsde.SeriesDraws({"level": draws}, {"level": dist.Normal(0.0, 3.0)})
    start = time.perf_counter()
    full = functools.partial(of_draws, series=series, size=None)
    # Of so many series the posterior of two parameters is normal: its mode and curvature do.
    normal = AutoLaplaceApproximation(full)
    svi = SVI(full, normal, numpyro.optim.Minimize(), Trace_ELBO())
    state, _ = jax.jit(svi.update)(svi.init(jax.random.key(0), stage), stage)
    draw = functools.partial(normal.sample_posterior, sample_shape=(4_000,))
    found = draw(jax.random.key(3), svi.get_params(state), stage)
    report("two stages", found, first, time.perf_counter() - start)
    start = time.perf_counter()
    model = integrated(functools.partial(of_series, size=500))
    features = nsde.guides.panel_features(times, y)
    guide = nsde.guides.AmortizedGuide(model, "series", features, hidden=(64,))
    # Batches of 500 are noisy: steps go down until their noise is below the sd of the posterior.
    decay = lambda i: 2e-2 * 10.0 ** (-3.0 * i / AMORTISED_STEPS)  # noqa: E731
    svi = SVI(model, guide, numpyro.optim.Adam(decay), Trace_ELBO(num_particles=2))
    args = jax.tree.map(jnp.asarray, (times, y))
    state = svi.init(jax.random.key(1), *args)
    step = jax.jit(lambda s, *a: jax.lax.scan(lambda s, _: svi.update(s, *a), s, None, 500))
    for _ in range(AMORTISED_STEPS // 500):
        state, _ = step(state, *args)
    found = guide.shared_draws(jax.random.key(2), svi.get_params(state), 4_000)
    report("amortised", found, 0.0, time.perf_counter() - start)


def first_stage(times, y, num_draws: int):
    """Draws of each series' level under its wide prior: exact, for the level enters linearly."""

    @jax.jit
    def posterior(times, y):
        model = integrated(alone_at)

        def value(level):
            return log_density(model, (times, y), {}, {"level": level})[0]

        slope = jax.grad(value)
        zero = jnp.zeros(len(y))
        precision = slope(zero) - slope(zero + 1.0)
        return slope(zero) / precision, precision

    mean, precision = (np.asarray(a) for a in posterior(*jax.tree.map(jnp.asarray, (times, y))))
    z = np.random.default_rng(3).normal(size=(len(y), num_draws))
    return mean[:, None] + z / np.sqrt(precision)[:, None]


def alone_at(times, y):
    """All series at once, each under its wide prior."""
    with numpyro.plate("series", y.shape[0]):
        alone(times, y)


def report(name, draws, first, seconds) -> None:
    """Means and intervals of the population's parameters."""
    parts = []
    for site, truth in (("mean", MEAN), ("sd", SD)):
        value = np.asarray(draws[site])
        low, high = np.quantile(value, [0.05, 0.95])
        inside = "inside" if low <= truth <= high else "OUTSIDE"
        parts.append(f"{site} {value.mean():.4f} [{low:.4f}, {high:.4f}] {inside}")
    print(f"  {name}: {'; '.join(parts)}; {first:.1f} + {seconds:.1f} s", flush=True)


def main() -> None:
    """Run the cases that are named."""
    nsde.configure_cpu()
    jax.config.update("jax_enable_x64", True)
    cases = {
        "gradient": gradient,
        "devices": devices,
        "fits": fits,
        "population": population,
        "one_process": one_process,
    }
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} processors, jax {jax.__version__}")
    for name in sys.argv[1:] or ("gradient", "devices", "fits", "population"):
        cases[name]()


if __name__ == "__main__":
    main()
