"""Effective equations: the limits of slow-fast systems, as SDEs for the slow variable alone.

Coefficients are functions of the time, the slow state and the user's parameters, evaluated where
they are needed or read off a table; the diffusion is the root of an averaged square.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from numpyro_sde.linear.small import diagonal, psd_factor, solve_lower
from numpyro_sde.multiscale.table import Table, look_up
from numpyro_sde.schemes import AbstractScheme, Euler
from numpyro_sde.schemes.base import require_square
from numpyro_sde.sde import SDE

if TYPE_CHECKING:
    from numpyro_sde.multiscale.slow_fast import SlowFastSDE

_USER = "params"
Coefficient = Callable[[Any, Any, Any], Array]
_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


def _mean_of_halves(halves: Coefficient, t: Any, x: Any, p: Any = None) -> Array:
    return jnp.mean(halves(t, x, p), axis=0)


def _root(square: Coefficient, t: Any, x: Any, p: Any = None) -> Array:
    value = square(t, x, p)
    return psd_factor(value) if value.ndim > 1 else jnp.sqrt(value)


def _of_user(fn: Coefficient, t: Any, x: Any, p: Any) -> Array:
    return fn(t, x, p.get(_USER))


def _from_table(table: Table, name: str, t: Any, x: Any, p: Any) -> Array:
    del t
    return look_up(table, p[name], jnp.asarray(x))


class EffectiveSDE(SDE):
    """The limit of a slow-fast system, an ordinary `SDE` for its slow variable.

    Made by `average` and `homogenize`; not by hand.

    Attributes:
        limit: which limit it is, in words.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> full = nsde.SlowFastSDE(
        ...     lambda t, x, y: x * (1.0 - y**2), lambda t, x, y: 0.3,
        ...     lambda t, x, y: x - y, lambda t, x, y: jnp.sqrt(0.6), epsilon=0.1,
        ... )
        >>> limit = nsde.average(full)
        >>> limit.limit, round(float(limit.drift_at(0.0, 0.5)), 4)  # (1 - 0.3) x - x^3
        ('averaged', 0.225)
    """

    limit: str = eqx.field(static=True)

    def __init__(
        self,
        limit: str,
        halves: Coefficient,
        *,
        square: Coefficient | None = None,
        diffusion: Coefficient | None = None,
        params: Any = None,
        event_dims: Any = None,
        interpretation: str = "ito",
    ) -> None:
        self.limit = limit
        root = Partial(_root, square) if square is not None else diffusion
        assert root is not None, "square or diffusion"
        super().__init__(
            Partial(_mean_of_halves, halves),
            root,
            params=params,
            event_dims=event_dims,
            interpretation=interpretation,
        )

    def drift_halves_at(self, t: Any, x: Any) -> Float[Array, "halves *state"]:
        """Independent estimates of the drift at one state, one where nodes are fixed."""
        halves: Any = self.drift.function
        return halves.args[0](t, x, self.params)


class SampledEffectiveSDE(EffectiveSDE):
    """An effective SDE whose drift is a mean of fresh draws, in two independent halves.

    Its transition is `TwoHalvesEuler`.

    Example:
        >>> import jax, numpyro.distributions as dist, numpyro_sde as nsde
        >>> full = nsde.SlowFastSDE(
        ...     lambda t, x, y: y - x, lambda t, x, y: 0.5,
        ...     lambda t, x, y: -y, lambda t, x, y: 1.0, epsilon=0.1,
        ... )
        >>> draws = nsde.multiscale.MonteCarlo(8, jax.random.key(0))
        >>> limit = nsde.average(full, lambda x: dist.Normal(0.0, 0.7), draws)
        >>> limit.drift_halves_at(0.0, 1.0).shape
        (2,)
    """

    def default_transition(self) -> AbstractScheme | None:
        return TwoHalvesEuler()


class TwoHalvesEuler(Euler):
    """Euler's transition with the square of the residual replaced by the product of two.

    With drifts b1 and b2 from independent draws, `(dx - b1 dt)(dx - b2 dt)` has the expectation
    of the residual's square at the exact average, and a plain mean in place of it has
    `dt^2 Var(b) / L` too much. An estimate of the log density, and no density itself; for
    stochastic gradients.

    When not to use it: with fixed nodes, where `Euler` is the same; in NUTS.

    Example:
        >>> import jax, numpyro.distributions as dist, numpyro_sde as nsde
        >>> full = nsde.SlowFastSDE(
        ...     lambda t, x, y: y - x, lambda t, x, y: 0.5,
        ...     lambda t, x, y: -y, lambda t, x, y: 1.0, epsilon=0.1,
        ... )
        >>> draws = nsde.multiscale.MonteCarlo(8, jax.random.key(0))
        >>> limit = nsde.average(full, lambda x: dist.Normal(0.0, 0.7), draws)
        >>> type(nsde.SDEPath(limit, [0.0, 0.1], init=0.0).scheme).__name__
        'TwoHalvesEuler'
    """

    def check(self, sde: SDE, state_shape: tuple[int, ...]) -> None:
        """Refuse an SDE without halves.

        Raises:
            ValueError: an SDE that `average` did not make.
        """
        if not isinstance(sde, EffectiveSDE):
            raise ValueError(
                f"TwoHalvesEuler needs an SDE made by nsde.average, got {type(sde).__name__}"
            )
        sde.structure(state_shape)

    def log_density(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Float[Array, ""]:
        assert isinstance(sde, EffectiveSDE)
        x = jnp.asarray(x)
        root, half_log = (jnp.sqrt(dt), 0.5 * jnp.log(dt)) if cache is None else cache
        halves = sde.drift_halves_at(t, x)
        factor = sde.noise_factor_at(t, x)
        residuals = (x_next - x - halves * dt) / root
        if factor.ndim > x.ndim:
            require_square(factor)
            z = solve_lower(factor, residuals.T).T
            log_det = jnp.sum(jnp.log(jnp.abs(diagonal(factor))))
        else:
            z = residuals / factor
            log_det = jnp.sum(jnp.log(jnp.abs(factor)))
        return -0.5 * jnp.sum(z[0] * z[-1]) - log_det - (half_log + _HALF_LOG_2PI) * x.size

    def log_density_sum(
        self, sde: SDE, times: Any, dt: Any, path: Array, cache: Any
    ) -> Float[Array, ""]:
        return jnp.sum(self.log_densities(sde, times, dt, path, cache))


def direct(
    limit: str,
    slow_fast: SlowFastSDE,
    halves: Coefficient,
    square: Coefficient | None,
    diffusion: Coefficient | None,
    sampled: bool = False,
) -> EffectiveSDE:
    """An effective SDE that evaluates its coefficients at every state."""
    kind: type[EffectiveSDE] = SampledEffectiveSDE if sampled else EffectiveSDE
    return kind(
        limit,
        halves,
        square=square,
        diffusion=diffusion,
        params=slow_fast.user_params,
        event_dims=slow_fast.event_dims,
    )


def from_table(
    limit: str,
    slow_fast: SlowFastSDE,
    table: Table,
    entries: dict[str, Array],
    entry_dims: dict[str, int],
    diffusion: Coefficient | None,
    sampled: bool = False,
) -> EffectiveSDE:
    """An effective SDE that reads its coefficients off tables `entries` (drift, and square)."""
    own = {} if slow_fast.user_params is None else {_USER: slow_fast.user_params}
    declared = {} if slow_fast.event_dims is None else {_USER: slow_fast.event_dims}
    kind: type[EffectiveSDE] = SampledEffectiveSDE if sampled else EffectiveSDE
    return kind(
        limit,
        Partial(_from_table, table, "drift"),
        square=Partial(_from_table, table, "square") if "square" in entries else None,
        diffusion=None if diffusion is None else Partial(_of_user, diffusion),
        params=own | entries,
        event_dims=declared | entry_dims,
    )
