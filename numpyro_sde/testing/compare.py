"""Comparisons that name what failed and on which numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree


def assert_true(condition: bool, what: str, got: Any) -> None:
    """Raise an `AssertionError` that says what must hold and what came instead."""
    if not condition:
        raise AssertionError(f"{what}, got {got}")


def assert_shape(what: str, value: Any, shape: tuple[int, ...]) -> None:
    """Compare a shape."""
    assert_true(
        jnp.shape(value) == tuple(shape), f"{what} must have shape {tuple(shape)}", value.shape
    )


def assert_close(what: str, got: Any, expected: Any, scale: float = 1.0) -> None:
    """Compare arrays: 1e-9 of the largest entry in float64, 1e-4 in float32.

    `scale` is the number of terms summed, whose rounding adds up.
    """
    got, expected = np.asarray(got), np.asarray(expected)
    assert_true(got.shape == expected.shape, f"{what}: shape must be {expected.shape}", got.shape)
    double = got.dtype == np.float64 and expected.dtype == np.float64
    tolerance = 1e-9 if double else 1e-4
    size = np.max(np.abs(expected), initial=1.0)
    near = np.abs(got.astype(float) - expected.astype(float)) <= tolerance * size * scale**0.5
    assert_true(bool(np.all(near)), f"{what} must be {expected}", got)


def as_float64(args: Sequence[Any]) -> tuple[Any, ...]:
    """Widen the numbers among arguments."""

    def widen(leaf: Any) -> Any:
        array = np.asarray(leaf)
        wide = {"f": jnp.float64, "i": jnp.int64}.get(array.dtype.kind, array.dtype)
        return jnp.asarray(array, wide)

    return tuple(jax.tree.map(widen, arg) for arg in args)


def draw_and_judge(drawn: dist.Distribution, law: dist.Distribution, key: Any, shape: Any) -> Any:
    """One draw and its density under both laws, compiled together."""

    @jax.jit
    def run(key: Any) -> Any:
        value = drawn.sample(key, shape)
        return value, drawn.log_prob(value), law.log_prob(value)

    return run(key)


def assert_derivative(what: str, fn: Callable[..., Any], at: tuple[Any, ...], key: Any) -> None:
    """Compare a gradient along a random direction with a central difference."""
    flat, unravel = ravel_pytree(at)
    if not jnp.issubdtype(flat.dtype, jnp.floating):
        return
    direction, step = jax.random.normal(key, flat.shape, flat.dtype), 1e-5

    def along(v: Any) -> Any:
        return fn(*unravel(v))

    @jax.jit
    def derivatives(v: Any) -> Any:
        _, slope = jax.jvp(along, (v,), (direction,))
        return jax.grad(along)(v), slope, along(v + step * direction), along(v - step * direction)

    gradient, slope, up, down = derivatives(flat)
    finite = bool(jnp.all(jnp.isfinite(gradient)))
    assert_true(finite, f"the gradient of {what} is not finite", gradient)
    assert_close(f"reverse and forward derivative of {what}", gradient @ direction, slope)
    difference = float((up - down) / (2 * step))
    # Rounding of the two values limits a central difference.
    noise = 1e-15 * (abs(float(up)) + abs(float(down)) + 1.0) / step
    assert_true(
        bool(abs(difference - slope) <= 1e-4 * abs(difference) + 1e-5 + 10 * noise),
        f"the derivative of {what} is {float(slope):.8g}, by differences",
        difference,
    )
