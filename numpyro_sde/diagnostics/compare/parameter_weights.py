"""Importance weights of a guide's parameters alone, the path integrated out.

A guide q(theta) q(x | theta) may have the right parameters and a poor path. Its joint weights
p(theta, x, y) / q(theta, x) then say that it is bad. With several paths x_1, ..., x_M from
q(x | theta) the mean of p(theta, x_m, y) / q(x_m | theta) estimates p(theta, y) without bias, and
over q(theta) it is a weight of the parameters: the more paths, the nearer to the exact one (Andrieu
and Roberts 2009, Annals of Statistics 37, 697-725, on such unbiased estimates in place of a
density).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro import handlers
from numpyro.infer.util import compute_log_probs, log_density

from numpyro_sde.diagnostics.compare.sites import unwrap

NUM_PATHS = 16


class GuideDraw(NamedTuple):
    """One draw of a guide.

    Attributes:
        log_probs: Log density of each of its sites.
        trace: Its trace.
        log_p: Log joint density of the model there.

    Example:
        >>> GuideDraw({"a": 0.0}, {}, -1.5).log_p
        -1.5
    """

    log_probs: Mapping[str, Array]
    trace: Mapping[str, Any]
    log_p: Array


def path_sites_of(guide: Any) -> tuple[str, ...]:
    """Names of the sites that a guide draws given its parameters: its `path_sites()`, if any.

    A guide that draws parameters first and paths given them offers the method (a function may
    carry it as an attribute); running it with the other sites held draws new paths.

    Example:
        >>> def guide(): ...
        >>> guide.path_sites = lambda: ("x",)
        >>> path_sites_of(guide), path_sites_of(len)
        (('x',), ())
    """
    offered = getattr(guide, "path_sites", None)
    return tuple(offered()) if callable(offered) else ()


def parameter_log_weight(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    params: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    drawn: GuideDraw,
    paths: tuple[str, ...],
    rng_key: PRNGKeyArray,
    num_paths: int,
) -> Float[Array, ""]:
    """Log of the estimated p(theta, y) over q(theta) at one draw of a guide.

    Args:
        model: The model.
        guide: The guide.
        params: Values of the parameters of both.
        args: Positional arguments of both.
        kwargs: Keyword arguments of both.
        drawn: A draw of the guide, whose path is the first of the paths.
        paths: The guide's path sites.
        rng_key: For further paths.
        num_paths: Number M of paths in all.

    Raises:
        ValueError: If the guide has no latent site of a name in `paths`, or no other one.
    """
    latent = [name for name, site in drawn.trace.items() if is_drawn(site)]
    others = [name for name in latent if name not in paths]
    if lost := [name for name in paths if name not in latent]:
        raise ValueError(f"the guide's path_sites() names {lost}, but it draws {latent}")
    if not others:
        raise ValueError(f"the guide's path_sites() names all that it draws, {latent}")
    # A Delta follows from the others; comparing values for its density would only hurt.
    held = {
        name: drawn.trace[name]["value"]
        for name in others
        if not isinstance(unwrap(drawn.trace[name]["fn"]), dist.Delta)
    }

    def of_paths(log_probs: Mapping[str, Array]) -> Array:
        return sum((log_probs[name] for name in paths), start=jnp.zeros(()))

    def again(key: PRNGKeyArray) -> Array:
        key_guide, key_model = jax.random.split(key)
        log_probs, trace = compute_log_probs(
            handlers.seed(guide, key_guide), args, dict(kwargs), {**params, **held}
        )
        replayed = handlers.replay(handlers.seed(model, key_model), trace=trace)
        return log_density(replayed, args, dict(kwargs), dict(params))[0] - of_paths(log_probs)

    first = drawn.log_p - of_paths(drawn.log_probs)
    more = jax.lax.map(again, jax.random.split(rng_key, num_paths - 1))
    mean = logsumexp(jnp.append(more, first)) - jnp.log(num_paths)
    log_q = sum((drawn.log_probs[name] for name in others), start=jnp.zeros(()))
    return mean - log_q


def is_drawn(site: Mapping[str, Any]) -> bool:
    """Whether a guide draws a site, auxiliary ones too.

    Example:
        >>> is_drawn({"type": "sample", "is_observed": False, "infer": {"is_auxiliary": True}})
        True
    """
    return site["type"] == "sample" and not site["is_observed"]
