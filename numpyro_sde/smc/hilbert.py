"""Particles in the order of a curve that fills space.

Source: Skilling (2004), "Programming the Hilbert curve".
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def hilbert_order(x: Float[Array, "d M"], bits: int = 10) -> Int[Array, " M"]:
    """Indices that sort points along Hilbert's curve; by value where d = 1.

    Neighbours in this order are neighbours in space, so that resampling changes little when the
    random numbers do (Gerber and Chopin 2015; Deligiannidis, Doucet and Pitt 2018). Coordinates
    beyond the third are not looked at.

    Example:
        >>> import jax.numpy as jnp
        >>> hilbert_order(jnp.array([[0.3, 0.1, 0.2]])).tolist()
        [1, 2, 0]
    """
    d = min(x.shape[0], 3)
    if d == 1:
        return jnp.argsort(x[0])
    spread = jnp.std(x[:d], axis=1, keepdims=True)
    scaled = (x[:d] - jnp.mean(x[:d], axis=1, keepdims=True)) / jnp.where(spread > 0, spread, 1.0)
    cells = jnp.clip(jax.scipy.stats.norm.cdf(scaled) * 2**bits, 0, 2**bits - 1)
    axes = list(jnp.nan_to_num(cells).astype(jnp.uint32))
    top = 1 << (bits - 1)
    q = top
    while q > 1:
        low = jnp.uint32(q - 1)
        for i in range(d):
            set_ = (axes[i] & q) != 0
            swap = jnp.where(set_, 0, (axes[0] ^ axes[i]) & low)
            axes[0] = jnp.where(set_, axes[0] ^ low, axes[0] ^ swap)
            if i > 0:
                axes[i] = axes[i] ^ swap
        q >>= 1
    for i in range(1, d):
        axes[i] = axes[i] ^ axes[i - 1]
    flip = jnp.zeros_like(axes[0])
    q = top
    while q > 1:
        flip = jnp.where((axes[d - 1] & q) != 0, flip ^ jnp.uint32(q - 1), flip)
        q >>= 1
    axes = [a ^ flip for a in axes]
    position = jnp.zeros_like(axes[0])
    for bit in range(bits - 1, -1, -1):
        for i in range(d):
            position = (position << 1) | ((axes[i] >> bit) & 1)
    return jnp.argsort(position)
