"""Flat starts under Kalman against dense normal laws, and laws without moments refused by name."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import state_space as ss
from numpyro.distributions import constraints
from numpyro.infer.util import log_density

import numpyro_sde as nsde
from numpyro_sde import filters
from numpyro_sde.linear import diffuse, kalman

A = np.array([[0.0, 1.0], [-1.3, -0.4]])
B = np.array([0.2, 0.5])
L = np.array([[0.3, 0.0], [0.1, 0.6]])
TIMES = np.array([0.0, 0.3, 0.5, 1.1, 1.6, 2.4])
# far from 0, the first two rows without the data that would determine the start
Y = np.array([np.nan, 51.0, np.nan, 49.2, 48.7, 50.3])
NOISE = 0.4
FLAT = dist.ImproperUniform(constraints.real_vector, (), (2,))


def flat_law(steps, C=(1.0, 0.0), y=Y, noise=NOISE):
    """Log of the integral over the first state, and moments of all, by one precision matrix.

    The joint density of states and data with density 1 for the first state is the exponential of
    `k - x'J x / 2 + h'x`; no prior variance appears.
    """
    d = len(steps[0][1])
    n = d * (len(steps) + 1)
    J, h, k = np.zeros((n, n)), np.zeros(n), 0.0
    factors = []
    for i, (F, c, Q) in enumerate(steps):
        G = np.zeros((d, n))
        G[:, d * i : d * (i + 1)], G[:, d * (i + 1) : d * (i + 2)] = -F, np.eye(d)
        factors.append((G, c, Q))
    for i, value in enumerate(y):
        if not np.isnan(value):
            G = np.zeros((1, n))
            G[0, d * i : d * (i + 1)] = C
            factors.append((G, np.array([value]), np.array([[noise**2]])))
    for G, c, Q in factors:
        P = np.linalg.inv(Q)
        J, h = J + G.T @ P @ G, h + G.T @ P @ c
        k -= 0.5 * (c @ P @ c + np.linalg.slogdet(2 * np.pi * Q)[1])
    cov = np.linalg.inv(J)
    total = k + 0.5 * h @ cov @ h - 0.5 * np.linalg.slogdet(J / (2 * np.pi))[1]
    blocks = [slice(d * i, d * (i + 1)) for i in range(len(y))]
    return total, (cov @ h).reshape(-1, d), np.array([cov[b, b] for b in blocks])


def path(init=FLAT, offset=B):
    sde = nsde.SDE(lambda t, x: A @ x + offset, lambda t, x: jnp.asarray(L))
    return nsde.SDEPath(sde, TIMES, init)


def emission(t, x):
    return dist.Normal(x[0], NOISE)


def run(init=FLAT, y=Y, form="auto", law=emission, method=None, offset=B):
    method = filters.Kalman(form) if method is None else method
    return jax.jit(lambda y: nsde.filter_path(path(init, offset), law, y, method=method))(y)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["sequential", "sqrt", "parallel"])
def test_flat_start_equals_the_dense_law(form, x64):
    total, mean, cov = flat_law(ss.exact_steps(A, B, L, np.diff(TIMES)))
    result = run(form=form)
    np.testing.assert_allclose(result.log_likelihood, total, rtol=1e-9)
    smoothed, spread = jax.jit(lambda r: r.smooth())(result)
    np.testing.assert_allclose(smoothed, mean, rtol=1e-8)
    np.testing.assert_allclose(spread, cov, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(result.mean[-1], mean[-1], rtol=1e-9)
    np.testing.assert_allclose(result.cov[-1], cov[-1], rtol=1e-8)
    # Nothing is known until the second datum, at the fourth time.
    assert np.isnan(result.mean[:3]).all()
    assert np.isinf(np.diagonal(result.cov[2])).all()
    assert not np.any(result.increments[:3])
    np.testing.assert_allclose(result.increments.sum(), total, rtol=1e-9)
    # later increments are predictive densities: differences of integrals
    shorter, _, _ = flat_law(ss.exact_steps(A, B, L, np.diff(TIMES)), y=[*Y[:5], np.nan])
    np.testing.assert_allclose(result.increments[5], total - shorter, rtol=1e-7)


@pytest.mark.slow
def test_flat_start_is_the_limit_of_wide_ones(x64):
    """Less `log(2 pi k)` for two states; the error falls with the variance k."""
    exact = run().log_likelihood
    gaps = []
    for k in (1e5, 1e7):
        wide = run(dist.MultivariateNormal(jnp.zeros(2), k * jnp.eye(2))).log_likelihood
        gaps.append(float(wide + np.log(2 * np.pi * k) - exact))
    assert abs(gaps[1]) < 1e-3
    assert gaps[0] / gaps[1] == pytest.approx(100.0, rel=0.05)


def test_flat_start_of_a_random_walk_in_closed_form(x64):
    """`p(y_1, y_2, ..) = int`: the first datum integrates to 1, the rest are differences."""
    sde = nsde.processes.BrownianMotion(drift=0.0, scale=0.7)
    flat = dist.ImproperUniform(constraints.real, (), ())
    walk = nsde.SDEPath(sde, [0.0, 1.0], flat)
    method = filters.Kalman()
    law = lambda t, x: dist.Normal(x, 0.3)  # noqa: E731
    got = nsde.filter_path(walk, law, jnp.array([1000.0, 1001.5]), method=method).log_likelihood
    want = dist.Normal(0.0, jnp.sqrt(0.49 + 2 * 0.09)).log_prob(1.5)
    np.testing.assert_allclose(got, want, rtol=1e-10)
    exactly = lambda t, x: dist.Delta(x)  # noqa: E731
    seen = nsde.filter_path(walk, exactly, jnp.array([1000.0, 1001.5]), method=method)
    np.testing.assert_allclose(seen.log_likelihood, dist.Normal(0.0, 0.7).log_prob(1.5), rtol=1e-10)


@pytest.mark.slow
def test_flat_start_in_float32():
    offset = B + 0.125
    total, mean, _ = flat_law(ss.exact_steps(A, offset, L, np.diff(TIMES)))
    result = run(offset=offset)
    np.testing.assert_allclose(result.log_likelihood, total, rtol=1e-4)
    np.testing.assert_allclose(result.smooth()[0], mean, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_flat_start_with_too_few_data_is_nan(x64):
    one = np.where(np.arange(6) == 3, 50.0, np.nan)
    assert np.isnan(run(y=one).log_likelihood)
    blind = run(law=lambda t, x: dist.Normal(0.0 * x[0], NOISE))
    assert np.isnan(blind.log_likelihood)
    same = run(law=lambda t, x: dist.Normal(x[0], NOISE), y=np.full(6, np.nan))
    assert np.isnan(same.log_likelihood)


def test_flat_start_inside_a_model_and_its_gradient(x64):
    def model(y):
        rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
        sde = nsde.SDE(lambda t, x, p: -p * x, lambda t, x, p: 0.5, params=rate)
        init = dist.ImproperUniform(constraints.real, (), ())
        x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, init))
        nsde.observe("y", x, lambda t, x: dist.Normal(x, NOISE), obs=y)

    marginal = nsde.handlers.marginalize(model, method=filters.Kalman())

    @jax.jit
    def posterior(rate):
        return log_density(marginal, (Y,), {}, {"rate": rate})[0]

    def truth(rate):
        steps = ss.exact_steps(np.array([[-rate]]), np.zeros(1), np.array([[0.5]]), np.diff(TIMES))
        return flat_law(steps, (1.0,))[0] + float(dist.LogNormal(0.0, 1.0).log_prob(rate))

    np.testing.assert_allclose(posterior(0.8), truth(0.8), rtol=1e-9)
    slope = (truth(0.8 + 1e-5) - truth(0.8 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.jit(jax.grad(posterior))(0.8), slope, rtol=1e-6)


@pytest.mark.slow
def test_draws_of_the_path_from_a_flat_start(x64):
    n = 20_000
    _, mean, cov = flat_law(ss.exact_steps(A, B, L, np.diff(TIMES)))
    draws = np.asarray(jax.jit(lambda r, k: r.sample(k, n))(run(), jax.random.key(2)))
    sd = np.sqrt(np.diagonal(cov, axis1=1, axis2=2))
    z = (draws.mean(0) - mean) / (sd / np.sqrt(n))  # standard errors of the means
    assert np.abs(z).max() < 4.0


@pytest.mark.parametrize("form", ["sequential", "parallel"])
def test_arrays_with_any_first_law(form, x64):
    """The model's own first law is not read."""
    steps = ss.exact_steps(A, B, L, np.diff(TIMES))
    F, c, Q = (jnp.asarray(np.stack(v)) for v in zip(*steps, strict=True))
    mask, y = ~np.isnan(Y)[:, None], np.nan_to_num(Y)[:, None]
    rest = {"F": F, "c": c, "Q": Q, "C": jnp.array([[1.0, 0.0]]), "R": jnp.array([NOISE**2])}
    for m0, P0 in ((jnp.zeros(2), jnp.eye(2)), (jnp.full(2, 1e3), jnp.zeros((2, 2)))):
        model = kalman.LinearGaussian(m0=m0, P0=P0, **rest)
        got = diffuse.log_likelihood(model, y, mask, form=form)
        np.testing.assert_allclose(got, flat_law(steps)[0], rtol=1e-9)


