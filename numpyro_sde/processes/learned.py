"""Processes with a learned drift that are stable whatever has been learned.

The classes of Oh, Lim and Kim (2024), "Stable Neural Stochastic Differential Equations in analyzing
irregular time series data": Langevin-type, linear noise and geometric equations. There the drift is
assumed to be dissipative; here it is so by its form. With a learned part g that is bounded,
`|g| <= B`, each equation has a mean square that stays bounded for ever, for all weights, by
Ito's formula for `|Z|^2` (Khasminskii 2012, Stochastic Stability of Differential Equations, theorem
3.7, with `V = |z|^2`), and existence and uniqueness as g is smooth.

The paper hands the drift an interpolation of the data. Such a law knows data to come: it is a
posterior, not a prior, and belongs into a guide.
"""

# ruff: noqa: ARG001
# Functions of one protocol share its arguments, used or not.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from numpyro_sde.fields.field import AbstractField
from numpyro_sde.processes.arguments import parameter, positive
from numpyro_sde.schemes.base import AbstractScheme
from numpyro_sde.schemes.log_euler import LogEuler
from numpyro_sde.sde import SDE


class _Learned(SDE):
    """An equation whose drift has a learned, bounded part."""

    net = parameter("net", "The learned part.")

    def __init__(
        self,
        drift: Callable[..., Array],
        diffusion: Callable[..., Array],
        params: dict[str, Any],
        event_dims: dict[str, int],
    ) -> None:
        super().__init__(drift, diffusion, params=params, event_dims=event_dims)
        one = self.unbatched_shapes()
        if jax.eval_shape(lambda one: one.net.bound(), one) is None:
            raise ValueError(
                f"{type(self).__name__} is stable with a bounded net, and of this "
                f"{type(self.net).__name__} no bound is known: end the network in a bounded "
                "activation, eqx.nn.MLP(..., final_activation=jax.nn.tanh), or hand over "
                "fields.Bounded(net, limit)"
            )

    def _sizes(self) -> tuple[Array, int]:
        """Bound of the learned part's Euclidean norm, and the number of components."""
        bound = self.net.bound()
        return jnp.sqrt(jnp.sum(bound**2)), max(int(bound.size), 1)


def _parameters(
    name: str, net: Any, event_dim: int, **numbers: Any
) -> tuple[dict[str, Any], dict[str, int]]:
    """Checked parameters of a process, and their event dimensions."""
    if not isinstance(net, AbstractField):
        raise TypeError(
            f"{name}: net must be a field, such as nsde.fields.Network(module).register('f'), got "
            f"{type(net).__name__}"
        )
    if event_dim not in (0, 1):
        raise ValueError(
            f"{name}: event_dim must be 0 (one number for all components) or 1 (one for each), "
            f"got {event_dim!r}"
        )
    checked = {key: positive(key, value) for key, value in numbers.items()}
    return {"net": net, **checked}, dict.fromkeys(checked, event_dim)


def _langevin_drift(t: Any, x: Any, p: Any) -> Array:
    return p["net"](x) - p["rate"] * x


def _constant_diffusion(t: Any, x: Any, p: Any) -> Array:
    return p["scale"]


