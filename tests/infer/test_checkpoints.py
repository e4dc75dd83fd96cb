"""A run that is killed goes on bit by bit the same, for any kernel; draws are read from files."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS, BarkerMH

import numpyro_sde as nsde
from numpyro_sde.infer import CheckpointedMCMC, read_draws

DATA = np.array([0.3, -0.2, 0.8])


def model(y):
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    numpyro.deterministic("twice", 2.0 * a)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(a, 1.0), obs=y)


def run(folder, kernel=None, num_samples=40, key=None, **options):
    together = options.get("chain_method") == "vectorized"  # only NUTS takes chains together
    kernel = kernel or (NUTS if together else BarkerMH)(model)
    settings = {"num_warmup": 25, "every": 7, "progress_bar": False, **options}
    mcmc = CheckpointedMCMC(kernel, folder, num_samples=num_samples, **settings)
    mcmc.run(jax.random.key(0) if key is None else key, DATA, extra_fields=("accept_prob",))
    return mcmc


class KilledError(Exception):
    pass


def kill_at(monkeypatch, number):
    """End the run in the middle of writing a state, the draws being on file already."""
    calls = []
    save = CheckpointedMCMC.__init__.__globals__["RunFolder"].save

    def dying(self, progressed):
        calls.append(1)
        if len(calls) == number:
            raise KilledError
        save(self, progressed)

    monkeypatch.setattr(CheckpointedMCMC.__init__.__globals__["RunFolder"], "save", dying)


@pytest.mark.parametrize(
    ("options", "new_style"),
    [
        ({"num_chains": 2, "thinning": 3}, True),
        pytest.param({}, False, marks=pytest.mark.slow),
        pytest.param({"num_chains": 2}, False, marks=pytest.mark.slow),
        pytest.param({"num_chains": 2, "chain_method": "vectorized"}, True, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_bit_by_bit(tmp_path, monkeypatch, options, new_style):
    key = jax.random.key(0) if new_style else jax.random.PRNGKey(0)
    together = "chain_method" in options
    if together:
        options = {**options, "num_samples": 12, "num_warmup": 10}
    whole = run(tmp_path / "whole", key=key, **options)
    for number in (3,) if together else (2, 6):
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            with pytest.raises(KilledError):
                run(tmp_path / f"{number}", key=key, **options)
        again = run(tmp_path / f"{number}", key=key, **options)
        for name, value in whole.get_samples(group_by_chain=True).items():
            np.testing.assert_array_equal(again.get_samples(group_by_chain=True)[name], value)
        np.testing.assert_array_equal(
            again.get_extra_fields()["accept_prob"], whole.get_extra_fields()["accept_prob"]
        )


def test_draws_are_those_of_numpyro(tmp_path):
    """The same kernel under NumPyro's own loop, from the same key."""
    ours = run(tmp_path, num_chains=2, thinning=2)
    theirs = MCMC(
        BarkerMH(model),
        num_warmup=25,
        num_samples=40,
        num_chains=2,
        thinning=2,
        chain_method="sequential",
        progress_bar=False,
    )
    theirs.run(jax.random.key(0), DATA)
    for name, value in theirs.get_samples(group_by_chain=True).items():
        np.testing.assert_allclose(
            ours.get_samples(group_by_chain=True)[name], value, rtol=2e-5, atol=1e-6
        )
    assert ours.get_samples()["a"].shape == (40,)
    np.testing.assert_array_equal(np.asarray(ours.last_state.i), np.asarray(theirs.last_state.i))


def test_a_finished_run_goes_on_to_more_draws_and_files_are_read(tmp_path):
    short = run(tmp_path, num_samples=10)
    first = np.array(short.get_samples()["a"])
    assert short.num_done == [10]
    longer = run(tmp_path, num_samples=30)
    np.testing.assert_array_equal(longer.get_samples()["a"][:10], first)
    at_once = run(tmp_path / "other", num_samples=30)
    np.testing.assert_array_equal(longer.get_samples()["a"], at_once.get_samples()["a"])
    files = read_draws(tmp_path)
    assert isinstance(longer.get_samples()["twice"], np.memmap)
    np.testing.assert_array_equal(files["z/twice"][0], longer.get_samples()["twice"])
    np.testing.assert_array_equal(files["z/twice"], 2.0 * files["z/a"])


