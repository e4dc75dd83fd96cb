"""Spikes that an unseen chaotic state drives: Langevin flows with an encoder and mini-batches.

Thirty neurons fire in 40 trials of a second; their log rates are linear in the state of a Lorenz
equation that starts anew in each trial. The model knows nothing of Lorenz: its latent state is
six oscillators on a ring, with inertia, friction and springs to be inferred, and the read-out
of every neuron is unknown too. The law of all paths is one network with an encoder that reads the
spikes of a trial, trained on 8 trials at a time. How near are the rates, and do their bands cover?
Song, Keller, Yue, Perona and Welling (2025), "Langevin Flows for Modeling Neural Latent Dynamics";
the data are of the kind of Sussillo, Jozefowicz, Abbott and Pandarinath (2016), "LFADS".

25,000 spikes, 21 a second from each neuron on average; R2 about each neuron's mean rate:

| rates | R2 of rates | R2 of log rates | inside 90 % bands |
| --- | --- | --- | --- |
| counts smoothed by a Gaussian, the best width of five | 0.75 | | |
| Langevin flow, path law with an encoder | 0.913 | 0.913 | 0.885 |
| the same model, Laplace's approximation at the medians of the parameters | 0.939 | | 0.864 |
| three oscillators, path law with an encoder | 0.918 | 0.921 | 0.830 |
| three oscillators, Laplace's approximation | 0.945 | | 0.809 |

The state has three coordinates, and three oscillators fit as well; but their bands are too narrow,
in Laplace's approximation too, which shares no code with the guide: the model is too sure. A
chaotic state speeds up and slows down, and a linear ring of three has few speeds to follow it with.
Six have more, and what the data do not tell apart stays open.
Run: python examples/spikes_lorenz.py [--quick] [--output folder]

:title: Spikes that a chaotic state drives
:problem: spikes of many neurons in many trials, no equation known
:field: neuroscience
:engine: SVI, one path law with an encoder, mini-batches
:data: simulated, 40 trials of 30 neurons
:tags: counts, panel, latent dynamics, encoder
:page: learned_drifts.md
:run time: 4 minutes of processor time
"""

# ruff: noqa: ARG001
# Functions of one protocol share its arguments, used or not.

from __future__ import annotations

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
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.initialization import init_to_value
from scipy.linalg import expm
from scipy.ndimage import gaussian_filter1d

import numpyro_sde as nsde
from numpyro_sde.guides import AutoPathGuide, ControlledPath, fit_svi

mpl.use("Agg")
import matplotlib.pyplot as plt

NEURONS, TRIALS, BINS, WIDTH = 30, 40, 50, 0.2  # bins of 20 ms; the unit of time is 0.1 s
OSCILLATORS = 6
SPEED = 0.15  # Lorenz's time in a unit
STEPS = 1000
BASE, GAIN = 1.2, 1.0  # spikes in a unit of time (12 a second); standard deviation of a log rate


def lorenz(rng, trials, bins):
    """States in the bins, `(trial, bin, 3)`, each coordinate of mean 0 and variance 1."""

    def velocity(x):
        a, b, c = np.moveaxis(x, -1, 0)
        return np.stack([10.0 * (b - a), a * (28.0 - c) - b, a * b - 8.0 / 3.0 * c], -1)

    def step(x, h):
        k1 = velocity(x)
        k2 = velocity(x + 0.5 * h * k1)
        k3 = velocity(x + 0.5 * h * k2)
        k4 = velocity(x + h * k3)
        return x + h * (k1 + 2 * k2 + 2 * k3 + k4) / 6.0

    x = rng.normal(size=(trials, 3)) + np.array([0.0, 0.0, 25.0])
    for _ in range(2000):
        x = step(x, 0.01)
    path = []
    for _ in range(bins):
        path.append(x)
        for _ in range(5):
            x = step(x, SPEED * WIDTH / 5)
    mean, sd = np.array([0.0, 0.0, 23.55]), np.array([7.92, 9.01, 8.62])  # of the attractor
    return (np.stack(path, 1) - mean) / sd


def simulated(trials, bins):
    """Rates in spikes a unit of time and counts, `(trial, bin, neuron)`."""
    rng = np.random.default_rng(0)
    state = lorenz(rng, trials, bins)
    weights = rng.normal(size=(3, NEURONS))
    weights = GAIN * weights / np.linalg.norm(weights, axis=0)
    rates = np.exp(np.log(BASE) + 0.3 * rng.normal(size=NEURONS) + state @ weights)
    return rates, rng.poisson(WIDTH * rates).astype(np.float32)


def emission(t, x, p):
    """Counts of all neurons in a bin."""
    drive = p["weights"] @ x[:OSCILLATORS]
    return dist.Poisson(WIDTH * jnp.exp(p["offset"] + drive)).to_event(1)


def linear(ring):
    """The same equation with its matrices written out: one exact step serves all bins."""
    rest = jnp.zeros(2 * OSCILLATORS)
    A = jax.jacfwd(partial(ring.drift_at, 0.0))(rest)
    return nsde.processes.LinearSDE(A, jnp.zeros_like(rest), ring.diffusion_at(0.0, rest))


