"""Chains on several devices at once: the search before them runs on one."""

import os
import subprocess
import sys
from pathlib import Path

import numpyro_sde as nsde

CODE = """
import numpyro, numpyro.distributions as dist
numpyro.set_host_device_count(2)
import jax, numpy as np, numpyro_sde as nsde

def model(times, y=None):
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
    sde = nsde.SDE(lambda t, x, p: -p * x, lambda t, x, p: 0.5, params=rate)
    x = numpyro.sample("x", nsde.SDEPath(sde, times, dist.Normal(0.0, 1.0)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)

guided = numpyro.handlers.reparam(model, config={"x": nsde.reparam.GuidedReparam()})
kernel = nsde.infer.SplitNUTS(guided)
mcmc = numpyro.infer.MCMC(kernel, num_warmup=5, num_samples=5, num_chains=2, progress_bar=False)
mcmc.run(jax.random.key(0), np.arange(6) * 0.2, np.sin(np.arange(6.0)))
rates = np.asarray(mcmc.get_samples(group_by_chain=True)["rate"])
print(jax.device_count(), rates.shape, bool(np.isfinite(rates).all()))
"""


def test_guided_paths_take_parallel_chains():
    root = str(Path(nsde.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.stdout.strip() == "2 (2, 5) True", done.stderr[-2000:]
