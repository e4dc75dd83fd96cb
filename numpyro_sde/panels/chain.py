"""One chain, or some, of a kernel as a fit that pickles and compiles once in each process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from numpyro.infer import NUTS

from numpyro_sde.diagnostics.calibration.compiled import compiled_chain


class ChainDraws(NamedTuple):
    """Draws of chains by site, each `(chain, draw, ...)`."""

    draws: dict[str, np.ndarray]


@dataclass(frozen=True)
class Chain:
    """Markov chains of one kernel, for a fit of each series: the `fit` of `fit_panel`.

    All of a chain, its start and adaptation included, is one program, whose arguments are the data
    of the series. It is compiled once for each process and shape of the data, and pickles where
    the model does. Not for one long run: `numpyro.infer.MCMC` and `infer.CheckpointedMCMC` are.

    Args:
        kernel: makes the kernel of a model: a class (`NUTS`, `infer.ParticleGibbs`), or a
            `functools.partial` of one with its options.
        num_warmup: warm-up iterations.
        num_samples: iterations after it.
        num_chains: chains, one after the other.
        thinning: keep every so many iterations.

    Raises:
        ValueError: a count that is not positive.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model(y):
        ...     a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(a, 1.0), obs=y)
        >>> fit = nsde.Chain(num_warmup=50, num_samples=100, num_chains=2)
        >>> fit(jax.random.key(0), model, {"y": 0.5}).draws["a"].shape
        (2, 100)
    """

    kernel: Callable[..., Any] = field(default=NUTS)
    num_warmup: int = 500
    num_samples: int = 500
    num_chains: int = 1
    thinning: int = 1

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_chains", "thinning"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.num_warmup < 0:
            raise ValueError(f"num_warmup must not be negative, got {self.num_warmup}")

    def __call__(
        self, rng_key: PRNGKeyArray, model: Callable[..., Any], data: Mapping[str, Any]
    ) -> ChainDraws:
        """Run the chains on the data of one series, keyword arguments of the model."""
        draws = _compiled(self, model)(rng_key, dict(data))
        return ChainDraws({name: np.asarray(value) for name, value in draws.items()})


@lru_cache(maxsize=16)
def _compiled(chain: Chain, model: Callable[..., Any]) -> Callable[..., dict[str, Array]]:
    one = compiled_chain(
        chain.kernel(model), chain.num_warmup, chain.num_samples, thinning=chain.thinning
    )

    def run(rng_key: PRNGKeyArray, data: Mapping[str, Any]) -> dict[str, Array]:
        keys = jax.random.split(rng_key, chain.num_chains)
        return jax.lax.map(lambda key: one(key, **data), keys)

    return jax.jit(run)
