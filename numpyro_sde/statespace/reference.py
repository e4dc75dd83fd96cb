"""References: paths along which a model is linearised, checked before they are believed.

A guide is as good as the path along which it was made. The mean of the extended Kalman smoother is
the best one where linearising serves, and may be far from any path of the model where it does not:
so a guide is judged by its own central path, that of innovations `z = 0`, and where that is
implausible another reference is tried.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from numpyro_sde.linear.affine import degrees
from numpyro_sde.linear.information import (
    LinearizedSteps,
    backward_information,
    log_weight,
    step_sd,
)
from numpyro_sde.linear.ranks import equal_rank
from numpyro_sde.linear.small import diagonal, spd_solve
from numpyro_sde.schemes.base import GaussianScheme
from numpyro_sde.schemes.euler import Euler
from numpyro_sde.statespace.exact import has_exact
from numpyro_sde.statespace.guide import (
    Guide,
    first_inputs,
    guided_innovations_along,
    guided_start,
    has_moments,
    innovation_size,
    linearize_along,
    log_emissions,
    observations_along,
    speaks_by_variance,
)
from numpyro_sde.statespace.linearized import filter_linearized
from numpyro_sde.statespace.model import Instrument, StateSpaceModel

# Scoring steps from the start towards the state that one observation alone points to.
_SCORING_STEPS = 12
_LENGTHS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.0)
# Ridge of these steps, as a share of the observation's information: directions that it does not
# see stay where they are.
_RIDGE = 1e-3
# A reference of a positive process stays above this share of the mean of its start.
_POSITIVE_FLOOR = 1e-2
# Half the squares that a guide's central path may need beyond one for each observation.
_FREE_MISFIT = 10.0
# Standard deviations of one step by which a reference may miss it.
_LARGEST_MISS = 5.0
# Share of a step's noise below which that of a component seen exactly is rounding.
_ROUNDING = 1e-5


def kalman_reference(model: StateSpaceModel) -> Float[Array, "N d"]:
    """Mean of the extended Kalman smoother, whatever it is.

    Normal emissions whose variance depends on the state are taken by Laplace's approximation: by
    moments alone a return tells nothing of a volatility, and at a reference that has not learnt of
    a large one its score points far beyond any likely state.
    """
    gaussian = isinstance(model.scheme, GaussianScheme)
    linearised = model if gaussian else model.with_scheme(Euler())
    by_variance = [i.gaussian and speaks_by_variance(model, i) for i in model.instruments]
    if any(by_variance):
        pairs = zip(model.instruments, by_variance, strict=True)
        taken = tuple(i._replace(gaussian=i.gaussian and not v) for i, v in pairs)
        linearised = linearised._replace(instruments=taken)
    silent = any(not has_moments(i, first_inputs(i), model.init_mean) for i in model.instruments)
    emission = "laplace" if any(by_variance) or silent else "moments"
    mean, _ = filter_linearized(linearised, emission=emission).smooth()
    return _keep_positive(model, mean)


def data_reference(model: StateSpaceModel) -> Float[Array, "N d"]:
    """States that the observations point to, interpolated in time, component by component.

    Each observation is solved for the state by damped scoring from the mean of the start;
    components that none of them sees stay there.
    """
    N, d = model.num_times, model.dim
    start = jnp.broadcast_to(model.init_mean, (N, d))

    def improve(x: Array, _: None) -> tuple[Array, None]:
        J, s = observations_along(model, x)
        move = spd_solve(_with_ridge(J), s[..., None])
        # Of a few lengths the one that fits best, at each time: a full step may overshoot far.
        points = _keep_positive(
            model, x[None] + jnp.asarray(_LENGTHS, x.dtype)[:, None, None] * move[..., 0][None]
        )
        fit = jax.vmap(lambda x: log_emissions(model, x))(points)
        best = jnp.argmax(jnp.where(jnp.isnan(fit), -jnp.inf, fit), axis=0)
        return points[best, jnp.arange(N)], None

    x, _ = lax.scan(improve, start, None, _SCORING_STEPS)
    return _between(model, x, observations_along(model, x)[0])[0]


def seen_reference(model: StateSpaceModel) -> tuple[Float[Array, "N d"], Bool[Array, " d"]]:
    """States that normal observations point to, interpolated, and the components that they see.

    One step of scoring from the mean of the start: quick to compile, and exact where what is
    observed is affine in the state with a noise that does not depend on it. Other emissions see
    nothing here.
    """
    start = jnp.broadcast_to(model.init_mean, (model.num_times, model.dim))
    if any(not is_plain(model, instrument) for instrument in model.instruments):
        return start, jnp.zeros(model.dim, bool)
    J, s = observations_along(model, start)
    x = start + spd_solve(_with_ridge(J), s[..., None])[..., 0]
    return _between(model, _keep_positive(model, x), J)


def is_plain(model: StateSpaceModel, instrument: Instrument) -> bool:
    """Whether an emission is normal, affine in the state with a covariance free of it."""
    inputs = first_inputs(instrument)
    if not instrument.gaussian or not has_moments(instrument, inputs, model.init_mean):
        return False
    mean, cov = degrees(lambda x: instrument.moments(inputs, x), model.init_mean)
    return mean <= 1 and cov == 0


def _between(model: StateSpaceModel, x: Array, J: Array) -> tuple[Array, Array]:
    """States interpolated between the times that see them, by component, and which are seen."""
    seen = diagonal(J) > 0
    times = jnp.asarray(model.times, x.dtype)
    states = jax.vmap(lambda seen, x: _interpolate(times, seen, x), (1, 1), 1)(seen, x)
    return states, jnp.any(seen, axis=0)


def _interpolate(times: Array, seen: Array, x: Array) -> Array:
    """Linear between the times seen, constant beyond them; as given where none is."""
    index = jnp.arange(times.shape[0])
    before = lax.cummax(jnp.where(seen, index, -1))
    after = lax.cummin(jnp.where(seen, index, times.shape[0]), reverse=True)
    before = jnp.where(before < 0, after, before)
    after = jnp.where(after >= times.shape[0], before, after)
    before, after = (jnp.clip(i, 0, times.shape[0] - 1) for i in (before, after))
    width = times[after] - times[before]
    share = jnp.where(width > 0, (times - times[before]) / jnp.where(width > 0, width, 1.0), 0.0)
    return x[before] + share * (x[after] - x[before])


class BelievedGuide(NamedTuple):
    """A guide, the linear model behind it, and how its central path fits.

    Attributes:
        guide: reference and information.
        steps: the model linearised along the reference.
        log_fit: log likelihood as the central path of the guide has it (exact for linear Gaussian
            models); minus infinity where even that path is lost, and the guide then says nothing.
    """

    guide: Guide
    steps: LinearizedSteps
    log_fit: Float[Array, ""]


class _Tried(NamedTuple):
    """A guide that was tried.

    Attributes:
        believed: the guide.
        misfit: half the squares of the innovations that its central path needs and of the
            residuals that it leaves.
        misses: by how many standard deviations each step along the reference misses the next
            state, `(N - 1,)`.
    """

    believed: BelievedGuide
    misfit: Array
    misses: Array


def smoothed_reference(model: StateSpaceModel) -> Float[Array, "N d"]:
    """Mean of the extended Kalman smoother, replaced where it is not to be believed.

    See `believed_guide`.
    """
    return believed_guide(model).guide.reference


def believed_guide(model: StateSpaceModel) -> BelievedGuide:
    """A guide along the extended Kalman smoother's mean, checked before it is believed.

    A smoother's mean may fit every observation and run away between them: where Euler steps of an
    unstable drift are linearised far out, each step along it misses the next state by many standard
    deviations, and what is guided there is lost. The guide's central path, that of innovations
    `z = 0`, tells: the squared innovations that it needs and the squared residuals that it leaves
    are together of the order of the number of observations where model and guide are right. Where
    they are far above that, or a step misses by more than 5 standard deviations, the interpolated
    data replace the reference from one observation to the next where it misses, then altogether;
    of these guides the one whose central path has the highest log likelihood is taken.
    """
    dtype = model.init_mean.dtype

    def attempt(turn: Array, best: _Tried) -> _Tried:
        before = best.believed.guide.reference

        def of_data() -> Array:
            data = data_reference(model)
            patched = _patch(model, before, best.misses, data)
            return jnp.where(turn == 1, patched, data).astype(dtype)

        reference = lax.cond(turn == 0, lambda: kalman_reference(model).astype(dtype), of_data)
        found = _look_along(model, reference)
        better = (turn == 0) | (found.believed.log_fit > best.believed.log_fit)
        return jax.tree.map(lambda a, b: jnp.where(better, a, b), found, best)

    def step(best: _Tried, turn: Array) -> tuple[_Tried, None]:
        # A scan over the candidates: one compiled copy of what is done along each.
        return lax.cond(_plausible(model, best), lambda: best, lambda: attempt(turn, best)), None

    start = jnp.zeros((model.num_times, model.dim), dtype)
    shapes = jax.eval_shape(partial(_look_along, model), start)
    nothing = jax.tree.map(lambda a: jnp.full(a.shape, jnp.inf, a.dtype), shapes)
    best, _ = lax.scan(step, nothing, jnp.arange(3))
    believed = best.believed
    lost = jnp.isneginf(believed.log_fit)
    silent = jax.tree.map(lambda a: jnp.where(lost, 0.0, a).astype(a.dtype), believed)
    return silent._replace(log_fit=believed.log_fit)


def _look_along(model: StateSpaceModel, reference: Float[Array, "N d"]) -> _Tried:
    """The guide along a reference, and how its central path fits."""
    steps = linearize_along(model, reference)
    guide = Guide(reference, *backward_information(steps))
    start, ratio = guided_start(model, guide, jnp.zeros_like(model.init_mean))
    zero = jnp.zeros((model.num_times - 1, innovation_size(model)), reference.dtype)
    central, w, log_det = guided_innovations_along(model, guide, start, zero)
    fit = ratio + jnp.sum(log_weight(w, zero, log_det)) + jnp.sum(log_emissions(model, central))
    J, s = observations_along(model, central)
    residuals = jnp.sum(s * spd_solve(_with_ridge(J), s[..., None])[..., 0])
    misfit = 0.5 * (jnp.sum(w**2) + residuals)
    sd = jax.vmap(step_sd)(steps.B)
    # Where there is no noise at all, or only its rounding, a miss cannot be told in units of it.
    least = _ROUNDING * jnp.max(sd, axis=-1, keepdims=True) if has_exact(model) else 0.0
    misses = jnp.where(sd > least, jnp.abs(steps.c) / jnp.where(sd > least, sd, 1.0), 0.0)
    whole = jnp.isfinite(fit) & jnp.all(jnp.isfinite(guide.H)) & jnp.all(jnp.isfinite(guide.e))
    believed = BelievedGuide(guide, steps, jnp.where(whole, fit, -jnp.inf))
    misfit = jnp.where(whole, misfit, jnp.inf)
    return _Tried(believed, misfit, jnp.max(misses, axis=-1, initial=0.0))


def _plausible(model: StateSpaceModel, tried: _Tried) -> Array:
    """Whether a guide needs no second look."""
    count = sum(jnp.sum(i.present[np.asarray(i.rows, int)]) for i in model.instruments)
    close = jnp.max(tried.misses, initial=0.0) <= _LARGEST_MISS
    return close & (tried.misfit <= count + _FREE_MISFIT)


def _patch(model: StateSpaceModel, reference: Array, misses: Array, data: Array) -> Array:
    """Replace a reference by the data's from one observation to the next where it misses a step."""
    if model.num_times == 1:
        return data
    rows = [np.asarray(i.rows, dtype=int) for i in model.instruments]
    seen = np.unique(np.concatenate([np.zeros(0, int), *rows]))
    gap = np.searchsorted(seen, np.arange(model.num_times - 1), side="right")
    whole = jnp.all(jnp.isfinite(reference), axis=1)
    bad = ~(misses <= _LARGEST_MISS) | ~whole[1:]
    # Bad ones up to each step; in a gap: those up to its end less those before it.
    count = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(bad, dtype=jnp.int32)])
    starts, ends = (np.searchsorted(gap, gap, side=side) for side in ("left", "right"))
    any_bad = count[ends] > count[starts]
    replaced = jnp.concatenate([any_bad, any_bad[-1:]]) | ~whole
    return jnp.where(replaced[:, None], data, reference)


def _with_ridge(J: Float[Array, "N d d"]) -> Float[Array, "N d d"]:
    """Information that can be inverted: directions that are not seen get a little."""
    d = J.shape[-1]
    ridge = _RIDGE * jnp.trace(J, axis1=1, axis2=2) / d
    ridge = jnp.where(ridge > 0, ridge, 1.0)
    return J + ridge[:, None, None] * jnp.eye(d, dtype=J.dtype)[None]


def _keep_positive(model: StateSpaceModel, x: Array) -> Array:
    if not model.sde.positive or model.state_shape is not None:
        return x
    return jnp.maximum(*equal_rank(x, _POSITIVE_FLOOR * jnp.abs(model.init_mean)))
