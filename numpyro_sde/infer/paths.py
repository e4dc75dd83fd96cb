"""Paths of a model and their data, as kernels that update them need them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from numpyro.handlers import seed, substitute, trace

from numpyro_sde.distributions.observation import EmissionPath
from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.distributions.state_space import Statement
from numpyro_sde.handlers import path_law
from numpyro_sde.reparam.lookahead import Recorder, outside_all_handlers
from numpyro_sde.reparam.path import peel
from numpyro_sde.schemes.dependence import reaches_output


class ObservedPath(NamedTuple):
    """A latent path of a model in one run of it.

    Attributes:
        path: its law.
        lead: batch shape around it, plates included.
        data: observation statements on it, with their data.
    """

    path: SDEPath
    lead: tuple[int, ...]
    data: list[tuple[Statement, Array]]


def path_sites(model_trace: Any) -> tuple[str, ...]:
    """Names of the latent path sites in a trace.

    Raises:
        ValueError: there is none.
    """
    names = tuple(
        name
        for name, site in model_trace.items()
        if site["type"] == "sample" and not site["is_observed"] and path_law(site["fn"]) is not None
    )
    if not names:
        raise ValueError(
            "the model has no latent SDEPath site. Hand over the model itself: without "
            "handlers.marginalize and without reparametrisation of the path"
        )
    return names


def run_with(
    model: Callable[..., Any],
    args: Any,
    kwargs: Any,
    name: str,
    values: Mapping[str, Array],
) -> ObservedPath:
    """Run a model with given path values and note one path's law and data."""
    recorder = Recorder(name, values[name])
    with (
        outside_all_handlers(),
        trace(),
        seed(rng_seed=0),
        substitute(data={k: v for k, v in values.items() if k != name}),
        recorder,
    ):
        model(*args, **kwargs)
    path, _ = peel(recorder.fn)
    shape = recorder.fn.shape()
    return ObservedPath(path, shape[: len(shape) - path.event_dim], recorder.data)


def refuse_other_uses(
    model: Callable[..., Any], args: Any, kwargs: Any, names: tuple[str, ...], values: Any
) -> None:
    """Raise where a path enters the density elsewhere than in its law and in `observe`.

    Raises:
        ValueError: naming the path and the sites.
    """
    found: dict[str, list[str]] = {}

    for name in names:
        sites: list[str] = []

        def others(x: Array, name: str = name, sites: list[str] = sites) -> list[Array]:
            with (
                outside_all_handlers(),
                trace() as recorded,
                seed(rng_seed=0),
                substitute(data={**values, name: x}),
            ):
                model(*args, **kwargs)
            sites.clear()
            terms = []
            for other, site in recorded.items():
                if site["type"] != "sample" or other == name:
                    continue
                law, _ = peel(site["fn"])
                if isinstance(law, EmissionPath) and site["is_observed"]:
                    continue
                sites.append(other)
                terms.append(jnp.sum(site["fn"].log_prob(site["value"])))
            return terms

        jaxpr = jax.make_jaxpr(others)(values[name]).jaxpr
        for i, other in enumerate(sites):
            if reaches_output(jaxpr, 0, i):
                found.setdefault(name, []).append(other)
    if found:
        text = "; ".join(f"{name!r} in {sites}" for name, sites in found.items())
        raise ValueError(
            f"conditional SMC sees a path's law and its observe statements only, but the density "
            f"of other sites uses it: {text}. State them with nsde.observe, or sample the path "
            "with reparam.GuidedReparam and NUTS"
        )
