"""Ornstein-Uhlenbeck processes driven by a subordinator: positive, jumping up and decaying.

`dX = -rate X dt + dZ(rate t)` with a process Z that only increases, chosen such that the stationary
law is a gamma or an inverse Gaussian one: Barndorff-Nielsen and Shephard (2001), "Non-Gaussian
Ornstein-Uhlenbeck-based models", J. R. Statist. Soc. B 63. With `c = exp(-rate dt)` the next state
is `c x + W`, the law of W known and drawn exactly:

- gamma: `E exp(-s W) = ((1 + c s scale) / (1 + s scale))^shape`. It is 0 with probability
  `c^shape`, else gamma of shape S and scale `c scale`, S negative binomial (Sabino and Cufaro
  Petroni 2021).
- inverse Gaussian: an inverse Gaussian variable and a Poisson number of variables `N(0, 1)^2 / 2V`,
  `sqrt V` uniform: the mixture form of Zhang and Zhang (2008), without rejection. Its density by
  inverting its Laplace transform (`schemes.contour`).
"""

# ruff: noqa: ARG001, ARG002
# Functions of one protocol share its arguments, used or not.

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import gammaln, logsumexp
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from numpyro_sde.processes.arguments import parameter, positive
from numpyro_sde.schemes.base import AbstractScheme
from numpyro_sde.schemes.contour import CUT, enough, log_integral, saddle
from numpyro_sde.schemes.inversion import poisson
from numpyro_sde.schemes.keyed import KeyedScheme
from numpyro_sde.sde import SDE

# Decays of a state after which nothing of it is left in float64.
_FORGOTTEN = 40.0
# Terms of Kummer's series, largest argument for it, and terms of its expansion beyond.
_TERMS, _LARGEST, _BEYOND = 512, 350.0, 96
# The expansion ends at as many terms as the shape has.
_LARGEST_SHAPE = 64.0
# Nodes of the contour of an inverse Gaussian step.
_NODES = 192


def _decay(t: Any, x: Any, p: Any) -> Array:
    return -p["rate"] * x


def _no_diffusion(t: Any, x: Any, p: Any) -> Array:
    return jnp.zeros_like(x)


class SubordinatedOU(SDE):
    """What the two processes share: their exact step is the only scheme that knows their jumps."""

    rate = parameter("rate", "Speed of decay, 1/time.")

    def __init__(self, params: dict[str, Any]) -> None:
        super().__init__(_decay, _no_diffusion, params=params)

    @property
    def positive(self) -> bool:
        """A positive state stays positive."""
        return True

    @property
    def is_diffusion(self) -> bool:
        return False

    def default_transition(self) -> AbstractScheme | None:
        return self.exact_transition()

    def check_scheme(self, scheme: AbstractScheme) -> None:
        if not isinstance(scheme, SubordinatedStep):
            raise ValueError(
                f"{type(scheme).__name__} would leave out the jumps of {type(self).__name__}: "
                "leave scheme=None, or give schemes.Exact()"
            )


class GammaOU(SubordinatedOU):
    """A process of exponential jumps that decay, with a gamma stationary law.

    Jumps of mean `scale` arrive `shape * rate` times per unit time and decay at the rate: shot
    noise, volatility, rain in a store. The transition is drawn exactly and has a closed density
    with an atom: where no jump came, with probability `exp(-shape rate dt)`, the log density is the
    log of that. Filters take it as particles, proposal="bootstrap"; NUTS on a path that is seen.

    Args:
        rate: speed of decay, 1/time; positive.
        shape: shape of the stationary gamma law; positive.
        scale: scale of that law and mean size of a jump, state units; positive.

    Raises:
        ValueError: a number that is not positive and finite.
        TypeError: an argument that is no number or array.

    Example:
        >>> import jax, numpyro.distributions as dist, numpyro_sde as nsde
        >>> shots = nsde.processes.GammaOU(rate=0.5, shape=2.0, scale=1.5)
        >>> path = nsde.SDEPath(shots, [0.0, 1.0, 2.0], init=dist.Gamma(2.0, 1 / 1.5))
        >>> x = path.sample(jax.random.key(0))
        >>> x.shape, bool(x.min() > 0), [float(m) for m in shots.stationary_moments()]
        ((3,), True, [3.0, 4.5])
    """

    shape = parameter("shape", "Shape of the stationary law.")
    scale = parameter("scale", "Scale of the stationary law, state units.")

    def __init__(self, rate: ArrayLike, shape: ArrayLike, scale: ArrayLike) -> None:
        super().__init__(
            {
                "rate": positive("rate", rate),
                "shape": positive("shape", shape),
                "scale": positive("scale", scale),
            }
        )

    def exact_transition(self) -> AbstractScheme | None:
        """The step by a negative binomial number of exponential variables."""
        return GammaOUTransition()

    def stationary_moments(self) -> tuple[Array, Array]:
        """Mean and variance of the stationary law."""
        return self.shape * self.scale, self.shape * self.scale**2

    def stationary_log_density(self, x: ArrayLike) -> Float[Array, "..."]:
        """Log density of the stationary gamma law at `x`, elementwise."""
        y = jnp.asarray(x) / self.scale
        return (self.shape - 1.0) * jnp.log(y) - y - gammaln(self.shape) - jnp.log(self.scale)


