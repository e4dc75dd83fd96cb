"""Known functions of time that drive an SDE: temperatures, covariates, controls, rates of infusion.

An input has a clock of its own. Inside one step of a grid it is a polynomial of degree at most 1,
because the grid contains the input's breakpoints (`TimeGrid(..., include=sde.breakpoints)`): the
piece is found once for each step, on the host, at the step's middle, so that neither rounding nor
a scheme that looks at the end of its step can take the next piece's value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from numpyro_sde.grid import broadcast_rows, check_times, resolution

ORDERS = ("hold", "linear", "hold_next")


class Located(NamedTuple):
    """Where each step of a grid stands among an input's times; leading axis the steps.

    In a step that starts at t the input is `start + slope (s - t)`, with
    `start = v[low] + weight (v[high] - v[low])` and `slope = rate (v[high] - v[low])`.
    """

    low: Any
    high: Any
    weight: Any
    rate: Any


class Piece(NamedTuple):
    """An input inside each step: its value at the start, and its slope; None where it is held."""

    start: Array
    slope: Array | None


class Input(eqx.Module):
    """A known function of time, given at times of its own.

    Args:
        times: increasing times of the values, shape `(M,)` or `(*batch, M)`.
        values: the values, shape `(*batch, M)`, or `(*batch, M, q)` for a vector input. They may
            depend on parameters; the times may not.
        order: "hold" (each value from its time on, right-continuous), "linear" (interpolated) or
            "hold_next" (each value up to its time).
        beyond: what holds outside `times`: None, nothing (an error), or "hold", the first and
            the last value.
        event_dim: 0 for a scalar input, 1 for a vector; None reads it off the shapes.

    Raises:
        ValueError: times that are unsorted, repeated or not finite; values that do not fit them
            or are not finite; an unknown `order` or `beyond`.
        TypeError: times that are traced.

    Example:
        >>> import numpyro_sde as nsde
        >>> heat = nsde.Input([0.0, 1.0, 3.0], [20.0, 22.0, 18.0], order="linear")
        >>> float(heat(2.0))
        20.0
    """

    times: Any
    values: Any
    order: str = eqx.field(static=True)
    beyond: str | None = eqx.field(static=True)
    event_dim: int = eqx.field(static=True)

    def __init__(
        self,
        times: Any,
        values: Any,
        order: str = "hold",
        *,
        beyond: str | None = None,
        event_dim: int | None = None,
    ) -> None:
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(map(repr, ORDERS))}, got {order!r}")
        if beyond not in (None, "hold"):
            raise ValueError(f"beyond must be None or 'hold', got {beyond!r}")
        if isinstance(times, jax.core.Tracer):
            raise TypeError(
                "times of an Input must be known before tracing (NumPy or a list), got a traced "
                "array: a time that is inferred moves the grid"
            )
        self.times = check_times(times, name="times of an Input")
        self.values = _values(values)
        self.order, self.beyond = order, beyond
        self.event_dim = _event_dim(np.shape(self.times), np.shape(self.values), event_dim)
        if order == "linear" and self.times.shape[-1] < 2:
            raise ValueError("order='linear' needs at least 2 times, got 1")
        _ = self.batch_shape

    @staticmethod
    def resample(fn: Callable[[Any], Any], times: Any, *, beyond: str | None = None) -> Input:
        """A linear input through a function's values at the given times.

        For smooth functions: choose the times so dense that straight lines between them will do.

        Args:
            fn: function of one time, vectorised over an array of times.
            times: times, shape `(M,)` or `(*batch, M)`.
            beyond: as for `Input`.

        Example:
            >>> import numpy as np, numpyro_sde as nsde
            >>> daily = nsde.Input.resample(np.sin, np.linspace(0.0, 6.0, 601))
            >>> abs(float(daily(1.234)) - float(np.sin(1.234))) < 1e-4
            True
        """
        return Input(times, fn(np.asarray(times, float)), order="linear", beyond=beyond)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Broadcast of the leading dimensions of times and values."""
        values = jnp.shape(self.values)
        lead = values[: len(values) - 1 - self.event_dim]
        try:
            return jnp.broadcast_shapes(jnp.shape(self.times)[:-1], lead)
        except ValueError:
            raise ValueError(
                f"Input: times of shape {jnp.shape(self.times)} and values of shape {values} have "
                "batch dimensions that do not broadcast"
            ) from None

    def leaf_event_dims(self) -> list[int]:
        """Event dimensions of times and values."""
        return [1, 1 + self.event_dim]

    def __call__(self, t: Any) -> Array:
        """Value at one time (of one series); NaN outside the times, unless they are held."""
        times = jnp.asarray(self.times)
        t = jnp.asarray(t, jnp.result_type(times, float))
        values = jnp.asarray(self.values)
        place = _place(jnp, times, t, t, t, self.order, self.beyond)
        piece = _piece(values, Located(*place), self.event_dim)
        return jnp.where(jnp.isnan(t), jnp.nan, piece.start)

    def locate(self, name: str, times: Any, dt: Any) -> Located:
        """Find each step of a grid among the input's times.

        Args:
            name: the input's name, for errors.
            times: grid times, `(*batch, T)`; NumPy, or traced.
            dt: step lengths, `(*batch, T - 1)`.

        Raises:
            ValueError: a step outside the input's times, or one with a breakpoint inside.
        """
        start = times[..., :-1]
        if isinstance(times, jax.core.Tracer):
            return self._locate_traced(start, dt)
        lead, own, start, dt = broadcast_rows(np.asarray(self.times), start, np.asarray(dt))
        rows = [
            self._locate_row(name, number if lead else None, *row)
            for number, row in enumerate(zip(own, start, dt, strict=True))
        ]
        shape = (*lead, start.shape[-1])
        return Located(*(np.stack(part).reshape(shape) for part in zip(*rows, strict=True)))

    def _locate_row(
        self, name: str, series: int | None, own: np.ndarray, start: np.ndarray, dt: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        where = "" if series is None else f" of series {series}"
        tolerance = resolution(own, start)
        if self.beyond is None and start.size:
            end = start[-1] + dt[-1]
            if start[0] < own[0] - tolerance or end > own[-1] + tolerance:
                raise ValueError(
                    f"input {name!r} is given from {own[0]:.6g} to {own[-1]:.6g}, but the path"
                    f"{where} runs from {start[0]:.6g} to {end:.6g}: give it at more times, or "
                    "Input(..., beyond='hold')"
                )
        after = np.searchsorted(own, start + tolerance, side="right")
        inside = own[np.minimum(after, own.size - 1)]
        cut = (after < own.size) & (inside < start + dt - tolerance)
        if np.any(cut):
            step = int(np.flatnonzero(cut)[0])
            raise ValueError(
                f"input {name!r} has a breakpoint at {inside[step]:.6g}, inside the step"
                f"{where} from {start[step]:.6g} to {start[step] + dt[step]:.6g}: put it on the "
                "grid, TimeGrid(times, max_step, include=sde.breakpoints)"
            )
        middle = start + 0.5 * dt
        return _place(np, own, start, middle, middle, self.order, "hold")

    def _locate_traced(self, start: Any, dt: Any) -> Located:
        own = jnp.asarray(self.times)
        place = jnp.vectorize(
            lambda own, start, dt: _place(
                jnp, own, start, start, start + dt, self.order, self.beyond
            ),
            signature="(m),(k),(k)->(k),(k),(k),(k)",
        )
        return Located(*place(own, jnp.asarray(start), jnp.asarray(dt)))

    def piece(self, where: Located) -> Piece:
        """The input inside each step of a grid, for one series."""
        return _piece(jnp.asarray(self.values), where, self.event_dim)


def _place(xp: Any, own: Any, t: Any, first: Any, last: Any, order: str, beyond: Any) -> Any:
    """Place of times t among `own`, in the piece that holds `first` and `last`; NaN if none."""
    count = own.shape[-1]
    side = "left" if order == "hold_next" else "right"
    middle = 0.5 * (first + last)
    after = xp.searchsorted(own, middle, side=side)
    if order == "linear":
        low = xp.clip(after - 1, 0, count - 2)
        high = low + 1
        inside = (middle >= own[0]) & (middle <= own[-1])
        rate = xp.where(inside, 1.0 / (own[high] - own[low]), 0.0)
        weight = xp.where(inside, (t - own[low]) * rate, xp.where(middle < own[0], 0.0, 1.0))
    else:
        low = xp.clip(after if order == "hold_next" else after - 1, 0, count - 1)
        high, rate, weight = low, xp.zeros_like(middle), xp.zeros_like(middle)
    if beyond is None:
        # Traced: what cannot be refused is NaN, a time that is not covered or a step that is cut.
        known = (first >= own[0]) & (last <= own[-1])
        ahead = xp.searchsorted(own, first, side="right")
        cut = (ahead < count) & (own[xp.clip(ahead, 0, count - 1)] < last)
        weight = xp.where(known & ~cut, weight, xp.nan)
    return low, high, weight, rate


def _piece(values: Array, where: Located, event_dim: int) -> Piece:
    dtype = jnp.result_type(values, float)
    low, high = values[where.low].astype(dtype), values[where.high].astype(dtype)
    tail = (1,) * event_dim
    weight = jnp.asarray(where.weight, dtype).reshape(jnp.shape(where.weight) + tail)
    rate = jnp.asarray(where.rate, dtype).reshape(jnp.shape(where.rate) + tail)
    return Piece(low + weight * (high - low), rate * (high - low))


class Inputs(eqx.Module):
    """The inputs of an SDE by name, each evaluated at any time.

    Example:
        >>> import numpyro_sde as nsde
        >>> from numpyro_sde.inputs import Inputs
        >>> float(Inputs({"dose": nsde.Input([0.0, 1.0], [2.0, 3.0])}).at(0.5)["dose"])
        2.0
    """

    names: tuple[str, ...] = eqx.field(static=True)
    each: tuple[Input, ...]

    def __init__(self, inputs: Mapping[str, Input]) -> None:
        if not isinstance(inputs, Mapping) or not inputs:
            raise TypeError(
                "inputs must be a mapping from names to nsde.Input, such as "
                f"{{'heat': nsde.Input(times, values)}}, got {type(inputs).__name__}"
            )
        for name, value in inputs.items():
            if not isinstance(value, Input):
                raise TypeError(
                    f"inputs[{name!r}] must be an nsde.Input(times, values), got "
                    f"{type(value).__name__}"
                )
        self.names, self.each = tuple(inputs), tuple(inputs.values())

    def at(self, t: Any) -> dict[str, Array]:
        """Values at one time of one series."""
        return {name: one(t) for name, one in zip(self.names, self.each, strict=True)}

    @property
    def batch_shapes(self) -> dict[str, tuple[int, ...]]:
        """Batch shape of each input, by how errors call it."""
        pairs = zip(self.names, self.each, strict=True)
        return {f"input {name!r}": one.batch_shape for name, one in pairs}

    def leaf_event_dims(self) -> list[int]:
        """Event dimensions of each array leaf, in flattening order."""
        return [dim for one in self.each for dim in one.leaf_event_dims()]

    @property
    def breakpoints(self) -> Float[np.ndarray, "*batch M"]:
        """All times at which some input may bend or jump."""
        lead = np.broadcast_shapes(*(np.shape(one.times)[:-1] for one in self.each))
        parts = [np.broadcast_to(i.times, (*lead, np.shape(i.times)[-1])) for i in self.each]
        return np.sort(np.concatenate(parts, axis=-1), axis=-1)

    def locate(self, times: Any, dt: Any) -> tuple[Located, ...]:
        """Find each step of a grid among each input's times."""
        return tuple(
            one.locate(name, times, dt) for name, one in zip(self.names, self.each, strict=True)
        )

    def pieces(self, where: tuple[Located, ...]) -> tuple[Piece, ...]:
        """The inputs inside each step of a grid, for one series; no slope where all are held."""
        found = [one.piece(place) for one, place in zip(self.each, where, strict=True)]
        return tuple(
            piece if one.order == "linear" else Piece(piece.start, None)
            for one, piece in zip(self.each, found, strict=True)
        )


class StepInputs(eqx.Module):
    """The inputs of an SDE inside one step: straight lines from the step's start.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.inputs import Piece, StepInputs
        >>> step = StepInputs(("heat",), 1.0, (Piece(jnp.array(2.0), jnp.array(0.5)),))
        >>> float(step.at(3.0)["heat"])
        3.0
    """

    names: tuple[str, ...] = eqx.field(static=True)
    start: Any
    pieces: tuple[Piece, ...]

    def at(self, t: Any) -> dict[str, Array]:
        """Values at one time of the step."""
        return {
            name: p.start if p.slope is None else p.start + p.slope * (t - self.start)
            for name, p in zip(self.names, self.pieces, strict=True)
        }


def _values(values: Any) -> Any:
    if isinstance(values, jax.core.Tracer):
        return values
    array = values if isinstance(values, jax.Array) else np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"values of an Input must be numbers, got dtype {array.dtype}")
    if not np.all(np.isfinite(array)):
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(np.asarray(array)))[0])
        raise ValueError(
            f"values of an Input must be finite, got {np.asarray(array)[where]} at index {where}: "
            "an input is known at all times; leave out what was not recorded"
        )
    return array if array.dtype.kind == "f" else array.astype(float)


def _event_dim(times: tuple[int, ...], values: tuple[int, ...], declared: int | None) -> int:
    count = times[-1]
    fits = [dim for dim in (0, 1) if len(values) > dim and values[len(values) - 1 - dim] == count]
    if declared is None and values == times:
        return 0
    if declared is not None:
        fits = [dim for dim in fits if dim == declared]
    if len(fits) == 2:
        raise ValueError(
            f"values of an Input of shape {values} may be a batch of scalar inputs or one vector "
            f"input at {count} times: say which by event_dim=0 or 1"
        )
    if not fits:
        raise ValueError(
            f"values of an Input must have shape (*batch, {count}) or (*batch, {count}, q) for "
            f"times of shape {times}, got {values}"
        )
    return fits[0]
