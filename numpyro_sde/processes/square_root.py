"""Mean-reverting processes with noise that vanishes at zero: square root and constant elasticity.

The transition of the square-root process is noncentral chi-squared: Feller (1951), Two Singular
Diffusion Problems; Cox, Ingersoll and Ross (1985), A Theory of the Term Structure of Interest
Rates, equations 18 and 20.
"""

# ruff: noqa: ARG001, ARG002
# Functions of one protocol share its arguments, used or not.

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from numpyro_sde.processes.arguments import nonnegative, parameter, positive
from numpyro_sde.processes.special import expm1_ratio, log_noncentral_gamma
from numpyro_sde.schemes.base import AbstractScheme
from numpyro_sde.sde import SDE

# Above this mean a Poisson variable is replaced by its Cornish-Fisher quantile map (see draw).
_LARGE_MEAN = 1e5


def _reverting_drift(t: Any, x: Any, p: Any) -> Array:
    return p["rate"] * (p["mean"] - x)


def _square_root_diffusion(t: Any, x: Any, p: Any) -> Array:
    inside = x > 0.0
    # The inner choice keeps the derivative of the root finite where it is not used.
    return p["scale"] * jnp.where(inside, jnp.sqrt(jnp.where(inside, x, 1.0)), 0.0)


class CoxIngersollRoss(SDE):
    """The square-root process, `dX = rate (mean - X) dt + scale sqrt(X) dW`.

    A positive quantity with mean reversion and noise in proportion to the root of its size:
    short interest rates (Cox, Ingersoll and Ross 1985), variances (Heston 1993), intensities,
    large populations with immigration. Zero is never reached if `2 rate mean >= scale^2`, and
    touched without being crossed otherwise. The stationary law is Gamma with shape
    `2 rate mean / scale^2` and rate `2 rate / scale^2`: mean `mean`, variance
    `mean scale^2 / (2 rate)`.

    The exact transition is noncentral chi-squared. Discretised steps may leave the positive
    half line: there the diffusion is taken as zero (full truncation, Lord, Koekkoek and van
    Dijk 2010), so that simulation goes on, and the density of a path that does so is not
    finite. `schemes.DriftImplicitSquareRoot` and `schemes.HighOrderStrang` are steps
    made for this process.

    Args:
        rate: speed of return, 1/time; positive.
        mean: level of return, state units; positive.
        scale: volatility, square root of state units per square root of time; positive.

    Raises:
        ValueError: a number that is not positive and finite.
        TypeError: an argument that is no number or array.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> cir = nsde.processes.CoxIngersollRoss(rate=0.5, mean=4.0, scale=1.0)
        >>> path = nsde.SDEPath(cir, [0.0, 0.25], init=3.0)
        >>> round(float(path.log_prob(jnp.array([3.0, 3.5]))), 4)
        -0.9235
    """

    rate = parameter("rate", "Speed of return, 1/time.")
    mean = parameter("mean", "Level of return, state units.")
    scale = parameter("scale", "Volatility, root of state units per square root of time.")

    def __init__(self, rate: ArrayLike, mean: ArrayLike, scale: ArrayLike) -> None:
        super().__init__(
            _reverting_drift,
            _square_root_diffusion,
            params={
                "rate": positive("rate", rate),
                "mean": positive("mean", mean),
                "scale": positive("scale", scale),
            },
        )

    @property
    def positive(self) -> bool:
        """A positive state does not become negative."""
        return True

    def exact_transition(self) -> AbstractScheme | None:
        """The noncentral chi-squared transition."""
        return NoncentralChiSquaredTransition() if self.noise.independent else None

    def stationary_moments(self) -> tuple[Array, Array]:
        """Mean and variance of the stationary Gamma law, NaN unless the rate is positive."""
        mean = jnp.where(self.rate > 0.0, self.mean, jnp.nan)
        return mean, 0.5 * mean * self.scale**2 / self.rate

    def stationary_log_density(self, x: ArrayLike) -> Float[Array, "..."]:
        """Log density of the stationary Gamma law at `x`, elementwise; -inf for `x < 0`.

        At 0 it is the limit from above, infinite below two degrees of freedom.
        """
        x = jnp.asarray(x)
        inverse = 2.0 * jnp.where(self.rate > 0.0, self.rate, jnp.nan) / self.scale**2
        shape = inverse * self.mean
        inside = x > 0.0
        edge = jnp.where(shape < 1.0, jnp.inf, jnp.where(shape == 1.0, jnp.log(inverse), -jnp.inf))
        outside = jnp.where(x == 0.0, edge, -jnp.inf)
        x = jnp.where(inside, x, 1.0)
        value = shape * jnp.log(inverse) - gammaln(shape) + (shape - 1.0) * jnp.log(x) - inverse * x
        return jnp.where(inside | jnp.isnan(shape), value, outside)


