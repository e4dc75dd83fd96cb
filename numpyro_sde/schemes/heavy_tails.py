"""Euler steps with increments of heavier tails than normal ones: paths that may leap.

`x + drift dt + diffusion dt^(1/alpha) e` with independent e for each component: Student t
variables, which make an outlier-proof random walk on a grid (the heavy-tailed smoothness priors of
Kitagawa 1987, "Non-Gaussian state-space modeling of nonstationary time series", JASA 82), or stable
ones, the increments of a Levy process, whose law does not depend on the grid (Chambers, Mallows and
Stuck 1976, JASA 71, for drawing them).
"""

# ruff: noqa: ARG002
# Methods of one protocol share its arguments, used or not.

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr, ndtr
from jax.scipy.stats import t as student
from jaxtyping import Array, Float

from numpyro_sde.schemes.base import AbstractScheme

if TYPE_CHECKING:
    from numpyro_sde.sde import SDE


class HeavyTailedStep(AbstractScheme):
    """An Euler step whose increments are smooth maps of two standard normals each.

    So a latent path can be whitened (`reparam.InnovationReparam`) or guided. Two numbers make one
    increment: they cannot be read off a path.
    """

    taken_by: ClassVar[str] = (
        "reparam.InnovationReparam or GuidedReparam with NUTS, infer.PMMH or filters.Particle()"
    )

    def check(self, sde: SDE, state_shape: tuple[int, ...]) -> None:
        if not sde.is_diffusion or not sde.noise.independent:
            raise ValueError(
                f"{type(self).__name__} is for drift and diffusion alone, got a "
                f"{type(sde).__name__} with jumps, regimes or another noise"
            )
        if sde.structure(state_shape).kind == "general":
            raise ValueError(
                f"{type(self).__name__} moves each component by an increment of its own: diffusion "
                f"must return a scalar or the shape of the state {state_shape}"
            )

    def innovation_shape(self, sde: SDE, state_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (2, *state_shape)

    @abstractmethod
    def increments(self, z: Float[Array, "2 *state"], dt: Array) -> Array:
        """What the diffusion coefficient multiplies over a step."""

    def step(self, sde: SDE, t: Array, dt: Array, x: Array, z: Array, cache: Any = None) -> Array:
        x = jnp.asarray(x, jnp.result_type(x, float))
        dt = jnp.asarray(dt, x.dtype)
        mean = x + sde.ito_drift_at(t, x) * dt
        return mean + sde.noise_factor_at(t, x) * self.increments(z, dt)

    def invert(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Array:
        raise TypeError(
            f"the innovations of {type(self).__name__}() cannot be read off its ends: two make one "
            "increment"
        )


class StudentEuler(HeavyTailedStep):
    """Euler steps with Student t increments, `sqrt(dt)` times a t variable of scale 1.

    A path that mostly drifts and now and then leaps: level shifts, tracked animals, outliers in the
    system. It has a density, so NUTS samples the path as it stands and fits one that is seen; a
    latent path is better whitened (`reparam.InnovationReparam`) or guided. The law of the path
    depends on the grid, as sums of t variables are no t variables: fix the grid with the model.

    Args:
        df: degrees of freedom, above 0; may be a parameter of the model. The increments have a
            variance of `df / (df - 2)` times the Gaussian ones' for df above 2.

    Raises:
        ValueError: df that is not positive. In use: a diffusion with shared noises.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist, numpyro_sde as nsde
        >>> walk = nsde.processes.BrownianMotion(drift=0.0, scale=0.5)
        >>> path = nsde.SDEPath(walk, [0.0, 1.0], 0.0, scheme=nsde.schemes.StudentEuler(4.0))
        >>> known = dist.StudentT(4.0, 0.0, 0.5).log_prob(3.0)
        >>> bool(jnp.isclose(path.log_prob(jnp.array([0.0, 3.0])), known))
        True
    """

    df: Any

    def __init__(self, df: Any) -> None:
        if isinstance(df, int | float | np.ndarray) and not np.all(np.asarray(df) > 0):
            raise ValueError(f"df must be positive, got {df}")
        if jnp.ndim(df):
            raise ValueError(f"df must be one number, got shape {jnp.shape(df)}")
        self.df = jnp.asarray(df, jnp.result_type(float))

    def increments(self, z: Float[Array, "2 *state"], dt: Array) -> Array:
        # In polar coordinates, Bailey (1994), Mathematics of Computation 62: the squared radius
        # of two normals becomes that of a bivariate t law, of which this is one component.
        df = self.df.astype(dt.dtype)
        square = jnp.sum(z**2, axis=0)
        away = square > 0.0
        stretched = df * jnp.expm1(square / df) / jnp.where(away, square, 1.0)
        return jnp.sqrt(dt) * z[0] * jnp.sqrt(jnp.where(away, stretched, 1.0))

    def log_density(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Float[Array, ""]:
        x = jnp.asarray(x)
        scale = jnp.abs(sde.noise_factor_at(t, x)) * jnp.sqrt(dt)
        mean = x + sde.ito_drift_at(t, x) * dt
        return jnp.sum(student.logpdf(x_next, self.df, mean, scale))


class StableEuler(HeavyTailedStep):
    """Euler steps with stable increments: a Levy process in place of Brownian motion.

    Over any step the increment is stable of index alpha and scale
    `diffusion dt^(1/alpha) / sqrt(2)`, so that alpha = 2 is the Gaussian step; below 2 it has no
    variance, from 1 down no mean. Foraging paths, turbulence, prices. No density is evaluated, but
    a latent path can be whitened (`reparam.InnovationReparam`) or guided, and particles,
    `infer.PMMH` and `infer.IteratedFiltering` take it.

    Args:
        alpha: index of stability, above 0 and at most 2.
        skew: in [-1, 1], 0 for a symmetric law; needs an alpha other than 1.

    Raises:
        ValueError: an index or a skew out of range. In use: a diffusion with shared noises.

    Example:
        >>> import jax, numpyro_sde as nsde
        >>> flight = nsde.processes.BrownianMotion(drift=0.0, scale=1.0)
        >>> path = nsde.SDEPath(flight, [0.0, 1.0, 2.0], 0.0,
        ...                     scheme=nsde.schemes.StableEuler(1.5))
        >>> path.sample(jax.random.key(0)).shape
        (3,)
    """

    has_density: ClassVar[bool] = False

    alpha: float = eqx.field(static=True)
    skew: float = eqx.field(static=True)

    def __init__(self, alpha: float, skew: float = 0.0) -> None:
        if not 0.0 < alpha <= 2.0:
            raise ValueError(f"alpha must be above 0 and at most 2, got {alpha}")
        if not -1.0 <= skew <= 1.0 or (skew and alpha == 1.0):
            raise ValueError(f"skew must be in [-1, 1], and 0 where alpha is 1, got {skew}")
        self.alpha, self.skew = float(alpha), float(skew)

    def increments(self, z: Float[Array, "2 *state"], dt: Array) -> Array:
        a, tiny = self.alpha, jnp.finfo(dt.dtype).tiny
        # A uniform angle on (-pi / 2, pi / 2), its cosine without cancellation, and a waiting time.
        angle = math.pi * (ndtr(z[0]) - 0.5)
        cosine = jnp.sin(math.pi * ndtr(-jnp.abs(z[0])))
        wait = -log_ndtr(-z[1])
        tilt = self.skew * math.tan(0.5 * math.pi * a) if self.skew else 0.0
        shift, size = math.atan(tilt) / a, (1.0 + tilt**2) ** (0.5 / a)
        turned = a * (angle + shift)
        ratio = jnp.maximum(jnp.cos(angle - turned), tiny) / jnp.maximum(wait, tiny)
        body = jnp.sin(turned) / cosine ** (1.0 / a) * ratio ** ((1.0 - a) / a)
        return size * body * dt ** (1.0 / a) / math.sqrt(2.0)

    def log_density(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Float[Array, ""]:
        raise TypeError(
            "stable increments have no density in closed form: use reparam.InnovationReparam, "
            "filters.Particle(proposal='bootstrap'), infer.PMMH, or StudentEuler(df)"
        )
