"""Three real data sets, fitted and compared: a river's level, an interest rate, a volatility.

    python examples/demo.py --output demo_output

1. The annual flow of the Nile, 1871 to 1970, as noisy measurements of a level that no one saw:
   an Ornstein-Uhlenbeck path is latent. Fitted by NUTS on the guided path, by a normalizing flow
   over the whole path (SVI), and by a flow over the parameters alone, the path integrated out.
2. The three-month interest rate of the United States, 1959 to 2009, observed as it is: a
   Cox-Ingersoll-Ross diffusion, fitted with its exact transition density and with Euler's.
3. Monthly changes of the one-year Treasury yield, 1953 to 1999: their volatility is a latent path
   that enters the data through their variance alone. Three engines fit one model: NUTS on the
   guided path, SVI with a flow over the parameters and a controlled path, and particle Gibbs.

Everything runs in float32, JAX's default: a data set of some hundred points does not need more.
Call `numpyro.enable_x64()` first where yours does. All random seeds are fixed.

:title: Three real data sets
:problem: a river, a rate and a volatility: fits compared
:field: climate
:engine: NUTS, SVI with flows, particle Gibbs
:data: real
:tags: comparing fits, flows, particles
:page: first_model.md
:picture: nile_level.png
:run time: 3 minutes
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl

mpl.use("Agg")  # pictures go to files

import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO

import numpyro_sde as nsde
from numpyro_sde.diagnostics import SVIFit, compare_fits, plot_fits, plot_paths, timed, to_arviz

START = time.perf_counter()


class Sizes(NamedTuple):
    """How long to run."""

    warmup: int = 500
    draws: int = 1000
    svi_steps: int = 4000
    svi_particles: int = 32
    svi_draws: int = 4000
    path_steps: int = 2500
    path_particles: int = 16
    sweeps: int = 4000


CHAINS = 2  # in parallel, a device each
QUICK = Sizes(
    warmup=200,
    draws=100,
    svi_steps=20,
    svi_particles=2,
    svi_draws=100,
    path_steps=20,
    path_particles=2,
    sweeps=40,
)


def say(message: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"[{time.perf_counter() - START:5.0f} s] {message}", flush=True)


def run_nuts(kernel, data, sizes: Sizes, seed: int):
    """Run NUTS; return it with its timing."""
    say(f"NUTS, {CHAINS} chains of {sizes.warmup} + {sizes.draws} steps ...")
    mcmc = MCMC(
        kernel,
        num_warmup=sizes.warmup,
        num_samples=sizes.draws,
        num_chains=CHAINS,
        progress_bar=False,
    )
    _, timing = timed(mcmc.run, jax.random.key(seed), *data)
    return mcmc, timing


def run_svi(model, guide, data, sizes: Sizes, peak: float):
    """Train a guide with step sizes that rise to a peak and fall to zero."""
    steps = sizes.svi_steps

    def step_size(step):
        done = step / steps
        return peak * jnp.minimum(10.0 * done, 0.5 + 0.5 * jnp.cos(jnp.pi * done))

    say(f"SVI with a flow, {steps} steps of {sizes.svi_particles} draws ...")
    adam = numpyro.optim.ClippedAdam(step_size, clip_norm=10.0)
    svi = SVI(model, guide, adam, Trace_ELBO(num_particles=sizes.svi_particles))
    result, timing = timed(svi.run, jax.random.key(1), steps, *data, progress_bar=False)
    return SVIFit(svi, result, data, timing=timing)


# --- 1. A latent path: the level of the Nile ------------------------------------------------


def nile_model(times, flow=None):
    """Noisy yearly flow (1e10 m^3) around a level that wanders and returns to its mean."""
    rate = numpyro.sample("rate", dist.LogNormal(jnp.log(0.1), 0.7))  # 1/year
    mean = numpyro.sample("mean", dist.Normal(9.0, 1.0))  # 1e10 m^3/year
    scale = numpyro.sample("scale", dist.LogNormal(jnp.log(0.5), 0.7))  # and per root year
    noise = numpyro.sample("noise", dist.LogNormal(0.0, 0.5))  # 1e10 m^3/year
    sde = nsde.processes.OrnsteinUhlenbeck(rate, mean, scale)
    stationary = dist.Normal(mean, scale / jnp.sqrt(2.0 * rate))
    x = numpyro.sample("level", nsde.SDEPath(sde, times, init=stationary))
    nsde.observe("flow", x, lambda t, x, sd: dist.Normal(x, sd), params=noise, obs=flow)  # noqa: ARG005


def fit_nile(sizes: Sizes):
    """Fit the same model three times."""
    nile = nsde.datasets.load_nile_flow()
    data = (nile.times, nile.flow / 100.0)
    guided = numpyro.handlers.reparam(nile_model, config={"level": nsde.reparam.GuidedReparam()})
    mcmc, timing = run_nuts(
        nsde.infer.SplitNUTS(guided, target_accept_prob=0.9), data, sizes, seed=0
    )
    fits = {"NUTS": to_arviz(mcmc, timing=timing)}

    # 104 dimensions, of which the guided path leaves little to learn but four: two layers do.
    guide = nsde.guides.AutoFlow(guided, num_flows=2)
    fit = run_svi(guided, guide, data, sizes._replace(svi_particles=sizes.path_particles), 1e-3)
    fits["flow"] = to_arviz(fit, num_samples=sizes.svi_draws)

    # This model is linear and Gaussian: a Kalman filter integrates the path out exactly, and
    # gives it back on request. The flow is then over the four parameters. Its log likelihood
    # is one step ahead, another quantity than that given the path, so it is left out here.
    integrated = nsde.handlers.marginalize(nile_model, method=nsde.filters.Kalman())
    guide = nsde.guides.AutoFlow(integrated, num_flows=4)
    fit = run_svi(integrated, guide, data, sizes, peak=3e-3)
    fits["flow_integrated"] = to_arviz(
        fit, num_samples=sizes.svi_draws, smooth=True, log_likelihood=False
    )
    return fits


def report_nile(fits, output: Path) -> None:
    """Print the comparison and draw it."""
    print(f"\n{compare_fits(fits)}\n")
    print(
        "khat: below 0.5 a variational fit is good, above 0.7 do not trust its parameters.\n"
        "Published, for a level that never returns (rate 0; Durbin and Koopman 2012, maximum\n"
        "likelihood): noise 1.228, scale 0.385.\n"
    )
    figure, axis = plt.subplots(figsize=(8.0, 4.0), layout="constrained")
    plot_paths(fits["NUTS"], "level", data="flow", ax=axis)
    axis.set(xlabel="year", ylabel="flow of the Nile, 1e10 m$^3$ a year")
    save(figure, output / "nile_level.png")
    axes = plot_fits(fits, ["rate", "mean", "scale", "noise"])
    save(axes[0].figure, output / "nile_parameters.png")


# --- 2. A path observed as it is: the interest rate -----------------------------------------

PUBLISHED = {"rate": 0.0397, "mean": 3.98, "scale": 0.6666}  # see nsde.datasets.load_us_tbill
PUBLISHED_LOG_LIKELIHOOD = -214.4892


def short_rate_model(times, r, scheme=None):
    """Cox-Ingersoll-Ross interest rate, per cent a year, given its first value."""
    rate = numpyro.sample("rate", dist.LogNormal(jnp.log(0.2), 1.0))  # 1/year
    mean = numpyro.sample("mean", dist.LogNormal(jnp.log(5.0), 0.5))  # per cent
    scale = numpyro.sample("scale", dist.LogNormal(jnp.log(0.7), 1.0))  # root per cent a year
    sde = nsde.processes.CoxIngersollRoss(rate, mean, scale)
    numpyro.sample("r", nsde.SDEPath(sde, times, init=r[0], scheme=scheme), obs=r)


def fit_short_rate(sizes: Sizes):
    """Fit by NUTS under two transition densities."""
    bill = nsde.datasets.load_us_tbill()
    schemes = {"exact": nsde.schemes.Exact(), "Euler": nsde.schemes.Euler()}
    report_likelihood(bill, schemes)
    fits = {}
    for name, scheme in schemes.items():
        print(f"   {name} transition density:")
        model = partial(short_rate_model, scheme=scheme)
        mcmc, timing = run_nuts(
            NUTS(model, target_accept_prob=0.9), (bill.times, bill.rate), sizes, seed=2
        )
        fits[name] = to_arviz(mcmc, timing=timing, posterior_predictive=500)
    return fits


def report_likelihood(bill, schemes) -> None:
    """Set the log likelihood at the published estimates beside the published one."""
    best = nsde.processes.CoxIngersollRoss(**PUBLISHED)
    terms = {
        name: nsde.SDEPath(best, bill.times, bill.rate[0], scheme=s).log_prob_pointwise(bill.rate)
        for name, s in schemes.items()
    }
    difference = np.asarray(terms["Euler"] - terms["exact"])
    first, second = np.argsort(-np.abs(difference))[:2]
    print(
        "   Log likelihood at the published maximum likelihood estimate: "
        f"{terms['exact'].sum():.2f} (published {PUBLISHED_LOG_LIKELIHOOD:.2f}).\n"
        f"   Euler's density makes it {difference.sum():.2f} more, "
        f"{difference[[first, second]].sum():.2f} of them by the steps to "
        f"{bill.times[first]} and {bill.times[second]}."
    )


def report_short_rate(fits, output: Path) -> None:
    """Print the comparison beside published estimates and draw it."""
    comparison = compare_fits(fits)
    print(f"\n{comparison}\n")
    print("Beside the published maximum likelihood estimates (exact transition density)")
    print(f"{'':12}{'published':>10}" + "".join(f"{name:>16}" for name in fits))
    for name, value in PUBLISHED.items():
        rows = [comparison.parameters.loc[(name, fit)] for fit in fits]
        cells = "".join(f"{row['mean']:>9.3f} ±{row['sd']:6.3f}" for row in rows)
        print(f"{name:12}{value:>10.4g}{cells}")
    print(
        "\nThe two laws differ: Euler's step underestimates the scale. That the data prefer it\n"
        "(elpd_diff) is due to two sudden falls, in 1980 and 2008, further than a square-root\n"
        "process goes in a quarter: a sign against this model rather than for Euler's step.\n"
    )
    figure, axis = plt.subplots(figsize=(8.0, 4.0), layout="constrained")
    plot_paths(
        fits["exact"], "r", group="posterior_predictive", data="r", ax=axis, label="prediction"
    )
    axis.set(xlabel="year", ylabel="3-month interest rate, per cent a year")
    save(figure, output / "rate_prediction.png")
    axes = plot_fits(fits, list(PUBLISHED))
    for axis, value in zip(axes, PUBLISHED.values(), strict=True):
        axis.axvline(value, color="black", linewidth=0.8, linestyle=":", label="published ML")
    axes[0].legend(frameon=False, fontsize="small")
    save(axes[0].figure, output / "rate_parameters.png")


# --- 3. A volatility that no one sees, by three engines ---------------------------------------


def volatility_model(times, change=None):
    """Changes of a log yield, per cent a month, of log variance v that returns to its mean."""
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))  # 1/year
    mean = numpyro.sample("mean", dist.Normal(3.0, 2.0))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.7))  # per root year
    ou = nsde.processes.OrnsteinUhlenbeck(rate, mean, scale)
    stationary = dist.Normal(mean, scale / jnp.sqrt(2.0 * rate))
    v = numpyro.sample("v", nsde.SDEPath(ou, times, stationary, scheme=nsde.schemes.Euler()))
    nsde.observe("change", v, lambda t, v: dist.Normal(0.0, jnp.exp(v / 2.0)), obs=change)  # noqa: ARG005


def fit_volatility(sizes: Sizes):
    """Fit one model by NUTS, by SVI and by particle Gibbs."""
    treasury = nsde.datasets.load_us_treasury()
    change = 100.0 * np.diff(np.log(treasury.yields[:, 0]))
    data = (treasury.times[1:], jnp.asarray(change - change.mean(), jnp.float32))
    guided = numpyro.handlers.reparam(volatility_model, config={"v": nsde.reparam.GuidedReparam()})
    mcmc, timing = run_nuts(nsde.infer.SplitNUTS(guided), data, sizes, seed=3)
    fits = {"NUTS": to_arviz(mcmc, timing=timing, times=data[0])}

    guide = nsde.guides.AutoPathGuide(volatility_model, path=nsde.guides.ControlledPath())
    sizes = sizes._replace(svi_steps=sizes.path_steps, svi_particles=4)
    fit = run_svi(volatility_model, guide, data, sizes, peak=5e-3)
    fits["SVI"] = to_arviz(fit, num_samples=sizes.svi_draws, times=data[0])

    say(f"particle Gibbs, {CHAINS} chains of {sizes.sweeps} sweeps of 64 particles ...")
    # Returns say little about a volatility: the model's own steps do, at two thirds of the cost of
    # guided ones.
    sampler = MCMC(
        nsde.infer.ParticleGibbs(volatility_model, num_particles=64, proposal="bootstrap"),
        num_warmup=sizes.warmup,
        num_samples=sizes.sweeps,
        num_chains=CHAINS,
        thinning=4,
        progress_bar=False,
    )
    _, timing = timed(sampler.run, jax.random.key(4), *data)
    fits["particle Gibbs"] = to_arviz(sampler, timing=timing, times=data[0])
    return fits


def report_volatility(fits, output: Path) -> None:
    """Print the comparison of the three engines and draw it."""
    print(f"\n{compare_fits(fits)}\n")
    print(
        "Three engines, one posterior: NUTS moves a guided path; particle Gibbs draws the path\n"
        "given the parameters and the parameters given the path, which ties them: few\n"
        "effective draws of rate and scale; SVI is narrower than the posterior, and its k-hat\n"
        "says so.\n"
    )
    figure, axis = plt.subplots(figsize=(8.0, 4.0), layout="constrained")
    for color, name in zip(("C0", "C1", "C2"), ("NUTS", "SVI", "particle Gibbs"), strict=True):
        sd = np.exp(np.asarray(fits[name]["posterior"]["v"]) / 2.0)
        sd = sd.reshape(-1, sd.shape[-1])
        times = np.asarray(fits[name]["posterior"]["v"].coords["time"])
        low, middle, high = np.quantile(sd, [0.05, 0.5, 0.95], axis=0)
        axis.fill_between(times, low, high, color=color, alpha=0.15, linewidth=0)
        axis.plot(times, middle, color=color, linewidth=1.0, label=name)
    axis.set(xlabel="year", ylabel="volatility of the one-year yield, % a month", yscale="log")
    axis.legend(frameon=False)
    save(figure, output / "volatility_paths.png")
    axes = plot_fits(fits, ["rate", "mean", "scale"])
    save(axes[0].figure, output / "volatility_parameters.png")


# --- Output -----------------------------------------------------------------------------------


def save(figure, path: Path) -> None:
    """Write a figure and close it."""
    figure.savefig(path, dpi=120)
    plt.close(figure)
    say(f"wrote {path}")


def save_fits(fits, prefix: str, output: Path) -> None:
    """Write every fit as netCDF; `arviz.from_netcdf` reads it."""
    for name, fit in fits.items():
        path = output / f"{prefix}_{name.lower().replace(' ', '_')}.nc"
        fit.to_netcdf(str(path))
        say(f"wrote {path}")


def main() -> None:
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="a folder")
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 3], choices=[1, 2, 3])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tests the script")
    arguments = parser.parse_args()
    # Both before JAX computes anything.
    nsde.configure_cpu()
    numpyro.set_host_device_count(CHAINS)
    sizes = QUICK if arguments.quick else Sizes()
    arguments.output.mkdir(parents=True, exist_ok=True)

    print(f"numpyro_sde {nsde.__version__}, JAX {jax.__version__} on {jax.default_backend()}")
    if 1 in arguments.parts:
        print("\n1. The Nile at Aswan, 1871 to 1970: a latent level, by NUTS and by a flow\n")
        fits = fit_nile(sizes)
        report_nile(fits, arguments.output)
        save_fits(fits, "nile", arguments.output)
    if 2 in arguments.parts:
        print("\n2. The US 3-month interest rate, 1959 to 2009: exact or Euler transitions\n")
        fits = fit_short_rate(sizes)
        report_short_rate(fits, arguments.output)
        save_fits(fits, "rate", arguments.output)
    if 3 in arguments.parts:
        print("\n3. The volatility of the US one-year yield, 1953 to 1999: three engines\n")
        fits = fit_volatility(sizes)
        report_volatility(fits, arguments.output)
        save_fits(fits, "volatility", arguments.output)

    print()
    say(f"done: pictures (png) and ArviZ results (nc) are in {arguments.output.resolve()}")


if __name__ == "__main__":
    main()
