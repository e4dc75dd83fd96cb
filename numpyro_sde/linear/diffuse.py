r"""A first state about which nothing is known: the Kalman filter with a flat start, exactly.

With a flat density, 1 everywhere, for the first state, the likelihood of the data is
`int p(y | x_0) dx_0`. It is the limit of `(2 pi k)^(d/2) p(y)` under `x_0 ~ N(0, k I)`; the diffuse
likelihood of de Jong (1991, "The diffuse Kalman filter", Annals of Statistics 19) and of Durbin
and Koopman (2012, Time Series Analysis by State Space Methods, section 5.2) is this without its
`(2 pi)^(d/2)`.

No large number takes part. Let `L(a)` be the log likelihood under `x_0 ~ N(a, P)`, with any P.
It is quadratic in a, with gradient g and Hessian -W, and since `N(x_0; a, P)` integrates to 1
over a, the flat likelihood is

    int exp L(a) da = exp(L(a) + g' W^-1 g / 2) (2 pi)^(d/2) |W|^(-1/2),

at whatever a the two are taken. They are what the backward recursion of the score ends with. An a
near the data's own estimate, found by one such step, leaves no large squares to cancel. Where the
data do not determine the first state W is singular, and the likelihood NaN.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from numpyro_sde.linear import kalman, recursions
from numpyro_sde.linear.kalman import Filtered, LinearGaussian, choose_form, scalar_steps
from numpyro_sde.linear.recursions import ScalarSteps, first_information
from numpyro_sde.linear.small import (
    cholesky,
    diagonal,
    matmul,
    matvec,
    outer,
    psd_factor,
    solve_lower,
    symmetrize,
    transpose,
    tria,
)
from numpyro_sde.linear.smoothing import BackwardKernel, backward_kernels

_LOG_2PI = math.log(2.0 * math.pi)


def _with_start(model: LinearGaussian) -> LinearGaussian:
    """The model with a first state of the width of its first step."""
    P0 = model.Q[0] if model.num_times > 1 else jnp.zeros_like(model.P0)
    return dataclasses.replace(model, P0=P0, m0=jnp.zeros_like(model.m0), P0_factor=None)


def _factor(W: Float[Array, "*n d d"]) -> tuple[Array, Array]:
    """Units `u` and lower triangular K with `W = (u K)(u K)'`; NaN where W is singular.

    A pivot that is left of a cancellation of nearly all digits is no information.
    """
    scale = jnp.sqrt(diagonal(W))
    scale = jnp.where(scale > 0, scale, jnp.nan)
    K = cholesky(W / outer(scale, scale))
    lost = jnp.min(diagonal(K), axis=-1) ** 2 < 1e3 * jnp.finfo(W.dtype).eps
    return scale, jnp.where(lost[..., None, None], jnp.nan, K)


def _log_integral(g: Float[Array, "*n d"], W: Float[Array, "*n d d"]) -> Float[Array, "*n"]:
    """Log of `int exp(g'a - a'W a / 2) da`."""
    scale, K = _factor(W)
    half = solve_lower(K, (g / scale)[..., None])[..., 0]
    log_root = jnp.log(scale).sum(-1) + jnp.log(diagonal(K)).sum(-1)
    return 0.5 * (half**2).sum(-1) - log_root + 0.5 * _LOG_2PI * g.shape[-1]


def _solve(W: Array, y: Array) -> Array:
    """`W^-1 y` for matrices y."""
    scale, K = _factor(W)
    half = solve_lower(K, y / scale[..., None])
    return solve_lower(K, half, transposed=True) / scale[..., None]


@partial(jax.jit, static_argnames="form")
def log_likelihood(
    model: LinearGaussian,
    y: Float[Array, "T p"],
    mask: Bool[Array, "T p"] | None = None,
    *,
    form: str = "auto",
) -> Float[Array, ""]:
    """Log of `int p(y | x_0) dx_0`; the model's own first law is not read.

    Args:
        model: the model's arrays.
        y: observations, shape `(T, p)`.
        mask: True where a component was observed; `None` if all were.
        form: as in `linear.kalman`.

    Returns:
        The log likelihood; NaN where the data do not determine the first state.

    Example:
        >>> import jax.numpy as jnp
        >>> one = jnp.ones((1, 1))
        >>> model = LinearGaussian(
        ...     m0=jnp.zeros(1), P0=one, F=jnp.ones((0, 1, 1)), c=jnp.zeros((0, 1)),
        ...     Q=jnp.ones((0, 1, 1)), C=one, R=jnp.ones(1))
        >>> abs(float(log_likelihood(model, jnp.ones((1, 1))))) < 1e-6  # one datum, no residual
        True
    """
    steps, constant = scalar_steps(_with_start(model), y, mask)
    form = choose_form(form, steps.y.shape[0], model.state_size, model.m0.dtype)
    steps = steps._replace(m0=_estimate(steps, form))
    W, g = first_information(steps, form)
    return recursions.log_likelihood(steps, form) + constant.sum() + _log_integral(g, W)


def _estimate(steps: ScalarSteps, form: str) -> Float[Array, " d"]:
    """The data's own estimate of the first state, a constant."""
    steps = lax.stop_gradient(steps)
    W, g = first_information(steps, form)
    found = steps.m0 + _solve(W, g[:, None])[:, 0]
    return jnp.where(jnp.isfinite(found), found, steps.m0)


