"""Functions that are compiled once for a structure, whatever objects they are called with.

`jax.jit` of a function made anew compiles anew. An entry point stands at module level and takes all
that it needs as arguments, laws, methods and user functions included. Arrays of JAX and numbers are
data. Host arrays (the times of a grid), functions and everything else decide what the program is:
they are compared by what they hold, so that the same model built a second time finds the program.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np

P = ParamSpec("P")
R = TypeVar("R")

_PLAIN = (int, float, complex, str, bytes, bool, type(None))


class Held:
    """A value that decides what a program is, compared by what it holds.

    Host arrays by their numbers; functions by their code, defaults and what they close over; other
    values by their own equality, or identity where they have no hash.

    Example:
        >>> def make(scale):
        ...     return lambda x: scale * x
        >>> Held(make(2.0)) == Held(make(2.0)), Held(make(2.0)) == Held(make(3.0))
        (True, False)
        >>> Held(np.arange(3)) == Held(np.arange(3))
        True
    """

    __slots__ = ("_hash", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        self._hash = _hash_of(value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Held) and _same(self.value, other.value)


def _hash_of(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return hash((value.shape, value.dtype.str, value.tobytes()))
    if isinstance(value, types.FunctionType):
        return hash(value.__code__)
    try:
        return hash(value)
    except TypeError:
        return id(value)


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        same = a.shape == b.shape and a.dtype == b.dtype
        return same and a.tobytes() == b.tobytes()
    if isinstance(a, types.FunctionType) and isinstance(b, types.FunctionType):
        return _same_function(a, b)
    if type(a) is not type(b):
        return False
    try:
        hash(a)
    except TypeError:
        return False
    return bool(a == b)


def _same_function(a: types.FunctionType, b: types.FunctionType) -> bool:
    if a.__code__ is not b.__code__ or a.__globals__ is not b.__globals__:
        return False
    if a.__kwdefaults__ or b.__kwdefaults__:
        return False
    held = [_closed_over(f) for f in (a, b)]
    if any(cells is None for cells in held) or len(held[0]) != len(held[1]):
        return False
    return all(_same_cell(x, y) for x, y in zip(*held, strict=True))


def _closed_over(fn: types.FunctionType) -> Any:
    try:
        return [cell.cell_contents for cell in fn.__closure__ or ()] + list(fn.__defaults__ or ())
    except ValueError:  # a name that is not bound yet
        return None


def _same_cell(a: Any, b: Any) -> bool:
    # Not by equality of any object: that of a mutable one may hold now and not later.
    plain = isinstance(a, (*_PLAIN, types.FunctionType))
    return a is b or (plain and type(a) is type(b) and _same(a, b))


def split(tree: Any) -> tuple[tuple[Any, tuple[Held | None, ...]], list[Any]]:
    """What decides a program in a pytree of anything, and its data.

    Example:
        >>> static, data = split({"times": np.arange(3.0), "y": jnp.ones(2), "f": abs})
        >>> [x.shape for x in data], join(static, data)["f"] is abs
        ([(2,)], True)
    """
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    is_data = [isinstance(leaf, jax.Array | float | np.floating) for leaf in leaves]
    held = tuple(None if d else Held(leaf) for leaf, d in zip(leaves, is_data, strict=True))
    return (treedef, held), [leaf for leaf, d in zip(leaves, is_data, strict=True) if d]


def join(static: tuple[Any, tuple[Held | None, ...]], data: list[Any]) -> Any:
    """Undo `split`, with other data perhaps."""
    treedef, held = static
    rest = iter(data)
    return treedef.unflatten([next(rest) if h is None else h.value for h in held])


def entry_point(fn: Callable[P, R]) -> Callable[P, R]:
    """Compile a function of pytrees once for each structure; it returns arrays.

    Example:
        >>> @entry_point
        ... def total(weights, x, fn):
        ...     return (weights * fn(x)).sum()
        >>> [float(total(np.ones(2), jnp.ones(2), lambda x: x + a)) for a in (1.0, 1.0)]
        [4.0, 4.0]
    """

    @partial(jax.jit, static_argnums=0)
    def run(static: Any, data: list[Any]) -> Any:
        args, kwargs = join(static, data)
        return fn(*args, **kwargs)

    run.__name__ = getattr(fn, "__name__", "entry_point")

    @wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        static, data = split((args, kwargs))
        return run(static, data)  # type: ignore[no-any-return]

    return call
