"""Guides: what all observations say about each step of a path, along a reference path.

The SDE and its emissions are linearised along a reference path, the backward information filter
(`numpyro_sde.linear.information`) gathers the observations, and each step's innovations are drawn
given those to come. The innovations of the scheme itself are guided, so every scheme that is a map
of standard normals can be: the guided path is a path of the model, its law has a density in the
innovations, and the ratio of the two laws is exact whatever the guide.

Source: Whiteley and Lee (2014), "Twisted particle filters", for the exact discrete step; Schauer,
van der Meulen and van Zanten (2017), "Guided proposals for simulating multi-dimensional diffusion
bridges", for its continuous counterpart.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from numpyro_sde.linear.information import (
    LinearizedSteps,
    backward_information,
    guided_innovations,
    log_weight,
    whiten_innovations,
)
from numpyro_sde.linear.rows import put_rows, take_rows
from numpyro_sde.linear.small import (
    cholesky,
    matmul,
    matvec,
    psd_factor,
    solve_lower,
    transpose,
)
from numpyro_sde.schemes.base import GaussianScheme
from numpyro_sde.schemes.dependence import reaches_output
from numpyro_sde.statespace.exact import (
    condition,
    condition_linear,
    has_exact,
    noisy,
    readings,
    reads_start,
)
from numpyro_sde.statespace.model import Instrument, StateSpaceModel
from numpyro_sde.statespace.updates import covariance_uses_state, drop_missing, linearize


class Guide(NamedTuple):
    """What observations from each time on say, in deviations from a reference path.

    Attributes:
        reference: the path of linearisation, `(N, d)`.
        H: precisions, `(N, d, d)`.
        e: information vectors, `(N, d)`.
    """

    reference: Float[Array, "N d"]
    H: Float[Array, "N d d"]
    e: Float[Array, "N d"]


class GuidedPath(NamedTuple):
    """A path and the log ratio of its law under the model to its law under the guide.

    Attributes:
        path: states, `(N, d)`.
        log_weight: log density ratio at this path, the observations not in it.
    """

    path: Float[Array, "N d"]
    log_weight: Float[Array, ""]


def affine_step(
    model: StateSpaceModel, t: Any, dt: Any, x: Float[Array, " d"], cache: Any
) -> tuple[Float[Array, " d"], Float[Array, "..."]]:
    """Mean of a step and its derivative by the innovations, `(d,)` where that is diagonal.

    Exact for Gaussian schemes; for others the step is expanded about innovations of zero.
    """
    scheme, state = model.scheme.linearizable(), model.to_state(x)
    if isinstance(scheme, GaussianScheme):
        mean, factor = scheme.moments(model.sde, t, dt, state, cache)
        shape = (model.dim,) if jnp.ndim(factor) < 2 else jnp.shape(factor)
        return jnp.reshape(mean, (model.dim,)), jnp.reshape(factor, shape)
    shape = scheme.innovation_shape(model.sde, jnp.shape(state))
    zero = jnp.zeros(int(np.prod(shape, dtype=int)), x.dtype)

    def step(w: Array) -> tuple[Array, Array]:
        new = scheme.step(model.sde, t, dt, state, jnp.reshape(w, shape), cache)
        return jnp.reshape(new, (model.dim,)), jnp.reshape(new, (model.dim,))

    factor, mean = jax.jacfwd(step, has_aux=True)(zero)
    return mean, factor


def innovation_size(model: StateSpaceModel) -> int:
    """Number m of standard normals in one step."""
    state_shape = () if model.scalar else (model.dim,)
    return int(np.prod(model.scheme.innovation_shape(model.sde, state_shape), dtype=int))


def noise_uses_state(model: StateSpaceModel) -> bool:
    """Whether the factor of a step's noise depends on the state that it starts from."""
    t, dt, cache = jax.tree.map(lambda a: a[0], model.step_inputs())
    trace = jax.make_jaxpr(lambda x: affine_step(model, t, dt, x, cache)[1])(model.init_mean)
    return reaches_output(trace.jaxpr, 0)


