"""Propagate, weigh, select: the one loop that every particle algorithm here runs.

A `Loop` holds a model, a setting and what the proposal has planned, and takes the particles
`(d, M)` of one time to the next: `start`, then `observe` and `enter`; for each grid step `select`
(where something was observed), `move`, `observe`. Filters, conditional filters and smoothers that
run along (`smc.particle_filter`, `smc.conditional`, `smc.online`) differ in what they note on the
way. Weights stay on the log scale, relative to their mean, whose logarithms add up to the log
likelihood: its exponential is unbiased, look-ahead functions, adaptive resampling and all (Del
Moral 2004, section 7.4; Whiteley and Lee 2014).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from numpyro_sde.smc.hilbert import hilbert_order
from numpyro_sde.smc.normals import normals
from numpyro_sde.smc.proposals import Plan
from numpyro_sde.smc.resampling import effective_size, systematic
from numpyro_sde.smc.settings import Setting
from numpyro_sde.statespace.guide import innovation_size, log_emission
from numpyro_sde.statespace.model import StateSpaceModel

# A step round the unit circle that spreads points evenly, however many.
_GOLDEN = 0.5 * (5.0**0.5 - 1.0)
# Look-ahead functions go so many nats below their largest value.
_LEAST_AHEAD = 1e4
# Innovations further out than this have lost the digits that their weight is made of.
_FURTHEST = {np.dtype(np.float64): 1e4, np.dtype(np.float32): 1e3}


class Particles(NamedTuple):
    """Particles between two steps.

    Attributes:
        x: states, `(d, M)`.
        memo: what each carries from one observed time to the next.
        log_weights: log weights, `(M,)`.
        total: log of the mean weight, up to what is in `log_weights`.
        roots: index of each particle's ancestor at the first time, or None.
    """

    x: Float[Array, "d M"]
    memo: Any
    log_weights: Float[Array, " M"]
    total: Float[Array, ""]
    roots: Any = None


class Choice(NamedTuple):
    """What resampling did after a time.

    Attributes:
        ancestors: index of each slot's ancestor, `(M,)`.
        ess: effective size of the weights.
        done: whether particles were resampled.
        weights: the weights by which they were, `(M,)`.
    """

    ancestors: Int[Array, " M"]
    ess: Float[Array, ""]
    done: Array
    weights: Any = None


class Way(NamedTuple):
    """How to resample: keeping slot 0, along Hilbert's curve, with a new ancestor for slot 0."""

    conditional: bool = False
    sort: bool = False
    lead_to: Any = None


def over_particles(fn: Callable[..., Any], *in_axes: Any) -> Callable[..., Any]:
    """Map a function of one particle over the last axis of those arguments marked -1."""
    return jax.vmap(fn, in_axes=in_axes, out_axes=-1)


