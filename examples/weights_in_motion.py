"""A network whose weights follow an SDE: Bayesian regression, plain and by Nesterov's acceleration.

An infinitely deep network: a state h starts at the input and moves by `dh = f(h, w) dt`, f two
layers whose weights w are Ornstein-Uhlenbeck processes of the depth, one path of 22 coordinates.
Nesterov's form gives the state a velocity, `h = k(t) x`, `x' = m`, `m' = -m - f(h, w)`,
`k(t) = t^(-3/2) e^(t/2)`. Which of them needs fewer evaluations of f? Twenty noisy readings of a
function; the path of the weights by NUTS on its innovations, beside a normal law of them (SVI).
With f linear in w the posterior is normal and known exactly, for both forms: that comes first.
Xu, Chen, Li and Duvenaud (2022), "Infinitely Deep Bayesian Neural Networks with Stochastic
Differential Equations"; Nguyen et al. (2022), "Improving Neural Ordinary Differential Equations
with Nesterov's Accelerated Gradient Method".

Where f is linear in the weights, means of the function are within 1.7 (plain) and 3.0 (Nesterov)
Monte Carlo errors of the exact ones at 73 inputs, standard deviations within 13 per cent. Networks,
judged between -1.5 and 1.5; the noise alone allows a log score of 0.88:

| form, steps of depth | root mean square error | inside 90 % band | log score |
| --- | --- | --- | --- |
| plain, 3 | 0.067 | 1.00 | 0.66 |
| plain, 6 | 0.069 | 1.00 | 0.67 |
| plain, 12 | 0.078 | 1.00 | 0.69 |
| Nesterov, 3 | 0.116 | 1.00 | 0.59 |
| Nesterov, 6 | 0.118 | 0.93 | 0.56 |
| Nesterov, 12 | 0.128 | 0.82 | 0.53 |
| plain, 12, SVI | 0.743 | 1.00 | -1.42 |
| Nesterov, 12, SVI | 0.767 | 0.62 | -1.27 |

Three evaluations serve either form, and Nesterov's is none the better for it here: it fills the gap
in the data with more confidence, and worse. A normal law of independent innovations (SVI) does not
find the function at all. NUTS does, at 1,023 gradients a draw, the most that its trees have: the
weights of networks are not identified.
Run: python examples/weights_in_motion.py [--quick] [--output folder]

:title: Weights in motion
:problem: Bayesian regression by a network of infinite depth
:field: machine learning
:engine: NUTS on the innovations of the weights, beside an exact law and SVI
:data: simulated, 20 readings
:tags: network, regression, exact answer
:page: learned_drifts.md
:run time: 2 minutes of processor time
"""

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
from jax.scipy.special import logsumexp
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

import numpyro_sde as nsde
from numpyro_sde.guides import fit_svi

mpl.use("Agg")
import matplotlib.pyplot as plt

HIDDEN, NOISE, RATE, SPREAD = 4, 0.1, 1.0, 1.5  # units, sd of a reading; of the weights
NUM_WEIGHTS = {"network": 5 * HIDDEN + 2, "linear": 6}
GRID = np.linspace(-1.8, 1.8, 73)


def wanted(x):
    """The function that is read."""
    return np.sin(3.0 * x) + 0.4 * x


def network(h, w, _):
    """Velocity of a state of two coordinates: one hidden layer."""
    inner, bias, outer, shift = jnp.split(w, [2 * HIDDEN, 3 * HIDDEN, 5 * HIDDEN])
    return outer.reshape(2, HIDDEN) @ jnp.tanh(inner.reshape(HIDDEN, 2) @ h + bias) + shift


def linear(h, w, x):
    """A velocity that is linear in the weights: features of the input, not of the state."""
    features = jnp.cos(jnp.arange(6) * 0.9 * x + 0.5 * jnp.arange(6))
    return jnp.stack([jnp.zeros_like(h[0]), w @ features])


