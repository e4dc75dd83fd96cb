r"""Natural-gradient steps of `GaussianMarkovPath`: the conjugate update, in closed form.

A Gaussian path with a block-tridiagonal precision has natural parameters h and J with blocks
`J_kk`, `J_{k,k+1}`. In its mean parameters the gradient of `E log p(x, y)` is, by the theorems of
Bonnet and Price,

    J*_kk = -E d_k d_k log p,  J*_{k,k+1} = -E d_k d_{k+1} log p,  h*_k = E d_k log p + (J* m)_k,

so that a step of natural gradient of size r is `(1 - r) (h, J) + r (h*, J*)` (Khan and Lin 2017,
"Conjugate-computation variational inference"; for paths of SDEs Hu, Smith and Linderman 2025,
"SING: SDE inference via natural gradients"). A step of size one ends at the smoothing law where the
model is linear and Gaussian; elsewhere the best of several sizes is taken, by the bound itself.
Expectations are over pairs of states, by quadrature.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from numpyro_sde.guides.path_laws import GaussianMarkovPath, Place
from numpyro_sde.guides.steps import pull_of
from numpyro_sde.linear.small import cholesky, diagonal, matvec, solve_lower, transpose
from numpyro_sde.statespace.guide import log_emission
from numpyro_sde.statespace.model import StateSpaceModel

# Sizes of a step of which the best is taken; the first keeps what there is.
_SIZES = (0.0, 0.05, 0.2, 0.5, 1.0)


class Natural(NamedTuple):
    """Natural parameters of a Gaussian path in deviations from the reference.

    Attributes:
        h: precision times mean, `(N, d)`.
        J: blocks of the precision on its diagonal, `(N, d, d)`.
        K: blocks between neighbours, `(N - 1, d, d)`.
    """

    h: Float[Array, "N d"]
    J: Float[Array, "N d d"]
    K: Float[Array, "N-1 d d"]


class Chain(NamedTuple):
    """The same path by its steps: `d_{k+1} = M d_k + v + P z`, from `d_0 = m + S z`.

    Attributes:
        m: mean of the first state, `(d,)`; S: factor of its covariance, `(d, d)`, zero if known.
        M: gains, `(N - 1, d, d)`; v: offsets, `(N - 1, d)`; P: factors, `(N - 1, d, d)`.
    """

    m: Array
    S: Array
    M: Array
    v: Array
    P: Array


def natural_steps(
    law: GaussianMarkovPath,
    model: StateSpaceModel,
    place: Place,
    start: Any,
    local: dict[str, Array],
    num_steps: int,
) -> tuple[dict[str, Array], dict[str, Array], Array]:
    """Improve the parameters of one path by natural-gradient steps at fixed model parameters.

    Args:
        law: the family.
        model: the path and its instruments.
        place: where it stands.
        start: law of the first state.
        local: parameters of the law.
        num_steps: steps.

    Returns:
        New parameters, those of the start, and the bound before each step and at the end.
    """
    _check(model, place)
    known = place.start == "fixed"

    def step(state: Natural, _: None) -> tuple[Natural, Array]:
        chain = to_chain(state, known)
        target = _target(law, model, place, chain)
        sizes = jnp.asarray(_SIZES, state.h.dtype)

        def at(size: Array) -> tuple[Natural, Array]:
            moved = jax.tree.map(lambda a, b: a + size * (b - a), state, target)
            bound = _bound(law, model, place, to_chain(moved, known), known)
            return moved, jnp.where(jnp.isfinite(bound), bound, -jnp.inf)

        moved, bounds = jax.vmap(at)(sizes)
        best = jnp.argmax(bounds)
        return jax.tree.map(lambda a: a[best], moved), bounds[0]

    first = to_natural(_from_law(law, place, start, local), known)
    last, bounds = lax.scan(step, first, None, num_steps)
    chain = to_chain(last, known)
    end = _bound(law, model, place, chain, known)
    new, first_state = _to_law(place, start, chain)
    return new, first_state, jnp.append(bounds, end)


def _check(model: StateSpaceModel, place: Place) -> None:
    if place.start == "general":
        raise ValueError(
            "natural-gradient steps need a first state that is known or normal: train this guide "
            "by SVI"
        )
    if model.state_shape is not None:
        raise ValueError(
            "natural-gradient steps need noise without a memory: train this guide by SVI"
        )


# --- natural parameters and steps ---------------------------------------------------------------


def to_natural(chain: Chain, known: bool) -> Natural:
    """Natural parameters of a chain; a known first state has precision zero of its own."""
    W = jax.vmap(_inverse)(chain.P)
    Q = transpose(W) @ W  # precision of a step
    MQ = transpose(chain.M) @ Q
    N, d = chain.v.shape[0] + 1, chain.v.shape[1]
    J = jnp.zeros((N, d, d), Q.dtype).at[1:].add(Q).at[:-1].add(MQ @ chain.M)
    h = jnp.zeros((N, d), Q.dtype).at[1:].add(matvec(Q, chain.v)).at[:-1].add(-matvec(MQ, chain.v))
    if not known:
        W0 = _inverse(chain.S)
        J, h = J.at[0].add(W0.T @ W0), h.at[0].add(W0.T @ (W0 @ chain.m))
    return Natural(h, J, -MQ)


def to_chain(natural: Natural, known: bool) -> Chain:
    """The steps of a path from its natural parameters, by elimination from the end."""

    def step(carry: tuple[Array, Array], now: Any) -> tuple[Any, Any]:
        Lam, lam = carry
        h, J, K = now
        root = cholesky(Lam)
        half = solve_lower(root, jnp.concatenate([transpose(K), lam[:, None]], 1))
        back = solve_lower(root, half, transposed=True)
        M, v = -back[:, :-1], back[:, -1]
        P = solve_lower(root, jnp.eye(len(lam), dtype=lam.dtype), transposed=True)
        rest = J - half[:, :-1].T @ half[:, :-1], h - half[:, :-1].T @ half[:, -1]
        return rest, (M, v, P)

    first = (natural.J[-1], natural.h[-1])
    inputs = (natural.h[:-1], natural.J[:-1], natural.K)
    (Lam, lam), (M, v, P) = lax.scan(step, first, inputs, reverse=True)
    d = lam.shape[0]
    if known:
        return Chain(jnp.zeros(d, lam.dtype), jnp.zeros((d, d), lam.dtype), M, v, P)
    root = cholesky(Lam)
    m = solve_lower(root, solve_lower(root, lam[:, None]), transposed=True)[:, 0]
    S = solve_lower(root, jnp.eye(d, dtype=lam.dtype), transposed=True)
    return Chain(m, S, M, v, P)


def _inverse(P: Array) -> Array:
    """Inverse of a triangular or general square factor."""
    return jnp.linalg.inv(P)


def _moments(chain: Chain) -> tuple[Array, Array]:
    """Means `(N, d)` and factors of covariances `(N, d, d)`."""

    def step(carry: tuple[Array, Array], now: Any) -> tuple[Any, Any]:
        (m, C), (M, v, P) = carry, now
        new = (matvec(M, m) + v, M @ C @ M.T + P @ P.T)
        return new, new

    first = chain.m, chain.S @ chain.S.T
    _, (means, covs) = lax.scan(step, first, (chain.M, chain.v, chain.P))
    means = jnp.concatenate([first[0][None], means])
    covs = jnp.concatenate([first[1][None], covs])
    return means, jax.vmap(_root)(covs)


def _root(C: Array) -> Array:
    """A factor of a covariance that may be zero."""
    info = jnp.finfo(C.dtype)
    return cholesky(C + jnp.diag(jnp.maximum(diagonal(C) * (4.0 * info.eps), info.tiny)))


# --- expectations -------------------------------------------------------------------------------


def _pairs(chain: Chain) -> tuple[Array, Array]:
    """Means `(N - 1, 2 d)` and factors `(N - 1, 2 d, 2 d)` of neighbours."""
    means, roots = _moments(chain)
    both = jnp.concatenate([means[:-1], means[1:]], 1)
    top = jnp.concatenate([roots[:-1], jnp.zeros_like(chain.P)], 2)
    low = jnp.concatenate([chain.M @ roots[:-1], chain.P], 2)
    return both, jnp.concatenate([top, low], 1)


def _nodes(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights for a standard normal vector."""
    if size > 4:
        unit = np.sqrt(size) * np.eye(size)
        return np.concatenate([unit, -unit]), np.full(2 * size, 0.5 / size)
    points, weights = np.polynomial.hermite_e.hermegauss(5 if size <= 2 else 3)
    grid = np.stack(np.meshgrid(*[points] * size, indexing="ij"), -1).reshape(-1, size)
    mass = np.stack(np.meshgrid(*[weights / weights.sum()] * size, indexing="ij"), -1)
    return grid, mass.reshape(-1, size).prod(1)


