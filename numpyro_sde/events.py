"""Known jumps of the state at known times: doses, harvests, resets, changes of units.

A state on the grid is the left limit: an event at a time opens the step that starts there. So a
dose at a sampling time comes after the sample, unless the observation says `side="after"`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from numpyro_sde.grid import broadcast_rows, resolution
from numpyro_sde.parameters import Code, as_function


class Rule(eqx.Module):
    """What an event does to one state of one process."""

    @abstractmethod
    def __call__(self, x: Array, amount: Any, p: Any) -> Array:
        """State right after the event."""


class Applied(Rule):
    """A user's function `apply(x, a, p)`."""

    code: Code

    def __call__(self, x: Array, amount: Any, p: Any) -> Array:
        return jnp.asarray(self.code(x, amount, p))


class Added(Rule):
    """A dose: the part of an amount that arrives is added to one component."""

    to: int = eqx.field(static=True)
    fraction: Code | None

    def share(self, p: Any) -> Any:
        """The part of an amount that arrives."""
        return 1.0 if self.fraction is None else self.fraction(p)

    def __call__(self, x: Array, amount: Any, p: Any) -> Array:
        more = self.share(p) * amount
        return x + more if x.ndim == 0 else x.at[self.to].add(more)


class Placed(NamedTuple):
    """Events on a grid; leading axes `(*batch, T - 1)`, the steps that they open.

    Attributes:
        active: whether an event opens the step.
        amount: its amount, anything where there is none; None where events have no amounts.
        rate: amount per time that flows in during the step (infusions), or None.
    """

    active: np.ndarray
    amount: Any
    rate: Any


def marked_steps(flags: np.ndarray) -> np.ndarray:
    """Steps `(*batch, T - 1)` that are marked in any series."""
    return np.flatnonzero(flags.reshape(-1, flags.shape[-1]).any(axis=0))


def changes(values: np.ndarray) -> np.ndarray:
    """Which steps have another value than the step before, along the last axis."""
    first = np.zeros((*values.shape[:-1], min(1, values.shape[-1])), bool)
    return np.concatenate([first, values[..., 1:] != values[..., :-1]], axis=-1)