def outputs(velocity, form, path, x):
    """Second coordinate at the end of a path of weights `(step + 1, weight)`, for inputs `(n,)`."""
    steps = len(path) - 1
    dt = 1.0 / steps
    depth = 1.0 + dt * jnp.arange(steps)

    def k(t):
        return t**-1.5 * jnp.exp(0.5 * t)

    def of_one(x):
        start = jnp.stack([x, jnp.zeros_like(x)])
        if form == "plain":
            step = lambda h, now: (h + dt * velocity(h, now[1], x), None)  # noqa: E731
            return jax.lax.scan(step, start, (depth, path[:-1]))[0][1]

        def accelerated(now, inputs):
            z, m = now
            t, w = inputs
            m = m + dt * (-m - velocity(k(t) * z, w, x))
            return (z + dt * m, m), None

        (z, _), _ = jax.lax.scan(accelerated, (start / k(1.0), jnp.zeros(2)), (depth, path[:-1]))
        return k(2.0) * z[1]

    return jax.vmap(of_one)(x)


def regression(kind, form, steps, x, y=None):
    """Readings of the network's output; the weights' path has `steps` steps of depth."""
    size = NUM_WEIGHTS[kind]
    drifting = nsde.processes.OrnsteinUhlenbeck(RATE, 0.0, SPREAD * np.sqrt(2.0 * RATE))
    start = dist.Normal(jnp.zeros(size), SPREAD).to_event(1)
    depth = np.linspace(0.0, 1.0, steps + 1)
    w = numpyro.sample("w", nsde.SDEPath(drifting, depth, start))
    noise = NOISE if kind == "linear" else numpyro.sample("noise", dist.LogNormal(-2.0, 0.7))
    middle = outputs({"network": network, "linear": linear}[kind], form, w, x)
    with numpyro.plate("reading", len(x)):
        numpyro.sample("y", dist.Normal(middle, noise), obs=y)


def whitened(kind, form, steps):
    """The regression on the innovations of its weights."""
    whiten = {"w": nsde.reparam.InnovationReparam()}
    return numpyro.handlers.reparam(partial(regression, kind, form, steps), config=whiten)


def by_nuts(kind, form, steps, x, y, draws):
    """Draws of the weights' path, gradients a draw and divergences."""
    kernel = NUTS(whitened(kind, form, steps), target_accept_prob=0.9)
    mcmc = MCMC(kernel, num_warmup=draws, num_samples=draws, progress_bar=False)
    mcmc.run(jax.random.key(0), x, y, extra_fields=("num_steps", "diverging"))
    extra = mcmc.get_extra_fields()
    return (
        mcmc.get_samples(),
        float(np.mean(extra["num_steps"])),
        int(np.sum(extra["diverging"])),
    )


