"""Smoothing of linear-Gaussian models and draws of their paths, after a Kalman filter.

Both go backward through the law of each state given the next,
x_k | x_{k+1} ~ N(J_k x_{k+1} + g_k, V_k), whose factor comes from one triangularisation of
square-root factors, so that nothing is inverted that may be singular and no digits cancel.

Sources: H. E. Rauch, F. Tung and C. T. Striebel (1965), "Maximum likelihood estimates of linear
dynamic systems"; S. Frühwirth-Schnatter (1994), "Data augmentation and dynamic linear models";
T. Kailath, A. H. Sayed and B. Hassibi (2000), Linear Estimation, chapter 12 (arrays).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_sde.linear import recursions
from numpyro_sde.linear.kalman import Filtered, LinearGaussian, choose_form
from numpyro_sde.linear.small import (
    diagonal,
    matmul,
    matvec,
    psd_factor,
    solve_lower,
    symmetrize,
    transpose,
    tria,
)


class Smoothed(NamedTuple):
    """Result of `smoother`: moments given all observations.

    Attributes:
        mean: means, `(T, d)`.
        cov: covariances, `(T, d, d)`.
        cross: covariances of `x_{k+1}` with `x_k`, `(T - 1, d, d)`.
        gain: smoothing gains J, `(T - 1, d, d)`.
    """

    mean: Float[Array, "T d"]
    cov: Float[Array, "T d d"]
    cross: Float[Array, "T-1 d d"]
    gain: Float[Array, "T-1 d d"]


class BackwardKernel(NamedTuple):
    """Law of each state given the next: N(gain x_{k+1} + offset, factor factor').

    The last entries of `offset` and `factor` are the law of the last state itself.

    Attributes:
        gain: `(T - 1, d, d)`.
        offset: `(T, d)`.
        factor: lower triangular, `(T, d, d)`.
    """

    gain: Float[Array, "T-1 d d"]
    offset: Float[Array, "T d"]
    factor: Float[Array, "T d d"]


def _solve_singular(X: Array, Y: Array) -> Array:
    """Solve `J X = Y` for lower triangular X; a zero pivot has a zero column, in Y too."""
    zero = diagonal(X) == 0
    X = jnp.where(zero[..., None, :], jnp.eye(X.shape[-1], dtype=X.dtype), X)
    return transpose(solve_lower(X, transpose(Y), transposed=True))


def backward_kernels(model: LinearGaussian, filtered: Filtered) -> BackwardKernel:
    """Law of each state given the next one and the observations up to its own time.

    With square-root factors S of the filtered covariance and B of the noise, triangularising
    `[[F S, B], [S, 0]]` to `[[X, 0], [Y, Z]]` gives the gain `Y X^-1` and the factor Z of the
    conditional covariance. No covariance is inverted; directions in which the next state has no
    variance are left out.

    Args:
        model: the model's arrays.
        filtered: the filter's result for it.

    Returns:
        A `BackwardKernel`.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.linear.kalman import kalman_filter
        >>> one = jnp.ones((1, 1))
        >>> model = LinearGaussian(
        ...     m0=jnp.zeros(1), P0=one, F=jnp.ones((1, 1, 1)), c=jnp.zeros((1, 1)),
        ...     Q=jnp.ones((1, 1, 1)), C=one, R=jnp.ones(1))
        >>> result = kalman_filter(model, jnp.array([[1.0], [0.0]]))
        >>> round(float(backward_kernels(model, result).gain[0, 0, 0]), 4)
        0.3333
    """
    d = model.state_size
    S = psd_factor(filtered.cov) if filtered.factor is None else filtered.factor
    B = psd_factor(model.Q) if model.Q_factor is None else model.Q_factor
    top = jnp.concatenate([matmul(model.F, S[:-1]), B], axis=-1)
    bottom = jnp.concatenate([S[:-1], jnp.zeros_like(B)], axis=-1)
    joint = tria(jnp.concatenate([top, bottom], axis=-2))
    gain = _solve_singular(joint[:, :d, :d], joint[:, d:, :d])
    offset = filtered.mean[:-1] - matvec(gain, matvec(model.F, filtered.mean[:-1]) + model.c)
    return BackwardKernel(
        gain=gain,
        offset=jnp.concatenate([offset, filtered.mean[-1:]]),
        factor=jnp.concatenate([joint[:, d:, d:], S[-1:]]),
    )


def smoother(model: LinearGaussian, filtered: Filtered, *, form: str = "auto") -> Smoothed:
    """Moments of the states given all observations (Rauch, Tung and Striebel, 1965).

    The covariances are sums of positive semi-definite terms, `J P J' + V`, so no digits cancel.

    Args:
        model: the model's arrays.
        filtered: the filter's result for it.
        form: "parallel" for an associative scan; the other forms are one `lax.scan`.

    Returns:
        A `Smoothed`.

    Raises:
        ValueError: if `form` is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.linear.kalman import kalman_filter
        >>> one = jnp.ones((1, 1))
        >>> model = LinearGaussian(
        ...     m0=jnp.zeros(1), P0=one, F=jnp.ones((1, 1, 1)), c=jnp.zeros((1, 1)),
        ...     Q=jnp.ones((1, 1, 1)), C=one, R=jnp.ones(1))
        >>> result = kalman_filter(model, jnp.array([[1.0], [0.0]]))
        >>> round(float(smoother(model, result).mean[0, 0]), 4)
        0.4
    """
    form = choose_form(form, model.num_times, model.state_size, model.m0.dtype)
    return moments_backward(backward_kernels(model, filtered), form)


def moments_backward(kernel: BackwardKernel, form: str = "sequential") -> Smoothed:
    """Moments of the states, given the law of each given the next.

    Args:
        kernel: the laws.
        form: "parallel" for an associative scan; the other forms are one `lax.scan`.
    """
    V = matmul(kernel.factor, transpose(kernel.factor))
    ends = jnp.concatenate([V, kernel.offset[..., None]], axis=-1)
    Z = recursions.affine_backward(transpose(kernel.gain), ends, form)
    cov = symmetrize(Z[..., :-1])
    cross = matmul(cov[1:], transpose(kernel.gain))
    return Smoothed(mean=Z[..., -1], cov=cov, cross=cross, gain=kernel.gain)


def draw_backward(
    kernel: BackwardKernel, normals: Float[Array, "draws T d"]
) -> Float[Array, "draws T d"]:
    """Map standard normals to paths, given the law of each state given the next."""
    noise = matmul(jnp.swapaxes(normals, 0, 1), transpose(kernel.factor)) + kernel.offset[:, None]

    def step(x: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        gain, shock = inputs
        x = matmul(x, gain.T) + shock
        return x, x

    _, path = lax.scan(step, noise[-1], (kernel.gain, noise[:-1]), reverse=True)
    return jnp.swapaxes(jnp.concatenate([path, noise[-1:]]), 0, 1)


def sample_paths(
    model: LinearGaussian,
    filtered: Filtered,
    *,
    key: PRNGKeyArray | None = None,
    num_draws: int | None = None,
    normals: Float[Array, "draws T d"] | None = None,
) -> Float[Array, "draws T d"]:
    """Draw paths of the state given all observations: filter forward, sample backward.

    Args:
        model: the model's arrays.
        filtered: the filter's result for it.
        key: random key, with `num_draws`.
        num_draws: number of draws, with `key`.
        normals: standard normals to use instead, shape `(draws, T, d)`. For given arrays the
            path is an affine function of them.

    Returns:
        Paths, shape `(draws, T, d)`.

    Raises:
        ValueError: unless either `normals`, or both `key` and `num_draws`, are given.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro_sde.linear.kalman import kalman_filter
        >>> one = jnp.ones((1, 1))
        >>> model = LinearGaussian(
        ...     m0=jnp.zeros(1), P0=one, F=jnp.ones((1, 1, 1)), c=jnp.zeros((1, 1)),
        ...     Q=jnp.ones((1, 1, 1)), C=one, R=jnp.ones(1))
        >>> result = kalman_filter(model, jnp.array([[1.0], [0.0]]))
        >>> sample_paths(model, result, key=jax.random.key(0), num_draws=5).shape
        (5, 2, 1)
    """
    T, d = model.num_times, model.state_size
    if normals is None:
        if key is None or num_draws is None:
            raise ValueError("sample_paths needs normals, or both key and num_draws")
        normals = jax.random.normal(key, (num_draws, T, d), model.m0.dtype)
    elif key is not None or num_draws is not None:
        raise ValueError("sample_paths takes normals or key and num_draws, not both")
    if normals.ndim != 3 or normals.shape[1:] != (T, d):
        raise ValueError(f"normals must have shape (draws, {T}, {d}), got {normals.shape}")
    return draw_backward(backward_kernels(model, filtered), normals)
