"""Simulated transitions: cells that are guided to where a cell was seen.

The density of an end y given a start x is the mean, over paths drawn by a guide that ends in y, of
the ratio of the equation's law to the guide's (Pedersen 1995; Durham and Gallant 2002; guides of
Whiteley and Lee 2014). The normal numbers are fixed, so that the density is one smooth function of
parameters.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_sde.distributions.arguments import resolve_scheme
from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.distributions.state_space import ObservedPath
from numpyro_sde.linear.rows import put_rows
from numpyro_sde.schemes import AbstractScheme
from numpyro_sde.schemes.base import GaussianScheme
from numpyro_sde.sde import SDE
from numpyro_sde.snapshots.clock import Clock
from numpyro_sde.snapshots.population import AbstractPopulation
from numpyro_sde.statespace.checks import check_count
from numpyro_sde.statespace.exact import check_conditioning
from numpyro_sde.statespace.guide import Guide, guided_path, make_guide
from numpyro_sde.statespace.model import Instrument, StateSpaceModel
from numpyro_sde.statespace.reference import kalman_reference


class GuidedParticles:
    """Transitions by simulation: paths guided from each start to each cell.

    For noise too large, or a drift too curved, for two moments. The log density is too small by
    about half the variance of the log of its estimate, which falls as one over `num_particles`:
    double these, and see whether the posterior stays. The paths step along the grid of
    `times`, so give a `TimeGrid` as fine as Euler's steps need.

    Args:
        num_particles: paths for each pair of a start and a cell.
        scheme: Gaussian transition over a step of the grid; None for `Euler()`, or the exact one.
        seed: of the normal numbers, which stay the same in all evaluations.

    Raises:
        ValueError: a scheme that is not Gaussian, a count below one.
        TypeError: a count that is no integer.

    When not to use it: many cells. It costs `num_particles` times the cells times the starts, at
    each time: some hundred cells and starts are its limit.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.snapshots.GuidedParticles(16).num_particles
        16
    """

    def __init__(
        self, num_particles: int = 32, *, scheme: AbstractScheme | None = None, seed: int = 0
    ) -> None:
        check_count("num_particles", num_particles)
        check_count("seed", seed, least=0)
        if scheme is not None and not isinstance(scheme, GaussianScheme):
            raise ValueError(
                "scheme of GuidedParticles must be Gaussian, such as Euler() or LocalLinear(), got "
                f"{scheme!r}"
            )
        self.num_particles, self.scheme, self.seed = num_particles, scheme, seed
        self._key = (num_particles, None if scheme is None else repr(scheme), seed)

    def __repr__(self) -> str:
        return f"GuidedParticles(num_particles={self.num_particles})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GuidedParticles) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


class ParticleMixture(AbstractPopulation):
    """A mixture of simulated transitions.

    Attributes:
        sde: the equation.
        starts: `(M, d)`.
        log_weights: `(M,)`, normalised.
        particles: how to simulate.
        clock: the snapshots and the grid.
        scalar: whether the equation is written for states of shape `()`.
    """

    sde: SDE
    starts: Array
    log_weights: Array
    particles: GuidedParticles = eqx.field(static=True)
    clock: Clock = eqx.field(static=True)
    scalar: bool = eqx.field(static=True)

    def leaf_event_dims(self) -> list[int]:
        return [*self.sde.leaf_event_dims(), 2, 1]

    def log_density(self, y: Float[Array, "K-1 n d"]) -> Float[Array, "K-1 n"]:
        later = self.clock.num_snapshots - 1
        rows = jnp.eye(later, dtype=bool)
        keys = jax.random.split(jax.random.key(self.particles.seed), (y.shape[1], later))

        def of_cell(now: Any) -> Array:
            """One cell of each snapshot."""
            cells, keys = now

            def at(cell: Array, row: Array, key: PRNGKeyArray) -> Array:
                count = self.particles.num_particles
                shape = (count, self.starts.shape[0])
                logs = self._log_weights(cell, row, key, shape)
                return jax.nn.logsumexp(logs + self.log_weights[None]) - jnp.log(count)

            return jax.vmap(at)(cells, rows, keys)

        # Cell by cell: all pairs at once would hold all paths.
        terms = lax.map(jax.checkpoint(of_cell), (jnp.swapaxes(y, 0, 1), keys))
        return jnp.swapaxes(terms, 0, 1)

    def _log_weights(
        self, cell: Array, row: Array, key: PRNGKeyArray, shape: tuple[int, int]
    ) -> Float[Array, "S M"]:
        """Log weights of paths from each start to a cell at one of the times."""
        clock, scalar = self.clock, self.scalar

        def from_start(start: Array, key: PRNGKeyArray) -> Array:
            path = path_from(self.sde, start, self.particles.scheme, clock, scalar)
            size = path.innovation_shape
            z = jax.random.normal(key, (shape[0], *size), cell.dtype)

            def of_model(model: StateSpaceModel) -> Array:
                model, guide = pinned_guide(model, clock, cell, row)

                def one(z: Array) -> Array:
                    return guided_path(model, guide, model.init_mean, z).log_weight

                return jax.vmap(one)(z)

            weights: Array = ObservedPath(path, ()).map(of_model)
            return weights

        return jax.vmap(from_start)(self.starts, jax.random.split(key, shape[1])).T

    def draw(self, key: PRNGKeyArray, num_cells: int) -> Float[Array, "K-1 n d"]:
        rows = self.clock.index[1:]

        def one(key: PRNGKeyArray, row: Any) -> Array:
            which, own = jax.random.split(key)
            start = self.starts[jax.random.categorical(which, self.log_weights)]
            path = path_from(self.sde, start, self.particles.scheme, self.clock, self.scalar)
            return jnp.reshape(path.sample(own)[row], start.shape)

        keys = jax.random.split(key, (rows.size, num_cells))
        return jax.vmap(jax.vmap(one, (0, None)))(keys, jnp.asarray(rows))


def path_from(
    sde: SDE, start: Float[Array, " d"], scheme: Any, clock: Clock, scalar: bool
) -> SDEPath:
    """The law of paths from a start, along the grid."""
    state = start[0] if scalar else start
    chosen = resolve_scheme(sde, scheme, state.shape)
    return SDEPath(sde, clock.grid, dist.Delta(state, event_dim=state.ndim), scheme=chosen)


def pinned_guide(
    model: StateSpaceModel, clock: Clock, cells: Array, present: Array
) -> tuple[StateSpaceModel, Guide]:
    """The model with states seen exactly at snapshots, and its guide.

    Args:
        model: a path from a fixed start.
        clock: the snapshots and the grid.
        cells: states at the snapshots after the first `(K - 1, d)`, or one for all `(d,)`.
        present: which of them are seen, `(K - 1,)`.
    """
    rows = clock.index[1:]
    states = jnp.broadcast_to(cells, (rows.size, model.dim)).astype(model.init_mean.dtype)
    values = put_rows(states, rows, model.num_times)
    shown = jnp.broadcast_to(present[:, None], (rows.size, model.dim))
    seen = put_rows(shown, rows, model.num_times)
    zero = jnp.zeros((model.dim, model.dim), states.dtype)
    pin = Instrument(
        inputs=jnp.zeros(model.num_times, states.dtype),
        values=values,
        present=seen,
        moments=lambda _, x: (x, zero),
        log_prob=lambda *_: jnp.zeros((), states.dtype),
        gaussian=True,
        rows=rows,
        exact=True,
    )
    model = model._replace(instruments=(pin,))
    check_conditioning(model, "a path pinned at snapshots")
    return model, make_guide(model, kalman_reference(model))
