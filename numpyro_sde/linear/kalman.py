"""Kalman filtering of linear-Gaussian models given by arrays.

The model, at times k = 0, ..., T - 1 with a state of d and observations of p components:

    x_0 ~ N(m0, P0),   x_{k+1} = F_k x_k + c_k + N(0, Q_k),   y_k = C_k x_k + e_k + N(0, R_k).

Everything that makes the arrays (`linear.discretize`) and everything that batches them
(`jax.vmap`) is the caller's. Components of an observation are taken in one by one, after
whitening if their noise is correlated; a missing one is passed over. The recursions, the
exact score and the choice of forms are in `linear.recursions`:

- "sequential": one scan over covariances. The fastest on a CPU.
- "sqrt": one scan over square-root factors, for ill-conditioned models: precise observations
  of a vague state, nearly singular noise, float32.
- "parallel": an associative scan of logarithmic depth, for accelerators.
- "auto": "parallel" on an accelerator from 64 observed components on; else "sqrt" in float32
  with more than one state, where the covariances of the sequential form can keep too few digits
  (prior variance a million times the noise: log likelihood wrong by 6e-3, against 4e-7); else
  "sequential". The log likelihood alone is there found by covariances first, and by factors
  only where these are seen to have lost more than three digits.

Smoothing and sampling paths are in `linear.smoothing`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from numpyro_sde.linear import recursions
from numpyro_sde.linear.recursions import ScalarSteps
from numpyro_sde.linear.small import (
    cholesky,
    diagonal,
    matmul,
    solve_lower,
    symmetrize,
    transpose,
)

FORMS = ("auto", "sequential", "sqrt", "parallel")
"""Names accepted by `form=`."""

_LOG_2PI = math.log(2.0 * math.pi)
_PARALLEL_FROM = 64  # observed components; below, a few scan steps cost less than the rounds


class LinearGaussian(eqx.Module):
    """Arrays of a time-varying linear-Gaussian state-space model; see the module's opening.

    Attributes:
        m0: initial mean, shape `(d,)`. There is no transition before the first observation.
        P0: initial covariance, shape `(d, d)`; may be singular, or zero for a known state.
        F: transition matrices, shape `(T - 1, d, d)`.
        c: transition offsets, shape `(T - 1, d)`.
        Q: transition covariances, shape `(T - 1, d, d)`; may be singular.
        C: observation matrices, shape `(p, d)` or `(T, p, d)`.
        R: observation noise: variances of independent components, shape `(p,)` or `(T, p)`;
            with `correlated`, covariances of shape `(p, p)` or `(T, p, p)`.
        e: observation offsets, shape `(p,)` or `(T, p)`; `None` for zero.
        P0_factor: optional `(d, m)` matrix whose product with its transpose is `P0`; the
            square-root form, smoothing and sampling read it in place of `P0`.
        Q_factor: optional `(T - 1, d, m)` factors of `Q`, read likewise. Give them where `Q` is
            nearly singular (`discretize.transition_sqrt`): a factor found from `Q` has lost
            half of the digits.
        correlated: whether `R` holds covariance matrices.
        coupled: number of leading rows of `F` that are full, where the others are diagonal (states
            that a bank of relaxations drives): the sequential form then takes the square of `d`
            for a step, not its cube. What stands off the diagonal there is not read.

    A batch of models is made and used inside `jax.vmap`.

    Raises:
        ValueError: if the shapes do not fit together.

    Example:
        >>> import jax.numpy as jnp
        >>> one = jnp.ones((1, 1))
        >>> walk = LinearGaussian(
        ...     m0=jnp.zeros(1), P0=one, F=jnp.ones((2, 1, 1)), c=jnp.zeros((2, 1)),
        ...     Q=jnp.ones((2, 1, 1)), C=one, R=jnp.ones(1))
        >>> walk.state_size, walk.num_times
        (1, 3)
    """

    m0: Float[Array, " d"]
    P0: Float[Array, "d d"]
    F: Float[Array, "T-1 d d"]
    c: Float[Array, "T-1 d"]
    Q: Float[Array, "T-1 d d"]
    C: Array
    R: Array
    e: Array | None = None
    P0_factor: Float[Array, "d m"] | None = None
    Q_factor: Float[Array, "T-1 d m"] | None = None
    correlated: bool = eqx.field(static=True, default=False)
    coupled: int | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        """Check that the shapes fit together."""
        if not all(hasattr(x, "ndim") for x in (self.m0, self.F, self.C)):
            return  # a tree of placeholders, as transformations make
        d, n = (self.m0.shape or (0,))[-1], (self.F.shape or (0,))[0]
        p = self.C.shape[-2] if self.C.ndim > 1 else 0
        noise = (p, p) if self.correlated else (p,)
        times = n + 1
        if n == 1:  # one transition may stand for all: observations then tell how many times
            own = ((self.C, 2), (self.R, len(noise)), (self.e, 1))
            lengths = [a.shape[0] for a, rank in own if a is not None and a.ndim > rank]
            times = max([times, *lengths])
        needed: dict[str, list[Any]] = {
            "m0": [(d,)],
            "P0": [(d, d)],
            "F": [(n, d, d)],
            "c": [(n, d)],
            "Q": [(n, d, d)],
            "C": [(p, d), (times, p, d)],
            "R": [noise, (times, *noise)],
            "e": [(p,), (times, p)],
            "P0_factor": [(d, m) for m in self._columns(self.P0_factor)],
            "Q_factor": [(n, d, m) for m in self._columns(self.Q_factor)],
        }
        for name, shapes in needed.items():
            value = getattr(self, name)
            if value is not None and value.shape not in shapes:
                raise ValueError(
                    f"LinearGaussian: {name} has shape {value.shape}, needs "
                    + " or ".join(map(str, shapes))
                )

    @staticmethod
    def _columns(factor: Array | None) -> tuple[int | str, ...]:
        """Number of columns of a factor, which is free."""
        return () if factor is None else (factor.shape[-1] if factor.ndim else "m",)

    @property
    def state_size(self) -> int:
        """Number of state components, d."""
        return int(self.m0.shape[0])

    @property
    def num_times(self) -> int:
        """Number of times, T."""
        return int(self.F.shape[0]) + 1


class Filtered(NamedTuple):
    """Result of `kalman_filter`, over T times.

    Attributes:
        log_likelihood: log density of all observations.
        increments: log density of each time's observation given the earlier ones, `(T,)`.
        mean: means given the observations up to and including each time, `(T, d)`.
        cov: covariances of the same, `(T, d, d)`.
        predicted_mean: means given the observations before each time, `(T, d)`.
        predicted_cov: covariances of the same, `(T, d, d)`.
        factor: square-root factors of `cov`, from the square-root form only.
    """

    log_likelihood: Float[Array, ""]
    increments: Float[Array, " T"]
    mean: Float[Array, "T d"]
    cov: Float[Array, "T d d"]
    predicted_mean: Float[Array, "T d"]
    predicted_cov: Float[Array, "T d d"]
    factor: Float[Array, "T d d"] | None = None


# --- from vectors of observations to scalar ones ----------------------------------------------


def choose_form(
    form: str, num_components: int, state_size: int = 1, dtype: Any = jnp.float32
) -> str:
    """Resolve `form="auto"` from the default backend and the size of the problem.

    Args:
        form: one of `FORMS`; any but "auto" is returned as it is.
        num_components: number of observed components over all times.
        state_size: number of state components.
        dtype: floating type of the model's arrays.

    Raises:
        ValueError: if `form` is not one of `FORMS`.

    Example:
        >>> choose_form("auto", 10, 1, "float32")
        'sequential'
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    if form != "auto":
        return form
    if jax.default_backend() != "cpu" and num_components >= _PARALLEL_FROM:
        return "parallel"
    single = jnp.finfo(dtype).eps > 1e-10
    return "sqrt" if single and state_size > 1 else "sequential"


