"""The observation statement: noisy data at times of a path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike
from numpyro.handlers import substitute, trace
from numpyro.infer.initialization import init_to_sample
from numpyro.primitives import _PYRO_STACK

from numpyro_sde.accumulate import Accumulated
from numpyro_sde.checks.data import as_data
from numpyro_sde.distributions.clocks import (
    Clock,
    clock_of_value,
    clocks_of_this_run,
    distinct,
    identity_of_path,
    mask_of_value,
)
from numpyro_sde.distributions.marginal import IntegratedPath
from numpyro_sde.distributions.observation import (
    Emission,
    EmissionPath,
    EmissionStructure,
    Opening,
    Openings,
)
from numpyro_sde.distributions.path_law import AbstractPathLaw
from numpyro_sde.distributions.statement import make_statement
from numpyro_sde.grid import check_times
from numpyro_sde.linear.rows import take_rows
from numpyro_sde.models.dims import dims_of_data, name_path
from numpyro_sde.models.stack import plates_here


def observe(
    name: str,
    x: ArrayLike | IntegratedPath,
    emission: Callable[..., dist.Distribution],
    *,
    params: Any = None,
    event_dims: Any = None,
    inputs: Any = None,
    obs: ArrayLike | None = None,
    at: ArrayLike | None = None,
    times: ArrayLike | None = None,
    side: Literal["before", "after"] = "before",
    accumulated: Accumulated | None = None,
) -> Array:
    """State that a path was observed with noise.

    Makes one NumPyro sample site with the time dimension in its event shape, observations
    being independent given the path. Several statements on one path are several instruments.

    Args:
        name: name of the site.
        x: the value of an `SDEPath` site, shape `(*batch, T, *state)`.
        emission: `emission(t, x)` returns the distribution of the observation of ONE state at
            one time; with `params` `(t, x, p)`, with `inputs` `u` comes last.
        params: pytree of arrays handed over as `p`. What varies over a plate must come this
            way.
        event_dims: dimensions of each parameter that belong to one process (default 0).
        inputs: pytree of arrays with one entry for each observation time, shape
            `(*batch, K, ...)` or `(K, ...)`.
        obs: the data, shape `(*batch, K, *observation)`; NaN marks what is missing. None
            draws data.
        at: indices into the path of the K times observed (a grid's `.index`); None for all.
        times: the path's times, shape `(*batch, T)`; only needed where `x` was transformed
            after sampling, so that its path cannot be found.
        side: whether an observation at the time of an event (a dose) sees the state before it,
            as a trough does, or after it.
        accumulated: the `nsde.accumulate` whose path `x` is: the emission then gets the integrals
            since the last reset as a dict, `emission(t, x, acc, ...)`; without `at`, the readings
            are at all times of reset but the first, and at the last time.

    Returns:
        The data, observed or drawn.

    Raises:
        TypeError: an emission that returns no distribution or takes other arguments.
        ValueError: data whose shape does not fit the path; indices outside it; data missing in
            part where only whole observations can be.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model(y=None):
        ...     sde = nsde.processes.OrnsteinUhlenbeck(rate=1.0, mean=0.0, scale=0.5)
        ...     x = numpyro.sample("x", nsde.SDEPath(sde, [0.0, 0.5, 1.0], init=0.0))
        ...     return nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)
        >>> numpyro.handlers.seed(model, jax.random.key(0))().shape
        (3,)
    """
    if isinstance(x, IntegratedPath):
        clock, batch_shape = x.clock, x.lead
    else:
        given, x = x, jnp.asarray(x)
        clock = _find_clock(name, x, given) if times is None else _given_clock(name, x, times)
        batch_shape = x.shape[: x.ndim - 1 - len(clock.state_shape)]
    length = np.shape(clock.times)[-1]
    split = None
    if accumulated is not None:
        law_of_x = _law_of(name, x, clock)
        at, split = accumulated.readings(name, law_of_x, at), accumulated.split(law_of_x)
    rows = np.arange(length) if at is None else check_indices(name, at, length)
    obs = None if obs is None else as_data(f"observe({name!r}): obs", obs)
    openings = _openings(name, x, clock, rows, side)
    emissions = Emission(
        emission,
        params,
        event_dims,
        inputs,
        len(rows),
        batch_shape,
        openings,
        split,
        whole=_is_whole(x, clock),
    )
    if isinstance(x, IntegratedPath):
        statement = make_statement(emissions, x.index[rows], clock.state_shape, batch_shape)
        marginal = x.law_of(statement)
        if obs is not None:
            check_data(name, obs, batch_shape, marginal.event_shape, statement.structure)
        _check_declared(name, emissions, statement.event_shape, batch_shape, obs)
        infer = dims_of_data(name, marginal.event_shape, length, len(marginal.batch_shape))
        return numpyro.sample(name, marginal, obs=obs, infer=infer)
    states, path_times = x, clock.times
    if at is not None:
        states = take_rows(jnp.asarray(x), rows, axis=len(batch_shape))
        path_times = path_times[..., rows]
    states = _under_mask(name, states, mask_of_value(x))
    law = EmissionPath(emissions, path_times, states, clock.state_shape)
    law.observed_path, law.observed_rows = x, rows
    if obs is not None:
        check_data(name, obs, law.batch_shape, law.event_shape, law.structure)
    _check_declared(name, emissions, law.event_shape, batch_shape, obs, clock.undeclared)
    if obs is not None and law.structure.exact:
        _check_meets(name, x)
    name_path(x, len(clock.state_shape))
    infer = dims_of_data(name, law.event_shape, length, len(law.batch_shape))
    return numpyro.sample(name, law, obs=obs, infer=infer)


def _is_whole(x: Any, clock: Clock) -> bool:
    """Whether the states seen are whole numbers."""
    if isinstance(x, IntegratedPath):
        return x.path.whole_states
    return _holds_integers(x) if clock.law is None else clock.law.whole_states


def _holds_integers(x: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.integer))


def _law_of(name: str, x: Any, clock: Clock) -> AbstractPathLaw:
    if isinstance(x, IntegratedPath):
        return x.path
    if clock.law is None:
        raise ValueError(
            f"observe({name!r}): which events act on x is not known, because it is not the value "
            "of an SDEPath site as it was drawn: pass the path itself and transform it in the "
            "emission"
        )
    return cast("AbstractPathLaw", clock.law)


def _openings(name: str, x: Any, clock: Clock, rows: Any, side: str) -> Openings | None:
    """The events after which the states at these rows are seen."""
    if side not in ("before", "after"):
        raise ValueError(f"observe({name!r}): side must be 'before' or 'after', got {side!r}")
    if side == "before":
        return None
    law = _law_of(name, x, clock)
    if law.whole_states:
        return None
    if not law.events or law.forcing is None:
        # Nothing to open yet; a forecast may bring events.
        return Openings(Opening((), law.sde.parameters), (), ())
    place = x.index[rows] if isinstance(x, IntegratedPath) else rows
    shown, dims = law.forcing.openings(place)
    return Openings(Opening(law.forcing.rules, law.sde.parameters), shown, dims)


def _under_mask(name: str, states: Array, mask: Any) -> Array:
    """The states, refused where a path made of innovations is masked out and what sees it is not.

    Innovations have no density there that a change of variables would keep. Masks that are known
    only inside a trace refuse when the compiled program runs.

    Raises:
        ValueError: naming the statement.
    """
    here = numpyro.get_mask()
    if mask is True or here is False:
        return states
    here = True if here is None else here
    known = not any(isinstance(m, jax.core.Tracer) for m in (mask, here))
    xp: Any = np if known else jnp
    alone = xp.any(xp.logical_and(xp.logical_not(mask), here))
    message = (
        f"observe({name!r}): its path is masked out by handlers.mask where this statement is not, "
        "and the path is made of innovations under its law: mask the statement alone, or both"
    )
    if not known:
        return eqx.error_if(states, alone, message)
    if alone:
        raise ValueError(message)
    return states


def _check_meets(name: str, x: Any) -> None:
    """Raise where a sampler or guide starts on paths of which none meets readings without noise.

    Raises:
        ValueError: naming the remedy.
    """
    functions = [h.substitute_fn for h in _PYRO_STACK if isinstance(h, substitute)]
    functions = [getattr(fn, "func", fn) for fn in functions if fn is not None]
    # A strategy of NumPyro's for first values; by `init_to_sample` its Gibbs, and ArviZ, look at a
    # model without starting there.
    strategies = [fn for fn in functions if fn.__module__ == init_to_sample.__module__]
    if not strategies or init_to_sample in strategies:
        return
    shown = identity_of_path(x)
    for handler in _PYRO_STACK:
        sites = handler.trace if isinstance(handler, trace) else {}
        for path, site in sites.items():
            if id(site.get("value")) != shown:
                continue
            centred = site["type"] == "sample" and not site["is_observed"]
            whitened = site["type"] == "deterministic" and f"{path}_guide" not in sites
            if centred or whitened:
                raise ValueError(
                    f"observe({name!r}) reads path {path!r} without noise (Delta emission), and a "
                    f"path that is {'whitened' if whitened else 'latent as it stands'} meets the "
                    "data nowhere: its density is zero. Use reparam.GuidedReparam, "
                    "handlers.marginalize, infer.ParticleGibbs or PMMH, which condition on them; "
                    "or give the emission a noise"
                )


def _check_declared(
    name: str,
    emission: Emission,
    event: tuple[int, ...],
    path_batch: tuple[int, ...],
    obs: Any,
    undeclared: frozenset[int] = frozenset(),
) -> None:
    """Raise where parameters bring a batch dimension that nobody else knows.

    It would make several processes, or count every datum several times. A plate declares a
    dimension; so do the path and the data by having it.

    Raises:
        ValueError: naming `event_dims`.
    """
    plates = plates_here()
    data = () if obs is None else np.shape(obs)[: np.ndim(obs) - len(event)]

    def has(shape: tuple[int, ...], dim: int, size: int) -> bool:
        return len(shape) >= -dim and shape[dim] == size

    own = emission.batch_shape
    for dim in range(-len(own), 0):
        known = dim in plates or (has(path_batch, dim, own[dim]) and dim not in undeclared)
        if own[dim] > 1 and not known and not has(data, dim, own[dim]):
            raise ValueError(
                f"observe({name!r}): params or inputs have a leading dimension of size {own[dim]} "
                f"that no plate declares and neither the path nor the data (shape "
                f"{None if obs is None else np.shape(obs)}) have. Declare the dimensions of one "
                f"process in event_dims{emission.parameters.batch_hint}, or put the statement into "
                "a plate"
            )
    for dim in undeclared:
        size = path_batch[dim] if len(path_batch) >= -dim else 1
        if obs is not None and dim not in plates and not has(data, dim, size):
            raise ValueError(
                f"observe({name!r}): params of the SDE have a leading dimension of size {size} "
                f"that no plate declares and the data of shape {np.shape(obs)} do not have: it "
                "would make as many processes. Declare the dimensions of one process in SDE(..., "
                "event_dims=...), or put the path into a plate"
            )


def _find_clock(name: str, x: Array, given: Any) -> Clock:
    known = clock_of_value(x)
    if known is not None:
        return known
    traces = [handler.trace for handler in reversed(_PYRO_STACK) if isinstance(handler, trace)]
    sites = [site for recorded in traces for site in recorded.values()]
    in_model = []
    for site in sites:
        law = site.get("fn")
        while isinstance(
            law, dist.ExpandedDistribution | dist.Independent | dist.MaskedDistribution
        ):
            law = law.base_dist
        if isinstance(law, AbstractPathLaw):
            if site["value"] is given:  # data given as NumPy are not the array made of them
                if not law.clock.fits(x.shape):
                    raise ValueError(
                        f"observe({name!r}): path {site['name']!r} has "
                        f"{np.shape(law.times)[-1]} times of states of shape "
                        f"{law.state_shape}, but its value has shape {x.shape}. Draws of a path at "
                        "other times are no values of this one: nsde.forecast draws paths and "
                        "observations at new times"
                    )
                return law.clock
            in_model.append(law.clock)
    # A handler may have put a path on another grid: the model knows it by its own clock.
    fitting = [
        [c for c in clocks if c.fits(x.shape)] for clocks in (in_model, clocks_of_this_run())
    ]
    candidates = distinct(fitting[0] or fitting[1])
    if len(candidates) == 1:
        return candidates[0]
    found = "several paths on different clocks" if candidates else "no path"
    raise ValueError(
        f"observe({name!r}): x of shape {x.shape} is not the value of an SDEPath site, and "
        f"{found} would fit it. Pass the path itself and transform it inside the emission, or "
        "give times="
    )


def _given_clock(name: str, x: Array, times: Any) -> Clock:
    if not isinstance(times, jax.core.Tracer):
        times = check_times(times)
    length = np.shape(times)[-1]
    for state_shape in ((), x.shape[-1:]):
        clock = Clock(times, state_shape)
        if clock.fits(x.shape):
            return clock
    raise ValueError(
        f"observe({name!r}): times has length {length} but x has shape {x.shape}: x must be "
        f"(*batch, {length}) or (*batch, {length}, d)"
    )


def check_indices(name: str, at: Any, length: int) -> Any:
    """Indices from 0 into a path of this length, or an error that names the statement."""
    if isinstance(at, jax.core.Tracer):
        raise TypeError(f"observe({name!r}): at must be known before tracing, got a traced array")
    index = np.asarray(at)
    if index.size == 0:
        raise ValueError(
            f"observe({name!r}): at is empty: name at least one time, or leave the statement out"
        )
    if index.ndim != 1 or index.dtype.kind not in "iu":
        raise ValueError(
            f"observe({name!r}): at must be a list of integer indices into the path, got "
            f"dtype {index.dtype} and shape {index.shape}"
        )
    if index.min() < -length or index.max() >= length:
        raise ValueError(
            f"observe({name!r}): at must lie in 0..{length - 1} for a path of {length} times, "
            f"got {index.min()}..{index.max()}"
        )
    return index.astype(int) % length  # from the end too, as indices of arrays are


def check_data(
    name: str,
    obs: Any,
    batch_shape: tuple[int, ...],
    event: tuple[int, ...],
    structure: EmissionStructure,
) -> None:
    """Raise a `ValueError` where data do not fit the observations that a path gives."""
    shape = np.shape(obs)
    if len(shape) < len(event) or shape[len(shape) - len(event) :] != event:
        raise ValueError(
            f"observe({name!r}): obs has shape {shape}, but the path gives observations of "
            f"shape {(*batch_shape, *event)} ({event[0]} times). Give one entry for each "
            "time (NaN where missing), or select times with at="
        )
    lead = shape[: len(shape) - len(event)]
    try:
        np.broadcast_shapes(lead, batch_shape)
    except ValueError:
        raise ValueError(
            f"observe({name!r}): obs has shape {shape}, whose leading dimensions {lead} do not fit "
            f"the batch shape {batch_shape} of the path"
        ) from None
    if structure.partial or isinstance(obs, jax.core.Tracer):
        return
    data = np.asarray(obs)
    if data.dtype.kind != "f":
        return
    missing = np.isnan(data.reshape(*data.shape[: data.ndim - len(event) + 1], -1))
    if np.any(missing.any(-1) & ~missing.all(-1)):
        raise ValueError(
            f"observe({name!r}): obs is missing in part at some times, but a component of "
            f"{structure.family} cannot be integrated out: give the whole observation or "
            "none (all NaN)"
        )
