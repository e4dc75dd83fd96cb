"""Time grids: observation times refined to the steps that a scheme needs.

Everything here is host-side NumPy in float64. Step lengths are differences of float64 times,
taken before any cast: in float32 the differences of calendar times lose most of their digits.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from numpyro_sde.describe import html_table

# A quotient such as 0.3 / 0.1 exceeds 3 by rounding alone; it must still give three steps.
_ROUNDING = 1e-9
# Times closer than this, against the largest, are the same.
_SAME = 1e-12
# Indices are 32-bit integers by default in JAX.
_MOST_STEPS = 2**31 - 2


def check_times(times: Any, *, name: str = "times") -> NDArray[np.float64]:
    """Return concrete times as float64, or say what is wrong with them.

    Args:
        times: increasing times, shape `(*batch, T)`, in the user's unit.
        name: the argument to name in an error.

    Raises:
        ValueError: `times` has no dimension or is empty, not finite, unsorted or repeated.
    """
    try:
        array = np.asarray(times)
    except ValueError as error:  # rows of different lengths
        raise ValueError(
            f"{name} must be an array of shape (*batch, T), every series with T times: {error}"
        ) from error
    if array.dtype.kind not in "fiu":
        dates = array.dtype.kind in "mMOUST"
        hint = f'; nsde.data.as_times({name}, unit="day").values makes them' if dates else ""
        raise ValueError(f"{name} must be numbers in one time unit, got dtype {array.dtype}{hint}")
    if isinstance(times, np.ma.MaskedArray) and np.ma.getmaskarray(times).any():
        raise ValueError(f"{name} is a masked array with times masked out: leave these out")
    array = array.astype(np.float64)
    if array.ndim == 0 or array.shape[-1] == 0:
        raise ValueError(f"{name} must have shape (*batch, T) with T >= 1, got {array.shape}")
    if not np.all(np.isfinite(array)):
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(f"{name} must be finite, got {array[where]} at index {where}")
    steps = np.diff(array, axis=-1)
    if not np.all(steps > 0):
        where = tuple(int(i) for i in np.argwhere(~(steps > 0))[0])
        after = (*where[:-1], where[-1] + 1)
        kind = "repeated" if steps[where] == 0 else "unsorted"
        raise ValueError(
            f"{name} must be strictly increasing, got {kind} times "
            f"{array[where]} then {array[after]} at index {where}"
        )
    return array


def resolution(*times: Any) -> float:
    """Differences of times below this are rounding: one time computed in two ways."""
    arrays = [np.asarray(t) for t in times]
    single = any(a.dtype == np.float32 for a in arrays)
    most = max((float(np.nanmax(np.abs(a), initial=0.0)) for a in arrays), default=0.0)
    return (1e-6 if single else _SAME) * most


def broadcast_rows(*arrays: NDArray[Any]) -> tuple[Any, ...]:
    """Batch shape of arrays `(*batch, n)`, and each as `(series, n)`."""
    lead = np.broadcast_shapes(*(a.shape[:-1] for a in arrays))
    return lead, *(
        np.broadcast_to(a, (*lead, a.shape[-1])).reshape(math.prod(lead), a.shape[-1])
        for a in arrays
    )


def _check_max_step(max_step: Any) -> float:
    traced = isinstance(max_step, jax.core.Tracer)
    number = not traced and np.ndim(max_step) == 0 and np.asarray(max_step).dtype.kind in "fiu"
    if not (number and np.isfinite(max_step) and max_step > 0):
        why = "a traced value" if traced else repr(max_step)
        raise ValueError(f"max_step must be one positive finite step length, got {why}")
    return float(max_step)


def _steps_in_each_gap(gaps: NDArray[np.float64], max_step: float) -> NDArray[np.int64]:
    longest = gaps.max(axis=tuple(range(gaps.ndim - 1)), initial=0.0)
    with np.errstate(over="ignore"):
        counts = np.maximum(np.ceil(longest / max_step - _ROUNDING), 1)
    if counts.sum() > _MOST_STEPS:
        raise ValueError(
            f"max_step={max_step} asks for {counts.sum():.3g} steps, more than {_MOST_STEPS:.3g}"
        )
    return counts.astype(np.int64)


def _equal_steps(
    observed: NDArray[np.float64], max_step: Any
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Starts, lengths and number of the steps in each gap, all of one gap equal."""
    gaps = np.diff(observed, axis=-1)
    if max_step is None:
        counts = np.ones(gaps.shape[-1], dtype=np.int64)
    else:
        counts = _steps_in_each_gap(gaps, _check_max_step(max_step))
    step = np.repeat(gaps / counts, counts, axis=-1)
    before = np.cumsum(counts) - counts
    within = np.arange(counts.sum()) - np.repeat(before, counts)
    return np.repeat(observed[..., :-1], counts, axis=-1) + within * step, step, counts


