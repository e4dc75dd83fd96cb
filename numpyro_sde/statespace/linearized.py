"""The extended Kalman recursion: transition and emission linearised about the mean.

Source: Jazwinski (1970), "Stochastic Processes and Filtering Theory", section 8.3; Särkkä
(2013), "Bayesian Filtering and Smoothing", section 5.2.
"""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array

from numpyro_sde.linear.small import congruence, matmul, transpose
from numpyro_sde.statespace.gaussian import run_gaussian
from numpyro_sde.statespace.model import FilterResult, StateSpaceModel
from numpyro_sde.statespace.updates import choose_update, linearized_update, with_valid_inputs


def filter_linearized(
    model: StateSpaceModel,
    *,
    iterations: int = 1,
    emission: str = "laplace",
    newton_steps: int = 10,
) -> FilterResult:
    """Filter with each step and each emission expanded to first order about the current mean.

    Args:
        model: the model; its scheme's transition is Gaussian.
        iterations: linearisations of each emission; above 1, about the mode.
        emission: for emissions that are not normal, "laplace" or "moments".
        newton_steps: damped Newton steps of the Laplace approximation.
    """
    model = with_valid_inputs(model)._replace(scheme=model.scheme.linearizable())

    def predict(mean: Array, cov: Array, now: Any) -> tuple[Array, Array, Array]:
        t, dt, cache = now

        def with_aux(x: Array) -> tuple[Array, tuple[Array, Array]]:
            next_mean, noise = model.step_moments(t, dt, x, cache)
            return next_mean, (next_mean, noise)

        F, (next_mean, noise) = jax.jacfwd(with_aux, has_aux=True)(mean)
        return next_mean, congruence(F, cov) + noise, matmul(cov, transpose(F))

    update = choose_update(linearized_update(iterations), emission, newton_steps)
    return run_gaussian(model, predict, update)
