"""Natural-gradient steps of a Gaussian path: exact in one on linear models, else never worse."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO

import numpyro_sde as nsde
from numpyro_sde.guides import AutoPathGuide, ControlledPath, fit_natural

TIMES = np.array([0.0, 0.2, 0.5, 0.6, 1.0])


def scalar(y=None):
    sde = nsde.SDE(lambda t, x: 0.5 - 1.3 * x, lambda t, x: 0.6)
    x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, dist.Normal(0.2, 0.4)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)


def known_start(y=None):
    sde = nsde.SDE(lambda t, x: 0.5 - 1.3 * x, lambda t, x: 0.6)
    x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, 0.1))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)


def vectors(y=None):
    A, L = jnp.array([[-1.0, 0.8], [-0.5, -0.4]]), jnp.array([[0.5, 0.0], [0.2, 0.4]])
    sde = nsde.SDE(lambda t, x: A @ x, lambda t, x: L)
    init = dist.MultivariateNormal(jnp.array([0.3, -0.1]), jnp.array([[0.3, 0.1], [0.1, 0.2]]))
    x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, init))
    nsde.observe("y", x, lambda t, x: dist.Normal(x[0], 0.3), obs=y)


Y = jnp.array([0.3, 0.1, 0.5, 0.2, -0.1])


def perturbed(guide, y, size=0.2):
    with handlers.trace() as recorded, handlers.seed(rng_seed=0):
        guide(y)
    rng = np.random.default_rng(0)
    return {
        k: v["value"] + size * rng.normal(size=np.shape(v["value"]))
        for k, v in recorded.items()
        if v["type"] == "param"
    }


def update(guide, params, y, steps):
    def run(params):
        with handlers.block(), handlers.seed(rng_seed=0), handlers.substitute(data=params):
            return guide.natural_update(steps, (y,), {})

    return jax.jit(run)(params)


@pytest.mark.parametrize(
    "model",
    [scalar, *(pytest.param(one, marks=pytest.mark.slow) for one in (known_start, vectors))],
)
def test_one_step_is_the_smoother_of_a_linear_model(x64, model):
    """From any parameters; the bound is then Kalman's evidence of the same Euler steps."""
    guide = AutoPathGuide(model)
    params = perturbed(guide, Y)
    new, bounds = update(guide, params, Y, 1)
    path = (
        handlers.trace(handlers.seed(model, 0))
        .get_trace(Y)["x"]["fn"]
        .replace(scheme=nsde.schemes.Euler())
    )
    emission = (
        (lambda t, x: dist.Normal(x[0], 0.3))
        if model is vectors
        else (lambda t, x: dist.Normal(x, 0.3))
    )
    exact = nsde.filter_path(path, emission, Y, method=nsde.filters.ExtendedKalman())
    assert float(bounds[0]) < float(exact.log_likelihood) - 0.01
    np.testing.assert_allclose(bounds[1], exact.log_likelihood, rtol=1e-8)
    # The law that the new parameters make is the one whose bound that was: no gap at any draw.
    losses = [Trace_ELBO().loss(jax.random.key(k), params | new, model, guide, Y) for k in range(3)]
    np.testing.assert_allclose(losses, -float(exact.log_likelihood), rtol=1e-6)


def well(y=None, scale=None):
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.3)) if scale is None else scale
    grid = nsde.TimeGrid(np.arange(6) * 0.8, max_step=0.04)
    sde = nsde.processes.DoubleWell(linear=2.0, cubic=2.0, scale=scale)
    x = numpyro.sample("x", nsde.SDEPath(sde, grid, init=dist.Normal(-1.0, 0.1)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y, at=grid.index[1:])


WELL = jnp.array([-1.0, -0.7, 0.9, 1.1, 0.8])


@pytest.mark.slow
def test_natural_steps_reach_what_gradients_reach(x64):
    """Double well at known parameters, a hundred steps of 0.04, against 3,000 steps of Adam.

    Bounds from 20,000 draws each; that of 12 natural steps is not below Adam's by more than
    4 standard errors of the difference and 0.01.
    """

    def model(y=None):
        well(y, 0.9)

    guide = AutoPathGuide(model)
    svi = SVI(model, guide, numpyro.optim.Adam(5e-3), Trace_ELBO(num_particles=8))
    natural = fit_natural(
        svi, jax.random.key(0), 1, WELL, natural_steps=12, svi_steps=0, progress_bar=False
    )
    assert np.all(np.diff(natural.losses) <= 1e-9)
    adam = svi.run(jax.random.key(0), 3000, WELL, progress_bar=False)

    def bound(params):
        keys = jax.random.split(jax.random.key(1), 20_000)
        loss = lambda k: Trace_ELBO().loss(k, params, model, guide, WELL)  # noqa: E731
        values = -np.asarray(jax.jit(jax.vmap(loss))(keys))
        return values.mean(), values.std() / np.sqrt(len(values))

    (ours, e1), (theirs, e2) = bound(natural.params), bound(adam.params)
    assert ours > theirs - 4 * np.hypot(e1, e2) - 0.01
    # the quadrature's bound is that of the draws
    assert abs(-natural.losses[-1] - ours) < 4 * e1 + 0.01


@pytest.mark.slow
def test_alternating_with_the_bound_fits_parameters_too():
    guide = AutoPathGuide(well)
    svi = SVI(well, guide, numpyro.optim.Adam(5e-3), Trace_ELBO(num_particles=4))
    fit = fit_natural(
        svi, jax.random.key(0), 3, WELL, natural_steps=5, svi_steps=50, progress_bar=False
    )
    assert fit.losses.shape == (150,)
    assert np.isfinite(fit.losses).all()
    draws = guide.sample_posterior(jax.random.key(1), fit.params, WELL, sample_shape=(10,))
    assert draws["x"].shape[0] == 10


def log_normal_start(y=None):
    sde = nsde.processes.GeometricBrownianMotion(drift=0.1, volatility=0.3)
    x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, dist.LogNormal(0.0, 0.3)))
    nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.3), obs=y)


def test_other_laws_are_refused():
    svi = SVI(
        scalar,
        AutoPathGuide(scalar, path=ControlledPath((4,))),
        numpyro.optim.Adam(1e-2),
        Trace_ELBO(),
    )
    with pytest.raises(TypeError, match="fit_natural needs the guide"):
        fit_natural(svi, jax.random.key(0), 1, Y)


@pytest.mark.slow
def test_other_starts_are_refused():
    guide = AutoPathGuide(log_normal_start)
    params = perturbed(guide, Y, 0.0)
    with pytest.raises(ValueError, match="known or normal"):
        update(guide, params, Y, 1)
