"""Weather without its eddies, learned: a closure of Lorenz '96 out of the slow variables alone.

The system of `turbulence_closure.py`, but nobody sees the fast variables, nor what they do: only
the eight slow ones, every 0.02 (two and a half hours) for ten units of time. Between two readings
the known advection is run forward from the first and back from the second; what they miss each
other by in the middle is what the fast variables did, U, on average over the interval. U is a
function of the slow variable at the same place, one for all places, and a deviation with a memory:

    U = b0 + b1 X + f(X) + e,   de = -rate e dt + scale dW,   read with an error of its own.

`f` is a Gaussian process of unknown amplitude and length; Kalman integrates the deviations of all
places out. What the closure is wanted for is drawn from the posterior: forecasts, each member with
closure and parameters of its own, and the climate. Beside it no closure, a straight line, and a
polynomial of degree four, alone and with noise of first order (Wilks 2005), by least squares.

20 forecasts from states known exactly, 40 members, each CRPS with its mean difference from that of
the polynomial with noise, start by start; climates of 40 runs, the full system's is 3.79 and 5.08:

| closure | CRPS at 1.0 | at 2.0 | intervals of 90 % at 2.0 | mean and sd of X |
| --- | --- | --- | --- | --- |
| none | 7.03 | 6.66, +4.68 +- 0.52 | | 3.42, 7.51 |
| line | 1.93 | 4.14, +2.16 +- 0.31 | | 3.65, 5.03 |
| polynomial | 1.37 | 3.90, +1.92 +- 0.30 | | 3.66, 4.99 |
| polynomial with noise | 0.91 | 1.98 | 0.90 | 3.72, 5.05 |
| learned, with noise | 0.98 | 2.02, +0.05 +- 0.06 | 0.93 | 3.71, 5.06 |

So the learned closure needs no degree to be chosen, and is as good as the polynomial, not better:
here U is nearly one. The deviations are what counts. Its band with deviations holds 0.91 of U in a
run never seen; `f` alone is 0.61 off the mean of U in bins of X (root mean square), above it where
X is large, further than its own band is wide where data were many: a band says how well a function
is known if the model is right, and this one has no delay between X and U.

The sampler takes 757 gradients a draw, 5 of 150 divergent: weights, line and amplitude of a field
that thousands of values inform are one narrow ridge.

That a closure is the drift which is right on average given what is resolved, learned as a
stochastic equation from resolved paths: Boral et al. (2023), "Neural ideal large eddy simulation".
Lorenz (1996); Wilks (2005), Q. J. R. Meteorol. Soc. 131.
Run: python examples/learned_closure.py [--quick] [--output folder]

:title: A closure nobody wrote down
:problem: what unresolved scales do, learned from the resolved ones alone
:field: physics
:engine: NUTS on a Gaussian process, deviations integrated out by Kalman in a plate
:data: simulated, the full system
:tags: turbulence closure, multiscale, Gaussian process, panel, forecast
:page: learned_drifts.md
:run time: 1 minute of processor time
"""

# ruff: noqa: ARG005
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
from numpyro.infer import MCMC, NUTS, init_to_median

import numpyro_sde as nsde

mpl.use("Agg")
import matplotlib.pyplot as plt

SLOW, FAST, FORCING = 8, 32, 20.0
SEEN, STEP, COARSE = 0.02, 0.001, 0.0025  # between readings; of the full run; of a forecast
FIELD = nsde.fields.HSGP(dim=1, box=(-20.0, 30.0), num=20)


def runge_kutta(velocity, x, h):
    """One step of a velocity."""
    k1 = velocity(x)
    k2 = velocity(x + 0.5 * h * k1)
    k3 = velocity(x + 0.5 * h * k2)
    k4 = velocity(x + h * k3)
    return x + h * (k1 + 2 * k2 + 2 * k3 + k4) / 6.0


@partial(jax.jit, static_argnums=1)
def full_run(state, num):
    """Slow variables and U at `num` readings, both `(num, slow)`."""
    full = nsde.processes.Lorenz96TwoScale(
        SLOW, FAST, forcing=FORCING, slow_scale=0.0, fast_scale=0.0
    )

    def keep(s, _):
        s = jax.lax.fori_loop(
            0,
            round(SEEN / STEP),
            lambda _, s: runge_kutta(lambda s: full.drift_at(0.0, s), s, STEP),
            s,
        )
        x = s[:SLOW]
        return s, (x, advection(x) - full.drift_at(0.0, s)[:SLOW])

    return jax.lax.scan(keep, state, None, num)[1]


