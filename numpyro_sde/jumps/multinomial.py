"""Probabilities of leaving a compartment within one Euler-multinomial step, in closed form."""

from __future__ import annotations

import jax.numpy as jnp
from jax.scipy.special import gammaln
from jaxtyping import Array, ArrayLike, Float


def exit_log_pmf(
    counts: Float[ArrayLike, " R"],
    number: ArrayLike,
    hazards: Float[ArrayLike, " R"],
    dt: ArrayLike,
) -> Float[Array, ""]:
    """Log probability that so many of `number` individuals leave by each of several ways.

    Each stays with probability `exp(-dt sum r)`, else it leaves by way i with probability
    proportional to `r_i` (Bretó, He, Ionides and King 2009, equation 7).

    Args:
        counts: who left by each way.
        number: individuals at the start.
        hazards: hazards of the ways, 1/time.
        dt: length of the step.

    Example:
        >>> from numpyro_sde.jumps import exit_log_pmf
        >>> round(float(exit_log_pmf([3.0, 2.0], 20, [0.7, 0.4], 0.25)), 4)
        -2.6794
    """
    counts, hazards, dt = jnp.asarray(counts), jnp.asarray(hazards), jnp.asarray(dt)
    total = jnp.sum(hazards)
    stay = number - jnp.sum(counts)
    log_leave = jnp.log(-jnp.expm1(-dt * total)) + jnp.log(hazards) - jnp.log(total)
    ways = gammaln(number + 1.0) - jnp.sum(gammaln(counts + 1.0)) - gammaln(stay + 1.0)
    return jnp.where(stay < 0, -jnp.inf, ways + jnp.sum(counts * log_leave) - dt * total * stay)


def noisy_exit_log_pmf(
    count: ArrayLike, number: int, hazard: ArrayLike, dt: ArrayLike, noise: ArrayLike
) -> Float[Array, ""]:
    """Log probability that `count` of `number` individuals leave under gamma noise on the hazard.

    `C(n, k) sum_j (-1)^j C(k, j) (1 + r s^2 (n - k + j))^(-dt / s^2)`; the sum alternates, so only
    for small counts.

    Args:
        count: who left.
        number: individuals at the start.
        hazard: mean hazard, 1/time.
        dt: length of the step.
        noise: intensity s of the noise, square root of time.

    Example:
        >>> from numpyro_sde.jumps import noisy_exit_log_pmf
        >>> round(float(noisy_exit_log_pmf(0, 20, 0.7, 0.25, 0.3**0.5)), 3)
        -1.374
    """
    k, dt = jnp.asarray(count, jnp.result_type(float)), jnp.asarray(dt)
    j = jnp.arange(number + 1, dtype=k.dtype)
    inside = j <= k
    log_ways = gammaln(k + 1.0) - gammaln(j + 1.0) - gammaln(jnp.where(inside, k - j, 0.0) + 1.0)
    power = -dt / noise**2 * jnp.log1p(hazard * noise**2 * (number - k + j))
    terms = jnp.where(inside, (-1.0) ** j * jnp.exp(log_ways + power), 0.0)
    choose = gammaln(number + 1.0) - gammaln(k + 1.0) - gammaln(number - k + 1.0)
    return choose + jnp.log(jnp.sum(terms))
