"""The path sites of a model: what a guide of paths finds out about them before and in a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.initialization import init_to_median
from numpyro.primitives import Messenger

from numpyro_sde.distributions.clocks import remember_value
from numpyro_sde.distributions.observation import EmissionPath
from numpyro_sde.distributions.path_law import AbstractPathLaw
from numpyro_sde.distributions.state_space import ObservedPath, data_under_law
from numpyro_sde.guides.path_laws import Place, Sizes, gap_rows, observed_rows
from numpyro_sde.guides.starts import StartKind
from numpyro_sde.guides.steps import guide_along
from numpyro_sde.models.reading import read_model, stand_in
from numpyro_sde.models.stack import outside_all_handlers, path_law, peel
from numpyro_sde.reparam.guided import carried
from numpyro_sde.schemes.milstein import Milstein
from numpyro_sde.statespace.exact import refuse_exact
from numpyro_sde.statespace.model import StateSpaceModel
from numpyro_sde.statespace.reference import (
    data_reference,
    is_plain,
    kalman_reference,
    smoothed_reference,
)


class NoDataError(ValueError):
    """Nothing is observed of a path."""


class _StandIns(Messenger):
    """Give latent paths a value without simulating them; `hide` them and what sees them too."""

    def __init__(self, fn: Any = None, *, hide: bool = False) -> None:
        super().__init__(fn)
        self.hide = hide

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "deterministic" and self.hide:
            msg["stop"] = True  # it may be made of a path
        if msg["type"] != "sample":
            return
        law, _ = peel(msg["fn"])
        path = path_law(msg["fn"])
        if path is not None and not msg["is_observed"]:
            if msg["value"] is not None:
                return  # a recorder inside has given it one
            shape = msg["fn"].shape()
            msg["value"] = stand_in(path, shape[: len(shape) - path.event_dim])
            msg["stop"] = self.hide
            remember_value(msg["value"], path.clock)
        elif isinstance(law, EmissionPath):
            if msg["value"] is None:
                msg["value"] = jnp.zeros(msg["fn"].shape())
            msg["stop"] = self.hide


class _FullPlates(Messenger):
    """Take all of every plate, subsampled ones too, whose names are noted."""

    def __init__(self) -> None:
        super().__init__()
        self.filled: list[str] = []

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "plate":
            if msg["args"][1] not in (None, msg["args"][0]):
                self.filled.append(msg["name"])
            msg["args"] = (msg["args"][0], None)
            msg["value"] = jnp.arange(msg["args"][0])


def without_paths(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model's parameters alone: no path, no observation of one, no deterministic site."""

    def parameters(*args: Any, **kwargs: Any) -> None:
        with _StandIns(hide=True):
            model(*args, **kwargs)

    return parameters


