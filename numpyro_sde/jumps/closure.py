"""Normal closure of the first two moments of a reaction network.

Counts with mean m and covariance C obey, exactly,

    m' = S E a(X),   C' = E (X - m) (S a(X))' + its transpose + S diag(E a(X)) S',

for the jump process and for the chemical Langevin equation alike. Closed by `X ~ N(m, C)`:
`E a = a(m) + 1/2 a'' : C`, which is exact for propensities of degree up to three, and
`E (X - m) a' = C (dE a / dm)'` (Stein). No floor keeps propensities nonnegative here, so the
equations may have no physical solution: Schnoerr, Sanguinetti and Grima (2014), J. Chem. Phys.
141, 084103. Where a mean or variance becomes negative or the moments run away, this says so.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float

from numpyro_sde.jumps.reactions import ReactionNetwork
from numpyro_sde.linear.small import diagonal

_Moments = tuple[Array, Array, Array]


class ClosedMoments(NamedTuple):
    """Moments of a network by the normal closure.

    Attributes:
        times: times, `(T,)`.
        mean: means, `(T, d)`.
        cov: covariances, `(T, d, d)`.
        valid: whether all means and variances were finite and not negative up to each time.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.jumps import ClosedMoments
        >>> ClosedMoments(jnp.zeros(1), jnp.ones((1, 1)), jnp.ones((1, 1, 1)), jnp.array([True]))[3]
        Array([ True], dtype=bool)
    """

    times: Float[Array, " T"]
    mean: Float[Array, "T d"]
    cov: Float[Array, "T d d"]
    valid: Bool[Array, " T"]


def _slopes(net: ReactionNetwork, mean: Array, cov: Array) -> tuple[Array, Array, Array]:
    """Derivatives of mean and covariance, and the mean Jacobian of the drift."""
    stoichiometry = jnp.asarray(net.stoichiometry, mean.dtype)

    def closed(mean: Array) -> Array:
        curvature = jax.hessian(net.propensities_at)(mean)
        return net.propensities_at(mean) + 0.5 * jnp.einsum("rij,ij->r", curvature, cov)

    rates, slope = closed(mean), jax.jacfwd(closed)(mean)
    J = stoichiometry @ slope
    spread = J @ cov
    noise = (stoichiometry * rates[None]) @ stoichiometry.T
    return stoichiometry @ rates, spread + spread.T + noise, J


def closed_step(
    net: ReactionNetwork,
    mean: Float[Array, " d"],
    cov: Float[Array, "d d"],
    dt: ArrayLike,
    substeps: int,
) -> tuple[Float[Array, " d"], Float[Array, "d d"], Float[Array, "d d"]]:
    """Solve the closed equations over one step, by Runge-Kutta steps of order four.

    Returns:
        Mean, covariance, and covariance of the state before with the state after; NaN where a mean
        or variance of the species became negative on the way.
    """
    if net.accumulated:
        raise ValueError("moment closure has no accumulators: use laws.LinearNoise() for fluxes")
    net = net.with_floor(None)
    h = jnp.asarray(dt, mean.dtype) / substeps

    def slope(state: _Moments) -> _Moments:
        m, C, cross = state
        dm, dC, J = _slopes(net, m, C)
        return dm, dC, cross @ J.T

    def moved(state: _Moments, along: _Moments, size: Array) -> _Moments:
        m, C, cross = (a + size * b for a, b in zip(state, along, strict=True))
        return m, C, cross

    def step(carry: tuple[_Moments, Array], _: None) -> tuple[tuple[_Moments, Array], None]:
        state, valid = carry
        k1 = slope(state)
        k2 = slope(moved(state, k1, h / 2))
        k3 = slope(moved(state, k2, h / 2))
        k4 = slope(moved(state, k3, h))
        m, C, cross = (
            a + h / 6 * (b1 + 2 * b2 + 2 * b3 + b4)
            for a, b1, b2, b3, b4 in zip(state, k1, k2, k3, k4, strict=True)
        )
        valid = valid & is_physical(m, C)
        return ((m, C, cross), valid), None

    start = ((mean, cov, cov), is_physical(mean, cov))
    (state, valid), _ = lax.scan(step, start, None, substeps)
    mean, cov, cross = (jnp.where(valid, a, jnp.nan) for a in state)
    return mean, 0.5 * (cov + cov.T), cross


def is_physical(mean: Float[Array, " d"], cov: Float[Array, "d d"]) -> Bool[Array, ""]:
    """Whether means and variances are finite and not negative, but for rounding."""
    variances = diagonal(cov)
    slack = 1e-6 * (1.0 + jnp.max(jnp.abs(mean)))
    finite = jnp.all(jnp.isfinite(mean)) & jnp.all(jnp.isfinite(variances))
    return finite & jnp.all(mean >= -slack) & jnp.all(variances >= -slack)


def moment_closure(
    net: ReactionNetwork,
    times: ArrayLike,
    mean: ArrayLike,
    cov: ArrayLike | None = None,
    *,
    substeps: int = 20,
) -> ClosedMoments:
    """Mean and covariance of a network's counts by the normal closure of second order.

    Args:
        net: the network, one process.
        times: increasing times, shape `(T,)`.
        mean: mean at the first time, shape `(d,)`.
        cov: covariance there; None for a fixed start.
        substeps: Runge-Kutta steps between two times.

    Returns:
        Moments, NaN from the first time at which no distribution has them, and a flag.
        Valid moments may still be far from true: compare several starts, and simulation.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> births_and_deaths = nsde.ReactionNetwork([[0, 1]], [[1, 0]], jnp.array([12.0, 0.6]))
        >>> moments = nsde.jumps.moment_closure(births_and_deaths, [0.0, 50.0], [0.0])
        >>> moments.mean[-1].round(2).tolist(), moments.cov[-1].round(2).tolist()
        ([20.0], [[20.0]])
    """
    times = jnp.asarray(times, jnp.result_type(float))
    mean = jnp.asarray(mean, times.dtype)
    cov = jnp.zeros((mean.size, mean.size), times.dtype) if cov is None else jnp.asarray(cov)

    def step(carry: tuple[Array, Array], dt: Array) -> tuple[tuple[Array, Array], Any]:
        m, C, _ = closed_step(net, *carry, dt, substeps)
        return (m, C), (m, C)

    _, (means, covs) = lax.scan(step, (mean, cov), jnp.diff(times))
    means = jnp.concatenate([mean[None], means])
    covs = jnp.concatenate([cov[None], covs])
    return ClosedMoments(times, means, covs, jnp.all(jnp.isfinite(means), axis=1))
