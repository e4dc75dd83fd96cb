"""Exact discretisation of linear stochastic differential equations.

Over a step h, the solution of dX = (A X + b) dt + L dW with constant coefficients is

    X(t + h) = F X(t) + c + N(0, Q),   F = exp(A h),   c = int_0^h exp(A s) ds b,
    Q = int_0^h exp(A s) L L' exp(A' s) ds.

A scalar or diagonal A has closed forms. For a general one, the step is halved until
`h |A| <= 1`, where the Taylor series of all three are summed (the powers of A once, for all
steps), and then doubled back: F <- F F, c <- F c + c, Q <- F Q F' + Q. Every term of the
doubling is positive semi-definite and no exponential of -A is taken, so stiff and stable systems
neither overflow nor lose definiteness, as the block exponential of Van Loan (1978, "Computing
integrals involving the matrix exponential") does; A may be singular or zero; and for very short
steps every element of Q is accurate relative to itself (the doubling is that of C. Moler and
C. F. Van Loan, 2003, "Nineteen dubious ways to compute the exponential of a matrix", method 3).
The states are first put into units in which |A| is small (balancing, powers of 2: no rounding),
so that the number of halvings depends on the system and not on the units of measurement.

The number of doublings depends on values, so it is a loop with a hand-written reverse
derivative: reverse mode and forward-over-reverse (Hessians) work. For forward mode alone, or
reverse twice, state a bound `max_doublings`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from numpyro_sde.linear.balance import balancing_units
from numpyro_sde.linear.ranks import equal_rank
from numpyro_sde.linear.small import matmul, matvec, symmetrize, transpose, tria

_LIMIT = 60  # doublings; beyond, h |A| > 1e18 and the answer is NaN


class Transition(NamedTuple):
    """Law of the state one step on: `N(F x + c, Q)`.

    Attributes:
        F: transition matrix, shape `(..., d, d)`, or `(...)` for a scalar process.
        c: offset, `(..., d)` or `(...)`.
        Q: covariance, like `F`; from the functions ending in `_sqrt` a lower triangular
            factor `S` with `S S'` the covariance.
    """

    F: Array
    c: Array
    Q: Array


class _State(NamedTuple):
    """A transition that is being doubled.

    With a ramp r, `g = int_0^h exp(A s) ds r` over the length h so far: what the second half adds
    because the drift has grown by `h r` by then.
    """

    F: Array
    c: Array
    Q: Array
    g: Array | None = None
    h: Array | None = None


# --- shapes -----------------------------------------------------------------------------------


def _noise_matrix(L: Array, d: int) -> Array:
    """`L` as a `(d, m)` matrix, from a scalar, a diagonal or a matrix."""
    if L.ndim == 2:
        return L
    return jnp.diag(jnp.broadcast_to(L, (d,)))


def _coefficients(A: Any, b: Any, L: Any, dt: Any) -> tuple[Array, Array, Array, Array]:
    A, b, L = (jnp.asarray(x) for x in (A, b, L))
    dtype = jnp.result_type(A, b, L, float)
    A, b, L = (x.astype(dtype) for x in (A, b, L))
    dt = jnp.asarray(dt, dtype)
    if A.ndim > 2 or (A.ndim == 2 and A.shape[0] != A.shape[1]):
        raise ValueError(
            f"A must be a scalar, a diagonal (d,) or a matrix (d, d); got shape {A.shape}"
        )
    state = A.shape[:1]
    if b.shape not in ((), state):
        raise ValueError(f"b must have shape () or {state} for A of shape {A.shape}; got {b.shape}")
    fits = L.ndim <= 1 if not state else L.shape in ((), state) or (L.ndim == 2)
    if not fits or (L.ndim == 2 and L.shape[0] != state[0]):
        wanted = "() or (m,)" if not state else f"(), {state} (diagonal) or ({state[0]}, m)"
        raise ValueError(f"L must have shape {wanted} for A of shape {A.shape}; got {L.shape}")
    return A, jnp.broadcast_to(b, state), L, dt


# --- closed forms -----------------------------------------------------------------------------


def _phi1(z: Array) -> Array:
    """`(exp(z) - 1) / z`, with its derivative, accurate through zero."""
    small = jnp.abs(z) < 0.5
    series = jnp.zeros_like(z)
    for k in reversed(range(15)):  # remainder 0.5^15 / 16!, below float64 rounding
        series = series * jnp.where(small, z, 0) + 1.0 / math.factorial(k + 1)
    far = jnp.where(small, 1.0, z)
    return jnp.where(small, series, jnp.expm1(far) / far)


def _scalar(A: Array, b: Array, L: Array, h: Array) -> Transition:
    q = jnp.sum(L * L)
    return Transition(jnp.exp(A * h), b * h * _phi1(A * h), q * h * _phi1(2 * A * h))


def _scalar_sqrt(A: Array, b: Array, L: Array, h: Array) -> Transition:
    F, c, _ = _scalar(A, b, L, h)
    variance = h * _phi1(2 * A * h)
    scale = jnp.where(variance == 0, 0, jnp.sqrt(jnp.where(variance == 0, 1, variance)))
    return Transition(F, c, scale * (jnp.abs(L) if L.ndim == 0 else jnp.linalg.norm(L)))


def _diagonal(A: Array, b: Array, L: Array, h: Array) -> Transition:
    B = _noise_matrix(L, A.shape[0])
    D, sums, step = equal_rank(matmul(B, B.T), A[:, None] + A[None, :], h[..., None, None])
    rates, b, h = equal_rank(A, b, h[..., None])
    grown = jnp.exp(rates * h)[..., None]
    F = jnp.multiply(*equal_rank(grown, jnp.eye(A.shape[0], dtype=A.dtype)))
    return Transition(F, b * h * _phi1(rates * h), D * step * _phi1(sums * step))


# --- general matrices -------------------------------------------------------------------------


def _orders(dtype: Any) -> tuple[int, int, int]:
    """Terms of the series for F and for Q, and quadrature nodes, for `h |A| <= 1`."""
    return (20, 25, 8) if dtype == jnp.float64 else (12, 16, 5)


def _powers(apply: Any, first: Array, n: int) -> Array:
    """`first, apply(first), ...`, n of them stacked."""

    def step(X: Array, _: None) -> tuple[Array, Array]:
        return apply(X), X

    return lax.scan(step, first, None, length=n)[1]


def _monomials(x: Array, n: int) -> Array:
    """`x^k / k!` for k = 0, ..., n - 1, on a new last axis."""
    k = np.arange(n)
    scale = np.array([1.0 / math.factorial(i) for i in k]).astype(x.dtype)
    powers = jnp.stack([lax.integer_pow(x, int(i)) for i in k], axis=-1)
    return powers * scale.reshape(*(1,) * x.ndim, n)


def _sum_series(weights: Array, terms: Array) -> Array:
    """Weighted sums of terms: `(*n, K)` and `(K, ...)` to `(*n, ...)`."""
    return jnp.tensordot(weights, terms, axes=1, precision=lax.Precision.HIGHEST)


def _double(state: _State, sqrt: bool) -> _State:
    F, c, Q, g, h = state
    if sqrt:
        Q = tria(jnp.concatenate([matmul(F, Q), Q], axis=-1))
    else:
        Q = Q + matmul(matmul(F, Q), transpose(F))
    c = matvec(F, c) + c
    if g is None or h is None:
        return _State(matmul(F, F), c, Q)
    return _State(matmul(F, F), c + h[..., None] * g, Q, matvec(F, g) + g, 2 * h)


def _double_some(k: Array, halvings: Array, state: _State, sqrt: bool) -> _State:
    """Double the steps that were halved more than k times."""
    todo = halvings > k

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(todo.reshape(todo.shape + (1,) * (new.ndim - todo.ndim)), new, old)

    return jax.tree.map(choose, _double(state, sqrt), state)


def _loop(bound: Array, halvings: Array, state: _State, sqrt: bool) -> _State:
    return lax.fori_loop(0, bound, lambda k, carry: _double_some(k, halvings, carry, sqrt), state)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _doublings(state: _State, halvings: Array, sqrt: bool) -> _State:
    return _loop(jnp.max(halvings), halvings, state, sqrt)


def _doublings_fwd(
    state: _State, halvings: Array, sqrt: bool
) -> tuple[_State, tuple[_State, Array]]:
    return _loop(jnp.max(halvings), halvings, state, sqrt), (state, halvings)


def _doublings_bwd(sqrt: bool, kept: tuple[_State, Array], slope: _State) -> tuple[_State, None]:
    # Each level is computed again from the start: doublings are few, and storing them all
    # would mean arrays of the largest possible number of levels.
    state, halvings = kept
    bound = jnp.max(halvings)

    def back(i: Array, slope: _State) -> _State:
        k = bound - 1 - i
        level = _loop(k, halvings, state, sqrt)
        _, pull = jax.vjp(lambda s: _double_some(k, halvings, s, sqrt), level)
        return pull(slope)[0]

    return lax.fori_loop(0, bound, back, slope), None


_doublings.defvjp(_doublings_fwd, _doublings_bwd)


def _matrix(
    A: Array,
    b: Array,
    L: Array,
    h: Array,
    ramp: Array | None,
    *,
    sqrt: bool,
    max_doublings: int | None,
) -> Transition:
    """General A, for steps h of any batch shape."""
    d, (order_F, order_Q, nodes) = A.shape[0], _orders(A.dtype)
    unit = balancing_units(A)
    A, b, B = A * (unit[None, :] / unit[:, None]), b / unit, _noise_matrix(L, d) / unit[:, None]
    # Work with A tau of norm one and x = h / tau; tau is a unit of time, without effect on the
    # result and so without a derivative.
    size = lax.stop_gradient(jnp.minimum(jnp.abs(A).sum(0).max(), jnp.abs(A).sum(1).max()))
    tau = 1 / jnp.where(size > jnp.finfo(A.dtype).tiny, size, 1)
    x, A = h / tau, A * tau
    halvings = jnp.ceil(jnp.log2(jnp.maximum(lax.stop_gradient(x), 1)))
    limit = _LIMIT if max_doublings is None else max_doublings
    x = jnp.where((halvings <= limit) & (x >= 0), x, jnp.nan)
    halvings = jnp.clip(jnp.nan_to_num(halvings), 0, limit)
    x = x * jnp.exp2(-halvings)
    halvings = halvings.astype(jnp.int32)

    powers = _powers(lambda X: matmul(A, X), jnp.eye(d, dtype=A.dtype), order_F)
    weights = _monomials(x, order_Q + 1)
    F = _sum_series(weights[..., :order_F], powers)
    C1 = tau * _sum_series(weights[..., 1 : order_F + 1], powers)
    c = matvec(C1, b)
    g = length = None
    if ramp is not None:
        ramp = ramp / unit
        c = c + tau**2 * matvec(_sum_series(weights[..., 2 : order_F + 2], powers), ramp)
        g, length = matvec(C1, ramp), tau * x
    if sqrt:
        points, mass = np.polynomial.legendre.leggauss(nodes)
        shape = (*(1,) * x.ndim, nodes)
        share = jnp.asarray((points + 1) / 2, A.dtype).reshape(shape)
        weight = jnp.asarray(mass / 2, A.dtype).reshape(shape)
        at = _monomials(x[..., None] * share, order_F)
        G = _sum_series(at, matmul(powers, B))  # (*n, nodes, d, m): exp(A s) L at the nodes
        step = jnp.where(x > 0, x, 1) * tau
        G = G * jnp.sqrt(step[..., None] * weight)[..., None, None]
        G = jnp.where(x[..., None, None, None] == 0, 0, G)
        Q = tria(jnp.moveaxis(G, -3, -2).reshape(*x.shape, d, -1))
    else:
        D = _powers(lambda X: matmul(A, X) + matmul(X, A.T), matmul(B, B.T), order_Q)
        Q = tau * _sum_series(weights[..., 1:], D)
    state = _State(F, c, Q, g, length)
    if max_doublings is None:
        state = _doublings(state, halvings, sqrt)
    elif max_doublings > 0:
        state, _ = lax.scan(
            lambda carry, k: (_double_some(k, halvings, carry, sqrt), None),
            state,
            jnp.arange(max_doublings),
        )
    units = unit.reshape(*(1,) * x.ndim, d)
    rows, columns = units[..., :, None], units[..., None, :]
    Q = state.Q * rows if sqrt else symmetrize(state.Q) * (rows * columns)
    return Transition(state.F * (rows / columns), state.c * units, Q)


# --- the public functions ---------------------------------------------------------------------


# Compiled as one piece: outside jit, its many small operations would each be compiled alone.
@partial(jax.jit, static_argnames=("sqrt", "bound"))
def _steps(
    A: Array, b: Array, L: Array, h: Array, ramp: Array | None, sqrt: bool, bound: int | None
) -> Transition:
    """Transitions for steps h of any batch shape, by the form of A."""
    if A.ndim == 0:
        out = (_scalar_sqrt if sqrt else _scalar)(A, b, L, h)
    elif A.ndim == 1 and not sqrt:
        out = _diagonal(A, b, L, h)
    else:
        A = jnp.diag(A) if A.ndim == 1 else A
        out = _matrix(A, b, L, h, ramp, sqrt=sqrt, max_doublings=bound)
    # time does not run backward: NaN, since a traced step cannot be refused
    forward = h >= 0
    return Transition(
        *(jnp.where(forward.reshape(h.shape + (1,) * (x.ndim - h.ndim)), x, jnp.nan) for x in out)
    )


def transition(
    A: Float[Array, "*state_by_state"],
    b: Float[Array, "*state"],
    L: Array,
    dt: Float[Array, ""],
    *,
    max_doublings: int | None = None,
) -> Transition:
    """Exact transition of dX = (A X + b) dt + L dW over one step.

    Args:
        A: drift matrix `(d, d)`, a diagonal `(d,)`, or a scalar for a scalar process; in units
            of 1/time. Any matrix: singular, stiff, unstable.
        b: drift offset, `(d,)` or a scalar; state/time.
        L: diffusion, `(d, m)`, a diagonal `(d,)` or a scalar; state/sqrt(time). For a scalar
            process also `(m,)`.
        dt: length of the step, not negative.
        max_doublings: for a matrix `A`, a bound on `log2(dt |A|)` that makes every derivative
            available (forward mode alone, reverse twice), and NaN beyond; `None` has none.

    Returns:
        `(F, c, Q)`. The elements of Q are accurate to rounding relative to themselves as long
        as no doubling is needed, else relative to the diagonal. NaN for a negative `dt`.

    Raises:
        ValueError: if the shapes do not fit together.

    Example:
        >>> import jax.numpy as jnp
        >>> F, c, Q = transition(jnp.array(0.0), jnp.array(1.0), jnp.array(2.0), 0.5)
        >>> float(F), float(c), float(Q)  # Brownian motion with drift
        (1.0, 0.5, 2.0)
    """
    A, b, L, h = _coefficients(A, b, L, dt)
    return _steps(A, b, L, h, None, False, max_doublings)


def transition_sqrt(
    A: Float[Array, "*state_by_state"],
    b: Float[Array, "*state"],
    L: Array,
    dt: Float[Array, ""],
    *,
    ramp: Float[Array, " d"] | None = None,
    max_doublings: int | None = None,
) -> Transition:
    """Exact transition with a lower triangular factor S of its covariance, `S S' = Q`.

    The factor is found without Q: Gauss-Legendre quadrature of `exp(A s) L` gives a matrix
    whose product with its transpose is Q, and that is triangularised. Its diagonal has an error
    of about `4 eps` times the norm of its row, where a Cholesky factor of Q itself has one of
    `sqrt(eps)`: use it where Q is nearly singular, as with very short steps and noise that
    enters some components only through others (hypoelliptic systems).

    Args:
        A: as in `transition`.
        b: as in `transition`.
        L: as in `transition`.
        dt: as in `transition`.
        ramp: change of `b` in a unit of time, `(d,)`, for a matrix `A`: the offset at time s of
            the step is `b + ramp s`; None for a constant one.
        max_doublings: as in `transition`.

    Returns:
        `(F, c, S)`; for a scalar process S is the standard deviation.

    Raises:
        ValueError: if the shapes do not fit together.

    Example:
        >>> import jax.numpy as jnp
        >>> A = jnp.array([[0.0, 1.0], [0.0, 0.0]])  # position and velocity
        >>> F, c, S = transition_sqrt(A, 0.0, jnp.array([[0.0], [1.0]]), 1e-4)
        >>> bool(S[1, 1] > 0)
        True
    """
    A, b, L, h = _coefficients(A, b, L, dt)
    if ramp is not None:
        if A.ndim != 2 or jnp.shape(ramp) != A.shape[:1]:
            raise ValueError(
                f"ramp must have shape (d,) and A shape (d, d); got {jnp.shape(ramp)}, {A.shape}"
            )
        ramp = jnp.asarray(ramp, A.dtype)
    return _steps(A, b, L, h, ramp, True, max_doublings)


def distinct_steps(dt: np.ndarray, tolerance: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Distinct step lengths and the place of each step among them, found on the host.

    Differences of float64 times that mean the same step differ by rounding of the times; steps
    closer than `tolerance` are taken as one, with their mean length.

    Args:
        dt: step lengths, shape `(n,)`.
        tolerance: largest difference within a group, in units of time. `None` takes 4 float64
            roundings of the sum of the steps; for times far from zero state 4 roundings of
            the largest time.

    Returns:
        Lengths `(u,)`, ascending, and indices `(n,)` into them.

    Raises:
        ValueError: if a step is negative or not finite, or `dt` is not a vector.

    Example:
        >>> import numpy as np
        >>> lengths, index = distinct_steps(np.diff(np.array([0.1, 0.2, 0.3, 0.5])))
        >>> lengths.round(3).tolist(), index.tolist()
        ([0.1, 0.2], [0, 0, 1])
    """
    dt = np.asarray(dt, dtype=np.float64)
    if dt.ndim != 1:
        raise ValueError(f"dt must be a vector of steps, got shape {dt.shape}")
    if not np.isfinite(dt).all() or (dt < 0).any():
        raise ValueError("dt must be finite and not negative; got a step that is not")
    if dt.size == 0:
        return dt, np.zeros(0, int)
    if tolerance is None:
        tolerance = 4 * float(np.finfo(np.float64).eps) * float(dt.sum())
    order = np.argsort(dt, kind="stable")
    ordered = dt[order]
    labels = np.zeros(dt.size, int)
    start, label = ordered[0], 0
    for i, step in enumerate(ordered):
        if step - start > tolerance:
            start, label = step, label + 1
        labels[i] = label
    lengths = np.bincount(labels, weights=ordered) / np.bincount(labels)
    index = np.empty(dt.size, int)
    index[order] = labels
    return lengths, index


