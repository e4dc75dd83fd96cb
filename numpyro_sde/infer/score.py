"""The score of a model with latent paths: the gradient of its log likelihood, by smoothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PRNGKeyArray
from numpyro.handlers import seed, substitute, trace

from numpyro_sde.distributions.observation import EmissionPath
from numpyro_sde.distributions.state_space import ObservedPath, draw_starts, with_starts
from numpyro_sde.filters.particle import Particle
from numpyro_sde.models.reading import NO_PATH, read_model, refuse_weighted
from numpyro_sde.models.stack import outside_all_handlers, peel
from numpyro_sde.models.survey import survey
from numpyro_sde.runtime.entry import entry_point
from numpyro_sde.statespace.checks import check_count
from numpyro_sde.statespace.model import StateSpaceModel


class Score(NamedTuple):
    """What `score` returns, by site.

    Attributes:
        mean: gradient of the log likelihood by the site's value.
        standard_error: its Monte Carlo error, from the spread of independent filters.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.infer.Score(mean={"rate": -0.2}, standard_error={"rate": 0.1}).mean["rate"]
        -0.2
    """

    mean: dict[str, Array]
    standard_error: dict[str, Array]


def score(
    model: Callable[..., Any],
    params: Mapping[str, ArrayLike],
    *model_args: Any,
    rng_key: PRNGKeyArray,
    method: Particle | None = None,
    num_draws: int = 400,
    num_filters: int = 10,
    **model_kwargs: Any,
) -> Score:
    """Gradient of the log likelihood of parameters, its paths integrated out by particles.

    By Fisher's identity it is the expected gradient of the log density of path and data, over the
    path's law given the data (Poyiadjis, Doucet and Singh 2011): paths are drawn by a particle
    smoother, and nothing is differentiated through resampling.

    Args:
        model: the model, its path sites as they are.
        params: values of all other latent sites, on their own (constrained) scale.
        *model_args: arguments of the model, the data included.
        rng_key: random key.
        method: the particle filter; None for 500 guided particles.
        num_draws: number of paths, a multiple of `num_filters`.
        num_filters: independent filters that they are drawn from, at least 2.
        **model_kwargs: keyword arguments of the model.

    Returns:
        Mean and standard error for each site of `params`.

    Raises:
        ValueError: no latent path, or a transition without density.
        TypeError: a method that is no particle filter, or a count that is no integer.

    Example:
        >>> import jax, numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model(y=None):
        ...     scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
        ...     sde = nsde.SDE(lambda t, x, p: -x, lambda t, x, p: p, params=scale)
        ...     x = numpyro.sample("x", nsde.SDEPath(sde, np.arange(4.0), dist.Normal(0.0, 1.0)))
        ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.5), obs=y)
        >>> y = np.array([0.5, -0.2, 0.1, 0.4])
        >>> got = nsde.infer.score(model, {"scale": 2.0}, y, rng_key=jax.random.key(0))
        >>> bool(got.mean["scale"] < 0)  # these data vary less
        True
    """
    method = Particle(500) if method is None else method
    if not isinstance(method, Particle):
        raise TypeError(f"method must be a filters.Particle, got {method!r}")
    check_count("num_filters", num_filters, least=2)
    check_count("num_draws", num_draws, least=num_filters)
    if num_draws % num_filters:
        raise ValueError(f"num_draws must be a multiple of {num_filters} filters, got {num_draws}")
    values = {name: jnp.asarray(value, jnp.result_type(float)) for name, value in params.items()}

    treated = _given(model, values)
    survey(treated, model_args, model_kwargs).refuse_other_uses()
    reading = read_model(treated, model_args, model_kwargs)
    if not reading.paths:
        raise ValueError(NO_PATH)
    for name, site in reading.paths.items():
        refuse_weighted(site, name, "score")
    keys = jax.random.split(rng_key, num_filters)
    each = num_draws // num_filters
    means = _gradients(model, values, model_args, model_kwargs, method, keys, each)
    return Score(
        jax.tree.map(lambda g: jnp.mean(g, axis=0), means),
        jax.tree.map(lambda g: jnp.std(g, axis=0, ddof=1) / np.sqrt(num_filters), means),
    )


def _given(model: Callable[..., Any], values: Mapping[str, Array]) -> Callable[..., Any]:
    return substitute(seed(model, 0), data=dict(values))


@entry_point
def _gradients(
    model: Any,
    values: dict[str, Array],
    args: Any,
    kwargs: Any,
    method: Particle,
    keys: Any,
    each: int,
) -> dict[str, Array]:
    """Mean gradient over the paths that each of several filters draws, `(num_filters, ...)`.

    Compiled once for a model and the shapes of its arguments: an ascent calls it at every step.
    """
    names = tuple(read_model(_given(model, values), args, kwargs).paths)

    def draw(key: PRNGKeyArray) -> dict[str, Array]:
        observed = read_model(_given(model, values), args, kwargs).observed
        own = jax.random.split(key, len(names))
        return {n: _draw(observed[n], method, k, each) for n, k in zip(names, own, strict=True)}

    def density(values: Any, drawn: dict[str, Array]) -> Array:
        with outside_all_handlers(), trace() as sites:
            substitute(_given(model, values), data=drawn)(*args, **kwargs)
        total = jnp.zeros(())
        for name, site in sites.items():
            law, _ = peel(site["fn"]) if site["type"] == "sample" else (None, None)
            if name in names or (isinstance(law, EmissionPath) and site["is_observed"]):
                scale = 1.0 if site["scale"] is None else site["scale"]
                total = total + jnp.sum(scale * site["fn"].log_prob(site["value"]))
        return total

    def gradient(key: PRNGKeyArray) -> Any:
        terms = jax.lax.map(lambda d: jax.grad(density)(values, d), draw(key), batch_size=50)
        return jax.tree.map(lambda g: jnp.mean(g, axis=0), terms)

    return jax.lax.map(gradient, keys)


def _draw(observed: ObservedPath, method: Particle, key: PRNGKeyArray, num_draws: int) -> Array:
    """Paths from the smoothing law, `(draws, *lead, T, *state)`."""
    path, lead = observed.path, observed.lead
    start_key, filter_key, draw_key = jax.random.split(key, 3)
    method = method.for_smoothing()
    starts = draw_starts(path, lead, method.num_particles, start_key)
    keys = [jax.random.split(k, lead) for k in (filter_key, draw_key)]

    def one(model: StateSpaceModel, first: Any, second: Any, *starts: Array) -> Array:
        model = with_starts(model, *starts)
        chosen = method.with_key(first)
        chosen.check(model)
        paths = chosen.filter(model).sample(second, num_draws)
        return model.visible(paths)

    key_dim = keys[0].ndim - len(lead)
    dims = (key_dim, key_dim, *(1 + len(path.state_shape) for _ in starts))
    return jnp.moveaxis(observed.map(one, (*keys, *starts), dims), len(lead), 0)
