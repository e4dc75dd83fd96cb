"""The exact transition of a process that has a known one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from jaxtyping import Array, Float

from numpyro_sde.schemes.base import AbstractScheme

if TYPE_CHECKING:
    from numpyro_sde.sde import SDE


class Exact(AbstractScheme):
    """The exact transition law of a named process, free of discretisation error.

    Raises:
        TypeError: the process has no known transition law.

    Example:
        >>> import numpyro_sde as nsde
        >>> ou = nsde.processes.OrnsteinUhlenbeck(rate=1.0, mean=0.0, scale=1.0)
        >>> round(float(nsde.schemes.Exact().log_density(ou, 0.0, 0.5, 1.0, 0.6)), 4)
        -0.3431
    """

    approximates_sde: ClassVar[bool] = True

    def resolve(self, sde: SDE) -> AbstractScheme:
        transition = sde.exact_transition()
        if transition is None:
            raise TypeError(
                f"scheme=Exact() needs a process with a known transition law; "
                f"{type(sde).__name__} has none. Use Euler(), Milstein(), LocalLinear() or "
                "another discretisation"
            )
        return transition

    def prepare(self, sde: SDE, times: Any, dt: Any) -> Any:
        return self.resolve(sde).prepare(sde, times, dt)

    def innovation_shape(self, sde: SDE, state_shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.resolve(sde).innovation_shape(sde, state_shape)

    def log_density(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Float[Array, ""]:
        return self.resolve(sde).log_density(sde, t, dt, x, x_next, cache)

    def step(self, sde: SDE, t: Array, dt: Array, x: Array, z: Array, cache: Any = None) -> Array:
        return self.resolve(sde).step(sde, t, dt, x, z, cache)

    def invert(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Array:
        return self.resolve(sde).invert(sde, t, dt, x, x_next, cache)
