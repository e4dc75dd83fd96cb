"""A particle filter whose particles carry parameters, perturbed before each observation.

The inner loop of iterated filtering (Ionides, Nguyen, Atchadé, Stoev and King 2015, PNAS 112,
algorithm IF2): every particle has parameters of its own; before each observation they take a small
normal step on the unconstrained scale; then the particle moves by the model's own steps under its
parameters, is weighed, and is resampled together with them. Series of a panel are filtered one
after another, each with the parameters that the one before left; parameters that belong to other
series stay as they are (Bretó, Ionides and King 2020, JASA 115; marginalised as in Abkemeier,
Wheeler and Ionides 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_sde.linear.small import matvec, psd_factor
from numpyro_sde.schemes.events import ForcedScheme, StepCache
from numpyro_sde.schemes.memory import MemoryScheme
from numpyro_sde.smc.loop import branch, log_mean, over_particles, relative_weights
from numpyro_sde.smc.normals import normals
from numpyro_sde.smc.proposals import observed_rows, plain_step
from numpyro_sde.statespace.guide import innovation_size, log_emission
from numpyro_sde.statespace.model import StateSpaceModel


class Swarm(NamedTuple):
    """Particles that carry parameters.

    Attributes:
        z: their parameters, unconstrained, `(D, M)`.
        x: their states, `(d, M)`.
        log_likelihood: log of the mean weights so far.
    """

    z: Float[Array, "D M"]
    x: Float[Array, "d M"]
    log_likelihood: Float[Array, ""]


class Perturbation(NamedTuple):
    """How parameters are perturbed in one pass.

    Attributes:
        start: standard deviations before the first state is drawn, `(D,)`.
        later: those before each observation, `(D,)`.
        cooling: factor of both from the beginning of the pass to its end.
        own: which parameters belong to the series that is filtered, `(D,)`.
    """

    start: Float[Array, " D"]
    later: Float[Array, " D"]
    cooling: Any
    own: Array


def step_at(model: StateSpaceModel, k: Array) -> tuple[Array, Array, Any]:
    """Time, length and cache of one step; what a scheme prepares is prepared for it alone.

    A cache of the whole grid would be made anew for each particle's parameters at each step.
    """
    times, dt = jnp.asarray(model.times), jnp.asarray(model.dt)

    def prepared(scheme: Any) -> Any:
        pair, own = lax.dynamic_slice_in_dim(times, k, 2), lax.dynamic_slice_in_dim(dt, k, 1)
        return jax.tree.map(lambda a: jnp.asarray(a)[0], scheme.prepare(model.sde, pair, own))

    scheme, cache = model.scheme, model.cache
    if isinstance(scheme, MemoryScheme):
        cache = jax.tree.map(lambda a: jnp.asarray(a)[k], cache)
    elif isinstance(scheme, ForcedScheme) and not isinstance(scheme.inner, MemoryScheme):
        rest = jax.tree.map(lambda a: jnp.asarray(a)[k], cache._replace(inner=None))
        cache = StepCache(prepared(scheme.inner), *rest[1:])
    elif isinstance(scheme, ForcedScheme):
        cache = jax.tree.map(lambda a: jnp.asarray(a)[k], cache)
    else:
        cache = prepared(scheme)
    return times[k], dt[k], cache


class PerturbedFilter:
    """One pass over one series.

    Args:
        build: the series' model under parameters `(D,)`; its first state is drawn with the key
            where it is not normal.
        log_prior_weight: what weighs particles by their parameters alone; None for nothing.
        perturbation: standard deviations.
        resampler: one of `smc.resampling`.
    """

    def __init__(
        self,
        build: Callable[[Array, PRNGKeyArray], StateSpaceModel],
        log_prior_weight: Callable[[Array], Array] | None,
        perturbation: Perturbation,
        resampler: Callable[..., Array],
    ) -> None:
        self.build, self.log_prior_weight = build, log_prior_weight
        self.perturbation, self.resampler = perturbation, resampler

    def run(self, z: Float[Array, "D M"], key: PRNGKeyArray) -> Swarm:
        """Filter once through the data."""
        start_key, build_key, move_key, choose_key, perturb_key = jax.random.split(key, 5)
        self._build_key = build_key
        model = self.build(z[:, 0], build_key)
        N, rows = model.num_times, observed_rows(model)
        observed = np.isin(np.arange(N), rows)
        # The pass is cooled by the share of the observations that are behind.
        share = np.cumsum(observed) / max(rows.size, 1)
        perturb_keys = jax.random.split(perturb_key, N)
        swarm = self._start(model, z, start_key, perturb_keys[0])
        weigh = self._weigh_and_choose
        choose_keys = jax.random.split(choose_key, N)
        if observed[0]:
            swarm = weigh(swarm, jnp.zeros((), int), choose_keys[0])
        if N == 1:
            return swarm
        size, M = innovation_size(model), z.shape[1]

        def stay(swarm: Swarm, *_: Any) -> Swarm:
            return swarm

        def step(swarm: Swarm, now: Any) -> tuple[Swarm, None]:
            k, opens, closes, share, perturb_key, move_key, choose_key = now
            disturb = branch(opens, observed[:-1], self._perturb, stay)
            swarm = disturb(swarm, share, perturb_key)
            noise = normals(move_key, (size, M), swarm.x.dtype)
            swarm = swarm._replace(x=self._move(swarm, k, noise))
            return branch(closes, observed[1:], weigh, stay)(swarm, k + 1, choose_key), None

        inputs = (
            jnp.arange(N - 1),
            jnp.asarray(observed[:-1]),
            jnp.asarray(observed[1:]),
            jnp.asarray(share[:-1], z.dtype),
            perturb_keys[1:],
            jax.random.split(move_key, N - 1),
            choose_keys[1:],
        )
        return lax.scan(step, swarm, inputs)[0]

    def _start(self, model: StateSpaceModel, z: Array, key: Any, perturb_key: Any) -> Swarm:
        own = self.perturbation
        noise = normals(perturb_key, z.shape, z.dtype)
        z = z + (own.start * own.own)[:, None] * noise
        keys = jax.random.split(key, z.shape[1])
        dtype = model.init_mean.dtype

        def first(z: Array, key: PRNGKeyArray, noise: Array) -> Array:
            model = self.build(z, key)
            if model.starts is not None:
                return model.starts[0].astype(dtype)
            return model.init_mean + matvec(psd_factor(model.init_cov), noise)

        spread = normals(jax.random.fold_in(key, 1), (model.dim, z.shape[1]), dtype)
        x = jax.vmap(first, in_axes=(-1, 0, -1), out_axes=-1)(z, keys, spread)
        swarm = Swarm(z, x, jnp.zeros((), dtype))
        if self.log_prior_weight is None:
            return swarm
        log_weights = over_particles(self.log_prior_weight, -1)(z).astype(dtype)
        return self._choose(swarm, log_weights, jax.random.fold_in(key, 2))

    def _perturb(self, swarm: Swarm, share: Array, key: PRNGKeyArray) -> Swarm:
        own = self.perturbation
        sd = own.later * own.own * own.cooling**share
        return swarm._replace(z=swarm.z + sd[:, None] * normals(key, swarm.z.shape, swarm.z.dtype))

    def _move(self, swarm: Swarm, k: Array, noise: Array) -> Array:
        def move(z: Array, x: Array, noise: Array) -> Array:
            model = self.build(z, self._build_key)
            return plain_step(model, step_at(model, k), x, noise)

        return over_particles(move, -1, -1, -1)(swarm.z, swarm.x, noise)

    def _weigh_and_choose(self, swarm: Swarm, k: Array, key: PRNGKeyArray) -> Swarm:
        def weigh(z: Array, x: Array) -> Array:
            model = self.build(z, self._build_key)
            data = jax.tree.map(lambda a: jnp.asarray(a)[k], model.observation_inputs())
            return log_emission(model, data, x)

        log_weights = over_particles(weigh, -1, -1)(swarm.z, swarm.x)
        sound = jnp.all(jnp.isfinite(swarm.x), axis=0) & jnp.all(jnp.isfinite(swarm.z), axis=0)
        return self._choose(swarm, jnp.where(sound, log_weights, -jnp.inf), key)

    def _choose(self, swarm: Swarm, log_weights: Array, key: PRNGKeyArray) -> Swarm:
        weights, _ = relative_weights(log_weights)
        usable = jnp.sum(weights) > 0.0
        # Where nothing has weight the swarm goes on as it is, and the pass counts for nothing.
        ancestors = self.resampler(key, jnp.where(usable, weights, 1.0))
        z = jnp.where(self.perturbation.own[:, None], swarm.z[:, ancestors], swarm.z)
        total = swarm.log_likelihood + log_mean(log_weights)
        return Swarm(z, swarm.x[:, ancestors], total)
