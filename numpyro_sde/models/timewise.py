"""What a model does to a path before it observes it, as a map of one state at one time.

A model may hand `observe` not the path but something made of it: `2 * x`, `jnp.exp(x)`,
`x[..., 0]`. Engines that know the path by its states one time after another need that map for one
state. It is read off the trace (the jaxpr) of the whole path: where every operation keeps the times
apart, the same operations on one time are the map; where one mixes them, the statement is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from jaxtyping import Array

from numpyro_sde.distributions.batching import map_batch

# fmt: off
_ELEMENTWISE = frozenset({
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh",
    "bessel_i0e", "bessel_i1e", "cbrt", "ceil", "clamp", "convert_element_type", "copy", "copy_p",
    "cos", "cosh", "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1",
    "floor", "ge", "gt", "igamma", "igammac", "integer_pow", "is_finite", "le", "lgamma", "log",
    "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "polygamma", "pow",
    "real", "reduce_precision", "regularized_incomplete_beta", "rem", "round", "rsqrt",
    "select_n", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh",
    "xor",
})
# fmt: on
# fmt: off
_REDUCTIONS = frozenset({
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax",
    "argmin",
})
# fmt: on
# fmt: off
_SCANS = frozenset({
    "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "rev", "sort",
})
# fmt: on
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
}


class MixesTimesError(ValueError):
    """What is made of a path uses one of its times for another."""


@partial(jax.jit, static_argnames=("axis",))
def times_of_path(value: Array, index: Any, axis: int) -> Array:
    """Some of the times of a path; recognised by its name in a trace."""
    return jnp.take(value, index, axis=axis)


class _Step(NamedTuple):
    """One operation: a primitive, its parameters for a single time, where its operands come from.

    Operands are `("const", i)`, `("value", i)` or `("literal", value)`.
    """

    primitive: Any
    params: dict[str, Any]
    operands: tuple[tuple[str, Any], ...]
    outputs: tuple[int, ...]


class _Program:
    """The operations, compared by identity so that they can be static."""

    def __init__(self, steps: list[_Step], result: tuple[str, Any]) -> None:
        self.steps, self.result = tuple(steps), result


class TimewiseMap(eqx.Module):
    """A map of one state at one time, with its constants.

    Attributes:
        consts: constants `(*lead, T, ...)`, one entry for each time of the path the model saw, or
            numbers.
        program: the operations.
        rank: number of leading axes of the model's path, batch and time.
        rows: the times of the path, as its law has them, that the model saw; None for all.
        steady: for each constant whether it is the same at all times, as its making shows.
    """

    consts: tuple[Any, ...]
    program: _Program = eqx.field(static=True)
    rank: int = eqx.field(static=True)
    rows: tuple[int, ...] | None = eqx.field(static=True)
    steady: tuple[bool, ...] = eqx.field(static=True)

    def leaf_event_dims(self) -> list[int]:
        """Event dimensions of each constant: all but those of the batch."""
        return [max(jnp.ndim(c) - self.rank + 1, 0) for c in self.consts]

    def on_grid(self, num_times: int, batch_dims: int = 0) -> tuple[Any, ...]:
        """Constants with an axis over the times of the path's law, behind that of the batch."""

        def one(c: Any) -> Any:
            c = jnp.asarray(c)
            if c.ndim == 0:
                return jnp.broadcast_to(c, (1,) * batch_dims + (num_times,))
            if self.rows is None:
                return c
            front = (slice(None),) * batch_dims
            out = jnp.zeros((*c.shape[:batch_dims], num_times, *c.shape[batch_dims + 1 :]), c.dtype)
            return out.at[(*front, np.asarray(self.rows))].set(c)

        return tuple(one(c) for c in self.consts)

    def seen_through(self, index: np.ndarray) -> TimewiseMap:
        """The same map where the model's times are those at `index` of a finer path."""
        rows = index if self.rows is None else index[np.asarray(self.rows)]
        rows = tuple(int(i) for i in rows)
        return TimewiseMap(self.consts, self.program, self.rank, rows, self.steady)

    def at_other_times(self, states: Array, state_dim: int) -> Array:
        """The map of states `(*lead, F, *state)` at times that the model did not see.

        Raises:
            MixesTimesError: a constant that has an entry for each of the times it saw.
        """
        if not all(self.steady):
            raise MixesTimesError("it joins the path with an array over the path's own times")
        lead = jnp.shape(states)[: jnp.ndim(states) - state_dim - 1]
        axis = self.rank - 1
        now = [
            c if jnp.ndim(c) == 0 else jax.lax.index_in_dim(jnp.asarray(c), 0, axis, keepdims=False)
            for c in self.consts
        ]

        def at(states: Array, *now: Any) -> Array:
            return jax.vmap(lambda x: self.apply(x, now))(states)

        dims = [max(jnp.ndim(c) - axis, 0) for c in now]
        return map_batch(at, lead, (states, *now), (1 + state_dim, *dims))

    def apply(self, state: Array, now: Sequence[Any]) -> Array:
        """The map of one state, given the constants of its time."""
        front = (1,) * self.rank

        def place(original: Any, value: Any) -> Any:
            return value if jnp.ndim(original) == 0 else jnp.reshape(value, front + value.shape)

        consts = [place(c, jnp.asarray(v)) for c, v in zip(self.consts, now, strict=True)]
        values: dict[int, Any] = {0: jnp.reshape(state, front + jnp.shape(state))}

        def read(operand: tuple[str, Any]) -> Any:
            kind, key = operand
            return {"const": lambda: consts[key], "value": lambda: values[key]}.get(
                kind, lambda: key
            )()

        for step in self.program.steps:
            out = step.primitive.bind(*(read(o) for o in step.operands), **step.params)
            outputs = out if step.primitive.multiple_results else [out]
            values.update(zip(step.outputs, outputs, strict=True))
        result = read(self.program.result)
        return jnp.reshape(result, jnp.shape(result)[self.rank :])


