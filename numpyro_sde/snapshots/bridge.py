"""Schrödinger bridges through snapshots: the likeliest coupling of clouds under a reference SDE."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

from numpyro_sde.grid import TimeGrid
from numpyro_sde.runtime.entry import Held, entry_point
from numpyro_sde.schemes import AbstractScheme
from numpyro_sde.schemes.base import GaussianScheme
from numpyro_sde.sde import SDE
from numpyro_sde.snapshots import sinkhorn
from numpyro_sde.snapshots.cells import Cells, as_cells
from numpyro_sde.snapshots.clock import Clock, snapshot_clock
from numpyro_sde.snapshots.identifiability import warn_if_stationary
from numpyro_sde.snapshots.kernels import Reference, gap_grids, over_batch
from numpyro_sde.snapshots.moments import Rate, factor_of, log_densities, normals
from numpyro_sde.snapshots.pinned import BridgePaths, draw_pinned
from numpyro_sde.snapshots.transitions import (
    GuidedParticles,
    chosen_transition,
    growth_rate,
    with_data_leaves,
)
from numpyro_sde.statespace.checks import check_count, typed_key


class BridgeResult(eqx.Module):
    """A Schrödinger bridge through K snapshots; what `schrodinger_bridge` returns.

    A reference with a batch shape (posterior draws) has one bridge for each: arrays then begin with
    `batch`.

    Attributes:
        f: potentials of the cells as starts, `(*batch, K - 1, n)`.
        g: potentials of the cells as ends, `(*batch, K - 1, n)`.
        marginal_error: sum of the absolute errors of the first marginal of each coupling,
            `(*batch, K - 1)`; the second is exact.
        iterations: iterations used, `(*batch, K - 1)`.
        row_weights: weights of the cells as starts, `(*batch, K - 1, n)`: those of the snapshot,
            times the expected number of descendants where there is growth.

    Example:
        >>> import numpy as np, numpyro_sde as nsde
        >>> clouds = np.random.default_rng(0).normal([[0.0], [2.0]], 1.0, (2, 30))
        >>> reference = nsde.processes.BrownianMotion(drift=0.0, scale=1.0)
        >>> bridge = nsde.schrodinger_bridge(reference, [0.0, 1.0], clouds)
        >>> bridge.couplings.shape, float(bridge.marginal_error.max()) < 1e-5
        ((1, 30, 30), True)
    """

    reference: Reference
    cells: Cells
    f: Array
    g: Array
    marginal_error: Array
    iterations: Array
    row_weights: Array
    clock: Clock = eqx.field(static=True)

    @property
    def times(self) -> np.ndarray:
        """Times of the snapshots, `(K,)`."""
        return self.clock.times

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Batch shape of the reference."""
        return self.f.shape[:-2]

    @property
    def couplings(self) -> Float[Array, "*batch K-1 n n"]:
        """Probability of each pair of cells of neighbouring snapshots."""
        return _map_gaps(self, sinkhorn.coupling)

    @property
    def kl(self) -> Float[Array, "*batch K-1"]:
        r"""Relative entropy of each coupling to its start's cells moved by the reference.

        `sum_ij pi_ij log(pi_ij / (a_i K_ij))` with the densities `K_ij`, so that it falls as the
        reference explains the next snapshot better. It is finite for clouds because the ends are
        counted, not smoothed: differences between references mean something, its size does not.
        """
        b = self.cells.weights[1:]
        entropy = jnp.sum(jax.scipy.special.xlogy(b, b), axis=-1)
        rows = jnp.sum(self.row_weights * self.f, axis=-1)
        columns = jnp.sum(jnp.broadcast_to(b, self.g.shape) * self.g, axis=-1)
        return rows + columns + jnp.broadcast_to(entropy, rows.shape)

    def lineages(self, rng_key: PRNGKeyArray, num_paths: int) -> Int[Array, "*batch num_paths K"]:
        """Draw which cell of each snapshot a path goes through.

        Backward from the last snapshot, so that with growth these are the ancestors of cells seen.

        Args:
            rng_key: random key.
            num_paths: how many.
        """
        check_count("num_paths", num_paths)
        keys = jax.random.split(typed_key(rng_key), self.batch_shape)
        return _lineages(self, keys, num_paths)

    def sample_paths(
        self,
        rng_key: PRNGKeyArray,
        num_paths: int,
        *,
        max_step: float | None = None,
        num_particles: int = 16,
        scheme: AbstractScheme | None = None,
    ) -> BridgePaths:
        """Draw paths of the bridge: through cells by the couplings, between them by the reference.

        Between two cells a path is drawn from the reference given both ends: exactly where its
        steps are exact and normal, else one of `num_particles` guided paths, by its weight.

        Args:
            rng_key: random key.
            num_paths: how many.
            max_step: longest step between snapshots; None for 20 steps between any two.
            num_particles: guided paths for each that is drawn, where the guide is not exact.
            scheme: Gaussian transition along the steps; None for the process's own, else `Euler()`.

        Returns:
            Times `(T,)` and paths `(*batch, num_paths, T, *state)`.

        Raises:
            ValueError: a step that is not positive, a scheme that is not Gaussian.
        """
        check_count("num_particles", num_particles)
        key_cells, key_paths = jax.random.split(typed_key(rng_key))
        which = self.lineages(key_cells, num_paths)
        ends = self.cells.values[np.arange(self.clock.num_snapshots), which]
        return draw_pinned(
            self.reference,
            self.clock.times,
            ends,
            key_paths,
            max_step=max_step,
            num_particles=num_particles,
            scheme=scheme,
        )

    def drift_at(self, t: ArrayLike, x: Float[ArrayLike, "*state"]) -> Float[Array, "*state"]:
        """Drift of the bridge as a diffusion: the reference's plus `D grad log h(t, x)`.

        `h` is the reference's expectation of the end potentials. At a snapshot's time the gap that
        begins there counts. The bridge's diffusion is the reference's.

        Args:
            t: a time within the snapshots', before the last.
            x: one state. Map over many with `jax.vmap`.

        Raises:
            ValueError: a batched bridge, a transition that is not normal.
        """
        if self.batch_shape:
            raise ValueError("drift_at is for one bridge: this one has a batch of references")
        scheme = self.reference.scheme
        if scheme is not None and not isinstance(scheme, GaussianScheme):
            raise ValueError(
                "drift_at needs normal transitions: make the bridge with transition='moments'"
            )
        state = jnp.asarray(x, self.g.dtype)
        t = jnp.asarray(t, self.g.dtype)
        return _drift(self, t, state)