class NeuralLangevin(_Learned):
    """A learned drift with a pull to the origin and additive noise.

    `dZ = (net(Z) - rate Z) dt + scale dW`. With `|net| <= B` it has one stationary law, which it
    approaches from everywhere, and `E|Z|^2` comes below `mean_square_bound()` whatever the net has
    learned. Scale the data to order one, so that a pull to 0 is harmless, or shift them.

    Args:
        net: a field (`nsde.fields`) of the state with a bound: a network that ends in `tanh`, an
            `HSGP`, `RFF` or `InducingGP`, or any in `fields.Bounded`. Its values have the shape of
            the state; units of the state per time.
        rate: pull to the origin, 1/time; positive.
        scale: volatility, state units per square root of time; positive.
        event_dim: 1 where rate and scale are one for each component.

    Raises:
        TypeError: a net that is no field, a number that is none.
        ValueError: a net without a bound, a number that is not positive.

    When not to use it: if the force is known to have a potential, `OverdampedLangevin`.

    Example:
        >>> import equinox as eqx, jax, numpyro, numpyro_sde as nsde
        >>> net = eqx.nn.MLP(
        ...     "scalar", "scalar", 8, 1, jax.nn.tanh, jax.nn.tanh, key=jax.random.key(0))
        >>> with numpyro.handlers.seed(rng_seed=0):
        ...     sde = nsde.processes.NeuralLangevin(
        ...         nsde.fields.Network(net).register("f"), rate=1.0, scale=0.5)
        >>> round(float(sde.mean_square_bound()), 3)
        1.237
    """

    rate = parameter("rate", "Pull to the origin, 1/time.")
    scale = parameter("scale", "Volatility, state units per square root of time.")

    def __init__(
        self, net: AbstractField, rate: ArrayLike, scale: ArrayLike, *, event_dim: int = 0
    ) -> None:
        params, dims = _parameters("NeuralLangevin", net, event_dim, rate=rate, scale=scale)
        super().__init__(_langevin_drift, _constant_diffusion, params, dims)

    def mean_square_bound(self) -> Float[Array, ""]:
        """What `E|Z_t|^2` comes below as time goes on, whatever the start; for one process.

        The root of `2 B sqrt(u) - 2 rate u + |scale|^2 = 0`.
        """
        bound, size = self._sizes()
        rate = jnp.min(self.rate)
        noise = jnp.sum(jnp.broadcast_to(jnp.asarray(self.scale), (size,)) ** 2)
        return ((bound + jnp.sqrt(bound**2 + 2.0 * rate * noise)) / (2.0 * rate)) ** 2


def _at(net: Any, t: Any, x: Array) -> Array:
    """A net of time and state."""
    return net(jnp.concatenate([jnp.atleast_1d(t).astype(x.dtype), jnp.atleast_1d(x)]))


def _linear_noise_drift(t: Any, x: Any, p: Any) -> Array:
    return p["net"](x) - (p["decay"] + 0.5 * p["scale"] ** 2) * x


def _linear_noise_drift_in_time(t: Any, x: Any, p: Any) -> Array:
    x = jnp.asarray(x)
    return _at(p["net"], t, x) - (p["decay"] + 0.5 * p["scale"] ** 2) * x


def _relative_diffusion(t: Any, x: Any, p: Any) -> Array:
    return p["scale"] * x


class LinearNoise(_Learned):
    """A learned drift with noise in proportion to the state.

    `dZ = (net(t, Z) - (decay + scale^2 / 2) Z) dt + scale Z dW`, componentwise. The pull makes up
    for what the noise adds to the mean square, so that `E|Z|^2` comes below `(B / decay)^2`.
    Without noise at 0, what reaches 0 leaves it by the net alone.

    Args:
        net: a field of the state, as for `NeuralLangevin`; of `(time, *state)` with `time=True`.
        decay: rate at which root mean squares decay without the net, 1/time; positive.
        scale: relative volatility, 1/sqrt(time); positive.
        time: whether the net is given the time before the state.
        event_dim: 1 where decay and scale are one for each component.

    Raises:
        TypeError: a net that is no field, a number that is none.
        ValueError: a net without a bound, a number that is not positive.

    When not to use it: states that are observed at 0, where the transition has no density.

    Example:
        >>> import equinox as eqx, jax, numpyro, numpyro_sde as nsde
        >>> net = eqx.nn.MLP(
        ...     2, "scalar", 8, 1, jax.nn.tanh, jax.nn.tanh, key=jax.random.key(0))
        >>> with numpyro.handlers.seed(rng_seed=0):
        ...     f = nsde.fields.Network(net, dim=2).register("f")
        >>> sde = nsde.processes.LinearNoise(f, decay=2.0, scale=0.5, time=True)
        >>> float(sde.mean_square_bound())
        0.25
    """

    decay = parameter("decay", "Rate of decay of root mean squares, 1/time.")
    scale = parameter("scale", "Relative volatility, 1/sqrt(time).")

    def __init__(
        self,
        net: AbstractField,
        decay: ArrayLike,
        scale: ArrayLike,
        *,
        time: bool = False,
        event_dim: int = 0,
    ) -> None:
        params, dims = _parameters("LinearNoise", net, event_dim, decay=decay, scale=scale)
        drift = _linear_noise_drift_in_time if time else _linear_noise_drift
        super().__init__(drift, _relative_diffusion, params, dims)

    def mean_square_bound(self) -> Float[Array, ""]:
        """What `E|Z_t|^2` comes below as time goes on, whatever the start; for one process."""
        bound, _ = self._sizes()
        return (bound / jnp.min(self.decay)) ** 2


