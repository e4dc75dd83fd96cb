"""The same model with its paths going on to further times, under scenarios of what drives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import ArrayLike

from numpyro_sde.accumulate import AccumulatedSDE, Resets
from numpyro_sde.distributions.path_law import AbstractPathLaw
from numpyro_sde.events import Events
from numpyro_sde.grid import check_times
from numpyro_sde.handlers import _ChangePath, path_law
from numpyro_sde.inputs import Input, Inputs
from numpyro_sde.joining import JoinedClock, join_clocks

_CHECKED = 200  # times at which a scenario is held against the input of the fit
_ROUNDING = 1e-5


class extend(_ChangePath):  # noqa: N801
    """The same model with its paths going on to further times.

    Every path site becomes a path on its own times and the further ones, between them or after the
    last; the model still sees it at its own. The site's value in traces is the long path. This is
    what `nsde.forecast` runs; use it to look at the laws.

    Args:
        fn: the model.
        times: further times, `(F,)`, or `(*batch, F)` with a clock for each series.
        inputs: scenarios of inputs by name, each over the whole time: up to `until` they must be
            what the model has.
        events: further events, after the model's own.
        max_step: longest step of the grid; None takes the longest of the path's own steps.
        until: time up to which scenarios must equal the model's inputs; None is the path's end.

    Raises:
        ValueError: times before a path's start, a scenario for an input that no path has or that
            changes the past, or times known only inside a trace.

    Example:
        >>> import numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model():
        ...     ou = nsde.processes.OrnsteinUhlenbeck(rate=1.0, mean=0.0, scale=0.5)
        ...     x = numpyro.sample("x", nsde.SDEPath(ou, np.arange(3.0), dist.Normal(0.0, 1.0)))
        ...     return nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1))
        >>> longer = nsde.handlers.extend(model, [3.0, 4.0])
        >>> sites = numpyro.handlers.trace(numpyro.handlers.seed(longer, 0)).get_trace()
        >>> sites["x"]["value"].shape, sites["y"]["value"].shape
        ((5,), (3,))
    """

    def __init__(
        self,
        fn: Callable[..., Any] | None = None,
        times: ArrayLike | None = None,
        *,
        inputs: Mapping[str, Input] | None = None,
        events: Events | Sequence[Events] = (),
        max_step: float | None = None,
        until: float | None = None,
    ) -> None:
        if times is None:
            raise ValueError("extend needs times= to go on to")
        self.times = check_times(np.sort(np.asarray(times, np.float64), axis=-1))
        self.inputs = dict(inputs or {})
        self.events = (events,) if isinstance(events, Events) else tuple(events)
        self.max_step = max_step
        self.until = until
        self.laws: dict[str, AbstractPathLaw] = {}
        self.clocks: dict[str, JoinedClock] = {}
        self._used: set[str] = set()
        super().__init__(fn)

    def __enter__(self) -> None:
        self.laws, self.clocks, self._used = {}, {}, set()
        super().__enter__()

    def __exit__(self, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        super().__exit__(exc_type, exc_value, traceback)
        if exc_type is None and (unknown := set(self.inputs) - self._used):
            raise ValueError(f"inputs names {sorted(unknown)}, which no path of the model has")

    def process_message(self, msg: Any) -> None:
        path = path_law(msg["fn"]) if msg["type"] == "sample" else None
        if path is not None and msg["is_observed"]:
            # Seen itself: the model keeps it as it is, and its law goes on.
            self.replace(msg["name"], path)
            self.changed[msg["name"]] = np.arange(path.num_times), path.clock
            return
        super().process_message(msg)

    def replace(self, name: str, path: AbstractPathLaw) -> tuple[AbstractPathLaw, np.ndarray]:
        if isinstance(path.times, jax.core.Tracer):
            raise ValueError(
                f"extend: the times of path {name!r} are traced; hand them to the model as NumPy "
                "arrays, outside jit"
            )
        own = np.asarray(path.times, np.float64)
        step = self.max_step
        if step is None and np.size(path.dt):
            step = float(np.max(path.dt))
        sde = self._driven(name, path)
        further = self.times
        added, waiting = self.events, []
        if isinstance(path.sde, AccumulatedSDE):
            added = (*path.sde.resets_at(own, self.times), *added)
            waiting = [one for one in path.events if isinstance(one, Resets)]
        breaks = [np.asarray(one.breakpoints, np.float64) for one in (*waiting, *self.events)]
        if self.inputs and sde.inputs is not None:
            breaks.append(np.asarray(sde.breakpoints, np.float64))
        further = _with_breaks(own, further, breaks)
        clock = join_clocks(own, further, step)
        changes: dict[str, Any] = {} if sde is path.sde else {"sde": sde}
        if added:
            changes["events"] = (*path.events, *added)
        law = path.replace(times=clock.grid, **changes)
        self.laws[name], self.clocks[name] = law, clock
        return law, clock.old

    def place(self, name: str) -> np.ndarray:
        """Where the further times, in increasing order, stand on a path's grid."""
        times = self.clocks[name].grid.times
        lead = np.broadcast_shapes(times.shape[:-1], self.times.shape[:-1])
        grid = np.broadcast_to(times, (*lead, times.shape[-1])).reshape(-1, times.shape[-1])
        own = np.broadcast_to(self.times, (*lead, self.times.shape[-1]))
        own = own.reshape(-1, own.shape[-1])
        found = [np.abs(g[:, None] - t).argmin(axis=0) for g, t in zip(grid, own, strict=True)]
        return np.stack(found).reshape(*lead, -1) if lead else found[0]

    def _driven(self, name: str, path: AbstractPathLaw) -> Any:
        """The equation under the scenario."""
        inputs = path.sde.inputs
        if not self.inputs or not isinstance(inputs, Inputs):
            return path.sde
        known = dict(zip(inputs.names, inputs.each, strict=True))
        for key in known.keys() & self.inputs.keys():
            self._used.add(key)
            end = float(np.max(path.times)) if self.until is None else self.until
            _check_past(name, key, known[key], self.inputs[key], float(np.min(path.times)), end)
        return path.sde._with(inputs=Inputs({k: self.inputs.get(k, v) for k, v in known.items()}))


