"""Interval observations: integrals of the state since the last reading, as states with resets.

An average over a day, rain in a gauge, counts since the last visit: the integral is one more
component of the state, `dA = g(t, X) dt`, set back to zero by an event after each reading. It takes
no filter of its own: where the SDE and g are linear, so is the wide model, and `Kalman` is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike

from numpyro_sde.distributions.accumulators import WithAccumulators
from numpyro_sde.distributions.arguments import as_init
from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.events import Events, Placed
from numpyro_sde.grid import TimeGrid, broadcast_rows, check_times, resolution
from numpyro_sde.parameters import Code, as_function
from numpyro_sde.schemes.base import AbstractScheme
from numpyro_sde.sde import SDE


class Resets(Events):
    """Integrals set back to zero; those outside the path's times wait until it goes on to them.

    Args:
        times: when, `(E,)` or `(*batch, E)`.
        stays: factor of each component of the state, 0 for the integrals.
        carry: 1 where a reading is missing and the integrals run on, `(*batch, E)`; None for never.

    Example:
        >>> import numpy as np
        >>> from numpyro_sde.accumulate import Resets
        >>> Resets(np.array([0.0, 1.0, 5.0]), (1.0, 0.0)).place(np.arange(3.0))[0].active.tolist()
        [True, True]
    """

    def __init__(self, times: Any, stays: tuple[float, ...], carry: Any = None) -> None:
        super().__init__(times, _set_back(stays), carry)

    def place(self, times: np.ndarray) -> tuple[Placed, np.ndarray]:
        lead, own, rows = broadcast_rows(self.times, times)
        tolerance = np.array([resolution(e, row) for e, row in zip(own, rows, strict=True)])[
            :, None
        ]
        inside = (own >= rows[:, :1] - tolerance) & (own <= rows[:, -1:] - tolerance)
        active: Resets = eqx.tree_at(
            lambda e: e.times, self, np.where(inside, own, np.nan).reshape(*lead, own.shape[-1])
        )
        return super(Resets, active).place(times)


class AccumulatedSDE(SDE):
    """An SDE with integrals of its state as further components, made by `accumulate`.

    Example:
        >>> import numpyro.distributions as dist, numpyro_sde as nsde
        >>> ou = nsde.processes.OrnsteinUhlenbeck(rate=1.0, mean=0.0, scale=0.5)
        >>> wide = nsde.accumulate(ou, {"area": lambda t, x, p: x})
        >>> wide.path([0.0, 1.0, 2.0], init=dist.Normal(0.0, 1.0)).sde.names
        ('area',)
    """

    state_shape: tuple[int, ...] = eqx.field(static=True)
    names: tuple[str, ...] = eqx.field(static=True)
    # Rows of the path at which a reading ends, as the model sees it; None where it has to say.
    reading_rows: tuple[int, ...] | None = eqx.field(static=True)
    # Factor of each component where a reading sets integrals back; None where no reading does.
    stays: tuple[float, ...] | None = eqx.field(static=True)

    def __init__(
        self,
        sde: SDE,
        integrands: Mapping[str, Code],
        state_shape: tuple[int, ...],
        reading_rows: tuple[int, ...] | None,
        stays: tuple[float, ...] | None,
    ) -> None:
        self.parameters, self.noise, self.interpretation = sde.parameters, sde.noise, "ito"
        self.inputs, self.push, self.jumps = sde.inputs, None, ()
        self.state_shape, self.names = state_shape, tuple(integrands)
        self.reading_rows, self.stays = reading_rows, stays
        self.interpretation = sde.interpretation
        size = state_shape[0] if state_shape else 1
        drift, diffusion = sde.drift.function, sde.diffusion.function
        parts = [code.function for code in integrands.values()]

        def own(x: Array) -> Array:
            return x[:size] if state_shape else x[0]

        def wide_drift(t: Any, x: Array, *rest: Any) -> Array:
            state = own(x)
            rates = [jnp.reshape(part(t, state, *rest), (1,)) for part in parts]
            return jnp.concatenate([jnp.reshape(drift(t, state, *rest), (size,)), *rates])

        def wide_diffusion(t: Any, x: Array, *rest: Any) -> Array:
            # Columns, also for independent noises: the integrals have none of their own.
            state = own(x)
            value = jnp.asarray(diffusion(t, state, *rest))
            if value.ndim > state.ndim:
                columns = jnp.reshape(value, (size, -1))
            else:
                columns = jnp.diag(jnp.broadcast_to(jnp.reshape(value, (-1,)), (size,)))
            return jnp.pad(columns, ((0, len(parts)), (0, 0)))

        self.drift, self.diffusion = Code(wide_drift), Code(wide_diffusion)

    def resets_at(self, own: np.ndarray, further: np.ndarray) -> tuple[Resets, ...]:
        """Resets by readings at further times `(*batch, F)`, after a path's own `(*batch, T)`."""
        if self.stays is None:
            return ()
        later = further > own[..., -1:] + resolution(further, own)
        return (Resets(np.where(later, further, np.nan), self.stays),)


