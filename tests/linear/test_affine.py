"""The degree that a trace proves, against the function's own values at random points."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from numpyro_sde.linear import affine
from numpyro_sde.linear.affine import degrees

A = np.array([[2.0, 0.3, -0.4], [0.3, 1.5, 0.2], [0.1, -0.6, 1.7]])
LOWER = np.tril(A)
INDEX = jnp.array([2, 0])


@jax.custom_jvp
def _own_forward(x: Any) -> Any:
    return 3.0 * x


_own_forward.defjvp(lambda p, t: (3.0 * p[0], 3.0 * t[0]))


@jax.custom_vjp
def _own_reverse(x: Any) -> Any:
    return 3.0 * x


_own_reverse.defvjp(lambda x: (3.0 * x, None), lambda _, g: (3.0 * g,))


def _tridiagonal(x: Any, d: Any = 3.0) -> Any:
    one = jnp.full(3, 0.5)
    return lax.linalg.tridiagonal_solve(one.at[0].set(0), one * 0 + d, one.at[2].set(0), x[:, None])


def _scatter(op: Any, x: Any, updates: Any) -> Any:
    numbers = lax.ScatterDimensionNumbers((), (0,), (0,))
    return op(x, INDEX[:, None], updates, numbers)


AFFINE = {
    "add": lambda x: x + 1.0,
    "sub": lambda x: 1.0 - x - x[::-1],
    "neg": lambda x: -x,
    "mul": lambda x: jnp.arange(3.0) * x,
    "div": lambda x: x / jnp.array([2.0, 3.0, 4.0]),
    "power": lambda x: lax.integer_pow_p.bind(x, y=1),
    "matmul": lambda x: A @ x + x @ A,
    "convolution": lambda x: jnp.convolve(x, jnp.array([1.0, -2.0]), precision="highest"),
    "shapes": lambda x: jnp.tile(lax.expand_dims(x, (1,)), (2, 2)).T.reshape(-1)[1::2],
    "tile": lambda x: lax.tile(x, (2,)) if hasattr(lax, "tile") else jnp.tile(x, 2),
    "squeeze": lambda x: jnp.squeeze(jnp.broadcast_to(x, (1, 3)), 0),
    "concatenate": lambda x: jnp.concatenate([x, jnp.ones(2), 2.0 * x]),
    "stack": lambda x: jnp.stack([x[0], x[1] + x[2]]),
    "split": lambda x: lax.split(x, (1, 2))[1],
    "unstack": lambda x: jnp.unstack(x)[1],
    "rev": lambda x: lax.rev(x, (0,)),
    "pad": lambda x: jnp.pad(x, 1) + lax.pad(jnp.ones(3), x[0], [(1, 1, 0)]),
    "sums": lambda x: jnp.sum(x) + jnp.cumsum(x),
    "windows": lambda x: lax.reduce_window(x, 0.0, lax.add, (2,), (1,), "VALID"),
    "complex": lambda x: jnp.real(jnp.conj(lax.complex(x, x[::-1]) * 1j)) + jnp.imag(x * 1j),
    "fourier": lambda x: jnp.real(jnp.fft.fft(x)),
    "conversion": lambda x: x.astype(jnp.float32).astype(x.dtype),
    "precision": lambda x: lax.reduce_precision(x, 8, 23),
    "copy": lambda x: lax.optimization_barrier(jnp.copy(x)),
    "name": lambda x: checkpoint_name(x, "x"),
    "index": lambda x: x[INDEX] + lax.dynamic_slice(x, (jnp.array(1),), (2,)),
    "set": lambda x: jnp.zeros((3, 2)).at[:, 0].set(x).at[0, 1].add(x[2]),
    "set row": lambda x: lax.dynamic_update_slice(x, 2.0 * x[:1], (jnp.array(1),)),
    "scatter": lambda x: _scatter(lax.scatter, x, 2.0 * x[:2]),
    "scatter_add": lambda x: _scatter(lax.scatter_add, jnp.ones(3), x[:2]),
    "scatter_sub": lambda x: _scatter(lax.scatter_sub, x, x[:2]),
    "select": lambda x: jnp.where(jnp.array([True, False, True]), x, 1.0),
    "triangular": lambda x: jax.scipy.linalg.solve_triangular(LOWER, x, lower=True),
    "tridiagonal": _tridiagonal,
    "solve": lambda x: jnp.linalg.solve(A, x),
    "cho_solve": lambda x: jax.scipy.linalg.cho_solve((jnp.asarray(LOWER), True), x),
    "jit": jax.jit(lambda x: 2.0 * x),
    "remat": jax.checkpoint(lambda x: 2.0 * x + 1.0),
    "custom_jvp": _own_forward,
    "custom_vjp": _own_reverse,
    "scan": lambda x: lax.scan(lambda c, a: (a * c + x, c), x, jnp.arange(1.0, 4.0))[1],
    "scan over x": lambda x: lax.scan(lambda c, a: (c + 2.0 * a, a), 0.0, x)[0],
    "for": lambda x: lax.fori_loop(0, 3, lambda i, c: i * c + x, x),
    "while": lambda x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] + x), (0, x))[
        1
    ],
    "cond": lambda x: lax.cond(jnp.array(1.0) > 0, lambda x: 2.0 * x, lambda x: x + 1.0, x),
}

NONLINEAR = {
    "triangular_solve in its matrix": lambda x: jax.scipy.linalg.solve_triangular(
        jnp.eye(3) + jnp.diag(x), jnp.ones(3), lower=True
    ),
    "solve in its matrix": lambda x: jnp.linalg.solve(A + jnp.diag(x), jnp.ones(3)),
    "tridiagonal_solve in its diagonal": lambda x: _tridiagonal(jnp.ones(3), x),
    "inverse": lambda x: jnp.linalg.inv(A + jnp.diag(x)),
    "cholesky": lambda x: jnp.linalg.cholesky(jnp.eye(3) + jnp.diag(x**2)),
    "to integers": lambda x: x.astype(jnp.int32).astype(x.dtype),
    "integers, then scaled": lambda x: 0.5 * (3.0 * x).astype(jnp.int32),
    "round": jnp.round,
    "floor": jnp.floor,
    "sign": jnp.sign,
    "comparison": lambda x: jnp.where(x > 0, x, 0.0),
    "comparison as a number": lambda x: (x > 0).astype(x.dtype),
    "abs": jnp.abs,
    "max": lambda x: jnp.maximum(x, 0.0),
    "sort": jnp.sort,
    "clip": lambda x: jnp.clip(x, -1.0, 1.0),
    "square": lambda x: x**2,
    "product": lambda x: x * x[::-1],
    "quadratic form": lambda x: x @ A @ x,
    "divided by x": lambda x: 1.0 / x,
    "product of all": jnp.prod,
    "running product": jnp.cumprod,
    "reduce by products": lambda x: lax.reduce(x, jnp.ones(()), lambda a, b: a * b, (0,)),
    "window of maxima": lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2,), (1,), "VALID"),
    "scatter by products": lambda x: _scatter(lax.scatter_mul, x, x[:2]),
    "index by x": lambda x: jnp.arange(9.0)[x.astype(jnp.int32)],
    "slice by x": lambda x: lax.dynamic_slice(x, (jnp.abs(9 * x[1]).astype(jnp.int32) % 3,), (1,)),
    "interp": lambda x: jnp.interp(x, jnp.arange(3.0), jnp.array([0.0, 1.0, 0.0])),
    "relu": jax.nn.relu,
    "power in a scan": lambda x: lax.scan(lambda c, _: (c * x, c), jnp.ones(3), None, 4)[0],
    "power late in a scan": lambda x: lax.scan(  # the third round finds it: a chain of carries
        lambda c, _: ((c[1], c[2], c[2] * c[0], c[2]), None), (x, x, x, 0.0 * x), None, 4
    )[0][3],
    "rounds that x decides": lambda x: lax.while_loop(
        lambda c: c[0] < x[0], lambda c: (c[0] + 1.0, c[1] + x), (0.0, x)
    )[1],
    "rounds counted along x": lambda x: lax.fori_loop(
        0, x[0].astype(jnp.int32), lambda i, c: c + 1.0, jnp.zeros(3)
    ),
    "branch that x decides": lambda x: lax.cond(x[0] > 0, lambda x: x, lambda x: -x, x),
    "squares in a branch": lambda x: lax.cond(jnp.array(1.0) > 0, lambda x: x**2, lambda x: x, x),
    "a blocked slope": lambda x: 2.0 * lax.stop_gradient(x),
}


def _points(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    u, v = np.random.default_rng(seed).normal(size=(2, 3)) * 1.7
    u[0], v[0] = 3.2, -1.4  # on both sides of what branches and counts of rounds ask about
    return u, v


def _is_affine(fn: Any) -> bool:
    u, v = _points()
    for a in (-0.7, 0.3, 2.9):
        mixed = fn(jnp.asarray(a * u + (1 - a) * v))
        expected = a * fn(jnp.asarray(u)) + (1 - a) * fn(jnp.asarray(v))
        if not np.allclose(mixed, expected, rtol=1e-6, atol=1e-6):
            return False
    return True


@pytest.mark.parametrize("name", AFFINE)
def test_affine_expressions_are_found(name, x64):
    fn = AFFINE[name]
    assert degrees(fn, jnp.zeros(3)) == [1]
    assert _is_affine(fn)


@pytest.mark.parametrize("name", NONLINEAR)
def test_nonlinear_expressions_are_found(name, x64):
    fn = NONLINEAR[name]
    assert degrees(fn, jnp.zeros(3)) == [2]
    assert name == "a blocked slope" or not _is_affine(fn)  # the test tells the two apart


def _primitives(jaxpr: Any) -> set[str]:
    found: set[str] = set()
    for equation in jaxpr.eqns:
        found.add(equation.primitive.name)
        for value in jax.tree_util.tree_leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found |= _primitives(inner)
    return found


def test_every_primitive_in_the_tables_is_tried(x64):
    tried: set[str] = set()
    for fn in AFFINE.values():
        tried |= _primitives(jax.make_jaxpr(fn)(jnp.zeros(3)).jaxpr)
    known = affine._LINEAR | affine._BILINEAR | set(affine._LINEAR_IN) | set(affine._STRUCTURED)
    # Names of other JAX releases for primitives that are tried under the present one's.
    elsewhere = {"scatter_add", "copy_p", "expand_dims", "add_any", "tile", "stack", "unstack"}
    assert known - tried - elsewhere == set()


def _random_function(rng: np.random.Generator) -> Any:
    """A composition of random operations of two running values, one of them free of x."""
    steps = [(rng.integers(12), rng.normal(), rng.integers(2), rng.integers(2)) for _ in range(5)]

    def fn(x: Any) -> Any:
        values = [x, jnp.array([0.4, -1.2, 0.9])]
        for op, c, i, j in steps:
            a, b = values[i], values[j]
            results = [
                lambda a, b, c: a + c * b,
                lambda a, b, c: a * b,
                lambda a, b, c: a / (2.5 + c * b**2),
                lambda a, b, c: A @ a - b,
                lambda a, b, c: jnp.where(b > c, a, b),
                lambda a, b, c: jnp.linalg.solve(A + jnp.diag(0.1 * b), a),
                lambda a, b, c: jnp.round(a) + b,
                lambda a, b, c: lax.scan(lambda s, e: (0.5 * s + e * a, s), b, a)[1][1],
                lambda a, b, c: lax.fori_loop(0, 2, lambda k, s: s + c * a, b),
                lambda a, b, c: lax.cond(b[0] > c, lambda a: a, lambda a: 2.0 * a, a),
                lambda a, b, c: a.at[0].set(b[1]),
                lambda a, b, c: jnp.cumsum(a) + jnp.max(b),
            ]
            values[i] = results[op](a, b, c)
        return values[0]

    return fn


@pytest.mark.slow
def test_random_compositions_that_are_declared_affine_are(x64):
    rng = np.random.default_rng(3)
    seen = {0: 0, 1: 0, 2: 0}
    for _ in range(48):
        fn = _random_function(rng)
        (degree,) = degrees(fn, jnp.zeros(3))
        seen[degree] += 1
        if degree == 1:
            assert _is_affine(fn)
        if degree == 0:
            u, v = _points()
            np.testing.assert_allclose(fn(jnp.asarray(u)), fn(jnp.asarray(v)))
    assert min(seen[1], seen[2]) > 6  # the generator makes both kinds
