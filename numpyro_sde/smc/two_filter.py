"""Two-filter smoothing: particles that run forward joined to particles that run backward.

The likelihood of the later observations is no law of the state, so it is multiplied by an
artificial one: here the normal law with the moments that the forward particles predict. Backward
particles are drawn from the backward kernels of the linearised model with those moments, with the
diffusion of the state that they come from, and weighed exactly, so that any artificial law leaves
the result consistent: for linear models they already have nearly the smoothing law. At an observed
time their artificial law is divided out and replaced by the law that the forward particles of the
grid time before predict, a sum over all of them. At linear cost, states there are drawn between a
forward particle of the grid time before and a backward one of the time after, paired at random.

Sources: Briers, Doucet and Maskell (2010), "Smoothing algorithms for state-space models"
(generalised two-filter smoothing, artificial laws); Fearnhead, Wyncoll and Tawn (2010), "A
sequential smoothing algorithm with linear computational cost" (normal ones from a filter).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from numpyro_sde.linear.information import guided_innovations, log_weight
from numpyro_sde.linear.small import (
    cholesky,
    diagonal,
    matmul,
    matvec,
    psd_factor,
    solve_lower,
    spd_solve,
    symmetrize,
    transpose,
)
from numpyro_sde.smc.loop import (
    branch,
    clean,
    over_particles,
    weigh,
    weighted_moments,
)
from numpyro_sde.smc.normals import normals
from numpyro_sde.smc.particle_filter import History, run_filter
from numpyro_sde.smc.proposals import move_by, observed_rows
from numpyro_sde.smc.resampling import effective_size, multinomial
from numpyro_sde.smc.settings import Setting
from numpyro_sde.statespace.guide import (
    affine_step,
    information_at,
    innovation_size,
    linearize_step,
    log_emission,
)
from numpyro_sde.statespace.model import StateSpaceModel
from numpyro_sde.statespace.updates import with_valid_inputs

# Standard deviations of artificial laws, and of filtered ones in backward proposals, are those of
# the particles times this: laws wider than the target keep weights small in the tails.
_SPREAD = 1.2
JOINS = ("all", "pairs")
_JOINED_AT_ONCE = 64


class TwoFilterResult(NamedTuple):
    """Smoothed marginals at the observed times, the first and the last.

    Attributes:
        rows: grid indices of these times, `(K,)`.
        mean: smoothed means, `(K, d)`.
        cov: smoothed covariances, `(K, d, d)`.
        particles: weighted particles of each marginal, `(K, M, d)`.
        log_weights: their normalised log weights, `(K, M)`.
        ess: effective sample sizes of these weights, `(K,)`.
    """

    rows: Int[Array, " K"]
    mean: Float[Array, "K d"]
    cov: Float[Array, "K d d"]
    particles: Float[Array, "K M d"]
    log_weights: Float[Array, "K M"]
    ess: Float[Array, " K"]


class _Gaussians(NamedTuple):
    """Normal laws with the moments of the forward particles at each grid time.

    Attributes:
        ahead: means given earlier data, of the artificial laws, `(N, d)`.
        ahead_factor: factors of their widened covariances, `(N, d, d)`.
        mean: means given the data of their own time too, `(N, d)`.
        cov: their widened covariances, `(N, d, d)`.
    """

    ahead: Array
    ahead_factor: Array
    mean: Array
    cov: Array


def _gaussians(moments: Any) -> _Gaussians:
    ahead, ahead_cov, mean, cov = moments
    factor = _SPREAD * jax.vmap(psd_factor)(ahead_cov)
    return _Gaussians(ahead, factor, mean, _SPREAD**2 * cov)


def _log_normal(x: Array, mean: Array, factor: Array) -> Array:
    white = solve_lower(factor, (x - mean)[:, None])[:, 0]
    size = 0.5 * x.shape[0] * np.log(2.0 * np.pi)
    return -0.5 * jnp.sum(white**2) - jnp.sum(jnp.log(diagonal(factor))) - size


def _density(model: StateSpaceModel, step: Any, x: Array, following: Array) -> Array:
    t, dt, cache = step
    return model.scheme.log_density(
        model.sde, t, dt, model.to_state(x), model.to_state(following), cache
    )


def _skip_data(k: Any, log_weights: Array, x: Array) -> Array:
    del k, x
    return log_weights


def _skip_join(
    k: Any, later: Any, x: Array, log_weights: Array, key: PRNGKeyArray
) -> tuple[Array, Array]:
    del k, later, key
    return x, log_weights


def _skip_choice(x: Array, log_weights: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
    del key
    return x, log_weights


def _draw_back(
    model: StateSpaceModel, step: Any, belief: Any, following: Array, z: Array
) -> tuple[Array, Array]:
    """Draw a state given the next one, filtered moments and the linearised step; log density."""
    t, dt, cache = step
    mean, cov = belief
    A, miss, _ = linearize_step(model, step, mean, following)
    # The diffusion where the next state is: on a fine grid another one would be told apart from
    # the true one at every step.
    _, B = affine_step(model, t, dt, following, cache)
    Q = jnp.diag(B**2) if B.ndim == 1 else matmul(B, transpose(B))
    AP = matmul(A, cov)
    gain = transpose(spd_solve(symmetrize(matmul(AP, transpose(A)) + Q), AP))
    rest = jnp.eye(mean.shape[0], dtype=mean.dtype) - matmul(gain, A)
    kept = matmul(matmul(rest, cov), transpose(rest))
    factor = cholesky(symmetrize(kept + matmul(matmul(gain, Q), transpose(gain))))
    centre = mean - matvec(gain, miss)
    x = centre + matvec(factor, z)
    return x, _log_normal(x, centre, factor)


def _join(
    model: StateSpaceModel, step: Any, forward: tuple[Array, Array], x: Float[Array, "d M"]
) -> Float[Array, " M"]:
    """Log density that weighted forward particles predict at some states."""
    states, log_weights = forward

    def one(x: Array) -> Array:
        terms = over_particles(lambda before: _density(model, step, before, x), -1)(states)
        return jax.nn.logsumexp(clean(terms + log_weights))

    return lax.map(one, x.T, batch_size=_JOINED_AT_ONCE)


def _draw_between(
    model: StateSpaceModel, steps: Any, data: Any, before: Array, after: Array, z: Array
) -> tuple[Array, Array]:
    """Draw a state given the one before it, the one after it and its own data; log weight."""
    first, second = steps
    t, dt, cache = first
    mean, B = affine_step(model, t, dt, before, cache)
    A, miss, B_next = linearize_step(model, second, mean, after)
    Q = jnp.diag(B_next**2) if B_next.ndim == 1 else matmul(B_next, transpose(B_next))
    white = solve_lower(cholesky(Q), jnp.concatenate([A, -miss[:, None]], axis=1))
    half = transpose(white[:, :-1])
    J, s = information_at(model, data, mean)
    H, e = J + matmul(half, white[:, :-1]), s + matvec(half, white[:, -1])
    w, log_det = guided_innovations(H, e, jnp.zeros_like(mean), B, z)
    x = move_by(model, first, before, (mean, B), w)
    fit = log_emission(model, data, x) + _density(model, second, x, after)
    return x, log_weight(w, z, log_det) + fit


def two_filter(
    model: StateSpaceModel, setting: Setting, key: PRNGKeyArray, *, join: str = "all"
) -> TwoFilterResult:
    """Run a particle filter forward, another one backward, and join them at the observed times.

    Args:
        model: the path and its instruments; its steps must have a density.
        setting: particles of either filter, proposal of the forward one, resampling.
        key: random key.
        join: "all" weighs backward particles by all forward ones, "pairs" draws states between
            forward and backward particles paired at random, at linear cost.
    """
    model = with_valid_inputs(model)
    forward_key, key = jax.random.split(key)
    run = run_filter(model, setting, forward_key, history=True, moments=True)
    history = run.history
    assert history is not None
    seen = observed_rows(model)
    nodes = np.unique(np.concatenate([[0, model.num_times - 1], seen]))
    log_weights = jax.nn.log_softmax(history.log_weights, axis=-1)
    history = history._replace(log_weights=log_weights)
    if model.num_times == 1:
        return _result(nodes, history.particles, log_weights)
    beliefs = _gaussians(run.moments)
    M, observed = setting.num_particles, np.isin(np.arange(model.num_times), seen)
    is_node = np.isin(np.arange(model.num_times), nodes)
    inputs, data = model.step_inputs(), jax.tree.map(jnp.asarray, model.observation_inputs())

    def at(tree: Any, k: Any) -> Any:
        return jax.tree.map(lambda a: a[k], tree)

    def artificial(k: Any, x: Array) -> Array:
        one = partial(_log_normal, mean=beliefs.ahead[k], factor=beliefs.ahead_factor[k])
        return over_particles(one, -1)(x)

    def observe(k: Any, log_weights: Array, x: Array) -> Array:
        return log_weights + weigh(model, at(data, k), x)

    def weigh_all(
        k: Any, later: Any, x: Array, log_weights: Array, key: Any
    ) -> tuple[Array, Array]:
        del later, key
        forward = (history.particles[k - 1], history.log_weights[k - 1])
        joined = _join(model, at(inputs, k - 1), forward, x)
        return x, log_weights - artificial(k, x) + joined

    def draw_pairs(
        k: Any, later: tuple[Array, Array], x: Array, log_weights: Array, key: PRNGKeyArray
    ) -> tuple[Array, Array]:
        del x, log_weights
        keys = jax.random.split(key, 3)
        i = setting.resampler(keys[0], jnp.exp(history.log_weights[k - 1]))
        j = multinomial(keys[1], jnp.exp(later[1] - jnp.max(later[1])))
        z = normals(keys[2], (innovation_size(model), M), later[1].dtype)
        steps = (at(inputs, k - 1), at(inputs, k))
        draw = over_particles(partial(_draw_between, model, steps, at(data, k)), -1, -1, -1)
        after = later[0][:, j]
        x, log_weights = draw(history.particles[k - 1][:, i], after, z)
        return x, clean(log_weights - artificial(k + 1, after))

    joined = weigh_all if join == "all" else draw_pairs

    def resample(x: Array, log_weights: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
        weights = jnp.exp(log_weights - jnp.max(log_weights))
        due = effective_size(weights) < setting.ess_threshold * M
        ancestors = jnp.where(due, setting.resampler(key, weights), jnp.arange(M))
        return x[:, ancestors], jnp.where(due, 0.0, log_weights)

    def back(carry: tuple[Array, Array], now: Any) -> tuple[Any, Any]:
        k, node, sight, z, key = now
        following, log_weights = carry
        step = at(inputs, k)
        draw = partial(_draw_back, model, step, (beliefs.mean[k], beliefs.cov[k]))
        x, log_q = over_particles(draw, -1, -1)(following, z)
        ratio = over_particles(partial(_density, model, step), -1, -1)(x, following) - log_q
        log_weights = log_weights + ratio + artificial(k, x) - artificial(k + 1, following)
        log_weights = branch(sight, observed[1:-1], observe, _skip_data)(k, log_weights, x)
        log_weights = clean(log_weights)
        log_weights = log_weights - jnp.max(log_weights)
        pattern = is_node[1:-1]
        key, join_key = jax.random.split(key)
        smoothed = branch(node, pattern, joined, _skip_join)(k, carry, x, log_weights, join_key)
        kept = branch(node, pattern, resample, _skip_choice)(x, log_weights, key)
        return kept, smoothed

    normal_key, start_key, key = jax.random.split(key, 3)
    last = model.num_times - 1
    z = normals(normal_key, (last, model.dim, M), model.init_mean.dtype)
    factor = cholesky(beliefs.cov[last])
    x = beliefs.mean[last][:, None] + matmul(factor, z[0])
    log_q = over_particles(partial(_log_normal, mean=beliefs.mean[last], factor=factor), -1)(x)
    log_weights = artificial(last, x) - log_q
    if observed[last]:
        log_weights = observe(last, log_weights, x)
    log_weights = clean(log_weights)
    end = (history.particles[last], history.log_weights[last])
    if join == "all":
        end = weigh_all(last, None, x, log_weights, None)
    keys = jax.random.split(key, last)
    carry = resample(x, log_weights, keys[0])
    inner = np.arange(1, last)
    sequence = (inner, jnp.asarray(is_node[1:-1]), jnp.asarray(observed[1:-1]), z[1:], keys[1:])
    (x, log_weights), (states, weights) = lax.scan(back, carry, sequence, reverse=True)
    # The first state may be known, and has no artificial law then: its forward particles are
    # weighed by the backward ones after it.
    log_weights = log_weights - artificial(1, x)
    if join == "all":
        first = _weigh_start(model, inputs, history, x, log_weights)
    else:
        j = multinomial(start_key, jnp.exp(log_weights - jnp.max(log_weights)))
        density = over_particles(partial(_density, model, at(inputs, 0)), -1, -1)
        first = clean(history.log_weights[0] + density(history.particles[0], x[:, j]))
    start = (history.particles[0], first)
    particles, log_weights = (
        jnp.concatenate([a[None], b, c[None]])
        for a, b, c in zip(start, (states, weights), end, strict=True)
    )
    return _result(nodes, particles, log_weights)


def _weigh_start(
    model: StateSpaceModel, inputs: Any, history: History, x: Array, log_weights: Array
) -> Float[Array, " M"]:
    step = jax.tree.map(lambda a: a[0], inputs)

    def one(before: Array) -> Array:
        terms = over_particles(lambda x: _density(model, step, before, x), -1)(x)
        return jax.nn.logsumexp(clean(terms + log_weights))

    likelihood = lax.map(one, history.particles[0].T, batch_size=_JOINED_AT_ONCE)
    return history.log_weights[0] + likelihood


def _result(nodes: np.ndarray, particles: Array, log_weights: Array) -> TwoFilterResult:
    particles, log_weights = particles[nodes], log_weights[nodes]
    mean, cov = jax.vmap(weighted_moments)(particles, log_weights)
    log_weights = jax.nn.log_softmax(clean(log_weights), axis=-1)
    ess = jax.vmap(effective_size)(jnp.exp(log_weights))
    rows = jnp.asarray(nodes)
    return TwoFilterResult(rows, mean, cov, jnp.swapaxes(particles, 1, 2), log_weights, ess)
