"""Conditioning a Gaussian belief about one state on one observation.

Three ways, shared by all filters that carry a mean and a covariance:

- a linear observation, exactly, in the form of Joseph, which cannot lose positive
  semi-definiteness (Bar-Shalom, Li and Kirubarajan 2001, section 5.2);
- a statistical linearisation over sigma points (Särkkä 2013, "Bayesian Filtering and
  Smoothing", section 5.4), written as a regression on whitened coordinates, so that neither
  the prior covariance nor the residual one is ever inverted or subtracted from another;
- the Laplace approximation for emissions that are not Gaussian (Fahrmeir and Kaufmann 1991;
  Rasmussen and Williams 2006, section 3.4): Newton's method for the mode of
  `p(y | x) N(x; m, P)`, differentiated implicitly.

A component that is missing drops out exactly: its row of the observation matrix is zero and
its noise an independent unit variance, so it adds nothing to any sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from numpyro_sde.linear.small import (
    cholesky,
    congruence,
    diagonal,
    matmul,
    matvec,
    outer,
    psd_factor,
    solve,
    solve_lower,
    symmetrize,
    transpose,
)
from numpyro_sde.schemes.dependence import reaches_output
from numpyro_sde.statespace.gaussian import Update
from numpyro_sde.statespace.model import Instrument, StateSpaceModel
from numpyro_sde.statespace.quadrature import QuadratureRule

Belief = tuple[Array, Array, Array]
"""Mean `(d,)`, covariance `(d, d)` and log density of the observation."""

LOG_2PI = math.log(2.0 * math.pi)

_STEP_SIZES = (1.0, 0.5, 0.25, 0.125, 0.03125, 4.0**-4, 4.0**-6, 4.0**-8, 4.0**-10, 0.0)


def linear_update(
    mean: Float[Array, " d"],
    cov: Float[Array, "d d"],
    residual: Float[Array, " p"],
    H: Float[Array, "p d"],
    R: Float[Array, "p p"],
    present: Bool[Array, " p"],
) -> Belief:
    """Condition `N(mean, cov)` on `y = expected + H (x - mean) + N(0, R)`.

    Args:
        mean: mean of the state.
        cov: its covariance; may be singular.
        residual: `y - expected`; anything where missing.
        H: observation matrix.
        R: covariance of the noise.
        present: which components were observed.

    Returns:
        Mean and covariance given the observation, and its log density. NaN where the
        covariance of the observation is singular.

    Example:
        >>> import jax.numpy as jnp
        >>> one = jnp.ones((1, 1))
        >>> mean, cov, _ = linear_update(
        ...     jnp.zeros(1), one, jnp.ones(1), one, one, jnp.array([True]))
        >>> round(float(mean[0]), 4), round(float(cov[0, 0]), 4)
        (0.5, 0.5)
    """
    d = H.shape[1]
    residual, H, R = drop_missing(residual, H, R, present)
    HP = matmul(H, cov)
    L = cholesky(symmetrize(matmul(HP, transpose(H))) + R)
    white = solve_lower(L, jnp.concatenate([residual[:, None], HP], axis=1))
    gain = transpose(solve_lower(L, white[:, 1:], transposed=True))
    keep = jnp.eye(d, dtype=cov.dtype) - matmul(gain, H)
    log_density = -0.5 * jnp.sum(white[:, 0] ** 2) - jnp.sum(jnp.log(diagonal(L)))
    log_density = log_density - 0.5 * LOG_2PI * jnp.sum(present)
    return (
        mean + matvec(transpose(white[:, 1:]), white[:, 0]),
        congruence(keep, cov) + congruence(gain, R),
        log_density,
    )


def drop_missing(
    residual: Float[Array, " p"],
    H: Float[Array, "p d"],
    R: Float[Array, "p p"],
    present: Bool[Array, " p"],
) -> tuple[Float[Array, " p"], Float[Array, "p d"], Float[Array, "p p"]]:
    """Make missing components of a linear observation say nothing, at unit noise of their own."""
    both = present[:, None] & present[None, :]
    return (
        jnp.where(present, residual, 0.0),
        jnp.where(present[:, None], H, 0.0),
        jnp.where(both, R, jnp.eye(R.shape[0], dtype=R.dtype)),
    )


def covariance_uses_state(instrument: Instrument, inputs: Any, x: Float[Array, " d"]) -> bool:
    """Whether the covariance of an observation depends on the state, by its trace.

    Conservative: it may say yes wrongly, never no.
    """
    jaxpr = jax.make_jaxpr(lambda x: instrument.moments(inputs, x)[1])(x).jaxpr
    return reaches_output(jaxpr, 0)


def linearize(
    instrument: Instrument, inputs: Any, x: Float[Array, " d"]
) -> tuple[Float[Array, " p"], Float[Array, "p p"], Float[Array, "p d"]]:
    """Mean and covariance of an observation of `x`, and the Jacobian of the mean."""

    def with_aux(x: Array) -> tuple[Array, tuple[Array, Array]]:
        mean, cov = instrument.moments(inputs, x)
        return mean, (mean, cov)

    jacobian, (mean, cov) = jax.jacfwd(with_aux, has_aux=True)(x)
    return mean, cov, jacobian


def linearized_update(iterations: int = 1) -> Update:
    """Make the update of the extended filter: the emission linearised about a point.

    With more than one iteration the point moves on to the updated mean, a Gauss-Newton search
    for the mode (Bell and Cathey 1993).
    """

    def update(mean: Array, cov: Array, instrument: Instrument, data: Any) -> Belief:
        inputs, y, present = data

        def about(x: Array) -> Belief:
            expected, R, H = linearize(instrument, inputs, x)
            residual = y - expected - matvec(H, mean - x)
            return linear_update(mean, cov, residual, H, R, present)

        point = mean
        if iterations > 1:
            point, _ = lax.scan(lambda x, _: (about(x)[0], None), mean, None, iterations - 1)
        return about(point)

    return update


def sigma_point_update(rule: QuadratureRule) -> Update:
    """Make the update that linearises the emission statistically over a rule's points."""

    def update(mean: Array, cov: Array, instrument: Instrument, data: Any) -> Belief:
        inputs, y, present = data
        S = psd_factor(cov)
        expected, G, R = regress(rule, lambda x: instrument.moments(inputs, x), mean, S)
        zero, eye = jnp.zeros_like(mean), jnp.eye(mean.shape[0], dtype=cov.dtype)
        z, cov_z, log_density = linear_update(zero, eye, y - expected, G, R, present)
        return mean + matvec(S, z), congruence(S, cov_z), log_density

    return update


