r"""Means and covariances of cells that start at given states: the population as a normal mixture.

From a start `N(m, P)` the linearised equation moves mean and covariance by

    m' = f(t, m),   P' = J P + P J' + L L'(t, m),   J = df/dm,

exact for linear equations with additive noise (van Kampen 1961; Särkkä and Solin 2019, section
9.1). Where cells divide and die at a net rate `g(t, x)`, the number of descendants tilts the law
by `exp(int g)` (Feynman and Kac); with `g` expanded to second order,

    m' = f + P grad g,   P' = J P + P J' + L L' + P hess g P,   l' = g + tr(P hess g) / 2,

where `exp(l)` is the expected number of descendants: exact for linear equations and quadratic `g`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from numpyro_sde.linear.small import (
    cholesky,
    congruence,
    diagonal,
    matmul,
    matvec,
    solve_lower,
    symmetrize,
    transpose,
)
from numpyro_sde.parameters import Code
from numpyro_sde.schemes.base import GaussianScheme
from numpyro_sde.sde import SDE
from numpyro_sde.snapshots.clock import Clock
from numpyro_sde.statespace.updates import LOG_2PI

_JITTER = 8.0  # roundings of the variances: a state that no noise reaches yet has a density


class Belief(NamedTuple):
    """A normal law of cells, and how many there are.

    Attributes:
        mean: `(d,)`.
        cov: `(d, d)`.
        log_mass: log of the expected number of descendants of one cell.
    """

    mean: Array
    cov: Array
    log_mass: Array


class Rate(eqx.Module):
    """A net growth rate of one cell, `fn(t, x)` or `fn(t, x, p)` with the equation's parameters."""

    fn: Code
    takes_params: bool = eqx.field(static=True)

    def __call__(self, sde: SDE, t: Any, x: Array) -> Array:
        value = self.fn(t, x, *(sde.arguments if self.takes_params else ()))
        return jnp.reshape(jnp.asarray(value, x.dtype), ())


def propagate(
    sde: SDE,
    scheme: GaussianScheme | None,
    growth: Rate | None,
    grid: tuple[Any, Any, Any],
    start: Belief,
    *,
    scalar: bool,
) -> Belief:
    """Move a normal law along a grid.

    Args:
        sde: one equation.
        scheme: a Gaussian transition to chain, step by step; None for the linearised equation.
        growth: net growth rate; None for none. Only without `scheme`.
        grid: start times and lengths of the steps, and what the scheme prepared for them.
        start: the law at the first time.
        scalar: whether the equation is written for states of shape `()`.

    Returns:
        The law after each step, leading axis `T - 1`.
    """

    def step(belief: Belief, now: Any) -> tuple[Belief, Belief]:
        t, h, cache = now
        if scheme is None:
            belief = _runge_kutta(sde, growth, t, h, belief, scalar)
        else:
            belief = _chained(sde, scheme, t, h, cache, belief, scalar)
        return belief, belief

    return lax.scan(jax.checkpoint(step), start, grid)[1]


def prepared(sde: SDE, scheme: GaussianScheme | None, times: Any, dt: Any) -> tuple[Any, Any, Any]:
    """The steps of a grid, as `propagate` takes them."""
    cache = None if scheme is None else scheme.prepare(sde, times, dt)
    return jax.tree.map(jnp.asarray, (times[:-1], dt, cache))


def _chained(
    sde: SDE, scheme: GaussianScheme, t: Any, h: Any, cache: Any, belief: Belief, scalar: bool
) -> Belief:
    """One step of a Gaussian scheme, expanded about the mean."""
    d = belief.mean.size

    def with_aux(x: Array) -> tuple[Array, tuple[Array, Array]]:
        state = x[0] if scalar else x
        mean, factor = scheme.moments(sde, t, h, state, cache)
        mean = jnp.reshape(mean, (d,))
        full = jnp.diag(jnp.reshape(factor, (d,))) if jnp.ndim(factor) < 2 else factor
        return mean, (mean, full)

    F, (mean, factor) = jax.jacfwd(with_aux, has_aux=True)(belief.mean)
    cov = congruence(F, belief.cov) + matmul(factor, transpose(factor))
    return Belief(mean.astype(belief.mean.dtype), cov.astype(belief.cov.dtype), belief.log_mass)


def _runge_kutta(
    sde: SDE, growth: Rate | None, t: Any, h: Any, belief: Belief, scalar: bool
) -> Belief:
    """One classical step of order four of the moment equations."""
    nodes = jnp.asarray(np.array([0.0, 0.5, 0.5, 1.0]), belief.mean.dtype)
    shares = jnp.asarray(np.array([1.0, 2.0, 2.0, 1.0]) / 6.0, belief.mean.dtype)
    h = jnp.asarray(h, belief.mean.dtype)

    # A loop, not four copies of the drift's code: compilation is what such a step costs most.
    def stage(carry: tuple[Belief, Belief], now: tuple[Array, Array]) -> tuple[Any, None]:
        slope, total = carry
        node, share = now
        at = jax.tree.map(lambda a, b: a + node * h * b, belief, slope)
        slope = _slope(sde, growth, t + node * h, at, scalar)
        return (slope, jax.tree.map(lambda a, b: a + share * h * b, total, slope)), None

    still = jax.tree.map(jnp.zeros_like, belief)
    (_, end), _ = lax.scan(stage, (still, belief), (nodes, shares))
    return end._replace(cov=symmetrize(end.cov))


