"""Posterior bands of an unknown function, and where data have anything to say of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray
from numpyro import handlers

from numpyro_sde.collapse import collapse, smooth_weights
from numpyro_sde.diagnostics.compare.arviz_compat import make_dataset
from numpyro_sde.diagnostics.compare.draws import (
    Draws,
    complete_draws,
    flatten_draws,
    hold_values,
    map_draws,
    read_fit,
)
from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.fields.field import AbstractField, recorded_fields
from numpyro_sde.models.stack import path_law

_LEVELS = (50, 90)


def field_band(
    fit: Any,
    name: str,
    at: Float[ArrayLike, "n *state"],
    *,
    model: Callable[..., Any] | None = None,
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    time: float = 0.0,
    num_draws: int = 500,
    rng_key: PRNGKeyArray | None = None,
) -> Any:
    """Bands of an unknown function, or of the whole drift of a path, at given states.

    Weights of a field are not identified one by one; its values are. Besides the band stands how
    much the data have narrowed it: `informed`, the prior's standard deviation over the posterior's,
    the hyperparameters being those of the posterior. Below 2 the band is the prior's more than the
    data's.

    Args:
        fit: what `to_arviz` takes: an `MCMC`, `(svi, result)`, a dictionary of draws.
        name: a field, as given to `register`, or a path site, for its drift.
        at: states, shape `(n,)`, or `(n, d)`.
        model: the model; needed with a dictionary of draws. One in `handlers.collapse` has its
            weights drawn back.
        model_args: arguments of the model as when it was fitted.
        model_kwargs: its keyword arguments.
        time: at which the drift of a path is looked at.
        num_draws: at most so many draws are used, evenly thinned.
        rng_key: for weights drawn back, and for the prior; by default a fixed one.

    Returns:
        An `xarray.Dataset` over `point` (and `output` for vectors): `mean`, `sd`, `lower_50`,
        `upper_50`, `lower_90`, `upper_90`, `prior_sd`, `informed`; `states`, those of the
        paths that the model observes, for a rug. For a path's drift no prior.

    Raises:
        ValueError: no such field or path, no model, states outside its box, a field for each
            series of a plate.

    Example:
        >>> import jax, numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> prior = nsde.fields.HSGP(dim=1, box=2.5, num=8)
        >>> times, x = np.arange(5) * 0.1, np.array([0.0, 0.2, 0.1, 0.3, 0.2])
        >>> def model():
        ...     f = prior.register("f", amplitude=dist.HalfNormal(2.0), length=0.8)
        ...     sde = nsde.SDE(lambda t, x, p: p(x), lambda t, x, p: 1.0, params=f)
        ...     numpyro.sample("x", nsde.SDEPath(sde, times, init=x[0]), obs=x)
        >>> draws = {"f/amplitude": np.full(100, 1.5)}
        >>> collapsed = nsde.handlers.collapse(model, "f")
        >>> band = nsde.diagnostics.field_band(draws, "f", [0.0, 1.0], model=collapsed)
        >>> bool(band["informed"][0] > band["informed"][1])
        True
    """
    key = jax.random.key(0) if rng_key is None else rng_key
    key_draws, key_weights, key_values, key_prior = jax.random.split(key, 4)
    points = np.asarray(at, float)
    if points.ndim not in (1, 2) or not len(points):
        raise ValueError(f"at must have shape (n,) or (n, d), got {points.shape}")
    draws, flat, count = model_draws(
        fit, model, model_args, model_kwargs, num_draws, key_draws, key_weights
    )
    values = _values(draws, flat, count, key_values, name, points, time)
    variables = summary_of(values["value"], values["value"].ndim > 2)
    dims = variables["mean"][0]
    if "prior_sd" in values:
        prior = np.sqrt(np.mean(values["prior_sd"] ** 2, axis=0))
    elif "is_field" in values:
        prior = _prior_draws(draws, flat, count, key_prior, name, points).std(axis=0)
    else:
        prior = None
    if prior is not None:
        variables["prior_sd"] = dims, prior
        with np.errstate(divide="ignore"):  # a value that all draws agree on
            variables["informed"] = dims, prior / variables["sd"][1]
    seen = observed_states(draws, flat)
    if seen is not None and seen.shape[1:] == points.shape[1:]:
        variables["states"] = ("state", "coordinate")[: seen.ndim], seen
    variables["x"] = ("point", "coordinate")[: points.ndim], points
    attrs = {"name": name, "num_draws": count, "what": "field" if prior is not None else "drift"}
    return make_dataset(variables, {}, attrs).set_coords("x")


def model_draws(
    fit: Any,
    model: Callable[..., Any] | None,
    model_args: tuple[Any, ...],
    model_kwargs: Mapping[str, Any] | None,
    num_draws: int,
    key: PRNGKeyArray,
    key_weights: PRNGKeyArray,
) -> tuple[Draws, dict[str, Any], int]:
    """The fit, its draws in one row, thinned, with weights drawn back, and their number."""
    draws = read_fit(fit, model=model, model_args=model_args, model_kwargs=model_kwargs)
    if draws.model is None:
        raise ValueError("a field lives in a model: give model= with the draws")
    draws = complete_draws(
        draws, num_samples=num_draws, rng_key=key, log_likelihood=False, num_times=None
    )
    flat = flatten_draws(draws.posterior)
    length = len(next(iter(flat.values())))
    index = np.unique(np.linspace(0, length - 1, min(num_draws, length)).astype(int))
    flat = {k: v[index] for k, v in flat.items()}
    if isinstance(draws.model, collapse):
        weights = smooth_weights(
            draws.model, flat, draws.model_args, draws.model_kwargs, key_weights, 64
        )
        flat |= {k: np.asarray(v) for k, v in weights.items()}
        draws = draws._replace(model=draws.model.fn)
    return draws, flat, len(index)


def run_with_fields(
    draws: Draws, values: Mapping[str, Any], key: PRNGKeyArray
) -> tuple[dict[str, AbstractField], Mapping[str, Any]]:
    """Run the model at one draw: the fields it registers, and its trace."""
    assert draws.model is not None
    run = hold_values(handlers.seed(draws.model, key), {**draws.params, **values})
    with recorded_fields() as fields:
        trace = handlers.trace(run).get_trace(*draws.model_args, **draws.model_kwargs)
    return fields, trace


def drift_of(trace: Mapping[str, Any], name: str, time: float) -> Callable[[Array], Array] | None:
    """Drift of a path at a time as a function of the state; None if the site is no path."""
    site = trace.get(name)
    law = path_law(site["fn"]) if site is not None and site["type"] == "sample" else None
    if not isinstance(law, SDEPath):
        return None
    if law.batch_shape:
        raise ValueError(
            f"path {name!r} has series of shape {law.batch_shape}, each with its own drift: "
            "look at a model of one of them"
        )
    return lambda x: law.sde.ito_drift_at(time, x)


def _values(
    draws: Draws,
    flat: Mapping[str, Any],
    count: int,
    key: PRNGKeyArray,
    name: str,
    points: np.ndarray,
    time: float,
) -> dict[str, np.ndarray]:
    grid = jnp.asarray(points, jnp.result_type(float))

    def one(inputs: tuple[Mapping[str, Array], PRNGKeyArray]) -> dict[str, Array]:
        fields, trace = run_with_fields(draws, *inputs)
        field = fields.get(name)
        if field is None:
            drift = drift_of(trace, name, time)
            if drift is None:
                raise ValueError(
                    f"the model has no field and no path {name!r}; it registers {sorted(fields)}"
                )
            return {"value": jax.vmap(drift)(grid)}
        _require_one(name, field)
        _require_inside(name, field, points)
        out = {"value": field.on(grid), "is_field": jnp.ones(())}
        if hasattr(field, "prior_sd"):
            out["prior_sd"] = jax.vmap(field.prior_sd)(grid)
        return out

    keys = jax.random.split(key, count)
    return map_draws(one, ({k: jnp.asarray(v) for k, v in flat.items()}, keys), count)


def _require_one(name: str, field: AbstractField) -> None:
    leaves = jax.tree_util.tree_leaves(field)
    for leaf, rank in zip(leaves, field.leaf_ranks, strict=True):
        if rank is not None and jnp.ndim(leaf) > rank:
            raise ValueError(
                f"field {name!r} is one for each series of a plate: look at the draws of one "
                "series, with a model of it"
            )


def _require_inside(name: str, field: AbstractField, points: np.ndarray) -> None:
    outside_by = getattr(getattr(field, "basis", None), "outside_by", None)
    beyond = 0.0 if outside_by is None else outside_by(points)
    if beyond > 0:
        raise ValueError(
            f"at has states outside the box of field {name!r}, by {beyond:.2g} half-widths: there "
            "the field is zero"
        )


def _prior_draws(
    draws: Draws,
    flat: Mapping[str, Any],
    count: int,
    key: PRNGKeyArray,
    name: str,
    points: np.ndarray,
) -> np.ndarray:
    """Values under fresh weights, the hyperparameters being those of the draws."""
    own = {site for site in flat if site.startswith(f"{name}/")}
    weights = {f"{name}/z"} if f"{name}/z" in own else own
    rest = {site: jnp.asarray(v) for site, v in flat.items() if site not in weights}
    grid = jnp.asarray(points, jnp.result_type(float))

    def one(inputs: tuple[Mapping[str, Array], PRNGKeyArray]) -> dict[str, Array]:
        fields, _ = run_with_fields(draws, *inputs)
        return {"value": fields[name].on(grid)}

    return map_draws(one, (rest, jax.random.split(key, count)), count)["value"]


def summary_of(values: np.ndarray, vector: bool) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Mean, standard deviation and quantiles of draws, each with its dimensions."""
    dims: tuple[str, ...] = ("point", "output") if vector else ("point",)
    out = {"mean": (dims, values.mean(axis=0)), "sd": (dims, values.std(axis=0, ddof=1))}
    for level in _LEVELS:
        tail = 0.5 - level / 200.0
        low, high = np.quantile(values, [tail, 1.0 - tail], axis=0)
        out[f"lower_{level}"], out[f"upper_{level}"] = (dims, low), (dims, high)
    return out


def observed_states(draws: Draws, flat: Mapping[str, Any]) -> np.ndarray | None:
    """States of the paths that the model observes as they are, shape `(N, *state)`, if any."""
    first = {name: jnp.asarray(value[0]) for name, value in flat.items()}
    _, trace = run_with_fields(draws, first, jax.random.key(0))
    found = []
    for site in trace.values():
        law = path_law(site["fn"]) if site["type"] == "sample" and site["is_observed"] else None
        if isinstance(law, SDEPath):
            found.append(np.asarray(site["value"]).reshape(-1, *law.state_shape))
    if not found or len({states.shape[1:] for states in found}) > 1:
        return None
    return np.concatenate(found)
