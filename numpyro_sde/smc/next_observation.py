"""Proposals that look at the next observation alone.

- `Auxiliary`: the model's own steps, weights that look ahead (Pitt and Shephard 1999).
- `ModifiedBridge`: towards the next observation, drift and diffusion frozen (Durham and Gallant
  2002; with noisy, partial observations as in Golightly and Wilkinson 2008).
- `ResidualBridge`: the same for what a drift-only path leaves (Whitaker, Golightly, Boys and
  Sherlock 2017, section 3.1).

Observations enter by the information and score of the emission where the particle is predicted to
be, so every emission with moments can guide.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from numpyro_sde.linear.small import (
    cholesky,
    diagonal,
    matmul,
    matvec,
    solve,
    solve_lower,
    transpose,
)
from numpyro_sde.smc.proposals import (
    Plan,
    Proposal,
    mixed_level,
    observed_rows,
    plain_step,
    step_given,
)
from numpyro_sde.statespace.exact import refuse_exact
from numpyro_sde.statespace.guide import affine_step, information_at, log_emission
from numpyro_sde.statespace.model import StateSpaceModel

# Share of the constant in an auxiliary filter's look-ahead function.
_SHARE = 0.1


def _next_observation(model: StateSpaceModel) -> tuple[Any, np.ndarray, np.ndarray]:
    """For each step: data of the next observed time, whether there is one, and time left."""
    rows = observed_rows(model)
    steps = np.arange(model.num_times - 1)
    place = np.searchsorted(rows, steps + 1)
    seen = place < rows.size
    target = rows[np.minimum(place, rows.size - 1)] if rows.size else np.zeros_like(steps)
    target = np.where(seen, target, steps + 1)
    data = jax.tree.map(lambda a: jnp.asarray(a)[target], model.observation_inputs())
    return data, target, seen


class _TowardsNext(Proposal):
    """Proposals that look at the next observation alone."""

    def plan(self, model: StateSpaceModel) -> Plan:
        refuse_exact(model, type(self).__name__)
        data, target, seen = _next_observation(model)
        steps = jnp.arange(model.num_times - 1)
        times = jnp.asarray(model.times)
        left = times[target] - times[:-1]
        after = times[target] - times[1:]
        num_left = jnp.asarray(target) - steps
        inputs = (model.step_inputs(), data, left, after, jnp.asarray(seen))
        node = (steps, num_left, data, left, jnp.asarray(seen))
        # The last time has no step after it: its node is never used.
        node = jax.tree.map(lambda a: jnp.concatenate([a, a[-1:]]), node)
        return Plan(inputs, node)

    def _bridge(
        self, model: StateSpaceModel, step: Any, x: Array, end: Array, z: Array
    ) -> tuple[Array, Array]:
        """Step given the next observation, `end` being where the particle is predicted then."""
        now, data, left, after, seen = step
        J, s = information_at(model, data, end)
        J, s = jnp.where(seen, J, 0.0), jnp.where(seen, s, 0.0)
        opened, inside = model.enter(now, x)
        L = inside.factor(now[0], opened)
        rest = matmul(L, transpose(L)) * after
        M = solve(
            jnp.eye(model.dim, dtype=x.dtype) + matmul(J, rest),
            jnp.concatenate([J, s[:, None]], axis=1),
        )
        t, dt, cache = now
        mean, B = affine_step(model, t, dt, x, cache)
        del left
        # The mean of the step is what the prediction goes through: nothing is ahead of it.
        return step_given(model, now, x, (mean, B), z, (M[:, :-1], M[:, -1], mean))


class ModifiedBridge(_TowardsNext):
    """Towards the next observation with drift and diffusion frozen at the particle.

    Example:
        >>> ModifiedBridge()
        ModifiedBridge()
    """

    def move(
        self, model: StateSpaceModel, step: Any, x: Float[Array, " d"], memo: Any, z: Array
    ) -> tuple[Float[Array, " d"], Any, Float[Array, ""]]:
        opened, inside = model.enter(step[0], x)
        end = opened + inside.drift(step[0][0], opened) * step[2]
        new, ratio = self._bridge(model, step, x, end, z)
        return new, memo, ratio


def _drift_only(model: StateSpaceModel, node: Any, x: Array) -> Array:
    """State at the next observation by Euler steps without noise."""
    first, count = node[0], node[1]
    steps = model.step_inputs()

    def one(k: Any, x: Array) -> Array:
        now = jax.tree.map(lambda a: a[k], steps)
        x, inside = model.enter(now, x)
        return (x + inside.drift(now[0], x) * now[1]).astype(x.dtype)

    return lax.fori_loop(first, first + count, one, x)


class ResidualBridge(_TowardsNext):
    """Towards the next observation along a path without noise from the last one.

    The noiseless path takes the curvature of the drift; the bridge is needed for the rest only.

    Example:
        >>> ResidualBridge()
        ResidualBridge()
    """

    def enter(self, model: StateSpaceModel, node: Any, x: Float[Array, " d"]) -> Any:
        return x, _drift_only(model, node, x)

    def move(
        self, model: StateSpaceModel, step: Any, x: Float[Array, " d"], memo: Any, z: Array
    ) -> tuple[Float[Array, " d"], Any, Float[Array, ""]]:
        along, target = memo
        (t, dt, cache), left = step[0], step[2]
        opened, inside = model.enter(step[0], x)
        along = model.open_step(along, cache)
        slope = inside.drift(t, along)
        end = target + (opened - along) + (inside.drift(t, opened) - slope) * left
        new, ratio = self._bridge(model, step, x, end, z)
        return new, ((along + slope * dt).astype(x.dtype), target), ratio


class Auxiliary(_TowardsNext):
    """The model's own steps, resampled by what the next observation is expected to say.

    What is expected is mixed with a constant, a tenth of it: where the drift alone predicts badly
    (coarse steps, counts) that costs some particles, and not the estimate.

    Example:
        >>> Auxiliary()
        Auxiliary()
    """

    def look_ahead(
        self, model: StateSpaceModel, node: Any, x: Float[Array, " d"]
    ) -> Float[Array, ""] | None:
        _, _, data, left, seen = node
        p = _drift_only(model, node, x)
        J, s = information_at(model, data, p)
        now = jax.tree.map(lambda a: a[node[0]], model.step_inputs())
        opened, inside = model.enter(now, x)
        L = inside.factor(now[0], opened) * jnp.sqrt(left)
        gain = cholesky(jnp.eye(L.shape[-1], dtype=x.dtype) + matmul(transpose(L), matmul(J, L)))
        white = solve_lower(gain, matvec(transpose(L), s)[:, None])[:, 0]
        fit = 0.5 * jnp.sum(white**2) - jnp.sum(jnp.log(diagonal(gain)))
        fit = fit + log_emission(model, data, p)
        return jnp.where(seen & jnp.isfinite(fit), fit, 0.0)

    def level(
        self, ahead: Float[Array, " M"], log_weights: Float[Array, " M"]
    ) -> Float[Array, " M"]:
        return mixed_level(ahead, log_weights, math.log(_SHARE), math.log1p(-_SHARE))

    def move(
        self, model: StateSpaceModel, step: Any, x: Float[Array, " d"], memo: Any, z: Array
    ) -> tuple[Float[Array, " d"], Any, Float[Array, ""]]:
        return plain_step(model, step[0], x, z), memo, jnp.zeros((), x.dtype)
