"""Importance sampling over particle filters: the evidence of a model with few parameters.

The likelihood of the parameters is estimated by a particle filter without bias, so importance
sampling over parameters, with estimates in place of likelihoods, is unbiased for the evidence
(Chopin, Jacob and Papaspiliopoulos 2013, "SMC^2", section 2; Tran, Scharth, Pitt and Kohn 2013,
"Importance sampling squared"). The sampling law is a Student t, fitted anew in each round; the
estimate is that of the last round, whose law was fixed before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray
from scipy.special import gammaln, logsumexp

from numpyro_sde.infer.evidence_result import (
    Evidence,
    EvidenceRound,
    complain,
    judge_weights,
)
from numpyro_sde.infer.pmmh import PMMH, PMMHState
from numpyro_sde.infer.racing import estimated_log_density
from numpyro_sde.runtime.draws import on_one_device
from numpyro_sde.smc.tails import pareto_shape

_FREEDOM = 5.0
# Scale of the first law in standard deviations of the start, and of the fitted ones' variances.
_FIRST_WIDTH, _WIDER = 2.0, 1.2
_ROUNDS, _MOST_ROUNDS = 3, 6
_AGREEMENT = 3.0
_MOST_PARAMETERS = 8


def by_filters(
    model: Callable[..., Any],
    args: Any,
    kwargs: Any,
    rng_key: PRNGKeyArray,
    *,
    num_draws: int,
    kernel: PMMH,
    state: PMMHState | None = None,
) -> Evidence:
    """The evidence by three rounds of importance sampling or more.

    Args:
        model: the model.
        args: its positional arguments.
        kwargs: its keyword arguments.
        rng_key: random key.
        num_draws: draws in each round.
        kernel: whose filters are run, tuned for these arguments if it is not yet.
        state: where its chains ended, if they ran: the first law is then theirs.

    Raises:
        RuntimeError: no three rounds that agree within 3 of their errors, or no finite weights.
    """
    tune_key, rng_key = jax.random.split(rng_key)
    found = kernel.tuned_for(tune_key, args, kwargs)
    (flat, back), factor = ravel_pytree(found.z), np.asarray(found.factor, float)
    if state is not None:
        flat, factor = _where_chains_ended(state)
    if flat.size > _MOST_PARAMETERS:
        complain(f"{flat.size} parameters are many for importance sampling: look at ess and khat")

    @jax.jit
    def log_densities(points: Array, keys: PRNGKeyArray) -> Array:
        def one(now: tuple[Array, PRNGKeyArray]) -> Array:
            point, key = now
            own = found.method.with_key(key)
            return estimated_log_density(model, own, back(point), args, kwargs)

        return lax.map(one, (points, keys))

    width = 2.38 / np.sqrt(flat.size)  # that of the kernel's random walk
    law = _Student(np.asarray(flat, float), _FIRST_WIDTH / width * factor)
    rounds: list[EvidenceRound] = []
    while True:
        draw_key, run_key, rng_key = jax.random.split(rng_key, 3)
        points = law.draw(draw_key, num_draws)
        # The law's density is that of the points as the filter gets them, rounding included.
        handed = jnp.asarray(points, flat.dtype)
        values = np.asarray(log_densities(handed, jax.random.split(run_key, num_draws)), float)
        log_weights = values - law.log_density(np.asarray(handed, float))
        rounds.append(_summarise(log_weights))
        if _agree(rounds):
            break
        if len(rounds) == _MOST_ROUNDS:
            told = (f"{r.log_evidence:.2f} +- {r.error:.2f} (ess {r.ess:.0f})" for r in rounds)
            raise RuntimeError(
                "no three rounds of importance sampling agree within 3 of their errors: "
                f"{'; '.join(told)}. Use more draws, more particles, or a proposal that suits the "
                "model"
            )
        law = law.refitted(points, log_weights)
    last = rounds[-1]
    khat = float(pareto_shape(jnp.exp(jnp.asarray(log_weights - np.max(log_weights)))))
    judge_weights(last.ess, khat)
    constrain = found.postprocess(*args, **kwargs)
    return Evidence(
        last.log_evidence,
        last.error,
        last.ess,
        khat,
        dict(jax.jit(jax.vmap(lambda p: constrain(back(p))))(handed)),
        log_weights - logsumexp(log_weights),
        tuple(rounds),
        found.method.num_particles,
        found.race,
        "filters",
    )


def _where_chains_ended(state: PMMHState) -> tuple[Array, np.ndarray]:
    """Mean of the last values of all chains, and a factor of their walks' mean covariance."""
    z, factors = on_one_device(state.z), np.asarray(state.factor, float)
    if factors.ndim == 2:
        return ravel_pytree(z)[0], factors
    covariance = np.mean(factors @ np.swapaxes(factors, 1, 2), axis=0)
    return ravel_pytree(jax.tree.map(lambda a: a.mean(0), z))[0], np.linalg.cholesky(covariance)


