"""Interpolants: velocity and score against closed forms, populations of the SDE and of the flow."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from scipy import stats

import numpyro_sde as nsde
from numpyro_sde.snapshots.interpolant import Interpolant
from numpyro_sde.snapshots.velocity import LearnedVelocity, NoiseScale

# N(0, 1) to N(2, 1/4), scale 1: the coupling of the Brownian bridge has covariance 0.2071.
COV = 0.20710678


def moments(t, cov=COV, scale=1.0):
    """Mean and variance of the population, and covariances of displacement and noise with x_t."""
    gamma2 = scale**2 * t * (1 - t)
    var = (1 - t) ** 2 + t**2 / 4 + 2 * t * (1 - t) * cov + gamma2
    return 2 * t, var, -(1 - t) + t / 4 + (1 - 2 * t) * cov, np.sqrt(gamma2)


def closed(t, x, cov=COV, scale=1.0):
    """Velocity and score."""
    mean, var, m, _ = moments(t, cov, scale)
    slope = scale**2 * (1 - 2 * t) / 2  # gamma gamma'
    return 2 + (m + slope) / var * (x - mean), -(x - mean) / var


class ExactNet(eqx.Module):
    """The conditional means of the normal example, as a network would give them."""

    cov: float = eqx.field(static=True)

    def __call__(self, v):
        x, t = v[0], (v[1] + 1.0) / 2.0
        var = (1 - t) ** 2 + t**2 / 4 + 2 * t * (1 - t) * self.cov + t * (1 - t)
        m = -(1 - t) + t / 4 + (1 - 2 * t) * self.cov
        r = (x - 2 * t) / var
        return jnp.stack([2 + m * r, jnp.sqrt(t * (1 - t)) * r])


def exact(noise):
    one = jnp.ones(1)
    field = LearnedVelocity(
        ExactNet(COV), jnp.array([0.0, 1.0]), 0.0 * one, one, NoiseScale(1.0, None), True
    )
    return Interpolant(field, noise, jnp.zeros(1))


def test_exact_means_give_the_populations_at_every_noise_level():
    grid = np.linspace(0.0, 1.0, 201)
    x0 = jax.random.normal(jax.random.key(0), (4000,))
    for noise in (0.0, 1.0, 1.6):
        sde = exact(1.0).with_noise(noise)
        path = nsde.SDEPath(sde, grid, dist.Delta(x0), scheme=nsde.schemes.Euler())
        drawn = np.asarray(jax.jit(path.sample)(jax.random.key(1)))
        for k in (50, 100, 150):
            mean, var, _, _ = moments(grid[k])
            assert abs(drawn[:, k].mean() - mean) < 4 * np.sqrt(var / 4000)
            assert abs(drawn[:, k].var() - var) < 4 * var * np.sqrt(2 / 4000) + 0.01 * var  # steps
    t, x = 0.3, 1.1
    velocity, score = closed(t, x)
    np.testing.assert_allclose(exact(1.0).velocity(t, x), velocity, rtol=1e-4)
    np.testing.assert_allclose(exact(1.0).score(t, x), score, rtol=1e-4)


def test_likelihood_by_the_flow():
    x = jnp.array([-0.5, 0.8, 1.7])
    for t in (0.5, 1.0):
        mean, var, _, _ = moments(t)
        found = exact(1.0).log_prob(x, dist.Normal(0.0, 1.0), time=t)
        # The flow begins a thousandth late: 4e-3 of the variance there.
        np.testing.assert_allclose(found, stats.norm.logpdf(x, mean, np.sqrt(var)), atol=5e-3)


@pytest.mark.slow
def test_a_few_steps_run_for_every_kind_of_cloud():
    rng = np.random.default_rng(0)
    clouds = [rng.normal(size=(n, 2)) + k for k, n in enumerate((30, 20, 25))]
    small = {"num_steps": 3, "width": 4, "depth": 1, "batch_size": 8}
    several = nsde.interpolant(
        *clouds, times=[0.0, 1.0, 3.0], gamma=lambda s: s * (1 - s), noise=0.4, **small
    )
    assert several.velocity(2.0, clouds[0][0]).shape == (2,)
    assert several.drift_at(0.5, clouds[0][0]).shape == (2,)
    base = dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2))
    assert np.isfinite(several.log_prob(clouds[1][:3], base, time=1.0, num_steps=4)).all()
    plan = np.full((30, 20), 1 / 600)
    nsde.interpolant(clouds[0], clouds[1], coupling=plan, **small)
    with pytest.raises(ValueError, match="probabilities of shape"):
        nsde.interpolant(clouds[0], clouds[1], coupling=plan.T, **small)
    with pytest.raises(ValueError, match="clouds of one size"):
        nsde.interpolant(clouds[0], clouds[1], coupling="paired", **small)
    with pytest.raises(ValueError, match="zero at both ends"):
        nsde.interpolant(clouds[0], clouds[1], gamma=lambda s: 1.0 + 0 * s, **small)
    with pytest.raises(ValueError, match="must not be negative"):
        several.with_noise(-1.0)


def test_pairs_are_drawn_as_often_as_they_are_likely():
    from numpyro_sde.snapshots.interpolant import _draw

    weights = np.array([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    totals = jnp.asarray(np.cumsum(weights), jnp.float32)
    u = jnp.asarray((np.arange(1000) + 0.5) / 1000, jnp.float32)
    counts = np.bincount(np.asarray(_draw(lambda at: totals[at], 6, u)), minlength=6)
    np.testing.assert_allclose(counts / 1000, weights, atol=2e-3)
    one = _draw(lambda at: jnp.ones(at.shape), 1, u)
    assert int(one.max()) == 0


def judge(sde, forms, draw, times=(0.1, 0.3, 0.5, 0.7, 0.9)):
    """Mean squared errors of velocity and score, as shares of their variances."""
    out = []
    for t in times:
        x = draw(t)
        both = jax.vmap(sde.field.parts, (None, 0))(t, jnp.asarray(x))
        out.append(
            [
                np.mean((np.asarray(a) - b) ** 2) / np.var(b)
                for a, b in zip(both, forms(t, x), strict=True)
            ]
        )
    return np.array(out)


@pytest.mark.slow
def test_between_normals_with_the_coupling_of_the_bridge():
    rng = np.random.default_rng(1)
    x0 = rng.normal(size=20_000)
    x1 = 2 + COV * x0 + np.sqrt(0.25 - COV**2) * rng.normal(size=20_000)
    sde = nsde.interpolant(x0, x1, coupling="paired", gamma=1.0, rng_key=jax.random.key(2))
    shares = judge(
        sde,
        closed,
        lambda t: stats.norm.rvs(moments(t)[0], np.sqrt(moments(t)[1]), size=4000, random_state=3),
    )
    assert shares.max() < 0.02, shares
    ends = {}
    for noise in (0.0, 1.0):
        path = nsde.SDEPath(
            sde.with_noise(noise),
            np.linspace(0, 1, 201),
            dist.Delta(jnp.asarray(x0[:10_000])),
            scheme=nsde.schemes.Euler(),
        )
        drawn = np.asarray(jax.jit(path.sample)(jax.random.key(4)))
        ends[noise] = drawn
        for k in (100, 200):
            mean, var, _, _ = moments(k / 200)
            levels = stats.norm.ppf((np.arange(10_000) + 0.5) / 10_000, mean, np.sqrt(var))
            w2 = np.sqrt(np.mean((np.sort(drawn[:, k]) - levels) ** 2))
            assert w2 < 0.05, (noise, k, w2)
    for k in (50, 100, 150, 200):
        w2 = np.sqrt(np.mean((np.sort(ends[0.0][:, k]) - np.sort(ends[1.0][:, k])) ** 2))
        assert w2 < 0.07, (k, w2)  # two samples of errors below 0.05 each


@pytest.mark.slow
def test_between_mixtures():
    left, right = np.array([-1.0, 1.5]), np.array([-0.5, 2.0])
    sd0, sd1 = np.array([0.4, 0.6]), np.array([0.5, 0.3])
    rng = np.random.default_rng(5)
    which = rng.integers(0, 2, (2, 20_000))
    x0 = left[which[0]] + sd0[which[0]] * rng.normal(size=20_000)
    x1 = right[which[1]] + sd1[which[1]] * rng.normal(size=20_000)
    gamma = 0.8
    sde = nsde.interpolant(x0, x1, gamma=gamma, rng_key=jax.random.key(6))

    def forms(t, x):
        scale = gamma * np.sqrt(t * (1 - t))
        mean = ((1 - t) * left[:, None] + t * right[None]).ravel()
        var = ((1 - t) ** 2 * sd0[:, None] ** 2 + t**2 * sd1[None] ** 2).ravel() + scale**2
        r = x[:, None] - mean
        share = np.exp(-0.5 * r**2 / var) / np.sqrt(var)
        share /= share.sum(1, keepdims=True)
        pull = (t * sd1[None] ** 2 - (1 - t) * sd0[:, None] ** 2).ravel()
        pull = pull + gamma**2 * (1 - 2 * t) / 2
        jump = (right[None] - left[:, None]).ravel()
        return (share * (jump + pull * r / var)).sum(1), -(share * r / var).sum(1)

    def draw(t):
        rng = np.random.default_rng(7)
        i, j = rng.integers(0, 2, (2, 4000))
        z = rng.normal(size=(3, 4000))
        start, end = left[i] + sd0[i] * z[0], right[j] + sd1[j] * z[1]
        return (1 - t) * start + t * end + gamma * np.sqrt(t * (1 - t)) * z[2]

    shares = judge(sde, forms, draw)
    assert shares.max() < 0.02, shares


@pytest.mark.slow
def test_with_a_bridge_it_is_the_bridge():
    rng = np.random.default_rng(8)
    clouds = np.stack([rng.normal(size=1500), 2 + 0.5 * rng.normal(size=1500)])
    reference = nsde.processes.BrownianMotion(drift=0.0, scale=1.0)
    bridge = nsde.schrodinger_bridge(reference, [0.0, 1.0], clouds)
    sde = nsde.interpolant(*clouds, coupling=bridge, gamma=1.0, rng_key=jax.random.key(9))
    x = jnp.linspace(-0.3, 2.3, 14)
    learned = jax.vmap(lambda x: sde.drift_at(0.5, x))(x)
    exact_drift = jax.vmap(lambda x: bridge.drift_at(0.5, x))(x)
    assert float(jnp.mean((learned - exact_drift) ** 2) / jnp.var(exact_drift)) < 0.02
