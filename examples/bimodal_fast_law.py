"""A slow variable driven by a fast one with two wells, learned from the slow path alone.

`dX = (-X + Y) dt + s dW`, `dY = -(Y^3 - Y - X) dt/eps + sqrt(2 T/eps) dV`. Frozen at a slow state,
Y has a bimodal law, and averaging over it gives X two wells of its own. A Gaussian law whose mean
is linear in X has a linear averaged drift, whatever its parameters: one well, or none. A
conditional flow has no such limit. Where the potential of Y is known but for its parameters, those
are sampled with a flow over them (`AutoFlow`), and the drift is known better than they are.

    python examples/bimodal_fast_law.py --output multiscale_output

:title: A fast variable with two wells
:problem: a fast variable that no one sees drives a slow one
:field: climate
:engine: SVI with flows, averaged equation
:data: simulated
:tags: multiscale, averaging, flows
:run time: 72 s of processor time
:page: multiscale.md
:picture: bimodal_fast_law.png
"""

# ruff: noqa: ARG005
# Functions of one protocol share its arguments, used or not.

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, Trace_ELBO

import numpyro_sde as nsde
from numpyro_sde.multiscale import MonteCarlo, ScalarFast

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NOISE, STEP = 0.3, 0.05
TABLE = (-3.0, 3.0, 64)


def system(k=1.0, temperature=0.5, scale=NOISE, epsilon=0.01):
    """The full system."""
    return nsde.SlowFastSDE(
        slow_drift=lambda t, x, y, p: -x + y,
        slow_diffusion=lambda t, x, y, p: p["scale"],
        fast_drift=lambda t, x, y, p: y - y**3 + p["k"] * x,
        fast_diffusion=lambda t, x, y, p: jnp.sqrt(2.0 * p["T"]),
        epsilon=epsilon,
        params={"k": k, "T": temperature, "scale": scale},
    )


def simulate(num_times: int):
    """The slow path of the full system, and its times."""
    full = system()
    times = STEP * np.arange(num_times + 1)
    grid = full.grid(times, steps_per_scale=20)
    law = nsde.SDEPath(full, grid, init=jnp.array([1.0, 1.0]), scheme=nsde.schemes.Euler())
    return times, full.slow(law.sample(jax.random.key(1)))[grid.index]


def learned_law(law, times, path):
    """Any law of the fast variable: its weights are `param` sites, penalised."""
    pi = law()
    limit = nsde.average(system(), pi, MonteCarlo(32, numpyro.prng_key()), TABLE)
    numpyro.sample("x", nsde.SDEPath(limit, times, init=path[0]), obs=path)
    numpyro.factor("moment", -1e-3 * jnp.mean(jax.vmap(lambda x: second_moment(pi, x))(path[::50])))


def second_moment(pi, x):
    """`E Y^2` at one slow state, by the nodes of a draw-free rule."""
    if isinstance(pi, nsde.ConditionalFlow):
        return pi.moment(x)
    return pi(x, None).mean ** 2 + pi(x, None).variance


def linear_gaussian():
    """A Gaussian law whose mean is linear in the slow state."""
    start = numpyro.param("start", 0.0)
    slope = numpyro.param("slope", 0.5)
    sd = numpyro.param("sd", 1.0, constraint=dist.constraints.positive)
    return lambda x, p: dist.Normal(start + slope * x, sd)


def conditional_flow():
    """A flow whose law may take any shape, and change with the slow state."""
    flow = nsde.ConditionalFlow(fast_dim=1, slow_dim=1, num_layers=2, hidden_dims=(16,))
    return flow.register("pi")


def physics(times, path):
    """The potential of the fast variable up to its parameters; all of them are unknown."""
    k = numpyro.sample("k", dist.LogNormal(0.0, 0.5))
    temperature = numpyro.sample("T", dist.LogNormal(-0.7, 0.5))
    scale = numpyro.sample("scale", dist.LogNormal(-1.0, 0.5))
    limit = nsde.average(system(k, temperature, scale), ScalarFast(-5.0, 5.0), table=TABLE)
    numpyro.sample("x", nsde.SDEPath(limit, times, init=path[0]), obs=path)


def train(model, guide, data, steps: int, rate: float):
    """Stochastic optimisation with a rate that falls to zero."""
    falling = numpyro.optim.Adam(lambda i: rate * jnp.maximum(1.0 - i / steps, 1e-3))
    svi = SVI(model, guide, falling, Trace_ELBO())
    return svi.run(jax.random.key(0), steps, *data, progress_bar=False).params


def drift_of(invariant, states):
    """Averaged drift at every state, with fixed nodes."""
    limit = nsde.average(system(), invariant)
    return np.asarray(jax.vmap(lambda x: limit.drift_at(0.0, x))(jnp.asarray(states)))


def main() -> None:
    """Simulate, learn three ways, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("multiscale_output"), help="a folder")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the script")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    num_times, steps = (200, 20) if arguments.quick else (4_000, 1_500)

    times, path = simulate(num_times)
    data = (times, path)
    states = np.linspace(-1.6, 1.6, 65)
    truth = drift_of(ScalarFast(-5.0, 5.0), states)
    weight = np.histogram(path, np.append(states - 0.025, states[-1] + 0.025))[0] / len(path)
    print(f"path of {num_times} steps of {STEP}; it visits {path.min():.2f} to {path.max():.2f}")
    drifts = {}
    for name, law in (("linear Gaussian law", linear_gaussian), ("flow", conditional_flow)):
        params = train(partial(learned_law, law), lambda *_: None, data, steps, 5e-3)
        trained = numpyro.handlers.substitute(law, params)()
        drifts[name] = drift_of(trained, states)

    guide = nsde.guides.AutoFlow(physics)
    params = train(physics, guide, data, steps, 5e-3)
    draws = guide.sample_posterior(jax.random.key(2), params, *data, sample_shape=(500,))
    bands = nsde.diagnostics.averaged_drift(
        draws,
        lambda s: nsde.average(system(s["k"], s["T"], s["scale"]), ScalarFast(-5.0, 5.0)),
        states,
        path=path,
    )
    for name in ("k", "T", "scale"):
        print(f"{name:6} {np.mean(draws[name]):.3f} +- {np.std(draws[name]):.3f}")
    drifts["physics (median)"] = bands.median
    for name, drift in drifts.items():
        error = np.sqrt(np.sum(weight * (drift - truth) ** 2) / np.sum(weight))
        print(f"{name:22} root mean square error of the drift, where the path was: {error:.4f}")
    print(bands.note)

    figure, axes = plt.subplots(1, 2, figsize=(10.0, 4.0), layout="constrained")
    axes[0].plot(times, path, linewidth=0.5)
    axes[0].set(xlabel="time", ylabel="slow variable")
    bands.plot(axes[1], truth)
    for name, style in (("linear Gaussian law", "C3:"), ("flow", "C1-.")):
        axes[1].plot(states, drifts[name], style, label=name)
    axes[1].set_ylim(-1.2, 1.2)
    axes[1].legend(frameon=False, fontsize="small")
    figure.savefig(arguments.output / "bimodal_fast_law.png", dpi=120)
    print(f"wrote {arguments.output / 'bimodal_fast_law.png'}")


if __name__ == "__main__":
    main()
