"""Linear stochastic differential equations: the matrix Ornstein-Uhlenbeck process.

Source: Sarkka and Solin (2019), Applied Stochastic Differential Equations, sections 6.2 and 6.5.
"""

# ruff: noqa: ARG001, ARG002
# Functions of one protocol share its arguments, used or not.

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from numpyro_sde.linear import small
from numpyro_sde.linear.discretize import transition_sqrt, transitions
from numpyro_sde.linear.ranks import equal_rank
from numpyro_sde.processes.arguments import parameter, real
from numpyro_sde.schemes.base import AbstractScheme, GaussianScheme
from numpyro_sde.sde import SDE

_LOG_2PI = math.log(2.0 * math.pi)


def _linear_drift(t: Any, x: Any, p: Any) -> Array:
    x = jnp.asarray(x)
    if x.shape != p["b"].shape:
        raise ValueError(f"a state of this LinearSDE must have shape {p['b'].shape}, got {x.shape}")
    return small.matvec(jnp.asarray(p["A"]), x) + p["b"]


def _linear_diffusion(t: Any, x: Any, p: Any) -> Array:
    return p["L"]


class LinearSDE(SDE):
    """A linear equation with additive noise, `dX = (A X + b) dt + L dW`.

    Coupled relaxation: compartments in pharmacology, noisy oscillators, continuous-time vector
    autoregressions, Gaussian processes in state-space form (integrated Brownian motion, Matern).
    The transition is `N(F x + c, Q)` with `F = exp(A dt)`, `c` and `Q` the integrals of
    `exp(A s) b` and `exp(A s) L L' exp(A' s)` over the step; it has a density where the noise
    reaches every state through `A`, even with fewer Brownian motions than states. Where all
    eigenvalues of `A` have negative real parts the stationary law is normal, with the
    covariance `S` that solves `A S + S A' + L L' = 0`.

    Args:
        A: drift matrix, 1/time, shape `(*batch, d, d)`.
        b: constant drift, state units per time, shape `(*batch, d)`.
        L: diffusion matrix, state units per square root of time, shape `(*batch, d, m)`.

    Raises:
        ValueError: shapes that do not fit each other.
        TypeError: an argument that is no array.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> spring = nsde.processes.LinearSDE(  # position and velocity
        ...     A=jnp.array([[0.0, 1.0], [-1.0, -0.5]]), b=jnp.zeros(2), L=jnp.array([[0.0], [1.0]])
        ... )
        >>> mean, covariance = spring.stationary_moments()
        >>> covariance.round(4).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """

    A = parameter("A", "Drift matrix, 1/time.")
    b = parameter("b", "Constant drift, state units per time.")
    L = parameter("L", "Diffusion matrix, state units per square root of time.")

    def __init__(self, A: ArrayLike, b: ArrayLike, L: ArrayLike) -> None:
        params = {
            name: real(name, jnp.asarray(value) if isinstance(value, list | tuple) else value)
            for name, value in (("A", A), ("b", b), ("L", L))
        }
        shapes = {name: jnp.shape(value) for name, value in params.items()}
        if len(shapes["A"]) < 2 or shapes["A"][-1] != shapes["A"][-2]:
            raise ValueError(f"A must have shape (*batch, d, d), got {shapes['A']}")
        d = shapes["A"][-1]
        if shapes["b"][-1:] != (d,):
            raise ValueError(f"b must have shape (*batch, {d}) with this A, got {shapes['b']}")
        if len(shapes["L"]) < 2 or shapes["L"][-2] != d:
            raise ValueError(f"L must have shape (*batch, {d}, m) with this A, got {shapes['L']}")
        super().__init__(
            _linear_drift,
            _linear_diffusion,
            params=params,
            event_dims={"A": 2, "b": 1, "L": 2},
        )

    def exact_transition(self) -> AbstractScheme | None:
        """The Gaussian transition."""
        return LinearTransition() if self.noise.independent else None

    def stationary_moments(self) -> tuple[Float[Array, "*batch d"], Float[Array, "*batch d d"]]:
        """Mean and covariance of the stationary law, NaN where there is none.

        The Lyapunov equation is solved as one linear system of `d^2` unknowns. A stable `A`
        is told by a positive definite solution (Lyapunov's theorem), so noise that does not
        reach every state gives NaN as well.
        """
        d = self.A.shape[-1]
        eye = jnp.eye(d)
        system = jnp.einsum("...ik,jl->...ijkl", self.A, eye)
        system = system + jnp.einsum("ik,...jl->...ijkl", eye, self.A)
        system = system.reshape(*system.shape[:-4], d * d, d * d)
        source = small.matmul(self.L, small.transpose(self.L))
        batch = jnp.broadcast_shapes(system.shape[:-2], source.shape[:-2])
        flat = jnp.broadcast_to(source, (*batch, d, d)).reshape(*batch, d * d, 1)
        covariance = small.symmetrize(-jnp.linalg.solve(system, flat).reshape(*batch, d, d))
        stable = jnp.all(jnp.isfinite(small.cholesky(covariance)), axis=(-2, -1))
        mean = -small.solve(self.A, self.b[..., None])[..., 0]
        return (
            jnp.where(stable[..., None], mean, jnp.nan),
            jnp.where(stable[..., None, None], covariance, jnp.nan),
        )

    def stationary_log_density(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch"]:
        """Log density of the stationary normal law at `x`."""
        mean, covariance = self.stationary_moments()
        factor = small.cholesky(covariance)
        z = small.solve_lower(factor, jnp.subtract(*equal_rank(jnp.asarray(x), mean))[..., None])[
            ..., 0
        ]
        size = mean.shape[-1]
        return -0.5 * (jnp.sum(z**2, axis=-1) + small.cho_logdet(factor) + size * _LOG_2PI)


class LinearTransition(GaussianScheme):
    """The exact Gaussian step of a `LinearSDE`; matrix exponentials once for each distinct step.

    Example:
        >>> import jax.numpy as jnp, numpyro_sde as nsde
        >>> ou = nsde.processes.LinearSDE([[-1.0]], [0.0], [[1.0]])
        >>> mean, factor = ou.exact_transition().moments(ou, 0.0, 0.5, jnp.ones(1))
        >>> round(float(mean[0]), 4), round(float(factor[0, 0]), 4)
        (0.6065, 0.5622)
    """

    def prepare(self, sde: SDE, times: Any, dt: Any) -> Any:
        p = sde.params
        known = isinstance(dt, np.ndarray)
        tolerance = rounding_of(times) if known else None
        return tuple(transitions(p["A"], p["b"], p["L"], dt, sqrt=True, tolerance=tolerance))

    def innovation_shape(self, sde: SDE, state_shape: tuple[int, ...]) -> tuple[int, ...]:
        return state_shape

    def moments(
        self,
        sde: SDE,
        t: Array,
        dt: Array,
        x: Array,
        cache: Any = None,
    ) -> tuple[Array, Array]:
        p = sde.params
        F, c, factor = transition_sqrt(p["A"], p["b"], p["L"], dt) if cache is None else cache
        return small.matvec(F, x) + c, factor


def rounding_of(times: np.ndarray) -> float:
    """Largest difference that rounding of float64 times makes between equal steps."""
    return 4.0 * float(np.finfo(np.float64).eps) * float(np.max(np.abs(times)))
