"""Population kinetics: does the system need noise of its own, or will measurement noise do?

Two populations with random effects on absorption, clearance and volume, on clocks of their own:
twelve patients after one oral dose of theophylline (Boeckmann, Sheiner and Beal 1994), and 24
simulated ones with a dose every twelve hours, whose concentration has system noise. Both are
linear, so that `Kalman` integrates the paths out exactly. The ODE is the same model with its system
noise held at zero.
Run: python examples/population.py [--data theophylline repeated] [--quick]

:title: Twelve patients
:problem: concentrations after doses, patients that differ
:field: pharmacology
:engine: NUTS, paths integrated out by Kalman in a plate
:data: real, 12 patients; simulated, 24
:tags: panel, random effects, doses, SDE against ODE
:page: sde_vs_ode.md
:picture: theophylline.png
:run time: 29 s of processor time
"""

# ruff: noqa: ARG005
# Functions of one protocol share its arguments, used or not.

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.diagnostics import summary
from numpyro.infer import MCMC, NUTS, init_to_median

import numpyro_sde as nsde
from numpyro_sde.diagnostics import compare_models, plot_paths, residuals, to_arviz

mpl.use("Agg")
import matplotlib.pyplot as plt

EFFECTS = ("absorption", "clearance", "volume")


def kinetics(times, doses, y, means, size=None):
    """Absorption from the gut and elimination, with noise on the concentration.

    Args:
        times: hours of each patient's samples, `(patient, T)`.
        doses: their doses.
        y: concentrations, mg/l.
        means: prior means of the logs of the effects, and their standard deviation.
        size: log of weight over 70 kg, where volume and clearance grow with it.
    """
    centre, width = means
    mean = numpyro.sample("mean", dist.Normal(jnp.asarray(centre), width).to_event(1))
    spread = numpyro.sample("spread", dist.HalfNormal(0.5).expand([3]).to_event(1))
    system = numpyro.sample("system", dist.HalfNormal(1.0))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    size = jnp.zeros(len(y)) if size is None else size
    with numpyro.plate("patient", len(y)):
        each = {}
        for k, name in enumerate(EFFECTS):
            grown = mean[k] + (0.0 if name == "absorption" else size)
            each[name] = jnp.exp(numpyro.sample(name, dist.Normal(grown, spread[k])))
        sde = nsde.SDE(
            lambda t, x, p: jnp.stack(
                [-p["ka"] * x[0], p["ka"] * x[0] / p["volume"] - p["ke"] * x[1]]
            ),
            lambda t, x, p: jnp.stack([jnp.zeros(()), p["system"]]),
            params={
                "ka": each["absorption"],
                "ke": each["clearance"] / each["volume"],
                "volume": each["volume"],
                "system": system,
            },
        )
        grid = nsde.TimeGrid(times, include=doses.breakpoints)
        x = numpyro.sample("x", nsde.SDEPath(sde, grid, init=jnp.zeros(2), events=[doses]))
        nsde.observe(
            "y", x, lambda t, x, p: dist.Normal(x[1], p), params=noise, obs=y, at=grid.index
        )


def theophylline():
    """Arguments of the model for the twelve patients; doses in mg per kg."""
    data = nsde.datasets.load_theophylline()
    doses = nsde.doses(data.times[:, :1], data.dose[:, None])
    return (data.times, doses, data.concentration, ((0.5, -3.2, -0.8), 1.0))


def repeated():
    """Arguments of the model for 24 patients with a dose every twelve hours; doses in mg."""
    data = nsde.datasets.load_repeated_doses()
    count = len(data.weight)
    # Each clock begins with the first dose, where nothing was measured.
    times = np.concatenate([np.zeros((count, 1)), data.times], axis=1)
    y = np.concatenate([np.full((count, 1), np.nan), data.concentration], axis=1)
    doses = nsde.doses(data.dose_times, data.doses)
    return (times, doses, y, ((0.0, 1.0, 3.4), 0.4), np.log(data.weight / 70.0))


