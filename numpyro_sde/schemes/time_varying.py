"""Linear SDEs whose coefficients change in time: their transition to rounding, where it converges.

`dX = (A(t) X + b(t)) dt + L(t) dW` has a Gaussian transition `N(F x + c, Q)` with
`Phi' = A Phi`, `F = Phi(dt)`, `c = F int Phi^-1 b`, `Q = F (int Phi^-1 L L' Phi^-T) F'`. All three
are integrated by the Gauss collocation method with three stages, of order 6 (Hairer, Lubich and
Wanner 2006, Geometric Numerical Integration, sections II.1 and IV.2). It is a Runge-Kutta method
with positive weights, so Q is a sum of squares and a factor of it comes without a subtraction
(Dieci and Eirola 1994, "Positive definiteness in the numerical solution of Riccati differential
equations"). A step of the grid is taken in eight and, to compare, in four: where the two differ
by more than 60 times the accuracy that is promised, which is their difference in error, the
transition is NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool

from numpyro_sde.linear.small import diagonal, matmul, matvec, outer, transpose, tria
from numpyro_sde.schemes.base import GaussianScheme
from numpyro_sde.schemes.generator import as_point

if TYPE_CHECKING:
    from numpyro_sde.sde import SDE

_R = np.sqrt(15.0)
_NODES = np.array([0.5 - _R / 10, 0.5, 0.5 + _R / 10])
_WEIGHTS = np.array([5 / 18, 4 / 9, 5 / 18])
_STAGES = np.array(
    [
        [5 / 36, 2 / 9 - _R / 15, 5 / 36 - _R / 30],
        [5 / 36 + _R / 24, 2 / 9, 5 / 36 - _R / 24],
        [5 / 36 + _R / 30, 2 / 9 + _R / 15, 5 / 36],
    ]
)


_PAIRS = 4


class _Step(NamedTuple):
    """`F`, `c` and columns whose product with their transpose is Q."""

    F: Array
    c: Array
    columns: Array


class _Size(NamedTuple):
    """`int |A|`, `int |b|`: what errors of F and c are measured against."""

    F: Array
    c: Array


class TimeVaryingLinear(GaussianScheme):
    """Transition of a linear SDE with additive noise whose coefficients change smoothly in time.

    The drift must be affine in the state and the diffusion free of it (`filters.Kalman`, which
    takes this scheme where no other was chosen, proves both by tracing). Accurate to 2e-8 of the
    size of each element in float64 and to 2e-6 in float32; NaN where a step of the grid is too
    long for that against the change of the coefficients or the fastest rate, or where they jump
    inside a step: refine the grid, with the jumps on it.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> from numpyro_sde.schemes.time_varying import TimeVaryingLinear
        >>> sde = nsde.SDE(lambda t, x: -2.0 * t * x, lambda t, x: 0.5)  # mean exp(-t^2) x
        >>> mean, _ = TimeVaryingLinear().moments(sde, jnp.array(0.0), 0.5, jnp.array(1.0))
        >>> round(float(mean), 4)
        0.7788
    """

    def innovation_shape(self, sde: SDE, state_shape: tuple[int, ...]) -> tuple[int, ...]:  # noqa: ARG002
        return state_shape

    def moments(
        self, sde: SDE, t: Array, dt: Array, x: Array, cache: Any = None
    ) -> tuple[Array, Array]:
        del cache
        t, x = as_point(t, x)
        d = max(x.size, 1)
        eye, zero = jnp.eye(d, dtype=x.dtype), jnp.zeros(d, x.dtype)
        h = dt / _PAIRS

        def pair(carry: tuple[_Step, _Step, _Size], i: Array) -> tuple[Any, None]:
            coarse, fine, size = carry
            # The whole step and its halves at once: one copy of the drift's code.
            starts = t + (i + jnp.array([0.0, 0.0, 0.5], x.dtype)) * h
            lengths = jnp.array([1.0, 0.5, 0.5], x.dtype) * h
            steps, sizes = jax.vmap(lambda s, length: _collocate(sde, s, length, x))(
                starts, lengths
            )
            whole, *halves = (jax.tree.map(lambda v, k=k: v[k], steps) for k in range(3))
            for half in halves:
                fine = _after(fine, half)
            size = _Size(size.F + sizes.F[0], size.c + sizes.c[0])
            return (_after(coarse, whole), fine, size), None

        still = _Step(eye, zero, 0 * eye)
        index = jnp.arange(_PAIRS, dtype=x.dtype)
        start = (still, still, _Size(0 * eye, zero))
        (coarse, fine, size), _ = lax.scan(jax.checkpoint(pair), start, index)
        settled = lax.stop_gradient(_agree(coarse, fine, size))
        F, c, factor = fine
        mean = matvec(F, jnp.reshape(x, F.shape[:1])) + c
        mean = jnp.where(settled, mean, jnp.nan)
        factor = jnp.where(settled, factor, jnp.nan)
        return (mean[0], factor[0, 0]) if x.ndim == 0 else (mean, factor)


def _after(first: _Step, second: _Step) -> _Step:
    columns = jnp.concatenate([matmul(second.F, first.columns), second.columns], axis=1)
    return _Step(matmul(second.F, first.F), matvec(second.F, first.c) + second.c, tria(columns))


def _collocate(sde: SDE, t: Array, h: Array, x: Array) -> tuple[_Step, _Size]:
    """One step of Gauss's method from t over h; `x` gives the shape of the state."""
    origin = jnp.zeros_like(x)
    d = max(x.size, 1)

    def at(s: Array) -> tuple[Array, Array, Array]:
        A = jax.jacfwd(lambda y: sde.ito_drift_at(s, y))(origin)
        L = sde.diffusion_columns_at(s, origin)
        return A.reshape(d, d), sde.ito_drift_at(s, origin).reshape(d), L.reshape(d, -1)

    A, b, L = (v.astype(x.dtype) for v in jax.vmap(at)(t + h * _NODES.astype(x.dtype)))
    w, a = h * _WEIGHTS.astype(x.dtype), h * _STAGES.astype(x.dtype)
    eye = jnp.eye(d, dtype=x.dtype)
    start = jnp.concatenate([jnp.tile(eye, (3, 1)), (a @ b).reshape(-1, 1)], axis=1)
    X = _stages(a, A, start).reshape(3, d, d + 1)
    moved = jnp.einsum("i,ijk,ikl->jl", w, A, X) + jnp.append(0 * eye, (w @ b)[:, None], axis=1)
    F, c = eye + moved[:, :d], moved[:, d]
    # Y_i, stage values of the inverse of the fundamental matrix, as their transposes
    Y = _stages(-a, transpose(A), jnp.tile(eye, (3, 1))).reshape(3, d, d)
    parts = matmul(F, matmul(transpose(Y), L)) * jnp.sqrt(w)[:, None, None]
    size = _Size(jnp.einsum("i,ijk->jk", w, jnp.abs(A)), w @ jnp.abs(b))
    return _Step(F, c, jnp.concatenate(list(parts), axis=1)), size


