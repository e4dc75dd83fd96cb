"""The FitzHugh-Nagumo neuron with noise.

Sources: FitzHugh (1961), Impulses and physiological states in theoretical models of nerve
membrane; Ditlevsen and Samson (2019), Hypoelliptic diffusions: filtering and inference from
complete and partial observations, for the scaling and the noise in the recovery alone.
"""

# ruff: noqa: ARG001
# Functions of one protocol share its arguments, used or not.

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from numpyro_sde.processes.arguments import parameter, positive, real
from numpyro_sde.sde import SDE


def _drift(t: Any, x: Any, p: Any) -> Array:
    voltage, recovery = x[0], x[1]
    excitation = (voltage - voltage**3 - recovery + p["current"]) / p["epsilon"]
    return jnp.stack([excitation, p["gamma"] * voltage - recovery + p["beta"]])


def _recovery_diffusion(t: Any, x: Any, p: Any) -> Array:
    scale = p["scale"]
    return jnp.stack([jnp.zeros_like(scale), scale])[:, None]


def _full_diffusion(t: Any, x: Any, p: Any) -> Array:
    return jnp.stack([p["voltage_scale"], p["scale"]])


class FitzHughNagumo(SDE):
    """An excitable neuron: fast voltage V, slow recovery U, state `(V, U)`.

    `dV = (V - V^3 - U + current) / epsilon dt [+ voltage_scale dW1]`,
    `dU = (gamma V - U + beta) dt + scale dW2`. Noise in the recovery alone (ion channels) is
    the default and makes the model hypoelliptic: a Euler step has no density then, so use
    `schemes.LocalLinear` or `Strang`. With `voltage_scale` both coordinates carry independent
    noise. The stationary law exists but has no closed form.

    Args:
        epsilon: ratio of the time scales of voltage and recovery; positive, below 1.
        current: input current, in units of the voltage.
        gamma: coupling of the recovery to the voltage.
        beta: offset of the recovery; with the current it sets the excitability.
        scale: noise in the recovery, per square root of time; positive.
        voltage_scale: noise in the voltage, per square root of time; positive. None for none.

    Raises:
        ValueError: a number that is not finite, or an `epsilon` or scale that is not positive.
        TypeError: an argument that is no number or array.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> neuron = nsde.processes.FitzHughNagumo(epsilon=0.5)
        >>> neuron.structure((2,)).diffusion_shape
        (2, 1)
        >>> nsde.processes.FitzHughNagumo(voltage_scale=0.1).structure((2,)).kind
        'diagonal'
    """

    epsilon = parameter("epsilon", "Ratio of the time scales of voltage and recovery.")
    current = parameter("current", "Input current, in units of the voltage.")
    gamma = parameter("gamma", "Coupling of the recovery to the voltage.")
    beta = parameter("beta", "Offset of the recovery.")
    scale = parameter("scale", "Noise in the recovery, per square root of time.")

    def __init__(
        self,
        epsilon: ArrayLike = 0.1,
        current: ArrayLike = 0.0,
        gamma: ArrayLike = 1.5,
        beta: ArrayLike = 0.8,
        scale: ArrayLike = 0.3,
        *,
        voltage_scale: ArrayLike | None = None,
    ) -> None:
        params = {
            "epsilon": positive("epsilon", epsilon),
            "current": real("current", current),
            "gamma": real("gamma", gamma),
            "beta": real("beta", beta),
            "scale": positive("scale", scale),
        }
        if voltage_scale is None:
            super().__init__(_drift, _recovery_diffusion, params=params)
            return
        params["voltage_scale"] = positive("voltage_scale", voltage_scale)
        super().__init__(_drift, _full_diffusion, params=params)

    @property
    def voltage_scale(self) -> Any:
        """Noise in the voltage, per square root of time; None for none."""
        return self.params.get("voltage_scale")
