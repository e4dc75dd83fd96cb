"""A model run once, with all that it says of its paths.

Engines that treat a path by its states (a filter, a guide, particles) need to know its law, the
batch around it, and every statement that observes it with its data, mask, scale and plates. One
messenger notes them in one run. A statement belongs to a path where what it observes is that path's
value, or is made of it: the first is seen at once, the second is read off the model's trace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.handlers import seed, substitute, trace
from numpyro.primitives import Messenger

from numpyro_sde.distributions.clocks import identity_of_path, remember_value, times_shown
from numpyro_sde.distributions.observation import EmissionPath
from numpyro_sde.distributions.path_law import AbstractPathLaw
from numpyro_sde.distributions.state_space import ObservedPath
from numpyro_sde.distributions.statement import (
    Rows,
    Statement,
    broadcast_lead,
    missing_where_masked,
    stack_replicates,
    with_lead,
)
from numpyro_sde.models.stack import (
    intervenes_on,
    outside_all_handlers,
    path_law,
    peel,
    plates_around,
    power_of,
)
from numpyro_sde.models.timewise import MixesTimesError, TimewiseMap, timewise_map
from numpyro_sde.schemes.dependence import reaches_output

# Begins the name of the call that a path's value comes from in a trace.
MARK = "value_of_path:"

NO_PATH = (
    "the model has no latent SDEPath site, nor a JumpPath. Hand over the model itself: without "
    "handlers.marginalize and without reparametrisation of the path"
)


class PathSite(NamedTuple):
    """A latent path site in one run.

    Attributes:
        law: its law.
        lead: batch shape around it, plates included.
        plates: the plates around it, and size over subsample size of each.
        mask: True, or where its density counts.
        power: power of its density; None for 1.
        value: its value as the law has it.
        intervened: whether `handlers.do` hands the rest of the model another value.
    """

    law: AbstractPathLaw
    lead: tuple[int, ...]
    plates: dict[str, float]
    mask: Any
    power: Any
    value: Any
    intervened: bool = False


class _Observation(NamedTuple):
    law: EmissionPath
    batch_shape: tuple[int, ...]
    plates: dict[str, float]
    mask: Any
    message: Any

    @property
    def has_data(self) -> bool:
        return bool(self.message["is_observed"])


class Reader(Messenger):
    """Give latent paths their values and note their laws and all statements of a run.

    Args:
        values: values of paths by site; the others get their start's mean at all times.
        marked: whether a trace of the run is to tell what is made of each.
    """

    def __init__(self, values: Mapping[str, Any] | None = None, *, marked: bool = False) -> None:
        super().__init__()
        self.marked = marked
        self.values = dict(values or {})
        self.paths: dict[str, PathSite] = {}
        self.observations: dict[str, _Observation] = {}
        self.others: dict[str, Any] = {}
        self.substituted: set[str] = set()
        self.returned: Any = None

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and msg["value"] is not None and not msg["is_observed"]:
            self.substituted.add(msg["name"])
        if msg["type"] != "sample" or msg["is_observed"] or msg["value"] is not None:
            return
        path = path_law(msg["fn"])
        if path is None:
            return
        shape = msg["fn"].shape()
        lead = shape[: len(shape) - path.event_dim]
        given = self.values.get(msg["name"])
        if self.marked:  # a value that depends on nothing, its own law neither
            value = marked_value(msg["name"], jnp.ones(shape, _real(path)))
        else:
            value = stand_in(path, lead) if given is None else given + 0
        plates = plates_around(msg)
        _, mask = peel(msg["fn"])
        power = power_of(msg["scale"], plates, plates)
        site = PathSite(path, lead, plates, mask, power, value, intervenes_on(msg["name"]))
        self.paths[msg["name"]] = site
        msg["value"] = value
        remember_value(value, path.clock)

    def postprocess_message(self, msg: Any) -> None:
        if msg["type"] == "deterministic":
            self.others[msg["name"]] = msg["value"]
        if msg["type"] != "sample" or msg["name"] in self.paths:
            return
        law, mask = peel(msg["fn"])
        if isinstance(law, EmissionPath):
            batch = jnp.broadcast_shapes(
                msg["fn"].batch_shape, _lead_of(msg["value"], len(law.event_shape))
            )
            self.observations[msg["name"]] = _Observation(
                law, batch, plates_around(msg), mask, dict(msg)
            )
        else:
            self.others[msg["name"]] = (msg["fn"], msg["value"])


def _lead_of(value: Any, event_dim: int) -> tuple[int, ...]:
    return np.shape(value)[: np.ndim(value) - event_dim]


def stand_in(path: AbstractPathLaw, lead: tuple[int, ...]) -> Array:
    """A value of the path's shape: its start's mean at all times."""
    try:
        start = jnp.asarray(path.init.mean, jnp.result_type(float))
    except NotImplementedError:  # a law without moments
        start = jnp.zeros(path.init.shape(), jnp.result_type(float))
    start = jnp.where(jnp.isfinite(start), start, 1.0)
    axis = start.ndim - len(path.state_shape)
    whole = jnp.broadcast_to(jnp.expand_dims(start, axis), lead + path.event_shape)
    return whole.astype(_real(path)) + 0


def _real(path: AbstractPathLaw) -> Any:
    """The type of a path's states."""
    return jnp.int32 if path.whole_states else jnp.result_type(float)


