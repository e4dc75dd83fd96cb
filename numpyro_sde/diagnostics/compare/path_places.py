"""Where a model's paths live, whatever treats them: times, plates and state, from the model itself.

Under `GuidedReparam` and the like a path is a deterministic site that knows no times; integrated
out it is no site at all. The model without these treatments says all: it is run once more, nothing
being computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from numpyro import handlers
from numpyro.primitives import Messenger

from numpyro_sde.diagnostics.compare.sites import law_times, unwrap
from numpyro_sde.distributions.path_law import AbstractPathLaw
from numpyro_sde.handlers import marginalize
from numpyro_sde.statespace.model import AbstractFilter


class PathPlace(NamedTuple):
    """The dimensions of a path's value.

    Attributes:
        times: Its times, float64 of shape `(*batch, T)`.
        event_dim: Dimensions of one path, 1 or 2.
        plates: Name, position (negative, among batch dimensions) and size of each plate around it.

    Example:
        >>> PathPlace(np.arange(3.0), 1, (("series", -1, 5),)).plates[0][0]
        'series'
    """

    times: np.ndarray
    event_dim: int
    plates: tuple[tuple[str, int, int], ...]


def strip_treatments(
    model: Callable[..., Any],
) -> tuple[Callable[..., Any], AbstractFilter | None]:
    """The model without `marginalize` and `reparam` around it, and the filter of the former.

    Draws hold the values that a reparametrised site had, so the plain model can be run on them.

    Example:
        >>> import numpyro_sde as nsde
        >>> model = lambda: None
        >>> inner, method = strip_treatments(
        ...     nsde.handlers.marginalize(model, method=nsde.filters.Kalman()))
        >>> inner is model, type(method).__name__
        (True, 'Kalman')
    """
    method = None
    while isinstance(model, marginalize | handlers.reparam) and model.fn is not None:
        if isinstance(model, marginalize):
            method = method or model.method
        model = model.fn
    return model, method


class _Places(Messenger):
    """Notes every path site."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, PathPlace] = {}

    def postprocess_message(self, msg: Any) -> None:
        if msg["type"] != "sample" or not isinstance(unwrap(msg["fn"]), AbstractPathLaw):
            return
        times = law_times(msg["fn"])
        if times is not None:
            plates = tuple((f.name, f.dim, f.size) for f in msg["cond_indep_stack"])
            self.found[msg["name"]] = PathPlace(times, unwrap(msg["fn"]).event_dim, plates)


def find_paths(
    model: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, PathPlace]:
    """The paths of a model by site; nothing is computed.

    A model that cannot run without its treatments (data that only they take) has none.

    Example:
        >>> import numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model():
        ...     sde = nsde.SDE(lambda t, x: -x, lambda t, x: 1.0)
        ...     with numpyro.plate("series", 2):
        ...         numpyro.sample("x", nsde.SDEPath(sde, [0.0, 1.0], dist.Normal(0.0, 1.0)))
        >>> place = find_paths(model, (), {})["x"]
        >>> place.times.tolist(), place.plates
        ([0.0, 1.0], (('series', -1, 2),))
    """
    if model is None:
        return {}
    (plain, _), places = strip_treatments(model), _Places()

    def run() -> int:
        with handlers.block(), handlers.seed(rng_seed=0), places:
            plain(*args, **kwargs)
        return 0

    jax.eval_shape(run)
    return places.found
