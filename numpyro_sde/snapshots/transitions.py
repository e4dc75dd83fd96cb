"""The law of a cell given its start: exact, by two moments, by a scheme, or simulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array

from numpyro_sde.distributions.arguments import resolve_scheme
from numpyro_sde.distributions.batching import map_batch
from numpyro_sde.parameters import as_function
from numpyro_sde.runtime.entry import entry_point
from numpyro_sde.schemes import AbstractScheme
from numpyro_sde.schemes.base import GaussianScheme
from numpyro_sde.sde import SDE
from numpyro_sde.snapshots.clock import Clock, coarse
from numpyro_sde.snapshots.moments import Rate, at_snapshots, factor_of
from numpyro_sde.snapshots.particles import GuidedParticles, ParticleMixture
from numpyro_sde.snapshots.population import (
    AbstractPopulation,
    NormalMixture,
    TransitionMixture,
)
from numpyro_sde.snapshots.starts import Starts

Transition = AbstractScheme | GuidedParticles | None
"""A scheme, particles, or None for the moments of the linearised equation."""


def chosen_transition(
    sde: SDE, transition: Any, state_shape: tuple[int, ...], *, growth: bool = False
) -> Transition:
    """The transition to use, checked.

    Raises:
        ValueError: an equation with jumps, regimes or a noise with memory; a scheme without
            density; growth with a transition that does not take it.
        TypeError: what is no transition.
    """
    _check_equation(sde, state_shape)
    if transition is None and not growth and sde.inputs is None:
        exact = sde.exact_transition()
        if exact is not None and exact.has_density:
            return exact
    if transition is None or (isinstance(transition, str) and transition == "moments"):
        return None
    if growth:
        raise ValueError(
            "growth is taken along with the moments of the linearised equation, "
            f"transition='moments', got {transition!r}"
        )
    if isinstance(transition, GuidedParticles):
        return transition
    if not isinstance(transition, AbstractScheme):
        raise TypeError(
            'transition must be None, "moments", a scheme of nsde.schemes or '
            f"nsde.snapshots.GuidedParticles(...), got {transition!r}"
        )
    if sde.inputs is not None:
        raise ValueError(
            "an SDE with inputs takes transition='moments' or GuidedParticles(...), got "
            f"{type(transition).__name__}"
        )
    scheme = resolve_scheme(sde, transition, state_shape)
    scheme.check(sde, state_shape)
    if not scheme.has_density or scheme.has_memory:
        raise ValueError(
            f"transition: {type(scheme).__name__} has no density of the next state: use "
            "'moments', LocalLinear() or GuidedParticles(...)"
        )
    return scheme


def _check_equation(sde: SDE, state_shape: tuple[int, ...]) -> None:
    sde.structure(state_shape)
    if not sde.is_diffusion or not sde.noise.independent:
        raise ValueError(
            "snapshots are for diffusions driven by Brownian motion, got "
            f"{type(sde).__name__} with noise {type(sde.noise).__name__}"
            f"{' and jumps' if sde.jumps else ''}"
        )


def is_exact_normal(sde: SDE, transition: Transition) -> bool:
    """Whether a normal law stays normal, exactly, under a transition."""
    exact = sde.exact_transition()
    same = transition is not None and exact is not None and type(transition) is type(exact)
    return same and isinstance(transition, GaussianScheme)


def growth_rate(growth: Callable[..., Any] | None, sde: SDE) -> Rate | None:
    """A net growth rate, checked.

    Raises:
        TypeError: no function of time, state and the parameters.
    """
    if growth is None:
        return None
    optional = {"p": ("params", sde.params is not None)}
    try:
        return Rate(as_function(growth, "growth", "t, x", optional), sde.params is not None)
    except TypeError:
        return Rate(as_function(growth, "growth", "t, x", {}), False)


def population_of(
    sde: SDE,
    transition: Transition,
    growth: Rate | None,
    clock: Clock,
    starts: Starts,
    noise: Array | None,
    batch_shape: tuple[int, ...],
    *,
    scalar: bool,
) -> AbstractPopulation:
    """The population at each snapshot after the first.

    Raises:
        ValueError: measurement noise with a transition that is not normal.
    """
    if transition is None or isinstance(transition, GaussianScheme):
        exact = is_exact_normal(sde, transition)
        return _normal_mixture(
            with_data_leaves(sde),
            transition,
            growth,
            coarse(clock) if exact else clock,
            (starts.points, starts.cov, starts.log_weights),
            noise,
            batch_shape,
            scalar,
        )
    if noise is not None:
        raise ValueError(
            "noise_scale goes with normal transitions: use transition='moments', got "
            f"{type(transition).__name__}"
        )
    points, log_weights = starts.points, starts.log_weights
    if isinstance(transition, GuidedParticles):
        return ParticleMixture(sde, points, log_weights, transition, clock, scalar)
    return TransitionMixture(sde, transition, points, log_weights, coarse(clock), scalar)


def with_data_leaves(sde: SDE) -> SDE:
    """The equation with arrays of JAX for parameters: data of a program, not part of it."""
    if sde.inputs is not None:  # whose times are looked at on the host
        return sde
    return cast("SDE", jax.tree.map(jnp.asarray, sde))


@entry_point
def _normal_mixture(
    sde: SDE,
    scheme: GaussianScheme | None,
    growth: Rate | None,
    clock: Clock,
    starts: tuple[Array, Array, Array],
    noise: Array | None,
    batch_shape: tuple[int, ...],
    scalar: bool,
) -> NormalMixture:
    linear: Any = None if scheme is None else scheme.linearizable()
    arrays: list[Any] = [*starts]
    dims: list[Any] = [2, 2, 1]
    if noise is not None:
        arrays.append(noise)
        dims.append(2)
    inside = [jnp.ndim(leaf) for leaf in jax.tree_util.tree_leaves(linear)]
    rates = [jnp.ndim(leaf) for leaf in jax.tree_util.tree_leaves(growth)]

    def one(
        sde: SDE, scheme: Any, growth: Any, points: Array, cov: Array, logs: Array, *noise: Array
    ) -> Any:
        belief = at_snapshots(sde, scheme, growth, clock, points, cov, scalar=scalar)
        tril = factor_of(belief.cov, noise[0] if noise else None)
        masses = logs[None] + belief.log_mass
        masses = masses - jax.nn.logsumexp(masses, axis=-1, keepdims=True)
        return belief.mean, tril, masses

    args = (sde, linear, growth, *arrays)
    every = (sde.leaf_event_dims(), inside, rates, *dims)
    return NormalMixture(*map_batch(one, batch_shape, args, every))