def _stages(a: Array, A: Array, start: Array) -> Array:
    """Solve `X_i = start_i + sum_j a_ij A_j X_j`, the stages one above the other."""
    d = A.shape[-1]
    system = a[:, None, :, None] * jnp.moveaxis(A, 0, 1)[None]
    # Dense routines: unrolled arithmetic on 3 d rows would be long to compile.
    return jnp.linalg.solve(jnp.eye(3 * d, dtype=A.dtype) - system.reshape(3 * d, 3 * d), start)


def _agree(coarse: _Step, fine: _Step, size: _Size) -> Bool[Array, ""]:
    """Whether steps of half the length change nothing, in any units of the states."""
    tolerance = 1e-6 if fine.F.dtype == jnp.float64 else 1e-4
    P, Q = (matmul(s.columns, transpose(s.columns)) for s in (coarse, fine))
    sd = jnp.sqrt(diagonal(Q))
    bound = jnp.eye(sd.size, dtype=sd.dtype) + size.F
    return (
        jnp.all(jnp.abs(fine.F - coarse.F) <= tolerance * matmul(bound, bound))
        & jnp.all(jnp.abs(fine.c - coarse.c) <= tolerance * (matvec(bound, size.c) + sd))
        & jnp.all(jnp.abs(Q - P) <= tolerance * outer(sd, sd))
    )
