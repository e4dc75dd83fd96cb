"""Pictures of fits: bands of a path against data, marginals over one another.

The only file of the package that imports Matplotlib, and only when a plot is made. Colours are
those of Okabe and Ito (2008), Color Universal Design, which colour-blind readers tell apart; line
styles differ too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from numpyro_sde.diagnostics.compare.arviz_compat import get_group, is_tree, scalar_draws
from numpyro_sde.diagnostics.compare.convert import to_arviz
from numpyro_sde.diagnostics.compare.path_distances import Difference
from numpyro_sde.diagnostics.compare.tables import Differences, Summary, has_time, labelled

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", "-.", ":")
_MAX_PANELS = 12
_GRID = 256
_ENDS = 0.1  # of its greatest value: less, and an estimate has ended


def load_pyplot() -> ModuleType:
    """The module `matplotlib.pyplot`.

    Raises:
        ImportError: If Matplotlib is not installed; the message says how to install it.

    Example:
        >>> load_pyplot().__name__
        'matplotlib.pyplot'
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plots need Matplotlib: pip install 'numpyro-sde[arviz]'") from error
    return plt


def plot_paths(
    fit: Any,
    var: str = "x",
    *,
    group: str = "posterior",
    data: Any = None,
    times: Any = None,
    data_times: Any = None,
    ax: Any = None,
    intervals: Sequence[float] = (0.5, 0.9),
    draws: int = 0,
    series: Any = None,
    state: Any = None,
    data_state: Any = None,
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
    color: str = COLOURS[0],
    label: str | None = None,
) -> Any:
    """Draw the posterior bands of a path, with data on top.

    One panel for each series and component of the state, each over its own times: hours where the
    model has hours. Panels and data are matched by series; a plate's coordinates name them.

    Args:
        fit: A result of :func:`to_arviz`, or a fit that it converts.
        var: The path's site, a variable with a time dimension; in the group
            `posterior_predictive` a data site.
        group: Group of the results to draw from.
        data: Name of a site of `observed_data`, or an array; an array has the panels' shape,
            `(T,)`, `(series, T)`, `(T, state)` or `(series, T, state)`. None draws no data.
        times: As for `to_arviz`, for a fit that is not converted yet.
        data_times: Times of an array `data`, `(T,)`; None takes the path's.
        ax: Axes to draw on, one for each panel; None makes a new figure.
        intervals: Central posterior probabilities of the bands, in (0, 1).
        draws: Number of single draws to add as thin lines, evenly thinned.
        series: Which series to draw: position or positions along the batch dimensions joined
            together. None draws the first 12 panels.
        state: Which components of the state: position or positions. None draws all.
        data_state: Which components of the state the data measure, one for each component of the
            data; None takes `state` if it names as many, else the first ones.
        transform: Applied to the draws before quantiles are taken, elementwise, such as `np.exp`
            for a state in logs; data are drawn as they are.
        color: Colour of bands and lines.
        label: Legend label; None is the variable's name.

    Returns:
        The `matplotlib.axes.Axes`; of several panels a list of them.

    Raises:
        ValueError: If the variable is missing or has no time dimension, an interval lies
            outside (0, 1), or axes and panels differ in number.
        ImportError: If Matplotlib is not installed.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> import numpy as np
        >>> from numpyro_sde.diagnostics import plot_paths
        >>> walk = np.random.default_rng(0).normal(size=(100, 20)).cumsum(axis=1)
        >>> ax = plot_paths({"x": walk}, times=np.arange(20.0), data=walk[0])
        >>> ax.get_xlabel()
        'time'
    """
    if any(not 0.0 < level < 1.0 for level in intervals):
        raise ValueError(f"intervals must lie in (0, 1), got {tuple(intervals)}")
    tree = fit if is_tree(fit) else to_arviz(fit, times=times, log_likelihood=False)
    path = _Panels(_variable(tree, group, var), series, state)
    observed = _data_panels(tree, data, data_times, path, _measured(state, data_state))
    axes = make_axes(ax, len(path), names=[path.title(k) for k in range(len(path))])
    for k, axis in enumerate(axes):
        at, values = path.known(k)
        if transform is not None:
            values = np.asarray(transform(values))
        for depth, level in enumerate(sorted(intervals, reverse=True)):
            low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], axis=0)
            style = {"color": color, "alpha": min(0.2 + 0.2 * depth, 0.8), "linewidth": 0}
            axis.fill_between(at, low, high, label=f"{100 * level:g} %", **style)
        name = label or var
        axis.plot(at, np.median(values, axis=0), color=color, linewidth=1.2, label=f"{name} median")
        if draws:
            chosen = np.linspace(0, len(values) - 1, min(draws, len(values))).round().astype(int)
            lines = axis.plot(at, values[chosen].T, color="#444444", linewidth=0.5, alpha=0.6)
            lines[0].set_label("draws")
        if observed is not None:
            axis.plot(*observed[k], "o", color="black", markersize=3, label="data", zorder=3)
        axis.set_xlabel(path.time_label)
        axis.set_ylabel(name)
        if at.dtype.kind == "M":
            _write_dates(axis)
    axes[0].legend(frameon=False, fontsize="small")
    return axes[0] if len(axes) == 1 else axes


