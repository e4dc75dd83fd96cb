"""The unscented Kalman filter: transition and emission seen at a few sigma points.

Source: Julier and Uhlmann (2004), "Unscented filtering and nonlinear estimation"; Wan and van
der Merwe (2000), "The unscented Kalman filter for nonlinear estimation".
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
from jaxtyping import Array

from numpyro_sde.linear.small import matmul, psd_factor, transpose
from numpyro_sde.statespace.checks import (
    EMISSIONS,
    check_brownian,
    check_choice,
    check_count,
    check_gaussian_scheme,
    check_moments,
)
from numpyro_sde.statespace.exact import check_affine
from numpyro_sde.statespace.gaussian import run_gaussian
from numpyro_sde.statespace.model import AbstractFilter, FilterResult, StateSpaceModel
from numpyro_sde.statespace.quadrature import unscented
from numpyro_sde.statespace.updates import (
    choose_update,
    regress,
    sigma_point_update,
    with_valid_inputs,
)


class UnscentedKalman(AbstractFilter):
    """Unscented Kalman filter on the scheme's Gaussian transition.

    Mean and covariance after a step are those of the transition averaged over `2 d + 1` sigma
    points; the noise covariance is averaged too, so a state-dependent diffusion enters with its
    mean square. Exact for linear-Gaussian models; second order in the width of the belief
    otherwise. Wrong on multimodal states.

    The defaults (`alpha = 1`, `kappa = 0`, `beta = 2`) have no negative weight, so covariances
    stay positive semi-definite, and no large ones, so float32 holds. The textbook
    `alpha = 1e-3` has weights of order 1e6 that cancel.

    Args:
        alpha: spread of the points, positive.
        beta: weight of the centre in covariances.
        kappa: second spread parameter, above `-d`; the points lie at `alpha sqrt(d + kappa)`
            standard deviations.
        emission: for emissions that are not Gaussian, "laplace" (Laplace approximation about
            the mode) or "moments" (conditional mean and covariance, averaged).
        newton_steps: damped Newton steps of the Laplace approximation.

    Raises:
        ValueError: an option out of range. When used: a scheme whose transition is not
            Gaussian.
        TypeError: a count that is no integer.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.filters.UnscentedKalman(kappa=1.0).kappa
        1.0
    """

    alpha: float = eqx.field(static=True)
    beta: float = eqx.field(static=True)
    kappa: float = eqx.field(static=True)
    emission: str = eqx.field(static=True)
    newton_steps: int = eqx.field(static=True)

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 2.0,
        kappa: float = 0.0,
        *,
        emission: str = "laplace",
        newton_steps: int = 10,
    ) -> None:
        if not alpha > 0:
            raise ValueError(f"alpha must be positive, got {alpha}")
        check_choice("emission", emission, EMISSIONS)
        check_count("newton_steps", newton_steps)
        self.alpha, self.beta, self.kappa = float(alpha), float(beta), float(kappa)
        self.emission = emission
        self.newton_steps = newton_steps

    def check(self, model: StateSpaceModel) -> None:
        check_brownian(model, "UnscentedKalman()")
        check_moments(model, "UnscentedKalman()", self.emission)
        check_affine(model, "UnscentedKalman()")
        check_gaussian_scheme(model, "UnscentedKalman()")
        unscented(model.dim, self.alpha, self.beta, self.kappa)

    def filter(self, model: StateSpaceModel) -> FilterResult:
        self.check(model)
        model = with_valid_inputs(model)
        rule = unscented(model.dim, self.alpha, self.beta, self.kappa)

        def predict(mean: Array, cov: Array, now: Any) -> tuple[Array, Array, Array]:
            t, dt, cache = now
            S = psd_factor(cov)
            next_mean, G, rest = regress(
                rule, lambda x: model.step_moments(t, dt, x, cache), mean, S
            )
            next_cov = matmul(G, transpose(G)) + rest
            return next_mean, next_cov, matmul(S, transpose(G))

        update = choose_update(sigma_point_update(rule), self.emission, self.newton_steps)
        return run_gaussian(model, predict, update)
