"""Strang splitting of an SDE with additive noise into a linear SDE and a nonlinear ODE.

Buckwar, Samson, Tamborrino and Tubikanec (2022), Applied Numerical Mathematics 179 (a
FitzHugh-Nagumo model); Pilipovic, Samson and Ditlevsen (2024), Annals of Statistics 52 (the
likelihood). The drift is `A (x - b) + N(x)`; one step follows the ODE `dx/ds = N(x)` for half
the step, the linear SDE exactly for the whole of it, and the ODE again.

The flow of a general N is not known in closed form. Here the half flow is one classical
Runge-Kutta step R, and the last half step is the inverse of R taken backwards in time: the
whole step stays symmetric (Hairer, Lubich and Wanner 2006, section II.3), hence of even order,
and its density, which needs that inverse, is explicit and exact for the step as simulated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from numpyro_sde.linear import small
from numpyro_sde.linear.affine import degrees
from numpyro_sde.schemes.base import AbstractScheme, GaussianScheme, gaussian_log_density
from numpyro_sde.schemes.dependence import require_additive
from numpyro_sde.schemes.generator import as_point
from numpyro_sde.schemes.local_linear import (
    LINEARIZABLE_DOUBLINGS,
    linear_step,
    noise_columns,
)
from numpyro_sde.sde import Code

if TYPE_CHECKING:
    from numpyro_sde.sde import SDE

_NEWTON_STEPS = 4
# Largest residual of the last half step, in standard deviations of the step.
_NEWTON_TOLERANCE = 1e-4


class Strang(AbstractScheme):
    r"""Strang splitting for additive noise: linear SDE exactly, nonlinear ODE by half steps.

    Strong order 1 (Pilipovic et al. 2024); conditional means and other smooth moments of one step
    are in error by `O(dt^3)`, so weak order 2. The transition is not Gaussian: it is
    a Gaussian bent by the nonlinear flow, with an exact Jacobian in its density. Hypoelliptic
    systems (noise in some components only) have a density, as the linear part carries the
    noise; so innovations have the dimension of the state. A diffusion that changes with time is
    taken at the middle of the step, as is the drift. Where a step is so long that the half flow
    cannot be inverted, states are NaN.

    Args:
        linear: function of the parameters `linear(p)`, or `linear()` for an SDE without
            params, that returns `(A, b)` of shapes `(d, d)` and `(d,)` (both `()` for a scalar
            state) of the linear drift `A (x - b)`; take the Jacobian at a stable fixed point b
            for the long-run behaviour of the cited papers. None linearises the drift at the
            start of each step, so that only its curvature is left to the ODE. In a hypoelliptic
            system A must hold the coupling that carries the noise on: where that coupling
            changes with the state, only None gives the right density as `dt` shrinks.

        max_doublings: as in `LocalLinear`.

    Raises:
        TypeError: `linear` is not a function.

    Example:
        >>> import numpyro_sde as nsde
        >>> sde = nsde.SDE(lambda t, x: x - x**3, lambda t, x: 0.5)
        >>> strang = nsde.schemes.Strang()
        >>> round(float(strang.log_density(sde, 0.0, 0.1, 0.5, 0.6)), 4)
        0.8525
    """

    approximates_sde: ClassVar[bool] = True

    linear: Code | None
    max_doublings: int | None = eqx.field(static=True)

    def __init__(
        self,
        linear: Callable[..., tuple[Any, Any]] | None = None,
        max_doublings: int | None = None,
    ) -> None:
        if linear is not None and not callable(linear):
            raise TypeError(
                f"linear must be a function that returns (A, b), got {type(linear).__name__}"
            )
        self.linear = None if linear is None else Code(linear)
        self.max_doublings = max_doublings

    def linearizable(self) -> Strang:
        if self.max_doublings is not None:
            return self
        linear = None if self.linear is None else self.linear.function
        return Strang(linear, LINEARIZABLE_DOUBLINGS)

    def check(self, sde: SDE, state_shape: tuple[int, ...]) -> None:
        """Refuse noise that depends on the state, and a linear part that does not fit.

        Raises:
            ValueError: state-dependent diffusion, or `linear` returns other shapes.
        """
        sde.structure(state_shape)
        require_additive(sde, state_shape, "Strang()", "use Milstein(), Kessler() or LocalLinear()")
        if self.linear is None:
            return
        got = jax.eval_shape(self._linear_part, sde.unbatched_shapes())
        shapes = tuple(getattr(part, "shape", None) for part in got)
        if shapes != (state_shape * 2, state_shape):
            raise ValueError(
                f"linear must return (A, b) of shapes {state_shape * 2} and {state_shape} for a "
                f"state of shape {state_shape}, got {shapes}"
            )

    def gaussian_form(self, sde: SDE, state_shape: tuple[int, ...]) -> GaussianScheme | None:
        """The step of a linear SDE, whose half flow is an affine map; None for other SDEs."""
        form, real = _AffineStrang(self), jnp.result_type(float)
        t, dt, x = jnp.zeros((), real), jnp.ones((), real), jnp.zeros(state_shape, real)
        inner = self.linearizable()
        degree_mean, degree_factor = degrees(lambda x: form.moments(sde, t, dt, x), x)
        (degree_flow,) = degrees(lambda s: inner._split(sde, t, dt, x).backward(s), x)
        affine = degree_mean <= 1 and degree_flow <= 1 and degree_factor == 0
        return form if affine else None

    def innovation_shape(self, sde: SDE, state_shape: tuple[int, ...]) -> tuple[int, ...]:  # noqa: ARG002
        return state_shape

    def log_density(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Float[Array, ""]:
        del cache
        parts = self._split(sde, t, dt, x)
        pulled, log_det = _with_log_jacobian(parts.backward, jnp.asarray(x_next, parts.mean.dtype))
        return gaussian_log_density(pulled, parts.mean, parts.factor) + log_det

    def step(self, sde: SDE, t: Array, dt: Array, x: Array, z: Array, cache: Any = None) -> Array:
        del cache
        parts = self._split(sde, t, dt, x)
        noise = parts.factor * z if parts.mean.ndim == 0 else parts.factor @ z
        return _solve(parts, parts.mean + noise)

    def invert(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Array:
        del cache
        parts = self._split(sde, t, dt, x)
        away = parts.backward(jnp.asarray(x_next, parts.mean.dtype)) - parts.mean
        if away.ndim == 0:
            return away / parts.factor
        return small.solve_lower(parts.factor, away[:, None])[:, 0]

    def _linear_part(self, sde: SDE) -> tuple[Array, Array]:
        assert self.linear is not None
        A, b = self.linear(*(() if sde.params is None else (sde.params,)))
        return jnp.asarray(A), jnp.asarray(b)

    def _split(self, sde: SDE, t: Array, dt: Array, x: Array) -> _Parts:
        t, x = as_point(t, x)
        middle = t + 0.5 * dt

        def drift(s: Array) -> Array:
            return sde.ito_drift_at(middle, s).astype(x.dtype)

        if self.linear is None:
            A, value = jax.jacfwd(drift)(x), drift(x)

            def linear(s: Array) -> Array:
                return value + _apply(A, s - x)
        else:
            A, b = self._linear_part(sde)

            def linear(s: Array) -> Array:
                return _apply(A, s - b)

        def flow(s: Array, length: Array) -> Array:
            return _runge_kutta(lambda y: drift(y) - linear(y), s, length)

        start = x if self.linear is None else flow(x, 0.5 * dt)
        change, factor = linear_step(
            A, linear(start), None, noise_columns(sde, middle, x), dt, self.max_doublings
        )
        return _Parts(
            start + change,
            factor,
            lambda s: flow(s, 0.5 * dt),
            lambda s: flow(s, -0.5 * dt),
        )


class _AffineStrang(GaussianScheme):
    """A Strang step whose half flow is affine, `backward(s) = B s + a`, as a Gaussian one."""

    scheme: Strang

    def innovation_shape(self, sde: SDE, state_shape: tuple[int, ...]) -> tuple[int, ...]:  # noqa: ARG002
        return state_shape

    def moments(
        self, sde: SDE, t: Array, dt: Array, x: Array, cache: Any = None
    ) -> tuple[Array, Array]:
        del cache
        parts = self.scheme.linearizable()._split(sde, t, dt, x)
        origin = jnp.zeros_like(parts.mean)
        B, away = jax.jacfwd(parts.backward)(origin), parts.mean - parts.backward(origin)
        if origin.ndim == 0:
            return away / B, parts.factor / B
        inverse = small.solve(B, jnp.eye(origin.size, dtype=B.dtype))
        return small.matvec(inverse, away), small.tria(small.matmul(inverse, parts.factor))


class _Parts(NamedTuple):
    """One step: the Gaussian in its middle, and the half flow and its backward form."""

    mean: Array
    factor: Array
    forward: Callable[[Array], Array]
    backward: Callable[[Array], Array]


def _apply(A: Array, v: Array) -> Array:
    return A * v if v.ndim == 0 else A @ v


def _runge_kutta(rate: Callable[[Array], Array], x: Array, h: Array) -> Array:
    k1 = rate(x)
    k2 = rate(x + 0.5 * h * k1)
    k3 = rate(x + 0.5 * h * k2)
    k4 = rate(x + h * k3)
    return x + h * (k1 + 2.0 * k2 + 2.0 * k3 + k4) / 6.0


def _with_log_jacobian(fn: Callable[[Array], Array], x: Array) -> tuple[Array, Array]:
    """Value and log determinant of the Jacobian; -inf where the map has folded over."""
    if x.ndim == 0:
        value, slope = jax.jvp(fn, (x,), (jnp.ones_like(x),))
        sign, log_det = jnp.sign(slope), jnp.log(jnp.abs(slope))
    else:
        value = fn(x)
        sign, log_det = jnp.linalg.slogdet(jax.jacfwd(fn)(x))
    return value, jnp.where(sign < 0.0, -jnp.inf, log_det)


def _solve(parts: _Parts, target: Array) -> Array:
    """Solve `backward(x) = target` by Newton's method from the forward flow; NaN if it fails."""

    def newton(fn: Callable[[Array], Array], x: Array) -> Array:
        def correct(_: Any, s: Array) -> Array:
            return s - _solve_linear(jax.jacfwd(fn)(s), fn(s))

        return lax.fori_loop(0, _NEWTON_STEPS, correct, x)

    def tangent(fn: Callable[[Array], Array], v: Array) -> Array:
        return _solve_linear(jax.jacfwd(fn)(jnp.zeros_like(v)), v)

    def residual(s: Array) -> Array:
        return parts.backward(s) - target

    # Differentiated by the implicit function theorem, not through the iterations.
    x = lax.custom_root(residual, parts.forward(target), newton, tangent)
    scale = parts.factor if x.ndim == 0 else jnp.sqrt(jnp.sum(parts.factor**2, axis=1))
    rounding = 10.0 * jnp.finfo(x.dtype).eps * jnp.abs(target)
    allowed = _NEWTON_TOLERANCE * jnp.abs(scale) + rounding
    settled = jnp.all(jnp.abs(lax.stop_gradient(residual(x))) <= lax.stop_gradient(allowed))
    return jnp.where(settled, x, jnp.nan)


def _solve_linear(A: Array, b: Array) -> Array:
    if b.ndim == 0:
        return b / A
    # By the inverse: elimination on [A, b] as one array could not be transposed in b alone.
    return small.solve(A, jnp.eye(b.size, dtype=A.dtype)) @ b
