"""What stands around a statement: NumPyro's handlers, plates, scales, masks, and the calling frame.

Everything of the package that looks at NumPyro's stack of handlers, or at a frame of its calls,
stands here; `tests/models/test_stack.py` fails where a release of NumPyro changes what is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple

import jax
import numpy as np
import numpyro.distributions as dist
from numpyro.handlers import condition, do, reparam, replay, scale, substitute, trace
from numpyro.infer import MCMC
from numpyro.primitives import _PYRO_STACK, Messenger, plate

from numpyro_sde.distributions.path_law import AbstractPathLaw


def peel(fn: Any) -> tuple[Any, Any]:
    """The distribution inside `expand`, `to_event` and `mask`, and the mask; True for none."""
    mask: Any = True
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        if isinstance(fn, dist.MaskedDistribution):
            mask = mask & fn._mask
        fn = fn.base_dist
    return fn, mask


def path_law(fn: Any) -> AbstractPathLaw | None:
    """The path law inside a distribution, if there is one."""
    law, _ = peel(fn)
    return law if isinstance(law, AbstractPathLaw) else None


@contextlib.contextmanager
def outside_all_handlers() -> Iterator[None]:
    """Set the stack of effect handlers aside."""
    saved = _PYRO_STACK[:]
    _PYRO_STACK.clear()
    try:
        yield
    finally:
        _PYRO_STACK[:] = saved


@contextlib.contextmanager
def outside_all_meshes() -> Iterator[None]:
    """Set the mesh of devices aside that `pmap` announces while it traces parallel chains.

    What is compiled inside is for one device, and may run at once.
    """
    # JAX before 0.7.2 has another `pmap`, which announces none.
    setter = getattr(jax.sharding, "use_abstract_mesh", None)
    with contextlib.nullcontext() if setter is None else setter(jax.sharding.AbstractMesh((), ())):
        yield


def handlers_outside(handler: Messenger | None = None) -> list[Any]:
    """Handlers on the stack, outermost first; those outside one of them."""
    return _PYRO_STACK[:] if handler is None else _PYRO_STACK[: _PYRO_STACK.index(handler)]


def conditions_on(name: str, handler: Messenger | None = None) -> bool:
    """Whether a `condition` handler outside gives a site its value."""
    return any(
        isinstance(h, condition) and name in (h.data or {}) for h in handlers_outside(handler)
    )


def intervenes_on(name: str, handler: Messenger | None = None) -> bool:
    """Whether a `do` handler outside cuts a site off from what the model makes of it."""
    return any(isinstance(h, do) and name in (h.data or {}) for h in handlers_outside(handler))


def substitutes(name: str, handler: Messenger | None = None) -> bool:
    """Whether a `substitute` handler outside gives a site its value."""
    return any(
        isinstance(h, substitute) and name in (h.data or {}) for h in handlers_outside(handler)
    )


def value_outside(name: str, handler: Messenger) -> Any:
    """The value that a `condition` or `substitute` handler outside has for a site, or None."""
    for h in reversed(handlers_outside(handler)):
        if isinstance(h, condition | substitute) and name in (h.data or {}):
            return h.data[name]
    return None


def substituted_here(names: Iterable[str]) -> dict[str, Any]:
    """Values that `substitute` handlers around the present statement have for some sites."""
    found: dict[str, Any] = {}
    for h in _PYRO_STACK:  # the innermost last
        if isinstance(h, substitute) and h.data:
            found.update({name: h.data[name] for name in names if name in h.data})
    return found


def known_values(handler: Messenger) -> dict[str, Any]:
    """Values of the sites run so far, as traces outside a handler have them."""
    known: dict[str, Any] = {}
    for recorder in handlers_outside(handler):
        if isinstance(recorder, trace):
            known.update({name: site["value"] for name, site in recorder.trace.items()})
    return known


def plates_here() -> dict[int, tuple[str, int]]:
    """Name and size of the plates around the present statement, by their dimension."""
    return {h.dim: (h.name, int(h.subsample_size)) for h in _PYRO_STACK if isinstance(h, plate)}


def plates_around(msg: Any) -> dict[str, float]:
    """The plates around a site on the stack: their names, and size over subsample size."""
    ratios = {
        h.name: h.size / h.subsample_size if h.subsample_size else 1.0
        for h in _PYRO_STACK
        if isinstance(h, plate)
    }
    frames = msg.get("cond_indep_stack") or ()
    return {frame.name: ratios.get(frame.name, 1.0) for frame in frames}


def power_of(total: Any, plates: Mapping[str, float], shared: Iterable[str]) -> Any:
    """The power that a site's density is raised to, but for subsampling in the plates `shared`.

    Args:
        total: the site's scale.
        plates: the plates around it, as `plates_around` gives them.
        shared: names of those whose subsampling stands for the whole plate.

    Returns:
        A number or an array; None for 1.
    """
    if total is None:
        return None
    power = total / math.prod(ratio for name, ratio in plates.items() if name in set(shared))
    if isinstance(power, int | float | np.generic | np.ndarray) and np.all(power == 1.0):
        return None
    return power


def explicit_scale(handler: Messenger | None = None) -> bool:
    """Whether a `scale` handler other than of 1 stands around the statement, or a handler."""
    return any(
        isinstance(h, scale) and not (isinstance(h.scale, int | float) and h.scale == 1)
        for h in handlers_outside(handler)
    )


class Run(NamedTuple):
    """One run of a model inside a handler.

    Attributes:
        fn: the model inside the handler.
        config: the handler's choice of a reparametrisation for a site.
        args: positional arguments of the run.
        kwargs: keyword arguments of the run.
        conditions: `condition` handlers outside, outermost first.
        known: values of the sites run so far, as outer traces have them.
        later: for a site still to come, its value where a handler outside has one, else None.
    """

    fn: Callable[..., Any]
    config: Callable[[Any], Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    conditions: tuple[condition, ...]
    known: dict[str, Any]
    later: Callable[[Any], Any] = lambda _: None

    def conditioned(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """A model under the `condition` handlers outside."""
        for outer in reversed(self.conditions):
            model = condition(model, data=outer.data, condition_fn=outer.condition_fn)
        return model

    def looking_ahead(self) -> Callable[..., Any]:
        """The model with the values that its sites have, or will have in this run."""
        return substitute(self.conditioned(self.fn), substitute_fn=self.later)

    @property
    def is_concrete(self) -> bool:
        """Whether the arguments and the data conditioned on are known before tracing."""
        return not any(isinstance(leaf, jax.core.Tracer) for leaf in self._leaves())

    def digest(self) -> bytes:
        """A key that changes with the arguments and the data conditioned on."""
        total = hashlib.sha256()
        for leaf in self._leaves():
            if isinstance(leaf, jax.Array | np.ndarray | float | int):
                array = np.asarray(leaf)
                total.update(repr((array.shape, array.dtype)).encode() + array.tobytes())
            else:
                total.update(repr(leaf).encode())
        return total.digest()

    def _leaves(self) -> list[Any]:
        data = [outer.data for outer in self.conditions]
        return jax.tree_util.tree_leaves((self.args, self.kwargs, data))


def progress_is_shown(frame: FrameType | None) -> bool:
    """Whether the `MCMC` that runs a kernel, found among the calls, shows a progress bar."""
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, MCMC):
            return bool(owner.progress_bar)
        frame = frame.f_back
    return False


def enclosing_run(frame: FrameType | None, name: str, kind: str) -> Run:
    """The run of the model whose `reparam` handler is asking, from the frame of its call.

    NumPyro hands a reparametrisation neither the model nor its arguments; both stand in the
    frames of the handler's calls.

    Raises:
        ValueError: the handler wraps no function, so that there is nothing to look ahead in.
    """
    handler = None
    while frame is not None:
        owner = frame.f_locals.get("self")
        if handler is None and isinstance(owner, reparam) and "msg" in frame.f_locals:
            handler = owner
        calls = frame.f_code is Messenger.__call__.__code__
        if handler is not None and calls and owner is handler:
            return _describe(handler, frame.f_locals["args"], frame.f_locals["kwargs"])
        frame = frame.f_back
    raise ValueError(
        f"{kind} of site {name!r} looks ahead at the model's observations, so it must wrap the "
        "model: numpyro.handlers.reparam(model, config=...), not a context manager"
    )


def _describe(handler: reparam, args: Any, kwargs: Any) -> Run:
    config: Any = handler.config

    def chosen(site: Any) -> Any:
        return config.get(site["name"]) if isinstance(config, dict) else config(site)

    assert handler.fn is not None
    outside = handlers_outside(handler)
    conditions = tuple(h for h in outside if isinstance(h, condition))
    known = known_values(handler)
    return Run(handler.fn, chosen, args, kwargs, conditions, known, _values_to_come(outside, known))


def _values_to_come(outside: list[Any], known: Mapping[str, Any]) -> Callable[[Any], Any]:
    """What handlers outside have for a site that has not run yet: a sampler's value, a guide's."""
    givers = [h for h in outside if isinstance(h, substitute | replay)]

    def of(handler: Any, site: Any) -> Any:
        if isinstance(handler, replay):
            return handler.trace[site["name"]]["value"] if site["name"] in handler.trace else None
        if handler.substitute_fn is not None:
            # A strategy for first values may draw, and no key has come by here yet.
            kwargs = {**site["kwargs"], "rng_key": jax.random.key(0)}
            return handler.substitute_fn({**site, "kwargs": kwargs})
        return (handler.data or {}).get(site["name"])

    def value(site: Any) -> Any:
        ours = site["type"] == "sample" and not site["is_observed"]
        if not ours or site["name"] in known or path_law(site["fn"]) is not None:
            return None
        values = (of(handler, site) for handler in givers)
        return next((v for v in values if v is not None), None)

    return value