def regress(
    rule: QuadratureRule,
    moments: Callable[[Array], tuple[Array, Array]],
    mean: Float[Array, " d"],
    S: Float[Array, "d d"],
) -> tuple[Float[Array, " p"], Float[Array, "p d"], Float[Array, "p p"]]:
    """Best linear prediction of an output from the whitened state, over a rule's points.

    The output given the state `x = mean + S z`, `z ~ N(0, I)`, has the moments
    `moments(x)`.

    Returns:
        Mean of the output, its regression matrix `G` on `z`, and the covariance that is left,
        so that the covariance of the output is `G G' + rest`, and with `x` it is `S G'`.
    """
    z = jnp.asarray(rule.points, mean.dtype)
    w, wc = jnp.asarray(rule.weights, mean.dtype), jnp.asarray(rule.cov_weights, mean.dtype)
    means, covs = jax.vmap(moments)(mean[None] + matmul(z, transpose(S)))
    center = jnp.tensordot(w, means, 1)
    deviations = means - center[None]
    G = matmul(transpose(deviations * wc[:, None]), z)
    rest = deviations - matmul(z, transpose(G))
    spread = matmul(transpose(rest * wc[:, None]), rest)
    return center, G, symmetrize(spread + jnp.tensordot(w, covs, 1))


def laplace_update(newton_steps: int) -> Update:
    """Make the update by the Laplace approximation at the mode of the posterior."""

    def update(mean: Array, cov: Array, instrument: Instrument, data: Any) -> Belief:
        inputs, y, present = data
        S = psd_factor(cov)

        def emission(z: Array) -> Array:
            return instrument.log_prob(inputs, mean + matvec(S, z), y, present)

        z, B, log_density = laplace(emission, jnp.zeros_like(mean), newton_steps)
        root = solve_lower(B, transpose(S))
        return mean + matvec(S, z), symmetrize(matmul(transpose(root), root)), log_density

    return update


