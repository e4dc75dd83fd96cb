"""Leave-future-out against closed forms of a Gaussian model with an unknown mean."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS
from scipy.stats import multivariate_normal, norm

import numpyro_sde as nsde
from numpyro_sde.diagnostics import lfo

RATE, SCALE, SD = 0.7, 0.6, 0.4
TIMES = np.array([0.0, 0.5, 1.1, 1.4, 2.0, 3.1, 3.5, 4.2, 5.0, 5.4, 6.3, 7.0])
rng = np.random.default_rng(4)
PATH = SCALE**2 / (2 * RATE) * np.exp(-RATE * np.abs(np.subtract.outer(TIMES, TIMES)))
# All is normal: y = level + path + noise, level ~ N(0, 1).
COV = 1.0 + PATH + SD**2 * np.eye(len(TIMES))
Y = np.linalg.cholesky(COV) @ rng.normal(size=len(TIMES))
Y[4] = np.nan
RUNS = []


def model(times=TIMES, y=Y):
    RUNS.append(1)
    level = numpyro.sample("level", dist.Normal(0.0, 1.0))
    ou = nsde.processes.OrnsteinUhlenbeck(RATE, 0.0, SCALE)
    x = numpyro.sample("x", nsde.SDEPath(ou, times, dist.Normal(0.0, SCALE / np.sqrt(2 * RATE))))
    nsde.observe("y", x, lambda t, x, p: dist.Normal(p + x, SD), params=level, obs=y)


MARGINAL = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())
SEEN = np.flatnonzero(~np.isnan(Y))


def exact(start, horizon):
    values = []
    for k in range(start, len(SEEN) - horizon + 1):
        known, ahead = SEEN[:k], SEEN[k : k + horizon]
        gain = np.linalg.solve(COV[np.ix_(known, known)], COV[np.ix_(known, ahead)])
        mean = gain.T @ Y[known]
        cov = COV[np.ix_(ahead, ahead)] - gain.T @ COV[np.ix_(known, ahead)]
        values.append(multivariate_normal(mean, cov).logpdf(Y[ahead]))
    return np.array(values)


def exact_refit(calls, size=4000):
    """Independent draws of the level given the data up to a time, from its normal posterior."""

    def make(_):
        def run(key, cutoff):
            calls.append(cutoff)
            known = SEEN[TIMES[SEEN] <= cutoff]
            noise = COV[np.ix_(known, known)] - 1.0
            precision = 1.0 + np.linalg.solve(noise, np.ones(len(known))).sum()
            mean = np.linalg.solve(noise, Y[known]).sum() / precision
            return {"level": mean + np.asarray(jax.random.normal(key, (size,))) / precision**0.5}

        return run

    return make


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("horizon", [1, 3])
@pytest.mark.parametrize("refit", ["all", "psis"])
def test_against_closed_form(refit, horizon):
    """4,000 exact draws a fit: each log density has an error of its own below 0.01."""
    calls = []
    draws = {"level": np.zeros(5)}
    found = lfo(
        draws,
        start=4,
        horizon=horizon,
        refit=exact_refit(calls),
        khat_threshold=-np.inf if refit == "all" else 0.7,
        model=MARGINAL,
    )
    expected = exact(4, horizon)
    assert found.pointwise.shape == expected.shape
    assert found.origins.tolist() == TIMES[SEEN][3 : 3 + len(expected)].tolist()
    np.testing.assert_allclose(found.pointwise, expected, atol=0.03)
    assert abs(found.elpd - expected.sum()) < 0.06
    assert len(calls) == (len(expected) if refit == "all" else len(found.refits))
    if refit == "psis":
        assert len(calls) < len(expected)
        assert np.all(found.khat <= 0.7)


@pytest.mark.slow
def test_refits_of_a_sampler_compile_once():
    """Seed 0: five refits by NUTS; the model runs in Python for the first alone."""
    mcmc = MCMC(NUTS(MARGINAL), num_warmup=100, num_samples=300, progress_bar=False)
    mcmc.run(jax.random.key(0))
    del RUNS[:]
    few = lfo(mcmc, start=10, refit="all")
    one = len(RUNS)
    del RUNS[:]
    many = lfo(mcmc, start=6, refit="all")
    assert len(RUNS) == one
    assert len(few.refits) == 1
    assert len(many.refits) == 5
    # Standard deviation of one log density here is 0.05; the sum of five has 0.11.
    assert abs(many.elpd - exact(6, 1).sum()) < 0.45
    assert "5 fits" in str(many)


def test_a_path_seen_itself_and_a_panel():
    """Two series on their own clocks, exact transitions; the level is known, so no draws matter."""
    times = np.stack([[0.0, 1.0, 2.0], [0.0, 0.5, 2.5]])
    x = np.array([[0.0, 0.4, 0.1], [0.0, -0.3, 0.2]])

    def panel():
        numpyro.sample("unused", dist.Normal(0.0, 1.0))
        ou = nsde.processes.OrnsteinUhlenbeck(RATE, 0.0, SCALE)
        with numpyro.plate("series", 2):
            numpyro.sample("x", nsde.SDEPath(ou, times, 0.0), obs=x)

    make = lambda _: lambda key, cutoff: {"unused": jnp.zeros(50)}  # noqa: E731
    found = lfo({"unused": np.zeros(2)}, start=1, refit=make, model=panel)
    decay = np.exp(-RATE * np.diff(times))
    sd = SCALE * np.sqrt((1 - decay**2) / (2 * RATE))
    term = norm.logpdf(x[:, 1:], x[:, :-1] * decay, sd)
    # Times in order: 0.5 (second series), 1 (first), 2 (first), 2.5 (second).
    expected = [term[0, 0], term[0, 1], term[1, 1]]
    assert found.origins.tolist() == [0.5, 1.0, 2.0]
    np.testing.assert_allclose(found.pointwise, expected, rtol=1e-5)


def test_refusals():
    draws = {"level": np.zeros(5)}
    with pytest.raises(ValueError, match="kept latent"):
        lfo(draws, model=model)
    with pytest.raises(ValueError, match="give refit="):
        lfo(draws, model=MARGINAL)
    with pytest.raises(ValueError, match="start must leave 1 of the 11 times"):
        lfo(draws, model=MARGINAL, start=11, refit=exact_refit([]))
    with pytest.raises(ValueError, match="max_refits=1"):
        lfo(draws, model=MARGINAL, start=4, refit=exact_refit([]), khat_threshold=-9, max_refits=1)
    with pytest.raises(ValueError, match='"psis", "all"'):
        lfo(draws, model=MARGINAL, refit="never")
