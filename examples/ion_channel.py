"""When is an ion channel open? Its rates and states from a noisy current.

A channel with two states, a Markov jump process in continuous time, seen every tenth of a
millisecond. The states are summed out exactly, NUTS samples the rates, and `smooth` gives the
states back. The current is simulated, so that the truth is known.

:title: An ion channel
:problem: a hidden state that jumps, seen through noise
:field: neuroscience
:engine: NUTS, states summed out by Forward
:data: simulated
:tags: discrete states, jump process, hidden Markov model
:page: markov_jump_processes.md
:run time: 101 s
"""

# ruff: noqa: ARG005
# Functions of one protocol share its arguments, used or not.

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS

import numpyro_sde as nsde

mpl.use("Agg")
import matplotlib.pyplot as plt

OPENS, CLOSES, NOISE = 0.8, 1.5, 0.35  # 1/ms, 1/ms, pA; an open channel passes 1 pA


def channel(times, current=None):
    """A channel that opens and closes, seen through the noise of an amplifier."""
    rates = {
        "opens": numpyro.sample("opens", dist.LogNormal(0.0, 1.0)),
        "closes": numpyro.sample("closes", dist.LogNormal(0.0, 1.0)),
    }
    noise = numpyro.sample("noise", dist.LogNormal(-1.0, 0.5))
    chain = nsde.MarkovJumpProcess(
        lambda p: jnp.stack([p["opens"], p["closes"]]),
        num_states=2,
        edges=[(0, 1), (1, 0)],
        params=rates,
    )
    s = numpyro.sample("s", nsde.JumpPath(chain, times, init="stationary"))
    nsde.observe("y", s, lambda t, s, sd: dist.Normal(s, sd), params=noise, obs=current)


def main(output: Path, quick: bool) -> None:
    """Simulate, fit, and draw when the channel was open."""
    times = np.arange(60 if quick else 400) * 0.1
    chain = nsde.MarkovJumpProcess(np.array([[0.0, OPENS], [CLOSES, 0.0]]), 2)
    truth = np.asarray(nsde.JumpPath(chain, times).sample(jax.random.key(1)))
    current = truth + NOISE * np.random.default_rng(1).normal(size=truth.shape)
    marginal = nsde.handlers.marginalize(channel, method=nsde.filters.Forward())
    draws = 20 if quick else 500
    mcmc = MCMC(NUTS(marginal), num_warmup=draws, num_samples=draws, progress_bar=False)
    mcmc.run(jax.random.key(0), times, current)
    samples = mcmc.get_samples()
    for name, true in (("opens", OPENS), ("closes", CLOSES), ("noise", NOISE)):
        print(f"{name:7} {samples[name].mean():.2f} +- {samples[name].std():.2f} (true {true})")
    states = nsde.smooth(marginal, samples, times, current, rng_key=jax.random.key(2))["s"]
    figure, axis = plt.subplots(figsize=(8.0, 3.2), layout="constrained")
    axis.plot(times, current, ".", color="0.6", markersize=3, label="current")
    axis.step(times, truth, color="black", linewidth=0.7, where="post", label="true state")
    axis.plot(times, np.mean(states, axis=0), color="C0", label="probability of open")
    axis.set(xlabel="milliseconds", ylabel="pA")
    axis.legend(frameon=False, ncols=3, loc="upper right", fontsize="small")
    figure.savefig(output / "ion_channel.png", dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the script")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    nsde.configure_cpu()
    main(options.output, options.quick)