class Split(eqx.Module):
    """Parts a wide state into the process and its integrals, for emissions.

    Example:
        >>> import jax.numpy as jnp
        >>> from numpyro_sde.accumulate import Split
        >>> x, acc = Split((), ("area",))(jnp.array([0.5, 2.0]))
        >>> float(x), float(acc["area"])
        (0.5, 2.0)
    """

    state_shape: tuple[int, ...] = eqx.field(static=True)
    names: tuple[str, ...] = eqx.field(static=True)

    def __call__(self, x: Array) -> tuple[Array, dict[str, Array]]:
        size = self.state_shape[0] if self.state_shape else 1
        integrals = {name: x[size + k] for k, name in enumerate(self.names)}
        return (x[:size] if self.state_shape else x[0]), integrals


class Accumulated:
    """An SDE and integrals of its state, read and set back at given times; from `accumulate`."""

    def __init__(self, sde: SDE, integrands: dict[str, Code], since: Any, missing: str) -> None:
        self.sde, self.integrands, self.since, self.missing = sde, integrands, since, missing

    @property
    def breakpoints(self) -> Any:
        """Times of resets that must be on the grid, for `TimeGrid(..., include=)`."""
        given = [when for when in self.since.values() if not isinstance(when, str)]
        return np.concatenate(given, axis=-1) if given else np.zeros(0)

    def path(
        self,
        times: ArrayLike | TimeGrid,
        init: dist.Distribution | ArrayLike,
        *,
        scheme: AbstractScheme | None = None,
        events: Events | Sequence[Events] = (),
        obs: ArrayLike | None = None,
    ) -> SDEPath:
        """The law of the states and integrals at the given times.

        Args:
            times: increasing times, shape `(*batch, T)`, or a `TimeGrid`: with
                `since="observation"` readings are at its observation times but the first.
            init: distribution of the first state of the process, or a fixed one.
            scheme: as for `SDEPath`.
            events: further events; doses go to components of the process.
            obs: with `missing="carry"`, the readings, `(*batch, K)` or `(*batch, K, q)`: where one
                is NaN, the integral runs on.

        Returns:
            A path whose states `(d + k,)` are those of the process and the integrals.

        Raises:
            ValueError: resets off the grid; readings that do not fit the times.
            TypeError: traced times.
        """
        grid = times if isinstance(times, TimeGrid) else None
        if grid is None:
            times = check_times(times)
        when = grid.observation_times if grid is not None else cast("np.ndarray", times)
        index = grid.index if grid is not None else np.arange(when.shape[-1])
        start = as_init(init)
        shape = start.event_shape
        every = all(isinstance(since, str) for since in self.since.values())
        rows = tuple(int(i) for i in index[1:]) if every else None
        size = shape[0] if shape else 1
        groups = {key: self._stays(size, names) for key, names in self._groups().items()}
        stays = groups.get("observation")
        wide = AccumulatedSDE(self.sde, self.integrands, shape, rows, stays)
        resets = self._resets(when, groups, obs)
        further = (events,) if isinstance(events, Events) else tuple(events)
        law = WithAccumulators(start, len(self.integrands))
        return SDEPath(
            wide,
            grid if grid is not None else times,
            law.as_normal(),
            scheme=scheme,
            events=(*resets, *further),
        )

    def _resets(
        self, when: np.ndarray, groups: dict[Any, tuple[float, ...]], obs: Any
    ) -> list[Resets]:
        """One kind of event for the integrals that are set back at the same times."""
        resets = []
        for key, stays in groups.items():
            if key == "observation":
                # At the last time too: it acts where the path goes on.
                resets.append(Resets(when, stays, self._carried(when, obs)))
            else:
                shape, data = key
                resets.append(Resets(np.frombuffer(data).reshape(shape), stays))
        return resets

    def _stays(self, size: int, names: list[str]) -> tuple[float, ...]:
        """0 for the integrals of these names, 1 for every other component of the state."""
        return (1.0,) * size + tuple(0.0 if name in names else 1.0 for name in self.integrands)

    def _groups(self) -> dict[Any, list[str]]:
        groups: dict[Any, list[str]] = {}
        for name, since in self.since.items():
            key = since if isinstance(since, str) else (since.shape, since.tobytes())
            groups.setdefault(key, []).append(name)
        return groups

    def _carried(self, when: np.ndarray, obs: Any) -> Any:
        """1 where the integral runs on past a reading that is missing, else 0; the start is 0."""
        if self.missing == "reset" or obs is None:
            return None
        count = when.shape[-1] - 1
        data = jnp.asarray(obs)
        lead = when.ndim - 1
        if data.ndim <= lead or count not in data.shape[lead : lead + 2]:
            raise ValueError(
                f"obs of a path with missing='carry' must have shape (*batch, {count}), one "
                f"reading for each of the times but the first, got {data.shape}"
            )
        lost = jnp.isnan(data)
        axis = data.shape.index(count, lead)
        if axis < data.ndim - 1:
            lost = jnp.all(lost, axis=tuple(range(axis + 1, data.ndim)))
        first = jnp.zeros((*lost.shape[:-1], 1), bool)
        return jnp.concatenate([first, lost], axis=-1).astype(jnp.result_type(float))

    def readings(self, name: str, path: SDEPath, at: Any) -> Any:
        """Indices of the readings in the path as the model sees it.

        Raises:
            ValueError: a path that is not one of these integrals, or a reading at its first time.
        """
        sde = path.sde
        if not isinstance(sde, AccumulatedSDE) or sde.names != tuple(self.integrands):
            raise ValueError(
                f"observe({name!r}): accumulated={list(self.integrands)} belongs to a path made by "
                "its own .path(times, init)"
            )
        if at is None:
            if sde.reading_rows is None:
                raise ValueError(
                    f"observe({name!r}): with since=times of their own, at= must say where the "
                    "integrals are read"
                )
            return np.asarray(sde.reading_rows)
        if np.any(np.asarray(at) % path.num_times == 0):
            raise ValueError(
                f"observe({name!r}): a reading at the path's first time has nothing to integrate; "
                "readings start at index 1"
            )
        return at

    def split(self, path: SDEPath) -> Split:
        """How to part a state of the path."""
        sde = cast("AccumulatedSDE", path.sde)
        return Split(sde.state_shape, sde.names)