def _write_dates(axis: Any) -> None:
    """Dates on the time axis, each told as shortly as its neighbours allow."""
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    locator = AutoDateLocator(maxticks=6)
    axis.xaxis.set_major_locator(locator)
    axis.xaxis.set_major_formatter(ConciseDateFormatter(locator))


def plot_fits(
    fits: Mapping[str, Any],
    var_names: Iterable[str] | None = None,
    axes: Any = None,
    *,
    paths: Iterable[str] = (),
    reference: str | None = None,
) -> list[Any]:
    """Draw the marginal posteriors of several fits over one another, and how their paths differ.

    A kernel estimate for each scalar, reflected at the ends of the draws where it has not ended,
    so that a positive parameter gets no mass below its smallest draw. For each path of `paths`,
    and each series and component of it, two more panels over time: differences of posterior means
    and of posterior sds from the reference fit, in its posterior sds, with bands of two Monte Carlo
    errors.

    Args:
        fits: Name to a result of :func:`to_arviz`, or to a fit that it converts.
        var_names: Variables to draw; None takes those in common, without paths, at most 12
            scalars.
        axes: Axes to draw on, one for each panel; None makes a new figure.
        paths: Variables with a time dimension, at most 12 panels of each.
        reference: Name of the fit that paths are compared with; None is the first.

    Returns:
        The list of `matplotlib.axes.Axes`: scalars first, then paths.

    Raises:
        ValueError: If there is nothing to draw, a path is not in every fit or has no time,
            `reference` is no fit, or axes and panels differ in number.
        ImportError: If Matplotlib is not installed.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> import numpy as np
        >>> from numpyro_sde.diagnostics import plot_fits
        >>> rng = np.random.default_rng(0)
        >>> nuts, svi = rng.gamma(2.0, size=(2, 500))
        >>> fits = {"NUTS": {"rate": nuts}, "SVI": {"rate": svi}}
        >>> [axis.get_xlabel() for axis in plot_fits(fits)]
        ['rate']
    """
    summaries: dict[str, Summary] = {}
    for name, fit in fits.items():
        tree = fit if is_tree(fit) else to_arviz(fit, log_likelihood=False)
        posterior = get_group(tree, "posterior")
        summaries[name] = Summary(tree, posterior, dict(posterior.attrs))
    posteriors = {name: summary.posterior for name, summary in summaries.items()}
    scalars = _scalars(posteriors, var_names)
    curves = _path_panels(summaries, list(paths), reference)
    count = len(scalars) + 2 * len(curves)
    if not count:
        raise ValueError("fits must have a scalar variable in common; nothing to draw")
    panels = make_axes(axes, count, names=[""] * count)
    _draw_differences(panels[len(scalars) :], curves, list(fits))
    for axis, (var, element) in zip(panels, scalars, strict=False):
        for k, (name, posterior) in enumerate(posteriors.items()):
            grid, density = _density(scalar_draws(posterior, var, element).ravel())
            style = {"color": COLOURS[k % len(COLOURS)], "linestyle": _STYLES[k % len(_STYLES)]}
            axis.plot(grid, density, label=name, **style)
        axis.set_xlabel(f"{var}[{', '.join(map(str, element))}]" if element else var)
        axis.set_yticks([])
        axis.locator_params(axis="x", nbins=5)
        axis.set_ylim(bottom=0.0)
        axis.spines[["top", "left", "right"]].set_visible(False)
    if scalars:
        panels[0].legend(frameon=False, fontsize="small")
    return panels


