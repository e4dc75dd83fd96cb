"""Where NUTS on a guided path should start, and in which metric."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_sde.infer.start import approximate_mode
from numpyro_sde.reparam.path import is_innovation


def guided_metric(model: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Options of NUTS for a model with `GuidedReparam`: a start and a metric that need no warm-up.

    The innovations of a well-guided path are nearly standard normal, so their metric is known:
    one. A diagonal metric estimated from a few hundred draws of thousands of innovations is that
    plus noise, which costs more the finer the grid. The parameters get a dense metric, the
    curvature at the mode of the model with its paths integrated out by an extended Kalman filter,
    and start there, the innovations at zero. The metric is not adapted; the step size is.

    Where the guide fits badly (`diagnostics.guide_quality`), leave the metric to the warm-up; so
    too where data bear on the variance of what is seen alone (a volatility given returns), of
    which the extended filter learns nothing. `SplitNUTS` adapts the parameters' metric alone, and
    gains little but a shorter warm-up.

    Args:
        model: the model itself, its paths neither reparametrised nor integrated out.
        *args: its arguments, data included.
        **kwargs: its keyword arguments.

    Returns:
        Keyword arguments for `numpyro.infer.NUTS`: `inverse_mass_matrix`, `dense_mass`,
        `adapt_mass_matrix` and `init_strategy`.

    Raises:
        ValueError: the model observes no latent path, or has no parameters besides its paths.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> from numpyro.infer import MCMC, NUTS
        >>> def model(y):
        ...     rate = numpyro.sample("rate", dist.LogNormal(0.0, 0.5))
        ...     sde = nsde.SDE(lambda t, x, p: -p * x, lambda t, x, p: 0.5, params=rate)
        ...     x = numpyro.sample("x", nsde.SDEPath(sde, [0.0, 0.5, 1.0], dist.Normal(0.0, 1.0)))
        ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.1), obs=y)
        >>> y = jax.numpy.array([0.8, 0.5, 0.2])
        >>> options = nsde.infer.guided_metric(model, y)
        >>> guided = numpyro.handlers.reparam(model, config={"x": nsde.reparam.GuidedReparam()})
        >>> mcmc = MCMC(NUTS(guided, **options), num_warmup=50, num_samples=50, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), y)
        >>> options["dense_mass"], options["adapt_mass_matrix"]
        ([('rate',)], False)
    """
    start, constrain = approximate_mode(model, args, kwargs, jax.random.key(0))
    if not start.z:
        raise ValueError(
            "guided_metric: the model has no parameters besides its paths; NUTS starts with a unit "
            "metric then: give it adapt_mass_matrix=False"
        )
    names = tuple(sorted(start.z))
    values = constrain(*args, **kwargs)(start.z)
    return {
        "inverse_mass_matrix": {names: start.factor @ start.factor.T},
        "dense_mass": [names],
        "adapt_mass_matrix": False,
        "init_strategy": partial(_at, values={name: values[name] for name in names}),
    }


def _at(site: Any = None, values: Any = None) -> Any:
    """The given values, and zero for innovations; a strategy of NumPyro's kind."""
    if site is None:
        return partial(_at, values=values)
    if site["type"] != "sample" or site["is_observed"]:
        return None
    if is_innovation(site["name"]):
        return jnp.zeros(site["fn"].shape())
    return values.get(site["name"])