def advection(x):
    """What the slow variables do to each other, forced and damped."""
    return jnp.roll(x, 1) * (jnp.roll(x, -1) - jnp.roll(x, 2)) - x + FORCING


@jax.jit
def missed(x):
    """Slow variables in the middle between readings, and U there, both `(slow, reading - 1)`."""
    ahead = jax.vmap(lambda x: runge_kutta(advection, x, 0.5 * SEEN))(x[:-1])
    back = jax.vmap(lambda x: runge_kutta(advection, x, -0.5 * SEEN))(x[1:])
    return 0.5 * (ahead + back).T, (ahead - back).T / SEEN


def closure(x, u=None):
    """U of each place given the slow variable there, `(slow, time)`."""
    f = FIELD.register("f", amplitude=dist.HalfNormal(10.0), length=dist.LogNormal(1.6, 0.4))
    b0 = numpyro.sample("b0", dist.Normal(0.0, 10.0))
    b1 = numpyro.sample("b1", dist.Normal(0.0, 2.0))
    rate = numpyro.sample("rate", dist.LogNormal(2.0, 1.0))
    size = numpyro.sample("size", dist.HalfNormal(5.0))  # of the deviation, at rest
    error = numpyro.sample("error", dist.HalfNormal(1.0))
    around = b0 + b1 * x + jax.vmap(jax.vmap(f))(x)
    times = SEEN * np.arange(x.shape[1])
    with numpyro.plate("place", SLOW):
        ou = nsde.processes.OrnsteinUhlenbeck(rate, 0.0, size * jnp.sqrt(2.0 * rate))
        e = numpyro.sample("e", nsde.SDEPath(ou, times, dist.Normal(0.0, size)))
        nsde.observe(
            "u",
            e,
            lambda t, e, sd, mean: dist.Normal(mean + e, sd),
            params=error,
            inputs=around,
            obs=u,
        )


def learned(x, u, draws):
    """Draws of the closure, as a pytree of parameters, and the sampler."""
    model = nsde.handlers.marginalize(closure, method=nsde.filters.Kalman())
    kernel = NUTS(model, dense_mass=True, init_strategy=init_to_median)
    mcmc = MCMC(kernel, num_warmup=draws, num_samples=draws, progress_bar=False)
    mcmc.run(jax.random.key(0), x, u, extra_fields=("num_steps", "diverging"))
    return mcmc


def by_field(p, x):
    """The learned closure of one draw at one state."""
    f = FIELD.from_weights(p["f/z"], amplitude=p["f/amplitude"], length=p["f/length"])
    return p["b0"] + p["b1"] * x + f(x)


def by_polynomial(p, x):
    """The closure of Wilks at one state; of degree one it is a line, without coefficients none."""
    return jnp.polyval(p["b"], x)


def fitted(x, u, degree):
    """Least squares, and a noise of first order out of what is left."""
    b = np.polyfit(x.ravel(), u.ravel(), degree)
    rest = u - np.polyval(b, x)
    kept = (rest[:, 1:] * rest[:, :-1]).mean() / (rest**2).mean()
    return {"b": b, "rate": -np.log(kept) / SEEN, "size": rest.std()}


@partial(jax.jit, static_argnums=(0, 4))
def run(mean, p, x, e, num, key):
    """Slow variables and U, `(member, lead, slow)`, each member with parameters and noise its own.

    The deviations are drawn by their exact law and drive Runge-Kutta steps of half a reading.
    """
    fine = 0.5 * SEEN * np.arange(2 * num + 1)

    def member(p, key):
        around = jax.vmap(partial(mean, p))
        ou = nsde.processes.OrnsteinUhlenbeck(p["rate"], 0.0, p["size"] * jnp.sqrt(2.0 * p["rate"]))
        start = jnp.where(p["noisy"], e - around(x), 0.0)
        paths = jax.vmap(lambda key, e: nsde.SDEPath(ou, fine, e).sample(key))
        deviation = p["noisy"] * paths(jax.random.split(key, SLOW), start).T

        def step(x, e):
            x = runge_kutta(lambda x: advection(x) - around(x) - e, x, 0.5 * SEEN)
            return x, x

        path = jax.lax.scan(step, x, 0.5 * (deviation[1:] + deviation[:-1]))[1]
        path = jnp.concatenate([x[None], path[1::2]])
        return path, jax.vmap(around)(path) + deviation[::2]

    return jax.vmap(member)(p, jax.random.split(key, p["rate"].shape[0]))