class Loop(NamedTuple):
    """One step after another of a particle algorithm.

    Attributes:
        model: the path and its instruments.
        setting: particles, proposal, resampling.
        plan: what the proposal computed for this model.
    """

    model: StateSpaceModel
    setting: Setting
    plan: Plan

    @classmethod
    def of(cls, model: StateSpaceModel, setting: Setting, plan: Plan | None = None) -> Loop:
        """Choose the proposal by the model, and make the plan where there is none."""
        setting = setting.for_model(model)
        return cls(model, setting, setting.proposal.plan(model) if plan is None else plan)

    def start(self, key: PRNGKeyArray) -> tuple[Float[Array, "d M"], Float[Array, " M"]]:
        """First states and log ratios; draws that came with the model where it is not normal."""
        model, dtype = self.model, self.model.init_mean.dtype
        if model.starts is not None:
            x = jnp.swapaxes(model.starts, 0, 1).astype(dtype)
            return x, jnp.zeros(x.shape[-1], dtype)
        start = partial(self.setting.proposal.start, model, self.plan)
        return over_particles(start, -1)(self._numbers(key, model.dim, spread=False))

    def numbers(self, key: PRNGKeyArray, *, spread: bool = True) -> Float[Array, "m M"]:
        """What one step needs for each particle: normals, and uniform numbers below them.

        Args:
            key: random key.
            spread: whether the uniform numbers of different particles are spread evenly, each
                still uniform: shares that they decide are then met to one particle. Not for
                conditional filters, where particles must be independent of the retained one.
        """
        return self._numbers(key, innovation_size(self.model), spread=spread)

    def _numbers(self, key: PRNGKeyArray, size: int, *, spread: bool) -> Array:
        M, extra, dtype = self.setting.num_particles, self.setting.proposal.num_extra, self._dtype
        if not extra:
            return normals(key, (size, M), dtype)
        normal_key, key = jax.random.split(key)
        if spread:
            u = jax.random.uniform(key, (extra, 1), dtype)
            u = u + _GOLDEN * jnp.arange(M, dtype=dtype)[None]
            u = u - jnp.floor(u)
        else:
            u = jax.random.uniform(key, (extra, M), dtype)
        return jnp.concatenate([normals(normal_key, (size, M), dtype), u])

    @property
    def _dtype(self) -> Any:
        return self.model.init_mean.dtype

    def observe(self, p: Particles, data: Any) -> Particles:
        """Weigh by the observations of one time: their inputs, values and presence."""
        return p._replace(log_weights=p.log_weights + weigh(self.model, data, p.x))

    def enter(self, p: Particles, node: Any) -> Particles:
        """Begin what particles carry from this time to the next observed one."""
        enter = partial(self.setting.proposal.enter, self.model, node)
        return p._replace(memo=over_particles(enter, -1)(p.x))

    def look_ahead(self, x: Float[Array, "d M"], node: Any) -> Any:
        """Log of the function by which particles are favoured, or None."""
        return over_particles(partial(self.setting.proposal.look_ahead, self.model, node), -1)(x)

    def move(self, p: Particles, step: Any, z: Float[Array, "m M"]) -> Particles:
        """Move over one grid step; a particle whose weight has lost its digits gets none."""
        move = partial(self.setting.proposal.move, self.model, step)
        x, memo, ratio = over_particles(move, -1, -1, -1)(p.x, p.memo, z)
        furthest = _FURTHEST.get(np.dtype(ratio.dtype), 1e2)
        sound = jnp.all(jnp.isfinite(x), axis=0) & (jnp.abs(ratio) < 0.5 * furthest**2)
        ratio = jnp.where(sound, ratio, -jnp.inf)
        return p._replace(x=x, memo=memo, log_weights=p.log_weights + ratio)

    def select(
        self, p: Particles, node: Any, key: PRNGKeyArray, way: Way
    ) -> tuple[Particles, Choice]:
        """Resample where weights times look-ahead are uneven; begin what is carried on."""
        setting, M = self.setting, self.setting.num_particles
        ahead = self.look_ahead(p.x, node)
        if ahead is not None:
            ahead = setting.proposal.level(_relative(ahead, p.log_weights), p.log_weights)
        weights, level = relative_weights(p.log_weights if ahead is None else p.log_weights + ahead)
        ess = effective_size(weights)
        mean = level + jnp.log(jnp.mean(weights))

        def resample(p: Particles) -> tuple[Particles, Array]:
            ancestors = self._ancestors(p, weights, key, way)
            after = jnp.zeros(M, weights.dtype) if ahead is None else -ahead[ancestors]
            roots = None if p.roots is None else p.roots[ancestors]
            moved = p._replace(x=p.x[:, ancestors], log_weights=after, roots=roots)
            return moved, ancestors.astype(jnp.int32)

        def keep(p: Particles) -> tuple[Particles, Array]:
            # After a collapse the run goes on with equal weights and a total of minus infinity.
            usable = jnp.isfinite(mean)
            centred = clean(p.log_weights) - jnp.where(usable, mean, 0.0)
            kept = p._replace(log_weights=jnp.where(usable, centred, 0.0))
            return kept, jnp.arange(M, dtype=jnp.int32)

        total = p.total + mean
        if setting.ess_threshold >= 1.0:
            due = jnp.ones((), bool)
            p, ancestors = resample(p)
        else:
            due = ess < setting.ess_threshold * M
            p, ancestors = lax.cond(due, resample, keep, p)
        return self.enter(p, node)._replace(total=total), Choice(ancestors, ess, due, weights)

    def _ancestors(self, p: Particles, weights: Array, key: PRNGKeyArray, way: Way) -> Array:
        resampler = self.setting.resampler
        if way.sort:
            order = hilbert_order(p.x)
            return order[systematic(key, weights[order])]
        if way.lead_to is None:
            # A scheme that a user wrote need not know of conditional filters.
            return (
                resampler(key, weights, conditional=True)
                if way.conditional
                else resampler(key, weights)
            )
        # Others are drawn given the new ancestor of slot 0, which takes the first place.
        own_key, others_key = jax.random.split(key)
        own = self._new_ancestor(p, way.lead_to, own_key)
        order = jnp.arange(weights.shape[0]).at[0].set(own).at[own].set(0)
        return order[resampler(others_key, weights[order], conditional=True)]

    def _new_ancestor(self, p: Particles, lead_to: Any, key: PRNGKeyArray) -> Array:
        """Draw which particle the retained path comes from: weight times transition to its next."""
        (step, following), model = lead_to, self.model
        t, dt, cache = self.setting.proposal.grid_step(step)

        def density(x: Array) -> Array:
            return model.scheme.log_density(
                model.sde, t, dt, model.to_state(x), model.to_state(following), cache
            )

        scores = clean(over_particles(density, -1)(p.x) + p.log_weights)
        present = jnp.where(jnp.arange(scores.size) == 0, 0.0, -jnp.inf)
        scores = jnp.where(jnp.isfinite(jnp.max(scores)), scores, present)
        return jax.random.categorical(key, scores)


