"""Guided steps with something learned on top: the recursions behind every path law.

The guide (`numpyro_sde.statespace.guide`) draws each step's innovations from their law given the
observations to come, in a model linearised along a reference path: with the precision
`I + B'H B = L L'` and the pull `r = B'(e - H ahead)`, `w = L^-T (L^-1 r + z)`, `z ~ N(0, I)`.
A path law adds a shift and a factor in these whitened coordinates,

    w = L^-T (L^-1 r + shift + factor z),

both functions of the state, so that a new law (shift 0, factor 1) is the guide itself: the exact
smoothing law of a linear-Gaussian model, whatever its parameters. With a shift of order
`sqrt(dt)` this is the posterior SDE `dX = (f + sigma u) dt + sigma dW` with a control `u` added to
the guided one; the factor lets it tighten the noise, without which the bound keeps a gap of the
order of the step (Euler keeps the model's variance at every step, the posterior does not).

Two recursions share this. A controlled path runs the model's own scheme. A Gaussian path runs
the model linearised along the reference, with shifts affine in the state: its law is Gaussian
with a block-tridiagonal precision, and every such law with the model's factors can be reached.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from numpyro_sde.linear.information import (
    LinearizedSteps,
    backward_information,
    innovation_precision,
)
from numpyro_sde.linear.small import cholesky, diagonal, matvec, solve_lower, transpose
from numpyro_sde.schemes.base import GaussianScheme
from numpyro_sde.statespace.guide import Guide, affine_step, linearize_along
from numpyro_sde.statespace.model import StateSpaceModel

# A positive process is expected to keep this share of its value over a step.
_LEAST_SHARE = 0.1

# `control(local, x, pull)` gives a shift `(m,)` and a factor: log scales `(m,)`, or `(m, m)`,
# lower triangular, the logarithm of its diagonal in place of it.
Control = Callable[[Any, "Pull"], tuple[Array, Array]]


class Pull(NamedTuple):
    """One step seen from its start.

    Attributes:
        x: the state, `(d,)`; of a Gaussian path the deviation from the reference.
        mean: mean of the next state under the model, `(d,)`, of the same kind.
        B: factor of its noise, `(d, m)` or `(d,)`.
        half: the guide's pull on the whitened innovations, `L^-1 r`, `(m,)`.
        L: factor of their precision, `(m, m)`.
    """

    x: Array
    mean: Array
    B: Array
    half: Array
    L: Array


class Along(NamedTuple):
    """A guide along a reference path with the linear model that it is made from."""

    guide: Guide
    linear: LinearizedSteps


def guide_along(model: StateSpaceModel, reference: Float[Array, "N d"]) -> Along:
    """Linearise along a reference and gather the observations backward."""
    linear = linearize_along(model, reference)
    return Along(Guide(reference, *backward_information(linear)), linear)


def pull_of(H: Array, e: Array, x: Array, mean: Array, ahead: Array, B: Array) -> Pull:
    """The guide's pull; `ahead` is the step's mean less the reference at the next time."""
    r = e - matvec(H, ahead)
    r = B * r if B.ndim == 1 else matvec(transpose(B), r)
    L = cholesky(innovation_precision(H, B))
    return Pull(x, mean, B, solve_lower(L, r[:, None])[:, 0], L)


def _transform(control: Control, local: Any, pull: Pull, z: Array) -> tuple[Array, Array]:
    """Innovations of standard normals, and the log of the Jacobian's determinant."""
    shift, factor = control(local, pull)
    if factor.ndim == 1:
        v, log_det = pull.half + shift + jnp.exp(factor) * z, jnp.sum(factor)
    else:
        v = pull.half + shift + matvec(_unpack_factor(factor), z)
        log_det = jnp.sum(diagonal(factor))
    w = solve_lower(pull.L, v[:, None], transposed=True)[:, 0]
    return w, log_det - jnp.sum(jnp.log(diagonal(pull.L)))


def _whiten(
    control: Control, local: Any, pull: Pull, w: Array, known: Array | None
) -> tuple[Array, Array]:
    """The standard normals behind innovations, and the same log determinant.

    Where they are known, the map gives their derivatives alone. Recovered from a path in float32
    they are rounding where a factor is small, and a bound made of them rewards small factors.
    """
    shift, factor = control(local, pull)
    v = matvec(transpose(pull.L), w) - pull.half - shift
    if factor.ndim == 1:
        z, log_det = v * jnp.exp(-factor), jnp.sum(factor)
    else:
        z = solve_lower(_unpack_factor(factor), v[:, None])[:, 0]
        log_det = jnp.sum(diagonal(factor))
    return hold_value(z, known), log_det - jnp.sum(jnp.log(diagonal(pull.L)))


