"""Networks as unknown functions: their weights drawn, optimised, or the last layer's drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float

from numpyro_sde.checks.numbers import at_least
from numpyro_sde.fields.bounded import network_bound
from numpyro_sde.fields.field import AbstractField, as_point, record_field

Prior = str | dist.Distribution | Callable[[str, tuple[int, ...]], dist.Distribution] | None


class NetworkField(AbstractField):
    """A network at its weights.

    Attributes:
        module: the network, of one vector.
        dim: coordinates of a state.
        ranks: dimensions of its leaves, None for those that are no arrays.
    """

    module: Any
    dim: int = eqx.field(static=True)
    outputs: int | None = eqx.field(static=True)
    scalar_input: bool = eqx.field(static=True)
    ranks: tuple[int | None, ...] = eqx.field(static=True)

    @property
    def leaf_ranks(self) -> list[int | None]:
        return list(self.ranks)

    def __call__(self, x: Float[ArrayLike, "*state"]) -> Array:
        point = as_point(x, self.dim)
        value = jnp.asarray(self.module(point[0] if self.scalar_input else point))
        shape = () if self.outputs is None else (self.outputs,)
        return value.reshape(shape)

    def bound(self) -> Array | None:
        largest = network_bound(self.module)
        return largest if largest is None or self.outputs is not None else largest.reshape(())


class Network:
    """A network as an unknown function: any Equinox module that takes one vector.

    Args:
        module: the network, such as `eqx.nn.MLP(1, "scalar", 16, 1, key=key)`; its input is a
            vector of `dim` numbers, or a scalar ("scalar"). Its own weights are where optimisation
            starts.
        dim: coordinates of a state.
        outputs: None for scalar values, else their number.
        prior: of the weights. "fan_in": independent normal with variance one over the number of
            inputs of the layer; a distribution over scalars; a function `(name, shape)` that
            returns one; None to optimise all weights (`param` sites).
        last_layer: optimise all layers but the last and draw the last: a Bayesian last layer.

    Raises:
        TypeError: a module that is no Equinox module, or without weights.
        ValueError: a module whose value has not the shape that `outputs` says.

    When not to use it: few data in few dimensions, where `HSGP` says what is not known; a
    network's weights have many equal modes, and chains on them do not mix.

    Example:
        >>> import equinox as eqx, jax, numpyro, numpyro_sde as nsde
        >>> net = eqx.nn.MLP("scalar", "scalar", 8, 1, jax.nn.tanh, key=jax.random.key(0))
        >>> prior = nsde.fields.Network(net, dim=1)
        >>> model = lambda: prior.register("f")(0.5)
        >>> sites = numpyro.handlers.trace(numpyro.handlers.seed(model, 0)).get_trace()
        >>> sorted(sites)
        ['f/layers.0.bias', 'f/layers.0.weight', 'f/layers.1.bias', 'f/layers.1.weight']
    """

    def __init__(
        self,
        module: Any,
        dim: int = 1,
        outputs: int | None = None,
        *,
        prior: Prior = "fan_in",
        last_layer: bool = False,
    ) -> None:
        at_least("dim", dim, 1)
        if not isinstance(module, eqx.Module) or not callable(module):
            raise TypeError(
                f"module must be a callable Equinox module, got {type(module).__name__}"
            )
        if isinstance(prior, str) and prior != "fan_in":
            raise ValueError(
                f'prior must be "fan_in", a distribution, a function or None, got {prior!r}'
            )
        if prior is None and last_layer:
            raise ValueError(
                "last_layer=True draws the last layer's weights, so prior must be given"
            )
        self.module, self.dim, self.outputs = module, int(dim), outputs
        self.prior, self.last_layer = prior, bool(last_layer)
        leaves = jax.tree_util.tree_flatten_with_path(eqx.filter(module, eqx.is_inexact_array))[0]
        if not leaves:
            raise TypeError("module must hold weights, and has no array of real numbers")
        self.names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
        self.scalar_input = getattr(module, "in_size", None) == "scalar"
        self._check_value()

    def _check_value(self) -> None:
        x = jnp.zeros(() if self.scalar_input else self.dim)
        try:
            shape = eqx.filter_eval_shape(self.module, x).shape
        except Exception as error:
            raise ValueError(
                f"module does not take one vector of {self.dim} number(s): {error}"
            ) from error
        wanted = [(), (1,)] if self.outputs is None else [(self.outputs,)]
        if shape not in wanted:
            raise ValueError(
                f"module must return shape {' or '.join(map(str, wanted))} as outputs="
                f"{self.outputs} says, got {shape}"
            )

    def register(self, name: str) -> NetworkField:
        """Make the network's sites inside a model; in a plate, one network for each series.

        Sites: `{name}/{place of the weights}`, such as `f/layers.0.weight`, and
        `{name}$params` for those that are optimised.

        Args:
            name: prefix of the sites.
        """
        weights, static = eqx.partition(self.module, eqx.is_inexact_array)
        leaves, treedef = jax.tree_util.tree_flatten(weights)
        drawn = self._drawn()
        optimised = [leaf for leaf, draw in zip(leaves, drawn, strict=True) if not draw]
        if optimised:
            optimised = numpyro.param(f"{name}$params", lambda _: tuple(optimised))
        rest, values = iter(optimised), []
        for own, leaf, draw in zip(self.names, leaves, drawn, strict=True):
            if draw:
                law = self._law(own, leaf.shape).expand(leaf.shape).to_event(leaf.ndim)
                values.append(numpyro.sample(f"{name}/{own}", law))
            else:
                values.append(next(rest))
        module = eqx.combine(jax.tree_util.tree_unflatten(treedef, values), static)
        ranks = [
            jnp.ndim(leaf) if eqx.is_array(leaf) else None
            for leaf in jax.tree_util.tree_leaves(self.module)
        ]
        field = NetworkField(module, self.dim, self.outputs, self.scalar_input, tuple(ranks))
        record_field(name, field)
        return field

    def _drawn(self) -> list[bool]:
        """Which arrays of weights have a prior."""
        if self.prior is None:
            return [False] * len(self.names)
        if not self.last_layer:
            return [True] * len(self.names)
        last = self.names[-1].rpartition(".")[0]
        return [one.rpartition(".")[0] == last for one in self.names]

    def _law(self, own: str, shape: tuple[int, ...]) -> dist.Distribution:
        if isinstance(self.prior, dist.Distribution):
            return self.prior
        if callable(self.prior) and not isinstance(self.prior, str):
            return self.prior(own, shape)
        return dist.Normal(0.0, self._fan_in(own, shape) ** -0.5)

    def _fan_in(self, own: str, shape: tuple[int, ...]) -> int:
        """Inputs of the layer that holds an array: those of its matrix."""
        if len(shape) > 1:
            return int(shape[1])
        layer = own.rpartition(".")[0]
        arrays = jax.tree_util.tree_leaves(eqx.filter(self.module, eqx.is_inexact_array))
        for other, array in zip(self.names, arrays, strict=True):
            if other.rpartition(".")[0] == layer and array.ndim > 1:
                return int(array.shape[1])
        return max(int(shape[0]) if shape else 1, 1)
