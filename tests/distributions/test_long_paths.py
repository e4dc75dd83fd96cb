"""A path of a million steps fits in memory, and its density is a few passes over it."""

import subprocess
import sys
from pathlib import Path

import pytest

MEMORY = """
import jax, jax.numpy as jnp, numpy as np, numpyro.distributions as dist
import numpyro_sde as nsde
{x64}
times = 0.01 * np.arange(1_000_001)
def density(params, path):
    sde = nsde.SDE(
        lambda t, x, p: -p["rate"] * x, lambda t, x, p: p["scale"], params=params)
    return nsde.SDEPath(sde, times, dist.Normal(0.0, 1.0)).log_prob(path)
gradient = jax.jit(jax.value_and_grad(density, (0, 1)))
value, _ = gradient(dict(rate=1.0, scale=0.5), jnp.zeros(1_000_001))
jax.block_until_ready(value)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(float(value), int(status["VmHWM"].split()[0]) / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "x64", ["", pytest.param('jax.config.update("jax_enable_x64", True)', marks=pytest.mark.slow)]
)
def test_a_million_steps_fit_in_two_gigabytes(x64):
    """Peak memory of a fresh process: imports, compilation, log density and gradient.

    Read from /proc, as `getrusage` counts the peak of the process that started this one.
    """
    done = subprocess.run(
        [sys.executable, "-c", MEMORY.format(x64=x64)], capture_output=True, text=True, check=True
    )
    value, gibibytes = map(float, done.stdout.split()[-2:])
    # -N log(scale sqrt(dt)) - (N + 1) / 2 log(2 pi) at the zero path: N log(20) minus a constant
    assert value == pytest.approx(1_000_000 * 2.99573227 - 1_000_001 * 0.91893853, rel=1e-4)
    assert gibibytes < 2.0
