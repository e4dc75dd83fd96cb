"""Paths of a Markov jump process in continuous time given data, against exact expectations."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jumps.references import REFERENCE

import numpyro_sde as nsde
from numpyro_sde.jumps import JumpTimes, path_totals

REF = REFERENCE["mjp_dfr_noisy"]
TIMES, LABELS = np.array(REF["t"]), np.array(REF["labels"])
Q = np.array(REF["Q"])


def ratchet(y=None, times=TIMES):
    """Labels of six states, a tenth of them wrong."""
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    chain = nsde.MarkovJumpProcess(
        lambda p: p * jnp.array(Q - np.diag(np.diag(Q))), 6, params=scale
    )
    s = numpyro.sample("s", nsde.JumpPath(chain, times))

    def label(t, s):
        return dist.Categorical(0.1 / 6 + 0.9 * (jnp.arange(6) == s))

    nsde.observe("y", s, label, obs=y)


def drawn(num, key=0, model=ratchet, scale=1.0, y=LABELS):
    return nsde.smooth(
        model,
        {"scale": jnp.full(num, scale)},
        y,
        method=nsde.filters.Forward(),
        rng_key=jax.random.key(key),
        at_jumps=True,
    )["s"]


@pytest.mark.slow
def test_numbers_of_jumps_and_times_in_states(x64):
    """Their means over draws are the expectations given the data, known to 1e-10."""
    num = 1500
    jumps = drawn(num)
    assert jumps.times.shape[0] == num
    assert jumps.states.shape[1] == jumps.times.shape[1] + 1
    times = np.array(jumps.times)
    real = ~np.isnan(times)
    assert np.all((times[:, 1:] > times[:, :-1])[real[:, 1:]])
    assert np.nanmin(times) > TIMES[0]
    assert np.nanmax(times) < TIMES[-1]
    assert real[:, -1].any()  # cut to the longest
    totals = path_totals(jumps, TIMES[0], TIMES[-1], 6)
    counts, dwell = np.array(totals.jumps), np.array(totals.dwell)
    np.testing.assert_array_equal(counts.sum((1, 2)), real.sum(1))
    np.testing.assert_array_equal(np.diagonal(counts, axis1=1, axis2=2), 0.0)
    np.testing.assert_allclose(dwell.sum(1), TIMES[-1] - TIMES[0], rtol=1e-12)
    for found, truth in ((counts, REF["expected_jumps"]), (dwell, REF["expected_dwell"])):
        error = found.std(0) / np.sqrt(num)
        assert np.all(np.abs(found.mean(0) - truth) <= 4.0 * error + 1e-12)


@pytest.mark.slow
def test_many_states_without_matrices(x64):
    """A birth-death chain: the expectations of jumps and times are those by a derivative."""
    n, num, times = 80, 1500, np.array([0.0, 0.7, 1.5])
    edges = [*((i, i + 1) for i in range(n - 1)), *((i + 1, i) for i in range(n - 1))]
    y = np.array([40.0, 42.0, 37.0])

    def rates(birth, death):
        return jnp.concatenate([jnp.full(n - 1, birth), death * jnp.arange(1.0, n)])

    def walk(y=None):
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
        chain = nsde.MarkovJumpProcess(lambda p: rates(p, 0.05), n, edges=edges, params=scale)
        s = numpyro.sample("s", nsde.JumpPath(chain, times, init=40))
        nsde.observe("y", s, lambda t, s: dist.Normal(s, 1.0), obs=y)

    def value(birth, death):
        chain = nsde.MarkovJumpProcess(rates(birth, death), n, edges=edges)
        path = nsde.JumpPath(chain, times, init=40)
        return nsde.filter_path(
            path, lambda t, s: dist.Normal(s, 1.0), y, method=nsde.filters.Forward()
        ).log_likelihood

    # Fisher's identity: rate times derivative is E[births] - birth E[time where one can be born].
    births, deaths = (
        float(rate * jax.grad(value, place)(2.0, 0.05)) for place, rate in ((0, 2.0), (1, 0.05))
    )
    jumps = drawn(num, model=walk, scale=2.0, y=y)
    counts, dwell = (np.array(a) for a in path_totals(jumps, 0.0, 1.5, n))
    up, down = (np.trace(counts, k, 1, 2) for k in (1, -1))
    assert counts.sum() == up.sum() + down.sum()
    for found, truth in (
        (up - 2.0 * dwell[:, :-1].sum(1), births),
        (down - 0.05 * dwell @ np.arange(n), deaths),
    ):
        assert abs(found.mean() - truth) < 4.0 * found.std() / np.sqrt(num)


@pytest.mark.slow
def test_states_between_the_data(x64):
    """The states of drawn paths at times between are those that `smooth(times=)` draws."""
    num, between = 1500, np.array([0.31 * TIMES[1], 0.5 * (TIMES[7] + TIMES[8])])
    finer = np.sort(np.concatenate([TIMES, between]))
    y = np.full(finer.size, np.nan)
    y[np.searchsorted(finer, TIMES)] = LABELS
    chain = nsde.MarkovJumpProcess(Q, 6)
    result = nsde.filter_path(
        nsde.JumpPath(chain, finer),
        lambda t, s: dist.Categorical(0.1 / 6 + 0.9 * (jnp.arange(6) == s)),
        y,
        method=nsde.filters.Forward(),
    )
    truth = np.array(result.smoothed())[np.searchsorted(finer, between)]
    jumps = drawn(num, key=1)
    states = jax.vmap(lambda j: nsde.jumps.states_at(j, jnp.array(between)))(jumps)
    share = np.mean(np.array(states)[..., None] == np.arange(6), axis=0)
    assert np.all(np.abs(share - truth) <= 4.0 * np.sqrt(truth * (1 - truth) / num) + 1e-12)


@pytest.mark.slow
def test_fast_chains_get_the_room_that_they_need(x64):
    """At 40 times the rates a path jumps some 1,000 times: more than is set aside at first."""
    num = 20
    jumps = drawn(num, scale=40.0)
    chain = nsde.MarkovJumpProcess(40.0 * (Q - np.diag(np.diag(Q))), 6)
    result = nsde.filter_path(
        nsde.JumpPath(chain, TIMES),
        lambda t, s: dist.Categorical(0.1 / 6 + 0.9 * (jnp.arange(6) == s)),
        LABELS,
        method=nsde.filters.Forward(),
    )
    expected = float(result.path_statistics().jumps.sum())
    count = np.sum(~np.isnan(np.array(jumps.times)), axis=1)
    assert expected > 500
    assert abs(count.mean() - expected) < 4.0 * count.std() / np.sqrt(num)


def test_panels():
    def panel(y=None):
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
        chain = nsde.MarkovJumpProcess(lambda p: p * jnp.ones((2, 2)), 2, params=scale)
        with numpyro.plate("series", 3):
            s = numpyro.sample("s", nsde.JumpPath(chain, [0.0, 1.0, 2.0]))
            nsde.observe("y", s, lambda t, s: dist.Normal(s, 0.1), obs=y)

    y = np.array([[0.0, 1.0, 0.0], [0.0, np.nan, 0.0], [1.0, 1.0, 1.0]])
    jumps = drawn(5, model=panel, y=y)
    assert jumps.times.shape[:2] == jumps.states.shape[:2] == (5, 3)
    np.testing.assert_array_equal(jumps.states[..., 0], np.tile([0, 0, 1], (5, 1)))
    np.testing.assert_array_equal(jumps.states[..., -1], np.tile([0, 0, 1], (5, 1)))
    assert np.all(np.sum(~np.isnan(np.array(jumps.times)), axis=-1)[:, 0] >= 2)


def test_totals_by_hand():
    blinks = JumpTimes(
        jnp.array([[0.5, 0.75, jnp.nan], [jnp.nan, jnp.nan, jnp.nan]]),
        jnp.array([[0, 1, 0, 0], [2, 2, 2, 2]]),
    )
    totals = path_totals(blinks, 0.0, 2.0, 3)
    np.testing.assert_array_equal(totals.dwell, [[1.75, 0.25, 0.0], [0.0, 0.0, 2.0]])
    assert totals.jumps[0].tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert totals.jumps[1].sum() == 0


def test_refusals():
    def smooth(model, method=None, **options):
        nsde.smooth(
            model,
            {"scale": jnp.ones(2)},
            method=method or nsde.filters.Forward(),
            rng_key=jax.random.key(0),
            at_jumps=True,
            **options,
        )

    def data(y=LABELS):
        ratchet(y)

    with pytest.raises(ValueError, match="times= is not taken"):
        smooth(data, times=[0.5])
    with pytest.raises(ValueError, match=r"method=filters\.Forward"):
        smooth(data, nsde.filters.Particle(10, proposal="bootstrap"))

    def net():
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
        decay = nsde.ReactionNetwork([[1]], [[0]], scale[None])
        x = numpyro.sample("s", nsde.ReactionPath(decay, [0.0, 1.0], [3.0], law=nsde.laws.Jump()))
        nsde.observe("y", x, lambda t, x: dist.Normal(x[0], 1.0), obs=np.zeros(2))

    with pytest.raises(ValueError, match=r"for paths of an nsde\.JumpPath"):
        smooth(net, nsde.filters.Forward(bounds=(3,)))