def schrodinger_bridge(
    reference: SDE,
    times: ArrayLike | TimeGrid,
    snapshots: Any,
    *,
    weights: ArrayLike | None = None,
    transition: str | AbstractScheme | None = None,
    growth: Callable[..., Any] | None = None,
    tol: float = 1e-6,
    max_iterations: int = 10_000,
    tau: float | None = None,
) -> BridgeResult:
    """Couple snapshots by the law of paths that is closest to a reference SDE.

    Of all laws of paths whose populations at the snapshots' times are the snapshots, the bridge has
    the least relative entropy to the reference. A reference without memory has a bridge without
    memory, so it is made of the bridges between neighbours. It answers who became whom, under
    the reference; it does not tell whether the reference is right, nor its parameters: those are
    for `SnapshotLaw`, whose posterior draws make a batch of references here, and bands over paths.

    Args:
        reference: the equation, driven by Brownian motion. Leading dimensions of its parameters,
            such as posterior draws, are a batch of references.
        times: times of the snapshots, `(K,)`; a `TimeGrid` for finer moments in between.
        snapshots: cells, `(K, n, d)` or `(K, n)`, NaN where there is none; or a list of clouds.
        weights: relative weights of the cells, `(K, n)`.
        transition: as in `SnapshotLaw`: exact, "moments", or a scheme.
        growth: known net growth rate, as in `SnapshotLaw`: a cell then starts as many lineages as
            it has descendants.
        tol: largest sum of the absolute errors of a marginal.
        max_iterations: bound on Sinkhorn's iterations.
        tau: for masses that the reference's growth does not explain: how strictly marginals hold, 1
            exactly, less than 1 in part (`ott-jax`'s parameter; needs `pip install ott-jax`). None
            for exactly.

    Returns:
        Potentials, couplings, draws of paths and the bridge's drift.

    Raises:
        ValueError: shapes that do not fit, options out of range, jumps or noise with memory.
        TypeError: arguments of the wrong kind.

    Warns:
        UserWarning: where the iteration has not converged; where the snapshots look stationary, so
            that the bridge shows the reference and nothing else.

    When not to use it: snapshots with measurement noise that is not small against the reference's
    own noise between them: the bridge goes through every cell as it was measured.

    Example:
        >>> import jax, numpy as np, numpyro_sde as nsde
        >>> clouds = np.random.default_rng(0).normal([[0.0], [2.0]], 1.0, (2, 50))
        >>> reference = nsde.processes.OrnsteinUhlenbeck(rate=1.0, mean=0.0, scale=1.0)
        >>> bridge = nsde.schrodinger_bridge(reference, [0.0, 1.0], clouds)
        >>> bridge.sample_paths(jax.random.key(0), 4).paths.shape
        (4, 21)
    """
    if not isinstance(reference, SDE):
        raise TypeError(f"reference must be an nsde.SDE, got {type(reference).__name__}")
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")
    if tau is not None and not 0 < tau <= 1:
        raise ValueError(f"tau must lie in (0, 1], got {tau}")
    check_count("max_iterations", max_iterations)
    clock = snapshot_clock(times)
    cells = as_cells(snapshots, clock.times, weights)
    state_shape = () if cells.scalar else cells.values.shape[2:]
    chosen = chosen_transition(reference, transition, state_shape, growth=growth is not None)
    law = reference_law(reference, chosen, growth_rate(growth, reference), scalar=cells.scalar)
    warn_if_stationary(cells)
    return bridge_of(law, cells, clock, tol=tol, max_iterations=max_iterations, tau=tau)


