"""Hares and lynx: one SDE by three engines, and what its forecast is worth beside the ODE's.

Pelts of the Hudson's Bay Company. The eleven years to 1910 are fitted, the ten after them are
forecast and held out. The SDE is fitted by SplitNUTS on the guided path, by particle marginal
Metropolis-Hastings and by a variational guide of parameters and path, which share the model and
nothing else; the ODE is the same model with its system noise held at zero.
Run: python examples/hare_lynx.py [--quick] [--output folder]

:title: Hares and lynx
:problem: two species that eat each other, and a forecast
:field: ecology
:engine: SplitNUTS on the guided path, PMMH, a path guide
:data: real, 21 years
:tags: forecast, nonlinear, vector state, SDE against ODE
:run time: 5 minutes of processor time
:page: sde_vs_ode.md
:picture: hare_lynx.png
"""

# ruff: noqa: ARG001, ARG005
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
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO, init_to_value

import numpyro_sde as nsde
from numpyro_sde.diagnostics import SVIFit, plot_paths, score

mpl.use("Agg")
import matplotlib.pyplot as plt

DATA = nsde.datasets.load_hare_lynx()
YEARS, LOGS = DATA.times - 1900.0, np.log(DATA.pelts)
SEEN = 11
QUIETLY = {"chain_method": "sequential", "progress_bar": False}
START = {
    "birth": 0.55,
    "predation": 0.028,
    "growth": 0.024,
    "death": 0.8,
    "scale": 0.2,
    "noise": 0.2,
}


def drift(t, x, p):
    """Rates of the logs of hares and lynx."""
    hares, lynx = jnp.exp(x[0]), jnp.exp(x[1])
    return jnp.stack([p["birth"] - p["predation"] * lynx, p["growth"] * hares - p["death"]])


def pelts(y=None):
    """Predator and prey with system noise on their logs; logs of pelts with measurement noise."""
    p = {
        "birth": numpyro.sample("birth", dist.LogNormal(-0.6, 0.5)),
        "predation": numpyro.sample("predation", dist.LogNormal(-3.5, 0.5)),
        "growth": numpyro.sample("growth", dist.LogNormal(-3.5, 0.5)),
        "death": numpyro.sample("death", dist.LogNormal(-0.2, 0.5)),
        "scale": numpyro.sample("scale", dist.HalfNormal(0.5)),
    }
    noise = numpyro.sample("noise", dist.LogNormal(-1.5, 0.5))
    sde = nsde.SDE(drift, lambda t, x, p: p["scale"], params=p)
    grid = nsde.TimeGrid(YEARS[:SEEN], max_step=0.2)
    init = dist.Normal(jnp.log(jnp.array([30.0, 5.0])), 0.5).to_event(1)
    x = numpyro.sample("x", nsde.SDEPath(sde, grid, init))
    nsde.observe(
        "y", x, lambda t, x, s: dist.Normal(x, s).to_event(1), params=noise, obs=y, at=grid.index
    )


def by_guided_nuts(y, quick):
    """SplitNUTS along the guided path."""
    guided = numpyro.handlers.reparam(pelts, config={"x": nsde.reparam.GuidedReparam(follow=1)})
    warmup, draws = (20, 20) if quick else (500, 1_000)
    kernel = nsde.infer.SplitNUTS(guided)
    mcmc = MCMC(kernel, num_warmup=warmup, num_samples=draws, num_chains=2, **QUIETLY)
    mcmc.run(jax.random.key(0), y, extra_fields=("diverging", "num_steps"))
    return mcmc


def by_particles(y, quick):
    """Random-walk Metropolis on the likelihood that guided particles estimate."""
    warmup, draws = (20, 20) if quick else (1_000, 6_000)
    kernel = nsde.infer.PMMH(pelts, num_particles=50, proposal="guided")
    mcmc = MCMC(kernel, num_warmup=warmup, num_samples=draws, num_chains=2, **QUIETLY)
    mcmc.run(jax.random.key(1), y)
    return mcmc


def by_guide(y, quick):
    """A flow of the parameters, and a controlled path given them."""
    guide = nsde.guides.AutoPathGuide(pelts, path=nsde.guides.ControlledPath())
    svi = SVI(pelts, guide, numpyro.optim.ClippedAdam(5e-3), Trace_ELBO(num_particles=8))
    result = svi.run(jax.random.key(2), 20 if quick else 3_000, y, progress_bar=False)
    return SVIFit(svi, result, model_args=(y,))


