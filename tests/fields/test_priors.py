"""Unknown functions: covariances against the kernels, constraints exactly, sites and shapes."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.hsgp import spectral_densities
from numpyro.infer.util import log_density

import numpyro_sde as nsde
from numpyro_sde.fields.kernels import covariance

HSGP, RFF, InducingGP, Network = (
    nsde.fields.HSGP,
    nsde.fields.RFF,
    nsde.fields.InducingGP,
    nsde.fields.Network,
)
MATERN = {"matern32": 1.5, "matern52": 2.5}


def drawn(prior, seed=0, amplitude=1.0, length=0.7):
    z = np.random.default_rng(seed).normal(size=prior.weight_shape)
    return prior.from_weights(z, amplitude=amplitude, length=length)


def gram(prior, field, points):
    phi = jax.vmap(lambda x: prior.features(jnp.reshape(x, prior.dim), field.own))(points)
    return (phi * field.weight_sd**2) @ phi.T


@pytest.mark.parametrize("kernel", ["se", "matern32", "matern52"])
def test_prior_variances_of_sines_are_those_of_numpyro(x64, kernel):
    field = drawn(HSGP(2, [2.5, (-1.0, 2.0)], [5, 4], kernel), amplitude=1.7)
    ell, m = [2.5, 1.5], [5, 4]
    if kernel == "se":
        want = spectral_densities.diag_spectral_density_squared_exponential(1.7**2, 0.7, ell, m, 2)
    else:
        want = spectral_densities.diag_spectral_density_matern(
            nu=MATERN[kernel], alpha=1.7**2, length=0.7, ell=ell, m=m, dim=2
        )
    np.testing.assert_allclose(np.sort(field.weight_sd**2), np.sort(want), rtol=1e-12)


def test_covariance_of_the_sines_is_the_kernel(x64):
    """Box 4, length 0.5, within 1.5 of zero: mirror images add less than exp(-50)."""
    prior = HSGP(1, 4.0, 80)
    x = jnp.linspace(-1.5, 1.5, 7)
    want = covariance("se", ((x[:, None] - x[None]) / 0.5) ** 2)
    np.testing.assert_allclose(gram(prior, drawn(prior, length=0.5), x), want, atol=1e-8)


@pytest.mark.parametrize("kernel", ["se", "matern32", "matern52"])
def test_covariance_of_random_features_is_the_kernel(kernel):
    """20,000 features: an error of 1 / sqrt(20,000) = 0.007 in each entry, at 4 of them."""
    prior = RFF(3, 20_000, kernel, seed=1)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(5, 3)))
    distance = ((x[:, None] - x[None]) ** 2).sum(-1) / 0.7**2
    np.testing.assert_allclose(
        gram(prior, drawn(prior), x), covariance(kernel, distance), atol=4 / np.sqrt(20_000)
    )


def test_inducing_values_are_interpolated_as_a_gaussian_process(x64):
    points, x = np.linspace(-2.0, 2.0, 9), 0.37
    prior = InducingGP(points, "matern32")
    field = drawn(prior, length=0.8, amplitude=2.0)
    values = field.on(points)
    k = np.asarray(covariance("matern32", ((points - x) / 0.8) ** 2))
    K = np.asarray(covariance("matern32", ((points[:, None] - points) / 0.8) ** 2))
    np.testing.assert_allclose(field(x), k @ np.linalg.solve(K, values), rtol=1e-8)
    np.testing.assert_allclose(field.prior_sd(points[3]), 2.0, rtol=1e-8)


@pytest.mark.slow
def test_constraints_hold_whatever_the_weights(x64):
    x = jnp.array([0.3, -0.4])
    slopes = jax.jacfwd(drawn(HSGP(2, 2.0, 5, constraint="divergence_free")))(x)
    assert abs(jnp.trace(slopes)) < 1e-12
    curl = jax.jacfwd(drawn(HSGP(3, 2.0, 3, constraint="divergence_free")))(jnp.append(x, 0.2))
    assert abs(jnp.trace(curl)) < 1e-12
    slopes = jax.jacfwd(drawn(HSGP(2, 2.0, 5, constraint="gradient")))(x)
    np.testing.assert_allclose(slopes, slopes.T, atol=1e-12)
    odd = drawn(HSGP(2, 2.0, 5, constraint="odd", outputs=2))
    np.testing.assert_allclose(odd(x), -odd(-x), atol=1e-12)
    rises = drawn(HSGP(1, 2.0, 8, constraint="increasing")).on(jnp.linspace(-1.5, 1.5, 30))
    assert np.all(np.diff(rises) > 0)
    falls = drawn(HSGP(1, 2.0, 8, constraint="decreasing")).on(jnp.linspace(-1.5, 1.5, 30))
    np.testing.assert_allclose(falls, -rises)


def test_the_integral_of_a_monotone_field_is_that_of_its_slope(x64):
    field = drawn(HSGP(1, 2.0, 8, constraint="increasing"))
    slope = jax.grad(field)(0.9)
    np.testing.assert_allclose(slope, jnp.exp(field.log_slope(0.9)), rtol=1e-6)


def test_a_field_with_rest_points_is_the_process_given_that_it_is_zero_there(x64):
    """Prior variance beside the points: that of a Gaussian process conditioned on zeros."""
    rest, x = np.array([-1.0, 0.5]), 0.2
    prior, free = HSGP(1, 4.0, 60, zero_at=rest), HSGP(1, 4.0, 60)
    field = drawn(prior)
    np.testing.assert_allclose(field.on(rest), 0.0, atol=1e-10)
    zs = np.eye(60)
    rows = [prior.from_weights(z, amplitude=1.0, length=0.7)(x) for z in zs]
    K = gram(free, drawn(free), jnp.array([x, *rest]))
    want = K[0, 0] - K[0, 1:] @ jnp.linalg.solve(K[1:, 1:], K[1:, 0])
    np.testing.assert_allclose(np.sum(np.square(rows)), want, rtol=1e-8)
    both = drawn(HSGP(2, 2.0, 6, constraint="gradient", zero_at=[[0.0, 0.0]]))
    np.testing.assert_allclose(both(jnp.zeros(2)), 0.0, atol=1e-10)


def test_outside_its_box_a_field_is_zero():
    field = drawn(HSGP(1, (0.0, 2.0), 6))
    assert float(field(2.5)) == float(field(-0.1)) == 0.0
    assert float(field(1.0)) != 0.0


def test_sums_and_products_with_known_parts():
    f, g = drawn(HSGP(1, 2.0, 6)), drawn(HSGP(1, 2.0, 6), seed=1)
    x = 0.4
    for made, want in [
        (f + g, f(x) + g(x)),
        (f + (lambda x: -(x**3)), f(x) - x**3),
        (1.0 - f, 1.0 - f(x)),
        (2.0 * f * g, 2.0 * f(x) * g(x)),
        (-f * jnp.sin, -f(x) * jnp.sin(x)),
        (np.float32(3.0) * f, 3.0 * f(x)),
    ]:
        np.testing.assert_allclose(made(x), want, rtol=1e-6)
    with pytest.raises(TypeError, match="a part of a field must be"):
        f + "known"
    two = drawn(HSGP(1, 2.0, 6, outputs=2)) + drawn(HSGP(1, 2.0, 6, outputs=3))
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(3,\)"):
        two(0.1)


TIMES = np.linspace(0.0, 0.5, 6)


def panel(prior, series=3, shared=False):
    def model(y=None):
        if shared:
            f = prior.register("f", amplitude=dist.HalfNormal(2.0), length=0.7)
        with numpyro.plate("series", series):
            if not shared:
                f = prior.register("f", amplitude=dist.HalfNormal(2.0), length=0.7)
            sde = nsde.SDE(
                lambda t, x, p: p["f"](x) - x**3,
                lambda t, x, p: 0.5 + 0.1 * jnp.tanh(p["f"](x)),
                params={"f": f},
            )
            numpyro.sample("x", nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 0.5)), obs=y)

    return model


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_in_a_plate_each_series_has_the_function_of_its_own_sites(x64, shared):
    """The density of a panel is the sum over models of one series."""
    prior = HSGP(1, 2.5, 5)
    recorded = handlers.trace(handlers.seed(panel(prior, shared=shared), 0)).get_trace()
    values = {k: recorded[k]["value"] for k in ("f/amplitude", "f/z", "x")}
    assert values["f/z"].shape == ((5,) if shared else (3, 5))
    got = recorded["x"]["fn"].log_prob(values["x"])
    for i in range(3):
        own = {k: v if shared and k != "x" else v[i : i + 1] for k, v in values.items()}
        one = handlers.substitute(panel(prior, series=1, shared=shared), own)
        alone = handlers.trace(handlers.seed(one, 0)).get_trace()["x"]
        np.testing.assert_allclose(alone["fn"].log_prob(alone["value"])[0], got[i], rtol=1e-9)


def test_two_plates_and_hyperparameters_on_different_ones(x64):
    prior = HSGP(1, 2.5, 4)

    def model():
        with numpyro.plate("sites", 2, dim=-2):
            amplitude = numpyro.sample("a", dist.HalfNormal(1.0))  # (2, 1)
            with numpyro.plate("series", 3, dim=-1):
                f = prior.register("f", amplitude=amplitude + 0.1, length=0.5)
        return f

    with pytest.raises(ValueError, match=r"amplitude must have shape"):
        handlers.seed(model, 0)()

    def nested():
        with numpyro.plate("sites", 2, dim=-2):
            length = numpyro.plate("series", 3, dim=-1)
            with length:
                return prior.register("f", amplitude=dist.HalfNormal(1.0), length=0.5)

    field = handlers.seed(nested, 0)()
    assert field.weights.shape == (2, 3, 4)


def test_networks_are_sites_params_or_both():
    module = eqx.nn.MLP(2, 2, 8, 1, jnp.tanh, key=jax.random.key(0))
    names = ["f/layers.0.bias", "f/layers.0.weight", "f/layers.1.bias", "f/layers.1.weight"]
    for prior, sites in [
        (Network(module, 2, 2), names),
        (Network(module, 2, 2, prior=None), ["f$params"]),
        (Network(module, 2, 2, last_layer=True), ["f$params", *names[2:]]),
        (Network(module, 2, 2, prior=dist.Normal(0.0, 0.1)), names),
    ]:
        recorded = handlers.trace(handlers.seed(lambda p=prior: p.register("f"), 0)).get_trace()
        assert sorted(recorded) == sorted(sites)
    one = handlers.seed(Network(module, 2, 2, prior=None).register, 0)("f")
    np.testing.assert_allclose(one(jnp.ones(2)), module(jnp.ones(2)), rtol=1e-6)
    law = handlers.trace(handlers.seed(Network(module, 2, 2).register, 0)).get_trace("f")
    sd = {k: float(v["fn"].base_dist.variance.ravel()[0]) ** 0.5 for k, v in law.items()}
    np.testing.assert_allclose([sd[n] for n in names], [2**-0.5, 2**-0.5, 8**-0.5, 8**-0.5])


@pytest.mark.slow
def test_one_network_for_each_series():
    prior = Network(eqx.nn.MLP("scalar", "scalar", 4, 1, jnp.tanh, key=jax.random.key(0)))

    def model():
        with numpyro.plate("series", 3):
            f = prior.register("f")
            sde = nsde.SDE(lambda t, x, p: 0.3 * p["f"](x), lambda t, x, p: 0.3, params={"f": f})
            return f, numpyro.sample("x", nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 0.5)))

    recorded = handlers.trace(handlers.seed(model, 0)).get_trace()
    path = recorded["x"]
    assert path["fn"].batch_shape == (3,)
    got = path["fn"].log_prob(path["value"])
    for i in range(3):
        drawn = {k: v["value"][i] for k, v in recorded.items() if k.startswith("f/")}
        f = handlers.substitute(handlers.seed(prior.register, 0), drawn)("f")
        sde = nsde.SDE(lambda t, x, p: 0.3 * p(x), lambda t, x, p: 0.3, params=f)
        alone = nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 0.5)).log_prob(path["value"][i])
        np.testing.assert_allclose(alone, got[i], rtol=1e-5)


def observed(prior, x, of=lambda f, x: f(x)):
    def model():
        f = prior.register("f", amplitude=dist.HalfNormal(2.0), length=0.7)
        sde = nsde.SDE(lambda t, x, p: of(p, x), lambda t, x, p: 0.5, params=f)
        numpyro.sample("x", nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 0.5)), obs=x)

    return model


def test_data_outside_a_box_are_an_error_also_where_parameters_are_traced():
    prior, x = HSGP(1, 1.0, 4), np.array([0.1, 0.2, np.nan, 0.5, 2.0, 1.2])

    def density(z, x=x, of=lambda f, x: f(x)):
        values = {"f/z": z, "f/amplitude": jnp.array(1.0)}
        return log_density(observed(prior, x, of), (), {}, values)[0]

    for call in (density, jax.jit(density), jax.grad(density)):
        with pytest.raises(ValueError, match=r"2 of 5 states .* outside the box"):
            call(jnp.zeros(4))
    inside = np.array([0.1, 0.2, 0.4, 0.5, 0.7, 0.6])
    assert np.isfinite(density(jnp.zeros(4), inside))
    # What the drift hands to the field is looked at, not the state.
    assert np.isfinite(density(jnp.zeros(4), 2.0 * inside, lambda f, x: f(0.5 * x)))
    with pytest.raises(ValueError, match="outside the box"):
        density(jnp.zeros(4), inside, lambda f, x: f(3.0 * x))


def test_sites_inside_a_drift_are_an_error():
    prior = HSGP(1, 2.0, 4)

    def drift(t, x):
        return prior.register("f", amplitude=dist.HalfNormal(2.0), length=0.7)(x)

    def model():
        path = nsde.SDEPath(nsde.SDE(drift, lambda t, x: 1.0), TIMES, dist.Normal(0.0, 1.0))
        numpyro.sample("x", path)

    with pytest.raises(ValueError, match="'f/amplitude' is made inside a drift"):
        handlers.seed(model, 0)()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HSGP(4, 1.0), "1 to 3 dimensions, got dim=4"),
        (lambda: HSGP(1, 1.0, kernel="rbf"), "kernel must be one of"),
        (lambda: HSGP(2, [1.0, 1.0, 1.0]), "box must be a half-width"),
        (lambda: HSGP(1, (2.0, 1.0)), "the lower first"),
        (lambda: HSGP(1, (0.0, 2.0), constraint="odd"), "symmetric about zero"),
        (lambda: HSGP(2, 1.0, constraint="increasing"), "dim must be 1"),
        (lambda: HSGP(2, 1.0, constraint="gradient", outputs=3), "must be dim=2, got 3"),
        (lambda: HSGP(1, 1.0, constraint="curl"), "constraint must be None or one of"),
        (lambda: HSGP(3, 1.0, 40), "64000 sines, above"),
        (lambda: drawn(HSGP(2, 1.0, 3))(jnp.zeros(3)), "one state of 2 coordinate"),
        (lambda: HSGP(1, 1.0, 3).from_weights(np.zeros(4), amplitude=1.0, length=1.0), "z must"),
        (lambda: HSGP(1, 1.0, 3).register("f", amplitude=-1.0, length=1.0), "must be positive"),
        (lambda: InducingGP([np.nan]), "points must be finite"),
        (lambda: Network(eqx.nn.Linear(2, 3, key=jax.random.key(0)), 2, 2), "must return shape"),
        (lambda: Network(eqx.nn.Linear(2, 2, key=jax.random.key(0)), 3, 2), "does not take one"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_float32_and_float64(x64):
    prior = HSGP(1, 2.0, 6)
    want = drawn(prior)(0.3)
    with jax.enable_x64(False):
        got = drawn(HSGP(1, 2.0, 6))(0.3)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5)


def _by_quadrature(f, mean, covariance):
    points, weights = np.polynomial.hermite_e.hermegauss(40)
    dim = len(mean)
    grid = np.stack(np.meshgrid(*[points] * dim, indexing="ij"), -1).reshape(-1, dim)
    mass = np.stack(np.meshgrid(*[weights] * dim, indexing="ij"), -1).reshape(-1, dim).prod(1)
    values = np.asarray(f.on(mean + grid @ np.linalg.cholesky(covariance).T))
    return np.tensordot(mass / mass.sum(), values, 1)


@pytest.mark.parametrize("options", [{"outputs": 2}, {"constraint": "divergence_free"}])
def test_expectations_under_a_normal_law_are_those_of_quadrature(x64, options):
    """A law well inside the box, 40 points in each dimension; Stein's identity for its Jacobian."""
    prior = nsde.fields.HSGP(2, ((-3.0, 2.0), 2.5), 4, **options)
    z = np.random.default_rng(0).normal(size=prior.weight_shape)
    f = prior.from_weights(z, amplitude=1.2, length=0.9)
    mean, covariance = np.array([-0.4, 0.2]), np.array([[0.05, 0.02], [0.02, 0.03]])
    want = _by_quadrature(f, mean, covariance)
    np.testing.assert_allclose(f.expected(mean, covariance), want, atol=1e-9)
    got = jax.jacfwd(f.expected)(jnp.asarray(mean), covariance)
    slopes = _by_quadrature(_Slopes(f), mean, covariance)
    np.testing.assert_allclose(got, slopes, atol=1e-8)


class _Slopes:
    def __init__(self, f):
        self.on = jax.vmap(jax.jacfwd(f))


def test_expectations_without_a_formula_are_refused():
    f = nsde.fields.RFF(1, 3).from_weights(jnp.ones(3), amplitude=1.0, length=1.0)
    with pytest.raises(ValueError, match="no expectations in closed form"):
        f.expected(0.0, 1.0)
