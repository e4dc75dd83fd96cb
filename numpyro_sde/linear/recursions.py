"""Forward and backward recursions of a linear-Gaussian model with one observation a step.

The engine room of `numpyro_sde.linear.kalman`. The model is

    x_0 ~ N(m0, P0),   y_k = h_k' x_k + N(0, r_k),   x_{k+1} = F_k x_k + c_k + N(0, Q_k),

with scalar observations: a vector of them with independent noise is a run of steps with
F = I, c = 0, Q = 0 between (Koopman and Durbin, 2000, "Fast filtering and smoothing for
multivariate state space models"). A missing one has h = 0, r = 1, y = 0, which adds nothing.

Two recursions are sequential; all else is computed outside them for all steps at once.

- Forward, on Z = [P | m], the predicted moments, a (d, d + 1) matrix. With s = h'P h + r,
  k = F P h / s and L = F - k h', the update and the prediction are one symmetric product,
  P <- L P L' + r k k' + Q, m <- L m + k y + c: the stabilised form of Joseph at the price of
  the plain one. Three ways lead to it: in sequence, in sequence on square-root factors, and
  by an associative scan (Särkkä and García-Fernández, 2021, "Temporal parallelization of
  Bayesian smoothers"). A fourth takes the first, looks how many digits it has lost, and
  takes the second where they are too many.
- Backward, on [N | n], the information in the observations from k on about x_k:
  n <- L'n + h v / s, N <- L'N L + h h'/s, with v = y - h'm (Bryson and Frazier, 1963;
  de Jong, 1989). It is affine, so it too has an associative form.

The score is then closed: the derivative of the log likelihood by the predicted mean is n, by
the predicted covariance G = (n n' - N) / 2, and those by F, c, Q, h, r, y follow (after
Koopman and Shephard, 1992, "Exact score for time series models in state space form"). So the
gradient costs one more recursion of the same kind, without stored intermediates, whatever
the form of the forward pass; `log_likelihood` gives it to JAX as a `custom_jvp`, a sum of
products with the tangents, which forward and reverse mode (and both again, for Hessians) take.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from numpyro_sde.linear.coupled import (
    is_dense,
    slope_of_transition,
    through,
    times,
    transposed_times,
)
from numpyro_sde.linear.ranks import equal_rank
from numpyro_sde.linear.running_products import running
from numpyro_sde.linear.small import (
    diagonal,
    inverse_one_plus,
    matmul,
    matvec,
    outer,
    psd_factor,
    symmetrize,
    transpose,
    tria,
)


class ScalarSteps(NamedTuple):
    """A model with one scalar observation a step: `n` steps, `d` states.

    `F`, `c`, `Q`, `h`, `r` and `noise_factor` that are the same at every step have a leading axis
    of 1, and so have their derivatives: sums over the steps, made without a matrix for each.
    `noise_factor` and `factor0` are square-root factors of `Q` and `P0`, read by the
    square-root form in place of them.
    """

    m0: Float[Array, " d"]
    P0: Float[Array, "d d"]
    F: Float[Array, "n-1 d d"]
    c: Float[Array, "n-1 d"]
    Q: Float[Array, "n-1 d d"]
    h: Float[Array, "n d"]
    r: Float[Array, " n"]
    y: Float[Array, " n"]
    factor0: Float[Array, "d d"] | None = None
    noise_factor: Float[Array, "n-1 d d"] | None = None


class Prediction(NamedTuple):
    """Predicted moments of every step and the innovation of its observation.

    `v` is the innovation, `s` its variance, `K` the gain of the update; `factor` is the
    square-root factor of `P` where the square-root form made it.
    """

    m: Float[Array, "n d"]
    P: Float[Array, "n d d"]
    v: Float[Array, " n"]
    s: Float[Array, " n"]
    K: Float[Array, "n d"]
    factor: Float[Array, "n d d"] | None = None


def _augment(P: Array, m: Array) -> Array:
    return jnp.concatenate([P, m[..., None]], axis=-1)


def _through(L: Array, Z: Array) -> Array:
    """`[L P L' | L m]` of `Z = [P | m]`."""
    W = matmul(L, Z)
    return _augment(matmul(W[..., :-1], transpose(L)), W[..., -1])


def _dot(a: Array, b: Array) -> Array:
    return (a * b).sum(-1)


def _early(x: Array) -> Array:
    """All steps but the last; what stands at every step stays."""
    return x if x.shape[0] == 1 else x[:-1]


def _late(x: Array) -> Array:
    """All steps but the first; what stands at every step stays."""
    return x if x.shape[0] == 1 else x[1:]


def _summed(x: Array, like: Array) -> Array:
    """Derivatives of each step, or their sum where `like` stands at every step."""
    return x.sum(0, keepdims=True) if like.shape[0] == 1 else x


def _scan(
    step: Callable[[Array, tuple[Array, ...]], Array], start: Array, arrays: tuple[Array, ...]
) -> Array:
    """All states from the start on, stepwise through arrays of which some stand at every step."""
    length = arrays[-1].shape[0]  # of the data, which always move
    moving = [None if a.shape[0] == 1 else a for a in arrays]

    def one(Z: Array, now: list[Array | None]) -> tuple[Array, Array]:
        Z = step(Z, tuple(a[0] if x is None else x for a, x in zip(arrays, now, strict=True)))
        return Z, Z

    # where the scan itself is differentiated, recomputing a step beats storing its parts
    _, Z = lax.scan(jax.checkpoint(one), start, moving, length=length)
    return jnp.concatenate([start[None], Z])


# --- forward ----------------------------------------------------------------------------------


def _scan_covariances(steps: ScalarSteps, coupled: int | None = None) -> Float[Array, "n d d+1"]:
    """Predicted `[P | m]` of every step, by one `lax.scan`."""
    d, dense = steps.m0.shape[-1], is_dense(steps.F, coupled)

    def step(Z: Array, x: tuple[Array, ...]) -> Array:
        F, Q, c, h, r, y = x
        u = matvec(Z[:, :d], h)
        k = matvec(F, u) / (_dot(u, h) + r)
        if dense:
            Z = _through(F - outer(k, h), Z)
        else:
            Z = through(partial(times, F, coupled=coupled), k, h, Z)
        return Z + outer(k, jnp.append(r * k, y)) + _augment(Q, c)

    return _scan(step, _augment(steps.P0, steps.m0), (steps.F, steps.Q, steps.c, *_before(steps)))


def _before(steps: ScalarSteps) -> tuple[Array, Array, Array]:
    """The observations before each transition."""
    return _early(steps.h), _early(steps.r), steps.y[:-1]


def _scan_factors(steps: ScalarSteps) -> Float[Array, "n d d+1"]:
    """Predicted `[S | m]` of every step, with `S S' = P`, by one `lax.scan`.

    Potter's update of the factor, then a triangularisation of `[F S, Q^(1/2)]` (Kailath, Sayed
    and Hassibi, 2000, Linear Estimation, chapter 12).
    """
    d = steps.m0.shape[-1]
    S0 = psd_factor(steps.P0) if steps.factor0 is None else steps.factor0
    B = psd_factor(steps.Q) if steps.noise_factor is None else steps.noise_factor

    def step(Z: Array, x: tuple[Array, ...]) -> Array:
        F, B, c, h, r, y = x
        S, m = Z[:, :d], Z[:, d]
        f = matvec(transpose(S), h)
        s = _dot(f, f) + r
        K = matvec(S, f) / s
        S = S - outer(K, f) / (1 + jnp.sqrt(r / s))
        m = matvec(F, m + K * (y - _dot(h, m))) + c
        return _augment(tria(jnp.concatenate([matmul(F, S), B], axis=-1)), m)

    return _scan(step, _augment(S0, steps.m0), (steps.F, B, steps.c, *_before(steps)))


_MOST_LOST = 1e6


def _loses_digits(steps: ScalarSteps, Z: Array) -> Array:
    """Whether the covariances of some step were found as differences of far larger numbers.

    An update leaves `h'P h = s - r` of s, and of a variance p its part after the observation: in
    the product with `F - k h'` rounding of the size `eps (s p)^(1/2)` stands beside `(r p')^(1/2)`.
    A transition makes a variance of terms that may cancel, of the size `(|F| p'^(1/2))^2`. A ratio
    of squares above 1e6 is a loss of more than three digits; NaN counts as one.
    """
    P = Z[..., :-1]
    h, r, _ = _before(steps)
    u = matvec(P[:-1], h)
    s = _dot(u, h) + r
    before, after = diagonal(P[:-1]), diagonal(P[:-1]) - u * u / s[:, None]
    ok = s[:, None] * before <= _MOST_LOST * r[:, None] * after
    size = matvec(jnp.abs(steps.F), jnp.sqrt(jnp.maximum(after, 0.0)))
    ok = ok & (size * size <= _MOST_LOST * diagonal(P[1:]))
    return ~jnp.all(ok)


class _Seen(NamedTuple):
    """Predicted `[P | m]` of every step with `P h` and `h' P h`, which P alone may not tell."""

    Z: Float[Array, "n d d+1"]
    u: Float[Array, "n d"]
    spread: Float[Array, " n"]


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _scan_guarded(steps: ScalarSteps, coupled: int | None) -> _Seen:
    """Predictions by covariances where they keep their digits, else by factors.

    What a batch of models needs is decided for all of them.
    """
    by_covariances = _seen(steps, _scan_covariances(steps, coupled))

    # A loop of one round or none: under `vmap` it runs if any element asks for it, where both
    # branches of a `cond` would run.
    def once(carry: tuple[Array, _Seen]) -> tuple[Array, _Seen]:
        return jnp.zeros_like(carry[0]), _seen_by_factors(steps, _scan_factors(steps))

    todo = _loses_digits(steps, lax.stop_gradient(by_covariances.Z))
    return lax.while_loop(lambda carry: carry[0], once, (todo, by_covariances))[1]


def _seen(steps: ScalarSteps, Z: Float[Array, "n d d+1"]) -> _Seen:
    u = matvec(Z[..., :-1], steps.h)
    return _Seen(Z, u, _dot(u, steps.h))


def _seen_by_factors(steps: ScalarSteps, Z: Float[Array, "n d d+1"]) -> _Seen:
    """Of predicted `[S | m]`."""
    S = Z[..., :-1]
    f = matvec(transpose(S), steps.h)
    return _Seen(_augment(matmul(S, transpose(S)), Z[..., -1]), matvec(S, f), _dot(f, f))


@_scan_guarded.defjvp
def _scan_guarded_jvp(
    coupled: int | None,  # noqa: ARG001
    primals: tuple[ScalarSteps],
    tangents: tuple[ScalarSteps],
) -> tuple[_Seen, _Seen]:
    # The loop has no reverse derivative; the factors are good wherever it leads.
    return jax.jvp(lambda steps: _seen_by_factors(steps, _scan_factors(steps)), primals, tangents)


class _Element(NamedTuple):
    """p(x_j | y_i..y_j, x_i) = N(A x_i + b, C), p(y_i..y_j | x_i) ~ exp(eta'x_i - x_i'J x_i/2)."""

    A: Array
    b: Array
    C: Array
    eta: Array
    J: Array


def _compose(first: _Element, second: _Element) -> _Element:
    """Combine two neighbouring elements (Särkkä and García-Fernández, 2021, lemma 8)."""
    M = inverse_one_plus(second.J, first.C)
    AM = matmul(second.A, transpose(M))
    AtM = matmul(transpose(first.A), M)
    return _Element(
        A=matmul(AM, first.A),
        b=matvec(AM, first.b + matvec(first.C, second.eta)) + second.b,
        C=symmetrize(matmul(matmul(AM, first.C), transpose(second.A))) + second.C,
        eta=matvec(AtM, second.eta - matvec(second.J, first.b)) + first.eta,
        J=symmetrize(matmul(matmul(AtM, second.J), first.A)) + first.J,
    )


def _associate(steps: ScalarSteps) -> Float[Array, "n d d+1"]:
    """Predicted `[P | m]` of every step, by an associative scan of logarithmic depth."""
    n = steps.y.shape[0]
    steps = steps._replace(
        **{
            name: jnp.broadcast_to(x, (n - (name in "FcQ"), *x.shape[1:]))
            for name, x in zip("FcQhr", (steps.F, steps.c, steps.Q, steps.h, steps.r), strict=True)
        }
    )
    h, y = steps.h[1:], steps.y[1:]
    u = matvec(steps.Q, h)
    s = _dot(u, h) + steps.r[1:]
    hF = matvec(transpose(steps.F), h)
    m, P = _update(steps.c, steps.Q, u / s[:, None], y - _dot(h, steps.c), h, steps.r[1:])
    rest = _Element(
        A=steps.F - outer(u / s[:, None], hF),
        b=m,
        C=P,
        eta=hF * ((y - _dot(h, steps.c)) / s)[:, None],
        J=outer(hF, hF) / s[:, None, None],
    )
    u = matvec(steps.P0, steps.h[0])
    K, v = u / (_dot(u, steps.h[0]) + steps.r[0]), steps.y[0] - _dot(steps.h[0], steps.m0)
    m, P = _update(steps.m0, steps.P0, K, v, steps.h[0], steps.r[0])
    start = _Element(jnp.zeros_like(P), m, P, jnp.zeros_like(m), jnp.zeros_like(P))
    elements = _Element(*(jnp.concatenate([a[None], b]) for a, b in zip(start, rest, strict=True)))
    one = jnp.eye(steps.m0.shape[-1], dtype=P.dtype)
    neutral = _Element(one, jnp.zeros_like(m), 0 * one, jnp.zeros_like(m), 0 * one)
    filtered = running(_compose, elements, neutral)
    m, P = filtered.b[:-1], filtered.C[:-1]
    m, P = matvec(steps.F, m) + steps.c, matmul(matmul(steps.F, P), transpose(steps.F)) + steps.Q
    return jnp.concatenate([_augment(steps.P0, steps.m0)[None], _augment(symmetrize(P), m)])


def _update(m: Array, P: Array, K: Array, v: Array, h: Array, r: Array) -> tuple[Array, Array]:
    """Moments after one scalar observation, in Joseph's form."""
    one, Kh = equal_rank(jnp.eye(m.shape[-1], dtype=m.dtype), outer(K, h))
    A = one - Kh
    P = matmul(matmul(A, P), transpose(A)) + r[..., None, None] * outer(K, K)
    return m + K * v[..., None], symmetrize(P)


