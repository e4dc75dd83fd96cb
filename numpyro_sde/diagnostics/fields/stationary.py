"""Where a fitted scalar diffusion rests, and how it spreads over its states in the long run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from numpyro_sde.diagnostics.compare.arviz_compat import make_dataset
from numpyro_sde.diagnostics.compare.draws import map_draws
from numpyro_sde.diagnostics.fields.band import drift_of, model_draws, run_with_fields, summary_of
from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.models.stack import path_law


@dataclass(frozen=True)
class RestPoints:
    """Zeros of a drift, draw by draw.

    Attributes:
        stable: positions where the drift falls through zero, of all draws.
        unstable: positions where it rises through zero.
        numbers: number of zeros to the share of draws with so many.
        num_draws: number of draws.

    Example:
        >>> import numpy as np, numpyro_sde as nsde
        >>> zero = np.zeros(2)
        >>> print(nsde.diagnostics.RestPoints(zero, np.zeros(0), {1: 1.0}, num_draws=2))
        1 rest points: 100 %
        stable: 1.00 a draw, median 0, 90 % in [0, 0]
    """

    stable: Float[np.ndarray, " n"]
    unstable: Float[np.ndarray, " m"]
    numbers: dict[int, float]
    num_draws: int

    def __str__(self) -> str:
        lines = [f"{n} rest points: {100 * share:.0f} %" for n, share in self.numbers.items()]
        for kind, found in (("stable", self.stable), ("unstable", self.unstable)):
            if len(found):
                low, middle, high = np.quantile(found, [0.05, 0.5, 0.95])
                per = len(found) / self.num_draws
                lines.append(
                    f"{kind}: {per:.2f} a draw, median {middle:.3g}, "
                    f"90 % in [{low:.3g}, {high:.3g}]"
                )
        return "\n".join(lines)


def rest_points(
    fit: Any,
    path: str,
    at: Float[ArrayLike, " n"],
    *,
    model: Callable[..., Any] | None = None,
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    time: float = 0.0,
    num_draws: int = 500,
    rng_key: PRNGKeyArray | None = None,
) -> RestPoints:
    """Zeros of the drift of a scalar path under each posterior draw.

    Args:
        fit: what `to_arviz` takes.
        path: the path site.
        at: increasing states; zeros are looked for between neighbours, and interpolated.
        model: as for `field_band`.
        model_args: as for `field_band`.
        model_kwargs: as for `field_band`.
        time: at which the drift is looked at.
        num_draws: at most so many draws are used.
        rng_key: as for `field_band`.

    Raises:
        ValueError: no such path, a path that is not scalar, states that do not increase.

    Example:
        >>> import numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model():
        ...     a = numpyro.sample("a", dist.LogNormal(0.0, 0.1))
        ...     sde = nsde.SDE(lambda t, x, p: p * x - x**3, lambda t, x, p: 1.0, params=a)
        ...     numpyro.sample("x", nsde.SDEPath(sde, [0.0, 0.1], dist.Normal(0.0, 1.0)))
        >>> draws = {"a": np.full(20, 1.0)}
        >>> print(nsde.diagnostics.rest_points(draws, "x", np.linspace(-2, 2, 41), model=model))
        3 rest points: 100 %
        stable: 2.00 a draw, median 0, 90 % in [-1, 1]
        unstable: 1.00 a draw, median 0, 90 % in [0, 0]
    """
    states = _increasing(at)
    drift, _ = _coefficients(
        fit, path, states, model, model_args, model_kwargs, time, num_draws, rng_key
    )
    # A zero on a state itself belongs to the interval that begins there.
    before, after = drift[:, :-1], drift[:, 1:]
    crossing = (before * after < 0) | (before == 0)
    which, place = np.nonzero(crossing)
    left, right = before[which, place], after[which, place]
    share = np.where(left == 0, 0.0, left / np.where(left == right, 1.0, left - right))
    position = states[place] + share * (states[place + 1] - states[place])
    earlier = np.where(place > 0, drift[which, np.maximum(place - 1, 0)], -right)
    falls = np.where(left == 0, earlier > right, left > right)
    numbers, counts = np.unique(crossing.sum(1), return_counts=True)
    shares = {int(n): float(c) / len(drift) for n, c in zip(numbers, counts, strict=True)}
    return RestPoints(position[falls], position[~falls], shares, len(drift))


def invariant_density(
    fit: Any,
    path: str,
    at: Float[ArrayLike, " n"],
    *,
    model: Callable[..., Any] | None = None,
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    time: float = 0.0,
    num_draws: int = 500,
    rng_key: PRNGKeyArray | None = None,
) -> Any:
    """Bands of the invariant density of a scalar path, `p ~ exp(int 2 f / D) / D`, `D = sigma^2`.

    The long-run share of time at each state, normalised over the states given: they must reach to
    where the density is small (Gardiner 2009, section 5.2.2).

    Args:
        fit: what `to_arviz` takes.
        path: the path site.
        at: increasing states, close enough for the trapezoidal rule.
        model: as for `field_band`.
        model_args: as for `field_band`.
        model_kwargs: as for `field_band`.
        time: at which drift and diffusion are looked at.
        num_draws: at most so many draws are used.
        rng_key: as for `field_band`.

    Returns:
        An `xarray.Dataset` over `point`, as of `field_band` without a prior.

    Raises:
        ValueError: no such path, a path that is not scalar, states that do not increase.

    Example:
        >>> import numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model():
        ...     s = numpyro.sample("s", dist.LogNormal(0.0, 0.1))
        ...     sde = nsde.SDE(lambda t, x, p: -x, lambda t, x, p: p, params=s)
        ...     numpyro.sample("x", nsde.SDEPath(sde, [0.0, 0.1], dist.Normal(0.0, 1.0)))
        >>> draws, grid = {"s": np.full(20, 2.0**0.5)}, np.linspace(-5.0, 5.0, 201)
        >>> density = nsde.diagnostics.invariant_density(draws, "x", grid, model=model)
        >>> round(float(density["mean"][100]), 3)  # standard normal at zero
        0.399
    """
    states = _increasing(at)
    drift, noise = _coefficients(
        fit, path, states, model, model_args, model_kwargs, time, num_draws, rng_key
    )
    slope = 2.0 * drift / noise
    step = np.diff(states)
    energy = np.concatenate(
        [np.zeros((len(drift), 1)), np.cumsum(0.5 * (slope[:, 1:] + slope[:, :-1]) * step, 1)], 1
    )
    log_density = energy - np.log(noise)
    density = np.exp(log_density - log_density.max(1, keepdims=True))
    density = density / np.sum(0.5 * (density[:, 1:] + density[:, :-1]) * step, 1, keepdims=True)
    variables = summary_of(density, False) | {"x": (("point",), states)}
    attrs = {"name": path, "num_draws": len(drift), "what": "invariant density"}
    return make_dataset(variables, {}, attrs).set_coords("x")


def _increasing(at: Any) -> np.ndarray:
    states = np.asarray(at, float)
    if states.ndim != 1 or len(states) < 2 or not np.all(np.diff(states) > 0):
        raise ValueError(f"at must be increasing states, shape (n,), got shape {states.shape}")
    return states


def _coefficients(
    fit: Any,
    path: str,
    states: np.ndarray,
    model: Callable[..., Any] | None,
    model_args: tuple[Any, ...],
    model_kwargs: Mapping[str, Any] | None,
    time: float,
    num_draws: int,
    rng_key: PRNGKeyArray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Drift and squared diffusion of a scalar path at states, each `(draws, n)`."""
    key = jax.random.key(0) if rng_key is None else rng_key
    key_draws, key_weights, key_values = jax.random.split(key, 3)
    draws, flat, count = model_draws(
        fit, model, model_args, model_kwargs, num_draws, key_draws, key_weights
    )
    grid = jnp.asarray(states, jnp.result_type(float))

    def one(inputs: tuple[Mapping[str, Array], PRNGKeyArray]) -> dict[str, Array]:
        _, trace = run_with_fields(draws, *inputs)
        drift = drift_of(trace, path, time)
        law = path_law(trace[path]["fn"]) if drift is not None else None
        if drift is None or not isinstance(law, SDEPath):
            raise ValueError(f"the model has no path site {path!r}")
        if law.state_shape not in ((), (1,)):
            raise ValueError(f"path {path!r} must be scalar, has states of {law.state_shape}")
        each = grid.reshape(-1, *law.state_shape)
        noise = jax.vmap(lambda x: jnp.sum(law.sde.diffusion_columns_at(time, x) ** 2))(each)
        return {"drift": jax.vmap(drift)(each).reshape(-1), "noise": noise}

    keys = jax.random.split(key_values, count)
    out = map_draws(one, ({k: jnp.asarray(v) for k, v in flat.items()}, keys), count)
    return out["drift"].astype(float), out["noise"].astype(float)
