"""Particle filters on a grid finer than the data.

One filter serves every proposal: particles `(d, M)` move step by step, are weighed where something
is observed, and are resampled there when their effective size falls below a share of their number
(Liu and Chen 1995). Weights stay on the log scale, relative to their mean, whose logarithms add up
to the log likelihood: its exponential is unbiased, look-ahead functions, adaptive resampling and
all (Del Moral 2004, section 7.4; Whiteley and Lee 2014).
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
from numpyro_sde.smc.proposals import (
    PROPOSALS,
    Plan,
    Proposal,
    log_emission,
    observed_rows,
)
from numpyro_sde.smc.resampling import SCHEMES, effective_size, systematic
from numpyro_sde.statespace.checks import check_choice, check_count
from numpyro_sde.statespace.guide import innovation_size
from numpyro_sde.statespace.model import StateSpaceModel
from numpyro_sde.statespace.updates import with_valid_inputs

Resampler = Callable[..., Array]


class Setting(NamedTuple):
    """How a particle filter runs.

    Attributes:
        num_particles: number M of particles.
        proposal: how they move.
        resampler: one of `smc.resampling`'s schemes.
        ess_threshold: share of M below which the effective size calls for resampling; 1 or more
            resamples at every observation.
    """

    num_particles: int
    proposal: Proposal
    resampler: Resampler
    ess_threshold: float


def make_setting(
    num_particles: int,
    proposal: str,
    resampling: str,
    ess_threshold: float,
    *,
    least: int = 1,
    proposals: tuple[str, ...] = tuple(PROPOSALS),
) -> Setting:
    """Check the options of a particle filter and gather them.

    Args:
        num_particles: number of particles.
        proposal: name of a proposal.
        resampling: name of a resampling scheme.
        ess_threshold: share of particles below which the effective size calls for resampling.
        least: least number of particles.
        proposals: names of proposals allowed.

    Raises:
        ValueError: an option out of range.
        TypeError: a count that is no integer.
    """
    check_count("num_particles", num_particles, least)
    check_choice("proposal", proposal, proposals)
    check_choice("resampling", resampling, tuple(SCHEMES))
    if not 0 <= ess_threshold <= 1:
        raise ValueError(f"ess_threshold must be between 0 and 1, got {ess_threshold}")
    return Setting(num_particles, PROPOSALS[proposal](), SCHEMES[resampling], float(ess_threshold))


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
    """

    log_likelihood: Float[Array, ""]
    increments: Any
    ess: Any
    resampled: Any
    variance: Any
    moments: Any
    history: History | None
    last: tuple[Float[Array, "d M"], Float[Array, " M"]]


class Particles(NamedTuple):
    """The state of a filter between two steps."""

    x: Array
    memo: Any
    log_weights: Array
    total: Array  # log of the mean weight, up to what is in log_weights
    roots: Any  # index of each particle's ancestor at the first time


def over_particles(fn: Callable[..., Any], *in_axes: Any) -> Callable[..., Any]:
    """Map a function of one particle over the last axis of those arguments marked -1."""
    return jax.vmap(fn, in_axes=in_axes, out_axes=-1)


def draw_start(
    model: StateSpaceModel, proposal: Proposal, plan: Plan, z: Float[Array, "d M"]
) -> tuple[Float[Array, "d M"], Float[Array, " M"]]:
    """First states and their log ratios; draws that came with the model where it is not normal."""
    if model.starts is not None:
        x = jnp.swapaxes(model.starts, 0, 1).astype(z.dtype)
        return x, jnp.zeros(x.shape[-1], z.dtype)
    return over_particles(partial(proposal.start, model, plan), -1)(z)


