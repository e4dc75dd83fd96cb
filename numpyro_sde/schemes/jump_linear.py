"""The exact step of a scalar linear equation with jumps that decay, or grow, after they come.

    dX = (a X + b) dt + sigma dW + dJ,   J compound Poisson of rate r, sizes N(m, v):

the next state is a normal variable and a sum of sizes, each times `exp(a u)`, u the time that is
left when it comes. Its law given at least one jump has the log moment generating function

    log(e^K(s) - 1) - r dt + ...,   K(s) = r int_0^dt exp(s m e^(a u) + s^2 v e^(2 a u) / 2) du,

which is inverted along a contour (`schemes.contour`); no jump at all is a term of its own.
"""

# ruff: noqa: ARG002
# Methods of one protocol share its arguments, used or not.

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from numpyro_sde.linear.affine import degrees
from numpyro_sde.schemes.base import AbstractScheme, gaussian_log_density
from numpyro_sde.schemes.contour import CUT, enough, log_integral, saddle
from numpyro_sde.schemes.inversion import poisson
from numpyro_sde.schemes.jump_euler import check_jumps, held
from numpyro_sde.schemes.keyed import key_of
from numpyro_sde.schemes.local_linear import LocalLinear

if TYPE_CHECKING:
    from numpyro_sde.sde import SDE

# Nodes of Gauss and Legendre over the times of a jump, on [0, 1].
_PLACES, _SHARES = np.polynomial.legendre.leggauss(32)
_PLACES, _SHARES = 0.5 * (_PLACES + 1.0), 0.5 * _SHARES
# Shifts of the contour, in standard deviations, by which the rule's error is bounded.
_SHIFTS = np.array([0.5, 1.0, 2.0, 4.0, 8.0, 16.0])


class _Law(NamedTuple):
    """What a step adds to the mean without jumps, as an integrand over the times of a jump.

    Attributes:
        variance: of the normal part.
        weights: expected number of jumps for each source and node, `(K,)`.
        mean: mean of what one of them adds to the end of the step, `(K,)`.
        cov: its variance, `(K,)`.
    """

    variance: Float[Array, ""]
    weights: Float[Array, " K"]
    mean: Float[Array, " K"]
    cov: Float[Array, " K"]

    def jumps(self, s: Array) -> Array:
        """The function K at one point."""
        return jnp.sum(self.weights * jnp.exp(s * self.mean + 0.5 * s**2 * self.cov))

    def log_at(self, s: Array, y: Array) -> Array:
        """Log moment generating function given a jump, less `s y`, on the real axis."""
        K = self.jumps(s)
        return 0.5 * s**2 * self.variance - s * y + K + jnp.log(-jnp.expm1(-K))


