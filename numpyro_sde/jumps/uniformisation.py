"""Transition matrices of a Markov jump process by uniformisation.

With `q >= max_i |Q_ii|` and `M = I + Q / q`, a stochastic matrix,

    P(t) = exp(Q t) = sum_k Poisson(k; q t) M^k

(Jensen 1953; Grassmann 1977). All terms are nonnegative, so nothing cancels: entries keep their
relative precision also where the generator is close to a defective one, where a decomposition by
eigenvectors loses all digits. The powers do not depend on `t` and are shared by all gaps of a
clock. A gap with too large a `q t` for the terms at hand is halved `s` times and the result
squared as often.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float
from scipy.special import gammaincinv, gammaln

from numpyro_sde.linear.small import diagonal

MAX_SQUARINGS = 12
TAIL = 1e-14
"""Mass of the Poisson law that truncation may lose."""


def largest_mean(num_terms: int) -> float:
    """Largest Poisson mean of which all but `TAIL` lies below `num_terms`.

    Example:
        >>> from numpyro_sde.jumps.uniformisation import largest_mean
        >>> round(largest_mean(64), 1)
        20.4
    """
    return float(gammaincinv(num_terms, TAIL))


def terms_for(mean: float) -> int:
    """Smallest number of terms, a power of two, that holds all but `TAIL` of a Poisson law.

    Example:
        >>> from numpyro_sde.jumps.uniformisation import terms_for
        >>> terms_for(20.0)
        64
    """
    terms = 16
    while largest_mean(terms) < mean:
        terms *= 2
    return terms


def uniform_rate(Q: Float[Array, "n n"]) -> Float[Array, ""]:
    """The largest rate of leaving a state; 1 where nothing moves.

    Constant for derivatives: the transition matrix does not depend on it.
    """
    q = jnp.max(-diagonal(lax.stop_gradient(Q)))
    return jnp.where(q == 0.0, 1.0, q)


def poisson_weights(mean: Float[Array, "*G"], num_terms: int) -> Float[Array, "*G K"]:
    """Probabilities of `0..num_terms - 1` under Poisson laws."""
    k = np.arange(num_terms, dtype=float).reshape(*(1,) * mean.ndim, -1)
    positive = mean > 0.0
    log_mean = jnp.where(positive, jnp.log(jnp.where(positive, mean, 1.0)), -1e30)
    exponent = k.astype(log_mean.dtype) * log_mean[..., None] - mean[..., None]
    return jnp.exp(exponent - gammaln(k + 1.0).astype(log_mean.dtype))


def matrix_powers(M: Float[Array, "n n"], num_terms: int) -> Float[Array, "K n n"]:
    """Powers `M^0 .. M^(num_terms - 1)`, by doubling their number."""
    powers = jnp.eye(M.shape[0], dtype=M.dtype)[None]
    block = M
    while powers.shape[0] < num_terms:
        powers = jnp.concatenate([powers, powers @ block])
        if powers.shape[0] < num_terms:
            block = block @ block
    return powers[:num_terms]


def transition_matrices(
    Q: Float[Array, "n n"], gaps: Float[Array, " G"], *, num_terms: int = 64
) -> Float[Array, "G n n"]:
    """Transition matrices `exp(Q t)` for many gaps `t`, with derivatives.

    Args:
        Q: generator, `Q[i, j]` the rate from i to j, rows summing to 0; 1/time.
        gaps: lengths of time, not negative.
        num_terms: terms of the series; at least as many as jumps that may separate two states.

    Returns:
        Matrices `P[g, i, j]`, the probability of j after `gaps[g]` from i. NaN where the rates
        are so high that `q t` exceeds 4096 times what the series holds, or are NaN themselves.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.jumps.uniformisation import transition_matrices
        >>> Q = jnp.array([[-1.0, 1.0], [3.0, -3.0]])
        >>> P = transition_matrices(Q, jnp.array([0.5, 100.0]))
        >>> [round(float(p), 4) for p in P[:, 0, 1]]  # (1 - exp(-4 t)) / 4
        [0.2162, 0.25]
    """
    gaps = jnp.asarray(gaps, Q.dtype)
    if gaps.shape[0] == 0:
        return jnp.zeros((0, *Q.shape), Q.dtype)
    q = uniform_rate(Q)
    M = jnp.eye(Q.shape[0], dtype=Q.dtype) + Q / q
    limit = largest_mean(num_terms)
    longest = q * jnp.max(lax.stop_gradient(gaps))

    def series(means: Array) -> Array:
        powers = matrix_powers(M, num_terms)
        flat = poisson_weights(means, num_terms) @ powers.reshape(num_terms, -1)
        return flat.reshape(-1, *Q.shape)

    def halved() -> Array:
        times = jnp.clip(jnp.ceil(jnp.log2(longest / limit)), 0, MAX_SQUARINGS)

        def square(P: Array, i: Array) -> tuple[Array, None]:
            return lax.cond(i < times, lambda P: P @ P, lambda P: P, P), None

        P = series(q * gaps * 2.0**-times)
        return lax.scan(square, P, jnp.arange(MAX_SQUARINGS))[0]

    P = lax.cond(longest <= limit, lambda: series(q * gaps), halved)
    return jnp.where(longest <= limit * 2.0**MAX_SQUARINGS, P, jnp.nan)


def transition_matrices_on(
    Q: Float[Array, "n n"], gaps: Float[Array, " G"], *, num_terms: int = 64
) -> Float[Array, "G n n"]:
    """`transition_matrices`, each different length once where the clock is known on the host."""
    if isinstance(gaps, np.ndarray) and gaps.size:
        # Equal steps of a clock differ in their last digits.
        _, first, inverse = np.unique(
            np.round(gaps / gaps.max(), 13), return_index=True, return_inverse=True
        )
        if first.size < gaps.size:
            return transition_matrices(Q, gaps[first], num_terms=num_terms)[inverse.ravel()]
    return transition_matrices(Q, gaps, num_terms=num_terms)
