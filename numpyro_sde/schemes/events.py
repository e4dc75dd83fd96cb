"""What acts on a path from outside, inputs and events, laid on its grid; and schemes under it.

A scheme under a forcing opens each step with the events at its start and sees the inputs as
straight lines inside the step: `step(jump(x))`. Jacobians of steps so contain the jump, and every
filter and guide that takes a scheme takes events.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_sde.events import Added, Events, Placed, Rule, changes, marked_steps
from numpyro_sde.inputs import Inputs, Located, Piece, StepInputs
from numpyro_sde.schemes.base import AbstractScheme, GaussianScheme

if TYPE_CHECKING:
    from numpyro_sde.sde import SDE


class StepCache(NamedTuple):
    """What a step needs besides the state: leading axis the steps, or one step's slice.

    Attributes:
        inner: cache of the scheme that moves the state.
        pieces: the inputs inside the step.
        push: constant added to the drift, shape of the state, or None.
        jumps: for each rule whether an event opens the step, and its amount.
    """

    inner: Any
    pieces: tuple[Piece, ...]
    push: Any
    jumps: tuple[tuple[Any, Any], ...]


def open_state(rules: tuple[Rule, ...], p: Any, x: Any, jumps: tuple[Any, ...]) -> Array:
    """State after the events of one time, each of which may stand there or not."""
    x = jnp.asarray(x)
    for rule, (active, amount) in zip(rules, jumps, strict=True):
        x = jnp.where(active, rule(x, amount, p).astype(x.dtype), x)
    return x


class ForcedScheme(AbstractScheme):
    """A scheme whose steps open with events and see inputs as straight lines.

    Example:
        >>> import numpyro_sde as nsde
        >>> from numpyro_sde.schemes.events import ForcedScheme
        >>> ForcedScheme(nsde.schemes.Milstein(), (), (), ()).has_density
        True
    """

    inner: AbstractScheme
    rules: tuple[Rule, ...]
    names: tuple[str, ...] = eqx.field(static=True)
    # Steps that something opens in some series: between them a linear SDE has one transition.
    rows: tuple[int, ...] = eqx.field(static=True)

    @property
    def has_density(self) -> bool:  # type: ignore[override]
        return self.inner.has_density

    @property
    def has_innovations(self) -> bool:  # type: ignore[override]
        return self.inner.has_innovations

    @property
    def keeps_positive(self) -> bool:  # type: ignore[override]
        return self.inner.keeps_positive

    @property
    def reaches_zero(self) -> bool:  # type: ignore[override]
        return self.inner.reaches_zero

    @property
    def approximates_sde(self) -> bool:  # type: ignore[override]
        return self.inner.approximates_sde

    @property
    def smooth(self) -> bool:  # type: ignore[override]
        return self.inner.smooth

    @property
    def restarts(self) -> bool:  # type: ignore[override]
        return self.inner.restarts

    @property
    def counts(self) -> bool:  # type: ignore[override]
        return self.inner.counts

    def require_smooth(self, user: str) -> None:
        self.inner.require_smooth(user)

    def around(self, inner: AbstractScheme) -> ForcedScheme:
        """The same forcing on another scheme."""
        return forced(inner, self.rules, self.names, self.rows)

    def linearizable(self) -> ForcedScheme:
        return self.around(self.inner.linearizable())

    def gaussian_form(self, sde: SDE, state_shape: tuple[int, ...]) -> Any:
        form = self.inner.gaussian_form(sde, state_shape)
        return None if form is None else self.around(form)

    def innovation_shape(self, sde: SDE, state_shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.inner.innovation_shape(sde, state_shape)

    def during(self, sde: SDE, t: Any, cache: StepCache) -> SDE:
        """The equation inside the step that starts at t."""
        inputs = StepInputs(self.names, t, cache.pieces) if self.names else None
        return sde.during(inputs, cache.push)

    def open(self, sde: SDE, x: Array, cache: StepCache) -> Array:
        """State after the events that open a step, from the one before."""
        return open_state(self.rules, sde.params, x, cache.jumps)

    def _inside(self, sde: SDE, t: Any, x: Array, cache: StepCache) -> tuple[SDE, Array]:
        return self.during(sde, t, cache), self.open(sde, x, cache)

    def log_density(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Float[Array, ""]:
        sde, x = self._inside(sde, t, x, cache)
        return self.inner.log_density(sde, t, dt, x, x_next, cache.inner)

    def step(self, sde: SDE, t: Array, dt: Array, x: Array, z: Array, cache: Any = None) -> Array:
        sde, x = self._inside(sde, t, x, cache)
        return self.inner.step(sde, t, dt, x, z, cache.inner)

    def invert(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Array:
        sde, x = self._inside(sde, t, x, cache)
        return self.inner.invert(sde, t, dt, x, x_next, cache.inner)

    def draw(
        self, sde: SDE, key: PRNGKeyArray, t: Array, dt: Array, x: Array, cache: Any = None
    ) -> Array:
        sde, x = self._inside(sde, t, x, cache)
        return self.inner.draw(sde, key, t, dt, x, cache.inner)


class ForcedGaussian(ForcedScheme, GaussianScheme):  # type: ignore[override]
    """A Gaussian scheme whose steps open with events and see inputs as straight lines.

    Example:
        >>> import numpyro_sde as nsde
        >>> from numpyro_sde.schemes.events import ForcedGaussian
        >>> ForcedGaussian(nsde.schemes.Euler(), (), (), ()).has_innovations
        True
    """

    inner: GaussianScheme

    def moments(
        self, sde: SDE, t: Array, dt: Array, x: Array, cache: Any = None
    ) -> tuple[Array, Array]:
        sde, x = self._inside(sde, t, x, cache)
        return self.inner.moments(sde, t, dt, x, cache.inner)


def forced(
    scheme: AbstractScheme, rules: tuple[Rule, ...], names: tuple[str, ...], rows: tuple[int, ...]
) -> ForcedScheme:
    """A scheme under events and inputs, Gaussian where it is."""
    kind: Any = ForcedGaussian if isinstance(scheme, GaussianScheme) else ForcedScheme
    made: ForcedScheme = kind(scheme, rules, names, rows)
    return made


class Forcing(eqx.Module):
    """Inputs and events of a path, placed on its grid once, on the host.

    Args:
        sde: the equation, batched or not.
        events: the events, in the order in which those of one time act.
        times: grid times, `(*batch, T)`.
        dt: step lengths, `(*batch, T - 1)`.
        state_shape: `()` or `(d,)`.

    Raises:
        ValueError: inputs or events that do not fit the grid.

    Example:
        >>> import numpy as np, numpyro_sde as nsde
        >>> from numpyro_sde.schemes.events import Forcing
        >>> sde = nsde.SDE(lambda t, x: -x, lambda t, x: 1.0)
        >>> times = np.arange(4.0)
        >>> Forcing(sde, (nsde.doses([1.0], 5.0),), times, np.diff(times), ()).rows
        (0, 1)
    """

    where: tuple[Located, ...]
    placed: tuple[Placed, ...]
    rules: tuple[Rule, ...]
    amount_dims: tuple[int, ...] = eqx.field(static=True)
    rows: tuple[int, ...] = eqx.field(static=True)
    # Steps at which events of each kind may stand, whatever the data say of them.
    event_rows: tuple[tuple[int, ...], ...] = eqx.field(static=True)
    state_shape: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        sde: SDE,
        events: tuple[Events, ...],
        times: Any,
        dt: Any,
        state_shape: tuple[int, ...],
    ) -> None:
        traced = isinstance(times, jax.core.Tracer)
        if traced and events:
            raise ValueError(
                "events need times that are known before tracing, got traced times: hand them to "
                "the model as NumPy arrays, outside jit"
            )
        for one in events:
            one.check_apply(sde.unbatched_shapes().params, state_shape)
        self.where = sde.inputs.locate(times, dt) if isinstance(sde.inputs, Inputs) else ()
        on_grid = [one.place(times) for one in events]
        self.placed = tuple(placed for placed, _ in on_grid)
        self.rules = tuple(one.rule for one in events)
        self.amount_dims = tuple(one.event_dim for one in events)
        self.state_shape = state_shape
        self.event_rows = tuple(tuple(marked_steps(p.active).tolist()) for p in self.placed)
        steps = np.arange(np.shape(dt)[-1])
        opened = [steps[:1], *(rows for _, rows in on_grid)]
        if traced:
            opened = [steps]
        else:
            pieces = [a for place in self.where for a in (place.low, place.rate)]
            opened += [marked_steps(changes(a)) for a in pieces]
        self.rows = tuple(np.unique(np.concatenate(opened)).astype(int).tolist())

    @property
    def flows(self) -> bool:
        """Whether an infusion adds to the drift."""
        return any(placed.rate is not None for placed in self.placed)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Batch shape of what stands on the grid."""
        lead: tuple[int, ...] = ()
        for leaf, dim in zip(jax.tree_util.tree_leaves(self), self.leaf_event_dims(), strict=True):
            lead = jnp.broadcast_shapes(lead, jnp.shape(leaf)[: jnp.ndim(leaf) - dim])
        return lead

    def leaf_event_dims(self) -> list[int]:
        """Event dimensions of each array leaf, in flattening order."""
        dims = [1] * len(jax.tree_util.tree_leaves(self.where))
        for placed, dim in zip(self.placed, self.amount_dims, strict=True):
            pairs = zip(placed, (1, 1 + dim, 1), strict=True)
            dims += [own for leaf, own in pairs if leaf is not None]
        return dims + [jnp.ndim(leaf) for leaf in jax.tree_util.tree_leaves(self.rules)]

    def force(self, sde: SDE, scheme: AbstractScheme, cache: Any) -> tuple[ForcedScheme, StepCache]:
        """A scheme under this forcing, with its cache, for one process."""
        names: tuple[str, ...] = ()
        pieces: tuple[Piece, ...] = ()
        if isinstance(sde.inputs, Inputs):
            names, pieces = sde.inputs.names, sde.inputs.pieces(self.where)
        jumps = tuple((jnp.asarray(p.active), p.amount) for p in self.placed)
        return (
            forced(scheme, self.rules, names, self.rows),
            StepCache(cache, pieces, self._push(sde), jumps),
        )

    def _push(self, sde: SDE) -> Array | None:
        total = None
        for rule, placed in zip(self.rules, self.placed, strict=True):
            if placed.rate is None:
                continue
            assert isinstance(rule, Added)
            rate = jnp.asarray(rule.share(sde.params) * placed.rate, jnp.result_type(float))
            if self.state_shape:
                zero = jnp.zeros((*rate.shape, *self.state_shape), rate.dtype)
                rate = zero.at[..., rule.to].add(rate)
            total = rate if total is None else total + rate
        return total

    def openings(self, rows: np.ndarray) -> tuple[Any, tuple[int, ...]]:
        """For each rule whether an event stands at some times, and its amount; no event at the end.

        Args:
            rows: indices into the path's times, `(K,)`, or `(*batch, K)` for each series its own.

        Returns:
            Flags and amounts `(*batch, K, ...)`, and event dimensions of their leaves.
        """
        last = self.num_steps
        rows = rows % (last + 1)
        place = np.minimum(rows, last - 1)

        def at(leaf: Any, dim: int) -> Any:
            xp: Any = np if isinstance(leaf, np.ndarray) else jnp
            axis = jnp.ndim(leaf) - dim
            if place.ndim == 1:
                return xp.take(leaf, place, axis=axis)
            lead = np.broadcast_shapes(jnp.shape(leaf)[:axis], place.shape[:-1])
            wide = xp.broadcast_to(leaf, (*lead, *jnp.shape(leaf)[axis:]))
            index = np.broadcast_to(place, (*lead, place.shape[-1]))
            index = index.reshape(index.shape + (1,) * (dim - 1))
            return xp.take_along_axis(wide, index, axis=len(lead))

        shown, dims = [], []
        for placed, dim in zip(self.placed, self.amount_dims, strict=True):
            amount = None if placed.amount is None else jnp.asarray(at(placed.amount, 1 + dim))
            shown.append((jnp.asarray(at(placed.active, 1) & (rows < last)), amount))
            dims += [1] if amount is None else [1, 1 + dim]
        return tuple(shown), tuple(dims)

    @property
    def num_steps(self) -> int:
        """Number of steps of the grid."""
        return int(np.shape(self.placed[0].active)[-1])