def observed_information(
    instrument: Instrument, inputs: Any, y: Array, present: Bool[Array, " p"], x: Array
) -> tuple[Float[Array, "d d"], Float[Array, " d"]]:
    """Information of one observation about the state, and its score, at a state.

    The information is the expected one of a Gaussian with the emission's mean and covariance
    (for the exponential families in their mean, Fisher's); of a normal emission whose covariance
    uses the state, as that of a return given its log volatility, it has the covariance's part
    `tr(R^-1 dR R^-1 dR) / 2` too. The score is the emission's own. An emission that knows no
    moments of its own speaks by the curvature of its log density, where that is concave.
    """
    if not has_moments(instrument, inputs, x):
        return _observed_curvature(instrument, inputs, y, present, x)
    if instrument.variances is not None and y.shape[0] > 1:
        return _independent_information(instrument, inputs, y, present, x)
    mean, R, C = linearize(instrument, inputs, x)
    residual, C, R = drop_missing(y - mean, C, R, present)
    L = cholesky(R)
    white = solve_lower(L, jnp.concatenate([C, residual[:, None]], axis=1))
    information = matmul(transpose(white[:, :-1]), white[:, :-1])
    scaled = instrument.gaussian and covariance_uses_state(instrument, inputs, x)
    if scaled:
        information = information + _scale_information(instrument, inputs, x, L, present)
    if instrument.gaussian and not scaled:
        score = matvec(transpose(white[:, :-1]), white[:, -1])
    else:
        score = jax.grad(lambda x: instrument.log_prob(inputs, x, y, present))(x)
    # An emission without moments (a Cauchy law) does not guide; its likelihood still counts.
    usable = jnp.all(jnp.isfinite(information)) & jnp.all(jnp.isfinite(score)) & jnp.any(present)
    return jnp.where(usable, information, 0.0), jnp.where(usable, score, 0.0)


