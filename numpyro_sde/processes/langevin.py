"""Diffusions in a potential: overdamped and underdamped Langevin equations, the double well.

Energies and temperatures share one unit (Boltzmann's constant is 1). Source: Pavliotis (2014),
Stochastic Processes and Applications, sections 4.5 (overdamped) and 6.1 (underdamped).
"""

# ruff: noqa: ARG001
# Functions of one protocol share its arguments, used or not.

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, ArrayLike, Float

from numpyro_sde.processes.arguments import parameter, positive
from numpyro_sde.processes.special import log_bessel_i
from numpyro_sde.sde import SDE, as_function

_POTENTIAL = "potential"


def _bundle(
    own: dict[str, Any], potential: Any, params: Any, event_dims: Any
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Join the parameters of the process with those of the user's potential."""
    as_function(potential, "potential", "x", {"p": ("params", params is not None)})
    if params is None:
        if event_dims is not None:
            raise ValueError("event_dims was given without params: there is nothing to declare")
        return own, None
    declared = None if event_dims is None else {_POTENTIAL: event_dims}
    return {**own, _POTENTIAL: params}, declared


def _energy(potential: Callable[..., Any], x: Array, p: Any) -> Array:
    value = potential(x, p[_POTENTIAL]) if _POTENTIAL in p else potential(x)
    if jnp.shape(value) != ():
        raise ValueError(
            f"potential must return a scalar, got shape {jnp.shape(value)} at a position of "
            f"shape {jnp.shape(x)}"
        )
    return jnp.asarray(value)


def _force(potential: Callable[..., Any], x: Any, p: Any) -> Array:
    x = jnp.asarray(x, jnp.result_type(float, x))
    return -jax.grad(lambda x: _energy(potential, x, p))(x)


def _overdamped_drift(potential: Any, t: Any, x: Any, p: Any) -> Array:
    return _force(potential, x, p)


def _overdamped_diffusion(t: Any, x: Any, p: Any) -> Array:
    return jnp.sqrt(2.0 * p["temperature"])


class OverdampedLangevin(SDE):
    """Diffusion in a potential, `dX = -grad U(X) dt + sqrt(2 temperature) dW`.

    Motion where friction leaves no inertia: colloids, proteins along a reaction coordinate,
    and any reversible process with a density of one's choice. The stationary law is the Gibbs
    law `exp(-U(x) / temperature)`.

    Args:
        potential: `U(x)`, or `U(x, p)` with `params`: a scalar energy for one state of shape
            `()` or `(d,)`, differentiable by JAX. Use a function defined once; a lambda made
            anew at each call compiles anew.
        temperature: energy units; positive.
        params: parameters of the potential, handed to it as `p`.
        event_dims: their event dimensions, as for `SDE`.

    Raises:
        TypeError: a potential that is no function of the right arguments.
        ValueError: a potential that is not scalar, or a temperature that is not positive.

    Example:
        >>> import numpyro_sde as nsde
        >>> def quartic(x, p):
        ...     return p["stiffness"] * x**4 / 4
        >>> sde = nsde.processes.OverdampedLangevin(quartic, params={"stiffness": 2.0})
        >>> float(sde.drift_at(0.0, 1.0)), float(sde.stationary_log_density(1.0))
        (-2.0, -0.5)
    """

    temperature = parameter("temperature", "Temperature, energy units.")

    def __init__(
        self,
        potential: Callable[..., Any],
        *,
        temperature: ArrayLike = 1.0,
        params: Any = None,
        event_dims: Any = None,
    ) -> None:
        own = {"temperature": positive("temperature", temperature)}
        params, event_dims = _bundle(own, potential, params, event_dims)
        super().__init__(
            Partial(_overdamped_drift, potential),
            _overdamped_diffusion,
            params=params,
            event_dims=event_dims,
        )

    @property
    def potential(self) -> Callable[..., Any]:
        """The potential, as it was given."""
        return self.drift.function.args[0]  # type: ignore[attr-defined]

    def stationary_log_density(self, x: ArrayLike) -> Float[Array, ""]:
        """Log of the Gibbs density at one state, up to a constant; for one process."""
        x = jnp.asarray(x, jnp.result_type(float, x))
        return -_energy(self.potential, x, self.params) / self.temperature


def _split(x: Array) -> tuple[Array, Array, int]:
    """Position, velocity and dimension; one-dimensional positions are scalars."""
    if x.ndim != 1 or x.shape[0] % 2:
        raise ValueError(
            f"a state of UnderdampedLangevin must have shape (2 d,), position then velocity, "
            f"got {x.shape}"
        )
    d = x.shape[0] // 2
    return (x[0], x[1], d) if d == 1 else (x[:d], x[d:], d)


def _underdamped_drift(potential: Any, t: Any, x: Any, p: Any) -> Array:
    x = jnp.asarray(x, jnp.result_type(float, x))
    position, velocity, _ = _split(x)
    acceleration = _force(potential, position, p) / p["mass"] - p["friction"] * velocity
    return jnp.concatenate([jnp.atleast_1d(velocity), jnp.atleast_1d(acceleration)])


def _underdamped_diffusion(t: Any, x: Any, p: Any) -> Array:
    _, _, d = _split(jnp.asarray(x))
    scale = jnp.sqrt(2.0 * p["friction"] * p["temperature"] / p["mass"])
    return jnp.concatenate([jnp.zeros((d, d)), scale * jnp.eye(d)])


class UnderdampedLangevin(SDE):
    """A particle with inertia and friction in a potential.

    `dQ = V dt`, `dV = (-grad U(Q) / mass - friction V) dt + sqrt(2 friction temperature /
    mass) dW`. The state is `(Q, V)`, shape `(2 d,)`: tracked cells and animals whose velocity
    persists, molecules, synchrony of generators. Noise enters the velocity alone
    (hypoelliptic), so a Euler step has no density: use `schemes.LocalLinear` or `Strang`. The
    stationary law is `exp(-(U(q) + mass |v|^2 / 2) / temperature)`: the velocities are
    `N(0, temperature / mass)`, independent of the position.

    Args:
        potential: `U(q)`, or `U(q, p)` with `params`: a scalar energy for one position, of
            shape `(d,)`, a scalar where `d = 1`. Use a function defined once.
        friction: rate at which velocities decay, 1/time; positive.
        temperature: energy units; positive.
        mass: energy per squared velocity; positive.
        params: parameters of the potential, handed to it as `p`.
        event_dims: their event dimensions, as for `SDE`.

    Raises:
        TypeError: a potential that is no function of the right arguments.
        ValueError: a potential that is not scalar, a number that is not positive, or a state
            whose length is odd.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> def spring(q):
        ...     return q**2 / 2
        >>> sde = nsde.processes.UnderdampedLangevin(spring, friction=0.5)
        >>> sde.drift_at(0.0, jnp.array([1.0, 2.0])).tolist()
        [2.0, -2.0]
    """

    friction = parameter("friction", "Rate at which velocities decay, 1/time.")
    temperature = parameter("temperature", "Temperature, energy units.")
    mass = parameter("mass", "Mass, energy per squared velocity.")

    def __init__(
        self,
        potential: Callable[..., Any],
        friction: ArrayLike,
        *,
        temperature: ArrayLike = 1.0,
        mass: ArrayLike = 1.0,
        params: Any = None,
        event_dims: Any = None,
    ) -> None:
        own = {
            "friction": positive("friction", friction),
            "temperature": positive("temperature", temperature),
            "mass": positive("mass", mass),
        }
        params, event_dims = _bundle(own, potential, params, event_dims)
        super().__init__(
            Partial(_underdamped_drift, potential),
            _underdamped_diffusion,
            params=params,
            event_dims=event_dims,
        )

    @property
    def potential(self) -> Callable[..., Any]:
        """The potential, as it was given."""
        return self.drift.function.args[0]  # type: ignore[attr-defined]

    def stationary_log_density(self, x: ArrayLike) -> Float[Array, ""]:
        """Log of the Gibbs density at one state `(q, v)`, up to a constant; for one process."""
        position, velocity, _ = _split(jnp.asarray(x, jnp.result_type(float, x)))
        kinetic = 0.5 * self.mass * jnp.sum(velocity**2)
        return -(_energy(self.potential, position, self.params) + kinetic) / self.temperature


def _double_well_drift(t: Any, x: Any, p: Any) -> Array:
    return x * (p["linear"] - p["cubic"] * x**2)


def _constant_diffusion(t: Any, x: Any, p: Any) -> Array:
    return p["scale"]


class DoubleWell(SDE):
    """Noise-driven switching, `dX = (linear X - cubic X^3) dt + scale dW`.

    Two stable states at `+-sqrt(linear / cubic)`, each left after a mean time that grows as
    `exp(linear^2 / (2 cubic scale^2))` (Kramers 1940): the standard test of smoothing and
    path sampling, and a model of climate and gene switches. The stationary law is
    `exp(2 (linear x^2 / 2 - cubic x^4 / 4) / scale^2)`, with its constant known.

    Args:
        linear: growth rate away from zero, 1/time; positive.
        cubic: saturation, 1/(time state^2); positive.
        scale: volatility, state units per square root of time; positive.

    Raises:
        ValueError: a number that is not positive and finite.
        TypeError: an argument that is no number or array.

    Example:
        >>> import numpyro_sde as nsde
        >>> well = nsde.processes.DoubleWell(scale=0.7)
        >>> float(well.drift_at(0.0, 1.0)), round(float(well.stationary_moments()[1]), 4)
        (0.0, 0.8322)
    """

    linear = parameter("linear", "Growth rate away from zero, 1/time.")
    cubic = parameter("cubic", "Saturation, 1/(time state^2).")
    scale = parameter("scale", "Volatility, state units per square root of time.")

    def __init__(
        self, linear: ArrayLike = 1.0, cubic: ArrayLike = 1.0, scale: ArrayLike = 1.0
    ) -> None:
        super().__init__(
            _double_well_drift,
            _constant_diffusion,
            params={
                "linear": positive("linear", linear),
                "cubic": positive("cubic", cubic),
                "scale": positive("scale", scale),
            },
        )

    def _exponents(self) -> tuple[Array, Array]:
        """Coefficients of `x^2` and of `-x^4` in the log density."""
        return self.linear / self.scale**2, 0.5 * self.cubic / self.scale**2

    def stationary_moments(self) -> tuple[Array, Array]:
        """Mean (zero) and variance of the stationary law."""
        a, b = self._exponents()
        # The normaliser generates the moments of x^2.
        _, variance = jax.jvp(lambda a: _log_normaliser(a, b), (a,), (jnp.ones_like(a),))
        return jnp.zeros_like(variance), variance

    def stationary_log_density(self, x: ArrayLike) -> Float[Array, "..."]:
        """Log density of the stationary law at `x`, elementwise."""
        a, b = self._exponents()
        square = jnp.asarray(x) ** 2
        return square * (a - b * square) - _log_normaliser(a, b)


def _log_normaliser(a: Array, b: Array) -> Array:
    """Log of the integral of `exp(a x^2 - b x^4)`, `a > 0`.

    `pi sqrt(a / b) / (2 sqrt 2) e^c (I_{1/4}(c) + I_{-1/4}(c))` with `c = a^2 / (8 b)`
    (Gradshteyn and Ryzhik, 3.323.3 continued to `a > 0`).
    """
    c = a**2 / (8.0 * b)
    bessel = jnp.logaddexp(log_bessel_i(0.25, c), log_bessel_i(-0.25, c))
    return math.log(math.pi / (2.0 * math.sqrt(2.0))) + 0.5 * jnp.log(a / b) + c + bessel
