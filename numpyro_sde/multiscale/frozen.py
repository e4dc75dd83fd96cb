"""The fast process simulated at frozen slow states, always with the same random numbers.

Common random numbers make the average a smooth, deterministic function of the slow state and the
parameters, so that it can be tabulated, differentiated and handed to NUTS; its statistical error is
then a fixed perturbation of the model rather than noise. Sources: E, Liu and Vanden-Eijnden (2005),
Comm. Pure Appl. Math. 58, 1544 (averages of a simulated fast process); the step with averaged
drift and additive noise has weak order 2 (Kloeden and Platen 1992, section 15.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from numpyro_sde.checks.numbers import at_least
from numpyro_sde.multiscale.slow_fast import call


class ErgodicAverage(eqx.Module):
    """The fast law by simulation of the fast process, in its own time.

    Chains in antithetic pairs start from `start`, are discarded for `burn_in` and then kept every
    `every` time units. Times are those of the fast process by itself: time over `epsilon`. The
    relative error of an average falls as the root of `num_chains * length / every` while `every`
    exceeds the correlation time; the step's own error is of order `step^2` (of order `step`
    where the fast diffusion depends on the fast state).

    When not to use it: where the law is known, or the fast variable is scalar (`ScalarFast` is
    exact); and without `table=`, as every state of a path would run its own simulation.

    Args:
        num_chains: number of chains, even.
        step: step of the simulation, fast time.
        burn_in: time before anything is kept.
        length: time over which states are kept.
        every: time between two kept states.
        start: first fast state.
        seed: seed of the random numbers, which stay the same for all slow states.

    Raises:
        ValueError: an odd number of chains, or times that are not positive or out of order.

    Example:
        >>> from numpyro_sde.multiscale import ErgodicAverage
        >>> ErgodicAverage(num_chains=256).num_nodes
        2560
    """

    num_chains: int = eqx.field(static=True, default=1024)
    step: float = eqx.field(static=True, default=0.05)
    burn_in: float = eqx.field(static=True, default=5.0)
    length: float = eqx.field(static=True, default=10.0)
    every: float = eqx.field(static=True, default=1.0)
    start: float = eqx.field(static=True, default=0.0)
    seed: int = eqx.field(static=True, default=0)

    def __check_init__(self) -> None:
        check_chains(self.num_chains)
        check_times_ordered(step=self.step, every=self.every, length=self.length)
        if self.burn_in < 0:
            raise ValueError(f"burn_in must not be negative, got {self.burn_in}")

    @property
    def num_nodes(self) -> int:
        """Number of kept states."""
        return self.num_chains * self._kept[1]

    @property
    def _kept(self) -> tuple[int, int, int]:
        """Steps discarded, states kept of each chain, steps between two."""
        between = round(self.every / self.step)
        return round(self.burn_in / self.step), round(self.length / self.every), between

    def innovations(self, shape: tuple[int, ...]) -> np.ndarray:
        """The random numbers, shape `(steps, chains, *shape)`."""
        first, kept, between = self._kept
        return antithetic(self.seed, first + kept * between, self.num_chains, shape)


class FixedNoise(eqx.Module):
    """Random numbers of one simulation, shared by all series of a batch.

    A module, as a bare array that a coefficient holds would be taken for one of a batch.
    """

    values: np.ndarray


def check_chains(num_chains: int) -> None:
    """Raise unless chains can be paired."""
    at_least("num_chains", num_chains, 2)
    if num_chains % 2:
        raise ValueError(f"num_chains must be even, for antithetic pairs, got {num_chains}")


def check_times_ordered(**times: float) -> None:
    """Raise unless times are positive and each is at least the one before."""
    names = list(times)
    for name, value in times.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a positive number, got {value}")
    for first, second in pairwise(names):
        if times[first] > times[second]:
            raise ValueError(
                f"{first} must not exceed {second}, got {times[first]} and {times[second]}"
            )


def antithetic(seed: int, steps: int, chains: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normals in antithetic pairs of chains, float32."""
    rng = np.random.default_rng(seed)
    half = rng.standard_normal((steps, chains // 2, *shape), np.float32)
    return np.concatenate([half, -half], axis=1)


def independent(seed: int, steps: int, chains: int, shape: tuple[int, ...]) -> np.ndarray:
    """Independent standard normals, float32."""
    return np.random.default_rng(seed).standard_normal((steps, chains, *shape), np.float32)


def innovation_shape(diffusion: tuple[int, ...], state: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the noise of one step, from the shapes of the diffusion and the state."""
    return diffusion[-1:] if len(diffusion) > len(state) else state


def fast_step(
    drift: Callable[[Array], Array],
    diffusion: Callable[[Array], Array],
    step: float,
    y: Array,
    z: Array,
) -> Array:
    """One step of the frozen fast process: drift averaged over the step, noise of its start."""
    b = diffusion(y)
    shock = math.sqrt(step) * (jnp.sum(b * z, axis=-1) if b.ndim > y.ndim else b * z)
    first = drift(y)
    second = drift(y + step * first + shock)
    return y + 0.5 * step * (first + second) + shock


def simulate(
    drift: Any,
    diffusion: Any,
    step: float,
    start: Array,
    innovations: Array,
    t: Any,
    x: Any,
    p: Any,
) -> Array:
    """Last states of chains `(chains, *fast)` after the steps of `innovations`."""

    def one(y: Array, z: Array) -> Array:
        return fast_step(
            lambda s: call(drift, t, x, s, p), lambda s: call(diffusion, t, x, s, p), step, y, z
        )

    def advance(y: Array, z: Array) -> tuple[Array, None]:
        return jax.vmap(one)(y, z), None

    last, _ = lax.scan(jax.checkpoint(advance), start, innovations)
    return last


def ergodic_nodes(
    law: ErgodicAverage,
    shape: tuple[int, ...],
    noise: FixedNoise,
    drift: Any,
    diffusion: Any,
    t: Any,
    x: Any,
    p: Any,
) -> tuple[Array, Array]:
    """Kept states of all chains, equally weighted."""
    first, kept, between = law._kept
    dtype = jnp.result_type(float, x)
    z = jnp.asarray(noise.values, dtype)
    y = jnp.full((law.num_chains, *shape), law.start, dtype)
    run = (drift, diffusion, law.step)
    if first:
        y = simulate(*run, y, z[:first], t, x, p)

    def block(y: Array, z: Array) -> tuple[Array, Array]:
        y = simulate(*run, y, z, t, x, p)
        return y, y

    _, states = lax.scan(block, y, z[first:].reshape(kept, between, *z.shape[1:]))
    nodes = states.reshape(-1, *shape)
    return nodes, jnp.full(nodes.shape[0], 1.0 / nodes.shape[0], dtype)
