"""Exact draws of discrete paths as a block of NumPyro's Gibbs sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from numpyro_sde.distributions.state_space import ObservedPath
from numpyro_sde.filters.forward import Forward
from numpyro_sde.infer.conditional import ConditionalSMC
from numpyro_sde.statespace.model import StateSpaceModel


class ConditionalForward(ConditionalSMC):
    """Draw the states of a `JumpPath` given the rest of a model: exact, no particles.

    A block kernel for `numpyro.infer.gibbs.Gibbs`, by forward filtering and backward sampling:
    `Gibbs([(ConditionalForward(model), ["s"]), (NUTS(model), None)])`. Where nothing but `observe`
    sees the path, `handlers.marginalize(model, method=filters.Forward())` under NUTS mixes better;
    take this where the path is wanted draw by draw, or enters other sites' laws through samplers of
    your own.

    Args:
        model: the model, its path sites as they are.
        sites: names of the path sites; None for all of the model.

    Raises:
        ValueError: when run, a path that is no `JumpPath`, or that enters the density elsewhere
            than in `observe`.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, numpyro, numpyro.distributions as dist
        >>> import numpyro_sde as nsde
        >>> from numpyro.infer import MCMC, NUTS
        >>> from numpyro.infer.gibbs import Gibbs
        >>> def model(y=None):
        ...     rates = numpyro.sample("rates", dist.LogNormal(jnp.zeros(2), 1.0).to_event(1))
        ...     chain = nsde.MarkovJumpProcess(
        ...         lambda p: p, 2, edges=[(0, 1), (1, 0)], params=rates, event_dims=1)
        ...     s = numpyro.sample("s", nsde.JumpPath(chain, np.arange(4.0)))
        ...     nsde.observe("y", s, lambda t, s: dist.Normal(s, 0.5), obs=y)
        >>> block = nsde.infer.ConditionalForward(model)
        >>> mcmc = MCMC(Gibbs([(block, ["s"]), (NUTS(model), None)]), num_warmup=10,
        ...             num_samples=10, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), np.array([0.1, 0.9, 1.1, 0.2]))
        >>> mcmc.get_samples()["s"].shape
        (10, 4)
    """

    def __init__(self, model: Callable[..., Any], sites: Sequence[str] | None = None) -> None:
        super().__init__(model, sites, 2, proposal="bootstrap", renewal="none")
        self.method = Forward()

    def _check(self, model: StateSpaceModel) -> None:
        self.method.check(model)

    def _first(self, observed: ObservedPath, key: PRNGKeyArray) -> Array:
        def one(model: StateSpaceModel, key: PRNGKeyArray) -> Array:
            self._check(model)
            return self.method.filter(model).sample(key, 1)[0, :, 0]

        return jnp.asarray(observed.map_seeded(one, key, 0), jnp.int32)

    def _sweep(
        self, observed: ObservedPath, value: Array, key: PRNGKeyArray
    ) -> tuple[Array, Array, Array]:
        new = self._first(observed, key)
        return new, new != value, jnp.ones(new.shape)
