"""Steps of a jump-diffusion: a Gaussian step, and jumps of a Poisson number.

With normal sizes the transition is a mixture over the number n of jumps,

    p(x' | x) = sum_n w_n N(x'; m + n E J, V + n Var J),   w_n = Poisson(n; rate dt),

exact where drift, diffusion, rate and sizes are constant (Merton 1976), else in error by the length
of the step as the Gaussian step is.
"""

# ruff: noqa: ARG002
# Methods of one protocol share its arguments, used or not.

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import gammaincc, log_ndtr, logsumexp
from jaxtyping import Array, Float
from scipy.special import gammaln

from numpyro_sde.linear.small import cholesky
from numpyro_sde.schemes.base import AbstractScheme, GaussianScheme, gaussian_log_density
from numpyro_sde.schemes.euler import Euler
from numpyro_sde.schemes.inversion import poisson
from numpyro_sde.schemes.keyed import key_of

if TYPE_CHECKING:
    from numpyro_sde.sde import SDE

MAX_COMPONENTS = 400
"""Most terms of the mixture."""

TAIL = 1e-6
"""Mass of the number of jumps that may lie beyond the most allowed."""


class JumpEuler(AbstractScheme):
    """A Gaussian step, then jumps at the rate and of the sizes of the step's beginning.

    Default of an `SDE` with `jumps`. With normal sizes it has a density (fully observed paths,
    latent paths as they are); the innovations are not smooth, so a latent path is not whitened:
    use `JumpMixture()` for a scalar process, or particles with proposal="bootstrap".

    Args:
        base: the Gaussian step without jumps.

    Raises:
        TypeError: a base that is not Gaussian.
        ValueError: in use, an SDE without jumps, or too many terms of the mixture.

    Example:
        >>> import numpyro.distributions as dist, numpyro_sde as nsde
        >>> merton = nsde.SDE(lambda t, x: 0.05, lambda t, x: 0.2,
        ...                   jumps=nsde.CompoundPoisson(3.0, dist.Normal(-0.1, 0.15)))
        >>> scheme = nsde.schemes.JumpEuler()
        >>> round(float(scheme.log_density(merton, 0.0, 0.25, 0.0, 0.05)), 3)
        0.918
    """

    smooth: ClassVar[bool] = False
    has_jumps: ClassVar[bool] = True
    taken_by: ClassVar[str] = (
        "infer.PMMH or filters.Particle(proposal='bootstrap' or, for normal sizes, 'guided'), for "
        "a latent scalar path scheme=JumpMixture() with reparam.InnovationReparam, or "
        "scheme=MatchedJumps() for two moments of the jumps"
    )

    base: GaussianScheme

    def __init__(self, base: GaussianScheme | None = None) -> None:
        base = Euler() if base is None else base
        if not isinstance(base, GaussianScheme):
            raise TypeError(f"base must be a Gaussian scheme such as Euler(), got {base!r}")
        self.base = base

    def check(self, sde: SDE, state_shape: tuple[int, ...]) -> None:
        check_jumps(self, sde)
        terms = math.prod(source.max_per_step + 1 for source in sde.jumps)
        if terms > MAX_COMPONENTS:
            raise ValueError(
                f"{terms} combinations of jump numbers in one step, more than {MAX_COMPONENTS}: "
                "lower max_per_step on a finer grid"
            )
        self.base.check(sde, state_shape)

    def prepare(self, sde: SDE, times: Any, dt: Any) -> Any:
        return self.base.prepare(sde, times, dt)

    def innovation_shape(self, sde: SDE, state_shape: tuple[int, ...]) -> tuple[int, ...]:
        shape = self.base.innovation_shape(sde, state_shape)
        return (int(np.prod(shape, dtype=int)) + 2,)

    def step(self, sde: SDE, t: Array, dt: Array, x: Array, z: Array, cache: Any = None) -> Array:
        x = jnp.asarray(x)
        shape = self.base.innovation_shape(sde, x.shape)
        moved = self.base.step(sde, t, dt, x, jnp.reshape(z[:-2], shape), cache)
        key = key_of(z[-2:])
        for number, source in enumerate(sde.jumps):
            own = jax.random.fold_in(key, number)
            u = jax.random.uniform(own, (), x.dtype)
            mean = source.rate_at(t, x, sde.arguments) * dt
            count = jnp.minimum(poisson(u, mean), source.max_per_step)
            keys = jax.random.split(own, source.max_per_step)
            draw = jax.vmap(lambda k, s=source: s.draw_size(k, t, x, sde.arguments))
            sizes = draw(keys)
            happens = (jnp.arange(source.max_per_step) < count).astype(x.dtype)
            moved = moved + jnp.tensordot(happens, sizes.astype(x.dtype), 1)
            moved = jnp.where(held(mean, source.max_per_step), moved, jnp.nan)
        return moved

    def log_density(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Float[Array, ""]:
        x = jnp.asarray(x)
        log_weights, means, covs = mixture(self.base, sde, t, dt, x, cache)
        if x.ndim == 0:
            density = jax.vmap(lambda m, V: gaussian_log_density(x_next, m, jnp.sqrt(V[0, 0])))
        else:
            density = jax.vmap(lambda m, V: gaussian_log_density(x_next, m, cholesky(V)))
        return logsumexp(log_weights + density(means, covs))

    def invert(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Array:
        raise TypeError(
            "the innovations of JumpEuler() cannot be read off the ends of a step: whiten a scalar "
            "path with scheme=JumpMixture()"
        )


def check_jumps(scheme: AbstractScheme, sde: SDE) -> None:
    """Raise a `ValueError` for an SDE without jumps."""
    if not sde.jumps:
        raise ValueError(
            f"{type(scheme).__name__} is for an SDE with jumps, and this one has none: give "
            "SDE(..., jumps=nsde.CompoundPoisson(rate, size)), or take Euler()"
        )


def held(mean: Array, most: int) -> Array:
    """Whether a Poisson number hardly ever exceeds the most allowed."""
    return (1.0 - gammaincc(most + 1.0, lax.stop_gradient(mean))) <= TAIL


def mixture(
    base: GaussianScheme, sde: SDE, t: Any, dt: Any, x: Array, cache: Any
) -> tuple[Float[Array, " K"], Float[Array, "K *state"], Float[Array, "K d d"]]:
    """Weights, means and covariances of the next state by the numbers of jumps.

    Weights are those of the truncated Poisson laws; NaN where these have too much beyond.

    Raises:
        TypeError: sizes that are not normal.
    """
    mean, factor = base.moments(sde, t, dt, x, cache)
    if factor.ndim == mean.ndim:
        cov = jnp.diag(jnp.reshape(factor, (-1,)) ** 2)
    else:
        cov = factor @ factor.T
    counts = np.array(
        list(itertools.product(*(range(source.max_per_step + 1) for source in sde.jumps)))
    )
    log_weights = jnp.zeros(len(counts), mean.dtype)
    means = jnp.broadcast_to(mean, (len(counts), *mean.shape))
    covs = jnp.broadcast_to(cov, (len(counts), *cov.shape))
    for number, source in enumerate(sde.jumps):
        expected = source.rate_at(t, x, sde.arguments) * dt
        n = counts[:, number].astype(float)
        positive = expected > 0.0
        log_rate = jnp.where(positive, jnp.log(jnp.where(positive, expected, 1.0)), -1e30)
        all_n = np.arange(source.max_per_step + 1.0)
        total = logsumexp(all_n * log_rate - gammaln(all_n + 1.0))
        within = held(expected, source.max_per_step)
        log_w = n * log_rate - gammaln(n + 1.0) - total
        log_weights = log_weights + jnp.where(within, log_w, jnp.nan)
        size_mean, size_cov = source.normal_size(t, x, sde.arguments)
        means = (
            means + n.reshape(-1, *(1,) * mean.ndim) * jnp.broadcast_to(size_mean, mean.shape)[None]
        )
        covs = covs + n[:, None, None] * size_cov[None]
    return log_weights, means, covs


class JumpMixture(JumpEuler):
    """The same step of a scalar process as a smooth map of one standard normal number.

    `x' = F^-1(Phi(z))` with the distribution function F of the mixture: jumps and diffusion in one
    number, so that a latent path can be whitened (`reparam.InnovationReparam`) or guided. Sizes
    must be normal.

    Args:
        base: the Gaussian step without jumps.

    Raises:
        ValueError: in use, a vector state.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist, numpyro_sde as nsde
        >>> merton = nsde.SDE(lambda t, x: 0.05, lambda t, x: 0.2,
        ...                   jumps=nsde.CompoundPoisson(3.0, dist.Normal(-0.1, 0.15)))
        >>> scheme = nsde.schemes.JumpMixture()
        >>> x = scheme.step(merton, 0.0, 0.25, jnp.array(0.0), jnp.array(-2.5))
        >>> round(float(scheme.invert(merton, 0.0, 0.25, jnp.array(0.0), x)), 3)
        -2.5
    """

    smooth: ClassVar[bool] = True
    taken_by: ClassVar[str] = (
        "reparam.InnovationReparam with NUTS, infer.PMMH or filters.Particle(proposal='bootstrap')"
    )

    def check(self, sde: SDE, state_shape: tuple[int, ...]) -> None:
        super().check(sde, state_shape)
        if state_shape != ():
            raise ValueError(
                f"JumpMixture() maps one number through the distribution function of a scalar "
                f"process, got a state of shape {state_shape}: use JumpEuler() with "
                "filters.Particle(proposal='bootstrap')"
            )

    def innovation_shape(self, sde: SDE, state_shape: tuple[int, ...]) -> tuple[int, ...]:
        return ()

    def step(self, sde: SDE, t: Array, dt: Array, x: Array, z: Array, cache: Any = None) -> Array:
        x = jnp.asarray(x, jnp.result_type(x, float))
        log_weights, means, covs = mixture(self.base, sde, t, dt, x, cache)
        return _quantile(jnp.reshape(z, ()), log_weights, means, jnp.sqrt(covs[:, 0, 0]))

    def invert(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Array:
        x = jnp.asarray(x, jnp.result_type(x, float))
        log_weights, means, covs = mixture(self.base, sde, t, dt, x, cache)
        sd = jnp.sqrt(covs[:, 0, 0])
        one, zero = jnp.ones(1, x.dtype), jnp.zeros(1, x.dtype)
        upper = jnp.sum(jnp.exp(log_weights) * (x_next > means)) > 0.5
        sign = jnp.where(upper, -1.0, 1.0)

        # A normal number with the same tail: the smaller one, so that none is lost to rounding.
        tail = logsumexp(log_weights + log_ndtr(sign * (x_next - means) / sd))
        return sign * _normal_of_log_tail(tail, one, zero)


def _tail_and_slope(y: Array, log_weights: Array, means: Array, sd: Array) -> tuple[Array, Array]:
    """Log of the distribution function of a normal mixture, and its derivative."""
    u = (y - means) / sd
    log_tail = logsumexp(log_weights + log_ndtr(u))
    log_density = logsumexp(log_weights - 0.5 * u**2 - jnp.log(sd)) - 0.5 * math.log(2 * math.pi)
    return log_tail, jnp.exp(log_density - log_tail)


def _solve(
    target: Array, log_weights: Array, means: Array, sd: Array, lo: Array, hi: Array
) -> Array:
    """Where the log distribution function takes a value, with its derivatives."""

    def halve(bracket: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        lo, hi = bracket
        middle = 0.5 * (lo + hi)
        below = _tail_and_slope(middle, *fixed)[0] < aim
        return (jnp.where(below, middle, lo), jnp.where(below, hi, middle)), None

    fixed = tuple(lax.stop_gradient(a) for a in (log_weights, means, sd))
    aim = lax.stop_gradient(target)
    start = (lax.stop_gradient(lo), lax.stop_gradient(hi))
    (lo, hi), _ = lax.scan(halve, start, None, 60)
    y = 0.5 * (lo + hi)
    for _ in range(2):  # each step of Newton's makes one more derivative exact
        value, slope = _tail_and_slope(y, log_weights, means, sd)
        y = y - (value - target) / slope
    return y


def _quantile(z: Array, log_weights: Array, means: Array, sd: Array) -> Array:
    # The smaller tail, mirrored for positive z: differences of numbers next to one lose digits.
    sign = jnp.where(z > 0.0, -1.0, 1.0)
    centres = sign * means
    ends = centres + sd * (sign * z)  # the quantile lies among those of the components
    margin = 1e-6 * (1.0 + jnp.max(jnp.abs(ends)))
    likely = log_weights > -700.0
    lo = jnp.min(jnp.where(likely, ends, jnp.inf)) - margin
    hi = jnp.max(jnp.where(likely, ends, -jnp.inf)) + margin
    target = log_ndtr(sign * z)
    return sign * _solve(target, log_weights, centres, sd, lo, hi)


def _normal_of_log_tail(tail: Array, one: Array, zero: Array) -> Array:
    # A mixture of one standard normal: its quantile by the same search.
    far = -jnp.sqrt(jnp.maximum(-2.0 * lax.stop_gradient(tail), 0.0)) - 2.0
    return _solve(tail, zero, zero, one, far, jnp.ones_like(far))