def with_full_plates(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model with all of every plate.

    Raises:
        ValueError: when run, a model that cannot run so, where a plate subsamples.
    """

    def full(*args: Any, **kwargs: Any) -> Any:
        plates = _FullPlates()
        try:
            with plates:
                return model(*args, **kwargs)
        except (ValueError, TypeError) as error:
            if not plates.filled:
                raise
            raise ValueError(
                f"AutoPathGuide has parameters for all of plate {plates.filled[0]!r}, which "
                "subsamples, and the model does not run with all of it: give all the data and "
                f"index them by the plate (y[i]), in the model. {error}"
            ) from error

    return full


def trace_at_median(model: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """A trace of the model at prior medians, with stand-ins for its paths."""
    strategy = init_to_median(num_samples=15)

    def value(msg: Any) -> Any:
        return strategy(msg) if msg["value"] is None else None

    median = substitute(substitute_fn=value)
    with outside_all_handlers(), trace() as recorded, median, seed(rng_seed=0), _StandIns():
        model(*args, **kwargs)
    return recorded


def batch_sizes(model: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, int]:
    """How many of each plate a call of the model takes."""
    sites = trace_at_median(model, args, kwargs).items()
    return {name: site["args"][1] for name, site in sites if site["type"] == "plate"}


def look(
    model: Callable[..., Any], args: Any, kwargs: Any, name: str, known: Mapping[str, Any]
) -> ObservedPath:
    """Find a path's law and data in a run of the model at known values, plates' indices among them.

    Raises:
        NoDataError: nothing is observed of the path.
    """
    site = read_model(model, args, kwargs, known=known, only=name).observed[name]
    if not site.has_data:
        raise NoDataError(
            f"AutoPathGuide: path {name!r} has no data: state them with nsde.observe(..., obs=...) "
            "and hand them to the guide's first call"
        )
    data = tuple((s, data_under_law(site.mask, s, y, name)) for s, y in site.data)
    return ObservedPath(site.path, site.lead, data, site.name, site.mask)


def check_site(name: str, path: AbstractPathLaw) -> None:
    """Raise where a path cannot be guided."""
    scheme = path.scheme
    scheme.require_smooth(f"AutoPathGuide: path {name!r}")
    if not (scheme.has_density and scheme.has_innovations) or isinstance(scheme, Milstein):
        raise ValueError(
            f"AutoPathGuide: path {name!r} has scheme {type(scheme).__name__}, whose step is not "
            "a density and a one-to-one map of innovations at once; choose scheme=Euler() or "
            "LocalLinear()"
        )
    noises = int(np.prod(path.innovation_shape[1:], dtype=int))
    states = int(np.prod(path.state_shape, dtype=int))
    if noises != states:
        raise ValueError(
            f"AutoPathGuide: path {name!r} has {noises} noises in a step for states of shape "
            f"{path.state_shape}; a path guide needs as many noises as states. With fewer choose "
            "scheme=LocalLinear() or Strang(); with more give SDE the square root of "
            "diffusion @ diffusion.T"
        )


def sizes_of(site: ObservedPath, num_theta: int) -> Sizes:
    """Sizes of one path of a site and of its data."""
    found: list[Sizes] = []
    path = site.path

    def probe(model: StateSpaceModel) -> Array:
        refuse_exact(model, "AutoPathGuide")
        found.append(
            Sizes(
                num_steps=path.num_times - 1,
                num_noises=int(np.prod(path.innovation_shape[1:], dtype=int)),
                dim=model.dim,
                num_free=int(np.prod(path.state_shape, dtype=int)),
                num_data=sum(i.values.shape[1] for i in model.instruments),
                num_theta=num_theta,
                num_gaps=len(gap_rows(model)) - 1,
            )
        )
        return jnp.zeros(())

    jax.eval_shape(lambda: site.map(probe))
    return found[0]


def smoothed_references(site: ObservedPath) -> Array:
    """Mean of the extended Kalman smoother of every path, `(*lead, N, d)`."""

    def one(model: StateSpaceModel) -> Array:
        return carried(model, smoothed_reference(model))

    return jax.jit(lambda: site.map(one))()


def reference_from_data(model: StateSpaceModel) -> Array:
    """A reference made of the data in each call, for paths that have none of their own.

    Interpolated data where these are readings of the state. Where one observation alone says little
    or points to infinity, as a bin without a spike does, the mean of the extended Kalman smoother;
    where that is lost, the typical state.
    """
    if all(is_plain(model, instrument) for instrument in model.instruments):
        return carried(model, data_reference(model))
    mean = kalman_reference(model)
    lost = ~jnp.all(jnp.isfinite(mean))
    return carried(model, jnp.where(lost, model.init_mean[None], mean))


def place_of(model: StateSpaceModel, reference: Array, theta: Array, start: StartKind) -> Place:
    """The guide along a reference and the scales on which a law sees states.

    States are seen from their mean along the reference, in units of how far they go: along it,
    and by their noise between two observations.
    """
    along = guide_along(model, reference)
    center = jnp.mean(reference, axis=0)
    variance = jnp.mean((reference - center[None]) ** 2, axis=0)
    if model.num_times > 1:
        B = along.linear.B
        noise = jnp.sum(B**2, axis=0) if B.ndim == 2 else jnp.sum(B**2, axis=(0, 2))
        variance = variance + noise / max(len(observed_rows(model)), 1)
    spread = jnp.sqrt(jnp.where(variance > 0, variance, 1.0))
    return Place(along, center, spread, theta, start)


def is_traced(tree: Any) -> bool:
    """Whether any leaf is known only inside a trace."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree_util.tree_leaves(tree))
