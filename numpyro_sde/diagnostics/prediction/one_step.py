"""Predictions of all data of a fit, in the shape of its observation sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_sde.describe import html_text
from numpyro_sde.diagnostics.prediction.direct import predict_direct
from numpyro_sde.diagnostics.prediction.predictive import observed_times, predict_path, slots
from numpyro_sde.diagnostics.prediction.reading import (
    DirectPath,
    Reading,
    SeenPath,
    read_predictive,
)
from numpyro_sde.diagnostics.prediction.rules import log_score
from numpyro_sde.distributions.path_law import AbstractPathLaw
from numpyro_sde.filters.particle import Particle
from numpyro_sde.statespace.model import AbstractFilter

_PARTICLE_BATCH, _BATCH = 4, 32  # draws treated at once


class SitePrediction(NamedTuple):
    """Predictions of one observation site, its own shape `(*batch, K, *observation)`.

    Attributes:
        times: `(*batch, K)` or `(K,)`.
        data: What was observed, NaN where missing.
        upper: Distribution function of the prediction at each datum, given the components before
            it at the same time; the mean over parameter draws. NaN where missing.
        lower: The same just below the datum; less than `upper` for discrete data only.
        draws: One draw for each parameter draw, `(draw, *batch, K, *observation)`.
        event_dim: Number of dimensions of one observation.
    """

    times: Float[np.ndarray, "*batch K"]
    data: Float[np.ndarray, "*batch K *obs"]
    upper: Float[np.ndarray, "*batch K *obs"]
    lower: Float[np.ndarray, "*batch K *obs"]
    draws: Float[np.ndarray, "draw *batch K *obs"]
    event_dim: int = 0


class PathScore(NamedTuple):
    """Log densities of all data of one path at one time, given those before.

    Attributes:
        times: Times at which anything was seen, `(*batch, J)` or `(J,)`.
        per_draw: Log density under each parameter draw, `(draw, *batch, J)`.
    """

    times: Float[np.ndarray, "*batch J"]
    per_draw: Float[np.ndarray, "draw *batch J"]


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions of every datum from the data `horizon` observed times before it and earlier.

    From :func:`k_step`. Parameter draws are those of the fit, which has seen all data: for an
    honest account of a model with many parameters take :func:`lfo`.

    Attributes:
        horizon: How many observed times ahead.
        sites: By observation site; `score(predictions)` summarises them.
        scores: By path.
        num_draws: Number of parameter draws.

    Example:
        >>> from numpyro_sde.diagnostics import Predictions
        >>> Predictions(1, {}, {}, 100).log_scores
        {}
    """

    horizon: int
    sites: dict[str, SitePrediction]
    scores: dict[str, PathScore] = field(default_factory=dict)
    num_draws: int = 0

    @property
    def log_scores(self) -> dict[str, Float[np.ndarray, "*batch J"]]:
        """Log density of the data of each path at each time under the mixture of the draws."""
        return {name: log_score(found.per_draw) for name, found in self.scores.items()}

    @property
    def data(self) -> dict[str, np.ndarray]:
        """The data by site."""
        return {name: site.data for name, site in self.sites.items()}

    def __getitem__(self, site: str) -> np.ndarray:
        return self.sites[site].draws

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {site.data.shape}" for name, site in self.sites.items())
        return f"Predictions({self.horizon} ahead of {shapes}; {self.num_draws} draws)"

    def _repr_html_(self) -> str:
        return html_text(repr(self))


def k_step(
    fit: Any,
    k: int = 1,
    *,
    method: AbstractFilter | None = None,
    model: Callable[..., Any] | None = None,
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    num_draws: int | None = 200,
    rng_key: PRNGKeyArray | None = None,
) -> Predictions:
    """Predict every datum from those `k` observed times before it and earlier.

    The filter's law of the state is moved `k` observed times on without an update. The first
    `k` times are predicted from the start of the path alone.

    Args:
        fit: Anything that :func:`to_arviz` takes: chains, a variational fit, draws with `model=`.
        k: Number of observed times ahead.
        method: The filter; None takes that of `handlers.marginalize`. For a fit whose path is
            latent it must be given: the path's draws have seen all data, so parameters alone are
            used.
        model: As for `to_arviz`; so are the next two.
        model_args: See `model`.
        model_kwargs: See `model`.
        num_draws: At most so many parameter draws, evenly thinned; None takes all. For `k` above
            1 a filter that is not of particles runs once for each observed time and draw.
        rng_key: For draws of predictions, and of a guide; None is `jax.random.key(0)`.

    Raises:
        ValueError: If the path was kept latent and `method` is not given, `k` is not positive, or
            an emission cannot be predicted (a vector neither normal nor of independent
            components).

    Example:
        >>> import jax, numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> from numpyro_sde.diagnostics import k_step
        >>> def model(y):
        ...     rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
        ...     ou = nsde.processes.OrnsteinUhlenbeck(rate, 0.0, 1.0)
        ...     x = numpyro.sample("x", nsde.SDEPath(ou, np.arange(4.0), dist.Normal(0.0, 1.0)))
        ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.5), obs=y)
        >>> y, draws = np.array([0.1, 0.8, np.nan, 0.3]), {"rate": np.array([0.5, 1.0])}
        >>> ahead = k_step(draws, 2, model=model, model_args=(y,), method=nsde.filters.Kalman())
        >>> ahead["y"].shape, ahead.log_scores["x"].round(2).tolist()[2]
        ((2, 4), 0.0)
    """
    if not (isinstance(k, int | np.integer) and k >= 1):
        raise ValueError(f"k must be a whole number of observed times, at least 1, got {k!r}")
    key = jax.random.key(0) if rng_key is None else rng_key
    read_key, run_key = jax.random.split(key)
    reading = read_predictive(
        fit,
        caller="k_step",
        method=method,
        model=model,
        model_args=model_args,
        model_kwargs=model_kwargs,
        rng_key=read_key,
    )
    return predict(reading.thin(num_draws), int(k), run_key)


