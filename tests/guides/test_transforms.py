"""`CouplingTransform` as a NumPyro transform: pytree, jit, vmap, densities, equality."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

from numpyro_sde.guides.flows import CouplingFlow
from numpyro_sde.guides.transforms import CouplingTransform


def random_transform(dim: int, context=None, kind: str = "affine") -> CouplingTransform:
    context_dim = 0 if context is None else context.shape[-1]
    flow = CouplingFlow.create(
        jax.random.key(0), dim, kind=kind, context_dim=context_dim, hidden_dims=(8,), num_layers=2
    )
    leaves, treedef = jax.tree.flatten(flow)
    rng = np.random.default_rng(1)
    moved = [a + jnp.asarray(0.4 * rng.standard_normal(a.shape), a.dtype) for a in leaves]
    return CouplingTransform(jax.tree.unflatten(treedef, moved), context)


X = np.random.default_rng(2).standard_normal((3, 3)).astype(np.float32)
CONTEXT = jnp.array([[0.5, -1.0], [2.0, 0.3], [0.0, 0.0]])


def test_domain_and_codomain_are_vectors():
    transform = random_transform(2)
    assert transform.domain is constraints.real_vector
    assert transform.codomain is constraints.real_vector


@pytest.mark.parametrize("context", [None, CONTEXT])
def test_pytree_round_trip_keeps_weights_and_context_as_data(context):
    transform = random_transform(3, context)
    leaves, treedef = jax.tree.flatten(transform)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    rebuilt = jax.tree.unflatten(treedef, leaves)
    x = jnp.asarray(X)
    apply = jax.jit(lambda t, v: t(v))
    assert jnp.array_equal(apply(rebuilt, x), apply(transform, x))
    assert rebuilt == transform
    doubled = jax.tree.map(lambda leaf: 2.0 * leaf, transform)
    assert doubled != transform
    assert not jnp.allclose(apply(doubled, x), apply(transform, x))
    assert transform != random_transform(3, context, kind="spline")


def test_jit_and_vmap_over_transforms():
    transform = random_transform(2, CONTEXT)
    x = jnp.asarray(X[:, :2])
    np.testing.assert_allclose(jax.jit(lambda t, v: t(v))(transform, x), transform(x), rtol=1e-5)
    apply = jax.jit(jax.vmap(lambda c, v: CouplingTransform(transform.flow, c)(v)))
    stacked = apply(CONTEXT, x)
    np.testing.assert_allclose(stacked, transform(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["affine", "spline"])
def test_inverse_and_log_det(kind):
    transform = random_transform(3, CONTEXT, kind)
    x = jnp.asarray(X)
    y, intermediates = jax.jit(lambda t, v: t.call_with_intermediates(v))(transform, x)
    np.testing.assert_allclose(jax.jit(lambda t, v: t.inv(v))(transform, y), x, atol=1e-4)
    np.testing.assert_allclose(
        transform.log_abs_det_jacobian(x, y, intermediates),
        transform.log_abs_det_jacobian(x, y),
        rtol=1e-6,
    )
    np.testing.assert_allclose(transform.inv.log_abs_det_jacobian(y, x), -intermediates, atol=1e-4)


def test_conditional_density_in_one_dimension_integrates_to_one():
    transform = random_transform(1, CONTEXT, kind="spline")
    law = dist.TransformedDistribution(dist.Normal(jnp.zeros(1), 1.0).to_event(1), transform)
    grid = jnp.linspace(-60.0, 60.0, 60001)
    density = jnp.exp(jax.jit(law.log_prob)(grid[:, None, None]))
    assert density.shape == (60001, 3)
    # With nothing left at its ends, the trapezoid rule errs only at the spline's kinks.
    assert jnp.max(density[jnp.array([0, -1])]) < 1e-6
    np.testing.assert_allclose(density.sum(0) * (120.0 / 60000), jnp.ones(3), atol=1e-4)


def test_conditional_law_has_the_contexts_batch_and_its_gradient(x64):
    flow = random_transform(2, CONTEXT).flow
    base = dist.Normal(jnp.zeros(2), 1.0).to_event(1)

    def law(context):
        return dist.TransformedDistribution(base, CouplingTransform(flow, context))

    assert law(CONTEXT).batch_shape == (3,)
    value = law(CONTEXT).sample(jax.random.key(0))
    assert value.shape == (3, 2)
    log_prob = jax.jit(lambda context: law(context).log_prob(value))
    apart = [log_prob(jnp.broadcast_to(c, (3, 2)))[i] for i, c in enumerate(CONTEXT)]
    np.testing.assert_allclose(log_prob(CONTEXT), jnp.stack(apart), rtol=1e-12)
    gradient = jax.jit(jax.grad(lambda context: log_prob(context).sum()))(CONTEXT)
    step = 1e-6 * jnp.eye(2)
    central = [(log_prob(CONTEXT + e) - log_prob(CONTEXT - e)) / 2e-6 for e in step]
    assert jnp.all(jnp.abs(gradient) > 0.0)
    np.testing.assert_allclose(gradient, jnp.stack(central, axis=-1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("context", [None, jnp.ones(3)])
def test_a_context_of_the_wrong_length_is_refused(context):
    flow = CouplingFlow.create(jax.random.key(0), 2, context_dim=2)
    got = "none" if context is None else r"shape \(3,\)"
    with pytest.raises(ValueError, match=f"context must be a vector of length 2.*got {got}"):
        CouplingTransform(flow, context)
