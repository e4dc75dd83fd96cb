"""The compilation cache: a second process compiles nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import numpyro_sde as nsde

# A kernel of NumPyro, which closes over the data.
NUTS = """
import jax, jax.numpy as jnp, numpy as np, numpyro, numpyro.distributions as dist
import numpyro_sde as nsde
from numpyro.infer import MCMC, NUTS
nsde.enable_compilation_cache({!r})
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
def model(times, y):
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
    sde = nsde.processes.OrnsteinUhlenbeck(rate, 0.0, 1.0)
    x = numpyro.sample("x", nsde.SDEPath(sde, times, dist.Normal(0.0, 1.0)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)
integrated = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())
y = np.random.default_rng({}).normal(size=30)
mcmc = MCMC(NUTS(integrated), num_warmup=5, num_samples=5, progress_bar=False)
mcmc.run(jax.random.key(0), np.arange(30.0), y)
print(events.count("/jax/compilation_cache/cache_misses"))
print(hash(np.asarray(mcmc.get_samples()["rate"]).tobytes()) % 1000)
"""

CODE = """
import jax, jax.numpy as jnp, numpyro_sde as nsde
jnp.ones(2) + 1.0  # the cache may be turned on late
nsde.enable_compilation_cache({!r})
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones(3)).block_until_ready()
print(hits.count("/jax/compilation_cache/cache_hits"),
      hits.count("/jax/compilation_cache/cache_misses"))
"""


def run(code):
    root = str(Path(nsde.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": root, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def test_second_process_finds_every_program(tmp_path):
    folder = str(tmp_path / "xla")
    hits, misses = run(CODE.format(folder))
    assert hits == 0
    assert misses > 0
    assert run(CODE.format(folder)) == [misses, 0]


@pytest.mark.slow
def test_new_data_of_the_same_shape_find_every_program(tmp_path):
    folder = str(tmp_path / "xla")
    misses, first = run(NUTS.format(folder, 0))
    assert misses > 0
    none, second = run(NUTS.format(folder, 1))
    assert none == 0
    assert second != first  # not the old data
    assert run(NUTS.format(folder, 0)) == [0, first]


def test_a_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(ValueError, match="must be a folder"):
        nsde.enable_compilation_cache(path)