def transitions(
    A: Float[Array, "*state_by_state"],
    b: Float[Array, "*state"],
    L: Array,
    dt: np.ndarray | Float[Array, " n"],
    *,
    sqrt: bool = False,
    tolerance: float | None = None,
    max_doublings: int | None = None,
) -> Transition:
    """Exact transitions over a vector of steps, each distinct length computed once.

    Args:
        A: as in `transition`.
        b: as in `transition`.
        L: as in `transition`.
        dt: step lengths, shape `(n,)`. A NumPy array is looked through for distinct lengths
            before tracing (`distinct_steps`); a JAX array is taken as it is.
        sqrt: return factors, as `transition_sqrt`.
        tolerance: as in `distinct_steps`.
        max_doublings: as in `transition`.

    Returns:
        `(F, c, Q)`, or `(F, c, S)` with `sqrt`, with leading axis n.

    Raises:
        ValueError: if the shapes do not fit together, or a step on the host is negative or
            not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> transitions(-jnp.eye(2), 0.0, jnp.array(1.0), np.full(5, 0.1)).F.shape
        (5, 2, 2)
    """
    if np.ndim(dt) != 1:
        raise ValueError(f"dt must be a vector of steps, got shape {np.shape(dt)}")
    n, index = np.shape(dt)[0], None
    if isinstance(dt, np.ndarray):
        lengths, index = distinct_steps(dt, tolerance)
        dt = lengths if len(lengths) < n else dt
    A, b, L, h = _coefficients(A, b, L, dt)
    out = _steps(A, b, L, h, None, sqrt, max_doublings)
    if index is None or h.shape[0] == n:
        return out
    if h.shape[0] == 1:
        return Transition(*(jnp.broadcast_to(x, (n, *x.shape[1:])) for x in out))
    return Transition(*(x[index] for x in out))
