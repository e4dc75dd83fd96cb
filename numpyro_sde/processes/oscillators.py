"""Oscillators on a ring, coupled to their neighbours: second-order latent dynamics.

The prior of Song, Keller, Yue, Perona and Welling (2025), "Langevin Flows for Modeling Neural
Latent Dynamics": latent variables with inertia and friction in a potential of locally coupled
oscillators, whose travelling and standing waves a first-order equation has not.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float

from numpyro_sde.fields.field import AbstractField
from numpyro_sde.processes.arguments import positive
from numpyro_sde.processes.langevin import UnderdampedLangevin


def _ring_energy(q: Array, p: Any) -> Array:
    q = jnp.atleast_1d(q)
    energy = 0.5 * p["stiffness"] * jnp.sum(q**2)
    for distance in range(1, p["coupling"].shape[-1] + 1):
        stretch = jnp.sum((q - jnp.roll(q, distance)) ** 2)
        energy = energy + 0.5 * p["coupling"][distance - 1] * stretch
    return energy + p["extra"](q) if "extra" in p else energy


class CoupledOscillators(UnderdampedLangevin):
    """Oscillators on a ring with inertia, friction and springs to their neighbours.

    `dQ = V dt`, `dV = (-grad U(Q) / mass - friction V) dt + sqrt(2 friction temperature / mass) dW`
    with `U(q) = stiffness |q|^2 / 2 + sum_l coupling_l sum_i (q_i - q_{i+l})^2 / 2 + extra(q)`.
    The state is `(Q, V)`, shape `(2 d,)`, d as the start of the path says. Springs confine: with
    a bounded `extra`, learned or not, the stationary law is Gibbs's and paths stay bounded.
    Observe it by any emission; for spike counts `Poisson(exp(weights @ q + offset) dt)`.

    Args:
        friction: rate at which velocities decay, 1/time; positive.
        stiffness: spring of each oscillator to 0, energy per squared position; positive.
        coupling: springs to the neighbours at distance 1, 2, ..., shape `(reach,)`; not negative.
        extra: a field of the d positions, added to the energy: what is not known of it.
        temperature: energy units; positive.
        mass: energy per squared velocity; positive.

    Raises:
        TypeError: an extra that is no field, a number that is none.
        ValueError: a number that is not positive, a coupling that is negative or no vector.

    When not to use it: first-order dynamics without inertia (`OverdampedLangevin`,
    `NeuralLangevin`). Noise enters velocities alone, so Euler has no density: `LocalLinear` is the
    default, exact without `extra`.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> ring = nsde.processes.CoupledOscillators(
        ...     friction=0.5, stiffness=1.0, coupling=jnp.array([2.0]))
        >>> path = nsde.SDEPath(ring, [0.0, 0.1], init=jnp.zeros(6))  # three oscillators
        >>> type(path.scheme).__name__
        'LocalLinear'
    """

    def __init__(
        self,
        friction: ArrayLike,
        stiffness: ArrayLike,
        coupling: Float[ArrayLike, "*batch reach"],
        *,
        extra: AbstractField | None = None,
        temperature: ArrayLike = 1.0,
        mass: ArrayLike = 1.0,
    ) -> None:
        springs = jnp.asarray(coupling, jnp.result_type(float))
        if springs.ndim < 1 or springs.shape[-1] < 1:
            raise ValueError(
                f"coupling must be springs to neighbours, shape (reach,), got {springs.shape}"
            )
        if not isinstance(springs, Tracer) and not np.all(np.asarray(springs) >= 0):
            raise ValueError(f"coupling must not be negative, got {coupling}")
        if extra is not None and not isinstance(extra, AbstractField):
            raise TypeError(
                f"extra must be a field of the positions, got {type(extra).__name__}: see "
                "nsde.fields"
            )
        own: dict[str, Any] = {"stiffness": positive("stiffness", stiffness), "coupling": springs}
        super().__init__(
            _ring_energy,
            friction,
            temperature=temperature,
            mass=mass,
            params=own if extra is None else {**own, "extra": extra},
            event_dims={"coupling": 1},
        )

    def default_transition(self) -> Any:
        """The law of the linearised equation."""
        from numpyro_sde.schemes.local_linear import LocalLinear  # schemes know equations

        return LocalLinear()
