"""Functions that are compiled once for a structure, whatever objects they are called with.

`jax.jit` of a function made anew compiles anew. An entry point stands at module level and takes all
that it needs as arguments, laws, methods and user functions included. Arrays of JAX and numbers are
data. Host arrays (the times of a grid), functions and everything else decide what the program is:
they are compared by what they hold, so that the same model built a second time finds the program.
"""

from __future__ import annotations

import dis
import types
from collections.abc import Callable
from functools import lru_cache, partial, wraps
from typing import Any, ParamSpec, TypeVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

P = ParamSpec("P")
R = TypeVar("R")

_PLAIN = (int, float, complex, str, bytes, bool, type(None), range, np.dtype, np.generic)
# What these packages define does not change between calls.
_LIBRARIES = {"builtins", "equinox", "jax", "jaxlib", "numpy", "numpyro", "numpyro_sde", "scipy"}
_MOST_DEPTH = 20
# Host arrays that a program of a model is compared by are this small together, in bytes.
_MOST_HELD = 2**20


class Held:
    """A value that decides what a program is, compared by what it held when this was made.

    Host arrays by their numbers; functions by their code, defaults, what they close over and the
    globals that they read; modules, classes and other values that cannot change by identity. What
    may change unseen (an object with attributes) is equal to nothing, itself included.

    Example:
        >>> def make(scale):
        ...     return lambda x: scale * x
        >>> Held(make(2.0)) == Held(make(2.0)), Held(make(2.0)) == Held(make(3.0))
        (True, False)
        >>> Held(np.arange(3)) == Held(np.arange(3))
        True
    """

    __slots__ = ("_hash", "_key", "lasting", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        self._key = _snapshot(value, {}, 0)
        self._hash = hash(self._key)
        # Whether a program made for it can be found again: it holds nothing that belongs to one
        # trace, and nothing that may change unseen.
        self.lasting = _lasts(self._key)

    def __reduce__(self) -> tuple[Any, tuple[Any]]:
        return Held, (self.value,)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Held) and self._key == other._key


class _Unknown:
    """Equal to nothing else: a value that may change unseen."""


