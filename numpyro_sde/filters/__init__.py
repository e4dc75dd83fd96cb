"""Filters: ways to integrate a path out of a model.

`Kalman` is exact for linear-Gaussian models; `Particle` estimates the likelihood of any other
without bias; the others approximate nonlinear ones. All work on
a `StateSpaceModel` and return a `FilterResult`.
"""

from numpyro_sde.filters.closure import ClosureReport, closure_check
from numpyro_sde.filters.ensemble import EnsembleKalman
from numpyro_sde.filters.extended import ExtendedKalman
from numpyro_sde.filters.forward import Forward, ForwardResult
from numpyro_sde.filters.kalman import Kalman
from numpyro_sde.filters.moment_matching import MomentMatching
from numpyro_sde.filters.particle import (
    Particle,
    ParticleCollapseWarning,
    UnreliableFilterWarning,
)
from numpyro_sde.filters.particle_result import ParticleResult, Reliability
from numpyro_sde.filters.rao_blackwell import RaoBlackwell, RaoBlackwellResult
from numpyro_sde.filters.regimes import GPB, IMM, RegimeResult
from numpyro_sde.filters.unscented import UnscentedKalman
from numpyro_sde.smc.proposals import Proposal, plain_step
from numpyro_sde.smc.resampling import Resampling
from numpyro_sde.statespace.model import AbstractFilter, FilterResult, Instrument, StateSpaceModel

__all__ = [
    "GPB",
    "IMM",
    "AbstractFilter",
    "ClosureReport",
    "EnsembleKalman",
    "ExtendedKalman",
    "FilterResult",
    "Forward",
    "ForwardResult",
    "Instrument",
    "Kalman",
    "MomentMatching",
    "Particle",
    "ParticleCollapseWarning",
    "ParticleResult",
    "Proposal",
    "RaoBlackwell",
    "RaoBlackwellResult",
    "RegimeResult",
    "Reliability",
    "Resampling",
    "StateSpaceModel",
    "UnreliableFilterWarning",
    "UnscentedKalman",
    "closure_check",
    "plain_step",
]
