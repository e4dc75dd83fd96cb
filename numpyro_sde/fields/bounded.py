"""What is known of how large an unknown function can be, for processes that need it bounded."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from numpyro_sde.fields.field import AbstractField

# Largest absolute values of activation functions that have one.
_ACTIVATIONS: tuple[tuple[Callable[..., Any], float], ...] = (
    (jnp.tanh, 1.0),
    (jax.nn.tanh, 1.0),
    (jax.lax.tanh, 1.0),
    (jax.nn.sigmoid, 1.0),
    (jax.lax.logistic, 1.0),
    (jax.nn.hard_tanh, 1.0),
    (jax.nn.hard_sigmoid, 1.0),
    (jax.nn.soft_sign, 1.0),
    (jnp.sin, 1.0),
    (jnp.cos, 1.0),
    (jnp.arctan, np.pi / 2.0),
)

# The default end of a network, which Equinox does not export.
_IDENTITY = inspect.signature(eqx.nn.MLP.__init__).parameters["final_activation"].default


class Bounded(AbstractField):
    """A field held between `-limit` and `limit`: `limit tanh(field(x) / limit)`.

    What processes take that are stable only with a bounded drift (`processes.NeuralLangevin`),
    for fields of which no bound is known.

    Args:
        field: the field.
        limit: largest absolute value, in units of the field's; positive.

    Raises:
        TypeError: a field that is none.
        ValueError: a limit that is not positive.

    Example:
        >>> import jax, equinox as eqx, numpyro, numpyro_sde as nsde
        >>> net = eqx.nn.MLP("scalar", "scalar", 8, 1, jax.nn.softplus, key=jax.random.key(0))
        >>> with numpyro.handlers.seed(rng_seed=0):
        ...     f = nsde.fields.Bounded(nsde.fields.Network(net).register("f"), 2.0)
        >>> f.field.bound() is None, float(f.bound()), abs(float(f(1e6))) <= 2.0
        (True, 2.0, True)
    """

    field: AbstractField
    limit: Array

    def __init__(self, field: AbstractField, limit: ArrayLike) -> None:
        if not isinstance(field, AbstractField):
            raise TypeError(f"field must be one of nsde.fields, got {type(field).__name__}")
        concrete = not isinstance(limit, jax.core.Tracer)
        if concrete and not np.all(np.asarray(limit) > 0):
            raise ValueError(f"limit must be positive, got {limit}")
        self.field, self.limit = field, jnp.asarray(limit, jnp.result_type(float))

    @property
    def leaf_ranks(self) -> list[int | None]:
        return [*self.field.leaf_ranks, 0]

    def __call__(self, x: Float[ArrayLike, "*state"]) -> Array:
        return self.limit * jnp.tanh(self.field(x) / self.limit)

    def bound(self) -> Array:
        return self.limit


def network_bound(module: Any) -> Array | None:
    """Largest absolute value of each output of a multilayer perceptron, at any input.

    One, where its last activation is bounded; the sums of the last layer's absolute weights, where
    the activation before it is. None for all else.

    Example:
        >>> import equinox as eqx, jax
        >>> from numpyro_sde.fields.bounded import network_bound
        >>> net = eqx.nn.MLP(2, 3, 8, 1, jax.nn.relu, jax.nn.tanh, key=jax.random.key(0))
        >>> network_bound(net).tolist()
        [1.0, 1.0, 1.0]
    """
    if not isinstance(module, eqx.nn.MLP):
        return None
    last = module.layers[-1]
    lead = last.weight.shape[:-2]
    shape = lead if module.out_size == "scalar" else (*lead, module.out_size)
    final = _largest(module.final_activation)
    if final is not None:
        return jnp.full(shape, final, last.weight.dtype)
    hidden = _largest(module.activation) if module.depth else None
    if hidden is None or module.final_activation is not _IDENTITY:
        return None
    total = hidden * jnp.abs(last.weight).sum(-1)
    if last.bias is not None:
        total = total + jnp.abs(last.bias).reshape(total.shape)
    return total.reshape(shape)


def _largest(activation: Any) -> float | None:
    return next((sup for known, sup in _ACTIVATIONS if known is activation), None)
