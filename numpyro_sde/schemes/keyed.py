"""Steps that need a number of random numbers which is not known beforehand.

Such a step draws them from a random key, and the key is made of the bits of two standard normals,
so that the step is a map of innovations as those of other schemes are: particle filters take it as
it is. The map is not smooth in them, which `smooth = False` says; nothing that differentiates a
step will take it.
"""

# ruff: noqa: ARG002
# Methods of one protocol share its arguments, used or not.

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_sde.schemes.base import AbstractScheme

if TYPE_CHECKING:
    from numpyro_sde.sde import SDE


def key_of(z: Float[Array, " 2"]) -> PRNGKeyArray:
    """A random key from the bits of two standard normals.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sde.schemes.keyed import key_of
        >>> jax.random.uniform(key_of(jnp.array([0.3, -1.2]))).shape
        ()
    """
    bits = lax.bitcast_convert_type(lax.stop_gradient(z), jnp.uint32)
    if bits.ndim == 2:  # float64: two words each, of which the lower one is random throughout
        bits = bits[:, 0] ^ bits[:, 1]
    return jax.random.wrap_key_data(bits, impl="threefry2x32")


class KeyedScheme(AbstractScheme):
    """A step that subclasses draw from a random key.

    Example:
        >>> from numpyro_sde import schemes
        >>> from numpyro_sde.schemes.keyed import KeyedScheme
        >>> issubclass(schemes.Gillespie, KeyedScheme), schemes.Gillespie.smooth
        (True, False)
    """

    smooth: ClassVar[bool] = False

    def innovation_shape(self, sde: SDE, state_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (2,)

    def step(self, sde: SDE, t: Array, dt: Array, x: Array, z: Array, cache: Any = None) -> Array:
        return self.draw(sde, key_of(z), t, dt, x, cache)

    @abstractmethod
    def draw(
        self, sde: SDE, key: PRNGKeyArray, t: Array, dt: Array, x: Array, cache: Any = None
    ) -> Array:
        """Draw the next state."""

    def invert(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Array:
        raise TypeError(f"the innovations of {type(self).__name__}() cannot be read off its ends")