def predict(steps: ScalarSteps, form: str, coupled: int | None = None) -> Prediction:
    """Predicted moments and innovations of every step.

    `form` is "sequential", "sqrt", "parallel" or "guarded"; see the module's opening. Of `F` only
    the first `coupled` rows are full, the others diagonal, where that is given.
    """
    S = None
    if form == "sqrt":
        Z = _scan_factors(steps)
        S, seen = Z[..., :-1], _seen_by_factors(steps, Z)
    elif form == "guarded":
        seen = _scan_guarded(steps, coupled)
    elif form == "parallel":
        seen = _seen(steps, _associate(steps))
    else:
        seen = _seen(steps, _scan_covariances(steps, coupled))
    P, m, u, s = seen.Z[..., :-1], seen.Z[..., -1], seen.u, seen.spread + steps.r
    # A variance below zero anywhere spoils its step, so that a wrong sign cannot pass.
    bad = (steps.r < 0) | (diagonal(P) < 0).any(-1)
    s = jnp.where(bad, jnp.nan, s)
    return Prediction(m, P, steps.y - _dot(steps.h, m), s, u / s[:, None], S)


def increments(prediction: Prediction) -> Float[Array, " n"]:
    """Log likelihood of each observation given the earlier ones, less its `-log(2 pi) / 2`."""
    return -0.5 * (jnp.log(prediction.s) + prediction.v**2 / prediction.s)


