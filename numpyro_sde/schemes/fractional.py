"""Steps of an SDE driven by a sum of Ornstein-Uhlenbeck processes, these integrated out.

The noise is taken in its innovations form (`noise.banks`): beside the state x goes the mean m of
the bank given the path so far, one for each noise. `(x, m)` is a Markov process that one standard
normal a step and noise drives, m a function of the path, and the law of the path is exactly that
of the scheme driven by the noise itself, whatever the bank's unknown start. Filters, guides and
particles work on `(x, m)`: the bank is integrated out in each of them.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from numpyro_sde.linear.affine import degrees
from numpyro_sde.linear.discretize import transitions
from numpyro_sde.linear.small import psd_factor, solve_lower
from numpyro_sde.noise import Brownian
from numpyro_sde.noise.banks import (
    BLOCK,
    Innovations,
    bank_means,
    increment_log_densities,
    innovations_form,
    log_likelihood,
)
from numpyro_sde.noise.markov_fbm import OUBank, has_equal_steps
from numpyro_sde.schemes.base import (
    _HALF_LOG_2PI,
    AbstractScheme,
    GaussianScheme,
    gaussian_log_density,
    require_square,
)
from numpyro_sde.schemes.dependence import dependence, require_additive
from numpyro_sde.schemes.euler import Euler
from numpyro_sde.schemes.local_linear import LocalLinear
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
    if isinstance(sde.noise, Brownian):
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


class MemoryScheme(AbstractScheme):
    """A scheme whose state carries the mean of the bank beside the user's state.

    `carry` puts the first state and the bank's mean, zero, into one vector `(D,)`; `lift` does so
    for a whole path, `visible` takes the user's part out. `step` and `invert` act on vectors.

    Args:
        state_shape: shape of the user's state, `()` or `(d,)`.
    """

    state_shape: tuple[int, ...] = eqx.field(static=True)

    has_memory: ClassVar[bool] = True

    @property
    def dim(self) -> int:
        """Number of components of the user's state."""
        return int(np.prod(self.state_shape, dtype=int))

    def plain(self) -> AbstractScheme:
        """The scheme for Brownian motion that this one extends."""
        return Euler()

    def innovation_shape(self, sde: SDE, state_shape: tuple[int, ...]) -> tuple[int, ...]:
        del state_shape  # filters ask with that of the carried vector
        return sde.structure(self.state_shape).innovation_shape

    def check(self, sde: SDE, state_shape: tuple[int, ...]) -> None:
        structure = sde.structure(state_shape)
        shape = structure.diffusion_shape
        if len(shape) > len(state_shape) and shape[-1] > self.dim:
            raise ValueError(
                f"diffusion has shape {shape}: with noise {type(sde.noise).__name__} there can be "
                f"no more noises than the {self.dim} component(s) of the state"
            )
        if sde.interpretation != "ito" or not dependence(sde, "diffusion", state_shape).state:
            return
        hurst = sde.noise.hurst
        known = not (sde.noise.varies or isinstance(hurst, jax.core.Tracer))
        if known and np.any(np.asarray(hurst) < 0.5):
            raise ValueError(
                "with H < 1/2 and a diffusion that depends on the state no Ito integral exists: "
                "its correction grows without bound with the number of terms. Give SDE "
                "interpretation='stratonovich'"
            )

    def visible(self, states: Float[Array, "*n D"]) -> Array:
        """The user's part of carried states."""
        return states[..., 0] if self.state_shape == () else states[..., : self.dim]

    def carry(self, sde: SDE, x0: Array) -> Float[Array, " D"]:
        """The first state with the bank's mean, which is zero."""
        bank = jnp.zeros(self.num_noises(sde) * num_states(sde.noise), jnp.result_type(x0))
        return jnp.concatenate([jnp.reshape(x0, (self.dim,)), bank])

    def num_noises(self, sde: SDE) -> int:
        """Number of independent noises."""
        return int(np.prod(self.innovation_shape(sde, self.state_shape), dtype=int))

    def split(self, sde: SDE, carried: Float[Array, " D"]) -> tuple[Array, Float[Array, "m n"]]:
        """The user's state, and the mean of each noise's bank."""
        x = carried[0] if self.state_shape == () else carried[: self.dim]
        return x, carried[self.dim :].reshape(-1, num_states(sde.noise))

    def join(self, x: Array, means: Float[Array, "m n"]) -> Float[Array, " D"]:
        """One vector of the user's state and the means of the banks."""
        return jnp.concatenate([jnp.reshape(x, (self.dim,)), means.ravel()])

    @abstractmethod
    def lift(self, sde: SDE, times: Any, dt: Any, path: Array, cache: Any) -> Float[Array, "T D"]:
        """The carried states along a path `(T, *state)`: the bank's means given the path."""

    def log_densities(
        self, sde: SDE, times: Any, dt: Any, path: Array, cache: Any
    ) -> Float[Array, "T-1"]:
        states = self.lift(sde, times, dt, path, cache)
        return super().log_densities(sde, times, dt, states, cache)


