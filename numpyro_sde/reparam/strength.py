"""Guides that pull with part of their strength while a model is run: tempering needs them.

With strength `s` the precisions and information vectors of a guide are multiplied by `s`: 0 draws
the path from its prior, 1 is the guide itself. The ratio of the two laws is exact for every
strength, and one path has standard normals for each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Array


class Pull:
    """How strongly guides pull, and what they did.

    Args:
        strength: between 0 and 1.
        to: another strength, for whose guides the normals of the same path are wanted.

    Attributes:
        log_weights: log ratios of the laws of model and guide, one for each guided path.
        moved: the normals of the same paths under guides of strength `to`, by site.
        largest: largest innovation of the model along each path, which are standard normal there.
    """

    def __init__(self, strength: Any, to: Any) -> None:
        self.strength, self.to = strength, to
        self.log_weights: list[Array] = []
        self.moved: dict[str, Array] = {}
        self.largest: list[Array] = []


_pulls: list[Pull] = []


@contextmanager
def guided_by(strength: Any, to: Any = None) -> Iterator[Pull]:
    """Run models inside with guides of a strength.

    Args:
        strength: between 0 and 1; it may be traced.
        to: see `Pull`; None is `strength`.

    Example:
        >>> with guided_by(0.5) as pull:
        ...     pass
        >>> pull.moved
        {}
    """
    pull = Pull(strength, strength if to is None else to)
    _pulls.append(pull)
    try:
        yield pull
    finally:
        _pulls.remove(pull)


def present_pull() -> Pull | None:
    """The innermost pull that stands around; None for guides as they are."""
    return _pulls[-1] if _pulls else None