def bridge_of(
    law: Reference,
    cells: Cells,
    clock: Clock,
    *,
    tol: float,
    max_iterations: int,
    tau: float | None = None,
) -> BridgeResult:
    """The bridge of a reference whose transition has been chosen; warns where it has not converged.

    Args:
        law: the reference.
        cells: the snapshots.
        clock: their times.
        tol: as in `schrodinger_bridge`.
        max_iterations: as there.
        tau: as there.
    """
    # In this precision a sum of n products is no nearer to one.
    tol = max(tol, 4.0 * float(jnp.finfo(cells.values.dtype).eps))
    options = (Held(tol), max_iterations, None if tau is None else Held(tau))
    f, g, error, iterations, rows = solve_bridges(law, cells, clock, options)
    result = BridgeResult(law, cells, f, g, error, iterations, rows, clock)
    _warn_unconverged(result, tol, tau)
    return result


def reference_law(sde: SDE, chosen: Any, growth: Rate | None, *, scalar: bool) -> Reference:
    """A reference with the transition chosen for it.

    Raises:
        ValueError: guided particles, which have no kernel here.
    """
    if isinstance(chosen, GuidedParticles):
        raise ValueError(
            "a bridge evaluates the reference's density for all pairs of cells: transition must be "
            "None, 'moments' or a scheme, got GuidedParticles"
        )
    exact = chosen is not None and (
        not isinstance(chosen, GaussianScheme) or type(chosen) is type(sde.exact_transition())
    )
    return Reference(with_data_leaves(sde), chosen, growth, scalar, exact)


@entry_point
def solve_bridges(
    law: Reference, cells: Cells, clock: Clock, options: tuple[Any, int, Any]
) -> tuple[Array, Array, Array, Array, Array]:
    """Potentials, errors, iterations and row weights of all gaps, in batches."""
    held_tol, most, held_tau = options
    tol, tau = held_tol.value, None if held_tau is None else held_tau.value
    grids = jnp.asarray(gap_grids(clock, law.exact), cells.values.dtype)
    gaps = (grids, cells.values[:-1], cells.values[1:], cells.weights[:-1], cells.weights[1:])

    def of_one(law: Reference) -> Any:
        return lax.map(lambda gap: _solve_gap(law, gap, tol, most, tau), gaps)

    return cast("Any", over_batch(law, of_one))


def _solve_gap(law: Reference, gap: Any, tol: float, most: int, tau: float | None) -> Any:
    grid, x, y, a, b = gap
    count = sinkhorn.blocks_of(x.shape[0], y.shape[0])
    if count == 1 or tau is not None:
        kernel, log_mass = law.log_kernel(grid, x, y)
        rows = _row_weights(a, log_mass)
        if tau is None:
            found = sinkhorn.solve(kernel, rows, b, tol=tol, max_iterations=most)
        else:
            from numpyro_sde.interop.ott import solve_unbalanced

            options: Any = {"tau": tau, "tol": tol, "max_iterations": most}
            found = sinkhorn.Potentials(*solve_unbalanced(kernel, rows, b, **options))
        return found.f, found.g, found.error, found.iterations, rows
    belief: Any = None
    if law.scheme is None or isinstance(law.scheme, GaussianScheme):
        belief = law.beliefs(grid, x)
        rows = _row_weights(a, belief.log_mass)
        laws = normals(belief.mean, factor_of(belief.cov, None))
        parts = jax.tree.map(lambda v: v.reshape(count, -1, *v.shape[1:]), laws)

        def block(k: Any) -> Array:
            return log_densities(jax.tree.map(lambda v: v[k], parts), y)

    else:
        rows, starts = a, x.reshape(count, -1, x.shape[1])

        def block(k: Any) -> Array:
            return law.log_kernel(grid, starts[k], y)[0]

    found = sinkhorn.solve_in_blocks(block, count, rows, b, tol=tol, max_iterations=most)
    return found.f, found.g, found.error, found.iterations, rows


