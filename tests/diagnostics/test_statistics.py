"""Distances and importance-sampling statistics against scipy, ArviZ and closed forms."""

import numpy as np
import pytest
from scipy.stats import norm, wasserstein_distance

from numpyro_sde.diagnostics.compare.arviz_compat import load_arviz, make_dataset, make_tree
from numpyro_sde.diagnostics.compare.statistics import (
    fit_weights,
    khat_threshold,
    leave_one_out,
    wasserstein,
)


@pytest.mark.parametrize(("n", "m"), [(50, 50), (50, 73), (7, 1000), (1, 5)])
def test_wasserstein_matches_scipy(n, m):
    rng = np.random.default_rng(n)
    first, second = rng.normal(size=(n, 2, 3)), rng.gamma(2.0, size=(m, 2, 3))
    expected = [
        [wasserstein_distance(first[:, i, j], second[:, i, j]) for j in range(3)] for i in range(2)
    ]
    np.testing.assert_allclose(wasserstein(first, second), expected, rtol=1e-10)


def test_wasserstein_of_a_long_path_is_chunked_alike():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(20, 1300)), rng.normal(size=(30, 1300))
    whole = wasserstein(first, second)
    np.testing.assert_allclose(
        whole[1200:1210], wasserstein(first[:, 1200:1210], second[:, 1200:1210])
    )


def test_leave_one_out_matches_arviz():
    rng = np.random.default_rng(1)
    log_likelihood = norm.logpdf(rng.normal(size=(4, 250, 1)), rng.normal(size=30), 1.0)
    dims = ("chain", "draw", "obs")
    tree = make_tree(
        {
            "posterior": make_dataset({"a": (dims[:2], rng.normal(size=(4, 250)))}, {}, {}),
            "log_likelihood": make_dataset({"y": (dims, log_likelihood)}, {}, {}),
        }
    )
    theirs = load_arviz().loo(tree, reff=0.8, pointwise=True)
    ours = leave_one_out(log_likelihood.reshape(1000, 30), 0.8)
    elpd = theirs.elpd if hasattr(theirs, "elpd") else theirs.elpd_loo
    p_loo = theirs.p if hasattr(theirs, "p") else theirs.p_loo
    np.testing.assert_allclose(ours.elpd.sum(), elpd, rtol=1e-8)
    np.testing.assert_allclose(ours.num_effective, p_loo, rtol=1e-6)
    np.testing.assert_allclose(ours.khat, np.asarray(theirs.pareto_k), rtol=1e-6)
    np.testing.assert_allclose(ours.threshold, theirs.good_k)


def test_leave_one_out_of_a_conjugate_model_is_exact():
    """theta ~ N(0, 1), y_i ~ N(theta, 1): y_i given the others is normal."""
    y = np.array([0.3, -0.8, 1.1, 0.4, 2.0, -0.1])
    n = len(y)
    mean, variance = (y.sum() - y) / n, 1.0 / n  # posterior without y_i: n - 1 data and the prior
    exact = norm.logpdf(y, mean, np.sqrt(1.0 + variance)).sum()
    rng = np.random.default_rng(2)
    estimates = []
    for _ in range(25):
        theta = y.sum() / (n + 1) + rng.normal(size=(8000, 1)) / np.sqrt(n + 1)
        loo = leave_one_out(norm.logpdf(y, theta, 1.0))
        assert loo.khat.max() < loo.threshold
        estimates.append(loo.elpd.sum())
    error = np.std(estimates, ddof=1) / 5.0
    assert error < 0.005  # sharp enough to tell, on a sum near -9
    assert abs(np.mean(estimates) - exact) < 4 * error


def test_threshold_grows_with_the_draws():
    assert khat_threshold(100) == pytest.approx(0.5)
    assert khat_threshold(4000) == 0.7


@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.9])
def test_fit_weights_of_a_narrow_gaussian(ratio):
    """Target N(0, 1) times e^c, fit N(0, s^2): k = 1 - s^2, KL = -log s + (s^2 - 1) / 2."""
    n, log_z = 20_000, -7.0
    z = ratio * np.random.default_rng(3).normal(size=n)
    weights = fit_weights(log_z + norm.logpdf(z) - norm.logpdf(z, scale=ratio))
    kl = -np.log(ratio) + (ratio**2 - 1.0) / 2.0
    assert abs(weights.elbo - (log_z - kl)) < 4 * weights.elbo_se
    # The log weight is a constant plus z^2 (1/s^2 - 1) / 2, whose sd is (1 - s^2) / sqrt(2).
    np.testing.assert_allclose(weights.elbo_se, (1 - ratio**2) / np.sqrt(2 * n), rtol=0.05)
    # The Pareto shape is fitted to 3 sqrt(n) draws: sd about (1 + k) / sqrt(3 sqrt(n)) = 0.09;
    # the weights reach their limiting tail slowly, from below.
    assert 1 - ratio**2 - 0.35 < weights.khat < 1 - ratio**2 + 0.2
    assert (weights.khat > 0.7) == (ratio == 0.3)
    if ratio > 0.8:  # finite variance: E w^2 = s^2 / sqrt(2 s^2 - 1)
        second = ratio**2 / np.sqrt(2 * ratio**2 - 1)
        assert abs(weights.log_evidence - log_z) < 4 * np.sqrt((second - 1) / n)
        np.testing.assert_allclose(weights.efficiency, 1 / second, rtol=0.05)


def test_fit_weights_of_impossible_draws():
    constant = np.full(100, -2.0)
    assert fit_weights(constant).khat == -np.inf
    assert fit_weights(constant).log_evidence == pytest.approx(-2.0)
    assert fit_weights(np.append(constant, np.nan)).khat == np.inf
    forbidden = fit_weights(np.concatenate([constant, np.full(100, -np.inf)]))
    assert forbidden.elbo == -np.inf
    assert forbidden.log_evidence == pytest.approx(-2.0 + np.log(0.5))
    assert forbidden.efficiency == pytest.approx(0.5)
