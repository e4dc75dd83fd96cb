"""Weights of guides against closed forms: the parameters' alone, and refined fits."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from diagnostic_models import CONJUGATE_DATA, conjugate, conjugate_posterior
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from scipy.stats import multivariate_normal, norm

from numpyro_sde.diagnostics import RefinedFit, SVIFit, compare_fits, refine_fit, to_arviz
from numpyro_sde.diagnostics.compare.arviz_compat import get_group

MEAN, SD, LOG_Z = conjugate_posterior()
LENGTH = 20
Y = np.random.default_rng(0).normal(0.5, 1.2, LENGTH)


def levels(y=None):
    """theta ~ N(0, 1), x_t ~ N(theta, 1) in one event, y_t ~ N(x_t, 0.5^2)."""
    theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
    x = numpyro.sample("x", dist.Normal(theta * jnp.ones(LENGTH), 1.0).to_event(1))
    numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


def exact_theta():
    """Mean and sd of theta given y, and the log evidence."""
    precision = 1 + LENGTH / 1.25
    cov = 1.25 * np.eye(LENGTH) + 1.0
    log_z = multivariate_normal.logpdf(Y, np.zeros(LENGTH), cov)
    return Y.sum() / 1.25 / precision, precision**-0.5, log_z


def path_guide(shift=0.0, factor=1.0, offer=True):
    """q(theta) with its mean shifted (in sds), q(x | theta) with its sd multiplied."""
    mean, sd, _ = exact_theta()

    def guide(y=None):
        theta = numpyro.sample("theta", dist.Normal(mean + shift * sd, sd))
        at = 0.2 * (theta + 4 * y)
        numpyro.sample("x", dist.Normal(at, factor * np.sqrt(0.2)).to_event(1))

    if offer:
        guide.path_sites = lambda: ("x",)
    return guide


def as_fit(guide):
    svi = SVI(levels, guide, numpyro.optim.Adam(0.1), Trace_ELBO())
    return SVIFit(svi, {}, model_kwargs={"y": Y})


def weights(guide, num_paths):
    tree = to_arviz(as_fit(guide), num_samples=1000, num_paths=num_paths, log_likelihood=False)
    return tree, get_group(tree, "sample_stats")


@pytest.mark.slow
def test_exact_guide_has_constant_weights():
    _, _, log_z = exact_theta()
    _, stats = weights(path_guide(), 3)
    np.testing.assert_allclose(stats["log_weight_parameters"], log_z, atol=1e-3)
    np.testing.assert_allclose(stats["log_p"] - stats["log_q"], log_z, atol=1e-3)


@pytest.mark.slow
def test_parameters_alone_are_judged_right_under_a_poor_path():
    """sd of the path 1.6 times the right one, in 20 dimensions: the square of a path's weight is
    (1.6 / sqrt(2 - 1 / 1.6^2))^20 = 81 times that of its mean; 256 paths leave 0.31 of it."""
    _, _, log_z = exact_theta()
    tree, stats = weights(path_guide(factor=1.6), 256)
    table = compare_fits({"poor": tree})
    row = table.fits.loc["poor"]
    assert row["khat"] > 0.7
    assert row["efficiency"] < 0.1
    assert row["khat_parameters"] < 0.5
    assert row["efficiency_parameters"] == pytest.approx(1 / (1 + 80 / 256), abs=0.1)
    weight = np.exp(np.ravel(stats["log_weight_parameters"]) - log_z)
    assert abs(weight.mean() - 1) < 4 * weight.std() / np.sqrt(1000)
    assert table.verdicts["poor"].startswith("use its parameters as a proposal")
    assert "not its path" in table.verdicts["poor"]


@pytest.mark.slow
def test_wrong_parameters_stay_wrong():
    tree, _ = weights(path_guide(shift=4.0), 8)
    table = compare_fits({"wrong": tree})
    assert table.fits.loc["wrong", "khat_parameters"] > 0.7
    assert table.verdicts["wrong"].startswith("do not trust these parameters: theta")


def test_guides_that_offer_nothing_get_no_such_number():
    _, stats = weights(path_guide(offer=False), 8)
    assert "log_weight_parameters" not in stats
    _, stats = weights(path_guide(), 1)
    assert "log_weight_parameters" not in stats
    guide = path_guide()
    guide.path_sites = lambda: ("z",)
    with pytest.raises(ValueError, match=r"path_sites\(\) names \['z'\]"):
        weights(guide, 4)
    guide.path_sites = lambda: ("theta", "x")
    with pytest.raises(ValueError, match=r"path_sites\(\) names all"):
        weights(guide, 4)


class ParametersThenPath:
    """An automatic guide over theta, then a path given it: the form of a path guide."""

    def __init__(self):
        self.parameters = AutoDiagonalNormal(
            lambda y=None: numpyro.sample("theta", dist.Normal(0.0, 1.0)), prefix="first"
        )

    def __call__(self, y=None):
        theta = self.parameters(y)["theta"]
        at = 0.2 * (theta + 4 * y)
        x = numpyro.sample("x", dist.Normal(at, np.sqrt(0.2)).to_event(1))
        return {"theta": theta, "x": x}

    def path_sites(self):
        return ("x",)


@pytest.mark.slow
def test_auxiliary_sites_are_held():
    """`first_latent` is held; `theta`, a Delta at it, follows."""
    mean, sd, log_z = exact_theta()
    guide = ParametersThenPath()
    svi = SVI(levels, guide, numpyro.optim.Adam(0.1), Trace_ELBO())
    svi.init(jax.random.key(0), y=Y)
    params = {"first_loc": jnp.array([mean]), "first_scale": jnp.array([sd])}
    fit = SVIFit(svi, params, model_kwargs={"y": Y})
    stats = get_group(to_arviz(fit, num_samples=50, num_paths=3), "sample_stats")
    np.testing.assert_allclose(stats["log_weight_parameters"], log_z, atol=1e-3)


def gaussian(factor, shift=0.0):
    def guide(y=None):
        numpyro.sample("theta", dist.Normal(MEAN + shift * SD, factor * SD))

    svi = SVI(conjugate, guide, numpyro.optim.Adam(1e-3), Trace_ELBO())
    return SVIFit(svi, {}, model_kwargs={"y": CONJUGATE_DATA})


def assert_posterior(draws, size):
    draws = np.asarray(draws, np.float64)
    assert abs(draws.mean() - MEAN) < 4 * SD / np.sqrt(size)
    assert abs(draws.std() / SD - 1) < 4 / np.sqrt(2 * size)


def test_psis_corrects_a_shifted_wide_guide():
    """1.5 posterior sds wide, shifted by 0.7: 4,000 draws, seed 0."""
    fit = refine_fit(gaussian(1.5, 0.7), num_samples=2000)
    assert isinstance(fit, RefinedFit)
    assert fit.khat < 0.5
    assert_posterior(fit.draws["theta"], min(fit.ess, 2000))
    assert abs(fit.log_evidence - LOG_Z) < 4 * fit.log_evidence_se + 1e-4
    # The efficiency in closed form: 1 / E_q[w^2] for normal laws.
    grid = np.linspace(-12, 12, 20_001)
    square = np.trapezoid(norm.pdf(grid) ** 2 / norm.pdf(grid, 0.7, 1.5), grid)
    assert fit.ess / 4000 == pytest.approx(1 / square, rel=0.05)
    assert fit.log_evidence_se == pytest.approx(np.sqrt((square - 1) / 4000), rel=0.1)
    tree = to_arviz(fit)
    attrs = get_group(tree, "posterior").attrs
    assert (attrs["method"], attrs["engine"]) == ("psis", "guide")
    assert attrs["importance_ess"] == fit.ess
    table = compare_fits({"refined": fit, "guide": gaussian(1.5, 0.7)}, num_samples=4000)
    assert table.verdicts["refined"] == "use it"
    assert table.verdicts["guide"].startswith("use it as a proposal: theta (0.")
    assert np.isnan(table.parameters.loc[("theta", "refined"), "rhat"])
    assert table.fits.loc["refined", "log_evidence"] == fit.log_evidence
    assert table.fits.loc["refined", "num_points"] == len(CONJUGATE_DATA)
    assert fit.get_samples()["theta"].shape == (2000,)
    assert "log evidence" in str(fit)


def test_psis_says_when_it_corrects_nothing():
    with pytest.warns(UserWarning, match="resampling corrects nothing"):
        fit = refine_fit(gaussian(0.2, 2.0))
    assert fit.khat > 0.7
    assert compare_fits({"bad": fit}).verdicts["bad"].startswith("do not trust these parameters")


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "shift"), [(1.5, 0.0), (0.2, 2.0)])
def test_nuts_from_a_guide(factor, shift):
    """2 chains of 1,000 draws after 100, from a good guide and from a bad one; seed 0."""
    options = {"num_chains": 2, "num_warmup": 100, "num_guide_draws": 1000}
    fit = refine_fit(gaussian(factor, shift), method="nuts", chain_method="sequential", **options)
    tree = to_arviz(fit)
    posterior = get_group(tree, "posterior")
    assert posterior["theta"].shape == (2, 1000)
    table = compare_fits({"nuts": tree})
    row = table.parameters.loc[("theta", "nuts")]
    assert_posterior(posterior["theta"], row["ess_bulk"])
    assert table.verdicts["nuts"] == "use it"
    assert posterior.attrs["method"] == "mcmc"
    assert posterior.attrs["refined_from"] == "guide"
    assert posterior.attrs["sampling_time"] > 0
    mass = fit.mcmc.last_state.adapt_state.inverse_mass_matrix[("theta",)]
    if factor > 1:  # a proposal that covers: the posterior's variance, never adapted
        np.testing.assert_allclose(mass, SD**2, rtol=0.15)
        assert abs(fit.log_evidence - LOG_Z) < 4 * fit.log_evidence_se + 1e-4
    assert fit.khat < 0.5 if factor > 1 else fit.khat > 0.7


@pytest.mark.slow
def test_several_sites_with_constraints():
    """Chains start where the guide is, in unconstrained space and the order of its sites."""

    def model():
        numpyro.sample("b", dist.LogNormal(1.0, 0.3))
        numpyro.sample("a", dist.Normal(jnp.array([0.0, 5.0]), jnp.array([0.1, 2.0])).to_event(1))

    svi = SVI(model, AutoNormal(model), numpyro.optim.Adam(0.1), Trace_ELBO())
    svi.init(jax.random.key(0))
    params = {
        "a_auto_loc": jnp.array([0.0, 5.0]),
        "a_auto_scale": jnp.array([0.1, 2.0]),
        "b_auto_loc": jnp.array(1.0),
        "b_auto_scale": jnp.array(0.3),
    }
    options = {"num_chains": 1, "num_warmup": 50, "num_samples": 500}
    fit = refine_fit((svi, params), method="nuts", **options)
    mass = np.asarray(fit.mcmc.last_state.adapt_state.inverse_mass_matrix["a", "b"])
    np.testing.assert_allclose(np.diag(mass), [0.01, 4.0, 0.09], rtol=0.2)
    assert fit.log_evidence == pytest.approx(0.0, abs=1e-3)
    log_b = np.log(fit.get_samples()["b"])
    assert abs(log_b.mean() - 1.0) < 4 * 0.3 / np.sqrt(200)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="method must be 'psis' or 'nuts'"):
        refine_fit(gaussian(1.0), method="loo")
    with pytest.raises(ValueError, match="num_samples must be positive"):
        refine_fit(gaussian(1.0), num_samples=0)
    with pytest.raises(TypeError, match="fit must be an SVIFit"):
        refine_fit({"theta": np.zeros(3)})
    guide = AutoDelta(conjugate)
    svi = SVI(conjugate, guide, numpyro.optim.Adam(0.1), Trace_ELBO())
    result = svi.run(jax.random.key(0), 2, y=CONJUGATE_DATA, progress_bar=False)
    with pytest.raises(ValueError, match="guide with a density"):
        refine_fit(SVIFit(svi, result, model_kwargs={"y": CONJUGATE_DATA}))

    def outside(y=None):
        numpyro.sample("theta", dist.Normal(1e30, 1.0))

    with pytest.raises(ValueError, match="no draw of the guide has a finite density"):
        refine_fit((outside, {}), conjugate, model_kwargs={"y": CONJUGATE_DATA})
