"""Series over devices: the same posterior, one sum over devices a gradient, two processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.sharding import Mesh
from numpyro.infer import MCMC, NUTS

import numpyro_sde as nsde

MODEL = """
import sys, json
import jax, jax.numpy as jnp, numpy as np, numpyro, numpyro.distributions as dist
import numpyro_sde as nsde
from numpyro.infer import MCMC, NUTS, init_to_value
from numpyro.infer.util import log_density
jax.config.update("jax_enable_x64", True)

SERIES, TIMES = {series}, 10
rng = np.random.default_rng(0)
clocks = nsde.TimeGrid(np.cumsum(rng.exponential(0.3, size=(SERIES, TIMES)) + 0.05, axis=1))
weight = rng.normal(size=SERIES)
x = rng.normal(size=(SERIES, 1))
for k in range(1, TIMES):  # rate 1.2, slope 0.3, scale 0.9
    decay = np.exp(-1.2 * (clocks.times[:, k] - clocks.times[:, k - 1]))
    mean = 0.3 * weight * (1 - decay) + decay * x[:, -1]
    noise = np.sqrt(0.81 / 2.4 * (1 - decay**2)) * rng.normal(size=SERIES)
    x = np.concatenate([x, (mean + noise)[:, None]], axis=1)
y = x + 0.3 * rng.normal(size=x.shape)

def model(times, y, weight):
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with numpyro.plate("series", SERIES):
        ou = nsde.processes.OrnsteinUhlenbeck(rate, slope * weight, scale)
        x = numpyro.sample("x", nsde.SDEPath(ou, times, init=dist.Normal(0.0, 1.0)))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)

marginal = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())
params = dict(rate=jnp.asarray(1.2), slope=jnp.asarray(0.3), scale=jnp.asarray(0.9))

@jax.jit
def gradient(params, *args):
    return jax.value_and_grad(lambda p: log_density(marginal, args, {{}}, p)[0])(params)
"""

TWO_DEVICES = (
    MODEL
    + """
here = jax.tree.map(jnp.asarray, (clocks, y, weight))
there = nsde.shard_panel(None, clocks, y, weight)
text = gradient.lower(params, *there).compile().as_text()
out = {{"devices": jax.device_count(), "sums": text.count(" all-reduce("),
       "gathers": text.count("all-gather(") + text.count("all-to-all(")
       + text.count("collective-permute(")}}
(a, da), (b, db) = gradient(params, *here), gradient(params, *there)
out["value"] = abs(float(a - b) / float(a))
out["slope"] = max(abs(float(da[k] - db[k]) / float(da[k])) for k in da)
draws = []
for args in (here, there) if {nuts} else ():
    # From the truth: on the way down from far away rounding grows a million times.
    kernel = NUTS(marginal, init_strategy=init_to_value(values=params))
    mcmc = MCMC(kernel, num_warmup=40, num_samples=40, progress_bar=False, jit_model_args=True)
    mcmc.run(jax.random.key(0), *args)
    draws.append(mcmc.get_samples())
out["draws"] = max([float(abs(draws[0][k] - draws[1][k]).max()) for k in params] if draws else [0])
print(json.dumps(out))
"""
)

CHAINS = (
    MODEL
    + """
from jax.sharding import Mesh
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("chain", "series"))
here = jax.tree.map(jnp.asarray, (clocks, y, weight))
there = nsde.shard_panel(mesh, clocks, y, weight)
def plain():
    return NUTS(marginal, init_strategy=init_to_value(values=params))

both = (plain, here), (lambda: nsde.shard_chains(plain(), mesh), there)
work, draws = [], []
for make, args in both:
    mcmc = MCMC(make(), num_warmup=20, num_samples=20, num_chains=4, chain_method="vectorized",
                progress_bar=False, jit_model_args=True)
    mcmc.run(jax.random.key(0), *args)
    draws.append(mcmc.get_samples())
    kernel = make()  # one that has run maps over chains twice
    step = jax.jit(lambda state, args: kernel.sample(state, args, {{}}))
    state = kernel.init(jax.random.split(jax.random.key(0), 4), 20, None, args, {{}})
    work.append(step.lower(state, args).compile())
print(json.dumps({{
    "spec": list(mcmc.last_state.z["rate"].sharding.spec),
    "work": work[1].cost_analysis()["flops"] / work[0].cost_analysis()["flops"],
    "gathers": work[1].as_text().count("all-gather("),
    "draws": max(float(abs(draws[0][k] - np.asarray(draws[1][k])).max()) for k in params),
}}))
"""
)

TWO_PROCESSES = (
    """
import sys, jax
rank, port = int(sys.argv[1]), sys.argv[2]
if rank >= 0:  # before anything is computed
    jax.distributed.initialize(f"localhost:{{port}}", num_processes=2, process_id=rank)
"""
    + MODEL
    + """