def included(include: Any) -> NDArray[np.float64] | None:
    """Further grid times, `(*batch, M)`, NaN where a series has fewer; None for none.

    Raises:
        ValueError: times that are no numbers or infinite.
        TypeError: traced times.
    """
    if include is None:
        return None
    parts = list(include) if isinstance(include, list | tuple) else [include]
    if any(isinstance(part, jax.core.Tracer) for part in parts):
        raise TypeError(
            "include must be known before tracing (NumPy or a list), got a traced array"
        )
    if all(np.ndim(part) == 0 for part in parts):
        parts = [parts]
    arrays = [np.asarray(part) for part in parts]
    if any(a.dtype.kind not in "fiu" or a.ndim == 0 or np.any(np.isinf(a)) for a in arrays):
        raise ValueError(
            "include must hold finite times, shape (M,) or (*batch, M), NaN as padding, or a list "
            f"of such arrays; got {include!r}"
        )
    lead = np.broadcast_shapes(*(a.shape[:-1] for a in arrays))
    wide = [np.broadcast_to(a, (*lead, a.shape[-1])).astype(np.float64) for a in arrays]
    return np.concatenate(wide, axis=-1)


class _Gap:
    """One interval between two observation times of one series, cut at the times included."""

    def __init__(self, left: float, right: float, within: Any, tolerance: float, max_step: Any):
        edges = [left]
        for t in np.sort(within[(within > left + tolerance) & (within < right - tolerance)]):
            if t > edges[-1] + tolerance:
                edges.append(float(t))
        self.edges = np.array([*edges, right])
        lengths = np.diff(self.edges)
        self.counts = np.ones(lengths.size, np.int64)
        if max_step is not None:
            self.counts = _steps_in_each_gap(lengths, max_step)

    def steps(self, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Starts and lengths of `count` steps, the longest ones cut further."""
        lengths, counts = np.diff(self.edges), self.counts.copy()
        while counts.sum() < count:
            counts[np.argmax(lengths / counts)] += 1
        step = np.repeat(lengths / counts, counts)
        within = np.concatenate([np.arange(n) for n in counts])
        return np.repeat(self.edges[:-1], counts) + within * step, step


def _cut(
    observed: NDArray[np.float64], more: NDArray[np.float64], max_step: float | None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Starts, lengths and number of the steps in each gap, further times being on the grid."""
    tolerance = resolution(observed, more)
    lead, rows, inner = broadcast_rows(observed, more)
    gaps = [
        [_Gap(a, b, within, tolerance, max_step) for a, b in itertools.pairwise(row)]
        for row, within in zip(rows, inner, strict=True)
    ]
    counts = [max(gap.counts.sum() for gap in same) for same in zip(*gaps, strict=True)]
    steps = [
        [gap.steps(count) for gap, count in zip(series, counts, strict=True)] for series in gaps
    ]

    def joined(part: int) -> NDArray[np.float64]:
        each = [np.concatenate([np.zeros(0), *(gap[part] for gap in series)]) for series in steps]
        return np.stack(each).reshape(*lead, -1)

    return joined(0), joined(1), np.asarray(counts, np.int64)


@jax.tree_util.register_pytree_node_class
class TimeGrid:
    """Observation times refined so that no step exceeds `max_step`.

    Each interval between two times is cut into equal steps. In a panel (times of shape
    `(*batch, T)`) every series gets the same number of steps in its k-th interval, the number
    that the longest of them needs, so that `index` serves all series.

    A grid is checked when it is made, on the host, and may then be an argument of a compiled
    function: its times and steps are data (a pytree), its `index` decides the program. That is the
    way for panels of many series: clocks of the same shape share one program, the steps keep the
    digits that they had in float64, and nothing is checked again.

    Args:
        times: strictly increasing times, shape `(*batch, T)`, in the user's unit.
        max_step: longest step allowed, in the same unit; None keeps the times as they are.
        include: further times that must be on the grid, shape `(M,)` or `(*batch, M)`, NaN as
            padding, or a list of such arrays: an input's breakpoints (`sde.breakpoints`), times
            of doses (`doses.breakpoints`). Those outside the observation times are left out.

    Attributes:
        times: all grid times, float64, shape `(*batch, N)`.
        dt: step lengths, float64, shape `(*batch, N - 1)`.
        index: where the observation times stand in the grid, shape `(T,)`.

    Raises:
        ValueError: times that are unsorted, repeated or not finite, a `max_step` that is
            not a positive number, or times to include that are no finite numbers.
        TypeError: traced times to include.

    Example:
        >>> from numpyro_sde import TimeGrid
        >>> grid = TimeGrid([0.0, 1.0, 1.5], max_step=0.25)
        >>> grid.times.tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
        >>> grid.index.tolist()
        [0, 4, 6]
        >>> TimeGrid([0.0, 1.0, 1.5], include=[0.4]).times.tolist()
        [0.0, 0.4, 1.0, 1.5]
        >>> import jax
        >>> steps = jax.jit(lambda grid: grid.dt.sum())  # one program for all grids of this shape
        >>> float(steps(grid))
        1.5
    """

    times: Any  # NDArray[np.float64]; an array of JAX where the grid is an argument
    dt: Any
    index: NDArray[np.int64]

    def __init__(self, times: Any, max_step: float | None = None, *, include: Any = None) -> None:
        if isinstance(times, TimeGrid):
            # Refining a refined grid keeps the observation times of the first one.
            times = times.observation_times
        if isinstance(times, jax.core.Tracer):
            raise ValueError(
                "times of a TimeGrid must be known before tracing (NumPy or a list), got a "
                "traced array: build the grid outside jit and vmap"
            )
        observed = check_times(times)
        more = included(include)
        if more is not None:
            step_bound = None if max_step is None else _check_max_step(max_step)
            inner, step, counts = _cut(observed, more, step_bound)
            observed = np.broadcast_to(observed, (*inner.shape[:-1], observed.shape[-1]))
        else:
            inner, step, counts = _equal_steps(observed, max_step)
        self.index = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self.times = np.concatenate([inner, observed[..., -1:]], axis=-1)
        self.dt = step
        if not np.all(np.diff(self.times, axis=-1) > 0):
            raise ValueError(
                f"max_step={max_step} is below the resolution of float64 at times as large as "
                f"{np.abs(observed).max():.6g}: measure time from a nearer origin"
            )
        for array in (self.times, self.dt, self.index):
            array.setflags(write=False)

    @classmethod
    def of_arrays(cls, times: Any, dt: Any, index: Any = None) -> TimeGrid:
        """A grid of arrays that were checked before; `index` None for all of its times."""
        grid = object.__new__(cls)
        grid.times, grid.dt = times, dt
        grid.index = np.arange(np.shape(times)[-1]) if index is None else index
        return grid

    def tree_flatten(self) -> tuple[tuple[Any, Any], bytes]:
        """Times and steps as data, the index as what decides a program."""
        return (self.times, self.dt), self.index.tobytes()

    @classmethod
    def tree_unflatten(cls, index: bytes, arrays: tuple[Any, Any]) -> TimeGrid:
        """The grid of `tree_flatten`, with other data perhaps."""
        return cls.of_arrays(*arrays, np.frombuffer(index, np.int64))

    @property
    def on_host(self) -> bool:
        """Whether its times are known before tracing."""
        return isinstance(self.times, np.ndarray)

    @property
    def observation_times(self) -> Any:
        """The times that the grid was made from, shape `(*batch, T)`."""
        return self.times[..., self.index]

    def __len__(self) -> int:
        return int(self.times.shape[-1])

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, TimeGrid)
            and np.array_equal(self.index, other.index)
            and _same(self.times, other.times)
            and _same(self.dt, other.dt)
        )

    def __hash__(self) -> int:
        # Arrays of JAX are not hashable, and so neither is a grid of them.
        times = self.times.tobytes() if self.on_host else self.times
        return hash((times, self.index.tobytes()))

    def _repr_html_(self) -> str:
        first, last = self.times.min(), self.times.max()
        rows = [
            ("observation times", str(self.index.size)),
            ("grid times", f"{self.times.shape[-1]}, {first:g} to {last:g}"),
            ("longest step", f"{self.dt.max() if self.dt.size else 0.0:.4g}"),
        ]
        return html_table(type(self).__name__, rows)

    def __repr__(self) -> str:
        counts = f"{self.index.size} observation times, {np.shape(self.times)[-1]} grid times"
        if not self.on_host:
            return f"TimeGrid({counts}, as an argument)"
        longest = self.dt.max() if self.dt.size else 0.0
        return f"TimeGrid({counts}, longest step {longest:.4g})"


def _same(a: Any, b: Any) -> bool:
    """Whether two leaves of grids hold the same; those of placeholders as these say."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return a is b
    if isinstance(a, np.ndarray | jax.Array) and isinstance(b, np.ndarray | jax.Array):
        return np.array_equal(a, b)
    return bool(a == b)
