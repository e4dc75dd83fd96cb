"""What loops are made of: no scatter, of which XLA makes no kernel on a CPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer.util import potential_energy

import numpyro_sde as nsde
from numpyro_sde.filters import ExtendedKalman, Kalman, MomentMatching, UnscentedKalman
from numpyro_sde.infer.racing import LikelihoodEstimator, estimated_log_density

TIMES = np.arange(6.0)


def drift(t, x, p):
    return jnp.stack([x[1] - p * x[0], -x[1]])


def model(law, y):
    p = numpyro.sample("p", dist.LogNormal(0.0, 0.3))
    path = nsde.SDEPath(
        nsde.SDE(drift, lambda t, x, p: 0.3, params=p),
        nsde.TimeGrid(TIMES, max_step=0.5),
        dist.Normal(jnp.zeros(2), 1.0).to_event(1),
    )
    x = numpyro.sample("x", path)
    nsde.observe("y", x, law, obs=y, at=np.arange(0, 11, 2))


normal = partial(model, lambda t, x: dist.Normal(x, 0.1).to_event(1), np.zeros((6, 2)))
counts = partial(model, lambda t, x: dist.Poisson(jnp.exp(x[0])), np.ones(6, int))


def linear():
    p = numpyro.sample("p", dist.LogNormal(0.0, 0.3))
    A = -p * jnp.array([[1.0, 0.2], [0.0, 1.0]])
    sde = nsde.processes.LinearSDE(A, jnp.zeros(2), jnp.eye(2))
    x = numpyro.sample("x", nsde.SDEPath(sde, TIMES, dist.Normal(jnp.zeros(2), 1.0).to_event(1)))
    cov = jnp.eye(2) + 0.1
    nsde.observe("y", x, lambda t, x: dist.MultivariateNormal(x, cov), obs=np.zeros((6, 2)))


def scatters(jaxpr, in_loop=False):
    """Scatters inside of loops."""
    found = []
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if in_loop and name.startswith("scatter"):
            found.append(str(eqn))
        inner = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr"))
        for part in inner:
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                found += scatters(part, in_loop or name in ("scan", "while"))
    return found


def in_gradient(fn, z):
    """Scatters in the loops of a gradient, which is traced and not compiled."""
    gradient = jax.value_and_grad(lambda z: potential_energy(handlers.seed(fn, 0), (), {}, z))
    return scatters(jax.make_jaxpr(gradient)(z).jaxpr)


@pytest.mark.parametrize(
    ("fn", "method"),
    [
        (linear, Kalman()),
        (normal, ExtendedKalman()),
        (normal, UnscentedKalman()),
        (normal, MomentMatching()),
        (counts, ExtendedKalman()),
    ],
    ids=["kalman", "extended", "unscented", "moments", "laplace"],
)
def test_integrated_paths(fn, method):
    integrated = nsde.handlers.marginalize(fn, method=method)
    assert in_gradient(integrated, {"p": jnp.zeros(())}) == []


@pytest.mark.parametrize("fn", [normal, pytest.param(counts, marks=pytest.mark.slow)])
def test_guided_paths(fn):
    guided = handlers.reparam(fn, config={"x": nsde.reparam.GuidedReparam()})
    trace = handlers.trace(handlers.seed(guided, 0)).get_trace()
    latent = {n: s for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}
    z = {name: jnp.zeros(jnp.shape(site["value"])) for name, site in latent.items()}
    assert in_gradient(guided, z) == []


@pytest.mark.parametrize("proposal", ["bootstrap", "guided", "defensive", "auto"])
@pytest.mark.parametrize("resampling", ["systematic", "stratified", "multinomial", "residual"])
def test_particles(proposal, resampling):
    method = LikelihoodEstimator(8, proposal=proposal, resampling=resampling)
    density = partial(estimated_log_density, normal, method.with_key(jax.random.key(0)))
    traced = jax.make_jaxpr(lambda z: density(z, (), {}))({"p": jnp.zeros(())})
    assert scatters(traced.jaxpr) == []


def test_the_search_finds_one():
    def step(x, _):
        return x.at[jnp.array([0, 1])].add(1.0), None

    traced = jax.make_jaxpr(lambda x: jax.lax.scan(step, x, None, 3)[0])(jnp.zeros(3))
    assert len(scatters(traced.jaxpr)) == 1
