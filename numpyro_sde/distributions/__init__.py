"""NumPyro distributions: exact laws of fractional processes; path and observation laws."""

from numpyro_sde.distributions.fractional import (
    FractionalBrownianMotion,
    FractionalGaussianNoise,
    FractionalOrnsteinUhlenbeck,
)

__all__ = [
    "FractionalBrownianMotion",
    "FractionalGaussianNoise",
    "FractionalOrnsteinUhlenbeck",
]
