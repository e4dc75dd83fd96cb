"""Which model a fit is of: a name that tells models apart and treatments of one model alike.

Two fits of one model by different treatments are to agree; fits of two models need not. So what a
model is called leaves out `marginalize`, `reparam` and the like around it, and includes what picks
a variant: arguments that are no arrays, and what the function closes over.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

from numpyro.primitives import Messenger

_DEPTH = 4


def describe_model(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> str:
    """Name of a model's function and a mark of what makes it the model that it is.

    Args:
        model: The model, with or without handlers around it.
        args: Positional arguments of the fit.
        kwargs: Its keyword arguments.

    Example:
        >>> import numpyro_sde as nsde
        >>> def model(kind, y): ...
        >>> marginal = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())
        >>> name = describe_model(model, ("cir", [1.0]), {})
        >>> name == describe_model(marginal, ("cir", [2.0]), {})
        True
        >>> name == describe_model(model, ("ckls", [1.0]), {})
        False
    """
    function: Any = model
    while isinstance(function, Messenger) and function.fn is not None:
        function = function.fn
    name = getattr(_innermost(function), "__qualname__", type(function).__name__)
    content = (_content(function, _DEPTH), _content(args, _DEPTH), _content(dict(kwargs), _DEPTH))
    return f"{name}@{hashlib.sha256(repr(content).encode()).hexdigest()[:8]}"


def _innermost(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _content(value: Any, depth: int) -> Any:
    """What of a value tells one model from another; arrays and objects only by their type."""
    if value is None or isinstance(value, str | bool | int | bytes):
        return value
    if depth == 0:
        return type(value).__name__
    if isinstance(value, functools.partial):
        inner = (value.func, value.args, value.keywords)
        return tuple(_content(v, depth - 1) for v in inner)
    if isinstance(value, Mapping):
        return tuple((str(k), _content(v, depth - 1)) for k, v in value.items())
    if isinstance(value, tuple | list) and len(value) <= 16:
        return tuple(_content(v, depth - 1) for v in value)
    if isinstance(value, type):
        return value.__qualname__
    if isinstance(value, FunctionType):
        return _function(value, depth)
    return type(value).__name__


def _function(function: FunctionType, depth: int) -> Any:
    code = function.__code__
    cells = [_cell(cell) for cell in function.__closure__ or ()]
    return (
        function.__module__,
        function.__qualname__,
        hashlib.sha256(code.co_code).hexdigest(),
        code.co_names,
        tuple(v for v in code.co_consts if isinstance(v, str | int | float | type(None)))[1:],
        tuple(_content(cell, depth - 1) for cell in cells),
        _content(function.__defaults__, depth - 1),
    )


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None