def _with_breaks(own: np.ndarray, times: np.ndarray, breaks: list[np.ndarray]) -> np.ndarray:
    """Further times with what must be on the grid before the last of them."""
    first, last = own.min(), max(own.max(), times.max())
    for more in breaks:
        lead = np.broadcast_shapes(times.shape[:-1], more.shape[:-1])
        # A filler of NaN, and what lies outside, stands for a time that is there already.
        inside = np.isfinite(more) & (more >= first) & (more <= last)
        more = np.where(inside, more, times[..., -1:] if times.ndim == more.ndim else times.max())
        parts = [np.broadcast_to(a, (*lead, a.shape[-1])) for a in (times, more)]
        times = np.sort(np.concatenate(parts, axis=-1), axis=-1)
    return times


def _check_past(
    path: str, name: str, fitted: Input, scenario: Input, start: float, end: float
) -> None:
    """Raise where a scenario changes what drove the path up to its last datum."""
    if any(isinstance(one.values, jax.core.Tracer) for one in (fitted, scenario)):
        return
    if fitted.batch_shape or scenario.batch_shape:
        return  # series by series, this is the fit's own business
    for t in np.linspace(start, end, _CHECKED, endpoint=False):
        with jax.ensure_compile_time_eval():  # both are known, though the model may be traced
            before, after = np.asarray(fitted(t)), np.asarray(scenario(t))
        if before.shape != after.shape or not np.allclose(before, after, rtol=_ROUNDING, atol=1e-8):
            raise ValueError(
                f"scenario {name!r} must be what drove path {path!r} up to its last datum at "
                f"{end:g}: at {t:g} it is {after}, the fit had {before}. Give the whole input, "
                "past and future"
            )
