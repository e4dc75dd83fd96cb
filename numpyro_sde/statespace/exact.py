"""Components of the state that are seen without noise: conditioned on, not weighed.

A step from x has the next state `x' = mu + B w`, `w ~ N(0, I)`, and a reading says `C x' = y`. With
`S = C B B' C'` the innovations given it are normal with mean `w* = B'C' S^-1 (y - C mu)` and the
projection `P = I - B'C' S^-1 C B` for a covariance, so the step given the reading is

    x' = (mu + B w*) + (B P) zeta,   zeta ~ N(0, I),   p(y | x) = N(y; C mu, S),

a step like any other, with a factor of lower rank; directions of zeta that P removes stay standard
normal. Along a linearised path, `mu = A d + c`, the matrix becomes `A - B (CB)' S^-1 C A`, and the
reading says `A'C' S^-1 C A` about the state before the step. Where the transition is normal this is
exact whatever the drift. The density is that of y in its own units (Lebesgue's measure).

Source: conditioning of normal laws by kriging (Rue and Held 2005, section 2.3.3); its use in
guided filters is that of Whiteley and Lee (2014) with a point mass for an emission.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from numpyro_sde.linear.affine import degrees
from numpyro_sde.linear.small import cholesky, diagonal, matmul, matvec, solve_lower, transpose
from numpyro_sde.schemes.base import GaussianScheme
from numpyro_sde.schemes.events import ForcedScheme
from numpyro_sde.statespace.model import Instrument, StateSpaceModel
from numpyro_sde.statespace.updates import LOG_2PI, with_valid_inputs


class Readings(NamedTuple):
    """What is seen exactly at each grid time: `C x = v` where present.

    Attributes:
        C: observation matrices, `(N, q, d)`, or one time's `(q, d)`.
        v: readings less the emission's offset, `(N, q)`.
        present: which of them there are, `(N, q)`.
    """

    C: Float[Array, "N q d"]
    v: Float[Array, "N q"]
    present: Bool[Array, "N q"]

    def at(self, index: int) -> Readings:
        """The readings of one time."""
        return Readings(self.C[index], self.v[index], self.present[index])


class Conditioned(NamedTuple):
    """A step given the readings at its end.

    Attributes:
        mean: its mean, `(d,)`.
        factor: factor of its noise, `(d, m)`, of lower rank.
        log_density: of the readings, given the state before the step.
        white: readings' deviations from the mean, whitened, `(q,)`.
        rows: what they say of the innovations, orthonormal rows `(q, m)`.
        chol: lower factor of their covariance, `(q, q)`.
    """

    mean: Float[Array, " d"]
    factor: Float[Array, "d m"]
    log_density: Float[Array, ""]
    white: Float[Array, " q"]
    rows: Float[Array, "q m"]
    chol: Float[Array, "q q"]


def has_exact(model: StateSpaceModel) -> bool:
    """Whether anything is seen without noise."""
    return any(instrument.exact for instrument in model.instruments)


def noisy(model: StateSpaceModel) -> tuple[Instrument, ...]:
    """The instruments with noise."""
    return tuple(i for i in model.instruments if not i.exact)


def check_affine(model: StateSpaceModel, method: str) -> None:
    """Raise a `ValueError` where what is seen exactly is no affine function of the state."""
    x = jax.ShapeDtypeStruct((model.dim,), jnp.result_type(float))
    for instrument in model.instruments:
        if not instrument.exact:
            continue
        inputs = jax.tree.map(lambda a: jnp.asarray(a)[0], instrument.inputs)
        if max(degrees(lambda x, i=instrument, u=inputs: i.moments(u, x)[0], x)) > 1:  # type: ignore[misc]
            raise ValueError(
                f"{method} conditions on a Delta emission exactly where it is affine in the state, "
                "and this one is not: transform the state so that it is (the log of a positive "
                "state), or give the emission a small noise"
            )


def check_conditioning(model: StateSpaceModel, method: str) -> None:
    """Raise a `ValueError` where steps cannot be conditioned on what is seen exactly."""
    if not has_exact(model):
        return
    check_affine(model, method)
    if not model.init_gaussian and reads_start(model):
        raise ValueError(
            f"{method} conditions the first state on a Delta emission at the path's first time, "
            "which needs a normal init: give it one, or leave that reading out (NaN)"
        )
    if not isinstance(model.scheme, GaussianScheme):
        raise ValueError(
            f"{method} conditions each step on a Delta emission, which needs a normal transition; "
            f"{type(model.scheme).__name__} has none: use LocalLinear() or Euler()"
        )
    _refuse_unreached(model, method)


def reads_start(model: StateSpaceModel) -> bool:
    """Whether something may be seen exactly at the first time."""
    return any(i.exact and 0 in np.asarray(i.rows) for i in model.instruments)


def without_known_start(model: StateSpaceModel) -> StateSpaceModel:
    """The model without exact readings of what its start knows already.

    They say nothing more: whether they agree is `start_agrees`.
    """
    if model.init_kind != "normal" or not reads_start(model):
        return model
    agrees = jnp.zeros((), model.init_mean.dtype)
    instruments = []
    for instrument in model.instruments:
        if not (instrument.exact and 0 in np.asarray(instrument.rows)):
            instruments.append(instrument)
            continue
        inputs = jax.tree.map(lambda a: jnp.asarray(a)[0], instrument.inputs)

        def mean_at(x: Array, instrument: Instrument = instrument, inputs: Any = inputs) -> Array:
            return instrument.moments(inputs, x)[0]

        C = jax.jacfwd(mean_at)(model.init_mean)
        known = jnp.sum(matmul(C, model.init_cov) * C, axis=-1) == 0.0
        present = jnp.asarray(instrument.present)
        y, m = jnp.asarray(instrument.values)[0], mean_at(model.init_mean)
        near = jnp.sqrt(jnp.finfo(m.dtype).eps) * (1.0 + jnp.abs(y))
        disagree = jnp.any(present[0] & known & (jnp.abs(y - m) > near))
        agrees = agrees + jnp.where(disagree, -jnp.inf, 0.0)
        left = present.at[0].set(present[0] & ~known)
        instruments.append(instrument._replace(present=left))
    return model._replace(instruments=tuple(instruments), start_agrees=agrees)


def refuse_contradiction(model: StateSpaceModel) -> None:
    """Raise where exact readings of one time cannot all be: of one component, or of none.

    What can be seen before tracing: matrices that depend on no parameter, data known by then.

    Raises:
        ValueError: naming the remedy.
    """
    exact = [i for i in model.instruments if i.exact]
    if not exact or not all(isinstance(i.present, np.ndarray) for i in exact):
        return
    matrices = [_matrix_before_tracing(i, model.dim) for i in exact]
    if any(C is None for C in matrices):
        return
    C = np.concatenate([np.asarray(C) for C in matrices])
    present = np.concatenate([i.present for i in exact], axis=-1)
    for seen in np.unique(present, axis=0):
        if np.linalg.matrix_rank(C[seen]) < seen.sum():
            row = int(np.flatnonzero((present == seen).all(axis=-1))[0])
            raise ValueError(
                f"{int(seen.sum())} readings without noise (Delta emissions) at row {row} of the "
                "path are of one component of the state, or of none: they contradict each other, "
                "or say the same twice. Leave all but one out (NaN), or give them a noise"
            )


def _matrix_before_tracing(instrument: Instrument, dim: int) -> Any:
    """The matrix of an affine emission that depends on nothing traced, else None."""
    found: list[np.ndarray] = []

    def matrix(size: float) -> Array:
        inputs = _filled(instrument.inputs, size)
        x = jnp.full(dim, size, jnp.result_type(float))
        return jax.jacfwd(lambda x: instrument.moments(inputs, x)[0])(x)

    with jax.ensure_compile_time_eval():
        for size in (0.3, 0.7):
            C = matrix(size)
            if isinstance(C, jax.core.Tracer):
                return None
            found.append(np.asarray(C))
    return found[0] if np.array_equal(found[0], found[1]) else None


def _filled(inputs: Any, size: float) -> Any:
    """One time's inputs, all of them one number."""
    return jax.tree.map(lambda a: jnp.full(jnp.shape(a)[1:], size, jnp.result_type(a)), inputs)


