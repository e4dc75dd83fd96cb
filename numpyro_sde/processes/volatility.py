"""Stochastic volatility with leverage: a log price and what drives its variance.

Observe the log price exactly, `nsde.observe("price", x, lambda t, x: dist.Delta(x[0]), obs=...)`,
or with noise where quotes are noisy. Steps of a day in the unit of the rates: with rates per year,
1/252.
"""

# ruff: noqa: ARG001
# Functions of one protocol share its arguments, used or not.

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from numpyro_sde.processes.arguments import parameter, positive, real
from numpyro_sde.sde import SDE


def _two_noises(first: Array, second: Array, leverage: Array) -> Float[Array, "2 2"]:
    """Diffusion matrix of a pair whose noises have a correlation; lower triangular."""
    own = jnp.sqrt(1.0 - leverage**2)
    zero = jnp.zeros_like(first)
    return jnp.stack([jnp.stack([first, zero]), jnp.stack([second * leverage, second * own])])


def correlation(name: str, value: Any) -> Any:
    """Return a correlation as a floating point array.

    Raises:
        TypeError: not an array or a number.
        ValueError: a number that is not between -1 and 1.

    Example:
        >>> correlation("leverage", -0.5)
        Array(-0.5, dtype=float32, weak_type=True)
    """
    value = jnp.asarray(real(name, value))
    known = not isinstance(value, jax.core.Tracer) and value.ndim == 0
    if known and not -1.0 < float(value) < 1.0:  # a number, also inside somebody's trace
        raise ValueError(f"{name} must lie between -1 and 1, got {float(value)}")
    return value


def _log_volatility_drift(t: Any, x: Any, p: Any) -> Array:
    price = p["drift"] - 0.5 * jnp.exp(x[1])
    return jnp.stack([price, p["rate"] * (p["mean"] - x[1])])


def _log_volatility_diffusion(t: Any, x: Any, p: Any) -> Array:
    return _two_noises(jnp.exp(0.5 * x[1]), p["scale"] + 0.0 * x[1], p["leverage"])


class StochasticVolatility(SDE):
    """A log price with log variance h: `dX = (drift - e^h / 2) dt + e^(h/2) dW`.

    `dh = rate (mean - h) dt + scale dB`, with correlation `leverage` of `dW` and `dB`: negative
    where prices that fall make the market nervous. The state is `(X, h)`. The stationary law of h
    is normal with mean `mean` and variance `scale^2 / (2 rate)`; `exp(mean / 2)` is the volatility
    at its median.

    Source: Hull and White (1987), The Pricing of Options on Assets with Stochastic Volatilities;
    Harvey and Shephard (1996), Estimation of an Asymmetric Stochastic Volatility Model.

    Args:
        rate: speed of return of the log variance, 1/time; positive.
        mean: its level, log of (1/time).
        scale: its volatility, per square root of time; positive.
        leverage: correlation of the two noises, in (-1, 1).
        drift: growth of the price, 1/time.

    Raises:
        ValueError: a number out of its range.
        TypeError: an argument that is no number or array.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro_sde as nsde
        >>> sde = nsde.processes.StochasticVolatility(rate=5.0, mean=-3.2, scale=1.5, leverage=-0.6)
        >>> path = nsde.SDEPath(sde, jnp.arange(4) / 252.0, init=jnp.array([0.0, -3.2]))
        >>> path.sample(jax.random.key(0)).shape
        (4, 2)
    """

    rate = parameter("rate", "Speed of return of the log variance, 1/time.")
    mean = parameter("mean", "Level of the log variance, log of (1/time).")
    scale = parameter("scale", "Volatility of the log variance, per square root of time.")
    leverage = parameter("leverage", "Correlation of the noises of price and log variance.")
    growth = parameter("drift", "Growth of the price, 1/time.")

    def __init__(
        self,
        rate: ArrayLike,
        mean: ArrayLike,
        scale: ArrayLike,
        leverage: ArrayLike = 0.0,
        drift: ArrayLike = 0.0,
    ) -> None:
        super().__init__(
            _log_volatility_drift,
            _log_volatility_diffusion,
            params={
                "rate": positive("rate", rate),
                "mean": real("mean", mean),
                "scale": positive("scale", scale),
                "leverage": correlation("leverage", leverage),
                "drift": real("drift", drift),
            },
        )


def _heston_drift(t: Any, x: Any, p: Any) -> Array:
    variance = jnp.maximum(x[1], 0.0)
    return jnp.stack([p["drift"] - 0.5 * variance, p["rate"] * (p["mean"] - variance)])


def _heston_diffusion(t: Any, x: Any, p: Any) -> Array:
    inside = x[1] > 0.0
    # The inner choice keeps the derivative of the root finite where it is not used.
    root = jnp.where(inside, jnp.sqrt(jnp.where(inside, x[1], 1.0)), 0.0)
    return _two_noises(root, p["scale"] * root, p["leverage"])


class Heston(SDE):
    """A log price whose variance v is a square-root process: `dX = (drift - v/2) dt + sqrt(v) dW`.

    `dv = rate (mean - v) dt + scale sqrt(v) dB`, with correlation `leverage` of `dW` and `dB`. The
    state is `(X, v)`. The variance never reaches zero where `2 rate mean >= scale^2`. Discretised
    steps may make it negative: there drift and diffusion take it as zero (full truncation, Lord,
    Koekkoek and van Dijk 2010), and the density of a path that stays there is not finite. Where
    Feller's condition fails (as options often ask), `StochasticVolatility` is the safer model for
    inference.

    Source: Heston (1993), A Closed-Form Solution for Options with Stochastic Volatility.

    Args:
        rate: speed of return of the variance, 1/time; positive.
        mean: its level, 1/time; positive.
        scale: its volatility, 1/time; positive.
        leverage: correlation of the two noises, in (-1, 1).
        drift: growth of the price, 1/time.

    Raises:
        ValueError: a number out of its range.
        TypeError: an argument that is no number or array.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro_sde as nsde
        >>> sde = nsde.processes.Heston(rate=3.0, mean=0.04, scale=0.4, leverage=-0.7)
        >>> path = nsde.SDEPath(sde, jnp.arange(4) / 252.0, init=jnp.array([0.0, 0.04]))
        >>> path.sample(jax.random.key(0)).shape
        (4, 2)
    """

    rate = parameter("rate", "Speed of return of the variance, 1/time.")
    mean = parameter("mean", "Level of the variance, 1/time.")
    scale = parameter("scale", "Volatility of the variance, 1/time.")
    leverage = parameter("leverage", "Correlation of the noises of price and variance.")
    growth = parameter("drift", "Growth of the price, 1/time.")

    def __init__(
        self,
        rate: ArrayLike,
        mean: ArrayLike,
        scale: ArrayLike,
        leverage: ArrayLike = 0.0,
        drift: ArrayLike = 0.0,
    ) -> None:
        super().__init__(
            _heston_drift,
            _heston_diffusion,
            params={
                "rate": positive("rate", rate),
                "mean": positive("mean", mean),
                "scale": positive("scale", scale),
                "leverage": correlation("leverage", leverage),
                "drift": real("drift", drift),
            },
        )
