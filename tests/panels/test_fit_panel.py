"""A fit for each series: any executor, the same draws; killed runs go on; failures are told."""

import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock

import jax
import numpy as np
import panel_models as models
import pytest

import numpyro_sde as nsde
from numpyro_sde.panels.chain import _compiled

DATA = models.series(7)
quiet = {"progress": False}


def test_compiled_once_and_draws_are_the_posterior(x64):
    fits = nsde.fit_panel(
        models.marginal, models.series(4), nsde.Chain(num_warmup=200, num_samples=400), **quiet
    )
    assert len(fits.programs) == 1
    found = fits.summary("level")["level"]
    data = models.series(4)
    for k in range(4):
        t, y = data["times"].times[k], data["y"][k]
        # x is stationary with variance 1/2 but for its start, N(level, 1).
        apart = np.abs(t[:, None] - t[None, :])
        from_start = np.exp(-(t[:, None] + t[None, :] - 2 * t[0]))
        cov = 0.5 * (np.exp(-apart) - from_start) + from_start + 0.25 * np.eye(len(t))
        precision = np.linalg.inv(cov)
        variance = 1 / (precision.sum() + 0.25)
        error = np.sqrt(variance / found["ess"][k])
        assert abs(found["mean"][k] - variance * precision.sum(0) @ y) < 4 * error
        assert abs(found["sd"][k] - np.sqrt(variance)) < 4 * error
        assert found["rhat"][k] < 1.05


def test_threads_any_executor_and_batches_give_the_same_draws():
    class Plain:
        def submit(self, fn, *args):
            future = Future()
            future.set_result(fn(*args))
            return future

    alone = nsde.fit_panel(None, DATA, models.moments, **quiet).draws()["level"]
    with ThreadPoolExecutor(2) as pool:
        threads = nsde.fit_panel(None, DATA, models.moments, executor=pool, batch_size=2, **quiet)
    plain = nsde.fit_panel(None, DATA, models.moments, executor=Plain(), batch_size=3, **quiet)
    np.testing.assert_array_equal(threads.draws()["level"], alone)
    np.testing.assert_array_equal(plain.draws()["level"], alone)
    other = nsde.fit_panel(None, DATA, models.moments, rng_key=jax.random.key(1), **quiet)
    assert not np.array_equal(other.draws()["level"], alone)


def test_a_failed_series_is_told_and_the_rest_kept(tmp_path):
    data = {**DATA, "y": DATA["y"].copy()}
    data["y"][2, 3] = np.nan
    names = list("abcdefg")
    with pytest.warns(
        UserWarning, match=r"1 of 7 series failed; the first \(c\): ValueError: data"
    ):
        fits = nsde.fit_panel(None, data, models.moments, ids=names, path=tmp_path, **quiet)
    assert list(fits) == ["a", "b", "d", "e", "f", "g"]
    assert fits.failures == {"c": "ValueError: data are not finite"}
    with pytest.raises(KeyError, match="series 'c' is not fitted: ValueError"):
        fits["c"]
    assert fits["g"]["level"].shape == (1, 20)
    assert {name: draws["level"].shape for name, draws in fits.items()}["g"] == (1, 20)


def test_killed_runs_go_on_nothing_lost_nothing_twice(tmp_path):
    """A process that is killed in the middle: what it saved stays, the rest is done once."""
    notes, folder = tmp_path / "notes", tmp_path / "fits"
    notes.mkdir()
    code = """
import sys; sys.path.insert(0, {tests!r})
import panel_models as models, numpyro_sde as nsde
from functools import partial
data = models.series(7)
fit = partial(models.kill_after, folder={notes!r}, when=data["y"][4, 0])
nsde.fit_panel(None, data, fit, path={folder!r}, batch_size=2, progress=False)
"""
    tests = str(Path(__file__).parent)
    root = str(Path(nsde.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code.format(tests=tests, notes=str(notes), folder=str(folder))],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == -9, done.stderr
    (folder / "fits-half.npz.part").write_bytes(b"half a file")
    fit = partial(models.moments_noted, folder=str(notes))
    fits = nsde.fit_panel(None, DATA, fit, path=folder, batch_size=2, **quiet)
    calls = [line for file in notes.iterdir() for line in file.read_text().split()]
    assert sorted(calls) == sorted(f"{y!r}" for y in DATA["y"][:, 0])
    alone = nsde.fit_panel(None, DATA, models.moments, **quiet)
    np.testing.assert_array_equal(fits.draws()["level"], alone.draws()["level"])
    with pytest.raises(ValueError, match=r"holds fits of another run: it differs in rng_key"):
        nsde.fit_panel(None, DATA, fit, path=folder, rng_key=jax.random.key(1), **quiet)


def test_bad_arguments_are_named():
    fit = partial(nsde.fit_panel, None, fit=models.moments, **quiet)
    with pytest.raises(TypeError, match="series must be a dictionary"):
        fit([1, 2])
    with pytest.raises(ValueError, match=r"one leading length, the number of series; got"):
        fit({"y": np.ones(3), "w": np.ones(2)})
    with pytest.raises(ValueError, match="is a TimeGrid of one clock"):
        fit({"times": nsde.TimeGrid([0.0, 1.0])})
    with pytest.raises(ValueError, match="ids must name each of the 7 series once, got 1"):
        fit(DATA, ids=[0] * 7)
    with pytest.raises(TypeError, match="executor must be None"):
        fit(DATA, executor=1.5)
    with pytest.raises(RuntimeError, match=r"all of the first series failed, the first \(0\)"):
        fit({"y": np.full((6, 2), np.nan)})
    with pytest.raises(ValueError, match="model and fit must be picklable"):
        nsde.fit_panel(Lock(), DATA, models.moments, executor=Submitter(), **quiet)


class Submitter:
    def submit(self, fn, *args):
        raise AssertionError("nothing should be submitted")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["processes", "dask", "submitit"])
def test_other_processes_compile_once_each(kind, tmp_path, monkeypatch):
    """Two workers: the same draws as here, and the programs of one chain in each of them."""
    _compiled.cache_clear()  # of the tests before
    data = models.series(12)
    run = partial(nsde.fit_panel, models.marginal, data, models.short_chain, batch_size=2, **quiet)
    alone = run()
    if kind == "processes":
        fits = run(executor=2)
    elif kind == "dask":
        distributed = pytest.importorskip("distributed")
        with (
            distributed.LocalCluster(
                n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
            ) as cluster,
            distributed.Client(cluster) as client,
        ):
            fits = run(executor=client.get_executor())
    else:
        pytest.importorskip("submitit")
        roots = (str(Path(__file__).parent), str(Path(nsde.__file__).parents[1]))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(roots))  # as a script's folder would be
        with nsde.SubmititExecutor(tmp_path, cluster="local", timeout_min=10) as executor:
            fits = run(executor=executor, batch_size=6)
    np.testing.assert_array_equal(fits.draws()["level"], alone.draws()["level"])
    (once,) = alone.programs.values()
    assert len(fits.programs) == 2
    for programs in fits.programs.values():
        assert programs <= once + 5  # a chain is one program; not one for each of six series