def closures(draws, x, u, members):
    """Name, function and parameters (one set a member) of all that is compared."""

    def same(p):
        return {k: jnp.broadcast_to(jnp.asarray(v), (members, *np.shape(v))) for k, v in p.items()}

    line, quartic = fitted(x, u, 1), fitted(x, u, 4)
    rows = np.random.default_rng(3).integers(len(draws["rate"]), size=members)
    field = {name: jnp.asarray(value)[rows] for name, value in draws.items() if name != "error"}
    return {
        "no closure": (by_polynomial, same({**line, "b": np.zeros(1), "noisy": 0.0})),
        "a line": (by_polynomial, same({**line, "noisy": 0.0})),
        "quartic": (by_polynomial, same({**quartic, "noisy": 0.0})),
        "quartic, noise": (by_polynomial, same({**quartic, "noisy": 1.0})),
        "learned": (by_field, {**field, "noisy": jnp.ones(members)}),
    }


def forecasts(models, x, starts, num):
    """Scores at each lead, by closure: CRPS of each start, coverage of 90 per cent intervals."""
    truth = np.stack([x[row : row + num + 1] for row in starts])
    # What is known when a forecast begins: the last interval's U.
    last = [missed(x[row - 1 : row + 1])[1][:, 0] for row in starts]
    found = {}
    for name, (mean, p) in models.items():
        keys = jax.random.split(jax.random.key(2), len(starts))
        some = [
            run(mean, p, jnp.asarray(x[row]), e, num, key)[0]
            for row, e, key in zip(starts, last, keys, strict=True)
        ]
        result = nsde.diagnostics.score(np.stack(some, axis=1), truth, levels=(0.9,))
        rows = result.pointwise["y"]
        found[name] = {
            "crps": rows["crps"].mean(axis=2),
            "held": rows["cover_90"].mean(axis=(0, 2)),
        }
    return found


