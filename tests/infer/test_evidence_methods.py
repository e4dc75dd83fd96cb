"""The evidence by bridge sampling, tempering and its batch form, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS
from scipy import stats

import numpyro_sde as nsde
from numpyro_sde.infer.bridge_sampling import NormalLaw, bridged
from numpyro_sde.infer.tempered_smc import _increment

RATE, COUNTS = (3.0, 2.0), np.array([4, 1, 3])


def counts(y=None):
    """Poisson counts with a gamma rate, beside three numbers seen with noise."""
    rate = numpyro.sample("rate", dist.Gamma(*RATE))
    numpyro.sample("y", dist.Poisson(rate).expand([3]).to_event(1), obs=y)
    z = numpyro.sample("z_innov", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    numpyro.sample("seen", dist.Normal(z, 0.5).to_event(1), obs=jnp.array([1.0, 0.0, -0.5]))


def exact_log_evidence():
    a, b = RATE
    total, n = COUNTS.sum(), COUNTS.size
    logs = stats.gamma.logpdf(1.0, a, scale=1.0 / b) + stats.poisson.logpmf(COUNTS, 1.0).sum()
    logs -= stats.gamma.logpdf(1.0, a + total, scale=1.0 / (b + n))  # Bayes' rule at rate 1
    seen = stats.norm(0.0, np.sqrt(1.25)).logpdf([1.0, 0.0, -0.5]).sum()
    return logs + seen


def exact_draws(chains, length):
    rng = np.random.default_rng(0)
    total, n = COUNTS.sum(), COUNTS.size
    rate = rng.gamma(RATE[0] + total, 1.0 / (RATE[1] + n), size=(chains, length))
    means = np.array([1.0, 0.0, -0.5]) / 1.25
    return {"rate": rate, "z_innov": means + np.sqrt(0.2) * rng.normal(size=(chains, length, 3))}


def test_bridge_sampling_from_draws():
    draws = {name: v[0] for name, v in exact_draws(1, 2000).items()}
    found = nsde.evidence(counts, COUNTS, rng_key=jax.random.key(0), fit=draws)
    assert found.method == "bridge"
    assert 0.0 < found.error < 0.05
    assert abs(found.log_evidence - exact_log_evidence()) < 4.0 * found.error
    assert len(found.rounds) == 2


@pytest.mark.slow
def test_bridge_sampling_of_a_run():
    mcmc = MCMC(NUTS(counts), num_warmup=200, num_samples=500, progress_bar=False)
    mcmc.run(jax.random.key(1), COUNTS)
    found = nsde.evidence(mcmc, rng_key=jax.random.key(0))
    assert abs(found.log_evidence - exact_log_evidence()) < 4.0 * found.error
    assert found.error < 0.1
    with pytest.raises(ValueError, match="needs one by"):
        nsde.evidence(mcmc, method="tempered", rng_key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"needs one by infer\.PMMH"):
        nsde.evidence(mcmc, method="filters", rng_key=jax.random.key(0))


def test_the_error_of_a_bridge_grows_with_dependence():
    """Normal law and posterior that differ by a shift; draws repeated twenty times."""
    rng = np.random.default_rng(2)
    drawn = rng.normal(size=2000)
    posterior = 1.0 + rng.normal(size=(1, 2000))

    def log_ratio(x):
        return -0.5 * (x - 1.0) ** 2 + 0.5 * x**2 + 3.0

    value, error, _ = bridged(log_ratio(posterior), log_ratio(drawn))
    assert abs(value - 3.0) < 4.0 * error
    slow = np.repeat(posterior[:, :100], 20, axis=1)
    value, larger, _ = bridged(log_ratio(slow), log_ratio(drawn))
    assert larger > 1.5 * error
    assert abs(value - 3.0) < 4.0 * larger


def test_the_law_of_a_bridge_has_a_density():
    rng = np.random.default_rng(3)
    dense = np.array([True, False, True, False, False])
    law = NormalLaw.fitted(rng.normal(size=(500, 5)) * [1.0, 0.3, 2.0, 1.0, 1.0], dense)
    points = law.draw(jax.random.key(0), 4)
    cov = np.zeros((5, 5))
    cov[np.ix_(dense, dense)] = law.factor @ law.factor.T
    cov[~dense, ~dense] = law.scale**2
    theirs = stats.multivariate_normal(law.mean, cov).logpdf(points)
    np.testing.assert_allclose(law.log_density(points), theirs, rtol=1e-6)


@pytest.mark.slow
def test_tempered_smc_in_one_batch():
    found = nsde.evidence(
        counts, COUNTS, rng_key=jax.random.key(2), method="smc", num_particles=400
    )
    assert found.method == "smc"
    assert len(found.rounds) == 4
    # The error of four repeats is itself known to half: 4 errors and a floor of 0.1 nats.
    assert abs(found.log_evidence - exact_log_evidence()) < max(4.0 * found.error, 0.1)
    draws = found.resampled(jax.random.key(3), 1600)
    rate, shape = np.asarray(draws["rate"]), RATE[0] + COUNTS.sum()
    # 1,600 particles with common ancestors: the error is taken for that of 400.
    sd = np.sqrt(shape) / (RATE[1] + 3)
    assert abs(rate.mean() - shape / (RATE[1] + 3)) < 4.0 * sd / np.sqrt(400)
    assert abs(np.asarray(draws["z_innov"]).std(0) - np.sqrt(0.2)).max() < 0.06


def test_the_step_leaves_the_wanted_share():
    ratios = jnp.asarray(100.0 * np.random.default_rng(4).normal(size=300), jnp.float32)
    step = float(_increment(ratios, jnp.zeros(())))
    weights = np.exp(step * (np.asarray(ratios) - np.asarray(ratios).max()))
    assert weights.sum() ** 2 / (weights**2).sum() == pytest.approx(0.7 * 300, rel=0.01)
    assert float(_increment(jnp.zeros(5), jnp.asarray(0.4))) == pytest.approx(0.6)


@pytest.mark.slow
def test_tempering_of_a_model():
    found = nsde.evidence(
        counts, COUNTS, rng_key=jax.random.key(5), method="tempered", num_draws=2000, num_levels=5
    )
    assert abs(found.log_evidence - exact_log_evidence()) < 4.0 * found.error
    assert found.error < 0.1
    assert found.samples["rate"].shape == (2000,)


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="needs fit="):
        nsde.evidence(counts, COUNTS, rng_key=jax.random.key(0), method="bridge")
    with pytest.raises(ValueError, match="no other method takes one"):
        nsde.evidence(counts, COUNTS, rng_key=jax.random.key(0), method="smc", fit={})
    with pytest.raises(TypeError, match="fit must be an MCMC"):
        nsde.evidence(counts, COUNTS, rng_key=jax.random.key(0), fit=3)
    lacking = {"rate": np.ones(200)}
    with pytest.raises(ValueError, match=r"none of \['z_innov'\]"):
        nsde.evidence(counts, COUNTS, rng_key=jax.random.key(0), fit=lacking)
    few = {"rate": np.ones(20), "z_innov": np.zeros((20, 3))}
    with pytest.raises(ValueError, match="100 draws or more"):
        nsde.evidence(counts, COUNTS, rng_key=jax.random.key(0), fit=few)