class NoncentralChiSquaredTransition(AbstractScheme):
    """The exact step of the square-root process.

    With `c = 2 rate / (scale^2 (1 - exp(-rate dt)))` the variable `c X'` is
    `Gamma(2 rate mean / scale^2 + N, 1)` with `N ~ Poisson(c x exp(-rate dt))`. It is drawn as
    that, so it is no map of normal innovations. From a half degree of freedom on the Poisson
    variable gives way to a squared normal one; below, a Poisson mean above 1e5 is drawn from
    its second-order Cornish-Fisher expansion, whose error is below 1e-5 of the spread.

    The log density is exact to about 3e-15 relative in float64 and 2e-6 in float32, and
    differentiable in parameters and both states. At a next state of exactly 0 it is the limit from
    above: infinite below two degrees of freedom, `4 rate mean < scale^2 * 2`; finite at two;
    -inf above. Draws are above 0.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro_sde as nsde
        >>> cir = nsde.processes.CoxIngersollRoss(rate=0.5, mean=4.0, scale=1.0)
        >>> draw = cir.exact_transition().draw
        >>> bool(draw(cir, jax.random.key(0), 0.0, 0.25, jnp.array(3.0)) > 0)
        True
    """

    approximates_sde: ClassVar[bool] = True

    has_innovations: ClassVar[bool] = False
    keeps_positive: ClassVar[bool] = True
    reaches_zero: ClassVar[bool] = True

    def log_density(
        self,
        sde: SDE,
        t: Array,
        dt: Array,
        x: Array,
        x_next: Array,
        cache: Any = None,
    ) -> Float[Array, ""]:
        mean = sde.params["mean"]
        shape, c, decay, pull = _transition_constants(sde, dt)
        # The increment first: it is exact where steps are short.
        gap = c * ((x_next - x) - (mean - x) * pull)
        value = log_noncentral_gamma(c * x_next, shape, c * decay * x, gap) + jnp.log(c)
        return jnp.sum(value)

    def draw(
        self,
        sde: SDE,
        key: PRNGKeyArray,
        t: Array,
        dt: Array,
        x: Array,
        cache: Any = None,
    ) -> Array:
        shape, c, decay, _ = _transition_constants(sde, dt)
        u = c * decay * x
        dtype = jnp.result_type(u)
        key_normal, key_poisson, key_gamma = jax.random.split(key, 3)
        z = jax.random.normal(key_normal, jnp.shape(u), dtype)
        by_normal = shape > 0.5
        by_poisson = ~by_normal & (u < _LARGE_MEAN)
        n = jax.random.poisson(key_poisson, jnp.where(by_poisson, u, 0.0)).astype(dtype)
        large = u + jnp.sqrt(u) * z + (z**2 - 1.0) / 6.0
        extra = jnp.where(by_poisson, n, large)
        gamma = jax.random.gamma(
            key_gamma, jnp.where(by_normal, shape - 0.5, shape + extra), jnp.shape(u), dtype
        )
        # Divided by c before the square, which short steps would blow up to 1 / dt.
        squared = (jnp.sqrt(decay * x) + z / jnp.sqrt(2.0 * c)) ** 2
        # With few degrees of freedom much of the law lies below the smallest float32: a draw is
        # the smallest number there is, not 0, where the density is no number.
        smallest = jnp.finfo(dtype).tiny * jnp.maximum(1.0, 1.0 / c)
        return jnp.maximum(gamma / c + jnp.where(by_normal, squared, 0.0), smallest)

    def step(self, sde: SDE, t: Array, dt: Array, x: Array, z: Array, cache: Any = None) -> Array:
        raise TypeError(_NO_INNOVATIONS)

    def invert(
        self,
        sde: SDE,
        t: Array,
        dt: Array,
        x: Array,
        x_next: Array,
        cache: Any = None,
    ) -> Array:
        raise TypeError(_NO_INNOVATIONS)


