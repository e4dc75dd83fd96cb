"""`AutoSplit`: a flow over ordinary parameters, a low-rank normal law over weights of fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.handlers import block, seed
from numpyro.infer.autoguide import AutoGuideList, AutoLowRankMultivariateNormal
from numpyro.infer.initialization import init_to_median, init_to_value

from numpyro_sde.guides.auto import AutoFlow

# Names that a field's register gives to what is no weight.
_HYPERPARAMETERS = ("amplitude", "length")


def weight_sites(fields: Sequence[str], sites: Sequence[str]) -> tuple[str, ...]:
    """Sites that hold weights of fields.

    Args:
        fields: names of the fields of a model.
        sites: names of its latent sites.

    Example:
        >>> from numpyro_sde.guides.split import weight_sites
        >>> weight_sites(["f"], ["f/amplitude", "f/z", "scale"])
        ('f/z',)
    """
    found = []
    for site in sites:
        field, _, rest = site.rpartition("/")
        if field in fields and rest not in _HYPERPARAMETERS:
            found.append(site)
    return tuple(found)


def hidden_sites(
    model: Callable[..., Any], hide: tuple[str, ...], *args: Any, **kwargs: Any
) -> Any:
    """Run a model of which some sites are not seen."""
    with block(hide=list(hide)), seed(rng_seed=0):
        return model(*args, **kwargs)


def check_weights(weights: Any) -> tuple[str, ...]:
    """Names of sites as a tuple."""
    if isinstance(weights, str) or not weights:
        raise ValueError(f"weights must be a list of names of sites, got {weights!r}")
    return tuple(weights)


def places_of(names: Sequence[str], sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Where each site lies in the vector of all unconstrained coordinates."""
    ends = np.cumsum([sizes[name] for name in names])
    return {name: np.arange(end - sizes[name], end) for name, end in zip(names, ends, strict=True)}


class AutoSplit(AutoGuideList):
    """A flow over ordinary parameters and a low-rank normal law over the weights of fields.

    A flow's networks grow with the square of the number of unknowns; the weights of a learned drift
    are many and, whitened, near normal. `AutoPathGuide` takes this guide by itself for more than 50
    weights.

    Args:
        model: a model, all of its latent sites continuous.
        weights: names of the sites that hold weights, such as `"f/z"`.
        rank: rank of the weights' covariance beyond a diagonal; None for the root of their number.
        **options: keyword arguments of `AutoFlow`, for the rest.

    Raises:
        ValueError: no weights.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model():
        ...     f = nsde.fields.HSGP(1, 2.0, 60).register(
        ...         "f", amplitude=dist.HalfNormal(1.0), length=0.5)
        ...     numpyro.sample("y", dist.Normal(f(0.3), 0.1), obs=0.5)
        >>> guide = nsde.guides.AutoSplit(model, ["f/z"], rank=4)
        >>> svi = numpyro.infer.SVI(
        ...     model, guide, numpyro.optim.Adam(1e-2), numpyro.infer.Trace_ELBO())
        >>> fit = svi.run(jax.random.key(0), 5, progress_bar=False)
        >>> fit.params["auto_weights_cov_factor"].shape
        (60, 4)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        weights: Sequence[str],
        *,
        rank: int | None = None,
        prefix: str = "auto",
        **options: Any,
    ) -> None:
        self.weights = check_weights(weights)
        super().__init__(model, prefix=prefix, init_loc_fn=init_to_median)
        self._rank, self._options = rank, options
        self._located = init_to_median
        self._scales: tuple[Any, Any] = (0.1, 0.1)

    def start_at(
        self, values: Mapping[str, Array], names: Sequence[str], covariance: Array, sizes: Any
    ) -> None:
        """Begin at values of the sites, with a covariance of their unconstrained coordinates.

        Args:
            values: by site.
            names: sites in the order of the covariance.
            covariance: `(D, D)`.
            sizes: number of unconstrained coordinates of each site.
        """
        places = places_of(names, sizes)
        rest = tuple(name for name in names if name not in self.weights)
        kept = np.concatenate([places[n] for n in rest]) if rest else np.zeros(0, int)
        own = np.concatenate([places[n] for n in names if n in self.weights])
        block_of_rest = jnp.asarray(covariance)[np.ix_(kept, kept)]
        spread = float(np.sqrt(np.mean(np.diag(np.asarray(covariance))[own])))
        self._located = init_to_value(values=dict(values))
        self._scales = ({rest: block_of_rest}, spread)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        latent = [
            name
            for name, site in self.prototype_trace.items()
            if site["type"] == "sample" and not site["is_observed"]
        ]
        missing = sorted(set(self.weights) - set(latent))
        if missing:
            raise ValueError(f"AutoSplit: {missing} are no latent sites, which are {latent}")
        rest = tuple(name for name in latent if name not in self.weights)
        flow_scale, weight_scale = self._scales
        if rest:
            self.append(
                AutoFlow(
                    partial(hidden_sites, self.model, self.weights),
                    prefix=self.prefix,
                    init_loc_fn=self._located,
                    init_scale=flow_scale,
                    **self._options,
                )
            )
        self.append(
            AutoLowRankMultivariateNormal(
                partial(hidden_sites, self.model, rest),
                prefix=f"{self.prefix}_weights",
                init_loc_fn=self._located,
                init_scale=weight_scale,
                rank=self._rank,
            )
        )