def _fading(net_value: Array, x: Array, p: Any) -> Array:
    return (net_value - p["net"].bound() - p["decay"] - 0.5 * p["scale"] ** 2) * x


def _saturating(net_value: Array, x: Array, p: Any) -> Array:
    return (net_value - p["saturation"] * x) * x


def _fading_drift(t: Any, x: Any, p: Any) -> Array:
    return _fading(p["net"](x), x, p)


def _fading_drift_in_time(t: Any, x: Any, p: Any) -> Array:
    return _fading(_at(p["net"], t, jnp.asarray(x)), x, p)


def _saturating_drift(t: Any, x: Any, p: Any) -> Array:
    return _saturating(p["net"](x), x, p)


def _saturating_drift_in_time(t: Any, x: Any, p: Any) -> Array:
    return _saturating(_at(p["net"], t, jnp.asarray(x)), x, p)


class Geometric(_Learned):
    """A positive state that grows at a learned relative rate, held in bounds.

    With `saturation`, `dZ = (net(t, Z) - saturation Z) Z dt + scale Z dW`, componentwise: a
    population with crowding. It stays bounded in mean square and lives on where the net exceeds
    `scale^2 / 2` near 0. With `decay`, `dZ = (net(t, Z) - B - decay - scale^2 / 2) Z dt +
    scale Z dW`, B the net's bound: `E Z^2` decays at least as `exp(-2 decay t)`, the exponential
    stability of the paper's geometric class. States stay positive; steps are Euler's in `log Z`.

    Args:
        net: a field of the state, as for `NeuralLangevin`, of relative growth rates, 1/time; of
            `(time, *state)` with `time=True`.
        scale: relative volatility, 1/sqrt(time); positive.
        saturation: crowding, 1/(time state); positive.
        decay: least rate of decay of root mean squares, 1/time; positive. Give one of the two.
        time: whether the net is given the time before the state.
        event_dim: 1 where the numbers are one for each component.

    Raises:
        TypeError: a net that is no field, a number that is none.
        ValueError: a net without a bound, a number that is not positive, both or neither of
            saturation and decay.

    When not to use it: states that may be 0, which this process never reaches.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> f = nsde.fields.HSGP(dim=1, box=(0.0, 4.0), num=8).from_weights(
        ...     jnp.ones(8), amplitude=0.5, length=1.0)
        >>> sde = nsde.processes.Geometric(f, scale=0.3, saturation=1.0)
        >>> path = nsde.SDEPath(sde, [0.0, 0.1], init=1.0)
        >>> type(path.scheme).__name__, bool(sde.positive)
        ('LogEuler', True)
    """

    scale = parameter("scale", "Relative volatility, 1/sqrt(time).")

    def __init__(
        self,
        net: AbstractField,
        scale: ArrayLike,
        *,
        saturation: ArrayLike | None = None,
        decay: ArrayLike | None = None,
        time: bool = False,
        event_dim: int = 0,
    ) -> None:
        given = {"saturation": saturation, "decay": decay}
        numbers = {key: value for key, value in given.items() if value is not None}
        if len(numbers) != 1:
            raise ValueError(
                f"Geometric needs saturation or decay, one of the two, got {sorted(numbers)}"
            )
        params, dims = _parameters("Geometric", net, event_dim, scale=scale, **numbers)
        if saturation is not None:
            drift = _saturating_drift_in_time if time else _saturating_drift
        else:
            drift = _fading_drift_in_time if time else _fading_drift
        super().__init__(drift, _relative_diffusion, params, dims)

    @property
    def positive(self) -> bool:
        """A positive state stays positive."""
        return True

    def default_transition(self) -> AbstractScheme | None:
        """Euler's step in logarithms."""
        return LogEuler() if self.noise.independent else None

    def mean_square_bound(self) -> Float[Array, ""]:
        """What `E|Z_t|^2` comes below as time goes on, whatever the start; for one process.

        With saturation `((B + scale^2 / 2) / saturation)^2` for each component, from
        `(E Z^2)' <= (2 B + scale^2) E Z^2 - 2 saturation (E Z^2)^(3/2)`; with decay 0.
        """
        if "decay" in self.params:
            return jnp.zeros(())
        _, size = self._sizes()
        numbers = (self.net.bound(), self.scale, self.params["saturation"])
        bound, scale, saturation = (jnp.broadcast_to(jnp.asarray(a), (size,)) for a in numbers)
        return jnp.sum(((bound + 0.5 * scale**2) / saturation) ** 2)
