"""Weights of a learned drift: integrated out, or sampled by NUTS; effective draws a second.

Double well `4 (x - x^3)`, 2,000 and 20,000 points, `dt = 0.02`, 24 sines, amplitude and length
inferred, one chain. CPU seconds of the first 500 + 500 draws with compilation, and of a draw after.
"""

import time

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS

import numpyro_sde as nsde

MORE = 4500
PRIOR = nsde.fields.HSGP(dim=1, box=2.5, num=24)


def well(t, x):
    return 4.0 * (x - x**3)


def model(x):
    f = PRIOR.register("f", amplitude=dist.HalfNormal(10.0), length=dist.InverseGamma(5.0, 5.0))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    sde = nsde.SDE(lambda t, x, p: p["f"](x), lambda t, x, p: p["s"], params={"f": f, "s": scale})
    numpyro.sample("x", nsde.SDEPath(sde, np.arange(len(x)) * 0.02, init=float(x[0])), obs=x)


def run(name, model, x):
    """CPU seconds to 500 + 500 draws, compilation included, and for each draw after that."""
    seconds = []
    for num_samples in (500, 500, MORE):  # the first with everything that is compiled once
        mcmc = MCMC(NUTS(model), num_warmup=500, num_samples=num_samples, progress_bar=False)
        began = time.process_time()
        mcmc.run(jax.random.key(1), x, extra_fields=("num_steps", "diverging"))
        jax.block_until_ready(mcmc.get_samples())
        seconds.append(time.process_time() - began)
        if len(seconds) == 1:
            first = mcmc
    samples, extra = mcmc.get_samples(), mcmc.get_extra_fields()
    ess = {
        site: float(effective_sample_size(np.asarray(samples[site])[None]))
        for site in ("f/amplitude", "f/length", "scale")
    }
    each = (seconds[2] - seconds[1]) / (MORE - 500)
    steps, diverging = (float(np.mean(extra[k])) for k in ("num_steps", "diverging"))
    print(f"{name:<10} first 500 + 500 draws {seconds[0]:.1f} s, then {1e3 * each:.2f} ms a draw")
    print(f"  {steps:.0f} steps a draw, {500 * diverging:.1f} divergences in 500")
    for site, value in ess.items():
        mean, sd = np.mean(samples[site]), np.std(samples[site])
        error = sd / np.sqrt(value)
        print(f"  {site}: {mean:.3f} +- {sd:.3f} (error {error:.3f}), {value / MORE:.2f} a draw")
    early = np.asarray(first.get_samples()["f/amplitude"])
    first_ess = float(effective_sample_size(early[None]))
    return ess["f/amplitude"] / (MORE * each), first_ess / seconds[0]


def main():
    nsde.configure_cpu()
    steps = 200_000
    path = nsde.SDEPath(nsde.SDE(well, lambda t, x: 1.0), np.arange(steps + 1) * 0.002, init=1.0)
    every = np.array(path.sample(jax.random.key(0)))[::10]
    assert np.abs(every).max() < 2.5
    for num in (2_000, 20_000):
        print(f"{num} points")
        x = every[: num + 1]
        ours = run("collapsed", nsde.handlers.collapse(model, "f"), x)
        theirs = run("weights", model, x)
        ratio, first = ours[0] / theirs[0], ours[1] / theirs[1]
        print(
            f"effective draws of the amplitude a CPU second: {ratio:.1f} times while sampling, "
            f"{first:.1f} times in the first run with its compilation"
        )


if __name__ == "__main__":
    main()
