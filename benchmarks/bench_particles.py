"""Particle filters beside cuthbert and particles, and particle MCMC beside NUTS.

As a test (`make bench`): a bootstrap filter of an Ornstein-Uhlenbeck process with 1,000 noisy
observations, 1,000 and 10,000 particles. Claims: at least 2 times the particle steps a second of
cuthbert and of particles (nchopin), and at most 1.5 times the cost of JAX's random numbers and of
moving the particles alone. Measured were 5.4, 4.9 and 1.2 with 1,000 particles, 3.8, 4.5 and 0.8
with 10,000; beside our own random numbers (`smc.normals`) and moves it is 2.4 and 2.1. Install
the peers by `pip install cuthbert` and `pip install --no-deps particles numba scikit-learn`
(particles 0.4 asks for an older NumPy than JAX takes, but runs with a new one).

As a program: `python benchmarks/bench_particles.py variance` prints the variance of the log
likelihood of a stochastic Lotka-Volterra model with precise observations, guided and bootstrap, at
10, 50 and 200 steps between observations; `... posterior` fits the shipped Lotka-Volterra counts by
PMMH, particle Gibbs and NUTS on the guided path and prints effective sizes by second.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from measure import compiled, cpu_ms, report
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS, init_to_median

import numpyro_sde as nsde
from numpyro_sde.smc.normals import normals

NUM_TIMES = 1000
STEP, RATE, SCALE, NOISE = 0.1, 1.0, 0.7, 0.3


def data():
    rng = np.random.default_rng(0)
    x, path = 0.0, []
    for _ in range(NUM_TIMES):
        path.append(x)
        x = x - RATE * x * STEP + SCALE * np.sqrt(STEP) * rng.normal()
    return np.array(path) + NOISE * rng.normal(size=NUM_TIMES)


def ours(y, num_particles, threshold=0.5):
    times = np.arange(NUM_TIMES) * STEP
    sde = nsde.processes.OrnsteinUhlenbeck(RATE, 0.0, SCALE)
    path = nsde.SDEPath(sde, times, dist.Normal(0.0, 0.5), scheme=nsde.schemes.Euler())

    def model(y=None):
        x = numpyro.sample("x", path)
        nsde.observe("y", x, lambda t, x: dist.Normal(x, NOISE), obs=y)

    def run(key):
        method = nsde.filters.Particle(
            num_particles, proposal="bootstrap", ess_threshold=threshold, key=key
        )
        marginal = nsde.handlers.marginalize(model, method=method)
        return numpyro.infer.util.log_density(marginal, (y,), {}, {})[0]

    return run


def random_numbers_and_moves(num_particles, draw=jax.random.normal):
    def run(key):
        def step(x, key):
            z = draw(key, (num_particles,), float)
            return x - RATE * STEP * x + SCALE * np.sqrt(STEP) * z, None

        keys = jax.random.split(key, NUM_TIMES - 1)
        return jnp.sum(jax.lax.scan(step, jnp.zeros(num_particles), keys)[0])

    return run


def by_cuthbert(y, num_particles):
    from cuthbert import filter as run_filter
    from cuthbert.smc import particle_filter
    from cuthbertlib.resampling import adaptive, systematic

    observations = jnp.asarray(y)
    kernel = particle_filter.build_filter(
        init_sample=lambda key: 0.5 * jax.random.normal(key),
        propagate_sample=lambda key, x, inputs: (
            x - RATE * STEP * x + SCALE * np.sqrt(STEP) * jax.random.normal(key)
        ),
        log_potential=lambda last, x, inputs: jax.scipy.stats.norm.logpdf(inputs, x, NOISE),
        n_filter_particles=num_particles,
        resampling_fn=adaptive.ess_decorator(systematic.resampling, 0.5),
    )

    def run(key):
        start_key, key = jax.random.split(key)
        # The first state is not weighed here: one observation of a thousand.
        start = kernel.init_prepare(key=start_key)
        return run_filter(kernel, observations[1:], start, key=key).log_normalizing_constant[-1]

    return run


def by_particles(y, num_particles):
    """CPU milliseconds of one run of particles (NumPy and Numba)."""
    import particles
    from particles import distributions as law
    from particles import state_space_models as ssm

    class Model(ssm.StateSpaceModel):
        def PX0(self):  # noqa: N802
            return law.Normal(scale=0.5)

        def PX(self, t, xp):  # noqa: N802
            return law.Normal(loc=xp - RATE * STEP * xp, scale=SCALE * np.sqrt(STEP))

        def PY(self, t, xp, x):  # noqa: N802
            return law.Normal(loc=x, scale=NOISE)

    taken = []
    for _ in range(4):
        run = particles.SMC(
            fk=ssm.Bootstrap(ssm=Model(), data=y), N=num_particles, resampling="systematic"
        )
        start = time.process_time()
        run.run()
        taken.append(time.process_time() - start)
    return 1e3 * float(np.median(taken[1:]))


@pytest.fixture
def double_precision():
    """For the whole process: callbacks, which cuthbert uses, do not see a context's setting."""
    numpyro.enable_x64()
    yield
    numpyro.enable_x64(False)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("num_particles", [1000, 10_000])
