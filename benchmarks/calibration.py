"""Simulation-based calibration of three engines on one nonlinear model.

    python benchmarks/calibration.py [--engines NUTS SVI "particle Gibbs"] [--replicates 200]
        [--output folder]

A process with two wells, dX = pull (X - X^3) dt + scale dW, seen ten times with noise of 0.2 (one
value missing) on a grid of four Euler steps between observations; pull and scale are unknown.
Fitted by NUTS on the guided path, by a normalizing flow over the parameters with a
controlled path (SVI), and
by particle Gibbs. Each engine is one compiled function of key and data. The log joint density of
parameters, path and data is ranked beside the parameters and the path at three times.

Prints one table for each engine; with `--output` also pictures, and files to resume from.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.infer import NUTS, SVI, Trace_ELBO, init_to_median

import numpyro_sde as nsde
from numpyro_sde.diagnostics import compiled_chain, sbc

mpl.use("Agg")

TIMES = np.arange(0.0, 5.0, 0.5)
GRID = nsde.TimeGrid(TIMES, 0.126)
PATTERN = np.where(np.arange(TIMES.size) == 4, np.nan, 0.0)


def model(y=None):
    """Two wells, noisy observations."""
    scale = numpyro.sample("scale", dist.LogNormal(-0.5, 0.4))
    pull = numpyro.sample("pull", dist.LogNormal(0.0, 0.4))
    sde = nsde.SDE(
        lambda t, x, p: p["pull"] * (x - x**3),
        lambda t, x, p: p["scale"],
        params={"pull": pull, "scale": scale},
    )
    x = numpyro.sample("x", nsde.SDEPath(sde, GRID, init=dist.Normal(0.0, 1.0)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.2), obs=y, at=GRID.index)


GUIDED = handlers.reparam(model, config={"x": nsde.reparam.GuidedReparam()})


def nuts():
    """200 + 300 iterations on the guided path."""
    run = compiled_chain(NUTS(GUIDED, init_strategy=init_to_median), 200, 300)
    return lambda key, data: run(key, data["y"])


def particle_gibbs():
    """300 + 2,000 sweeps of 16 particles, every fourth kept."""
    run = compiled_chain(nsde.infer.ParticleGibbs(model, num_particles=16), 300, 2000, thinning=4)
    return lambda key, data: run(key, data["y"])


def svi(steps=2000, draws=500):
    """A flow over the parameters and a controlled path, trained with falling step sizes."""

    def step_size(step):
        done = step / steps
        return 1e-2 * jnp.minimum(10.0 * done, 0.5 + 0.5 * jnp.cos(jnp.pi * done))

    adam = numpyro.optim.ClippedAdam(step_size, clip_norm=10.0)

    @jax.jit
    def run(key, y):
        # A guide of its own for each data set: it is set up along them.
        guide = nsde.guides.AutoPathGuide(
            model,
            parameters=partial(nsde.guides.AutoFlow, num_flows=4),
            path=nsde.guides.ControlledPath((16, 16)),
        )
        engine = SVI(model, guide, adam, Trace_ELBO(num_particles=8))
        key_init, key_draws = jax.random.split(key)
        state = engine.init(key_init, y)
        state, _ = jax.lax.scan(lambda s, _: engine.stable_update(s, y), state, None, length=steps)
        params = engine.get_params(state)
        return guide.sample_posterior(key_draws, params, y, sample_shape=(draws,))

    return lambda key, data: run(key, data["y"])


ENGINES = {"NUTS": nuts, "SVI": svi, "particle Gibbs": particle_gibbs}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--replicates", type=int, default=200)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.engines:
        stem = None if arguments.output is None else arguments.output / name.replace(" ", "_")
        start = time.perf_counter()
        result = sbc(
            model,
            ENGINES[name](),
            arguments.replicates,
            model_kwargs={"y": PATTERN},
            log_joint=True,
            independent=name == "SVI",
            path=None if stem is None else stem.with_suffix(".npz"),
        )
        print(f"\n{name}, {time.perf_counter() - start:.0f} s\n{result}", flush=True)
        if stem is not None:
            result.plot()[0].figure.savefig(stem.with_suffix(".png"), dpi=100)


if __name__ == "__main__":
    main()
