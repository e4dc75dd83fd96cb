"""Weather without its eddies: a stochastic closure of the Lorenz '96 system with two scales.

Eight slow variables around a circle of latitude, each with thirty-two fast ones that no forecast
can afford. What the fast ones do to a slow one, U, is a noisy function of it with a memory: an
Ornstein-Uhlenbeck process around a cubic of the slow variable. Its parameters are learned by NUTS
from a run of the full system; forecasts without the fast variables, with and without the noise of
U, are scored against the full system, by the error of the mean, the spread and the CRPS.
Lorenz (1996); Wilks (2005), Q. J. R. Meteorol. Soc. 131; Arnold, Moroz and Palmer (2013), Phil.
Trans. R. Soc. A 371.

:title: Weather without its eddies
:problem: a forecast that cannot resolve the small scales
:field: physics
:engine: NUTS, exact steps of a path observed with its input
:data: simulated, the full system
:tags: turbulence closure, multiscale, inputs, panel, forecast
:page: multiscale.md
:run time: 22 s of processor time
"""

# ruff: noqa: ARG001, ARG005
# Functions of one protocol share its arguments, used or not.

from __future__ import annotations

import argparse
from functools import partial
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

SLOW, FAST, FORCING, SPEED, RATIO = 8, 32, 20.0, 10.0, 10.0  # K, J, F, c, b of Lorenz; h = 1
STEP, SEEN = 0.001, 0.04  # of the full run, and between the times that are kept


def advection(x):
    """What the slow variables do to each other, forced and damped."""
    return jnp.roll(x, 1) * (jnp.roll(x, -1) - jnp.roll(x, 2)) - x + FORCING


def eddies(y):
    """What the fast variables do to the slow ones: minus U."""
    return -(SPEED / RATIO) * y.reshape(SLOW, FAST).sum(axis=-1)


def both(state):
    """Velocity of the full system."""
    x, y = state
    own = SPEED * RATIO * jnp.roll(y, -1) * (jnp.roll(y, 1) - jnp.roll(y, -2)) - SPEED * y
    return advection(x) + eddies(y), own + (SPEED / RATIO) * jnp.repeat(x, FAST)


@partial(jax.jit, static_argnums=1)
def full_run(state, num):
    """Slow variables and U at `num` times, by Runge-Kutta steps of the full system."""

    def step(s, _):
        def shifted(k, size):
            return jax.tree.map(lambda a, b: a + size * STEP * b, s, k)

        k1 = both(s)
        k2 = both(shifted(k1, 0.5))
        k3 = both(shifted(k2, 0.5))
        k4 = both(shifted(k3, 1.0))
        move = jax.tree.map(lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6.0, k1, k2, k3, k4)
        return jax.tree.map(lambda a, b: a + STEP * b, s, move), None

    def keep(s, _):
        s, _ = jax.lax.scan(step, s, None, round(SEEN / STEP))
        return s, (s[0], -eddies(s[1]))

    return jax.lax.scan(keep, state, None, num)[1]


def middle(x, p):
    """U on average, given the slow variable: a cubic."""
    z = x / 10.0
    return p["b0"] + z * (p["b1"] + z * (p["b2"] + z * p["b3"]))


def closure(times, x, u=None):
    """U of each slow variable, which is its input; both are known from the full run."""
    p = {name: numpyro.sample(name, dist.Normal(0.0, 10.0)) for name in ("b0", "b1", "b2", "b3")}
    p["rate"] = numpyro.sample("rate", dist.LogNormal(1.0, 1.0))
    p["scale"] = numpyro.sample("scale", dist.LogNormal(1.0, 1.0))
    start = dist.Delta(jnp.zeros(SLOW) if u is None else u[:, 0])
    with numpyro.plate("place", SLOW):
        sde = nsde.SDE(
            lambda t, u, p, seen: p["rate"] * (middle(seen["x"], p) - u),
            lambda t, u, p, seen: p["scale"],
            params=p,
            inputs={"x": nsde.Input(times, x, order="linear")},
        )
        path = nsde.SDEPath(sde, times, init=start, scheme=nsde.schemes.LocalLinear())
        numpyro.sample("u", path, obs=u)


def closed(p):
    """The slow variables with U in place of the fast ones; sixteen states."""

    def drift(t, s, p):
        x, u = s[:SLOW], s[SLOW:]
        return jnp.concatenate([advection(x) - u, p["rate"] * (middle(x, p) - u)])

    def diffusion(t, s, p):
        return p["scale"] * jnp.repeat(jnp.array([0.0, 1.0]), SLOW)

    return nsde.SDE(drift, diffusion, params=p)


