"""Conditional sequential Monte Carlo: a Markov kernel on paths that keeps their smoothing law.

A particle filter runs with the present path in slot 0, resampling conditionally on its survival;
then a path is drawn backward among all particles, block by block (`smc.backward`). Any number of
particles leaves the law of the path given the data invariant; more of them, better proposals and
backward sampling make it forget its past sooner.

Sources: Andrieu, Doucet and Holenstein (2010), "Particle Markov chain Monte Carlo methods";
Whiteley (2010) (backward sampling); Chopin and Singh (2015); Lindsten, Jordan and Schon (2014)
(ancestor sampling).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from numpyro_sde.smc.backward import Dynamics, blocks_of, choose_piece, make_pool
from numpyro_sde.smc.loop import over_particles
from numpyro_sde.smc.particle_filter import History, Retained, run_filter
from numpyro_sde.smc.proposals import Plan, Proposal, observed_rows
from numpyro_sde.smc.settings import Setting
from numpyro_sde.smc.smoothers import assemble, current_piece, genealogy
from numpyro_sde.statespace.checks import check_choice
from numpyro_sde.statespace.model import StateSpaceModel
from numpyro_sde.statespace.reference import smoothed_reference
from numpyro_sde.statespace.updates import with_valid_inputs

RENEWALS = ("backward", "ancestor", "none")


def check_renewal(model: StateSpaceModel, renewal: str) -> None:
    """Raise a `ValueError` where a way to renew paths does not fit the grid."""
    check_choice("renewal", renewal, RENEWALS)
    unseen = model.num_times - observed_rows(model).size
    if renewal == "ancestor" and unseen:
        raise ValueError(
            f"renewal='ancestor' weighs one step at a time, but {unseen} of {model.num_times} grid "
            "times have no observation: use renewal='backward', which draws bridges"
        )


class Sweep(NamedTuple):
    """One conditional particle filter and the path drawn from it.

    Attributes:
        path: the new path, `(N, d)`.
        renewed: whether the state changed, at each grid time, `(N,)`.
        history: all particles of the run.
        law: the dynamics, for what is to be computed from the history.
        ess: effective sample sizes at each grid time, `(N,)`.
    """

    path: Float[Array, "N d"]
    renewed: Bool[Array, " N"]
    history: History
    law: Dynamics
    ess: Float[Array, " N"]


def retain(
    model: StateSpaceModel, proposal: Proposal, plan: Plan, path: Array, new_ancestors: bool
) -> Retained:
    """The log ratios that a path would have had as a particle."""
    start = proposal.start_ratio(model, plan, path[0])
    return Retained(path, start, proposal.path_ratios(model, plan, path), new_ancestors)


def first_path(model: StateSpaceModel, setting: Setting, key: PRNGKeyArray) -> Float[Array, "N d"]:
    """Draw a path from an unconditional particle filter, to begin with.

    A path from elsewhere, far from all that the proposal makes, may weigh more than everything
    else and be kept for very long.
    """
    filter_key, choice_key = jax.random.split(key)
    run = run_filter(model, setting, filter_key, history=True)
    assert run.history is not None
    scores = run.history.log_weights[-1]
    scores = jnp.where(jnp.isfinite(jnp.max(scores)), scores, 0.0)
    return genealogy(run.history)[jax.random.categorical(choice_key, scores)]


def bridge_reference(model: StateSpaceModel, plan: Plan) -> Float[Array, "N d"]:
    """Path along which bridges are linearised; nothing to linearise where steps are not smooth."""
    if not model.scheme.smooth:
        return jnp.broadcast_to(model.init_mean, (model.num_times, model.dim))
    return smoothed_reference(model) if plan.guide is None else plan.guide.reference


def conditional_smc(
    model: StateSpaceModel,
    setting: Setting,
    path: Float[Array, "N d"],
    key: PRNGKeyArray,
    *,
    renewal: str = "backward",
) -> Sweep:
    """Replace a path by another one of its smoothing law, given the data.

    Args:
        model: the path law and its instruments; its steps must have a density, or with
            renewal="none" innovations that can be read off their ends.
        setting: particles (at least 2), proposal (bootstrap or guided), resampling.
        path: the present path.
        key: random key.
        renewal: "backward" draws the path backward among all particles; "ancestor" gives the path
            new ancestors while the filter runs, for grids of which every time is observed; "none"
            leaves it to the ancestors alone.
    """
    check_renewal(model, renewal)
    model = with_valid_inputs(model)
    filter_key, last_key, back_key = jax.random.split(key, 3)
    proposal = setting.proposal
    plan = proposal.plan(model)
    run = run_filter(
        model,
        setting,
        filter_key,
        diagnose=True,
        history=True,
        retained=retain(model, proposal, plan, path, renewal == "ancestor"),
        plan=plan,
    )
    history = run.history
    assert history is not None
    law = Dynamics.of(model, bridge_reference(model, plan))
    scores = history.log_weights[-1]
    usable = jnp.isfinite(jnp.max(scores))
    last = jax.random.categorical(last_key, jnp.where(usable, scores, 0.0))
    last = jnp.where(usable, last, 0).astype(history.ancestors.dtype)
    if renewal == "backward":
        new = _trace_back(law, history, plan, proposal, last, back_key)
    else:
        new = genealogy(history)[last]
    return Sweep(new, jnp.any(new != path, axis=-1), history, law, run.ess)


def _trace_back(
    law: Dynamics,
    history: History,
    plan: Plan,
    proposal: Proposal,
    last: Array,
    key: PRNGKeyArray,
) -> Float[Array, "N d"]:
    end = history.particles[-1][:, last]
    if len(law.nodes) == 1:
        return end[None]
    blocks, model = blocks_of(law), law.model

    def back(carry: tuple[Array, Array], now: Any) -> tuple[Any, Any]:
        index, end = carry
        block, node, key = now
        piece = current_piece(model, block, history, index, end)
        x = history.particles[block.start]
        ahead = over_particles(partial(proposal.look_ahead, model, node), -1)(x)
        pool = make_pool(x, history.log_weights[block.start], ahead)
        piece, _ = choose_piece(model, block, pool, piece, end, key)
        return (piece.ancestor, piece.start), (piece.start, piece.states)

    keys = jax.random.split(key, len(law.nodes) - 1)
    nodes = jax.tree.map(lambda a: a[jnp.asarray(blocks.start)], plan.nodes)
    _, (starts, states) = lax.scan(back, (last, end), (blocks, nodes, keys), reverse=True)
    return assemble(blocks, law, starts[:, None], states[:, None], end[None])[0]
