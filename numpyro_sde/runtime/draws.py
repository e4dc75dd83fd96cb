"""Draws of chains that ran on several devices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


def on_host(
    samples: Mapping[str, Any], names: Iterable[str] | None = None
) -> dict[str, np.ndarray]:
    """Draws by site, as host arrays.

    Those of parallel chains lie over several devices, and XLA would split a program of them over
    all of these, with a sum or a copy between devices at every step of its loops.

    Args:
        samples: draws by site.
        names: sites to take; None for all.

    Example:
        >>> on_host({"a": [1.0, 2.0], "b": [3.0]}, ["a"])
        {'a': array([1., 2.])}
    """
    return {name: np.asarray(samples[name]) for name in (samples if names is None else names)}