OTHERS = ["ExtendedKalman", "UnscentedKalman", "MomentMatching", "EnsembleKalman"]


@pytest.mark.parametrize("name", [*OTHERS, "Particle"])
def test_other_filters_refuse_a_flat_start(name):
    method = filters.Particle(16) if name == "Particle" else getattr(filters, name)()
    with pytest.raises(ValueError, match=r"ImproperUniform.*Kalman\(\)"):
        run(method=method)


def test_a_flat_start_on_half_a_line_is_refused():
    half = dist.ImproperUniform(constraints.positive, (), ())
    sde = nsde.SDE(lambda t, x: -x, lambda t, x: 0.5)
    law = lambda t, x: dist.Normal(x, 0.3)  # noqa: E731
    with pytest.raises(ValueError, match=r"init must be a normal.*ImproperUniform"):
        nsde.filter_path(
            nsde.SDEPath(sde, [0.0, 1.0], half), law, jnp.ones(2), method=filters.Kalman()
        )


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("law", [dist.Cauchy(0.0, 1.0), dist.StudentT(2.0, 0.0, 1.0)])
def test_starts_without_moments_are_refused(name, law):
    sde = nsde.SDE(lambda t, x: -x, lambda t, x: 0.5)
    start = nsde.SDEPath(sde, [0.0, 1.0], law)
    seen = lambda t, x: dist.Normal(x, 0.3)  # noqa: E731
    with pytest.raises(ValueError, match="law of init has not"):
        nsde.filter_path(start, seen, jnp.ones(2), method=getattr(filters, name)())


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    "law",
    [lambda t, x: dist.Cauchy(x[0], 1.0), lambda t, x: dist.StudentT(1.5, x[0], 1.0)],
)
def test_emissions_without_moments_are_refused_where_they_are_asked_for(name, law):
    init = dist.MultivariateNormal(jnp.zeros(2), jnp.eye(2))
    with pytest.raises(ValueError, match=r"statement 1 has none.*emission='laplace'"):
        run(init, law=law, method=getattr(filters, name)(emission="moments"))


