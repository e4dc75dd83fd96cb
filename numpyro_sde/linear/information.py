"""Backward information filter: what later observations say about each state.

Along a reference path, in deviations d_k = x_k - ref_k from it, the model is

    d_{k+1} = A_k d_k + c_k + B_k w_k,   w_k ~ N(0, I),

and what is observed at time k multiplies the density by exp(-d'J_k d / 2 + s_k'd) (a Gaussian
observation y = C d + N(0, R) has J = C'R^-1 C and s = C'R^-1 y). Then the likelihood of the
observations from k on, given the state, is proportional to h_k = exp(-d'H_k d / 2 + e_k'd), with

    H_k = J_k + A'(I + H Q)^-1 H A,   e_k = s_k + A'(I + H Q)^-1 (e - H c),   Q = B B',

H and e on the right being those of k + 1 (Fraser and Potter 1969; Mayne 1966). Nothing singular
is inverted: not Q, which has low rank where few noises drive many states, nor H, which is zero
after the last observation. The symmetric product is taken in the form of Joseph, so that H stays
positive semi-definite in float32.

Conditioning one step on h_{k+1} is a change of its innovations: given the state, w has the
density N(w; 0, I) h_{k+1}, normal with precision I + B'H B, whatever the rank of B.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from numpyro_sde.linear.small import (
    cholesky,
    congruence,
    diagonal,
    matmul,
    matvec,
    outer,
    solve_lower,
    symmetrize,
    transpose,
)

# Bound of the ratio of two standard deviations in `match_noise`.
_MOST = 1e3


class LinearizedSteps(NamedTuple):
    """A linear-Gaussian model in deviations from a reference path of N times.

    Attributes:
        A: transition matrices, `(N - 1, d, d)`.
        c: offsets, what the reference leaves out of the mean, `(N - 1, d)`.
        B: factors of the noise: `(N - 1, d, m)`, or `(N - 1, d)` where it is diagonal.
        J: information of the observations at each time, `(N, d, d)`.
        s: their score at the reference, `(N, d)`.
        J_step: information that readings without noise at the end of each step give about its
            beginning, `(N - 1, d, d)`; None for none.
        s_step: their score, `(N - 1, d)`.
    """

    A: Float[Array, "N-1 d d"]
    c: Float[Array, "N-1 d"]
    B: Float[Array, "..."]
    J: Float[Array, "N d d"]
    s: Float[Array, "N d"]
    J_step: Float[Array, "N-1 d d"] | None = None
    s_step: Float[Array, "N-1 d"] | None = None


class Information(NamedTuple):
    """Information in the observations from each time on, about the deviation at that time.

    Attributes:
        H: precision, `(N, d, d)`.
        e: `H` times the deviation that the observations point to, `(N, d)`.
    """

    H: Float[Array, "N d d"]
    e: Float[Array, "N d"]


def backward_information(steps: LinearizedSteps) -> Information:
    """Run the backward recursion.

    Args:
        steps: the linear model, one entry for each step and time.

    Returns:
        Precisions `(N, d, d)` and information vectors `(N, d)`.

    Example:
        >>> import jax.numpy as jnp
        >>> one = jnp.ones((1, 1, 1))
        >>> steps = LinearizedSteps(
        ...     A=one, c=jnp.zeros((1, 1)), B=one, J=jnp.array([[[0.0]], [[1.0]]]),
        ...     s=jnp.array([[0.0], [2.0]]))
        >>> H, e = backward_information(steps)
        >>> H[0].tolist(), e[0].round(4).tolist()  # a unit of noise halves the information
        ([[0.5]], [1.0])
    """
    d = steps.J.shape[-1]

    def step(Z: Array, now: tuple[Array, ...]) -> tuple[Array, Array]:
        A, c, B, J, s = now
        H, e = Z[:, :d], Z[:, d]
        M, K = discount(H, B)
        V = matmul(transpose(A), matmul(M, jnp.concatenate([H, (e - matvec(H, c))[:, None]], 1)))
        W = matmul(transpose(A), K)
        # A'M H M'A + W W': V has A'M H in front, the rest of the congruence is on its right.
        left = matmul(V[:, :d], matmul(transpose(M), A)) + matmul(W, transpose(W))
        Z = jnp.concatenate([symmetrize(left) + J, (V[:, d] + s)[:, None]], axis=1)
        return Z, Z

    last = jnp.concatenate([steps.J[-1], steps.s[-1][:, None]], axis=1)
    J, s = steps.J[:-1], steps.s[:-1]
    if steps.J_step is not None and steps.s_step is not None:
        J, s = J + steps.J_step, s + steps.s_step
    inputs = (steps.A, steps.c, steps.B, J, s)
    _, rest = lax.scan(jax.checkpoint(step), last, inputs, reverse=True)
    Z = jnp.concatenate([rest, last[None]])
    return Information(Z[..., :d], Z[..., d])


class Spans(NamedTuple):
    """How each time's deviation leads to the one at the next of some marked times.

    That is `d_end = phi d_k + b + N(0, V)`.

    Attributes:
        phi: products of the transition matrices, `(N - 1, d, d)`.
        b: gathered offsets, `(N - 1, d)`.
        V: covariances of the gathered noise, `(N - 1, d, d)`.
    """

    phi: Float[Array, "N-1 d d"]
    b: Float[Array, "N-1 d"]
    V: Float[Array, "N-1 d d"]


def spans(
    A: Float[Array, "N-1 d d"],
    c: Float[Array, "N-1 d"],
    B: Float[Array, "..."],
    is_end: Bool[Array, " N-1"],
) -> Spans:
    """Gather steps, backward, from each time to the next marked one after it.

    Args:
        A: transition matrices of the steps.
        c: their offsets.
        B: factors of their noise, `(N - 1, d, m)`, or `(N - 1, d)` where it is diagonal.
        is_end: whether a step ends at a marked time; the last one must.

    Example:
        >>> import jax.numpy as jnp
        >>> one = jnp.ones((3, 1))
        >>> to_end = spans(0.5 * one[..., None], one, one, jnp.array([False, True, True]))
        >>> to_end.phi[:, 0, 0].tolist(), to_end.V[:, 0, 0].tolist()
        ([0.25, 0.5, 0.5], [1.25, 1.0, 1.0])
    """
    d = c.shape[-1]
    eye = jnp.eye(d, dtype=c.dtype)

    def back(carry: Spans, now: Any) -> tuple[Spans, Spans]:
        A, c, B, is_end = now
        phi = jnp.where(is_end, eye, carry.phi)
        b, V = jnp.where(is_end, 0.0, carry.b), jnp.where(is_end, 0.0, carry.V)
        through = phi * B[None] if B.ndim == 1 else matmul(phi, B)
        V = symmetrize(V + matmul(through, transpose(through)))
        new = Spans(matmul(phi, A), b + matvec(phi, c), V)
        return new, new

    start = Spans(eye, jnp.zeros(d, eye.dtype), jnp.zeros((d, d), eye.dtype))
    return lax.scan(back, start, (A, c, B, is_end), reverse=True)[1]


def step_sd(B: Float[Array, "..."]) -> Float[Array, " d"]:
    """Standard deviations of one step's noise, from its factor `(d, m)`, or `(d,)`.

    Example:
        >>> import jax.numpy as jnp
        >>> step_sd(jnp.array([[3.0, 4.0], [0.0, 1.0]])).tolist()
        [5.0, 1.0]
    """
    return jnp.abs(B) if B.ndim == 1 else jnp.sqrt(jnp.sum(B**2, axis=-1))


def match_noise(
    V: Float[Array, "d d"], B: Float[Array, "..."], sd: Float[Array, " d"]
) -> Float[Array, "d d"]:
    """Scale gathered noise of a linearised model to that of the state where a path is.

    A bridge to a precise observation is drawn rightly on fine grids only where its noise at the
    end is the path's own: otherwise the two laws grow apart with every halving of the steps
    (Schauer, van der Meulen and van Zanten 2017, assumption on a at the end; Delyon and Hu 2006).

    Args:
        V: covariance of the noise up to the end of the bridge.
        B: factor of the noise of the step at hand, at the path's state.
        sd: standard deviations of that step in the linearised model.

    Example:
        >>> import jax.numpy as jnp
        >>> match_noise(jnp.eye(2), jnp.array([2.0, 0.5]), jnp.ones(2)).tolist()
        [[4.0, 0.0], [0.0, 0.25]]
    """
    ratio = jnp.where(sd > 0, step_sd(B) / jnp.where(sd > 0, sd, 1.0), 1.0)
    # Where the path's state has no noise, V stays definite.
    ratio = jnp.clip(ratio, 1.0 / _MOST, _MOST)
    return V * outer(ratio, ratio)


def discount(H: Array, B: Array) -> tuple[Array, Array]:
    """`M = (I + H B B')^-1` and the gain `K = H B (I + B'H B)^-1`, with `M = I - K B'`."""
    eye = jnp.eye(H.shape[-1], dtype=H.dtype)
    HB = H * B[None] if B.ndim == 1 else matmul(H, B)
    L = cholesky(innovation_precision(H, B))
    K = transpose(solve_lower(L, solve_lower(L, transpose(HB)), transposed=True))
    return eye - (K * B[None] if B.ndim == 1 else matmul(K, transpose(B))), K


def innovation_precision(H: Float[Array, "d d"], B: Float[Array, "..."]) -> Float[Array, "m m"]:
    """Precision `I + B'H B` of one step's innovations given the later observations.

    Args:
        H: precision of the next state in the later observations, `(d, d)`.
        B: factor of the step's noise, `(d, m)`, or `(d,)` where it is diagonal.

    Example:
        >>> import jax.numpy as jnp
        >>> innovation_precision(jnp.eye(2), jnp.array([1.0, 2.0])).tolist()
        [[2.0, 0.0], [0.0, 5.0]]
    """
    product = H * outer(B, B) if B.ndim == 1 else congruence(transpose(B), H)
    return product + jnp.eye(B.shape[-1], dtype=H.dtype)


def guided_innovations(
    H: Float[Array, "d d"],
    e: Float[Array, " d"],
    ahead: Float[Array, " d"],
    B: Float[Array, "..."],
    z: Float[Array, " m"],
) -> tuple[Float[Array, " m"], Float[Array, ""]]:
    """Turn standard normals into innovations of one step given the later observations.

    Args:
        H: precision of the next state in the later observations, `(d, d)`.
        e: information vector of its deviation from the reference, `(d,)`.
        ahead: the step's mean less the reference at the next time, `(d,)`.
        B: factor of the step's noise, `(d, m)`, or `(d,)` where it is diagonal.
        z: standard normals, `(m,)`.

    Returns:
        The innovations `w = P^-1 r + L^-T z`, where `P = I + B'H B = L L'` and
        `r = B'(e - H ahead)`, and `log det L`.

    Example:
        >>> import jax.numpy as jnp
        >>> one = jnp.ones(1)
        >>> w, log_det = guided_innovations(3.0 * jnp.eye(1), 4.0 * one, 0.0 * one, one, one)
        >>> w.tolist()
        [1.5]
    """
    r = e - matvec(H, ahead)
    r = B * r if B.ndim == 1 else matvec(transpose(B), r)
    L = cholesky(innovation_precision(H, B))
    half = solve_lower(L, r[:, None]) + z[:, None]
    w = solve_lower(L, half, transposed=True)[:, 0]
    return w, jnp.sum(jnp.log(diagonal(L)))


def whiten_innovations(
    H: Float[Array, "d d"],
    e: Float[Array, " d"],
    ahead: Float[Array, " d"],
    B: Float[Array, "..."],
    w: Float[Array, " m"],
) -> tuple[Float[Array, " m"], Float[Array, ""]]:
    """Standard normals that `guided_innovations` turns into `w`: its inverse, and `log det L`.

    Example:
        >>> import jax.numpy as jnp
        >>> one = jnp.ones(1)
        >>> z, _ = whiten_innovations(3.0 * jnp.eye(1), 4.0 * one, 0.0 * one, one, 1.5 * one)
        >>> z.tolist()
        [1.0]
    """
    r = e - matvec(H, ahead)
    r = B * r if B.ndim == 1 else matvec(transpose(B), r)
    L = cholesky(innovation_precision(H, B))
    z = matvec(transpose(L), w) - solve_lower(L, r[:, None])[:, 0]
    return z, jnp.sum(jnp.log(diagonal(L)))


def log_weight(w: Array, z: Array, log_det: Any) -> Array:
    """Log density of innovations `w`, standard normal, over that of the map from `z`.

    Sums over the last axis; `log_det` as `guided_innovations` gives it.

    Example:
        >>> import jax.numpy as jnp
        >>> float(log_weight(jnp.ones(2), jnp.ones(2), 0.0))
        0.0
    """
    return 0.5 * jnp.sum((z - w) * (z + w), axis=-1) - log_det
