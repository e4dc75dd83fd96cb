"""The conditional flow: its law, its gradients, its sites, what it learns."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import systems
from numpyro.infer import SVI, Trace_ELBO

import numpyro_sde as nsde
from numpyro_sde.multiscale import MonteCarlo, QuasiMonteCarlo


def moved(flow, size=0.4):
    """The flow with random weights, so that it is no longer the identity."""
    leaves, treedef = jax.tree.flatten(flow)
    rng = np.random.default_rng(1)
    leaves = [a + jnp.asarray(size * rng.standard_normal(a.shape), a.dtype) for a in leaves]
    return jax.tree.unflatten(treedef, leaves)


def small(fast_dim, slow_dim, kind):
    layers = 1 if kind == "spline" else 2
    return moved(
        nsde.ConditionalFlow(fast_dim, slow_dim, kind=kind, num_layers=layers, hidden_dims=(4,))
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fast_dim", "kind"),
    [
        (1, "spline"),
        pytest.param(2, "affine", marks=pytest.mark.slow),
        pytest.param(1, "affine", marks=pytest.mark.slow),
        pytest.param(2, "spline", marks=pytest.mark.slow),
    ],
)
def test_gradients_reach_the_condition(fast_dim, kind, x64):
    """Densities, draws and averages against central differences in x."""
    flow = small(fast_dim, 1, kind)
    value = jnp.full((fast_dim,) if fast_dim > 1 else (), 0.3)

    def density(x):
        return flow(x).log_prob(value)

    def draw(x):
        return jnp.sum(flow(x).rsample(jax.random.key(0), (3,)))

    def moment(x):
        return flow.moment(x, quadrature=8)

    both = jax.jit(lambda x: jnp.stack([density(x), draw(x), moment(x)]))
    gradient = jax.jit(jax.jacfwd(both))(0.4)
    step = 1e-5
    central = (both(0.4 + step) - both(0.4 - step)) / (2 * step)
    assert np.all(np.abs(central) > 1e-3)
    np.testing.assert_allclose(gradient, central, rtol=1e-6)


def test_a_new_flow_is_normal():
    flow = nsde.ConditionalFlow(1, 1, num_layers=1, hidden_dims=(), loc=0.5, scale=2.0)
    law = flow(1.7)
    assert (law.batch_shape, law.event_shape) == ((), ())
    got = jax.jit(law.log_prob)(0.9)
    assert float(got) == pytest.approx(float(dist.Normal(0.5, 2.0).log_prob(0.9)), abs=1e-5)
    assert float(flow.moment()) == pytest.approx(4.25, rel=1e-5)


@pytest.mark.slow
def test_a_scalar_flow_is_a_density(x64):
    flow = small(1, 2, "spline")
    grid = jnp.linspace(-40.0, 40.0, 8_001)
    density = jax.jit(lambda flow, y: flow(jnp.array([0.3, -0.7])).log_prob(y))
    mass = jnp.sum(jnp.exp(density(flow, grid))) * (grid[1] - grid[0])
    assert float(mass) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.slow
def test_an_average_over_a_flow_is_that_of_its_draws(x64):
    flow = small(2, 1, "affine")
    full = nsde.SlowFastSDE(
        lambda t, x, y: jnp.tanh(y[0]) * jnp.cos(y[1] - x),
        lambda t, x, y: 1.0,
        lambda t, x, y: -y,
        lambda t, x, y: 1.0,
        0.1,
        fast_dim=2,
    )
    draws = flow(0.4).sample(jax.random.key(1), (200_000,))
    values = np.tanh(draws[:, 0]) * np.cos(draws[:, 1] - 0.4)
    error = values.std() / np.sqrt(len(values))
    for rule in (QuasiMonteCarlo(4096), 40):
        limit = nsde.average(full, flow, rule)
        drift = jax.jit(lambda x, limit=limit: limit.drift_at(0.0, x))(0.4)
        assert abs(float(drift) - values.mean()) < 4 * error


def test_weights_are_param_or_sample_sites():
    flow = nsde.ConditionalFlow(1, 1, kind="affine", num_layers=1, hidden_dims=(2,))
    seeded = numpyro.handlers.seed(lambda: flow.register("pi"), 0)
    sites = numpyro.handlers.trace(seeded).get_trace()
    assert {name: site["type"] for name, site in sites.items()} == {"pi$params": "param"}
    prior = numpyro.handlers.seed(lambda: flow.register("pi", lambda n, s: dist.Normal()), 0)
    sites = numpyro.handlers.trace(prior).get_trace()
    assert {site["type"] for site in sites.values()} == {"sample"}
    assert sum(np.size(s["value"]) for s in sites.values()) == sum(
        leaf.size for leaf in jax.tree.leaves(flow)
    )


def linear_system():
    return nsde.SlowFastSDE(
        lambda t, x, y: y, lambda t, x, y: 0.3, lambda t, x, y: x - y, lambda t, x, y: 1.0, 0.1
    )


def test_the_penalised_likelihood_trains_the_flow_in_the_model():
    """The slow drift is `E[Y | x]`: a conditional affine flow has to learn `-1.5 x`."""
    rate, times = 1.5, np.arange(401) * 0.1
    ou = nsde.processes.OrnsteinUhlenbeck(rate, 0.0, 0.3)
    path = nsde.SDEPath(ou, times, init=0.0).sample(jax.random.key(3))
    flow = nsde.ConditionalFlow(1, 1, kind="affine", num_layers=1, hidden_dims=())
    full = linear_system()

    def model(path):
        pi = flow.register("pi")
        draws = MonteCarlo(16, numpyro.prng_key())
        limit = nsde.average(full, pi, draws)
        numpyro.sample("x", nsde.SDEPath(limit, times, init=path[0]), obs=path)
        numpyro.factor("moment", -1e-3 * pi.moment())

    steps = numpyro.optim.Adam(lambda i: 0.05 * 0.99**i)
    svi = SVI(model, lambda path: None, steps, Trace_ELBO())
    result = svi.run(jax.random.key(0), 400, path, progress_bar=False)
    trained = numpyro.handlers.substitute(lambda: flow.register("pi"), result.params)()
    drift = jax.jit(jax.vmap(lambda x: nsde.average(full, trained).drift_at(0.0, x)))
    slope = float(jnp.diff(drift(jnp.array([-0.2, 0.2])))[0]) / 0.4
    # The least-squares slope of this path is what the likelihood knows.
    x, dx = np.asarray(path[:-1]), np.diff(np.asarray(path)) / 0.1
    best = np.polyfit(x, dx, 1)[0]
    error = 0.3 / np.sqrt(0.1 * np.sum((x - x.mean()) ** 2))
    assert abs(slope - best) < error


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"fast_dim": 0}, ValueError, "fast_dim must be at least 1"),
        ({"fast_dim": 1.5}, TypeError, "fast_dim must be an integer"),
        ({"fast_dim": 1, "slow_dim": -1}, ValueError, "slow_dim must be at least 0"),
        ({"fast_dim": 1, "kind": "planar"}, ValueError, "kind must be"),
        ({"fast_dim": 1, "scale": 0.0}, ValueError, "scale must be positive"),
        ({"fast_dim": 1, "num_layers": 0}, ValueError, "num_layers must be at least 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        nsde.ConditionalFlow(**arguments)


def test_a_condition_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"x must have 2 coordinate"):
        nsde.ConditionalFlow(1, 2, kind="affine", num_layers=1)(0.3)


def test_a_flow_of_the_wrong_dimension_is_refused():
    with pytest.raises(ValueError, match="event shape"):
        nsde.average(
            systems.tagged_particle(), nsde.ConditionalFlow(3, 1, kind="affine", num_layers=1)
        )
