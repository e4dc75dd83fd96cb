"""Data as users hand them over: what is no plain array of numbers is told or refused."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def as_data(name: str, value: Any) -> Any:
    """Observations as an array that stays on the host if it was there.

    The masked entries of a NumPy masked array are missing: they become NaN.

    Args:
        name: the argument or site, for errors.
        value: what was given.

    Raises:
        TypeError: complex numbers, dates, texts or objects.

    Example:
        >>> import numpy as np
        >>> as_data("obs", np.ma.masked_equal([0.1, -999.0], -999.0)).tolist()
        [0.1, nan]
    """
    if isinstance(value, jax.core.Tracer | jax.Array):
        array: Any = value
    elif isinstance(value, np.ma.MaskedArray):
        _refuse_kind(name, value.dtype)
        floats: Any = value.astype(np.result_type(value.dtype, np.float32))
        array = floats.filled(np.nan)
    else:
        array = np.asarray(value)
        if array.dtype.kind == "O":
            array = _from_objects(name, array)
    _refuse_kind(name, array.dtype)
    return array


def _from_objects(name: str, array: np.ndarray) -> np.ndarray:
    """Numbers in an array of objects, None and pandas' NA among them as NaN."""
    try:
        entries = [np.nan if v is None or v != v else float(v) for v in array.reshape(-1)]
        return np.array(entries, np.float64).reshape(array.shape)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} must be an array of numbers, got dtype object with entries such as "
            f"{array.reshape(-1)[0]!r}; give floats, NaN where missing"
        ) from None


def _refuse_kind(name: str, dtype: Any) -> None:
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{name} must be real, got dtype {dtype}: give real and imaginary parts as components"
        )
    kind = np.dtype(dtype).kind if not jnp.issubdtype(dtype, jnp.floating) else "f"
    if kind not in "biuf":
        raise TypeError(f"{name} must be an array of numbers, got dtype {dtype}")
