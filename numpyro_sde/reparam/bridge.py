"""The modified diffusion bridge: paths forced through given states.

Between two states known exactly, Durham and Gallant (2002) propose each Euler step with its
mean pulled straight to the next known state and its variance shrunk accordingly. The ratio of
the path's true density to the proposal's makes it exact (Roberts and Stramer 2001).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float
from numpy.typing import NDArray

from numpyro_sde.linear.small import diagonal

if TYPE_CHECKING:
    from numpyro_sde.schemes.base import AbstractScheme
    from numpyro_sde.sde import SDE


class BridgePlan(NamedTuple):
    """Which steps of a grid are free, pulled to a later state, or determined.

    Attributes:
        target: for each step the index of the next known state, or -1 past the last one.
        point: for each step the row of the known states that it is pulled to.
        determined: whether the step ends at a known state.
        free: indices of the other steps; each takes innovations.
    """

    target: NDArray[np.int64]
    point: NDArray[np.int64]
    determined: NDArray[np.bool_]
    free: NDArray[np.int64]


def plan_bridge(num_times: int, index: NDArray[np.int64]) -> BridgePlan:
    """Lay out the steps of a grid of `num_times` times with known states at `index`."""
    ends = np.arange(1, num_times)
    point = np.searchsorted(index, ends)
    beyond = point == len(index)
    point = np.where(beyond, len(index) - 1, point)
    target = np.where(beyond, -1, index[point])
    determined = target == ends
    return BridgePlan(target, point, determined, np.flatnonzero(~determined))


def bridge_path(
    plan: BridgePlan,
    sde: SDE,
    scheme: AbstractScheme,
    times: Any,
    dt: Any,
    cache: Any,
    x0: Array,
    z: Float[Array, "free ..."],
    points: Float[Array, "K ..."],
) -> tuple[Array, Float[Array, ""]]:
    """Map innovations of the free steps to a path through the known states.

    Args:
        plan: the layout from `plan_bridge`.
        sde: the unbatched equation.
        scheme: its transition density.
        times: grid times, shape `(T,)`.
        dt: step lengths, shape `(T - 1,)`.
        cache: what the scheme prepared for the grid.
        x0: first state.
        z: standard normal innovations of the free steps, `plan.free.size` of them.
        points: the known states, in order of time.

    Returns:
        The path, shape `(T, *state)`, and the log ratio of its density given `x0` to that of
        the proposal; with standard normal `z` their sum is the path's density in terms of `z`.
    """
    num_steps = len(plan.determined)
    innovations = jnp.zeros((num_steps, *z.shape[1:]), z.dtype).at[plan.free].set(z)
    end_times = jnp.asarray(times)[np.maximum(plan.target, 0)]
    remaining = jnp.where(plan.target < 0, jnp.inf, end_times - jnp.asarray(times)[:-1])
    shrink = jnp.where(plan.target < 0, 1.0, 1.0 - jnp.asarray(dt) / remaining)
    shrink = jnp.where(plan.determined, 1.0, shrink)  # unused there; keeps gradients finite
    inputs = (
        jnp.asarray(times)[:-1],
        jnp.asarray(dt),
        innovations,
        points[plan.point],
        remaining,
        shrink,
        jnp.asarray(plan.determined),
        jnp.asarray(plan.target < 0),
        cache,
    )

    def step(x: Array, now: Any) -> tuple[Array, tuple[Array, Array]]:
        t, h, e, end, left, factor_of_variance, determined, beyond, c = now
        factor = sde.noise_factor_at(t, x) * jnp.sqrt(h * factor_of_variance)
        alone = factor.ndim == x.ndim  # each component has noise of its own
        noise = factor * e if alone else factor @ e
        pulled = x + (end - x) * (h / left) + noise
        drifted = scheme.step(sde, t, h, x, e, c) if scheme.has_innovations else pulled
        x_next = jnp.where(determined, end, jnp.where(beyond, drifted, pulled)).astype(x.dtype)
        true = scheme.log_density(sde, t, h, x, x_next, c)
        scales = factor if alone else diagonal(factor)
        proposed = jnp.sum(-0.5 * e**2 - 0.5 * jnp.log(2.0 * jnp.pi) - jnp.log(jnp.abs(scales)))
        ratio = jnp.where(beyond, 0.0, true - jnp.where(determined, 0.0, proposed))
        # A step past the last known state follows the true law: its ratio is one.
        return x_next, (x_next, ratio)

    inputs = jax.tree.map(jnp.asarray, inputs)
    _, (rest, ratios) = lax.scan(step, x0, inputs)
    return jnp.concatenate([x0[None], rest]), jnp.sum(ratios)
