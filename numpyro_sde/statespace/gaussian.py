"""The recursion that all Gaussian filters share: predict over a step, update at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from numpyro_sde.statespace.model import FilterResult, Instrument, StateSpaceModel

Predict = Callable[[Array, Array, Any], tuple[Array, Array, Array]]
"""`predict(mean, cov, (t, dt, cache))` returns mean, covariance and cross covariance."""

Update = Callable[[Array, Array, Instrument, Any], tuple[Array, Array, Array]]
"""`update(mean, cov, instrument, (inputs, y, present))` returns mean, cov, log density."""


def run_gaussian(model: StateSpaceModel, predict: Predict, update: Update) -> FilterResult:
    """Run predict and update over the grid.

    Args:
        model: the model.
        predict: moments one step later.
        update: moments after one instrument's observation at one time; must leave them as they
            are, with log density 0, where nothing is present.

    Returns:
        The result with filtered and predicted moments.
    """

    def observe(mean: Array, cov: Array, now: Any) -> tuple[Array, Array, Array]:
        total = jnp.zeros((), mean.dtype)
        for instrument, data in zip(model.instruments, now, strict=True):
            mean, cov, log_density = update(mean, cov, instrument, data)
            total = total + log_density
        return mean, cov, total

    def step(carry: tuple[Array, Array], inputs: Any) -> tuple[Any, Any]:
        now, data = inputs
        mean, cov, cross = predict(*carry, now)
        new_mean, new_cov, log_density = observe(mean, cov, data)
        return (new_mean, new_cov), (new_mean, new_cov, mean, cov, cross, log_density)

    data = model.observation_inputs()
    first = _slice(data, 0)
    m0, p0 = model.init_mean, model.init_cov
    mean, cov, log_density = observe(m0, p0, first)
    _, rest = lax.scan(step, (mean, cov), (model.step_inputs(), _slice(data, slice(1, None))))
    means, covs, pred_means, pred_covs, cross, increments = rest
    increments = jnp.concatenate([log_density[None], increments])
    return FilterResult(
        times=model.times,
        log_likelihood=jnp.sum(increments),
        increments=increments,
        mean=jnp.concatenate([mean[None], means]),
        cov=jnp.concatenate([cov[None], covs]),
        predicted_mean=jnp.concatenate([m0[None], pred_means]),
        predicted_cov=jnp.concatenate([p0[None], pred_covs]),
        cross=cross,
    )


def _slice(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda a: a[index], tree)
