"""Coupling flows: inverses, Jacobians, tails and gradients, against automatic differentiation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_sde.guides.flows import Conditioner, CouplingFlow, rational_quadratic_spline


def random_flow(
    seed: int, dim: int, kind: str, context_dim: int = 0, scale: float = 0.5, **options
) -> CouplingFlow:
    """A flow far from the identity: all weights and biases moved at random."""
    flow = CouplingFlow.create(
        jax.random.key(seed), dim, kind=kind, context_dim=context_dim, **options
    )
    leaves, treedef = jax.tree.flatten(flow)
    rng = np.random.default_rng(seed)
    moved = [a + jnp.asarray(scale * rng.standard_normal(a.shape), a.dtype) for a in leaves]
    return jax.tree.unflatten(treedef, moved)


def random_spline(seed: int, num: int, bins: int = 8, scale: float = 1.5):
    rng = np.random.default_rng(seed)
    shapes = ((num, bins), (num, bins), (num, bins - 1))
    return tuple(jnp.asarray(scale * rng.standard_normal(shape)) for shape in shapes)


spline = jax.jit(rational_quadratic_spline, static_argnames=("bound", "inverse"))


class TestSpline:
    def test_inverse_returns_the_input_in_float64(self, x64):
        bound = 1.0
        x = jnp.linspace(-1.5 * bound, 1.5 * bound, 601)
        params = random_spline(0, x.size)
        y, log_slope = spline(x, *params, bound=bound)
        back, log_slope_back = spline(y, *params, bound=bound, inverse=True)
        np.testing.assert_allclose(back, x, atol=1e-11)
        np.testing.assert_allclose(log_slope_back, -log_slope, atol=1e-9)

    def test_inverse_returns_the_input_in_float32(self):
        x = jnp.linspace(-6.0, 6.0, 601)
        params = random_spline(0, x.size)
        y, log_slope = spline(x, *params, bound=4.0)
        back, _ = spline(y, *params, bound=4.0, inverse=True)
        # Rounding y by half a unit in the last place moves x by that over the slope.
        rounding = np.finfo(np.float32).eps * 4.0 * np.maximum(1.0, np.exp(-log_slope))
        assert np.max(np.abs(back - x) / rounding) < 20.0

    def test_log_slope_is_the_log_derivative(self, x64):
        x = jnp.linspace(-5.0, 5.0, 201) + 1e-3
        params = random_spline(1, x.size)

        def scalar(value, *p):
            return rational_quadratic_spline(value, *p, bound=4.0)[0]

        slope = jax.jit(jax.vmap(jax.grad(scalar)))(x, *params)
        _, log_slope = spline(x, *params, bound=4.0)
        assert np.all(slope > 0.0)
        np.testing.assert_allclose(log_slope, jnp.log(slope), atol=1e-10)

    def test_identity_and_zero_log_slope_outside_the_box(self):
        x = jnp.array([-100.0, -4.001, 4.001, 100.0])
        for inverse in (False, True):
            y, log_slope = spline(x, *random_spline(2, 4), bound=4.0, inverse=inverse)
            assert jnp.array_equal(y, x)
            assert jnp.all(log_slope == 0.0)

    def test_value_and_slope_are_continuous_at_the_edge(self, x64):
        params = random_spline(3, 1)
        step = 1e-7
        inside, log_inside = rational_quadratic_spline(jnp.array([4.0 - step]), *params, bound=4.0)
        np.testing.assert_allclose(inside, 4.0 - step, atol=1e-9)
        np.testing.assert_allclose(log_inside, 0.0, atol=1e-4)

    @pytest.mark.parametrize("inverse", [False, True])
    def test_gradients_are_finite_in_float32_at_knots_edges_and_far_out(self, inverse):
        x = jnp.array([-1e30, -4.0, -3.0, 0.0, 3.0, 4.0, 1e30])

        def total(x, *p):
            y, log_slope = rational_quadratic_spline(x, *p, bound=4.0, inverse=inverse)
            return jnp.sum(jnp.clip(y, -10, 10)) + jnp.sum(log_slope)

        gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))
        for scale in (0.0, 1.5, 30.0):
            params = random_spline(4, x.size, scale=scale)

            for gradient in gradients(x, *params):
                assert jnp.all(jnp.isfinite(gradient))

    def test_nan_stays_nan(self):
        y, log_slope = rational_quadratic_spline(
            jnp.array([jnp.nan]), *random_spline(5, 1), bound=4.0
        )
        assert jnp.isnan(y[0])
        assert jnp.isnan(log_slope[0])


forward = jax.jit(lambda flow, x, context: flow.forward(x, context))
inverse = jax.jit(lambda flow, y, context: flow.inverse(y, context))
KINDS = ["affine", "spline"]


@pytest.mark.parametrize("kind", KINDS)
class TestFlow:
    def make(self, kind, dim, context_dim):
        flow = random_flow(dim, dim, kind, context_dim, hidden_dims=(8,), num_layers=2)
        rng = np.random.default_rng(99)
        x = jnp.asarray(2.0 * rng.standard_normal((50, dim)))
        context = jnp.asarray(rng.standard_normal((50, context_dim))) if context_dim else None
        return flow, x, context

    @pytest.mark.slow
    @pytest.mark.parametrize(("dim", "context_dim"), [(1, 2), (2, 0), (5, 2)])
    def test_inverse_and_jacobian_in_float64(self, x64, kind, dim, context_dim):
        flow, x, context = self.make(kind, dim, context_dim)
        y, log_det = forward(flow, x, context)
        assert y.shape == (50, dim)
        assert log_det.shape == (50,)
        assert not np.allclose(y, x, atol=0.1)
        back, log_det_back = inverse(flow, y, context)
        np.testing.assert_allclose(back, x, atol=1e-8)
        np.testing.assert_allclose(log_det_back, -log_det, atol=1e-7)
        axes = (0, None if context is None else 0)
        jacobian = jax.jit(jax.vmap(jax.jacfwd(lambda v, c: flow.forward(v, c)[0]), axes))(
            x, context
        )
        sign, expected = jnp.linalg.slogdet(jacobian)
        assert jnp.all(sign > 0)
        np.testing.assert_allclose(log_det, expected, atol=1e-8)

    @pytest.mark.slow
    def test_inverse_in_float32(self, kind):
        flow, x, context = self.make(kind, 3, 0)
        y, log_det = forward(flow, x, context)
        assert y.dtype == jnp.float32
        back, log_det_back = inverse(flow, y, context)
        axes = (0, None if context is None else 0)
        jacobian = jax.jit(jax.vmap(jax.jacfwd(lambda v, c: flow.inverse(v, c)[0]), axes))(
            y, context
        )
        # The inverse amplifies the rounding of y by its own Jacobian, and each layer
        # rounds once more.
        size = 1.0 + jnp.max(jnp.abs(y), axis=-1) + jnp.max(jnp.abs(x), axis=-1)
        error = jnp.max(jnp.abs(back - x), axis=-1)
        amplification = 1.0 + jnp.linalg.norm(jacobian, axis=(-2, -1))
        assert jnp.max(error / (amplification * size)) < 50 * np.finfo(np.float32).eps
        np.testing.assert_allclose(log_det_back, -log_det, atol=2e-2)

    @pytest.mark.parametrize(("dim", "context_dim"), [(1, 0), (3, 2)])
    def test_new_flow_is_the_identity(self, kind, dim, context_dim):
        flow = CouplingFlow.create(
            jax.random.key(0), dim, kind=kind, context_dim=context_dim, hidden_dims=(8,)
        )
        x = jnp.linspace(-5.0, 5.0, 4 * dim).reshape(4, dim)
        y, log_det = forward(flow, x, jnp.ones(context_dim) if context_dim else None)
        np.testing.assert_allclose(y, x, atol=2e-6)
        np.testing.assert_allclose(log_det, jnp.zeros(4), atol=2e-6)

    @pytest.mark.slow
    def test_gradients_are_finite_in_float32_for_huge_inputs(self, kind):
        flow, x, context = self.make(kind, 2, 1)
        x = x.at[0].set(1e6).at[1].set(-1e6).at[2].set(0.0)

        def total(flow, x, context):
            y, log_det = flow.forward(x, context)
            back, log_det_back = flow.inverse(x, context)
            return jnp.mean(jnp.tanh(y) + jnp.tanh(back)) + jnp.mean(log_det + log_det_back)

        gradient = jax.jit(jax.grad(total, argnums=(0, 1)))(flow, x, context)
        assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_context_gradient_is_the_finite_difference(x64, direction):
    flow = random_flow(3, 3, "spline", context_dim=2, hidden_dims=(8,), num_layers=2)
    x = jnp.array([0.4, -1.2, 2.0])
    context = jnp.array([0.3, -0.7])

    def scalar(context):
        y, log_det = getattr(flow, direction)(x, context)
        return jnp.sum(jnp.sin(y)) + log_det

    scalar = jax.jit(scalar)
    gradient = jax.jit(jax.grad(scalar))(context)
    step = 1e-6 * jnp.eye(2)
    central = jnp.array([(scalar(context + e) - scalar(context - e)) / 2e-6 for e in step])
    assert jnp.all(jnp.abs(gradient) > 1e-3)
    np.testing.assert_allclose(gradient, central, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dim", [2, 3, 7])
def test_every_coordinate_depends_on_every_other(x64, dim):
    flow = random_flow(0, dim, "affine", num_layers=6, hidden_dims=(8,))
    jacobian = jax.jit(jax.jacfwd(lambda v: flow.forward(v)[0]))(jnp.linspace(-1.0, 1.0, dim))
    assert jnp.min(jnp.abs(jacobian)) > 1e-8


def test_far_out_the_map_is_linear_in_one_dimension():
    flow = random_flow(0, 1, "spline", scale=0.1, num_layers=2)
    far = jnp.array([[1e3], [2e3], [3e3]])
    y, log_det = forward(flow, far, None)
    np.testing.assert_allclose(y[2] - y[1], y[1] - y[0], rtol=1e-4)
    np.testing.assert_allclose(log_det, jnp.full(3, log_det[0]), atol=1e-5)


def test_context_batch_broadcasts_against_the_vectors():
    flow = random_flow(0, 3, "affine", context_dim=2, hidden_dims=(8,), num_layers=2)
    x, context = jnp.ones((4, 1, 3)), jnp.arange(10.0).reshape(5, 2)
    y, log_det = forward(flow, x, context)
    assert y.shape == (4, 5, 3)
    assert log_det.shape == (4, 5)
    alone, _ = forward(flow, jnp.ones(3), context[3])
    np.testing.assert_allclose(y[2, 3], alone, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "planar"}, "kind must be 'affine' or 'spline', got 'planar'"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"num_bins": 1}, "num_bins must be at least 2, got 1"),
        ({"num_spline_layers": 0}, "num_spline_layers must be at least 1, got 0"),
        ({"context_dim": -1}, "context_dim must be at least 0, got -1"),
        ({"hidden_dims": (8, 0)}, r"hidden_dims\[1\] must be at least 1, got 0"),
        ({"bound": 0.0}, "bound must be positive, got 0.0"),
        ({"bound": float("nan")}, "bound must be positive, got nan"),
    ],
)
def test_bad_sizes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        CouplingFlow.create(jax.random.key(0), **({"dim": 2} | options))


def test_spline_layers_are_the_ones_next_to_the_base():
    flow = CouplingFlow.create(jax.random.key(0), 2, num_layers=4, num_spline_layers=2)
    assert [layer.kind for layer in flow.layers] == ["spline", "spline", "affine", "affine"]


def test_conditioner_without_inputs_is_a_constant():
    network = Conditioner.create(jax.random.key(0), 0, (8, 8), 3)
    assert [w.shape for w in network.weights] == [(0, 3)]
    assert network(jnp.zeros((5, 0))).shape == (5, 3)
