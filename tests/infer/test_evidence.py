"""The evidence by importance sampling over particle filters, against Kalman and a grid filter."""

import jax
import jax.numpy as jnp
import multimodal
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS
from numpyro.infer.util import log_density

import numpyro_sde as nsde
from numpyro_sde.filters import Kalman
from numpyro_sde.infer.evidence_result import EvidenceRound
from numpyro_sde.infer.importance import _agree, _Student

Y = np.random.default_rng(3).normal(size=15)


def model(y=None):
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    ou = nsde.processes.OrnsteinUhlenbeck(1.0, 0.0, scale)
    x = numpyro.sample("x", nsde.SDEPath(ou, np.arange(15.0), dist.Normal(0.0, 1.0)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.5), obs=y)


def exact():
    """By quadrature over the scale, the path integrated out by Kalman."""
    marginal = nsde.handlers.marginalize(model, method=Kalman())
    logs = np.linspace(-3.0, 3.0, 601)

    def joint(u):
        return log_density(marginal, (Y,), {}, {"scale": jnp.exp(u)})[0] + u

    values = np.asarray(jax.jit(lambda u: jax.lax.map(joint, u))(jnp.asarray(logs)))
    return np.log(np.sum(np.exp(values - values.max()))) + values.max() + np.log(logs[1] - logs[0])


def check(proposal, particles, seeds, draws):
    truth = exact()
    found = [
        nsde.evidence(
            model, Y, rng_key=jax.random.key(seed), num_draws=draws, proposal=proposal,
            num_particles=particles,
        )
        for seed in range(seeds)
    ]  # fmt: skip
    misses = np.array([e.log_evidence - truth for e in found])
    inside = np.abs(misses) < 2.0 * np.array([e.error for e in found])
    return misses, inside, found


@pytest.mark.slow
def test_the_evidence_is_kalmans(x64):
    misses, _, found = check("guided", 4, 2, 1500)
    assert np.all(np.abs(misses) < 4.0 * np.array([e.error for e in found]))
    assert np.all(np.abs(misses) < 0.1)
    first = found[0]
    assert first.khat < 0.7
    assert first.samples["scale"].shape == (1500,)
    assert np.exp(first.log_weights).sum() == pytest.approx(1.0)
    assert first.resampled(jax.random.PRNGKey(0), 7)["scale"].shape == (7,)


@pytest.mark.slow
def test_it_is_inside_two_errors_in_18_of_20_seeds(x64):
    misses, inside, _ = check("bootstrap", 200, 20, 1000)
    assert inside.sum() >= 18
    assert np.max(np.abs(misses)) < 0.1


def test_a_fit_by_particles_has_its_filters_and_its_law(x64, monkeypatch):
    """Nothing is looked for again: neither a proposal, nor a number, nor where the mass is."""
    kernel = nsde.infer.PMMH(model, 4, proposal="guided")
    mcmc = MCMC(
        kernel, num_warmup=100, num_samples=100, num_chains=2, chain_method="vectorized",
        progress_bar=False,
    )  # fmt: skip
    mcmc.run(jax.random.key(0), Y)
    monkeypatch.setattr(kernel, "tune", None)
    found = nsde.evidence(mcmc, rng_key=jax.random.key(1), num_draws=400)
    assert found.method == "filters"
    assert found.num_particles == 4
    assert abs(found.log_evidence - exact()) < 4.0 * found.error < 0.4
    nuts = MCMC(NUTS(model), num_warmup=1, num_samples=1)
    with pytest.raises(ValueError, match=r"needs one by infer\.PMMH, got NUTS"):
        nsde.evidence(nuts, rng_key=jax.random.key(1), method="filters")
    with pytest.raises(ValueError, match="has not run"):
        nsde.evidence(nuts, rng_key=jax.random.key(1))


@pytest.mark.slow
def test_the_evidence_of_the_double_well(x64):
    found = nsde.evidence(
        multimodal.well, multimodal.data("well"), rng_key=jax.random.key(0), num_draws=1000
    )
    assert abs(found.log_evidence - multimodal.REFERENCE["well"]["log_evidence"]) < 0.1


def test_rounds_must_agree():
    near = [EvidenceRound(-3.0 + d, 0.1, 200.0) for d in (0.0, 0.2, 0.1)]
    assert not _agree(near[:2])
    assert _agree(near)
    assert not _agree([*near[:2], EvidenceRound(-4.0, 0.1, 200.0)])


def test_the_sampling_law_is_a_student():
    law = _Student(np.array([0.3, -1.0]), np.array([[1.0, 0.0], [0.5, 2.0]]))
    points = law.draw(jax.random.key(0), 5)
    theirs = dist.MultivariateStudentT(5.0, jnp.asarray(law.mean), jnp.asarray(law.factor))
    np.testing.assert_allclose(law.log_density(points), theirs.log_prob(points), rtol=1e-5)


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="method must be one of 'filters'"):
        nsde.evidence(model, Y, rng_key=jax.random.key(0), method="laplace")
    with pytest.raises(ValueError, match="num_draws must be at least 50"):
        nsde.evidence(model, Y, rng_key=jax.random.key(0), num_draws=10)