def climates(models, x, num):
    """Slow variables and U of long runs after a while, by closure."""
    found = {}
    for name, (mean, p) in models.items():
        paths = run(mean, p, jnp.asarray(x[0]), jnp.zeros(SLOW), num, jax.random.key(4))
        found[name] = [np.asarray(one)[:, num // 5 :] for one in paths]
    return found


def band(draws, line):
    """Draws of the closure on a line, `(draw, point)`."""
    p = {name: jnp.asarray(value) for name, value in draws.items()}
    return np.asarray(jax.vmap(lambda p: jax.vmap(partial(by_field, p))(jnp.asarray(line)))(p))


def binned(x, u, edges):
    """Mean of U in bins of the slow variable; NaN where fewer than one value in 500 is."""
    which = np.digitize(x.ravel(), edges)
    number = np.bincount(which, minlength=len(edges) + 1)
    total = np.bincount(which, u.ravel(), minlength=len(edges) + 1)
    return np.where(number < max(20, x.size // 500), np.nan, total / np.maximum(number, 1))[1:-1]


def against_the_unseen(draws, climate, x, u):
    """What was learned against U of a run never seen, in bins of the slow variable of width one.

    The share of U inside the 90 per cent band of closure and deviations, and how far off (root
    mean square over bins) are the closure alone and the mean of U in its own climate. These two
    differ: a deviation drives the slow variable, and is not independent of it.
    """
    edges = np.arange(np.floor(x.min()), np.ceil(x.max()) + 1.0)
    truth, own = binned(x, u, edges), binned(*climate, edges)
    values = band(draws, 0.5 * (edges[1:] + edges[:-1]))
    some = np.random.default_rng(6).permutation(x.size)[:5000]
    low, high = np.quantile(with_deviations(draws, band(draws, x.ravel()[some])), [0.05, 0.95], 0)
    inside = np.mean((low <= u.ravel()[some]) & (u.ravel()[some] <= high))
    off = [np.sqrt(np.nanmean((one - truth) ** 2)) for one in (values.mean(0), own)]
    return inside, off


def with_deviations(draws, values):
    """Draws of the closure with a deviation each."""
    noise = np.random.default_rng(5).normal(size=values.shape)
    return values + draws["size"][:, None] * noise


def draw(output, draws, x, u, found, climate, truth):
    """The closure over what was never seen, scores over the lead, the climate."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12.0, 3.8), layout="constrained")
    left.plot(x.ravel()[::7], u.ravel()[::7], ".", markersize=1.5, color="0.7", label="U, unseen")
    line = np.linspace(x.min() - 2.0, x.max() + 2.0, 150)
    values = band(draws, line)
    for one, alpha in ((with_deviations(draws, values), 0.15), (values, 0.4)):
        low, high = np.quantile(one, [0.05, 0.95], axis=0)
        left.fill_between(line, low, high, color="C3", alpha=alpha, linewidth=0, zorder=3)
    left.plot(line, values.mean(0), color="C3", label="learned", zorder=4)
    left.set(xlabel="slow variable", ylabel="U, what the fast ones do to it")
    left.legend(frameon=False, fontsize="small")
    leads = SEEN * np.arange(next(iter(found.values()))["crps"].shape[1])
    at = np.linspace(truth.min(), truth.max(), 60)
    right.hist(truth.ravel(), at, density=True, color="0.85", label="full system")
    colors = dict(zip(found, ("0.5", "C1", "C2", "C0", "C3"), strict=True))
    for name, row in found.items():
        middle.plot(leads, row["crps"].mean(0), color=colors[name], label=name)
        right.hist(climate[name][0].ravel(), at, density=True, histtype="step", color=colors[name])
    middle.set(xlabel="lead (one is about five days)", ylabel="CRPS")
    middle.legend(frameon=False, fontsize="small")
    right.set(xlabel="slow variable", yticks=[], title="climate")
    right.legend(frameon=False, fontsize="small")
    figure.savefig(output / "learned_closure.png", dpi=100)


def tell(draws, mcmc, clock):
    """Parameters and what they cost."""
    extra = mcmc.get_extra_fields()
    size = numpyro.diagnostics.effective_sample_size(draws["rate"][None])
    print(
        f"{np.mean(extra['num_steps']):.0f} gradients a draw, {np.sum(extra['diverging'])} "
        f"divergent, effective size of the rate {size:.0f}, {clock:.0f} s of processor time"
    )
    for name in ("f/amplitude", "f/length", "b0", "b1", "rate", "size", "error"):
        print(f"{name:11} {draws[name].mean():7.3f} +- {draws[name].std():.3f}")


def experiment(seen, num_starts, members, ahead, draws, long):
    """Everything but the printing."""
    rng = np.random.default_rng(0)
    start = jnp.asarray(np.r_[rng.normal(size=SLOW), 0.1 * rng.normal(size=SLOW * FAST)])
    skip, apart = 200, 150  # four units of time, three
    x, u = map(np.asarray, full_run(start, skip + seen + apart * num_starts + ahead + long))
    train = missed(jnp.asarray(x[skip : skip + seen]))
    clock = time.process_time()
    mcmc = learned(*train, draws)
    samples = {name: np.asarray(value) for name, value in mcmc.get_samples().items()}
    clock = time.process_time() - clock
    models = closures(samples, *map(np.asarray, train), members)
    starts = skip + seen + apart * (1 + np.arange(num_starts))
    return {
        "mcmc": mcmc,
        "clock": clock,
        "draws": samples,
        "seen": train,
        "later": (x[skip + seen :], u[skip + seen :]),
        "scores": forecasts(models, x, starts, ahead),
        "climate": climates(models, x[skip:], long // 4),
    }


def main() -> None:
    """Learn, forecast, run on; print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the script")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    sizes = (40, 2, 4, 20, 10, 300) if options.quick else (500, 20, 40, 100, 150, 8000)
    found = experiment(*sizes)
    tell(found["draws"], found["mcmc"], found["clock"])
    later, ahead = found["later"], sizes[3]
    inside, off = against_the_unseen(found["draws"], found["climate"]["learned"], *later)
    print(f"U of a run never seen: {inside:.3f} of it in the band with deviations")
    print(f"its mean in bins of X: f off by {off[0]:.2f}, U in the learned climate by {off[1]:.2f}")
    print(f"full system: mean {later[0].mean():.2f}, sd {later[0].std():.2f}")
    best = found["scores"]["quartic, noise"]["crps"]
    for name, row in found["scores"].items():
        values = found["climate"][name][0]
        print(f"{name}: climate mean {values.mean():.2f}, sd {values.std():.2f}")
        for lead in (ahead // 2, ahead):
            more = (row["crps"] - best)[:, lead]
            error = more.std(ddof=1) / np.sqrt(len(more))
            print(
                f"  lead {SEEN * lead:.1f}: CRPS {row['crps'][:, lead].mean():.2f}, beside the "
                f"quartic with noise {more.mean():+.2f} +- {error:.2f}; 90 per cent intervals "
                f"hold {row['held'][lead]:.2f}"
            )
    draw(options.output, found["draws"], *later, found["scores"], found["climate"], later[0])


if __name__ == "__main__":
    nsde.configure_cpu()
    main()