class InverseGaussianOU(SubordinatedOU):
    """A decaying process of infinitely many small jumps, with an inverse Gaussian stationary law.

    Volatilities and other positive quantities with heavier tails than a gamma law has. The
    transition is drawn exactly, and its density is an integral that is computed to rounding: NUTS
    on a path that is seen, particles with proposal="bootstrap" for one that is not.

    Args:
        rate: speed of decay, 1/time; positive.
        mean: mean of the stationary law, state units; positive.
        shape: its shape parameter, state units: the variance is `mean^3 / shape`; positive.

    Raises:
        ValueError: a number that is not positive and finite.
        TypeError: an argument that is no number or array.

    Example:
        >>> import jax, numpyro_sde as nsde
        >>> variance = nsde.processes.InverseGaussianOU(rate=0.5, mean=1.0, shape=2.0)
        >>> path = nsde.SDEPath(variance, [0.0, 1.0, 2.0], init=1.0)
        >>> x = path.sample(jax.random.key(0))
        >>> bool(x.min() > 0), [float(m) for m in variance.stationary_moments()]
        (True, [1.0, 0.5])
    """

    mean = parameter("mean", "Mean of the stationary law, state units.")
    shape = parameter("shape", "Shape of the stationary law, state units.")

    def __init__(self, rate: ArrayLike, mean: ArrayLike, shape: ArrayLike) -> None:
        super().__init__(
            {
                "rate": positive("rate", rate),
                "mean": positive("mean", mean),
                "shape": positive("shape", shape),
            }
        )

    def exact_transition(self) -> AbstractScheme | None:
        """The step by an inverse Gaussian variable and a Poisson number of others."""
        return InverseGaussianOUTransition()

    def stationary_moments(self) -> tuple[Array, Array]:
        """Mean and variance of the stationary law."""
        return self.mean, self.mean**3 / self.shape

    def stationary_log_density(self, x: ArrayLike) -> Float[Array, "..."]:
        """Log density of the stationary inverse Gaussian law at `x`, elementwise."""
        x = jnp.asarray(x)
        away = self.shape * (x - self.mean) ** 2 / (2.0 * self.mean**2 * x)
        return 0.5 * jnp.log(self.shape / (2.0 * math.pi * x**3)) - away


class SubordinatedStep(KeyedScheme):
    """The next state is the decayed one and an independent variable, drawn by a key."""

    keeps_positive: ClassVar[bool] = True
    has_jumps: ClassVar[bool] = True
    taken_by: ClassVar[str] = "infer.PMMH or filters.Particle(proposal='bootstrap')"

    def check(self, sde: SDE, state_shape: tuple[int, ...]) -> None:
        if not isinstance(sde, SubordinatedOU) or state_shape != ():
            raise ValueError(
                f"{type(self).__name__} is the step of a scalar GammaOU or InverseGaussianOU, got "
                f"a {type(sde).__name__} of state shape {state_shape}"
            )

    @abstractmethod
    def added(self, p: Any, c: Array, key: PRNGKeyArray) -> Array:
        """Draw what is added to the decayed state, which `c` multiplies."""

    def draw(
        self, sde: SDE, key: PRNGKeyArray, t: Array, dt: Array, x: Array, cache: Any = None
    ) -> Array:
        x = jnp.asarray(x, jnp.result_type(x, float))
        total = jnp.asarray(sde.params["rate"] * dt, x.dtype)
        # In parts of one decay each, so that the numbers in `added` stay small.
        kept = jnp.minimum(total, _FORGOTTEN)
        parts = jnp.maximum(jnp.ceil(kept), 1.0)
        c = jnp.exp(-kept / parts)

        def part(k: Array, x: Array) -> Array:
            return c * x + self.added(sde.params, c, jax.random.fold_in(key, k)).astype(x.dtype)

        number = jnp.where(jnp.isnan(parts), 0.0, parts).astype(jnp.int32)
        new = lax.fori_loop(0, number, part, x * jnp.exp(kept - total))
        return jnp.where(jnp.isnan(total), jnp.nan, new)


