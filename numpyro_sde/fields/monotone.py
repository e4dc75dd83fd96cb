"""Increasing and decreasing functions: the slope is the exponential of a field."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from numpyro_sde.fields.field import AbstractField, as_point

_NODES, _MASS = np.polynomial.legendre.leggauss(20)


class MonotoneField(AbstractField):
    """`sign int_middle^x exp(g(u)) du` for a field g of one coordinate.

    The integral by Gauss-Legendre quadrature of 20 points. Add a constant for the level:
    `f + level`. Not linear in the weights of g, so it cannot be collapsed.

    Attributes:
        log_slope: g.
        middle: where the field is zero.
        sign: 1 or -1.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> prior = nsde.fields.HSGP(dim=1, box=2.0, num=8, constraint="increasing")
        >>> f = prior.from_weights(jnp.zeros(8), amplitude=1.0, length=1.0)
        >>> [round(float(f(x)), 4) for x in (-1.0, 0.0, 1.0)]  # g = 0: the identity
        [-1.0, 0.0, 1.0]
    """

    log_slope: AbstractField
    middle: float = eqx.field(static=True)
    sign: float = eqx.field(static=True)

    @property
    def leaf_ranks(self) -> list[int | None]:
        return self.log_slope.leaf_ranks

    def __call__(self, x: Float[ArrayLike, "*state"]) -> Array:
        x = as_point(x, 1)[0]
        half = 0.5 * (x - self.middle)
        nodes = self.middle + half * (1.0 + jnp.asarray(_NODES, x.dtype))
        slopes = jnp.exp(jax.vmap(self.log_slope)(nodes))
        return self.sign * half * (slopes @ jnp.asarray(_MASS, x.dtype))