def _expected(fn: Any, mean: Array, root: Array) -> Array:
    points, weights = (jnp.asarray(a, mean.dtype) for a in _nodes(mean.size))
    values = jax.vmap(lambda e: fn(mean + matvec(root, e)))(points)
    return jnp.sum(weights * values)


def _step_density(law: GaussianMarkovPath, model: StateSpaceModel) -> Any:
    """`log p(x' | x)` of a step in deviations, from `(d, d')` and the step's inputs."""
    size = model.dim

    def density(step: Any, ends: Any, pair: Array) -> Array:
        t, dt, cache = step
        x = law.state_of(model, pair[:size], ends[0])
        x_next = law.state_of(model, pair[size:], ends[1])
        log_p = model.scheme.log_density(
            model.sde, t, dt, model.to_state(x), model.to_state(x_next), cache
        )
        more = pair[size:] / ends[1] if model.sde.positive else jnp.zeros_like(pair[size:])
        return log_p + jnp.sum(more)

    return density


def _terms(law: GaussianMarkovPath, model: StateSpaceModel, place: Place) -> tuple[Any, Any, Any]:
    """Inputs of all steps, and the log densities of a step and of what is seen at a time."""
    reference = place.along.guide.reference
    ends = (reference[:-1], reference[1:])

    def seen(data: Any, ref: Array, d: Array) -> Array:
        return log_emission(model, data, law.state_of(model, d, ref))

    return (model.step_inputs(), ends), _step_density(law, model), seen


