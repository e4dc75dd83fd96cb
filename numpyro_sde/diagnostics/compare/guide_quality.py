"""How well the guide of a guided path fits: importance weights of its draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float, PRNGKeyArray

from numpyro_sde.diagnostics.compare.sites import is_latent, trace_model
from numpyro_sde.diagnostics.compare.statistics import fit_weights
from numpyro_sde.runtime.draws import on_one_device

_POINTS = 5


class GuideQuality(NamedTuple):
    """Importance weights of guided paths, one entry for each parameter draw looked at.

    Attributes:
        khat: Pareto shape of the weights: below 0.5 the guide covers the posterior of the path,
            above 0.7 it does not, and draws by NUTS may miss a part of it as well.
        efficiency: effective share of the guide's draws.
        log_likelihood: log marginal likelihood at the parameters, by importance sampling.

    Example:
        >>> import numpy as np
        >>> from numpyro_sde.diagnostics import GuideQuality
        >>> quality = GuideQuality(np.array([0.2, 0.9]), np.array([0.8, 0.1]), np.zeros(2))
        >>> (quality.khat < 0.7).tolist()  # at which parameters the guide covers the posterior
        [True, False]
    """

    khat: Float[np.ndarray, " points"]
    efficiency: Float[np.ndarray, " points"]
    log_likelihood: Float[np.ndarray, " points"]


def guide_quality(
    model: Callable[..., Any],
    samples: Mapping[str, ArrayLike],
    *model_args: Any,
    rng_key: PRNGKeyArray,
    num_points: int = 5,
    num_draws: int = 1000,
    **model_kwargs: Any,
) -> GuideQuality:
    """Draw paths from the guide at some posterior draws of the parameters, and weigh them.

    The guide is what `GuidedReparam` whitens by: its innovations are standard normal, and the
    weights are the model's density over theirs. Weights of finite variance (a small k-hat)
    mean that the posterior of the innovations is close to standard normal. Paths that are not
    guided are drawn from their prior, so the model's every latent path should be guided.

    Args:
        model: the model with `GuidedReparam` around it.
        samples: posterior draws (`mcmc.get_samples()`); only parameters are used.
        *model_args: arguments of the model, data included.
        rng_key: key of the draws.
        num_points: at how many parameter draws, evenly spaced, to look.
        num_draws: paths drawn at each.
        **model_kwargs: keyword arguments of the model.

    Returns:
        Diagnostics of each parameter draw looked at, arrays of length `num_points`.

    Raises:
        ValueError: a model without a guided path.

    Example:
        >>> import jax, numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model(y):
        ...     scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     sde = nsde.SDE(lambda t, x, p: -x, lambda t, x, p: p, params=scale)
        ...     x = numpyro.sample("x", nsde.SDEPath(sde, np.arange(4.0), dist.Normal(0.0, 1.0)))
        ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)
        >>> guided = numpyro.handlers.reparam(model, config={"x": nsde.reparam.GuidedReparam()})
        >>> draws, y = {"scale": np.array([0.5, 1.0])}, np.array([0.1, 0.3, 0.2, 0.0])
        >>> quality = nsde.diagnostics.guide_quality(
        ...     guided, draws, y, rng_key=jax.random.key(0), num_points=2, num_draws=100)
        >>> bool(np.all(quality.efficiency > 0.99))  # linear and Gaussian: the guide is exact
        True
    """
    sites = trace_model(model, model_args, model_kwargs, {}, jax.random.key(0))
    guided = {name.removesuffix("_guide") for name in sites if name.endswith("_guide")}
    if not guided:
        raise ValueError("guide_quality: the model has no path under GuidedReparam")
    drawn = {f"{name}{suffix}" for name in guided for suffix in ("_innov", "_init_innov", "_init")}
    latent = [name for name, site in sites.items() if is_latent(site) and name not in drawn]
    kept = on_one_device(samples, [name for name in latent if name in samples])
    length = min((len(v) for v in kept.values()), default=1)
    chosen = np.linspace(0, length - 1, num_points).astype(int)

    def log_weight(theta: Any, key: PRNGKeyArray) -> Any:
        # Latent sites come from their own laws, so that data and factors are the whole weight.
        draw = trace_model(model, model_args, model_kwargs, theta, key)
        total = jnp.zeros(())
        for site in draw.values():
            if site["type"] == "sample" and site["is_observed"]:
                scale = 1.0 if site["scale"] is None else site["scale"]
                total = total + jnp.sum(scale * site["fn"].log_prob(site["value"]))
        return total

    def at(theta: Any, key: PRNGKeyArray) -> Any:
        keys = jax.random.split(key, num_draws)
        return jax.lax.map(lambda k: log_weight(theta, k), keys, batch_size=50)

    keys = jax.random.split(rng_key, num_points)
    points = {name: value[chosen] for name, value in kept.items()}
    weights = np.asarray(jax.jit(lambda p, k: jax.lax.map(lambda a: at(*a), (p, k)))(points, keys))
    fits = [fit_weights(w.astype(np.float64)) for w in weights]
    return GuideQuality(
        np.array([f.khat for f in fits]),
        np.array([f.efficiency for f in fits]),
        np.array([f.log_evidence for f in fits]),
    )


def guide_of_chains(
    model: Callable[..., Any],
    args: Any,
    kwargs: Mapping[str, Any],
    posterior: Mapping[str, np.ndarray],
    *,
    rng_key: PRNGKeyArray,
    num_draws: int,
) -> dict[str, float]:
    """Efficiency and k-hat of the guide behind chains, the middle one of some of their draws.

    Args:
        model: the model with `GuidedReparam` around it.
        args: its positional arguments.
        kwargs: its keyword arguments.
        posterior: draws of all sites, `(chain, draw, ...)`.
        rng_key: random key.
        num_draws: paths of the guide at each of the draws.
    """
    samples = {name: v.reshape(-1, *v.shape[2:]) for name, v in posterior.items()}
    quality = guide_quality(
        model, samples, *args, rng_key=rng_key, num_points=_POINTS, num_draws=num_draws, **kwargs
    )
    return {
        "guide_efficiency": float(np.median(np.nan_to_num(quality.efficiency))),
        "guide_khat": float(np.median(quality.khat)),
    }