@pytest.mark.slow
@pytest.mark.parametrize("law", [dist.Cauchy(0.3, 0.5), dist.StudentT(3.0, 0.3, 0.5)])
@pytest.mark.parametrize("family", [dist.Normal, dist.Cauchy])
def test_guides_stand_laws_without_moments(law, family):
    """The guided density is the joint one and the log Jacobian of the map of the innovations."""
    times, y = np.linspace(0.0, 1.0, 4), np.array([0.5, 0.4, 0.7, 0.2])
    path = nsde.SDEPath(nsde.SDE(lambda t, x: x - x**3, lambda t, x: 0.5), times, law)

    def model():
        x = numpyro.sample("x", path)
        nsde.observe("y", x, lambda t, x: family(x, 0.3), obs=y)

    guided = numpyro.handlers.reparam(model, {"x": nsde.reparam.GuidedReparam()})

    @jax.jit
    def density(z):
        sites = {"x_init": 0.4, "x_innov": z}
        total, trace = log_density(guided, (), {}, sites)
        return trace["x"]["value"][1:], (trace["x"]["value"], total)

    z = jnp.array([0.1, -0.4, 0.9])
    slope, (value, total) = jax.jacfwd(density, has_aux=True)(z)
    joint = path.log_prob(value) + jnp.sum(family(value, 0.3).log_prob(y))
    np.testing.assert_allclose(total, joint + jnp.linalg.slogdet(slope)[1], rtol=1e-4)
    # It guides: innovations of zero lead to the data more closely than those of the model do.
    central = density(0.0 * z)[1][0]
    assert jnp.mean(jnp.abs(central - y)) < jnp.mean(jnp.abs(path.forward(0.4, 0.0 * z) - y))