def update(steps: ScalarSteps, p: Prediction) -> tuple[Array, Array]:
    """Moments after each step's observation: means `(n, d)` and covariances `(n, d, d)`."""
    return _update(p.m, p.P, p.K, p.v, steps.h, steps.r)


def update_factor(steps: ScalarSteps, p: Prediction) -> Float[Array, "n d d"]:
    """Square-root factors of the covariances after each step's observation."""
    if p.factor is None:
        raise ValueError("update_factor needs a prediction made with form='sqrt'")
    f = matvec(transpose(p.factor), steps.h)
    return p.factor - outer(p.K, f) / (1 + jnp.sqrt(steps.r / p.s))[:, None, None]


# --- backward ---------------------------------------------------------------------------------


def affine_backward(
    L: Float[Array, "n-1 d d"], B: Float[Array, "n d d+1"], form: str
) -> Float[Array, "n d d+1"]:
    """Solve `N_k = L_k' N_{k+1} L_k + B_k`, `n_k = L_k' n_{k+1} + b_k` backward from the end.

    Args:
        L: the maps, one fewer than the steps.
        B: the additions `[B | b]`; the last of them is the end value.
        form: "parallel" for an associative scan, else one `lax.scan`.

    Returns:
        `[N | n]` of every step.
    """
    d = L.shape[-1]

    if form != "parallel":

        def step(Z: Array, x: tuple[Array, Array]) -> tuple[Array, Array]:
            Z = _through(transpose(x[0]), Z) + x[1]
            return Z, Z

        _, Z = lax.scan(step, B[-1], (L, B[:-1]), reverse=True)
        return jnp.concatenate([Z, B[-1:]])

    def compose(later: tuple[Array, Array], earlier: tuple[Array, Array]) -> tuple[Array, Array]:
        return matmul(later[0], earlier[0]), _through(transpose(earlier[0]), later[1]) + earlier[1]

    ends = jnp.concatenate([L, jnp.zeros_like(B[-1:, :, :d])])
    neutral = (jnp.eye(d, dtype=L.dtype), jnp.zeros_like(B[-1]))
    return running(compose, (ends[::-1], B[::-1]), neutral)[1][::-1]


