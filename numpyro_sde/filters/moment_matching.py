"""Gaussian moment matching: the first two moments of the SDE itself, closed by a Gaussian.

With X ~ N(m, P) at every time, the Fokker-Planck-Kolmogorov equation gives

    dm/dt = E f(t, X),    dP/dt = E f (X - m)' + E (X - m) f' + E L L'(t, X).

The expectations are taken by quadrature. Särkkä and Solin (2019), "Applied Stochastic
Differential Equations", section 9.1; Solin, Tamir and Verma (2021), "Scalable inference in SDEs
by direct matching of the Fokker-Planck-Kolmogorov equation", arXiv:2110.15739.

The covariance is not integrated as such. With A = E f (X - m)' P^-1, the statistical
linearisation of the drift (where P is all but singular: the averaged Jacobian, its equal by
Stein's identity), and d Phi/dt = A Phi, d Y/dt = -Y A (so that Y = Phi^-1),
d M/dt = Y E LL' Y', it is P(t) = Phi (P(0) + M) Phi'. One Runge-Kutta step of order four on
(m, Phi, Y, M) has positive weights, so M is a sum of squares at every stage. Only a factor of
it is kept, and S in P = S S' comes from the columns of Phi [S(0), ...] by orthogonal reduction:
no covariance can become indefinite, not even by rounding. P(0) Phi' is the cross covariance
that smoothing needs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from equinox.internal import unvmap_any
from jax import lax
from jaxtyping import Array, Float

from numpyro_sde.linear.balance import fastest_rate
from numpyro_sde.linear.small import diagonal, matmul, psd_factor, solve_lower, transpose, tria
from numpyro_sde.schemes import MomentClosure
from numpyro_sde.statespace.checks import (
    EMISSIONS,
    check_brownian,
    check_choice,
    check_count,
    check_moments,
)
from numpyro_sde.statespace.exact import check_affine
from numpyro_sde.statespace.gaussian import run_gaussian
from numpyro_sde.statespace.model import AbstractFilter, FilterResult, StateSpaceModel
from numpyro_sde.statespace.quadrature import QuadratureRule, cubature, gauss_hermite, unscented
from numpyro_sde.statespace.updates import (
    choose_update,
    regress,
    sigma_point_update,
    with_valid_inputs,
)

QUADRATURES = ("auto", "cubature", "unscented", "gauss_hermite")

_State = tuple[Array, Array, Array]
"""Mean, Phi and Y."""

_TABLEAU = np.array([[0.0, 1 / 6], [0.5, 1 / 3], [0.5, 1 / 3], [1.0, 1 / 6]])
"""Node and weight of each stage of the classical Runge-Kutta method."""

# Largest product of a Runge-Kutta step and the drift's fastest rate. The method is stable to 2.7;
# here covariances, which move at twice the rate, are right to 3e-4 in one step.
_RATE_TIMES_STEP = 0.25
_ROUNDS = 7  # on each of two levels

_NARROW, _WIDE = 1e-3, 1e-2  # shares of a variance at which the linearisation changes its source


class MomentMatching(AbstractFilter):
    """Continuous-discrete Gaussian filter that matches the moments of the SDE.

    It integrates the moment equations between grid times and does not use the path's scheme:
    a coarse grid costs accuracy only through `substeps`, so there is no discretisation of the
    path to refine. `E[L L']` is averaged, not taken at the mean; for geometric Brownian motion
    both moments are exact. Wrong where the law between observations is far from Gaussian
    (bistable systems, small copy numbers): use `closure_check` before trusting it. The drift
    must be differentiable.

    Args:
        quadrature: "cubature" (`2 d` points), "unscented" (`2 d + 1`), "gauss_hermite"
            (`order ** d`), or "auto": Gauss-Hermite up to three states, else cubature.
        order: points of the Gauss-Hermite rule in each dimension.
        substeps: Runge-Kutta steps for each grid step, at least. The error falls with its fourth
            power. Where the drift's mean Jacobian A asks for shorter ones, `|A| h > 0.25`, more are
            taken, up to 49 times as many; a step that would need more is NaN, never integrated
            past the method's bound of stability.
        emission: for emissions that are not Gaussian, "laplace" (Laplace approximation about
            the mode) or "moments" (conditional mean and covariance, averaged).
        newton_steps: damped Newton steps of the Laplace approximation.

    Raises:
        ValueError: an option out of range, or a rule with too many points.
        TypeError: a count that is no integer.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.filters.MomentMatching("gauss_hermite", order=7).order
        7
    """

    quadrature: str = eqx.field(static=True)
    order: int = eqx.field(static=True)
    substeps: int = eqx.field(static=True)
    emission: str = eqx.field(static=True)
    newton_steps: int = eqx.field(static=True)

    def __init__(
        self,
        quadrature: str = "auto",
        *,
        order: int = 5,
        substeps: int = 4,
        emission: str = "laplace",
        newton_steps: int = 10,
    ) -> None:
        check_choice("quadrature", quadrature, QUADRATURES)
        check_count("order", order, least=2)
        check_count("substeps", substeps)
        check_choice("emission", emission, EMISSIONS)
        check_count("newton_steps", newton_steps)
        self.quadrature = quadrature
        self.order = order
        self.substeps = substeps
        self.emission = emission
        self.newton_steps = newton_steps

    def rule(self, d: int) -> QuadratureRule:
        """The quadrature rule for d states."""
        if self.quadrature == "gauss_hermite" or (self.quadrature == "auto" and d <= 3):
            return gauss_hermite(d, self.order)
        return unscented(d) if self.quadrature == "unscented" else cubature(d)

    def check(self, model: StateSpaceModel) -> None:
        check_brownian(model, "MomentMatching()", continuous=True)
        check_moments(model, "MomentMatching()", self.emission)
        check_affine(model, "MomentMatching()")
        follows = model.sde.is_diffusion and model.scheme.approximates_sde
        if not (follows or (model.sde.is_diffusion and not model.scheme_chosen)):
            otherwise = (
                "leave the scheme out, or use Particle() or EnsembleKalman(), which take its steps"
            )
            raise ValueError(
                "MomentMatching() integrates the moments of the SDE's drift and diffusion and uses "
                f"no scheme: what {type(model.scheme).__name__}() adds to them would be dropped; "
                f"{model.scheme.remedy(otherwise)}"
            )
        self.rule(model.dim)

    def filter(self, model: StateSpaceModel) -> FilterResult:
        self.check(model)
        model = with_valid_inputs(model)
        rule = self.rule(model.dim)

        def predict(mean: Array, cov: Array, now: Any) -> tuple[Array, Array, Array]:
            t, dt, cache = now
            if isinstance(model.scheme, MomentClosure):
                return model.scheme.propagate(model.sde, dt, mean, cov)
            inside = model.in_step(t, cache)
            if not model.has_events:
                return matched_moments(inside, rule, t, dt, mean, cov, self.substeps)
            S = psd_factor(cov)
            mean, G, rest = regress(rule, lambda x: _opened(model, x, cache), mean, S)
            cov, shared = matmul(G, transpose(G)) + rest, matmul(S, transpose(G))
            return matched_moments(inside, rule, t, dt, mean, cov, self.substeps, shared)

        update = choose_update(sigma_point_update(rule), self.emission, self.newton_steps)
        return run_gaussian(model, predict, update)


def _opened(model: StateSpaceModel, x: Array, cache: Any) -> tuple[Array, Array]:
    """State after the events that open a step, and its covariance given the one before: none."""
    return model.open_step(x, cache), jnp.zeros((model.dim, model.dim), x.dtype)


def matched_moments(
    model: StateSpaceModel,
    rule: QuadratureRule,
    t: Any,
    dt: Any,
    mean: Float[Array, " d"],
    cov: Float[Array, "d d"],
    substeps: int,
    shared: Float[Array, "d d"] | None = None,
) -> tuple[Float[Array, " d"], Float[Array, "d d"], Float[Array, "d d"]]:
    """Integrate the moment equations over one grid step.

    Args:
        model: the model; its drift and diffusion are used.
        rule: quadrature rule for its number of states.
        t: time at the start.
        dt: length of the step.
        mean: mean at the start.
        cov: covariance at the start; may be singular.
        substeps: number of Runge-Kutta steps.
        shared: covariance of an earlier state with that at the start; None for `cov`.

    Returns:
        Mean and covariance at the end, and the covariance of the earlier state, or that at the
        start, with the one at the end.
    """
    eye = jnp.eye(mean.shape[0], dtype=cov.dtype)
    dt = jnp.asarray(dt, cov.dtype)

    def advance(carry: _Carry) -> _Carry:
        h = _safe_length(model, rule, t + (dt - carry.left), carry, substeps)

        def one(carry: _Carry, _: None) -> tuple[_Carry, None]:
            now = t + (dt - carry.left)
            mean, S, phi = _runge_kutta(model, rule, now, h, carry.mean, carry.S)
            return _Carry(mean, S, matmul(phi, carry.transition), carry.left - h), None

        whole = h * substeps >= carry.left
        carry, _ = lax.scan(jax.checkpoint(one), carry, None, substeps)
        return carry._replace(left=jnp.where(whole, 0.0, carry.left))

    def rounds(again: Any) -> Any:
        """Do it as long as anything is left, in a batch as long as in any of its elements."""

        def body(carry: _Carry, _: None) -> tuple[_Carry, None]:
            return lax.cond(unvmap_any(carry.left > 0), again, lambda c: c, carry), None

        return lambda carry: lax.scan(body, carry, None, _ROUNDS)[0]

    start = _Carry(mean, psd_factor(cov), eye, dt)
    # Two levels: where one round is enough the others cost next to nothing.
    end = rounds(rounds(advance))(start)
    settled = end.left <= 0
    mean, S, transition = (jnp.where(settled, a, jnp.nan) for a in end[:3])
    earlier = cov if shared is None else shared
    return mean, matmul(S, transpose(S)), matmul(earlier, transpose(transition))


class _Carry(NamedTuple):
    """Mean, factor of the covariance, transition so far and time that is left of the step."""

    mean: Array
    S: Array
    transition: Array
    left: Array


def _safe_length(
    model: StateSpaceModel, rule: QuadratureRule, t: Any, carry: _Carry, substeps: int
) -> Array:
    """Length of each of the next Runge-Kutta steps: of all that is left, or as the drift allows."""
    weights = jnp.asarray(rule.weights, carry.mean.dtype)
    z = jnp.asarray(rule.points, carry.mean.dtype)
    points = carry.mean[None] + matmul(z, transpose(carry.S))
    jacobians = jax.vmap(jax.jacfwd(lambda x: model.drift(t, x)))(points)
    rate = lax.stop_gradient(fastest_rate(jnp.tensordot(weights, jacobians, 1)))
    wanted = carry.left / substeps
    allowed = _RATE_TIMES_STEP / jnp.where(rate > 0, rate, 1.0)
    return jnp.where(wanted * rate > _RATE_TIMES_STEP, allowed, jnp.maximum(wanted, 0.0))


def _runge_kutta(
    model: StateSpaceModel, rule: QuadratureRule, t: Any, h: Any, mean: Array, S: Array
) -> tuple[Array, Array, Array]:
    """One step of order four: mean, factor of the covariance, transition matrix."""
    eye = jnp.eye(mean.shape[0], dtype=S.dtype)
    start = (mean, eye, eye)

    def stage(carry: tuple[_State, Array, _State], tableau: Array) -> tuple[Any, Array]:
        slope, noise, total = carry
        step, weight = tableau[0] * h, tableau[1] * h
        m, phi, inverse = jax.tree.map(lambda a, b: a + step * b, start, slope)
        columns = jnp.concatenate([S, _root(step) * noise], axis=1)
        Ef, A, Q = _expectations(model, rule, t + step, h, m, tria(matmul(phi, columns)))
        slope = (Ef, matmul(A, phi), -matmul(inverse, A))
        noise = matmul(inverse, psd_factor(Q))
        total = jax.tree.map(lambda a, b: a + weight * b, total, slope)
        return (slope, noise, total), _root(weight) * noise

    # A loop, not four copies of the drift's code: compilation is what such a step costs most.
    still = (jax.tree.map(jnp.zeros_like, start), jnp.zeros_like(S), start)
    (_, _, (mean, phi, _)), noises = lax.scan(stage, still, jnp.asarray(_TABLEAU, S.dtype))
    columns = jnp.concatenate([S, *noises], axis=1)
    return mean, tria(matmul(phi, columns)), phi


def _root(x: Array) -> Array:
    """Square root whose derivative at 0, the first node, is 0."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)


