"""The driving noise of an SDE, and standard Brownian motion."""

from __future__ import annotations

from typing import ClassVar

import equinox as eqx


class AbstractNoise(eqx.Module):
    """What drives an SDE: a process with the increments that multiply the diffusion.

    Example:
        >>> from numpyro_sde.noise import AbstractNoise, Brownian
        >>> isinstance(Brownian(), AbstractNoise)
        True

    Attributes:
        independent: whether increments are independent and normal of variance dt, as schemes take
            them to be that carry nothing from step to step.
    """

    independent: ClassVar[bool] = False

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Batch shape of its parameters; their leading dimensions are the batch."""
        return ()

    def leaf_event_dims(self) -> list[int]:
        """Event dimensions of each of its array leaves, in flattening order."""
        return []


class Brownian(AbstractNoise):
    """Independent standard Brownian motions: increments `N(0, dt)`.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.SDE(lambda t, x: -x, lambda t, x: 1.0, noise=nsde.noise.Brownian()).noise
        Brownian()
    """

    independent: ClassVar[bool] = True