class Reading(NamedTuple):
    """What a run of a model says of its latent paths.

    Attributes:
        paths: the sites, by name, in the order of the model.
        observed: each path with the statements that observe it.
    """

    paths: dict[str, PathSite]
    observed: dict[str, ObservedPath]


def read_model(
    model: Callable[..., Any],
    args: Any,
    kwargs: Any,
    *,
    known: Mapping[str, Any] | None = None,
    values: Mapping[str, Any] | None = None,
    only: str | None = None,
) -> Reading:
    """Run a model once, aside, and say what it states of each latent path.

    Nothing of the run reaches handlers outside. Statements without data are left out. What is
    masked out counts as missing; instruments of one path are stacked as replicates; a scale around
    a statement is the power of its likelihood.

    Args:
        model: the model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        known: values of other sites; sites that are not known are drawn.
        values: values of path sites; the others get their start's mean at all times.
        only: the one path asked for: what a statement sees is made of it alone, the others given.

    Raises:
        ValueError: a statement on what mixes the times of a path, or is made of several paths;
            parameters of an emission that depend on the path; data by `substitute`.
    """
    hidden = {*(values or {}), *([] if only is None else [only])}
    known = {k: v for k, v in (known or {}).items() if k not in hidden}

    def run(values: Mapping[str, Any]) -> Reader:
        return run_aside(model, args, kwargs, known, values)

    reader = run(values or {})
    views = _attribute(run, reader, only)
    data: dict[str, list[Any]] = {name: [] for name in reader.paths}
    for name, seen in reader.observations.items():  # in the order of the model
        if name in views and seen.has_data:
            owner, view = views[name]
            data[owner].append(_statement(reader.paths[owner], seen, view))
        elif name in views and name in reader.substituted - known.keys():
            raise ValueError(
                f"observe({name!r}) has no data, and handlers.substitute gives it a value all the "
                "same: a value that is no datum. Use handlers.condition"
            )
    observed = {
        name: ObservedPath(site.law, site.lead, tuple(data[name]), name, site.mask)
        for name, site in reader.paths.items()
        if only in (None, name)
    }
    return Reading(reader.paths, observed)


