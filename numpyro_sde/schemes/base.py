"""The protocol of a transition density over one step.

A scheme turns the coefficients of an SDE into the law of the next state, one step long, for
one state of one process; batches of series and all steps of a path are mapped by the caller.
`t` is the time at the start of the step, `dt` its length, `x` the state there. `cache` is one
step's slice of what `prepare` made for the whole grid (None where there is nothing to share).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_sde.linear.small import diagonal, solve_lower

if TYPE_CHECKING:
    from numpyro_sde.sde import SDE

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


class AbstractScheme(eqx.Module):
    """The law of the next state, one step long.

    Subclasses state what they can do: `has_density`, a transition density; `has_innovations`,
    the next state as a map of standard normal innovations. One of the two is always there.
    `has_memory`: the state of `step` carries more than the user's, which `visible` takes out.
    `keeps_positive`: positive states stay so; `reaches_zero`: the density stands at 0 too.
    `approximates_sde`: the step is that of drift and diffusion and adds nothing to them (jumps,
    say), so that a method which works on the SDE itself may stand for it.
    `smooth`: the next state is a smooth map of the innovations, so that what differentiates a step
    may take it. `restarts`: accumulators in the state start again at zero in each step. `counts`:
    states are whole numbers. `has_jumps`: the jumps of an SDE that has any are in the step.
    `taken_by`: the engines that take paths of this law, for those that refuse it to name; empty
    where a law asks for nothing special.

    Example:
        >>> from numpyro_sde import schemes
        >>> isinstance(schemes.Euler(), schemes.AbstractScheme)
        True
        >>> schemes.Euler.has_density, schemes.DiffraxSolver.has_density
        (True, False)
    """

    has_density: ClassVar[bool] = True
    has_innovations: ClassVar[bool] = True
    keeps_positive: ClassVar[bool] = False
    reaches_zero: ClassVar[bool] = False
    has_memory: ClassVar[bool] = False
    approximates_sde: ClassVar[bool] = False
    smooth: ClassVar[bool] = True
    restarts: ClassVar[bool] = False
    counts: ClassVar[bool] = False
    has_jumps: ClassVar[bool] = False
    taken_by: ClassVar[str] = ""

    def resolve(self, sde: SDE) -> AbstractScheme:  # noqa: ARG002
        """Return the scheme to use for this SDE (itself, unless it delegates)."""
        return self

    def check(self, sde: SDE, state_shape: tuple[int, ...]) -> None:
        """Raise a `ValueError` if the scheme cannot treat this SDE."""

    def require_smooth(self, user: str) -> None:
        """Refuse what differentiates a step, or replaces its innovations by others.

        Raises:
            ValueError: the innovations of this scheme are not smooth.
        """
        if not self.smooth:
            otherwise = (
                "use filters.Particle(proposal='bootstrap') or 'auxiliary', infer.PMMH, or "
                "ConditionalSMC(proposal='bootstrap', renewal='none')"
            )
            raise ValueError(
                f"{user} needs steps that are smooth maps of their innovations, which those of "
                f"{type(self).__name__} are not: {self.remedy(otherwise)}"
            )

    def remedy(self, otherwise: str) -> str:
        """What to do where an engine refuses paths of this law."""
        return f"use {self.taken_by}" if self.taken_by else otherwise

    def linearizable(self) -> AbstractScheme:
        """Return the scheme in a form that is differentiable in both modes, twice.

        Filters and guides take the Jacobian of a step, and samplers the gradient through it.
        """
        return self

    def gaussian_form(
        self,
        sde: SDE,  # noqa: ARG002
        state_shape: tuple[int, ...],  # noqa: ARG002
    ) -> GaussianScheme | None:
        """The scheme by mean and covariance, where its transition is normal; None elsewhere.

        Filters that carry two moments take a chosen scheme in this form or refuse it.
        """
        return None

    def prepare(self, sde: SDE, times: Any, dt: Any) -> Any:  # noqa: ARG002
        """Compute, for the whole grid, what the steps share: leaves with leading axis `T - 1`.

        `times` has shape `(T,)` and `dt` `(T - 1,)`. Both are NumPy arrays where they are
        known before tracing, so that equal steps can be found on the host.
        """
        return None

    def innovation_shape(self, sde: SDE, state_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of one step's standard normal innovations."""
        return sde.structure(state_shape).innovation_shape

    def carry(self, sde: SDE, x0: Array) -> Array:  # noqa: ARG002
        """The first state as `step` takes it: with `has_memory` it carries more than x."""
        return x0

    def lift(self, sde: SDE, times: Any, dt: Any, path: Array, cache: Any) -> Array:  # noqa: ARG002
        """States `(T, *state)` as `step` takes them."""
        return path

    def visible(self, states: Array) -> Array:
        """The user's part of the states that `step` makes."""
        return states

    @abstractmethod
    def log_density(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Float[Array, ""]:
        """Log density of the next state given the state `x`."""

    def log_densities(
        self, sde: SDE, times: Any, dt: Any, path: Array, cache: Any
    ) -> Float[Array, "T-1"]:
        """Log density of each step of a path of shape `(T, *state)`."""
        axes = (None, 0, 0, 0, 0, None if cache is None else 0)
        return jax.vmap(self.log_density, axes)(sde, times[:-1], dt, path[:-1], path[1:], cache)

    def log_density_sum(
        self, sde: SDE, times: Any, dt: Any, path: Array, cache: Any
    ) -> Float[Array, ""]:
        """Sum of `log_densities`; to override where the sum is cheaper than its terms."""
        return jnp.sum(self.log_densities(sde, times, dt, path, cache))

    @abstractmethod
    def step(self, sde: SDE, t: Array, dt: Array, x: Array, z: Array, cache: Any = None) -> Array:
        """Next state as a map of standard normal innovations `z`."""

    @abstractmethod
    def invert(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Array:
        """Innovations that lead from `x` to `x_next`: the inverse of `step`."""

    def draw(
        self, sde: SDE, key: PRNGKeyArray, t: Array, dt: Array, x: Array, cache: Any = None
    ) -> Array:
        """Draw the next state."""
        shape = self.innovation_shape(sde, jnp.shape(x))
        return self.step(sde, t, dt, x, jax.random.normal(key, shape, jnp.result_type(x)), cache)


class GaussianScheme(AbstractScheme):
    """A scheme whose transition is Gaussian, given by its mean and a factor of its covariance.

    A subclass defines `moments`; density, step and inverse follow from it.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> class Heun(nsde.schemes.GaussianScheme):
        ...     def moments(self, sde, t, dt, x, cache=None):
        ...         first = sde.ito_drift_at(t, x)
        ...         second = sde.ito_drift_at(t + dt, x + dt * first)
        ...         factor = sde.noise_factor_at(t, x) * jnp.sqrt(dt)
        ...         return x + 0.5 * dt * (first + second), factor
        >>> sde = nsde.SDE(lambda t, x: -x, lambda t, x: 0.5)
        >>> x_next = Heun().step(sde, 0.0, 0.1, jnp.array(1.0), jnp.array(0.3))
        >>> round(float(Heun().invert(sde, 0.0, 0.1, jnp.array(1.0), x_next)), 4)
        0.3
    """

    approximates_sde: ClassVar[bool] = True

    def gaussian_form(
        self,
        sde: SDE,  # noqa: ARG002
        state_shape: tuple[int, ...],  # noqa: ARG002
    ) -> GaussianScheme:
        return self

    @abstractmethod
    def moments(
        self, sde: SDE, t: Array, dt: Array, x: Array, cache: Any = None
    ) -> tuple[Array, Array]:
        """Mean and factor of the next state.

        The factor has the shape of the state (standard deviations, independent components) or
        shape `(d, m)` with covariance `factor @ factor.T`; square factors are lower triangular.
        """

    def log_density(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Float[Array, ""]:
        mean, factor = self.moments(sde, t, dt, x, cache)
        return gaussian_log_density(x_next, mean, factor)

    def step(self, sde: SDE, t: Array, dt: Array, x: Array, z: Array, cache: Any = None) -> Array:
        mean, factor = self.moments(sde, t, dt, x, cache)
        return mean + (factor * z if factor.ndim == mean.ndim else factor @ z)

    def invert(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Array:
        mean, factor = self.moments(sde, t, dt, x, cache)
        if factor.ndim == mean.ndim:
            return (x_next - mean) / factor
        require_square(factor)
        return solve_lower(factor, (x_next - mean)[:, None])[:, 0]


def gaussian_log_density(x: Array, mean: Array, factor: Array) -> Float[Array, ""]:
    """Log density of `N(mean, factor factor')` at `x`; factor diagonal or lower triangular."""
    if factor.ndim == mean.ndim:
        # The sign of a diffusion coefficient carries no information: only its square does.
        z = (x - mean) / factor
        log_det = jnp.log(jnp.abs(factor))
    else:
        require_square(factor)
        z = solve_lower(factor, (x - mean)[:, None])[:, 0]
        log_det = jnp.log(jnp.abs(diagonal(factor)))
    return jnp.sum(-0.5 * z**2 - log_det) - _HALF_LOG_2PI * mean.size


def require_square(factor: Array) -> None:
    """Refuse a factor with fewer noises than states: the transition has no density."""
    if factor.shape[-1] < factor.shape[-2]:
        raise ValueError(
            f"the transition is degenerate: {factor.shape[-1]} noise(s) drive "
            f"{factor.shape[-2]} states in one step, so it has no density and no unique "
            "innovations. Use scheme=LocalLinear() or Strang(), whose steps carry the noise "
            "through the drift, or the whitened path (reparam.InnovationReparam)"
        )