def _refuse_unreached(model: StateSpaceModel, method: str) -> None:
    """Raise where a step's noise does not reach what is seen exactly, whatever the parameters.

    Raises:
        ValueError: naming the remedy.
    """
    scheme: Any = model.scheme.inner if isinstance(model.scheme, ForcedScheme) else model.scheme
    exact = [_matrix_before_tracing(i, model.dim) for i in model.instruments if i.exact]
    if model.sde.inputs is not None or any(C is None for C in exact) or not model.num_times > 1:
        return
    times = np.array([0.0, 0.1])
    with jax.ensure_compile_time_eval():
        leaves, treedef = jax.tree_util.tree_flatten(model.sde)
        sde = jax.tree_util.tree_unflatten(
            treedef, [jnp.full(jnp.shape(a), 0.3 + 0.1 * k) for k, a in enumerate(leaves)]
        )
        cache = scheme.prepare(sde, times, np.diff(times))
        now = jax.tree.map(lambda a: a[0], cache)
        x = model.to_state(jnp.full(model.dim, 0.4))
        B = scheme.moments(sde, jnp.asarray(0.0), jnp.asarray(0.1), x, now)[1]
        if isinstance(B, jax.core.Tracer):
            return
        B = np.asarray(B).reshape(model.dim, -1) if jnp.ndim(B) != 1 else np.diag(np.asarray(B))
    for C in exact:
        reached = np.abs(C @ B).max(axis=-1)
        if np.any((reached == 0.0) & (np.abs(C).max(axis=-1) > 0.0)):
            raise ValueError(
                f"{method} conditions each step on what is seen exactly (a Delta emission), and a "
                f"step of {type(scheme).__name__} brings no noise to it: use LocalLinear(), which "
                "carries the noise of other components to it"
            )