def latent_paths(model_trace: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the latent path sites in a trace.

    Raises:
        ValueError: there is none.
    """
    names = tuple(
        name
        for name, site in model_trace.items()
        if site["type"] == "sample" and not site["is_observed"] and path_law(site["fn"]) is not None
    )
    if not names:
        raise ValueError(NO_PATH)
    return names


def refuse_weighted(site: PathSite, name: str, engine: str) -> None:
    """Raise where the law of a path is masked or raised to a power, which `engine` cannot do.

    Raises:
        ValueError: naming the path.
    """
    if site.power is not None:
        raise ValueError(
            f"{engine}: path {name!r} stands inside handlers.scale: the power of its law is no law "
            "of a path. Scale the observe statements alone, or sample the path by NUTS"
        )
    mask = site.mask
    concrete = not isinstance(mask, jax.core.Tracer)
    if not (concrete and np.all(np.asarray(mask))):
        raise ValueError(
            f"{engine}: path {name!r} stands inside handlers.mask, so that parts of it have no law "
            "to draw them from: mask the observe statements alone"
        )


def run_aside(
    model: Callable[..., Any],
    args: Any,
    kwargs: Any,
    known: Any,
    values: Mapping[str, Any],
    *,
    marked: bool = False,
) -> Reader:
    """Run a model outside of all handlers, with values of its sites and paths."""
    reader = Reader(values, marked=marked)
    with outside_all_handlers(), trace(), seed(rng_seed=0), reader, substitute(data=known):
        reader.returned = model(*args, **kwargs)
    return reader


def _attribute(
    run: Callable[[Mapping[str, Any]], Reader], reader: Reader, only: str | None
) -> dict[str, tuple[str, Any]]:
    """For each statement on a latent path: the path, and what was made of it before."""
    by_value = {id(site.value): name for name, site in reader.paths.items()}
    views: dict[str, tuple[str, Any]] = {}
    unclear = []
    for name, seen in reader.observations.items():
        owner = by_value.get(identity_of_path(seen.law.observed_path))
        if owner is None:
            unclear.append(name)
        else:
            views[name] = owner, None
    if reader.paths and unclear:
        views.update(_provenance(run, reader, unclear, only))
    return views


def _statement(site: PathSite, seen: _Observation, view: Any) -> tuple[Statement, Any]:
    """A statement and its data, laid out for the batch of its path."""
    law, message = seen.law, seen.message
    rows = np.asarray(law.observed_rows)
    shown = times_shown(law.observed_path)
    if shown is not None:
        rows = np.asarray(shown)[rows]
    elif view is not None and view.rows is not None:
        rows = np.asarray(view.rows)[rows]
    plain = Statement(law.emission, None, view, Rows(rows), law.structure, ())
    power = power_of(message["scale"], seen.plates, site.plates)
    statement, lay_out, _ = stack_replicates(plain, seen.batch_shape, site.lead, power)
    event_dim = len(law.event_shape)
    y = missing_where_masked(message["value"], seen.mask, seen.batch_shape, event_dim)
    y = lay_out(broadcast_lead(y, seen.batch_shape, event_dim), event_dim)
    return with_lead(statement, y, site.lead)


def _provenance(
    run: Callable[[Mapping[str, Any]], Reader],
    reader: Reader,
    unclear: list[str],
    only: str | None,
) -> dict[str, tuple[str, Any]]:
    """For each statement that is made of a path: the path, and how."""
    names = [name for name in reader.paths if only in (None, name)]
    given = {name: site.value for name, site in reader.paths.items() if name not in names}
    labels: list[tuple[str, str]] = []

    def outputs(values: dict[str, Any]) -> list[Any]:
        again = run({**given, **values})
        labels.clear()
        found: list[Any] = []
        for name in unclear:
            seen = again.observations[name]
            leaves = parameters(seen)
            labels.extend([("seen", name), *(("emission", name) for _ in leaves)])
            found.extend([seen.law.observed_path, *leaves])
        return found

    stand_ins = {name: reader.paths[name].value for name in names}
    closed = jax.make_jaxpr(outputs)(stand_ins)
    position = {name: i for i, name in enumerate(sorted(names))}  # as dicts are flattened
    found: dict[str, tuple[str, Any]] = {}
    for i, (kind, site) in enumerate(labels):
        used = [n for n in names if reaches_output(closed.jaxpr, position[n], i)]
        if kind == "seen" and len(used) > 1:
            refuse_several(site, used)
        if kind == "seen" and used:
            view = _view(closed, position[used[0]], i, reader.paths[used[0]], site, used[0])
            found[site] = used[0], view
        elif kind == "emission" and used:
            refuse_parameters(site, used[0])
    return found


def parameters(seen: _Observation) -> list[Any]:
    """What an emission is given besides the state."""
    leaves = jax.tree_util.tree_leaves((seen.law.emission, seen.mask, seen.message["scale"]))
    return [leaf for leaf in leaves if isinstance(leaf, jax.Array)]


def refuse_parameters(site: str, path: str) -> None:
    """Raise a `ValueError` for a statement whose parameters depend on the path."""
    raise ValueError(
        f"observe({site!r}): its params, inputs, mask or scale depend on path {path!r}; use the "
        "state that emission(t, x) is given"
    )


def view_of(
    model: Callable[..., Any], args: Any, kwargs: Any, site: str, path: str, known: Any
) -> TimewiseMap:
    """What a model makes of a path before a statement sees it, given values of other sites.

    Raises:
        ValueError: it mixes the times of the path.
    """
    known = {name: value for name, value in known.items() if name != path}

    def run(values: Mapping[str, Any]) -> Reader:
        return run_aside(model, args, kwargs, known, values)

    return _provenance(run, run({}), [site], path)[site][1]


def refuse_several(site: str, paths: list[str]) -> None:
    """Raise a `ValueError` for a statement on what is made of several paths."""
    raise ValueError(
        f"observe({site!r}) sees what is made of several paths, {paths}: write them as one path "
        "with a vector state, or leave them latent"
    )


def marked_value(name: str, value: Array) -> Array:
    """The value, its origin told by the name of a call in the trace."""

    def path_value(value: Array) -> Array:
        return value + 0

    path_value.__name__ = MARK + name
    return jax.jit(path_value)(value)


def _view(
    closed: Any, index: int, output: int, site: PathSite, name: str, path: str
) -> TimewiseMap:
    front = (*site.lead, site.law.num_times)
    try:
        return timewise_map(closed.jaxpr, closed.consts, front, index, output)
    except MixesTimesError as error:
        raise ValueError(
            f"observe({name!r}) sees what is made of path {path!r}, and {error}: hand observe the "
            "path itself and put the transformation into emission(t, x), or choose times with at="
        ) from None