_NO_INNOVATIONS = (
    "the noncentral chi-squared step is not a map of normal innovations: use "
    "scheme=DriftImplicitSquareRoot() or HighOrderStrang()"
)


def _transition_constants(sde: SDE, dt: Any) -> tuple[Array, Array, Array, Array]:
    """Shape, inverse scale `c`, `exp(-rate dt)` and `1 - exp(-rate dt)` of a step."""
    rate, mean, scale = (sde.params[name] for name in ("rate", "mean", "scale"))
    h = rate * dt
    shape = 2.0 * rate * mean / scale**2
    c = 2.0 / (scale**2 * dt * expm1_ratio(h))
    return shape, c, jnp.exp(-h), -jnp.expm1(-h)


def _power_diffusion(t: Any, x: Any, p: Any) -> Array:
    inside = x > 0.0
    return p["scale"] * jnp.where(inside, jnp.where(inside, x, 1.0) ** p["exponent"], 0.0)


class CKLS(SDE):
    """Constant elasticity of variance, `dX = rate (mean - X) dt + scale X^exponent dW`.

    The short-rate family of Chan, Karolyi, Longstaff and Sanders (1992), who asked of the data
    how volatility grows with the level. Exponent 0 is the Vasicek (Ornstein-Uhlenbeck) model
    restricted to positive states, 1/2 Cox-Ingersoll-Ross, 1 the model of Brennan and Schwartz.
    With an exponent above 1/2 zero is never reached. No transition is known in closed form for
    general exponents; below zero the diffusion is taken as zero (full truncation).

    Args:
        rate: speed of return, 1/time; positive.
        mean: level of return, state units; positive.
        scale: volatility, `state^(1 - exponent)` per square root of time; positive.
        exponent: elasticity of the volatility, 0 or more.

    Raises:
        ValueError: a number that is not finite, not positive (`rate`, `mean`, `scale`) or
            negative (`exponent`).
        TypeError: an argument that is no number or array.

    Example:
        >>> import numpyro_sde as nsde
        >>> rate = nsde.processes.CKLS(rate=0.2, mean=5.0, scale=0.1, exponent=1.5)
        >>> round(float(rate.diffusion_at(0.0, 4.0)), 4)
        0.8
    """

    rate = parameter("rate", "Speed of return, 1/time.")
    mean = parameter("mean", "Level of return, state units.")
    scale = parameter("scale", "Volatility, state^(1 - exponent) per square root of time.")
    exponent = parameter("exponent", "Elasticity of the volatility.")

    def __init__(
        self, rate: ArrayLike, mean: ArrayLike, scale: ArrayLike, exponent: ArrayLike
    ) -> None:
        super().__init__(
            _reverting_drift,
            _power_diffusion,
            params={
                "rate": positive("rate", rate),
                "mean": positive("mean", mean),
                "scale": positive("scale", scale),
                "exponent": nonnegative("exponent", exponent),
            },
        )

    def stationary_log_density(self, x: ArrayLike) -> Float[Array, "..."]:
        """Log density of the stationary law at `x`, up to a constant; -inf for `x <= 0`.

        `x^(-2 g) exp((2 rate / scale^2) (mean B(x, 1 - 2 g) - B(x, 2 - 2 g)))` with `g` the
        exponent and `B(x, k) = (x^k - 1) / k`, a logarithm at `k = 0` (Karlin and Taylor 1981,
        section 15.6). It is a law for `g` above 1/2, and at 1/2.
        """
        inside = jnp.asarray(x) > 0.0
        log_x = jnp.log(jnp.where(inside, x, 1.0))
        g = self.exponent
        weight = 2.0 * jnp.where(self.rate > 0.0, self.rate, jnp.nan) / self.scale**2
        pull = self.mean * _box_cox(log_x, 1.0 - 2.0 * g) - _box_cox(log_x, 2.0 - 2.0 * g)
        return jnp.where(inside, weight * pull - 2.0 * g * log_x, -jnp.inf)


def _box_cox(log_x: Array, power: Array) -> Array:
    return log_x * expm1_ratio(-power * log_x)
