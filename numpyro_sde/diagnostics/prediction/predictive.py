"""What a filter predicts of each observation from those before it: density, distribution, draws.

A prediction is a mixture of emission laws over the predicted state. Where both are normal it is
normal, and exact for linear models; else the state's law is taken at weighted points: particles,
or the nodes of a quadrature rule for the filter's normal law. Several components at one time are
read in order, each given those before it (Rosenblatt 1952, "Remarks on a multivariate
transformation"), so that their probability integral transforms are independent and uniform where
the model is right.

Horizons above one are moved without an update: particles by the model's own steps; for other
filters the data after the origin are hidden and the filter is run again.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import lax
from jax.scipy.special import ndtr
from jaxtyping import Array, Float, PRNGKeyArray
from scipy.special import ndtri

from numpyro_sde.diagnostics.prediction.reading import SeenPath
from numpyro_sde.filters.particle import Particle
from numpyro_sde.linear.small import diagonal, psd_factor
from numpyro_sde.smc.normals import normals
from numpyro_sde.smc.particle_filter import run_filter
from numpyro_sde.statespace.model import AbstractFilter, Instrument, StateSpaceModel
from numpyro_sde.statespace.quadrature import QuadratureRule, gauss_hermite, unscented

_ORDERS = {1: 41, 2: 15, 3: 9}  # of the product rule, by the number of states
_SOBOL = 9  # above: so many powers of two of quasi-random points
_MAX_COUNT = 20_000  # largest datum of a law whose distribution function is summed


class RowPrediction(NamedTuple):
    """Prediction of what all instruments of a path gave at one time.

    Attributes:
        log_score: Log density of all present components together.
        upper: Distribution function of each component at its datum, given those before it,
            `(p,)`; NaN where missing.
        lower: The same just below the datum: less than `upper` for discrete data.
        draw: A draw of all components, `(p,)`.
    """

    log_score: Float[Array, ""]
    upper: Float[Array, " p"]
    lower: Float[Array, " p"]
    draw: Float[Array, " p"]


class Belief(NamedTuple):
    """Law of a state: normal, or weighted points.

    Attributes:
        mean: `(d,)`, for a normal law.
        cov: `(d, d)`, for a normal law.
        points: `(n, d)`, else.
        log_weights: `(n,)`, else.
    """

    mean: Any = None
    cov: Any = None
    points: Any = None
    log_weights: Any = None


def predict_path(
    seen: SeenPath, method: AbstractFilter, horizon: int, key: PRNGKeyArray
) -> RowPrediction:
    """Predictions at every observed time of a path, leading axes `(*lead, J)`.

    Args:
        seen: The path and its data.
        method: The filter.
        horizon: How many observed times ahead; the first ones are predicted from the start.
        key: For draws, and for the filter where it is random.
    """
    rows = observed_times(seen)
    limits = [_largest_count(s, y) for s, y in seen.data]

    def one(model: StateSpaceModel, key: PRNGKeyArray) -> RowPrediction:
        filter_key, draw_key = jax.random.split(key)
        chosen = method.with_key(filter_key)
        chosen.check(model)
        counts = _instrument_limits(seen, limits)
        if isinstance(chosen, Particle):
            return _by_particles(chosen, model, rows, horizon, counts, draw_key)
        return _by_moments(chosen, model, rows, horizon, counts, draw_key)

    return seen.observed.map_seeded(one, key, method.num_starts)


def observed_times(seen: SeenPath) -> np.ndarray:
    """Grid indices at which any statement looks, increasing."""
    num_times = seen.path.num_times
    return np.unique(np.concatenate([s.rows.index % num_times for s, _ in seen.data]))


def slots(seen: SeenPath) -> list[np.ndarray]:
    """For each statement where its data stand in a prediction: `(K, 2)`, row and first component.

    A time that occurs twice in a statement has an instrument for each occurrence.
    """
    rows, num_times = observed_times(seen), seen.path.num_times
    found, offset = [], 0
    for statement, _ in seen.data:
        size = int(np.prod((*statement.replicates, *statement.structure.shape), dtype=int))
        index = statement.rows.index % num_times
        turns = np.array([np.sum(index[:k] == row) for k, row in enumerate(index)], int)
        found.append(np.stack([np.searchsorted(rows, index), offset + size * turns], axis=-1))
        offset += size * (int(turns.max(initial=0)) + 1)
    return found


def _by_moments(
    method: AbstractFilter,
    model: StateSpaceModel,
    rows: np.ndarray,
    horizon: int,
    counts: list[int],
    key: PRNGKeyArray,
) -> RowPrediction:
    if horizon == 1:
        result = method.filter(model)
        _require_moments(method, result)
        mean, cov = result.predicted_mean[rows], result.predicted_cov[rows]
    else:
        # The origin of the first rows lies before all data.
        origins = np.concatenate([np.full(min(horizon, len(rows)), -1), rows[:-horizon]])

        def from_origin(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
            origin, target = inputs
            result = method.filter(_hidden_after(model, origin))
            _require_moments(method, result)
            return result.predicted_mean[target], result.predicted_cov[target]

        mean, cov = lax.map(from_origin, (jnp.asarray(origins), jnp.asarray(rows)))
    data = jax.tree.map(lambda a: jnp.asarray(a)[rows], model.observation_inputs())
    keys = jax.random.split(key, len(rows))
    predict = partial(_predict_row, model.instruments, counts)
    return jax.vmap(lambda m, P, now, k: predict(Belief(m, P), now, k))(mean, cov, data, keys)


def _require_moments(method: AbstractFilter, result: Any) -> None:
    if getattr(result, "predicted_mean", None) is None:
        raise ValueError(f"{type(method).__name__} gives no moments of the predicted state")


def _hidden_after(model: StateSpaceModel, origin: Array) -> StateSpaceModel:
    """The model with the data after a grid index taken as missing."""
    known = (jnp.arange(model.num_times) <= origin)[:, None]

    def hide(instrument: Instrument) -> Instrument:
        return instrument._replace(
            values=jnp.where(known, instrument.values, 0.0),
            present=jnp.asarray(instrument.present) & known,
        )

    return model._replace(instruments=tuple(hide(i) for i in model.instruments))


def _by_particles(
    method: Particle,
    model: StateSpaceModel,
    rows: np.ndarray,
    horizon: int,
    counts: list[int],
    key: PRNGKeyArray,
) -> RowPrediction:
    """Filtered particles of the last `horizon` observed times, moved on side by side."""
    run_key, start_key, scan_key = jax.random.split(key, 3)
    history = run_filter(model, method.setting, run_key, history=True).history
    assert history is not None
    dtype = model.init_mean.dtype
    start = _draw_prior(model, method.num_particles, start_key)
    ages = jnp.repeat(start[None], horizon, axis=0)
    weights = jnp.zeros(ages.shape[:2], dtype)
    is_row = np.zeros(model.num_times, bool)
    is_row[rows] = True
    predict = partial(_predict_row, model.instruments, counts)
    data = jax.tree.map(jnp.asarray, model.observation_inputs())

    def arrive(
        slots: tuple[Array, Array], now: Any, filtered: Any, key: PRNGKeyArray
    ) -> tuple[tuple[Array, Array], RowPrediction]:
        x, w = slots
        found = predict(Belief(points=x[-1], log_weights=w[-1]), now, key)
        particles, log_weights = filtered
        x = jnp.concatenate([particles.T[None], x[:-1]])
        w = jnp.concatenate([log_weights[None], w[:-1]])
        return (x, w), found

    def step(slots: tuple[Array, Array], inputs: Any) -> tuple[Any, RowPrediction]:
        now, step_now, filtered, key, seen = inputs
        move_key, key = jax.random.split(key)
        x, w = slots
        x = _move(model, move_key, x, step_now)
        return lax.cond(seen, arrive, _nothing, (x, w), now, filtered, key)

    def _nothing(
        slots: tuple[Array, Array], now: Any, filtered: Any, key: PRNGKeyArray
    ) -> tuple[tuple[Array, Array], RowPrediction]:
        like = jax.eval_shape(arrive, slots, now, filtered, key)[1]
        return slots, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)

    at = jax.tree.map(lambda a: a[0], (data, (history.particles, history.log_weights)))
    first_key, rest_key = jax.random.split(scan_key)
    entry = arrive if is_row[0] else _nothing
    carry, first = entry((ages, weights), at[0], at[1], first_key)
    later = jax.tree.map(lambda a: a[1:], (data, (history.particles, history.log_weights)))
    keys = jax.random.split(rest_key, model.num_times - 1)
    inputs = (later[0], model.step_inputs(), later[1], keys, jnp.asarray(is_row[1:]))
    _, rest = lax.scan(step, carry, inputs)
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b])[rows], first, rest)


def _draw_prior(model: StateSpaceModel, number: int, key: PRNGKeyArray) -> Float[Array, "M d"]:
    if model.starts is not None:
        return model.starts.astype(model.init_mean.dtype)
    z = normals(key, (number, model.dim), model.init_mean.dtype)
    return model.init_mean[None] + z @ psd_factor(model.init_cov).T


def _move(
    model: StateSpaceModel, key: PRNGKeyArray, x: Float[Array, "a M d"], now: Any
) -> Float[Array, "a M d"]:
    t, dt, cache = now
    shape = model.scheme.innovation_shape(model.sde, () if model.scalar else (model.dim,))
    z = normals(key, (*x.shape[:2], *shape), x.dtype)

    def one(x: Array, z: Array) -> Array:
        new = model.scheme.step(model.sde, t, dt, model.to_state(x), z, cache)
        return jnp.reshape(new, (model.dim,))

    return jax.vmap(jax.vmap(one))(x, z).astype(x.dtype)


def _predict_row(
    instruments: tuple[Instrument, ...],
    counts: list[int],
    belief: Belief,
    now: Any,
    key: PRNGKeyArray,
) -> RowPrediction:
    if belief.points is None and all(i.gaussian for i in instruments):
        return _normal_row(instruments, belief, now, key)
    return _mixture_row(instruments, counts, belief, now, key)


def _normal_row(
    instruments: tuple[Instrument, ...], belief: Belief, now: Any, key: PRNGKeyArray
) -> RowPrediction:
    rule = unscented(belief.mean.shape[0])
    points = belief.mean[None] + jnp.asarray(rule.points) @ psd_factor(belief.cov).T
    each = [
        jax.vmap(partial(i.moments, inputs))(points)
        for i, (inputs, _, _) in zip(instruments, now, strict=True)
    ]
    means = jnp.concatenate([mean for mean, _ in each], axis=-1)
    weights = jnp.asarray(rule.weights)
    mean = weights @ means
    away = means - mean[None]
    noise = jax.scipy.linalg.block_diag(*(jnp.tensordot(weights, cov, axes=1) for _, cov in each))
    cov = (away * jnp.asarray(rule.cov_weights)[:, None]).T @ away + noise
    y = jnp.concatenate([values for _, values, _ in now])
    present = jnp.concatenate([known for _, _, known in now])
    L, z = whiten(mean, cov, y, present)
    terms = -0.5 * z**2 - jnp.log(diagonal(L)) - 0.5 * jnp.log(2 * jnp.pi)
    pit = jnp.where(present, ndtr(z), jnp.nan)
    draw = mean + psd_factor(cov) @ jax.random.normal(key, mean.shape, mean.dtype)
    return RowPrediction(jnp.sum(jnp.where(present, terms, 0.0)), pit, pit, draw)


def whiten(mean: Array, cov: Array, y: Array, present: Array) -> tuple[Array, Array]:
    """Cholesky factor and standardised residuals of the present components of a normal vector."""
    both = present[:, None] & present[None, :]
    L = jnp.linalg.cholesky(jnp.where(both, cov, jnp.eye(mean.shape[0], dtype=cov.dtype)))
    residual = jnp.where(present, y - mean, 0.0)
    return L, jax.scipy.linalg.solve_triangular(L, residual, lower=True)


def _mixture_row(
    instruments: tuple[Instrument, ...],
    counts: list[int],
    belief: Belief,
    now: Any,
    key: PRNGKeyArray,
) -> RowPrediction:
    state_key, draw_key = jax.random.split(key)
    if belief.points is None:
        S, rule = psd_factor(belief.cov), _rule(belief.mean.shape[0])
        points = belief.mean[None] + jnp.asarray(rule.points) @ S.T
        start = jnp.log(jnp.asarray(rule.weights)).astype(points.dtype)
        z = jax.random.normal(state_key, belief.mean.shape, points.dtype)
        state = belief.mean + S @ z
    else:
        points = belief.points
        start = jax.nn.log_softmax(belief.log_weights)
        state = points[jax.random.categorical(state_key, start)]
    log_weights, parts = start, []
    for instrument, count, (inputs, y, present) in zip(instruments, counts, now, strict=True):
        components = partial(_components, instrument, inputs, y, present, count)
        upper, lower, terms = jax.vmap(components)(points)  # (n, p)
        terms = jnp.where(present, terms, 0.0)
        before = log_weights[:, None] + jnp.cumsum(terms, axis=-1) - terms
        share = jax.nn.softmax(before, axis=0)
        log_weights = log_weights + jnp.sum(terms, axis=-1)
        parts.append([jnp.where(present, jnp.sum(share * f, 0), jnp.nan) for f in (upper, lower)])
    score = jax.nn.logsumexp(log_weights) - jax.nn.logsumexp(start)
    draws = [
        _draw(instrument, inputs, state, k)
        for instrument, (inputs, _, _), k in zip(
            instruments, now, jax.random.split(draw_key, len(instruments)), strict=True
        )
    ]
    upper, lower = (jnp.clip(jnp.concatenate(p), 0.0, 1.0) for p in zip(*parts, strict=True))
    return RowPrediction(score, upper, lower, jnp.concatenate(draws))


def _rule(d: int) -> QuadratureRule:
    if d in _ORDERS:
        return gauss_hermite(d, _ORDERS[d])
    from scipy.stats import qmc  # slow to import

    points = ndtri(qmc.Sobol(d, seed=0).random_base2(_SOBOL))
    weights = np.full(len(points), 1.0 / len(points))
    return QuadratureRule(points, weights, weights)


def _components(
    instrument: Instrument, inputs: Any, y: Array, present: Array, count: int, x: Array
) -> tuple[Array, Array, Array]:
    """Distribution function at and below each component, and its log density, given the state."""
    if instrument.gaussian:
        mean, cov = instrument.moments(inputs, x)
        L, z = whiten(mean, cov, y, present)
        cdf = ndtr(z)
        return cdf, cdf, -0.5 * z**2 - jnp.log(diagonal(L)) - 0.5 * jnp.log(2 * jnp.pi)
    law = _plain(_law_of(instrument, inputs, x))
    support: Any = law.support
    shape = law.batch_shape
    feasible = support.feasible_like(jnp.zeros(shape)) * jnp.ones(shape)
    value = jnp.where(present.reshape(shape), y.reshape(shape), feasible)
    if support.is_discrete:
        whole = jnp.round(value).astype(int)
        terms = law.log_prob(whole)
        upper = _cdf_of_counts(law, whole, count)
        lower = upper - jnp.exp(terms)
    else:
        terms, upper = law.log_prob(value), _cdf(law, value)
        lower = upper
    return tuple(jnp.broadcast_to(a, shape).reshape(-1) for a in (upper, lower, terms))  # type: ignore[return-value]


def _draw(instrument: Instrument, inputs: Any, x: Array, key: PRNGKeyArray) -> Array:
    if instrument.gaussian:
        mean, cov = instrument.moments(inputs, x)
        return mean + psd_factor(cov) @ jax.random.normal(key, mean.shape, mean.dtype)
    law = _law_of(instrument, inputs, x)
    return jnp.reshape(law.sample(key), (-1,)).astype(jnp.result_type(float))


def _law_of(instrument: Instrument, inputs: Any, x: Array) -> dist.Distribution:
    if instrument.law is None:
        raise ValueError("an instrument that is not normal must give its law to be predicted")
    return instrument.law(inputs, x)


def _plain(law: Any) -> Any:
    """A law of independent scalars, without wrappers."""
    while isinstance(law, dist.Independent):
        law = law.base_dist
    if law.event_dim:
        raise ValueError(
            f"a predicted distribution function needs scalars or normal vectors, and emission "
            f"{type(law).__name__} is a vector of another kind: score its draws (k_step, forecast)"
        )
    return law


def _cdf(law: Any, value: Array) -> Array:
    try:
        return law.cdf(value)
    except NotImplementedError:
        raise ValueError(
            f"emission {type(law).__name__} has no distribution function (cdf) in NumPyro, which "
            "residuals need"
        ) from None


def _cdf_of_counts(law: Any, value: Array, count: int) -> Array:
    try:
        return law.cdf(value)
    except (NotImplementedError, AttributeError):
        if count > _MAX_COUNT:
            raise ValueError(
                f"emission {type(law).__name__} has no distribution function in NumPyro, and its "
                f"data go up to {count}: too many terms to sum"
            ) from None
    steps = jnp.arange(count + 1).reshape(-1, *(1,) * len(law.batch_shape))
    mass = jnp.where(steps <= value, jnp.exp(law.log_prob(steps)), 0.0)
    return jnp.sum(mass, axis=0)


def _largest_count(statement: Any, y: Any) -> int:
    """Largest datum of a statement on whole numbers; 0 for others."""
    if not statement.structure.support.is_discrete or isinstance(y, jax.core.Tracer):
        return 0
    y = np.asarray(y, np.float64)
    return int(np.nanmax(y, initial=0.0))


def _instrument_limits(seen: SeenPath, limits: list[int]) -> list[int]:
    """The limit of each instrument: a statement with repeated times has several."""
    found = []
    for (statement, _), limit in zip(seen.data, limits, strict=True):
        _, counts = np.unique(statement.rows.index % seen.path.num_times, return_counts=True)
        found += [limit] * int(counts.max(initial=1))
    return found
