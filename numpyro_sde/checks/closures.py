"""Arrays that a user's function reaches without being given them.

In a batched model an array that a drift closes over broadcasts against the state of one process.
Where a batch dimension has the size of the state, the result is wrong and nothing says so. So
such arrays are looked for, and refused by name; what varies over a plate goes through `params`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, cast

import equinox as eqx
import jax
import numpy as np

from numpyro_sde.runtime.entry import globals_read

_ARRAYS = (jax.Array, np.ndarray, np.generic)
# Functions of these packages hold tables of their own and are called on the caller's arrays.
_LIBRARIES = {"builtins", "equinox", "jax", "jaxlib", "numpy", "numpyro", "optax", "scipy"}
# A search that leads into a large object graph stops: it is a check, not a proof.
_MOST_OBJECTS = 10_000


def closed_over_arrays(fn: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of arrays with dimensions that a function reaches by itself.

    Looks at closure cells, default arguments, `functools.partial` arguments, the globals that
    the function reads, attributes of the objects whose method it is, and into the functions,
    containers and plain objects that these hold. Arrays inside Equinox modules are not
    reported: they are parameters of one process (network weights).

    Example:
        >>> import numpy as np
        >>> from numpyro_sde.checks.closures import closed_over_arrays
        >>> rates = np.ones(3)
        >>> list(closed_over_arrays(lambda t, x: -rates * x))
        [('rates', (3,))]
    """
    seen: dict[int, Any] = {}  # keeps the objects alive, so that an id stays theirs
    stack: list[tuple[str, Any]] = [("", fn)]
    while stack and len(seen) < _MOST_OBJECTS:
        name, obj = stack.pop()
        if id(obj) in seen:
            continue
        seen[id(obj)] = obj
        if isinstance(obj, _ARRAYS):
            if np.ndim(cast("Any", obj)) > 0:
                yield name, tuple(np.shape(cast("Any", obj)))
        else:
            stack += [(held_name or name, held) for held_name, held in _held(name, obj)]


def _held(name: str, obj: Any) -> list[tuple[str, Any]]:
    """What an object holds, each with the name to report it by."""
    if isinstance(obj, functools.partial):
        positional = [(f"{name}argument {i}", a) for i, a in enumerate(obj.args)]
        return [*positional, *obj.keywords.items(), (name, obj.func)]
    if inspect.ismethod(obj):
        return [("self", obj.__self__), (name, obj.__func__)]
    if inspect.isfunction(obj):
        return [] if _of_a_library(obj) else _captured(obj)
    if hasattr(obj, "__wrapped__"):  # jax.jit and other decorators
        return [(name, obj.__wrapped__)]
    if isinstance(obj, Mapping):
        return [(f"{name}[{k!r}]", v) for k, v in obj.items()]
    if isinstance(obj, list | tuple):
        return [(f"{name}[{i}]", v) for i, v in enumerate(obj)]
    if isinstance(obj, type | ModuleType | eqx.Module) or _of_a_library(type(obj)):
        return []
    attributes = [(f"{name}.{k}".lstrip("."), v) for k, v in getattr(obj, "__dict__", {}).items()]
    call = getattr(type(obj), "__call__", None)  # noqa: B004  the function is wanted, not a flag
    return [*attributes, (name, call)] if inspect.isfunction(call) else attributes


def _of_a_library(obj: Any) -> bool:
    return (getattr(obj, "__module__", None) or "").partition(".")[0] in _LIBRARIES


def _captured(fn: Any) -> list[tuple[str, Any]]:
    captured: list[tuple[str, Any]] = []
    for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=False):
        try:
            captured.append((name, cell.cell_contents))
        except ValueError:  # a cell that is not filled yet (recursive definition)
            continue
    defaults = fn.__defaults__ or ()
    positional = fn.__code__.co_varnames[: fn.__code__.co_argcount]
    captured += zip(positional[len(positional) - len(defaults) :], defaults, strict=True)
    captured += (fn.__kwdefaults__ or {}).items()
    captured += [
        (name, fn.__globals__[name]) for name in globals_read(fn.__code__) if name in fn.__globals__
    ]
    return captured


def refuse_closures(fn: Callable[..., Any], role: str, batch: str) -> None:
    """Refuse closed-over arrays with dimensions in a batched model.

    Args:
        fn: the user's function.
        role: what to call it in errors.
        batch: what makes the model batched, in words; empty if nothing does.

    Raises:
        ValueError: naming the arrays; under a plate they would broadcast against the state.
    """
    found = list(closed_over_arrays(fn)) if batch else []
    if found:
        listed = ", ".join(f"{name!r} of shape {shape}" for name, shape in found)
        raise ValueError(
            f"{role} closes over {listed} {batch}: which of its dimensions belong to the batch "
            "cannot be known. Pass it through params, with event_dims for the dimensions that "
            "belong to one process"
        )