class JumpLinear(AbstractScheme):
    """Exact step of a scalar linear SDE with jumps of constant rate and normal sizes.

    `JumpEuler` lets a jump come at the end of a step and the mean reversion start after it, an
    error of first order in the step; here jumps come at any time and decay from then on, so that
    steps may be as long as the data's. Mean-reverting rates, spreads and temperatures with spikes.
    The path may be seen or latent as it is; particles take it with proposal="bootstrap". Not for
    rates or sizes that depend on the state (self-exciting jumps): `JumpEuler` on a fine grid.

    Args:
        num_nodes: nodes of the contour, each with 32 times of a jump. A density that needs more
            (jumps a hundred times as long as the noise about them is wide) is NaN.

    Raises:
        ValueError: fewer than 16 nodes. In use: an SDE without jumps or of several components; a
            drift that is not affine in the state; a diffusion, rate or size that depends on it; any
            of them on time.
        TypeError: a number of nodes that is no integer; in use, sizes that are not normal.

    Example:
        >>> import numpyro.distributions as dist, numpyro_sde as nsde
        >>> spikes = nsde.SDE(lambda t, x: -1.2 * x, lambda t, x: 0.2,
        ...                   jumps=nsde.CompoundPoisson(3.0, dist.Normal(-0.1, 0.15)))
        >>> scheme = nsde.schemes.JumpLinear()
        >>> round(float(scheme.log_density(spikes, 0.0, 0.7, 0.5, 0.1)), 3)
        0.685
    """

    smooth: ClassVar[bool] = False
    has_jumps: ClassVar[bool] = True
    taken_by: ClassVar[str] = "infer.PMMH or filters.Particle(proposal='bootstrap')"

    num_nodes: int = eqx.field(static=True)

    def __init__(self, num_nodes: int = 256) -> None:
        if isinstance(num_nodes, bool) or not isinstance(num_nodes, int):
            raise TypeError(f"num_nodes must be an integer, got {num_nodes!r}")
        if num_nodes < 16:
            raise ValueError(f"num_nodes must be at least 16, got {num_nodes}")
        self.num_nodes = num_nodes

    def check(self, sde: SDE, state_shape: tuple[int, ...]) -> None:
        check_jumps(self, sde)
        if state_shape != ():
            raise ValueError(
                f"JumpLinear() is for a scalar process, got a state of shape {state_shape}: use "
                "JumpEuler(LocalLinear()) on a fine grid"
            )
        LocalLinear().check(sde, state_shape)

    def innovation_shape(self, sde: SDE, state_shape: tuple[int, ...]) -> tuple[int, ...]:
        return (3,)

    def step(self, sde: SDE, t: Array, dt: Array, x: Array, z: Array, cache: Any = None) -> Array:
        x = jnp.asarray(x, jnp.result_type(x, float))
        _require_linear(sde, x)
        mean, sd = LocalLinear().moments(sde, t, dt, x)
        moved, growth, key = mean + sd * z[0], _growth(sde, t, x), key_of(z[1:])
        for number, source in enumerate(sde.jumps):
            count_key, time_key, size_key = jax.random.split(jax.random.fold_in(key, number), 3)
            expected, most = source.rate_at(t, x, sde.arguments) * dt, source.max_per_step
            count = poisson(jax.random.uniform(count_key, (), x.dtype), expected)
            happens = (jnp.arange(most) < count).astype(x.dtype)
            left = dt * jax.random.uniform(time_key, (most,), x.dtype)
            draw = jax.vmap(lambda k, s=source: s.draw_size(k, t, x, sde.arguments))
            sizes = draw(jax.random.split(size_key, most)).astype(x.dtype)
            moved = moved + jnp.sum(happens * sizes * jnp.exp(growth * left))
            moved = jnp.where(held(expected, most), moved, jnp.nan)
        return moved

    def log_density(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Float[Array, ""]:
        x = jnp.asarray(x, jnp.result_type(x, float))
        _require_linear(sde, x)
        mean, sd = LocalLinear().moments(sde, t, dt, x)
        law = _law(sde, t, dt, x, sd)
        expected = jnp.sum(law.weights)
        calm = gaussian_log_density(x_next, mean, sd)
        jumps = expected > 0.0
        # Where there is no rate at all the second term is none, and its derivative neither.
        safe = law._replace(weights=jnp.where(jumps, law.weights, 1.0))
        more = jnp.where(jumps, _log_given_jumps(safe, x_next - mean, self.num_nodes), -jnp.inf)
        return jnp.logaddexp(calm, more) - expected

    def invert(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Array:
        raise TypeError("the innovations of JumpLinear() cannot be read off the ends of a step")


def _require_linear(sde: SDE, x: Array) -> None:
    """Refuse what makes the law of a step another one."""

    def coefficients(t: Any, x: Array) -> Any:
        sources = [
            (s.rate_at(t, x, sde.arguments), *s.normal_size(t, x, sde.arguments)) for s in sde.jumps
        ]
        return sde.ito_drift_at(t, x), (sde.noise_factor_at(t, x), sources)

    drift, *rest = degrees(lambda x: coefficients(jnp.zeros(()), x), x)
    in_time = degrees(lambda t: coefficients(t, jnp.ones_like(x)), jnp.zeros(()))
    if drift > 1 or max(rest) > 0 or max(in_time) > 0:
        what = "drift is not affine in x" if drift > 1 else "diffusion, rate or size depends on x"
        if max(in_time) > 0:
            what = "drift, diffusion, rate or size depends on t"
        raise ValueError(
            f"JumpLinear() is exact for linear equations with constant jumps only: {what}. Use "
            "JumpEuler(LocalLinear()) on a fine grid"
        )


def _growth(sde: SDE, t: Any, x: Array) -> Array:
    """The coefficient a of the drift `a x + b`."""
    return jax.jvp(lambda x: sde.ito_drift_at(t, x), (x,), (jnp.ones_like(x),))[1]


def _law(sde: SDE, t: Any, dt: Any, x: Array, sd: Array) -> _Law:
    left = dt * jnp.asarray(_PLACES, x.dtype)
    factor = jnp.exp(_growth(sde, t, x) * left)
    weights, means, covs = [], [], []
    for source in sde.jumps:
        mean, cov = source.normal_size(t, x, sde.arguments)
        rate = source.rate_at(t, x, sde.arguments)
        weights.append(rate * dt * jnp.asarray(_SHARES, x.dtype))
        means.append(mean * factor)
        covs.append(cov[0, 0] * factor**2)
    return _Law(sd**2, *(jnp.concatenate(parts) for parts in (weights, means, covs)))


def _log_given_jumps(law: _Law, y: Array, num_nodes: int) -> Array:
    """Log density of at least one jump and of the sum y, times `exp` of the expected number."""
    fixed, at = lax.stop_gradient(law), lax.stop_gradient(y)
    slope = jax.grad(fixed.log_at)
    # The second derivative is at least the variance that every jump leaves: a bracket.
    least = fixed.variance + jnp.min(fixed.cov)
    first = slope(jnp.zeros_like(least), at)
    side = jnp.where(first < 0.0, 1.0, -1.0)
    # Where an end of the bracket overflows the slope is NaN, which counts as above zero.
    real = side * saddle(
        lambda s: side * slope(side * s, at), jnp.zeros_like(least), jnp.abs(first) / least
    )
    sd = jnp.sqrt(jax.grad(slope)(real, at))
    step = CUT / jnp.sqrt(least) / num_nodes
    # Moved aside by b, the integral of each alias is `exp(log_at - 2 pi b / step)` at most.
    shifts = jnp.asarray(np.concatenate([-_SHIFTS, _SHIFTS]), y.dtype) / sd
    excess = jax.vmap(fixed.log_at, (0, None))(real + shifts, at) - fixed.log_at(real, at)
    gained = 2.0 * jnp.pi * jnp.abs(shifts) / step - excess
    sides = jnp.max(jnp.where(jnp.isnan(gained), -jnp.inf, gained).reshape(2, -1), axis=1)
    nodes = real + 1j * step * jnp.arange(1.0, num_nodes + 1.0)
    at_real, K0 = law.log_at(real, y), law.jumps(real)

    def ratio(s: Array) -> Array:
        K = law.jumps(s)
        smooth = 0.5 * (s**2 - real**2) * law.variance - (s - real) * y
        # (e^K - 1) / (e^K0 - 1), without what would overflow.
        return jnp.exp(smooth - K0) * jnp.expm1(K) / -jnp.expm1(-K0)

    value = log_integral(at_real, jax.vmap(ratio)(nodes), step)
    return jnp.where(jnp.min(sides) > enough(y.dtype), value, jnp.nan)