def num_states(noise: Any) -> int:
    """Number of processes of one noise, a constant included."""
    return noise.num_terms + (noise.fit == "law")


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
        bank, steps = _readable(sde, self.state_shape).on_grid(times, dt)
        return innovations_form(steps, bank.start, np.shape(dt)[0])

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
            cache.decay * means + z[:, None] * cache.gain,
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
        if not has_equal_steps(dt) or sde.noise.varies or np.shape(dt)[0] < 2 * BLOCK:
            return super().log_density_sum(sde, times, dt, path, cache)
        increments, log_det = self._increments(sde, times, dt, path)
        bank, steps = _readable(sde, self.state_shape).on_grid(times, dt)
        return log_likelihood(steps, bank.start, increments) + jnp.sum(log_det)


def _readable(sde: SDE, state_shape: tuple[int, ...]) -> Any:
    """The noise, NaN where H < 1/2 and the SDE asks for an Ito integral against it."""
    noise = sde.noise
    if sde.interpretation != "ito" or not dependence(sde, "diffusion", state_shape).state:
        return noise
    hurst = noise.hurst

    def valid(h: Array) -> Array:
        return jnp.where(h >= 0.5, h, jnp.nan)

    new = jax.tree_util.Partial(lambda t: valid(hurst(t))) if noise.varies else valid(hurst)
    return eqx.tree_at(lambda n: n.hurst, noise, new, is_leaf=lambda v: v is hurst)


def _columns(sde: SDE, t: Any, x: Array) -> Float[Array, "d m"]:
    """Diffusion with one column for each noise."""
    columns = sde.diffusion_columns_at(t, x)
    return jnp.reshape(columns, (-1, columns.shape[-1]))


def _solve(L: Float[Array, "d m"], y: Float[Array, " d"]) -> tuple[Array, Array]:
    """`L^-1 y` and the log of `|det L^-1|`."""
    require_square(L)
    if L.shape == (1, 1):
        return y / L[0, 0], -jnp.log(jnp.abs(L[0, 0]))
    return jnp.linalg.solve(L, y), -jnp.linalg.slogdet(L)[1]


class FractionalEuler(_IncrementScheme, GaussianScheme):
    """Euler's scheme with increments of the noise: `x' = x + f(t, x) dt + L(t, x) dB`.

    `dB` has the exact law of the noise on the grid. For a diffusion that depends on the state it
    converges to the integral of Young where H > 1/2, of Ito where H = 1/2; for H < 1/2 to nothing
    (see `FractionalTrapezoid`).
    """

    def apply(self, sde: SDE, t: Any, dt: Any, x: Array, increment: Float[Array, " m"]) -> Array:
        moved = _columns(sde, t, x) @ increment
        return x + sde.drift_at(t, x) * dt + jnp.reshape(moved, self.state_shape)

    def increment(
        self, sde: SDE, t: Any, dt: Any, x: Array, x_next: Array
    ) -> tuple[Float[Array, " m"], Float[Array, ""]]:
        rest = x_next - x - sde.drift_at(t, x) * dt
        if sde.structure(self.state_shape).kind == "diagonal":
            scale = sde.noise_factor_at(t, x)
            return jnp.reshape(rest / scale, (self.dim,)), -jnp.sum(jnp.log(jnp.abs(scale)))
        return _solve(_columns(sde, t, x), rest)

    def moments(
        self, sde: SDE, t: Array, dt: Array, x: Array, cache: Any = None
    ) -> tuple[Array, Array]:
        state, means = self.split(sde, x)
        L = _columns(sde, t, state)
        mean = self.join(self.apply(sde, t, dt, state, means @ cache.loading), cache.decay * means)
        gains = jnp.kron(jnp.eye(means.shape[0], dtype=L.dtype), cache.gain[:, None])
        return mean, jnp.concatenate([L, gains]) * cache.scale