class _Curves(NamedTuple):
    """Differences of one series and component of a path, by fit."""

    label: str
    times: np.ndarray
    by_fit: dict[str, Difference]


def _path_panels(
    summaries: Mapping[str, Summary], paths: list[str], reference: str | None
) -> list[_Curves]:
    first = next(iter(summaries), "") if reference is None else reference
    if first not in summaries:
        raise ValueError(f"reference names {reference!r}, but the fits are {list(summaries)}")
    curves = []
    for var in paths:
        shapes = {
            name: summary.posterior[var].shape[2:] if var in summary.posterior else None
            for name, summary in summaries.items()
        }
        if None in shapes.values() or len(set(shapes.values())) > 1:
            raise ValueError(f"paths names {var!r}, whose shapes in the fits are {shapes}")
        panels = _Panels(labelled(summaries, first, var), None, None)
        found = Differences.between(summaries, first, var).by_fit
        for k, (series, state) in enumerate(panels.chosen):
            by_fit = {
                name: Difference(*(panels.cut(part)[series, :, state] for part in difference))
                for name, difference in found.items()
            }
            title = panels.title(k)
            curves.append(_Curves(f"{var}, {title}" if title else var, panels.times(k), by_fit))
    return curves


def _draw_differences(panels: list[Any], curves: list[_Curves], fits: list[str]) -> None:
    for k, (label, times, by_fit) in enumerate(curves):
        for axis, what in zip(panels[2 * k : 2 * k + 2], ("mean", "sd"), strict=True):
            axis.axhline(0.0, color="black", linewidth=0.8)
            for name, found in by_fit.items():
                j = fits.index(name)
                color, style = COLOURS[j % len(COLOURS)], _STYLES[j % len(_STYLES)]
                value, error = getattr(found, what), getattr(found, f"{what}_error")
                axis.plot(times, value, color=color, linestyle=style, label=name)
                low, high = value - 2 * error, value + 2 * error
                axis.fill_between(times, low, high, color=color, alpha=0.2, linewidth=0)
            axis.set(xlabel="time", ylabel=f"{what} of {label}, less reference's")
        if k == 0:
            panels[0].legend(frameon=False, fontsize="small")


