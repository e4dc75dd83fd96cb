"""A conditional normalizing flow over the fast variable, to be learned from the slow path.

The law of the fast variable at a frozen slow state x is the image of a standard normal law under a
coupling flow whose networks see x. Everything is differentiable in x, in the draws and in the
weights, so that a latent path or parameter may be the condition. Source: Saha and Ganguly (2026),
arXiv:2605.09718, for the idea and the penalised likelihood (there without a
condition); the flow is that of `numpyro_sde.guides.flows`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from numpyro_sde.checks.numbers import at_least
from numpyro_sde.guides.flows import CouplingFlow, CouplingKind
from numpyro_sde.guides.transforms import CouplingTransform
from numpyro_sde.multiscale.laws import law_nodes
from numpyro_sde.multiscale.rules import as_rule


class ConditionalFlow(eqx.Module):
    """A flexible law of the fast variable given the slow one, `flow(x)`, for `average`.

    A pytree of weights and a function `(x, p) -> Distribution`. New, it is `Normal(loc, scale)` for
    every x. Inside a model `register` makes its weights NumPyro sites; then

        pi = flow.register("pi")
        limit = nsde.average(slow_fast, invariant=pi)
        numpyro.sample("x", nsde.SDEPath(limit, times, init=path[0]), obs=path)
        numpyro.factor("moment", -penalty * pi.moment())

    is the penalised likelihood of the slow path, for SVI with an empty guide. The penalty keeps
    mass from escaping to where the slow drift does not see it.

    In one fast dimension the layers are monotone scalar maps of their own, conditioned on x; in
    more they are coupling layers. Gradients reach the condition.

    When not to use it: to learn the fast law itself. The slow path identifies averages alone,
    and this flow fills the rest with what its start and the penalty prefer. Where physics gives a
    density with few unknowns, that is the better prior.

    Args:
        fast_dim: number of fast coordinates; 1 gives a scalar fast state of shape `()`.
        slow_dim: length of the condition: 1 for a scalar slow state, 0 for a fast law that
            does not depend on it.
        kind: `"spline"` (rational-quadratic, Durkan et al. 2019) or `"affine"`; affine layers in
            one dimension stay Gaussian.
        num_layers: coupling layers.
        hidden_dims: hidden widths of each layer's network.
        num_bins: bins of each spline.
        bound: half the width of each spline's box, in units of the start's scale.
        loc: mean of the law at the start, one number or one a coordinate.
        scale: its standard deviation; positive.
        key: draws the networks' hidden weights; by default a fixed one.

    Raises:
        TypeError: sizes that are no integers.
        ValueError: sizes that are too small, an unknown kind, or a scale that is not positive.

    Example:
        >>> import numpyro_sde as nsde
        >>> flow = nsde.ConditionalFlow(fast_dim=2, slow_dim=1, scale=0.5)
        >>> law = flow(0.3)
        >>> law.event_shape, round(float(flow.moment(0.3)), 3)  # 2 * 0.5^2
        ((2,), 0.5)
    """

    flow: CouplingFlow
    loc: Array
    log_scale: Array
    fast_dim: int = eqx.field(static=True)
    slow_dim: int = eqx.field(static=True)

    def __init__(
        self,
        fast_dim: int,
        slow_dim: int = 0,
        *,
        kind: CouplingKind = "spline",
        num_layers: int = 4,
        hidden_dims: tuple[int, ...] = (32, 32),
        num_bins: int = 8,
        bound: float = 4.0,
        loc: ArrayLike = 0.0,
        scale: ArrayLike = 1.0,
        key: PRNGKeyArray | None = None,
    ) -> None:
        at_least("fast_dim", fast_dim, 1)
        at_least("slow_dim", slow_dim, 0)
        if kind not in get_args(CouplingKind):
            raise ValueError(f"kind must be 'affine' or 'spline', got {kind!r}")
        # In a traced model jnp would trace a plain number too; what is traced gives NaN later.
        if not isinstance(scale, jax.core.Tracer) and not np.all(np.asarray(scale) > 0):
            raise ValueError(f"scale must be positive, got {scale}")
        self.fast_dim, self.slow_dim = int(fast_dim), int(slow_dim)
        self.flow = CouplingFlow.create(
            jax.random.key(0) if key is None else key,
            self.fast_dim,
            kind=kind,
            num_layers=num_layers,
            hidden_dims=tuple(hidden_dims),
            context_dim=self.slow_dim,
            num_bins=num_bins,
            bound=bound,
        )
        real = jnp.result_type(float)
        self.loc = jnp.broadcast_to(jnp.asarray(loc, real), (self.fast_dim,))
        self.log_scale = jnp.log(jnp.broadcast_to(jnp.asarray(scale, real), (self.fast_dim,)))

    def __call__(self, x: ArrayLike, p: Any = None) -> dist.TransformedDistribution:
        """The law of one fast state at the slow state x, of shape `()` or `(slow_dim,)`.

        Event shape `()` for one fast coordinate, else `(fast_dim,)`. `p` is not used.

        Raises:
            ValueError: a slow state of another length.
        """
        del p
        context = jnp.ravel(jnp.asarray(x))
        if self.slow_dim and context.shape != (self.slow_dim,):
            raise ValueError(
                f"x must have {self.slow_dim} coordinate(s), as slow_dim says, got shape "
                f"{jnp.shape(x)}"
            )
        base = dist.Normal(jnp.zeros(self.fast_dim, self.loc.dtype), 1.0).to_event(1)
        transforms: list[Any] = [
            CouplingTransform(self.flow, context if self.slow_dim else None),
            dist.transforms.AffineTransform(self.loc, jnp.exp(self.log_scale)),
        ]
        if self.fast_dim == 1:
            transforms.append(dist.transforms.ReshapeTransform((), (1,)))
        return dist.TransformedDistribution(base, transforms)

    def register(
        self,
        name: str,
        prior: dist.Distribution | Callable[[str, tuple[int, ...]], Any] | None = None,
    ) -> ConditionalFlow:
        """Make the weights NumPyro sites, inside a model; return the flow that holds them.

        Args:
            name: name of the `param` site, `{name}$params`, or prefix of the `sample` sites.
            prior: None for a `param` site, optimised; a distribution over scalars, or
                `prior(name, shape)`, for `sample` sites, one for each array of weights.

        Example:
            >>> import jax, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
            >>> flow = nsde.ConditionalFlow(1, 1, kind="affine", num_layers=1, hidden_dims=())
            >>> model = lambda: flow.register("pi", dist.Normal(0.0, 0.1))
            >>> sites = numpyro.handlers.trace(numpyro.handlers.seed(model, 0)).get_trace()
            >>> sorted(sites)
            ['pi/flow.layers.0.conditioner.biases.0', 'pi/flow.layers.0.conditioner.weights.0', \
'pi/loc', 'pi/log_scale']
        """
        weights, static = eqx.partition(self, eqx.is_inexact_array)
        if prior is None:
            return eqx.combine(numpyro.param(f"{name}$params", lambda _: weights), static)
        leaves, treedef = jax.tree_util.tree_flatten_with_path(weights)
        drawn = []
        for path, leaf in leaves:
            own = jax.tree_util.keystr(path, simple=True, separator=".")
            law = prior if isinstance(prior, dist.Distribution) else prior(own, leaf.shape)
            expanded = law.expand(leaf.shape).to_event(leaf.ndim)
            drawn.append(numpyro.sample(f"{name}/{own}", expanded))
        return eqx.combine(jax.tree_util.tree_unflatten(treedef, drawn), static)

    def moment(
        self, x: ArrayLike = 0.0, order: float = 2.0, quadrature: Any = None
    ) -> Float[Array, ""]:
        """`E sum_i |Y_i|^order` at one slow state: what the penalised likelihood penalises.

        Args:
            x: slow state; does not matter where `slow_dim` is 0.
            order: power, at least 1.
            quadrature: as for `average`; None for its default.

        Raises:
            ValueError: an order below 1.
        """
        if order < 1:
            raise ValueError(f"order must be at least 1, got {order}")
        y, weights = law_nodes(self(x), as_rule(quadrature))
        size = jnp.abs(y.reshape(len(weights), -1)) ** order
        return jnp.sum(weights * jnp.sum(size, axis=-1))