def _independent_information(
    instrument: Instrument, inputs: Any, y: Array, present: Bool[Array, " p"], x: Array
) -> tuple[Float[Array, "d d"], Float[Array, " d"]]:
    """The same for components that are independent given the state: p variances, no matrix."""
    assert instrument.variances is not None
    each = instrument.variances

    def with_aux(x: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        both = each(inputs, x)
        return both, both

    (C, slope), (_, variance) = jax.jacfwd(with_aux, has_aux=True)(x)
    weight = jnp.where(present, 1.0 / jnp.where(present, variance, 1.0), 0.0)
    C = jnp.where(present[:, None], C, 0.0)
    information = matmul(transpose(C) * weight[None], C)
    if instrument.gaussian and covariance_uses_state(instrument, inputs, x):
        slope = jnp.where(present[:, None], slope, 0.0)
        information = information + 0.5 * matmul(transpose(slope) * weight[None] ** 2, slope)
    score = jax.grad(lambda x: instrument.log_prob(inputs, x, y, present))(x)
    usable = jnp.all(jnp.isfinite(information)) & jnp.all(jnp.isfinite(score)) & jnp.any(present)
    return jnp.where(usable, information, 0.0), jnp.where(usable, score, 0.0)


def has_moments(instrument: Instrument, inputs: Any, x: Float[Array, " d"]) -> bool:
    """Whether an emission has a mean and a variance to ask for, for certain."""
    if not instrument.has_moments:
        return False
    try:
        jax.eval_shape(instrument.moments, inputs, x)
    except NotImplementedError:
        return False
    return True


def _observed_curvature(
    instrument: Instrument, inputs: Any, y: Array, present: Bool[Array, " p"], x: Array
) -> tuple[Float[Array, "d d"], Float[Array, " d"]]:
    """The concave part of minus the Hessian of an emission's log density, and its score."""

    def fit(x: Array) -> Array:
        return instrument.log_prob(inputs, x, y, present)

    values, vectors = jnp.linalg.eigh(-jax.hessian(fit)(x))
    information, score = (vectors * jnp.maximum(values, 0.0)[None]) @ vectors.T, jax.grad(fit)(x)
    usable = jnp.all(jnp.isfinite(information)) & jnp.all(jnp.isfinite(score)) & jnp.any(present)
    return jnp.where(usable, information, 0.0), jnp.where(usable, score, 0.0)


def _scale_information(
    instrument: Instrument, inputs: Any, x: Array, L: Array, present: Bool[Array, " p"]
) -> Float[Array, "d d"]:
    """Fisher's information of a normal law about a state that sets its covariance `L L'`."""
    change = jax.jacfwd(lambda x: instrument.moments(inputs, x)[1])(x)
    change = jnp.where((present[:, None] & present[None])[:, :, None], change, 0.0)

    def whiten(change: Array) -> Array:
        half = solve_lower(L, change)
        return jnp.ravel(solve_lower(L, transpose(half)))

    white = jax.vmap(whiten, 2)(change)
    return 0.5 * matmul(white, transpose(white))


def observations_along(
    model: StateSpaceModel, reference: Float[Array, "N d"]
) -> tuple[Float[Array, "N d d"], Float[Array, "N d"]]:
    """Information and score of all noisy observations at each grid time, at the reference."""
    J = jnp.zeros((*reference.shape, model.dim), reference.dtype)
    s = jnp.zeros_like(reference)
    for instrument in noisy(model):
        rows, now = _observed_times(instrument)
        inform: Any = partial(observed_information, instrument)
        more, score = jax.vmap(inform)(*now, take_rows(reference, rows))
        J = J + put_rows(more, rows, model.num_times)
        s = s + put_rows(score, rows, model.num_times)
    return J, s


def information_at(model: StateSpaceModel, data: Any, p: Array) -> tuple[Array, Array]:
    """Information and score of the noisy observations of one time, at the point `p`."""
    J = jnp.zeros((model.dim, model.dim), p.dtype)
    s = jnp.zeros(model.dim, p.dtype)
    for instrument, now in zip(model.instruments, data, strict=True):
        if instrument.exact:
            continue
        inputs, y, present = now
        more, score = observed_information(instrument, inputs, y, present, p)
        # Padding where an instrument has no observation may hold anything, NaN included.
        J = J + jnp.where(jnp.any(present), more, 0.0)
        s = s + jnp.where(jnp.any(present), score, 0.0)
    return J, s


def _observed_times(instrument: Instrument) -> tuple[np.ndarray, Any]:
    """Grid indices of an instrument's observations; its inputs, values and presence there."""
    rows = np.asarray(instrument.rows, dtype=int)
    data = (instrument.inputs, instrument.values, instrument.present)
    return rows, jax.tree.map(lambda a: take_rows(jnp.asarray(a), rows), data)


def linearize_step(
    model: StateSpaceModel, step: Any, x: Float[Array, " d"], following: Float[Array, " d"]
) -> tuple[Float[Array, "d d"], Float[Array, " d"], Float[Array, "..."]]:
    """Expand one step to first order: its matrix, what its mean misses the next state by, factor.

    Args:
        model: the model.
        step: time, length and cache of the step.
        x: state of linearisation at its beginning.
        following: and at its end.
    """
    t, dt, cache = step

    def mean_of(x: Array) -> tuple[Array, tuple[Array, Array]]:
        mean, factor = affine_step(model, t, dt, x, cache)
        return mean, (mean, factor)

    A, (mean, factor) = jax.jacfwd(mean_of, has_aux=True)(x)
    return A, mean - following, factor


def linearize_along(model: StateSpaceModel, reference: Float[Array, "N d"]) -> LinearizedSteps:
    """Expand every step and every emission to first order about a reference path."""
    J, s = observations_along(model, reference)
    expand: Any = partial(linearize_step, model)
    A, c, B = jax.vmap(expand)(model.step_inputs(), reference[:-1], reference[1:])
    if not has_exact(model):
        return LinearizedSteps(A, c, B, J, s)
    seen = jax.tree.map(lambda a: a[1:], readings(model))
    A, c, B, J_step, s_step = jax.vmap(condition_linear)(A, c, B, seen, reference[1:])
    return LinearizedSteps(A, c, B, J, s, J_step, s_step)


def make_guide(model: StateSpaceModel, reference: Float[Array, "N d"]) -> Guide:
    """Gather the observations backward along a reference path.

    Args:
        model: the path and its instruments.
        reference: states at which to linearise, `(N, d)`.
    """
    H, e = backward_information(linearize_along(model, reference))
    return Guide(reference, H, e)


def guided_start(
    model: StateSpaceModel, guide: Guide, z: Float[Array, " d"]
) -> tuple[Float[Array, " d"], Float[Array, ""]]:
    """First state, of a normal law, given all observations, and its log weight.

    Args:
        model: the model; only the mean and covariance of its start are used.
        guide: the guide.
        z: standard normals, `(d,)`.
    """
    mean, S, seen = start_given_readings(model)
    w, log_det = guided_innovations(guide.H[0], guide.e[0], mean - guide.reference[0], S, z)
    return mean + matvec(S, w), log_weight(w, z, log_det) + seen


def start_given_readings(
    model: StateSpaceModel,
) -> tuple[Float[Array, " d"], Float[Array, "d d"], Float[Array, ""]]:
    """Mean and factor of a normal start given what is seen exactly there, and its log density."""
    S = psd_factor(model.init_cov)
    if not reads_start(model):
        return model.init_mean, S, jnp.zeros((), S.dtype)
    given = condition(model.init_mean, S, readings(model).at(0))
    return given.mean, given.factor, given.log_density


def restarted(
    model: StateSpaceModel, guide: Guide, other: Guide, z: Float[Array, " d"]
) -> Float[Array, " d"]:
    """Standard normals of the same first state under another guide: see `guided_start`."""
    mean, S, _ = start_given_readings(model)
    w, _ = guided_innovations(guide.H[0], guide.e[0], mean - guide.reference[0], S, z)
    return whiten_innovations(other.H[0], other.e[0], mean - other.reference[0], S, w)[0]


def retraced(
    model: StateSpaceModel, guide: Guide, path: Float[Array, "N d"], w: Float[Array, "N-1 m"]
) -> Float[Array, "N-1 m"]:
    """Standard normals that a guide turns into given innovations: see `guided_path`.

    Args:
        model: the path and its instruments.
        guide: the guide.
        path: the states, `(N, d)`.
        w: the model's innovations along them, as `guided_innovations_along` gives them.
    """

    def one(x: Array, w: Array, inputs: Any) -> Array:
        (t, dt, cache), H, e, following, seen = inputs
        mean, B = affine_step(model, t, dt, x, cache)
        if seen is not None:
            given = condition(mean, B, seen)
            mean, B = given.mean, given.factor
        return whiten_innovations(H, e, mean - following, B, w)[0]

    exact = jax.tree.map(lambda a: a[1:], readings(model)) if has_exact(model) else None
    inputs = (model.step_inputs(), guide.H[1:], guide.e[1:], guide.reference[1:], exact)
    return jax.vmap(one)(path[:-1], w, inputs)


def guided_path(
    model: StateSpaceModel, guide: Guide, x0: Float[Array, " d"], z: Float[Array, "N-1 m"]
) -> GuidedPath:
    """Map standard normals to a path that heads for the observations.

    Args:
        model: the path and its instruments.
        guide: the guide.
        x0: first state, `(d,)`.
        z: standard normals, `(N - 1, *innovations)`.

    Returns:
        The path, and the log of the ratio of its density under the model to that of the map.
    """
    if model.num_times == 1:
        return GuidedPath(x0[None], jnp.zeros((), x0.dtype))
    flat = jnp.reshape(z, (z.shape[0], -1))
    path, w, log_det = guided_innovations_along(model, guide, x0, z)
    return GuidedPath(path, jnp.sum(log_weight(w, flat, log_det)))


def guided_innovations_along(
    model: StateSpaceModel, guide: Guide, x0: Float[Array, " d"], z: Float[Array, "N-1 m"]
) -> tuple[Float[Array, "N d"], Float[Array, "N-1 m"], Float[Array, " N-1"]]:
    """A guided path, the model's innovations along it, and the log determinant of each step.

    Where components are seen exactly the innovations are those given the readings, and what the
    readings say is taken from the log determinants.
    """
    shape = z.shape[1:]
    flat = jnp.reshape(z, (z.shape[0], int(np.prod(shape, dtype=int))))
    scheme = model.scheme

    def step(x: Array, inputs: Any) -> tuple[Array, tuple[Array, Array, Array]]:
        (t, dt, cache), H, e, following, z, seen = inputs
        mean, B = affine_step(model, t, dt, x, cache)
        density: Any = 0.0
        if seen is not None:
            given = condition(mean, B, seen)
            mean, B, density = given.mean, given.factor, given.log_density
        w, log_det = guided_innovations(H, e, mean - following, B, z)
        log_det = log_det - density
        if isinstance(scheme, GaussianScheme):
            new = mean + (B * w if B.ndim == 1 else matvec(B, w))
        else:
            state = scheme.step(model.sde, t, dt, model.to_state(x), jnp.reshape(w, shape), cache)
            new = jnp.reshape(state, (model.dim,))
        new = new.astype(x.dtype)
        return new, (new, w, log_det)

    exact = jax.tree.map(lambda a: a[1:], readings(model)) if has_exact(model) else None
    inputs = (model.step_inputs(), guide.H[1:], guide.e[1:], guide.reference[1:], flat, exact)
    # Recomputing a step in the backward pass beats storing its parts.
    _, (rest, w, log_det) = lax.scan(jax.checkpoint(step), x0, inputs)
    return jnp.concatenate([x0[None], rest]), w, log_det


def log_emissions(model: StateSpaceModel, x: Float[Array, "N d"]) -> Float[Array, " N"]:
    """Log density of the noisy observations at each grid time, given the states."""
    total = jnp.zeros(model.num_times, x.dtype)
    for instrument in noisy(model):
        rows, (inputs, values, present) = _observed_times(instrument)
        terms = jax.vmap(instrument.log_prob)(inputs, take_rows(x, rows), values, present)
        total = total + put_rows(terms, rows, model.num_times)
    return total


def log_emission(model: StateSpaceModel, data: Any, x: Float[Array, " d"]) -> Float[Array, ""]:
    """Log density of the noisy observations of one time, given the state.

    Args:
        model: the model.
        data: inputs, values and presence at that time, of each instrument.
        x: the state.
    """
    total = jnp.zeros((), x.dtype)
    for instrument, (inputs, y, present) in zip(model.instruments, data, strict=True):
        if instrument.exact:  # in the law of the step that leads here
            continue
        term = instrument.log_prob(inputs, x, y, present)
        if len(instrument.rows) < model.num_times:
            term = jnp.where(jnp.any(present), term, 0.0)
        total = total + term
    return total


def speaks_by_variance(model: StateSpaceModel, instrument: Instrument) -> bool:
    """Whether the variance of an emission depends on the state, as that of a return does."""
    return covariance_uses_state(instrument, first_inputs(instrument), model.init_mean)


def first_inputs(instrument: Instrument) -> Any:
    """What an emission needs at the first grid time."""
    return jax.tree.map(lambda a: jnp.asarray(a)[0], instrument.inputs)
