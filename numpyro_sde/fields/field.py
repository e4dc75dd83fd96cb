"""Unknown functions as parameters: what a drift calls, one event whatever its arrays."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from numpyro_sde.parameters import Code, OwnRanks, as_function

# While a model's own data are checked against boxes: where calls leave how far inside they were.
_margins: ContextVar[list[Array] | None] = ContextVar("margins", default=None)


@contextmanager
def recorded_margins() -> Iterator[list[Array]]:
    """Collect, for each call of a field in the block, its distance to the edge of its box."""
    margins: list[Array] = []
    token = _margins.set(margins)
    try:
        yield margins
    finally:
        _margins.reset(token)


# While a model is run to look at its fields: where `register` leaves them, by name.
_registered: ContextVar[dict[str, AbstractField] | None] = ContextVar("registered", default=None)


@contextmanager
def recorded_fields() -> Iterator[dict[str, AbstractField]]:
    """Collect the fields that a model registers in the block, by name."""
    fields: dict[str, AbstractField] = {}
    token = _registered.set(fields)
    try:
        yield fields
    finally:
        _registered.reset(token)


def record_field(name: str, field: AbstractField) -> None:
    """Note a field that has been registered."""
    fields = _registered.get()
    if fields is not None:
        fields[name] = field


def record_margin(margin: Array) -> None:
    """Note how far inside its box a field was called, in half-widths; negative outside."""
    margins = _margins.get()
    if margins is not None:
        margins.append(margin)


class AbstractField(OwnRanks):
    """A function of one state whose values are unknown: `f(x)`, to be put in `params`.

    `prior.register(name, ...)` makes one in a model. It is an Equinox module, so it is one
    parameter with no event dimensions to declare; in a plate its arrays are longer and each series
    has its own function. `f + g`, `f - g`, `-f`, `2.0 * f` and `f * g` are fields again, where g
    is a field or a known function of x.
    """

    # Sums and products with arrays come here, not to NumPy.
    __array_ufunc__: ClassVar[None] = None

    @abc.abstractmethod
    def __call__(self, x: Float[ArrayLike, "*state"]) -> Array:
        """The value at one state, shape `()` or `(outputs,)`."""

    def bound(self) -> Array | None:
        """Largest absolute value at any state, shape of the value; None where none is known.

        For one process: of a field without leading dimensions.
        """
        return None

    def on(self, points: Float[ArrayLike, "n *state"]) -> Array:
        """Values at many states, shape `(n,)` or `(n, outputs)`."""
        return jax.vmap(self)(jnp.asarray(points))

    def __add__(self, other: Any) -> Sum:
        return Sum((self, _as_part(other)))

    __radd__ = __add__

    def __neg__(self) -> Product:
        return Product((self, _as_part(-1.0)))

    def __sub__(self, other: Any) -> Sum:
        return self + -1.0 * _as_part(other)

    def __rsub__(self, other: Any) -> Sum:
        return _as_part(other) + -self

    def __mul__(self, other: Any) -> Product:
        return Product((self, _as_part(other)))

    __rmul__ = __mul__


class Known(AbstractField):
    """A function that is known, as a part of a sum or product."""

    function: Code

    @property
    def leaf_ranks(self) -> list[int | None]:
        return [jnp.ndim(leaf) for leaf in jax.tree_util.tree_leaves(self)]

    def __call__(self, x: Float[ArrayLike, "*state"]) -> Array:
        return jnp.asarray(self.function(jnp.asarray(x)))


class Constant(AbstractField):
    """A number, or one for each output, known or with a site of its own."""

    value: Array

    @property
    def leaf_ranks(self) -> list[int | None]:
        return [jnp.ndim(self.value)]

    def __call__(self, x: Float[ArrayLike, "*state"]) -> Array:  # noqa: ARG002
        return self.value

    def bound(self) -> Array:
        return jnp.abs(self.value)


def _as_part(other: Any) -> AbstractField:
    if isinstance(other, AbstractField):
        return other
    if callable(other):
        return Known(as_function(other, "a part of a field", "x", {}))
    try:
        return Constant(jnp.asarray(other, jnp.result_type(float)))
    except (TypeError, ValueError):
        raise TypeError(
            f"a part of a field must be a field, a function of x or a number, got {other!r}"
        ) from None


class _Several(AbstractField):
    parts: tuple[AbstractField, ...]

    @property
    def leaf_ranks(self) -> list[int | None]:
        return [rank for part in self.parts for rank in part.leaf_ranks]


class Sum(_Several):
    """The sum of its parts."""

    def __call__(self, x: Float[ArrayLike, "*state"]) -> Array:
        return _joined(jnp.add, self.parts, x)

    def bound(self) -> Array | None:
        return _joined_bounds(jnp.add, self.parts)


class Product(_Several):
    """The product of its parts."""

    def __call__(self, x: Float[ArrayLike, "*state"]) -> Array:
        return _joined(jnp.multiply, self.parts, x)

    def bound(self) -> Array | None:
        return _joined_bounds(jnp.multiply, self.parts)


def _joined(
    operation: Callable[[Array, Array], Array], parts: Sequence[AbstractField], x: Any
) -> Array:
    values = [part(x) for part in parts]
    total = values[0]
    for value in values[1:]:
        if total.ndim and value.ndim and total.shape != value.shape:
            raise ValueError(
                f"parts of a field have values of shapes {total.shape} and {value.shape}: they "
                "must be equal, or scalars"
            )
        total = operation(total, value)
    return total


def _joined_bounds(
    operation: Callable[[Array, Array], Array], parts: Sequence[AbstractField]
) -> Array | None:
    total = parts[0].bound()
    for part in parts[1:]:
        bound = part.bound()
        if total is None or bound is None:
            return None
        total = operation(total, bound)
    return total


class AbstractBasis(eqx.Module):
    """The functions of which a field is a weighted sum; static, without arrays that vary.

    Attributes:
        dim: number of coordinates of a state; 1 for scalar states too.
        outputs: length of the values; None for scalars.
    """

    dim: eqx.AbstractVar[int]
    outputs: eqx.AbstractVar[int | None]

    @property
    @abc.abstractmethod
    def vector_features(self) -> bool:
        """Whether a feature is itself a vector of `outputs`, with one weight for all of it."""

    @property
    def elementwise(self) -> bool:
        """Whether each weight is a multiple of one whitened weight, its own."""
        return True

    def largest_features(self, own: Any) -> Array | None:  # noqa: ARG002
        """Largest absolute values of the features, of their shape; None where none is known.

        Args:
            own: as for `features`.
        """
        return None

    def expected_features(self, mean: Array, covariance: Array) -> Array | None:  # noqa: ARG002
        """Expectations of the features under a normal law; None where there is no formula."""
        return None

    @abc.abstractmethod
    def features(self, x: Array, own: Any) -> Array:
        """Features at one state `(dim,)`: shape `(m,)`, or `(outputs, m)` for vector features.

        Args:
            x: the state.
            own: arrays of the field that its basis needs, such as frequencies.
        """


class LinearField(AbstractField):
    """A field that is linear in its weights: `sum_j w_j phi_j(x)`.

    Attributes:
        weights: shape `(m,)`, or `(outputs, m)` for independent outputs.
        weight_sd: prior standard deviations of the weights, of the same shape.
        own: arrays that the basis needs.
        basis: the functions.
    """

    weights: Array
    weight_sd: Array
    own: tuple[Array, ...]
    basis: AbstractBasis
    own_ranks: tuple[int, ...] = eqx.field(static=True)

    @property
    def leaf_ranks(self) -> list[int | None]:
        rank = 1 if self.basis.vector_features or self.basis.outputs is None else 2
        return [rank, rank, *self.own_ranks]

    def __call__(self, x: Float[ArrayLike, "*state"]) -> Array:
        phi = self.basis.features(as_point(x, self.basis.dim), self.own)
        if self.basis.vector_features or self.weights.ndim == 1:
            return phi @ self.weights
        return self.weights @ phi

    def bound(self) -> Array | None:
        largest = self.basis.largest_features(self.own)
        if largest is None:
            return None
        weights = jnp.abs(self.weights)
        if self.basis.vector_features or weights.ndim == 1:
            return largest @ weights
        return weights @ largest

    def expected(
        self, mean: Float[ArrayLike, "*state"], covariance: Float[ArrayLike, "*state *state"]
    ) -> Array:
        """Expected value under a normal law of the state, in closed form, shape of the value.

        Its Jacobian in the mean is the expected Jacobian `A` of the field, and `A covariance` the
        covariance of value and state (Stein's identity): all that the moment equations of an
        SDE need of its drift. For fields of an `HSGP`, whose sines have such expectations; the
        rim of its box, where the field goes to zero, is left out, so the law should be inside.

        Args:
            mean: shape `()` or `(dim,)`.
            covariance: shape `()` or `(dim, dim)`.

        Raises:
            ValueError: another shape, or a field without closed expectations.

        Source: Solin, Tamir and Verma (2021), arXiv:2110.15739, for the use of it.

        Example:
            >>> import jax.numpy as jnp, numpyro_sde as nsde
            >>> f = nsde.fields.HSGP(dim=1, box=2.0, num=4).from_weights(
            ...     jnp.ones(4), amplitude=1.0, length=1.0)
            >>> bool(jnp.isclose(f.expected(0.3, 0.0), f(0.3), rtol=1e-5))
            True
        """
        mean = as_point(mean, self.basis.dim)
        covariance = jnp.asarray(covariance, mean.dtype)
        if covariance.size != mean.size**2 or covariance.ndim not in (0, 2):
            raise ValueError(
                f"covariance must have shape {(mean.size, mean.size)}, got {covariance.shape}"
            )
        phi = self.basis.expected_features(mean, covariance.reshape(mean.size, mean.size))
        if phi is None:
            raise ValueError(
                f"a field of {type(self.basis).__name__} has no expectations in closed form: "
                "average field.on over draws, or use filters.MomentMatching"
            )
        if self.basis.vector_features or self.weights.ndim == 1:
            return phi @ self.weights
        return self.weights @ phi

    def prior_sd(self, x: Float[ArrayLike, "*state"]) -> Array:
        """Standard deviation of the value at one state before any data, shape of the value."""
        phi = self.basis.features(as_point(x, self.basis.dim), self.own)
        if self.basis.vector_features or self.weights.ndim == 1:
            return jnp.sqrt(phi**2 @ self.weight_sd**2)
        return jnp.sqrt(self.weight_sd**2 @ phi**2)


def as_point(x: Float[ArrayLike, "*state"], dim: int) -> Array:
    """One state as a vector of `dim` coordinates.

    Raises:
        ValueError: a state of another shape.
    """
    x = jnp.asarray(x, jnp.result_type(float))
    if x.shape != (dim,) and not (dim == 1 and x.ndim == 0):
        raise ValueError(
            f"the field takes one state of {dim} coordinate(s), got shape {x.shape}: pass it the "
            "coordinates it depends on, and evaluate many states with field.on"
        )
    return x.reshape(dim)
