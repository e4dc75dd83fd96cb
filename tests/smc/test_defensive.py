"""Defensive guided particles where an emission tells of the state through its variance."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from particle_models import on_model, setting

import numpyro_sde as nsde
from numpyro_sde.infer import ConditionalSMC
from numpyro_sde.smc.conditional import conditional_smc
from numpyro_sde.smc.defensive import Defensive
from numpyro_sde.smc.particle_filter import run_filter
from numpyro_sde.smc.proposals import Guided
from numpyro_sde.smc.settings import with_own_steps

# A log variance seen through returns, one of them large; steps between some observations.
OU = nsde.processes.OrnsteinUhlenbeck(0.8, -0.2, 1.0)
TIMES = np.array([0.0, 0.5, 1.0, 1.5])
SEEN = np.array([0, 1, 3])
Y = np.array([0.4, 4.0, -0.1])
PATH = nsde.SDEPath(OU, TIMES, dist.Normal(0.0, 0.8), scheme=nsde.schemes.Euler())
EDGE = np.linspace(-5.0, 6.0, 1101)


def returns(t, v):
    return dist.Normal(0.0, jnp.exp(v / 2))


def density(x, mean, sd):
    return np.exp(-0.5 * ((x - mean) / sd) ** 2) / (sd * np.sqrt(2 * np.pi))


def posterior(num, seed=0):
    """Log likelihood, smoothed means, variances, and paths, from a table of states 0.01 apart."""
    v = 0.5 * (EDGE[1:] + EDGE[:-1])
    width = v[1] - v[0]
    move = width * density(v[None, :], v[:, None] * 0.6 - 0.08, np.sqrt(0.5))
    seen = dict(zip(SEEN, Y, strict=True))
    likelihood = [
        density(seen[k], 0.0, np.exp(v / 2)) if k in seen else np.ones_like(v) for k in range(4)
    ]
    backward = [likelihood[3]]
    for k in (2, 1, 0):
        backward.insert(0, likelihood[k] * (move @ backward[0]))
    law = width * density(v, 0.0, 0.8) * backward[0]
    rng = np.random.default_rng(seed)
    moments, paths, index = [], [], None
    forward = law / law.sum()
    for k in range(4):
        if k:
            table = move * backward[k]
            table /= table.sum(axis=1, keepdims=True)
            forward = forward @ table
            u = rng.uniform(size=num)
            cumulative = np.cumsum(table, axis=1)
            index = np.minimum((cumulative[index] < u[:, None]).sum(1), v.size - 1)
        else:
            index = rng.choice(v.size, num, p=forward)
        mean = forward @ v
        moments.append((mean, forward @ (v - mean) ** 2, forward @ (v - mean) ** 4))
        paths.append(v[index])
    return np.log(law.sum()), np.array(moments).T, np.stack(paths, axis=1)


def on_paths(one, keys, *more):
    def run(model):
        return jax.lax.map(lambda a: one(model, *a), (keys, *more), batch_size=2000)

    return jax.tree.map(np.asarray, jax.jit(lambda: on_model(PATH, SEEN, Y, run, returns))())


@pytest.mark.parametrize(
    ("num", "renewal", "threshold"),
    [
        (100_000, "backward", 1.0),
        (100_000, "backward", 0.5),
        (100_000, "none", 1.0),
    ],
)
@pytest.mark.slow
def test_smoothing_law_is_invariant(num, renewal, threshold, x64):
    _, (mean, variance, fourth), start = posterior(num)
    chosen = setting(3, "guided", threshold=threshold)

    def one(model, key, path):
        own = with_own_steps(chosen, model, None)
        assert isinstance(own.proposal, Defensive)
        return conditional_smc(model, own, path, key, renewal=renewal).path[:, 0]

    keys = jax.random.split(jax.random.key(1), num)
    new = on_paths(one, keys, jnp.asarray(start)[..., None])
    # The table's spacing is an eightieth of a standard deviation: its error is far below these.
    assert np.max(np.abs(new.mean(0) - mean) / np.sqrt(variance / num)) < 4
    spread = (new - mean) ** 2
    assert np.max(np.abs(spread.mean(0) - variance) / np.sqrt((fourth - variance**2) / num)) < 4
    assert np.mean(new != start, axis=0).min() > 0.2


@pytest.mark.slow
def test_unbiased(x64):
    truth, _, _ = posterior(1)
    chosen = setting(10, "guided")._replace(proposal=Defensive(share=0.3))
    keys = jax.random.split(jax.random.key(2), 50_000)
    ratio = np.exp(on_paths(lambda m, k: run_filter(m, chosen, k).log_likelihood, keys) - truth)
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / np.sqrt(ratio.size)


@pytest.mark.slow
def test_ratios_are_those_of_the_mixture_and_bounded(x64):
    path, share = np.array([0.1, 3.0, -4.0, 5.0])[:, None], 0.1

    def ratios(model):
        both = [Guided(), Defensive(share=share)]
        return [p.path_ratios(model, p.plan(model), path) for p in both]

    plain, mixed = (
        np.asarray(a) for a in jax.jit(lambda: on_model(PATH, SEEN, Y, ratios, returns))()
    )
    # One step to the second observation, two to the third.
    ways = np.array([plain[0], plain[1] + plain[2]])
    assert np.max(ways) > 5.0
    wanted = -np.log(share + (1.0 - share) * np.exp(-ways))
    assert np.allclose([mixed[0], mixed[1] + mixed[2]], wanted)
    assert np.all(wanted < -np.log(share))


def test_default_leaves_linear_models_alone():
    chosen = setting(3, "guided")

    def proposal(law, share=None, seen=SEEN):
        return on_model(
            PATH, seen, Y, lambda m: [type(with_own_steps(chosen, m, share).proposal)], law
        )[0]

    assert proposal(lambda t, v: dist.Normal(v, 0.3)) is Guided
    assert proposal(lambda t, v: dist.Normal(v, 0.3), 0.2) is Defensive
    assert proposal(lambda t, v: dist.StudentT(3.0, v, 0.3)) is Defensive
    assert proposal(returns) is Defensive
    assert proposal(returns, 0.0) is Guided


def test_refused():
    with pytest.raises(ValueError, match=r"own_share must be at least 0 and below 1, got 1"):
        ConditionalSMC(lambda: None, own_share=1.0)
    with pytest.raises(ValueError, match="own_share is of proposal='guided' or 'auto'"):
        ConditionalSMC(lambda: None, proposal="bootstrap", own_share=0.1)