def scalar_observations(
    model: LinearGaussian, y: Array, mask: Array | None, num_times: int | None = None
) -> tuple[Array, Array, Array, Array]:
    """Independent scalar observations `(C, R, y)`, `(T, p, ...)`, and each time's constant.

    `num_times` is given where one transition stands for all.
    """
    T, p = model.num_times if num_times is None else num_times, model.C.shape[-2]
    if y.shape != (T, p):
        raise ValueError(f"y must have shape (T, p) = {(T, p)}, got {y.shape}")
    if mask is not None and mask.shape != (T, p):
        raise ValueError(f"mask must have shape (T, p) = {(T, p)}, got {mask.shape}")
    seen = jnp.ones((T, p), bool) if mask is None else mask.astype(bool)
    dtype = model.m0.dtype
    C = jnp.broadcast_to(model.C, (T, p, model.state_size))
    y = y if model.e is None else y - jnp.broadcast_to(model.e, (T, p))
    y = jnp.where(seen, y, 0).astype(dtype)
    C = C if mask is None else jnp.where(seen[..., None], C, 0)
    constant = -0.5 * _LOG_2PI * seen.sum(-1).astype(dtype)
    if not model.correlated:
        R = jnp.broadcast_to(model.R, (T, p))
        return C, R if mask is None else jnp.where(seen, R, 1), y, constant
    R = jnp.broadcast_to(model.R, (T, p, p)) if mask is not None else model.R
    if mask is not None:
        R = jnp.where(seen[:, :, None] & seen[:, None, :], R, jnp.eye(p, dtype=dtype))
    L = cholesky(R)
    white = solve_lower(L, jnp.concatenate([C, y[..., None]], axis=-1))
    constant = constant - jnp.log(diagonal(L)).sum(-1)
    return white[..., :-1], jnp.ones((T, p), dtype), white[..., -1], constant