def fit(model, arguments, warmup, draws):
    """NUTS with the paths integrated out; seconds of wall clock and of processor time."""
    marginal = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())
    # From medians: elsewhere absorption and elimination may change roles, which fits as well.
    kernel = NUTS(marginal, dense_mass=[("mean",), ("spread",)], init_strategy=init_to_median)
    quietly = {"chain_method": "sequential", "progress_bar": False}
    mcmc = MCMC(kernel, num_warmup=warmup, num_samples=draws, num_chains=2, **quietly)
    clocks = time.perf_counter(), time.process_time()
    mcmc.run(jax.random.key(1), *arguments, extra_fields=("diverging", "num_steps"))
    jax.block_until_ready(mcmc.get_samples())
    return mcmc, time.perf_counter() - clocks[0], time.process_time() - clocks[1]


def report(name, mcmc, seconds, cpu):
    """Convergence of all parameters, and what the noises are."""
    table = summary(mcmc.get_samples(group_by_chain=True))
    worst = max(float(np.max(row["r_hat"])) for row in table.values())
    least = min(float(np.min(row["n_eff"])) for row in table.values())
    fields = mcmc.get_extra_fields()
    held = name.endswith("ODE")
    noises = {n: mcmc.get_samples()[n] for n in (("noise",) if held else ("system", "noise"))}
    text = ", ".join(f"{n} {v.mean():.3f} (sd {v.std():.3f})" for n, v in noises.items())
    print(
        f"{name}: {text}; R-hat {worst:.3f}, min ESS {least:.0f}, "
        f"{int(fields['diverging'].sum())} divergences, {float(fields['num_steps'].mean()):.0f} "
        f"steps a draw; {seconds:.0f} s, {cpu:.0f} s of processor time",
        flush=True,
    )


def curves(mcmc, arguments, num_draws, path):
    """Each patient's concentration in hours: bands of the curve, and the data."""
    times, y = arguments[0], arguments[2]
    power = 2.0 if len(arguments[1].times.shape) > 1 else 1.0  # after one dose, finer early
    drawn = {n: v[:: max(len(v) // num_draws, 1)] for n, v in mcmc.get_samples().items()}
    span = times[:, -1:] - times[:, :1]
    finer = times[:, :1] + span * np.linspace(0.0, 1.0, 81)[1:] ** power
    x = nsde.smooth(
        kinetics,
        drawn,
        *arguments,
        method=nsde.filters.Kalman(),
        rng_key=jax.random.key(2),
        times=finer,
    )["x"]
    shown = min(12, len(y))
    figure, axes = plt.subplots(3, 4, figsize=(13.0, 8.0), layout="constrained")
    for k, axis in enumerate(axes.ravel()[:shown]):
        plot_paths(
            {"x": np.asarray(x[:, k, :, 1])},
            times=finer[k],
            data=y[k],
            data_times=times[k],
            ax=axis,
            label="concentration",
        )
        axis.set(title=f"patient {k + 1}", xlabel="hours", ylabel="mg/l", ylim=(0.0, None))
        if axis.get_legend() is not None:
            axis.get_legend().remove()
    axes[0, 0].legend(fontsize="x-small", loc="upper right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Fit SDE and ODE to each population, compare them, draw every patient's curve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("population_output"), help="a folder")
    parser.add_argument("--data", nargs="+", default=["theophylline", "repeated"])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the script")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    warmup, draws = (20, 20) if options.quick else (400, 800)
    populations = {"theophylline": theophylline, "repeated": repeated}
    for name in options.data:
        arguments = populations[name]()
        fits = {}
        for kind in ("SDE", "ODE"):
            held = {} if kind == "SDE" else {"system": 0.0}
            model = numpyro.handlers.do(kinetics, data=held) if held else kinetics
            mcmc, *clocks = fit(model, arguments, warmup, draws)
            report(f"{name}, {kind}", mcmc, *clocks)
            fits[kind] = mcmc
        print(compare_models({kind: to_arviz(mcmc) for kind, mcmc in fits.items()}))
        for kind, mcmc in fits.items():
            found = residuals(mcmc, num_draws=20 if options.quick else 200)
            print(kind, found.table()[["sd", "acf_1", "serial"]].round(3).to_dict("records"))
        curves(fits["SDE"], arguments, 20 if options.quick else 200, options.output / f"{name}.png")
        print(f"wrote {options.output / f'{name}.png'}", flush=True)


if __name__ == "__main__":
    numpyro.enable_x64()
    nsde.configure_cpu()
    main()