def predict(reading: Reading, horizon: int, rng_key: PRNGKeyArray) -> Predictions:
    """Predictions of all data under all draws of a reading."""
    shapes: list[Any] = []

    def one(paths: list[SeenPath | DirectPath], key: PRNGKeyArray) -> list[Any]:
        shapes.clear()
        found = []
        for path, own in zip(paths, jax.random.split(key, len(paths)), strict=True):
            shapes.append(_static(path))
            if isinstance(path, SeenPath):
                assert reading.method is not None
                found.append((predict_path(path, reading.method, horizon, own), _data(path)))
            else:
                rows = predict_direct(path.path, path.value, horizon, own)
                found.append((rows, [jnp.asarray(path.value, float)]))
        return found

    batch = _PARTICLE_BATCH if isinstance(reading.method, Particle) else _BATCH
    results = reading.map(one, rng_key, batch)
    sites: dict[str, SitePrediction] = {}
    scores: dict[str, PathScore] = {}
    for static, (rows, data) in zip(shapes, results, strict=True):
        scores[static.name] = PathScore(static.row_times, rows.log_score)
        for k, (name, y) in enumerate(zip(static.sites, data, strict=True)):
            shapes_of = static.replicates[k], static.events[k]
            sites[name] = _site(rows, *shapes_of, static.slots[k], static.times[k], y[0])
    return Predictions(horizon, sites, scores, reading.num_draws)


class _Static(NamedTuple):
    """What of a path is known before tracing."""

    name: str
    sites: list[str]
    events: list[tuple[int, ...]]
    replicates: list[tuple[int, ...]]
    slots: list[np.ndarray]
    times: list[np.ndarray]
    row_times: np.ndarray


def _static(path: SeenPath | DirectPath) -> _Static:
    if isinstance(path, DirectPath):
        law, times = path.path, _known_times(path.path, path.name)
        rows = np.arange(law.num_times)
        slot = np.stack([rows, np.zeros_like(rows)], axis=-1)
        return _Static(path.name, [path.name], [law.state_shape], [()], [slot], [times], times)
    times = _known_times(path.path, path.name)
    index = [s.rows.index % path.path.num_times for s, _ in path.data]
    return _Static(
        path.name,
        path.sites,
        [s.structure.shape for s, _ in path.data],
        [s.replicates for s, _ in path.data],
        slots(path),
        [times[..., i] for i in index],
        times[..., observed_times(path)],
    )


def _known_times(path: AbstractPathLaw, name: str) -> np.ndarray:
    if isinstance(path.times, jax.core.Tracer):
        raise ValueError(f"the times of path {name!r} are known only inside a trace")
    return np.asarray(path.times, np.float64)


def _data(path: SeenPath) -> list[Array]:
    return [jnp.broadcast_to(y, (*path.lead, *s.event_shape)).astype(float) for s, y in path.data]


def _site(
    rows: Any,
    replicates: tuple[int, ...],
    event: tuple[int, ...],
    slot: np.ndarray,
    times: np.ndarray,
    y: np.ndarray,
) -> SitePrediction:
    """Pick a site's components out of a path's predictions, leading axis the draws.

    Replicates, several instruments of one path, stand before time as they do in the data.
    """
    size, more = int(np.prod((*replicates, *event), dtype=int)), len(replicates)
    columns = slot[:, 1:] + np.arange(size)  # (K, size)

    def pick(a: np.ndarray) -> np.ndarray:
        chosen = a[..., slot[:, :1], columns]
        apart = chosen.reshape(*chosen.shape[:-1], *replicates, *event)
        time = chosen.ndim - 2
        return _in_plates(np.moveaxis(apart, time, time + more), 1, more, 1 + len(event))

    y = _in_plates(np.asarray(y, np.float64), 0, more, 1 + len(event))
    with np.errstate(invalid="ignore"):
        upper, lower = pick(rows.upper).mean(axis=0), pick(rows.lower).mean(axis=0)
    return SitePrediction(times, y, upper, lower, pick(rows.draw), len(event))


def _in_plates(a: np.ndarray, front: int, more: int, behind: int) -> np.ndarray:
    """Put replicates back where their plates stand: in place of the ones that they left.

    Args:
        a: Shape `front axes + lead + replicates + behind axes`.
        front: Number of axes in front of the batch.
        more: Number of axes of replicates.
        behind: Number of axes behind them.
    """
    rank = a.ndim - front - more - behind
    ones = [front + i for i in range(rank) if a.shape[front + i] == 1]
    if not more or len(ones) < more:
        return a
    left = ones[len(ones) - more :]
    moved = dict(zip(left, range(front + rank, front + rank + more), strict=True))
    order = [moved.get(axis, axis) for axis in range(front + rank)]
    rest = list(range(front + rank + more, a.ndim))
    return np.transpose(a, [*range(front), *order[front:], *rest, *left]).reshape(
        *a.shape[:front], *(a.shape[axis] for axis in order[front:]), *a.shape[a.ndim - behind :]
    )