class FractionalTrapezoid(_IncrementScheme):
    """The trapezoidal rule: `x' = x + f(t, x) dt + (L(t, x) + L(t', x')) / 2 dB`.

    For a diffusion that depends on the state, read in the sense of Stratonovich. In one dimension
    it converges for all H > 1/6 (Nourdin 2005, "Schemas associes a une EDS dirigee par un mbf");
    in more, where the columns of the diffusion commute. A draw solves for x' by iteration.
    """

    def _mean_columns(self, sde: SDE, t: Any, dt: Any, x: Array, x_next: Array) -> Array:
        return 0.5 * (_columns(sde, t, x) + _columns(sde, t + dt, x_next))

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


class _LinearSteps(NamedTuple):
    """`x' = A (x, m) + c + S z`, `m' = B (x, m) + e + K S z` of each step."""

    drift: Array  # (N, D, D)
    offset: Array  # (N, D)
    factor: Array  # S, (N, d, d)
    gain: Array  # K, (N, D - d, d)


class FractionalLinear(MemoryScheme, GaussianScheme):
    """The exact transition of a linear SDE with additive noise, whatever the step.

    State and banks together are a linear SDE that Brownian motion drives; it is discretised
    exactly and conditioned on the path.
    """

    def plain(self) -> AbstractScheme:
        return LocalLinear()

    def check(self, sde: SDE, state_shape: tuple[int, ...]) -> None:
        super().check(sde, state_shape)
        require_additive(sde, state_shape, "LocalLinear() with this noise", "use Euler()")
        if sde.noise.varies or dependence(sde, "diffusion", state_shape).time:
            raise ValueError(
                "LocalLinear() with this noise needs a diffusion and a Hurst index that do not "
                "change in time: use Euler()"
            )
        _require_linear(sde, state_shape)

    def innovation_shape(self, sde: SDE, state_shape: tuple[int, ...]) -> tuple[int, ...]:
        del sde, state_shape
        return self.state_shape

    def num_noises(self, sde: SDE) -> int:
        return int(np.prod(sde.structure(self.state_shape).innovation_shape, dtype=int))

    def prepare(self, sde: SDE, times: Any, dt: Any) -> _LinearSteps:
        bank, _ = sde.noise.on_grid(times, dt)
        whole = markovian_sde(sde, self.state_shape, bank)
        d, count = self.dim, self.num_noises(sde)
        start = jnp.kron(jnp.eye(count, dtype=bank.start.dtype), bank.start)
        origin = jnp.zeros(d + start.shape[0], start.dtype)
        zero = jnp.zeros((), start.dtype)
        A = jax.jacfwd(lambda x: whole.drift_at(zero, x))(origin)
        b, L = whole.drift_at(zero, origin), whole.diffusion_columns_at(zero, origin)
        steps = transitions(A, b, L, dt)

        def one(P: Array, now: Any) -> tuple[Array, Any]:
            F, _, Q = now
            cov = F[:, d:] @ P @ F[:, d:].T + Q
            factor = psd_factor(cov[:d, :d])
            half = solve_lower(factor, cov[:d, d:])
            gain = solve_lower(factor, half, transposed=True).T
            P = cov[d:, d:] - half.T @ half
            return 0.5 * (P + P.T), (factor, gain)

        _, (factor, gain) = lax.scan(one, start, tuple(steps))
        return _LinearSteps(steps.F, steps.c, factor, gain)

    def moments(
        self, sde: SDE, t: Array, dt: Array, x: Array, cache: Any = None
    ) -> tuple[Array, Array]:
        del sde, t, dt
        factor = jnp.concatenate([cache.factor, cache.gain @ cache.factor])
        return cache.drift @ x + cache.offset, factor

    def step(self, sde: SDE, t: Array, dt: Array, x: Array, z: Array, cache: Any = None) -> Array:
        mean, factor = self.moments(sde, t, dt, x, cache)
        return mean + factor @ jnp.reshape(z, (self.dim,))

    def invert(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Array:
        mean, _ = self.moments(sde, t, dt, x, cache)
        z = solve_lower(cache.factor, (x_next - mean)[: self.dim, None])[:, 0]
        return jnp.reshape(z, self.state_shape)

    def log_density(
        self, sde: SDE, t: Array, dt: Array, x: Array, x_next: Array, cache: Any = None
    ) -> Float[Array, ""]:
        mean, _ = self.moments(sde, t, dt, x, cache)
        return gaussian_log_density(x_next[: self.dim], mean[: self.dim], cache.factor)

    def lift(self, sde: SDE, times: Any, dt: Any, path: Array, cache: Any) -> Float[Array, "T D"]:
        del times, dt
        states = jnp.reshape(path, (path.shape[0], self.dim))

        def one(x: Array, now: Any) -> tuple[Array, Array]:
            step, seen = now
            mean = step.drift @ x + step.offset
            rest = seen - mean[: self.dim]
            x = jnp.concatenate([seen, mean[self.dim :] + step.gain @ rest])
            return x, x

        first = self.carry(sde, states[0])
        _, later = lax.scan(one, first, (cache, states[1:]))
        return jnp.concatenate([first[None], later])


def _require_linear(sde: SDE, state_shape: tuple[int, ...]) -> None:
    t = jax.ShapeDtypeStruct((), jnp.result_type(float))
    x = jax.ShapeDtypeStruct(state_shape, jnp.result_type(float))

    def degree(role: str, *, time: bool) -> int:
        def at(t: Any, x: Any) -> Any:
            one = jax.tree.map(
                lambda leaf: jnp.ones(leaf.shape, leaf.dtype), sde.unbatched_shapes()
            )
            return getattr(one, role)(t, x)

        if time:
            return int(degrees(lambda t: at(t, jnp.ones(state_shape)), t)[0])
        return int(degrees(lambda x: at(jnp.zeros(()), x), x)[0])

    if degree("drift_at", time=False) > 1 or degree("drift_at", time=True) > 0:
        raise ValueError(
            "LocalLinear() with this noise is for a drift that is affine in the state and free of "
            "time: use Euler()"
        )


class _BankDrift(eqx.Module):
    """Drift of the user's state and the banks, as one vector."""

    sde: SDE
    bank: OUBank
    state_shape: tuple[int, ...] = eqx.field(static=True)

    def __call__(self, t: Any, x: Array) -> Array:
        d = int(np.prod(self.state_shape, dtype=int))
        state = x[0] if self.state_shape == () else x[:d]
        banks = x[d:].reshape(-1, self.bank.rates.size)
        slope = banks @ (self.bank.integral - self.bank.rates * self.bank.difference)
        drift = (
            jnp.reshape(self.sde.drift_at(t, state), (d,)) + _columns(self.sde, t, state) @ slope
        )
        return jnp.concatenate([drift, (-self.bank.rates * banks).ravel()])


class _BankDiffusion(eqx.Module):
    """Diffusion of the user's state and the banks, a column for each Brownian motion."""

    sde: SDE
    bank: OUBank
    state_shape: tuple[int, ...] = eqx.field(static=True)

    def __call__(self, t: Any, x: Array) -> Array:
        d, G = int(np.prod(self.state_shape, dtype=int)), self.bank.drivers
        L = _columns(self.sde, t, x[0] if self.state_shape == () else x[:d])
        m, eye = L.shape[1], jnp.eye(L.shape[1], dtype=L.dtype)
        direct = jnp.kron(L, (self.bank.difference @ G)[None])
        banks = jnp.kron(eye, G)
        white = jnp.concatenate([self.bank.white * L, jnp.zeros((m * G.shape[0], m), L.dtype)])
        return jnp.concatenate([jnp.concatenate([direct, banks]), white], axis=1)


def markovian_sde(sde: SDE, state_shape: tuple[int, ...], bank: OUBank) -> SDE:
    """The user's state and the banks of its noises as one SDE that Brownian motion drives.

    The state is a vector: the user's components, then for each noise its processes, which start
    from `N(0, bank.start)`.

    Args:
        sde: an unbatched SDE with a `MarkovFBM` noise of constant Hurst index.
        state_shape: shape of its state.
        bank: `sde.noise.bank(horizon, step)`.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> from numpyro_sde.schemes.fractional import markovian_sde
        >>> noise = nsde.noise.MarkovFBM(0.3, num_terms=4)
        >>> sde = nsde.SDE(lambda t, x: -x, lambda t, x: 0.5, noise=noise)
        >>> whole = markovian_sde(sde, (), noise.bank(horizon=10.0, step=0.1))
        >>> whole.drift_at(0.0, jnp.zeros(6)).shape, whole.diffusion_at(0.0, jnp.zeros(6)).shape
        ((6,), (6, 6))
    """
    return SDE(
        _BankDrift(sde, bank, state_shape),
        _BankDiffusion(sde, bank, state_shape),
        interpretation=sde.interpretation,
    )
