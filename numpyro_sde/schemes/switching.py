"""Steps of an SDE with a hidden regime: the regime stays within a step and moves at its end."""

# ruff: noqa: ARG002
# Methods of one protocol share its arguments, used or not.

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr
from jaxtyping import Array, Float

from numpyro_sde.jumps import forward_backward
from numpyro_sde.schemes.base import AbstractScheme, GaussianScheme
from numpyro_sde.schemes.local_linear import LocalLinear

if TYPE_CHECKING:
    from numpyro_sde.sde import SDE


class SwitchingSteps(AbstractScheme):
    """A Gaussian step given the regime, of which the path alone is seen.

    The state of `step` carries the regime behind the user's state; -1 stands for one not drawn yet.
    Densities are of the path: the forward algorithm over the regimes of the steps.

    Args:
        base: the Gaussian step within a regime.
        state_shape: shape of the user's state.

    Example:
        >>> import numpyro_sde as nsde
        >>> from numpyro_sde.schemes.switching import SwitchingSteps
        >>> SwitchingSteps.around(nsde.schemes.Euler(), ()).smooth
        False
    """

    smooth: ClassVar[bool] = False
    has_memory: ClassVar[bool] = True
    taken_by: ClassVar[str] = (
        "filters.IMM() or GPB() with NUTS, filters.RaoBlackwell(), infer.ParticleGibbs where the "
        "model is linear in each regime, or infer.PMMH and filters.Particle(proposal='bootstrap')"
    )

    base: GaussianScheme
    state_shape: tuple[int, ...] = eqx.field(static=True)

    @classmethod
    def around(cls, scheme: Any, state_shape: tuple[int, ...]) -> SwitchingSteps:
        """These steps around a Gaussian one.

        Raises:
            ValueError: a scheme that is not Gaussian.
        """
        if isinstance(scheme, cls):
            return scheme
        base = LocalLinear() if scheme is None else scheme
        if not isinstance(base, GaussianScheme):
            raise ValueError(
                f"within a regime the step of a SwitchingSDE must be Gaussian, got "
                f"{type(base).__name__}: use LocalLinear(), Euler() or Kessler()"
            )
        return cls(base, state_shape)

    @property
    def dim(self) -> int:
        """Number of components of the user's state."""
        return int(np.prod(self.state_shape, dtype=int))

    def check(self, sde: SDE, state_shape: tuple[int, ...]) -> None:
        self.base.check(sde, state_shape)

    def prepare(self, sde: Any, times: Any, dt: Any) -> Any:
        return sde.chain.transitions(dt)

    def innovation_shape(self, sde: SDE, state_shape: tuple[int, ...]) -> tuple[int, ...]:
        shape = self.base.innovation_shape(sde, self.state_shape)
        return (int(np.prod(shape, dtype=int)) + 2,)

    def carry(self, sde: SDE, x0: Array) -> Array:
        x0 = jnp.asarray(x0, jnp.result_type(x0, float))
        return jnp.concatenate([jnp.reshape(x0, (-1,)), -jnp.ones(1, x0.dtype)])

    def visible(self, states: Array) -> Array:
        if self.state_shape == ():
            return states[..., 0]
        return states[..., : self.dim]

    def lift(self, sde: SDE, times: Any, dt: Any, path: Array, cache: Any) -> Array:
        raise TypeError(
            "the regimes of a path cannot be read off it: use infer.ParticleGibbs, infer.PMMH, or "
            "filters.IMM() with NUTS"
        )

    def step(self, sde: Any, t: Array, dt: Array, x: Array, z: Array, cache: Any = None) -> Array:
        first, following = ndtr(z[-2]), ndtr(z[-1])
        regime = jnp.where(x[-1] < 0, _chosen(sde.start, first), jnp.asarray(x[-1], jnp.int32))
        state = x[0] if self.state_shape == () else x[:-1]
        shape = self.base.innovation_shape(sde, self.state_shape)
        moved = self.base.step(
            sde.in_regime(regime), t, dt, state, jnp.reshape(z[:-2], shape), None
        )
        P = sde.chain.transition_matrix(dt) if cache is None else cache
        after = _chosen(P[regime], following)
        moved = jnp.where(jnp.isnan(P[regime, 0]), jnp.nan, moved)
        return jnp.concatenate([jnp.reshape(moved, (-1,)), after[None].astype(x.dtype)])

    def in_regimes(self, sde: Any, times: Any, dt: Any, path: Array) -> Float[Array, "T-1 n"]:
        """Log density of each step of a path in each regime."""

        def one(regime: Array) -> Array:
            return self.base.log_densities(sde.in_regime(regime), times, dt, path, None)

        return jax.vmap(one, out_axes=1)(jnp.arange(sde.chain.num_states))

    def log_densities(
        self, sde: Any, times: Any, dt: Any, path: Array, cache: Any
    ) -> Float[Array, "T-1"]:
        steps = self.in_regimes(sde, times, dt, path)
        return forward_backward.forward(sde.start, cache[:-1], steps).increments

    def log_density_sum(
        self, sde: Any, times: Any, dt: Any, path: Array, cache: Any
    ) -> Float[Array, ""]:
        steps = self.in_regimes(sde, times, dt, path)
        return forward_backward.log_likelihood(sde.start, cache[:-1], steps)

    def log_density(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Float[Array, ""]:
        raise TypeError(
            "one step of a path with a hidden regime has no density by itself: it depends on the "
            "whole past"
        )

    def invert(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Array:
        raise TypeError("the regimes of a path cannot be read off it")


def _chosen(probabilities: Array, u: Array) -> Array:
    """The state at which a distribution function passes a uniform number."""
    reached = jnp.cumsum(probabilities)
    place = jnp.sum(reached < u * reached[-1])
    return jnp.minimum(place, probabilities.shape[0] - 1).astype(jnp.int32)
