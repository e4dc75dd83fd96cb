"""Log densities of the data at each time given those before it, under every parameter draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from numpyro_sde.diagnostics.prediction.reading import (
    DirectPath,
    Reading,
    SeenPath,
    union_times,
)
from numpyro_sde.filters.particle import Particle
from numpyro_sde.statespace.model import AbstractFilter, StateSpaceModel

_PARTICLE_BATCH, _BATCH = 4, 32


class Increments(NamedTuple):
    """One-step log densities of all data, by time.

    Attributes:
        times: Distinct times at which anything was recorded in any series, `(J,)`, increasing.
        evaluate: Function of draws (by site, as in the reading) and a random key that gives the
            log densities, `(draw, J)`, summed over what was recorded at each time; compiled once.
    """

    times: Float[np.ndarray, " J"]
    evaluate: Callable[[Mapping[str, Any], PRNGKeyArray], Float[np.ndarray, "draw J"]]


def increments_by_time(reading: Reading) -> Increments:
    """How to find the terms of a fit's log likelihood in the order of time.

    Args:
        reading: The fit, from `read_predictive`.
    """
    found: list[tuple[np.ndarray, np.ndarray]] = []

    def one(paths: list[SeenPath | DirectPath], key: PRNGKeyArray) -> list[Array]:
        found.clear()
        terms = []
        for path, own in zip(paths, jax.random.split(key, len(paths)), strict=True):
            found.append(_recorded(path))
            if isinstance(path, SeenPath):
                assert reading.method is not None
                terms.append(_filter_terms(path, reading.method.with_key(own)))
            else:
                terms.append(path.path.log_prob_pointwise(path.value))
        return terms

    batch = _PARTICLE_BATCH if isinstance(reading.method, Particle) else _BATCH
    mapped = reading.mapper(one, batch)
    first = {name: value[:1] for name, value in reading.samples.items()}
    one_key = jax.random.key(0)
    jax.eval_shape(lambda: one(reading.run({n: v[0] for n, v in first.items()}, one_key), one_key))
    places = [(np.broadcast_to(times, recorded.shape), recorded) for times, recorded in list(found)]
    times = union_times([at[recorded] for at, recorded in places])

    def evaluate(samples: Mapping[str, Any], rng_key: PRNGKeyArray) -> np.ndarray:
        results = mapped(samples, rng_key)
        sums = np.zeros((len(next(iter(samples.values()))), len(times)))
        for (at, recorded), terms in zip(places, results, strict=True):
            columns = np.searchsorted(times, at[recorded] - 1e-9 * (np.ptp(times) or 1.0))
            kept = np.broadcast_to(terms, (len(sums), *recorded.shape))[:, recorded]
            np.add.at(sums.T, columns, kept.T)
        return sums

    return Increments(times, evaluate)


def _filter_terms(path: SeenPath, method: AbstractFilter) -> Array:
    def evaluate(method: AbstractFilter, model: StateSpaceModel) -> Array:
        return method.increments(model)

    return path.observed.run(method, evaluate)


def _recorded(
    path: SeenPath | DirectPath,
) -> tuple[Float[np.ndarray, "*batch N"], Bool[np.ndarray, "*lead N"]]:
    """Times of a path's grid, and where anything was recorded."""
    times = path.path.times
    if isinstance(times, jax.core.Tracer):
        raise ValueError(f"the times of path {path.name!r} are known only inside a trace")
    times = np.asarray(times, np.float64)
    if isinstance(path, DirectPath):
        value = np.asarray(path.value, np.float64)
        axes = tuple(range(value.ndim - len(path.path.state_shape), value.ndim))
        seen = np.asarray(~np.isnan(value).all(axis=axes))
        recorded = np.broadcast_to(seen, (*path.path.batch_shape, seen.shape[-1])).copy()
        if path.path.fixed_start is not None:
            recorded[..., 0] = False  # given, not predicted
        return times, recorded
    found = np.zeros((*path.lead, path.path.num_times), bool)
    for statement, y in path.data:
        value = np.asarray(y)
        size = len(statement.event_shape)
        there = np.ones(value.shape, bool) if value.dtype.kind != "f" else ~np.isnan(value)
        any_there = np.any(there.reshape(*there.shape[: there.ndim - size + 1], -1), axis=-1)
        known = np.broadcast_to(any_there, (*path.lead, len(statement.rows)))
        for column, row in enumerate(statement.rows.index % path.path.num_times):
            found[..., row] |= known[..., column]
    return times, found
