"""Several Euler steps of a chemical Langevin equation as one, with accumulators and a floor."""

# ruff: noqa: ARG002
# Methods of one protocol share its arguments, used or not.

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from numpyro_sde.schemes.base import AbstractScheme

if TYPE_CHECKING:
    from numpyro_sde.sde import SDE


class LangevinSteps(AbstractScheme):
    """Euler steps within each step of the grid; accumulators start at zero in each of those.

    The noise is one standard normal for each reaction and substep. Without accumulators, floor and
    substeps this is `Euler()`, which has a density as well.

    Args:
        substeps: Euler steps in each step of the grid.
        clip: least value of the species after each substep; None moves nothing.

    Raises:
        ValueError: fewer than one substep. In use: an SDE that is no reaction network.
        TypeError: a number that is no integer.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro_sde as nsde
        >>> decay = nsde.ReactionNetwork([[1]], [[0]], jnp.array([0.5]), accumulate=[0])
        >>> path = nsde.SDEPath(decay, [0.0, 1.0, 2.0], jnp.array([100.0, 0.0]),
        ...                     scheme=nsde.schemes.LangevinSteps(10))
        >>> x = path.sample(jax.random.key(0))
        >>> bool(jnp.allclose(x[:-1, 0] - x[1:, 0], x[1:, 1], atol=1e-3))
        True
    """

    has_density: ClassVar[bool] = False
    restarts: ClassVar[bool] = True

    substeps: int = eqx.field(static=True)
    clip: float | None = eqx.field(static=True)

    def __init__(self, substeps: int = 1, *, clip: float | None = None) -> None:
        if isinstance(substeps, bool) or not isinstance(substeps, int):
            raise TypeError(f"substeps must be an integer, got {substeps!r}")
        if substeps < 1:
            raise ValueError(f"substeps must be at least 1, got {substeps}")
        self.substeps = substeps
        self.clip = None if clip is None else float(clip)

    def check(self, sde: SDE, state_shape: tuple[int, ...]) -> None:
        from numpyro_sde.jumps.reactions import ReactionNetwork  # it is an SDE with schemes

        if not isinstance(sde, ReactionNetwork):
            raise ValueError(
                f"LangevinSteps moves an nsde.ReactionNetwork, got a {type(sde).__name__}: use "
                "Euler() on a TimeGrid"
            )

    def innovation_shape(self, sde: Any, state_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.substeps * len(sde.reactions),)

    def step(self, sde: Any, t: Array, dt: Array, x: Array, z: Array, cache: Any = None) -> Array:
        del cache
        x = sde.restart(jnp.asarray(x))
        h = jnp.asarray(dt, x.dtype) / self.substeps

        def substep(x: Array, now: tuple[Array, Array]) -> tuple[Array, None]:
            k, e = now
            s = t + k * h
            noise = sde.diffusion_columns_at(s, x) @ e
            x = x + h * sde.ito_drift_at(s, x) + jnp.sqrt(h) * noise
            if self.clip is not None:
                x = x.at[: sde.num_species].max(self.clip)
            return x, None

        innovations = jnp.reshape(z, (self.substeps, -1))
        return lax.scan(substep, x, (jnp.arange(self.substeps), innovations))[0]

    def invert(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Array:
        raise TypeError("the innovations of several Euler steps cannot be read off their ends")

    def log_density(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Float[Array, ""]:
        raise TypeError(
            "several Euler steps in one have no density in closed form: whiten the path "
            "(reparam.InnovationReparam), or use laws.LinearNoise()"
        )
