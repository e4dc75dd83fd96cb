"""Random effects: parameters that vary between the series of a plate, in one statement."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float

from numpyro_sde.linear.ranks import equal_rank

_LINKS = {"log": jnp.exp, "identity": lambda value: value, "logit": jax.nn.sigmoid}


def random_effects(
    name: str,
    mean: ArrayLike,
    sd: ArrayLike,
    covariates: ArrayLike | None = None,
    coefficients: ArrayLike | None = None,
    *,
    link: str = "log",
    centred: bool = False,
) -> Float[Array, "*batch"]:
    """State a parameter that varies between series.

    `exp(mean + covariates @ coefficients + sd * eta)` with the link "log".

    Call it inside the plate of the series. Non-centred: the sampler sees `eta`, a standard normal
    for each series at the site `{name}_eta`, which works where each series tells little by
    itself; `centred=True` samples the effect on its link scale, at `{name}_effect`, which works
    where each tells much. Both are the same law. The value is kept at the site `name`.

    For effects that are correlated, draw a vector from `dist.MultivariateNormal` yourself.

    Args:
        name: Name of the parameter.
        mean: Population mean on the scale of the link: for "log" the log of the median.
        sd: Standard deviation between series on that scale.
        covariates: What is known of each series, shape `(*batch, q)`, centred so that `mean`
            belongs to the average series, such as log weights less their mean.
        coefficients: Their effects, shape `(q,)`.
        link: "log" for positive parameters, "logit" for shares, "identity".
        centred: Sample the effect itself and not its standardised form.

    Returns:
        One value for each series, shape of the plate.

    Raises:
        ValueError: An unknown link, covariates without coefficients or the reverse, or shapes
            that do not fit.

    Example:
        >>> import jax, numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> weight = np.log(np.array([61.0, 80.0, 72.0]) / 70.0)[:, None]
        >>> def model():
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     slope = numpyro.sample("slope", dist.Normal(0.75, 0.2))
        ...     with numpyro.plate("subject", 3):
        ...         return nsde.random_effects("clearance", mean, 0.3, weight, slope[None])
        >>> numpyro.handlers.seed(model, jax.random.key(0))().shape
        (3,)
    """
    if link not in _LINKS:
        raise ValueError(f"link must be one of {list(_LINKS)}, got {link!r}")
    if (covariates is None) != (coefficients is None):
        missing = "coefficients" if coefficients is None else "covariates"
        raise ValueError(f"covariates and coefficients go together: {missing} is missing")
    centre = jnp.asarray(mean)
    if covariates is not None and coefficients is not None:
        explained = _explained(jnp.asarray(covariates), jnp.asarray(coefficients))
        centre = jnp.add(*equal_rank(centre, explained))
    if centred:
        effect = numpyro.sample(f"{name}_effect", dist.Normal(centre, sd))
    else:
        eta = numpyro.sample(f"{name}_eta", dist.Normal(0.0, 1.0))
        centre, spread, eta = equal_rank(centre, jnp.asarray(sd), jnp.asarray(eta))
        effect = centre + spread * eta
    value: Any = _LINKS[link](effect)
    return numpyro.deterministic(name, value)


def _explained(covariates: Array, coefficients: Array) -> Array:
    if coefficients.ndim < 1 or covariates.ndim < 1:
        raise ValueError(
            "covariates must have shape (*batch, q) and coefficients (q,), got "
            f"{covariates.shape} and {coefficients.shape}"
        )
    if covariates.shape[-1] != coefficients.shape[-1]:
        raise ValueError(
            f"covariates has {covariates.shape[-1]} columns, coefficients {coefficients.shape[-1]} "
            f"entries (shapes {covariates.shape} and {coefficients.shape})"
        )
    return jnp.sum(jnp.multiply(*equal_rank(covariates, coefficients)), axis=-1)