def _information(
    steps: ScalarSteps, p: Prediction, form: str, coupled: int | None = None
) -> Float[Array, "n d d+1"]:
    """What the observations from each step on say about its state, `[N | n]`."""
    h, k = steps.h, matvec(steps.F, p.K[:-1])
    w = p.v / p.s
    seen = jnp.concatenate([h / p.s[:, None], w[:, None]], axis=-1)
    if form == "parallel" or is_dense(steps.F, coupled):
        return affine_backward(steps.F - outer(k, _early(h)), outer(h, seen), form)

    def step(Z: Array, x: tuple[Array, ...]) -> Array:
        F, h, k, seen = x
        return through(partial(transposed_times, F, coupled=coupled), h, k, Z) + outer(h, seen)

    arrays = steps.F[::-1], _early(h)[::-1], k[::-1], seen[:-1][::-1]
    return _scan(step, outer(h[-1], seen[-1]), arrays)[::-1]


def first_information(
    steps: ScalarSteps, form: str
) -> tuple[Float[Array, "d d"], Float[Array, " d"]]:
    """Minus the Hessian, and the gradient, of the log likelihood by the mean of the first state."""
    Z = _information(steps, predict(steps, form), form)
    return symmetrize(Z[0, :, :-1]), Z[0, :, -1]


