"""Which regime a path that is seen itself was in: exact, by the forward-backward algorithm."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from numpyro_sde.distributions.path_law import AbstractPathLaw
from numpyro_sde.jumps import forward_backward
from numpyro_sde.schemes.switching import SwitchingSteps


class RegimeLaw(NamedTuple):
    """Probabilities of the regime of the step that ends at each time.

    At the first time they are those of the first step.

    Attributes:
        filtered: given the path up to that time, `(*lead, T, n)`; at the first time, before all.
        smoothed: given the whole path, `(*lead, T, n)`.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.RegimeLaw._fields
        ('filtered', 'smoothed')
    """

    filtered: Float[Array, "*lead T n"]
    smoothed: Float[Array, "*lead T n"]


def regime_law(path: AbstractPathLaw, value: ArrayLike) -> RegimeLaw:
    """The law of the regimes of a `SwitchingSDE` given its path without noise.

    Exact on the path's grid, whose density (`path.log_prob(value)`) integrates the regimes out. Of
    a path seen with noise, `filters.RaoBlackwell`, `IMM` and `GPB` give regimes.

    Args:
        path: the law of the path, its parameters given.
        value: the path, `(*lead, T, *state)`.

    Raises:
        ValueError: a path without regimes or of one time, or a value that does not fit.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> chain = nsde.MarkovJumpProcess(jnp.array([[0.0, 0.6], [1.0, 0.0]]), 2)
        >>> sde = nsde.SwitchingSDE(lambda t, x, r: -x, lambda t, x, r: 0.1 + 0.9 * r, chain)
        >>> path = nsde.SDEPath(sde, [0.0, 0.5, 1.0], 0.0)
        >>> law = nsde.regime_law(path, [0.0, 0.02, 1.2])
        >>> (law.smoothed[:, 1] > 0.5).tolist()
        [False, False, True]
    """
    scheme = getattr(path, "scheme", None)
    if not isinstance(scheme, SwitchingSteps):
        raise ValueError(
            "regime_law is for the path of an nsde.SwitchingSDE, got "
            f"{type(path).__name__} of scheme {type(scheme).__name__}; the states of other paths "
            "are drawn by nsde.smooth"
        )
    if path.num_times < 2:
        raise ValueError("regime_law needs a path of two times or more: a regime is a step's")
    value = jnp.asarray(value, jnp.result_type(float))
    lead = path._lead(value)
    value = jnp.broadcast_to(value, lead + path.event_shape)

    def one(sde: Any, scheme: Any, times: Any, dt: Any, cache: Any, x: Array) -> RegimeLaw:
        steps = scheme.in_regimes(sde, times, dt, x)
        passed = forward_backward.forward(sde.start, cache[:-1], steps)
        smoothed = forward_backward.smooth(sde.start, cache[:-1], steps)
        return RegimeLaw(
            jnp.concatenate([sde.start[None], passed.filtered]),
            jnp.concatenate([smoothed[:1], smoothed]),
        )

    law: RegimeLaw = path._map(one, lead, (value,), (path.event_dim,))
    return law
