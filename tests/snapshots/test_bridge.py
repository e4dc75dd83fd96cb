"""Bridges between normal laws, whose closed forms are known, on grids and by samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm, sqrtm

import numpyro_sde as nsde
from numpyro_sde.snapshots import sinkhorn

A = np.array([[-0.5, -1.5], [1.5, -0.5]])
B = np.array([0.2, 0.0])
L = np.array([[0.6, 0.0], [0.2, 0.5]])
M0, S0 = np.array([1.0, 0.0]), np.array([[0.3, 0.1], [0.1, 0.2]])
M1, S1 = np.array([-0.5, 1.0]), np.array([[0.2, -0.05], [-0.05, 0.4]])


def linear_transition(A, b, D, t):
    """Van Loan's matrix exponentials, with SciPy."""
    d = len(A)
    block = expm(np.block([[-A, D], [np.zeros((d, d)), A.T]]) * t)
    F = block[d:, d:].T
    big = expm(np.block([[A, b[:, None]], [np.zeros((1, d + 1))]]) * t)
    return F, big[:d, d], F @ block[:d, d:]


def gaussian_bridge(A, b, D, m0, S0, m1, S1, t, T=1.0):
    """Cross covariance of the ends, and mean and covariance at t."""
    F, c, Q = linear_transition(A, b, D, T)
    R = np.linalg.inv(sqrtm(Q).real)
    G = R @ F
    half = sqrtm(G @ S0 @ G.T).real
    inner = sqrtm(half @ R @ S1 @ R @ half + np.eye(len(A)) / 4).real
    C = (
        np.linalg.inv(G)
        @ (half @ inner @ np.linalg.inv(half) - np.eye(len(A)) / 2)
        @ np.linalg.inv(R)
    )
    F1, c1, Q1 = linear_transition(A, b, D, t)
    F2, _, _ = linear_transition(A, b, D, T - t)
    K = Q1 @ F2.T @ np.linalg.inv(Q)
    H0, k = F1 - K @ F, c1 - K @ c
    cov = H0 @ S0 @ H0.T + K @ S1 @ K.T + H0 @ C @ K.T + K @ C.T @ H0.T + Q1 - K @ F2 @ Q1
    return C, H0 @ m0 + K @ m1 + k, cov


def normal_grid(mean, cov, num, width):
    """Points of a product grid, and the normal density on them."""
    axes = [
        m + width * np.sqrt(v) * np.linspace(-1, 1, num)
        for m, v in zip(mean, np.diag(cov), strict=True)
    ]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(mean))
    gap = np.prod([axis[1] - axis[0] for axis in axes])
    r = points - mean
    density = np.exp(-0.5 * np.einsum("ni,ij,nj->n", r, np.linalg.inv(cov), r))
    density /= np.sqrt(np.linalg.det(2 * np.pi * cov))
    return points, density * gap, gap


