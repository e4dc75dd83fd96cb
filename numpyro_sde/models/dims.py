"""Names of dimensions, where ArviZ looks for them: `infer={"event_dims": ...}` of each site.

`arviz.from_numpyro` traces the model and reads the names of plates and of event dimensions off
its sites. A path is stated by `numpyro.sample` itself, which leaves no room for them; the statement
that observes it finds its site in whatever trace is being recorded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Array
from numpyro.handlers import trace
from numpyro.primitives import _PYRO_STACK

from numpyro_sde.distributions.clocks import identity_of_path
from numpyro_sde.models.stack import plates_here


def name_path(x: Array, state_dim: int) -> None:
    """Name the dimensions of a path's site in the traces being recorded.

    Args:
        x: the path, or what shows some of its times.
        state_dim: dimensions of one state.
    """
    shown = identity_of_path(x)
    for sites in _traces():
        for name, site in sites.items():
            if site["type"] not in ("sample", "deterministic") or id(site["value"]) != shown:
                continue
            shape = np.shape(site["value"])[np.ndim(site["value"]) - 1 - state_dim :]
            plates = np.ndim(site["value"]) - len(shape)
            infer = site.setdefault("infer", {})
            if "event_dims" in infer or len(site.get("cond_indep_stack") or ()) != plates:
                continue
            used = _used(sites)
            names = [_free("time", name, shape[0], used)]
            names += [_free("state", name, size, used) for size in shape[1:]]
            site["infer"] = {**infer, "event_dims": names}


def dims_of_data(name: str, shape: tuple[int, ...], num_times: int, plates: int) -> dict[str, Any]:
    """What a statement's site tells of its dimensions, `infer` of `numpyro.sample`.

    Args:
        name: the site.
        shape: its event shape, time first.
        num_times: number of times of the path; `time` names them where all are observed.
        plates: number of its batch dimensions; where plates do not name them all, nothing is named.
    """
    if len(plates_here()) != plates:
        return {}
    used: dict[str, int] = {}
    for sites in _traces():
        used |= _used(sites)
    own = f"time_{name}"
    time = own if shape[0] != num_times else _free("time", name, shape[0], used)
    rest = [f"{name}_dim_{k}" for k in range(len(shape) - 1)]
    return {"event_dims": [time, *rest]}


def _traces() -> list[dict[str, Any]]:
    return [handler.trace for handler in _PYRO_STACK if isinstance(handler, trace)]


def _used(sites: dict[str, Any]) -> dict[str, int]:
    """Sizes of the dimensions that are named already."""
    found: dict[str, int] = {}
    for site in sites.values():
        names = (site.get("infer") or {}).get("event_dims", ())
        shape = np.shape(site.get("value"))
        found |= dict(zip(names, shape[len(shape) - len(names) :], strict=False))
    return found


def _free(base: str, site: str, size: int, used: dict[str, int]) -> str:
    """A name for a dimension: the common one, unless another size has it."""
    return base if used.get(base, size) == size else f"{base}_{site}"