args = nsde.shard_panel(None, clocks, y, weight)
params = {{name: np.asarray(value) for name, value in
          dict(rate=1.2, slope=0.3, scale=0.9).items()}}
value, slope = gradient(params, *args)
kernel = NUTS(marginal, init_strategy=init_to_value(values=params))
mcmc = MCMC(kernel, num_warmup=20, num_samples=20, progress_bar=False, jit_model_args=True)
mcmc.run(jax.random.key(0), *args)
print(json.dumps({{"processes": jax.process_count(), "value": float(value),
                  **{{k: float(v) for k, v in slope.items()}},
                  "draws": [float(v) for k in params for v in np.asarray(mcmc.get_samples()[k])]}}))
"""
)


def start(code, *argv, devices=1, **env):
    flags = os.environ.get("XLA_FLAGS", "")
    flags = f"{flags} --xla_force_host_platform_device_count={devices}"
    root = str(Path(nsde.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", code, *argv],
        env={**os.environ, "PYTHONPATH": root, "XLA_FLAGS": flags, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result_of(process):
    import json

    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.strip().splitlines()[-1])


def check(found):
    assert found["devices"] == 2
    assert found["gathers"] == 0
    assert found["sums"] <= 2  # one of the value, one of the gradient
    assert found["value"] < 1e-12
    assert found["slope"] < 1e-11
    assert found["draws"] < 1e-9


@pytest.mark.parametrize("part_bytes", [pytest.param("33554432", marks=pytest.mark.slow), "1000"])
def test_two_devices_sum_once(part_bytes):
    """Without parts and with several of them on each device."""
    code = TWO_DEVICES.format(series=1200, nuts=False)
    check(result_of(start(code, devices=2, NUMPYRO_SDE_PART_BYTES=part_bytes)))


@pytest.mark.slow
def test_nuts_over_two_devices_is_nuts():
    check(result_of(start(TWO_DEVICES.format(series=2000, nuts=True), devices=2)))


@pytest.mark.slow
def test_chains_and_series_over_four_devices():
    """Each of 2 x 2 devices does a quarter of a step's work, and the draws stay the same."""
    found = result_of(start(CHAINS.format(series=40), devices=4))
    assert found["spec"] == ["chain"]
    assert found["work"] < 0.3
    assert found["gathers"] == 0
    assert found["draws"] < 1e-6  # rounding of sums, grown by 40 steps


def test_chains_that_do_not_fit_are_refused():
    kernel = NUTS(lambda: numpyro.sample("a", dist.Normal(0.0, 1.0)))
    mesh = Mesh(np.array(jax.devices()[:1]), ("chain",))
    with pytest.raises(TypeError, match="kernel must be"):
        nsde.shard_chains(None, mesh)
    with pytest.raises(TypeError, match="Mesh, got int"):
        nsde.shard_chains(kernel, 2)
    with pytest.raises(ValueError, match="an axis named 'chain'"):
        nsde.shard_chains(kernel, Mesh(np.array(jax.devices()[:1]), ("series",)))
    mcmc = MCMC(nsde.shard_chains(kernel, mesh), num_warmup=1, num_samples=1, progress_bar=False)
    with pytest.raises(ValueError, match="chain_method='vectorized', got chains of shape"):
        mcmc.run(jax.random.key(0))


@pytest.mark.slow
def test_two_processes_agree_with_one():
    """Rounding of sums apart: the same value, gradient and draws from each of two processes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    code = TWO_PROCESSES.format(series=600)
    both = [start(code, str(rank), port) for rank in (0, 1)]
    pair = [result_of(process) for process in both]
    alone = result_of(start(code, "-1", port))
    assert [found.pop("processes") for found in pair] == [2, 2]
    assert alone.pop("processes") == 1
    draws = alone.pop("draws")
    for found in pair:
        # Rounding grows by the steps of 40 iterations.
        np.testing.assert_allclose(found.pop("draws"), draws, rtol=1e-6)
        for name, value in alone.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-11)


def test_what_does_not_fit_is_refused():
    y = np.zeros((4, 3))
    with pytest.raises(ValueError, match="at least one array"):
        nsde.shard_panel(None)
    with pytest.raises(ValueError, match="one leading length"):
        nsde.shard_panel(None, y, np.zeros(3))
    with pytest.raises(ValueError, match="mesh asks for 1000 devices"):
        nsde.shard_panel(1000, y)
    with pytest.raises(TypeError, match=r"mesh must be a jax\.sharding\.Mesh"):
        nsde.shard_panel("all", y)
    clocks, found = nsde.shard_panel(
        jax.make_mesh((1,), ("anything",)), nsde.TimeGrid(np.cumsum(np.ones((4, 3)), axis=1)), y
    )
    assert isinstance(clocks, nsde.TimeGrid)
    assert found.sharding.spec == jax.sharding.PartitionSpec("anything")
