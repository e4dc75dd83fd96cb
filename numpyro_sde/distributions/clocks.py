"""Which clock an array of states runs on.

NumPyro's `sample` returns a plain array, so the times of a path are not on its value. An
observation statement needs them where its emission depends on time. They are looked up by the
identity of the value: among the values that path laws and reparametrisations made, then in the
traces being recorded; for a value that was replaced or transformed, by its shape, among the path
laws made in the same run of the model. What cannot be told apart is an error, never a guess.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from typing import Any, NamedTuple

import jax
import numpy as np
from numpyro.primitives import _PYRO_STACK


class Clock(NamedTuple):
    """Times of a path, shape `(*batch, T)`, the shape of its states, and its law, if known."""

    times: Any
    state_shape: tuple[int, ...]
    law: Any = None

    @property
    def undeclared(self) -> frozenset[int]:
        """Batch dimensions, from the right, that only parameters brought, outside any plate."""
        return frozenset() if self.law is None else self.law.undeclared

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape can hold states on this clock."""
        event = (np.shape(self.times)[-1], *self.state_shape)
        return shape[len(shape) - len(event) :] == event

    def same(self, other: Clock) -> bool:
        """Whether two clocks tell the same times of states of the same shape."""
        if self.state_shape != other.state_shape:
            return False
        if self.times is other.times:
            return True
        traced = isinstance(self.times, jax.core.Tracer) or isinstance(other.times, jax.core.Tracer)
        return not traced and np.array_equal(self.times, other.times)


class _Memory(threading.local):
    def __init__(self) -> None:
        self.recent: deque[tuple[Any, Clock]] = deque(maxlen=64)
        self.values: dict[int, tuple[Any, ...]] = {}


_memory = _Memory()


def _run() -> Any:
    """What stands for one run of a model: its outermost effect handler."""
    return _PYRO_STACK[0] if _PYRO_STACK else None


def remember_clock(clock: Clock) -> None:
    """Note the clock of a path law made while a model runs.

    Traced times are not kept: they would outlive their trace.
    """
    run = _run()
    if run is not None and not isinstance(clock.times, jax.core.Tracer):
        _memory.recent.append((weakref.ref(run), clock._replace(law=None)))


def remember_value(
    value: Any, clock: Clock, source: Any = None, index: Any = None, mask: Any = True
) -> None:
    """Note that this very array holds states on this clock, as long as the array lives.

    Args:
        value: the array.
        clock: its clock.
        source: the path's own value, where `value` holds only some of its times.
        index: which times of the path's own value these are; None for all.
        mask: where the density of the path counts, if the path is made of innovations.
    """
    key, values = id(value), _memory.values
    source = value if source is None else source
    entry = (weakref.ref(value, lambda _: values.pop(key, None)), clock, id(source), index, mask)
    values[key] = entry


def _entry(value: Any) -> tuple[Any, ...]:
    nothing = (None, None, None, None, True)
    entry = _memory.values.get(id(value), nothing)
    return entry if entry[0] is not None and entry[0]() is value else nothing


def mask_of_value(value: Any) -> Any:
    """Where the density of a path counts that innovations made this very array of."""
    return _entry(value)[4]


def clock_of_value(value: Any) -> Clock | None:
    """The clock noted for this very array."""
    return _entry(value)[1]


def identity_of_path(value: Any) -> int:
    """The `id` of the path's own value that this array shows, whole or in part."""
    source = _entry(value)[2]
    return id(value) if source is None else source


def times_shown(value: Any) -> Any:
    """Which times of the path's own value this array shows; None for all."""
    return _entry(value)[3]


def distinct(clocks: list[Clock]) -> list[Clock]:
    """Drop clocks that tell the same."""
    found: list[Clock] = []
    for clock in clocks:
        if not any(clock.same(other) for other in found):
            found.append(clock)
    return found


def clocks_of_this_run() -> list[Clock]:
    """Clocks of the path laws made in this run of the model, newest first."""
    run = _run()
    if run is None:
        return []
    return [clock for owner, clock in reversed(_memory.recent) if owner() is run]
