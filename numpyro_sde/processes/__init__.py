"""Named stochastic differential equations, each with what is known of it in closed form.

A process is an `SDE` whose parameters are read as attributes. Where the transition law is known
`exact_transition()` gives it and `SDEPath` takes it by default; where the stationary law is
known, `stationary_moments()` and `stationary_log_density(x)` give it.
"""

from numpyro_sde.processes.gaussian import (
    BrownianMotion,
    GeometricBrownianMotion,
    OrnsteinUhlenbeck,
)
from numpyro_sde.processes.langevin import DoubleWell, OverdampedLangevin, UnderdampedLangevin
from numpyro_sde.processes.learned import Geometric, LinearNoise, NeuralLangevin
from numpyro_sde.processes.linear import LinearSDE
from numpyro_sde.processes.lorenz import Lorenz63, Lorenz96TwoScale
from numpyro_sde.processes.neuron import FitzHughNagumo
from numpyro_sde.processes.oscillators import CoupledOscillators
from numpyro_sde.processes.reactions import ChemicalLangevin, LotkaVolterra, mass_action
from numpyro_sde.processes.square_root import CKLS, CoxIngersollRoss
from numpyro_sde.processes.subordinated import GammaOU, InverseGaussianOU
from numpyro_sde.processes.volatility import Heston, StochasticVolatility

__all__ = [
    "CKLS",
    "BrownianMotion",
    "ChemicalLangevin",
    "CoupledOscillators",
    "CoxIngersollRoss",
    "DoubleWell",
    "FitzHughNagumo",
    "GammaOU",
    "Geometric",
    "GeometricBrownianMotion",
    "Heston",
    "InverseGaussianOU",
    "LinearNoise",
    "LinearSDE",
    "Lorenz63",
    "Lorenz96TwoScale",
    "LotkaVolterra",
    "NeuralLangevin",
    "OrnsteinUhlenbeck",
    "OverdampedLangevin",
    "StochasticVolatility",
    "UnderdampedLangevin",
    "mass_action",
]
