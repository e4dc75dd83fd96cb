"""Steps with Student t and stable increments: laws, engines, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.util import log_density
from scipy import stats

import numpyro_sde as nsde

NUM = 20_000


def walk(scheme, times=(0.0, 0.25), scale=0.8):
    sde = nsde.SDE(lambda t, x: 0.4 - 0.0 * x, lambda t, x: scale)
    return nsde.SDEPath(sde, list(times), 0.0, scheme=scheme)


@pytest.mark.slow
def test_student_increments(x64):
    path = walk(nsde.schemes.StudentEuler(3.0))
    x = np.array(path.sample(jax.random.key(0), (NUM,)))[:, 1]
    law = stats.t(3.0, loc=0.1, scale=0.4)
    assert stats.kstest(x, law.cdf).pvalue > 0.001
    np.testing.assert_allclose(path.log_prob(jnp.array([0.0, 2.0])), law.logpdf(2.0))
    both = nsde.SDEPath(
        nsde.SDE(lambda t, x: 0.0 * x, lambda t, x: jnp.array([1.0, 2.0])),
        [0.0, 1.0],
        jnp.zeros(2),
        scheme=nsde.schemes.StudentEuler(5.0),
    )
    known = stats.t(5.0).logpdf(1.5) + stats.t(5.0, scale=2.0).logpdf(-1.0)
    np.testing.assert_allclose(both.log_prob(jnp.array([[0.0, 0.0], [1.5, -1.0]])), known)
    slope = jax.grad(lambda df: walk(nsde.schemes.StudentEuler(df)).log_prob(jnp.array([0.0, 2.0])))
    numeric = (
        stats.t(3.001, loc=0.1, scale=0.4).logpdf(2.0)
        - stats.t(2.999, loc=0.1, scale=0.4).logpdf(2.0)
    ) / 0.002
    np.testing.assert_allclose(slope(3.0), numeric, rtol=1e-5)


@pytest.mark.parametrize(
    ("alpha", "skew"), [(2.0, 0.0), (1.7, 0.0), (1.0, 0.0), (1.5, 0.8), (0.6, -0.5)]
)
def test_stable_increments_have_their_characteristic_function(x64, alpha, skew):
    one = walk(nsde.schemes.StableEuler(alpha, skew))
    # The law over a time is that of its parts together.
    four = walk(nsde.schemes.StableEuler(alpha, skew), np.linspace(0.0, 0.25, 5))
    tilt = skew * np.tan(np.pi * alpha / 2) if skew else 0.0
    for path in (one, four):
        x = np.array(path.sample(jax.random.key(1), (NUM,)))[:, -1] - 0.1
        for u in (0.5, 2.0, 5.0):
            c = 0.8 * 0.25 ** (1 / alpha) / np.sqrt(2.0)
            known = np.exp(-((c * u) ** alpha) * (1 - 1j * tilt))
            values = np.exp(1j * u * x)
            error = np.array([values.real.std(), values.imag.std()]) / np.sqrt(NUM)
            gap = values.mean() - known
            assert abs(gap.real) < 4.0 * error[0]
            assert abs(gap.imag) < 4.0 * error[1]


def model(scheme, y=None):
    x = numpyro.sample("x", walk(scheme, np.arange(4.0)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)


@pytest.mark.slow
def test_engines(x64):
    y = np.array([0.0, 0.2, 3.0, 2.9])
    scheme = nsde.schemes.StudentEuler(3.0)
    # Three latent states by quadrature.
    grid = np.linspace(-6.0, 9.0, 1501)
    width = grid[1] - grid[0]
    K = stats.t(3.0, scale=0.8).pdf(grid[None, :] - grid[:, None] - 0.4)
    f, total = stats.t(3.0, scale=0.8).pdf(grid - 0.4), stats.norm.logpdf(0.0, 0.0, 0.3)
    for k in (1, 2, 3):
        f = f * stats.norm.pdf(y[k], grid, 0.3)
        total, f = total + np.log(f.sum() * width), f / (f.sum() * width)
        f = f @ K * width

    def at(scheme, method):
        marginal = nsde.handlers.marginalize(model, method=method)
        return log_density(marginal, (scheme, y), {}, {})[0]

    for proposal, num in (("bootstrap", 4000), ("auto", 2000)):
        run = jax.jit(
            lambda key, p=proposal, n=num: at(scheme, nsde.filters.Particle(n, proposal=p, key=key))
        )
        ratio = np.exp(np.array([run(jax.random.key(k)) for k in range(8)]) - total)
        error = ratio.std(ddof=1) / np.sqrt(8)
        assert error < 0.1
        assert abs(ratio.mean() - 1.0) < 4.0 * error + 1e-3  # and the quadrature
    for method in (
        nsde.filters.Kalman(),
        nsde.filters.ExtendedKalman(),
        nsde.filters.MomentMatching(),
    ):
        for other in (scheme, nsde.schemes.StableEuler(1.5)):
            with pytest.raises((ValueError, TypeError), match=r"StudentEuler|StableEuler|Gaussian"):
                at(other, method)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [nsde.schemes.StudentEuler(3.0), nsde.schemes.StableEuler(1.6)])
def test_latent_paths_are_whitened(x64, scheme):
    y = np.array([0.0, 0.2, 3.0, 2.9])
    for reparam in (nsde.reparam.InnovationReparam(), nsde.reparam.GuidedReparam()):
        white = numpyro.handlers.reparam(model, config={"x": reparam})
        sites = numpyro.handlers.trace(numpyro.handlers.seed(white, 0)).get_trace(scheme, y)
        z, x = sites["x_innov"]["value"], sites["x"]["value"]
        assert z.shape == (3, 2)
        values = {"x_innov": z}
        density, slope = jax.value_and_grad(
            lambda values, w=white: log_density(w, (scheme, y), {}, values)[0]
        )(values)
        assert np.isfinite(density)
        assert np.all(np.isfinite(slope["x_innov"]))
        if isinstance(reparam, nsde.reparam.InnovationReparam):
            np.testing.assert_allclose(x, walk(scheme, np.arange(4.0)).forward(0.0, z))
    # At innovations of zero a step has the derivative that guides linearise by.
    step = jax.jacfwd(lambda z: scheme.increments(z, jnp.array(0.25)))(jnp.zeros(2))
    near = [scheme.increments(jnp.array([h, 0.0]), jnp.array(0.25)) for h in (-1e-5, 1e-5)]
    np.testing.assert_allclose(step[0], (near[1] - near[0]) / 2e-5, rtol=1e-6)
    path = walk(scheme, np.arange(4.0))
    with pytest.raises(TypeError, match="cannot be read off"):
        path.inverse(path.sample(jax.random.key(0)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nsde.schemes.StudentEuler(0.0), "df must be positive"),
        (lambda: nsde.schemes.StableEuler(2.1), "alpha must be"),
        (lambda: nsde.schemes.StableEuler(1.0, 0.5), "skew must be"),
        (
            lambda: nsde.SDEPath(
                nsde.SDE(lambda t, x: 0.0 * x, lambda t, x: jnp.ones((2, 1))),
                [0.0, 1.0],
                jnp.zeros(2),
                scheme=nsde.schemes.StableEuler(1.5),
            ),
            "increment of its own",
        ),
    ],
)
def test_wrong_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