class _Panels:
    """A variable with a time axis, cut into one panel for each series and state component."""

    def __init__(self, variable: Any, series: Any, state: Any) -> None:
        clocks = [dim for dim in variable.dims if str(dim).startswith("time")]
        if not clocks:
            raise ValueError(
                f"{variable.name!r} has dimensions {tuple(variable.dims)}, none of them time: "
                "give times= to to_arviz"
            )
        self.clock = str(clocks[0])
        lead = [dim for dim in ("chain", "draw") if dim in variable.dims]
        position = variable.dims.index(self.clock)
        self.batch = [str(dim) for dim in variable.dims[len(lead) : position]]
        self.rest = [str(dim) for dim in variable.dims[position + 1 :]]
        values = np.asarray(variable.values, np.float64)
        shape = values.shape
        draws = int(np.prod(shape[: len(lead)]))
        self.array = values.reshape(
            draws, int(np.prod(shape[len(lead) : position])), shape[position], -1
        )
        self.variable = variable
        self.shape = shape[len(lead) : position]
        chosen = [
            (s, c)
            for s in _positions(series, self.array.shape[1])
            for c in _positions(state, self.array.shape[3])
        ]
        everything = series is None and state is None
        self.chosen = chosen[:_MAX_PANELS] if everything else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def cut(self, values: np.ndarray) -> Float[np.ndarray, "series time state"]:
        """Values with the shape of one draw, batch dimensions joined."""
        return np.reshape(values, self.array.shape[1:])

    def values(self, panel: int) -> Float[np.ndarray, "draw time"]:
        """Draws of one panel."""
        series, state = self.chosen[panel]
        return self.array[:, series, :, state]

    def times(self, panel: int) -> np.ndarray:
        """Times of one panel."""
        return self.clock_of(self.chosen[panel][0])

    def known(self, panel: int) -> tuple[np.ndarray, Float[np.ndarray, "draw time"]]:
        """Times and draws of one panel, without the times that only fill a series up."""
        at = self.times(panel)
        real = ~(np.isnat(at) if at.dtype.kind == "M" else np.isnan(at.astype(float)))
        return at[real], self.values(panel)[:, real]

    @property
    def time_label(self) -> str:
        """What to write on the time axis: with the unit, where it is known."""
        for name in (f"{self.clock}_value", self.clock):
            if name in self.variable.coords:
                unit = self.variable.coords[name].attrs.get("unit")
                return f"time ({unit}s)" if unit else "time"
        return "time"

    def clock_of(self, series: int) -> np.ndarray:
        """Times of one series."""
        own = f"{self.clock}_value"
        if own in self.variable.coords:
            coordinate = self.variable.coords[own]
            at = dict(zip(self.batch, np.unravel_index(series, self.shape), strict=True))
            return coordinate.values[tuple(at[dim] for dim in coordinate.dims[:-1])]
        if self.clock in self.variable.coords:
            return self.variable.coords[self.clock].values
        return np.arange(self.array.shape[2])

    def title(self, panel: int) -> str:
        """What tells a panel from the others, by coordinate; empty for a single panel."""
        series, state = self.chosen[panel]
        parts = []
        for dim, i in zip(self.batch, np.unravel_index(series, self.shape), strict=True):
            parts.append(f"{dim} {self._coordinate(dim, int(i))}")
        if self.array.shape[3] > 1:
            parts.append(f"{self.rest[0]} {self._coordinate(self.rest[0], state)}")
        return ", ".join(parts)

    def _coordinate(self, dim: str, index: int) -> Any:
        coords = self.variable.coords
        return coords[dim].values[index] if dim in coords else index


def _positions(chosen: Any, size: int) -> list[int]:
    positions = list(range(size)) if chosen is None else [int(i) for i in np.atleast_1d(chosen)]
    if any(not -size <= i < size for i in positions):
        raise ValueError(f"series and state must be positions below {size}, got {chosen}")
    return positions


def _variable(tree: Any, group: str, var: str) -> Any:
    dataset = get_group(tree, group)
    names = [] if dataset is None else list(dataset.data_vars)
    if var not in names:
        raise ValueError(f"{var!r} is not in group {group!r}, which has {names}")
    return dataset[var]


def _measured(state: Any, data_state: Any) -> list[int] | None:
    """Components of the state that data measure, as far as the caller says."""
    chosen = state if data_state is None else data_state
    return None if chosen is None else [int(i) for i in np.atleast_1d(chosen)]