def laplace(
    log_emission: Callable[[Array], Array], start: Float[Array, " d"], newton_steps: int
) -> tuple[Float[Array, " d"], Float[Array, "d d"], Float[Array, ""]]:
    """Laplace approximation of `exp(log_emission(z)) N(z; 0, I)`.

    Args:
        log_emission: log density of the observation given `z`; twice differentiable.
        start: where the search for the mode starts.
        newton_steps: number of damped Newton steps.

    Returns:
        The mode, the lower Cholesky factor of the negative Hessian there, and the log of the
        normaliser. Derivatives of all three are those of the mode, by the implicit function
        theorem, whatever the number of steps.

    Example:
        >>> import jax.numpy as jnp
        >>> z, B, log_z = laplace(lambda z: -0.5 * jnp.sum((z - 2.0) ** 2), jnp.zeros(1), 3)
        >>> z.tolist(), round(float(log_z), 4)
        ([1.0], -1.3466)
    """

    def objective(z: Array) -> Array:
        return log_emission(z) - 0.5 * jnp.sum(z**2)

    def tangent_solve(linear: Callable[[Array], Array], rhs: Array) -> Array:
        # Solved against I first: the result must be a linear map of the right-hand side.
        zero = jnp.zeros_like(rhs)
        return matvec(solve(jax.jacfwd(linear)(zero), jnp.diag(zero + 1.0)), rhs)

    # The conversion names what the emission closes over, so that the search sees no tangents.
    z = lax.custom_root(
        jax.grad(objective),
        start,
        lambda _, z: _newton(objective, z, newton_steps),
        tangent_solve,
    )
    B = cholesky(_with_curvature(-jax.hessian(objective)(z)))
    return z, B, objective(z) - jnp.sum(jnp.log(diagonal(B)))


def _newton(objective: Callable[[Array], Array], start: Array, num_steps: int) -> Array:
    sizes = jnp.asarray(_STEP_SIZES, start.dtype)

    def slope(z: Array) -> tuple[Array, Array]:
        gradient = jax.grad(objective)(z)
        return gradient, gradient

    def step(z: Array, _: None) -> tuple[Array, None]:
        hessian, gradient = jax.jacfwd(slope, has_aux=True)(z)
        B = cholesky(_with_curvature(-hessian))
        white = solve_lower(B, gradient[:, None])
        direction = solve_lower(B, white, transposed=True)[:, 0]
        points = z[None] + outer(sizes, direction)
        values = jax.vmap(objective)(points)
        values = jnp.where(jnp.isnan(values), -jnp.inf, values)
        # Near the mode the values differ by rounding alone: there only full steps converge.
        rounding = 64.0 * jnp.finfo(z.dtype).eps * (1.0 + jnp.abs(jnp.max(values)))
        best = jnp.argmax(values + jnp.where(jnp.arange(values.size) == 0, rounding, 0.0))
        return points[best], None

    return lax.scan(step, start, None, num_steps)[0]


def _with_curvature(B: Array) -> Array:
    """Raise a negative Hessian that is not positive definite by a multiple of I.

    An emission with heavy tails is not log-concave; where it outweighs the prior's curvature,
    which is 1 here, the matrix is raised until its eigenvalues are at least 1 (by Gershgorin's
    bound), as if the emission had none.
    """
    B = symmetrize(B)
    own = diagonal(B)
    least = jnp.min(own - (jnp.sum(jnp.abs(B), axis=1) - jnp.abs(own)))
    definite = jnp.all(jnp.isfinite(cholesky(lax.stop_gradient(B))))
    shift = jnp.where(definite, 0.0, 1.0 - least)
    return B + shift * jnp.eye(B.shape[0], dtype=B.dtype)


def choose_update(gaussian: Update, emission: str, newton_steps: int) -> Update:
    """Update by the kind of emission: `gaussian` where it is Gaussian or matched by moments.

    Args:
        gaussian: update that uses the emission's conditional mean and covariance.
        emission: what to do with emissions that are not Gaussian: "laplace" or "moments".
        newton_steps: steps of the Laplace approximation.
    """
    laplace = laplace_update(newton_steps)

    def update(mean: Array, cov: Array, instrument: Instrument, data: Any) -> Belief:
        by_moments = instrument.gaussian or emission == "moments"
        chosen = gaussian if by_moments else laplace
        present = jnp.any(data[2])

        def observed() -> Belief:
            return chosen(mean, cov, instrument, data)

        def nothing() -> Belief:
            return mean, cov, jnp.zeros((), mean.dtype)

        if len(instrument.rows) < instrument.present.shape[0]:
            # A grid finer than the data: most times cost nothing.
            return lax.cond(present, observed, nothing)
        return jax.tree.map(lambda a, b: jnp.where(present, a, b), observed(), nothing())

    return update


def with_valid_inputs(model: StateSpaceModel) -> StateSpaceModel:
    """Give grid times without observations the inputs of a time with one.

    What is computed there is thrown away, but derivatives through padding (a noise scale of 0,
    say) would be NaN, which no selection afterwards removes.
    """

    def fill(instrument: Instrument) -> Instrument:
        rows, length = np.asarray(instrument.rows), model.num_times
        if rows.size in (0, length):
            return instrument
        after = np.minimum(np.searchsorted(rows, np.arange(length)), rows.size - 1)
        source = rows[after]
        inputs = jax.tree.map(lambda a: jnp.asarray(a)[source], instrument.inputs)
        return instrument._replace(inputs=inputs)

    return model._replace(instruments=tuple(fill(i) for i in model.instruments))
