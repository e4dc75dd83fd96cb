"""Chaotic test systems of data assimilation with additive noise.

Sources: Lorenz (1963), Deterministic nonperiodic flow; Lorenz (1996), Predictability: a problem
partly solved, equations 2 and 3.
"""

# ruff: noqa: ARG001
# Functions of one protocol share its arguments, used or not.

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, ArrayLike

from numpyro_sde.processes.arguments import count, nonnegative, parameter, positive, real
from numpyro_sde.sde import SDE


def _lorenz63_drift(t: Any, x: Any, p: Any) -> Array:
    return jnp.stack(
        [
            p["sigma"] * (x[1] - x[0]),
            x[0] * (p["rho"] - x[2]) - x[1],
            x[0] * x[1] - p["beta"] * x[2],
        ]
    )


def _constant_diffusion(t: Any, x: Any, p: Any) -> Array:
    return p["scale"]


class Lorenz63(SDE):
    """Lorenz's convection model with additive noise, state `(x, y, z)`.

    `dx = sigma (y - x) dt`, `dy = (x (rho - z) - y) dt`, `dz = (x y - beta z) dt`, each with
    `scale dW`. Chaotic at the usual values, with errors growing by a factor e in about 1.1
    time units: a hard test of filters with few observations. No stationary law in closed form.

    Args:
        sigma: Prandtl number.
        rho: Rayleigh number over its critical value.
        beta: geometric factor.
        scale: volatility of each coordinate, state units per square root of time; positive.

    Raises:
        ValueError: a number that is not finite, or a `scale` that is not positive.
        TypeError: an argument that is no number or array.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> lorenz = nsde.processes.Lorenz63(beta=2.0)
        >>> lorenz.drift_at(0.0, jnp.array([1.0, 2.0, 3.0])).tolist()
        [10.0, 23.0, -4.0]
    """

    sigma = parameter("sigma", "Prandtl number.")
    rho = parameter("rho", "Rayleigh number over its critical value.")
    beta = parameter("beta", "Geometric factor.")
    scale = parameter("scale", "Volatility, state units per square root of time.")

    def __init__(
        self,
        sigma: ArrayLike = 10.0,
        rho: ArrayLike = 28.0,
        beta: ArrayLike = 8.0 / 3.0,
        scale: ArrayLike = 1.0,
    ) -> None:
        super().__init__(
            _lorenz63_drift,
            _constant_diffusion,
            params={
                "sigma": real("sigma", sigma),
                "rho": real("rho", rho),
                "beta": real("beta", beta),
                "scale": positive("scale", scale),
            },
        )


def _lorenz96_drift(num_slow: int, t: Any, x: Any, p: Any) -> Array:
    slow, fast = x[:num_slow], x[num_slow:]
    b, c = p["amplitude_ratio"], p["time_ratio"]
    pull = p["coupling"] * c / b
    load = jnp.sum(fast.reshape(num_slow, -1), axis=1)
    slow_drift = jnp.roll(slow, 1) * (jnp.roll(slow, -1) - jnp.roll(slow, 2)) - slow
    slow_drift = slow_drift + p["forcing"] - pull * load
    fast_drift = c * b * jnp.roll(fast, -1) * (jnp.roll(fast, 1) - jnp.roll(fast, -2)) - c * fast
    fast_drift = fast_drift + pull * jnp.repeat(slow, fast.shape[0] // num_slow)
    return jnp.concatenate([slow_drift, fast_drift])


def _lorenz96_diffusion(num_slow: int, t: Any, x: Any, p: Any) -> Array:
    num_fast = x.shape[0] - num_slow
    return jnp.concatenate(
        [jnp.full(num_slow, p["slow_scale"]), jnp.full(num_fast, p["fast_scale"])]
    )


class Lorenz96TwoScale(SDE):
    """Weather on a latitude circle: slow variables, each coupled to a group of fast ones.

    `dX_k = (X_{k-1} (X_{k+1} - X_{k-2}) - X_k + forcing - (h c / b) sum_j Y_{j,k}) dt`,
    `dY_j = (c b Y_{j+1} (Y_{j-1} - Y_{j+2}) - c Y_j + (h c / b) X_k(j)) dt`, with `h` the
    coupling, `c` the time ratio and `b` the amplitude ratio, plus additive noise. The state is
    `(X_1, ..., X_K, Y_{1,1}, ..., Y_{J,1}, Y_{1,2}, ...)`, shape `(K (1 + J),)`; the fast
    variables form one ring. A test of parametrising unresolved scales (Wilks 2005).

    Args:
        num_slow: number K of slow variables, at least 3; static.
        fast_per_slow: number J of fast variables for each slow one; static. At least 3 fast
            variables in all.
        forcing: forcing of the slow variables.
        coupling: h.
        time_ratio: c, how much faster the fast variables are.
        amplitude_ratio: b, how much smaller they are.
        slow_scale: volatility of slow variables, per square root of time; 0 or more.
        fast_scale: volatility of fast variables, per square root of time; 0 or more.

    Raises:
        ValueError: counts that are too small, or a number that is not finite, not positive
            (`time_ratio`, `amplitude_ratio`) or negative (scales).
        TypeError: an argument of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> weather = nsde.processes.Lorenz96TwoScale(num_slow=4, fast_per_slow=2, coupling=0.0)
        >>> weather.drift_at(0.0, jnp.ones(12)).tolist()[:5]
        [9.0, 9.0, 9.0, 9.0, -10.0]
    """

    forcing = parameter("forcing", "Forcing of the slow variables.")
    coupling = parameter("coupling", "Coupling h of the scales.")
    time_ratio = parameter("time_ratio", "How much faster the fast variables are, c.")
    amplitude_ratio = parameter("amplitude_ratio", "How much smaller the fast variables are, b.")
    slow_scale = parameter("slow_scale", "Volatility of slow variables.")
    fast_scale = parameter("fast_scale", "Volatility of fast variables.")

    def __init__(
        self,
        num_slow: int = 8,
        fast_per_slow: int = 32,
        *,
        forcing: ArrayLike = 10.0,
        coupling: ArrayLike = 1.0,
        time_ratio: ArrayLike = 10.0,
        amplitude_ratio: ArrayLike = 10.0,
        slow_scale: ArrayLike = 0.1,
        fast_scale: ArrayLike = 0.1,
    ) -> None:
        num_slow = count("num_slow", num_slow, 3)
        fast_per_slow = count("fast_per_slow", fast_per_slow, 1)
        super().__init__(
            Partial(_lorenz96_drift, num_slow),
            Partial(_lorenz96_diffusion, num_slow),
            params={
                "forcing": real("forcing", forcing),
                "coupling": real("coupling", coupling),
                "time_ratio": positive("time_ratio", time_ratio),
                "amplitude_ratio": positive("amplitude_ratio", amplitude_ratio),
                "slow_scale": nonnegative("slow_scale", slow_scale),
                "fast_scale": nonnegative("fast_scale", fast_scale),
            },
        )
