"""Diffusion in a potential with a fine periodic structure, and its homogenised limit.

`dX = -V'(X) dt - (1/eps) p'(X/eps) dt + sqrt(2 temperature) dW`: a smooth potential V, and a
fluctuation p of period L that is `eps` times finer. At scales above `eps` the particle moves in
V alone, but slowed down by `K = L^2 / (int exp(-p/T) int exp(p/T)) <= 1`, drift and
diffusivity alike. Source: Pavliotis and Stuart (2007), J. Stat. Phys. 127, 741-781.
"""

# ruff: noqa: ARG001
# Functions of one protocol share its arguments, used or not.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import Partial
from jaxtyping import Array, ArrayLike, Float

from numpyro_sde.multiscale.frozen import fast_step, independent
from numpyro_sde.multiscale.green_kubo import GreenKubo, twice_integrated_correlation
from numpyro_sde.multiscale.slow_fast import call_of_state
from numpyro_sde.processes.arguments import parameter, positive
from numpyro_sde.sde import SDE, as_function

_USER = "params"
_FACTOR = "slowing"
_NODES = 256


def _two_scale_drift(potential: Any, fluctuation: Any, t: Any, x: Any, p: Any) -> Array:
    user, eps = p.get(_USER), p["epsilon"]
    x = jnp.asarray(x, jnp.result_type(float, x))
    smooth = jax.grad(lambda x: call_of_state(potential, x, user))(x)
    fine = jax.grad(lambda y: call_of_state(fluctuation, y, user))(x / eps)
    return -smooth - fine / eps


def _thermal_diffusion(t: Any, x: Any, p: Any) -> Array:
    return jnp.sqrt(2.0 * p["temperature"])


class TwoScaleLangevin(SDE):
    """A scalar diffusion in a rough potential, at a finite scale `epsilon` of the roughness.

    Its paths look like those of the limit (`homogenize`) except at steps below `epsilon^2`:
    fitted there, a model of the smooth potential gets the drift and the diffusivity of the
    rough one, too large by `1/K`, with tiny reported errors. See
    `diagnostics.sampling_scale_scan`. An Euler step must resolve `epsilon^2`.

    Args:
        potential: the smooth potential, `V(x)`, or `V(x, p)` with `params`; a scalar.
        fluctuation: the periodic one, `p(y)` or `p(y, p)`; a scalar, of period `period`.
        epsilon: scale of the fluctuation; positive.
        temperature: energy units; positive.
        period: period of the fluctuation in its own argument; positive.
        params: parameters of the potentials.

    Raises:
        TypeError: potentials that are no functions of the right arguments.
        ValueError: a number that is not positive, or a potential that is not scalar.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> rough = nsde.multiscale.TwoScaleLangevin(
        ...     lambda x: x**2 / 2, jnp.cos, epsilon=0.1, temperature=0.5
        ... )
        >>> round(float(rough.slowing), 5)  # 1 / I_0(2)^2
        0.19244
    """

    epsilon = parameter("epsilon", "Scale of the fluctuation.")
    temperature = parameter("temperature", "Temperature, energy units.")

    def __init__(
        self,
        potential: Callable[..., Any],
        fluctuation: Callable[..., Any],
        epsilon: ArrayLike,
        temperature: ArrayLike = 1.0,
        *,
        period: float = 2.0 * np.pi,
        params: Any = None,
    ) -> None:
        optional = {"p": ("params", params is not None)}
        as_function(potential, "potential", "x", optional)
        as_function(fluctuation, "fluctuation", "y", optional)
        own: dict[str, Any] = {
            "epsilon": positive("epsilon", epsilon),
            "temperature": positive("temperature", temperature),
            "period": positive("period", period),
        }
        super().__init__(
            Partial(_two_scale_drift, potential, fluctuation),
            _thermal_diffusion,
            params=own if params is None else {**own, _USER: params},
        )

    @property
    def slowing(self) -> Float[Array, ""]:
        """The factor K of drift and diffusivity in the limit; for unbatched parameters."""
        drift: Any = self.drift.function
        return slowing(drift.args[1], self.params)

    def limit(self, factor: ArrayLike | None = None) -> SDE:
        """The homogenised equation `dX = -K V'(X) dt + sqrt(2 K temperature) dW`.

        Args:
            factor: K; None computes it by quadrature, for every member of a batch.
        """
        drift: Any = self.drift.function
        own = {} if factor is None else {_FACTOR: factor}
        return SDE(
            Partial(_slowed_drift, *drift.args),
            Partial(_slowed_diffusion, drift.args[1]),
            params={**self.params, **own},
        )

    def sampled_slowing(self, method: GreenKubo) -> Float[Array, ""]:
        """K by simulation of the fluctuation: `1 - int_0^inf E p'(Y_0) p'(Y_s) ds / T`.

        The Green-Kubo formula of a force that is felt together with the noise behind it
        (Pavliotis 2014, chapter 9). For unbatched parameters.
        """
        drift: Any = self.drift.function
        fluctuation, p = drift.args[1], self.params
        scale = jnp.sqrt(2.0 * p["temperature"])

        def force(y: Array) -> Array:
            return -jax.grad(lambda y: call_of_state(fluctuation, y, p.get(_USER)))(y)

        def advance(y: Array, z: Array) -> tuple[Array, Array]:
            y = jax.vmap(lambda y, z: fast_step(force, lambda _: scale, method.step, y, z))(y, z)
            return y, jax.vmap(force)(y)

        first, lags = method.num_steps
        z = jnp.asarray(independent(method.seed, first + 2 * lags + 1, method.num_chains, ()))
        start = jnp.full(method.num_chains, method.start, z.dtype)
        _, forces = jax.jit(lambda y, z: lax.scan(advance, y, z))(start, z)
        power = twice_integrated_correlation(forces[first:].T, lags, method.step)
        return 1.0 - 0.5 * power / p["temperature"]


def slowing(fluctuation: Any, p: Any) -> Array:
    """`L^2 / (int exp(-p/T) int exp(p/T))` by the trapezoidal rule, spectrally accurate."""
    unit = jnp.asarray(np.arange(_NODES) / _NODES, jnp.result_type(float))
    y = p["period"] * unit
    energy = jax.vmap(lambda one: call_of_state(fluctuation, one, p.get(_USER)))(y)
    ratio = energy / p["temperature"]
    log_mean = jax.nn.logsumexp(ratio) + jax.nn.logsumexp(-ratio) - 2.0 * np.log(_NODES)
    return jnp.exp(-log_mean)


def _slowed_drift(potential: Any, fluctuation: Any, t: Any, x: Any, p: Any) -> Array:
    x = jnp.asarray(x, jnp.result_type(float, x))
    force = -jax.grad(lambda x: call_of_state(potential, x, p.get(_USER)))(x)
    return _factor(fluctuation, p) * force


def _slowed_diffusion(fluctuation: Any, t: Any, x: Any, p: Any) -> Array:
    return jnp.sqrt(2.0 * _factor(fluctuation, p) * p["temperature"])


def _factor(fluctuation: Any, p: Any) -> Array:
    return p[_FACTOR] if _FACTOR in p else slowing(fluctuation, p)