def forecasts(p, starts, leads, members):
    """Ensembles from each start, `(start, member, lead, slow)`."""
    grid = nsde.TimeGrid(leads, 0.002)

    @jax.jit
    def run(p, start, key):
        path = nsde.SDEPath(closed(p), grid, init=start, scheme=nsde.schemes.Euler())
        return path.sample(key, (members,))[:, grid.index, :SLOW]

    keys = jax.random.split(jax.random.key(2), len(starts))
    return np.stack([np.asarray(run(p, s, k)) for s, k in zip(starts, keys, strict=True)])


def scores(ensemble, truth):
    """Error of the mean, spread, and CRPS at each lead."""
    mean, spread = ensemble.mean(axis=1), ensemble.std(axis=1, ddof=1)
    error = np.sqrt(((mean - truth) ** 2).mean(axis=(0, 2)))
    apart = np.abs(ensemble - truth[:, None]).mean(axis=1)
    ordered, number = np.sort(ensemble, axis=1), ensemble.shape[1]
    weights = 2.0 * np.arange(1, number + 1) - number - 1.0
    within = np.tensordot(weights, ordered, axes=(0, 1)) / (number * (number - 1))
    return error, np.sqrt((spread**2).mean(axis=(0, 2))), (apart - within).mean(axis=(0, 2))


def draw(output, x, u, p, leads, found):
    """U against the slow variable with the learned cubic; scores over the lead."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    left.plot(x.ravel(), u.ravel(), ".", markersize=1.5, color="0.6")
    line = np.linspace(x.min(), x.max(), 200)
    spread = p["scale"] / np.sqrt(2.0 * p["rate"])
    left.plot(line, middle(line, p), color="C3")
    left.fill_between(
        line,
        middle(line, p) - 1.64 * spread,
        middle(line, p) + 1.64 * spread,
        color="C3",
        alpha=0.2,
    )
    left.set(xlabel="slow variable", ylabel="U, what the fast ones do to it")
    for (name, (error, spread, _)), color in zip(found.items(), ("C1", "C0"), strict=True):
        right.plot(leads, error, color=color, label=f"{name}: error")
        right.plot(leads, spread, "--", color=color, label=f"{name}: spread")
    right.set(xlabel="lead (one is about five days)", ylabel="root mean square")
    right.legend(frameon=False, fontsize="small")
    figure.savefig(output / "turbulence_closure.png", dpi=100)


def main(output: Path, quick: bool) -> None:
    """Run the full system, learn U, forecast."""
    seen, number, members = (60, 3, 5) if quick else (500, 20, 40)
    ahead = 10 if quick else 50
    rng = np.random.default_rng(0)
    start = (jnp.asarray(rng.normal(size=SLOW)), jnp.asarray(0.1 * rng.normal(size=SLOW * FAST)))
    skip, apart = 100, 75
    x, u = map(np.asarray, full_run(start, skip + seen + number * apart + ahead))
    times = SEEN * np.arange(seen)
    train = slice(skip, skip + seen)
    draws = 20 if quick else 300
    mcmc = MCMC(NUTS(closure), num_warmup=draws, num_samples=draws, progress_bar=False)
    mcmc.run(jax.random.key(0), times, x[train].T, u[train].T)
    samples = {name: np.asarray(value) for name, value in mcmc.get_samples().items()}
    for name, value in samples.items():
        print(f"{name:5} {value.mean():7.3f} +- {value.std():.3f}")
    p = {name: jnp.asarray(value.mean()) for name, value in samples.items()}
    leads = SEEN * np.arange(ahead + 1)
    rows = skip + seen + apart * np.arange(number)
    truth = np.stack([x[row : row + ahead + 1] for row in rows])
    starts = [jnp.concatenate([x[row], u[row]]) for row in rows]
    found = {}
    for name, q in {"cubic alone": {**p, "scale": 0.0 * p["scale"]}, "with noise": p}.items():
        found[name] = scores(forecasts(q, starts, leads, members), truth)
        for lead in (ahead // 2, ahead):
            error, spread, crps = (row[lead] for row in found[name])
            print(
                f"{name:12} lead {leads[lead]:.1f}: error {error:.2f}, spread {spread:.2f}, "
                f"CRPS {crps:.2f}"
            )
    draw(output, x[train], u[train], {k: float(v) for k, v in p.items()}, leads, found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the script")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    nsde.configure_cpu()
    main(options.output, options.quick)
