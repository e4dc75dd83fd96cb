"""Gaussian process priors of fields: amplitude, length and whitened weights as sites."""

from __future__ import annotations

import abc
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float

from numpyro_sde.fields.field import AbstractBasis, AbstractField, LinearField, record_field

Prior = dist.Distribution | ArrayLike


class AbstractGaussianPrior(AbstractBasis):
    """A Gaussian process, or an approximation of one, by finitely many weights.

    Attributes:
        kernel: "se" (squared exponential), "matern32" or "matern52".
    """

    kernel: eqx.AbstractVar[str]

    @property
    @abc.abstractmethod
    def num_weights(self) -> int:
        """Weights of one output."""

    @abc.abstractmethod
    def prepare(self, length: Array) -> tuple[Array, tuple[Array, ...]]:
        """Prior standard deviations of the weights for amplitude one, and the features' arrays.

        Args:
            length: shape `(dim,)`.
        """

    @property
    @abc.abstractmethod
    def own_ranks(self) -> tuple[int, ...]:
        """Dimensions of those arrays."""

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weights."""
        if self.vector_features or self.outputs is None:
            return (self.num_weights,)
        return (self.outputs, self.num_weights)

    def from_weights(
        self,
        z: Float[ArrayLike, "*outputs m"],
        *,
        amplitude: ArrayLike,
        length: ArrayLike,
    ) -> AbstractField:
        """The field with these whitened weights: standard normal under the prior.

        Args:
            z: whitened weights, shape `weight_shape`.
            amplitude: prior standard deviation of a value, in units of the value; shape `()`, or
                `(outputs,)`.
            length: shape `()`, or `(dim,)`, one for each coordinate; in units of the state.

        Raises:
            ValueError: an array of another shape.
        """
        z, amplitude, length = (
            jnp.asarray(a, jnp.result_type(float)) for a in (z, amplitude, length)
        )
        own = () if self.outputs is None or self.vector_features else (self.outputs,)
        allowed: list[tuple[str, Array, list[tuple[int, ...]]]] = [
            ("z", z, [self.weight_shape]),
            ("amplitude", amplitude, [(), own]),
            ("length", length, [(), (self.dim,)]),
        ]
        for what, array, shapes in allowed:
            if array.shape not in shapes:
                raise ValueError(
                    f"{what} must have shape {' or '.join(map(str, shapes))}, got {array.shape}"
                )
        return _linear_field(self, z, amplitude, length)

    def constrain(self, z: Array, sd: Array) -> Array:  # noqa: ARG002
        """Whitened weights that obey what the basis alone does not say; itself by default."""
        return z

    def register(self, name: str, *, amplitude: Prior, length: Prior) -> AbstractField:
        """Make the field's sites inside a model; in a plate, one field for each series.

        Sites: `{name}/amplitude` and `{name}/length` where priors are given, `{name}/z` for the
        whitened weights.

        Args:
            name: prefix of the sites.
            amplitude: prior standard deviation of a value of the field, in units of the value: a
                prior for it or a number; for several outputs an event of that length if they
                differ.
            length: distance over which the field changes, in units of the state: a prior or
                a number; an event of length `dim` for one in each coordinate.

        Returns:
            The field, for the `params` of an `SDE`.

        Raises:
            TypeError: an argument that is neither a distribution nor a number.
            ValueError: a distribution of another event shape.

        Example:
            >>> import jax, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
            >>> prior = nsde.fields.HSGP(dim=1, box=2.5, num=12)
            >>> def model():
            ...     f = prior.register("f", amplitude=dist.HalfNormal(5.0), length=0.8)
            ...     return f(0.5)
            >>> sites = numpyro.handlers.trace(numpyro.handlers.seed(model, 0)).get_trace()
            >>> sorted(sites)
            ['f/amplitude', 'f/z']
        """
        scale = _hyperparameter(f"{name}/amplitude", amplitude)
        length = _hyperparameter(f"{name}/length", length)
        shape = self.weight_shape
        z = numpyro.sample(f"{name}/z", dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape)))
        field = self._mapped(z, *scale, *length)
        record_field(name, field)
        return field

    def _mapped(
        self, z: Any, amplitude: Any, amplitude_rank: int, length: Any, length_rank: int
    ) -> AbstractField:
        """`from_weights` over the leading dimensions that plates gave the sites."""
        arrays = [z, amplitude, length]
        ranks = [len(self.weight_shape), amplitude_rank, length_rank]
        leads = [jnp.shape(a)[: jnp.ndim(a) - rank] for a, rank in zip(arrays, ranks, strict=True)]
        lead = jnp.broadcast_shapes(*leads)

        def make(*args: Any) -> AbstractField:
            return self.from_weights(args[0], amplitude=args[1], length=args[2])

        for depth in range(len(lead)):
            # Plates count from the right; a dimension of length one is shared.
            here = [len(one) > depth and one[-1 - depth] > 1 for one in leads]
            axes = tuple(0 if there else None for there in here)
            if any(here):
                make = jax.vmap(make, in_axes=axes)
            elif lead:
                make = _with_axis(make)
        squeezed = [_without_ones(a, one) for a, one in zip(arrays, leads, strict=True)]
        return make(*squeezed)


@partial(jax.jit, static_argnums=0)
def _linear_field(
    prior: AbstractGaussianPrior, z: Array, amplitude: Array, length: Array
) -> LinearField:
    """The field of whitened weights; compiled, as NumPyro runs models eagerly when it starts."""
    unit, arrays = prior.prepare(jnp.broadcast_to(length, (prior.dim,)))
    sd = jnp.broadcast_to(amplitude.reshape(*amplitude.shape, 1) * unit, prior.weight_shape)
    return LinearField(sd * prior.constrain(z, sd), sd, arrays, prior, prior.own_ranks)


def _with_axis(make: Any) -> Any:
    return lambda *args: jax.tree.map(lambda a: a[None], make(*args))


def _without_ones(a: Any, lead: tuple[int, ...]) -> Any:
    a = jnp.asarray(a)
    return a.reshape(*(n for n in lead if n > 1), *a.shape[len(lead) :])


def _hyperparameter(name: str, prior: Prior) -> tuple[Any, int]:
    """The value of a hyperparameter, and how many of its dimensions belong to one field."""
    if isinstance(prior, dist.Distribution):
        return numpyro.sample(name, prior), prior.event_dim
    if isinstance(prior, int | float | np.ndarray | np.generic | jax.Array):
        if not isinstance(prior, jax.core.Tracer) and not np.all(np.asarray(prior) > 0):
            raise ValueError(f"{name} must be positive, got {prior}")
        return prior, jnp.ndim(prior)
    raise TypeError(
        f"{name} must be a distribution or a positive number, got {type(prior).__name__}"
    )
