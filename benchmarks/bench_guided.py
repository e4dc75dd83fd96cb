"""Latent paths four ways: centred, whitened, guided (by NUTS and SplitNUTS), integrated out.

As a test (`make bench`) it compares the cost of one gradient on a stochastic Lotka-Volterra model:
at most 4 times the whitened one's for the guide that follows the parameters, 2 times for the
frozen one. As a program it fits the models of docs/treatments.md by NUTS each way and prints
effective sizes by gradient and by second:

    python benchmarks/bench_guided.py [--cases NAME ...] [--treatments NAME ...] [--draws 300]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from measure import compiled, cpu_ms, report
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS, init_to_median
from numpyro.infer.util import initialize_model

import numpyro_sde as nsde
from numpyro_sde.reparam import GuidedReparam, InnovationReparam


class Case(NamedTuple):
    """A model of one argument, its data, and the filter that integrates it out, if any."""

    model: Callable[..., Any]
    data: np.ndarray
    method: Any = None


def ou(noise: float) -> Case:
    """1,000 irregular observations of an Ornstein-Uhlenbeck process."""
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.uniform(0.05, 0.15, 1000))
    truth = nsde.processes.OrnsteinUhlenbeck(1.0, 0.3, 0.7)
    path = nsde.SDEPath(truth, times, dist.Normal(0.3, 0.5)).sample(jax.random.key(1))
    y = np.asarray(path) + noise * rng.normal(size=1000)

    def model(y: Any) -> None:
        rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.7))
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        scale = numpyro.sample("scale", dist.LogNormal(-0.5, 0.7))
        sde = nsde.processes.OrnsteinUhlenbeck(rate, mean, scale)
        x = numpyro.sample("x", nsde.SDEPath(sde, times, dist.Normal(mean, 1.0)))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, noise), obs=y)

    return Case(model, y, nsde.filters.Kalman())


def lotka_volterra(substeps: int, prey_only: bool = False) -> Case:
    """Log populations, 40 observations with noise of 0.1."""
    times = np.arange(41.0)
    grid = nsde.TimeGrid(times, max_step=1.0001 / substeps)
    truth = {"birth": 0.5, "predation": 0.0025, "death": 0.3}
    start = jnp.log(jnp.array([71.0, 79.0]))
    fine = nsde.TimeGrid(times, max_step=0.01)
    process = nsde.processes.LotkaVolterra(**truth, log_coordinates=True)
    exact = nsde.SDEPath(process, fine, dist.Normal(start, 0.1).to_event(1))
    states = np.asarray(exact.sample(jax.random.key(3)))[fine.index][1:]
    y = states + 0.1 * np.random.default_rng(0).normal(size=states.shape)
    if prey_only:
        y[:, 1] = np.nan

    def model(y: Any) -> None:
        rates = {
            name: jnp.exp(numpyro.sample(f"log_{name}", dist.Normal(np.log(value), 0.5)))
            for name, value in truth.items()
        }
        sde = nsde.processes.LotkaVolterra(**rates, log_coordinates=True)
        x = numpyro.sample("x", nsde.SDEPath(sde, grid, dist.Normal(start, 0.3).to_event(1)))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y, at=grid.index[1:])

    return Case(model, y, nsde.filters.ExtendedKalman())


def fitzhugh_nagumo() -> Case:
    """The voltage alone is seen, the other coordinate alone is noisy (hypoelliptic)."""
    grid = nsde.TimeGrid(np.arange(0.0, 20.01, 0.5), max_step=0.05)

    def path(epsilon: Any, scale: Any) -> nsde.SDEPath:
        sde = nsde.processes.FitzHughNagumo(epsilon=epsilon, gamma=1.5, beta=0.8, scale=scale)
        init = dist.Normal(jnp.array([-0.8, -0.5]), 0.2).to_event(1)
        return nsde.SDEPath(sde, grid, init, scheme=nsde.schemes.Euler())

    states = np.asarray(path(0.1, 0.3).sample(jax.random.key(1)))[grid.index]
    y = states[:, 0] + 0.05 * np.random.default_rng(0).normal(size=len(states))

    def model(y: Any) -> None:
        epsilon = numpyro.sample("epsilon", dist.LogNormal(-2.3, 0.5))
        scale = numpyro.sample("scale", dist.LogNormal(-1.2, 0.5))
        x = numpyro.sample("x", path(epsilon, scale))
        nsde.observe("y", x, lambda t, x: dist.Normal(x[0], 0.05), obs=y, at=grid.index)

    return Case(model, y, nsde.filters.ExtendedKalman())


def double_well() -> Case:
    """Observations so rare that the path between two of them may cross or stay."""
    grid = nsde.TimeGrid(np.arange(0.0, 41.0, 4.0), max_step=0.05)

    def path(scale: Any) -> nsde.SDEPath:
        sde = nsde.processes.DoubleWell(linear=2.0, cubic=2.0, scale=scale)
        return nsde.SDEPath(sde, grid, dist.Normal(-1.0, 0.3))

    states = np.asarray(path(0.8).sample(jax.random.key(5)))[grid.index]
    y = states + 0.1 * np.random.default_rng(0).normal(size=len(states))

    def model(y: Any) -> None:
        scale = numpyro.sample("scale", dist.LogNormal(-0.2, 0.5))
        x = numpyro.sample("x", path(scale))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y, at=grid.index)

    return Case(model, y, nsde.filters.ExtendedKalman())


def counts() -> Case:
    """A square-root process seen through Poisson counts."""
    grid = nsde.TimeGrid(np.arange(41) * 0.5, max_step=0.1)

    def path(rate: Any, mean: Any, scale: Any) -> nsde.SDEPath:
        sde = nsde.processes.CoxIngersollRoss(rate, mean, scale)
        scheme = nsde.schemes.DriftImplicitSquareRoot()
        return nsde.SDEPath(sde, grid, dist.LogNormal(1.4, 0.5), scheme=scheme)

    states = np.asarray(path(0.5, 4.0, 0.8).sample(jax.random.key(1)))[grid.index]
    y = np.random.default_rng(0).poisson(3.0 * states)

    def model(y: Any) -> None:
        rate = numpyro.sample("rate", dist.LogNormal(-0.7, 0.5))
        mean = numpyro.sample("mean", dist.LogNormal(1.4, 0.5))
        scale = numpyro.sample("scale", dist.LogNormal(-0.2, 0.5))
        x = numpyro.sample("x", path(rate, mean, scale))
        nsde.observe("y", x, lambda t, x: dist.Poisson(3.0 * x), obs=y, at=grid.index)

    return Case(model, y, nsde.filters.MomentMatching())


CASES = {
    "ou 0.01": lambda: ou(0.01),
    "ou 0.1": lambda: ou(0.1),
    "ou 1": lambda: ou(1.0),
    "lv 10": lambda: lotka_volterra(10),
    "lv 50": lambda: lotka_volterra(50),
    "prey 10": lambda: lotka_volterra(10, prey_only=True),
    "prey 50": lambda: lotka_volterra(50, prey_only=True),
    "fhn": fitzhugh_nagumo,
    "well": double_well,
    "counts": counts,
}
TREATMENTS = ("centred", "whitened", "guided", "split", "frozen", "integrated out")


def treat(case: Case, treatment: str) -> Callable[..., Any] | None:
    if treatment == "centred":
        return case.model
    if treatment == "integrated out":
        if case.method is None:
            return None
        return nsde.handlers.marginalize(case.model, method=case.method)
    how = {
        "whitened": InnovationReparam(),
        "guided": GuidedReparam(),
        "split": GuidedReparam(),
        "frozen": GuidedReparam(frozen=True),
    }[treatment]
    return numpyro.handlers.reparam(case.model, config={"x": how})


def smallest_ess(values: np.ndarray) -> float:
    """Smallest effective size over the coordinates that move."""
    flat = values.reshape(len(values), -1)
    moving = flat[:, flat.std(axis=0) > 0]
    return min(float(effective_sample_size(moving[None, :, i])) for i in range(moving.shape[1]))


def fit(case: Case, treatment: str, draws: int, acceptance: float, seed: int) -> None:
    """Fit once and print one row of the table."""
    target = treat(case, treatment)
    if target is None:
        return
    start = time.perf_counter()
    if treatment == "split":
        kernel = nsde.infer.SplitNUTS(target)
    else:
        kernel = NUTS(
            target, init_strategy=init_to_median(num_samples=20), target_accept_prob=acceptance
        )
    mcmc = MCMC(kernel, num_warmup=draws, num_samples=draws, progress_bar=False)
    try:
        mcmc.warmup(jax.random.key(seed), case.data, extra_fields=("num_steps",))
    except (RuntimeError, ValueError) as error:
        print(f"| {treatment} | fails: {str(error)[:60]} |", flush=True)
        return
    jax.block_until_ready(mcmc.last_state.z)
    mcmc.run(mcmc.last_state.rng_key, case.data, extra_fields=("num_steps", "diverging"))
    samples = jax.block_until_ready(mcmc.get_samples())
    wall = time.perf_counter() - start
    fields = mcmc.get_extra_fields()
    gradients = float(np.sum(fields["num_steps"]))
    parameters = {
        name: np.asarray(value)
        for name, value in samples.items()
        if np.ndim(value) == 1 and not name.startswith("x")
    }
    least = min(smallest_ess(v) for v in parameters.values())
    if "x" in samples:
        x = np.asarray(samples["x"])
        least = min(least, smallest_ess(x[:, :: max(1, x.shape[1] // 80)]))
    # Per second of sampling: compiling is paid once and is in the last column but one.
    cost, _ = gradient(case, treatment)
    values = ", ".join(f"{n} {v.mean():.3f} ({v.std():.3f})" for n, v in parameters.items())
    print(
        f"| {treatment} | {gradients / draws:.0f} | {int(np.sum(fields['diverging']))} | "
        f"{least:.0f} | {1e3 * least / gradients:.2f} | {cost:.2f} | "
        f"{1e3 * least / (gradients * cost):.2f} | {wall:.0f} | {values} |",
        flush=True,
    )


def gradient(case: Case, treatment: str) -> tuple[float, float]:
    """CPU milliseconds of one gradient of the potential, and seconds of compiling it."""
    ready = initialize_model(
        jax.random.key(0),
        treat(case, treatment),
        model_args=(case.data,),
        init_strategy=init_to_median(num_samples=20),
    )
    executable, seconds = compiled(jax.value_and_grad(ready.potential_fn), ready.param_info.z)
    return cpu_ms(executable, ready.param_info.z, repeats=100), seconds


def test_gradient_cost_of_a_guide() -> None:
    case = lotka_volterra(10)
    rows = [(name, *gradient(case, name)) for name in ("whitened", "guided", "frozen")]
    report("gradient, stochastic Lotka-Volterra, 400 Euler steps", rows)
    whitened, guided, frozen = (row[1] for row in rows)
    assert guided <= 4.0 * whitened
    assert frozen <= 2.0 * whitened


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--treatments", nargs="*", choices=TREATMENTS, default=list(TREATMENTS))
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--acceptance", type=float, default=0.8)
    parser.add_argument("--seeds", type=int, default=1)
    chosen = parser.parse_args()
    for name in chosen.cases:
        print(f"\n{name}, {chosen.draws} + {chosen.draws} iterations\n")
        print(
            "| treatment | leapfrog steps | divergences | min ESS | min ESS / 1000 gradients | "
            "gradient, ms | min ESS / s | seconds, all | parameters: mean (sd) |"
        )
        print("|" + " --- |" * 9)
        case = CASES[name]()
        for treatment in chosen.treatments:
            for seed in range(chosen.seeds):
                fit(case, treatment, chosen.draws, chosen.acceptance, seed)