def _relative(ahead: Float[Array, " M"], log_weights: Float[Array, " M"]) -> Float[Array, " M"]:
    """Look-ahead relative to the largest of a particle that has weight, and not far below it.

    Any positive function will do, but its logarithm is subtracted again: one particle without
    weight that has run off the range of numbers must not take the digits of all others.
    """
    alive = jnp.isfinite(log_weights) & jnp.isfinite(ahead)
    base = jnp.max(jnp.where(alive, ahead, -jnp.inf))
    base = jnp.where(jnp.isfinite(base), base, 0.0)
    return jnp.clip(jnp.where(jnp.isfinite(ahead), ahead, base) - base, -_LEAST_AHEAD, 0.0)


def weigh(model: StateSpaceModel, data: Any, x: Float[Array, "d M"]) -> Float[Array, " M"]:
    """Log density of the observations of one time, for each particle."""
    return over_particles(partial(log_emission, model, data), -1)(x)


def no_choice(p: Particles) -> Choice:
    """What resampling did where it was not called for."""
    M = p.log_weights.shape[0]
    even = jnp.ones(M, p.log_weights.dtype)
    size = jnp.asarray(float(M), even.dtype)
    return Choice(jnp.arange(M, dtype=jnp.int32), size, jnp.zeros((), bool), even)


def branch(flag: Any, pattern: np.ndarray, yes: Callable, no: Callable) -> Callable:
    """`yes` where the flag is set; no branch at all where it is the same at every step."""
    if pattern.all():
        return yes
    if not pattern.any():
        return no
    return lambda *args: lax.cond(flag, yes, no, *args)


def clean(log_weights: Array) -> Array:
    """A weight that is not a number is no weight."""
    return jnp.where(jnp.isnan(log_weights), -jnp.inf, log_weights)


def relative_weights(log_weights: Array) -> tuple[Array, Array]:
    """Weights relative to the largest, and the logarithm of that."""
    log_weights = clean(log_weights)
    top = jnp.max(log_weights)
    level = jnp.where(jnp.isfinite(top), top, 0.0)
    return jnp.exp(log_weights - level), level


def log_mean(log_weights: Array) -> Array:
    """Log of the mean weight."""
    weights, level = relative_weights(log_weights)
    return level + jnp.log(jnp.mean(weights))


def weighted_moments(
    x: Float[Array, "d M"], log_weights: Float[Array, " M"]
) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
    """Mean and covariance of weighted particles."""
    w, _ = relative_weights(log_weights)
    w = jnp.where(jnp.sum(w) > 0, w, 1.0)
    w = w / jnp.sum(w)
    mean = x @ w
    centred = x - mean[:, None]
    return mean, (centred * w[None]) @ centred.T
