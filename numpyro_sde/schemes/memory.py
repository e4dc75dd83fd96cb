"""Schemes whose state carries the memory of the noise beside the user's state."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_sde.noise.markov_fbm import MarkovFBM
from numpyro_sde.schemes.base import AbstractScheme
from numpyro_sde.schemes.dependence import dependence
from numpyro_sde.schemes.euler import Euler

if TYPE_CHECKING:
    from numpyro_sde.sde import SDE


class MemoryScheme(AbstractScheme):
    """A scheme whose state carries the mean of the bank beside the user's state.

    `carry` puts the first state and the bank's mean, zero, into one vector `(D,)`; `lift` does so
    for a whole path, `visible` takes the user's part out. `step` and `invert` act on vectors.

    Args:
        state_shape: shape of the user's state, `()` or `(d,)`.
    """

    state_shape: tuple[int, ...] = eqx.field(static=True)

    has_memory: ClassVar[bool] = True

    @property
    def dim(self) -> int:
        """Number of components of the user's state."""
        return int(np.prod(self.state_shape, dtype=int))

    def plain(self) -> AbstractScheme:
        """The scheme for Brownian motion that this one extends."""
        return Euler()

    def innovation_shape(self, sde: SDE, state_shape: tuple[int, ...]) -> tuple[int, ...]:
        del state_shape  # filters ask with that of the carried vector
        return sde.structure(self.state_shape).innovation_shape

    def check(self, sde: SDE, state_shape: tuple[int, ...]) -> None:
        structure = sde.structure(state_shape)
        shape = structure.diffusion_shape
        if len(shape) > len(state_shape) and shape[-1] > self.dim:
            raise ValueError(
                f"diffusion has shape {shape}: with noise {type(sde.noise).__name__} there can be "
                f"no more noises than the {self.dim} component(s) of the state"
            )
        if sde.interpretation != "ito" or not dependence(sde, "diffusion", state_shape).state:
            return
        hurst = noise_of(sde).hurst
        known = not (noise_of(sde).varies or isinstance(hurst, jax.core.Tracer))
        if known and np.any(np.asarray(hurst) < 0.5):
            raise ValueError(
                "with H < 1/2 and a diffusion that depends on the state no Ito integral exists: "
                "its correction grows without bound with the number of terms. Give SDE "
                "interpretation='stratonovich'"
            )

    def visible(self, states: Float[Array, "*n D"]) -> Array:
        """The user's part of carried states."""
        return states[..., 0] if self.state_shape == () else states[..., : self.dim]

    def carry(self, sde: SDE, x0: Array) -> Float[Array, " D"]:
        """The first state with the bank's mean, which is zero."""
        bank = jnp.zeros(self.num_noises(sde) * num_states(sde), jnp.result_type(x0))
        return jnp.concatenate([jnp.reshape(x0, (self.dim,)), bank])

    def num_noises(self, sde: SDE) -> int:
        """Number of independent noises."""
        return int(np.prod(self.innovation_shape(sde, self.state_shape), dtype=int))

    def split(self, sde: SDE, carried: Float[Array, " D"]) -> tuple[Array, Float[Array, "m n"]]:
        """The user's state, and the mean of each noise's bank."""
        x = carried[0] if self.state_shape == () else carried[: self.dim]
        return x, carried[self.dim :].reshape(-1, num_states(sde))

    def join(self, x: Array, means: Float[Array, "m n"]) -> Float[Array, " D"]:
        """One vector of the user's state and the means of the banks."""
        return jnp.concatenate([jnp.reshape(x, (self.dim,)), means.ravel()])

    @abstractmethod
    def lift(self, sde: SDE, times: Any, dt: Any, path: Array, cache: Any) -> Float[Array, "T D"]:
        """The carried states along a path `(T, *state)`: the bank's means given the path."""

    def log_densities(
        self, sde: SDE, times: Any, dt: Any, path: Array, cache: Any
    ) -> Float[Array, "T-1"]:
        states = self.lift(sde, times, dt, path, cache)
        return super().log_densities(sde, times, dt, states, cache)


def noise_of(sde: SDE) -> MarkovFBM:
    """The noise of an SDE that a scheme with memory treats."""
    return cast("MarkovFBM", sde.noise)


def num_states(sde: SDE) -> int:
    """Number of processes of one noise, a constant included."""
    noise = noise_of(sde)
    return noise.num_terms + (noise.fit == "law")


def noise_columns(sde: SDE, t: Any, x: Array) -> Float[Array, "d m"]:
    """Diffusion with one column for each noise."""
    columns = sde.diffusion_columns_at(t, x)
    return jnp.reshape(columns, (-1, columns.shape[-1]))
