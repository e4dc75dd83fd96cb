"""The linear noise approximation of one step, restarted at its beginning.

From the state `x` with no uncertainty, mean and covariance of the linearised equation follow

    m' = f(t, m),   C' = J C + C J' + L L'(t, m),   J = df/dm,

(van Kampen 1961; Komorowski, Finkenstädt, Harper and Rand 2009, BMC Bioinformatics 10). The
Jacobian of the mean by `x` is the fundamental matrix of `J`, so the extended Kalman filter on this
transition is the linear noise approximation with restart of Fearnhead, Giagos and Sherlock (2014),
Biometrics 70.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from numpyro_sde.linear.small import cholesky, matmul, symmetrize, transpose
from numpyro_sde.schemes.base import GaussianScheme

if TYPE_CHECKING:
    from numpyro_sde.sde import SDE

_JITTER = 8.0


class LinearNoise(GaussianScheme):
    """Gaussian law of the noise around the deterministic path from the start of the step.

    Good where fluctuations are small against the state within a step, whatever the step; for
    reaction networks it is the first correction to the rate equations. Poor near extinction and
    between several attractors. The noise travels through the Jacobian, so with fewer Brownian
    motions than states the transition still has a density.

    Args:
        substeps: Runge-Kutta steps (order 4) for the two equations in each step of the grid.

    Raises:
        ValueError: fewer than one substep.
        TypeError: a number of substeps that is no integer.

    Example:
        >>> import numpyro_sde as nsde
        >>> sde = nsde.SDE(lambda t, x: -2.0 * x, lambda t, x: 0.5)
        >>> mean, sd = nsde.schemes.LinearNoise().moments(sde, 0.0, 0.5, 1.0)
        >>> round(float(mean), 4), round(float(sd), 4)  # e^-1, sqrt(1 - e^-2) / 4
        (0.3679, 0.2325)
    """

    restarts: ClassVar[bool] = True

    substeps: int = eqx.field(static=True)

    def __init__(self, substeps: int = 20) -> None:
        if isinstance(substeps, bool) or not isinstance(substeps, int):
            raise TypeError(f"substeps must be an integer, got {substeps!r}")
        if substeps < 1:
            raise ValueError(f"substeps must be at least 1, got {substeps}")
        self.substeps = substeps

    def innovation_shape(self, sde: SDE, state_shape: tuple[int, ...]) -> tuple[int, ...]:  # noqa: ARG002
        return state_shape

    def moments(
        self, sde: SDE, t: Array, dt: Array, x: Array, cache: Any = None
    ) -> tuple[Array, Array]:
        del cache
        x = jnp.asarray(x)
        x = sde.restart(x.astype(jnp.result_type(x, float)))
        mean, cov = mean_and_covariance(sde, t, dt, x, self.substeps)
        if x.ndim == 0:
            return mean, jnp.sqrt(cov[0, 0])
        # Relative to the variances: a state that no noise reaches yet must not end the factor.
        jitter = _JITTER * jnp.finfo(cov.dtype).eps * jnp.trace(cov)
        return mean, cholesky(cov + jitter * jnp.eye(x.size, dtype=cov.dtype))


class LinearNoiseFrom(LinearNoise):
    """The same without restart: noise about the one deterministic path from a known start.

    The step from x is that of the deterministic path's point p, moved by its Jacobian:
    `m(p) + F(p) (x - p)`, and the covariance is that along the path (van Kampen 1961). What
    `laws.LinearNoise(restart=False)` makes of a path, whose start it needs.

    Args:
        substeps: as of `LinearNoise`.
        start: state `(d,)` from which the deterministic path starts.
        since: when it does.

    Example:
        >>> import numpyro_sde as nsde
        >>> decay = nsde.ReactionNetwork([[1]], [[0]], [0.5])
        >>> law = nsde.laws.LinearNoise(restart=False)
        >>> type(nsde.ReactionPath(decay, [0.0, 1.0], [20.0], law=law).scheme).__name__
        'LinearNoiseFrom'
    """

    start: Array
    since: float = eqx.field(static=True)

    def __init__(self, substeps: int, start: Array, since: float) -> None:
        super().__init__(substeps)
        self.start, self.since = start, since

    def prepare(self, sde: SDE, times: Any, dt: Any) -> Any:
        """The deterministic path at the beginning of each step, `(T - 1, d)`."""
        start = self.start
        if isinstance(times, np.ndarray):
            before = np.linspace(self.since, times[0], self._steps_before(times, dt) + 1)
            start = self._along(sde, start, before[:-1], np.diff(before))[1]
        else:  # only a clock that is known tells how far it is from the start
            start = jnp.where(times[0] == self.since, start, jnp.nan)
        return self._along(sde, start, times[:-1], dt)[0]

    def _steps_before(self, times: np.ndarray, dt: Any) -> int:
        late = float(times[0]) - self.since
        if late < 0.0:
            raise ValueError(
                f"the linear noise about a path from {self.since} says nothing of the earlier "
                f"time {times[0]}"
            )
        return int(np.ceil(late / np.max(dt))) if late else 0

    def _along(self, sde: SDE, start: Array, times: Any, dt: Any) -> tuple[Array, Array]:
        """The deterministic path at the beginning of each step, and at the end."""

        def step(x: Array, now: Any) -> tuple[Array, Array]:
            t, h = now
            return mean_and_covariance(sde, t, h, sde.restart(x), self.substeps)[0], x

        end, points = lax.scan(step, start, (jnp.asarray(times), jnp.asarray(dt)))
        return points, end

    def moments(
        self, sde: SDE, t: Array, dt: Array, x: Array, cache: Any = None
    ) -> tuple[Array, Array]:
        x = jnp.asarray(x)
        x = sde.restart(x.astype(jnp.result_type(x, float)))
        point = sde.restart(jnp.asarray(cache, x.dtype))

        def along(p: Array) -> Array:
            return mean_and_covariance(sde, t, dt, p, self.substeps)[0]

        mean, moved = jax.jvp(along, (point,), (x - point,))
        _, factor = super().moments(sde, t, dt, point)
        return mean + moved, factor


def mean_and_covariance(sde: SDE, t: Any, dt: Any, x: Array, substeps: int) -> tuple[Array, Array]:
    """Solve the two equations over one step, from no uncertainty.

    Returns:
        Mean, shape of the state, and covariance `(d, d)`.
    """
    d = x.size
    h = jnp.asarray(dt, x.dtype) / substeps

    def slope(s: Array, m: Array, C: Array) -> tuple[Array, Array]:
        f = sde.ito_drift_at(s, m)
        J = jax.jacfwd(lambda m: sde.ito_drift_at(s, m))(m).reshape(d, d)
        L = sde.diffusion_columns_at(s, m).reshape(d, -1)
        JC = matmul(J, C)
        return f, JC + transpose(JC) + matmul(L, transpose(L))

    def step(carry: tuple[Array, Array], k: Array) -> tuple[tuple[Array, Array], None]:
        m, C = carry
        s = t + k * h
        m1, C1 = slope(s, m, C)
        m2, C2 = slope(s + h / 2, m + h / 2 * m1, C + h / 2 * C1)
        m3, C3 = slope(s + h / 2, m + h / 2 * m2, C + h / 2 * C2)
        m4, C4 = slope(s + h, m + h * m3, C + h * C3)
        m = m + h / 6 * (m1 + 2 * m2 + 2 * m3 + m4)
        return (m, C + h / 6 * (C1 + 2 * C2 + 2 * C3 + C4)), None

    start = (x, jnp.zeros((d, d), x.dtype))
    (mean, cov), _ = lax.scan(step, start, jnp.arange(substeps, dtype=x.dtype))
    return mean, symmetrize(cov)
