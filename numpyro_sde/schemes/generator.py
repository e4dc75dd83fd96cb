"""The Ito generator of an SDE acting on functions of time and state, by forward derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array

if TYPE_CHECKING:
    from numpyro_sde.sde import SDE

Function = Callable[[Array, Array], Array]


def generator(sde: SDE, fn: Function) -> Function:
    """Apply `L = d_t + f . grad + 1/2 sum_j (L_j . grad)^2` (second derivatives only) to `fn`.

    Args:
        sde: an unbatched equation.
        fn: function of `(t, x)` that returns an array of any shape.

    Returns:
        A function of `(t, x)` of the same output shape: `d/dh E[fn(t + h, X_{t+h})]` at `h = 0`
        (Kloeden and Platen 1992, section 5.1).
    """

    def apply(t: Array, x: Array) -> Array:
        first = along_drift(fn, t, x, sde.ito_drift_at(t, x))
        return first + half_second_derivative(sde, fn, t, x)

    return apply


def along_drift(fn: Function, t: Array, x: Array, drift: Array) -> Array:
    """`d_t fn + drift . grad fn`."""
    return jax.jvp(fn, (t, x), (jnp.ones_like(t), drift.astype(x.dtype)))[1]


def half_second_derivative(sde: SDE, fn: Function, t: Array, x: Array) -> Array:
    """`1/2 sum_kl (L L')_kl d_k d_l fn`, one second derivative for each Brownian motion."""

    def along(direction: Array) -> Array:
        def slope(s: Array) -> Array:
            return jax.jvp(lambda y: fn(t, y), (s,), (direction,))[1]

        return jax.jvp(slope, (x,), (direction,))[1]

    if x.ndim == 0:
        return 0.5 * along(sde.noise_factor_at(t, x).astype(x.dtype))
    columns = sde.diffusion_columns_at(t, x).astype(x.dtype)
    return 0.5 * jnp.sum(jax.vmap(along, in_axes=1)(columns), axis=0)


def as_point(t: Array, x: Array) -> tuple[Array, Array]:
    """Time and state as arrays of one floating type, ready for derivatives in both."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.result_type(float))
    return jnp.asarray(t, x.dtype), x
