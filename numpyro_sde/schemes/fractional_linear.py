"""Linear SDEs driven by a sum of Ornstein-Uhlenbeck processes: exact, whatever the step."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from numpyro_sde.linear.affine import degrees
from numpyro_sde.linear.discretize import transitions
from numpyro_sde.linear.small import psd_factor, solve_lower
from numpyro_sde.noise.markov_fbm import OUBank
from numpyro_sde.schemes.base import AbstractScheme, GaussianScheme, gaussian_log_density
from numpyro_sde.schemes.dependence import dependence, require_additive
from numpyro_sde.schemes.local_linear import LocalLinear
from numpyro_sde.schemes.memory import MemoryScheme, noise_columns, noise_of
from numpyro_sde.sde import SDE


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
        if noise_of(sde).varies or dependence(sde, "diffusion", state_shape).time:
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
        del times
        bank = noise_of(sde).bank(dt.sum(), dt.min())
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
            jnp.reshape(self.sde.drift_at(t, state), (d,))
            + noise_columns(self.sde, t, state) @ slope
        )
        return jnp.concatenate([drift, (-self.bank.rates[None] * banks).ravel()])


class _BankDiffusion(eqx.Module):
    """Diffusion of the user's state and the banks, a column for each Brownian motion."""

    sde: SDE
    bank: OUBank
    state_shape: tuple[int, ...] = eqx.field(static=True)

    def __call__(self, t: Any, x: Array) -> Array:
        d, G = int(np.prod(self.state_shape, dtype=int)), self.bank.drivers
        L = noise_columns(self.sde, t, x[0] if self.state_shape == () else x[:d])
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
        >>> from numpyro_sde.schemes.fractional_linear import markovian_sde
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
