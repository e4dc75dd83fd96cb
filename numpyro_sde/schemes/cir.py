"""Simulation steps for the square-root process that respect its positivity.

An Euler step of `dX = rate (mean - X) dt + scale sqrt(X) dW` can leave the positive half line.
Both steps here solve the equation for `sqrt(X)`, whose noise is additive, and square the
result. With `m = mean - scale^2 / (4 rate)` that equation is
`dY = (rate / 2) (m / Y - Y) dt + (scale / 2) dW`; the assumption behind both is `m > 0`, that
is `4 rate mean > scale^2`.
"""

# ruff: noqa: ARG002
# Functions of one protocol share its arguments, used or not.

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_sde.schemes.base import _HALF_LOG_2PI, AbstractScheme

if TYPE_CHECKING:
    from numpyro_sde.sde import SDE

_ROOT_3 = math.sqrt(3.0)


class _SquareRootStep(AbstractScheme):
    """What both steps share: they are made for one process."""

    approximates_sde: ClassVar[bool] = True

    def check(self, sde: SDE, state_shape: tuple[int, ...]) -> None:
        # Imported here because the processes import the schemes.
        from numpyro_sde.processes import CoxIngersollRoss

        if not isinstance(sde, CoxIngersollRoss):
            raise ValueError(
                f"{type(self).__name__} is a step of the square-root process: sde must be "
                f"processes.CoxIngersollRoss, got {type(sde).__name__}"
            )
        if not sde.noise.independent:
            raise ValueError(
                f"{type(self).__name__} needs an sde driven by noise.Brownian(), got "
                f"{type(sde.noise).__name__}"
            )