def by_nuts_of_the_ode(y, quick):
    """The same model without system noise: its path has no randomness to be drawn."""
    ode = numpyro.handlers.do(pelts, data={"scale": 1e-6})
    marginal = nsde.handlers.marginalize(ode, method=nsde.filters.ExtendedKalman())
    start = {name: value for name, value in START.items() if name != "scale"}
    kernel = NUTS(marginal, init_strategy=init_to_value(values=start))
    warmup, draws = (20, 20) if quick else (300, 500)
    mcmc = MCMC(kernel, num_warmup=warmup, num_samples=draws, num_chains=2, **QUIETLY)
    mcmc.run(jax.random.key(3), y, extra_fields=("diverging", "num_steps"))
    return mcmc


ENGINES = {
    "guided NUTS": by_guided_nuts,
    "PMMH": by_particles,
    "path guide": by_guide,
    "ODE": by_nuts_of_the_ode,
}


def draws_of(fit, y):
    """Draws of the parameters `(chain, draw)` by name."""
    if isinstance(fit, MCMC):
        drawn = fit.get_samples(group_by_chain=True)
        return {name: np.asarray(drawn[name]) for name in START if name in drawn}
    key, size = jax.random.key(4), (2_000,)
    drawn = fit.svi.guide.sample_posterior(key, fit.result.params, y, sample_shape=size)
    return {name: np.asarray(drawn[name])[None] for name in START}


def report(name, fit, y):
    """Means and standard deviations with their Monte Carlo errors; the table of the summary."""
    drawn = draws_of(fit, y)
    if name == "ODE":
        del drawn["scale"]  # held at zero: what is drawn is its prior
    table = summary(drawn)
    for key, row in table.items():
        error = row["std"] / np.sqrt(row["n_eff"])
        print(
            f"  {key:9} {row['mean']:7.4f} ({error:.4f}) sd {row['std']:.4f} "
            f"ESS {row['n_eff']:5.0f} R-hat {row['r_hat']:.3f}"
        )
    if isinstance(fit, MCMC) and "diverging" in fit.get_extra_fields():
        fields = fit.get_extra_fields()
        print(
            f"  {int(fields['diverging'].sum())} divergences, "
            f"{float(fields['num_steps'].mean()):.0f} steps a draw"
        )
    return table


def compare(tables):
    """How far the engines of the SDE are from the first, in Monte Carlo errors and in s.d."""
    first, *others = (name for name in tables if name != "ODE")
    for other in others:
        for key, row in tables[first].items():
            second = tables[other][key]
            error = np.hypot(*(r["std"] / np.sqrt(r["n_eff"]) for r in (row, second)))
            away = second["mean"] - row["mean"]
            wider = second["std"] / row["std"]
            print(
                f"{other} less {first}, {key:9}: {away / error:+5.1f} Monte Carlo errors, "
                f"{away / row['std']:+.2f} standard deviations; s.d. {wider:.2f}"
            )


def draw(forecasts, path):
    """Bands of the pelts to come, SDE by three engines and ODE, and what came."""
    figure, axes = plt.subplots(
        2, len(forecasts), figsize=(15.0, 6.0), sharex=True, sharey="row", layout="constrained"
    )
    for column, (name, ahead) in zip(axes.T, forecasts.items(), strict=True):
        for k, (axis, animal) in enumerate(zip(column, ("hares", "lynx"), strict=True)):
            plot_paths(
                {"y": np.exp(np.asarray(ahead["y"])[..., k])},
                "y",
                times=DATA.times[SEEN:],
                ax=axis,
                intervals=(0.5, 0.9),
            )
            axis.plot(DATA.times, DATA.pelts[:, k], "k.-", markersize=4, linewidth=0.6)
            axis.axvline(DATA.times[SEEN - 1], color="grey", linewidth=0.6)
            axis.set(ylim=(0.0, 130.0), title=name if k == 0 else "", xlabel="")
            axis.set_ylabel(f"{animal}, thousand pelts" if name == "guided NUTS" else "")
            if axis.get_legend() is not None:
                axis.get_legend().remove()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Fit by each engine, forecast ten years, score them and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("hare_lynx_output"), help="a folder")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the script")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    y, later = LOGS[:SEEN], LOGS[SEEN:]
    tables, forecasts = {}, {}
    for number, (name, engine) in enumerate(ENGINES.items()):
        clocks = time.perf_counter(), time.process_time()
        fit = engine(y, options.quick)
        seconds, cpu = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
        print(f"{name}: {seconds:.0f} s, {cpu:.0f} s of processor time, compilation included")
        tables[name] = report(name, fit, y)
        forecasts[name] = nsde.forecast(
            fit, YEARS[SEEN:], max_step=0.2, rng_key=jax.random.key(10 + number)
        )
        found = score(forecasts[name], {"y": later}).table()
        print(found[["crps", "cover_50", "cover_90"]].round(3).to_dict("records"), flush=True)
    compare(tables)
    draw(forecasts, options.output / "hare_lynx.png")
    print(f"wrote {options.output / 'hare_lynx.png'}")


if __name__ == "__main__":
    numpyro.enable_x64()
    nsde.configure_cpu()
    main()
