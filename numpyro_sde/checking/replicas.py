"""The same model with other data, and a model of two data sets that share their parameters.

Posterior simulation-based calibration draws parameters from the posterior, new data from the model
at them, and asks for the posterior given both data sets (Sailynoja, Schmitt, Buerkner and Vehtari
2025, arXiv:2502.03279). The joint density of two data sets whose paths are independent given the
parameters is the product of two runs of the model, the prior counted once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from numpyro import handlers
from numpyro.primitives import Messenger

from numpyro_sde.diagnostics.compare.sites import is_latent, is_observation, unwrap
from numpyro_sde.distributions.path_law import AbstractPathLaw
from numpyro_sde.models.survey import survey

AGAIN = "again"  # prefix of the sites of the second data set


class Anatomy(NamedTuple):
    """What the sites of a model are.

    Attributes:
        parameters: Latent sites that are no paths.
        paths: Sites of paths, latent or observed.
        data: Observation sites.
        observed: Their values.
        trouble: Why new data cannot be drawn from it; empty if they can.
        laws: The laws of the paths in one run, by site.
        data_laws: Those of the data.
    """

    parameters: tuple[str, ...]
    paths: tuple[str, ...]
    data: tuple[str, ...]
    observed: dict[str, Array]
    trouble: str
    laws: dict[str, AbstractPathLaw]
    data_laws: dict[str, Any]


def anatomy(model: Callable[..., Any], args: Any, kwargs: Any) -> Anatomy:
    """Look at a model in one run of it.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> def model(y):
        ...     a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(a, 1.0), obs=y)
        >>> anatomy(model, (0.5,), {})[:3]
        (('a',), (), ('y',))
    """
    with handlers.block():
        trace = handlers.trace(handlers.seed(model, 0)).get_trace(*args, **kwargs)
    laws = {
        name: unwrap(site["fn"])
        for name, site in trace.items()
        if site["type"] == "sample" and isinstance(unwrap(site["fn"]), AbstractPathLaw)
    }
    data = tuple(name for name, site in trace.items() if is_observation(site))
    parameters = tuple(n for n, site in trace.items() if is_latent(site) and n not in laws)
    bare = [n for n, s in trace.items() if _is_factor(s)]
    trouble = ""
    if bare:
        trouble = f"the model has the bare factor {bare[0]!r}, so it does not draw its data"
    elif not data:
        trouble = "the model observes nothing"
    else:
        uses = survey(model, args, kwargs).densities
        depend = [site for sites in uses.values() for site in sites if site in parameters]
        if depend:
            trouble = (
                f"sites {depend} depend on a path, so they are no parameters of both data sets"
            )
    observed = {name: jnp.asarray(trace[name]["value"]) for name in data}
    data_laws = {name: unwrap(trace[name]["fn"]) for name in data}
    return Anatomy(parameters, tuple(laws), data, observed, trouble, laws, data_laws)


def _is_factor(site: Mapping[str, Any]) -> bool:
    return (
        site["type"] == "sample"
        and bool(site["is_observed"])
        and type(unwrap(site["fn"])).__name__ == "Unit"
    )


class with_data(Messenger):  # noqa: N801
    """The model with other values at its observation sites.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> def model():
        ...     return numpyro.sample("y", dist.Normal(0.0, 1.0), obs=0.5)
        >>> with_data(model, {"y": 2.0})()
        2.0
    """

    def __init__(self, fn: Callable[..., Any], data: Mapping[str, Any]) -> None:
        self.data = dict(data)
        super().__init__(fn)

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and msg["is_observed"] and msg["name"] in self.data:
            msg["value"] = self.data[msg["name"]]


def simulator(
    model: Callable[..., Any], args: Any, kwargs: Any, found: Anatomy
) -> Callable[[Mapping[str, Any], PRNGKeyArray], dict[str, Array]]:
    """A compiled function of parameter values and a key that draws new data, paths anew.

    What was missing in the data is missing in these.
    """
    missing = {
        name: np.isnan(np.asarray(value))
        for name, value in found.observed.items()
        if jnp.issubdtype(value.dtype, jnp.floating) and np.isnan(np.asarray(value)).any()
    }

    def run(values: Mapping[str, Any], key: PRNGKeyArray) -> dict[str, Array]:
        drawing = handlers.uncondition(handlers.seed(model, key))
        fixed = handlers.substitute(drawing, data=dict(values))
        with handlers.block():
            trace = handlers.trace(fixed).get_trace(*args, **kwargs)
        drawn = {}
        for name in found.data:
            value = jnp.asarray(trace[name]["value"])
            gaps = missing.get(name)
            drawn[name] = value if gaps is None else jnp.where(gaps, jnp.nan, value)
        return drawn

    return jax.jit(run)


def doubled(
    model: Callable[..., Any],
    treat: Callable[[Callable[..., Any]], Callable[..., Any]],
    args: Any,
    kwargs: Any,
    parameters: tuple[str, ...],
) -> Callable[[Mapping[str, Any]], None]:
    """The model of the data and of a second data set, its argument, with the same parameters.

    The sites of the second carry the prefix `again/`; its paths are its own.

    Args:
        model: The plain model.
        treat: What treats its paths.
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.
        parameters: Sites that both share.
    """
    first = treat(model)

    def both(data: Mapping[str, Any]) -> None:
        with handlers.trace() as trace:
            first(*args, **kwargs)
        values = {f"{AGAIN}/{name}": trace[name]["value"] for name in parameters}
        named = handlers.scope(with_data(model, data), prefix=AGAIN, hide_types=["plate", "param"])
        second = handlers.substitute(treat(named), data=values)
        handlers.block(second, hide=list(values))(*args, **kwargs)

    return both
