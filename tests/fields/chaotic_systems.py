"""Five chaotic equations, in coordinates of mean 0 and sd 1 and in turns of their orbits.

Each is written from its paper. All are in the collection of Gilpin (2021), "Chaos as an
interpretable benchmark for forecasting and data-driven modelling".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class System(NamedTuple):
    """An equation in its own units, and how it is taken wrongly.

    Attributes:
        velocity: of a state `(3,)` and the parameters.
        truth: parameters.
        wrong: the one that is mistaken, and its mistaken value.
        doubtful: the equation that it enters; None where it enters all three alike.
        start: a state from which the attractor is reached.
        step: of Runge and Kutta's method, in the equation's own time.
    """

    velocity: Callable[..., Array]
    truth: dict[str, float]
    wrong: tuple[str, float]
    doubtful: int | None
    start: tuple[float, float, float]
    step: float


def lorenz(x, sigma, rho, beta):
    """Lorenz (1963), "Deterministic nonperiodic flow", equations 25 to 27."""
    return jnp.stack([sigma * (x[1] - x[0]), x[0] * (rho - x[2]) - x[1], x[0] * x[1] - beta * x[2]])


def roessler(x, a, b, c):
    """Roessler (1976), "An equation for continuous chaos"."""
    return jnp.stack([-x[1] - x[2], x[0] + a * x[1], b + x[2] * (x[0] - c)])


def halvorsen(x, a):
    """Halvorsen's cyclically symmetric flow: Sprott (2003), "Chaos and time-series analysis"."""
    y, z = jnp.roll(x, -1), jnp.roll(x, -2)
    return -a * x - 4.0 * y - 4.0 * z - y**2


def thomas(x, b):
    """Thomas (1999), "Deterministic chaos seen in terms of feedback circuits"."""
    return jnp.sin(jnp.roll(x, -1)) - b * x


def sprott_b(x, a, b, c):
    """Sprott (1994), "Some simple chaotic flows", case B with its three coefficients."""
    return jnp.stack([a * x[1] * x[2], x[0] - b * x[1], c - x[0] * x[1]])


SYSTEMS = {
    "Lorenz": System(
        lorenz, {"sigma": 10.0, "rho": 28.0, "beta": 8.0 / 3.0}, ("rho", 24.0), 1,
        (1.0, 1.0, 20.0), 0.005,
    ),
    "Roessler": System(
        roessler, {"a": 0.2, "b": 0.2, "c": 5.7}, ("c", 5.0), 2, (1.0, 1.0, 0.0), 0.02
    ),
    "Halvorsen": System(halvorsen, {"a": 1.4}, ("a", 2.0), None, (-5.0, 0.0, 0.0), 0.005),
    "Thomas": System(thomas, {"b": 0.18}, ("b", 0.25), None, (0.1, 1.1, -0.3), 0.05),
    "Sprott B": System(
        sprott_b, {"a": 0.4, "b": 1.2, "c": 1.0}, ("b", 0.9), 1, (0.5, 0.5, 0.5), 0.05
    ),
}  # fmt: skip


class Scaled(NamedTuple):
    """An equation with every coordinate of mean 0 and sd 1 on the attractor, times in turns.

    A turn is the time in which a harmonic oscillation would go once around at the mean square
    velocity of the attractor.

    Attributes:
        truth: its velocity at a state `(3,)`.
        wrong: the same with the mistaken parameter.
        state: a state on the attractor.
        unknown: three velocities of one scalar function of the state.
        exponent: the largest Lyapunov exponent, in turns.
        turn: in the equation's own time.
        doubtful: as of `System`.
    """

    truth: Callable[[Array], Array]
    wrong: Callable[[Array], Array]
    state: Array
    unknown: Callable[[Callable[[Array], Array], Array], Array]
    exponent: float
    turn: float
    doubtful: int | None

    @property
    def equations(self) -> list[int]:
        """Those with anything unknown."""
        return [0, 1, 2] if self.doubtful is None else [self.doubtful]


def runge_kutta(velocity: Callable[[Array], Array], x: Array, h: Array | float) -> Array:
    """One step of the classical method."""
    a = velocity(x)
    b = velocity(x + 0.5 * h * a)
    c = velocity(x + 0.5 * h * b)
    return x + h / 6.0 * (a + 2.0 * b + 2.0 * c + velocity(x + h * c))


def scaled(system: System, steps: int = 200_000) -> Scaled:
    """Mean, sds, turn and exponent by one long orbit, a tenth of it thrown away."""

    def own(x):
        return system.velocity(x, **system.truth)

    @jax.jit
    def orbit(x):
        def step(carry, _):
            x, v = carry
            x, v = jax.jvp(lambda x: runge_kutta(own, x, system.step), (x,), (v,))
            growth = jnp.linalg.norm(v)
            return (x, v / growth), (x, jnp.log(growth))

        start = (x, jnp.full(3, 3.0**-0.5))
        return jax.lax.scan(step, start, None, steps)[1]

    path, growth = (np.asarray(a)[steps // 10 :] for a in orbit(jnp.array(system.start)))
    mean, sd = path.mean(0), path.std(0)
    if system.doubtful is None:  # the same in law
        mean, sd = np.full(3, mean.mean()), np.full(3, path.std())
    speed = np.asarray(jax.vmap(own)(jnp.asarray(path))) / sd
    turn = 2.0 * np.pi / np.sqrt(np.mean(speed**2))

    def velocity(parameters):
        def at(x):
            return turn * system.velocity(mean + sd * x, **parameters) / sd

        return at

    def unknown(f, x):
        if system.doubtful is None:
            return jnp.stack([f(jnp.roll(x, -i)) for i in range(3)])
        return jnp.zeros(3).at[system.doubtful].set(f(x))

    return Scaled(
        velocity(system.truth),
        velocity({**system.truth, system.wrong[0]: system.wrong[1]}),
        jnp.asarray((path[-1] - mean) / sd),
        unknown,
        float(growth.mean() / system.step * turn),
        float(turn),
        system.doubtful,
    )
