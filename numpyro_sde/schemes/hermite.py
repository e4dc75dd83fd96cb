"""Ait-Sahalia's closed-form expansion of the transition density of a scalar diffusion.

Ait-Sahalia (2002), Econometrica 70, and Ait-Sahalia (2008), Annals of Statistics 36, section 3:
in the coordinate `y = int dx / L(x)`, in which the noise is a Brownian motion with drift `m`,

    ln p(y' | y) = -1/2 ln(2 pi h) - (y' - y)^2 / (2 h) + C_0 + C_1 h + C_2 h^2 / 2 + ...

with `C_0 = int m dy` and, writing `k = -(m_y + m^2) / 2` for the potential and `y_s = y +
s (y' - y)`,

    C_1 = int_0^1 k(y_s) ds,        C_2 = int_0^1 s (1 - s) k_yy(y_s) ds.

(The recursion of the papers gives `C_2 = 2 int u (1/2) d^2 C_1/dy'^2 du`; swapping the order of
the two integrals leaves the single one above.) All integrals run over x here, so that the
coordinate y is never needed in closed form.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from numpy.typing import NDArray

from numpyro_sde.schemes.base import _HALF_LOG_2PI, AbstractScheme
from numpyro_sde.schemes.dependence import dependence
from numpyro_sde.schemes.generator import as_point

if TYPE_CHECKING:
    from numpyro_sde.sde import SDE

# Draws invert the distribution function on this grid, in standard deviations of the noise.
_GRID = np.linspace(-8.0, 8.0, 161)
_GRID_STEPS = 4


class HermiteExpansion(AbstractScheme):
    r"""Closed-form likelihood expansion of a scalar time-homogeneous SDE (Ait-Sahalia 2002).

    The log density is a series in powers of `dt` whose coefficients are integrals of the drift
    and diffusion and their derivatives along the step; they are computed from your functions by
    automatic differentiation and Gauss-Legendre quadrature, so any smooth scalar SDE will do.
    The log density is in error by `O(dt^(order + 1))`, with non-Gaussian shape included:
    far more precise than Euler's for data that are sparse in time. It does not integrate to
    exactly one, and far in the tails of a long step it can be wrong by any amount: for such
    steps refine the grid.

    The path is no map of Gaussian innovations, so it cannot be whitened. `draw` samples the
    expansion itself, by inverting its (normalised) distribution function on a grid of 161
    points across 16 standard deviations; that costs as many density evaluations for each step.

    Args:
        order: the highest power of `dt` kept, 1 or 2.
        num_nodes: quadrature nodes along a step.

    Raises:
        ValueError: an order that is not 1 or 2, or fewer than 2 nodes.

    Example:
        >>> import numpyro_sde as nsde
        >>> sde = nsde.SDE(lambda t, x: 0.5 * (0.06 - x), lambda t, x: 0.15 * x**0.5)
        >>> hermite = nsde.schemes.HermiteExpansion(order=2)
        >>> round(float(hermite.log_density(sde, 0.0, 1 / 12, 0.06, 0.065)), 4)
        3.4733
    """

    approximates_sde: ClassVar[bool] = True

    has_innovations: ClassVar[bool] = False

    order: int = eqx.field(static=True)
    num_nodes: int = eqx.field(static=True)

    def __init__(self, order: int = 2, *, num_nodes: int = 8) -> None:
        if order not in (1, 2):
            raise ValueError(f"order of HermiteExpansion must be 1 or 2, got {order!r}")
        if not isinstance(num_nodes, int) or num_nodes < 2:
            raise ValueError(f"num_nodes must be an integer of at least 2, got {num_nodes!r}")
        self.order, self.num_nodes = int(order), num_nodes

    def check(self, sde: SDE, state_shape: tuple[int, ...]) -> None:
        """Refuse vector states and coefficients that change in time.

        Raises:
            ValueError: saying which.
        """
        if state_shape != ():
            raise ValueError(
                f"HermiteExpansion() is for scalar processes, got a state of shape {state_shape}. "
                "Use LocalLinear(), Kessler() or Euler() on a finer grid"
            )
        sde.structure(state_shape)
        for role in ("drift", "diffusion"):
            if dependence(sde, role, state_shape).time:
                raise ValueError(
                    f"HermiteExpansion() needs coefficients that do not change in time, but {role} "
                    "uses t. Use Kessler() or LocalLinear()"
                )

    def log_density(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Float[Array, ""]:
        del cache
        t, x = as_point(t, x)
        u, weights, cumulate = (jnp.asarray(a, x.dtype) for a in _quadrature(self.num_nodes))
        change = x_next - x
        nodes = x + change * u
        local = jax.vmap(functools.partial(_coefficients, sde, t, self.order))(nodes)
        per_x = 1.0 / local.scale  # dy/dx
        length = weights @ per_x
        # Where each node stands along the step in the coordinate y, from 0 to 1.
        along = (cumulate @ per_x) / length
        share = weights * per_x / length
        series = change * (weights @ (local.drift * per_x)) + dt * (share @ local.potential)
        if self.order == 2:
            series = series + 0.5 * dt**2 * (share @ (along * (1.0 - along) * local.curvature))
        quadratic = 0.5 * (change * length) ** 2 / dt
        end = jnp.log(jnp.abs(sde.noise_factor_at(t, x_next)))
        return series - quadratic - end - 0.5 * jnp.log(dt) - _HALF_LOG_2PI

    def draw(
        self, sde: SDE, key: PRNGKeyArray, t: Array, dt: Array, x: Array, cache: Any = None
    ) -> Array:
        """Draw the next state from the normalised expansion."""
        del cache
        t, x = as_point(t, x)
        grid = _reachable_states(sde, t, dt, x)
        log_p = jax.vmap(lambda s: self.log_density(sde, t, dt, x, s))(grid)
        # Beyond a boundary of the state space the coefficients are not defined: no mass there.
        inside = jnp.isfinite(log_p) & jnp.isfinite(grid)
        log_p = jnp.where(inside, log_p, -jnp.inf)
        density = jnp.exp(log_p - jnp.max(log_p))
        width = jnp.diff(jnp.where(inside, grid, x))
        both = inside[1:] & inside[:-1]
        mass = jnp.where(both, 0.5 * jnp.abs(width) * (density[1:] + density[:-1]), 0.0)
        cumulated = jnp.cumsum(mass)
        target = jax.random.uniform(key, (), x.dtype) * cumulated[-1]
        cell = jnp.clip(jnp.searchsorted(cumulated, target, side="right"), 0, mass.size - 1)
        before = jnp.where(cell > 0, cumulated[cell - 1], 0.0)
        part = _invert_linear_density(
            density[cell], density[cell + 1], (target - before), mass[cell]
        )
        return grid[cell] + part * width[cell]

    def step(self, sde: SDE, t: Array, dt: Array, x: Array, z: Array, cache: Any = None) -> Array:
        del sde, t, dt, x, z, cache
        raise TypeError(_NO_INNOVATIONS)

    def invert(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Array:
        del sde, t, dt, x, x_next, cache
        raise TypeError(_NO_INNOVATIONS)


_NO_INNOVATIONS = (
    "HermiteExpansion is not a map of Gaussian innovations. Use Euler(), Milstein() or "
    "LocalLinear() to whiten a path, draw() to sample a step"
)


class _Local(NamedTuple):
    """The SDE at one state, in the coordinate of unit diffusion (derivatives along y)."""

    scale: Array
    drift: Array
    potential: Array
    curvature: Array


def _coefficients(sde: SDE, t: Array, order: int, x: Array) -> _Local:
    def scale(s: Array) -> Array:
        return sde.noise_factor_at(t, s).astype(s.dtype)

    def along_y(fn: Callable[[Array], Array]) -> Callable[[Array], Array]:
        return lambda s: jax.jvp(fn, (s,), (scale(s),))[1]

    def drift(s: Array) -> Array:
        value, slope = jax.jvp(scale, (s,), (jnp.ones_like(s),))
        return sde.ito_drift_at(t, s).astype(s.dtype) / value - 0.5 * slope

    def potential(s: Array) -> Array:
        value, slope = jax.jvp(drift, (s,), (scale(s),))
        return -0.5 * (slope + value**2)

    curvature = along_y(along_y(potential))(x) if order == 2 else jnp.zeros_like(x)
    return _Local(scale(x), drift(x), potential(x), curvature)


@functools.cache
def _quadrature(n: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Gauss-Legendre nodes and weights on [0, 1], and the matrix of integrals up to each node."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    # Legendre coefficients of the interpolant of values at the nodes, then its integral.
    values = np.polynomial.legendre.legvander(nodes, n - 1)
    fit = (values * weights[:, None]).T * (np.arange(n)[:, None] + 0.5)
    integral = np.polynomial.legendre.legint(np.eye(n), lbnd=-1, axis=0)
    cumulate = np.polynomial.legendre.legvander(nodes, n) @ integral @ fit
    return (nodes + 1.0) / 2.0, weights / 2.0, cumulate / 2.0


def _reachable_states(sde: SDE, t: Array, dt: Array, x: Array) -> Array:
    """States at equal distances in the coordinate of unit diffusion, around Euler's mean.

    Each is reached from x along `dx/dy = L(x)` by a few Runge-Kutta steps; they only place the
    grid, so their precision is not that of the draw.
    """
    scale = jnp.abs(sde.noise_factor_at(t, x))
    centre = sde.ito_drift_at(t, x) * dt / scale
    distance = centre + jnp.sqrt(dt) * jnp.asarray(_GRID, x.dtype)

    def reach(length: Array) -> Array:
        h = length / _GRID_STEPS

        def slope(s: Array) -> Array:
            return jnp.abs(sde.noise_factor_at(t, s))

        state = x
        for _ in range(_GRID_STEPS):
            k1 = slope(state)
            k2 = slope(state + 0.5 * h * k1)
            k3 = slope(state + 0.5 * h * k2)
            k4 = slope(state + h * k3)
            state = state + h * (k1 + 2.0 * k2 + 2.0 * k3 + k4) / 6.0
        return state

    return jax.vmap(reach)(distance)


def _invert_linear_density(left: Array, right: Array, mass: Array, total: Array) -> Array:
    """Share of a cell that holds `mass` of its `total`, for a density linear across it."""
    share = jnp.where(total > 0.0, mass / jnp.where(total > 0.0, total, 1.0), 0.5)
    rise = right - left
    # Root of rise/2 s^2 + left s = share (left + right)/2, in the form without cancellation.
    root = jnp.sqrt(jnp.maximum(left**2 + rise * share * (left + right), 0.0))
    below = left + root
    return jnp.where(
        below > 0.0, share * (left + right) / jnp.where(below > 0.0, below, 1.0), share
    )
