"""Homogenisation by correlations of the simulated fast process (Green-Kubo formulae).

With `Phi = int_0^inf E F(x, Y_s) ds` the effective square is twice the integrated correlation of
the force, and the drift its integrated response to small kicks, both taken along the same chains.
Source: Pavliotis and Stuart (2008), chapter 11; Pavliotis (2014), chapter 9.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from numpyro_sde.checks.numbers import at_least
from numpyro_sde.multiscale.frozen import FixedNoise, check_times_ordered, fast_step, simulate
from numpyro_sde.multiscale.slow_fast import call, slow_squares

# Sampled means of a force with mean zero stay well below this share of its size.
_MOST_MEAN = 0.1


class GreenKubo(eqx.Module):
    """Homogenise by integrals of correlations of the simulated fast process.

    For fast dynamics that can be simulated and not solved. Independent chains forget their
    start for `burn_in` and run for two windows more: every state of the first is the origin
    of a correlation of the force with itself over the next; the response of the force to the slow
    variable and to `fast_forcing` is taken from one origin a chain. Times are those
    of the fast process, its own time over `epsilon^2`. The window must hold several correlation
    times of the force, and no more: beyond them it adds noise alone. With six of them the
    relative standard error of the square is about `2 / sqrt(num_chains)`.

    When not to use it: chaotic fast dynamics, whose response to small changes grows with the
    window; and without `table=` along a path.

    Args:
        num_chains: number of chains.
        step: step of the simulation.
        burn_in: time before correlations are taken.
        window: longest lag.
        start: first fast state of every chain.
        seed: seed of the random numbers, the same for all slow states.

    Raises:
        ValueError: fewer than 2 chains, or times that are not positive or out of order.

    Example:
        >>> from numpyro_sde.multiscale import GreenKubo
        >>> GreenKubo(num_chains=1000).window
        6.0
    """

    num_chains: int = eqx.field(static=True, default=16_384)
    step: float = eqx.field(static=True, default=0.05)
    burn_in: float = eqx.field(static=True, default=6.0)
    window: float = eqx.field(static=True, default=6.0)
    start: float = eqx.field(static=True, default=0.0)
    seed: int = eqx.field(static=True, default=0)

    def __check_init__(self) -> None:
        at_least("num_chains", self.num_chains, 2)
        check_times_ordered(step=self.step, window=self.window)
        check_times_ordered(step=self.step, burn_in=self.burn_in)

    @property
    def num_steps(self) -> tuple[int, int]:
        """Steps before correlations are taken, and steps of one window."""
        return round(self.burn_in / self.step), round(self.window / self.step)


def green_kubo(
    functions: dict[str, Any],
    method: GreenKubo,
    fast: tuple[int, ...],
    noise: FixedNoise,
    t: Any,
    x: Any,
    p: Any,
) -> tuple[Array, Array]:
    """Effective drift and square at one slow state by simulated correlations."""
    x = jnp.asarray(x, jnp.result_type(float, x))
    z = jnp.asarray(noise.values, x.dtype)
    first, lags = method.num_steps
    dynamics = (functions["fast_drift"], functions["fast_diffusion"])
    start = jnp.full((method.num_chains, *fast), method.start, x.dtype)
    y = simulate(*dynamics, method.step, start, z[:first], t, x, p)

    def force(x: Array, one: Array) -> Array:
        return call(functions["slow_forcing"], t, x, one, p)

    def forces_along(shift: Array, y: Array, z: Array) -> tuple[Array, Array]:
        """Last state, and `F(x + shift, Y)` at the start and after every step of one chain."""
        here = x + shift

        def advance(y: Array, z: Array) -> tuple[Array, Array]:
            after = fast_step(
                lambda s: call(dynamics[0], t, here, s, p),
                lambda s: call(dynamics[1], t, here, s, p),
                method.step,
                y,
                z,
            )
            return after, force(here, after)

        last, forces = lax.scan(advance, y, z)
        return last, jnp.concatenate([force(here, y)[None], forces])

    def one_chain(y: Array, z: Array) -> tuple[Array, Array, Array, Array]:
        pull, push = force(x, y), jnp.zeros_like(y)
        if "fast_forcing" in functions:
            push = call(functions["fast_forcing"], t, x, y, p)

        def window(shift: Array, moved: Array) -> tuple[Array, tuple[Array, Array]]:
            last, forces = forces_along(shift, moved, z[:lags])
            ends = 0.5 * (forces[0] + forces[-1])
            return method.step * (jnp.sum(forces, axis=0) - ends), (last, forces)

        # The response of the integrated force to a kick at its start: of the slow state by
        # the force, of the fast one by fast_forcing.
        _, response, (last, early) = jax.jvp(
            window, (jnp.zeros_like(x), y), (pull, push), has_aux=True
        )
        _, late = forces_along(jnp.zeros_like(x), last, z[lags:])
        drift = response + call(functions["slow_drift"], t, x, y, p)
        return early, late[1:], drift, y

    early, late, drifts, starts = jax.vmap(one_chain, in_axes=(0, 1))(y, z[first:])
    forces = jnp.concatenate([early, late], axis=1)  # (chains, 2 lags + 1, *slow)
    mean = jnp.mean(forces, axis=(0, 1))
    size = jnp.sqrt(jnp.mean(forces**2, axis=(0, 1)))
    own = slow_squares(functions, t, x, p, starts)
    centred = forces - mean[None, None]
    square = jnp.mean(own, axis=0) + twice_integrated_correlation(centred, lags, method.step)
    ok = jnp.all(jnp.abs(mean) <= _MOST_MEAN * size)
    drift = jnp.where(ok, jnp.mean(drifts, axis=0), jnp.nan)
    return drift, jnp.where(ok, square, jnp.nan)


def twice_integrated_correlation(forces: Array, lags: int, step: float) -> Array:
    """`int_0^window E (F_0 F_s' + F_s F_0') ds` from series `(chains, 2 lags + 1, *slow)`.

    Every state of the first half is an origin; prefix sums make the integrals over the window.
    """
    sums = jnp.cumsum(forces, axis=1)
    origins, ends = forces[:, : lags + 1], forces[:, lags:]
    # The trapezoidal rule: half of both ends.
    integral = sums[:, lags:] - sums[:, : lags + 1] + 0.5 * (origins - ends)
    if forces.ndim == 2:
        return 2.0 * step * jnp.mean(origins * integral)
    pairs = jnp.einsum("coi,coj->ij", origins, integral)
    return step * (pairs + pairs.T) / (origins.shape[0] * origins.shape[1])
