"""Laws of a reaction network: exact jumps, and the approximations that people use.

One network, `ReactionNetwork`, and one word for what is computed with it. Handed to `ReactionPath`,
or put in place of another by `handlers.approximate`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from numpyro_sde import schemes
from numpyro_sde.jumps.reactions import ReactionNetwork
from numpyro_sde.schemes.base import AbstractScheme
from numpyro_sde.schemes.linear_noise import LinearNoiseFrom


class AbstractLaw(eqx.Module):
    """What a network's path follows; a subclass names the step that makes it.

    Example:
        >>> import numpyro_sde as nsde
        >>> isinstance(nsde.laws.Jump(), nsde.laws.AbstractLaw)
        True
    """

    counts: ClassVar[bool] = False

    @abstractmethod
    def scheme(self, net: ReactionNetwork) -> AbstractScheme:
        """The transition of this law for a network."""

    def scheme_from(self, net: ReactionNetwork, init: Any, times: Any) -> AbstractScheme:  # noqa: ARG002
        """The transition for a path of given start and times, which few laws depend on."""
        return self.scheme(net)


class Langevin(AbstractLaw):
    """The chemical Langevin equation: counts as real numbers, a Brownian motion a reaction.

    Good where every species has tens of individuals. Latent, whitened, guided, integrated out by
    approximate filters, or by particles.

    Args:
        scheme: transition density over a step of the grid; None for `Euler()`. With accumulators
            or `clip` it must be None.
        substeps: Euler steps within each step of the grid; with more than one the path has no
            density, but whitened innovations.
        clip: least value of the species after each step.

    Raises:
        ValueError: a scheme together with `substeps` or `clip`.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.laws.Langevin(substeps=4).substeps
        4
    """

    transition: AbstractScheme | None
    substeps: int = eqx.field(static=True)
    clip: float | None = eqx.field(static=True)

    def __init__(
        self,
        scheme: AbstractScheme | None = None,
        *,
        substeps: int = 1,
        clip: float | None = None,
    ) -> None:
        if scheme is not None and (substeps != 1 or clip is not None):
            raise ValueError(
                "Langevin: give either a scheme, or substeps and clip of Euler's; got "
                f"scheme={type(scheme).__name__}, substeps={substeps}, clip={clip}"
            )
        schemes.LangevinSteps(substeps, clip=clip)  # checks both
        self.transition, self.substeps, self.clip = scheme, substeps, clip

    def scheme(self, net: ReactionNetwork) -> AbstractScheme:
        if self.transition is not None:
            return self.transition
        if net.accumulated or self.substeps > 1 or self.clip is not None:
            return schemes.LangevinSteps(self.substeps, clip=self.clip)
        return schemes.Euler()


class LinearNoise(AbstractLaw):
    """The linear noise approximation, restarted at each time of the path.

    `marginalize(model, method=filters.ExtendedKalman())` integrates it out: for data that are
    linear and normal given the state this is the linear noise likelihood with restart. Without
    restart the noise is that about one deterministic path, from the mean of the start; `Kalman()`
    is then exact, and the approximation worse, since the path does not learn from the data
    (Fearnhead, Giagos and Sherlock 2014, Biometrics 70).

    Args:
        substeps: Runge-Kutta steps within each step of the grid.
        restart: whether the deterministic path starts anew at each time.

    Raises:
        ValueError: without restart, series with starts or first times of their own.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.laws.LinearNoise().substeps
        40
    """

    substeps: int = eqx.field(static=True, default=40)
    restart: bool = eqx.field(static=True, default=True)

    def scheme(self, net: ReactionNetwork) -> AbstractScheme:  # noqa: ARG002
        if not self.restart:
            raise ValueError(
                "LinearNoise(restart=False) depends on where a path starts: give it to "
                "ReactionPath or handlers.approximate"
            )
        return schemes.LinearNoise(self.substeps)

    def scheme_from(self, net: ReactionNetwork, init: Any, times: Any) -> AbstractScheme:
        if self.restart:
            return self.scheme(net)
        mean = init.mean if hasattr(init, "log_prob") else init
        start = jnp.asarray(mean, jnp.result_type(float))
        first = np.unique(np.asarray(times)[..., 0])
        if start.ndim != 1 or first.size != 1:
            raise ValueError(
                "LinearNoise(restart=False) follows one deterministic path: series need one start "
                f"and one first time, got starts of shape {start.shape} and times {first}"
            )
        return LinearNoiseFrom(self.substeps, start, float(first[0]))


class MomentClosure(AbstractLaw):
    """Normal closure of the first two moments: for `filters.MomentMatching()` only.

    No law of paths: such a model can be integrated out and in no other way. Check it,
    `jumps.moment_closure` from several starts: it may have no physical solution.

    Args:
        order: order of the closure; 2.
        substeps: Runge-Kutta steps within each step of the grid.

    Raises:
        ValueError: another order.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.laws.MomentClosure(2).substeps
        40
    """

    order: int = eqx.field(static=True)
    substeps: int = eqx.field(static=True)

    def __init__(self, order: int = 2, *, substeps: int = 40) -> None:
        if order != 2:
            raise ValueError(f"order must be 2 (means and covariances), got {order}")
        self.order, self.substeps = order, substeps

    def scheme(self, net: ReactionNetwork) -> AbstractScheme:  # noqa: ARG002
        return schemes.MomentClosure(self.substeps)


class EulerMultinomial(AbstractLaw):
    """Counts that leave compartments by multinomial laws over short steps: `pomp`'s epidemics.

    For particles (`filters.Particle(proposal="bootstrap")`, `infer.PMMH`) and prediction.

    Args:
        substeps: equal parts of each step of the grid.
        noise: gamma noise on hazards, `{"infection": 0.1}`, see `schemes.EulerMultinomial`.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.laws.EulerMultinomial(20).counts
        True
    """

    counts: ClassVar[bool] = True

    substeps: int = eqx.field(static=True)
    noise: tuple[tuple[Any, float], ...] = eqx.field(static=True)

    def __init__(self, substeps: int = 1, *, noise: Mapping[Any, float] | None = None) -> None:
        self.substeps = substeps
        self.noise = tuple((noise or {}).items())
        schemes.EulerMultinomial(substeps, noise=dict(self.noise))  # checks both

    def scheme(self, net: ReactionNetwork) -> AbstractScheme:  # noqa: ARG002
        return schemes.EulerMultinomial(self.substeps, noise=dict(self.noise))


class Jump(AbstractLaw):
    """Exact jumps of the counts.

    Simulated (`filters.Particle(proposal="bootstrap")`, `infer.PMMH`, prediction), or, on bounded
    counts, integrated out exactly by `filters.Forward(bounds=...)`, with derivatives.

    Args:
        max_events: most reactions within one step of the grid; more give NaN.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.laws.Jump().counts
        True
    """

    counts: ClassVar[bool] = True

    max_events: int = eqx.field(static=True, default=100_000)

    def scheme(self, net: ReactionNetwork) -> AbstractScheme:  # noqa: ARG002
        return schemes.Gillespie(self.max_events)
