"""Paths given posterior draws of the parameters, for models fitted with `marginalize`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PRNGKeyArray
from numpyro.handlers import seed, substitute
from numpyro.infer import MCMC

from numpyro_sde.collapse import collapse, smooth_weights
from numpyro_sde.distributions.marginal import IntegratedPath, MarginalPath, draw_parts, key_for
from numpyro_sde.distributions.state_space import ObservedPath, data_under_law
from numpyro_sde.grid import check_times
from numpyro_sde.handlers import marginalize
from numpyro_sde.joining import join_clocks
from numpyro_sde.models.arguments import released, with_data_as_arguments
from numpyro_sde.models.survey import survey
from numpyro_sde.runtime.draws import on_one_device
from numpyro_sde.runtime.entry import entry_point
from numpyro_sde.states.integrated import run_integrated
from numpyro_sde.states.jump_times import JumpSizes, draw_jumps, fitted_jumps
from numpyro_sde.statespace.checks import check_count
from numpyro_sde.statespace.model import AbstractFilter


def smooth(
    model: Callable[..., Any] | MCMC,
    samples: Mapping[str, ArrayLike] | None = None,
    *model_args: Any,
    method: AbstractFilter | None = None,
    rng_key: PRNGKeyArray,
    times: ArrayLike | None = None,
    at_jumps: bool = False,
    batch_size: int = 64,
    thinning: int = 1,
    **model_kwargs: Any,
) -> dict[str, Any]:
    """Draw every path that was integrated out, given posterior draws of the rest.

    One path for each posterior draw: forward filtering and backward sampling (Carter and Kohn
    1994), exact for linear-Gaussian models, the filter's Gaussian approximation otherwise.

    Of a run of `infer.PMMH` hand over the `MCMC` itself: paths then come from the very particles
    whose likelihoods were accepted, and are exact for any number of them (Andrieu, Doucet and
    Holenstein 2010, theorem 4). A `Particle` filter run afresh at each draw is biased where its
    log likelihood has a standard deviation near 1, as that of PMMH does: take many particles.

    Args:
        model: the model, with or without `handlers.marginalize` around it, or one in
            `handlers.collapse`; or a fit, an `MCMC` after `run`, whose model, draws (chains
            joined) and arguments are then taken.
        samples: posterior draws of the other sites, leading axis the draws
            (`mcmc.get_samples()`); None for those of the fit.
        *model_args: arguments of the model as when it was fitted, the data included.
        method: the filter; None takes that of `handlers.marginalize`.
        rng_key: key for the draws.
        times: times at which to draw the paths instead of their own, increasing, shape `(F,)`, or
            `(*batch, F)` with a clock for each series of a panel: between the data for a finer
            picture, or past them.
        at_jumps: draw paths of Markov jump processes in continuous time instead: the times of
            their jumps and the states between, exact given the states at the data.
        batch_size: how many draws to treat at once (memory against speed).
        thinning: take every so many of the draws.
        **model_kwargs: keyword arguments of the model.

    Returns:
        For each path site, draws of shape `(num_draws, *batch, T, *state)`. Under
        `filters.RaoBlackwell` also `{site}_regime`, `(num_draws, *batch, T)`: the regime of the
        step that ends at each time, at the first time that of the first step. With `at_jumps` a
        `jumps.JumpTimes` of each site: times `(num_draws, *batch, J)`, NaN after the last jump, and
        states `(num_draws, *batch, J + 1)`. Of a model in `handlers.collapse`, draws of the weights
        that it integrated out, by the name of their site.

    Raises:
        ValueError: no data, no path that the model observes, times that do not fit (those of a run
            of `PMMH` are its own), or `at_jumps` of a path that does not jump among at most 64
            states.
        TypeError: no method, no draws, or draws and arguments beside a fit.

    Example:
        >>> import jax, numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model(y=None):
        ...     rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
        ...     sde = nsde.SDE(lambda t, x, p: -p * x, lambda t, x, p: 0.5, params=rate)
        ...     x = numpyro.sample("x", nsde.SDEPath(sde, np.arange(4.0), dist.Normal(0.0, 1.0)))
        ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)
        >>> draws = {"rate": np.array([0.5, 1.0])}
        >>> y = np.array([0.1, np.nan, 0.3, 0.2])
        >>> method, key = nsde.filters.Kalman(), jax.random.key(0)
        >>> nsde.smooth(model, draws, y=y, method=method, rng_key=key)["x"].shape
        (2, 4)
        >>> later = np.array([4.0, 5.0, 6.0])
        >>> nsde.smooth(model, draws, y=y, method=method, rng_key=key, times=later)["x"].shape
        (2, 3)
    """
    filter_keys = None
    if isinstance(model, MCMC):
        if samples is not None or model_args or model_kwargs:
            raise TypeError("smooth: a fit brings its draws and arguments; hand over it alone")
        method, filter_keys = _filter_of(model, method, times)
        samples, model_args, model_kwargs = model.get_samples(), model._args, model._kwargs
        model = model.sampler.model
    if samples is None:
        raise TypeError("smooth: samples are missing: draws of the other sites, or hand over a fit")
    check_count("thinning", thinning)
    draws = {name: value[::thinning] for name, value in on_one_device(samples).items()}
    if isinstance(model, collapse):
        return smooth_weights(model, draws, model_args, model_kwargs, rng_key, batch_size)
    inner = model
    if isinstance(model, marginalize):
        assert model.fn is not None
        inner, method = model.fn, method or model.method
    if not isinstance(method, AbstractFilter):
        raise TypeError(f"method must be one of nsde.filters, got {method!r}")
    if times is not None:
        times = check_times(times)
    uses = survey(inner, model_args, model_kwargs)
    names = set(uses.observed.values())
    if not names:
        raise ValueError(
            "smooth: the model has no latent SDEPath site, nor a JumpPath, that it observes"
        )
    kept = {name: value for name, value in draws.items() if name not in names}
    if not kept:
        raise ValueError(f"samples must hold draws of the sites other than {sorted(names)}")
    num_draws = {name: value.shape[0] for name, value in kept.items()}
    if len(set(num_draws.values())) != 1:
        raise ValueError(f"samples must have one leading axis of draws, got lengths {num_draws}")

    keys = jax.random.split(rng_key, next(iter(num_draws.values())))
    filter_keys = None if filter_keys is None else filter_keys[::thinning]

    def run(size: JumpSizes | None) -> dict[str, Any]:
        transformed = bool(uses.transformed)
        how = (method, tuple(sorted(names)), transformed, times, size, batch_size)
        rest = (*how, kept, keys, filter_keys)
        return with_data_as_arguments(
            inner, model_args, model_kwargs, lambda arguments: _smoothed(inner, arguments, *rest)
        )

    if not at_jumps:
        return run(None)
    if times is not None:
        raise ValueError("smooth: at_jumps=True gives the times of jumps, so times= is not taken")
    return fitted_jumps(run)


def _filter_of(mcmc: MCMC, method: AbstractFilter | None, times: Any) -> tuple[Any, Any]:
    """The filter of a fit and the random numbers that it had at each draw, if it tells."""
    kept = mcmc.get_extra_fields().get("filter_key")
    if kept is None:
        return method, None
    if method is not None:
        raise TypeError("smooth: a run of PMMH brings its own filter, so that method= is not taken")
    if times is not None:
        raise ValueError("smooth: paths of a run of PMMH are drawn at their own times")
    return mcmc.sampler.tuning.method, jax.random.wrap_key_data(jnp.asarray(np.asarray(kept)))


@entry_point
def _smoothed(
    model: Callable[..., Any],
    arguments: Any,
    method: AbstractFilter,
    names: tuple[str, ...],
    transformed: bool,
    times: Any,
    jumps: JumpSizes | None,
    batch_size: int,
    kept: dict[str, Array],
    keys: PRNGKeyArray,
    filter_keys: PRNGKeyArray | None,
) -> dict[str, Any]:
    """Draws of all paths; compiled once for a model and the shapes of its data."""
    args, kwargs = released(arguments)

    def one(inputs: tuple[dict[str, Array], PRNGKeyArray, Any]) -> dict[str, Any]:
        draw, key, filter_key = inputs
        own = method if filter_key is None else method.with_key(filter_key)
        model_key, path_key = jax.random.split(key)
        paths, recorded = run_integrated(
            substitute(seed(model, model_key), data=draw),
            args,
            kwargs,
            method=own,
            sites=frozenset(names),
            transformed=transformed,
        )
        _require_data(recorded)
        keys = jax.random.split(path_key, len(paths))
        found: dict[str, Any] = {}
        for (name, path), key in zip(paths.items(), keys, strict=True):
            if jumps is not None:
                found[name] = draw_jumps(_observed(path), method, jumps, key)
            else:
                parts = _draw(path, own, times, key, filter_key is not None)
                found[name] = parts.pop("path")
                found |= {f"{name}_{part}": value for part, value in parts.items()}
        return found

    return jax.lax.map(one, (kept, keys, filter_keys), batch_size=batch_size)


def _require_data(recorded: Any) -> None:
    for name, site in recorded.items():
        law = site.get("fn")
        while hasattr(law, "base_dist"):
            law = law.base_dist
        if isinstance(law, MarginalPath) and not site["is_observed"]:
            raise ValueError(
                f"smooth: observation site {name!r} has no data; call smooth with the arguments "
                "of the model as when it was fitted"
            )


def _observed(stand_in: IntegratedPath) -> ObservedPath:
    """A path with all data on it."""
    data = tuple((s, data_under_law(stand_in.mask, s, y, stand_in.name)) for s, y in stand_in.seen)
    lead = jnp.broadcast_shapes(
        stand_in.lead, *(y.shape[: y.ndim - len(s.event_shape)] for s, y in data)
    )
    return ObservedPath(stand_in.path, lead, data, stand_in.name)


def _draw(
    stand_in: IntegratedPath, method: AbstractFilter, times: Any, key: PRNGKeyArray, again: bool
) -> dict[str, Array]:
    """A path, and what goes with it, at its own times or at others.

    `again` runs the filter of the path's likelihood once more, on the same random numbers.
    """
    observed = _observed(stand_in)
    path, lead = observed.path, observed.lead
    if times is None:
        parts = draw_parts(observed, method, key, key_for(method, stand_in.name) if again else None)
        return {
            name: jnp.take(value, stand_in.index, axis=len(lead)) for name, value in parts.items()
        }
    if isinstance(path.times, jax.core.Tracer):
        raise ValueError(
            f"smooth: times= needs a clock known before tracing, but path {stand_in.name!r} has "
            f"traced times of shape {jnp.shape(path.times)}"
        )
    # Past the data steps are no longer than those of the path's own grid.
    step = None if path.grid is None or not np.size(path.dt) else float(np.max(path.dt))
    clock = join_clocks(path.times, times, step)
    moved = tuple((s.moved(clock.old[s.rows.index]), y) for s, y in observed.data)
    longer = ObservedPath(path.replace(times=clock.grid), lead, moved)
    return {
        name: take_times(value, clock.place, len(path.state_shape) if name == "path" else 0)
        for name, value in draw_parts(longer, method, key).items()
    }


def take_times(states: Array, place: np.ndarray, state_dim: int) -> Array:
    """States at grid indices, `(F,)` or `(*batch, F)` where they differ between series.

    Args:
        states: `(*lead, N, *state)`.
        place: the indices.
        state_dim: dimensions of one state.
    """
    axis = states.ndim - state_dim - 1
    if place.ndim == 1:
        return jnp.take(states, place, axis=axis)
    index = np.broadcast_to(place, (*states.shape[:axis], place.shape[-1]))
    return jnp.take_along_axis(states, index.reshape(*index.shape, *(1,) * state_dim), axis=axis)