def test_another_run_and_bad_options_are_refused(tmp_path):
    run(tmp_path, num_samples=5)
    with pytest.raises(ValueError, match="holds another run: it differs in rng_key"):
        run(tmp_path, num_samples=5, key=jax.random.key(1))
    with pytest.raises(ValueError, match="it differs in num_warmup"):
        run(tmp_path, num_samples=5, num_warmup=3)
    with pytest.raises(ValueError, match="chain_method must be 'sequential' or 'vectorized'"):
        run(tmp_path, chain_method="parallel")
    with pytest.raises(ValueError, match="every must be a positive number"):
        run(tmp_path, every=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="path must be a folder"):
        run(tmp_path / "file")
    with pytest.raises(ValueError, match="has no warm-up of its own"):
        run(tmp_path, num_samples=5).warmup(jax.random.key(0), DATA)


KILLED = """
import sys, os, signal
import jax, numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
from numpyro.infer import NUTS, DiscreteHMCGibbs, HMCGibbs
from numpyro_sde.infer import draw_files

def model(times, y):
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
    ou = nsde.processes.OrnsteinUhlenbeck(rate, 0.0, 1.0)
    x = numpyro.sample("x", nsde.SDEPath(ou, times, init=dist.Normal(0.0, 1.0)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)

def with_coin(times, y):
    coin = numpyro.sample("coin", dist.Bernoulli(0.5))
    level = numpyro.sample("level", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(level + coin, 1.0).expand([len(y)]).to_event(1), obs=y)

kernels = {{
    "nuts": lambda: NUTS(nsde.handlers.marginalize(model, method=nsde.filters.Kalman())),
    "gibbs": lambda: nsde.infer.ParticleGibbs(model, num_particles=8),
    "pmmh": lambda: nsde.infer.PMMH(model, num_particles=30),
    "split": lambda: nsde.infer.SplitNUTS(numpyro.handlers.reparam(
        model, config={{"x": nsde.reparam.InnovationReparam()}})),
    "discrete": lambda: DiscreteHMCGibbs(NUTS(with_coin)),
}}
folder, kind, kill = sys.argv[1], sys.argv[2], int(sys.argv[3])
save, calls = draw_files.RunFolder.save, []
def dying(self, progressed):
    calls.append(1)
    if len(calls) == kill:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, progressed)
draw_files.RunFolder.save = dying
times = np.arange(6.0)
mcmc = nsde.infer.CheckpointedMCMC(
    kernels[kind](), folder, num_warmup=12, num_samples=12, every=5, progress_bar=False)
mcmc.run(jax.random.key(0), times, np.sin(times))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nuts", "gibbs", "pmmh", "split", "discrete"])
def test_processes_that_are_killed(tmp_path, kind):
    """SIGKILL in the warm-up and in the sampling; a third process makes the rest."""

    def process(folder, kill):
        root = str(Path(nsde.__file__).parents[1])
        done = subprocess.run(
            [sys.executable, "-c", KILLED.format(), str(folder), kind, str(kill)],
            env={**os.environ, "PYTHONPATH": root},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == (-9 if kill else 0), done.stderr[-3000:]

    process(tmp_path / "whole", 0)
    process(tmp_path / "killed", 2)
    process(tmp_path / "killed", 3)
    process(tmp_path / "killed", 0)
    whole, killed = read_draws(tmp_path / "whole"), read_draws(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(killed[name], value)
    moved = [np.unique(value[0], axis=0).shape[0] for value in whole.values()]
    assert max(moved) > 1
