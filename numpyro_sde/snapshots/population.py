"""Laws of a population at given times, as mixtures over where its cells started."""

from __future__ import annotations

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_sde.linear.small import matvec
from numpyro_sde.schemes.base import AbstractScheme
from numpyro_sde.sde import SDE
from numpyro_sde.snapshots.clock import Clock
from numpyro_sde.snapshots.moments import log_densities, normals


class AbstractPopulation(eqx.Module):
    """The law of the cells at each snapshot after the first, unbatched; cells are vectors."""

    @abc.abstractmethod
    def leaf_event_dims(self) -> list[int]:
        """Event dimensions of each array leaf, in flattening order."""

    @abc.abstractmethod
    def log_density(self, y: Float[Array, "K-1 n d"]) -> Float[Array, "K-1 n"]:
        """Log density of each cell."""

    @abc.abstractmethod
    def draw(self, key: PRNGKeyArray, num_cells: int) -> Float[Array, "K-1 n d"]:
        """Draw independent cells of each snapshot."""


class NormalMixture(AbstractPopulation):
    """A mixture of normal laws at each snapshot, one for each start.

    Attributes:
        mean: `(K - 1, M, d)`.
        tril: lower factors of the covariances, measurement noise included, `(K - 1, M, d, d)`.
        log_weights: `(K - 1, M)`, normalised.
    """

    mean: Array
    tril: Array
    log_weights: Array

    def leaf_event_dims(self) -> list[int]:
        return [3, 4, 2]

    def log_density(self, y: Float[Array, "K-1 n d"]) -> Float[Array, "K-1 n"]:
        def at(mean: Array, tril: Array, log_weights: Array, y: Array) -> Array:
            terms = log_densities(normals(mean, tril), y) + log_weights[:, None]
            return jax.nn.logsumexp(terms, axis=0)

        return jax.vmap(at)(self.mean, self.tril, self.log_weights, y)

    def draw(self, key: PRNGKeyArray, num_cells: int) -> Float[Array, "K-1 n d"]:
        def at(key: PRNGKeyArray, mean: Array, tril: Array, log_weights: Array) -> Array:
            which, noise = jax.random.split(key)
            start = jax.random.categorical(which, log_weights, shape=(num_cells,))
            z = jax.random.normal(noise, (num_cells, mean.shape[-1]), mean.dtype)
            return mean[start] + matvec(tril[start], z)

        keys = jax.random.split(key, self.mean.shape[0])
        return jax.vmap(at)(keys, self.mean, self.tril, self.log_weights)


class TransitionMixture(AbstractPopulation):
    """A mixture of transitions that need not be normal, each one step long.

    Attributes:
        sde: the equation.
        scheme: its transition.
        starts: `(M, d)`.
        log_weights: `(M,)`, normalised.
        clock: the snapshots.
        scalar: whether the equation is written for states of shape `()`.
    """

    sde: SDE
    scheme: AbstractScheme
    starts: Array
    log_weights: Array
    clock: Clock = eqx.field(static=True)
    scalar: bool = eqx.field(static=True)

    def leaf_event_dims(self) -> list[int]:
        whole = [jnp.ndim(leaf) for leaf in jax.tree_util.tree_leaves(self.scheme)]
        return [*self.sde.leaf_event_dims(), *whole, 2, 1]

    def log_density(self, y: Float[Array, "K-1 n d"]) -> Float[Array, "K-1 n"]:
        gaps = jnp.asarray(self.clock.times[1:] - self.clock.times[0], y.dtype)

        def at(gap: Array, y: Array) -> Array:
            terms = transition_log_densities(
                self.sde, self.scheme, self.clock.times[0], gap, self.starts, y, scalar=self.scalar
            )
            return jax.nn.logsumexp(terms + self.log_weights[:, None], axis=0)

        return jax.vmap(at)(gaps, y)

    def draw(self, key: PRNGKeyArray, num_cells: int) -> Float[Array, "K-1 n d"]:
        gaps = jnp.asarray(self.clock.times[1:] - self.clock.times[0], self.starts.dtype)

        def one(key: PRNGKeyArray, gap: Array) -> Array:
            which, own = jax.random.split(key)
            start = self.starts[jax.random.categorical(which, self.log_weights)]
            state = start[0] if self.scalar else start
            end = self.scheme.draw(self.sde, own, jnp.asarray(self.clock.times[0]), gap, state)
            return jnp.reshape(end, start.shape)

        keys = jax.random.split(key, (gaps.size, num_cells))
        return jax.vmap(jax.vmap(one, (0, None)))(keys, gaps)


def transition_log_densities(
    sde: SDE,
    scheme: AbstractScheme,
    t: Any,
    gap: Any,
    starts: Float[Array, "M d"],
    y: Float[Array, "n d"],
    *,
    scalar: bool,
) -> Float[Array, "M n"]:
    """Log density of one step of a scheme for each pair of a start and an end."""
    t, gap = jnp.asarray(t, starts.dtype), jnp.asarray(gap, starts.dtype)

    def pair(x: Any, y: Any) -> Any:
        x, y = (x[0], y[0]) if scalar else (x, y)
        return scheme.log_density(sde, t, gap, x, y)

    return jax.vmap(jax.vmap(pair, (None, 0)), (0, None))(starts, y)