def _row_weights(a: Array, log_mass: Array) -> Array:
    """Weights of starts, each by its expected number of descendants."""
    mass = jnp.where(a > 0, log_mass, -jnp.inf)
    raw = a * jnp.exp(mass - jnp.max(mass))
    return raw / jnp.sum(raw)


@entry_point
def _map_gaps(bridge: BridgeResult, fn: Any) -> Any:
    """Map `fn(kernel, row weights, column weights, f, g)` over the gaps, in batches."""
    law, cells = bridge.reference, bridge.cells
    grids = jnp.asarray(gap_grids(bridge.clock, law.exact), cells.values.dtype)

    def of_one(law: Reference, f: Array, g: Array, rows: Array) -> Any:
        def of_gap(gap: Any) -> Any:
            grid, x, y, a, b, f, g = gap
            return fn(law.log_kernel(grid, x, y)[0], a, b, f, g)

        gaps = (grids, cells.values[:-1], cells.values[1:], rows, cells.weights[1:], f, g)
        return lax.map(of_gap, gaps)

    return over_batch(law, of_one, bridge.f, bridge.g, bridge.row_weights)


@entry_point
def _lineages(bridge: BridgeResult, keys: PRNGKeyArray, num_paths: int) -> Array:
    law, cells = bridge.reference, bridge.cells
    grids = jnp.asarray(gap_grids(bridge.clock, law.exact), cells.values.dtype)

    def of_one(law: Reference, f: Array, rows: Array, key: PRNGKeyArray) -> Array:
        last, rest = jax.random.split(key)
        final = jax.random.categorical(last, _log(cells.weights[-1]), shape=(num_paths,))

        def back(later: Array, gap: Any) -> tuple[Array, Array]:
            grid, x, y, a, f, key = gap
            kernel = law.log_kernel(grid, x, y[later])[0]
            logits = kernel + (_log(a) + f)[:, None]
            earlier = jax.random.categorical(key, logits, axis=0)
            return earlier, earlier

        keys = jax.random.split(rest, grids.shape[0])
        gaps = (grids, cells.values[:-1], cells.values[1:], rows, f, keys)
        _, earlier = lax.scan(back, final, gaps, reverse=True)
        return jnp.concatenate([earlier, final[None]]).T

    return cast("Array", over_batch(law, of_one, bridge.f, bridge.row_weights, keys))


@entry_point
def _drift(bridge: BridgeResult, t: Array, x: Array) -> Array:
    law, cells, times = bridge.reference, bridge.cells, bridge.clock.times
    own = jnp.asarray(times, x.dtype)
    gap = jnp.clip(jnp.searchsorted(own, t, side="right") - 1, 0, own.size - 2)
    steps = gap_grids(bridge.clock, law.exact).shape[1]
    shares = jnp.asarray(np.linspace(0.0, 1.0, steps), x.dtype)
    grid = t + (own[gap + 1] - t) * shares
    y, b, g = cells.values[gap + 1], cells.weights[gap + 1], bridge.g[gap]

    def log_h(x: Array) -> Array:
        kernel, log_mass = law.log_kernel(grid, jnp.reshape(x, (1, -1)), y)
        return jax.nn.logsumexp(kernel[0] + g + _log(b)) + log_mass[0]

    gradient = jnp.reshape(jax.grad(log_h)(x), (-1,))
    L = jnp.reshape(law.sde.diffusion_columns_at(t, x), (gradient.size, -1))
    return law.sde.ito_drift_at(t, x) + jnp.reshape(L @ (L.T @ gradient), x.shape)


def _log(weights: Array) -> Array:
    there = weights > 0
    return jnp.where(there, jnp.log(jnp.where(there, weights, 1.0)), -jnp.inf)


def _warn_unconverged(result: BridgeResult, tol: float, tau: float | None) -> None:
    if isinstance(result.f, jax.core.Tracer) or tau is not None:
        return
    error = np.asarray(result.marginal_error)
    if not np.all(error <= tol):
        gap = int(np.argmax(error.reshape(-1, error.shape[-1]).max(0)))
        warnings.warn(
            f"the bridge has not converged between times {result.times[gap]:g} and "
            f"{result.times[gap + 1]:g}: marginal error {error.max():.1e} after "
            f"{int(np.max(result.iterations))} iterations, tol {tol:.1e}. Give more "
            "max_iterations, or a reference with more noise",
            UserWarning,
            stacklevel=4,
        )
