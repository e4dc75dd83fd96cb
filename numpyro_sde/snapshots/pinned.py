"""Paths of a reference between given states: by its own law where that is normal, else guided."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_sde.distributions.arguments import resolve_scheme
from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.distributions.state_space import ObservedPath
from numpyro_sde.runtime.entry import entry_point
from numpyro_sde.schemes import Euler
from numpyro_sde.schemes.base import GaussianScheme
from numpyro_sde.snapshots.clock import DEFAULT_STEPS, Clock
from numpyro_sde.snapshots.kernels import Reference, over_batch
from numpyro_sde.snapshots.particles import pinned_guide
from numpyro_sde.statespace.guide import guided_path
from numpyro_sde.statespace.model import StateSpaceModel


class BridgePaths(NamedTuple):
    """Paths of a bridge.

    Attributes:
        times: `(T,)`.
        paths: `(*batch, num_paths, T, *state)`.
        effective: effective number of the guided paths from which each piece was drawn, smallest
            over the pieces, `(*batch, num_paths)`; `num_particles` where guides are exact.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> from numpyro_sde.snapshots import BridgePaths
        >>> BridgePaths(np.arange(3.0), jnp.zeros((4, 3)), jnp.ones(4)).paths.shape
        (4, 3)
    """

    times: np.ndarray
    paths: Array
    effective: Array


def draw_pinned(
    law: Reference,
    times: np.ndarray,
    ends: Float[Array, "*batch num K d"],
    key: PRNGKeyArray,
    *,
    max_step: float | None,
    num_particles: int,
    scheme: Any,
) -> BridgePaths:
    """Draw a path of the reference through given states at given times.

    Raises:
        ValueError: a step that is not positive, a scheme that is not Gaussian.
    """
    if max_step is not None and not max_step > 0:
        raise ValueError(f"max_step must be positive, got {max_step}")
    gaps = np.diff(times)
    steps = DEFAULT_STEPS
    if max_step is not None:
        steps = max(int(np.ceil(gaps.max() / max_step - 1e-9)), 2)
    grids = times[:-1, None] + gaps[:, None] * np.linspace(0.0, 1.0, steps + 1)[None]
    grids[:, -1] = times[1:]
    state_shape = () if law.scalar else ends.shape[-1:]
    chosen = resolve_scheme(law.sde, scheme, state_shape)
    if not isinstance(chosen, GaussianScheme):
        if scheme is not None:
            raise ValueError(f"scheme must be Gaussian, such as Euler(), got {scheme!r}")
        chosen = Euler()
    normal = law.exact and isinstance(law.sde.exact_transition(), GaussianScheme)
    count = 1 if normal and type(chosen) is type(law.sde.exact_transition()) else num_particles
    batch = law.sde.batch_shape
    keys = jax.random.split(key, (*batch, ends.shape[-3], len(gaps)))
    paths, effective = _pieces(law, chosen, grids, ends, keys, count)
    inner = paths[..., :-1, :]
    flat = inner.reshape(*inner.shape[:-3], -1, inner.shape[-1])
    whole = jnp.concatenate([flat, paths[..., -1, -1:, :]], axis=-2)
    grid = np.append(grids[:, :-1].ravel(), times[-1])
    return BridgePaths(grid, whole[..., 0] if law.scalar else whole, effective)


@entry_point
def _pieces(
    law: Reference, scheme: Any, grids: np.ndarray, ends: Array, keys: PRNGKeyArray, count: int
) -> tuple[Array, Array]:
    """Paths `(*batch, num, K - 1, S + 1, d)` between neighbours, and effective numbers."""
    steps = grids.shape[1] - 1
    clock = Clock(
        np.array([0.0, 1.0]), np.linspace(0.0, 1.0, steps + 1), np.ones(steps), [0, steps]
    )
    times = jnp.asarray(grids, ends.dtype)

    def of_one(law: Reference, ends: Array, keys: PRNGKeyArray) -> Any:
        def piece(grid: Array, start: Array, target: Array, key: PRNGKeyArray) -> Any:
            return _piece(law, scheme, clock, grid, start, target, key, count)

        over_gaps = jax.vmap(piece)
        return jax.vmap(over_gaps, (None, 0, 0, 0))(times, ends[:, :-1], ends[:, 1:], keys)

    paths, effective = over_batch(law, of_one, ends, keys)
    return paths, jnp.min(effective, axis=-1)


def _piece(
    law: Reference,
    scheme: Any,
    clock: Clock,
    grid: Array,
    start: Array,
    target: Array,
    key: PRNGKeyArray,
    count: int,
) -> tuple[Array, Array]:
    """One path from a state to another, and from how many guided ones, effectively."""
    state = start[0] if law.scalar else start
    path = SDEPath(law.sde, grid, dist.Delta(state, event_dim=state.ndim), scheme=scheme)
    size = path.innovation_shape
    key_noise, key_choice = jax.random.split(key)
    z = jax.random.normal(key_noise, (count, *size), target.dtype)

    def draw(model: StateSpaceModel) -> tuple[Array, Array]:
        model, guide = pinned_guide(model, clock, target[None], jnp.ones(1, bool))
        drawn = jax.vmap(lambda z: guided_path(model, guide, model.init_mean, z))(z)
        whole = jnp.isfinite(drawn.log_weight)
        log_weights = jax.nn.log_softmax(jnp.where(whole, drawn.log_weight, -jnp.inf))
        which = jax.random.categorical(key_choice, log_weights)
        states = drawn.path[which].at[-1].set(target.astype(drawn.path.dtype))
        return states, 1.0 / jnp.sum(jnp.exp(2.0 * log_weights))

    return ObservedPath(path, ()).map(draw)
