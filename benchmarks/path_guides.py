"""Path guides: laws of a path against a long particle smoother; time to a given accuracy.

    python benchmarks/path_guides.py laws      smoothing marginals, bounds and times of all laws
    python benchmarks/path_guides.py bridge    the fractional Ornstein-Uhlenbeck bridge
    python benchmarks/path_guides.py panel     200 series: SVI against guided NUTS

`laws` fits paths at fixed parameters: the double well with five observations (400 steps), and the
stochastic Lotka-Volterra model in log coordinates, ten observations of the prey alone (200
steps). Beside our three laws stand NumPyro's own guides on the whitened path. The reference is a
particle filter of 20,000 with backward sampling; distances are in its standard deviations.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import reparam, replay, seed, substitute, trace
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO, init_to_median
from numpyro.infer.autoguide import (
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
)
from numpyro.infer.util import log_density

import numpyro_sde as nsde
from numpyro_sde.diagnostics.compare.statistics import fit_weights, wasserstein
from numpyro_sde.guides import (
    AutoPathGuide,
    ConditionalScorePath,
    ControlledPath,
    GaussianMarkovPath,
    fit_score,
    fit_svi,
)

NUM_DRAWS = 4000
ROOT = Path(__file__).resolve().parents[1]


def double_well():
    """Five observations; log evidence -3.8792 by a grid solution."""
    grid = nsde.TimeGrid(np.arange(6) * 0.8, max_step=0.01)
    sde = nsde.processes.DoubleWell(linear=2.0, cubic=2.0, scale=1.0)

    def path():
        return nsde.SDEPath(sde, grid, jnp.array(-1.0), scheme=nsde.schemes.LocalLinear())

    y = jnp.array([-1.0, -0.7, 0.9, 1.1, 0.8])
    return path, lambda t, x: dist.Normal(x, 0.3), y, grid.index[1:]


def predation():
    """The prey, ten times, four apart, with noise of 0.1."""
    times = np.arange(11) * 4.0
    grid = nsde.TimeGrid(times, max_step=0.2001)
    sde = nsde.processes.LotkaVolterra(0.5, 0.0025, 0.3, log_coordinates=True)
    start = dist.Normal(jnp.log(jnp.array([71.0, 79.0])), 0.1).to_event(1)

    def path():
        return nsde.SDEPath(sde, grid, start)

    x = path().sample(jax.random.key(3))[grid.index[1:], 0]
    y = x + 0.1 * jax.random.normal(jax.random.key(4), x.shape)
    return path, lambda t, x: dist.Normal(x[0], 0.1), y, grid.index[1:]


def as_model(case):
    path, emission, _, at = case

    def model(y):
        x = numpyro.sample("x", path())
        nsde.observe("y", x, emission, obs=y, at=at)

    return model


def evaluate(model, guide, params, y):
    """Log weights and paths of draws of a guide."""

    def one(key):
        log_q, drawn = log_density(seed(guide, key), (y,), {}, params)
        log_p, sites = log_density(replay(seed(model, 0), drawn), (y,), {}, params)
        return log_p - log_q, sites["x"]["value"]

    keys = jax.random.split(jax.random.key(9), NUM_DRAWS)
    run = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=200))
    return jax.tree.map(np.asarray, run(keys))


def by_bound(model, guide, y, rate, steps, num_particles=8):
    """Train by SVI with a rate that decays by a factor of 50 over the run."""
    schedule = lambda i: rate * jnp.exp(-4.0 * i / steps)  # noqa: E731
    svi = SVI(model, guide, numpyro.optim.Adam(schedule), Trace_ELBO(num_particles=num_particles))
    return fit_svi(
        svi, jax.random.key(1), steps, y, patience=None, window=steps, progress_bar=False
    ).params


def by_equation(model, guide, y):
    svi = SVI(model, guide, numpyro.optim.Adam(2e-3), Trace_ELBO(num_particles=8))
    return fit_score(
        svi, jax.random.key(1), 1, y, score_steps=3000, svi_steps=300, progress_bar=False
    ).params


def laws():
    numpyro.enable_x64()  # the prey say too much of the predators for float32
    for name, make, proposal in (
        ("double well", double_well, "bootstrap"),
        ("Lotka-Volterra", predation, "guided"),
    ):
        case = make()
        path, emission, y, at = case
        method = nsde.filters.Particle(20_000, proposal=proposal, history=True)
        start = time.perf_counter()
        result = nsde.filter_path(path(), emission, y, method=method, at=at)
        exact = np.asarray(result.sample(jax.random.key(8), NUM_DRAWS))
        mean, sd = exact.mean(0), np.maximum(exact.std(0), 1e-9)
        print(
            f"\n{name}: particle filter, log evidence {float(result.log_likelihood):.3f}, "
            f"{time.perf_counter() - start:.0f} s\n"
        )
        print(
            "| guide | ELBO | log evidence, weighted | effective share | k-hat | mean: worst | "
            "sd: ratio | seconds |"
        )
        print("|" + " --- |" * 8)
        model = as_model(case)
        white = reparam(model, config={"x": nsde.reparam.InnovationReparam()})
        ours = (
            ("GaussianMarkovPath", GaussianMarkovPath(), partial(by_bound, rate=5e-3, steps=3000)),
            ("ControlledPath", ControlledPath(), partial(by_bound, rate=5e-3, steps=3000)),
            ("ConditionalScorePath", ConditionalScorePath(), by_equation),
        )
        rows = [(n, model, AutoPathGuide(model, path=law), train) for n, law, train in ours]
        long = partial(by_bound, rate=3e-3, steps=5000)
        rows += [
            (
                f"NumPyro {kind.__name__}, whitened",
                white,
                kind(white, init_loc_fn=init_to_median(num_samples=20)),
                long,
            )
            for kind in (AutoMultivariateNormal, AutoLowRankMultivariateNormal, AutoIAFNormal)
        ]
        for label, target, guide, train in rows:
            start = time.perf_counter()
            params = train(target, guide, y)
            seconds = time.perf_counter() - start
            weights, paths = evaluate(target, guide, params, y)
            fit = fit_weights(weights.astype(np.float64))
            paths = paths.reshape(NUM_DRAWS, *mean.shape)
            off = np.abs(paths.mean(0) - mean) / sd
            seen = exact.std(0) > 1e-6
            ratio = (paths.std(0) / sd)[seen]
            print(
                f"| {label} | {weights.mean():.3f} | {fit.log_evidence:.3f} | "
                f"{fit.efficiency:.2f} | {fit.khat:.2f} | {off[seen].max():.2f} | "
                f"{ratio.min():.2f} to {ratio.max():.2f} | {seconds:.0f} |",
                flush=True,
            )


def bridge():
    """The fractional bridge of Daems et al. (2024): variances against the exact conditional law."""
    reference = json.loads((ROOT / "tests" / "fbm_reference.json").read_text())["bridge"]
    grid = np.linspace(0.0, 2.0, 201)
    at = [25, 50, 100, 150, 200]  # times 0.25, 0.5, 1, 1.5 and 2

    def model(y):
        sde = nsde.SDE(
            lambda t, x, p: -p["rate"] * x,
            lambda t, x, p: 1.0,
            params={"rate": rate},
            noise=nsde.noise.MarkovFBM(hurst),
        )
        path = nsde.SDEPath(sde, grid, jnp.array(0.0), scheme=nsde.schemes.LocalLinear())
        x = numpyro.sample("x", path)
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y, at=[200])

    print("\n| H, rate | law | ELBO | log evidence, exact | variances, worst ratio | seconds |")
    print("|" + " --- |" * 6)
    for hurst, rate in ((0.3, 1.0), (0.7, 1.0)):
        cell = reference[f"H{hurst}_th{rate}"]
        for law in (GaussianMarkovPath(), ControlledPath()):
            guide, y = AutoPathGuide(model, path=law), jnp.zeros(1)
            start = time.perf_counter()
            params = by_bound(model, guide, y, rate=3e-3, steps=300)
            seconds = time.perf_counter() - start
            weights, paths = evaluate(model, guide, params, y)
            ratio = paths[:, at].var(0) / np.array(cell["exact_var"])
            print(
                f"| {hurst}, {rate} | {type(law).__name__} | {weights.mean():.4f} | "
                f"{cell['exact_logev']:.4f} | {ratio[np.argmax(np.abs(ratio - 1))]:.3f} | "
                f"{seconds:.0f} |",
                flush=True,
            )


def panel():
    """Seconds, compilation included, until every parameter is within 0.1 sd of a long run."""
    series, times = 200, np.arange(200) * 0.1

    def model(y=None):
        rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        scale = numpyro.sample("scale", dist.LogNormal(-1.0, 0.5))
        noise = numpyro.sample("noise", dist.LogNormal(-2.0, 0.5))
        sde = nsde.SDE(
            lambda t, x, p: p["rate"] * (p["mean"] - x),
            lambda t, x, p: p["scale"],
            params={"rate": rate, "mean": mean, "scale": scale},
        )
        with numpyro.plate("series", series):
            path = nsde.SDEPath(sde, times, dist.Normal(mean, 0.5), scheme=nsde.schemes.Euler())
            x = numpyro.sample("x", path)
            nsde.observe("y", x, lambda t, x, p: dist.Normal(x, p), params=noise, obs=y)

    truth = {"rate": 1.0, "mean": 0.3, "scale": 0.5, "noise": 0.15}
    y = trace(seed(substitute(model, truth), 0)).get_trace()["y"]["value"]
    names = list(truth)

    def sample(target, warmup, draws):
        kernel = NUTS(target, init_strategy=init_to_median(num_samples=20))
        mcmc = MCMC(kernel, num_warmup=warmup, num_samples=draws, progress_bar=False)
        start = time.perf_counter()
        mcmc.run(jax.random.key(0), y)
        draws = mcmc.get_samples()
        return {name: np.asarray(draws[name]) for name in names}, time.perf_counter() - start

    exact = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())
    long, seconds = sample(exact, 300, 2000)
    print(f"\nreference: NUTS, path integrated out, 2,000 draws, {seconds:.0f} s")

    def distance(draws):
        return max(float(wasserstein(draws[n], long[n])) / long[n].std() for n in names)

    start = time.perf_counter()
    guide = AutoPathGuide(model)
    params = by_bound(model, guide, y, rate=2e-3, steps=500, num_particles=2)
    draws = guide.sample_posterior(jax.random.key(2), params, y, sample_shape=(1000,))
    fast = time.perf_counter() - start
    print(f"SVI, 500 steps: {fast:.0f} s, worst distance {distance(draws):.3f} sd", flush=True)
    guided = reparam(model, config={"x": nsde.reparam.GuidedReparam()})
    for warmup, count in ((200, 200), (300, 400), (500, 1000)):
        draws, seconds = sample(guided, warmup, count)
        off = distance(draws)
        print(
            f"guided NUTS, {warmup} + {count}: {seconds:.0f} s ({seconds / fast:.1f} times SVI's), "
            f"worst distance {off:.3f} sd",
            flush=True,
        )
        if off < 0.1:
            break


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=["laws", "bridge", "panel"])
    {"laws": laws, "bridge": bridge, "panel": panel}[parser.parse_args().study]()
