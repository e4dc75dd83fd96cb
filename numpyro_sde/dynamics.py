"""What moves a path: parameters and their batching, whatever the law of the next state.

An engine is handed dynamics and a scheme, the law of one step under them. `SDE` is drift and
diffusion; `schemes.markov_jumps.ChainEquation` is a Markov jump process, which has neither.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from numpyro_sde.describe import block, html_table, one_line
from numpyro_sde.noise import AbstractNoise
from numpyro_sde.noise.jumps import AbstractJumps

if TYPE_CHECKING:
    from numpyro_sde.schemes.base import AbstractScheme


class Structure(NamedTuple):
    """How Brownian motions enter: read off the diffusion's shape, never declared.

    Attributes:
        state_shape: `()` or `(d,)`.
        kind: "diagonal" where each component has its own independent noise (every scalar
            process is so, whatever the number of its Brownian motions), else "general".
        diffusion_shape: the shape that `diffusion` returns.
        innovation_shape: shape of the standard normals that drive one Gaussian step.
    """

    state_shape: tuple[int, ...]
    kind: Literal["diagonal", "general"]
    diffusion_shape: tuple[int, ...]
    innovation_shape: tuple[int, ...]


class AbstractDynamics(eqx.Module):
    """What moves the path of one process, for engines that ask for no more.

    Attributes:
        noise: the driving noise.
        jumps: sources of jumps at random times.
        inputs: known functions of time that drive it, or None.

    Example:
        >>> import numpyro_sde as nsde
        >>> from numpyro_sde.dynamics import AbstractDynamics
        >>> isinstance(nsde.processes.DoubleWell(1.0, 1.0, 0.5), AbstractDynamics)
        True
    """

    noise: eqx.AbstractVar[AbstractNoise]
    jumps: eqx.AbstractVar[tuple[AbstractJumps, ...]]
    inputs: eqx.AbstractVar[Any]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Batch shape of the parameters."""
        raise NotImplementedError

    def leaf_event_dims(self) -> list[int]:
        """Event dimensions of each array leaf of this object, in flattening order."""
        raise NotImplementedError

    def structure(self, state_shape: tuple[int, ...]) -> Structure:
        """How noise enters a step from states of this shape."""
        return Structure(state_shape, "diagonal", state_shape, state_shape)

    @property
    def is_diffusion(self) -> bool:
        """Whether drift and diffusion are all that moves a state: no jumps, no hidden regime."""
        return False

    @property
    def positive(self) -> bool:
        """Whether the state of the exact process stays above zero."""
        return False

    def driven_by(self, noise: AbstractNoise) -> Self:
        """The same dynamics with another driving noise.

        Raises:
            ValueError: dynamics that no noise drives.
        """
        raise ValueError(
            f"a {type(self).__name__} is driven by no noise, got {type(noise).__name__}: its "
            "transitions are exact. handlers.drive is for the paths of an SDE"
        )

    def check_scheme(self, scheme: AbstractScheme) -> None:
        """Raise a `ValueError` for a scheme that would leave out part of these dynamics."""

    def adapt(self, scheme: Any, state_shape: tuple[int, ...]) -> Any:  # noqa: ARG002
        """The scheme to use where one was named, or None was; itself, unless states are hidden."""
        return scheme

    def restart(self, x: Array) -> Array:
        """A state at the beginning of a step: accumulators, where there are any, at zero."""
        return x

    def _with(self, **changes: Any) -> Self:
        """A copy with some fields changed, of whatever subclass this is."""
        new = object.__new__(type(self))
        for field in dataclasses.fields(self):
            value = changes.get(field.name, getattr(self, field.name))
            object.__setattr__(new, field.name, value)
        return new

    def _described(self) -> list[tuple[str, str]]:
        """Names and values to print."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return one_line(type(self).__name__, self._described())

    def __str__(self) -> str:
        return block(type(self).__name__, self._described())

    def _repr_html_(self) -> str:
        return html_table(type(self).__name__, self._described())

    def unbatched_shapes(self) -> Self:
        """The same with shapes in place of arrays, batch dimensions removed."""
        leaves, treedef = jax.tree_util.tree_flatten(self)
        one = [
            jax.ShapeDtypeStruct(jnp.shape(leaf)[jnp.ndim(leaf) - dim :], jnp.result_type(leaf))
            for leaf, dim in zip(leaves, self.leaf_event_dims(), strict=True)
        ]
        return cast("Self", jax.tree_util.tree_unflatten(treedef, one))