def _summarise(log_weights: np.ndarray) -> EvidenceRound:
    top = np.max(log_weights)
    if not np.isfinite(top):
        raise RuntimeError(
            "every draw of the parameters has an estimated likelihood of zero: give more particles "
            "or data that the model can explain"
        )
    weights = np.exp(log_weights - top)
    mean, count = np.mean(weights), weights.size
    error = float(np.std(weights, ddof=1) / (mean * np.sqrt(count)))
    ess = float(np.sum(weights) ** 2 / np.sum(weights**2))
    return EvidenceRound(float(top + np.log(mean)), error, ess)


def _agree(rounds: list[EvidenceRound]) -> bool:
    """Whether the last three rounds are within 3 of their errors of one another."""
    if len(rounds) < _ROUNDS:
        return False
    last = rounds[-_ROUNDS:]
    return all(
        abs(a.log_evidence - b.log_evidence) <= _AGREEMENT * np.hypot(a.error, b.error)
        for i, a in enumerate(last)
        for b in last[:i]
    )


class _Student(NamedTuple):
    """A Student t law of 5 degrees of freedom on unconstrained parameters."""

    mean: Float[np.ndarray, " D"]
    factor: Float[np.ndarray, "D D"]

    def draw(self, key: PRNGKeyArray, count: int) -> Float[np.ndarray, "count D"]:
        normal_key, scale_key = jax.random.split(key)
        z = np.asarray(jax.random.normal(normal_key, (count, self.mean.size)), float)
        chi2 = 2.0 * np.asarray(jax.random.gamma(scale_key, 0.5 * _FREEDOM, (count, 1)), float)
        return self.mean + (z * np.sqrt(_FREEDOM / chi2)) @ self.factor.T

    def log_density(self, points: Float[np.ndarray, "count D"]) -> Float[np.ndarray, " count"]:
        d = self.mean.size
        white = np.linalg.solve(self.factor, (points - self.mean).T)
        size = gammaln(0.5 * (_FREEDOM + d)) - gammaln(0.5 * _FREEDOM)
        size = size - 0.5 * d * np.log(_FREEDOM * np.pi)
        size = size - np.sum(np.log(np.abs(np.diag(self.factor))))
        return size - 0.5 * (_FREEDOM + d) * np.log1p(np.sum(white**2, axis=0) / _FREEDOM)

    def refitted(self, points: np.ndarray, log_weights: np.ndarray) -> _Student:
        """The law with the weighted moments of its draws, evened where few have all weight."""
        d = self.mean.size
        power = 1.0
        while True:
            weights = np.exp(power * (log_weights - np.max(log_weights)))
            weights = weights / np.sum(weights)
            if 1.0 / np.sum(weights**2) >= 10.0 * d or power < 1e-3:
                break
            power *= 0.7
        mean = weights @ points
        centred = points - mean
        cov = _WIDER * (centred * weights[:, None]).T @ centred
        cov = cov + 1e-8 * np.trace(cov) / d * np.eye(d)
        # A law of 5 degrees of freedom has 5/3 of its scale matrix as covariance.
        return _Student(mean, np.linalg.cholesky(cov))