class _Known(NamedTuple):
    value: Any
    steady: bool = False  # the same along the time axis, by how it was made


class _Timewise(NamedTuple):
    number: int
    rows: Any  # times of the path's law that its time axis shows; None for all


class _Reader:
    """Walks a jaxpr, computing what does not depend on the path and noting what does."""

    def __init__(self, front: tuple[int, ...]) -> None:
        self.front, self.rank = front, len(front)
        self.steps: list[_Step] = []
        self.consts: list[Any] = []
        self.steady: list[bool] = []
        self.count = 1
        self.rows: Any = None

    def run(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], only: int | None = None
    ) -> list[Any]:
        env: dict[Any, Any] = {}
        env.update(zip(jaxpr.constvars, (_Known(c) for c in consts), strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(var: Any) -> Any:
            return _Known(var.val) if isinstance(var, Literal) else env[var]

        outvars = jaxpr.outvars if only is None else [jaxpr.outvars[only]]
        for eqn in jaxpr.eqns if only is None else needed(jaxpr, outvars[0]):
            operands = [read(v) for v in eqn.invars]
            outs = self._equation(eqn, operands)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in outvars]

    def _equation(self, eqn: Any, operands: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        known = all(isinstance(o, _Known) for o in operands)
        if known and name not in _CALLS:
            out = eqn.primitive.bind(*(o.value for o in operands), **eqn.params)
            steady = self._keeps_steady(eqn, operands)
            return [_Known(o, steady) for o in (out if eqn.primitive.multiple_results else [out])]
        if name in _CALLS:
            if not known and eqn.params.get("name") == "times_of_path":
                return [self._select(operands)]
            inner = eqn.params[_CALLS[name]]
            closed = hasattr(inner, "consts")
            jaxpr, consts = (inner.jaxpr, inner.consts) if closed else (inner, ())
            return self.run(jaxpr, consts, operands)
        return self._note(eqn, operands)

    def _is_steady(self, known: _Known) -> bool:
        shape = jnp.shape(known.value)
        one = len(shape) >= self.rank and shape[self.rank - 1] == 1 != self.front[-1]
        return known.steady or shape == () or one

    def _keeps_steady(self, eqn: Any, operands: list[_Known]) -> bool:
        """Whether what is known comes out the same at all times, as far as can be told."""
        axis = self.rank - 1
        if eqn.primitive.name == "broadcast_in_dim":
            dims = tuple(eqn.params["broadcast_dimensions"])
            if axis not in dims:
                return len(eqn.params["shape"]) > axis
            own = dims.index(axis)
            shape = eqn.invars[0].aval.shape
            spread = shape[own] == 1 != eqn.params["shape"][axis]
            return spread or (own == axis and self._is_steady(operands[0]))
        return eqn.primitive.name in _ELEMENTWISE and all(self._is_steady(o) for o in operands)

    def _select(self, operands: list[Any]) -> _Timewise:
        value, index = operands
        if not (
            isinstance(value, _Timewise) and value.rows is self.rows and isinstance(index, _Known)
        ):
            raise MixesTimesError("it selects times of it")
        index = np.asarray(index.value)
        self.rows = index if self.rows is None else np.asarray(self.rows)[index]
        self.front = (*self.front[:-1], int(index.size))
        axis = self.rank - 1
        self.consts = [
            c if jnp.ndim(c) == 0 else jnp.take(jnp.asarray(c), index, axis) for c in self.consts
        ]
        return _Timewise(value.number, self.rows)

    def _note(self, eqn: Any, operands: list[Any]) -> list[Any]:
        params = self._for_one_time(eqn, operands)
        refs = tuple(
            self._reference(o, v.aval.shape) for o, v in zip(operands, eqn.invars, strict=True)
        )
        outputs = tuple(range(self.count, self.count + len(eqn.outvars)))
        self.count += len(outputs)
        for var in eqn.outvars:
            if var.aval.shape[: self.rank] != self.front:
                raise MixesTimesError(f"{eqn.primitive.name} changes its times")
        self.steps.append(_Step(eqn.primitive, params, refs, outputs))
        return [_Timewise(i, self.rows) for i in outputs]

    def _reference(self, operand: Any, shape: tuple[int, ...]) -> tuple[str, Any]:
        if isinstance(operand, _Timewise):
            return ("value", operand.number)
        if shape == () and isinstance(operand.value, int | float | bool | np.generic):
            return ("literal", operand.value)
        value, steady = operand.value, self._is_steady(operand)
        if shape != () and self._aligned(shape):
            value = jnp.broadcast_to(value, self.front + shape[self.rank :])
        elif shape != ():  # a matrix that the state is multiplied by
            if isinstance(value, jax.core.Tracer):
                raise MixesTimesError("it joins the path with an array that has no time axis")
            return ("literal", value)
        self.consts.append(value)
        self.steady.append(steady)
        return ("const", len(self.consts) - 1)

    def _aligned(self, shape: tuple[int, ...]) -> bool:
        """Whether leading axes are those of the path, or 1."""
        own = shape[: self.rank]
        return len(own) == self.rank and all(
            a in (1, b) for a, b in zip(own, self.front, strict=True)
        )

    def _for_one_time(self, eqn: Any, operands: list[Any]) -> dict[str, Any]:
        """The parameters of an operation on one time, where it keeps times apart."""
        name, params = eqn.primitive.name, dict(eqn.params)
        rank, front, ones = self.rank, self.front, (1,) * self.rank
        shapes = [v.aval.shape for v in eqn.invars]
        varying = [i for i, o in enumerate(operands) if isinstance(o, _Timewise)]
        if name in _ELEMENTWISE:
            if all(s == () or self._aligned(s) for s in shapes):
                return params
        elif name == "broadcast_in_dim":
            dims = params["broadcast_dimensions"]
            if tuple(dims[:rank]) == tuple(range(rank)) and params["shape"][:rank] == front:
                return {**params, "shape": ones + tuple(params["shape"][rank:])}
        elif name == "reshape":
            if tuple(params["new_sizes"][:rank]) == front and params.get("dimensions") is None:
                return {**params, "new_sizes": ones + tuple(params["new_sizes"][rank:])}
        elif name in ("squeeze", "expand_dims"):
            if all(d >= rank for d in params["dimensions"]):
                return params
        elif name == "slice":
            strides = params["strides"] or (1,) * len(shapes[0])
            whole = tuple(params["limit_indices"][:rank]) == front
            whole = whole and not any(params["start_indices"][:rank])
            if whole and all(s == 1 for s in strides[:rank]):
                limits = ones + tuple(params["limit_indices"][rank:])
                return {**params, "limit_indices": limits}
        elif name == "transpose":
            if tuple(params["permutation"][:rank]) == tuple(range(rank)):
                return params
        elif name in ("concatenate", "stack"):
            axis = params["dimension"] if name == "concatenate" else params["axis"]
            if axis >= rank and all(s[:rank] == front for s in shapes):
                return params
        elif name in _REDUCTIONS:
            if all(a >= rank for a in params["axes"]):
                return params
        elif name in _SCANS:
            axes = params.get("dimensions", (params.get("axis", params.get("dimension", 0)),))
            if all(a >= rank for a in axes):
                return params
        elif name == "dot_general" and varying == [0]:
            (contracted, _), (batch, _) = params["dimension_numbers"]
            if not batch and all(a >= rank for a in contracted):
                return params
        raise MixesTimesError(f"its operation {name} is not one on each time apart")


def needed(jaxpr: Any, output: Any) -> list[Any]:
    """The operations that an output of a trace is made by."""
    wanted, kept = {output}, []
    for eqn in reversed(jaxpr.eqns):
        if any(v in wanted for v in eqn.outvars):
            kept.append(eqn)
            wanted.update(v for v in eqn.invars if not isinstance(v, Literal))
    return kept[::-1]


def timewise_map(
    jaxpr: Any, consts: Sequence[Any], front: tuple[int, ...], index: int = 0, output: int = 0
) -> TimewiseMap:
    """The map of one state in a trace from a whole path to what is made of it.

    Args:
        jaxpr: the trace.
        consts: its constants; may be traced outside.
        front: the leading axes of the path, `(*lead, T)`.
        index: which input is the path, `(*lead, T, *state)`.
        output: which output is what is made of it; it does not use the other inputs.

    Raises:
        MixesTimesError: an operation uses one time for another.
    """
    reader = _Reader(front)
    # What does not reach the output does not matter: zeros stand for the other inputs.
    args: list[Any] = [_Known(jnp.zeros(v.aval.shape, v.aval.dtype)) for v in jaxpr.invars]
    args[index] = _Timewise(0, None)
    (result,) = reader.run(jaxpr, consts, args, only=output)
    if isinstance(result, _Known):
        raise MixesTimesError("it does not depend on the path")
    rows = None if reader.rows is None else tuple(int(i) for i in reader.rows)
    program = _Program(reader.steps, ("value", result.number))
    return TimewiseMap(tuple(reader.consts), program, len(front), rows, tuple(reader.steady))
