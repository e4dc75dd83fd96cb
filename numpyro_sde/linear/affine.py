"""Find out by tracing whether a function is constant, affine or nonlinear in its argument.

The jaxpr of the function is walked once, with a degree for each variable: 0 does not depend on
the argument, 1 is affine in it, 2 is anything else. A verdict of at most 1 is a proof (up to
rounding); a 2 may be pessimistic: a nonlinear function that happens to cancel, or a primitive
that is not in the tables below. Loops are walked until the degrees of what they carry no longer
change, and calls are walked through.

`stop_gradient` counts as nonlinear on purpose. Its value is the identity, but whoever asks for a
degree goes on to take the slope of the function by differentiation, and would find none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Linear in all operands together: the degree of the output is the largest one.
_LINEAR = frozenset(
    [
        "add",
        "add_any",
        "broadcast_in_dim",
        "complex",
        "concatenate",
        "conj",
        "convert_element_type",
        "copy",
        "copy_p",
        "cumsum",
        "expand_dims",
        "fft",
        "imag",
        "name",
        "neg",
        "optimization_barrier",
        "pad",
        "real",
        "reduce_precision",
        "reduce_sum",
        "reduce_window_sum",
        "reshape",
        "rev",
        "slice",
        "split",
        "squeeze",
        "stack",
        "sub",
        "tile",
        "transpose",
        "unstack",
    ]
)
# Linear in each operand apart: at most one may depend on the argument.
_BILINEAR = frozenset(["mul", "dot_general", "conv_general_dilated"])
# Linear in the operands at these places together; the others must not depend on the argument.
_LINEAR_IN = {
    "div": (0,),
    "gather": (0,),
    "dynamic_slice": (0,),
    "dynamic_update_slice": (0, 1),
    "scatter": (0, 2),
    "scatter-add": (0, 2),
    "scatter_add": (0, 2),
    "scatter-sub": (0, 2),
    "triangular_solve": (1,),
    "tridiagonal_solve": (3,),
}
# Calls, with the name of the parameter that holds the body; operand i is its input i. Other
# primitives carry a jaxpr too (a reduction's is its combining function): they are not calls.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}


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
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # closed over its constants
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
    if max(operands, default=0) == 0:
        return [0] * count
    if name in _CALLS:
        outputs = _call(equation.params.get(_CALLS[name]), operands, count)
    elif name in _STRUCTURED:
        outputs = _STRUCTURED[name](equation.params, operands, count)
    else:
        outputs = [_arithmetic(equation, name, operands)] * count
    # A whole number or a truth value that depends on the argument is a step function of it.
    return [
        d if d == 0 or jnp.issubdtype(v.aval.dtype, jnp.inexact) else 2
        for d, v in zip(outputs, equation.outvars, strict=True)
    ]


def _arithmetic(equation: Any, name: str, operands: list[int]) -> int:
    places = _LINEAR_IN.get(name, ())
    linear = (
        name in _LINEAR
        or (name in _BILINEAR and sum(operands) <= 1)
        or (name in _LINEAR_IN and not any(d for i, d in enumerate(operands) if i not in places))
        or (name == "integer_pow" and equation.params["y"] == 1)
        or (name == "select_n" and operands[0] == 0)
    )
    return max(operands) if linear else 2


def _call(body: Any, operands: list[int], count: int) -> list[int]:
    inner = getattr(body, "jaxpr", body)
    if inner is None or len(inner.invars) != len(operands):
        return [2] * count
    return _walk(inner, operands)


def _scan_sizes(params: Any) -> tuple[int, int]:
    """Numbers of constants and of carried values of a scan."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # JAX 0.12: trees of its operands
    return len(list(consts.vals)), len(list(carry.vals))


def _scan(params: Any, operands: list[int], count: int) -> list[int]:
    del count
    num_consts, num_carry = _scan_sizes(params)
    consts, rest = operands[:num_consts], operands[num_consts:]
    carry, over = rest[:num_carry], rest[num_carry:]
    while True:
        outputs = _walk(params["jaxpr"], [*consts, *carry, *over])
        wider = [max(pair) for pair in zip(carry, outputs[:num_carry], strict=True)]
        if wider == carry:
            return outputs
        carry = wider


def _while(params: Any, operands: list[int], count: int) -> list[int]:
    split = params["cond_nconsts"]
    stop = split + params["body_nconsts"]
    test_consts, body_consts, carry = operands[:split], operands[split:stop], operands[stop:]
    while True:
        outputs = _walk(params["body_jaxpr"], [*body_consts, *carry])
        wider = [max(pair) for pair in zip(carry, outputs, strict=True)]
        if wider == carry:
            break
        carry = wider
    # A number of rounds that depends on the argument makes steps of everything carried.
    (test,) = _walk(params["cond_jaxpr"], [*test_consts, *carry])
    return [2] * count if test else carry


def _cond(params: Any, operands: list[int], count: int) -> list[int]:
    which, rest = operands[0], operands[1:]
    if which:
        return [2] * count
    branches = [_walk(branch, rest) for branch in params["branches"]]
    return [max(outputs) for outputs in zip(*branches, strict=True)]


def _linear_solve(params: Any, operands: list[int], count: int) -> list[int]:
    """The solver that was handed over; its matrix and its right-hand side are its operands."""
    lengths, solver = params["const_lengths"], params["jaxprs"].solve
    before = lengths.matvec + lengths.vecmat
    num_consts = sum(lengths)
    consts = operands[before : before + lengths.solve]
    return _call(solver, [*consts, *operands[num_consts:]], count)


_STRUCTURED = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "custom_linear_solve": _linear_solve,
}
