"""Log densities of the cells of one snapshot given those of the one before."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from numpyro_sde.distributions.batching import map_batch
from numpyro_sde.schemes.base import AbstractScheme, GaussianScheme
from numpyro_sde.sde import SDE
from numpyro_sde.snapshots.clock import Clock
from numpyro_sde.snapshots.moments import (
    Belief,
    Rate,
    factor_of,
    log_densities,
    normals,
    prepared,
    propagate,
)
from numpyro_sde.snapshots.population import transition_log_densities


class Reference(eqx.Module):
    """An equation and the transition that stands for it between snapshots.

    Attributes:
        sde: the equation.
        scheme: its transition; None for the moments of the linearised equation.
        growth: net growth rate, or None.
        scalar: whether the equation is written for states of shape `()`.
        exact: whether one step of the scheme is exact, however long.
    """

    sde: SDE
    scheme: AbstractScheme | None
    growth: Rate | None
    scalar: bool = eqx.field(static=True)
    exact: bool = eqx.field(static=True)

    def leaf_event_dims(self) -> list[int]:
        """Event dimensions of each array leaf, in flattening order."""
        rest = jax.tree_util.tree_leaves((self.scheme, self.growth))
        return [*self.sde.leaf_event_dims(), *(jnp.ndim(leaf) for leaf in rest)]

    def beliefs(self, times: Float[Array, " S+1"], x: Float[Array, "n d"]) -> Belief:
        """Normal law and number of descendants at the end of a grid, for each start.

        Args:
            times: the grid; one step for an exact transition.
            x: states at its beginning.
        """
        scheme = self.scheme
        assert scheme is None or isinstance(scheme, GaussianScheme)
        linear: Any = None if scheme is None else scheme.linearizable()
        steps = prepared(self.sde, linear, times, jnp.diff(times))
        zero = jnp.zeros((x.shape[1], x.shape[1]), x.dtype)

        def one(mean: Array) -> Belief:
            start = Belief(mean, zero, jnp.zeros((), mean.dtype))
            moved = propagate(self.sde, linear, self.growth, steps, start, scalar=self.scalar)
            return jax.tree.map(lambda a: a[-1], moved)

        return jax.vmap(one)(x)

    def log_kernel(
        self, times: Float[Array, " S+1"], x: Float[Array, "n d"], y: Float[Array, "m d"]
    ) -> tuple[Float[Array, "n m"], Float[Array, " n"]]:
        """Log density of each end given each start, and log numbers of descendants."""
        if self.scheme is None or isinstance(self.scheme, GaussianScheme):
            belief = self.beliefs(times, x)
            laws = normals(belief.mean, factor_of(belief.cov, None))
            return log_densities(laws, y), belief.log_mass
        gap = times[-1] - times[0]
        terms = transition_log_densities(
            self.sde, self.scheme, times[0], gap, x, y, scalar=self.scalar
        )
        return terms, jnp.zeros(x.shape[0], x.dtype)


def gap_grids(clock: Clock, exact: bool) -> np.ndarray:
    """A grid for each gap between snapshots, all of as many steps, shape `(K - 1, S + 1)`."""
    steps = 1 if exact else int(np.diff(clock.index).max())
    shares = np.linspace(0.0, 1.0, steps + 1)
    grids = clock.times[:-1, None] + np.diff(clock.times)[:, None] * shares[None]
    grids[:, -1] = clock.times[1:]
    return grids


def over_batch(law: Reference, fn: Callable[..., Any], *arrays: Array) -> Any:
    """Map `fn(law, *arrays)` over a batch of references, one after the other: each may be large.

    Args:
        law: the references.
        fn: function of one of them.
        arrays: further arguments, the batch in front.
    """
    batch = law.sde.batch_shape
    if not batch:
        return fn(law, *arrays)
    ranks = [array.ndim - len(batch) for array in arrays]

    def at(index: Array) -> Any:
        place = jnp.unravel_index(index, batch)
        return map_batch(fn, batch, (law, *arrays), (law.leaf_event_dims(), *ranks), at=place)

    flat = lax.map(at, jnp.arange(math.prod(batch)))
    return jax.tree.map(lambda a: a.reshape(*batch, *a.shape[1:]), flat)
