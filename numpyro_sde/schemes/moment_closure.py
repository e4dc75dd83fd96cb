"""A step of which only the first two moments are known: no law of paths goes with it."""

# ruff: noqa: ARG002
# Methods of one protocol share its arguments, used or not.

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import equinox as eqx
from jaxtyping import Array, ArrayLike

from numpyro_sde.schemes.base import AbstractScheme
from numpyro_sde.schemes.counts import Gillespie

if TYPE_CHECKING:
    from numpyro_sde.sde import SDE


class MomentClosure(AbstractScheme):
    """Closed equations of the first two moments of a reaction network, for `MomentMatching`.

    They say nothing about paths: a path with this scheme can only be integrated out, by
    `filters.MomentMatching()`; draws of it are those of the exact jumps. See
    `jumps.moment_closure` for the equations and for what can be wrong with them.

    Args:
        substeps: Runge-Kutta steps (order 4) in each step of the grid.

    Raises:
        ValueError: fewer than one substep. In use: an SDE that is no reaction network.
        TypeError: a number that is no integer.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.schemes.MomentClosure().has_innovations
        False
    """

    has_density: ClassVar[bool] = False
    has_innovations: ClassVar[bool] = False
    smooth: ClassVar[bool] = False
    taken_by: ClassVar[str] = (
        "filters.MomentMatching(), or give the path another law, "
        "handlers.approximate(model, law=laws.LinearNoise())"
    )
    restarts: ClassVar[bool] = True
    approximates_sde: ClassVar[bool] = True

    substeps: int = eqx.field(static=True)

    def __init__(self, substeps: int = 20) -> None:
        if isinstance(substeps, bool) or not isinstance(substeps, int):
            raise TypeError(f"substeps must be an integer, got {substeps!r}")
        if substeps < 1:
            raise ValueError(f"substeps must be at least 1, got {substeps}")
        self.substeps = substeps

    def check(self, sde: SDE, state_shape: tuple[int, ...]) -> None:
        from numpyro_sde.jumps.reactions import ReactionNetwork  # it is an SDE with schemes

        if not isinstance(sde, ReactionNetwork):
            raise ValueError(
                f"MomentClosure() closes the moments of an nsde.ReactionNetwork, got a "
                f"{type(sde).__name__}: use filters.MomentMatching() without a scheme"
            )
        if sde.accumulated:
            raise ValueError(
                "moment closure has no accumulators: use laws.LinearNoise() for fluxes"
            )

    def propagate(
        self, sde: Any, dt: ArrayLike, mean: Array, cov: Array
    ) -> tuple[Array, Array, Array]:
        """Mean, covariance and cross covariance a step later."""
        from numpyro_sde.jumps.closure import closed_step

        return closed_step(sde, mean, cov, dt, self.substeps)

    def _no_path(self) -> NoReturn:
        raise TypeError(
            "moment closure knows two moments and no law of paths: integrate the path out, "
            "marginalize(model, method=filters.MomentMatching()), or give it another law, "
            "handlers.approximate(model, law=laws.LinearNoise())"
        )

    def log_density(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Any:
        self._no_path()

    def step(self, sde: SDE, t: Array, dt: Array, x: Array, z: Array, cache: Any = None) -> Any:
        self._no_path()

    def invert(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Any:
        self._no_path()

    def draw(self, sde: SDE, key: Any, t: Array, dt: Array, x: Array, cache: Any = None) -> Array:
        # What the closure approximates: the exact jumps, so that prior predictions are possible.
        return Gillespie().draw(sde, key, t, dt, x)
