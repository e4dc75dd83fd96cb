"""Bridge sampling: the evidence from the posterior draws of any fit.

A normal law fitted to one half of the draws and the posterior itself are bridged by the other half
(Meng and Wong 1996, "Simulating ratios of normalizing constants via a simple identity", Statistica
Sinica 6; the iteration and the relative error as in Gronau et al. 2017, "A tutorial on bridge
sampling", Journal of Mathematical Psychology 81, equations 13 to 16, and Fruehwirth-Schnatter 2004,
Econometrics Journal 7). Then the halves change parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PRNGKeyArray
from numpyro.diagnostics import effective_sample_size
from numpyro.handlers import seed
from numpyro.infer.util import potential_energy, unconstrain_fn
from scipy.special import logsumexp

from numpyro_sde.infer.evidence_result import Evidence, EvidenceRound, complain, judge_weights
from numpyro_sde.infer.rotation import prior_values
from numpyro_sde.reparam.path import is_innovation
from numpyro_sde.runtime.draws import on_one_device
from numpyro_sde.smc.tails import pareto_shape

_MOST_STEPS, _SETTLED = 1000, 1e-8
_LEAST_DRAWS = 50
_MOST_APART = 4.0
_FEW_VALUES = 1e-10


class NormalLaw(NamedTuple):
    """A normal law, dense in some coordinates and independent in the rest.

    Attributes:
        mean: `(D,)`.
        factor: lower Cholesky factor of the covariance of the dense ones, `(P, P)`.
        scale: standard deviations of the rest, `(Q,)`.
        dense: which coordinates are dense, `(D,)`.
    """

    mean: Float[np.ndarray, " D"]
    factor: Float[np.ndarray, "P P"]
    scale: Float[np.ndarray, " Q"]
    dense: Bool[np.ndarray, " D"]

    @classmethod
    def fitted(cls, draws: Float[np.ndarray, "n D"], dense: Bool[np.ndarray, " D"]) -> NormalLaw:
        """The law with the moments of draws; innovations shrink towards standard normal ones."""
        mean, free = draws.mean(0), draws[:, dense]
        covariance = np.atleast_2d(np.cov(free.T)) if free.size else np.zeros((0, 0))
        ridge = _FEW_VALUES + 1e-8 * np.trace(covariance) / max(free.shape[1], 1)
        factor = np.linalg.cholesky(covariance + ridge * np.eye(len(covariance)))
        rest = draws[:, ~dense]
        size = _least_size(rest) if rest.size else 1.0
        mean[~dense] = _shrunk(mean[~dense], 1.0 / size)
        logs = np.log(np.maximum(rest.std(0), 1e-6))
        return cls(mean, factor, np.exp(_shrunk(logs, 0.5 / size)), dense)

    def draw(self, key: PRNGKeyArray, count: int) -> Float[np.ndarray, "count D"]:
        z = np.asarray(jax.random.normal(key, (count, self.mean.size)), float)
        out = np.empty_like(z)
        out[:, self.dense] = z[:, self.dense] @ self.factor.T
        out[:, ~self.dense] = z[:, ~self.dense] * self.scale
        return self.mean + out

    def log_density(self, points: Float[np.ndarray, "n D"]) -> Float[np.ndarray, " n"]:
        away = points - self.mean
        white = np.linalg.solve(self.factor, away[:, self.dense].T)
        total = -0.5 * np.sum(white**2, axis=0)
        total = total - 0.5 * np.sum((away[:, ~self.dense] / self.scale) ** 2, axis=1)
        size = np.sum(np.log(np.diag(self.factor))) + np.sum(np.log(self.scale))
        return total - size - 0.5 * self.mean.size * np.log(2.0 * np.pi)


def _shrunk(values: np.ndarray, variance: float) -> np.ndarray:
    """James and Stein's estimate: towards zero, the more the less they exceed their errors."""
    total = np.sum(values**2)
    if total == 0.0:
        return values
    return values * max(0.0, 1.0 - (values.size - 2.0) * variance / total)


