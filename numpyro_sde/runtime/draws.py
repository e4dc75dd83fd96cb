"""Draws of chains that ran on several devices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def on_one_device(
    samples: Mapping[str, Any], names: Iterable[str] | None = None
) -> dict[str, Array]:
    """Draws by site, on the default device.

    Those of parallel chains lie over several devices, and XLA would split a program of them over
    all of these, with a sum or a copy between devices at every step of its loops.

    Args:
        samples: draws by site.
        names: sites to take; None for all.

    Example:
        >>> on_one_device({"a": [1.0, 2.0], "b": [3.0]}, ["a"])["a"].shape
        (2,)
    """
    chosen = samples if names is None else names
    # By way of the host: `jnp.asarray` leaves an array where it is.
    return {name: jnp.asarray(np.asarray(samples[name])) for name in chosen}
