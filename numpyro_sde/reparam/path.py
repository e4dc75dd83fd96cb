"""The whitened path, and whitened bridges between states that are known.

Auxiliary sites are `{name}_init` (the first state, unless it is fixed or known) and
`{name}_innov` (standard normal innovations); the path becomes a deterministic site.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike
from numpyro.infer.reparam import Reparam

from numpyro_sde.distributions.clocks import remember_value
from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.distributions.path_law import AbstractPathLaw
from numpyro_sde.models.stack import conditions_on, explicit_scale, intervenes_on, peel
from numpyro_sde.reparam.bridge import bridge_path, plan_bridge

# What the factor of a guided path, and of a whitened bridge, adds to the path's name.
_HELD = ("_guide", "_bridge")


def pinned_innovations(sites: Iterable[str]) -> frozenset[str]:
    """Of a model's sites, innovations of paths that a guide or a bridge holds to their data.

    Given the data these are nearly what they are a priori, standard normal; those of a path that is
    whitened alone are not.
    """
    sites = frozenset(sites)
    held = [name.removesuffix(end) for end in _HELD for name in sites if name.endswith(end)]
    return sites & {f"{name}{end}" for name in held for end in ("_init_innov", "_innov")}


class Unwrapped(NamedTuple):
    """The path law of a site, the batch shape around it, plates included, and its mask."""

    path: SDEPath
    lead: tuple[int, ...]
    mask: Any


def is_innovation(name: str) -> bool:
    """Whether a site is one of standard normal innovations that a reparametrisation made."""
    return name.endswith("_innov")


def unwrap(name: str, fn: Any, reparam: Reparam) -> Unwrapped:
    """Find the path law of a site, or raise a `TypeError` that names it."""
    shape = fn.shape()
    fn, mask = peel(fn)
    if not isinstance(fn, SDEPath):
        if isinstance(fn, AbstractPathLaw):
            fn.scheme.require_smooth(type(reparam).__name__)
        raise TypeError(
            f"{type(reparam).__name__} is for SDEPath sites, but site {name!r} is a "
            f"{type(fn).__name__}"
        )
    return Unwrapped(fn, shape[: len(shape) - fn.event_dim], mask)


def leave_alone(name: str, obs: Any, reparam: Reparam) -> bool:
    """Whether a path is not to be treated: the model does not see it, by a `do` handler outside.

    Raises:
        ValueError: the path has a value, here or by an outer `condition`; or it stands inside
            `handlers.scale`, whose power of a density no change of variables keeps.
    """
    if obs is not None or conditions_on(name):
        raise ValueError(
            f"site {name!r} is conditioned on, but {type(reparam).__name__} replaces it by "
            f"{name}_innov: condition the model without the reparametrisation, or use "
            "BridgeReparam for a path that is known at some times"
        )
    if explicit_scale():
        raise ValueError(
            f"site {name!r} stands inside handlers.scale, but {type(reparam).__name__} replaces it "
            "by innovations, and the power of their density is not that of the path's: scale the "
            "observe statements alone, or leave the path as it is"
        )
    return intervenes_on(name)


def latent(name: str, law: dist.Distribution, unwrapped: Unwrapped, shape: Any = None) -> Array:
    """Sample an auxiliary site of the path, of standard normals where a shape is given."""
    if shape is not None:
        law = dist.Normal(0.0, 1.0).expand(unwrapped.lead + shape).to_event(len(shape))
    else:
        law = law.expand(unwrapped.lead)
    if unwrapped.mask is not True:
        law = law.mask(unwrapped.mask)
    return jnp.asarray(numpyro.sample(name, law))


class InnovationReparam(Reparam):
    """The path as a map of standard normal innovations (a whitened, non-centred path).

    Latent sites are `{name}_init` of the law `init` (none where the start is fixed) and
    `{name}_innov` of shape `(T - 1, m)`, `(T - 1,)` for a scalar process; the prior no longer
    couples the path to the parameters. Use it where the data say little about the path; where
    they are precise, the innovations become strongly dependent in the posterior (compare
    Papaspiliopoulos, Roberts and Skold 2007). Conditioning on the path raises.

    Raises:
        TypeError: the site is no `SDEPath`, or its scheme is no map of Gaussian innovations.
        ValueError: the path is observed or conditioned on.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model():
        ...     sde = nsde.SDE(lambda t, x: -x, lambda t, x: 0.5)
        ...     numpyro.sample("x", nsde.SDEPath(sde, [0.0, 0.1, 0.2], dist.Normal(0.0, 1.0)))
        >>> white = numpyro.handlers.reparam(
        ...     model, config={"x": nsde.reparam.InnovationReparam()}
        ... )
        >>> sites = numpyro.handlers.trace(numpyro.handlers.seed(white, 0)).get_trace()
        >>> [name for name in sites]
        ['x_init', 'x_innov', 'x']
    """

    def __call__(self, name: str, fn: Any, obs: Any) -> tuple[Any, Any]:
        if leave_alone(name, obs, self):
            return fn, obs
        unwrapped = unwrap(name, fn, self)
        path = unwrapped.path
        path.scheme.require_smooth("InnovationReparam")
        start = path.fixed_start
        if start is None:
            start = latent(f"{name}_init", path.init, unwrapped)
        z = latent(f"{name}_innov", path.init, unwrapped, path.innovation_shape)
        value = path.forward(start, z)
        remember_value(value, path.clock, mask=unwrapped.mask)
        return None, value


class BridgeReparam(Reparam):
    """The path as whitened bridges between states known exactly at some times.

    For a diffusion observed without noise at times far apart: the states between, on a finer
    grid, are latent. Their innovations `{name}_innov` are those of the modified diffusion
    bridge (Durham and Gallant 2002), and the factor `{name}_bridge` carries the ratio of the
    true path density to the bridge's, so the posterior is that of the discretised model,
    exactly. Parameters of the diffusion mix well, which they cannot with the path itself
    (Roberts and Stramer 2001). A prior draw of such a model is a bridge, not a path of the
    prior: simulate with the model itself.

    Args:
        points: the known states, shape `(*batch, K, *state)`; without `at`, `K = T` and NaN
            marks times at which the state is not known.
        at: indices into the path of the K known states (a grid's `.index`), increasing.

    Raises:
        ValueError: points that do not fit the path, a transition without density, or a path
            that is observed or conditioned on.
        TypeError: the site is no `SDEPath`.

    Example:
        >>> import jax, numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> data = np.array([1.0, 0.4, 0.7])
        >>> grid = nsde.TimeGrid([0.0, 1.0, 2.0], max_step=0.25)
        >>> def model():
        ...     scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     sde = nsde.SDE(lambda t, x, p: -x, lambda t, x, p: p, params=scale)
        ...     return numpyro.sample("x", nsde.SDEPath(sde, grid, dist.Normal(0.0, 1.0)))
        >>> bridge = nsde.reparam.BridgeReparam(data, at=grid.index)
        >>> bridged = numpyro.handlers.reparam(model, config={"x": bridge})
        >>> path = numpyro.handlers.seed(bridged, jax.random.key(0))()
        >>> [round(float(x), 4) for x in path[grid.index]]
        [1.0, 0.4, 0.7]
    """

    def __init__(self, points: ArrayLike, at: ArrayLike | None = None) -> None:
        self.points = points if isinstance(points, jax.core.Tracer) else np.asarray(points)
        self.at = None if at is None else np.asarray(at)
        if self.at is None and isinstance(points, jax.core.Tracer):
            raise ValueError("BridgeReparam: traced points need at=, the times they stand at")
        if self.at is not None and (
            self.at.ndim != 1
            or self.at.dtype.kind not in "iu"
            or self.at.size == 0
            or np.any(np.diff(self.at) <= 0)
            or self.at[0] < 0
        ):
            raise ValueError(f"BridgeReparam: at must be increasing indices >= 0, got {at!r}")

    def _place(self, name: str, path: SDEPath) -> tuple[Any, np.ndarray]:
        points, state_dim = self.points, len(path.state_shape)
        axis = np.ndim(points) - 1 - state_dim
        if axis < 0 or np.shape(points)[axis + 1 :] != path.state_shape:
            raise ValueError(
                f"BridgeReparam: points of site {name!r} must have shape (*batch, K) + "
                f"{path.state_shape}, got {np.shape(points)}"
            )
        count = np.shape(points)[axis]
        if self.at is not None:
            if count != self.at.size or self.at[-1] >= path.num_times:
                raise ValueError(
                    f"BridgeReparam: {count} points at {self.at.size} indices up to "
                    f"{self.at[-1]} do not fit site {name!r} of {path.num_times} times"
                )
            return points, self.at
        if count != path.num_times:
            raise ValueError(
                f"BridgeReparam: without at=, points must have one entry for each of the "
                f"{path.num_times} times of site {name!r}, got {count}"
            )
        others = tuple(i for i in range(np.ndim(points)) if i != axis)
        missing = np.isnan(np.asarray(points, dtype=float))
        some, everything = missing.any(axis=others), missing.all(axis=others)
        if np.any(some & ~everything):
            raise ValueError(
                f"BridgeReparam: points of site {name!r} are known in part at index "
                f"{int(np.flatnonzero(some & ~everything)[0])}: all components of all series "
                "must be known at the same times"
            )
        index = np.flatnonzero(~some)
        if index.size == 0:
            raise ValueError(f"BridgeReparam: no point of site {name!r} is known (all NaN)")
        return np.take(np.asarray(points), index, axis=axis), index

    def __call__(self, name: str, fn: Any, obs: Any) -> tuple[Any, Any]:
        if leave_alone(name, obs, self):
            return fn, obs
        unwrapped = unwrap(name, fn, self)
        path = unwrapped.path
        _check_bridgeable(name, path)
        points, index = self._place(name, path)
        plan = plan_bridge(path.num_times, index)
        state_dim = len(path.state_shape)
        points = jnp.asarray(points, jnp.result_type(float))
        points = jnp.broadcast_to(
            points, unwrapped.lead + points.shape[points.ndim - 1 - state_dim :]
        )
        log_weight = jnp.zeros(unwrapped.lead)
        start = path.fixed_start
        if index[0] == 0:
            start = jnp.take(points, 0, axis=len(unwrapped.lead))
            log_weight = path.init.expand(unwrapped.lead).log_prob(start)
        elif start is None:
            start = latent(f"{name}_init", path.init, unwrapped)
        free = (plan.free.size, *path.state_shape)
        z = latent(f"{name}_innov", path.init, unwrapped, free)
        value, ratio = path._map(
            lambda *args: bridge_path(plan, *args),
            unwrapped.lead,
            (start, z, points),
            (state_dim, 1 + state_dim, 1 + state_dim),
        )
        with numpyro.handlers.mask(mask=unwrapped.mask):
            numpyro.factor(f"{name}_bridge", log_weight + ratio)
        remember_value(value, path.clock, mask=unwrapped.mask)
        return None, value


def _check_bridgeable(name: str, path: SDEPath) -> None:
    path.scheme.require_smooth(f"BridgeReparam: site {name!r}")
    if path.scheme.has_memory:
        raise ValueError(
            f"BridgeReparam: site {name!r} has noise {type(path.sde.noise).__name__}, which "
            "remembers: its bridges need all known states. Use GuidedReparam with precise "
            "observations, or the exact bridges of distributions.FractionalBrownianMotion"
        )
    if path.events:
        raise ValueError(
            f"BridgeReparam: site {name!r} has events, and a bridge between two known states would "
            "miss those in between: use GuidedReparam with precise observations"
        )
    width = path.structure.innovation_shape
    if not path.scheme.has_density or width != path.state_shape:
        raise ValueError(
            f"BridgeReparam: site {name!r} has {width} noises for states of shape "
            f"{path.state_shape} under {type(path.scheme).__name__}; a bridge needs as many "
            "noises as states and a scheme with a transition density"
        )
