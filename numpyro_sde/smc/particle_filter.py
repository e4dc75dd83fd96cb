"""Particle filters on a grid finer than the data.

One filter serves every proposal: particles `(d, M)` move step by step, are weighed where something
is observed, and are resampled there when their effective size falls below a share of their number
(Liu and Chen 1995). The steps are those of `smc.loop`; here is what a run notes of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from numpyro_sde.smc.loop import (
    Choice,
    Loop,
    Particles,
    Way,
    branch,
    clean,
    log_mean,
    no_choice,
    relative_weights,
    weighted_moments,
)
from numpyro_sde.smc.proposals import Plan, observed_rows
from numpyro_sde.smc.resampling import effective_size
from numpyro_sde.smc.settings import Setting
from numpyro_sde.statespace.model import StateSpaceModel
from numpyro_sde.statespace.updates import with_valid_inputs


class Retained(NamedTuple):
    """The path that conditional sequential Monte Carlo keeps in slot 0.

    Attributes:
        path: states, `(N, d)`.
        start_ratio: log ratio of the first state's law to the proposal's.
        ratios: log ratio of each step's law to the proposal's, `(N - 1,)`.
        new_ancestors: whether the path draws a new ancestor wherever particles are resampled
            (Lindsten, Jordan and Schon 2014); its ratios are then found while the filter runs.
    """

    path: Float[Array, "N d"]
    start_ratio: Float[Array, ""]
    ratios: Float[Array, " N-1"]
    new_ancestors: bool = False


class History(NamedTuple):
    """Particles at all grid times.

    Attributes:
        particles: states, `(N, d, M)`.
        log_weights: log weights for the law of the state given the data so far, relative to
            their mean, `(N, M)`.
        ancestors: index at the time before of each particle's ancestor, `(N - 1, M)`.
    """

    particles: Float[Array, "N d M"]
    log_weights: Float[Array, "N M"]
    ancestors: Int[Array, "N-1 M"]


class Run(NamedTuple):
    """What a particle filter returns.

    Attributes:
        log_likelihood: log of the unbiased estimate of the likelihood; minus infinity where all
            particles have weight zero.
        increments: terms of it at each grid time, `(N,)`, or None.
        ess: effective sample sizes of the weights by which particles are resampled, `(N,)`, or
            None; the number of particles where nothing is observed.
        resampled: whether particles were resampled after each time, `(N,)`, or None.
        variance: estimate of the relative variance of the likelihood estimate (Lee and Whiteley
            2018, from the particles' ancestors at the first time), or None; for multinomial
            resampling only.
        moments: means `(N, d)` and covariances `(N, d, d)` before and after the observation at
            each time, or None.
        history: all particles, or None.
        last: the particles at the last time, `(d, M)`, and their log weights, `(M,)`.
        poorest: index of the time of the smallest effective size, and the weights there, or None.
    """

    log_likelihood: Float[Array, ""]
    increments: Any
    ess: Any
    resampled: Any
    variance: Any
    moments: Any
    history: History | None
    last: tuple[Float[Array, "d M"], Float[Array, " M"]]
    poorest: Any = None


def run_filter(
    model: StateSpaceModel,
    setting: Setting,
    key: PRNGKeyArray,
    *,
    diagnose: bool = False,
    moments: bool = False,
    history: bool = False,
    variance: bool = False,
    retained: Retained | None = None,
    plan: Plan | None = None,
) -> Run:
    """Run a particle filter over the grid.

    Args:
        model: the path and its instruments.
        setting: particles, proposal, resampling.
        key: random key; or keys `(B,)`, one for each of B stretches of time, with systematic
            resampling in the order of `hilbert_order`: estimates that share most keys are then
            close (Tran, Kohn, Quiroz and Villani 2016, "The block pseudo-marginal sampler").
        diagnose: whether to give increments and effective sizes.
        moments: whether to give moments at each time.
        history: whether to keep all particles (memory of N M d numbers).
        variance: whether to estimate the variance of the log likelihood.
        retained: a path that slot 0 keeps (conditional sequential Monte Carlo).
        plan: what the proposal has planned for this model already.
    """
    model = with_valid_inputs(model)
    N, dtype = model.num_times, model.init_mean.dtype
    loop = Loop.of(model, setting, plan)
    setting, plan, spread = loop.setting, loop.plan, retained is None
    start_key, move_keys, select_keys = _keys(key, N - 1)
    x, ratio = loop.start(start_key)
    if retained is not None:
        x = x.at[:, 0].set(retained.path[0])
        ratio = ratio.at[0].set(retained.start_ratio)
    observed = np.zeros(N, bool)
    observed[observed_rows(model)] = True
    data = jax.tree.map(jnp.asarray, model.observation_inputs())
    reports = _Reports(diagnose, moments, history, choices=diagnose or history or variance)
    new_ancestors = retained is not None and retained.new_ancestors

    def select(p: Particles, node: Any, chance: Any, lead_to: Any) -> tuple[Particles, Any]:
        return loop.select(p, node, chance, Way(retained is not None, key.ndim == 1, lead_to))

    def go_on(p: Particles, *_: Any) -> tuple[Particles, Any]:
        return p, no_choice(p)

    def keep(before: Particles, p: Particles, now: Any, kept: Any) -> Particles:
        """Slot 0 has the retained path, and the ratio that it would have had as a particle."""
        own = kept[1]
        if new_ancestors:
            own = setting.proposal.ratio(model, now, before.x[:, 0], kept[0])
        log_weights = p.log_weights.at[0].set(before.log_weights[0] + own)
        return p._replace(x=p.x.at[:, 0].set(kept[0]), log_weights=log_weights)

    def step(carry: tuple[Particles, Array, Any], inputs: Any) -> tuple[Any, Any]:
        # Normals are drawn one step ahead and carried: drawn where they are used, the compiler
        # would compute them again for each of their uses.
        p, z, poorest = carry
        is_node, is_seen, now, node, later, chance, noise, kept = inputs
        lead_to = (now, kept[0]) if new_ancestors else None
        p, chosen = branch(is_node, observed[:-1], select, go_on)(p, node, chance, lead_to)
        poorest = _poorer(poorest, chosen)
        chosen = chosen._replace(weights=None) if reports.choices else None
        z_next = loop.numbers(noise, spread=spread)
        moved = loop.move(p, now, z)
        if retained is not None:
            moved = keep(p, moved, now, kept)
        p = branch(is_seen, observed[1:], loop.observe, lambda p, _: p)(moved, later)
        return (p, z_next, poorest), (reports.at(moved, p), chosen)

    roots = jnp.arange(setting.num_particles) if variance else None
    first = Particles(x, None, ratio, jnp.zeros((), dtype), roots)
    p = loop.observe(first, jax.tree.map(lambda a: a[0], data)) if observed[0] else first
    p = loop.enter(p, jax.tree.map(lambda a: a[0], plan.nodes))
    report = reports.at(first, p)
    if N == 1:
        return _finish(p, jax.tree.map(lambda a: a[None], report), None, reports, None)
    inputs = (
        jnp.asarray(observed[:-1]),
        jnp.asarray(observed[1:]),
        plan.steps,
        jax.tree.map(lambda a: a[:-1], plan.nodes),
        jax.tree.map(lambda a: a[1:], data),
        select_keys,
        jnp.roll(move_keys, -1),
        None if retained is None else (retained.path[1:], retained.ratios),
    )
    zero = jnp.zeros((), int)
    poorest = (zero, zero, no_choice(p)) if diagnose else None
    carry = (p, loop.numbers(move_keys[0], spread=spread), poorest)
    (p, _, poorest), (rest, chosen) = lax.scan(step, carry, inputs)
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), report, rest)
    return _finish(p, joined, chosen, reports, poorest)


def _poorer(poorest: Any, chosen: Choice) -> Any:
    """Keep of two choices that of the smaller effective size, and when it was."""
    if poorest is None:
        return None
    k, now, least = poorest
    worse = chosen.ess < least.ess
    kept = jax.tree.map(lambda a, b: jnp.where(worse, a, b), chosen, least)
    return jnp.where(worse, now, k), now + 1, kept


def _keys(key: PRNGKeyArray, steps: int) -> tuple[Any, Any, Any]:
    """Keys of the start, of each step's moves and of each step's resampling."""
    if key.ndim == 0:
        start, moves, choices = jax.random.split(key, 3)
        return start, jax.random.split(moves, steps), jax.random.split(choices, steps)
    stretch = (np.arange(steps) * key.shape[0]) // max(steps, 1)
    own = jax.vmap(jax.random.fold_in)(key[stretch], jnp.arange(1, steps + 1))
    pairs = jax.vmap(jax.random.split)(own)
    return jax.random.fold_in(key[0], 0), pairs[:, 0], pairs[:, 1]


class _Reports:
    """What is kept of each time."""

    def __init__(self, diagnose: bool, moments: bool, history: bool, choices: bool) -> None:
        self.diagnose, self.moments, self.history = diagnose, moments, history
        self.choices = choices

    def at(self, before: Particles, after: Particles) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        if self.diagnose:
            kept["level"] = after.total + log_mean(after.log_weights)
        if self.moments:
            kept["moments"] = (
                *weighted_moments(before.x, before.log_weights),
                *weighted_moments(after.x, after.log_weights),
            )
        if self.history:
            kept["history"] = (after.x, clean(after.log_weights))
        return kept


def _finish(
    p: Particles, kept: dict[str, Any], chosen: Any, reports: _Reports, poorest: Any
) -> Run:
    M = p.log_weights.shape[0]
    weights, _ = relative_weights(p.log_weights)
    increments = ess = done = history = None
    first = no_choice(p)._replace(weights=None)
    if chosen is None:
        chosen = jax.tree.map(lambda a: a[None][:0], first)
    if reports.diagnose:
        levels = kept["level"]
        before = jnp.concatenate([jnp.zeros(1, levels.dtype), levels[:-1]])
        # Minus infinity stays: what comes after a collapse adds nothing.
        increments = jnp.where(jnp.isfinite(before), levels - before, 0.0)
        # The choice after the last time is never made.
        ess = jnp.concatenate([chosen.ess, effective_size(weights)[None]])
        done = jnp.concatenate([chosen.done, first.done[None]])
    if reports.history:
        particles, log_weights = kept["history"]
        history = History(particles, log_weights, chosen.ancestors)
    variance = None
    if p.roots is not None:
        variance = _variance(weights, p.roots, jnp.sum(chosen.done), M)
    return Run(
        p.total + log_mean(p.log_weights),
        increments,
        ess,
        done,
        variance,
        kept.get("moments"),
        history,
        (p.x, clean(p.log_weights)),
        _poorest_of_all(poorest, weights) if reports.diagnose else None,
    )


def _poorest_of_all(poorest: Any, weights: Array) -> tuple[Array, Array]:
    """The last time's weights are among the candidates."""
    if poorest is None:
        return jnp.zeros((), int), weights
    k, last, least = poorest
    worse = effective_size(weights) < least.ess
    return jnp.where(worse, last, k), jnp.where(worse, weights, least.weights)


def _variance(weights: Array, roots: Array, num_resampled: Array, M: int) -> Array:
    """Relative variance of the likelihood estimate: Lee and Whiteley (2018), equation 10.

    For multinomial resampling: other schemes tie families' sizes to their weights, which hides
    most of it.
    """
    shares = jnp.zeros(M, weights.dtype).at[roots].add(weights / jnp.sum(weights))
    return 1.0 - (M / (M - 1.0)) ** (num_resampled + 1.0) * (1.0 - jnp.sum(shares**2))
