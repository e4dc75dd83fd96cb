"""Steps of an SDE driven by a sum of Ornstein-Uhlenbeck processes, these integrated out.

The noise is taken in its innovations form (`noise.banks`): beside the state x goes the mean m of
the bank given the path so far, one for each noise. `(x, m)` is a Markov process that one standard
normal a step and noise drives, m a function of the path, and the law of the path is exactly that
of the scheme driven by the noise itself, whatever the bank's unknown start. Filters, guides and
particles work on `(x, m)`: the bank is integrated out in each of them.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from numpyro_sde.linear.small import solve
from numpyro_sde.noise.banks import (
    BLOCK,
    Innovations,
    bank_means,
    increment_log_densities,
    innovations_form,
    log_likelihood,
)
from numpyro_sde.noise.markov_fbm import MarkovFBM, has_equal_steps
from numpyro_sde.schemes.base import (
    _HALF_LOG_2PI,
    AbstractScheme,
    GaussianScheme,
    require_square,
)
from numpyro_sde.schemes.dependence import dependence
from numpyro_sde.schemes.euler import Euler
from numpyro_sde.schemes.fractional_linear import FractionalLinear
from numpyro_sde.schemes.local_linear import LocalLinear
from numpyro_sde.schemes.memory import MemoryScheme, noise_columns, noise_of
from numpyro_sde.sde import SDE

_ITERATIONS = 12  # fixed-point iterations of an implicit step


def driven_scheme(
    sde: SDE, scheme: AbstractScheme | None, state_shape: tuple[int, ...]
) -> AbstractScheme:
    """The scheme for this SDE's noise: with memory where the noise has one.

    Raises:
        TypeError: a scheme that only Brownian motion can drive.
        ValueError: an SDE that the noise cannot drive.
    """
    if sde.noise.independent:
        return scheme.plain() if isinstance(scheme, MemoryScheme) else scheme  # type: ignore[return-value]
    chosen = scheme.plain() if isinstance(scheme, MemoryScheme) else scheme
    if chosen is not None and not isinstance(chosen, Euler | LocalLinear):
        raise TypeError(
            f"{type(chosen).__name__} is for Brownian motion: with noise "
            f"{type(sde.noise).__name__} use Euler(), or LocalLinear() where the SDE is linear"
        )
    kind: type[MemoryScheme]
    if isinstance(chosen, LocalLinear):
        kind = FractionalLinear
    elif dependence(sde, "diffusion", state_shape).state and sde.interpretation != "ito":
        kind = FractionalTrapezoid
    else:
        kind = FractionalEuler
    return kind(state_shape)


class _IncrementScheme(MemoryScheme):
    """A scheme in which a step is a map of the noise's increment over it."""

    @abstractmethod
    def apply(self, sde: SDE, t: Any, dt: Any, x: Array, increment: Float[Array, " m"]) -> Array:
        """The next state, from the noise's increment."""

    @abstractmethod
    def increment(
        self, sde: SDE, t: Any, dt: Any, x: Array, x_next: Array
    ) -> tuple[Float[Array, " m"], Float[Array, ""]]:
        """The increment that leads from one state to the next, and its log Jacobian."""

    def prepare(self, sde: SDE, times: Any, dt: Any) -> Innovations:
        noise = _readable(sde, self.state_shape)
        bank, steps = noise.on_grid(times, dt)
        return innovations_form(steps, bank.start, np.shape(dt)[0], noise.kind == 1)

    def _increments(self, sde: SDE, times: Any, dt: Any, path: Array) -> tuple[Array, Array]:
        return jax.vmap(self.increment, (None, 0, 0, 0, 0))(
            sde, times[:-1], dt, path[:-1], path[1:]
        )

    def lift(
        self, sde: SDE, times: Any, dt: Any, path: Array, cache: Innovations
    ) -> Float[Array, "T D"]:
        means = bank_means(cache, self._increments(sde, times, dt, path)[0])
        return jax.vmap(self.join)(path, means)

    def step(
        self, sde: SDE, t: Array, dt: Array, x: Array, z: Array, cache: Innovations | None = None
    ) -> Array:
        assert cache is not None
        state, means = self.split(sde, x)
        z = jnp.reshape(z, means.shape[:1]) * cache.scale
        increment = means @ cache.loading + z
        return self.join(
            self.apply(sde, t, dt, state, increment),
            cache.decay[None] * means + z[:, None] * cache.gain[None],
        )

    def invert(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Array:
        state, means = self.split(sde, x)
        increment, _ = self.increment(sde, t, dt, state, self.split(sde, x_next)[0])
        z = (increment - means @ cache.loading) / cache.scale
        return jnp.reshape(z, self.innovation_shape(sde, self.state_shape))

    def log_density(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Float[Array, ""]:
        """Log density of the user's part of the next state."""
        state, means = self.split(sde, x)
        increment, log_det = self.increment(sde, t, dt, state, self.split(sde, x_next)[0])
        z = (increment - means @ cache.loading) / cache.scale
        return jnp.sum(-0.5 * z**2 - jnp.log(cache.scale) - _HALF_LOG_2PI) + log_det

    def log_densities(
        self, sde: SDE, times: Any, dt: Any, path: Array, cache: Any
    ) -> Float[Array, "T-1"]:
        increments, log_det = self._increments(sde, times, dt, path)
        return increment_log_densities(cache, increments) + log_det

    def log_density_sum(
        self, sde: SDE, times: Any, dt: Any, path: Array, cache: Any
    ) -> Float[Array, ""]:
        if not has_equal_steps(dt) or noise_of(sde).varies or np.shape(dt)[0] < 2 * BLOCK:
            return super().log_density_sum(sde, times, dt, path, cache)
        increments, log_det = self._increments(sde, times, dt, path)
        bank, steps = _readable(sde, self.state_shape).on_grid(times, dt)
        return log_likelihood(steps, bank.start, increments) + jnp.sum(log_det)


def _readable(sde: SDE, state_shape: tuple[int, ...]) -> MarkovFBM:
    """The noise, NaN where H < 1/2 and the SDE asks for an Ito integral against it."""
    noise = noise_of(sde)
    if sde.interpretation != "ito" or not dependence(sde, "diffusion", state_shape).state:
        return noise
    hurst = noise.hurst

    def valid(h: Array) -> Array:
        return jnp.where(h >= 0.5, h, jnp.nan)

    new = jax.tree_util.Partial(lambda t: valid(hurst(t))) if noise.varies else valid(hurst)
    readable: MarkovFBM = eqx.tree_at(lambda n: n.hurst, noise, new, is_leaf=lambda v: v is hurst)
    return readable


def _solve(L: Float[Array, "d m"], y: Float[Array, " d"]) -> tuple[Array, Array]:
    """`L^-1 y` and the log of `|det L^-1|`."""
    require_square(L)
    if L.shape == (1, 1):
        return y / L[0, 0], -jnp.log(jnp.abs(L[0, 0]))
    return solve(L, y[:, None])[:, 0], -jnp.linalg.slogdet(L)[1]


class FractionalEuler(_IncrementScheme, GaussianScheme):
    """Euler's scheme with increments of the noise: `x' = x + f(t, x) dt + L(t, x) dB`.

    `dB` has the exact law of the noise on the grid. For a diffusion that depends on the state it
    converges to the integral of Young where H > 1/2, of Ito where H = 1/2; for H < 1/2 to nothing
    (see `FractionalTrapezoid`).
    """

    def apply(self, sde: SDE, t: Any, dt: Any, x: Array, increment: Float[Array, " m"]) -> Array:
        moved = noise_columns(sde, t, x) @ increment
        return x + sde.drift_at(t, x) * dt + jnp.reshape(moved, self.state_shape)

    def increment(
        self, sde: SDE, t: Any, dt: Any, x: Array, x_next: Array
    ) -> tuple[Float[Array, " m"], Float[Array, ""]]:
        rest = x_next - x - sde.drift_at(t, x) * dt
        if sde.structure(self.state_shape).kind == "diagonal":
            scale = sde.noise_factor_at(t, x)
            return jnp.reshape(rest / scale, (self.dim,)), -jnp.sum(jnp.log(jnp.abs(scale)))
        return _solve(noise_columns(sde, t, x), rest)

    def moments(
        self, sde: SDE, t: Array, dt: Array, x: Array, cache: Any = None
    ) -> tuple[Array, Array]:
        state, means = self.split(sde, x)
        L = noise_columns(sde, t, state)
        mean = self.join(
            self.apply(sde, t, dt, state, means @ cache.loading), cache.decay[None] * means
        )
        gains = jnp.kron(jnp.eye(means.shape[0], dtype=L.dtype), cache.gain[:, None])
        return mean, jnp.concatenate([L, gains]) * cache.scale


class FractionalTrapezoid(_IncrementScheme):
    """The trapezoidal rule: `x' = x + f(t, x) dt + (L(t, x) + L(t', x')) / 2 dB`.

    For a diffusion that depends on the state, read in the sense of Stratonovich. In one dimension
    it converges for all H > 1/6 (Nourdin 2005, "Schemas associes a une EDS dirigee par un mbf");
    in more, where the columns of the diffusion commute. A draw solves for x' by iteration.
    """

    def _mean_columns(self, sde: SDE, t: Any, dt: Any, x: Array, x_next: Array) -> Array:
        return 0.5 * (noise_columns(sde, t, x) + noise_columns(sde, t + dt, x_next))

    def apply(self, sde: SDE, t: Any, dt: Any, x: Array, increment: Float[Array, " m"]) -> Array:
        start = x + sde.drift_at(t, x) * dt

        def better(x_next: Array, _: None) -> tuple[Array, None]:
            moved = self._mean_columns(sde, t, dt, x, x_next) @ increment
            return start + jnp.reshape(moved, self.state_shape), None

        return lax.scan(better, start, None, _ITERATIONS)[0]

    def increment(
        self, sde: SDE, t: Any, dt: Any, x: Array, x_next: Array
    ) -> tuple[Float[Array, " m"], Float[Array, ""]]:
        def of(x_next: Array) -> tuple[Array, Array]:
            rest = x_next - x - sde.drift_at(t, x) * dt
            L = self._mean_columns(sde, t, dt, x, x_next)
            solved, _ = _solve(L, jnp.reshape(rest, (self.dim,)))
            return solved, solved

        jacobian, increment = jax.jacfwd(of, has_aux=True)(x_next)
        return increment, jnp.linalg.slogdet(jnp.reshape(jacobian, (self.dim, self.dim)))[1]
