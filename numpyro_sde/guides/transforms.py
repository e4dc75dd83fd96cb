"""Coupling flows as NumPyro `Transform`s: for guides, conditional laws and `NeuTraReparam`.

The mathematics is in `numpyro_sde.guides.flows`; this module gives it NumPyro's interface. The
networks' weights and the context are data of the transform's pytree, so that `jit`, `vmap` and
`grad` reach both.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform

from numpyro_sde.guides.flows import CouplingFlow


class CouplingTransform(Transform):
    """A `CouplingFlow`, at a fixed context or without one, as a NumPyro transform of `R^d`.

    Args:
        flow: The flow.
        context: The context, `(*batch, context_dim)`, for a flow that has one; its batch
            dimensions broadcast against those of the vectors that are mapped. Derivatives reach
            it, so that it may depend on other latent sites.

    Raises:
        ValueError: If the context's length is not the one that the flow was made for.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import numpyro.distributions as dist
        >>> from numpyro_sde.guides.flows import CouplingFlow
        >>> from numpyro_sde.guides.transforms import CouplingTransform
        >>> flow = CouplingFlow.create(jax.random.key(0), 2, kind="affine", context_dim=1)
        >>> transform = CouplingTransform(flow, context=jnp.ones((5, 1)))
        >>> base = dist.Normal(jnp.zeros(2), 1.0).to_event(1)
        >>> law = dist.TransformedDistribution(base, transform)
        >>> law.batch_shape, law.event_shape
        ((5,), (2,))
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(
        self, flow: CouplingFlow, context: Float[Array, "*batch context_dim"] | None = None
    ) -> None:
        first = flow.layers[0]
        expected = first.conditioner.weights[0].shape[0] - len(first.passive)
        length = 0 if context is None else jnp.shape(context)[-1]
        if length != expected:
            raise ValueError(
                f"context must be a vector of length {expected}, as the flow was made for, got "
                f"{'none' if context is None else f'shape {jnp.shape(context)}'}"
            )
        self.flow = flow
        self.context = context

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        """Map `x` through the flow."""
        return self.flow.forward(x, self.context)[0]

    def call_with_intermediates(
        self, x: Float[Array, "*batch dim"]
    ) -> tuple[Float[Array, "*batch dim"], Float[Array, "*batch"]]:
        """Map `x`, and keep the log-determinant that comes with it."""
        return self.flow.forward(x, self.context)

    def _inverse(self, y: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        return self.flow.inverse(y, self.context)[0]

    def log_abs_det_jacobian(
        self,
        x: Float[Array, "*batch dim"],
        y: Float[Array, "*batch dim"],  # noqa: ARG002  NumPyro's signature
        intermediates: Float[Array, "*batch"] | None = None,
    ) -> Float[Array, "*batch"]:
        """Log-determinant of the Jacobian at `x`, read from `intermediates` where given."""
        if intermediates is not None:
            return intermediates
        return self.flow.forward(x, self.context)[1]

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the image of an array of this shape: the context's batch broadcasts in."""
        if self.context is None:
            return shape
        batch = jnp.broadcast_shapes(shape[:-1], jnp.shape(self.context)[:-1])
        return (*batch, shape[-1])

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the preimage of an array of this shape."""
        return self.forward_shape(shape)

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[tuple[str, ...], dict[str, Any]]]:
        """Flatten: the flow's weights and the context are both data."""
        return (self.flow, self.context), (("flow", "context"), {})

    def eq(self, other: object, static: bool = False) -> bool | Array:
        """Compare with another transform: same structure and equal weights and context."""
        if not isinstance(other, CouplingTransform):
            return False
        if jax.tree.structure(self) != jax.tree.structure(other):  # type: ignore[operator]
            return False
        pairs = zip(jax.tree.leaves(self), jax.tree.leaves(other), strict=True)
        same = [jnp.array_equal(mine, theirs) for mine, theirs in pairs]
        result = jnp.all(jnp.stack(same))
        return bool(result) if static else result