def by_svi(kind, form, steps, x, y, draws):
    """The same by a normal law with independent coordinates, and its bound."""
    model = whitened(kind, form, steps)
    guide = AutoNormal(model, init_scale=0.05)
    svi = SVI(model, guide, numpyro.optim.Adam(1e-2), Trace_ELBO(num_particles=4))
    result = fit_svi(svi, jax.random.key(0), 15 * draws, x, y, patience=None, progress_bar=False)
    found = guide.sample_posterior(jax.random.key(1), result.params, sample_shape=(draws,))
    paths = numpyro.infer.Predictive(model, found)(jax.random.key(2), x)["w"]
    return {**found, "w": paths}, -float(np.mean(result.losses[-len(result.losses) // 10 :]))


def functions(kind, form, draws):
    """The function of each draw on the grid, `(draw, point)`."""
    velocity = {"network": network, "linear": linear}[kind]
    each = jax.vmap(lambda w: outputs(velocity, form, w, jnp.asarray(GRID)))
    return np.asarray(jax.jit(each)(draws["w"]))


def exact(form, steps, x, y):
    """Mean and standard deviation of the function of the linear network on the grid."""
    size = NUM_WEIGHTS["linear"]
    depth = np.linspace(0.0, 1.0, steps + 1)
    over_depth = SPREAD**2 * np.exp(-RATE * np.abs(depth[:, None] - depth[None]))
    prior = np.kron(over_depth, np.eye(size))

    def design(x):
        flat = jax.jacobian(lambda w: outputs(linear, form, w, jnp.asarray(x)))
        return np.asarray(flat(jnp.zeros((steps + 1, size)))).reshape(len(x), -1)

    A, B = design(x), design(GRID)
    gain = np.linalg.solve(A @ prior @ A.T + NOISE**2 * np.eye(len(x)), A @ prior @ B.T).T
    covariance = B @ prior @ B.T - gain @ A @ prior @ B.T
    return gain @ y, np.sqrt(np.diag(covariance))


def judged(found, noise):
    """Error, share inside the 90 per cent band, and log score of new readings, where data are."""
    near = np.abs(GRID) <= 1.5
    truth = wanted(GRID)
    low, high = np.quantile(found, [0.05, 0.95], axis=0)
    error = np.sqrt(np.mean((found.mean(0) - truth)[near] ** 2))
    inside = np.mean(((low <= truth) & (truth <= high))[near])
    fresh = truth + NOISE * np.random.default_rng(1).normal(size=(20, len(GRID)))
    density = dist.Normal(found[:, None], np.asarray(noise)[:, None, None]).log_prob(fresh)
    score = np.asarray(logsumexp(density, axis=0)) - np.log(len(found))
    return error, inside, score[:, near].mean()


def main() -> None:
    """Exact answers first; then both forms at several depths."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the script")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    draws, depths = (20, (3,)) if options.quick else (400, (3, 6, 12))
    rng = np.random.default_rng(0)
    x = np.sort(np.concatenate([rng.uniform(-1.5, -0.4, 10), rng.uniform(0.2, 1.5, 10)]))
    y = wanted(x) + NOISE * rng.normal(size=20)

    for form in ("plain", "Nesterov"):
        found = functions("linear", form, by_nuts("linear", form, 6, x, y, draws)[0])
        mean, sd = exact(form, 6, x, y)
        size = numpyro.diagnostics.effective_sample_size(found[None])
        off = np.abs(found.mean(0) - mean) / sd * np.sqrt(np.minimum(size, len(found)))
        print(
            f"linear, {form}: mean off by {off.max():.1f} Monte Carlo errors at worst, sd ratio "
            f"{(found.std(0) / sd).min():.2f} to {(found.std(0) / sd).max():.2f}",
            flush=True,
        )
    kept = {}
    print("network              evaluations  error  inside  log score  gradients  divergences  s")
    for form in ("plain", "Nesterov"):
        for steps in depths:
            clock = time.process_time()
            samples, gradients, lost = by_nuts("network", form, steps, x, y, draws)
            seconds = time.process_time() - clock
            kept[form, steps] = functions("network", form, samples)
            error, inside, score = judged(kept[form, steps], samples["noise"])
            print(
                f"{form:8} NUTS {steps:17d} {error:9.3f} {inside:6.2f} {score:9.3f} "
                f"{gradients:9.0f} {lost:10d} {seconds:9.0f}",
                flush=True,
            )
        clock = time.process_time()
        samples, bound = by_svi("network", form, depths[-1], x, y, draws)
        seconds = time.process_time() - clock
        error, inside, score = judged(functions("network", form, samples), samples["noise"])
        print(
            f"{form:8} SVI  {depths[-1]:17d} {error:9.3f} {inside:6.2f} {score:9.3f} "
            f"bound {bound:.1f} {seconds:15.0f}",
            flush=True,
        )
    draw(options.output, x, y, {form: kept[form, depths[-1]] for form in ("plain", "Nesterov")})


def draw(output, x, y, found):
    """The function's band of each form beside the truth."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained", sharey=True)
    for axis, (form, functions) in zip(axes, found.items(), strict=True):
        low, middle, high = np.quantile(functions, [0.05, 0.5, 0.95], axis=0)
        axis.fill_between(GRID, low, high, alpha=0.3, label="90 % band")
        axis.plot(GRID, middle, label="median")
        axis.plot(GRID, wanted(GRID), "k--", linewidth=1, label="truth")
        axis.plot(x, y, ".", color="C3")
        axis.set(title=form, xlabel="input", ylim=(-3.0, 3.0))
    axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(output / "weights_in_motion.png", dpi=100)


if __name__ == "__main__":
    numpyro.enable_x64()
    nsde.configure_cpu()
    main()
