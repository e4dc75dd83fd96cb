"""`MatchedELBO`: the bound of a model whose path has the law `MatchedPath`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from numpyro.handlers import replay, seed
from numpyro.infer.elbo import ELBO
from numpyro.infer.util import log_density

from numpyro_sde.checks.numbers import at_least
from numpyro_sde.guides.auto_path import AutoPathGuide
from numpyro_sde.guides.matched import MatchedPath
from numpyro_sde.guides.path_sites import without_paths
from numpyro_sde.models.reading import read_model, refuse_weighted
from numpyro_sde.models.survey import survey


class MatchedELBO(ELBO):
    """The bound of a model whose path has the law `MatchedPath`, without simulating the path.

    A loss for `SVI(model, guide, optim, MatchedELBO())`, in the place of `Trace_ELBO`. It bounds
    the evidence of the equation in continuous time; `Trace_ELBO` of the same guide bounds that of
    the steps on the grid.

    Args:
        num_times: random times at which drifts are compared, in each series and step.
        num_particles: draws of the parameters in each step.

    Raises:
        ValueError: counts below one.
        TypeError: in use, a guide that is not `AutoPathGuide(model, path=MatchedPath())`.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.guides.MatchedELBO(num_times=64).num_times
        64
    """

    def __init__(self, num_times: int = 32, num_particles: int = 1) -> None:
        at_least("num_times", num_times, 1)
        at_least("num_particles", num_particles, 1)
        self.num_times = int(num_times)
        super().__init__(num_particles=int(num_particles))

    def loss_with_mutable_state(
        self, rng_key: Any, param_map: Any, model: Any, guide: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not (isinstance(guide, AutoPathGuide) and isinstance(guide.path, MatchedPath)):
            raise TypeError(
                "MatchedELBO needs the guide AutoPathGuide(model, path=MatchedPath()), got "
                f"{type(guide).__name__}"
            )
        survey(model, args, kwargs).refuse_other_uses()
        for name, site in read_model(model, args, kwargs).paths.items():
            refuse_weighted(site, name, "MatchedELBO")
        parameters = without_paths(model)

        def one(key: Any) -> Array:
            key_guide, key_model = jax.random.split(key)
            bounds: list[Array] = []

            def statement() -> None:
                bounds.append(guide.path_bound(model, self.num_times, args, kwargs))

            log_q, drawn = log_density(seed(statement, key_guide), (), {}, param_map)
            rest = replay(seed(parameters, key_model), drawn)
            log_p, _ = log_density(rest, args, kwargs, param_map)
            return bounds[-1] + log_p - log_q

        keys = jax.random.split(rng_key, self.num_particles)
        total = one(keys[0]) if self.num_particles == 1 else jnp.mean(jax.vmap(one)(keys))
        return {"loss": -total, "mutable_state": None}
