"""Does the answer depend on the sampling step? Scans over the step, for data with hidden scales.

Fitted at steps below a hidden fast scale, a model of the slow motion gets the drift and the
diffusivity of the fast one, with small reported errors: Pavliotis and Stuart (2007), J. Stat.
Phys. 127, 741-781. Fitted at steps too coarse for its own transition density, it is biased the
other way. In between the estimates do not move: the plateau that a scan looks for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float

from numpyro_sde.diagnostics.compare.plots import COLOURS, make_axes
from numpyro_sde.schemes import AbstractScheme, Exact, LocalLinear
from numpyro_sde.sde import SDE

# A posterior this much narrower than the spread over steps reports an error of no use.
_FAR_BELOW = 0.25
_SHORTEST_PLATEAU = 3
_FEWEST_INCREMENTS = 10


class ScaleScan(NamedTuple):
    """Estimates of one model on one path at several sampling steps.

    Attributes:
        steps: sampling steps used, whole multiples of the data's own, shape `(S,)`.
        names: names of the estimated parameters.
        estimates: shape `(S, K)`.
        standard_errors: those that the model reports at each step, shape `(S, K)`.
        quadratic_variation: mean squared increment over step, `2 Sigma` for a diffusivity
            Sigma, shape `(S,)`, the trace for a vector path.
        plateau: first and last step of the longest run of steps over which all estimates
            stay within the tolerance; None where there is none.

    Example:
        >>> import jax, numpy as np, numpyro_sde as nsde
        >>> ou = nsde.processes.OrnsteinUhlenbeck(rate=1.0, mean=0.0, scale=1.0)
        >>> times = np.arange(4000) * 0.05
        >>> path = nsde.SDEPath(ou, times, init=0.0).sample(jax.random.key(0))
        >>> scan = nsde.diagnostics.sampling_scale_scan(
        ...     path, times, lambda x: -x, [0.05, 0.1, 0.15, 0.2]
        ... )
        >>> scan.names, scan.depends_on_step
        (('coefficient',), False)
    """

    steps: np.ndarray
    names: tuple[str, ...]
    estimates: np.ndarray
    standard_errors: np.ndarray
    quadratic_variation: np.ndarray
    plateau: tuple[float, float] | None

    @property
    def spread(self) -> dict[str, float]:
        """Largest less smallest estimate over the steps, by parameter."""
        return dict(zip(self.names, np.ptp(self.estimates, axis=0).tolist(), strict=True))

    @property
    def depends_on_step(self) -> bool:
        """Whether the finest step lies outside the plateau: a sign of a hidden fast scale."""
        return self.plateau is None or bool(self.plateau[0] > self.steps[0])

    def check(self, posterior_sd: Mapping[str, float] | None = None) -> list[str]:
        """Warn where reported errors are far below the spread over steps.

        Args:
            posterior_sd: posterior standard deviations by parameter; None takes the standard
                errors of the finest step.

        Returns:
            The warnings, also issued as `UserWarning`.

        Raises:
            ValueError: a parameter that was not scanned.
        """
        if posterior_sd is None:
            posterior_sd = dict(zip(self.names, self.standard_errors[0].tolist(), strict=True))
        messages = []
        for name, sd in posterior_sd.items():
            if name not in self.names:
                raise ValueError(f"posterior_sd has {name!r}, which is not in {self.names}")
            spread = self.spread[name]
            if float(sd) < _FAR_BELOW * spread and self.depends_on_step:
                where = (
                    "there is no plateau"
                    if self.plateau is None
                    else f"they agree for steps {self.plateau[0]:.3g} to {self.plateau[1]:.3g}"
                )
                messages.append(
                    f"the posterior sd of {name!r} is {float(sd):.3g}, but its estimates spread by "
                    f"{spread:.3g} over sampling steps {self.steps[0]:.3g} to "
                    f"{self.steps[-1]:.3g}; {where}. The data have a scale that the model has "
                    "not: subsample, use filtered data, or model the fast scale or the noise of "
                    "measurement"
                )
        for message in messages:
            warnings.warn(message, UserWarning, stacklevel=2)
        return messages

    def plot(self, axes: Any = None) -> list[Any]:
        """Draw estimates with two standard errors, and quadratic variation, against the step.

        Args:
            axes: Matplotlib axes, one for each parameter and one more; None makes a figure.

        Raises:
            ImportError: if Matplotlib is not installed.
        """
        panels = make_axes(axes, len(self.names) + 1, [""] * (len(self.names) + 1))
        for k, (axis, name) in enumerate(zip(panels, self.names, strict=False)):
            bars = 2.0 * self.standard_errors[:, k]
            axis.errorbar(self.steps, self.estimates[:, k], bars, marker="o", color=COLOURS[0])
            axis.set_ylabel(name)
        panels[-1].plot(self.steps, self.quadratic_variation, marker="o", color=COLOURS[1])
        panels[-1].set_ylabel("quadratic variation per time")
        for axis in panels:
            axis.set_xscale("log")
            axis.set_xlabel("sampling step")
            if self.plateau is not None:
                axis.axvspan(*self.plateau, color="0.85", zorder=0, label="plateau")
        if self.plateau is not None:
            panels[0].legend(frameon=False, fontsize="small", loc="lower left")
        return panels

    def __str__(self) -> str:
        head = f"{'step':>10}" + "".join(f"{name:>22}" for name in self.names)
        lines = [head + f"{'QV per time':>14}"]
        for s, step in enumerate(self.steps):
            pairs = zip(self.estimates[s], self.standard_errors[s], strict=True)
            cells = "".join(f"{value:>12.4g} ±{error:8.2g}" for value, error in pairs)
            lines.append(f"{step:>10.4g}{cells}{self.quadratic_variation[s]:>14.4g}")
        end = "none" if self.plateau is None else f"{self.plateau[0]:.4g} to {self.plateau[1]:.4g}"
        return "\n".join([*lines, f"plateau: {end}"])


def sampling_scale_scan(
    path: ArrayLike,
    times: ArrayLike,
    model: SDE | Callable[..., Any],
    steps: Sequence[float],
    *,
    scheme: AbstractScheme | None = None,
    tolerance: float = 0.15,
    max_increments: int = 100_000,
) -> ScaleScan:
    """Fit a model to one directly observed path at several sampling steps.

    All increments of a step are used, overlapping ones too; errors count them as if they did
    not overlap. Judge the result by the plateau: a drift and a quadratic variation that fall as
    the step grows, and then stay, come from a scale below the plateau (or from noise of
    measurement, which looks the same at the finest steps).

    Args:
        path: the states, shape `(N,)` or `(N, d)`, without noise.
        times: their times, shape `(N,)`, equally spaced.
        model: either an `SDE`, all of whose parameters are fitted by maximum likelihood from
            the values it holds (those that are positive stay positive); or a function of the
            state that returns drift features, shape `(k,)` for scalar states and `(d, k)` for
            vectors (or the shape of the state, for one), fitted by least squares.
        steps: sampling steps, at least 2; rounded to multiples of the data's own.
        scheme: transition density of an `SDE`; by default its exact one, else `LocalLinear()`.
            Not `Euler()`, whose own bias grows with the step and hides the plateau; features
            have no other choice.
        tolerance: largest spread of an estimate over a plateau, as a share of its size; two
            standard errors are always allowed.
        max_increments: most increments of each step that are evaluated.

    Raises:
        TypeError: a model of another kind.
        ValueError: times that are not equally spaced or do not fit the path; a path that is
            not finite; fewer than 2 steps, steps below the data's own, or so coarse that fewer
            than 10 increments remain; an SDE without parameters or in a batch.

    Example:
        >>> import jax, numpy as np, numpyro_sde as nsde
        >>> ou = nsde.processes.OrnsteinUhlenbeck(rate=1.0, mean=0.0, scale=1.0)
        >>> times = np.arange(2000) * 0.05
        >>> path = nsde.SDEPath(ou, times, init=0.0).sample(jax.random.key(0))
        >>> scan = nsde.diagnostics.sampling_scale_scan(path, times, ou, [0.05, 0.1, 0.2])
        >>> scan.estimates.shape
        (3, 3)
    """
    states, dt = _regular(path, times)
    strides = _strides(steps, dt, len(states))
    if isinstance(model, SDE):
        fit: Any = _maximum_likelihood(model, states, np.asarray(times), scheme)
        names = model.parameters.names
    elif callable(model):
        if scheme is not None:
            raise ValueError("scheme is not used with drift features: give an SDE as model")
        features = _features(model, states)
        fit, names = _least_squares(features), _feature_names(features.shape[-1])
    else:
        raise TypeError(
            f"model must be an nsde.SDE or a function of the state, got {type(model).__name__}"
        )
    rows, start = [], None
    for stride in strides:
        number = len(states) - stride
        first = np.unique(np.linspace(0, number - 1, min(number, max_increments)).astype(int))
        increments = states[first + stride] - states[first]
        # Overlapping increments weigh as many as fit into the path side by side.
        weight = min(number / stride, len(first)) / len(first)
        estimate, errors, start = fit(first, states, increments, stride * dt, weight, start)
        rows.append((estimate, errors, np.mean(np.sum(increments**2, axis=-1)) / (stride * dt)))
    estimates, errors, variation = (np.array(column) for column in zip(*rows, strict=True))
    used = np.array(strides) * dt
    found = _plateau(estimates, errors, tolerance)
    plateau = None if found is None else (float(used[found[0]]), float(used[found[1]]))
    return ScaleScan(used, tuple(names), estimates, errors, variation, plateau)


def _regular(path: Any, times: Any) -> tuple[Float[np.ndarray, "N d"], float]:
    states, clock = np.asarray(path, np.float64), np.asarray(times, np.float64)
    if states.ndim not in (1, 2) or clock.ndim != 1 or len(states) != len(clock):
        raise ValueError(
            f"path must have shape (N,) or (N, d) and times (N,), got {states.shape} and "
            f"{clock.shape}"
        )
    if not np.all(np.isfinite(states)):
        raise ValueError("path must be finite: cut it at what is missing")
    gaps = np.diff(clock)
    if len(gaps) < 2 or not np.allclose(gaps, gaps.mean(), rtol=1e-3) or gaps.mean() <= 0:
        raise ValueError("times must be increasing and equally spaced, to sample at other steps")
    return states.reshape(len(states), -1), float(gaps.mean())


def _strides(steps: Any, dt: float, length: int) -> list[int]:
    given = np.sort(np.ravel(np.asarray(steps, np.float64)))
    if len(given) < 2 or not np.all(np.isfinite(given)):
        raise ValueError(f"steps must be at least 2 finite numbers, got {steps}")
    strides = sorted({round(step / dt) for step in given.tolist()})
    if strides[0] < 1 or given[0] < 0.9 * dt:
        raise ValueError(f"steps must not be below that of the data, {dt:.4g}, got {given[0]}")
    if (length - 1) // strides[-1] < _FEWEST_INCREMENTS:
        raise ValueError(
            f"steps must leave {_FEWEST_INCREMENTS} increments, {given[-1]} leaves "
            f"{(length - 1) // strides[-1]}"
        )
    return strides


def _features(model: Callable[..., Any], states: np.ndarray) -> np.ndarray:
    """Drift features at every state, shape `(N, d, k)`."""
    num, dim = states.shape
    values = np.asarray(jax.vmap(model)(jnp.asarray(states[:, 0] if dim == 1 else states)))
    values = values.astype(np.float64)
    if values.ndim == 1 and dim == 1:
        return values[:, None, None]
    if values.ndim == 2:
        return values[:, :, None] if dim > 1 and values.shape[1] == dim else values[:, None, :]
    if values.shape[:2] == (num, dim):
        return values
    raise ValueError(
        f"model must return features (k,) for a scalar state or (d, k) for a vector, got "
        f"{values.shape[1:]} for {dim} coordinate(s)"
    )


def _feature_names(count: int) -> tuple[str, ...]:
    return ("coefficient",) if count == 1 else tuple(f"coefficient[{i}]" for i in range(count))


def _least_squares(features: np.ndarray) -> Callable[..., Any]:
    def fit(
        first: np.ndarray, states: np.ndarray, dx: np.ndarray, dt: float, weight: float, start: Any
    ) -> Any:
        del states, start
        f = features[first]
        gram = np.einsum("ndi,ndj->ij", f, f) * dt
        estimate = np.linalg.solve(gram, np.einsum("ndi,nd->i", f, dx))
        residual = dx - np.einsum("ndi,i->nd", f, estimate) * dt
        noise = np.mean(residual**2) / dt
        return estimate, np.sqrt(np.diag(np.linalg.inv(gram * weight)) * noise), None

    return fit


def _maximum_likelihood(
    sde: SDE, states: np.ndarray, times: np.ndarray, scheme: AbstractScheme | None
) -> Callable[..., Any]:
    leaves = [np.asarray(leaf, np.float64) for leaf in sde.parameters.leaves]
    if not leaves or any(leaf.ndim for leaf in leaves):
        raise ValueError(
            "model must be an SDE with scalar parameters, got leaves of shapes "
            f"{[leaf.shape for leaf in leaves]}"
        )
    begin = np.array([float(leaf) for leaf in leaves])
    logged = begin > 0
    if scheme is None:
        scheme = sde.exact_transition() or LocalLinear()
    elif isinstance(scheme, Exact):
        scheme = scheme.resolve(sde)
    chosen, scalar = scheme, states.shape[1] == 1
    treedef = jax.tree_util.tree_structure(sde)
    others = jax.tree_util.tree_leaves(sde)[len(leaves) :]

    def natural(free: Any) -> Any:
        return jnp.where(logged, jnp.exp(jnp.where(logged, free, 0.0)), free)

    def loss(free: Any, t: Any, x: Any, x_next: Any, dt: Any, weight: Any) -> Any:
        values = natural(free)
        one = jax.tree_util.tree_unflatten(treedef, [*values, *others])
        shared = chosen.prepare(one, jnp.stack([t[0], t[0] + dt]), dt[None])
        cache = jax.tree.map(lambda leaf: leaf[0], shared)

        def density(t: Any, a: Any, b: Any) -> Any:
            return chosen.log_density(one, t, dt, a, b, cache)

        return -jnp.sum(weight * jax.vmap(density)(t, x, x_next))

    value_and_grad = jax.jit(jax.value_and_grad(loss))
    curvature = jax.jit(jax.hessian(loss))
    length = 0

    def fit(
        first: np.ndarray, states: np.ndarray, dx: np.ndarray, dt: float, weight: float, start: Any
    ) -> Any:
        nonlocal length
        # The finest step, which comes first, has the most increments: others are filled up to
        # that with increments of weight zero, so that all steps share their compiled code.
        length = max(length, len(first))
        rows = np.resize(np.arange(len(first)), length)
        weights = np.where(np.arange(length) < len(first), weight, 0.0)
        here, there = states[first[rows]], (states[first] + dx)[rows]
        pair = [here[:, 0], there[:, 0]] if scalar else [here, there]
        data = [jnp.asarray(a) for a in (times[first[rows]], *pair, dt, weights)]

        def objective(free: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = value_and_grad(jnp.asarray(free), *data)
            if not np.isfinite(value):
                return 1e30, np.zeros_like(free)
            return float(value), np.asarray(gradient, np.float64)

        if start is None:
            start = np.where(logged, np.log(np.where(logged, begin, 1.0)), begin)
        from scipy.optimize import minimize  # slow to import

        best = minimize(objective, start, jac=True, method="L-BFGS-B").x
        slope = np.where(logged, np.exp(np.where(logged, best, 0.0)), 1.0)
        information = np.asarray(curvature(jnp.asarray(best), *data), np.float64)
        variance = np.diag(np.linalg.pinv(information)) * slope**2
        return np.asarray(natural(best), np.float64), np.sqrt(np.maximum(variance, 0.0)), best

    return fit


def _plateau(estimates: np.ndarray, errors: np.ndarray, tolerance: float) -> tuple[int, int] | None:
    """First and last index of the longest run over which no estimate moves."""
    best: tuple[int, int] | None = None
    number = len(estimates)
    for first in range(number):
        for last in range(first + min(_SHORTEST_PLATEAU, number) - 1, number):
            run, error = estimates[first : last + 1], errors[first : last + 1].max(axis=0)
            size = np.abs(np.median(run, axis=0))
            if np.all(np.ptp(run, axis=0) <= np.maximum(tolerance * size, 2.0 * error)) and (
                best is None or last - first > best[1] - best[0]
            ):
                best = (first, last)
    return best