def refuse_exact(model: StateSpaceModel, method: str) -> None:
    """Raise a `ValueError` for a method that would weigh what must be conditioned on."""
    if has_exact(model):
        raise ValueError(
            f"{method}: states that are drawn without regard to a component seen exactly (a Delta "
            "emission) have density zero. Use what conditions on it: Kalman(), ExtendedKalman(), "
            "reparam.GuidedReparam or Particle(proposal='guided'); or give the emission a small "
            "noise"
        )


def readings(model: StateSpaceModel) -> Readings:
    """All that is seen exactly, at each grid time."""
    model = with_valid_inputs(model)
    origin = jnp.zeros(model.dim, model.init_mean.dtype)
    parts = []
    for instrument in model.instruments:
        if not instrument.exact:
            continue

        def of(inputs: Array, instrument: Instrument = instrument) -> tuple[Array, Array]:
            C = jax.jacfwd(lambda x: instrument.moments(inputs, x)[0])(origin)
            return C, instrument.moments(inputs, origin)[0]

        C, offset = jax.vmap(of)(instrument.inputs)
        present = jnp.asarray(instrument.present)
        v = jnp.where(present, instrument.values - offset, 0.0)
        parts.append((jnp.where(present[..., None], C, 0.0), v, present))
    C, v, present = (jnp.concatenate(each, axis=1) for each in zip(*parts, strict=True))
    return Readings(C, v, present)


def condition(mean: Float[Array, " d"], B: Float[Array, "..."], seen: Readings) -> Conditioned:
    """Condition `x' = mean + B w` on the readings of its time.

    Args:
        mean: the step's mean.
        B: factor of its noise, `(d, m)`, or `(d,)` where it is diagonal.
        seen: the readings at its end.

    Returns:
        The step given them; NaN where their covariance is singular.

    Example:
        >>> import jax.numpy as jnp
        >>> seen = Readings(jnp.array([[1.0, 0.0]]), jnp.array([2.0]), jnp.array([True]))
        >>> step = condition(jnp.zeros(2), jnp.array([[1.0, 0.0], [1.0, 1.0]]), seen)
        >>> step.mean.tolist(), step.factor.tolist()
        ([2.0, 2.0], [[0.0, 0.0], [0.0, 1.0]])
    """
    B = jnp.diag(B) if B.ndim == 1 else B
    CB = matmul(seen.C, B)
    # A reading that is missing: one of unit noise of its own, whose deviation is zero.
    alone = jnp.diag(jnp.where(seen.present, 0.0, 1.0).astype(CB.dtype))
    chol = cholesky(matmul(CB, transpose(CB)) + alone)
    residual = jnp.where(seen.present, seen.v - matvec(seen.C, mean), 0.0)
    solved = solve_lower(chol, jnp.concatenate([residual[:, None], CB], axis=1))
    white, rows = solved[:, 0], solved[:, 1:]
    log_density = -0.5 * jnp.sum(white**2) - jnp.sum(jnp.log(diagonal(chol)))
    return Conditioned(
        mean + matvec(B, matvec(transpose(rows), white)),
        B - matmul(matmul(B, transpose(rows)), rows),
        log_density - 0.5 * LOG_2PI * jnp.sum(seen.present),
        white,
        rows,
        chol,
    )


def condition_linear(
    A: Float[Array, "d d"],
    c: Float[Array, " d"],
    B: Float[Array, "..."],
    seen: Readings,
    reference: Float[Array, " d"],
) -> tuple[Array, Array, Array, Array, Array]:
    """Condition a linearised step `d' = A d + c + B w`, deviations from a reference.

    Args:
        A: its matrix.
        c: its offset.
        B: factor of its noise.
        seen: the readings at its end.
        reference: the reference there.

    Returns:
        Matrix, offset and factor given the readings; precision and information vector that they
        add to the state before the step.
    """
    deviations = seen._replace(v=jnp.where(seen.present, seen.v - matvec(seen.C, reference), 0.0))
    given = condition(c, B, deviations)
    wide = jnp.diag(B) if B.ndim == 1 else B
    half = solve_lower(given.chol, matmul(seen.C, A))
    A = A - matmul(matmul(wide, transpose(given.rows)), half)
    return (
        A,
        given.mean,
        given.factor,
        matmul(transpose(half), half),
        matvec(transpose(half), given.white),
    )


def free_part(w: Float[Array, " m"], given: Conditioned) -> Float[Array, " m"]:
    """The part of innovations that the readings leave free."""
    return w - matvec(transpose(given.rows), matvec(given.rows, w))