def scalar_steps(
    model: LinearGaussian, y: Array, mask: Array | None, num_times: int | None = None
) -> tuple[ScalarSteps, Array]:
    """Model with one component a step, and what each time adds to the log likelihood.

    `num_times` is given where one transition stands for all.
    """
    C, R, y, constant = scalar_observations(model, y, mask, num_times)
    T, p, d = C.shape
    if mask is None and p == 1 and not model.correlated:
        # One law of the observation at all times: axes of length 1.
        C = model.C[None] if model.C.ndim == 2 else C
        R = model.R[None] if model.R.ndim == 1 else R

    def spread(x: Array, between: Array) -> Array:
        """`x_k` after the last component of time k, `between` after the others."""
        if p == 1:
            return x
        rest = jnp.broadcast_to(between, (T, p - 1, *x.shape[1:]))
        x = jnp.broadcast_to(x, (T - 1, *x.shape[1:]))
        pairs = jnp.concatenate([rest[:-1], x[:, None]], axis=1)
        return jnp.concatenate([pairs.reshape(-1, *x.shape[1:]), rest[-1]])

    zero = jnp.zeros((), model.F.dtype)
    steps = ScalarSteps(
        m0=model.m0,
        P0=model.P0,
        F=spread(model.F, jnp.eye(d, dtype=model.F.dtype)),
        c=spread(model.c, zero),
        Q=spread(model.Q, zero),
        h=C.reshape(-1, d),
        r=R.reshape(-1),
        y=y.reshape(-1),
        factor0=model.P0_factor,
        noise_factor=None if model.Q_factor is None else spread(model.Q_factor, zero),
    )
    return steps, constant


