"""The law of the fast variable at a frozen slow state, from its dynamics or its density.

Each source becomes nodes and weights, `nodes(t, x, p) -> (y, w)` with `y` of shape `(L, *fast)`,
`w` of shape `(L,)` and sum one. Sources: Pavliotis and Stuart (2008), chapters 6 and 10; for
the scalar law Pavliotis (2014), chapter 4; linear dynamics through the Lyapunov equation,
Gardiner (2009), section 4.4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_sde.checks.numbers import at_least
from numpyro_sde.linear.affine import _walk
from numpyro_sde.linear.small import psd_factor
from numpyro_sde.multiscale.rules import AbstractRule
from numpyro_sde.multiscale.slow_fast import SlowFastSDE, as_columns, call


class UnnormalizedDensity(eqx.Module):
    """The fast law by its log density up to a constant, normalised by Gauss-Legendre quadrature.

    For a fast variable in an interval, or in a box of few dimensions. The law is cut off at the
    ends: choose them where the density is negligible for every slow state that matters.

    Args:
        log_density: `log_density(x, y, p)`, a scalar; without params `log_density(x, y)`.
        low: lower end of the fast variable; a tuple for a vector, one entry a coordinate.
        high: upper end.
        num_points: nodes for each coordinate.

    Raises:
        ValueError: ends that are not finite or out of order, or fewer than 4 nodes.

    Example:
        >>> from numpyro_sde.multiscale import UnnormalizedDensity
        >>> law = UnnormalizedDensity(lambda x, y: -((y - x) ** 2) / 2.0, -9.0, 9.0)
        >>> y, weights = law.nodes(0.5)
        >>> round(float((weights * y).sum()), 4)
        0.5
    """

    log_density: Callable[..., Any] = eqx.field(static=True)
    low: Any = eqx.field(static=True)
    high: Any = eqx.field(static=True)
    num_points: int = eqx.field(static=True)

    def __init__(
        self, log_density: Callable[..., Any], low: Any, high: Any, num_points: int = 128
    ) -> None:
        if not callable(log_density):
            raise TypeError(
                f"log_density must be a function of (x, y, p), got {type(log_density).__name__}"
            )
        at_least("num_points", num_points, 4)
        self.log_density, self.num_points = log_density, num_points
        self.low, self.high = _ends(low, high)

    def nodes(self, x: Any, *args: Any) -> tuple[Array, Array]:
        """Fast states `(L, *fast)` and their weights `(L,)` at one slow state (and params)."""
        return _density_nodes(self.log_density, (self.low, self.high, self.num_points), x, *args)


class ScalarFast(eqx.Module):
    """The exact law of a scalar fast diffusion, from its drift g and diffusion b.

    `pi(y) ~ exp(int 2 g / b^2 dy) / b(y)^2`: every scalar diffusion is in a potential, so this is
    the Gibbs law of gradient dynamics, whatever the temperature and with state-dependent noise
    too. The inner integral and the normaliser are Gauss-Legendre sums.

    Args:
        low: lower end of the fast variable, where the density is negligible, or a boundary
            that reflects.
        high: upper end.
        num_points: nodes.

    Raises:
        ValueError: ends that are not finite or out of order, or fewer than 4 nodes.

    Example:
        >>> from numpyro_sde.multiscale import ScalarFast
        >>> ScalarFast(-4.0, 4.0).num_points
        128
    """

    low: Any = eqx.field(static=True)
    high: Any = eqx.field(static=True)
    num_points: int = eqx.field(static=True)

    def __init__(self, low: float, high: float, num_points: int = 128) -> None:
        at_least("num_points", num_points, 4)
        self.low, self.high = _ends(low, high)
        if not isinstance(self.low, float):
            raise ValueError(f"low must be one number, got {low}")
        self.num_points = num_points


def _ends(low: Any, high: Any) -> tuple[Any, Any]:
    a, b = np.asarray(low, np.float64), np.asarray(high, np.float64)
    if a.shape != b.shape or a.ndim > 1:
        raise ValueError(f"low and high must be numbers or tuples alike, got {low} and {high}")
    if not (np.all(np.isfinite(a)) and np.all(np.isfinite(b)) and np.all(a < b)):
        raise ValueError(f"low must be below high, both finite, got {low} and {high}")
    if a.ndim == 0:
        return float(a), float(b)
    return tuple(map(float, a)), tuple(map(float, b))


def _box(low: Any, high: Any, num: int) -> tuple[Array, Array]:
    """Gauss-Legendre nodes and weights in an interval or a box."""
    unit, weight = np.polynomial.legendre.leggauss(num)
    ends = list(zip(np.ravel(low), np.ravel(high), strict=True))
    axes = [0.5 * (a + b) + 0.5 * (b - a) * unit for a, b in ends]
    mesh = np.meshgrid(*axes, indexing="ij")
    weights = np.meshgrid(*[weight / weight.sum() for _ in ends], indexing="ij")
    dtype = jnp.result_type(float)
    product = jnp.asarray(np.prod(np.stack(weights), axis=0).ravel(), dtype)
    points = np.stack([m.ravel() for m in mesh], axis=-1)
    return jnp.asarray(points[:, 0] if np.ndim(low) == 0 else points, dtype), product


def _density_nodes(
    log_density: Any, box: tuple[Any, Any, int], x: Any, *args: Any
) -> tuple[Array, Array]:
    y, weights = _box(*box)
    logits = jax.vmap(lambda one: log_density(x, one, *args))(y)
    if logits.shape != weights.shape:
        raise ValueError(
            f"log_density must return a scalar for one fast state, got {logits.shape[1:]}"
        )
    return y, jax.nn.softmax(logits + jnp.log(weights))


def density_nodes(
    log_density: Any, box: tuple[Any, Any, int], with_params: bool, t: Any, x: Any, p: Any
) -> tuple[Array, Array]:
    """Nodes of a density in a box `(low, high, num_points)`, whatever the time."""
    del t
    return _density_nodes(log_density, box, x, *((p,) if with_params else ()))


def scalar_nodes(
    law: ScalarFast, drift: Any, diffusion: Any, shape: tuple[int, ...], t: Any, x: Any, p: Any
) -> tuple[Array, Array]:
    """Nodes of the law of a scalar fast diffusion, of shape `()` or `(1,)`."""
    y, weights = _box(law.low, law.high, law.num_points)
    y = y.reshape(-1, *shape)
    g = jax.vmap(lambda one: jnp.sum(call(drift, t, x, one, p)))(y)
    square = jax.vmap(lambda one: jnp.sum(call(diffusion, t, x, one, p) ** 2))(y)
    integrate = jnp.asarray(_integration(law.num_points), y.dtype) * 0.5 * (law.high - law.low)
    logits = integrate @ (2.0 * g / square) - jnp.log(square)
    return y, jax.nn.softmax(logits + jnp.log(weights))


def _integration(num: int) -> np.ndarray:
    """Matrix from values at Gauss-Legendre nodes to the integral from -1 to each node."""
    nodes, weights = np.polynomial.legendre.leggauss(num)
    basis = np.polynomial.legendre.legvander(nodes, num)
    degree = np.arange(num)
    coefficients = (0.5 * (2 * degree + 1))[:, None] * basis[:, :num].T * weights
    lower = np.concatenate([-np.ones((num, 1)), basis[:, : num - 1]], axis=1)
    return ((basis[:, 1:] - lower) / (2 * degree + 1)) @ coefficients


def linear_moments(
    drift: Any, diffusion: Any, shape: tuple[int, ...], t: Any, x: Any, p: Any
) -> tuple[Array, Array, Array]:
    """Rate matrix, mean and covariance of the stationary law of linear fast dynamics.

    `dY = (A Y + m) ds + B dV` has mean `-A^-1 m` and covariance C with `A C + C A' + B B' = 0`;
    a system that is not stable gives NaN.
    """
    zero = jnp.zeros(shape, jnp.result_type(float))
    constant = jnp.atleast_1d(call(drift, t, x, zero, p))
    d = constant.size
    A = jnp.reshape(jax.jacfwd(lambda y: call(drift, t, x, y, p))(zero), (d, d))
    B = as_columns(call(diffusion, t, x, zero, p), zero)
    if d == 1:
        rate = -A[0, 0]
        stable = jnp.where(rate > 0, rate, jnp.nan)
        return A, constant / stable, (jnp.sum(B**2) / (2.0 * stable))[None, None]
    mean = -jnp.linalg.solve(A, constant)
    eye = jnp.eye(d, dtype=A.dtype)
    # vec(A C + C A') = (I kron A + A kron I) vec(C)
    flat = jnp.linalg.solve(jnp.kron(eye, A) + jnp.kron(A, eye), -(B @ B.T).ravel())
    C = flat.reshape(d, d)
    return A, mean, 0.5 * (C + C.T)


def linear_nodes(
    drift: Any,
    diffusion: Any,
    shape: tuple[int, ...],
    rule: AbstractRule,
    t: Any,
    x: Any,
    p: Any,
) -> tuple[Array, Array]:
    """Nodes of the Gaussian law of linear fast dynamics."""
    _, mean, cov = linear_moments(drift, diffusion, shape, t, x, p)
    points, weights = (jnp.asarray(a, mean.dtype) for a in rule.normal(mean.size))
    y = mean[None] + rule.spread(points, psd_factor(cov))
    return y.reshape(-1, *shape), weights


def degree_in(fn: Callable[..., Any], args: tuple[Any, ...], index: int) -> int:
    """Degree of a traceable function in one argument: 0 constant, 1 affine, 2 neither.

    Args:
        fn: the function.
        args: arrays, or their shapes, in pytrees.
        index: which of them.
    """
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    inputs = [int(k == index) for k, arg in enumerate(args) for _ in jax.tree_util.tree_leaves(arg)]
    return max(_walk(jaxpr, inputs), default=0)


def fast_shape_of(slow_fast: SlowFastSDE) -> tuple[int, ...]:
    """Shape of one fast state, as declared; `()` where `fast_dim` is not given."""
    dim = slow_fast.layout.fast_dim
    return () if dim is None else (dim,)


def degree_of(slow_fast: SlowFastSDE, role: str, argument: str, fast: tuple[int, ...]) -> int:
    """Degree of one of the coefficients in `t`, `x` or `y`."""
    real = jnp.result_type(float)
    shapes = {"t": (), "x": slow_fast.slow_shape, "y": fast}
    arrays = [jax.ShapeDtypeStruct(shape, real) for shape in shapes.values()]

    def coefficient(one: SlowFastSDE, t: Any, x: Any, y: Any) -> Array:
        return call(one.functions[role], t, x, y, one.user_params)

    index = 1 + list(shapes).index(argument)
    return degree_in(coefficient, (slow_fast.unbatched_shapes(), *arrays), index)


def fast_noise_shape(slow_fast: SlowFastSDE, fast: tuple[int, ...]) -> tuple[int, ...]:
    """Shape that the fast diffusion returns."""

    def diffusion(one: SlowFastSDE) -> Array:
        t, x, y = (jnp.zeros(shape) for shape in ((), slow_fast.slow_shape, fast))
        return call(one.functions["fast_diffusion"], t, x, y, one.user_params)

    return jax.eval_shape(diffusion, slow_fast.unbatched_shapes()).shape
