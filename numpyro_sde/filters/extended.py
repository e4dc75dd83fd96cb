"""The extended Kalman filter: transition and emission linearised about the mean.

Source: Jazwinski (1970), "Stochastic Processes and Filtering Theory", section 8.3; Särkkä
(2013), "Bayesian Filtering and Smoothing", section 5.2.
"""

from __future__ import annotations

import equinox as eqx

from numpyro_sde.statespace.checks import (
    EMISSIONS,
    check_brownian,
    check_choice,
    check_count,
    check_gaussian_scheme,
    check_moments,
)
from numpyro_sde.statespace.exact import check_affine
from numpyro_sde.statespace.linearized import filter_linearized
from numpyro_sde.statespace.model import AbstractFilter, FilterResult, StateSpaceModel


class ExtendedKalman(AbstractFilter):
    """Extended Kalman filter on the scheme's Gaussian transition.

    Each step and each emission is replaced by its first-order expansion about the current
    mean: exact for linear-Gaussian models, the cheapest filter otherwise. Wrong where the
    state is uncertain on the scale on which drift, diffusion or emission bend: it then moves
    the mean without the curvature and reports too little variance (notably on multimodal
    states). See `UnscentedKalman` and `MomentMatching`.

    Args:
        iterations: linearisations of each emission; above 1, the iterated filter, about the
            mode.
        emission: for emissions that are not Gaussian, "laplace" (Laplace approximation about
            the mode) or "moments" (conditional mean and covariance, linearised).
        newton_steps: damped Newton steps of the Laplace approximation.

    Raises:
        ValueError: an option out of range. When used: a scheme whose transition is not
            Gaussian.
        TypeError: a count that is no integer.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.filters.ExtendedKalman(iterations=3).iterations
        3
    """

    iterations: int = eqx.field(static=True)
    emission: str = eqx.field(static=True)
    newton_steps: int = eqx.field(static=True)

    def __init__(
        self, iterations: int = 1, *, emission: str = "laplace", newton_steps: int = 10
    ) -> None:
        check_count("iterations", iterations)
        check_choice("emission", emission, EMISSIONS)
        check_count("newton_steps", newton_steps)
        self.iterations = iterations
        self.emission = emission
        self.newton_steps = newton_steps

    def check(self, model: StateSpaceModel) -> None:
        check_brownian(model, "ExtendedKalman()")
        check_moments(model, "ExtendedKalman()", self.emission)
        check_affine(model, "ExtendedKalman()")
        check_gaussian_scheme(model, "ExtendedKalman()")

    def filter(self, model: StateSpaceModel) -> FilterResult:
        self.check(model)
        return filter_linearized(
            model,
            iterations=self.iterations,
            emission=self.emission,
            newton_steps=self.newton_steps,
        )
