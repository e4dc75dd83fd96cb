"""What an interpolant learns: one network for the mean velocity and the mean noise.

At a time between two clouds `x_t = (1 - s) x_0 + s x_1 + gamma(s) z`, with s from 0 to 1 and the
gap's length T. Learned are the conditional means

    m(t, x) = E[(x_1 - x_0) / T | x_t = x],   eta(t, x) = E[z | x_t = x],

both bounded where the velocity `b = m + gamma' eta / T` and the score `-eta / gamma` are not: at
the ends gamma' and 1 / gamma blow up (Albergo, Boffi and Vanden-Eijnden 2023, "Stochastic
interpolants", arXiv:2303.08797, section 2).
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_sde.parameters import Code

# Share of a gap that is left out at its ends, where 1 / gamma blows up.
EDGE = 1e-3


class NoiseScale(eqx.Module):
    """The scale gamma of the noise inside a gap, and its slope.

    Attributes:
        size: `gamma = size sqrt(T s (1 - s))`; None where a function is given.
        function: `gamma(s)`, zero at both ends.
    """

    size: float | None = eqx.field(static=True)
    function: Code | None

    def __call__(self, s: Array, length: Array) -> Array:
        """Scale at the share s of a gap."""
        if self.function is None:
            assert self.size is not None
            return self.size * jnp.sqrt(length * s * (1.0 - s))
        return jnp.reshape(jnp.asarray(self.function(s), s.dtype), s.shape)

    def slope(self, s: Array, length: Array) -> Array:
        """Its derivative by time."""
        return jax.grad(lambda s: self(s, length))(s) / length


class LearnedVelocity(eqx.Module):
    """Velocity and score of an interpolant, for one state at one time.

    Attributes:
        net: the network, of time and standardised state.
        times: times of the clouds, `(K,)`.
        center: mean of all cells, `(d,)`.
        width: their standard deviations, `(d,)`.
        noise: the scale of the noise.
        scalar: whether states have shape `()`.
    """

    net: Any
    times: Array
    center: Array
    width: Array
    noise: NoiseScale
    scalar: bool = eqx.field(static=True)

    def place(self, t: Any) -> tuple[Array, Array, Array]:
        """Gap that holds a time, the share of it that has passed, and its length."""
        t = jnp.asarray(t, self.times.dtype)
        last = self.times.shape[0] - 2
        gap = jnp.clip(jnp.searchsorted(self.times, t, side="right") - 1, 0, last)
        length = self.times[gap + 1] - self.times[gap]
        s = (t - self.times[gap]) / length
        return gap, jnp.clip(s, EDGE, 1.0 - EDGE), length

    def means(self, gap: Array, s: Array, x: Float[Array, " d"]) -> tuple[Array, Array]:
        """Conditional means of displacement over time and of the noise, `(d,)` each."""
        white = (x - self.center) / self.width
        which = jax.nn.one_hot(gap, self.times.shape[0] - 1, dtype=x.dtype)
        angle = jnp.pi * s
        clock = jnp.stack([2.0 * s - 1.0, jnp.cos(angle), jnp.sin(angle)])
        out = self.net(jnp.concatenate([white, clock, which]))
        d = x.size
        span = self.times[-1] - self.times[0]
        return out[:d] * self.width / span, out[d:]

    def parts(self, t: Any, x: Float[Array, "*state"]) -> tuple[Array, Array]:
        """Velocity and score at one state."""
        gap, s, length = self.place(t)
        state = jnp.asarray(x, self.center.dtype)
        m, eta = self.means(gap, s, jnp.reshape(state, (-1,)))
        scale = self.noise(s, length)
        velocity, score = m + self.noise.slope(s, length) * eta, -eta / scale
        return jnp.reshape(velocity, state.shape), jnp.reshape(score, state.shape)