def weigh(model: StateSpaceModel, data: Any, x: Float[Array, "d M"]) -> Float[Array, " M"]:
    """Log density of the observations of one time, for each particle."""
    return over_particles(partial(log_emission, model, data), -1)(x)


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
    M, N = setting.num_particles, model.num_times
    proposal = setting.proposal
    plan = proposal.plan(model) if plan is None else plan
    dtype = model.init_mean.dtype
    start_key, move_keys, select_keys = _keys(key, N - 1)
    z0 = normals(start_key, (model.dim + proposal.num_extra, M), dtype)
    x, ratio = draw_start(model, proposal, plan, z0)
    if retained is not None:
        x = x.at[:, 0].set(retained.path[0])
        ratio = ratio.at[0].set(retained.start_ratio)
    observed = np.zeros(N, bool)
    observed[observed_rows(model)] = True
    data = jax.tree.map(jnp.asarray, model.observation_inputs())
    m = innovation_size(model) + proposal.num_extra
    reports = _Reports(diagnose, moments, history, choices=diagnose or history or variance)

    def select(p: Particles, node: Any, chance: Any, lead_to: Any) -> tuple[Particles, Any]:
        way = Way(retained is not None, key.ndim == 1, lead_to)
        return select_particles(model, setting, p, node, chance, way)

    def go_on(p: Particles, *_: Any) -> tuple[Particles, Any]:
        return p, _no_choice(p)

    def normals_from(key: PRNGKeyArray) -> Array:
        return normals(key, (m, M), dtype)

    def step(carry: tuple[Particles, Any], inputs: Any) -> tuple[Any, Any]:
        # Normals are drawn one step ahead and carried: drawn where they are used, the compiler
        # would compute them again for each of their uses.
        p, z = carry
        is_node, is_seen, now, node, later, chance, noise, kept = inputs
        new_ancestors = retained is not None and retained.new_ancestors
        lead_to = (now, kept[0]) if new_ancestors else None
        p, chosen = branch(is_node, observed[:-1], select, go_on)(p, node, chance, lead_to)
        chosen = chosen if reports.choices else None
        z_next = normals_from(noise)
        move = over_particles(partial(proposal.move, model, now), -1, -1, -1)
        x, memo, ratio = move(p.x, p.memo, z)
        if retained is not None:
            x = x.at[:, 0].set(kept[0])
            own = kept[1]
            if new_ancestors:
                own = proposal.ratio(model, now, p.x[:, 0], kept[0])
            ratio = ratio.at[0].set(own)
        p = p._replace(x=x, memo=memo, log_weights=p.log_weights + ratio)
        before = p

        def observe(p: Particles, later: Any) -> Particles:
            return p._replace(log_weights=p.log_weights + weigh(model, later, p.x))

        p = branch(is_seen, observed[1:], observe, lambda p, _: p)(p, later)
        return (p, z_next), (reports.at(before, p), chosen)

    p = Particles(x, None, ratio, jnp.zeros((), dtype), jnp.arange(M) if variance else None)
    first_before = p
    first = jax.tree.map(lambda a: a[0], data)
    if observed[0]:
        p = p._replace(log_weights=p.log_weights + weigh(model, first, p.x))
    nodes = jax.tree.map(lambda a: a[0], plan.nodes)
    p = p._replace(memo=over_particles(partial(proposal.enter, model, nodes), -1)(p.x))
    report = reports.at(first_before, p)
    if N == 1:
        return _finish(p, jax.tree.map(lambda a: a[None], report), None, reports)
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
    (p, _), (rest, chosen) = lax.scan(step, (p, normals_from(move_keys[0])), inputs)
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), report, rest)
    return _finish(p, joined, chosen, reports)


def _keys(key: PRNGKeyArray, steps: int) -> tuple[Any, Any, Any]:
    """Keys of the start, of each step's moves and of each step's resampling."""
    if key.ndim == 0:
        start, moves, choices = jax.random.split(key, 3)
        return start, jax.random.split(moves, steps), jax.random.split(choices, steps)
    stretch = (np.arange(steps) * key.shape[0]) // max(steps, 1)
    own = jax.vmap(jax.random.fold_in)(key[stretch], jnp.arange(1, steps + 1))
    pairs = jax.vmap(jax.random.split)(own)
    return jax.random.fold_in(key[0], 0), pairs[:, 0], pairs[:, 1]


def branch(flag: Any, pattern: np.ndarray, yes: Callable, no: Callable) -> Callable:
    """`yes` where the flag is set; no branch at all where it is the same at every step."""
    if pattern.all():
        return yes
    if not pattern.any():
        return no
    return lambda *args: lax.cond(flag, yes, no, *args)


class _Choice(NamedTuple):
    """What resampling did after a time: ancestors, effective size, whether it happened."""

    ancestors: Array
    ess: Array
    done: Array


def _no_choice(p: Particles) -> _Choice:
    M = p.log_weights.shape[0]
    size = jnp.asarray(float(M), p.log_weights.dtype)
    return _Choice(jnp.arange(M, dtype=jnp.int32), size, jnp.zeros((), bool))


class Way(NamedTuple):
    """How to resample: keeping slot 0, along Hilbert's curve, with a new ancestor for slot 0."""

    conditional: bool
    sort: bool
    lead_to: Any


