"""What a traced model says about its sites: names for dimensions, clocks, pointwise densities.

A path law and an observation law are recognised by what they offer, `times` (shape `(*batch, T)`)
with time first in the event, and `log_prob_pointwise(value)`; any other law is taken as NumPyro
defines it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray
from numpyro import handlers

from numpyro_sde.models.stack import peel

_WRAPPERS = (dist.ExpandedDistribution, dist.MaskedDistribution, dist.Independent)


def hold_values(model: Callable[..., Any], values: Mapping[str, ArrayLike]) -> Callable[..., Any]:
    """The model with values for its unobserved random sites and its parameters.

    Deterministic sites are computed anew, so that a reparametrised path is still one, and data
    stay what they are, whatever the values hold under their names.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.handlers import seed
        >>> model = lambda: numpyro.sample("a", dist.Normal(0.0, 1.0))
        >>> hold_values(seed(model, jax.random.key(0)), {"a": 0.5})()
        0.5
    """

    def value_of(site: Mapping[str, Any]) -> Any:
        kind = site["type"]
        if kind == "param" or (kind == "sample" and not site["is_observed"]):
            return values.get(site["name"])
        return None

    return handlers.substitute(model, substitute_fn=value_of)


def trace_model(
    model: Callable[..., Any],
    model_args: tuple[Any, ...],
    model_kwargs: Mapping[str, Any],
    values: Mapping[str, ArrayLike],
    rng_key: PRNGKeyArray,
) -> dict[str, dict[str, Any]]:
    """Run a model once, with given values for some sites and seeds for the rest.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> model = lambda: numpyro.sample("a", dist.Normal(0.0, 1.0))
        >>> list(trace_model(model, (), {}, {"a": 0.5}, jax.random.key(0)))
        ['a']
    """
    held = hold_values(handlers.seed(model, rng_key), values)
    return handlers.trace(held).get_trace(*model_args, **model_kwargs)


def is_observation(site: Mapping[str, Any]) -> bool:
    """Whether a traced site is data: observed, and not the carrier of a bare factor."""
    return (
        site["type"] == "sample"
        and bool(site["is_observed"])
        and not site["infer"].get("is_auxiliary", False)
        and not isinstance(site["fn"], dist.Unit)
    )


def is_latent(site: Mapping[str, Any]) -> bool:
    """Whether a traced site is an unobserved random variable of the model."""
    return (
        site["type"] == "sample"
        and not site["is_observed"]
        and not site["infer"].get("is_auxiliary", False)
    )


def unwrap(fn: Any) -> Any:
    """The distribution inside `expand`, `mask` and `to_event`.

    Example:
        >>> import numpyro.distributions as dist
        >>> unwrap(dist.Normal(0.0, 1.0).expand([3]).to_event(1).mask(False)).batch_shape
        ()
    """
    return peel(fn)[0]


def law_times(fn: Any) -> np.ndarray | None:
    """Times of a path or observation law, float64 of shape `(*batch, T)`; None for other laws."""
    times = getattr(unwrap(fn), "times", None)
    if times is None or isinstance(times, jax.core.Tracer):
        return None
    times = np.asarray(times, np.float64)
    if times.ndim == 0 or unwrap(fn).event_shape[:1] != times.shape[-1:]:
        return None
    # A batch whose rows agree has one clock.
    rows = times.reshape(-1, times.shape[-1])
    return rows[0] if np.all(rows == rows[0]) else times


def pointwise_log_prob(fn: Any, value: Array, num_times: int | None = None) -> Array:
    """Log density of each data point of an observation site.

    A law with `log_prob_pointwise` gives one for each time, shape `batch + (T,)`. A law made by
    `to_event` whose first event dimension has `num_times` entries gives one for each of those.
    Any other law gives its `log_prob`. `mask` sets masked entries to 0.

    Args:
        fn: Distribution of the site.
        value: Observed value, shape `batch + event`.
        num_times: Length of a time axis to look for in an event made by `to_event`.

    Returns:
        Array of shape `batch` or `batch + (T,)`.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> law = dist.Normal(jnp.zeros((2, 5)), 1.0).to_event(1)
        >>> pointwise_log_prob(law, jnp.zeros((2, 5)), num_times=5).shape
        (2, 5)
    """
    if hasattr(fn, "log_prob_pointwise"):
        return fn.log_prob_pointwise(value)
    if isinstance(fn, dist.MaskedDistribution):
        inner = pointwise_log_prob(fn.base_dist, value, num_times)
        return jnp.where(_align(fn._mask, fn, inner.ndim), inner, 0.0)
    if isinstance(fn, dist.ExpandedDistribution):
        inner = pointwise_log_prob(fn.base_dist, value, num_times)
        return jnp.broadcast_to(inner, fn.batch_shape + inner.shape[_lead(fn.base_dist, value) :])
    if isinstance(fn, dist.Independent):
        inner = pointwise_log_prob(fn.base_dist, value, num_times)
        if inner.ndim > _lead(fn.base_dist, value):
            return inner  # already one value for each time
        if num_times is not None and fn.event_shape[0] == num_times:
            return inner.sum(tuple(range(_lead(fn, value) + 1, inner.ndim)))
    return fn.log_prob(value)


def _lead(fn: Any, value: Array) -> int:
    """Number of batch dimensions of `fn.log_prob(value)`."""
    return max(len(fn.batch_shape), value.ndim - fn.event_dim)


def _align(mask: ArrayLike, fn: Any, ndim: int) -> Array:
    """A mask over the batch, with one dimension more where there is a time axis."""
    mask = jnp.broadcast_to(mask, fn.batch_shape)
    return mask.reshape(mask.shape + (1,) * (ndim - mask.ndim))


def present_points(site: Mapping[str, Any], log_prob: np.ndarray) -> np.ndarray:
    """Which data points of an observation site were recorded, shape of `log_prob`.

    A point is missing where a mask hides it, where every component of its value is NaN, or
    where the law counts it as nothing (log density exactly 0): a value with a NaN component
    that its law passes over, or the fixed start of an observed path.

    Args:
        site: A traced observation site.
        log_prob: Its :func:`pointwise_log_prob` under one draw.
    """
    fn, value = site["fn"], np.asarray(site["value"])
    nan = (
        np.isnan(value) if np.issubdtype(value.dtype, np.floating) else np.zeros(value.shape, bool)
    )
    nan = np.broadcast_to(nan, np.broadcast_shapes(value.shape, fn.shape()))
    beyond = tuple(range(log_prob.ndim, nan.ndim))
    missing = nan.all(beyond) | (log_prob == 0.0)
    while isinstance(fn, _WRAPPERS):
        if isinstance(fn, dist.MaskedDistribution):
            missing = missing | ~np.asarray(_align(fn._mask, fn, log_prob.ndim), bool)
        fn = fn.base_dist
    return ~np.broadcast_to(missing, log_prob.shape)


class Clock(NamedTuple):
    """A time axis of the results.

    Attributes:
        dim: Name of the dimension.
        labels: Coordinate, shape `(T,)`, or `(*batch, T)` where every series has its own clock.
        model: The times that the laws carry, where known.
    """

    dim: str
    labels: np.ndarray
    model: np.ndarray | None

    @property
    def length(self) -> int:
        """Number of times."""
        return self.labels.shape[-1]


class Layout:
    """Names of the dimensions of every site of a model, and their coordinates.

    Plates name the batch dimensions. The paths' times are the dimension `time`, an observation
    at other times has its own `time_{site}`, the components of a state are `state`; dimensions
    that nothing names are `{site}_dim_{i}`, as ArviZ has it.

    Args:
        trace: A concrete trace of the model; None where there is no model.
        times: The user's labels for `time`, shape `(T,)` or `(*batch, T)`; None takes those of
            the first path.
        dims: The user's names, for each site those of all its dimensions but chain and draw.
        coords: The user's coordinates.
        paths: Where the model's paths live, by site (`path_places.find_paths`): what a path that
            is reparametrised or integrated out does not say itself.

    Raises:
        ValueError: If `times` fits no site.

    Example:
        >>> import numpy as np
        >>> layout = Layout(None, times=np.arange(4.0))
        >>> layout.dims_of("x", (3, 4))
        ('x_dim_0', 'time')
    """

    def __init__(
        self,
        trace: Mapping[str, Mapping[str, Any]] | None,
        times: Any = None,
        dims: Mapping[str, Sequence[str]] | None = None,
        coords: Mapping[str, Any] | None = None,
        paths: Mapping[str, Any] | None = None,
    ) -> None:
        self.trace = dict(trace or {})
        self.unit: str | None = getattr(times, "unit", None)
        self._labels_of = getattr(times, "labels_of", lambda numbers: numbers)
        self._paths = dict(paths or {})
        self.coords: dict[str, Any] = {}
        self._user_dims = {name: tuple(names) for name, names in (dims or {}).items()}
        self._user_coords = dict(coords or {})
        self._clocks: list[Clock] = []
        self._site_clock: dict[str, Clock] = {}
        self._state_size: int | None = None
        self._has_user_times = times is not None
        self._used_times = False
        if times is not None:
            self._clocks.append(Clock("time", _as_labels(times), None))
            if getattr(times, "id_name", None) is not None:  # a plate called as the table's column
                self._user_coords.setdefault(times.id_name, times.ids)
        for name, place in self._paths.items():
            self._site_clock[name] = self._clock_for(name, place.times)
        sites = [site for site in self.trace.values() if site["type"] == "sample"]
        for site in sorted(sites, key=lambda site: bool(site["is_observed"])):
            model_times = law_times(site["fn"])
            if model_times is not None and site["name"] not in self._paths:
                self._site_clock[site["name"]] = self._clock_for(site["name"], model_times)

    @property
    def num_times(self) -> int | None:
        """Length of the dimension `time`; None where no site has times."""
        return self._clocks[0].length if self._clocks else None

    def _clock_for(self, name: str, model_times: np.ndarray) -> Clock:
        for index, clock in enumerate(self._clocks):
            if clock.model is None and clock.length == model_times.shape[-1]:
                self._clocks[index] = clock._replace(model=model_times)
                return self._clocks[index]
            if clock.model is not None and _same_times(clock.model, model_times):
                return clock
        labels = self._labels_of(model_times)
        for clock in self._clocks:  # a subset of labelled times keeps their labels
            if clock.model is None or clock.model.ndim > 1 or model_times.ndim > 1:
                continue
            where = np.abs(clock.model[:, None] - model_times).argmin(axis=0)
            if clock.labels.ndim == 1 and _same_times(clock.model[where], model_times):
                labels = clock.labels[where]
                break
        dim = f"time_{name}" if self._clocks else "time"
        self._clocks.append(Clock(dim, labels, model_times))
        return self._clocks[-1]

    def dims_of(self, name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        """Names for the dimensions of a site's value, and their coordinates noted.

        Args:
            name: The site.
            shape: Shape of one draw of its value.

        Raises:
            ValueError: If the user's `dims` for this site have another number of names.
        """
        if name in self._user_dims:
            dims = self._user_dims[name]
            if len(dims) != len(shape):
                raise ValueError(
                    f"dims[{name!r}] must name {len(shape)} dimensions of shape {shape}, got {dims}"
                )
        else:
            dims = self._derive(name, shape)
        for dim, size in zip(dims, shape, strict=True):
            self._note(dim, size)
        return dims

    def _derive(self, name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        clock, event_dim = self._event(name, shape)
        batch_dim = len(shape) - event_dim
        names: list[str | None] = [None] * len(shape)
        for plate, dim, size in self._plates(name):
            position = batch_dim + dim
            if position >= 0 and shape[position] == size:
                names[position] = plate
        if clock is not None:
            names[batch_dim] = clock.dim
            if event_dim == 2 and not self._is_observed(name):
                names[batch_dim + 1] = self._state_dim(name, shape[-1])
        elif names and names[-1] is None and (plain := self._match(shape[-1])):
            names[-1] = plain.dim  # independent noise over a batch as long as the time axis
        unnamed = iter(range(len(shape)))
        dims = tuple(n if n is not None else f"{name}_dim_{next(unnamed)}" for n in names)
        if clock is not None:
            self._note_clock(clock, dims[:batch_dim], shape[:batch_dim])
        return dims

    def _plates(self, name: str) -> list[tuple[str, int, int]]:
        """Name, position and size of the plates around a site."""
        if name in self._paths and name not in self.trace:
            return list(self._paths[name].plates)
        frames = self.trace.get(name, {}).get("cond_indep_stack", ())
        return [(frame.name, frame.dim, frame.size) for frame in frames]

    def _event(self, name: str, shape: tuple[int, ...]) -> tuple[Clock | None, int]:
        """The clock that a site runs on, and how many trailing dimensions are its event."""
        site = self.trace.get(name)
        if name in self._paths and self._fits(name, shape):
            return self._site_clock[name], self._paths[name].event_dim
        if site is not None and site["type"] == "sample":
            event_dim = site["fn"].event_dim
            clock = self._site_clock.get(name)
            if clock is None and event_dim:
                steps = self._innovation_clock(name, shape, event_dim)
                clock = steps or self._match(shape[len(shape) - event_dim])
            return clock, event_dim
        frames = (site or {}).get("cond_indep_stack", ())
        batch_dim = max((-frame.dim for frame in frames), default=0)
        # A deterministic value (a reparametrised path) tells its event by its shape alone; the
        # plates' dimensions are never part of it.
        likely = len(shape) - batch_dim
        for event_dim in sorted((1, 2), key=lambda dim: dim != likely):
            if event_dim <= likely and (clock := self._match(shape[len(shape) - event_dim])):
                return clock, event_dim
        return None, max(likely, 0)

    def _fits(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a value has the path's own times (`refine` makes more of them)."""
        event_dim = self._paths[name].event_dim
        position = len(shape) - event_dim
        return position >= 0 and shape[position] == self._site_clock[name].length

    def _match(self, length: int) -> Clock | None:
        return next((clock for clock in self._clocks if clock.length == length), None)

    def _innovation_clock(self, name: str, shape: tuple[int, ...], event_dim: int) -> Clock | None:
        """Innovations of a path have one step less than it: label them by the later time."""
        owner = name.rpartition("_")[0]
        is_path = self.trace.get(owner, {}).get("type") == "deterministic"
        if owner in self._paths and is_path:
            own = self._site_clock[owner]
            fits = own.length == shape[len(shape) - event_dim] + 1
            return Clock(f"{own.dim}_step", own.labels[..., 1:], None) if fits else None
        clock = self._match(shape[len(shape) - event_dim] + 1) if is_path else None
        return clock and Clock(f"{clock.dim}_step", clock.labels[..., 1:], None)

    def _is_observed(self, name: str) -> bool:
        return bool(self.trace.get(name, {}).get("is_observed", False))

    def _state_dim(self, name: str, size: int) -> str:
        if self._state_size in (None, size):
            self._state_size = size
            return "state"
        return f"state_{name}"

    def _note_clock(self, clock: Clock, batch: Sequence[str], shape: tuple[int, ...]) -> None:
        self._used_times = self._used_times or clock.dim in ("time", "time_step")
        if clock.labels.ndim == 1:
            self.coords.setdefault(clock.dim, clock.labels)
            return
        lead = clock.labels.ndim - 1
        labels = np.broadcast_to(clock.labels, (*shape[len(shape) - lead :], clock.length))
        dims = (*batch[len(batch) - lead :], clock.dim)
        self.coords.setdefault(f"{clock.dim}_value", (dims, labels))

    def _note(self, dim: str, size: int) -> None:
        user = self._user_coords.get(dim)
        labels = next((clock.labels for clock in self._clocks if clock.dim == dim), None)
        if labels is not None and labels.shape == (size,):  # also of a plate of that name
            self._used_times = self._used_times or dim == "time"
            self.coords.setdefault(dim, labels)
        if user is not None and len(user) != size:
            raise ValueError(f"coords[{dim!r}] must have {size} entries, got {len(user)}")
        if user is not None:
            self.coords[dim] = np.asarray(user)
        else:
            self.coords.setdefault(dim, np.arange(size))

    def check_times_used(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise if the user's `times` labelled nothing.

        Args:
            shapes: Shape of one draw of each site that was named.

        Raises:
            ValueError: Naming the number of times and the shapes of the sites.
        """
        if self._has_user_times and not self._used_times:
            raise ValueError(
                f"times has {self._clocks[0].length} entries, which is no time axis of a site; "
                f"shapes of the sites: {dict(shapes)}"
            )


def _as_labels(times: Any) -> np.ndarray:
    numbers = getattr(times, "times", getattr(times, "values", times))
    labels = np.asarray(times.labels_of(numbers) if hasattr(times, "labels_of") else numbers)
    if labels.ndim == 0 or labels.dtype == object:
        raise ValueError(f"times must be an array of shape (*batch, T), got {times!r}")
    rows = labels.reshape(-1, labels.shape[-1])
    return rows[0] if np.all(rows == rows[0]) else labels


def _same_times(a: Float[np.ndarray, "..."], b: Float[np.ndarray, "..."]) -> bool:
    """Equal up to the rounding of a float32 law."""
    if a.shape != b.shape:
        return False
    return bool(np.allclose(a, b, rtol=1e-6, atol=1e-6 * float(np.ptp(b)) / max(b.shape[-1], 1)))
