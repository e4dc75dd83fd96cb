"""Paths of a run of PMMH come from the particles that were accepted, however few they were."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC

import numpyro_sde as nsde
from numpyro_sde.infer import PMMH
from numpyro_sde.infer.racing import estimated_log_density

GRID = nsde.TimeGrid(np.arange(6.0), 0.5)
Y = np.array([0.3, -1.2, 0.8, 1.5, 0.1, -0.9])


def model(y=None):
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.3))
    ou = nsde.processes.OrnsteinUhlenbeck(0.5, 0.0, scale)
    x = numpyro.sample("x", nsde.SDEPath(ou, GRID, dist.Normal(0.0, 1.0)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.4), obs=y, at=GRID.index)


def run(kernel, warmup, draws, *, chains=1, seed=0, **options):
    mcmc = MCMC(
        kernel, num_warmup=warmup, num_samples=draws, num_chains=chains,
        chain_method="vectorized", progress_bar=False, **options,
    )  # fmt: skip
    mcmc.run(jax.random.key(seed), Y)
    return mcmc


def test_a_filter_runs_again_on_the_numbers_of_its_estimate():
    """The kept key gives the kept density, and two paths of it are drawn apart."""
    kernel = PMMH(model, 5, proposal="bootstrap")
    mcmc = run(kernel, 5, 4, chains=2)
    keys = mcmc.get_extra_fields(group_by_chain=True)["filter_key"]
    assert keys.shape[:2] == (2, 4)
    last = mcmc.last_state
    method = kernel.tuning.method
    for chain in range(2):
        z = jax.tree.map(lambda a, c=chain: a[c], last.z)
        own = method.with_key(jax.random.wrap_key_data(jnp.asarray(keys[chain, -1])))
        again = estimated_log_density(model, own, z, (Y,), {})
        np.testing.assert_allclose(again, last.log_density[chain], rtol=1e-5)
    paths = nsde.smooth(mcmc, rng_key=jax.random.key(1))["x"]
    assert paths.shape == (8, GRID.times.size)
    thinned = nsde.smooth(mcmc, rng_key=jax.random.key(2), thinning=4)["x"]
    assert thinned.shape == (2, GRID.times.size)


@pytest.mark.slow
@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_paths_of_few_particles_are_exact(x64, correlation):
    """Three bootstrap particles: the mean of the path against Kalman's smoother, 4 errors."""
    mcmc = run(
        PMMH(model, 3, proposal="bootstrap", correlation=correlation), 1_000, 40_000, chains=4,
        thinning=10,
    )  # fmt: skip
    marginal = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())
    exact = MCMC(
        numpyro.infer.NUTS(marginal), num_warmup=500, num_samples=8_000, progress_bar=False
    )
    exact.run(jax.random.key(1), Y)
    truth = np.asarray(nsde.smooth(exact, rng_key=jax.random.key(2))["x"])[:, GRID.index]
    paths = np.asarray(nsde.smooth(mcmc, rng_key=jax.random.key(3))["x"])[:, GRID.index]
    size = np.array([
        effective_sample_size(paths[:, k].reshape(4, -1)) for k in range(paths.shape[1])
    ])  # fmt: skip
    for power in (1, 2):
        here, there = paths**power, truth**power
        error = np.sqrt(here.var(0) / size + there.var(0) / len(there))
        assert np.all(np.abs(here.mean(0) - there.mean(0)) < 4.0 * error)
    # Filters run afresh at the same draws are biased by so few particles: the check can fail.
    if correlation == 0.0:
        method = nsde.filters.Particle(3, proposal="bootstrap")
        fresh = nsde.smooth(
            model, mcmc.get_samples(), Y, method=method, rng_key=jax.random.key(4)
        )["x"]  # fmt: skip
        off = np.abs(np.asarray(fresh)[:, GRID.index].mean(0) - truth.mean(0))
        assert np.max(off / np.sqrt(truth.var(0) / size)) > 4.0


def test_what_smooth_refuses_of_a_fit():
    mcmc = run(PMMH(model, 5, proposal="bootstrap"), 2, 4)
    key = jax.random.key(0)
    with pytest.raises(TypeError, match="hand over it alone"):
        nsde.smooth(mcmc, mcmc.get_samples(), rng_key=key)
    with pytest.raises(TypeError, match="brings its own filter"):
        nsde.smooth(mcmc, method=nsde.filters.Particle(5), rng_key=key)
    with pytest.raises(ValueError, match="at their own times"):
        nsde.smooth(mcmc, times=[0.0, 1.0], rng_key=key)
    with pytest.raises(TypeError, match="samples are missing"):
        nsde.smooth(model, rng_key=key)
    with pytest.raises(ValueError, match="thinning"):
        nsde.smooth(mcmc, rng_key=key, thinning=0)


_TWO_DEVICES = """
import numpyro
numpyro.set_host_device_count(2)
import sys
import jax
sys.path.insert(0, {folder!r})
import numpy as np
import numpyro_sde as nsde
import test_pmmh_paths as own
from numpyro.infer import MCMC
kernel = nsde.infer.PMMH(own.model, 5, proposal="bootstrap").tune(jax.random.key(0), own.Y)
mcmc = MCMC(kernel, num_warmup=5, num_samples=40, num_chains=2, progress_bar=False)
mcmc.run(jax.random.key(0), own.Y)
assert len(mcmc.get_samples()["scale"].devices()) == 2
print(np.asarray(nsde.smooth(mcmc, rng_key=jax.random.key(1))["x"]).shape)
"""


@pytest.mark.slow
def test_draws_of_parallel_chains_are_smoothed_on_one_device():
    """Split over the devices, the program would wait for copies between them at every step."""
    code = _TWO_DEVICES.format(folder=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert f"(80, {GRID.times.size})" in done.stdout, done.stderr[-2000:]
