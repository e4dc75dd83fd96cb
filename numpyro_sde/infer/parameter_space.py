"""The parameters of a model with latent paths: their names, their unconstrained vector, and more.

Parameters are the latent sites other than paths. Likelihood methods take their supports from the
model and leave their priors aside, which is only right where those priors say nothing of one
another: a site whose law depends on another parameter is a random effect, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from numpyro.distributions import biject_to
from numpyro.handlers import seed, substitute, trace

from numpyro_sde.distributions.observation import EmissionPath
from numpyro_sde.models.reading import NO_PATH, Reader
from numpyro_sde.models.stack import outside_all_handlers, peel
from numpyro_sde.schemes.dependence import reaches_output


class Parameter(NamedTuple):
    """One parameter site.

    Attributes:
        transform: from unconstrained values to its support.
        plates: names of the plates around it by dimension, counted from the right of its batch.
        event_dim: its event dimensions, unconstrained.
        ndim: dimensions of its value.
    """

    transform: Any
    plates: dict[int, str]
    event_dim: int
    ndim: int


class ParameterSpace:
    """The parameters of a model for given arguments, and what its data say of them alone.

    Args:
        model: the model, its paths as they are.
        args: its positional arguments.
        kwargs: its keyword arguments.
        engine: what to call the method in errors.

    Raises:
        ValueError: no latent path, no parameter, one that is discrete, or one whose law depends on
            another.
    """

    def __init__(
        self, model: Callable[..., Any], args: Any, kwargs: Any, engine: str = "IteratedFiltering"
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        sites, reader = self._run(jax.random.key(0), {})
        if not reader.paths:
            raise ValueError(NO_PATH)
        self.paths = {name: (site.lead, site.plates) for name, site in reader.paths.items()}
        self.sites: dict[str, Parameter] = {}
        example: dict[str, Array] = {}
        for name, site in sites.items():
            if site["type"] != "sample" or site["is_observed"] or name in reader.paths:
                continue
            law = site["fn"]
            if law.is_discrete:
                raise ValueError(
                    f"{engine} perturbs parameters on a continuous scale, but site {name!r} is "
                    f"discrete ({type(law).__name__})"
                )
            plates = {f.dim: f.name for f in site["cond_indep_stack"]}
            transform = biject_to(law.support)
            value = jnp.asarray(site["value"], jnp.result_type(float))
            example[name] = transform.inv(value)
            event_dim = np.ndim(example[name]) - (np.ndim(value) - law.event_dim)
            self.sites[name] = Parameter(transform, plates, event_dim, np.ndim(value))
        if not self.sites:
            raise ValueError(f"{engine} has nothing to estimate: the model has no parameter site")
        flat, self._back = ravel_pytree(example)
        self.size = int(flat.size)
        self._shapes = {name: np.shape(value) for name, value in example.items()}
        self._refuse_hierarchy(sites, engine)
        self.has_other_data = any(
            site["type"] == "sample" and site["is_observed"] and not _of_path(site)
            for site in sites.values()
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameter sites."""
        return tuple(self.sites)

    def ndim(self, name: str) -> int:
        """Dimensions of a site's value."""
        return self.sites[name].ndim

    def _run(self, key: Any, values: Mapping[str, Any]) -> tuple[dict[str, Any], Reader]:
        reader = Reader()
        with outside_all_handlers(), trace() as sites, seed(rng_seed=key), reader:
            substitute(self.model, data=dict(values))(*self.args, **self.kwargs)
        return sites, reader

    def _refuse_hierarchy(self, sites: dict[str, Any], engine: str) -> None:
        values = {name: sites[name]["value"] for name in self.names}

        def densities(values: dict[str, Any]) -> list[Array]:
            found, _ = self._run(jax.random.key(0), values)
            # Each law at a fixed value of its own site: what is left is what others do to it.
            return [jnp.sum(found[n]["fn"].log_prob(sites[n]["value"])) for n in self.names]

        jaxpr = jax.make_jaxpr(densities)(values).jaxpr
        for place, used in enumerate(sorted(values)):
            for output, name in enumerate(self.names):
                if name != used and reaches_output(jaxpr, place, output):
                    raise ValueError(
                        f"{engine} maximises the likelihood and leaves priors aside, but the law "
                        f"of site {name!r} depends on site {used!r}: it is a random effect, not a "
                        "parameter. Integrate over it: infer.PMMH, infer.ParticleGibbs"
                    )

    def flat(self, values: Mapping[str, Any]) -> Float[Array, " D"]:
        """Unconstrained vector of values on the sites' own scale.

        Raises:
            ValueError: names that are not the parameters', or a value outside a support.
        """
        if set(values) != set(self.names):
            raise ValueError(
                f"init_params must give the parameters {sorted(self.names)}, got {sorted(values)}"
            )
        z = {}
        for name, value in values.items():
            value = jnp.asarray(value, jnp.result_type(float))
            z[name] = jnp.broadcast_to(self.sites[name].transform.inv(value), self._shapes[name])
            if not isinstance(value, jax.core.Tracer) and not np.all(np.isfinite(z[name])):
                raise ValueError(f"init_params[{name!r}] = {value} is outside the site's support")
        return ravel_pytree(z)[0]

    def constrain(self, flat: Float[Array, " D"]) -> dict[str, Array]:
        """Values by site on their own scale."""
        z = self._back(flat)
        return {name: self.sites[name].transform(z[name]) for name in self.names}

    def prior_draw(self, key: Any) -> Float[Array, " D"]:
        """A draw of the priors, unconstrained."""
        sites, _ = self._run(key, {})
        z = {
            n: s.transform.inv(jnp.asarray(sites[n]["value"], jnp.result_type(float)))
            for n, s in self.sites.items()
        }
        return ravel_pytree(z)[0]

    def by_component(self, given: Mapping[str, Any], default: float) -> np.ndarray:
        """A number for each component of the vector, from one for each site or element of one."""
        full = {
            name: np.broadcast_to(np.asarray(given.get(name, default), float), shape)
            for name, shape in self._shapes.items()
        }
        return _joined(full)

    def belonging(self, path: str, index: tuple[int, ...]) -> np.ndarray:
        """Which components have to do with one series of a path: `(D,)` of truth values.

        A site inside plates of the path has elements for each series; all else is shared.
        """
        lead, plates = self.paths[path]
        own = {}
        for name, shape in self._shapes.items():
            mask, site = np.ones(shape, bool), self.sites[name]
            for dim, plate in site.plates.items():
                if plate in plates and -dim <= len(lead) and lead[dim] > 1:
                    axis = len(shape) - site.event_dim + dim
                    keep = np.arange(shape[axis]) == index[dim]
                    mask &= keep.reshape((-1,) + (1,) * (len(shape) - axis - 1))
            own[name] = mask
        return _joined(own)

    def log_likelihood_elsewhere(self, values: Mapping[str, Any]) -> Float[Array, ""]:
        """Log density of all data that no latent path leads to."""
        sites, _ = self._run(jax.random.key(0), values)
        return _sum_observed(sites, skip_paths=True)

    def log_likelihood(
        self, treated: Callable[..., Any], values: Mapping[str, Any], key: Any
    ) -> Float[Array, ""]:
        """Log density of all data under a model whose paths are integrated out.

        The handler gives its filter random numbers of the run, so the key makes the estimate.
        """
        with outside_all_handlers(), trace() as sites, seed(rng_seed=key):
            substitute(treated, data=dict(values))(*self.args, **self.kwargs)
        return _sum_observed(sites, skip_paths=False)


def _joined(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Host arrays by site in the order of the vector."""
    return np.concatenate([np.ravel(arrays[name]) for name in sorted(arrays)])


def _of_path(site: Any) -> bool:
    law, _ = peel(site["fn"])
    return isinstance(law, EmissionPath)


def _sum_observed(sites: Mapping[str, Any], *, skip_paths: bool) -> Array:
    total = jnp.zeros(())
    for site in sites.values():
        if site["type"] == "sample" and site["is_observed"] and not (skip_paths and _of_path(site)):
            scale = 1.0 if site["scale"] is None else site["scale"]
            total = total + jnp.sum(scale * site["fn"].log_prob(site["value"]))
    return total
