"""sbc: an exact posterior passes, wrong ones fail; executors, resuming, failures."""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from threading import Lock

import calibration_models as models
import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS, SVI, BarkerMH, Trace_ELBO

mpl.use("Agg")

from numpyro_sde.diagnostics import SBCResult, SVIFit, compiled_chain, sbc

QUIET = {"progress": False, "independent": True}


def run(fit, number=200, **options):
    return sbc(models.conjugate, fit, number, data="y", **{**QUIET, **options})


@pytest.fixture(scope="module")
def exact():
    return run(models.exact)


def test_an_exact_posterior_passes(exact):
    """Seed 0, 200 replicates: bands of 95 %, z-scores and coverages within 4 standard errors."""
    assert exact.names == ("theta",)
    assert exact.ok
    assert exact.ranks.shape == (200, 1)
    assert exact.ranks.min() >= 0
    assert exact.ranks.max() <= exact.max_rank == 63
    z = exact.z_scores[:, 0]
    # (mean - truth) / sd is standard normal, but for the 150 draws behind mean and sd.
    noise = 1 + 1 / models.NUM_DRAWS
    assert abs(z.mean()) < 4 * np.sqrt(noise / 200)
    assert abs(z.var(ddof=1) - noise) < 4 * np.sqrt(2 / 200) * 1.1
    for prob in (0.5, 0.9):
        error = np.sqrt(prob * (1 - prob) / 200)
        assert np.all(np.abs(exact.coverage(prob) - prob) < 4 * error)
    # Truths are draws of the prior N(0, 1).
    assert abs(exact.truth[:, 0].mean()) < 4 / np.sqrt(200)
    assert abs(exact.truth[:, 0].var() - 1) < 4 * np.sqrt(2 / 200)


@pytest.mark.parametrize("wrong", [models.narrow, models.shifted])
def test_a_wrong_posterior_fails(wrong):
    result = run(wrong)
    assert not result.ok
    assert result.p_values[0] < 1e-4
    assert "Not calibrated (level 0.05): theta" in str(result)


def test_the_prior_passes_for_parameters_and_fails_for_the_joint_density():
    result = run(
        models.prior, log_joint=True, quantities={"with": lambda v, d: v["theta"] * d["y"][0]}
    )
    p = dict(zip(result.names, result.p_values, strict=True))
    assert p["theta"] > 0.01
    assert p["log_joint"] < 1e-6
    assert p["with"] < 1e-6


def test_chains_are_thinned_to_their_effective_size():
    """Coefficient 0.9: 2,000 steps are worth 105 draws, 400 of them 21."""
    result = run(models.autocorrelated, 100, independent=False)
    assert result.ok
    assert np.median(result.num_kept) == 63

    def short(key, data):
        return {"theta": models.autocorrelated(key, data)["theta"][:400]}

    with pytest.warns(UserWarning, match=r"ranks of \['theta'\] count fewer than half"):
        result = run(short, 60, independent=False)
    assert result.ok
    # The size of a short chain is estimated to some third.
    assert 12 < np.median(result.num_kept) < 32


def test_ties_are_broken_evenly():
    """A discrete quantity: the sign of theta among signs of draws."""
    result = run(models.exact, quantities={"sign": lambda v, d: jnp.sign(v["theta"])})
    assert result.ok


def test_missing_data_stay_missing():
    seen = []

    def fit(key, data):
        seen.append(np.asarray(data["y"]))
        return models.exact(key, data)

    pattern = np.array([0.1, np.nan, 0.2, np.nan])
    result = sbc(models.conjugate, fit, 60, model_kwargs={"y": pattern}, **QUIET)
    assert all(np.array_equal(np.isnan(y), np.isnan(pattern)) for y in seen)
    assert np.std([y[0] for y in seen]) > 0.5
    assert result.ok


