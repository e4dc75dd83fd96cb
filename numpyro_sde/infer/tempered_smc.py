"""Adaptive tempered sequential Monte Carlo: the reference carried to the posterior in one batch.

Particles of the reference are weighed by a power of the log ratio, chosen so that the conditional
effective size is a set share of them; resampled; moved by tempered Hamiltonian trajectories whose
step size and scales the particles set (Del Moral, Doucet and Jasra 2006, "Sequential Monte Carlo
samplers"; Zhou, Johansen and Aston 2016 for the conditional effective size; Buchholz, Chopin and
Jacob 2021, "Adaptive tuning of Hamiltonian Monte Carlo within sequential Monte Carlo"). Particles
share ancestors, so that errors are those between independent repeats.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int, PRNGKeyArray
from numpyro.infer.util import constrain_fn

from numpyro_sde.infer.evidence_result import Evidence, EvidenceRound, complain
from numpyro_sde.infer.rotation import (
    Place,
    TemperedModel,
    prior_reference,
    quarter_turn,
    rotate,
)
from numpyro_sde.smc.resampling import systematic

_SHARE = 0.7
_MOVES, _LAST_MOVES = 3, 12
_HALVINGS = 40
_MOST_STAGES = 500
_TARGET_ACCEPT, _GAIN = 0.75, 1.0
_MOST_TURN, _SHORTEST_JITTER, _NARROWEST = 1.2, 0.7, 0.02


class _Batch(NamedTuple):
    """All particles at one inverse temperature."""

    places: Place
    beta: Float[Array, ""]
    log_evidence: Float[Array, ""]
    log_step: Float[Array, ""]
    accept: Float[Array, ""]
    stage: Int[Array, ""]
    key: PRNGKeyArray


def by_smc(
    model: Callable[..., Any],
    args: Any,
    kwargs: Any,
    rng_key: PRNGKeyArray,
    *,
    num_particles: int,
    num_repeats: int,
    num_steps: int,
) -> Evidence:
    """The evidence by tempered sequential Monte Carlo, repeated.

    Raises:
        RuntimeError: a repeat that does not reach the posterior.
    """
    prior_key, run_key = jax.random.split(rng_key)
    centre, reference = prior_reference(model, args, kwargs, prior_key)
    _, back = ravel_pytree(centre)
    tempered = TemperedModel(model, args, kwargs, back, reference, from_prior=True)
    run = jax.jit(partial(_run, tempered, num_particles, num_steps))
    batches = [run(key) for key in jax.random.split(run_key, num_repeats)]
    if any(batch.beta < 1.0 for batch in batches):
        raise RuntimeError(
            f"tempered SMC did not reach the posterior in {_MOST_STAGES} stages: the reference is "
            "too far from it"
        )
    logs = np.array([float(batch.log_evidence) for batch in batches])
    weights = np.exp(logs - logs.max())
    value = float(logs.max() + np.log(weights.mean()))
    error = float("nan")
    if num_repeats > 1:
        error = float(np.std(weights, ddof=1) / (weights.mean() * np.sqrt(num_repeats)))
    accept = min(float(batch.accept) for batch in batches)
    if accept < 0.5:
        complain(f"only {accept:.0%} of moves were accepted at the posterior")
    x = jnp.concatenate([batch.places.x for batch in batches])
    constrain = partial(constrain_fn, model, args, kwargs, return_deterministic=True)
    samples = jax.jit(
        lambda x: jax.lax.map(lambda v: constrain(back(reference.place(v))), x, batch_size=64)
    )(x)
    log_weights = np.repeat(logs, num_particles)
    log_weights = log_weights - log_weights.max()
    return Evidence(
        value,
        error,
        float(num_particles * weights.sum() ** 2 / np.sum(weights**2)),
        float("nan"),
        dict(samples),
        log_weights - np.log(np.sum(np.exp(log_weights))),
        tuple(EvidenceRound(float(v), float("nan"), float(num_particles)) for v in logs),
        num_particles,
        None,
        "smc",
    )


def _run(tempered: TemperedModel, count: int, num_steps: int, key: PRNGKeyArray) -> _Batch:
    """One repeat; compiled once for a model."""
    like = tempered.reference.loc
    key, start_key = jax.random.split(key)
    x = jax.random.normal(start_key, (count, like.size), like.dtype)
    zero = jnp.zeros((), like.dtype)
    look = partial(tempered.look, level=tempered.level(zero))
    first = _Batch(
        jax.vmap(look)(x),
        zero,
        zero,
        jnp.log(quarter_turn(num_steps)) + zero,
        zero,
        jnp.zeros((), int),
        key,
    )

    def goes_on(batch: _Batch) -> Array:
        return (batch.beta < 1.0) & (batch.stage < _MOST_STAGES)

    return jax.lax.while_loop(goes_on, partial(_stage, tempered, num_steps), first)


def _stage(tempered: TemperedModel, num_steps: int, batch: _Batch) -> _Batch:
    """Weigh, resample, carry to the coordinates of the next level, move there."""
    ratios, count = batch.places.log_ratio, batch.places.x.shape[0]
    gained = _increment(ratios, batch.beta)
    beta = jnp.where(gained >= 1.0 - batch.beta, 1.0, batch.beta + gained)
    logs = (beta - batch.beta) * ratios
    key, pick_key, move_key = jax.random.split(batch.key, 3)
    index = systematic(pick_key, jax.nn.softmax(logs))
    now, new = tempered.level(batch.beta), tempered.level(beta)
    target = partial(tempered.look, level=new)
    x = jax.vmap(lambda x: tempered.carry(x, now, new))(batch.places.x[index])
    places = jax.vmap(target)(x)
    spread = jnp.std(places.x, axis=0)
    scale = jnp.clip(spread, _NARROWEST, 1.0)
    most = jnp.log(_MOST_TURN * quarter_turn(num_steps))

    def sweep(i: Array, now: tuple[Place, Array, Array]) -> tuple[Place, Array, Array]:
        places, log_step, _ = now
        jitter_key, key = jax.random.split(jax.random.fold_in(move_key, i))
        jitter = jax.random.uniform(jitter_key, (), log_step.dtype, _SHORTEST_JITTER, 1.0)
        move = partial(rotate, target, num_steps)
        step = jnp.exp(log_step) * jitter
        moved, accept = jax.vmap(lambda p, k: move(p, beta, step, scale, k))(
            places, jax.random.split(key, count)
        )
        accept = jnp.mean(accept)
        log_step = jnp.minimum(log_step + _GAIN * (accept - _TARGET_ACCEPT), most)
        return moved, log_step, accept

    moves = jnp.where(beta < 1.0, _MOVES, _LAST_MOVES)
    places, log_step, accept = jax.lax.fori_loop(
        0, moves, sweep, (places, batch.log_step, batch.accept)
    )
    gain = logsumexp(logs) - jnp.log(count)
    return _Batch(
        places,
        beta,
        batch.log_evidence + gain.astype(logs.dtype),
        log_step,
        accept,
        batch.stage + 1,
        key,
    )


def _increment(ratios: Float[Array, " N"], beta: Float[Array, ""]) -> Float[Array, ""]:
    """The step in inverse temperature that leaves the wanted share of effective particles."""

    def effective(step: Array) -> Array:
        logs = step * ratios
        return jnp.exp(2.0 * logsumexp(logs) - logsumexp(2.0 * logs)) / ratios.shape[0]

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        # Between logs: steps from a reference far off are many orders below one.
        middle = jnp.exp(0.5 * (jnp.log(low) + jnp.log(high)))
        fine = effective(middle) >= _SHARE
        return jnp.where(fine, middle, low), jnp.where(fine, high, middle)

    rest = 1.0 - beta
    low, _ = jax.lax.fori_loop(0, _HALVINGS, halve, (1e-12 * jnp.ones_like(rest), rest))
    return jnp.where(effective(rest) >= _SHARE, rest, low)
