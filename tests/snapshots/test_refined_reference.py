"""Refined references: the envelope gradient, a family with a known answer, a published problem."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from problems import (
    LV_TIMES,
    REPRESSILATOR_TIMES,
    STARTS,
    brownian_like,
    earth_mover,
    lotka_volterra,
    lv_family,
    repressilator,
    repressilator_family,
    simulate,
)

import numpyro_sde as nsde


def ou_family(snapshots, times=(0.0, 1.0, 2.5)):
    rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
    mean = numpyro.sample("mean", dist.Normal(0.0, 5.0))
    sde = nsde.processes.OrnsteinUhlenbeck(rate=rate, mean=mean, scale=0.7)
    numpyro.sample("cells", nsde.SnapshotLaw(sde, list(times), snapshots[0]), obs=snapshots)


def ou_clouds(n, seed, rate=0.8, mean=1.5):
    rng = np.random.default_rng(seed)
    out = []
    for t in (0.0, 1.0, 2.5):
        start = rng.normal(-1.0, 0.4, n)
        sd = 0.7 * np.sqrt((1 - np.exp(-2 * rate * t)) / (2 * rate))
        out.append(mean + np.exp(-rate * t) * (start - mean) + sd * rng.normal(size=n))
    return np.stack(out)


@pytest.mark.usefixtures("x64")
def test_gradient_is_that_of_the_objective_and_vanishes_at_the_estimate():
    # The objective at other parameters, by the bridge itself: kl, less what does not depend on it.
    clouds = ou_clouds(40, 0)
    fit = nsde.refine_reference(ou_family, clouds, tol=1e-11)
    assert fit.converged
    assert np.all(np.diff(fit.objective) <= 1e-9)

    def objective(rate, mean):
        sde = nsde.processes.OrnsteinUhlenbeck(rate=rate, mean=mean, scale=0.7)
        return float(nsde.schrodinger_bridge(sde, [0.0, 1.0, 2.5], clouds, tol=1e-11).kl.sum())

    rate, mean = (float(fit.values[k]) for k in ("rate", "mean"))
    best = objective(rate, mean)
    np.testing.assert_allclose(best, fit.objective[-1] - 2 * np.log(40), rtol=1e-9)
    h = 1e-3
    for move in ((h, 0.0), (0.0, h)):
        plus, minus = (
            objective(rate + move[0], mean + move[1]),
            objective(rate - move[0], mean - move[1]),
        )
        assert abs(plus - minus) / (2 * h) < 1e-3
        assert plus + minus - 2 * best > 0


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_recovers_a_linear_reference_within_its_bootstrap():
    clouds = ou_clouds(150, 1)
    fit = nsde.refine_reference(ou_family, clouds, num_bootstrap=30, rng_key=jax.random.key(3))
    for name, truth in (("rate", 0.8), ("mean", 1.5)):
        sd = fit.bootstrap[name].std(ddof=1)
        assert abs(float(fit.values[name]) - truth) < 4 * sd
    assert fit.interval(0.9)["rate"].shape == (2,)
    assert "not a posterior" in repr(fit)
    assert fit.bridge.couplings.shape == (2, 150, 150)


def held_out(make, family, times, num_sets):
    """Distances to held-out clouds: refined, Brownian and fresh draws, mean over data sets."""
    found = []
    dim = len(STARTS[2 if make is lotka_volterra else 3])
    for seed in range(num_sets):
        data = simulate(make(), jax.random.key(100 + seed), times, 50)
        fit = nsde.refine_reference(family, data[::2], sigma=0.1)
        plain = nsde.schrodinger_bridge(
            brownian_like(dim, 0.1), times[::2], data[::2], tol=1e-4, max_iterations=50_000
        )
        drawn = [
            bridge.sample_paths(jax.random.key(0), 50, max_step=0.05)
            for bridge in (fit.bridge, plain)
        ]
        keys = jax.random.split(jax.random.key(12), 10)
        fresh = [simulate(make(), key, times, 50) for key in keys]
        rows = []
        for k in range(1, len(times), 2):
            place = int(np.argmin(np.abs(drawn[0].times - times[k])))
            both = [earth_mover(one.paths[:, place], data[k]) for one in drawn]
            rows.append([*both, np.mean([earth_mover(one[k], data[k]) for one in fresh])])
        found.append(rows)
    return np.mean(found, axis=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "family", "times", "num_sets"),
    [
        (lotka_volterra, lv_family, LV_TIMES, 8),
        (repressilator, repressilator_family, REPRESSILATOR_TIMES, 4),
    ],
)
def test_published_problems_with_clouds_held_out(make, family, times, num_sets):
    # The even clouds to fit, the odd ones held out. One data set's distance varies by a third, so
    # the mean of several is held against the floor, the distance of fresh draws of the truth.
    refined, rough, floor = held_out(make, family, times, num_sets).T
    assert np.all(refined < 1.5 * floor), (refined, floor)
    assert np.all(refined < rough), (refined, rough)


def test_what_cannot_be_refined_is_refused():
    clouds = ou_clouds(12, 2)

    def moving_scale(snapshots):
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
        sde = nsde.processes.OrnsteinUhlenbeck(rate=1.0, mean=0.0, scale=scale)
        law = nsde.SnapshotLaw(sde, [0.0, 1.0, 2.5], snapshots[0])
        numpyro.sample("cells", law, obs=snapshots)

    with pytest.raises(ValueError, match=r"diffusion depends on \['scale'\]"):
        nsde.refine_reference(moving_scale, clouds)
    with pytest.raises(ValueError, match="one SnapshotLaw site"):
        nsde.refine_reference(lambda s: numpyro.sample("a", dist.Normal(0.0, 1.0)), clouds)
    held = numpyro.handlers.condition(ou_family, {"rate": jnp.array(1.0), "mean": jnp.array(0.0)})
    with pytest.raises(ValueError, match="no latent site"):
        nsde.refine_reference(held, clouds)
    with pytest.raises(ValueError, match="init_values names"):
        nsde.refine_reference(ou_family, clouds, init_values={"speed": 1.0})
