"""What a model will say about a path after the statement that draws it.

A reparametrisation is asked at the path's own statement, before the observations are made. The
model is therefore run once more, aside, up to its end: with the values known so far, and a
stand-in for the path. Nothing of that run reaches the handlers outside; under `jit` what it
computes and nobody uses is dropped by the compiler.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.handlers import condition, reparam, seed, substitute, trace
from numpyro.primitives import _PYRO_STACK, Messenger

from numpyro_sde.distributions.clocks import identity_of_path, remember_value, times_shown
from numpyro_sde.distributions.observation import EmissionPath
from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.distributions.state_space import Rows, Statement
from numpyro_sde.handlers import path_law
from numpyro_sde.reparam.path import peel


class Run(NamedTuple):
    """One run of a reparametrised model.

    Attributes:
        fn: the model inside the handler.
        config: the handler's choice of a reparametrisation for a site.
        args: positional arguments of the run.
        kwargs: keyword arguments of the run.
        conditions: `condition` handlers outside, outermost first.
        known: values of the sites run so far, as outer traces have them.
    """

    fn: Callable[..., Any]
    config: Callable[[Any], Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    conditions: tuple[condition, ...]
    known: dict[str, Any]

    def conditioned(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """A model under the `condition` handlers outside."""
        for outer in reversed(self.conditions):
            model = condition(model, data=outer.data, condition_fn=outer.condition_fn)
        return model

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
    outside = _PYRO_STACK[: _PYRO_STACK.index(handler)]
    known: dict[str, Any] = {}
    for recorder in outside:
        if isinstance(recorder, trace):
            known.update({name: site["value"] for name, site in recorder.trace.items()})
    config: Any = handler.config

    def chosen(site: Any) -> Any:
        return config.get(site["name"]) if isinstance(config, dict) else config(site)

    assert handler.fn is not None
    return Run(
        handler.fn,
        chosen,
        args,
        kwargs,
        tuple(h for h in outside if isinstance(h, condition)),
        known,
    )


@contextlib.contextmanager
def outside_all_handlers() -> Iterator[None]:
    """Set the stack of effect handlers aside."""
    saved = _PYRO_STACK[:]
    _PYRO_STACK.clear()
    try:
        yield
    finally:
        _PYRO_STACK[:] = saved


class Recorder(Messenger):
    """Give a path a value and note its law and what is observed of it.

    Args:
        name: the path's site.
        value: its value; None for its start's mean at all times.
    """

    def __init__(self, name: str, value: Any = None) -> None:
        super().__init__()
        self.name, self.given = name, value
        self.fn: Any = None
        self.value: Any = None
        self.data: list[tuple[Statement, Array]] = []

    def process_message(self, msg: Any) -> None:
        if msg["type"] != "sample":
            return
        if msg["name"] == self.name:
            path = path_law(msg["fn"])
            if path is not None:
                self.fn, shape = msg["fn"], msg["fn"].shape()
                lead = shape[: len(shape) - path.event_dim]
                self.value = stand_in(path, lead) if self.given is None else self.given + 0.0
                msg["value"] = self.value
                remember_value(self.value, path.clock)
            return
        if self.value is None or not msg["is_observed"]:
            return
        law, mask = peel(msg["fn"])
        if not isinstance(law, EmissionPath) or law.observed_rows is None:
            return
        if identity_of_path(law.observed_path) != id(self.value):
            return
        rows = law.observed_rows
        shown = times_shown(law.observed_path)
        if shown is not None:
            rows = np.asarray(shown)[rows]
        statement = Statement(law.emission, Rows(rows), law.structure)
        y: Any = msg["value"]
        if mask is not True:
            seen = jnp.reshape(mask, jnp.shape(mask) + (1,) * len(statement.event_shape))
            y = jnp.where(seen, jnp.asarray(y, jnp.result_type(float)), jnp.nan)
        self.data.append((statement, y))


def stand_in(path: SDEPath, lead: tuple[int, ...]) -> Array:
    """A value of the path's shape: its start's mean at all times."""
    start = jnp.asarray(path.init.mean, jnp.result_type(float))
    start = jnp.where(jnp.isfinite(start), start, 1.0)
    axis = start.ndim - len(path.state_shape)
    return jnp.broadcast_to(jnp.expand_dims(start, axis), lead + path.event_shape) + 0.0


def look_ahead(name: str, run: Run) -> list[tuple[Statement, Array]]:
    """Observation statements of a path, with their data, in a run of the model.

    Statements without data are left out; what is masked out counts as missing.
    """
    recorder = Recorder(name)
    with (
        outside_all_handlers(),
        trace(),
        seed(rng_seed=0),
        substitute(data={k: v for k, v in run.known.items() if k != name}),
        recorder,
    ):
        run.conditioned(run.fn)(*run.args, **run.kwargs)
    return recorder.data