def _slope(sde: SDE, growth: Rate | None, t: Any, belief: Belief, scalar: bool) -> Belief:
    mean, P, _ = belief
    d = mean.size

    def drift(x: Array) -> tuple[Array, Array]:
        value = jnp.reshape(sde.ito_drift_at(t, x[0] if scalar else x), (d,)).astype(x.dtype)
        return value, value

    J, f = jax.jacfwd(drift, has_aux=True)(mean)
    L = jnp.reshape(sde.diffusion_columns_at(t, mean[0] if scalar else mean), (d, -1))
    JP, L = matmul(J, P), L.astype(mean.dtype)
    spread = JP + transpose(JP) + matmul(L, transpose(L))
    if growth is None:
        return Belief(f, spread, jnp.zeros((), mean.dtype))

    def rate(x: Array) -> Array:
        return growth(sde, t, x[0] if scalar else x)

    gradient, hessian = jax.grad(rate)(mean), jax.hessian(rate)(mean)
    PG = matmul(P, hessian)
    mass = rate(mean) + 0.5 * jnp.trace(PG)
    return Belief(f + matvec(P, gradient), spread + matmul(PG, P), mass)


def at_snapshots(
    sde: SDE,
    scheme: GaussianScheme | None,
    growth: Rate | None,
    clock: Clock,
    starts: Float[Array, "M d"],
    start_cov: Float[Array, "d d"],
    *,
    scalar: bool,
) -> Belief:
    """The normal law at each snapshot after the first, for each of M starts.

    Args:
        sde: one equation.
        scheme: as in `propagate`.
        growth: as in `propagate`.
        clock: the snapshots.
        starts: means at the first time.
        start_cov: covariance there, the same for all.
        scalar: whether states are scalar.

    Returns:
        Leading axes `(K - 1, M)`.
    """
    steps = prepared(sde, scheme, clock.grid, clock.dt)

    def one(mean: Array) -> Belief:
        start = Belief(mean, start_cov, jnp.zeros((), mean.dtype))
        return propagate(sde, scheme, growth, steps, start, scalar=scalar)

    beliefs = jax.vmap(one)(starts)
    rows = clock.index[1:] - 1
    return Belief(*(jnp.swapaxes(a[:, rows], 0, 1) for a in beliefs))


def factor_of(cov: Float[Array, "*n d d"], noise: Float[Array, "d d"] | None) -> Array:
    """Lower factors of covariances, measurement noise added."""
    d = cov.shape[-1]
    variances = jnp.trace(cov, axis1=-2, axis2=-1)[..., None, None]
    lead = (1,) * (cov.ndim - 2)
    jitter = _JITTER * jnp.finfo(cov.dtype).eps * variances
    total = cov + jitter * jnp.eye(d, dtype=cov.dtype).reshape(*lead, d, d)
    if noise is not None:
        total = total + noise.reshape(*lead, d, d)
    return cholesky(total)


class Normals(NamedTuple):
    """M normal laws, ready for densities: shapes `(M, d)`, `(M, d, d)` and `(M,)`.

    Attributes:
        mean: means.
        whiten: inverses of the lower factors of the covariances.
        log_scale: log density at the mean.
    """

    mean: Array
    whiten: Array
    log_scale: Array


def normals(mean: Float[Array, "M d"], tril: Float[Array, "M d d"]) -> Normals:
    """Normal laws from means and lower factors."""
    d = mean.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(d, dtype=tril.dtype), tril.shape)
    log_det = jnp.sum(jnp.log(diagonal(tril)), axis=-1)
    return Normals(mean, solve_lower(tril, eye), -log_det - 0.5 * d * LOG_2PI)


def log_densities(laws: Normals, y: Float[Array, "n d"]) -> Float[Array, "M n"]:
    """Log density of each point under each law."""
    d = y.shape[-1]
    difference = [y[None, :, i] - laws.mean[:, None, i] for i in range(d)]
    squares = jnp.zeros((laws.mean.shape[0], y.shape[0]), y.dtype)
    for i in range(d):  # unrolled: one pass over the pairs
        z = laws.whiten[:, i, 0, None] * difference[0]
        for j in range(1, i + 1):
            z = z + laws.whiten[:, i, j, None] * difference[j]
        squares = squares + z * z
    return laws.log_scale[:, None] - 0.5 * squares