def _start_density(model: StateSpaceModel, place: Place, d: Array) -> Array:
    """`log p(x_0)` of a normal start."""
    gap = place.along.guide.reference[0] + d - model.init_mean
    root = cholesky(model.init_cov)
    z = solve_lower(root, gap[:, None])[:, 0]
    return -0.5 * jnp.sum(z**2 + jnp.log(2.0 * jnp.pi)) - jnp.sum(jnp.log(diagonal(root)))


def _target(law: GaussianMarkovPath, model: StateSpaceModel, place: Place, chain: Chain) -> Natural:
    """Natural parameters that a step of size one leads to."""
    (steps, ends), density, seen = _terms(law, model, place)
    means, roots = _moments(chain)
    pairs, factors = _pairs(chain)
    size = model.dim

    def of_pair(step: Any, ends: Any, mean: Array, root: Array) -> tuple[Array, Array]:
        def value(mean: Array) -> Array:
            return _expected(lambda u: density(step, ends, u), mean, root)

        slope, curve = jax.grad(value)(mean), jax.hessian(value)(mean)
        return slope - curve @ mean, -curve

    def of_state(data: Any, ref: Array, mean: Array, root: Array) -> tuple[Array, Array]:
        def value(mean: Array) -> Array:
            return _expected(lambda d: seen(data, ref, d), mean, root)

        slope, curve = jax.grad(value)(mean), jax.hessian(value)(mean)
        return slope - curve @ mean, -curve

    linear, precision = jax.vmap(of_pair)(steps, ends, pairs, factors)
    data = jax.tree.map(jnp.asarray, model.observation_inputs())
    h, J = jax.vmap(of_state)(data, place.along.guide.reference, means, roots)
    h = h.at[:-1].add(linear[:, :size]).at[1:].add(linear[:, size:])
    J = J.at[:-1].add(precision[:, :size, :size]).at[1:].add(precision[:, size:, size:])
    if place.start == "normal":
        zero = jnp.zeros(size, h.dtype)
        h = h.at[0].add(jax.grad(lambda d: _start_density(model, place, d))(zero))
        J = J.at[0].add(-jax.hessian(lambda d: _start_density(model, place, d))(zero))
    return Natural(h, J, precision[:, :size, size:])


