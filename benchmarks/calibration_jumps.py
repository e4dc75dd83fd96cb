"""Simulation-based calibration of discrete states and hidden regimes: 200 replicates of each case.

    python benchmarks/calibration_jumps.py [--cases "3 states, NUTS" ...] [--replicates 200]

- A Markov jump process of three states in a ring, seen 25 times with normal noise that hides which
  state it is; two rates and the noise unknown; NUTS on `filters.Forward()`.
- An Ornstein-Uhlenbeck process that is calm or wild by a hidden regime, seen 20 times with noise;
  both scales, the rate of return and the rate of switching unknown; PMMH on sequences of regimes
  (`filters.RaoBlackwell`), and particle Gibbs.

Each engine is one program of key and data, compiled once. Beside the parameters a quantity is
ranked that involves the data, the log joint density (of the switching process, as `filters.IMM`
has it: any function will do), without which a posterior that ignores the data would pass.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import NUTS
from numpyro.infer.util import log_density

import numpyro_sde as nsde
from numpyro_sde.diagnostics import compiled_chain, sbc

RING = [(0, 1), (1, 2), (2, 0), (1, 0), (2, 1), (0, 2)]
CHAIN_TIMES = np.cumsum(np.r_[0.0, np.tile([0.3, 0.5, 0.8], 8)])
SWITCHING_TIMES = 0.4 * np.arange(20)


def ring(y=None):
    """Three states, forward and backward rates, noise of half the distance between states."""
    forward = numpyro.sample("forward", dist.LogNormal(0.0, 0.5))
    backward = numpyro.sample("backward", dist.LogNormal(-1.0, 0.5))
    noise = numpyro.sample("noise", dist.LogNormal(-0.7, 0.3))
    chain = nsde.MarkovJumpProcess(
        lambda p: jnp.concatenate([jnp.full(3, p["forward"]), jnp.full(3, p["backward"])]),
        3,
        edges=RING,
        params={"forward": forward, "backward": backward},
    )
    s = numpyro.sample("s", nsde.JumpPath(chain, CHAIN_TIMES))
    nsde.observe("y", s, lambda t, s, p: dist.Normal(s, p), params=noise, obs=y)


def calm_or_wild(y=None):
    """An Ornstein-Uhlenbeck process whose scale follows a hidden regime."""
    pull = numpyro.sample("pull", dist.LogNormal(0.0, 0.4))
    calm = numpyro.sample("calm", dist.LogNormal(-1.5, 0.4))
    wild = numpyro.sample("wild", dist.LogNormal(0.0, 0.4))
    switch = numpyro.sample("switch", dist.LogNormal(-0.7, 0.4))
    sde = nsde.SwitchingSDE(
        lambda t, x, r, p: -p["pull"] * x,
        lambda t, x, r, p: jnp.where(r == 0, p["calm"], p["wild"]),
        nsde.MarkovJumpProcess(
            lambda p: jnp.stack([p, 1.5 * p]), 2, edges=[(0, 1), (1, 0)], params=switch
        ),
        params={"pull": pull, "calm": calm, "wild": wild},
    )
    x = numpyro.sample("x", nsde.SDEPath(sde, SWITCHING_TIMES, dist.Normal(0.0, 0.5)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)


MARGINAL_RING = nsde.handlers.marginalize(ring, method=nsde.filters.Forward())
MERGED = nsde.handlers.marginalize(calm_or_wild, method=nsde.filters.IMM())
NAMES = ("pull", "calm", "wild", "switch")


def joint_by_merging(values, data):
    """Log joint density of parameters and data as the merging filter has it."""
    values = {name: values[name] for name in NAMES}
    return log_density(MERGED, (), {"y": data["y"]}, values)[0]


def ring_by_nuts():
    """200 + 300 iterations."""
    run = compiled_chain(NUTS(MARGINAL_RING), 200, 300)
    return MARGINAL_RING, lambda key, data: run(key, data["y"]), {"log_joint": True}


def switching_by_pmmh():
    """500 + 4,000 iterations of 24 sequences, every tenth kept."""
    kernel = nsde.infer.PMMH(calm_or_wild, num_particles=24)
    draw = numpyro.infer.Predictive(calm_or_wild, num_samples=1)
    kernel.tune(jax.random.key(1), np.asarray(draw(jax.random.key(2))["y"][0]))
    run = compiled_chain(kernel, 500, 4000, thinning=10)
    options = {"quantities": {"joint": joint_by_merging}, "var_names": NAMES}
    return calm_or_wild, lambda key, data: run(key, data["y"]), options


def switching_by_particle_gibbs():
    """200 + 800 sweeps of 4 sequences and NUTS, every second kept."""
    run = compiled_chain(
        nsde.infer.ParticleGibbs(calm_or_wild, num_particles=4), 200, 800, thinning=2
    )
    options = {"quantities": {"joint": joint_by_merging}, "log_joint": True}
    return calm_or_wild, lambda key, data: run(key, data["y"]), options


CASES = {
    "3 states, NUTS": ring_by_nuts,
    "switching, PMMH": switching_by_pmmh,
    "switching, particle Gibbs": switching_by_particle_gibbs,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--replicates", type=int, default=200)
    arguments = parser.parse_args()
    for name in arguments.cases:
        wall, cpu = time.perf_counter(), time.process_time()
        model, fit, options = CASES[name]()
        result = sbc(model, fit, arguments.replicates, data="y", progress=False, **options)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(f"\n{name}: {wall:.0f} s, {cpu:.0f} s of CPU\n{result}", flush=True)


if __name__ == "__main__":
    nsde.configure_cpu()
    main()
