"""Draws against densities, by identities that hold only where the two agree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import PRNGKeyArray

from numpyro_sde.testing.compare import assert_true


def check_samples_match_density(
    law: dist.Distribution, key: PRNGKeyArray, *, num_samples: int = 20_000
) -> None:
    """Check that draws follow the density, by identities that hold only if they do.

    With `u` the free coordinates of the value and `p(u)` their density: for every density `q`,
    `E[q(u) / p(u)] = 1`; and `E[grad log p(u)] = 0`, `E[u_i d_j log p(u)] = -delta_ij` (Stein).
    `q` is a Gaussian with the moments of a first half of the draws and a smaller covariance;
    expectations are over the second half, judged at 4 Monte Carlo standard errors (5 for the
    Stein identities, of which there are many). A discrete law is checked by the frequencies of
    its most common values. Unbatched laws of few free components only.

    Raises:
        AssertionError: with the estimate, its standard error and the truth.

    Example:
        >>> import jax, numpyro.distributions as dist
        >>> from numpyro_sde.testing import check_samples_match_density
        >>> check_samples_match_density(dist.Gamma(3.0, 2.0), jax.random.key(0))
    """
    if law.batch_shape:
        raise ValueError(f"law must be unbatched, got batch shape {law.batch_shape}")
    draws = law.sample(key, (num_samples,))
    if law.is_discrete:
        _check_frequencies(law, np.asarray(draws))
        return
    bijection = dist.biject_to(law.support)
    free = jax.vmap(bijection.inv)(draws)
    shape = free.shape[1:]

    def log_density(u: Any) -> Any:
        u = u.reshape(shape)
        x = bijection(u)
        jacobian = jnp.sum(bijection.log_abs_det_jacobian(u, x))
        return law.log_prob(x) + jacobian

    flat = np.asarray(free.reshape(num_samples, -1), np.float64)
    first, second = np.split(flat, [num_samples // 2])
    mean, spread = first.mean(0), np.atleast_2d(np.cov(first.T))
    log_p = np.asarray(jax.vmap(log_density)(jnp.asarray(second)), np.float64)
    for shift in (0.0, 0.5):
        centre = mean + shift * np.sqrt(np.diag(spread) / len(mean))
        ratio = np.exp(_gaussian(second, centre, 0.6 * spread) - log_p)
        _expectation(f"E[q/p] for q shifted by {shift}", ratio, 1.0, 4.0)
    score = np.asarray(jax.vmap(jax.grad(log_density))(jnp.asarray(second)), np.float64)
    scale = np.sqrt(np.diag(spread))
    score, centred = score * scale, (second - mean) / scale
    for j in range(len(mean)):
        _expectation(f"E[score {j}]", score[:, j], 0.0, 5.0)
        for i in range(len(mean)):
            product = centred[:, i] * score[:, j]
            _expectation(f"E[u{i} score{j}]", product, -float(i == j), 5.0)


def _check_frequencies(law: dist.Distribution, draws: np.ndarray) -> None:
    values, counts = np.unique(draws, axis=0, return_counts=True)
    for i in np.argsort(-counts)[:5]:
        probability = float(jnp.exp(law.log_prob(jnp.asarray(values[i]))))
        error = np.sqrt(probability * (1 - probability) / len(draws))
        frequency = counts[i] / len(draws)
        assert_true(
            abs(frequency - probability) <= 4 * error,
            f"P({values[i].tolist()}) is {probability:.4g}, standard error {error:.2g}; drawn",
            frequency,
        )


def _gaussian(x: np.ndarray, mean: np.ndarray, cov: np.ndarray) -> np.ndarray:
    tril = np.linalg.cholesky(cov)
    z = np.linalg.solve(tril, (x - mean).T)
    constant = np.log(np.diag(tril)).sum() + 0.5 * len(mean) * np.log(2 * np.pi)
    return -0.5 * (z**2).sum(0) - constant


def _expectation(what: str, draws: np.ndarray, truth: float, bound: float) -> None:
    estimate, error = draws.mean(), draws.std(ddof=1) / np.sqrt(len(draws))
    assert_true(
        bool(abs(estimate - truth) <= bound * error + 1e-6),
        f"{what} must be {truth}, standard error {error:.2g}; estimated",
        estimate,
    )
