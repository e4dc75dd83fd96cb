"""What makes an SDE jump: the protocol that a scheme asks for rates, numbers and sizes."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray


class AbstractJumps(eqx.Module):
    """A source of jumps of an SDE's state, written for one state of one process.

    Attributes:
        max_per_step: most jumps of this source in one step of the grid.
    """

    max_per_step: eqx.AbstractVar[int]

    @abstractmethod
    def rate_at(self, t: Any, x: Array, args: tuple[Any, ...]) -> Float[Array, ""]:
        """Jumps per unit time at a state; `args` are the equation's parameters, if it has any."""

    @abstractmethod
    def draw_size(self, key: PRNGKeyArray, t: Any, x: Array, args: tuple[Any, ...]) -> Array:
        """Draw what a jump adds to the state."""

    @abstractmethod
    def normal_size(self, t: Any, x: Array, args: tuple[Any, ...]) -> tuple[Array, Array]:
        """Mean `(*state,)` and covariance `(d, d)` of a normal size.

        Raises:
            TypeError: sizes that are not normal.
        """

    @abstractmethod
    def size_moments(self, t: Any, x: Array, args: tuple[Any, ...]) -> tuple[Array, Array]:
        """Mean `(*state,)` and covariance `(d, d)` of a size of any law that has them.

        Raises:
            TypeError: sizes without a mean or a variance.
        """