def _bound(
    law: GaussianMarkovPath, model: StateSpaceModel, place: Place, chain: Chain, known: bool
) -> Array:
    """The evidence bound of one path at fixed parameters, by the same quadrature."""
    (steps, ends), density, seen = _terms(law, model, place)
    means, roots = _moments(chain)
    pairs, factors = _pairs(chain)
    total = jnp.sum(
        jax.vmap(lambda s, e, m, r: _expected(lambda u: density(s, e, u), m, r))(
            steps, ends, pairs, factors
        )
    )
    data = jax.tree.map(jnp.asarray, model.observation_inputs())
    total = total + jnp.sum(
        jax.vmap(lambda a, ref, m, r: _expected(lambda d: seen(a, ref, d), m, r))(
            data, place.along.guide.reference, means, roots
        )
    )
    count = chain.v.size
    entropy = jnp.sum(jnp.linalg.slogdet(chain.P)[1])
    if not known:
        total = total + _expected(lambda d: _start_density(model, place, d), means[0], roots[0])
        entropy, count = entropy + jnp.linalg.slogdet(chain.S)[1], count + chain.m.size
    return total + entropy + 0.5 * count * (1.0 + jnp.log(2.0 * jnp.pi))


# --- from and to the parameters of the guide ----------------------------------------------------


def _from_law(law: GaussianMarkovPath, place: Place, start: Any, local: dict[str, Array]) -> Chain:
    """The chain of the law at its present parameters: its affine steps, read off."""
    guide, (A, c, B) = place.along.guide, place.along.linear[:3]
    d = A.shape[-1]
    control = law.control(place)

    def one(A: Array, c: Array, B: Array, H: Array, e: Array, own: Any) -> tuple[Array, ...]:
        L, factor = _whitening(H, e, B), _lower(own["factor"])

        def mean_of(x: Array) -> Array:
            ahead = matvec(A, x) + c
            pull = pull_of(H, e, x, ahead, ahead, B)
            shift, _ = control(own, pull)
            w = solve_lower(pull.L, (pull.half + shift)[:, None], transposed=True)[:, 0]
            return ahead + _times(B, w)

        zero = jnp.zeros(d, A.dtype)
        P = _times(B, solve_lower(L, factor, transposed=True))
        return jax.jacfwd(mean_of)(zero), mean_of(zero), P

    M, v, P = jax.vmap(one)(A, c, B, guide.H[1:], guide.e[1:], local)
    if place.start == "fixed":
        return Chain(jnp.zeros(d, A.dtype), jnp.zeros((d, d), A.dtype), M, v, P)
    zero = jnp.zeros(d, A.dtype)
    m = start.draw(zero)[0] - guide.reference[0]
    S = jax.jacfwd(lambda z: start.draw(z)[0])(zero)
    return Chain(m, S, M, v, P)


def _to_law(place: Place, start: Any, chain: Chain) -> tuple[dict[str, Array], dict[str, Array]]:
    """Parameters of the law, and of the first state, with which it is this chain."""
    guide, (A, c, B) = place.along.guide, place.along.linear[:3]

    def one(
        A: Array, c: Array, B: Array, H: Array, e: Array, M: Array, v: Array, P: Array
    ) -> dict[str, Array]:
        L = _whitening(H, e, B)

        def shift_of(x: Array) -> Array:
            ahead = matvec(A, x) + c
            half = pull_of(H, e, x, ahead, ahead, B).half
            w = _over(B, (matvec(M, x) + v - ahead)[:, None])[:, 0]
            return matvec(transpose(L), w) - half

        zero = jnp.zeros_like(v)
        spread = _over(B, P)
        F = transpose(L) @ spread
        F = cholesky(F @ F.T)
        factor = jnp.tril(F, -1) + jnp.diag(jnp.log(diagonal(F)))
        gain = jax.jacfwd(shift_of)(zero) * place.spread[None]
        return {"shift": shift_of(zero), "gain": gain, "factor": factor}

    new = jax.vmap(one)(A, c, B, guide.H[1:], guide.e[1:], chain.M, chain.v, chain.P)
    if place.start == "fixed":
        return new, {}
    shift, whitened = start.whitened(guide.reference[0] + chain.m, chain.S)
    F = cholesky(whitened @ whitened.T)
    return new, {"shift": shift, "factor": jnp.tril(F, -1) + jnp.diag(jnp.log(diagonal(F)))}


def _whitening(H: Array, e: Array, B: Array) -> Array:
    zero = jnp.zeros_like(e)
    return pull_of(H, e, zero, zero, zero, B).L


def _lower(factor: Array) -> Array:
    return jnp.tril(factor, -1) + jnp.diag(jnp.exp(diagonal(factor)))


def _times(B: Array, w: Array) -> Array:
    if B.ndim == 2:
        return B @ w
    return B * w if w.ndim == 1 else B[:, None] * w


def _over(B: Array, w: Array) -> Array:
    return w / B[:, None] if B.ndim == 1 else jnp.linalg.solve(B, w)
