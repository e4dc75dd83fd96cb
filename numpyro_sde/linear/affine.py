"""Find out by tracing whether a function is constant, affine or nonlinear in its argument.

The jaxpr of the function is walked once, with a degree for each variable: 0 does not depend on
the argument, 1 is affine in it, 2 is anything else. A verdict of at most 1 is a proof; a 2 may
be pessimistic (a nonlinear function that happens to cancel).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

# Outputs are linear in all operands together: the degree is the largest one.
_LINEAR = frozenset(
    [
        "add",
        "add_any",
        "sub",
        "neg",
        "convert_element_type",
        "broadcast_in_dim",
        "reshape",
        "squeeze",
        "expand_dims",
        "transpose",
        "concatenate",
        "reduce_sum",
        "slice",
        "rev",
        "copy",
        "pad",
        "cumsum",
        "reduce_precision",
        "real",
        "imag",
        "split",
        "stack",
        "unstack",
    ]
)
# Linear in each operand apart: at most one may depend on the argument.
_BILINEAR = frozenset(["mul", "dot_general", "conv_general_dilated"])
# Linear in the first operand, the others must not depend on the argument.
_LINEAR_IN_FIRST = frozenset(["div", "gather", "dynamic_slice", "triangular_solve"])


def degrees(fn: Callable[[Any], Any], x: Any) -> list[int]:
    """Degree of each output leaf of `fn` in `x`: 0 constant, 1 affine, 2 neither (or unknown).

    Args:
        fn: a traceable function of one array.
        x: an array, or its shape and dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> degrees(lambda x: (2.0 * x + 1.0, x**2, jnp.ones(2)), jnp.zeros(2))
        [1, 2, 0]
    """
    closed = jax.make_jaxpr(fn)(x)
    return _walk(closed.jaxpr, [1] * len(closed.jaxpr.invars))


def _walk(jaxpr: Any, inputs: Sequence[int]) -> list[int]:
    degree: dict[Any, int] = dict.fromkeys(jaxpr.constvars, 0)
    degree.update(zip(jaxpr.invars, inputs, strict=True))

    def of(variable: Any) -> int:
        return 0 if hasattr(variable, "val") else degree[variable]  # a literal has a value

    for equation in jaxpr.eqns:
        operands = [of(v) for v in equation.invars]
        outputs = _apply(equation, operands)
        degree.update(zip(equation.outvars, outputs, strict=True))
    return [of(v) for v in jaxpr.outvars]


def _apply(equation: Any, operands: list[int]) -> list[int]:
    count, name = len(equation.outvars), equation.primitive.name
    highest = max(operands, default=0)
    if highest == 0:
        return [0] * count
    inner = _inner_jaxpr(equation)
    if inner is not None and len(inner.invars) == len(operands):
        return _walk(inner, operands)
    if highest == 2:
        return [2] * count
    linear = (
        name in _LINEAR
        or (name in _BILINEAR and sum(operands) <= 1)
        or (name in _LINEAR_IN_FIRST and not any(operands[1:]))
        or (name == "integer_pow" and equation.params["y"] == 1)
        or (name == "select_n" and operands[0] == 0)
    )
    return [1 if linear else 2] * count


def _inner_jaxpr(equation: Any) -> Any:
    """The body of a call, where it maps operands to results one to one."""
    if equation.primitive.name in ("scan", "while", "cond"):
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        body = equation.params.get(key)
        if body is not None:
            return getattr(body, "jaxpr", body)
    return None