def cross_covariance(bridge, x0, x1):
    pi = np.asarray(bridge.couplings[0])
    left, right = pi.sum(1) @ x0, pi.sum(0) @ x1
    return np.einsum("ij,ia,jb->ab", pi, x0 - left, x1 - right)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("rate", "cov", "kl"),
    [(0.0, 0.20710678, 2.7051536), (1.0, 0.18393972, 4.7617736)],
)
def test_scalar_normal_bridge_on_a_grid(rate, cov, kl):
    if rate:
        sde = nsde.processes.OrnsteinUhlenbeck(rate=rate, mean=0.0, scale=1.0)
    else:
        sde = nsde.processes.BrownianMotion(drift=0.0, scale=1.0)
    x0, w0, _ = normal_grid([0.0], np.array([[1.0]]), 200, 7.0)
    x1, w1, gap = normal_grid([2.0], np.array([[0.25]]), 200, 7.0)
    bridge = nsde.schrodinger_bridge(
        sde, [0.0, 1.0], np.stack([x0[:, 0], x1[:, 0]]), weights=np.stack([w0, w1]), tol=1e-10
    )
    assert float(bridge.marginal_error.max()) < 1e-10
    np.testing.assert_allclose(cross_covariance(bridge, x0, x1), [[cov]], atol=1e-6)
    # The density of the end's cells is weight over gap: kl counts cells.
    np.testing.assert_allclose(float(bridge.kl[0]) - np.log(gap), kl, atol=1e-6)
    # Drift of the bridge: the regression of the ends given the state, by the closed form at t.
    D = np.array([[1.0]])
    scale = (
        -rate * np.eye(1),
        np.zeros(1),
        D,
        np.zeros(1),
        np.eye(1),
        np.full(1, 2.0),
        0.25 * np.eye(1),
    )
    t, h = 0.5, 1e-4
    means, covs = zip(*(gaussian_bridge(*scale, t + e)[1:] for e in (-h, h)), strict=True)
    _, mean, var = gaussian_bridge(*scale, t)
    slope = ((covs[1] - covs[0]) / (2 * h) - D)[0, 0] / (2 * var[0, 0])
    x = 1.3
    expected = (means[1] - means[0])[0] / (2 * h) + slope * (x - mean[0])
    np.testing.assert_allclose(bridge.drift_at(t, x), expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_rotating_reference_on_a_grid():
    sde = nsde.processes.LinearSDE(A, B, L)
    C, mean, cov = gaussian_bridge(A, B, L @ L.T, M0, S0, M1, S1, 0.5)
    np.testing.assert_allclose(C, [[-0.05981, 0.20465], [-0.10951, 0.09407]], atol=1e-5)
    x0, w0, _ = normal_grid(M0, S0, 36, 6.0)
    x1, w1, gap = normal_grid(M1, S1, 36, 6.0)
    bridge = nsde.schrodinger_bridge(
        sde, [0.0, 1.0], np.stack([x0, x1]), weights=np.stack([w0, w1]), tol=1e-9
    )
    np.testing.assert_allclose(cross_covariance(bridge, x0, x1), C, atol=1e-6)
    np.testing.assert_allclose(float(bridge.kl[0]) - np.log(gap), 1.7317721, atol=1e-6)
    drawn = bridge.sample_paths(jax.random.key(0), 4000, max_step=0.5)
    middle = np.asarray(drawn.paths[:, 1])
    assert drawn.times.tolist() == [0.0, 0.5, 1.0]
    errors = (middle.mean(0) - mean) / np.sqrt(np.diag(cov) / 4000)
    assert np.abs(errors).max() < 4
    spread = np.cov(middle.T)
    se = np.sqrt((np.outer(np.diag(cov), np.diag(cov)) + cov**2) / 4000)
    assert (np.abs(spread - cov) / se).max() < 4


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_sampled_bridge_is_within_its_monte_carlo_error():
    # n = 800 and 8 seeds, as in the closed form's check: the mean error against its own error.
    sde = nsde.processes.LinearSDE(A, B, L)
    C, _, _ = gaussian_bridge(A, B, L @ L.T, M0, S0, M1, S1, 0.5)
    found = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        clouds = np.stack([rng.multivariate_normal(m, S, 800) for m, S in ((M0, S0), (M1, S1))])
        bridge = nsde.schrodinger_bridge(sde, [0.0, 1.0], clouds)
        assert float(bridge.marginal_error.max()) <= 1e-6
        found.append(cross_covariance(bridge, clouds[0], clouds[1]))
    error = np.std(found, 0, ddof=1) / np.sqrt(8)
    assert (np.abs(np.mean(found, 0) - C) / error).max() < 4


@pytest.mark.usefixtures("x64")
def test_many_marginals_are_a_chain():
    # Joint iterative fitting of all three marginals at once, against neighbour by neighbour.
    rng = np.random.default_rng(1)
    clouds = rng.normal([[0.0], [1.0], [0.5]], [[1.0], [0.6], [0.8]], (3, 12))
    sde = nsde.processes.OrnsteinUhlenbeck(rate=0.7, mean=0.0, scale=0.9)
    times = [0.0, 0.8, 2.0]
    bridge = nsde.schrodinger_bridge(sde, times, clouds, tol=1e-12)
    kernels = []
    for k in (0, 1):
        t = times[k + 1] - times[k]
        var = 0.81 * (1 - np.exp(-1.4 * t)) / 1.4
        r = clouds[k + 1][None] - np.exp(-0.7 * t) * clouds[k][:, None]
        kernels.append(np.exp(-0.5 * r**2 / var))
    joint = kernels[0][:, :, None] * kernels[1][None]
    for _ in range(3000):
        for axes in ((1, 2), (0, 2), (0, 1)):
            joint = joint / joint.sum(axes, keepdims=True) / 12
    np.testing.assert_allclose(bridge.couplings[0], joint.sum(2), atol=1e-9)
    np.testing.assert_allclose(bridge.couplings[1], joint.sum(0), atol=1e-9)
    which = np.asarray(bridge.lineages(jax.random.key(0), 5000))
    pairs = np.zeros((12, 12))
    np.add.at(pairs, (which[:, 0], which[:, 2]), 1 / 5000)
    expected = joint.sum(1)
    assert (np.abs(pairs - expected) / np.sqrt(expected / 5000 + 1e-8)).max() < 4.5


@pytest.mark.usefixtures("x64")
def test_a_kernel_in_blocks_and_scalings_agree_with_plain_logs():
    rng = np.random.default_rng(2)
    log_kernel = jnp.asarray(-40.0 * rng.normal(size=(12, 9)) ** 2)  # far too steep for scalings
    a, b = jnp.full(12, 1 / 12), jnp.asarray(np.append(np.full(8, 1 / 8), 0.0))
    options = {"tol": 1e-10, "max_iterations": 50_000}
    f, g = np.zeros(12), np.zeros(9)
    with np.errstate(divide="ignore"):
        for _ in range(50_000):
            f = -np.logaddexp.reduce(log_kernel + g + np.log(b), axis=1)
            g = -np.logaddexp.reduce(log_kernel + (f + np.log(a))[:, None], axis=0)
    expected = sinkhorn.coupling(log_kernel, a, b, jnp.asarray(f), jnp.asarray(g))
    whole = sinkhorn.solve(log_kernel, a, b, **options)
    blocks = sinkhorn.solve_in_blocks(lambda k: log_kernel.reshape(4, 3, 9)[k], 4, a, b, **options)
    for found in (whole, blocks):
        assert float(found.error) <= 1e-10
        got = sinkhorn.coupling(log_kernel, a, b, found.f, found.g)
        np.testing.assert_allclose(got, expected, atol=1e-8)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_batches_of_references_are_one_bridge_each():
    rng = np.random.default_rng(3)
    clouds = rng.normal([[0.0], [1.0], [2.0]], 0.7, (3, 15))
    rates = jnp.array([0.3, 1.0])
    times = [0.0, 0.5, 1.5]
    many = nsde.schrodinger_bridge(
        nsde.processes.OrnsteinUhlenbeck(rate=rates, mean=1.0, scale=0.8), times, clouds
    )
    assert many.batch_shape == (2,)
    assert many.sample_paths(jax.random.key(0), 3).paths.shape == (2, 3, 41)
    for i in range(2):
        one = nsde.schrodinger_bridge(
            nsde.processes.OrnsteinUhlenbeck(rate=rates[i], mean=1.0, scale=0.8), times, clouds
        )
        np.testing.assert_allclose(many.couplings[i], one.couplings, rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(many.kl[i], one.kl, rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_growth_gives_starts_as_many_lineages_as_descendants():
    rng = np.random.default_rng(4)
    clouds = rng.normal(0.0, 1.0, (2, 40)) + np.array([[0.0], [0.6]])
    sde = nsde.processes.BrownianMotion(drift=0.0, scale=1.0)
    bridge = nsde.schrodinger_bridge(sde, [0.0, 1.0], clouds, growth=lambda t, x: 0.6 * x)
    expected = np.exp(0.6 * clouds[0])
    np.testing.assert_allclose(bridge.row_weights[0], expected / expected.sum(), rtol=1e-7)
    np.testing.assert_allclose(bridge.couplings[0].sum(1), bridge.row_weights[0], atol=1e-6)
    np.testing.assert_allclose(bridge.couplings[0].sum(0), 1 / 40, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_paths_of_a_curved_reference_have_its_pinned_law():
    # A double well from -1 to 1: the middle against a long sample of unconditioned paths, kept
    # where they end close to 1.
    sde = nsde.processes.DoubleWell(linear=1.0, cubic=1.0, scale=1.0)
    ends = np.array([[-1.0], [1.0]])
    bridge = nsde.schrodinger_bridge(sde, [0.0, 1.0], ends)
    drawn = bridge.sample_paths(jax.random.key(1), 2000, max_step=0.05, num_particles=8)
    assert float(drawn.effective.min()) > 1.0
    path = nsde.SDEPath(sde, np.linspace(0, 1, 21), -1.0, scheme=nsde.schemes.Euler())
    free = np.asarray(path.sample(jax.random.key(2), (200_000,)))
    kept = free[np.abs(free[:, -1] - 1.0) < 0.05][:, 10]
    middle = np.asarray(drawn.paths[:, 10])
    se = np.sqrt(kept.var() / kept.size + middle.var() / middle.size)
    assert abs(kept.mean() - middle.mean()) < 4 * se
    se = np.sqrt(2 * kept.var() ** 2 / kept.size + 2 * middle.var() ** 2 / middle.size)
    assert abs(kept.var() - middle.var()) < 4 * se


@pytest.mark.slow
def test_ragged_lists_float32_and_errors():
    rng = np.random.default_rng(5)
    clouds = [rng.normal(size=(n, 2)) + k for k, n in enumerate((20, 30, 25))]
    sde = nsde.processes.LinearSDE(-0.3 * np.eye(2), np.ones(2), np.eye(2))
    bridge = nsde.schrodinger_bridge(sde, [0.0, 1.0, 2.0], clouds)
    assert float(bridge.marginal_error.max()) < 2e-6
    pi = np.asarray(bridge.couplings)
    np.testing.assert_allclose(pi[1].sum(0)[:25], 1 / 25, rtol=1e-4)
    np.testing.assert_array_equal(pi[0].sum(1)[20:], 0.0)
    which = np.asarray(bridge.lineages(jax.random.key(0), 200))
    assert (which.max(0) < [20, 30, 25]).all()
    with pytest.raises(ValueError, match="tol must be positive"):
        nsde.schrodinger_bridge(sde, [0.0, 1.0, 2.0], clouds, tol=0.0)
    with pytest.raises(ValueError, match="one cloud for each time"):
        nsde.schrodinger_bridge(sde, [0.0, 1.0], clouds)
    with pytest.warns(UserWarning, match="not converged"):
        nsde.schrodinger_bridge(sde, [0.0, 1.0, 2.0], clouds, max_iterations=2)
    still = rng.normal(size=(3, 40, 2))
    with pytest.warns(UserWarning, match="stationary"):
        nsde.schrodinger_bridge(sde, [0.0, 1.0, 2.0], still)


@pytest.mark.usefixtures("x64")
def test_unbalanced_by_ott():
    pytest.importorskip("ott")
    rng = np.random.default_rng(6)
    clouds = rng.normal([[0.0], [1.0]], 0.5, (2, 30))
    sde = nsde.processes.BrownianMotion(drift=0.0, scale=1.0)
    exact = nsde.schrodinger_bridge(sde, [0.0, 1.0], clouds)
    same = nsde.schrodinger_bridge(sde, [0.0, 1.0], clouds, tau=1.0)
    np.testing.assert_allclose(same.couplings, exact.couplings, atol=1e-6)
    loose = nsde.schrodinger_bridge(sde, [0.0, 1.0], clouds, tau=0.5)
    # First order, with lambda = tau / (1 - tau) = 1: the log ratio to the reference's coupling and
    # those of both marginals to the snapshots cancel, for every pair.
    pi = np.asarray(loose.couplings[0])
    r = clouds[1][None] - clouds[0][:, None]
    reference = np.exp(-0.5 * r**2)
    reference /= reference.sum()
    left, right = np.log(pi.sum(1) * 30), np.log(pi.sum(0) * 30)
    np.testing.assert_allclose(np.log(pi / reference) + left[:, None] + right[None], 0.0, atol=1e-4)
    ragged = [clouds[0], clouds[1][:20]]
    some = nsde.schrodinger_bridge(sde, [0.0, 1.0], ragged, tau=0.9)
    assert np.isfinite(some.couplings).all()
    np.testing.assert_array_equal(some.couplings[0][:, 20:], 0.0)