def flow(counts, batch=None):
    """Counts `(trial, bin, neuron)`; `batch` trials at a time, or all."""
    friction = numpyro.sample("friction", dist.LogNormal(0.0, 1.0))
    speed = numpyro.sample("speed", dist.LogNormal(0.0, 0.7))  # of an oscillator without springs
    coupling = numpyro.sample("coupling", dist.HalfNormal(1.0))
    weights = numpyro.sample(
        "weights", dist.Normal(0.0, 1.0).expand([NEURONS, OSCILLATORS]).to_event(2)
    )
    offset = numpyro.sample("offset", dist.Normal(0.0, 1.0).expand([NEURONS]).to_event(1))
    ring = linear(
        nsde.processes.CoupledOscillators(
            friction, stiffness=1.0, coupling=coupling[None], mass=1.0 / speed**2
        )
    )
    still = jnp.ones(OSCILLATORS)
    start = dist.Normal(0.0, jnp.concatenate([still, speed * still])).to_event(1)
    times = np.arange(counts.shape[1]) * WIDTH
    with numpyro.plate("trial", len(counts), subsample_size=batch) as i:
        x = numpyro.sample("x", nsde.SDEPath(ring, times, start))
        nsde.observe(
            "counts",
            x,
            emission,
            params={"weights": weights, "offset": offset},
            event_dims={"weights": 2, "offset": 1},
            obs=counts[i],
        )


def first_guess(counts):
    """Read-outs by principal components of smoothed log counts: a start, not a fit."""
    smooth = np.log(gaussian_filter1d(counts, 2.0, axis=1) / WIDTH + 0.3)
    offset = np.log(counts.mean((0, 1)) / WIDTH + 0.1)
    rest = (smooth - smooth.mean((0, 1))).reshape(-1, NEURONS)
    _, size, rows = np.linalg.svd(rest, full_matrices=False)
    weights = rows[:OSCILLATORS].T * size[:OSCILLATORS] / np.sqrt(len(rest))
    return {"weights": jnp.asarray(weights), "offset": jnp.asarray(offset)}


def guide_of(counts):
    """One law of all paths, which reads the spikes of a trial; read-outs are normal."""
    start = init_to_value(values=first_guess(counts))
    return AutoPathGuide(
        flow,
        parameters=partial(AutoNormal, init_loc_fn=start, init_scale=0.02),
        path=ControlledPath((32,), num_context=8),
        init="median",
    )


def fit(counts, steps, batch):
    """The guide, what it has learned of `batch` trials at a time, and the losses."""
    guide = guide_of(counts)
    optimiser = numpyro.optim.ClippedAdam(lambda k: 6e-3 * 0.03 ** (k / steps), clip_norm=100.0)
    svi = SVI(flow, guide, optimiser, Trace_ELBO())
    result = fit_svi(
        svi,
        jax.random.key(0),
        steps,
        jnp.asarray(counts),
        batch=batch,
        patience=None,
        progress_bar=False,
    )
    return guide, result.params, np.asarray(result.losses)


def log_rates(draws):
    """Log rates of draws of read-outs and paths, `(draw, trial, bin, neuron)`."""
    positions = np.asarray(draws["x"])[..., :OSCILLATORS]
    drive = np.einsum("dkti,dni->dktn", positions, np.asarray(draws["weights"]))
    return np.asarray(draws["offset"])[:, None, None] + drive


def explained(found, truth):
    """Share of the variance of the truth about each neuron's mean."""
    return 1.0 - np.sum((found - truth) ** 2) / np.sum((truth - truth.mean((0, 1))) ** 2)


def covered(found, truth):
    """Share of the truth inside the 90 per cent bands of draws."""
    low, high = np.quantile(found, [0.05, 0.95], axis=0)
    return np.mean((low <= truth) & (truth <= high))