def _data_panels(
    tree: Any, data: Any, data_times: Any, path: _Panels, measured: list[int] | None
) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Times and values of the data for each panel, missing ones left out."""
    if data is None:
        return None
    if isinstance(data, str):
        observed = _Panels(_variable(tree, "observed_data", data), None, None)
        array, clocks = observed.array[0], observed
    else:
        length = path.array.shape[2] if data_times is None else len(data_times)
        array = np.asarray(data, np.float64)
        array = array.reshape(-1, length, 1 if array.shape[-1] == length else array.shape[-1])
        clocks = path
    if array.shape[0] not in (1, path.array.shape[1]):
        raise ValueError(f"data has {array.shape[0]} series, the path has {path.array.shape[1]}")
    panels = []
    for series, state in path.chosen:
        row = series if array.shape[0] > 1 else 0
        # Fewer measured components than states: without a word they belong to the first states.
        owners = list(range(array.shape[2]))
        if measured is not None and array.shape[2] < path.array.shape[3]:
            owners = measured[: array.shape[2]]
        known = state in owners
        column = array[row, :, owners.index(state)] if known else np.full(array.shape[1], np.nan)
        seen = ~np.isnan(column)
        own = isinstance(data, str) or data_times is None
        clock = clocks.clock_of(row) if own else np.asarray(data_times)
        panels.append((clock[seen], column[seen]))
    return panels


def make_axes(axes: Any, count: int, names: Sequence[str], columns: int | None = None) -> list[Any]:
    """The axes given, flattened, or those of a new figure.

    Args:
        axes: Axes to use, `count` of them; None makes a figure.
        count: Number of panels.
        names: Titles for new axes.
        columns: Panels side by side; None takes up to three.

    Raises:
        ValueError: If axes and panels differ in number.

    Example:
        >>> import matplotlib
        >>> matplotlib.use("Agg")
        >>> len(make_axes(None, 2, ["a", "b"]))
        2
    """
    if axes is not None:
        given = list(np.ravel(np.asarray(axes, dtype=object)))
        if len(given) != count:
            raise ValueError(f"{count} axes are needed, one for each panel; got {len(given)}")
        return given
    columns = columns or (2 if count == 4 else min(count, 3))
    rows = -(-count // columns)
    width = 6.0 if count == 1 else 3.6 * columns
    figure, grid = load_pyplot().subplots(
        rows, columns, figsize=(width, 2.8 * rows + 0.2), squeeze=False, layout="constrained"
    )
    made = list(grid.ravel())
    for spare in made[count:]:
        figure.delaxes(spare)
    for axis, name in zip(made, names, strict=False):
        axis.set_title(name, fontsize="medium")
    return made[:count]


def _scalars(
    posteriors: Mapping[str, Any], var_names: Iterable[str] | None
) -> list[tuple[str, tuple[int, ...]]]:
    first = next(iter(posteriors.values()), None)
    if first is None:
        return []
    names = (
        list(var_names)
        if var_names is not None
        else [
            var
            for var in first.data_vars
            if not any(has_time(p[var]) for p in posteriors.values() if var in p)
        ]
    )
    shared = [
        var
        for var in names
        if all(var in p and p[var].shape[2:] == first[var].shape[2:] for p in posteriors.values())
    ]
    if var_names is not None and shared != names:
        raise ValueError(
            f"var_names must be in every fit with one shape, got {names}, in common {shared}"
        )
    scalars = [
        (str(var), element) for var in shared for element in np.ndindex(first[var].shape[2:])
    ]
    return scalars[:_MAX_PANELS] if var_names is None else scalars


def _density(values: Float[np.ndarray, " n"]) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian kernel estimate between the extreme draws, reflected where it has not ended."""
    low, high = values.min(), values.max()
    if low == high:
        return np.array([low, low]), np.array([0.0, 1.0])
    from scipy.stats import gaussian_kde  # slow to import, and only plots need it

    kernel = gaussian_kde(values, bw_method="silverman")
    grid = np.linspace(low, high, _GRID)
    density = kernel(grid)
    for end, plain in ((low, density[0]), (high, density[-1])):
        # A thin tail reflected would turn up again.
        if plain > _ENDS * density.max():
            density = density + kernel(2 * end - grid)
    return grid, density