class _Same:
    """A value compared by identity, and kept alive so that its identity stays its own."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


def _snapshot(value: Any, seen: dict[int, int], depth: int) -> Any:
    """What a value holds now, hashable."""
    if isinstance(value, _PLAIN):
        return type(value), repr(value) if isinstance(value, float) else value
    if isinstance(value, np.ndarray):
        # An array of objects holds what may change.
        data = _Unknown() if value.dtype.hasobject else value.tobytes()
        return np.ndarray, value.shape, value.dtype.str, data
    if id(value) in seen:  # a function that calls itself
        return "seen", seen[id(value)]
    if depth > _MOST_DEPTH or isinstance(value, jax.core.Tracer):
        return _Unknown()
    again = partial(_snapshot, seen={**seen, id(value): len(seen)}, depth=depth + 1)
    if isinstance(value, tuple | list):
        return type(value), tuple(again(v) for v in value)
    if isinstance(value, dict):
        return dict, tuple((again(k), again(v)) for k, v in value.items())
    if isinstance(value, partial):
        return partial, again(value.func), again(value.args), again(value.keywords)
    if isinstance(value, types.FunctionType):
        return value.__code__, *(again(v) for v in _captured(value))
    if isinstance(value, types.MethodType):
        return types.MethodType, again(value.__func__), again(value.__self__)
    if callable(getattr(value, "__wrapped__", None)):  # jax.jit and other decorators
        return _Same(value), again(value.__wrapped__)
    if isinstance(value, Held):
        return value._key
    fixed = types.ModuleType, type, types.BuiltinFunctionType, eqx.Module
    if isinstance(value, (*fixed, jax.Array)) or _of_a_library(type(value)):
        leaves = [] if isinstance(value, type) else jax.tree_util.tree_leaves(value)
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
        return _Unknown() if traced else _Same(value)
    return _Unknown()


def _lasts(key: Any) -> bool:
    """Whether a snapshot is equal to one taken anew of the same value."""
    if isinstance(key, tuple):
        return all(_lasts(part) for part in key)
    return not isinstance(key, _Unknown)


def _captured(fn: types.FunctionType) -> list[Any]:
    """What a function closes over, its defaults, and the globals that it reads."""
    cells = [_content(cell) for cell in fn.__closure__ or ()]
    # The globals of packages do not change between calls.
    names = () if _of_a_library(fn) else globals_read(fn.__code__)
    reads = [fn.__globals__[name] for name in names if name in fn.__globals__]
    return [cells, fn.__defaults__, fn.__kwdefaults__, reads]


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None


@lru_cache(maxsize=1024)
def globals_read(code: types.CodeType) -> tuple[str, ...]:
    """Names of the globals that a function reads, those of functions inside it included.

    Example:
        >>> globals_read((lambda x: np.sin(x).T).__code__)
        ('np',)
    """
    # co_names also lists attributes: `x.T` must not be taken for a global named T.
    names = [i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += globals_read(constant)
    return tuple(dict.fromkeys(names))


def _of_a_library(obj: Any) -> bool:
    return (getattr(obj, "__module__", None) or "").partition(".")[0] in _LIBRARIES


def split(tree: Any) -> tuple[tuple[Any, ...], list[Any]]:
    """What decides a program in a pytree of anything, and its data.

    Example:
        >>> import jax.numpy as jnp
        >>> static, data = split({"times": np.arange(3.0), "y": jnp.ones(2), "f": abs})
        >>> [x.shape for x in data], join(static, data)["f"] is abs
        ([(2,)], True)
    """
    leaves, treedef = jax.tree_util.tree_flatten(tree)
    # A function inside a law was looked at when the law was made: what it reads may have changed.
    parts = jax.tree_util.tree_leaves(tree, is_leaf=_holds_function)
    functions = tuple(Held(part.function) for part in parts if _holds_function(part))
    is_data = [isinstance(leaf, jax.Array | float | np.floating) for leaf in leaves]
    held = tuple(None if d else Held(leaf) for leaf, d in zip(leaves, is_data, strict=True))
    return (treedef, held, functions), [leaf for leaf, d in zip(leaves, is_data, strict=True) if d]


def holds_same_numbers(a: Any, b: np.ndarray) -> bool:
    """Whether two arrays hold the same numbers, axes of length 1 apart; never for single numbers.

    Example:
        >>> holds_same_numbers(np.array([1.0, np.nan]), np.array([[1.0], [np.nan]]))
        True
    """
    a = np.asarray(a)
    if a.size != b.size or a.size < 2 or a.dtype.kind not in "fiu" or b.dtype.kind not in "fiu":
        return False
    return np.array_equal(np.ravel(a).astype(b.dtype), np.ravel(b), equal_nan=True)


def _holds_function(part: Any) -> bool:
    return bool(getattr(type(part), "holds_function", False))


def join(static: tuple[Any, ...], data: list[Any]) -> Any:
    """Undo `split`, with other data perhaps."""
    treedef, held, _ = static
    rest = iter(data)
    return treedef.unflatten([next(rest) if h is None else _own(h.value) for h in held])


def _own(value: Any) -> Any:
    """Of an array of NumPy a copy, which only one trace sees.

    JAX 0.10 keeps the buffer of a constant by the array's identity: what was a constant in double
    precision would be handed, as it is, to a program in single precision.
    """
    return value.copy() if type(value) is np.ndarray else value


def entry_point(fn: Callable[P, R]) -> Callable[P, R]:
    """Compile a function of pytrees once for each structure; it returns arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> a = 1.0
        >>> @entry_point
        ... def total(weights, x, fn):
        ...     return (weights * fn(x)).sum()
        >>> [float(total(np.ones(2), jnp.ones(2), lambda x: x + a)) for _ in range(2)]
        [4.0, 4.0]
    """
    run = _compiled(fn)

    @wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        static, data = split((args, kwargs))
        return cast("R", run(static, data))

    return call


def subprogram(fn: Callable[P, R]) -> Callable[P, R]:
    """Compile what models evaluate as one program, by itself, under a gradient, or in a larger one.

    NumPyro takes its first gradient of a model operation by operation, each a small program that
    XLA compiles. Here that is one program, found again by a second call as an `entry_point` is; and
    what traces the model again finds it traced. Where it could not be found again (a function that
    closes over traced values, or reads what may change unseen), or would be compared by large host
    arrays (the clocks of a panel), `fn` runs as it is. Of a single number the gradient is one
    program with its value, where JAX would compile two, there and back.

    Example:
        >>> import jax.numpy as jnp
        >>> @subprogram
        ... def total(x, fn):
        ...     return fn(x).sum()
        >>> [float(jax.grad(total)(jnp.ones(2), lambda x: a * x)[0]) for a in (2.0, 3.0)]
        [2.0, 3.0]
    """
    run = _compiled(fn)
    number = _with_slope(run)

    @wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        leaves = jax.tree_util.tree_leaves((args, kwargs))
        size = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, np.ndarray))
        if size > _MOST_HELD:
            return fn(*args, **kwargs)
        static, data = split((args, kwargs))
        if not _can_be_found(static):
            return fn(*args, **kwargs)
        result = cast("Any", run).eval_shape(static, data)
        single = isinstance(result, jax.ShapeDtypeStruct) and result.shape == ()
        return cast("R", number(static, data) if single else run(static, data))

    return call


def _with_slope(run: Any) -> Any:
    """A program of one number, differentiated by a program of the number and its gradient."""

    @partial(jax.jit, static_argnums=(0, 1))
    def value_and_slopes(
        static: tuple[Any, ...], moving: tuple[int, ...], data: list[Any]
    ) -> tuple[Any, list[Any]]:
        def value(moved: list[Any]) -> Any:
            new = dict(zip(moving, moved, strict=True))
            return run(static, [new.get(i, leaf) for i, leaf in enumerate(data)])

        found, slopes = jax.value_and_grad(value)([data[i] for i in moving])
        return found, slopes

    @partial(jax.custom_jvp, nondiff_argnums=(0,))
    def number(static: tuple[Any, ...], data: list[Any]) -> Any:
        return run(static, data)

    @partial(number.defjvp, symbolic_zeros=True)
    def rule(static: tuple[Any, ...], primals: Any, tangents: Any) -> tuple[Any, Any]:
        (data,), (changes,) = primals, tangents
        still = jax.custom_derivatives.SymbolicZero
        moving = tuple(i for i, change in enumerate(changes) if not isinstance(change, still))
        found, slopes = value_and_slopes(static, moving, data)
        along = [jnp.sum(s * changes[i]) for i, s in zip(moving, slopes, strict=True)]
        return found, sum(along, start=jnp.zeros_like(found))

    return number


def _compiled(fn: Callable[..., Any]) -> Callable[[tuple[Any, ...], list[Any]], Any]:
    @partial(jax.jit, static_argnums=0)
    @wraps(fn, updated=(), assigned=("__name__", "__qualname__", "__module__"))
    def run(static: tuple[Any, ...], data: list[Any]) -> Any:
        args, kwargs = join(static, data)
        return fn(*args, **kwargs)

    return run


def _can_be_found(static: tuple[Any, ...]) -> bool:
    _, held, functions = static
    if not all(h is None or h.lasting for h in (*held, *functions)):
        return False
    try:
        hash(static)
    except TypeError:  # a law of the user's with parts that have no hash
        return False
    return True
