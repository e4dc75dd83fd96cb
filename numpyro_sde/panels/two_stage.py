"""Populations in two stages: series fitted apart, their draws reweighed inside a population model.

Each series is fitted alone under a prior of its own, as in `fit_panel`. Given the population's
parameters the likelihood of series i, relative to a constant, is then the mean over its draws of
`p(theta | population) / p(theta | first prior)`: the population model needs these draws and no
data. Lunn, Barrett, Sweeting and Thompson (2013), "Fully Bayesian hierarchical modelling in two
stages, with application to meta-analysis", proposed draws by these weights within a chain; here the
choice of the draw is summed out, so that any sampler or guide of NumPyro serves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_sde.panels.fitting import PanelFits

_TOGETHER = 16  # draws whose densities are evaluated at once

Laws = Mapping[str, dist.Distribution] | Callable[[Mapping[str, Array]], Array]


class SeriesDraws(eqx.Module):
    """Draws of many series as the data of a population model: the second of two stages.

    The log of a mean of M weights is too small by half its relative variance; that is estimated
    and added, so that errors of 1e5 series do not add up. What remains depends on how far the
    population's law is from the first prior: let that be wide, and look at `effective_size`.
    Draws of one chain depend on each other: thin them until they hardly do. Not where a series says
    so little that its own posterior is its prior, nor for more than some 5 parameters of a series.

    A pytree: hand it to the model as an argument (`MCMC(..., jit_model_args=True)`).

    Args:
        draws: `PanelFits`, or for each site an array `(series, draw, ...)`.
        prior: law of each site in the first stage, as the fits had it; or one function of a
            dictionary of values, `(series, ...)` each, that returns log densities `(series,)`;
            None where it was flat in these coordinates.
        sites: the sites that the population has laws of; None for those of `prior`, else all.
        thin: keep every so many draws.

    Raises:
        ValueError: no draws, arrays that disagree, or a prior of an unknown site.

    Example:
        >>> import jax, numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> rng = np.random.default_rng(0)
        >>> level = rng.normal(1.0, 0.5, size=(30, 1))  # 30 series around 1, each known to 0.2
        >>> found = level + rng.normal(0.0, 0.2, size=(30, 1)) + rng.normal(0, 0.2, size=(30, 200))
        >>> stage = nsde.SeriesDraws({"level": found}, prior=None)
        >>> def population(stage):
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 2.0))
        ...     sd = numpyro.sample("sd", dist.HalfNormal(1.0))
        ...     stage.reweigh("series", {"level": dist.Normal(mean, sd)})
        >>> sites = numpyro.handlers.trace(numpyro.handlers.seed(population, 0)).get_trace(stage)
        >>> sites["series"]["fn"].log_prob(sites["series"]["value"]).shape
        (30,)
    """

    values: dict[str, Array]
    log_prior: Float[Array, "series draw"]

    def __init__(
        self,
        draws: PanelFits | Mapping[str, Any],
        prior: Laws | None,
        *,
        sites: tuple[str, ...] | list[str] | None = None,
        thin: int = 1,
    ) -> None:
        if isinstance(thin, bool) or not isinstance(thin, int) or thin < 1:
            raise ValueError(f"thin must be a positive whole number, got {thin!r}")
        wanted = sites if sites is not None else list(prior) if isinstance(prior, Mapping) else None
        if isinstance(draws, PanelFits):
            found: Mapping[str, Any] = draws.draws(*(wanted or ()), thin=thin)
        else:
            found = {name: np.asarray(value)[:, ::thin] for name, value in draws.items()}
        names = list(found) if wanted is None else list(wanted)
        if lost := [name for name in names if name not in found]:
            raise ValueError(f"draws have no {lost}, but {list(found)}")
        leads = {name: np.shape(found[name])[:2] for name in names}
        if not names or len(set(leads.values())) != 1 or 0 in next(iter(leads.values())):
            raise ValueError(
                f"draws must hold arrays (series, draw, ...) of one leading shape, got {leads}"
            )
        if isinstance(prior, Mapping) and set(prior) != set(names):
            raise ValueError(f"prior must have a law of each of {names}, got {list(prior)}")
        self.values = {name: jnp.asarray(found[name]) for name in names}
        some = self.values[names[0]]
        self.log_prior = jnp.zeros(some.shape[:2], jnp.result_type(some, float))
        if prior is not None:
            self.log_prior = self._log_density(prior)

    @property
    def num_series(self) -> int:
        """Number of series."""
        return int(self.log_prior.shape[0])

    def __getitem__(self, index: Any) -> SeriesDraws:
        """Some of the series, as a plate with `subsample_size` asks for: `stage[index]`."""
        return jax.tree.map(lambda a: a[index], self)

    def reweigh(self, name: str, laws: Laws) -> None:
        """Say in a population model what law the parameters of the series have: a `factor`.

        Inside a plate of the series, or outside of any.

        Args:
            name: name of the site.
            laws: law of each site, for one series or, with batch shape `(series,)`, for each its
                own; or a function of a dictionary of values, `(series, ...)` each, that returns
                log densities `(series,)`, where sites depend on each other.
        """
        numpyro.factor(name, self.log_likelihood(laws))

    def log_likelihood(self, laws: Laws) -> Float[Array, " series"]:
        """Log likelihood of each series given the population, up to a constant."""
        weights = self._log_density(laws) - self.log_prior
        count = weights.shape[1]
        total = jax.nn.logsumexp(weights, axis=1)
        if count == 1:
            return total
        # Relative variance of the mean, by the sum of squared shares.
        squares = jnp.exp(jax.nn.logsumexp(2.0 * weights, axis=1) - 2.0 * total)
        variance = (squares - 1.0 / count) * count / (count - 1.0)
        return total - jnp.log(count) + 0.5 * variance

    def effective_size(self, laws: Laws) -> Float[Array, " series"]:
        """Effective number of draws of each series under these laws: few mean a poor estimate."""
        weights = self._log_density(laws) - self.log_prior
        total = jax.nn.logsumexp(weights, axis=1)
        return jnp.exp(2.0 * total - jax.nn.logsumexp(2.0 * weights, axis=1))

    def redraw(self, laws: Laws, rng_key: PRNGKeyArray) -> dict[str, Array]:
        """One draw of the parameters of every series given the population, `(series, ...)` each.

        Map it over the posterior draws of the population by `jax.vmap`.
        """
        weights = self._log_density(laws) - self.log_prior
        chosen = jax.random.categorical(rng_key, weights, axis=1)
        each = jnp.arange(self.num_series)
        return {name: value[each, chosen] for name, value in self.values.items()}

    def _log_density(self, laws: Laws) -> Float[Array, "series draw"]:
        if isinstance(laws, Mapping) and set(laws) != set(self.values):
            raise ValueError(
                f"laws must have a law of each of {list(self.values)}, got {list(laws)}"
            )

        def density(values: Mapping[str, Array]) -> Array:
            if not isinstance(laws, Mapping):
                return laws(values)
            terms = [_log_prob(name, laws[name], values[name]) for name in values]
            return sum(terms[1:], terms[0])

        first = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), self.values)  # draws in front
        # In parts that are evaluated again on the way back: memory of the draws, not of densities.
        found = lax.map(jax.checkpoint(density), first, batch_size=_TOGETHER)
        if found.shape != self.log_prior.shape[::-1]:
            raise ValueError(
                f"laws must give one log density for each of the {self.num_series} series, got "
                f"shape {found.shape[1:]}"
            )
        return found.T


def _log_prob(name: str, law: dist.Distribution, value: Array) -> Array:
    """Log density of each series' value; all dimensions but the first are of one series."""
    extra = value.ndim - 1 - law.event_dim
    if extra < 0 or law.event_shape != value.shape[value.ndim - law.event_dim :]:
        raise ValueError(
            f"the law of {name!r} has event shape {law.event_shape}, but a draw of one series has "
            f"shape {value.shape[1:]}"
        )
    found = law.to_event(extra).log_prob(value) if extra and law.batch_shape else None
    if found is None:
        found = law.log_prob(value)
        found = jnp.sum(found, axis=tuple(range(1, found.ndim)))
    return found
