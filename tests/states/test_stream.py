"""A stream of data gives what one run over all of them gives; states are kept; forecasts agree."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import numpyro_sde as nsde
from numpyro_sde import filters

RNG = np.random.default_rng(0)
TIMES = 1e4 + np.cumsum(RNG.exponential(0.4, size=12) + 0.05)
DATA = RNG.normal(size=12)
DATA[4] = np.nan


def noisy(t, x):
    return dist.Normal(x, 0.5)


def well(method, sde=None, **options):
    sde = nsde.processes.DoubleWell(linear=1.0, cubic=1.0, scale=0.7) if sde is None else sde
    options = {"start": TIMES[0], "scheme": nsde.schemes.Euler(), **options}
    return nsde.FilterStream(sde, dist.Normal(0.2, 0.7), noisy, method=method, **options)


def in_pieces(stream, cuts, times=TIMES, data=DATA):
    state = stream.begin(data[..., 0])
    ends = [1, *cuts, times.shape[-1]]
    for a, b in itertools.pairwise(ends):
        state = stream.update(state, times[..., a:b], data[..., a:b])
    return state


@pytest.mark.parametrize(
    ("method", "linear"),
    [
        (filters.Kalman(), True),
        (filters.ExtendedKalman(), False),
        pytest.param(filters.UnscentedKalman(), False, marks=pytest.mark.slow),
        pytest.param(filters.MomentMatching(), False, marks=pytest.mark.slow),
    ],
)
def test_pieces_agree_with_one_run(x64, method, linear):
    ou = nsde.processes.OrnsteinUhlenbeck(1.0, 0.3, 0.8)
    sde = ou if linear else nsde.processes.DoubleWell(linear=1.0, cubic=1.0, scale=0.7)
    scheme = None if linear else nsde.schemes.Euler()
    path = nsde.SDEPath(sde, TIMES, dist.Normal(0.2, 0.7), scheme=scheme)
    whole = nsde.filter_path(path, noisy, DATA, method=method)
    state = in_pieces(well(method, sde, scheme=scheme), [2, 7, 8])
    np.testing.assert_allclose(state.mean, whole.mean[-1], rtol=1e-9)
    np.testing.assert_allclose(state.cov, whole.cov[-1], rtol=1e-9)
    np.testing.assert_allclose(state.log_likelihood, whole.log_likelihood, rtol=1e-10)


def test_new_data_compile_nothing_and_states_are_kept(x64, tmp_path):
    stream = well(filters.Kalman(), nsde.processes.OrnsteinUhlenbeck(1.0, 0.3, 0.8), scheme=None)
    state = in_pieces(stream, [3, 5])
    state.save(tmp_path / "state.npz")
    again = nsde.StreamState.load(tmp_path / "state.npz")
    stream.update(again, TIMES[-1] + np.array([0.2, 0.3]), [0.0, 0.0])
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    later = TIMES[-1] + np.array([0.4, 0.7])
    a, b = (stream.update(one, later, [0.1, 0.2]) for one in (state, again))
    stream.update(a, later + 1.0, [0.3, -0.4])
    assert not compiled
    np.testing.assert_array_equal(a.mean, b.mean)
    assert again.particles is None
    assert b.num_times == state.num_times + 2


def test_panels_on_their_own_clocks(x64):
    ou = nsde.processes.OrnsteinUhlenbeck(np.array([0.5, 2.0, 1.0]), 0.3, 0.8)
    times = np.cumsum(RNG.exponential(0.4, size=(3, 6)) + 0.05, axis=1)
    data = RNG.normal(size=(3, 6))
    stream = well(filters.Kalman(), ou, start=times[:, 0], scheme=None)
    state = in_pieces(stream, [2, 5], times, data)
    path = nsde.SDEPath(ou, times, dist.Normal(0.2, 0.7))
    whole = nsde.filter_path(path, noisy, data, method=filters.Kalman())
    np.testing.assert_allclose(state.log_likelihood, whole.log_likelihood, rtol=1e-10)
    np.testing.assert_allclose(state.mean, whole.mean[:, -1], rtol=1e-9)


@pytest.mark.slow
def test_particles_are_unbiased_across_pieces(x64):
    """40 streams against Kalman: the mean likelihood ratio is 1, and so the mean."""
    ou = nsde.processes.OrnsteinUhlenbeck(1.0, 0.3, 0.8)
    path = nsde.SDEPath(ou, TIMES, dist.Normal(0.2, 0.7))
    whole = nsde.filter_path(path, noisy, DATA, method=filters.Kalman())
    ratios, means = [], []
    for key in jax.random.split(jax.random.key(0), 40):
        method = filters.Particle(100, proposal="bootstrap", key=key)
        state = in_pieces(well(method, ou, scheme=None), [3, 8])
        ratios.append(float(jnp.exp(state.log_likelihood - whole.log_likelihood)))
        means.append(float(state.mean[0]))
        assert state.particles.shape == (100, 1)
    for found, truth in ((ratios, 1.0), (means, float(whole.mean[-1, 0]))):
        error = np.std(found, ddof=1) / np.sqrt(len(found))
        assert abs(np.mean(found) - truth) < 4 * error


@pytest.mark.parametrize(
    "method",
    [
        filters.Kalman(),
        pytest.param(filters.Particle(4000, proposal="guided"), marks=pytest.mark.slow),
    ],
)
def test_predictions_and_forecasts_agree(x64, method):
    """Draws against the predicted moments, and these against the process's own formulas."""
    ou = nsde.processes.OrnsteinUhlenbeck(1.0, 0.3, 0.8)
    stream = well(method, ou, scheme=None)
    state = in_pieces(stream, [3])
    later = TIMES[-1] + np.array([0.5, 2.0])
    decay = np.exp(-(later - TIMES[-1]))
    mean = 0.3 + decay * (float(state.mean[0]) - 0.3)
    variance = decay**2 * float(state.cov[0, 0]) + 0.32 * (1 - decay**2)
    if isinstance(method, filters.Kalman):
        means, covs = stream.predict(state, later)
        np.testing.assert_allclose(means[:, 0], mean, rtol=1e-9)
        np.testing.assert_allclose(covs[:, 0, 0], variance, rtol=1e-9)
    draws = stream.forecast(state, later, 4000, rng_key=jax.random.key(1))
    for name, extra in (("x", 0.0), ("y", 0.25)):
        error = np.sqrt((variance + extra) / 4000)
        assert np.all(np.abs(draws[name].mean(0) - mean) < 4 * error)
        spread = np.var(draws[name], axis=0) / (variance + extra) - 1.0
        assert np.all(np.abs(spread) < 4 * np.sqrt(2 / 4000))


def test_what_a_stream_cannot_is_refused():
    with pytest.raises(TypeError, match="method must be one of Kalman"):
        well(filters.EnsembleKalman(10))
    with pytest.raises(ValueError, match="substeps must be a positive whole number"):
        well(filters.ExtendedKalman(), substeps=0)
    fractional = nsde.SDE(lambda t, x: -x, lambda t, x: 1.0, noise=nsde.noise.MarkovFBM(0.3))
    with pytest.raises(ValueError, match="a stream keeps the state alone"):
        well(filters.ExtendedKalman(), fractional)
    stream = well(filters.ExtendedKalman())
    state = stream.begin()
    with pytest.raises(ValueError, match="times must be after the state's"):
        stream.update(state, [TIMES[0]], [0.0])
    with pytest.raises(ValueError, match=r"obs has shape \(1,\)"):
        stream.update(state, TIMES[1:3], [0.0])
