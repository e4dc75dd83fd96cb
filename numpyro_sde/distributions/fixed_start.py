"""Support of a path whose first state is fixed."""

from __future__ import annotations

from typing import Any, cast

import jax.numpy as jnp
from jaxtyping import Array
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform, biject_to


class FixedStart(constraints._GreaterThan):
    """Paths that start at a given state, every later component in `rest`.

    It derives from NumPyro's greater-than constraint for one reason: NumPyro recomputes the
    support at every draw (it may depend on other sites) only for constraints of that kind
    whose `lower_bound` is an array.

    Args:
        start: first state, shape `(*batch, *state)`.
        rest: constraint on each later component.
        state_dim: number of dimensions of a state, 0 or 1.
    """

    def __init__(self, start: Array, rest: Any, state_dim: int) -> None:
        super().__init__(start)
        self.start = start
        self.rest = rest
        self.state_dim = state_dim

    @property
    def event_dim(self) -> int:
        return self.state_dim + 1

    def __call__(self, x: Any) -> Any:
        axis = jnp.ndim(x) - self.event_dim
        first = jnp.take(x, 0, axis)
        later = jnp.delete(x, 0, axis, assume_unique_indices=True)
        state = tuple(range(-self.state_dim, 0))
        path = tuple(range(-self.event_dim, 0))
        starts = jnp.all(first == self.start, axis=state)
        return starts & jnp.all(self.rest(later), axis=path)

    def feasible_like(self, prototype: Any) -> Array:
        filled = jnp.broadcast_to(self.rest.feasible_like(prototype), jnp.shape(prototype))
        axis = jnp.ndim(filled) - self.event_dim
        index = (slice(None),) * axis + (0,)
        return jnp.asarray(filled).at[index].set(self.start)

    def tree_flatten(self) -> Any:
        return (self.start,), (("start",), {"rest": self.rest, "state_dim": self.state_dim})

    @classmethod
    def tree_unflatten(cls, aux_data: Any, params: Any) -> FixedStart:
        return cls(params[0], aux_data[1]["rest"], aux_data[1]["state_dim"])

    def __eq__(self, other: object) -> Any:
        return (
            isinstance(other, FixedStart)
            and self.rest is other.rest
            and jnp.array_equal(self.start, other.start)
        )

    __hash__ = None  # type: ignore[assignment]


class PrependState(Transform):
    """Map free later states to a path that starts at a given state.

    The domain has one time less than the codomain, as a simplex has one free component less.
    """

    def __init__(self, constraint: FixedStart) -> None:
        self.constraint = constraint
        self.rest = biject_to(constraint.rest)

    @property
    def domain(self) -> Any:
        return constraints.independent(constraints.real, self.constraint.event_dim)

    @property
    def codomain(self) -> FixedStart:
        return self.constraint

    def __call__(self, x: Any) -> Array:
        later = self.rest(x)
        axis = jnp.ndim(later) - self.constraint.event_dim
        shape = jnp.shape(later)
        first = jnp.broadcast_to(self.constraint.start, shape[:axis] + shape[axis + 1 :])
        return jnp.concatenate([jnp.expand_dims(first, axis).astype(later.dtype), later], axis)

    def _inverse(self, y: Any) -> Array:
        axis = jnp.ndim(y) - self.constraint.event_dim
        return cast("Array", self.rest._inverse(jnp.delete(y, 0, axis, assume_unique_indices=True)))

    def log_abs_det_jacobian(self, x: Any, y: Any, intermediates: Any = None) -> Array:  # noqa: ARG002
        axis = jnp.ndim(y) - self.constraint.event_dim
        later = jnp.delete(y, 0, axis, assume_unique_indices=True)
        each = jnp.broadcast_to(self.rest.log_abs_det_jacobian(x, later), jnp.shape(x))
        return jnp.sum(each, axis=tuple(range(-self.constraint.event_dim, 0)))

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        axis = len(shape) - self.constraint.event_dim
        return (*shape[:axis], shape[axis] + 1, *shape[axis + 1 :])

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        axis = len(shape) - self.constraint.event_dim
        return (*shape[:axis], shape[axis] - 1, *shape[axis + 1 :])

    def tree_flatten(self) -> Any:
        return (self.constraint,), ((), {})

    @classmethod
    def tree_unflatten(cls, aux_data: Any, params: Any) -> PrependState:  # noqa: ARG003
        return cls(params[0])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PrependState) and bool(self.constraint == other.constraint)

    __hash__ = None  # type: ignore[assignment]


@biject_to.register(FixedStart)
def _prepend(constraint: FixedStart) -> PrependState:
    return PrependState(constraint)