def by_newton(middle, counts, num):
    """Draws of the rates by Laplace's approximation at given parameters, with NumPy alone.

    Beside the guide's they tell whether a band that does not cover is the guide's fault.
    """
    speed, size, bins = middle["speed"], 2 * OSCILLATORS, counts.shape[1]
    springs = [middle[name] for name in ("friction", "coupling")]
    ring = nsde.processes.CoupledOscillators(springs[0], 1.0, springs[1][None], mass=1.0 / speed**2)
    A = np.asarray(linear(ring).A, float)
    noise = np.diag(np.repeat([0.0, 2.0 * springs[0] * speed**2], OSCILLATORS))
    block = expm(WIDTH * np.block([[-A, noise], [np.zeros_like(A), A.T]]))  # Van Loan (1978)
    F = block[size:, size:].T
    inverse = np.linalg.inv(F @ block[:size, size:])
    prior = np.zeros((bins, size, bins, size))
    prior[0, :, 0] = np.diag(np.repeat([1.0, speed**-2], OSCILLATORS))
    for k in range(bins - 1):
        prior[k, :, k] += F.T @ inverse @ F
        prior[k + 1, :, k + 1] += inverse
        prior[k, :, k + 1], prior[k + 1, :, k] = -F.T @ inverse, -inverse @ F
    prior = prior.reshape(bins * size, bins * size)
    C = np.pad(middle["weights"], ((0, 0), (0, OSCILLATORS)))

    def look(x, y):
        logs = middle["offset"] + x.reshape(bins, size) @ C.T
        rates = WIDTH * np.exp(logs)
        return rates.sum() - np.sum(y * logs) + 0.5 * x @ prior @ x, rates

    rng, found = np.random.default_rng(1), []
    for y in counts:
        x = np.zeros(bins * size)
        for _ in range(30):
            value, rates = look(x, y)
            curved = prior.reshape(bins, size, bins, size).copy()
            for k in range(bins):
                curved[k, :, k] += C.T @ (rates[k][:, None] * C)
            curved = curved.reshape(prior.shape)
            move = np.linalg.solve(curved, prior @ x - ((y - rates) @ C).ravel())
            lengths = [0.5**j for j in range(10) if look(x - 0.5**j * move, y)[0] < value]
            if not lengths:
                break
            x = x - lengths[0] * move
        root = np.linalg.cholesky(curved).T
        paths = x[:, None] + np.linalg.solve(root, rng.normal(size=(len(x), num)))
        found.append(np.exp(middle["offset"] + paths.T.reshape(num, bins, size) @ C.T))
    return np.stack(found, 1)


def main() -> None:
    """Fit, and compare the rates with the truth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the script")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    trials, bins, steps, batch, num = (
        (4, 12, 6, 2, 10) if options.quick else (TRIALS, BINS, STEPS, 8, 200)
    )
    rates, counts = simulated(trials, bins)
    print(f"{10 * rates.mean():.1f} spikes a second on average, {counts.sum():.0f} in all")
    smooth = [gaussian_filter1d(counts, w, axis=1) / WIDTH for w in (1.0, 1.5, 2.0, 2.5, 3.0)]
    best = max(explained(one, rates) for one in smooth)
    print(f"counts smoothed by the best of five Gaussian widths: R2 of the rates {best:.3f}")
    clock = time.process_time()
    guide, params, losses = fit(counts, steps, batch)
    print(f"{steps} steps, {time.process_time() - clock:.0f} s of processor time, loss by tenths:")
    print(np.array([part.mean() for part in np.array_split(losses, min(10, steps))]).round(0))
    key = jax.random.key(1)
    draws = guide.sample_posterior(key, params, jnp.asarray(counts), sample_shape=(num,))
    logs = log_rates(draws)
    found = np.exp(logs)
    print(
        f"R2 of the rates {explained(found.mean(0), rates):.3f}, of their logarithms "
        f"{explained(logs.mean(0), np.log(rates)):.3f}; 90 per cent bands hold "
        f"{covered(found, rates):.3f} of them"
    )
    middle = {k: np.median(np.asarray(v), axis=0) for k, v in draws.items() if k != "x"}
    other = by_newton(middle, counts, num)
    print(
        "the same model by Laplace's approximation at the parameters' medians: R2 "
        f"{explained(other.mean(0), rates):.3f}, bands hold {covered(other, rates):.3f}"
    )
    for name in ("friction", "speed", "coupling"):
        value = np.asarray(draws[name])
        print(f"{name} {value.mean():.2f} +- {value.std():.2f}")
    draw(options.output, rates, counts, found)


def draw(output, rates, counts, found):
    """Rates of four neurons in one trial with their bands; spikes above."""
    seconds = np.arange(rates.shape[1]) * WIDTH / 10.0
    low, middle, high = 10.0 * np.quantile(found[:, 0], [0.05, 0.5, 0.95], axis=0)
    figure, axes = plt.subplots(2, 2, figsize=(9.5, 5.0), layout="constrained", sharex=True)
    order = np.argsort(rates[0].std(0))[::-1]
    for axis, i in zip(axes.flat, order[[0, 5, 10, 15]], strict=True):
        axis.fill_between(seconds, low[:, i], high[:, i], alpha=0.3, label="90 % band")
        axis.plot(seconds, middle[:, i], label="median")
        axis.plot(seconds, 10.0 * rates[0, :, i], "k--", linewidth=1, label="true rate")
        fired = np.repeat(seconds, counts[0, :, i].astype(int))
        axis.plot(fired, np.zeros_like(fired), "|", color="C3", label="spikes")
        axis.set(title=f"neuron {i}")
    for axis in axes[1]:
        axis.set(xlabel="seconds")
    for axis in axes[:, 0]:
        axis.set(ylabel="spikes a second")
    axes[0, 0].legend(frameon=False, fontsize="small")
    figure.savefig(output / "spikes_lorenz.png", dpi=100)


if __name__ == "__main__":
    nsde.configure_cpu()
    main()
