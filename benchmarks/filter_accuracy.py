"""Log-likelihood error of the approximate filters against a long bootstrap particle filter.

Each model is simulated and filtered on the same fine Euler grid, so that what is left is the
error of the Gaussian approximation (and, for moment matching, the difference between the Euler
grid and continuous time, which is small beside it). Prints the two markdown tables of
docs/filters_accuracy.md, in about a quarter of an hour on one core:

    python benchmarks/filter_accuracy.py [--particles 20000] [--repeats 25] [--only NAME]

Repeats are averaged as likelihoods, of which each is an unbiased estimate; their spread gives the
standard error. Many runs of few particles know it better than few runs of many.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax

from numpyro_sde import processes
from numpyro_sde.filters import (
    EnsembleKalman,
    ExtendedKalman,
    Instrument,
    MomentMatching,
    StateSpaceModel,
    UnscentedKalman,
    closure_check,
)
from numpyro_sde.schemes import Euler

SEEDS = 20


class Case(NamedTuple):
    """A model, its observations, and a second parameter value to tell from the first."""

    name: str
    sde: Callable[[float], Any]  # of the parameter below
    parameter: tuple[float, float]  # the true value and another
    start: tuple[float, ...]
    spread: float  # standard deviation of the start
    emission: Callable[[Any], Any]  # law of the observation of one state, independent components
    gaussian: bool
    step: float
    every: int  # grid steps between observations
    count: int  # observations


def first(scale: float) -> Callable[[Any], Any]:
    return lambda x: dist.Normal(x[:1], scale)


def noisy(scale: float) -> Callable[[Any], Any]:
    return lambda x: dist.Normal(x, scale)


def well(scale: float) -> Any:
    return processes.DoubleWell(linear=2.0, cubic=2.0, scale=scale)


def neuron(scale: float) -> Any:
    return processes.FitzHughNagumo(epsilon=0.1, gamma=1.5, beta=0.8, scale=scale)


def populations(predation: float) -> Any:
    return processes.LotkaVolterra(birth=1.0, predation=predation, death=0.6)


def log_populations(predation: float) -> Any:
    return processes.LotkaVolterra(1.0, predation, 0.6, log_coordinates=True)


CASES = [
    Case("double well, every 0.1", well, (0.7, 0.9), (-1.0,), 0.3, first(0.2), True, 0.01, 10, 100),
    Case("double well, every 0.5", well, (0.7, 0.9), (-1.0,), 0.3, first(0.2), True, 0.01, 50, 100),
    Case("double well, every 2", well, (0.7, 0.9), (-1.0,), 0.3, first(0.2), True, 0.01, 200, 50),
    Case(
        "Lotka-Volterra, 100s, noise of 10 every 1",
        populations, (0.005, 0.0055), (120.0, 200.0), 10.0, noisy(10.0), True, 0.02, 50, 30,
    ),
    Case(
        "Lotka-Volterra, 10s, noise of 2 every 1",
        populations, (0.05, 0.055), (12.0, 20.0), 3.0, noisy(2.0), True, 0.02, 50, 30,
    ),
    Case(
        "Lotka-Volterra, logs, Poisson counts every 1",
        log_populations, (0.005, 0.0055), (math.log(120.0), math.log(200.0)), 0.1,
        lambda x: dist.Poisson(jnp.exp(x)), False, 0.02, 50, 30,
    ),
    Case(
        "FitzHugh-Nagumo, voltage every 0.1",
        neuron, (0.3, 0.4), (-0.8, -0.5), 0.1, first(0.1), True, 0.01, 10, 100,
    ),
    Case(
        "FitzHugh-Nagumo, voltage every 0.2",
        neuron, (0.3, 0.4), (-0.8, -0.5), 0.1, first(0.1), True, 0.01, 20, 100,
    ),
    Case(
        "FitzHugh-Nagumo, voltage every 0.5",
        neuron, (0.3, 0.4), (-0.8, -0.5), 0.1, first(0.1), True, 0.01, 50, 100,
    ),
]  # fmt: skip

FILTERS = {
    "Extended": ExtendedKalman(),
    "Unscented": UnscentedKalman(),
    "MomentMatching": MomentMatching(substeps=1),
    "EnsembleKalman(500)": EnsembleKalman(500),
}


def euler_step(sde: Any, x: Any, h: float, z: Any) -> Any:
    """One step for all particles; `z` has one column for each Brownian motion."""
    scalar = x.shape[1] == 1

    def one(x: Any, z: Any) -> Any:
        state = x[0] if scalar else x
        drift = jnp.reshape(sde.ito_drift_at(0.0, state), x.shape)
        columns = jnp.reshape(sde.diffusion_columns_at(0.0, state), (x.shape[0], -1))
        return x + h * drift + math.sqrt(h) * jnp.sum(columns * z, axis=1)

    return jax.vmap(one)(x, z)


def num_noises(case: Case) -> int:
    state = jnp.zeros(()) if len(case.start) == 1 else jnp.ones(len(case.start))
    return case.sde(case.parameter[0]).diffusion_columns_at(0.0, state).shape[-1]


def simulate(case: Case, key: Any) -> Any:
    """Observations at the multiples of `every` steps, from the second on."""
    sde, m = case.sde(case.parameter[0]), num_noises(case)

    def interval(x: Any, key: Any) -> tuple[Any, Any]:
        keys = jax.random.split(key, case.every + 1)
        z = jax.vmap(lambda k: jax.random.normal(k, (1, m)))(keys[1:])
        x, _ = lax.scan(lambda x, z: (euler_step(sde, x, case.step, z), None), x, z)
        return x, case.emission(x[0]).sample(keys[0])

    start = jnp.asarray(case.start)[None]
    return lax.scan(interval, start, jax.random.split(key, case.count))[1].astype(float)


def particle_filter(case: Case, parameter: Any, y: Any, key: Any, num_particles: int) -> Any:
    """Log likelihood by the bootstrap filter of Gordon, Salmond and Smith (1993).

    Systematic resampling at every observation.
    """
    sde, m, d = case.sde(parameter), num_noises(case), len(case.start)

    def interval(carry: Any, inputs: Any) -> tuple[Any, Any]:
        x, total = carry
        y, key = inputs
        keys = jax.random.split(key, case.every + 1)

        def move(x: Any, key: Any) -> tuple[Any, None]:
            # In float32, which halves the time: the noise needs no more digits.
            z = jax.random.normal(key, (num_particles, m), jnp.float32)
            return euler_step(sde, x, case.step, z), None

        x, _ = lax.scan(move, x, keys[1:])
        log_w = jax.vmap(lambda x: jnp.sum(case.emission(x).log_prob(y)))(x)
        log_mean = jax.nn.logsumexp(log_w) - math.log(num_particles)
        cumulative = jnp.cumsum(jnp.exp(log_w - log_mean)) / num_particles
        points = (jnp.arange(num_particles) + jax.random.uniform(keys[0])) / num_particles
        ancestors = jnp.clip(jnp.searchsorted(cumulative, points), 0, num_particles - 1)
        return (x[ancestors], total + log_mean), None

    key, start_key = jax.random.split(key)
    start = jnp.asarray(case.start) + case.spread * jax.random.normal(start_key, (num_particles, d))
    keys = jax.random.split(key, case.count)
    return lax.scan(interval, (start, jnp.zeros(())), (y, keys))[0][1]


def state_space(case: Case, parameter: Any, y: Any) -> StateSpaceModel:
    """The same model as the filters take it."""
    n, d, p = case.every * case.count + 1, len(case.start), y.shape[1]
    times = case.step * np.arange(n)
    rows = case.every * np.arange(1, case.count + 1)
    values = jnp.zeros((n, p)).at[rows].set(y)
    present = jnp.zeros((n, p), bool).at[rows].set(True)

    def moments(_: Any, x: Any) -> tuple[Any, Any]:
        law = case.emission(x)
        return law.mean, jnp.diag(law.variance)

    def log_prob(_: Any, x: Any, y: Any, present: Any) -> Any:
        return jnp.sum(jnp.where(present, case.emission(x).log_prob(y), 0.0))

    sde, scheme, dt = case.sde(parameter), Euler(), np.diff(times)
    return StateSpaceModel(
        sde=sde,
        scheme=scheme,
        scheme_chosen=True,
        times=times,
        dt=dt,
        cache=scheme.prepare(sde, times, dt),
        init_mean=jnp.asarray(case.start),
        init_cov=case.spread**2 * jnp.eye(d),
        init_gaussian=True,
        scalar=d == 1,
        instruments=(Instrument(None, values, present, moments, log_prob, case.gaussian, rows),),
    )


def truth(case: Case, y: Any, key: Any, particles: int, repeats: int) -> np.ndarray:
    """Estimates, one row for each parameter value."""
    run = jax.jit(lambda theta, key: particle_filter(case, theta, y, key, particles))
    # The same keys for both values: their difference is known better than either.
    keys = jax.random.split(key, repeats)
    return np.array([[float(run(theta, k)) for k in keys] for theta in case.parameter])


def pooled(estimates: np.ndarray) -> tuple[float, float]:
    """Log of the mean likelihood, and its standard error by the delta method."""
    top = estimates.max()
    w = np.exp(estimates - top)
    error = w.std(ddof=1) / w.mean() / math.sqrt(len(w))
    return top + math.log(w.mean()), error


def filtered(case: Case, y: Any, method: Any) -> np.ndarray:
    """Log likelihood for each parameter value: one column, or one for each seed."""
    if isinstance(method, EnsembleKalman):
        keys = jax.random.split(jax.random.key(0), SEEDS)
        run = jax.jit(
            jax.vmap(
                lambda theta, key: (
                    method.filter_with_key(state_space(case, theta, y), key).log_likelihood
                ),
                (None, 0),
            )
        )
        return np.array([run(theta, keys) for theta in case.parameter])
    run = jax.jit(lambda theta: method.log_likelihood(state_space(case, theta, y)))
    return np.array([[run(theta)] for theta in case.parameter])


def cell(errors: np.ndarray) -> str:
    """An error, with its spread over the seeds of an ensemble."""
    if not np.all(np.isfinite(errors)):
        return f"fails ({np.mean(~np.isfinite(errors)):.0%})"
    if len(errors) == 1:
        return f"{errors[0]:+.2f}"
    return f"{errors.mean():+.2f} (sd {errors.std(ddof=1):.2f})"


def skewness(case: Case, y: Any) -> float:
    """Largest skewness of the state between the observations, by simulation."""
    model = state_space(case, case.parameter[0], y)
    report = closure_check(model, FILTERS["MomentMatching"], num_paths=1000, substeps=2)
    return float(report.skewness[0])


def study(case: Case, particles: int, repeats: int) -> tuple[list[str], list[str]]:
    """One row of each table."""
    began = time.perf_counter()
    data_key, key = jax.random.split(jax.random.key(20))
    y = jax.jit(lambda key: simulate(case, key))(data_key)
    estimates = truth(case, y, key, particles, repeats)
    (here, error), (there, _) = pooled(estimates[0]), pooled(estimates[1])
    contrast = estimates[1] - estimates[0]
    contrast_error = contrast.std(ddof=1) / math.sqrt(repeats)
    level, slope = [], []
    for method in FILTERS.values():
        values = filtered(case, y, method)
        level.append(cell(values[0] - here))
        slope.append(cell(values[1] - values[0] - (there - here)))
    shape = skewness(case, y)
    print(f"<!-- {case.name}: {time.perf_counter() - began:.0f} s -->", flush=True)
    of_level, of_slope = f"{here:.2f} ± {error:.2f}", f"{there - here:.2f} ± {contrast_error:.2f}"
    return (
        [case.name, str(case.count), of_level, *level, f"{shape:.1f}"],
        [case.name, of_slope, *slope],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--particles", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    chosen = [case for case in CASES if options.only in case.name]
    rows = [study(case, options.particles, options.repeats) for case in chosen]
    heads = (
        ["model", "observations", "particle filter", *FILTERS, "skewness"],
        ["model", "particle filter", *FILTERS],
    )
    for head, table in zip(heads, zip(*rows, strict=True), strict=True):
        print()
        for row in (head, ["---"] * len(head), *table):
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
