"""What a slow path says of a fast process: bands of the averaged drift, and no more.

The slow path identifies `x -> int f(x, y) pi(dy | x)` where it has been, and not the
fast law pi itself: laws of very different shape have the same averages. A flow or a mixture
fitted to such a path therefore says nothing of pi beyond them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float

from numpyro_sde.diagnostics.compare.plots import COLOURS, make_axes
from numpyro_sde.runtime.draws import on_one_device
from numpyro_sde.sde import SDE

_RIDGE = 0.95
NOT_IDENTIFIED = (
    "Identified from the slow path: the averaged drift and diffusion on the states visited. Not "
    "identified: the invariant law of the fast variable, and parameters that enter through it "
    "alone; their posteriors rest on the prior."
)


class AveragedDrift(NamedTuple):
    """Posterior bands of the averaged drift, and what cannot be known.

    Attributes:
        states: slow states, shape `(G,)`.
        draws: drift for each posterior draw, shape `(n, G)`.
        visited: share of the path's states within half a spacing of each state, shape
            `(G,)`; None without a path.
        ridges: pairs of parameters whose posterior correlation exceeds 0.95 in size, with it.
        note: what is identified and what is not.

    Example:
        >>> import numpy as np, numpyro_sde as nsde
        >>> draws = {"rate": np.random.default_rng(0).normal(1.0, 0.1, 200)}
        >>> bands = nsde.diagnostics.averaged_drift(
        ...     draws, lambda s: nsde.SDE(lambda t, x: -s["rate"] * x, lambda t, x: 1.0), [0.0, 1.0]
        ... )
        >>> bands.band(0.9)[0].shape
        (2,)
    """

    states: np.ndarray
    draws: np.ndarray
    visited: np.ndarray | None
    ridges: tuple[tuple[str, str, float], ...]
    note: str

    @property
    def median(self) -> Float[np.ndarray, " G"]:
        """Posterior median of the drift at every state."""
        return np.median(self.draws, axis=0)

    def band(self, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Central posterior band.

        Raises:
            ValueError: a level outside (0, 1).
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level must lie in (0, 1), got {level}")
        low, high = np.quantile(self.draws, [0.5 - level / 2, 0.5 + level / 2], axis=0)
        return low, high

    def plot(self, ax: Any = None, truth: Any = None) -> Any:
        """Draw median and bands of 50 and 90 per cent, shaded where the path has been.

        Args:
            ax: Matplotlib axes; None makes a figure.
            truth: drift to compare with, shape `(G,)`.

        Raises:
            ImportError: if Matplotlib is not installed.
        """
        (axis,) = make_axes(ax, 1, [""])
        for level, alpha in ((0.9, 0.2), (0.5, 0.4)):
            low, high = self.band(level)
            style = {"color": COLOURS[0], "alpha": alpha, "linewidth": 0}
            axis.fill_between(self.states, low, high, label=f"{100 * level:g} %", **style)
        axis.plot(self.states, self.median, color=COLOURS[0], label="median")
        if truth is not None:
            axis.plot(self.states, truth, "--", color="black", linewidth=1.0, label="truth")
        if self.visited is not None:
            # At the foot of the panel, whatever its limits become.
            foot = np.where(self.visited > 0, 0.01, np.nan)
            style = {"color": "0.5", "linewidth": 4, "transform": axis.get_xaxis_transform()}
            axis.plot(self.states, foot, label="states visited", **style)
        axis.set_xlabel("slow state")
        axis.set_ylabel("averaged drift")
        axis.legend(frameon=False, fontsize="small")
        return axis

    def __str__(self) -> str:
        low, high = self.band(0.9)
        lines = [f"{'state':>9}{'5 %':>11}{'median':>11}{'95 %':>11}"]
        rows = zip(self.states, low, self.median, high, strict=True)
        lines += [f"{x:>9.3g}{a:>11.4g}{m:>11.4g}{b:>11.4g}" for x, a, m, b in rows]
        ridges = [f"ridge: {a} and {b}, correlation {r:.3f}" for a, b, r in self.ridges]
        return "\n".join([*lines, *ridges, self.note])


def averaged_drift(
    samples: Mapping[str, Any],
    make_sde: Callable[[Any], SDE],
    states: ArrayLike,
    *,
    path: ArrayLike | None = None,
    max_draws: int = 500,
) -> AveragedDrift:
    """Posterior bands of the drift of an averaged SDE, from draws of its parameters.

    Warns (`UserWarning`) of ridges: pairs of scalar parameters so correlated that only a
    combination of them is known.

    Args:
        samples: posterior draws by site, each with the draws in front, as
            `mcmc.get_samples()`; weights of a flow too.
        make_sde: makes the SDE from one draw, a mapping like `samples`; traced by JAX.
        states: slow states of a scalar slow variable, shape `(G,)`.
        path: the slow path, shape `(T,)`, to tell states visited from others.
        max_draws: at most so many draws are evaluated, evenly thinned.

    Raises:
        TypeError: `make_sde` that does not return an SDE.
        ValueError: no draws, or states of another shape.

    Example:
        >>> import numpy as np, numpyro_sde as nsde
        >>> draws = {"rate": np.random.default_rng(0).normal(1.0, 0.1, 200)}
        >>> bands = nsde.diagnostics.averaged_drift(
        ...     draws, lambda s: nsde.SDE(lambda t, x: -s["rate"] * x, lambda t, x: 1.0), [0.0, 1.0]
        ... )
        >>> bool(abs(bands.median[1] + 1.0) < 0.03)
        True
    """
    grid = np.asarray(states, np.float64)
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(f"states must have shape (G,), at least 2 of them, got {grid.shape}")
    sites = on_one_device(samples)
    sizes = {len(value) for value in sites.values() if value.ndim}
    if len(sizes) != 1:
        raise ValueError(f"samples must have one number of draws in front, got {sorted(sizes)}")
    (number,) = sizes
    chosen = np.unique(np.linspace(0, number - 1, min(number, max_draws)).round().astype(int))
    thinned = {name: value[chosen] for name, value in sites.items()}

    def drift(one: Any) -> Any:
        sde = make_sde(one)
        if not isinstance(sde, SDE):
            raise TypeError(f"make_sde must return an nsde.SDE, got {type(sde).__name__}")
        return jax.vmap(lambda x: sde.ito_drift_at(0.0, x))(jnp.asarray(grid))

    draws = np.asarray(jax.jit(lambda s: jax.lax.map(drift, s))(thinned))
    ridges = _ridges(sites)
    for a, b, r in ridges:
        warnings.warn(
            f"{a!r} and {b!r} have posterior correlation {r:.3f}: only a combination of them is "
            "identified; report the averaged drift, not either of them",
            UserWarning,
            stacklevel=2,
        )
    visited = None if path is None else _visits(np.asarray(path), grid)
    return AveragedDrift(grid, draws, visited, ridges, NOT_IDENTIFIED)


def _ridges(sites: Mapping[str, Any]) -> tuple[tuple[str, str, float], ...]:
    scalars = {name: np.asarray(v, np.float64) for name, v in sites.items() if v.ndim == 1}
    # Positive parameters often trade off as products: their logarithms are looked at.
    logged = {n: np.log(v) if np.all(v > 0) else v for n, v in scalars.items() if np.ptp(v) > 0}
    names = list(logged)
    if len(names) < 2:
        return ()
    matrix = np.corrcoef(np.stack([logged[n] for n in names]))
    pairs = zip(*np.triu_indices(len(names), 1), strict=True)
    found = [(names[i], names[j], float(matrix[i, j])) for i, j in pairs]
    return tuple(pair for pair in found if abs(pair[2]) > _RIDGE)


def _visits(path: np.ndarray, grid: np.ndarray) -> np.ndarray:
    edges = np.concatenate([[-np.inf], 0.5 * (grid[1:] + grid[:-1]), [np.inf]])
    # The outer cells end half a spacing beyond the grid.
    edges[0], edges[-1] = 1.5 * grid[0] - 0.5 * grid[1], 1.5 * grid[-1] - 0.5 * grid[-2]
    return np.histogram(path, edges)[0] / path.size
