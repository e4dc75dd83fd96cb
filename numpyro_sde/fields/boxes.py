"""Are the states at which a model calls its fields inside their boxes? Looked at on the host."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_sde.fields.field import AbstractField, recorded_margins
from numpyro_sde.schemes.dependence import reachable
from numpyro_sde.sde import SDE

_passed: set[Any] = set()


def refuse_outside(sde: SDE, times: Any, states: Any, state_shape: tuple[int, ...]) -> None:
    """Raise where drift or diffusion call a field outside its box at a state of a known path.

    What a drift hands to a field (one coordinate, a logarithm) is followed. Nothing is said where
    that depends on parameters, or where states are traced.

    Args:
        sde: the equation.
        times: shape `(*batch, T)`.
        states: shape `(*lead, T, *state)`; NaN is skipped.
        state_shape: `()` or `(d,)`.

    Raises:
        ValueError: naming how many states are outside.
    """
    traced = any(isinstance(a, jax.core.Tracer) for a in (times, states))
    if traced or not _has_field(sde.params):
        return
    x = np.asarray(states, float)
    x = x.reshape(-1, *state_shape)
    key: Any = (sde.drift, sde.diffusion, x.tobytes())
    try:
        if key in _passed:
            return
    except TypeError:  # a drift that holds arrays has no hash
        key = None
    t = np.broadcast_to(np.asarray(times, float), np.shape(states)[: -len(state_shape) or None])
    known = ~np.isnan(x.reshape(len(x), -1)).any(-1)
    margins = _margins(sde, t.reshape(-1)[known], x[known])
    if margins is not None and margins.size and margins.min() < 0:
        outside = np.asarray((margins < 0).any(-1))
        raise ValueError(
            f"{int(outside.sum())} of {len(outside)} states of the path are outside the box of a "
            f"field, by up to {-margins.min():.2g} half-widths: there the field is zero. Give it a "
            "box that reaches a length beyond the data on each side"
        )
    if key is not None:
        _passed.add(key)


def _has_field(params: Any) -> bool:
    leaves = jax.tree_util.tree_leaves(params, is_leaf=lambda n: isinstance(n, AbstractField))
    return any(isinstance(leaf, AbstractField) for leaf in leaves)


def _margins(sde: SDE, t: np.ndarray, x: np.ndarray) -> np.ndarray | None:
    """How far inside its box each field is called at each state; None if parameters decide."""

    def margins(one: SDE, t: Any, x: Any) -> list[Any]:
        with recorded_margins() as found:
            one.drift_at(t, x)
            one.diffusion_at(t, x)
        return found

    one = sde.unbatched_shapes()
    real = jnp.result_type(float)
    point = jax.ShapeDtypeStruct((), real), jax.ShapeDtypeStruct(x.shape[1:], real)
    jaxpr = jax.make_jaxpr(margins)(one, *point).jaxpr
    if not jaxpr.outvars or any(reachable(jaxpr, jaxpr.invars[:-2])):
        return None
    with jax.ensure_compile_time_eval():
        zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), one)
        each = jax.jit(jax.vmap(lambda t, x: jnp.stack(margins(zeros, t, x))))
        return np.asarray(each(jnp.asarray(t, real), jnp.asarray(x, real)))
