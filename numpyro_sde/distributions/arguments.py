"""Arguments of a path law: its start, its scheme and its events, checked and completed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from numpyro_sde.events import Events
from numpyro_sde.schemes import (
    AbstractScheme,
    Euler,
    Exact,
    HermiteExpansion,
    LocalLinear,
    MomentClosure,
)
from numpyro_sde.schemes.dependence import has_no_noise
from numpyro_sde.schemes.fractional import driven_scheme
from numpyro_sde.sde import SDE, Structure


def as_init(init: Any, *, counts: bool = False) -> dist.Distribution:
    """A start as a distribution; a fixed state as a point mass."""
    if isinstance(init, dist.Distribution):
        if init.is_discrete and not counts:
            raise TypeError(
                f"init must be a continuous distribution, got {type(init).__name__}: the states of "
                "an SDE are real numbers"
            )
        return init
    try:
        state = jnp.asarray(init)
    except (TypeError, ValueError):
        raise TypeError(
            "init must be a NumPyro distribution over the first state, or one fixed state, got "
            f"{type(init).__name__}"
        ) from None
    if not jnp.issubdtype(state.dtype, jnp.floating):
        state = state.astype(jnp.result_type(float))
    if not isinstance(state, jax.core.Tracer) and not np.all(np.isfinite(state)):
        raise ValueError(f"init must be finite, got {init}")
    return dist.Delta(state, event_dim=state.ndim)


def resolve_scheme(sde: SDE, scheme: Any, state_shape: tuple[int, ...]) -> AbstractScheme:
    """The scheme to use: that named, else the process's own, else Euler's."""
    scheme = sde.adapt(scheme, state_shape)
    if scheme is None or isinstance(scheme, AbstractScheme):
        scheme = driven_scheme(sde, scheme, state_shape)
    if scheme is None:
        default = sde.default_transition()
        return Euler() if default is None else default
    if not isinstance(scheme, AbstractScheme):
        hint = f"; call it, scheme={scheme.__name__}()" if isinstance(scheme, type) else ""
        raise TypeError(f"scheme must be one of nsde.schemes, got {scheme!r}{hint}")
    return scheme.resolve(sde) if isinstance(scheme, Exact) else scheme


def as_events(events: Any) -> tuple[Events, ...]:
    """Events as a tuple."""
    listed = (events,) if isinstance(events, Events) else tuple(events or ())
    for one in listed:
        if not isinstance(one, Events):
            raise TypeError(
                "events must be a list of nsde.Events or nsde.doses(...), got one of type "
                f"{type(one).__name__}"
            )
    return listed


def with_flow(scheme: AbstractScheme) -> AbstractScheme:
    """The default scheme where an infusion adds to the drift, which exact laws do not know of."""
    return scheme if isinstance(scheme, Euler) or scheme.has_memory else LocalLinear()


def check_forced(sde: SDE, scheme: AbstractScheme, events: tuple[Events, ...]) -> None:
    """Raise a `ValueError` where inputs or events do not fit the noise or the scheme."""
    if not sde.is_diffusion:
        raise ValueError(
            f"inputs and events are for diffusions, but {type(sde).__name__} jumps or switches by "
            "chance too"
        )
    if scheme.has_memory:
        raise ValueError(
            f"inputs and events need an SDE driven by Brownian motion, got noise "
            f"{type(sde.noise).__name__}, whose memory they would have to pass through"
        )
    if events and isinstance(scheme, MomentClosure):
        raise ValueError("moment closure takes no events: use laws.LinearNoise()")
    exact = sde.exact_transition()
    knows_drift = exact is None or not isinstance(scheme, type(exact))
    if any(one.flows for one in events) and not (
        knows_drift and not isinstance(scheme, HermiteExpansion) and not scheme.restarts
    ):
        raise ValueError(
            f"infusions add to the drift, which {type(scheme).__name__} does not use: take "
            "scheme=LocalLinear() (exact for linear SDEs)"
        )


def checked_structure(sde: SDE, init: dist.Distribution) -> Structure:
    """How the noise enters, or an error that says what is wrong with `init`.

    Raises:
        ValueError: coefficients that do not fit the state.
    """
    try:
        return sde.structure(init.event_shape)
    except (IndexError, TypeError, ValueError) as error:
        if init.event_shape or not init.batch_shape:
            raise
        raise ValueError(
            f"drift or diffusion fail on a state of shape () ({error}), and init has batch shape "
            f"{init.batch_shape}: a vector state needs init.to_event(1)"
        ) from error


def refuse_undeclared(
    undeclared: frozenset[int],
    batch_shape: tuple[int, ...],
    lead: tuple[int, ...],
    what: str = "observed path",
) -> None:
    """Raise where data lack a batch dimension that only parameters brought.

    Args:
        undeclared: dimensions that only parameters brought.
        batch_shape: batch shape of the law.
        lead: leading dimensions of the data.
        what: what to call the data.

    Raises:
        ValueError: naming `event_dims`.
    """
    for dim in undeclared:
        if len(lead) < -dim or lead[dim] != batch_shape[dim]:
            raise ValueError(
                f"params of the SDE have a leading dimension of size {batch_shape[dim]} that no "
                f"plate declares and the {what} does not have: it would count the data as many "
                "times. Declare the dimensions of one process in SDE(..., event_dims=...), or put "
                "the statement into a plate"
            )


def refuse_without_noise(sde: SDE, state_shape: tuple[int, ...]) -> None:
    """Raise where the diffusion is zero, so that a path has no density.

    Raises:
        ValueError: naming what can be done.
    """
    if sde.is_diffusion and has_no_noise(sde, state_shape):
        raise ValueError(
            "diffusion is zero, so the path follows from its start and has no density: treat it by "
            "reparam.InnovationReparam, or integrate it out by handlers.marginalize"
        )