def test_replicates_do_not_hang_on_who_runs_them(exact, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        threads = run(models.exact, 30, executor=pool, batch_size=4)
    np.testing.assert_array_equal(threads.ranks, exact.ranks[:30])


def test_processes(exact):
    """A real pool, by spawn: the same ranks as in this process."""
    result = run(models.exact, 12, executor=1, batch_size=6)
    np.testing.assert_array_equal(result.ranks, exact.ranks[:12])
    np.testing.assert_allclose(result.truth, exact.truth[:12], rtol=1e-6)


def test_dask(exact):
    """Dask's executor: the same ranks."""
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        result = run(models.exact, 12, executor=client.get_executor(), batch_size=4)
    np.testing.assert_array_equal(result.ranks, exact.ranks[:12])


def test_an_interrupted_run_goes_on(exact, tmp_path):
    path, calls = tmp_path / "ranks.npz", []

    def stopping(key, data):
        if len(calls) == 25:
            raise KeyboardInterrupt
        calls.append(1)
        return models.exact(key, data)

    with pytest.raises(KeyboardInterrupt):
        run(stopping, 40, path=path)
    again = []

    def counting(key, data):
        again.append(1)
        return models.exact(key, data)

    result = run(counting, 40, path=path)
    assert len(again) == 20  # two batches of ten were saved
    np.testing.assert_array_equal(result.ranks, exact.ranks[:40])
    more = run(counting, 50, path=path)
    assert len(again) == 30
    np.testing.assert_array_equal(more.ranks, exact.ranks[:50])
    assert len(run(counting, 30, path=path).ranks) == 30
    with pytest.raises(ValueError, match="holds replicates of another run"):
        run(models.exact, 40, num_ranks=31, path=path)
    with pytest.raises(ValueError, match="holds replicates of another run"):
        run(models.exact, 40, path=path, rng_key=jax.random.key(1))


def test_failures_are_counted_and_told(tmp_path):
    path = tmp_path / "ranks.npz"
    with pytest.warns(UserWarning, match=r"of 60 replicates failed .*no step size"):
        result = run(models.sometimes_fails, 60, path=path)
    number = len(result.failures)
    assert 0 < number < 30
    assert len(result.ranks) == 60 - number
    assert not set(result.failures) & set(result.replicates)
    assert f"{number} REPLICATES FAILED" in str(result)
    assert not run(models.exact, 60, path=path).failures  # tried again
    with pytest.raises(RuntimeError, match=r"all of the first replicates failed.*no step size"):
        run(models.always_fails, 60)
    bad = partial(lambda key, data: {"theta": np.full(20, np.nan)})
    with pytest.raises(RuntimeError, match="not finite"):
        run(bad, 20)


TIMES = np.array([0.0, 0.5, 1.0, 1.5, 2.5, 4.0, 4.5])


def smoothed(key, data):
    """Exact draws of the path: the dense normal law of path given data."""
    gap = np.abs(TIMES[:, None] - TIMES)
    stationary = 0.7**2 / 2
    start = np.exp(-np.add.outer(TIMES, TIMES))  # of the initial variance 1
    prior = stationary * (np.exp(-gap) - start) + start
    gain = np.linalg.solve(prior + 0.3**2 * np.eye(7), prior).T
    factor = np.linalg.cholesky(prior - gain @ prior + 1e-10 * np.eye(7))
    z = np.random.default_rng(np.asarray(jax.random.key_data(key))).normal(size=(100, 7))
    return {"x": gain @ np.asarray(data["y"], np.float64) + z @ factor.T}


def test_paths_are_ranked_at_few_times():
    options = {"model_args": (TIMES,), "data": {"y": "y"}, "num_ranks": 31, **QUIET}
    model = models.path_model
    result = sbc(model, smoothed, 150, log_joint=True, **options)
    assert result.names == ("x[time=1]", "x[time=2.5]", "x[time=4.5]", "log_joint")
    assert result.ok, str(result)
    assert result.ranks.max() == 31
    all_times = sbc(model, smoothed, 2, num_path_times=9, max_size=4, **options)
    assert all_times.names == tuple(f"x[time={t:g}]" for t in TIMES[[0, 2, 4, 6]])


@pytest.mark.slow
def test_a_markov_chain_is_read():
    kernel = BarkerMH(two_parameters)
    mcmc = MCMC(kernel, num_warmup=30, num_samples=40, progress_bar=False, jit_model_args=True)

    def fit(key, data):
        mcmc.run(key, data["y"])
        return mcmc

    options = {"data": "y", "num_ranks": 10, "progress": False, "independent": True}
    result = sbc(two_parameters, fit, 1, **options)
    assert result.names == ("a", "b[0]", "b[1]")
    assert result.ranks.max() <= 10


def test_what_a_fit_lacks_is_told():
    options = {"data": "y", "num_ranks": 10, **QUIET}

    def one(key, data):
        return {"a": np.zeros(20)}

    with pytest.raises(RuntimeError, match=r"log_joint needs draws of all latent .*\['b'\]"):
        sbc(two_parameters, one, 1, log_joint=True, **options)
    with pytest.raises(RuntimeError, match=r"var_names has \['b'\], but fit returned"):
        sbc(two_parameters, one, 1, var_names=["b"], **options)


@pytest.mark.slow
def test_a_compiled_chain_gives_the_posterior():
    """Seed 0, 2,000 draws, every second kept: mean and sd within 4 Monte Carlo errors."""
    y = np.array([0.5, np.nan, 1.5, 0.3])
    run_chain = compiled_chain(NUTS(models.conjugate), 200, 2000, thinning=2)
    draws = np.asarray(run_chain(jax.random.key(0), y=y)["theta"], np.float64)
    assert draws.shape == (1000,)
    ess = min(effective_sample_size(draws[None]), 1000)
    assert abs(draws.mean() - 2.3 / 4) < 4 * 0.5 / np.sqrt(ess)
    assert abs(draws.std() / 0.5 - 1) < 4 / np.sqrt(2 * ess)
    with pytest.raises(ValueError, match="num_samples must be positive"):
        compiled_chain(NUTS(models.conjugate), 10, 0)
    with pytest.raises(ValueError, match="thinning must divide num_samples=10, got 3"):
        compiled_chain(NUTS(models.conjugate), 10, 10, thinning=3)


def two_parameters(y=None):
    a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    b = numpyro.sample("b", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    numpyro.sample("y", dist.Normal(a + b, 1.0).to_event(1), obs=y)


def test_a_variational_fit_is_sampled():
    def guide(y=None):
        mean = numpyro.param("mean", 0.0)
        numpyro.sample("theta", dist.Normal(mean, 1 / np.sqrt(5.0)))

    svi = SVI(models.conjugate, guide, numpyro.optim.Adam(0.1), Trace_ELBO())

    def fit(key, data):
        return SVIFit(svi, {"mean": data["y"].sum() / 5}, model_kwargs={"y": data["y"]})

    result = run(fit, 2, independent=False, num_samples=80, num_ranks=70)
    assert np.all(result.num_kept == 70)
    assert np.all(np.abs(result.z_scores) < 5)


def test_the_plot_shows_ranks_and_bands(exact):
    axes = exact.plot(["theta"])
    counts = axes[0].patches[0].get_data().values
    assert counts.sum() == 200
    np.testing.assert_array_equal(
        counts, np.histogram(exact.ranks[:, 0], np.linspace(0, 64, 17))[0]
    )
    difference = axes[1].lines[0].get_ydata()
    expected = [np.mean(exact.ranks[:, 0] <= r) - (r + 1) / 64 for r in range(63)]
    np.testing.assert_allclose(difference, expected)
    assert len(exact.plot()) == 2
    with pytest.raises(ValueError, match=r"names has \['z'\]"):
        exact.plot(["z"])
    with pytest.raises(ValueError, match="2 axes are needed"):
        exact.plot(["theta"], axes=[axes[0]])


def test_table(exact):
    table = exact.table()
    assert list(table.index) == ["theta"]
    np.testing.assert_allclose(table["coverage_90"], exact.coverage(0.9))
    assert "No departure from uniform ranks" in str(exact)
    assert isinstance(exact, SBCResult)


class Plain:
    """An executor by its `submit` alone, as MPI's and others' are."""

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


def test_any_executor_serves(exact):
    result = run(models.exact, 8, executor=Plain())
    np.testing.assert_array_equal(result.ranks, exact.ranks[:8])


@pytest.mark.slow
def test_float64_is_kept(x64):
    seen = []

    def fit(key, data):
        seen.append(data["y"].dtype)
        return models.exact(key, data)

    run(fit, 1)
    assert seen == [np.float64]


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="num_replicates must be positive"):
        run(models.exact, 0)
    with pytest.raises(ValueError, match="data must name observation sites"):
        sbc(models.conjugate, models.exact, 10, **QUIET)
    with pytest.raises(ValueError, match=r"data must name observation sites.*'w'"):
        sbc(models.conjugate, models.exact, 10, data="w", **QUIET)
    with pytest.raises(ValueError, match=r"var_names has \['w'\]"):
        run(models.exact, 10, var_names=["w"])
    with pytest.raises(ValueError, match="executor must be 'processes'"):
        run(models.exact, 10, executor="threads")
    with pytest.raises(ValueError, match="executor must be a positive number"):
        run(models.exact, 10, executor=0)
    with pytest.raises(TypeError, match="executor must be None"):
        run(models.exact, 10, executor=1.5)
    with pytest.raises(ValueError, match="must be picklable"):
        run(partial(models.exact, lock=Lock()), 10, executor=Plain())
    with pytest.raises(RuntimeError, match=r"'theta' with shape \(3,\)"):
        run(lambda key, data: {"theta": np.zeros((10, 3))}, 10)
    with pytest.raises(ValueError, match="fit returned draws of none of"):
        run(lambda key, data: {"other": np.zeros(10)}, 10)

    def factored(y=None):
        theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
        numpyro.factor("more", -(theta**2))
        numpyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    with pytest.raises(ValueError, match="bare factor 'more'"):
        sbc(factored, models.exact, 10, data="y", **QUIET)
