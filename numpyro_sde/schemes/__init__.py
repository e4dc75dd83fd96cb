"""Transition densities of an SDE over one step, behind one protocol."""

from numpyro_sde.schemes.base import AbstractScheme, GaussianScheme
from numpyro_sde.schemes.cir import DriftImplicitSquareRoot, HighOrderStrang
from numpyro_sde.schemes.counts import CountScheme, EulerMultinomial, Gillespie
from numpyro_sde.schemes.diffrax_solver import DiffraxSolver
from numpyro_sde.schemes.euler import Euler
from numpyro_sde.schemes.exact import Exact
from numpyro_sde.schemes.heavy_tails import StableEuler, StudentEuler
from numpyro_sde.schemes.hermite import HermiteExpansion
from numpyro_sde.schemes.jump_euler import JumpEuler, JumpMixture
from numpyro_sde.schemes.jump_linear import JumpLinear
from numpyro_sde.schemes.kessler import Kessler
from numpyro_sde.schemes.langevin_steps import LangevinSteps
from numpyro_sde.schemes.linear_noise import LinearNoise
from numpyro_sde.schemes.local_linear import LocalLinear
from numpyro_sde.schemes.log_euler import LogEuler
from numpyro_sde.schemes.matched_jumps import MatchedJumps
from numpyro_sde.schemes.milstein import Milstein
from numpyro_sde.schemes.moment_closure import MomentClosure
from numpyro_sde.schemes.strang import Strang

__all__ = [
    "AbstractScheme",
    "CountScheme",
    "DiffraxSolver",
    "DriftImplicitSquareRoot",
    "Euler",
    "EulerMultinomial",
    "Exact",
    "GaussianScheme",
    "Gillespie",
    "HermiteExpansion",
    "HighOrderStrang",
    "JumpEuler",
    "JumpLinear",
    "JumpMixture",
    "Kessler",
    "LangevinSteps",
    "LinearNoise",
    "LocalLinear",
    "LogEuler",
    "MatchedJumps",
    "Milstein",
    "MomentClosure",
    "StableEuler",
    "Strang",
    "StudentEuler",
]