@partial(jax.jit, static_argnames="form")
def kalman_filter(
    model: LinearGaussian,
    y: Float[Array, "T p"],
    mask: Bool[Array, "T p"] | None = None,
    *,
    form: str = "auto",
) -> tuple[Filtered, BackwardKernel]:
    """Moments and increments under a flat start.

    Until the data determine the first state there are no moments: the means are NaN and the
    variances infinite. The increments are 0 until then, and the first one is the log likelihood of
    all data so far.

    Args:
        model: as in `log_likelihood`.
        y: as in `log_likelihood`.
        mask: as in `log_likelihood`.
        form: as in `log_likelihood`.

    Returns:
        The filter's result, and the law of each state given the next, which is a proper one
        at all times.
    """
    dtype = model.m0.dtype
    model = _with_start(model)
    steps, _ = scalar_steps(model, y, mask)
    chosen = choose_form(form, steps.y.shape[0], model.state_size, dtype)
    start = _estimate(steps, chosen)

    def run(m0: Array) -> tuple[tuple[Array, Array, Array], Filtered]:
        result = kalman.kalman_filter(dataclasses.replace(model, m0=m0), y, mask, form=chosen)
        return (result.mean, result.predicted_mean, result.increments), result

    # All three are affine in the start, or quadratic, so that these derivatives are constants.
    (M, M_before, slopes), result = jax.jacfwd(run, has_aux=True)(start)
    curvature = jax.jacfwd(jax.jacfwd(lambda m0: run(m0)[0][2]))(start)
    g, W = jnp.cumsum(slopes, axis=0), -symmetrize(jnp.cumsum(curvature, axis=0))
    unknown = jnp.isfinite(W).all((-2, -1)) & jnp.isnan(_factor(W)[1]).any((-2, -1))
    total = jnp.cumsum(result.increments) + _log_integral(g, W)
    total = jnp.where(unknown, 0, total)
    mean, cov = _integrated(result.mean, result.cov, M, g, W, unknown)
    first = jnp.zeros_like(W[:1])
    W_before, g_before = jnp.concatenate([first, W[:-1]]), jnp.concatenate([first[0, :1], g[:-1]])
    never = jnp.ones(1, bool)
    before = (
        *(result.predicted_mean, result.predicted_cov, M_before, g_before, W_before),
        jnp.concatenate([never, unknown[:-1]]),
    )
    predicted_mean, predicted_cov = _integrated(*before)
    filtered = Filtered(
        log_likelihood=jnp.where(unknown[-1], jnp.nan, total[-1]),
        increments=jnp.diff(total, prepend=jnp.zeros(1, dtype)),
        mean=mean,
        cov=cov,
        predicted_mean=predicted_mean,
        predicted_cov=predicted_cov,
    )
    kernel = backward_kernels(dataclasses.replace(model, m0=start), result)
    return filtered, _kernel(model, result, kernel, M, g, W, filtered)


def _integrated(
    mean: Array, cov: Array, M: Array, g: Array, W: Array, unknown: Array
) -> tuple[Array, Array]:
    """Moments after the start has been integrated out, where it is determined."""
    eye = jnp.eye(mean.shape[-1], dtype=mean.dtype)
    W = jnp.where(unknown[:, None, None], eye, W)
    spread = _solve(W, transpose(M))
    mean = mean + matvec(transpose(spread), g)
    cov = symmetrize(cov + matmul(M, spread))
    nothing = jnp.where(eye == 1, jnp.inf, jnp.nan)
    return (
        jnp.where(unknown[:, None], jnp.nan, mean),
        jnp.where(unknown[:, None, None], nothing, cov),
    )


def _kernel(
    model: LinearGaussian,
    result: Filtered,
    kernel: BackwardKernel,
    M: Array,
    g: Array,
    W: Array,
    filtered: Filtered,
) -> BackwardKernel:
    """Law of each state given the next, the start integrated out.

    Given the start it is `kernel`; the next state is one more observation of the start.
    """
    F, M, g, W = model.F, M[:-1], g[:-1], W[:-1]
    ahead = matvec(F, result.mean[:-1]) + model.c
    B = matmul(F, M)
    seen = _solve(result.predicted_cov[1:], B)  # S^-1 B
    scale, K = _factor(W + symmetrize(matmul(transpose(B), seen)))
    D = M - matmul(kernel.gain, B)
    spread = transpose(solve_lower(K, transpose(D / scale[..., None, :])))
    # weight = D (W + B' S^-1 B)^-1
    weight = transpose(solve_lower(K, transpose(spread), transposed=True)) / scale[..., None, :]
    gain = kernel.gain + matmul(weight, transpose(seen))
    offset = kernel.offset[:-1] + matvec(weight, g - matvec(transpose(seen), ahead))
    factor = tria(jnp.concatenate([kernel.factor[:-1], spread], axis=-1))
    return BackwardKernel(
        gain=gain,
        offset=jnp.concatenate([offset, filtered.mean[-1:]]),
        factor=jnp.concatenate([factor, psd_factor(filtered.cov[-1:])]),
    )