def _expectations(
    model: StateSpaceModel, rule: QuadratureRule, t: Any, h: Any, m: Array, S: Array
) -> tuple[Array, Array, Array]:
    """Mean drift, its statistical linearisation and mean `L L'` under `N(m, S S')`."""
    weights = jnp.asarray(rule.weights, m.dtype)
    z = jnp.asarray(rule.points, m.dtype)

    def at(x: Array) -> tuple[Array, Array, Array]:
        def with_aux(x: Array) -> tuple[Array, Array]:
            drift = model.drift(t, x)
            return drift, drift

        jacobian, drift = jax.jacfwd(with_aux, has_aux=True)(x)
        L = model.factor(t, x)
        return drift, jacobian, matmul(L, transpose(L))

    drifts, jacobians, noises = jax.vmap(at)(m[None] + matmul(z, transpose(S)))
    drift, jacobian, noise = (jnp.tensordot(weights, v, 1) for v in (drifts, jacobians, noises))
    slopes = matmul(transpose((drifts - drift[None]) * weights[:, None]), z)
    return drift, _linearization(S, slopes, jacobian, noise, h, m), noise


def _linearization(
    S: Array, slopes: Array, jacobian: Array, noise: Array, h: Any, m: Array
) -> Array:
    """A matrix A with `A S = E f z'`, as far as the belief is wide enough to tell.

    For an exact rule A is the mean Jacobian. The regression is the better of the two for wide
    beliefs, since f is smoother than its derivative; in directions in which the state hardly
    varies, against its size, its other directions and what one step adds, it attributes the
    rule's error to them, magnified. The Jacobian takes over there, smoothly.
    """
    drifted = h * matmul(jacobian, S)
    size = jnp.sum(S**2 + drifted**2, axis=1) + h * diagonal(noise)
    size = size + jnp.finfo(m.dtype).eps * m**2
    pivots = diagonal(S)
    root = _root(size)  # by sds: in small units the derivative of a ratio of variances overflows
    share = (pivots / jnp.where(root > 0, root, 1.0)) ** 2
    u = jnp.clip((jnp.min(share) - _NARROW) / (_WIDE - _NARROW), 0.0, 1.0)
    S = S + jnp.diag(jnp.where(share > _NARROW, 0.0, 1.0).astype(S.dtype))
    excess = slopes - matmul(jacobian, S)
    excess = transpose(solve_lower(S, transpose(excess), transposed=True))
    return jacobian + u**2 * (3.0 - 2.0 * u) * excess