def _set_back(stays: tuple[float, ...]) -> Callable[[Array, Any, Any], Array]:
    """Integrals to zero, or, where the amount is 1, everything as it is."""

    def apply(x: Array, carry: Any, p: Any) -> Array:
        del p
        factor = jnp.asarray(stays, x.dtype)
        return factor * x if carry is None else jnp.where(carry > 0, x, factor * x)

    return apply


def accumulate(
    sde: SDE,
    integrands: Mapping[str, Callable[..., Any]],
    *,
    since: Any = "observation",
    missing: str = "reset",
) -> Accumulated:
    """Integrals of the state since the last reading, for data that are averages, sums or fluxes.

    Args:
        sde: the process.
        integrands: by name, what is integrated: `lambda t, x, p: x`, with the arguments of the
            SDE's own drift, one number.
        since: when the integrals are set to zero: "observation", after each reading (at the
            observation times of the path's grid), or times `(R,)` or `(*batch, R)` (starts of
            exposures), or a mapping from names to either.
        missing: what a missing reading means: "reset", the interval was lost, the integral was set
            back all the same; "carry", the meter ran on, the next reading holds both intervals
            (`path(..., obs=)` then has to know the data).

    Returns:
        An object whose `path(times, init)` is the law to sample, and which `observe(...,
        accumulated=)` takes.

    Raises:
        TypeError: integrands that are no functions of the drift's arguments; a noise with memory.
        ValueError: an unknown option, or an SDE with random jumps or regimes.

    Example:
        >>> import numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model(times, y=None):
        ...     ou = nsde.processes.OrnsteinUhlenbeck(rate=1.0, mean=0.0, scale=0.5)
        ...     wide = nsde.accumulate(ou, {"area": lambda t, x, p: x})
        ...     x = numpyro.sample("x", wide.path(times, init=dist.Normal(0.0, 0.35)))
        ...     mean = lambda t, x, acc, width: dist.Normal(acc["area"] / width, 0.1)
        ...     return nsde.observe("y", x, mean, obs=y, accumulated=wide, inputs=np.diff(times))
        >>> marginal = nsde.handlers.marginalize(model, method=nsde.filters.Kalman())
        >>> numpyro.handlers.seed(marginal, 0)(np.array([0.0, 1.0, 2.0, 4.0])).shape
        (3,)
    """
    if not isinstance(sde, SDE):
        raise TypeError(f"accumulate needs an nsde.SDE, got {type(sde).__name__}")
    if not sde.noise.independent:
        raise TypeError(
            f"accumulate needs an SDE driven by Brownian motion, got {type(sde.noise).__name__}"
        )
    if not sde.is_diffusion:
        raise ValueError(
            f"accumulate needs a diffusion, but {type(sde).__name__} jumps or switches by chance: "
            "its integrals would have to follow each jump"
        )
    if missing not in ("reset", "carry"):
        raise ValueError(f"missing must be 'reset' or 'carry', got {missing!r}")
    if not isinstance(integrands, Mapping) or not integrands:
        raise TypeError(
            "integrands must be a mapping from names to functions, such as "
            f"{{'area': lambda t, x, p: x}}, got {type(integrands).__name__}"
        )
    optional = {"p": ("params", sde.params is not None)}
    if sde.inputs is not None:
        optional["u"] = ("inputs", True)
    codes = {
        name: as_function(fn, f"integrand {name!r}", "t, x", optional)
        for name, fn in integrands.items()
    }
    each = dict(since) if isinstance(since, Mapping) else dict.fromkeys(codes, since)
    if set(each) != set(codes):
        raise ValueError(f"since has names {sorted(each)}, but integrands has {sorted(codes)}")
    return Accumulated(sde, codes, {name: _since(each[name]) for name in codes}, missing)


def _since(since: Any) -> Any:
    if isinstance(since, str):
        if since != "observation":
            raise ValueError(f"since must be 'observation' or times, got {since!r}")
        return since
    return check_times(since, name="since of accumulate")