class Events(eqx.Module):
    """Known changes of the state at known times.

    `apply(x, a, p)` returns the state right after the event from the one before, for ONE state of
    one process; `a` is the event's amount (None without `amounts`), `p` the parameters of the SDE
    (None without). A state of the path at an event's time is the one before it.

    Args:
        times: times of the events, `(E,)` or `(*batch, E)`, each series with its own; NaN where a
            series has fewer. They must be on the path's grid: `TimeGrid(times, max_step,
            include=events.breakpoints)`.
        apply: the function.
        amounts: what `apply` gets as `a`, shape `(*batch, E)`, or `(*batch, E, ...)` with
            `event_dim` dimensions of one amount; may depend on parameters.
        event_dim: dimensions of one amount.

    Raises:
        ValueError: times that are infinite, repeated or without dimension; amounts that do not fit.
        TypeError: traced times, or an `apply` that is no function of `(x, a, p)`.

    Example:
        >>> import numpyro.distributions as dist, numpyro_sde as nsde
        >>> harvest = nsde.Events([1.0, 2.0], lambda x, a, p: (1.0 - a) * x, amounts=[0.5, 0.2])
        >>> sde = nsde.SDE(lambda t, x: 0.1 * x, lambda t, x: 0.0 * x)
        >>> path = nsde.SDEPath(sde, [0.0, 1.0, 2.0, 3.0], init=8.0, events=[harvest])
        >>> import jax
        >>> [round(float(x), 3) for x in path.sample(jax.random.key(0))]  # before each harvest
        [8.0, 8.8, 4.84, 4.259]
    """

    times: Any
    amounts: Any
    rule: Rule
    event_dim: int = eqx.field(static=True)

    def __init__(
        self,
        times: Any,
        apply: Callable[..., Any],
        amounts: Any = None,
        *,
        event_dim: int = 0,
    ) -> None:
        self.times = check_event_times(times)
        self.event_dim = event_dim
        self.amounts = check_amounts(amounts, self.times, event_dim)
        self.rule = Applied(as_function(apply, "apply", "x, a, p", {}))

    @property
    def name(self) -> str:
        """What to call it in errors."""
        return "Events"

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Broadcast of the leading dimensions of times and amounts."""
        amounts = () if self.amounts is None else jnp.shape(self.amounts)
        lead = amounts[: max(len(amounts) - 1 - self.event_dim, 0)]
        return jnp.broadcast_shapes(np.shape(self.times)[:-1], lead)

    @property
    def breakpoints(self) -> Any:
        """Times that must be on the grid, for `TimeGrid(..., include=)`."""
        return self.times

    @property
    def flows(self) -> bool:
        """Whether something flows in over time (infusions)."""
        return False

    def check_apply(self, params: Any, state_shape: tuple[int, ...]) -> None:
        """Raise a `ValueError` where `apply` does not return the shape of a state."""
        amount = None
        if self.amounts is not None:
            shape = jnp.shape(self.amounts)
            amount = jax.ShapeDtypeStruct(shape[len(shape) - self.event_dim :], float)
        x = jax.ShapeDtypeStruct(state_shape, jnp.result_type(float))
        got = jax.eval_shape(self.rule, x, amount, params)
        if got.shape != state_shape:
            raise ValueError(
                f"apply of {self.name} must return the shape of the state {state_shape}, got "
                f"{got.shape}"
            )

    def place(self, times: np.ndarray) -> tuple[Placed, np.ndarray]:
        """Put the events on a grid of times `(*batch, T)`.

        Returns:
            The events on the grid, and the steps at which something changes in some series.

        Raises:
            ValueError: an event off the grid, outside it, or at its last time.
        """
        lead, own, rows = broadcast_rows(self.times, times)
        found = [_find(self.name, e, row) for e, row in zip(own, rows, strict=True)]
        num_steps = times.shape[-1] - 1
        opens = np.stack([_opens(index, num_steps) for index in found])
        shape = (*lead, num_steps, self.times.shape[-1])
        return self._placed(opens.reshape(shape), None)

    def _placed(
        self,
        opens: np.ndarray,
        flowing: np.ndarray | None,  # noqa: ARG002
    ) -> tuple[Placed, np.ndarray]:
        active = np.asarray(opens.any(axis=-1))
        if self.amounts is None:
            return Placed(active, None, None), marked_steps(active)
        # Steps without an event get the amount of a real one: what `apply` makes of it is thrown
        # away, but a derivative through padding might be NaN.
        real = opens.any(axis=-2, keepdims=True)
        which = np.argmax(opens, axis=-1)
        first = np.broadcast_to(np.argmax(real, axis=-1), which.shape)
        which = np.where(active, which, first)
        amount = _gather(self.amounts, which, self.event_dim)
        return Placed(active, amount, None), marked_steps(active)


class Doses(Events):
    """Doses of a substance; made by `nsde.doses`.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.doses([0.0, 6.0], 100.0, duration=[0.0, 2.0]).breakpoints.tolist()
        [0.0, 6.0, 0.0, 8.0]
    """

    durations: Any

    def __init__(self, times: Any, amounts: Any, rule: Added, durations: Any) -> None:
        self.times, self.event_dim = times, 0
        self.amounts, self.rule, self.durations = amounts, rule, durations

    @property
    def name(self) -> str:
        return "doses"

    @property
    def flows(self) -> bool:
        return self.durations is not None

    @property
    def breakpoints(self) -> Any:
        if self.durations is None:
            return self.times
        return np.concatenate([self.times, self.times + self.durations], axis=-1)

    def check_apply(self, params: Any, state_shape: tuple[int, ...]) -> None:
        assert isinstance(self.rule, Added)
        size = state_shape[0] if state_shape else 1
        if not -size <= self.rule.to < size:
            raise ValueError(
                f"doses go to={self.rule.to}, but the state of shape {state_shape} has {size} "
                "component(s)"
            )
        if self.rule.fraction is None:
            return
        try:
            got = jax.eval_shape(self.rule.share, params)
        except (TypeError, KeyError, IndexError) as error:
            raise ValueError(
                f"fraction of doses is a function of the SDE's params and fails on them: {error!r}"
            ) from error
        if getattr(got, "shape", ()) != ():
            raise ValueError(f"fraction of doses must be one number, got shape {got.shape}")

    def place(self, times: np.ndarray) -> tuple[Placed, np.ndarray]:
        ends = None if self.durations is None else self.times + self.durations
        if ends is None:
            return super().place(times)
        lead, starts, ends, rows = broadcast_rows(self.times, ends, times)
        num_steps = times.shape[-1] - 1
        opens, flowing = [], []
        for start, end, row in zip(starts, ends, rows, strict=True):
            index = _find(self.name, start, row)
            infusion = end > start
            last = _find(self.name, np.where(infusion, end, np.nan), row, is_end=True)
            opens.append(_opens(np.where(infusion, -1, index), num_steps))
            step = np.arange(num_steps)[:, None]
            flowing.append(infusion & (step >= index) & (step < last) & (index >= 0))
        shape = (*lead, num_steps, self.times.shape[-1])
        return self._placed(np.stack(opens).reshape(shape), np.stack(flowing).reshape(shape))

    def _placed(self, opens: np.ndarray, flowing: np.ndarray | None) -> tuple[Placed, np.ndarray]:
        active = np.asarray(opens.any(axis=-1))
        marked = active
        # Two doses at one time add up.
        rate = None
        if flowing is not None:
            per_time = jnp.asarray(self.amounts) / np.where(self.durations > 0, self.durations, 1.0)
            rate = _total(flowing, per_time)
            marked = active | changes(np.swapaxes(flowing, -1, -2)).any(axis=-2)
        return Placed(active, _total(opens, self.amounts), rate), marked_steps(marked)


def doses(
    times: Any,
    amount: Any,
    *,
    to: int = 0,
    fraction: Callable[[Any], Any] | float | None = None,
    duration: Any = None,
    interval: Any = None,
    additional: Any = 0,
    lag: float = 0.0,
) -> Doses:
    """Doses of a substance that a component of the state takes up.

    A bolus adds to the state at once, an infusion (a `duration` above 0) to its drift at a
    constant rate. A sample taken at the time of a dose is taken before it; for one after it say
    `observe(..., side="after")`.

    Args:
        times: times of the doses (NONMEM: TIME), `(E,)` or `(*batch, E)`; NaN where a series has
            fewer. They must be on the path's grid: `TimeGrid(..., include=doses.breakpoints)`.
        amount: amounts (AMT), a number or `(*batch, E)`; may depend on parameters.
        to: the component of the state that takes them up (CMT).
        fraction: the part that arrives (bioavailability, F), a number or a function of the SDE's
            params, `lambda p: p["F"]`.
        duration: how long each infusion lasts (AMT / RATE), a number or `(*batch, E)`; 0 or NaN for
            a bolus.
        interval: time between repetitions of a dose (II).
        additional: how many times each dose is repeated after the first (ADDL), a whole number or
            `(*batch, E)`.
        lag: how much later than `times` they arrive (ALAG), a number.

    Returns:
        Events for `SDEPath(..., events=[...])`.

    Raises:
        ValueError: times or amounts that do not fit or are not finite, a negative duration,
            repetitions without interval.
        TypeError: traced times, lag or duration: they move the grid. An absorption delay that is
            inferred is a chain of transit compartments.

    Example:
        >>> import numpyro_sde as nsde
        >>> twice_a_day = nsde.doses(0.0, 100.0, interval=12.0, additional=3)
        >>> twice_a_day.times.tolist()
        [0.0, 12.0, 24.0, 36.0]
    """
    for name, value in (("lag", lag), ("duration", duration), ("interval", interval)):
        if isinstance(value, jax.core.Tracer):
            raise TypeError(
                f"{name} of doses must be known before tracing, got a traced value: one that is "
                "inferred moves the grid. Use a chain of transit compartments for an absorption "
                "delay"
            )
    when = check_event_times(np.atleast_1d(times) if np.ndim(times) == 0 else times, "doses", True)
    amounts = check_amounts(amount, when, 0, "amount of doses")
    repeats = np.asarray(additional)
    if repeats.dtype.kind not in "iu" or np.any(repeats < 0):
        raise ValueError(f"additional must be whole numbers >= 0, got {additional!r}")
    long = None if duration is None else np.nan_to_num(np.asarray(duration, float))
    if long is not None and (np.any(long < 0) or np.any(np.isinf(long))):
        raise ValueError(f"duration of doses must be finite and >= 0, got {duration!r}")
    count = int(repeats.max(initial=0)) + 1
    if count > 1:
        gap = np.asarray(np.nan if interval is None else interval, float)
        if not np.all(gap > 0):
            raise ValueError(
                f"additional={additional!r} repeats doses every interval=, a positive time; got "
                f"{interval!r}"
            )
        shape = np.broadcast_shapes(when.shape, repeats.shape, gap.shape)
        turn = np.arange(count)
        spread = (
            np.broadcast_to(when, shape)[..., None] + turn * np.broadcast_to(gap, shape)[..., None]
        )
        spread = np.where(turn <= np.broadcast_to(repeats, shape)[..., None], spread, np.nan)
        amounts = _repeat(amounts, shape, count)
        long = None if long is None else _repeat(long, shape, count)
        when = spread.reshape(*shape[:-1], -1)
    if long is not None:
        long = np.broadcast_to(long, np.broadcast_shapes(np.shape(long), when.shape))
        long = long if np.any(long > 0) else None
    part = None
    if fraction is not None:
        constant = fraction if not callable(fraction) else None
        part = as_function(
            fraction if callable(fraction) else lambda p: constant,  # noqa: ARG005
            "fraction of doses",
            "p",
            {},
        )
    return Doses(when + lag, amounts, Added(int(to), part), long)


def _repeat(values: Any, shape: tuple[int, ...], count: int) -> Any:
    xp: Any = np if isinstance(values, np.ndarray) else jnp
    wide = xp.broadcast_to(values, np.broadcast_shapes(np.shape(values), shape))
    return xp.repeat(wide, count, axis=-1)


def check_event_times(times: Any, name: str = "Events", repeated: bool = False) -> np.ndarray:
    """Event times as float64 `(*batch, E)`, or an error that says what is wrong with them."""
    if isinstance(times, jax.core.Tracer):
        raise TypeError(
            f"times of {name} must be known before tracing (NumPy or a list), got a traced array"
        )
    array = np.asarray(times)
    if array.dtype.kind not in "fiu" or array.ndim == 0 or array.shape[-1] == 0:
        raise ValueError(
            f"times of {name} must be numbers of shape (E,) or (*batch, E), got dtype "
            f"{array.dtype} and shape {array.shape}"
        )
    array = array.astype(np.float64)
    if np.any(np.isinf(array)):
        raise ValueError(f"times of {name} must be finite, or NaN as padding; got {times!r}")
    ordered = np.sort(array, axis=-1)
    if not repeated and np.any(np.diff(ordered, axis=-1) == 0):
        same = ordered[..., 1:][np.diff(ordered, axis=-1) == 0][0]
        raise ValueError(
            f"times of {name} hold {same:.6g} twice in one series: put the second in another "
            "Events; those of one time act in the order of the list"
        )
    return array


def check_amounts(amounts: Any, times: np.ndarray, event_dim: int, name: str = "amounts") -> Any:
    """Amounts with a dimension for the events, those of padding being 0; or a `ValueError`."""
    if amounts is None:
        return None
    xp: Any = jnp if isinstance(amounts, jax.Array) else np
    array = xp.asarray(amounts)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} must be numbers, got dtype {array.dtype}")
    lead = array.shape[: array.ndim - event_dim]
    if array.ndim < event_dim or (lead and lead[-1] not in (1, times.shape[-1])):
        raise ValueError(
            f"{name} must have shape (*batch, {times.shape[-1]}) for times of shape {times.shape}"
            f"{f', and {event_dim} dimension(s) of one amount' if event_dim else ''}; got shape "
            f"{array.shape}"
        )
    known = ~np.isnan(times)
    known = known.reshape(known.shape + (1,) * event_dim)
    array = xp.where(known, array.astype(float), 0.0)
    if not isinstance(array, jax.core.Tracer) and not np.all(np.isfinite(array)):
        raise ValueError(f"{name} must be finite where there is an event, got {amounts!r}")
    return array


def _find(name: str, events: np.ndarray, grid: np.ndarray, is_end: bool = False) -> np.ndarray:
    """Grid index of each event of one series, -1 for padding; ends past the grid are its end."""
    tolerance = resolution(events, grid)
    index = np.full(events.shape, -1)
    for number, t in enumerate(events):
        if np.isnan(t):
            continue
        if is_end and t >= grid[-1] - tolerance:
            index[number] = grid.size - 1
            continue
        nearest = int(np.argmin(np.abs(grid - t)))
        what = f"{name}: the {'infusion ending' if is_end else 'event'} at time {t:.6g}"
        if t > grid[-1] - tolerance:
            raise ValueError(
                f"{what} comes at or after the path's last time {grid[-1]:.6g}, where no state "
                "shows it: leave it out (NaN), or let the path end later"
            )
        if t < grid[0] - tolerance:
            raise ValueError(
                f"{what} comes before the path's first time {grid[0]:.6g}: put it into init, or "
                "let the path start earlier"
            )
        if abs(grid[nearest] - t) > tolerance:
            raise ValueError(
                f"{what} is not on the path's grid (nearest {grid[nearest]:.6g}): use "
                "TimeGrid(times, max_step, include=events.breakpoints)"
            )
        index[number] = nearest
    return index


def _opens(index: np.ndarray, num_steps: int) -> np.ndarray:
    """Which event opens which step, `(T - 1, E)`."""
    return (np.arange(num_steps)[:, None] == index) & (index >= 0)


def _total(chosen: np.ndarray, amounts: Any) -> Any:
    """Sum of the amounts chosen for each step."""
    xp: Any = np if isinstance(amounts, np.ndarray) else jnp
    return xp.sum(xp.where(chosen, amounts[..., None, :], 0.0), axis=-1)


def _gather(amounts: Any, which: np.ndarray, event_dim: int) -> Any:
    """Amount of the event that opens each step."""
    xp: Any = np if isinstance(amounts, np.ndarray) else jnp
    cut = amounts.ndim - event_dim
    count = amounts.shape[cut - 1] if cut else 1
    lead = np.broadcast_shapes(which.shape[:-1], amounts.shape[: max(cut - 1, 0)])
    tail = amounts.shape[cut:]
    wide = xp.broadcast_to(amounts, (*lead, count, *tail))
    index = np.broadcast_to(which, (*lead, which.shape[-1]))
    index = np.minimum(index, count - 1).reshape(index.shape + (1,) * event_dim)
    return xp.take_along_axis(wide, index, axis=len(lead))
