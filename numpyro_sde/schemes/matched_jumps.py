"""A normal step with the mean and covariance of a jump-diffusion's: jumps by two moments."""

# ruff: noqa: ARG002
# Methods of one protocol share its arguments, used or not.

from __future__ import annotations

from typing import Any, ClassVar, cast

import jax.numpy as jnp
from jaxtyping import Array

from numpyro_sde.linear.small import psd_factor
from numpyro_sde.schemes.base import GaussianScheme
from numpyro_sde.schemes.euler import Euler
from numpyro_sde.schemes.jump_euler import check_jumps
from numpyro_sde.sde import SDE


class MatchedJumps(GaussianScheme):
    """A Gaussian step to whose mean and covariance those of the jumps are added.

    The step of the base for the diffusion with drift `f + rate E J` and covariance
    `L L' + rate E J J'`, for jumps J of any law with two moments: with `Euler()` these are the
    moments of a step of `JumpEuler`, with `LocalLinear()` those of a linear SDE over any step,
    exactly. Filters that carry two moments, guides and whitened paths take it; what it loses are
    the tails: a jump becomes a spell of large noise, single steps are far less surprising than they
    are, and smoothed paths round jumps off. Right where many small jumps fall into each step, wrong
    for a few large ones: compare with `filters.Particle(proposal="bootstrap")`.

    Args:
        base: the Gaussian step without jumps.

    Raises:
        TypeError: a base that is not Gaussian.
        ValueError: in use, an SDE without jumps.

    Example:
        >>> import numpyro.distributions as dist, numpyro_sde as nsde
        >>> merton = nsde.SDE(lambda t, x: 0.05, lambda t, x: 0.2,
        ...                   jumps=nsde.CompoundPoisson(3.0, dist.Normal(-0.1, 0.15)))
        >>> mean, sd = nsde.schemes.MatchedJumps().moments(merton, 0.0, 0.25, 0.0)
        >>> round(float(mean), 4), round(float(sd**2), 6)
        (-0.0625, 0.034375)
    """

    has_jumps: ClassVar[bool] = True
    approximates_sde: ClassVar[bool] = False

    base: GaussianScheme

    def __init__(self, base: GaussianScheme | None = None) -> None:
        base = Euler() if base is None else base
        if not isinstance(base, GaussianScheme):
            raise TypeError(f"base must be a Gaussian scheme such as Euler(), got {base!r}")
        self.base = base

    def check(self, sde: SDE, state_shape: tuple[int, ...]) -> None:
        check_jumps(self, sde)
        self.base.check(matched_diffusion(sde), state_shape)

    def prepare(self, sde: SDE, times: Any, dt: Any) -> Any:
        return self.base.prepare(matched_diffusion(sde), times, dt)

    def linearizable(self) -> MatchedJumps:
        return MatchedJumps(cast("GaussianScheme", self.base.linearizable()))

    def innovation_shape(self, sde: SDE, state_shape: tuple[int, ...]) -> tuple[int, ...]:
        return state_shape

    def moments(
        self, sde: SDE, t: Array, dt: Array, x: Array, cache: Any = None
    ) -> tuple[Array, Array]:
        return self.base.moments(matched_diffusion(sde), t, dt, x, cache)


def matched_diffusion(sde: SDE) -> SDE:
    """The diffusion with the mean and the covariance rate of a jump-diffusion, one process.

    Drift `f + rate E J`, diffusion a factor of `L L' + rate E J J'`.
    """

    def rates(t: Any, x: Array) -> tuple[Array, Array]:
        x = jnp.asarray(x, jnp.result_type(x, float))
        drift = jnp.asarray(sde.ito_drift_at(t, x))
        columns = jnp.reshape(sde.diffusion_columns_at(t, x), (max(x.size, 1), -1))
        cov = columns @ columns.T
        for source in sde.jumps:
            rate = source.rate_at(t, x, sde.arguments)
            mean, size_cov = source.size_moments(t, x, sde.arguments)
            flat = jnp.reshape(mean, (-1,))
            drift = drift + rate * mean
            cov = cov + rate * (size_cov + flat[:, None] * flat[None, :])
        return drift, cov

    def diffusion(t: Any, x: Array) -> Array:
        cov = rates(t, x)[1]
        return jnp.sqrt(cov[0, 0]) if jnp.ndim(x) == 0 else psd_factor(cov)

    return SDE(lambda t, x: rates(t, x)[0], diffusion)
