"""A pendulum whose friction is not known: physics where it is known, a learned function where not.

A pendulum swings out from 69 degrees; its angle is read 20 times a second with noise. Gravity is
known. Friction is not: in truth linear and quadratic in the velocity. Three models: physics alone,
with linear friction; physics with a Gaussian process for what else there is; a network for the
whole acceleration. Which of them foretells a swing from 137 degrees?
Run: python examples/pendulum.py [--quick] [--output folder]

:title: A pendulum whose friction is not known
:problem: physics where it is known, a learned function where it is not
:field: physics
:engine: NUTS for the Gaussian process, SVI for the network
:data: simulated
:tags: learned drift, Gaussian process, network, forecast
:page: learned_drifts.md
:run time: 255 s of processor time
:picture: pendulum_friction.png
"""

# ruff: noqa: ARG001, ARG005
# Functions of one protocol share its arguments, used or not.

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO, log_likelihood
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.initialization import init_to_median

import numpyro_sde as nsde

mpl.use("Agg")
import matplotlib.pyplot as plt

nsde.configure_cpu()

GRAVITY, LINEAR, QUADRATIC = 4.0, 0.2, 0.15  # 1/s^2, 1/s, 1
SCALE, NOISE = 0.05, 0.02  # rad/s per root of a second; rad
WIDTH = 0.05  # seconds between readings
FRICTION = nsde.fields.HSGP(dim=1, box=5.0, num=12, constraint="odd")
NETWORK = nsde.fields.Network(
    eqx.nn.MLP(2, "scalar", 12, 1, jax.nn.tanh, key=jax.random.key(0)),
    dim=2,
    prior=dist.Normal(0.0, 1.0),
)


def friction(v):
    return LINEAR * v + QUADRATIC * v * jnp.abs(v)


def pendulum(kind, y, start):
    """Angles `(time,)` of a swing from rest; kind "physics", "both" or "network"."""
    noise = numpyro.sample("noise", dist.LogNormal(-4.0, 0.5))
    scale = numpyro.sample("scale", dist.LogNormal(-2.5, 0.7))
    params = {"scale": scale}
    if kind == "network":
        params["net"] = NETWORK.register("net")
    else:
        params["linear"] = numpyro.sample("linear", dist.HalfNormal(0.5))
    if kind == "both":
        params["f"] = FRICTION.register(
            "f", amplitude=dist.HalfNormal(1.0), length=dist.InverseGamma(5.0, 8.0)
        )

    def drift(t, x, p):
        q, v = x[0], x[1]
        if "net" in p:
            return jnp.stack([v, p["net"](x)])
        rest = p["f"](v) if "f" in p else 0.0
        return jnp.stack([v, -GRAVITY * jnp.sin(q) - p["linear"] * v - rest])

    sde = nsde.SDE(
        drift, lambda t, x, p: jnp.stack([jnp.zeros(1), p["scale"][None]]), params=params
    )
    times = np.arange(len(y)) * WIDTH
    init = dist.Normal(jnp.array([start, 0.0]), jnp.array([0.02, 0.02])).to_event(1)
    x = numpyro.sample("x", nsde.SDEPath(sde, times, init, scheme=nsde.schemes.LocalLinear()))
    nsde.observe("y", x, lambda t, x, p: dist.Normal(x[0], p), params=noise, obs=y)


def swing(start, num, key):
    """A swing of the pendulum itself, and what is read of it."""
    sde = nsde.SDE(
        lambda t, x: jnp.stack([x[1], -GRAVITY * jnp.sin(x[0]) - friction(x[1])]),
        lambda t, x: jnp.array([[0.0], [SCALE]]),
    )
    keys = jax.random.split(key)
    times = np.arange((num - 1) * 20 + 1) * WIDTH / 20
    path = nsde.SDEPath(sde, times, jnp.array([start, 0.0]), scheme=nsde.schemes.LocalLinear())
    x = np.asarray(path.sample(keys[0]))[::20]
    return x, x[:, 0] + NOISE * np.asarray(jax.random.normal(keys[1], (num,)))


def integrated(kind):
    """The model with its path integrated out: readings are so sharp that this is near exact."""
    return nsde.handlers.marginalize(partial(pendulum, kind), method=nsde.filters.ExtendedKalman())


def fit(kind, y, start, draws):
    """Draws of the parameters: by NUTS; of the network's weights by a normal law."""
    model = integrated(kind)
    if kind == "network":
        guide = AutoNormal(model, init_loc_fn=init_to_median, init_scale=0.02)
        svi = SVI(model, guide, numpyro.optim.Adam(1e-2), Trace_ELBO())
        result = svi.run(jax.random.key(1), 4 * draws, y, start, progress_bar=False)
        return guide.sample_posterior(jax.random.key(2), result.params, sample_shape=(draws,))
    mcmc = MCMC(
        NUTS(model, init_strategy=init_to_median),
        num_warmup=draws,
        num_samples=draws,
        progress_bar=False,
    )
    mcmc.run(jax.random.key(1), y, start)
    return mcmc.get_samples()


def log_score(kind, draws, y, start):
    """Log density of a whole swing under the posterior predictive law."""
    terms = log_likelihood(integrated(kind), draws, y, start, parallel=False)
    total = sum(np.asarray(term).reshape(len(term), -1).sum(1) for term in terms.values())
    return float(logsumexp(jnp.asarray(total)) - np.log(len(total)))


def friction_draws(draws, v):
    """Friction at velocities `(n,)` in each draw, `(draws, n)`."""

    def one(z, amplitude, length, linear):
        return linear * v + FRICTION.from_weights(z, amplitude=amplitude, length=length).on(v)

    return np.asarray(
        jax.vmap(one)(draws["f/z"], draws["f/amplitude"], draws["f/length"], draws["linear"])
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    draws, count, far = (20, 41, 21) if options.quick else (400, 201, 101)
    x, y = swing(1.2, count, jax.random.key(0))
    _, y_far = swing(2.4, far, jax.random.key(5))
    posteriors = {}
    for kind in ("physics", "both", "network"):
        began = time.perf_counter()
        posteriors[kind] = fit(kind, y, 1.2, draws)
        seconds = time.perf_counter() - began
        seen, unseen = (
            log_score(kind, posteriors[kind], *data) for data in ((y, 1.2), (y_far, 2.4))
        )
        print(
            f"{kind:8} {seconds:5.0f} s, log score of a reading: "
            f"{seen / count:6.2f} in training, {unseen / far:6.2f} on the larger swing"
        )
    v = np.linspace(-np.abs(x[:, 1]).max(), np.abs(x[:, 1]).max(), 61)
    found = friction_draws(posteriors["both"], jnp.asarray(v))
    low, middle, high = np.quantile(found, [0.05, 0.5, 0.95], axis=0)
    truth = np.asarray(friction(v))
    inside = float(np.mean((low <= truth) & (truth <= high)))
    print(f"friction inside its 90 % band over {100 * inside:.0f} % of the velocities seen")
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        _, axis = plt.subplots(figsize=(6, 3.5))
        axis.fill_between(v, low, high, alpha=0.3, label="90 % band")
        axis.plot(v, middle, label="median")
        axis.plot(v, truth, "k--", label="truth")
        axis.set(xlabel="velocity, rad/s", ylabel="friction, rad/s^2")
        axis.legend()
        plt.tight_layout()
        plt.savefig(options.output / "pendulum_friction.png", dpi=120)


if __name__ == "__main__":
    main()