def hold_value(z: Array, known: Array | None) -> Array:
    """Normals with their known value and the derivatives of the map that recovers them.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.guides.steps import hold_value
        >>> hold_value(jnp.array(1.5), jnp.array(2.0)).item()
        2.0
    """
    return z if known is None else known + (z - lax.stop_gradient(z))


def _unpack_factor(factor: Array) -> Array:
    return jnp.tril(factor, -1) + jnp.diag(jnp.exp(diagonal(factor)))


class DrawnPath(NamedTuple):
    """States and the law's log density, both given the first state."""

    states: Float[Array, "N d"]
    log_density: Float[Array, ""]


def draw_controlled(
    model: StateSpaceModel, along: Along, control: Control, local: Any, x0: Array, z: Array
) -> DrawnPath:
    """Run the model's scheme with controlled innovations.

    A positive process moves by the factor `exp(B w / mean)` where the scheme would add `B w`: the
    same to first order, and never negative.

    Args:
        model: the path and its instruments.
        along: the guide.
        control: what is learned.
        local: its inputs at each step, leading axis `N - 1`.
        x0: first state, `(d,)`.
        z: standard normals, `(N - 1, *innovations)`.
    """
    if model.num_times == 1:
        return DrawnPath(x0[None], jnp.zeros((), x0.dtype))
    shape, flat = z.shape[1:], jnp.reshape(z, (z.shape[0], -1))
    scheme, direct = model.scheme, _is_direct(model)

    def step(x: Array, inputs: Any) -> tuple[Array, Any]:
        now, H, e, following, local, z = inputs
        t, dt, cache = now
        mean, B = _step_from(model, t, dt, x, cache)
        w, log_det = _transform(control, local, pull_of(H, e, x, mean, mean - following, B), z)
        if direct:
            new, more = _move(model, mean, B, w)
            log_det = log_det + more
        else:
            state = scheme.step(model.sde, t, dt, model.to_state(x), jnp.reshape(w, shape), cache)
            new = jnp.reshape(state, (model.dim,))
        new = new.astype(x.dtype)
        return new, (new, w, log_det)

    inputs = (model.step_inputs(), *_ahead(along), local, flat)
    _, (rest, w, log_det) = lax.scan(jax.checkpoint(step), x0, inputs)
    states = jnp.concatenate([x0[None], rest])
    return DrawnPath(states, _log_density(model, states, w, flat, log_det))


def weigh_controlled(
    model: StateSpaceModel,
    along: Along,
    control: Control,
    local: Any,
    states: Array,
    normals: Array | None = None,
) -> Float[Array, ""]:
    """Log density of a path given its first state; all steps at once, no recursion.

    Args:
        model: the path and its instruments.
        along: the guide.
        control: what is learned.
        local: its inputs at each step.
        states: the path, `(N, d)`.
        normals: those that it was drawn from, where known, `(N - 1, *innovations)`.
    """
    if model.num_times == 1:
        return jnp.zeros((), states.dtype)
    scheme, direct = model.scheme, _is_direct(model)

    def step(x: Array, new: Array, inputs: Any) -> tuple[Array, Array, Array]:
        (t, dt, cache), H, e, following, local, known = inputs
        mean, B = _step_from(model, t, dt, x, cache)
        more: Any = 0.0
        if direct:
            w, more = _moved_by(model, mean, B, new)
        else:
            state, following_state = model.to_state(x), model.to_state(new)
            w = jnp.ravel(scheme.invert(model.sde, t, dt, state, following_state, cache))
        pull = pull_of(H, e, x, mean, mean - following, B)
        z, log_det = _whiten(control, local, pull, w, known)
        return w, z, log_det + more

    inputs = (model.step_inputs(), *_ahead(along), local, _flat(normals))
    w, z, log_det = jax.vmap(step)(states[:-1], states[1:], inputs)
    return _log_density(model, states, w, z, log_det)


def _is_direct(model: StateSpaceModel) -> bool:
    """Whether a step is its mean plus its factor times the innovations, nothing carried."""
    return isinstance(model.scheme, GaussianScheme) and model.state_shape is None


def _log_density(
    model: StateSpaceModel, states: Array, w: Array, z: Array, log_det: Array
) -> Array:
    if _is_direct(model):
        return jnp.sum(log_normal(z)) - jnp.sum(log_det)
    # The step's own Jacobian is in the model's density: the laws differ in the innovations only.
    ratio = 0.5 * jnp.sum(w**2) - 0.5 * jnp.sum(z**2) - jnp.sum(log_det)
    path = model.visible(states)
    density = model.scheme.log_density_sum(model.sde, model.times, model.dt, path, model.cache)
    return ratio + density


