"""Exact transitions of a linear SDE under inputs and events.

Between two times at which something changes, a held input is a constant and a linear one a
straight line: the drift is `A x + b0 + b1 s` at time s after the start, and over a step h

    F = exp(A h),   c = h phi1(A h) b0 + h^2 phi2(A h) b1,

with `phi1(z) = (e^z - 1) / z`, `phi2(z) = (e^z - 1 - z) / z^2`, the covariance being that without
inputs (Van Loan 1978; Hochbruck and Ostermann 2010, "Exponential integrators", section 2). Both
integrals are blocks of one matrix exponential. An affine event `x -> G x + d` at the start makes
`F G` and `F d + c` of them.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_sde.linear import discretize
from numpyro_sde.linear.affine import degrees
from numpyro_sde.linear.small import matmul, matvec
from numpyro_sde.schemes.dependence import reaches_output
from numpyro_sde.schemes.events import ForcedScheme
from numpyro_sde.schemes.local_linear import phi1, phi2
from numpyro_sde.sde import SDE
from numpyro_sde.statespace.model import StateSpaceModel


def is_forced(model: StateSpaceModel) -> bool:
    """Whether inputs or events act on the path."""
    return isinstance(model.scheme, ForcedScheme)


def why_not_linear(model: StateSpaceModel) -> str:
    """Why the model is not linear under its inputs and events; empty where it is."""
    if model.num_times < 2:
        return ""
    t, _, cache = jax.tree.map(lambda a: a[0], model.step_inputs())
    x = jax.ShapeDtypeStruct((model.dim,), jnp.result_type(float))
    for number, (rule, (_, amount)) in enumerate(
        zip(cast("ForcedScheme", model.scheme).rules, cache.jumps, strict=True)
    ):

        def jump(x: Array, rule: Any = rule, amount: Any = amount) -> Array:
            return rule(model.to_state(x), amount, model.sde.params)

        if max(degrees(jump, x)) > 1:
            return f"events[{number}] of the path is not affine in the state"
    inside = model.in_step(t, cache)
    if max(degrees(lambda x: inside.drift(t, x), x)) > 1:
        return "drift is not affine in x"
    if max(degrees(lambda x: inside.factor(t, x), x)) > 0:
        return "diffusion depends on x"
    return ""


def varies_inside(model: StateSpaceModel) -> bool:
    """Whether coefficients change inside a step otherwise than the offset along a straight line."""
    if model.num_times < 2:
        return False
    t, _, cache = jax.tree.map(lambda a: a[0], model.step_inputs())
    state = model.to_state(jnp.ones(model.dim))
    return _varies(cast("ForcedScheme", model.scheme), model.sde, t, cache, state)


def path_varies_inside(path: Any) -> bool:
    """The same of a path law under inputs or events."""
    found = [False]

    def look(sde: Any, scheme: Any, times: Any, dt: Any, cache: Any) -> Array:
        del dt
        first = jax.tree.map(lambda a: jnp.asarray(a)[0], cache)
        found[0] = _varies(scheme, sde, jnp.asarray(times)[0], first, jnp.ones(path.state_shape))
        return jnp.zeros(())

    if path.num_times > 1:
        jax.eval_shape(lambda: path._map(look, path.batch_shape))
    return found[0]


def _varies(scheme: ForcedScheme, sde: SDE, start: Any, cache: Any, x: Array) -> bool:
    inside = scheme.during(sde, start, cache)

    def in_time(t: Array) -> tuple[Array, Array, Array]:
        A = jax.jacfwd(lambda x: inside.ito_drift_at(t, x))(x)
        return inside.ito_drift_at(t, x), A, inside.diffusion_columns_at(t, x)

    offset, slope, noise = degrees(in_time, jax.ShapeDtypeStruct((), jnp.result_type(float)))
    return offset > 1 or slope > 0 or noise > 0


def forced_rows(model: StateSpaceModel) -> np.ndarray:
    """Grid indices at which something may change."""
    return np.asarray(cast("ForcedScheme", model.scheme).rows, dtype=int)


def forced_transitions(model: StateSpaceModel, rows: np.ndarray) -> tuple[Array, Array, Array]:
    """Transitions between grid indices that hold all those of `forced_rows`.

    Args:
        model: a linear model under inputs and events.
        rows: increasing grid indices, n + 1 of them.

    Returns:
        `F (n, d, d)`, `c (n, d)` and `Q (n, d, d)`.
    """
    every = isinstance(model.times, np.ndarray)
    dt: Any = np.diff(model.times[rows]) if every else jnp.diff(jnp.asarray(model.times)[rows])
    times, _, cache = model.step_inputs()
    now = jax.tree.map(lambda a: a[rows[:-1]], (times, cache._replace(inner=None)))
    start, change = jax.vmap(lambda now: _offsets(model, now))(now)
    slope = None if _is_held(model) else change
    if _shares_matrices(model, now):
        first = jax.tree.map(lambda a: a[0], now)
        F, c, Q = _shared(*_matrices(model, first), start, slope, dt)
    else:
        A, L = jax.vmap(lambda now: _matrices(model, now))(now)
        F, c, Q = _separate(A, L, start, slope, jnp.asarray(dt))
    if not model.has_events:
        return F, c, Q

    def opening(cache: Any) -> tuple[Array, Array]:
        origin = jnp.zeros(model.dim, F.dtype)
        G = jax.jacfwd(lambda x: model.open_step(x, cache))(origin)
        return G, model.open_step(origin, cache)

    G, d = jax.vmap(opening)(now[1])
    return matmul(F, G), c + matvec(F, d), Q


def _offsets(model: StateSpaceModel, now: Any) -> tuple[Array, Array]:
    """Drift at the origin where a step starts, and its change with time."""
    t, cache = now
    origin = jnp.zeros(model.dim, jnp.result_type(float))
    inside = model.in_step(t, cache)
    return jax.jvp(lambda s: inside.drift(s, origin), (t,), (jnp.ones_like(t),))


def _matrices(model: StateSpaceModel, now: Any) -> tuple[Array, Array]:
    """What multiplies the state, and the diffusion."""
    t, cache = now
    origin = jnp.zeros(model.dim, jnp.result_type(float))
    inside = model.in_step(t, cache)
    return jax.jacfwd(lambda x: inside.drift(t, x))(origin), inside.factor(t, origin)


def _is_held(model: StateSpaceModel) -> bool:
    """Whether the drift stays the same inside a step."""
    t, _, cache = jax.tree.map(lambda a: a[0], model.step_inputs())
    at = jnp.zeros(model.dim)
    jaxpr = jax.make_jaxpr(lambda s: model.in_step(t, cache).drift(s, at))(t).jaxpr
    return not reaches_output(jaxpr, 0)


def _shares_matrices(model: StateSpaceModel, now: Any) -> bool:
    """Whether no input enters what multiplies the state, or the diffusion."""
    first = jax.tree.map(lambda a: a[0], now)
    leaves, treedef = jax.tree_util.tree_flatten(first)

    def matrices(*leaves: Any) -> Any:
        return _matrices(model, jax.tree_util.tree_unflatten(treedef, leaves))

    jaxpr = jax.make_jaxpr(matrices)(*leaves).jaxpr
    return not any(reaches_output(jaxpr, k) for k in range(len(leaves)))


def _shared(
    A: Array, L: Array, start: Array, slope: Array | None, dt: Any
) -> tuple[Array, Array, Array]:
    """Transitions of one matrix and one diffusion: the exponentials depend on the lengths alone."""
    d = A.shape[0]
    if d == 1:
        n = start.shape[0]
        each = jnp.broadcast_to(A, (n, 1, 1)), jnp.broadcast_to(L, (n, *L.shape))
        return _scalar(*each, start, slope, jnp.asarray(dt, start.dtype))
    # [A I 0; 0 0 I; 0 0 0]: the exponential's first row holds F, h phi1 and h^2 phi2.
    blocks = 2 if slope is None else 3
    wide = jnp.zeros((blocks * d, blocks * d), A.dtype).at[:d, :d].set(A)
    for k in range(blocks - 1):
        wide = wide.at[k * d : (k + 1) * d, (k + 1) * d : (k + 2) * d].set(jnp.eye(d))
    noise = jnp.zeros((blocks * d, L.shape[1]), L.dtype).at[:d].set(L)
    F, _, Q = discretize.transitions(wide, jnp.zeros(blocks * d, A.dtype), noise, dt)
    c = matvec(F[:, :d, d : 2 * d], start)
    if slope is not None:
        c = c + matvec(F[:, :d, 2 * d :], slope)
    return F[:, :d, :d], c, Q[:, :d, :d]


def _separate(
    A: Array, L: Array, start: Array, slope: Array | None, dt: Array
) -> tuple[Array, Array, Array]:
    """Transitions of steps with matrices of their own."""
    d = A.shape[-1]
    if d == 1:
        return _scalar(A, L, start, slope, dt.astype(start.dtype))
    if slope is None:
        return jax.vmap(discretize.transition)(A, start, L, dt)

    def one(A: Array, L: Array, start: Array, slope: Array, h: Array) -> Any:
        # Time since the start as one more state, without noise.
        wide = jnp.zeros((d + 1, d + 1), A.dtype).at[:d, :d].set(A).at[:d, d].set(slope)
        noise = jnp.concatenate([L, jnp.zeros((1, L.shape[1]), L.dtype)])
        F, c, Q = discretize.transition(wide, jnp.append(start, 1.0), noise, h)
        return F[:d, :d], c[:d], Q[:d, :d]

    F, c, Q = jax.vmap(one)(A, L, start, slope, dt)
    return F, c, Q


def _scalar(
    A: Array, L: Array, start: Array, slope: Array | None, dt: Array
) -> tuple[Array, Array, Array]:
    z = A[:, 0, 0] * dt
    c = start[:, 0] * dt * phi1(z)
    if slope is not None:
        c = c + slope[:, 0] * dt**2 * phi2(z)
    Q = jnp.sum(L[:, 0] ** 2, axis=-1) * dt * phi1(2.0 * z)
    return jnp.exp(z)[:, None, None], c[:, None], Q[:, None, None]
