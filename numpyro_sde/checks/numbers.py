"""Checks of single numbers."""

from __future__ import annotations

from typing import Any

import numpy as np


def at_least(name: str, value: Any, least: int) -> None:
    """Raise unless `value` is an integer of at least `least`."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
