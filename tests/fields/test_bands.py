"""Bands of unknown functions against the exact normal law of the weights; rest points; plots."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density

import numpyro_sde as nsde
from numpyro_sde.diagnostics import field_band, invariant_density, plot_field, rest_points

PRIOR = nsde.fields.HSGP(dim=1, box=2.5, num=4)
TIMES = np.arange(30) * 0.05
X = np.concatenate([[0.0], 0.2 * np.cumsum(np.random.default_rng(0).normal(size=29))])
GRID = np.array([-2.2, -1.0, 0.0, 0.3, 1.0])
DRAWS = {"f/amplitude": np.full(4000, 1.5)}


def model(x=X):
    f = PRIOR.register("f", amplitude=dist.HalfNormal(2.0), length=0.8)
    sde = nsde.SDE(lambda t, x, p: p(x) - x, lambda t, x, p: 0.9, params=f)
    return numpyro.sample("x", nsde.SDEPath(sde, TIMES, init=0.0), obs=x)


@pytest.fixture(scope="module")
def band():
    pytest.importorskip("arviz")
    return field_band(DRAWS, "f", GRID, model=nsde.handlers.collapse(model, "f"), num_draws=4000)


@pytest.fixture(scope="module")
def exact():
    """Mean and standard deviation of the field on the grid, from the joint density."""
    with jax.enable_x64(True):

        def density(z):
            return log_density(model, (), {}, {"f/amplitude": jnp.array(1.5), "f/z": z})[0]

        zero = jnp.zeros(4)
        H = -jax.hessian(density)(zero)
        mean = jnp.linalg.solve(H, jax.grad(density)(zero))
        field = PRIOR.from_weights(zero, amplitude=1.5, length=0.8)
        phi = jax.vmap(lambda x: PRIOR.features(x[None], ()))(jnp.asarray(GRID)) * field.weight_sd
        sd = jnp.sqrt(jnp.einsum("ij,jk,ik->i", phi, jnp.linalg.inv(H), phi))
        return np.asarray(phi @ mean), np.asarray(sd), np.asarray(jnp.sqrt((phi**2).sum(-1)))


@pytest.mark.slow
def test_band_of_a_collapsed_field_is_the_exact_normal_one(band, exact):
    """4,000 draws with the default key; means and sds at 4 standard errors."""
    mean, sd, prior = exact
    assert np.all(np.abs(band["mean"] - mean) < 4 * sd / np.sqrt(4000))
    assert np.all(np.abs(band["sd"] / sd - 1) < 4 / np.sqrt(2 * 4000))
    np.testing.assert_allclose(band["prior_sd"], prior, rtol=1e-4)
    # 5 and 95 per cent points: a quantile's error is sqrt(q (1 - q) / n) over the density.
    error = 4 * np.sqrt(0.05 * 0.95 / 4000) / 0.103
    assert np.all(np.abs((band["upper_90"] - mean) / sd - 1.645) < error)
    np.testing.assert_allclose(band["informed"], prior / sd, rtol=4 / np.sqrt(2 * 4000) + 1e-4)
    np.testing.assert_allclose(band["states"], X, rtol=1e-6)


@pytest.mark.slow
def test_weights_that_were_drawn_give_the_same_band_and_a_path_its_whole_drift(band):
    z = nsde.smooth(nsde.handlers.collapse(model, "f"), DRAWS, rng_key=jax.random.key(3))["f/z"]
    draws = DRAWS | {"f/z": np.asarray(z)}
    plain = field_band(draws, "f", GRID, model=model, num_draws=4000)
    np.testing.assert_allclose(plain["mean"], band["mean"], atol=6 * float(band["sd"].max()) / 63)
    whole = field_band(draws, "x", GRID, model=model, num_draws=4000)
    np.testing.assert_allclose(whole["mean"], plain["mean"] - GRID, atol=1e-4)
    assert "prior_sd" not in whole


def well(a=1.0, s=1.0):
    def model():
        scale = numpyro.sample("s", dist.LogNormal(0.0, 0.1))
        sde = nsde.SDE(lambda t, x, p: a * (x - x**3), lambda t, x, p: p + 0.2 * x**2, params=scale)
        numpyro.sample("x", nsde.SDEPath(sde, TIMES, dist.Normal(0.0, 1.0)))

    return model


def test_rest_points_and_invariant_density_of_a_double_well():
    draws, grid = {"s": np.full(3, 0.8)}, np.linspace(-3.0, 3.0, 602)
    found = rest_points(draws, "x", grid, model=well())
    assert found.numbers == {3: 1.0}
    np.testing.assert_allclose(np.sort(found.stable[:2]), [-1.0, 1.0], atol=1e-3)
    np.testing.assert_allclose(found.unstable, 0.0, atol=1e-3)
    assert "3 rest points: 100 %" in str(found)
    density = invariant_density(draws, "x", grid, model=well())
    # The stationary Fokker-Planck equation: no flux, f p = (D p)' / 2.
    p = density["mean"].values
    D, f = (0.8 + 0.2 * grid**2) ** 2, grid - grid**3
    flux = f * p - 0.5 * np.gradient(D * p, grid)
    assert np.abs(flux[2:-2]).max() < 1e-3 * np.abs(f * p).max()


def test_bands_of_networks_have_the_spread_of_fresh_weights():
    import equinox as eqx

    net = nsde.fields.Network(eqx.nn.Linear(1, "scalar", key=jax.random.key(0)), dim=1)

    def model():
        net.register("f")

    rng = np.random.default_rng(1)
    draws = {"f/weight": 0.1 * rng.normal(size=(2000, 1, 1)), "f/bias": np.zeros((2000, 1))}
    band = field_band(draws, "f", [0.0, 2.0], model=model, num_draws=2000)
    # Prior variance of w x + b with unit normal weights: 1 + x^2; posterior sd 0.1 |x|.
    error = 4 / np.sqrt(2 * 2000)
    assert np.all(np.abs(band["prior_sd"] / np.sqrt([1.0, 5.0]) - 1) < error)
    assert abs(float(band["sd"][1]) / 0.2 - 1) < error


@pytest.mark.parametrize("dim", [1, 2])
def test_plots_are_drawn(dim, tmp_path, band):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    if dim == 1:
        axis = plot_field(band, truth=-GRID)
        assert len(axis.lines) >= 3
    else:
        prior = nsde.fields.HSGP(2, 2.0, 3, constraint="gradient")

        def plane():
            prior.register("f", amplitude=1.0, length=1.0)

        draws = {"f/z": np.random.default_rng(0).normal(size=(50, 9))}
        grid = np.stack(np.meshgrid(*2 * [np.linspace(-1.5, 1.5, 5)]), -1).reshape(-1, 2)
        axis = plot_field(field_band(draws, "f", grid, model=plane))
        with pytest.raises(ValueError, match="full grid"):
            plot_field(field_band(draws, "f", grid[:-1], model=plane))
    axis.figure.savefig(tmp_path / "band.png")
    pyplot.close("all")


def test_errors_say_what_is_needed():
    collapsed = nsde.handlers.collapse(model, "f")
    few = {"f/amplitude": np.ones(3)}
    for call, message in [
        (lambda: field_band(few, "f", GRID), "give model="),
        (lambda: field_band(few, "g", GRID, model=collapsed), "no field and no path 'g'"),
        (lambda: field_band(few, "f", [0.0, 2.8], model=collapsed), "outside the box"),
        (lambda: rest_points(few, "f", GRID, model=collapsed), "no path site 'f'"),
        (lambda: rest_points(few, "x", GRID[::-1], model=collapsed), "increasing states"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert handlers.trace(handlers.seed(model, 0)).get_trace()