def test_bootstrap_filter(num_particles):
    pytest.importorskip("cuthbert")
    pytest.importorskip("particles")
    y = data()
    repeats = 15 if num_particles <= 1000 else 7
    key = jax.random.key(0)
    rows = []
    for name, fn in (
        ("JAX's random numbers and moves", random_numbers_and_moves(num_particles)),
        ("our random numbers and moves", random_numbers_and_moves(num_particles, normals)),
        ("ours", ours(y, num_particles)),
        ("ours, resampling at every time", ours(y, num_particles, 1.0)),
        ("cuthbert", by_cuthbert(y, num_particles)),
    ):
        executable, seconds = compiled(fn, key)
        rows.append((name, cpu_ms(executable, key, repeats=repeats), seconds))
    rows.append(("particles", by_particles(y, num_particles), 0.0))
    report(f"bootstrap filter, {NUM_TIMES} observations, {num_particles} particles", rows)
    alone, _, mine, _, cuthbert, peer = (row[1] for row in rows)
    assert cuthbert >= 2.0 * mine
    assert peer >= 2.0 * mine
    assert mine <= 1.5 * alone


def variance_table(noise=1.0):
    times = np.arange(41.0)
    sde = nsde.processes.LotkaVolterra(0.5, 0.0025, 0.3)
    start = jnp.array([71.0, 79.0])
    fine = nsde.TimeGrid(times, 0.01)
    states = np.asarray(nsde.SDEPath(sde, fine, start).sample(jax.random.key(3)))[fine.index]
    y = states + noise * np.random.default_rng(0).normal(size=states.shape)
    y[0] = np.nan
    print(
        "| steps | proposal | particles | variance | its error | CPU ms | variance x ms | ratio |"
    )
    print("|" + " --- |" * 8)
    for substeps in (10, 50, 200):
        grid = nsde.TimeGrid(times, 1.0001 / substeps)
        path = nsde.SDEPath(sde, grid, start)
        products = []
        for proposal, num_particles, repeats in (("bootstrap", 2000, 40), ("guided", 250, 400)):

            def run(key, path=path, grid=grid, proposal=proposal, num_particles=num_particles):
                method = nsde.filters.Particle(num_particles, proposal=proposal, key=key)
                return nsde.filter_path(
                    path,
                    lambda t, x: dist.Normal(x, noise).to_event(1),
                    y,
                    method=method,
                    at=grid.index,
                ).log_likelihood

            executable, _ = compiled(run, jax.random.key(0))
            logs = np.asarray([executable(jax.random.key(i)) for i in range(repeats)])
            cost = cpu_ms(executable, jax.random.key(0), repeats=5)
            variance = float(np.var(logs, ddof=1))
            error = float(np.std((logs - logs.mean()) ** 2) / np.sqrt(repeats))
            products.append(variance * cost)
            print(
                f"| {substeps} | {proposal} | {num_particles} | {variance:.4f} | {error:.4f} | "
                f"{cost:.1f} | {products[-1]:.3g} | {products[0] / products[-1]:.0f} |",
                flush=True,
            )


def counts_model():
    counts = nsde.datasets.load_lotka_volterra()
    grid = nsde.TimeGrid(np.asarray(counts.times), 0.1001)

    def model(y=None):
        centre = jnp.log(jnp.asarray(counts.rates))
        log_rates = numpyro.sample("log_rates", dist.Normal(centre, 1.0).to_event(1))
        birth, predation, death = jnp.exp(log_rates)
        sde = nsde.processes.LotkaVolterra(birth, predation, death)
        x = numpyro.sample("x", nsde.SDEPath(sde, grid, jnp.asarray(counts.start)))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 10.0).to_event(1), obs=y, at=grid.index)

    return model, np.asarray(counts.counts)


def posterior_table(draws):
    model, y = counts_model()
    guided = numpyro.handlers.reparam(model, config={"x": nsde.reparam.GuidedReparam()})
    print("| engine | min ESS | seconds, all | min ESS / s | rates: mean (sd) |")
    print("|" + " --- |" * 5)
    for name, kernel, factor in (
        ("PMMH", nsde.infer.PMMH(model), 10),
        ("particle Gibbs, 32", nsde.infer.ParticleGibbs(model, 32), 5),
        ("SplitNUTS, guided path", nsde.infer.SplitNUTS(guided), 1),
        ("NUTS, guided path", NUTS(guided, init_strategy=init_to_median(num_samples=20)), 1),
    ):
        start = time.perf_counter()
        mcmc = MCMC(
            kernel, num_warmup=draws // 2 * factor, num_samples=draws * factor, progress_bar=False
        )
        mcmc.run(jax.random.key(1), y)
        rates = np.exp(np.asarray(jax.block_until_ready(mcmc.get_samples()["log_rates"])))
        wall = time.perf_counter() - start
        size = min(float(effective_sample_size(rates[None, :, i])) for i in range(3))
        values = ", ".join(
            f"{m:.4g} ({s:.2g})" for m, s in zip(rates.mean(0), rates.std(0), strict=True)
        )
        print(f"| {name} | {size:.0f} | {wall:.0f} | {size / wall:.2f} | {values} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("table", choices=["variance", "posterior"])
    parser.add_argument("--draws", type=int, default=1000)
    chosen = parser.parse_args()
    numpyro.enable_x64()
    if chosen.table == "variance":
        variance_table()
    else:
        posterior_table(chosen.draws)