# --- filtering --------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="form")
def log_likelihood(
    model: LinearGaussian,
    y: Float[Array, "T p"],
    mask: Bool[Array, "T p"] | None = None,
    *,
    form: str = "auto",
) -> Float[Array, ""]:
    """Log density of the observations, with the exact score as its derivative.

    Far cheaper to differentiate than `kalman_filter(...).log_likelihood`, which is the same
    number: a gradient costs about three values, in any form, and forward mode and Hessians
    work.

    Args:
        model: the model's arrays; `F`, `c` and `Q` of leading axis 1 stand for all T - 1 steps.
        y: observations, shape `(T, p)`; what stands at a masked place is not read.
        mask: True where a component was observed; `None` if all were.
        form: "auto", "sequential", "sqrt" or "parallel"; see the module's opening.

    Returns:
        The log likelihood; NaN where a variance in the model is negative.

    Raises:
        ValueError: if `form` is unknown or a shape is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> one = jnp.ones((1, 1))
        >>> model = LinearGaussian(
        ...     m0=jnp.zeros(1), P0=one, F=jnp.ones((0, 1, 1)), c=jnp.zeros((0, 1)),
        ...     Q=jnp.ones((0, 1, 1)), C=one, R=jnp.ones(1))
        >>> round(float(log_likelihood(model, jnp.zeros((1, 1)))), 3)  # log N(0; 0, 2)
        -1.266
    """
    steps, constant = scalar_steps(model, y, mask, y.shape[0] if model.F.shape[0] == 1 else None)
    chosen = choose_form(form, steps.y.shape[0], model.state_size, model.m0.dtype)
    factored = not (model.P0_factor is None and model.Q_factor is None)
    form = "guarded" if form == "auto" and chosen == "sqrt" and not factored else chosen
    return recursions.log_likelihood(steps, form, model.coupled) + constant.sum()


@partial(jax.jit, static_argnames="form")
def kalman_filter(
    model: LinearGaussian,
    y: Float[Array, "T p"],
    mask: Bool[Array, "T p"] | None = None,
    *,
    form: str = "auto",
) -> Filtered:
    """Filtered and predicted moments and the increments of the log likelihood.

    Args:
        model: the model's arrays.
        y: observations, shape `(T, p)`; what stands at a masked place is not read.
        mask: True where a component was observed; `None` if all were.
        form: "auto", "sequential", "sqrt" or "parallel"; see the module's opening.

    Returns:
        A `Filtered`.

    Raises:
        ValueError: if `form` is unknown or a shape is wrong.

    Example:
        >>> import jax.numpy as jnp
        >>> one = jnp.ones((1, 1))
        >>> model = LinearGaussian(
        ...     m0=jnp.zeros(1), P0=one, F=jnp.ones((1, 1, 1)), c=jnp.zeros((1, 1)),
        ...     Q=jnp.ones((1, 1, 1)), C=one, R=jnp.ones(1))
        >>> means = kalman_filter(model, jnp.array([[1.0], [0.0]])).mean[:, 0]
        >>> [round(float(mean), 3) for mean in means]
        [0.5, 0.2]
    """
    steps, constant = scalar_steps(model, y, mask)
    form = choose_form(form, steps.y.shape[0], model.state_size, model.m0.dtype)
    p = y.shape[1]
    prediction = recursions.predict(steps, form, model.coupled)
    mean, cov = recursions.update(steps, prediction)
    increments = recursions.increments(prediction).reshape(-1, p).sum(-1) + constant
    factor = None
    if prediction.factor is not None:
        factor = recursions.update_factor(steps, prediction)[p - 1 :: p]
        cov = cov.at[p - 1 :: p].set(symmetrize(matmul(factor, transpose(factor))))
    return Filtered(
        log_likelihood=increments.sum(),
        increments=increments,
        mean=mean[p - 1 :: p],
        cov=cov[p - 1 :: p],
        predicted_mean=prediction.m[::p],
        predicted_cov=symmetrize(prediction.P[::p]),
        factor=factor,
    )
