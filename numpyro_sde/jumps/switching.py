"""An SDE whose coefficients follow a hidden regime, a Markov jump process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_sde.jumps.chain import MarkovJumpProcess
from numpyro_sde.jumps.starts import start_law
from numpyro_sde.noise.brownian import AbstractNoise, Brownian
from numpyro_sde.parameters import Code, as_function, broadcast_batch
from numpyro_sde.schemes.base import AbstractScheme
from numpyro_sde.schemes.switching import SwitchingSteps
from numpyro_sde.sde import SDE


def _still(t: Any, x: Any) -> Any:  # noqa: ARG001
    return x


def _still_with_params(t: Any, x: Any, p: Any) -> Any:  # noqa: ARG001
    return x


class SwitchingSDE(SDE):
    """`dX = drift(t, X, r) dt + diffusion(t, X, r) dW` with the regime r of a Markov jump process.

    The path of X is what a model sees; the regime is integrated out. It is constant within a step
    of the grid (refine the grid to see whether that matters) and is drawn anew at its end by the
    process's transition probabilities. An observed path has the exact density on the grid, by the
    forward algorithm over regimes; a path seen with noise is integrated out by `filters.IMM`,
    `filters.GPB`, `filters.RaoBlackwell`, or `filters.Particle(proposal="bootstrap")`.

    Regimes are labels: order a parameter of theirs (`dist.transforms.OrderedTransform`), or the
    posterior has a mode for each permutation.

    Args:
        drift: `drift(t, x, r, p)`, r an integer array `()`; index parameters with it,
            `p["rate"][r]` with `event_dims={"rate": 1}`. Without `params`, `drift(t, x, r)`.
        diffusion: `diffusion(t, x, r, p)`, shapes as for `SDE`.
        chain: the regime's process, with parameters of its own.
        params: pytree of arrays for both functions.
        event_dims: their event dimensions, as for `SDE`.
        first_regime: law of the first regime: "stationary", a regime, or a `Categorical`.

    Raises:
        ValueError: arguments that do not fit; "stationary" for a reducible process.
        TypeError: arguments of the wrong kind.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro_sde as nsde
        >>> chain = nsde.MarkovJumpProcess(jnp.array([[0.0, 0.6], [1.0, 0.0]]), 2)
        >>> calm_or_wild = nsde.SwitchingSDE(
        ...     lambda t, x, r, p: -x, lambda t, x, r, p: p["scale"][r], chain,
        ...     params={"scale": jnp.array([0.2, 1.0])}, event_dims={"scale": 1},
        ... )
        >>> path = nsde.SDEPath(calm_or_wild, [0.0, 0.5, 1.0], 0.0)
        >>> x = path.sample(jax.random.key(0))
        >>> x.shape, path.log_prob(x).shape
        ((3,), ())
    """

    chain: MarkovJumpProcess
    start: Float[Array, "*batch n"]
    # Inside one regime: its number. Never given by a user.
    regime: Any

    def __init__(
        self,
        drift: Callable[..., Any],
        diffusion: Callable[..., Any],
        chain: MarkovJumpProcess,
        *,
        params: Any = None,
        event_dims: Any = None,
        first_regime: Any = "stationary",
    ) -> None:
        if not isinstance(chain, MarkovJumpProcess):
            raise TypeError(f"chain must be an nsde.MarkovJumpProcess, got {type(chain).__name__}")
        if chain.matrix_free:
            raise ValueError(
                f"a regime has few states, got a chain of {chain.num_states}: up to 64 of them"
            )
        still = _still if params is None else _still_with_params
        super().__init__(still, still, params=params, event_dims=event_dims)
        optional = {"p": ("params", params is not None)}
        self.drift = as_function(drift, "drift", "t, x, r", optional)
        self.diffusion = as_function(diffusion, "diffusion", "t, x, r", optional)
        self.chain = chain
        self.start = start_law(chain, first_regime, "first_regime")
        self.regime = None

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return broadcast_batch(
            {
                "params": self.parameters.batch_shape,
                "params of the chain": self.chain.batch_shape,
                "first_regime": jnp.shape(self.start)[:-1],
            }
        )

    def leaf_event_dims(self) -> list[int]:
        leaves = jax.tree_util.tree_leaves(self)
        first = list(self.parameters.event_dims)
        last = [*self.chain.leaf_event_dims(), 1]
        if self.regime is not None:
            last.append(0)
        whole = leaves[len(first) : len(leaves) - len(last)]
        return first + [jnp.ndim(leaf) for leaf in whole] + last

    def in_regime(self, regime: Any) -> SwitchingSDE:
        """The equation of one process while it is in a regime."""
        new = self._with(regime=jnp.asarray(regime, jnp.int32))
        assert isinstance(new, SwitchingSDE)
        return new

    def driven_by(self, noise: AbstractNoise) -> Self:
        if not isinstance(noise, Brownian):
            raise ValueError(
                "a SwitchingSDE is driven by Brownian motion within each regime, got noise "
                f"{type(noise).__name__}: an SDE without regimes takes one with a memory"
            )
        return super().driven_by(noise)

    def _call(self, fn: Code, t: Any, x: Any) -> Any:
        regime = jnp.zeros((), jnp.int32) if self.regime is None else self.regime
        return fn(t, x, regime, *self.arguments)

    @property
    def is_diffusion(self) -> bool:
        return self.regime is not None

    def adapt(self, scheme: Any, state_shape: tuple[int, ...]) -> Any:
        if scheme is None or isinstance(scheme, AbstractScheme):
            return SwitchingSteps.around(scheme, state_shape)
        return scheme

    def check_scheme(self, scheme: AbstractScheme) -> None:
        if not isinstance(scheme, SwitchingSteps):
            raise ValueError(f"{type(scheme).__name__} knows no regimes")