class GammaOUTransition(SubordinatedStep):
    """The exact step of `GammaOU`.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> shots = nsde.processes.GammaOU(rate=0.5, shape=2.0, scale=1.5)
        >>> step = shots.exact_transition()
        >>> round(float(step.log_density(shots, 0.0, 1.0, jnp.array(2.0), jnp.array(3.0))), 4)
        -2.0096
    """

    def added(self, p: Any, c: Array, key: PRNGKeyArray) -> Array:
        mixed, number, size = jax.random.split(key, 3)
        mean = jax.random.gamma(mixed, jnp.asarray(p["shape"], c.dtype)) * (1.0 - c) / c
        jumps = poisson(jax.random.uniform(number, (), c.dtype), mean)
        total = jax.random.gamma(size, jnp.maximum(jumps, 1.0))
        return jnp.where(jumps > 0.0, p["scale"] * c * total, 0.0)

    def log_density(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Float[Array, ""]:
        p = sde.params
        a, scale = p["shape"], p["scale"]
        log_c = -p["rate"] * dt
        start = jnp.exp(log_c) * x
        w = x_next - start
        rounding = 16.0 * jnp.finfo(jnp.result_type(w)).eps * jnp.abs(x_next)
        jumped = w > rounding
        log_y = jnp.log(jnp.where(jumped, w, 1.0)) - jnp.log(scale) - log_c
        log_u = log_y + jnp.log(-jnp.expm1(log_c))
        body = a * log_c + log_u - jnp.log(jnp.where(jumped, w, 1.0)) - jnp.exp(log_y)
        body = body + jnp.log(a) + _log_kummer(a, log_u)
        return jnp.where(jumped, body, jnp.where(w < -rounding, -jnp.inf, a * log_c))


def _log_kummer(a: Array, log_z: Array) -> Array:
    """Log of Kummer's function `M(a + 1, 2, z)`; NaN for large z and shapes above 64."""
    near = log_z <= math.log(_LARGEST)
    k = jnp.arange(_TERMS, dtype=log_z.dtype)
    inside = jnp.where(near, log_z, 0.0)
    series = logsumexp(
        gammaln(a + 1.0 + k) - gammaln(a + 1.0) - gammaln(k + 1.0) - gammaln(k + 2.0) + k * inside
    )
    beyond = jnp.where(near, math.log(_LARGEST), log_z)
    j = jnp.arange(1.0, _BEYOND, dtype=log_z.dtype)
    ratios = (j - a) * (j - 1.0 - a) / j * jnp.exp(-beyond)
    total = 1.0 + jnp.sum(jnp.cumprod(ratios))
    far = jnp.exp(beyond) + (a - 1.0) * beyond - gammaln(a + 1.0) + jnp.log(total)
    return jnp.where(near, series, jnp.where(a <= _LARGEST_SHAPE, far, jnp.nan))


class InverseGaussianOUTransition(SubordinatedStep):
    """The exact step of `InverseGaussianOU`; its density by a contour integral.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> variance = nsde.processes.InverseGaussianOU(rate=0.5, mean=1.0, shape=2.0)
        >>> step = variance.exact_transition()
        >>> value = step.log_density(variance, 0.0, 1.0, jnp.array(1.0), jnp.array(1.2))
        >>> bool(jnp.isfinite(value))
        True
    """

    def added(self, p: Any, c: Array, key: PRNGKeyArray) -> Array:
        own, number, others = jax.random.split(key, 3)
        root = jnp.sqrt(c)
        tempering = p["shape"] / p["mean"] ** 2  # gamma^2 of the source
        first = _inverse_gaussian(
            own, p["mean"] * (1.0 - root), p["shape"] * (1.0 - root) ** 2, c.dtype
        )
        mean = p["shape"] / p["mean"] * (1.0 - root)
        count = poisson(jax.random.uniform(number, (), c.dtype), jnp.asarray(mean, c.dtype))

        def one(k: Array, total: Array) -> Array:
            normal, uniform = jax.random.split(jax.random.fold_in(others, k))
            z = jax.random.normal(normal, (), c.dtype)
            v = 1.0 + jax.random.uniform(uniform, (), c.dtype) * (1.0 / root - 1.0)
            return total + z**2 / (tempering * v**2)

        known = jnp.where(jnp.isnan(count), 0.0, count).astype(jnp.int32)
        return first + lax.fori_loop(0, known, one, 0.0 * count)

    def log_density(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Float[Array, ""]:
        p = sde.params
        log_c = -p["rate"] * dt
        w = x_next - jnp.exp(log_c) * x
        # Below this it is the rounding of two states; the density is far below any number there.
        inside = w > 16.0 * jnp.finfo(jnp.result_type(w)).eps * jnp.abs(x_next)
        value = _log_added_density(p["mean"], p["shape"], log_c, jnp.where(inside, w, 1.0))
        return jnp.where(inside, value, jnp.where(jnp.isnan(w), jnp.nan, -jnp.inf))


def _log_added_density(mean: Array, shape: Array, log_c: Array, w: Array) -> Array:
    """Log density of what a step adds to the decayed state of an inverse Gaussian process.

    With `q^2 = gamma^2 + 2 p`, p the variable of Laplace's transform, the inversion is the
    integral of `q exp(E(q))` along a line to the right of the origin, on which it decays like a
    normal density of variance 1 / w:

        E(q) = (q^2 - gamma^2) w / 2 + delta (sqrt(gamma^2 (1 - c) + c q^2) - q).
    """
    delta, gamma = jnp.sqrt(shape), jnp.sqrt(shape) / mean
    c, A = jnp.exp(log_c), -(gamma**2) * jnp.expm1(log_c)

    def exponent(q: Array, w: Array, delta: Array, gamma: Array, c: Array, A: Array) -> Array:
        return 0.5 * (q**2 - gamma**2) * w + delta * (jnp.sqrt(A + c * q**2) - q)

    values = (w, delta, gamma, c, A)
    fixed = lax.stop_gradient(values)
    at, root = fixed[0], jnp.sqrt(fixed[3])
    slope = jax.grad(exponent)
    highest = fixed[1] / at
    q = saddle(lambda q: slope(q, *fixed), highest * (1.0 - root), highest)
    # Away from the branch cut on the imaginary axis, at the cost of two nats at most.
    q = jnp.maximum(q, 2.0 / jnp.sqrt(at))
    curvature = jax.grad(slope)(q, *fixed)
    aside = jnp.minimum(CUT / jnp.sqrt(curvature), 0.9 * q)
    step = CUT / jnp.sqrt(at) / _NODES
    gained = 2.0 * math.pi * aside / step - 0.5 * curvature * aside**2
    nodes = q + 1j * step * jnp.arange(1.0, _NODES + 1.0)
    at_real = exponent(q, *values)
    ratios = jnp.exp(jax.vmap(exponent, (0, *(None,) * 5))(nodes, *values) - at_real) * nodes / q
    value = log_integral(at_real + jnp.log(q), ratios, step)
    return jnp.where(gained > enough(w.dtype), value, jnp.nan)


def _inverse_gaussian(key: PRNGKeyArray, mean: Array, shape: Array, dtype: Any) -> Array:
    """Draw by the roots of Michael, Schucany and Haas (1976), the smaller without cancellation."""
    normal, uniform = jax.random.split(key)
    q = mean * jax.random.normal(normal, (), dtype) ** 2 / (2.0 * shape)
    small = mean / (1.0 + q + jnp.sqrt(q * (q + 2.0)))
    u = jax.random.uniform(uniform, (), dtype)
    return jnp.where(u * (mean + small) <= mean, small, mean**2 / small)
