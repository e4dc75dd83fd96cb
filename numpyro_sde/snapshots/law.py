"""The law of snapshots: cells of a population seen at several times, none of them twice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray
from numpyro.distributions import constraints
from numpyro.distributions.batch_util import promote_batch_shape, vmap_over
from numpyro.distributions.transforms import IdentityTransform, biject_to
from numpyro.util import is_prng_key

from numpyro_sde.checks.closures import refuse_closures
from numpyro_sde.checks.data import as_data
from numpyro_sde.distributions.arguments import refuse_undeclared
from numpyro_sde.distributions.batching import (
    align_new_axes,
    describe_batch,
    leading_dims,
    map_batch,
    promote_inner,
    undeclared_dims,
)
from numpyro_sde.grid import TimeGrid
from numpyro_sde.linear.ranks import equal_rank
from numpyro_sde.parameters import broadcast_batch
from numpyro_sde.schemes import AbstractScheme
from numpyro_sde.sde import SDE
from numpyro_sde.snapshots.cells import check_whole
from numpyro_sde.snapshots.clock import Clock, snapshot_clock
from numpyro_sde.snapshots.population import AbstractPopulation
from numpyro_sde.snapshots.starts import Starts, cells_as_starts, law_as_starts
from numpyro_sde.snapshots.transitions import (
    GuidedParticles,
    chosen_transition,
    growth_rate,
    is_exact_normal,
    population_of,
)
from numpyro_sde.statespace.checks import check_count


class _CellsConstraint(type(constraints.real)):  # type: ignore[misc]
    """Real numbers, NaN for a cell that is not there."""

    def __call__(self, x: Any) -> Any:
        return ~jnp.isinf(x)


_CELLS = _CellsConstraint()


@biject_to.register(_CellsConstraint)
def _identity(constraint: Any) -> Any:  # noqa: ARG001
    return IdentityTransform()


class SnapshotLaw(dist.Distribution):
    r"""The law of cells seen at K times, each once: independent draws of the population.

    Event shape `(K, n, d)`, `(K, n)` for scalar states; a cell that is not there is a row of NaN.
    The cells of one time are exchangeable, those of two times share nothing but the parameters:
    the log density is the sum over cells of the log density of the population at their time,

        p(y) = sum_i w_i p(x_i -> y; t_0 -> t_k),

    a mixture over starts `x_i`. With a distribution for `init` these are points of it (a normal
    law stays whole where the transition is exact), and the first snapshot is drawn from it. With
    cells for `init` they are those cells: the first snapshot is given and says nothing itself.

    Intervals of parameters are right only with the start of all cells as the source, as here:
    a mixture over the cells of the previous snapshot, or the objective of a Schrödinger bridge, is
    no likelihood, and intervals made of it are two to three times too short.

    Args:
        sde: the equation, driven by Brownian motion.
        times: times of the snapshots, `(K,)`, increasing; a `TimeGrid` for steps of one's own
            between them (the default are 20).
        init: distribution of a cell at the first time, or the cells seen then, `(m, d)` or `(m,)`.
        num_cells: number n of cells at each time, or one number for each time. None with cells for
            `init`: as many at each time.
        transition: the law of a cell given its start. None: the exact one if the process has it,
            else "moments", the mean and covariance of the linearised equation. A scheme of
            `nsde.schemes`: that scheme, step by step if it is normal, in one step if not.
            `nsde.snapshots.GuidedParticles(...)`: simulated.
        noise_scale: standard deviation of normal measurement noise, a scalar or `(*batch, d)`, in
            units of the state; None for none.
        growth: known net rate of division less death, `growth(t, x)` or `growth(t, x, p)`, per unit
            of time. The population is then large, and cells are drawn alike from it. A rate
            that does not depend on the state changes nothing.
        weights: relative weights of the cells of `init`, `(*batch, m)`. Drawn from a Dirichlet law
            with ones, they are the Bayesian bootstrap of the first snapshot.
        num_starts: points of an `init` that is a distribution.
        validate_args: as for every NumPyro distribution.

    Raises:
        ValueError: shapes that do not fit; noise with a memory, jumps; a distribution without
            `num_cells`; growth or measurement noise with a transition that does not take it.
        TypeError: arguments of the wrong kind.

    When not to use it: cells of one family, which are not independent; times at which the law of
    a cell given its start has two modes ("moments" has one for each start: take more starts, later
    first times, or particles). With few cells for `init` the first snapshot's own error is
    left out: give it `weights`, or a distribution with parameters.

    Example:
        >>> import jax, numpyro.distributions as dist, numpyro_sde as nsde
        >>> sde = nsde.processes.OrnsteinUhlenbeck(rate=1.0, mean=0.0, scale=0.5)
        >>> law = nsde.SnapshotLaw(sde, [0.0, 1.0, 2.0], dist.Normal(2.0, 0.1), num_cells=5)
        >>> law.sample(jax.random.key(0)).shape
        (3, 5)
        >>> cells = law.sample(jax.random.key(0))
        >>> law.log_prob_pointwise(cells).shape
        (3, 5)
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    reparametrized_params: ClassVar[list[str]] = []
    pytree_data_fields = ("population", "starts")
    pytree_aux_fields = ("clock", "sizes", "state_shape", "leaf_dims", "lead_dims", "undeclared")

    population: AbstractPopulation
    starts: Starts
    clock: Clock
    sizes: tuple[int, ...]
    undeclared: frozenset[int]
    # The equation, its transition and growth rate, for what asks for more than densities. Not part
    # of the pytree: it is there in the run of a model that made the law.
    equation: tuple[SDE, Any, Any] | None = None

    def __init__(
        self,
        sde: SDE,
        times: ArrayLike | TimeGrid,
        init: dist.Distribution | ArrayLike,
        *,
        num_cells: int | Sequence[int] | None = None,
        transition: str | AbstractScheme | GuidedParticles | None = None,
        noise_scale: ArrayLike | None = None,
        growth: Callable[..., Any] | None = None,
        weights: ArrayLike | None = None,
        num_starts: int = 64,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(sde, SDE):
            raise TypeError(f"sde must be an nsde.SDE, got {type(sde).__name__}")
        check_count("num_starts", num_starts)
        self.clock = snapshot_clock(times)
        state_shape, found = _start_of(init, weights)
        chosen = chosen_transition(sde, transition, state_shape, growth=growth is not None)
        noise = _noise_covariance(noise_scale, state_shape)
        if isinstance(init, dist.Distribution):
            one = is_exact_normal(sde, chosen) and growth is None
            starts = law_as_starts(init, num_starts, noise, one_normal=one)
            seen = None
        else:
            starts, _, seen = found
        self.sizes = _sizes(num_cells, self.clock.num_snapshots, seen)
        self.starts, self.state_shape = starts, state_shape
        others = {
            "init": init.batch_shape if isinstance(init, dist.Distribution) else (),
            "weights": starts.log_weights.shape[:-1],
            "noise_scale": () if noise is None else noise.shape[:-2],
        }
        batch_shape = broadcast_batch({"params of the SDE": sde.batch_shape, **others})
        batch = describe_batch(batch_shape)
        refuse_closures(sde.drift.function, "drift", batch)
        refuse_closures(sde.diffusion.function, "diffusion", batch)
        if growth is not None:
            refuse_closures(growth, "growth", batch)
        rate = growth_rate(growth, sde)
        self.equation = (sde, chosen, rate)
        self.population = population_of(
            sde, chosen, rate, self.clock, starts, noise, batch_shape, scalar=state_shape == ()
        )
        self.undeclared = undeclared_dims(sde.batch_shape, broadcast_batch(others))
        given = () if starts.cells is None else (2,)
        self.leaf_dims = (*self.population.leaf_event_dims(), 2, 2, 1, *given)
        self.lead_dims = leading_dims(self._leaves, self.leaf_dims)
        event = (self.clock.num_snapshots, max(self.sizes), *state_shape)
        super().__init__(batch_shape, event, validate_args=validate_args)

    @property
    def times(self) -> np.ndarray:
        """Times of the snapshots, `(K,)`."""
        return self.clock.times

    @property
    def _leaves(self) -> tuple[Any, Array, Array, Array, Array | None]:
        starts = self.starts
        return self.population, starts.points, starts.cov, starts.log_weights, starts.cells

    @property
    def has_rsample(self) -> bool:
        return False

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        return constraints.independent(_CELLS, self.event_dim)

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> Array:  # noqa: ARG002
        terms, agrees = self._terms(value)
        return jnp.sum(terms, axis=(-2, -1)) + agrees

    def log_prob_pointwise(self, value: ArrayLike) -> Float[Array, "*batch K n"]:
        """Log density of each cell, shape `(*lead, K, n)`; 0 where there is none."""
        return self._terms(value)[0]

    def _terms(self, value: ArrayLike) -> tuple[Array, Array]:
        data, event = as_data("snapshots", value), self.event_shape
        if data.shape[data.ndim - self.event_dim :] != event:
            raise ValueError(
                f"snapshots must have event shape {event} (times, cells, state), got an array of "
                f"shape {data.shape}"
            )
        own = data.shape[: data.ndim - self.event_dim]
        refuse_undeclared(self.undeclared, self.batch_shape, own, what="array of snapshots")
        lead = jnp.broadcast_shapes(own, self.batch_shape)
        vectors = jnp.reshape(jnp.asarray(data, jnp.result_type(float)), (*own, *event[:2], -1))
        if not isinstance(vectors, jax.core.Tracer):
            check_whole(np.asarray(vectors))
        missing = jnp.isnan(vectors)
        here = ~jnp.all(missing, axis=-1)
        first, agrees = self._first_terms(vectors[..., 0, :, :], here[..., 0, :], lead)

        def one(population: AbstractPopulation, y: Array, here: Array, part: Array) -> Array:
            # Where there is no cell, one that is not far from any: derivatives stay finite.
            filled = jnp.where(here[..., None], y, _middle(y))
            terms = jnp.where(here, population.log_density(filled), 0.0)
            return jnp.where(part & here, jnp.nan, terms)

        part = jnp.any(missing, axis=-1)[..., 1:, :]
        later = map_batch(
            one,
            lead,
            (self.population, vectors[..., 1:, :, :], here[..., 1:, :], part),
            (self.population.leaf_event_dims(), 3, 2, 2),
        )
        return jnp.concatenate([first[..., None, :], later], axis=-2), agrees

    def _first_terms(self, y: Array, here: Array, lead: tuple[int, ...]) -> tuple[Array, Array]:
        """Log densities of the first snapshot's cells, and whether it is the one given."""
        law, n = self.starts.first, self.event_shape[1]
        if law is None:
            return jnp.zeros((*lead, n), y.dtype), self._agreement(y, here, lead)
        y = jnp.broadcast_to(y, (*lead, *y.shape[-2:]))
        y = jnp.moveaxis(y if self.state_shape else y[..., 0], len(lead), 0)
        law = law.expand(self.batch_shape)
        axes = tuple(range(y.ndim - len(self.state_shape), y.ndim))
        seen = ~jnp.isnan(y)
        whole = jnp.all(seen, axis=axes)
        terms = law.log_prob(jnp.where(seen, y, law.support.feasible_like(y)))
        terms = jnp.where(whole, terms, jnp.where(jnp.any(seen, axis=axes), jnp.nan, 0.0))
        return jnp.moveaxis(terms, 0, -1), jnp.zeros(lead, y.dtype)

    def _agreement(self, y: Array, here: Array, lead: tuple[int, ...]) -> Array:
        """0 where the first snapshot is that of `init`, or left out; minus infinity elsewhere."""
        given = self._first_cells()
        y, given = equal_rank(y, given)
        near = jnp.abs(y - given) <= 1e-5 * (1.0 + jnp.abs(given))
        same = jnp.all(jnp.where(here[..., None], near, True), axis=(-2, -1))
        if not isinstance(same, jax.core.Tracer) and not np.all(same):
            raise ValueError(
                "the first snapshot of the data is not that of init, which is given: pass "
                "init=snapshots[0], or a distribution for a start that is not known"
            )
        return jnp.broadcast_to(jnp.where(same, 0.0, -jnp.inf).astype(y.dtype), lead)

    def _first_cells(self) -> Array:
        """Cells of `init` as the first snapshot, `(n, d)`; NaN where there is none."""
        cells: Any = self.starts.cells
        pad = [(0, 0)] * (cells.ndim - 2) + [(0, self.event_shape[1] - cells.shape[-2]), (0, 0)]
        return jnp.pad(cells, pad, constant_values=jnp.nan)

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Array:
        assert is_prng_key(key)
        lead = sample_shape + self.batch_shape
        n = self.event_shape[1]
        key_first, key_later = jax.random.split(key)
        keys = jax.random.split(key_later, lead)

        def one(population: AbstractPopulation, key: PRNGKeyArray) -> Array:
            return population.draw(key, n)

        dims = (self.population.leaf_event_dims(), keys.ndim - len(lead))
        later = map_batch(one, lead, (self.population, keys), dims)
        cells = jnp.concatenate([self._draw_first(key_first, lead)[..., None, :, :], later], -3)
        there = np.arange(n)[None] < np.asarray(self.sizes)[:, None]
        there = there.reshape(*(1,) * len(lead), *there.shape, 1)
        cells = jnp.where(there, cells, jnp.nan)
        return cells if self.state_shape else cells[..., 0]

    def _draw_first(self, key: PRNGKeyArray, lead: tuple[int, ...]) -> Array:
        n, d = self.event_shape[1], self.starts.points.shape[-1]
        law = self.starts.first
        if law is None:
            return jnp.broadcast_to(self._first_cells(), (*lead, n, d))
        added = lead[: len(lead) - len(self.batch_shape)]
        draws = jnp.asarray(law.expand(self.batch_shape).sample(key, (n, *added)))
        draws = jnp.moveaxis(draws, 0, len(lead))
        return draws if self.state_shape else draws[..., None]


def _start_of(init: Any, weights: Any) -> tuple[tuple[int, ...], Any]:
    """Shape of a state, and the cells of `init` where it is no distribution."""
    if isinstance(init, dist.Distribution):
        if weights is not None:
            raise ValueError("weights belong to cells, and init is a distribution: leave them out")
        if init.is_discrete:
            raise TypeError(f"init must be a continuous distribution, got {type(init).__name__}")
        if len(init.event_shape) > 1:
            raise ValueError(f"init must have event shape () or (d,), got {init.event_shape}")
        return init.event_shape, None
    found = cells_as_starts(init, weights)
    return found[1], found


def _sizes(num_cells: Any, count: int, seen: int | None) -> tuple[int, ...]:
    """Number of cells at each time."""
    if num_cells is None:
        if seen is None:
            raise ValueError(
                "num_cells must be given where init is a distribution: the number of cells at each "
                "time, snapshots.shape[1]"
            )
        return (seen,) * count
    sizes = (num_cells,) * count if np.ndim(num_cells) == 0 else tuple(num_cells)
    sizes = tuple(int(n) if isinstance(n, np.integer) else n for n in sizes)
    for n in sizes:
        check_count("num_cells", n)
    if len(sizes) != count:
        raise ValueError(f"num_cells must be a number or {count} of them, got {len(sizes)}")
    if seen is not None and max(sizes) < seen:
        raise ValueError(f"num_cells is {max(sizes)} at most, but init holds {seen} cells")
    return sizes if seen is None else (seen, *sizes[1:])


def _noise_covariance(scale: Any, state_shape: tuple[int, ...]) -> Array | None:
    """Covariance of the measurement noise, `(*batch, d, d)`."""
    if scale is None:
        return None
    sd = jnp.asarray(scale, jnp.result_type(float))
    if not isinstance(sd, jax.core.Tracer) and not np.all(np.asarray(sd) > 0):
        raise ValueError(f"noise_scale must be positive, got {scale}")
    if state_shape == ():
        return sd[..., None, None] ** 2
    d = state_shape[0]
    if sd.ndim and sd.shape[-1] not in (1, d):
        raise ValueError(
            f"noise_scale must be a scalar or have shape (*batch, {d}), got {sd.shape}"
        )
    sd = jnp.broadcast_to(sd, (*sd.shape[:-1], d))
    eye = jnp.eye(d, dtype=sd.dtype).reshape(*(1,) * (sd.ndim - 1), d, d)
    return sd[..., None, :] ** 2 * eye


def _middle(y: Array) -> Array:
    """A cell of each snapshot that is there, else zero: shape `(K, 1, d)`."""
    there = ~jnp.isnan(y)
    count = jnp.sum(there, axis=1, keepdims=True)
    total = jnp.sum(jnp.where(there, y, 0.0), axis=1, keepdims=True)
    return total / jnp.maximum(count, 1)


@vmap_over.register
def _vmap_over_snapshots(
    law: SnapshotLaw,
    sde: Any = None,
    init: Any = None,
    noise_scale: Any = None,
    weights: Any = None,
) -> SnapshotLaw:
    axes: Any = copy.copy(law)
    given = [axis for axis in (sde, init, noise_scale, weights) if axis is not None]
    axes.population = given[0] if given else None
    changed = [axis for axis in (init, noise_scale) if axis is not None]
    first = changed[0] if changed else None
    shares = weights if weights is not None else init
    axes.starts = Starts(init, init, shares, first, init)
    return cast("SnapshotLaw", axes)


@promote_batch_shape.register
def _promote_snapshots(law: SnapshotLaw) -> SnapshotLaw:
    new, rank = copy.copy(law), len(law.batch_shape)
    leaves, new.lead_dims = align_new_axes(law._leaves, law.leaf_dims, law.lead_dims, rank)
    first = law.starts.first
    first = None if first is None else promote_inner(first, rank)
    new.population = leaves[0]
    points, cov, log_weights, cells = leaves[1:]
    new.starts = Starts(points, cov, log_weights, first, cells)
    shapes = [
        jnp.shape(leaf)[:lead]
        for leaf, lead in zip(jax.tree_util.tree_leaves(leaves), new.lead_dims, strict=True)
    ]
    own = () if first is None else first.batch_shape
    new._batch_shape = jnp.broadcast_shapes(law.batch_shape, *shapes, own)
    return new