def select_particles(
    model: StateSpaceModel,
    setting: Setting,
    p: Particles,
    node: Any,
    chance: Any,
    way: Way,
) -> tuple[Particles, _Choice]:
    """Resample where weights times look-ahead are uneven; begin what is carried to the next."""
    proposal, M = setting.proposal, setting.num_particles
    ahead = over_particles(partial(proposal.look_ahead, model, node), -1)(p.x)
    if ahead is not None:
        ahead = jnp.where(jnp.isfinite(ahead), ahead, 0.0)
        ahead = proposal.level(ahead - jnp.max(ahead), p.log_weights)
    weights, level = _weights(p.log_weights if ahead is None else p.log_weights + ahead)
    ess = effective_size(weights)
    mean = level + jnp.log(jnp.mean(weights))
    # After a collapse the run goes on with equal weights and a total of minus infinity.
    offset = jnp.where(jnp.isfinite(mean), mean, 0.0)
    total = p.total + mean

    def resample(p: Particles) -> tuple[Particles, Array]:
        if way.sort:
            order = hilbert_order(p.x)
            ancestors = order[systematic(chance, weights[order])]
        elif way.lead_to is None:
            ancestors = setting.resampler(chance, weights, conditional=way.conditional)
        else:
            # Others are drawn given the new ancestor of slot 0, which takes the first place.
            own_key, others_key = jax.random.split(chance)
            own = _new_ancestor(model, proposal, p, way.lead_to, own_key)
            order = jnp.arange(M).at[0].set(own).at[own].set(0)
            ancestors = order[setting.resampler(others_key, weights[order], conditional=True)]
        after = jnp.zeros(M, weights.dtype) if ahead is None else -ahead[ancestors]
        roots = None if p.roots is None else p.roots[ancestors]
        moved = p._replace(x=p.x[:, ancestors], log_weights=after, roots=roots)
        return moved, ancestors.astype(jnp.int32)

    def keep(p: Particles) -> tuple[Particles, Array]:
        usable = jnp.isfinite(mean)
        centred = jnp.where(usable, clean(p.log_weights) - offset, 0.0)
        return p._replace(log_weights=centred), jnp.arange(M, dtype=jnp.int32)

    if setting.ess_threshold >= 1.0:
        due = jnp.ones((), bool)
        p, ancestors = resample(p)
    else:
        due = ess < setting.ess_threshold * M
        p, ancestors = lax.cond(due, resample, keep, p)
    memo = over_particles(partial(proposal.enter, model, node), -1)(p.x)
    return p._replace(memo=memo, total=total), _Choice(ancestors, ess, due)


def _new_ancestor(
    model: StateSpaceModel, proposal: Proposal, p: Particles, lead_to: Any, key: PRNGKeyArray
) -> Array:
    """Draw which particle the retained path comes from: weight times transition to its next."""
    step, following = lead_to
    t, dt, cache = proposal.grid_step(step)

    def density(x: Array) -> Array:
        return model.scheme.log_density(
            model.sde, t, dt, model.to_state(x), model.to_state(following), cache
        )

    scores = clean(over_particles(density, -1)(p.x) + p.log_weights)
    present = jnp.where(jnp.arange(scores.size) == 0, 0.0, -jnp.inf)
    scores = jnp.where(jnp.isfinite(jnp.max(scores)), scores, present)
    return jax.random.categorical(key, scores)


def clean(log_weights: Array) -> Array:
    """A weight that is not a number is no weight."""
    return jnp.where(jnp.isnan(log_weights), -jnp.inf, log_weights)


def _weights(log_weights: Array) -> tuple[Array, Array]:
    """Weights relative to the largest, and the logarithm of that."""
    log_weights = clean(log_weights)
    top = jnp.max(log_weights)
    level = jnp.where(jnp.isfinite(top), top, 0.0)
    return jnp.exp(log_weights - level), level


def log_mean(log_weights: Array) -> Array:
    """Log of the mean weight."""
    weights, level = _weights(log_weights)
    return level + jnp.log(jnp.mean(weights))


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


def weighted_moments(
    x: Float[Array, "d M"], log_weights: Float[Array, " M"]
) -> tuple[Float[Array, " d"], Float[Array, "d d"]]:
    """Mean and covariance of weighted particles."""
    w, _ = _weights(log_weights)
    w = jnp.where(jnp.sum(w) > 0, w, 1.0)
    w = w / jnp.sum(w)
    mean = x @ w
    centred = x - mean[:, None]
    return mean, (centred * w) @ centred.T


def _finish(p: Particles, kept: dict[str, Any], chosen: Any, reports: _Reports) -> Run:
    M = p.log_weights.shape[0]
    weights, _ = _weights(p.log_weights)
    increments = ess = done = history = None
    first = _no_choice(p)
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
    )


def _variance(weights: Array, roots: Array, num_resampled: Array, M: int) -> Array:
    """Relative variance of the likelihood estimate: Lee and Whiteley (2018), equation 10.

    For multinomial resampling: other schemes tie families' sizes to their weights, which hides
    most of it.
    """
    shares = jnp.zeros(M, weights.dtype).at[roots].add(weights / jnp.sum(weights))
    return 1.0 - (M / (M - 1.0)) ** (num_resampled + 1.0) * (1.0 - jnp.sum(shares**2))
