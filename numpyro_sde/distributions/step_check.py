"""Is a path's step too long for Euler's scheme? Looked at on the data's own path, on the host.

Euler's one-step mean is in error by `(f' dt)^2 / 2` of the distance to go, and what it makes of a
drift is off by about `f' dt / 2`: a posterior of drift parameters then sits beside the truth,
however many data there are, and nothing in the fit shows it. Measured on a double well that
relaxes at 8 to 24 per unit of time: at dt = 0.02 bands of 90 % for the drift cover 0.83 under
Euler and 0.90 under LocalLinear.
"""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from numpyro_sde.linear.balance import fastest_rate
from numpyro_sde.schemes import Euler, Milstein
from numpyro_sde.schemes.dependence import dependence
from numpyro_sde.schemes.events import ForcedScheme

LARGEST = 0.05
"""Largest product of a step and the drift's rate that passes without a word."""

_seen: set[Any] = set()


class CoarseStepWarning(UserWarning):
    """The steps of a path are too long for Euler's scheme."""


def rate_times_step(path: Any, states: ArrayLike) -> float | None:
    """Largest product of a step and the drift's fastest rate `|f'|` along states.

    Args:
        path: an `SDEPath`.
        states: states at its times, shape `(*lead, T, *state)`.

    Returns:
        The product; None where it cannot be known (something is traced) or does not matter (a
        scheme that is not explicit in the drift).
    """
    scheme = path.scheme.inner if isinstance(path.scheme, ForcedScheme) else path.scheme
    leaves = jax.tree_util.tree_leaves((path.sde, path.times, path.forcing, states))
    known = not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    if path.num_times < 2 or not known or not isinstance(scheme, Euler | Milstein):
        return None
    states = jnp.asarray(states)
    if states.shape[states.ndim - path.event_dim :] != path.event_shape:
        return None
    lead = jnp.broadcast_shapes(path.batch_shape, states.shape[: states.ndim - path.event_dim])

    def largest(sde: Any, scheme: Any, times: Any, dt: Any, cache: Any, x: Array) -> Array:
        def one(t: Array, h: Array, x: Array, cache: Any) -> Array:
            inside = scheme.during(sde, t, cache) if isinstance(scheme, ForcedScheme) else sde
            slope = jax.jacfwd(lambda s: inside.ito_drift_at(t, s))(x)
            return h * fastest_rate(jnp.reshape(slope, (max(x.size, 1),) * 2))

        axes = (0, 0, 0, None if cache is None else 0)
        each = jax.vmap(one, axes)(
            jnp.asarray(times)[:-1], jnp.asarray(dt), x[:-1], jax.tree.map(jnp.asarray, cache)
        )
        return jnp.nanmax(each)

    found = jax.jit(lambda x: jnp.max(path._map(largest, lead, (x,), (path.event_dim,))))(states)
    return None if isinstance(found, jax.core.Tracer) else float(found)


def warn_coarse_step(path: Any, states: ArrayLike) -> None:
    """Say once, where Euler's step is too long for the drift along `states`, what to take instead.

    A no-op where anything is traced, and for the same drift and clock a second time.

    Args:
        path: an `SDEPath`.
        states: states at its times, the data's own path: observed, or filtered.

    Example:
        >>> import numpy as np, warnings, numpyro_sde as nsde
        >>> from numpyro_sde.distributions.step_check import warn_coarse_step
        >>> sde = nsde.SDE(lambda t, x: -50.0 * x, lambda t, x: 1.0)
        >>> path = nsde.SDEPath(sde, np.linspace(0.0, 1.0, 101), 0.0)
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     warn_coarse_step(path, np.zeros(101))
        >>> "LocalLinear()" in str(caught[0].message)
        True
    """
    if isinstance(path.dt, jax.core.Tracer) or path.num_times < 2:
        return
    drift = path.sde.drift.function
    key = (getattr(drift, "__code__", type(drift)), path.num_times, float(np.max(path.dt)))
    if key in _seen:
        return
    product = rate_times_step(path, jnp.asarray(states, jnp.result_type(float)))
    if product is None:
        return
    _seen.add(key)
    if not product > LARGEST:
        return
    additive = not dependence(path.sde, "diffusion", path.state_shape).state
    better = "LocalLinear()" if additive else "Kessler()"
    finer = float(np.max(path.dt)) * LARGEST / product
    warnings.warn(
        f"the steps of the path are too long for {type(path.scheme).__name__}(): on this path the "
        f"fastest rate of the drift times the step is {product:.2g}, above {LARGEST}, and drift "
        f"parameters will be off by about half of that. Give SDEPath scheme={better}, or where "
        f"the path is latent a grid of TimeGrid(times, max_step={finer:.1g})",
        CoarseStepWarning,
        stacklevel=3,
    )
