"""Densities and draws of path laws against dense normal laws in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats
from oracles import joint_states

import numpyro_sde as nsde

RNG = np.random.default_rng(3)
TIMES = np.cumsum(RNG.uniform(0.02, 0.3, 8))
A = np.array([[-1.0, 0.7], [-0.4, -0.6]])
B = np.array([0.3, -0.2])


def linear_sde(a, b, factor):
    return nsde.SDE(
        lambda t, x, p: p["a"] @ x + p["b"],
        lambda t, x, p: p["factor"],
        params={"a": a, "b": b, "factor": factor},
        event_dims={"a": 2, "b": 1, "factor": 2},
    )


def dense(a, b, factor, times, m0, P0):
    """Joint law of the Euler chain of a linear SDE."""
    dt = np.diff(times)[:, None, None]
    F = np.eye(len(a)) + a * dt
    Q = (factor @ factor.T) * dt
    return joint_states(m0, P0, F, b * dt[:, :, 0], Q)


FACTORS = {
    "square": np.array([[0.5, 0.2], [-0.3, 0.8]]),
    "more noises": RNG.normal(size=(2, 4)),
    "triangular, negative": np.array([[-0.5, 0.0], [0.3, -0.8]]),
}


@pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)
def test_general_noise_against_the_dense_normal(factor, x64):
    m0, P0 = np.array([0.5, -1.0]), np.array([[1.0, 0.3], [0.3, 0.5]])
    mean, cov = dense(A, B, factor, TIMES, m0, P0)
    law = nsde.SDEPath(linear_sde(A, B, factor), TIMES, dist.MultivariateNormal(m0, P0))
    paths = RNG.normal(size=(3, TIMES.size, 2))
    truth = scipy.stats.multivariate_normal(mean, cov).logpdf(paths.reshape(3, -1))
    np.testing.assert_allclose(law.log_prob(paths), truth, rtol=1e-8)


def test_scalar_and_diagonal_noise_against_the_dense_normal(x64):
    rates, scales = np.array([1.0, 3.0]), np.array([0.5, -0.2])
    sde = nsde.SDE(
        lambda t, x, p: -p["rate"] * x,
        lambda t, x, p: p["scale"],
        params={"rate": rates, "scale": scales},
    )
    paths = RNG.normal(size=(2, TIMES.size))
    truth = []
    for i in range(2):
        a, factor = np.array([[-rates[i]]]), np.array([[scales[i]]])
        mean, cov = dense(a, np.zeros(1), factor, TIMES, np.zeros(1), np.eye(1))
        truth.append(scipy.stats.multivariate_normal(mean, cov).logpdf(paths[i]))
    batch = nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 1.0))
    np.testing.assert_allclose(batch.log_prob(paths), truth, rtol=1e-8)
    joint = nsde.SDE(lambda t, x, p: -p[0] * x, lambda t, x, p: p[1], params=(rates, scales),
                     event_dims=1)  # fmt: skip
    one = nsde.SDEPath(joint, TIMES, dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    np.testing.assert_allclose(one.log_prob(paths.T), sum(truth), rtol=1e-8)


def hand_written(path, times, loc, scale, drift, diffusion):
    """Euler density of a scalar path in plain NumPy."""
    t, dt, x = times[:-1], np.diff(times), path[:-1]
    sd = np.abs(diffusion(t, x)) * np.sqrt(dt)
    steps = scipy.stats.norm(x + drift(t, x) * dt, sd).logpdf(path[1:])
    return scipy.stats.norm(loc, scale).logpdf(path[0]) + steps.sum()


def test_coefficients_see_the_time_and_state_at_the_start_of_the_step(x64):
    def drift(t, x):
        return np.sin(3 * t) - x**3

    def diffusion(t, x):
        return 0.3 * np.cos(t) * np.sqrt(1 + x**2)

    sde = nsde.SDE(
        lambda t, x: jnp.sin(3 * t) - x**3, lambda t, x: 0.3 * jnp.cos(t) * jnp.sqrt(1 + x**2)
    )
    path = RNG.normal(size=TIMES.size)
    truth = hand_written(path, TIMES, 0.0, 1.0, drift, diffusion)
    law = nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 1.0))
    np.testing.assert_allclose(law.log_prob(path), truth, rtol=1e-8)
    traced = jax.jit(lambda t: nsde.SDEPath(sde, t, dist.Normal(0.0, 1.0)).log_prob(path))(TIMES)
    np.testing.assert_allclose(traced, truth, rtol=1e-8)


@pytest.mark.parametrize("origin", [0.0, 1.7e9])
@pytest.mark.parametrize("size", [1_000, 10_000])
def test_float32_density_is_accurate(size, origin):
    """1e-4 relative against float64, also for calendar times (seconds, hourly steps)."""
    step = 0.01 if origin == 0.0 else 3600.0
    rng = np.random.default_rng(size)
    dt = rng.uniform(0.5, 1.5, size - 1) * step
    times = origin + np.concatenate([[0.0], np.cumsum(dt)])
    rate, scale = 0.01 / step, 0.5 / np.sqrt(step)
    path = np.empty(size)
    path[0] = 1.0
    for k in range(size - 1):
        sd = scale * np.sqrt(dt[k])
        path[k + 1] = path[k] - rate * (path[k] - 1.0) * dt[k] + sd * rng.normal()
    path = path.astype(np.float32)
    truth = hand_written(
        path.astype(np.float64), times, 1.0, 1.0, lambda t, x: -rate * (x - 1), lambda t, x: scale
    )
    sde = nsde.SDE(
        lambda t, x, p: -p["rate"] * (x - 1.0),
        lambda t, x, p: p["scale"],
        params={"rate": rate, "scale": scale},
    )
    law = nsde.SDEPath(sde, times, dist.Normal(1.0, 1.0))
    got = law.log_prob(jnp.asarray(path))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, truth, rtol=1e-4)


def test_density_by_change_of_variables(x64):
    """log p(path) = log p(x0) + log N(z) - log |dx/dz| for a nonlinear SDE with general noise."""
    sde = nsde.SDE(
        lambda t, x: jnp.stack([x[1], -jnp.sin(x[0])]),
        lambda t, x: jnp.stack(
            [jnp.stack([1.0 + 0.3 * x[0] ** 2, 0.2, 0.1]), jnp.stack([0.1 * x[1], 0.5, t])]
        ),
    )
    init = dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2))
    law = nsde.SDEPath(sde, TIMES[:4], init)
    x0, z = jnp.array([0.3, -0.4]), jnp.asarray(RNG.normal(size=(3, 2)))
    path = law.forward(x0, z)
    jacobian = jax.jacfwd(lambda z: law.forward(x0, z)[1:].ravel())(z).reshape(6, 6)
    truth = (
        init.log_prob(x0)
        + dist.Normal(0.0, 1.0).log_prob(z).sum()
        - jnp.linalg.slogdet(jacobian).logabsdet
    )
    np.testing.assert_allclose(law.log_prob(path), truth, rtol=1e-10)
    start, innovations = law.inverse(path)
    np.testing.assert_allclose(start, x0)
    np.testing.assert_allclose(innovations, z, atol=1e-10)


def test_moments_of_draws_against_the_dense_normal(key):
    """20,000 draws: means and covariances within 4 Monte Carlo standard errors."""
    times, num = TIMES[:4], 20_000
    factor, m0, P0 = FACTORS["more noises"], np.array([0.5, -1.0]), np.diag([1.0, 0.5])
    mean, cov = dense(A, B, factor, times, m0, P0)
    law = nsde.SDEPath(linear_sde(A, B, factor), times, dist.MultivariateNormal(m0, P0))
    draws = np.asarray(law.sample(key, (num,)), np.float64).reshape(num, -1)
    variance = np.diag(cov)
    assert np.all(np.abs(draws.mean(0) - mean) < 4 * np.sqrt(variance / num))
    # var of a product of centred normals: c_ii c_jj + c_ij^2 (Isserlis)
    error = np.sqrt((np.outer(variance, variance) + cov**2) / num)
    assert np.all(np.abs(np.cov(draws.T) - cov) < 4 * error)


# -- batches --------------------------------------------------------------------------------


def loop(laws, values):
    return jnp.stack([law.log_prob(v) for law, v in zip(laws, values, strict=True)])


@pytest.mark.slow
def test_a_panel_with_its_own_clocks_equals_a_loop(key, x64):
    clocks = np.cumsum(RNG.uniform(0.1, 1.0, (3, 5)), axis=-1)
    rates, starts = np.array([0.5, 1.0, 2.0]), np.array([0.0, 1.0, -1.0])

    def sde(rate):
        return nsde.SDE(
            lambda t, x, p: -p * (x - jnp.sin(t)), lambda t, x, p: 0.3 * (1 + p), params=rate
        )

    panel = nsde.SDEPath(sde(rates), clocks, dist.Normal(starts, 0.5))
    each = [nsde.SDEPath(sde(rates[i]), clocks[i], dist.Normal(starts[i], 0.5)) for i in range(3)]
    value = panel.sample(key)
    assert panel.batch_shape == (3,)
    np.testing.assert_allclose(panel.log_prob(value), loop(each, value), rtol=1e-10)
    x0, z = panel.inverse(value)
    for i in range(3):
        np.testing.assert_allclose(panel.forward(x0, z)[i], each[i].forward(x0[i], z[i]))
    grid = nsde.TimeGrid(clocks, max_step=0.2)
    refined = nsde.SDEPath(sde(rates), grid, dist.Normal(starts, 0.5))
    value = refined.sample(key)
    each = [
        nsde.SDEPath(sde(rates[i]), grid.times[i], dist.Normal(starts[i], 0.5)) for i in range(3)
    ]
    np.testing.assert_allclose(refined.log_prob(value), loop(each, value), rtol=1e-10)


@pytest.mark.slow
def test_a_batch_over_two_dimensions_equals_a_loop(key, x64):
    """Parameters, clocks and first states vary over different batch dimensions."""
    a = np.stack([A, 2 * A, 0.5 * A])[:, None]  # (3, 1) + (2, 2)
    clocks = np.cumsum(RNG.uniform(0.1, 0.3, (2, 4)), axis=-1)  # (2,) + (4,)
    loc = RNG.normal(size=(3, 1, 2))
    factor = FACTORS["square"]
    law = nsde.SDEPath(linear_sde(a, B, factor), clocks, dist.Normal(loc, 1.0).to_event(1))
    assert law.batch_shape == (3, 2)
    value = law.sample(key)
    density = law.log_prob(value)
    for i in range(3):
        for j in range(2):
            init = dist.Normal(loc[i, 0], 1.0).to_event(1)
            one = nsde.SDEPath(linear_sde(a[i, 0], B, factor), clocks[j], init)
            np.testing.assert_allclose(density[i, j], one.log_prob(value[i, j]), rtol=1e-10)


def test_a_batch_as_large_as_the_state_is_not_mixed_up_with_it(key, x64):
    """Two series of two states: rates of shape (2,) belong to the series, not to the state."""
    rates = np.array([0.5, 3.0])
    init = dist.Normal(jnp.zeros(2), 1.0).to_event(1)

    def law(rate):
        sde = nsde.SDE(lambda t, x, p: -p * x, lambda t, x, p: 0.3, params=rate)
        return nsde.SDEPath(sde, TIMES[:3], init)

    value = law(rates).sample(key)
    expected = loop([law(rates[0]), law(rates[1])], value)
    np.testing.assert_allclose(law(rates).log_prob(value), expected, rtol=1e-10)


def test_expanding_broadcast_sizes_of_one(key):
    sde = nsde.SDE(lambda t, x, p: -p * x, lambda t, x, p: 1.0, params=jnp.ones((1, 2)))
    law = nsde.SDEPath(sde, TIMES[None, None, :3], dist.Normal(jnp.zeros((3, 1)), 1.0))
    assert law.batch_shape == (3, 2)
    draws = law.sample(key, (4,))
    assert draws.shape == (4, 3, 2, 3)
    # Series are independent draws, not copies of the broadcast dimension.
    assert len(np.unique(np.asarray(draws[..., -1]))) == 24


def test_values_of_wrong_shape_are_refused():
    law = nsde.SDEPath(linear_sde(A, B, FACTORS["square"]), TIMES, jnp.zeros(2))
    for shape in ((7, 2), (8,), (8, 3)):
        with pytest.raises(ValueError, match=r"(event shape \(8, 2\)|\(8, 2\))"):
            law.log_prob(jnp.zeros(shape))


def test_bad_values_give_minus_infinity_or_nan_never_a_number():
    sde = nsde.SDE(lambda t, x, p: -x, lambda t, x, p: p, params=jnp.array([1.0, jnp.nan, 0.0]))
    law = nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 1.0))
    density = law.log_prob(jnp.linspace(0.0, 1.0, 8))
    assert np.isfinite(density[0])
    assert not np.any(np.isfinite(density[1:]))
    value = jnp.zeros((3, 8)).at[0, 4].set(jnp.nan)
    assert not np.isfinite(law.log_prob(value)[0])


def test_traced_times_that_are_unsorted_give_no_finite_density():
    sde = nsde.SDE(lambda t, x: -x, lambda t, x: 1.0)

    @jax.jit
    def density(times):
        return nsde.SDEPath(sde, times, dist.Normal(0.0, 1.0)).log_prob(jnp.ones(3))

    assert np.isfinite(density(jnp.array([0.0, 1.0, 2.0])))
    for times in ([0.0, 2.0, 1.0], [0.0, 1.0, 1.0], [0.0, jnp.nan, 1.0]):
        assert not np.isfinite(density(jnp.array(times)))


def test_degenerate_noise_simulates_but_has_no_density(key):
    law = nsde.SDEPath(
        linear_sde(A, B, np.array([[0.0], [1.0]])),
        TIMES,
        dist.Normal(jnp.zeros(2), 1.0).to_event(1),
    )
    assert law.sample(key, (3,)).shape == (3, 8, 2)
    with pytest.raises(ValueError, match=r"1 noise\(s\) drive 2 states in one step"):
        law.log_prob(jnp.zeros((8, 2)))
    with pytest.raises(ValueError, match=r"1 noise\(s\) drive 2 states in one step"):
        law.inverse(jnp.zeros((8, 2)))


def test_integer_values_and_starts_are_taken_as_real(key):
    law = nsde.SDEPath(nsde.SDE(lambda t, x: -x, lambda t, x: 1.0), TIMES, init=1)
    assert law.sample(key).dtype == jnp.result_type(float)
    assert np.isfinite(law.log_prob(np.arange(1, 9)))


def test_validate_args_reports_bad_times():
    sde = nsde.SDE(lambda t, x: -x, lambda t, x: 1.0)
    law = nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 1.0), validate_args=True)
    with pytest.warns(UserWarning, match="Out-of-support"):
        assert np.isneginf(law.log_prob(jnp.full(8, jnp.nan)))


def test_replace_changes_one_argument():
    sde = nsde.SDE(lambda t, x: -x, lambda t, x: 1.0)
    grid = nsde.TimeGrid(TIMES, max_step=0.05)
    law = nsde.SDEPath(sde, grid, dist.Normal(0.0, 1.0))
    assert law.replace(init=dist.Normal(3.0, 1.0)).grid == grid
    assert law.replace(times=TIMES).event_shape == (8,)
