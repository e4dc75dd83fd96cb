"""What a coefficient depends on, read off its trace: the state, the time, other components.

Some schemes are right only for additive noise, some only for coefficients that do not change
in time. The trace of the coefficient (its jaxpr) decides it: no parameter value is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

if TYPE_CHECKING:
    from numpyro_sde.sde import SDE


class Dependence(NamedTuple):
    """Whether a coefficient uses the time and the state (conservative: may say yes wrongly)."""

    time: bool
    state: bool


def dependence(sde: SDE, role: str, state_shape: tuple[int, ...]) -> Dependence:
    """Trace a coefficient and follow its inputs forward to its output.

    Args:
        sde: the equation, batched or not.
        role: "drift" or "diffusion".
        state_shape: `()` or `(d,)`.
    """
    real = jnp.result_type(float)
    t, x = jax.ShapeDtypeStruct((), real), jax.ShapeDtypeStruct(state_shape, real)

    def coefficient(one: SDE, t: Any, x: Any) -> Any:
        return one._call(getattr(one, role), t, x)

    jaxpr = jax.make_jaxpr(coefficient)(sde.unbatched_shapes(), t, x).jaxpr
    return Dependence(reaches_output(jaxpr, -2), reaches_output(jaxpr, -1))


def reachable(jaxpr: Any, variables: Iterable[Any]) -> list[bool]:
    """Which outputs of a trace some of its variables can influence."""
    reached = set(variables)
    for eqn in jaxpr.eqns:
        if any(not isinstance(v, Literal) and v in reached for v in eqn.invars):
            reached.update(eqn.outvars)
    return [not isinstance(v, Literal) and v in reached for v in jaxpr.outvars]


def reaches_output(jaxpr: Any, index: int, output: int | None = None) -> bool:
    """Whether one input of a trace can influence its outputs, or one of them."""
    found = reachable(jaxpr, [jaxpr.invars[index]])
    return any(found) if output is None else found[output]


def require_additive(sde: SDE, state_shape: tuple[int, ...], scheme: str, remedy: str) -> None:
    """Refuse a diffusion that uses the state.

    Raises:
        ValueError: naming the scheme and what to use instead.
    """
    if dependence(sde, "diffusion", state_shape).state:
        raise ValueError(
            f"{scheme} needs additive noise, but diffusion(t, x) uses the state x. If it only "
            f"borrows the shape of x, use jnp.ones_like(x) or return a scalar; else {remedy}"
        )


def _one_process(sde: SDE) -> SDE | None:
    """The first process of a batch; None where there is none."""
    leaves, treedef = jax.tree_util.tree_flatten(sde)
    first = [
        jnp.reshape(leaf, (-1, *jnp.shape(leaf)[jnp.ndim(leaf) - dim :]))[0]
        for leaf, dim in zip(leaves, sde.leaf_event_dims(), strict=True)
        if np.size(leaf)
    ]
    if len(first) < len(leaves):  # an empty batch has no parameters to look at
        return None
    return jax.tree_util.tree_unflatten(treedef, first)


# Zero where any operand is; where the first is; where all are.
_ZERO_IF_ANY = frozenset({"mul", "dot_general"})
# fmt: off
_ZERO_IF_FIRST = frozenset({
    "broadcast_in_dim", "reshape", "squeeze", "slice", "convert_element_type", "neg", "sqrt",
    "square", "integer_pow", "div", "transpose", "copy", "abs", "reduce_sum",
})
# fmt: on
_ZERO_IF_ALL = frozenset({"add", "add_any", "sub", "concatenate", "stack", "max", "min"})


def has_no_noise(sde: SDE, state_shape: tuple[int, ...]) -> bool:
    """Whether the diffusion is zero whatever the state, by its trace; nothing is computed.

    Conservative: it may say no wrongly, and does so where it would need the values of traced
    parameters.
    """
    real = jnp.result_type(float)
    t, x = jax.ShapeDtypeStruct((), real), jax.ShapeDtypeStruct(state_shape, real)
    closed = jax.make_jaxpr(lambda one, t, x: one._call(one.diffusion, t, x))(
        sde.unbatched_shapes(), t, x
    )
    leaves = [*jax.tree_util.tree_leaves(sde), None, None]
    return all(_zeros(closed.jaxpr, closed.consts, [_known_zero(leaf) for leaf in leaves]))


def _known_zero(value: Any) -> bool:
    if value is None or isinstance(value, jax.core.Tracer):
        return False
    return bool(np.all(np.asarray(value) == 0))


def _zeros(jaxpr: Any, consts: Any, inputs: list[bool]) -> list[bool]:
    """Which outputs of a trace are zero, given which inputs are."""
    zero = dict(zip(jaxpr.invars, inputs, strict=True))
    zero.update((v, _known_zero(c)) for v, c in zip(jaxpr.constvars, consts, strict=True))

    def read(v: Any) -> bool:
        return _known_zero(v.val) if isinstance(v, Literal) else zero[v]

    for eqn in jaxpr.eqns:
        name, found = eqn.primitive.name, [read(v) for v in eqn.invars]
        if name in ("jit", "pjit"):
            inner = eqn.params["jaxpr"]
            zero.update(zip(eqn.outvars, _zeros(inner.jaxpr, inner.consts, found), strict=True))
            continue
        nothing = (
            (name in _ZERO_IF_ANY and any(found))
            or (name in _ZERO_IF_FIRST and found[0])
            or (name in _ZERO_IF_ALL and all(found))
        )
        zero.update((v, bool(nothing)) for v in eqn.outvars)
    return [read(v) for v in jaxpr.outvars]


def coupled_component(sde: SDE, state_shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Find `(i, j)` where noise i depends on component j of the state, in diagonal noise.

    Looks at the derivatives at one point, for concrete parameters only: None where they are
    traced, where nothing is found, or where the point lies outside the domain.
    """
    leaves = jax.tree_util.tree_leaves(sde)
    if state_shape in ((), (1,)) or any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return None
    if not dependence(sde, "diffusion", state_shape).state:
        return None
    one = _one_process(sde)
    if one is None:
        return None
    x = 0.7 + 0.1 * jnp.arange(state_shape[0], dtype=jnp.result_type(float))
    jacobian = jax.jacfwd(lambda s: one.noise_factor_at(jnp.zeros(()), s))(x)
    if isinstance(jacobian, jax.core.Tracer):  # a function that closes over traced arrays
        return None
    found = np.argwhere(np.nan_to_num(np.asarray(jacobian)) * (1 - np.eye(len(x))) != 0)
    return (int(found[0][0]), int(found[0][1])) if len(found) else None
