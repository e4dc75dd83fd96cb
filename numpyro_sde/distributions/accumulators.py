"""The start of a process together with integrals that have not begun."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, PRNGKeyArray
from numpyro.distributions import constraints
from numpyro.util import is_prng_key

from numpyro_sde.distributions.moments import is_gaussian, mean_and_cov


class WithAccumulators(dist.Distribution):
    """A first state, and independent standard normals for integrals that a reset at once wipes.

    Integrals that start at a fixed zero would make the law of a latent path singular.

    Args:
        base: law of the first state, event shape `()` or `(d,)`.
        count: number of integrals.

    Example:
        >>> import numpyro.distributions as dist
        >>> from numpyro_sde.distributions.accumulators import WithAccumulators
        >>> WithAccumulators(dist.LogNormal(0.0, 1.0), 2).event_shape
        (3,)
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    pytree_data_fields = ("base",)
    pytree_aux_fields = ("count",)

    def __init__(
        self, base: dist.Distribution, count: int, *, validate_args: bool | None = None
    ) -> None:
        self.base, self.count = base, count
        shape = base.event_shape
        size = shape[0] if shape else 1
        super().__init__(base.batch_shape, (size + count,), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:
        return constraints.real_vector

    @property
    def has_rsample(self) -> bool:
        return self.base.has_rsample

    def as_normal(self) -> dist.Distribution:
        """The same law as a multivariate normal, or a point mass, where it is one."""
        base: Any = self.base
        if not is_gaussian(base):
            return self
        mean, cov = mean_and_cov(base, len(base.event_shape))
        pad = [(0, 0)] * (mean.ndim - 1)
        mean = jnp.pad(mean, [*pad, (0, self.count)])
        inner = base
        while isinstance(inner, dist.Independent | dist.ExpandedDistribution):
            inner = inner.base_dist
        if isinstance(inner, dist.Delta):
            return dist.Delta(mean, event_dim=1)
        size = cov.shape[-1]
        wide = jnp.zeros((*cov.shape[:-2], size + self.count, size + self.count), cov.dtype)
        wide = wide.at[..., :size, :size].set(cov)
        wide = wide.at[..., size:, size:].set(jnp.eye(self.count, dtype=cov.dtype))
        return dist.MultivariateNormal(mean, wide)

    def sample(self, key: PRNGKeyArray, sample_shape: tuple[int, ...] = ()) -> Array:
        assert is_prng_key(key)
        first, second = jax.random.split(key)
        x = self.base.sample(first, sample_shape)
        x = x if self.base.event_shape else x[..., None]
        rest = jax.random.normal(second, (*x.shape[:-1], self.count), x.dtype)
        return jnp.concatenate([x, rest], axis=-1)

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> Array:  # noqa: ARG002
        value = jnp.asarray(value)
        x, rest = value[..., : -self.count], value[..., -self.count :]
        x = x if self.base.event_shape else x[..., 0]
        return self.base.log_prob(x) + jnp.sum(dist.Normal(0.0, 1.0).log_prob(rest), axis=-1)

    @property
    def mean(self) -> Array:
        mean, _ = self._moments()
        return jnp.pad(mean, [(0, 0)] * (mean.ndim - 1) + [(0, self.count)])

    @property
    def variance(self) -> Array:
        _, variance = self._moments()
        pad = [(0, 0)] * (variance.ndim - 1) + [(0, self.count)]
        return jnp.pad(variance, pad, constant_values=1.0)

    def _moments(self) -> tuple[Array, Array]:
        mean, variance = jnp.asarray(self.base.mean), jnp.asarray(self.base.variance)
        return (mean, variance) if self.base.event_shape else (mean[..., None], variance[..., None])