def _score(steps: ScalarSteps, p: Prediction, form: str, coupled: int | None = None) -> ScalarSteps:
    """Derivatives of the log likelihood by every array of the model."""
    h, F = steps.h, steps.F
    w, k = p.v / p.s, matvec(F, p.K[:-1])
    Z = _information(steps, p, form, coupled)
    N, n = Z[..., :-1], Z[..., -1]
    G = 0.5 * (outer(n, n) - N)
    G_later = _summed(G[1:], steps.Q)
    # just after each observation that information is F'n and F'N F; there is none after the last
    zero = jnp.zeros_like(h[:1])
    n_after = jnp.concatenate([matvec(transpose(F), n[1:]), zero])
    NK = jnp.concatenate([matvec(transpose(F), matvec(N[1:], k)), zero])  # F'N F K
    m = p.m + p.K * p.v[:, None]
    if p.factor is None:
        P = p.P - outer(p.K, p.K) * p.s[:, None, None]
    else:
        S = update_factor(steps, p)
        P = matmul(S, transpose(S))
    e = w - _dot(p.K, n_after)  # smoothed innovation and its precision
    D = 1 / p.s + _dot(p.K, NK)
    return ScalarSteps(
        m0=n[0],
        P0=G[0],
        F=slope_of_transition(F, n[1:], m[:-1], G[1:], P[:-1], coupled),
        c=_summed(n[1:], steps.c),
        Q=G_later,
        h=_summed(e[:, None] * (m + matvec(P, n_after)) - p.K + matvec(P, NK), h),
        r=_summed(0.5 * (e * e - D), steps.r),
        y=-e,
        factor0=None if steps.factor0 is None else 2 * matmul(G[0], steps.factor0),
        noise_factor=(
            None if steps.noise_factor is None else 2 * matmul(G_later, steps.noise_factor)
        ),
    )


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def log_likelihood(steps: ScalarSteps, form: str, coupled: int | None = None) -> Float[Array, ""]:
    """Log likelihood of all observations, less `log(2 pi) / 2` for each, with its exact score.

    The derivative is the closed form in the module's opening, so a gradient costs about
    three times the value for every `form`. In the square-root form, `factor0` and
    `noise_factor` where given take the derivative that `P0` and `Q` would have taken.
    """
    return increments(predict(steps, form, coupled)).sum()


def _log_likelihood_jvp(
    form: str, coupled: int | None, primals: tuple[ScalarSteps], tangents: tuple[ScalarSteps]
) -> tuple[Array, Array]:
    (steps,), (dots,) = primals, tangents
    prediction = predict(steps, form, coupled)
    gradient = _score(steps, prediction, form, coupled)
    # A factor that was given was read instead of its covariance, and only by this form.
    ignored = {
        "P0": form == "sqrt" and steps.factor0 is not None,
        "Q": form == "sqrt" and steps.noise_factor is not None,
        "factor0": form != "sqrt",
        "noise_factor": form != "sqrt",
    }
    out = jnp.zeros_like(prediction.s[0])
    for name, slope, dot in zip(ScalarSteps._fields, gradient, dots, strict=True):
        if slope is None or dot is None or isinstance(dot, SymbolicZero) or ignored.get(name):
            continue
        out = out + (slope * dot).sum()
    return increments(prediction).sum(), out


log_likelihood.defjvp(_log_likelihood_jvp, symbolic_zeros=True)
