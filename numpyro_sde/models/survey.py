"""Who uses the paths of a model, found by one trace of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_sde.distributions.clocks import identity_of_path
from numpyro_sde.models.reading import (
    MARK,
    parameters,
    refuse_parameters,
    refuse_several,
    run_aside,
)
from numpyro_sde.schemes.dependence import reachable


class Survey(NamedTuple):
    """Who uses the latent paths of a model.

    Attributes:
        observed: for each statement, with data or without, the path that it observes.
        densities: for each path, other sites whose density uses it.
        values: for each path, deterministic sites that are made of it.
        transformed: for each path that the model computes with before it observes it, the
            statements on what it makes of it.
        returned: for each such path, which leaves of what the model returns are made of it.
    """

    observed: dict[str, str]
    densities: dict[str, list[str]]
    values: dict[str, list[str]]
    transformed: dict[str, set[str]]
    returned: dict[str, list[bool]]

    def refuse_other_uses(self) -> None:
        """Raise where the density of a site other than an observation uses a path.

        Raises:
            ValueError: naming the paths and the sites.
        """
        if self.densities:
            text = "; ".join(f"{name!r} in {sites}" for name, sites in self.densities.items())
            raise ValueError(
                "an engine that treats a path by its states sees the path's law and its observe "
                f"statements only, but the density of other sites uses it: {text}. State them with "
                "nsde.observe, or sample the path with reparam.GuidedReparam and NUTS"
            )


def survey(model: Callable[..., Any], args: Any, kwargs: Any) -> Survey:
    """Find who uses the paths of a model, by one trace of it; nothing is computed.

    Raises:
        ValueError: a statement made of several paths, or parameters of one that depend on a path.
    """
    labels: list[tuple[str, str]] = []
    direct: set[str] = set()

    def outputs() -> list[Any]:
        reader = run_aside(model, args, kwargs, {}, {}, marked=True)
        own = {id(site.value) for site in reader.paths.values()}
        found: list[Any] = []
        leaves = jax.tree_util.tree_leaves(reader.returned)
        labels.extend(("return", "") for _ in leaves)
        found.extend(leaf if isinstance(leaf, jax.Array) else 0.0 for leaf in leaves)
        for name, seen in reader.observations.items():
            if identity_of_path(seen.law.observed_path) in own:
                direct.add(name)
            leaves = parameters(seen)
            labels.extend([("seen", name), *(("emission", name) for _ in leaves)])
            found.extend([seen.law.observed_path, *leaves])
        for name, site in reader.paths.items():
            leaves = [a for a in jax.tree_util.tree_leaves(site.law) if isinstance(a, jax.Array)]
            labels.extend(("density", name) for _ in leaves)
            found.extend(leaves)
        for name, other in reader.others.items():
            if isinstance(other, tuple):
                labels.append(("density", name))
                found.append(jnp.sum(other[0].log_prob(other[1])))
            else:
                leaves = [a for a in jax.tree_util.tree_leaves(other) if isinstance(a, jax.Array)]
                labels.extend(("value", name) for _ in leaves)
                found.extend(leaves)
        return found

    jaxpr = jax.make_jaxpr(outputs)().jaxpr
    paths = {
        eqn.params["name"].removeprefix(MARK): eqn.outvars
        for eqn in jaxpr.eqns
        if str(eqn.params.get("name", "")).startswith(MARK)
    }
    found = Survey({}, {}, {}, {}, {})
    for path, variables in paths.items():
        reached = list(zip(labels, reachable(jaxpr, variables), strict=True))
        for (kind, site), used in reached:
            if not used or kind == "return":
                continue
            if kind == "emission":
                refuse_parameters(site, path)
            if kind == "seen":
                if site in found.observed:
                    refuse_several(site, [found.observed[site], path])
                found.observed[site] = path
                if site not in direct:
                    found.transformed.setdefault(path, set()).add(site)
            else:
                uses = found.densities if kind == "density" else found.values
                if site not in uses.setdefault(path, []):
                    uses[path].append(site)
        if path in found.transformed:
            found.returned[path] = [used for (kind, _), used in reached if kind == "return"]
    return found