def _step_from(
    model: StateSpaceModel, t: Any, dt: Any, x: Array, cache: Any
) -> tuple[Array, Array]:
    mean, B = affine_step(model, t, dt, x, cache)
    if model.sde.positive and _is_direct(model):
        mean = jnp.maximum(mean, _LEAST_SHARE * x)
    return mean, B


def _move(model: StateSpaceModel, mean: Array, B: Array, w: Array) -> tuple[Array, Array]:
    """Next state of innovations, and the log of the Jacobian's determinant."""
    gap = B * w if B.ndim == 1 else matvec(B, w)
    log_det = _log_det(B, model.dim)
    if model.sde.positive:
        return mean * jnp.exp(gap / mean), log_det + jnp.sum(gap / mean)
    return mean + gap, log_det


def _moved_by(model: StateSpaceModel, mean: Array, B: Array, new: Array) -> tuple[Array, Array]:
    """Innovations that lead to a state, and the same log determinant."""
    gap, log_det = new - mean, _log_det(B, model.dim)
    if model.sde.positive:
        gap = mean * jnp.log(new / mean)
        log_det = log_det + jnp.sum(gap / mean)
    return (gap / B if B.ndim == 1 else jnp.linalg.solve(B, gap)), log_det


def _flat(normals: Array | None) -> Array | None:
    return None if normals is None else jnp.reshape(normals, (normals.shape[0], -1))


def _ahead(along: Along) -> tuple[Array, Array, Array]:
    guide = along.guide
    return guide.H[1:], guide.e[1:], guide.reference[1:]


class GaussianDraw(NamedTuple):
    """Deviations from the reference and the log density of those after the first."""

    deviations: Float[Array, "N d"]
    log_density: Float[Array, ""]


def draw_gaussian(
    along: Along, control: Control, local: Any, d0: Array, z: Array, num_free: int
) -> GaussianDraw:
    """Run the linearised model with controlled innovations.

    Args:
        along: the guide and the linear model.
        control: what is learned, affine in the deviation.
        local: its inputs at each step, leading axis `N - 1`.
        d0: deviation of the first state, `(d,)`.
        z: standard normals, `(N - 1, m)`.
        num_free: components of the state that have a density, as many as there are noises.
    """

    def step(d: Array, inputs: Any) -> tuple[Array, Any]:
        (A, c, B), H, e, local, z = inputs
        mean = matvec(A, d) + c
        w, log_det = _transform(control, local, pull_of(H, e, d, mean, mean, B), z)
        new = mean + (B * w if B.ndim == 1 else matvec(B, w))
        return new, (new, log_det + _log_det(B, num_free))

    inputs = (along.linear[:3], along.guide.H[1:], along.guide.e[1:], local, z)
    _, (rest, log_det) = lax.scan(jax.checkpoint(step), d0, inputs)
    log_density = jnp.sum(log_normal(z)) - jnp.sum(log_det)
    return GaussianDraw(jnp.concatenate([d0[None], rest]), log_density)


def weigh_gaussian(
    along: Along,
    control: Control,
    local: Any,
    free: Float[Array, "N u"],
    normals: Array | None = None,
) -> Float[Array, ""]:
    """Log density of deviations after the first; of a state with a memory its free part."""
    num_free = free.shape[1]
    dim = along.guide.reference.shape[1]

    def step(d: Array, inputs: Any) -> tuple[Array, Array]:
        (A, c, B), H, e, local, new, known = inputs
        mean = matvec(A, d) + c
        gap = new - mean[:num_free]
        w = gap / B if B.ndim == 1 else jnp.linalg.solve(B[:num_free], gap)
        z, log_det = _whiten(control, local, pull_of(H, e, d, mean, mean, B), w, known)
        d = mean + (B * w if B.ndim == 1 else matvec(B, w))
        return d, jnp.sum(log_normal(z)) - log_det - _log_det(B, num_free)

    d0 = jnp.pad(free[0], (0, dim - num_free))
    inputs = (
        along.linear[:3],
        along.guide.H[1:],
        along.guide.e[1:],
        local,
        free[1:],
        _flat(normals),
    )
    _, terms = lax.scan(jax.checkpoint(step), d0, inputs)
    return jnp.sum(terms)


def _log_det(B: Array, num_free: int) -> Array:
    if B.ndim == 1:
        return jnp.sum(jnp.log(jnp.abs(B)))
    if num_free == 1:
        return jnp.log(jnp.abs(B[0, 0]))
    return jnp.linalg.slogdet(B[:num_free])[1]


def log_normal(z: Array) -> Array:
    """Log density of standard normals, each."""
    return -0.5 * (z**2 + jnp.log(2.0 * jnp.pi))
