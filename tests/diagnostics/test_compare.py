"""compare_fits against closed forms and ArviZ's own statistics."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from diagnostic_models import CONJUGATE_DATA, conjugate, conjugate_posterior, plane
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO

from numpyro_sde.diagnostics import SVIFit, Timing, compare_fits, timed, to_arviz
from numpyro_sde.diagnostics.compare.arviz_compat import get_group, load_arviz

MEAN, SD, LOG_Z = conjugate_posterior()


def gaussian_fit(factor):
    """A variational fit whose guide is the posterior with its sd multiplied by a factor."""

    def guide(y=None):
        loc = numpyro.param("loc", MEAN)
        numpyro.sample("theta", dist.Normal(loc, factor * SD))

    svi = SVI(conjugate, guide, numpyro.optim.Adam(1e-3), Trace_ELBO())
    state = svi.init(jax.random.key(0), y=CONJUGATE_DATA)
    return SVIFit(svi, svi.get_params(state), model_kwargs={"y": CONJUGATE_DATA})


@pytest.fixture(scope="module")
def comparison():
    mcmc = MCMC(
        NUTS(conjugate),
        num_warmup=200,
        num_samples=1000,
        num_chains=2,
        chain_method="sequential",
        progress_bar=False,
    )
    _, timing = timed(mcmc.run, jax.random.key(0), y=CONJUGATE_DATA)
    nuts = to_arviz(mcmc, timing=timing)
    fits = {"NUTS": nuts, "exact": gaussian_fit(1.0), "narrow": gaussian_fit(0.2)}
    table = compare_fits(
        fits, num_samples=4000, timings={"exact": Timing(3.0, 1.0)}, rng_key=jax.random.key(7)
    )
    return nuts, table, timing


@pytest.mark.slow
def test_parameter_rows(comparison):
    nuts, table, timing = comparison
    rows = table.parameters.loc["theta"]
    ess = rows.loc["NUTS", "ess_bulk"]
    assert abs(rows.loc["NUTS", "mean"] - MEAN) < 4 * SD / np.sqrt(ess)
    assert abs(rows.loc["exact", "mean"] - MEAN) < 4 * SD / np.sqrt(4000)
    # The standard error of a normal sample's sd is sd / sqrt(2 n).
    assert abs(rows.loc["narrow", "sd"] - 0.2 * SD) < 4 * 0.2 * SD / np.sqrt(8000)
    arviz, posterior = load_arviz(), get_group(nuts, "posterior")
    theirs = {
        "rhat": arviz.rhat(posterior),
        "ess_bulk": arviz.ess(posterior, method="bulk"),
        "ess_tail": arviz.ess(posterior, method="tail", prob=(0.05, 0.95)),
    }
    for column, value in theirs.items():
        np.testing.assert_allclose(rows.loc["NUTS", column], float(value["theta"]))
    np.testing.assert_allclose(rows.loc["NUTS", "ess_per_second"], ess / timing.run_time)
    assert (
        rows.loc[["exact", "narrow"], ["rhat", "ess_bulk", "ess_per_second"]].isna().all(axis=None)
    )


@pytest.mark.slow
def test_distances_are_in_sds_of_the_reference(comparison):
    _, table, _ = comparison
    rows = table.parameters.loc["theta"]
    assert rows.loc["NUTS", "distance"] == 0.0
    # W1 of N(m, s^2) and N(m, (0.2 s)^2) is 0.8 s E|Z|; its error comes from the spread of both
    # samples, at most that of the mean absolute deviation of the wider one.
    ess = rows.loc["NUTS", "ess_bulk"]
    assert abs(rows.loc["narrow", "distance"] - 0.8 * np.sqrt(2 / np.pi)) < 4 / np.sqrt(ess)
    # Equal laws: E|Z| sqrt(1/n + 1/m) is the size of the noise.
    assert rows.loc["exact", "distance"] < 4 * np.sqrt(1 / ess + 1 / 4000)


def test_wasserstein_of_two_shifted_normals():
    rng, n = np.random.default_rng(0), 20_000
    fits = {"a": {"x": rng.normal(size=n)}, "b": {"x": 1.5 + rng.normal(size=n)}}
    distance = compare_fits(fits).parameters.loc[("x", "b"), "distance"]
    # Shift 1.5 over the reference's sd: errors of two means and of one sd.
    assert abs(distance - 1.5) < 4 * np.sqrt(2 / n + 1.5**2 / (2 * n))


def test_fit_rows_judge_the_guides(comparison):
    _, table, timing = comparison
    fits = table.fits
    assert list(fits.method) == ["mcmc", "variational", "variational"]
    assert fits.loc["exact", "elbo"] == pytest.approx(LOG_Z, abs=1e-4)
    assert fits.loc["exact", "khat"] < 0.5
    assert fits.loc["exact", "efficiency"] == pytest.approx(1.0, abs=1e-3)
    kl = -np.log(0.2) + (0.2**2 - 1) / 2
    assert abs(fits.loc["narrow", "elbo"] - (LOG_Z - kl)) < 4 * fits.loc["narrow", "elbo_se"]
    assert fits.loc["narrow", "khat"] > 0.7
    assert np.isnan(fits.loc["NUTS", "khat"])
    assert fits.loc["NUTS", "divergences"] == 0
    assert fits.loc["NUTS", "run_time"] == pytest.approx(timing.run_time)
    assert fits.loc["NUTS", "compile_time"] == pytest.approx(timing.compile_time)
    assert tuple(fits.loc["exact", ["run_time", "compile_time"]]) == (2.0, 1.0)
    assert np.isnan(fits.loc["narrow", "run_time"])


def test_elpd_is_that_of_arviz(comparison):
    nuts, table, _ = comparison
    theirs = load_arviz().loo(nuts, pointwise=True)
    row = table.fits.loc["NUTS"]
    elpd, p = (
        (theirs.elpd, theirs.p) if hasattr(theirs, "elpd") else (theirs.elpd_loo, theirs.p_loo)
    )
    np.testing.assert_allclose([row.elpd, row.p_loo], [elpd, p], rtol=1e-4)
    # ArviZ 0.23 divides by n in the variance of the points, 1.x and we by n - 1.
    n = len(CONJUGATE_DATA)
    factor = 1.0 if hasattr(theirs, "elpd") else np.sqrt(n / (n - 1))
    np.testing.assert_allclose(row.elpd_se, factor * theirs.se, rtol=1e-4)
    assert row.num_points == len(CONJUGATE_DATA)
    assert row.bad_khat == int((np.asarray(theirs.pareto_k) > theirs.good_k).sum())
    assert table.fits.loc["exact", "elpd_diff"] == pytest.approx(
        table.fits.loc["exact", "elpd"] - row.elpd
    )
    assert (row.elpd_diff, row.diff_se) == (0.0, 0.0)


def test_printed_tables(comparison):
    _, table, _ = comparison
    text, html = str(table), table._repr_html_()
    for word in ("theta", "NUTS", "narrow", "khat", "elpd_se", "run_time", "sds of NUTS"):
        assert word in text
        assert word in html
    assert "nan" not in text.lower()
    assert "None" not in text


def test_paths_and_large_sites_have_one_row():
    rng = np.random.default_rng(1)
    times, n = np.linspace(0.0, 1.0, 8), 500
    first = {"rate": rng.normal(size=n), "x": rng.normal(size=(n, 8, 2)), "w": rng.normal(size=n)}
    second = {"rate": first["rate"], "x": first["x"].copy()}
    second["x"][:, 5, 1] += 3.0
    options = {"model": plane, "model_args": (times,), "log_likelihood": False}
    trees = {
        "a": to_arviz(first, **options),
        "b": to_arviz(second, coords={"state": ["p", "q"]}, **options),
    }
    table = compare_fits(trees)
    row = table.paths.loc[("x", "b")]
    shift = 3.0 / first["x"][:, 5, 1].std(ddof=1)
    assert row["distance"] == pytest.approx(shift)
    assert row["mean_distance"] == pytest.approx(shift / 16)
    assert row["where"] == f"time={times[5]:.6g}, state=1"
    # `w` is not in common; equal draws are at distance zero.
    assert list(table.parameters.index) == [("rate", "a"), ("rate", "b")]
    assert table.parameters.loc[("rate", "b"), "distance"] == 0.0
    swapped = compare_fits(trees, reference="b")
    assert swapped.paths.loc[("x", "a"), "where"] == f"time={times[5]:.6g}, state=q"


def test_elements_of_small_vectors_are_rows_by_coordinate():
    def model():
        with numpyro.plate("group", 3):
            numpyro.sample("effect", dist.Normal(0.0, 1.0))

    draws = {"effect": np.random.default_rng(0).normal(size=(100, 3))}
    tree = to_arviz(draws, model=model, coords={"group": ["u", "v", "w"]})
    table = compare_fits({"only": tree})
    labels = [f"effect[{name}]" for name in "uvw"]
    assert list(table.parameters.index.get_level_values("parameter")) == labels
    np.testing.assert_allclose(table.parameters["mean"], draws["effect"].mean(axis=0))
    assert len(compare_fits({"only": tree}, max_size=2).parameters) == 0


def test_raw_fits_share_arguments():
    fits = {"a": gaussian_fit(1.0)[:2], "b": gaussian_fit(0.5)[:2]}
    table = compare_fits(fits, model_kwargs={"y": CONJUGATE_DATA}, num_samples=200)
    assert table.fits.loc["a", "num_points"] == len(CONJUGATE_DATA)
    assert table.fits.loc["b", "elbo"] < table.fits.loc["a", "elbo"]


def test_constant_reference_gives_nan_not_infinity():
    constant = compare_fits({"a": {"x": np.ones(10)}, "b": {"x": np.arange(10.0)}})
    assert np.isnan(constant.parameters.loc[("x", "b"), "distance"])


def test_errors_name_the_argument():
    fits = {"a": {"x": np.ones(10)}}
    with pytest.raises(ValueError, match="fits must name at least one fit"):
        compare_fits({})
    with pytest.raises(ValueError, match=r"reference names \['b'\].*\['a'\]"):
        compare_fits(fits, reference="b")
    with pytest.raises(ValueError, match=r"timings names \['c'\]"):
        compare_fits(fits, timings={"c": Timing(1.0, 0.5)})
    with pytest.raises(ValueError, match=r"var_names has \['z'\], but fit 'a' has \['x'\]"):
        compare_fits(fits, var_names=["z"])
