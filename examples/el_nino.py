"""How long does a warm anomaly last? Sea-surface temperature off Peru, month by month.

Thirty years of the El Nino 1+2 region as a yearly wave and an anomaly that fades, an
Ornstein-Uhlenbeck process. Kalman integrates it out, and the last year is forecast and scored.

:title: Sea-surface temperature
:problem: a seasonal series and its forecast
:field: climate
:engine: NUTS, path integrated out by Kalman
:data: real, 360 months
:tags: season, forecast, linear
:page: forecasting.md
:run time: 89 s
"""

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
from numpyro_sde.diagnostics import score

mpl.use("Agg")
import matplotlib.pyplot as plt


def sea(times, y=None):
    """A yearly wave, and an anomaly that fades."""
    wave = numpyro.sample("wave", dist.Normal(jnp.array([23.0, 0.0, 0.0]), 3.0).to_event(1))
    rate = numpyro.sample("rate", dist.LogNormal(0.5, 0.7))  # 1/year
    scale = numpyro.sample("scale", dist.LogNormal(0.5, 0.7))
    noise = numpyro.sample("noise", dist.LogNormal(-1.5, 0.5))
    ou = nsde.processes.OrnsteinUhlenbeck(rate, 0.0, scale)
    start = dist.Normal(0.0, scale / jnp.sqrt(2.0 * rate))
    x = numpyro.sample("x", nsde.SDEPath(ou, times, init=start))

    def thermometer(t, x, p):
        angle = 2.0 * jnp.pi * t
        season = p["wave"][0] + p["wave"][1] * jnp.cos(angle) + p["wave"][2] * jnp.sin(angle)
        return dist.Normal(season + x, p["noise"])

    params = {"wave": wave, "noise": noise}
    nsde.observe("y", x, thermometer, params=params, event_dims={"wave": 1, "noise": 0}, obs=y)


def main(output: Path, quick: bool) -> None:
    """Fit the years 1980 to 2009, forecast the year after."""
    data = nsde.datasets.load_elnino_sst()
    kept = data.times >= (2008.0 if quick else 1980.0)
    times, y = data.times[kept] - 2000.0, data.temperature[kept]
    seen = len(times) - 12
    marginal = nsde.handlers.marginalize(sea, method=nsde.filters.Kalman())
    draws = 20 if quick else 200
    mcmc = MCMC(NUTS(marginal), num_warmup=draws, num_samples=draws, progress_bar=False)
    mcmc.run(jax.random.key(0), times[:seen], y[:seen])
    samples = mcmc.get_samples()
    half = np.log(2.0) / np.asarray(samples["rate"]) * 12.0
    print(f"an anomaly halves in {half.mean():.1f} +- {half.std():.1f} months")
    ahead = nsde.forecast(mcmc, times[seen:], rng_key=jax.random.key(1))
    print(score(ahead, {"y": y[seen:]}))
    low, high = np.quantile(np.asarray(ahead["y"]), [0.05, 0.95], axis=0)
    figure, axis = plt.subplots(figsize=(8.0, 3.2), layout="constrained")
    shown = slice(max(0, seen - 72), None)
    axis.plot(times[shown] + 2000.0, y[shown], "k.-", linewidth=0.5, markersize=3)
    axis.fill_between(times[seen:] + 2000.0, low, high, alpha=0.4, label="forecast, 90 %")
    axis.set(xlabel="year", ylabel="sea surface, degrees Celsius")
    axis.legend(frameon=False)
    figure.savefig(output / "el_nino.png", dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the script")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    nsde.configure_cpu()
    main(options.output, options.quick)
