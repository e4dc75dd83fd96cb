"""Arguments of the named processes: checked when they are numbers, readable as attributes."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def real(name: str, value: Any) -> Any:
    """Return a real parameter as a floating point array.

    Only a concrete scalar can be checked: what is traced gives a NaN log density later, and
    leading dimensions belong to a batch.

    Raises:
        TypeError: not an array or a number.
        ValueError: a number that is not finite.
    """
    if not isinstance(value, jax.Array | np.ndarray | np.generic | int | float):
        raise TypeError(f"{name} must be a number or an array, got {type(value).__name__}")
    if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        value = jnp.asarray(value, jnp.result_type(float))
    number = _concrete(value)
    if number is not None and not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return value


def positive(name: str, value: Any) -> Any:
    """Return a positive parameter as a floating point array.

    Raises:
        TypeError: not an array or a number.
        ValueError: a number that is not positive and finite.
    """
    value = real(name, value)
    number = _concrete(value)
    if number is not None and number <= 0.0:
        raise ValueError(f"{name} must be positive, got {number}")
    return value


def nonnegative(name: str, value: Any) -> Any:
    """Return a parameter of 0 or more as a floating point array.

    Raises:
        TypeError: not an array or a number.
        ValueError: a number that is negative or not finite.
    """
    value = real(name, value)
    number = _concrete(value)
    if number is not None and number < 0.0:
        raise ValueError(f"{name} must not be negative, got {number}")
    return value


def count(name: str, value: Any, least: int) -> int:
    """Return a whole number that fixes the shape of the state.

    Raises:
        TypeError: not an integer.
        ValueError: fewer than `least`.
    """
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def parameter(name: str, meaning: str) -> Any:
    """Make a read-only attribute for an entry of `params`."""
    return property(lambda self: self.params[name], doc=meaning)


def _concrete(value: Any) -> float | None:
    if isinstance(value, jax.core.Tracer) or jnp.ndim(value) > 0:
        return None
    return float(value)