class DriftImplicitSquareRoot(_SquareRootStep):
    """The drift-implicit Euler step for the square root of a Cox-Ingersoll-Ross process.

    `(1 + rate dt / 2) Y'^2 - (Y + scale W / 2) Y' - rate m dt / 2 = 0` has one positive root
    where `4 rate mean > scale^2`; it increases with the increment `W`, so the step is a
    bijection from the real line to the positive states and has a density. Strong order 1 where
    `2 rate mean > 3 scale^2`, falling towards 1/2 with the Feller ratio. At
    `4 rate mean <= scale^2` the step is still defined, with a negative radicand cut at zero,
    but its density is NaN. Source: Alfonsi (2005), On the discretization schemes for the CIR
    processes, section 3; order: Dereich, Neuenkirch and Szpruch (2012), An Euler-type method
    for the strong approximation of the CIR process.

    Raises:
        ValueError: the SDE is no `processes.CoxIngersollRoss`.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> cir = nsde.processes.CoxIngersollRoss(rate=1.0, mean=1.0, scale=1.5)
        >>> scheme = nsde.schemes.DriftImplicitSquareRoot()
        >>> x = scheme.step(cir, 0.0, 0.1, jnp.array(0.5), jnp.array(-1.0))
        >>> bool(x > 0), round(float(scheme.invert(cir, 0.0, 0.1, jnp.array(0.5), x)), 4)
        (True, -1.0)
    """

    keeps_positive: ClassVar[bool] = True

    def log_density(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Float[Array, ""]:
        inside = x_next > 0.0
        x_next = jnp.where(inside, x_next, 1.0)
        implicit, source, half_scale = _implicit_constants(sde, dt)
        z = self.invert(sde, t, dt, x, x_next, cache)
        # dz/dx' = (dz/dy') / (2 y') with y' = sqrt(x').
        slope = 0.5 * (implicit + source / x_next) / (2.0 * jnp.sqrt(x_next))
        value = jnp.log(slope) - jnp.log(half_scale * jnp.sqrt(dt)) - 0.5 * z**2 - _HALF_LOG_2PI
        value = jnp.where(source > 0.0, value, jnp.nan)
        return jnp.sum(jnp.where(inside | jnp.isnan(value), value, -jnp.inf))

    def step(self, sde: SDE, t: Array, dt: Array, x: Array, z: Array, cache: Any = None) -> Array:
        implicit, source, half_scale = _implicit_constants(sde, dt)
        start = jnp.sqrt(x) + half_scale * jnp.sqrt(dt) * z
        root = _root(start**2 + implicit * source)
        # Of the two forms of the positive root, the one without a difference.
        safe = jnp.where(start < 0.0, root - start, 1.0)
        below = jnp.where(source > 0.0, source / safe, (start + root) / implicit)
        return jnp.where(start < 0.0, below, (start + root) / implicit) ** 2

    def invert(
        self,
        sde: SDE,
        t: Array,
        dt: Array,
        x: Array,
        x_next: Array,
        cache: Any = None,
    ) -> Array:
        implicit, source, half_scale = _implicit_constants(sde, dt)
        y, y_next = jnp.sqrt(x), jnp.sqrt(x_next)
        source = jnp.where(source > 0.0, source, jnp.nan)
        # (y' - y) first: short steps leave few digits in the difference of the other terms.
        start = (y_next - y) + 0.5 * ((implicit - 2.0) * y_next - source / y_next)
        return start / (half_scale * jnp.sqrt(dt))


def _implicit_constants(sde: SDE, dt: Any) -> tuple[Array, Array, Array]:
    rate, mean, scale = (sde.params[name] for name in ("rate", "mean", "scale"))
    return 2.0 + rate * dt, (rate * mean - 0.25 * scale**2) * dt, 0.5 * scale


def _root(x: Array) -> Array:
    """Square root of the positive part, with a derivative of zero where it is cut."""
    inside = x > 0.0
    return jnp.where(inside, jnp.sqrt(jnp.where(inside, x, 1.0)), 0.0)


class HighOrderStrang(_SquareRootStep):
    """The high order Strang splitting ("HOStS") of the Cox-Ingersoll-Ross process.

    Half steps of the drift around two steps of the noise at the points of a two-point rule,
    which use the increment `W` of the Brownian motion and its space-time Levy area `H`
    (normal, variance `dt / 12`): Foster, dos Reis and Strange (2024), High order splitting
    methods for SDEs satisfying a commutativity condition, equation 5.3. Two innovations a
    step, `W = sqrt(dt) z_0` and `H = sqrt(dt / 12) z_1`, so there is no density: it serves
    simulation and the whitened path. Strong order 3/2 where the state stays away from zero;
    measured orders over fixed steps fall to 0.8 where zero is often near
    (`rate = mean = 1`, `scale = 1.5`). Positive where `4 rate mean > scale^2`; below that,
    paths can become slightly negative, and the roots cut that at zero.

    Raises:
        ValueError: the SDE is no `processes.CoxIngersollRoss`.

    Example:
        >>> import jax, numpyro_sde as nsde
        >>> cir = nsde.processes.CoxIngersollRoss(rate=1.0, mean=1.0, scale=1.5)
        >>> scheme = nsde.schemes.HighOrderStrang()
        >>> path = nsde.SDEPath(cir, [0.0, 0.1, 0.2], init=1.0, scheme=scheme)
        >>> path.sample(jax.random.key(0)).shape
        (3,)
    """

    has_density: ClassVar[bool] = False

    def innovation_shape(self, sde: SDE, state_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (2, *state_shape)

    def step(self, sde: SDE, t: Array, dt: Array, x: Array, z: Array, cache: Any = None) -> Array:
        rate, mean, scale = (sde.params[name] for name in ("rate", "mean", "scale"))
        level = mean - scale**2 / (4.0 * rate)
        increment = jnp.sqrt(dt) * z[0]
        area = jnp.sqrt(dt / 12.0) * z[1]
        outer = -jnp.expm1(-rate * dt * (3.0 - _ROOT_3) / 6.0)
        inner = -jnp.expm1(-rate * dt / _ROOT_3)
        x = x + (level - x) * outer
        x = (_root(x) + 0.5 * scale * (0.5 * increment + _ROOT_3 * area)) ** 2
        x = x + (level - x) * inner
        x = (_root(x) + 0.5 * scale * (0.5 * increment - _ROOT_3 * area)) ** 2
        return x + (level - x) * outer

    def log_density(
        self,
        sde: SDE,
        t: Array,
        dt: Array,
        x: Array,
        x_next: Array,
        cache: Any = None,
    ) -> Float[Array, ""]:
        raise TypeError(
            "HighOrderStrang has no transition density: two innovations lead to one state. Use "
            "Exact() or DriftImplicitSquareRoot()"
        )

    def invert(
        self,
        sde: SDE,
        t: Array,
        dt: Array,
        x: Array,
        x_next: Array,
        cache: Any = None,
    ) -> Array:
        raise ValueError(
            "the innovations of HighOrderStrang are not unique: two of them lead to one state. "
            "Use DriftImplicitSquareRoot()"
        )
