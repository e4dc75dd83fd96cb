"""Jump-diffusions: exact densities, whitening, particles, and what must be refused."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jumps.references import REFERENCE
from scipy import integrate, stats

import numpyro_sde as nsde

MERTON = REFERENCE["merton"]


def merton(max_per_step=24):
    return nsde.SDE(
        lambda t, x: MERTON["mu"],
        lambda t, x: MERTON["sigma"],
        jumps=nsde.CompoundPoisson(
            MERTON["lam"], dist.Normal(MERTON["mj"], MERTON["sj"]), max_per_step=max_per_step
        ),
    )


@pytest.mark.parametrize("scheme", [nsde.schemes.JumpEuler(), nsde.schemes.JumpMixture()])
def test_transition_density_of_merton(x64, scheme):
    times = [0.0, MERTON["d"]]
    path = nsde.SDEPath(merton(), times, 0.0, scheme=scheme)
    x = jnp.stack([jnp.zeros(7), jnp.array(MERTON["x"])], axis=1)
    np.testing.assert_allclose(path.log_prob(x), MERTON["log_density"], atol=1e-8)


def test_draws_follow_the_density(x64):
    num = 20_000
    path = nsde.SDEPath(merton(8), [0.0, MERTON["d"]], 0.0)
    x = np.array(path.sample(jax.random.key(0), (num,)))[:, 1]
    grid = np.linspace(-2.0, 1.5, 7001)
    pairs = jnp.stack([jnp.zeros(grid.size), jnp.array(grid)], axis=1)
    cdf = np.cumsum(np.exp(path.log_prob(pairs))) * (grid[1] - grid[0])
    assert stats.kstest(x, lambda v: np.interp(v, grid, cdf)).pvalue > 0.001


def test_whitening_through_the_mixture(x64):
    sde, scheme = merton(8), nsde.schemes.JumpMixture()
    d, start = MERTON["d"], jnp.array(0.0)
    z = jnp.linspace(-7.0, 7.0, 29)

    @jax.jit
    def of(z):
        x, slope = jax.value_and_grad(lambda z: scheme.step(sde, 0.0, d, start, z))(z)
        back = scheme.invert(sde, 0.0, d, start, x)
        return x, slope, back, scheme.log_density(sde, 0.0, d, start, x)

    _, slope, back, log_density = jax.vmap(of)(z)
    np.testing.assert_allclose(back, z, atol=1e-9)
    np.testing.assert_allclose(
        log_density, jax.scipy.stats.norm.logpdf(z) - jnp.log(slope), atol=1e-9
    )


@pytest.mark.slow
def test_derivative_of_the_whitened_step_by_a_parameter(x64):
    def x_of(rate):
        sde = nsde.SDE(
            lambda t, x, p: 0.1,
            lambda t, x, p: 0.2,
            params=rate,
            jumps=nsde.CompoundPoisson(lambda t, x, p: p, dist.Normal(-0.3, 0.1)),
        )
        return nsde.schemes.JumpMixture().step(sde, 0.0, 0.25, jnp.array(0.0), jnp.array(-1.2))

    step = 1e-5
    numeric = (x_of(1.0 + step) - x_of(1.0 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(x_of)(1.0), numeric, rtol=1e-6)
    slope = jax.grad(x_of)
    numeric = (slope(1.0 + step) - slope(1.0 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(slope)(1.0), numeric, rtol=1e-5)


@pytest.mark.slow
def test_mean_reversion_with_jumps_on_a_fine_grid(x64):
    # The exact law has a jump decay by its own age; steps of the grid let it decay from their ends.
    ref = REFERENCE["ou_jump"]
    sde = nsde.SDE(
        lambda t, x: -ref["theta"] * x,
        lambda t, x: ref["sigma"],
        jumps=nsde.CompoundPoisson(ref["lam"], dist.Normal(ref["mj"], ref["sj"]), max_per_step=6),
    )
    scheme = nsde.schemes.JumpEuler(nsde.schemes.LocalLinear())
    grid = jnp.linspace(-1.4, 1.6, 601)
    width = grid[1] - grid[0]

    def after(steps):
        """Density after the whole time, steps one after the other by the trapezoidal rule."""
        h = ref["d"] / steps
        one = jax.vmap(lambda y, x: scheme.log_density(sde, 0.0, h, x, y), (0, None))
        density = jnp.exp(one(grid, jnp.array(ref["x0"])))
        K = jnp.exp(jax.vmap(lambda x: one(grid, x))(grid)) * width
        for _ in range(steps - 1):
            density = density @ K
        return np.interp(ref["x"], grid, density)

    exact = np.exp(ref["log_density"])
    coarse, fine = after(10) - exact, after(20) - exact
    # An error of first order in the step, removed by extrapolation.
    assert np.all(np.abs(fine) < 0.6 * np.abs(coarse) + 2e-3)
    np.testing.assert_allclose(2 * fine - coarse, 0.0, atol=6e-3)


def model(sde, scheme=None, y=None):
    x = numpyro.sample("x", nsde.SDEPath(sde, np.arange(5.0) / 4, 0.0, scheme=scheme))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)


@pytest.mark.slow
def test_particles_and_the_latent_path_agree(x64):
    # The likelihood by a bootstrap filter, and by quadrature of the exact transition density.
    sde, y = merton(), np.array([np.nan, 0.1, -0.3, -0.25, 0.0])
    grid = np.linspace(-1.6, 1.2, 701)
    width = grid[1] - grid[0]
    scheme = nsde.schemes.JumpEuler()
    K = jax.jit(
        jax.vmap(
            lambda x: jax.vmap(lambda v: scheme.log_density(sde, 0.0, 0.25, x, v))(jnp.array(grid))
        )
    )(jnp.array(grid))
    K = np.exp(K) * width
    exact = 0.0
    f = K[np.argmin(np.abs(grid))] / width
    for k in range(1, 5):
        if k > 1:
            f = f @ K
        f = f * stats.norm.pdf(y[k], grid, 0.1)
        exact += np.log(f.sum() * width)
        f = f / (f.sum() * width)
    path = nsde.SDEPath(sde, np.arange(5.0) / 4, 0.0)

    @jax.jit
    def run(key):
        method = nsde.filters.Particle(2000, proposal="bootstrap", key=key)
        return nsde.filter_path(path, lambda t, x: dist.Normal(x, 0.1), y, method=method)

    values = np.array([run(jax.random.key(k)).log_likelihood for k in range(10)])
    likelihood = np.exp(values - exact)
    error = likelihood.std() / np.sqrt(likelihood.size)
    assert error < 0.05
    assert abs(likelihood.mean() - 1.0) < 4.0 * error


@pytest.mark.slow
def test_guided_jumps_of_a_vector_with_its_own_rate(x64):
    # Unbiased for a self-exciting pair, whose rate the guide does not know exactly.
    sde = nsde.SDE(
        lambda t, x: -jnp.array([0.5, 1.0]) * (x - jnp.array([0.0, 0.4])),
        lambda t, x: jnp.array([0.3, 0.05]),
        jumps=nsde.CompoundPoisson(
            lambda t, x: jnp.maximum(x[1], 0.0),
            dist.Normal(jnp.array([1.0, 0.4]), jnp.array([0.5, 0.1])).to_event(1),
        ),
    )
    init = dist.Normal(jnp.array([0.0, 0.4]), jnp.array([0.2, 0.05])).to_event(1)
    path = nsde.SDEPath(sde, nsde.TimeGrid(np.arange(6.0), 0.25), init)
    y = np.array([0.1, 1.4, 1.1, 2.6, 2.0, 1.2])

    def estimates(proposal, num):
        @jax.jit
        def run(key):
            method = nsde.filters.Particle(num, proposal=proposal, key=key)
            return nsde.filter_path(
                path, lambda t, x: dist.Normal(x[0], 0.1), y, method=method, at=path.grid.index
            ).log_likelihood

        return np.array([run(jax.random.key(k)) for k in range(12)])

    guided, own = estimates("guided", 400), estimates("bootstrap", 4000)
    means, errors = [], []
    for values in (guided, own):
        weights = np.exp(values - own.max())
        means.append(weights.mean())
        errors.append(weights.std(ddof=1) / np.sqrt(12))
    assert errors[0] < 0.3 * means[0]
    assert abs(means[0] - means[1]) < 4.0 * np.hypot(*errors)


@pytest.mark.slow
def test_jumps_by_two_moments_on_request(x64):
    # Brownian motion with jumps: the moments of a step are exact, so is the Kalman filter of them.
    y = np.array([0.0, 0.1, -0.3, -0.25, 0.0])
    mean = (MERTON["mu"] + MERTON["lam"] * MERTON["mj"]) * 0.25
    second = MERTON["mj"] ** 2 + MERTON["sj"] ** 2
    var = (MERTON["sigma"] ** 2 + MERTON["lam"] * second) * 0.25
    steps = np.arange(5)
    cov = var * np.minimum(steps[:, None], steps[None, :]) + 0.01 * np.eye(5)
    exact = stats.multivariate_normal(mean * steps, cov).logpdf(y)
    matched = nsde.schemes.MatchedJumps()
    for method in (
        nsde.filters.Kalman(),
        nsde.filters.ExtendedKalman(),
        nsde.filters.UnscentedKalman(),
    ):
        marginal = nsde.handlers.marginalize(model, method=method)
        value = numpyro.infer.util.log_density(marginal, (merton(), matched, y), {}, {})[0]
        np.testing.assert_allclose(value, exact, atol=1e-9)
    # One line for a model that is written already, and sizes of any law with moments.
    other = nsde.handlers.discretize(model, matched)
    marginal = nsde.handlers.marginalize(other, method=nsde.filters.ExtendedKalman())
    value = numpyro.infer.util.log_density(marginal, (merton(), None, y), {}, {})[0]
    np.testing.assert_allclose(value, exact, atol=1e-9)
    skew = nsde.SDE(
        lambda t, x: 0.0 * x,
        lambda t, x: 0.2,
        jumps=nsde.CompoundPoisson(1.0, dist.Exponential(2.0)),
    )
    found = matched.moments(skew, 0.0, 0.5, jnp.array(1.0))
    np.testing.assert_allclose(found[0], 1.25)
    np.testing.assert_allclose(found[1] ** 2, 0.02 + 0.5 * 0.5)
    heavy = nsde.SDE(
        lambda t, x: 0.0 * x, lambda t, x: 0.2, jumps=nsde.CompoundPoisson(1.0, dist.Cauchy())
    )
    with pytest.raises(TypeError, match="no mean and variance"):
        matched.moments(heavy, 0.0, 0.5, jnp.array(1.0))


def test_moments_of_a_linear_jump_diffusion_are_exact(x64):
    ref = REFERENCE["ou_jump"]
    sde = nsde.SDE(
        lambda t, x: -ref["theta"] * x,
        lambda t, x: ref["sigma"],
        jumps=nsde.CompoundPoisson(ref["lam"], dist.Normal(ref["mj"], ref["sj"])),
    )
    scheme = nsde.schemes.MatchedJumps(nsde.schemes.LocalLinear())
    mean, sd = scheme.moments(sde, 0.0, ref["d"], jnp.array(ref["x0"]))
    np.testing.assert_allclose([mean, sd**2], [ref["mean"], ref["var"]], atol=1e-8)
    # A vector, against the equation of its moments: C' = A C + C A' + L L' + rate E J J'.
    A, L = np.array([[-1.0, 0.4], [0.0, -0.5]]), np.diag([0.2, 0.3])
    m, S = np.array([0.5, -0.2]), np.diag([0.3, 0.1]) ** 2
    pair = nsde.SDE(
        lambda t, x: jnp.array(A) @ x,
        lambda t, x: jnp.array([0.2, 0.3]),
        jumps=nsde.CompoundPoisson(0.7, dist.Normal(m, jnp.array([0.3, 0.1])).to_event(1)),
    )
    mean, factor = scheme.moments(pair, 0.0, 0.8, jnp.array([1.0, 2.0]))
    D = L @ L.T + 0.7 * (S + np.outer(m, m))

    def slopes(t, v):
        C = v[2:].reshape(2, 2)
        return np.concatenate([A @ v[:2] + 0.7 * m, (A @ C + C @ A.T + D).ravel()])

    end = integrate.solve_ivp(slopes, (0.0, 0.8), [1.0, 2.0, 0, 0, 0, 0], rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(mean, end.y[:2, -1], atol=1e-8)
    np.testing.assert_allclose(factor @ factor.T, end.y[2:, -1].reshape(2, 2), atol=1e-8)


def test_state_dependent_rates_excite_themselves(x64):
    # Hawkes: the intensity is the second state, decays at 2 and rises by 1 at each jump.
    sde = nsde.SDE(
        lambda t, x: jnp.stack([0.0 * x[0], -2.0 * (x[1] - 1.0)]),
        lambda t, x: jnp.array([0.1, 1e-6]),
        jumps=nsde.CompoundPoisson(
            lambda t, x: x[1], lambda t, x: dist.Delta(jnp.array([1.0, 1.0]), event_dim=1)
        ),
    )
    times = np.linspace(0.0, 6.0, 301)
    x = np.array(nsde.SDEPath(sde, times, jnp.array([0.0, 1.0])).sample(jax.random.key(0), (600,)))
    # Mean intensity: l' = 2 (1 - l) + l, so it tends to 2 at rate 1; the count is its integral.
    final = x[:, -1]
    intensity = 2.0 - np.exp(-6.0)
    count = 12.0 - (1.0 - np.exp(-6.0))
    for got, truth in ((final[:, 1], intensity), (final[:, 0], count)):
        error = got.std() / np.sqrt(len(got))
        assert abs(got.mean() - truth) < 4.0 * error + 0.02 * truth  # and the step of the grid


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (nsde.filters.Kalman(), "jumps"),
        (nsde.filters.ExtendedKalman(), "Gaussian transition"),
        (nsde.filters.UnscentedKalman(), "Gaussian transition"),
        (nsde.filters.MomentMatching(), "uses no scheme"),
        (nsde.filters.EnsembleKalman(), "bootstrap"),
        (nsde.filters.Particle(10, proposal="residual_bridge"), "bootstrap"),
    ],
)
def test_engines_that_would_drop_the_jumps_refuse(method, message):
    marginal = nsde.handlers.marginalize(model, method=method)
    with pytest.raises((ValueError, TypeError), match=message):
        numpyro.infer.util.log_density(marginal, (merton(), None, np.zeros(5)), {}, {})


@pytest.mark.slow
def test_reparametrisations():
    for reparam in (nsde.reparam.InnovationReparam(), nsde.reparam.GuidedReparam()):
        treated = numpyro.handlers.reparam(model, config={"x": reparam})
        with pytest.raises(ValueError, match="smooth maps of their innovations"):
            numpyro.handlers.trace(numpyro.handlers.seed(treated, 0)).get_trace(
                merton(8), None, np.zeros(5)
            )
        sites = numpyro.handlers.trace(numpyro.handlers.seed(treated, 0)).get_trace(
            merton(8), nsde.schemes.JumpMixture(), np.zeros(5)
        )
        assert np.all(np.isfinite(sites["x"]["value"]))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: nsde.CompoundPoisson(-1.0, dist.Normal()), ValueError, "rate must be"),
        (lambda: nsde.CompoundPoisson(1.0, 0.3), TypeError, "size must be a distribution"),
        (
            lambda: nsde.CompoundPoisson(1.0, dist.Normal(jnp.zeros(2))),
            ValueError,
            "no batch shape",
        ),
        (
            lambda: nsde.CompoundPoisson(1.0, dist.Normal(), max_per_step=0),
            ValueError,
            "at least 1",
        ),
        (lambda: nsde.SDE(lambda t, x: x, lambda t, x: 1.0, jumps=[1]), TypeError, "jumps must"),
        (
            lambda: nsde.SDEPath(merton(), [0.0, 1.0], 0.0, scheme=nsde.schemes.Euler()),
            ValueError,
            "would leave out the jumps",
        ),
        (
            lambda: nsde.SDEPath(
                nsde.SDE(lambda t, x: x, lambda t, x: 1.0),
                [0.0, 1.0],
                0.0,
                scheme=nsde.schemes.JumpEuler(),
            ),
            ValueError,
            "this one has none",
        ),
        (
            lambda: nsde.SDEPath(
                nsde.SDE(
                    lambda t, x: x,
                    lambda t, x: 1.0,
                    jumps=nsde.CompoundPoisson(1.0, dist.Normal()),
                ),
                [0.0, 1.0],
                jnp.zeros(2),
                scheme=nsde.schemes.JumpMixture(),
            ),
            ValueError,
            "scalar",
        ),
    ],
)
def test_wrong_jumps(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.slow
def test_sizes_without_a_density_and_steps_with_too_many_jumps():
    sde = nsde.SDE(
        lambda t, x: 0.0, lambda t, x: 0.2, jumps=nsde.CompoundPoisson(1.0, dist.Exponential(2.0))
    )
    path = nsde.SDEPath(sde, [0.0, 0.5], 0.0)
    x = path.sample(jax.random.key(0))
    with pytest.raises(TypeError, match="Exponential have no transition density"):
        path.log_prob(x)
    often = nsde.SDE(
        lambda t, x: 0.0, lambda t, x: 0.2, jumps=nsde.CompoundPoisson(50.0, dist.Normal())
    )
    path = nsde.SDEPath(often, [0.0, 0.5], 0.0)
    assert np.isnan(path.sample(jax.random.key(0))[1])
    assert np.isnan(path.log_prob(jnp.zeros(2)))