def _least_size(draws: Float[np.ndarray, "n D"]) -> float:
    """Effective number of draws behind the moments of many coordinates, their lower quartile."""
    chosen = draws[None, :, :: max(1, draws.shape[1] // 50)]
    return float(max(np.nanquantile(effective_sample_size(chosen), 0.25), 1.0))


def by_bridge(
    model: Callable[..., Any],
    args: Any,
    kwargs: Any,
    rng_key: PRNGKeyArray,
    samples: Mapping[str, Any],
) -> Evidence:
    """The evidence by bridge sampling.

    Args:
        model: the model that was fitted.
        args: its positional arguments.
        kwargs: its keyword arguments.
        rng_key: random key.
        samples: posterior draws of its latent sites, `(chain, draw, ...)`.

    Raises:
        ValueError: draws that lack a latent site of the model, or fewer than 100 of them.
        RuntimeError: a log density that is not finite at any draw.
    """
    names = list(jax.eval_shape(prior_values(model, args, kwargs), jax.random.key(0)))
    if missing := [name for name in names if name not in samples]:
        raise ValueError(
            "bridge sampling needs draws of all latent sites of the model, and the fit has none of "
            f"{missing}: it has {sorted(samples)}"
        )
    chains = on_one_device(samples, names)
    num_chains, length = next(iter(chains.values())).shape[:2]
    if num_chains * length < 2 * _LEAST_DRAWS:
        raise ValueError(f"bridge sampling needs 100 draws or more, got {num_chains * length}")
    points, dense, back = _unconstrained(model, args, kwargs, chains)

    @jax.jit
    def log_density(points: Array) -> Array:
        return jax.lax.map(
            lambda u: -potential_energy(model, args, kwargs, back(u)), points, batch_size=64
        )

    flat = points.reshape(-1, points.shape[-1])
    known = np.asarray(log_density(jnp.asarray(flat)), float).reshape(num_chains, length)
    if not np.all(np.isfinite(known)):
        raise RuntimeError("the log density of the model is not finite at all draws of the fit")
    middle = length // 2
    halves = slice(None, middle), slice(middle, 2 * middle)
    found = []
    for key, fit, rest in zip(jax.random.split(rng_key), halves, halves[::-1], strict=True):
        law = NormalLaw.fitted(points[:, fit].reshape(-1, points.shape[-1]), dense)
        drawn = law.draw(key, num_chains * middle)
        handed = jnp.asarray(drawn, jnp.result_type(float))
        at = np.asarray(handed, float)
        values = np.asarray(log_density(handed), float)
        others = points[:, rest].reshape(-1, points.shape[-1])
        log_weights = np.where(np.isnan(values), -np.inf, values) - law.log_density(at)
        own = known[:, rest] - law.log_density(others).reshape(num_chains, -1)
        found.append((*bridged(own, log_weights), log_weights))
    return _joined(found, {name: chains[name] for name in names})


def _joined(found: list[Any], chains: Mapping[str, Array]) -> Evidence:
    rounds = tuple(EvidenceRound(value, error, ess) for value, error, ess, _ in found)
    first, second = rounds
    error = float(np.hypot(first.error, second.error) / 2.0)
    apart = abs(first.log_evidence - second.log_evidence)
    if apart > _MOST_APART * max(2.0 * error, 1e-3):
        complain(
            f"the two halves of the draws have log evidences {first.log_evidence:.2f} and "
            f"{second.log_evidence:.2f}, {apart / (2.0 * error):.0f} errors apart: run it longer, "
            "or use method='tempered'"
        )
    khat = max(float(pareto_shape(jnp.asarray(np.exp(w - np.max(w))))) for *_, w in found)
    ess = first.ess + second.ess
    judge_weights(ess, -np.inf)
    flat = {name: v.reshape(-1, *v.shape[2:]) for name, v in chains.items()}
    count = next(iter(flat.values())).shape[0]
    return Evidence(
        0.5 * (first.log_evidence + second.log_evidence),
        max(error, 0.5 * apart),
        ess,
        khat,
        flat,
        np.full(count, -np.log(count)),
        rounds,
        0,
        None,
        "bridge",
    )


def _unconstrained(
    model: Callable[..., Any], args: Any, kwargs: Any, chains: Mapping[str, Array]
) -> tuple[np.ndarray, np.ndarray, Callable[[Array], Any]]:
    """Draws as vectors `(chain, draw, D)`, which of them are no innovations, and the way back."""

    def one(values: dict[str, Array]) -> dict[str, Array]:
        return unconstrain_fn(seed(model, 0), args, kwargs, values)

    flat = {name: v.reshape(-1, *v.shape[2:]) for name, v in chains.items()}
    free = jax.jit(lambda v: jax.lax.map(one, v, batch_size=64))(flat)
    example = jax.tree.map(lambda a: a[0], free)
    marks = {name: np.full(np.shape(v), not is_innovation(name)) for name, v in example.items()}
    _, back = ravel_pytree(example)
    points = np.asarray(jax.vmap(lambda v: ravel_pytree(v)[0])(free), float)
    shape = next(iter(chains.values())).shape[:2]
    dense = np.asarray(ravel_pytree(marks)[0]).astype(bool)
    return points.reshape(*shape, -1), dense, back


def bridged(
    posterior: Float[np.ndarray, "chain draw"], proposal: Float[np.ndarray, " n"]
) -> tuple[float, float, float]:
    """Log evidence, its error and the effective number of posterior draws.

    Args:
        posterior: log joint density over that of the law, at posterior draws.
        proposal: likewise at draws of the law.
    """
    flat = posterior.ravel()
    ess = float(min(effective_sample_size(posterior), flat.size))
    shares = np.log([ess, proposal.size]) - np.log(ess + proposal.size)
    value = float(np.median(flat))

    def terms(value: float) -> tuple[np.ndarray, np.ndarray]:
        """Logs of the bridge's two summands, the joint density over the evidence."""
        at_law = proposal - np.logaddexp(shares[0] + proposal - value, shares[1])
        at_posterior = -np.logaddexp(shares[0] + flat - value, shares[1])
        return at_law, at_posterior

    for _ in range(_MOST_STEPS):
        above, below = terms(value)
        new = logsumexp(above) - np.log(above.size) - logsumexp(below) + np.log(below.size)
        if abs(new - value) < _SETTLED:
            break
        value = float(new)
    above, below = (np.exp(t - np.max(t)) for t in terms(value))
    slow = effective_sample_size(below.reshape(posterior.shape)) if np.ptp(below) > 0 else ess
    size = float(np.clip(slow, 1.0, below.size))
    error = np.var(above) / np.mean(above) ** 2 / above.size
    error = error + np.var(below) / np.mean(below) ** 2 / size
    return value, float(np.sqrt(error)), size
