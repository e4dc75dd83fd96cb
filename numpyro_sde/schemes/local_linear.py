"""Local linearisation: the exact Gaussian law of the SDE linearised at the present state.

Ozaki (1992), Statistica Sinica 2, 113-135; Shoji and Ozaki (1998), Biometrika 85, 240-243.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from numpyro_sde.linear.discretize import transition_sqrt
from numpyro_sde.schemes.base import GaussianScheme
from numpyro_sde.schemes.generator import as_point, half_second_derivative

if TYPE_CHECKING:
    from numpyro_sde.sde import SDE

# A step of a thousand time constants: beyond it a linearised step means nothing.
LINEARIZABLE_DOUBLINGS = 10
_SERIES_BELOW = 0.5
_SERIES_TERMS = 14


class LocalLinear(GaussianScheme):
    r"""Exact Gaussian law of the SDE linearised at the start of the step.

    The drift is replaced by `f + J (X_s - x) + M (s - t)` with the Jacobian `J` at `(t, x)` and
    `M = f_t + 1/2 sum_kl (L L')_kl f_{x_k x_l}`, the mean change of the drift that a curved
    drift adds (Shoji and Ozaki 1998); the diffusion is frozen at `x` and at the
    middle of the step. Then

        mean = x + int_0^dt e^{J s} ds f + int_0^dt (dt - s) e^{J s} ds M,
        covariance = int_0^dt e^{J s} L L' e^{J' s} ds.

    With additive noise the one-step mean and covariance are in error by `O(dt^3)` (weak order 2:
    Carbonell, Jimenez and Biscay 2006, J. Comput. Appl. Math. 197; strong order 3/2: Shoji
    1998, Math. Comp. 67); exact for linear SDEs with additive
    noise, whatever the step, and stable for stiff ones. Where the diffusion changes with the
    state, its freezing leaves the order of Euler's scheme: transform to constant diffusion
    first (log or square root of the state), or use `Kessler`.

    The noise travels through `J`, so a hypoelliptic system (fewer Brownian motions than states,
    as in a noisy oscillator) has a proper density, and its innovations have the dimension of
    the state. If a state is not reached by noise in this linearised way, the density is NaN.

    Args:
        ito_term: whether `M` has its second-derivative part (Shoji and Ozaki). Without it the
            mean is in error by `O(dt^2)` in a nonlinear drift, and no second derivatives are
            taken.
        max_doublings: bound k on the squarings of the matrix exponential, NaN where
            `dt |J| > 2^k`; None bounds nothing, but such a step cannot be differentiated in
            forward mode.

    Example:
        >>> import numpyro_sde as nsde
        >>> sde = nsde.SDE(lambda t, x: -2.0 * x, lambda t, x: 0.5)
        >>> mean, sd = nsde.schemes.LocalLinear().moments(sde, 0.0, 0.5, 1.0)
        >>> round(float(mean), 4), round(float(sd), 4)  # e^-1, sqrt(1 - e^-2) / 4
        (0.3679, 0.2325)
    """

    ito_term: bool = eqx.field(static=True, default=True)
    max_doublings: int | None = eqx.field(static=True, default=None)

    def innovation_shape(self, sde: SDE, state_shape: tuple[int, ...]) -> tuple[int, ...]:  # noqa: ARG002
        return state_shape

    def linearizable(self) -> LocalLinear:
        if self.max_doublings is not None:
            return self
        return LocalLinear(self.ito_term, LINEARIZABLE_DOUBLINGS)

    def moments(
        self, sde: SDE, t: Array, dt: Array, x: Array, cache: Any = None
    ) -> tuple[Array, Array]:
        del cache
        t, x = as_point(t, x)
        drift, change = jax.jvp(
            lambda s: sde.ito_drift_at(s, x).astype(x.dtype), (t,), (jnp.ones_like(t),)
        )
        if self.ito_term:
            change = change + half_second_derivative(sde, sde.ito_drift_at, t, x)
        jacobian = jax.jacfwd(lambda s: sde.ito_drift_at(t, s))(x)
        noise = noise_columns(sde, t + 0.5 * dt, x)
        mean, factor = linear_step(jacobian, drift, change, noise, dt, self.max_doublings)
        return x + mean, factor


def noise_columns(sde: SDE, t: Array, x: Array) -> Array:
    """Diffusion as a scalar (scalar states) or as a matrix `(d, m)`."""
    return sde.noise_factor_at(t, x) if x.ndim == 0 else sde.diffusion_columns_at(t, x)


def linear_step(
    jacobian: Array,
    drift: Array,
    change: Array | None,
    noise: Array,
    dt: Array,
    max_doublings: int | None = None,
) -> tuple[Array, Array]:
    """Law of `Y_dt` for `dY = (jacobian Y + drift + change s) ds + noise dW`, `Y_0 = 0`.

    Args:
        jacobian: shape `()` or `(d, d)`.
        drift: shape of the state.
        change: shape of the state, or None for zero.
        noise: shape `()` or `(d, m)`.
        dt: length of the step.
        max_doublings: as in `LocalLinear`.

    Returns:
        Mean, and standard deviation or lower triangular factor of the covariance.
    """
    if drift.ndim == 0:
        a = jacobian * dt
        mean = drift * dt * phi1(a)
        if change is not None:
            mean = mean + change * dt**2 * phi2(a)
        return mean, noise * jnp.sqrt(dt * phi1(2.0 * a))
    _, mean, factor = transition_sqrt(
        jacobian, drift, noise, dt, ramp=change, max_doublings=max_doublings
    )
    return mean, factor


def phi1(a: Array) -> Array:
    """`(e^a - 1) / a`, by its series near zero."""
    return _phi(a, 1, lambda big: jnp.expm1(big) / big)


def phi2(a: Array) -> Array:
    """`(e^a - 1 - a) / a^2`, by its series near zero."""
    return _phi(a, 2, lambda big: (jnp.expm1(big) - big) / big**2)


def _phi(a: Array, order: int, direct: Any) -> Array:
    near = jnp.abs(a) < _SERIES_BELOW
    small_a = jnp.where(near, a, 0.0)
    series = jnp.zeros_like(small_a)
    for k in reversed(range(_SERIES_TERMS)):
        series = series * small_a + 1.0 / math.factorial(k + order)
    return jnp.where(near, series, direct(jnp.where(near, 1.0, a)))
