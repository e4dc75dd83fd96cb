"""MCMC kernels, with paths in them or for any model; they run under `numpyro.infer.MCMC`."""

from numpyro_sde.infer.blackjax import BlackJAX, BlackJAXState
from numpyro_sde.infer.checkpoints import CheckpointedMCMC
from numpyro_sde.infer.collapsed_field import CollapsedField, CollapsedFieldState
from numpyro_sde.infer.conditional import ConditionalSMC, ConditionalSMCState
from numpyro_sde.infer.conditional_forward import ConditionalForward
from numpyro_sde.infer.draw_files import read_draws
from numpyro_sde.infer.evidence import evidence
from numpyro_sde.infer.evidence_result import Evidence, EvidenceRound
from numpyro_sde.infer.gamma_rates import GammaRates, GammaRatesState
from numpyro_sde.infer.ibis import RenewedDraws, ibis
from numpyro_sde.infer.iterated_filtering import IteratedFiltering
from numpyro_sde.infer.langevin import UnderdampedLangevin, UnderdampedLangevinState
from numpyro_sde.infer.likelihood_fit import LikelihoodFit
from numpyro_sde.infer.metric import guided_metric
from numpyro_sde.infer.parisian import ParisianEstimate, parisian_gibbs
from numpyro_sde.infer.particle_gibbs import ParticleGibbs
from numpyro_sde.infer.pmmh import PMMH, PMMHState
from numpyro_sde.infer.profile import AdjustedProfile, Profile, adjusted_profile
from numpyro_sde.infer.racing import Contestant, ProposalRace
from numpyro_sde.infer.score import Score, score
from numpyro_sde.infer.split_nuts import SplitNUTS
from numpyro_sde.infer.tempered import Tempered, TemperedState
from numpyro_sde.infer.tempering_report import TemperingReport

__all__ = [
    "PMMH",
    "AdjustedProfile",
    "BlackJAX",
    "BlackJAXState",
    "CheckpointedMCMC",
    "CollapsedField",
    "CollapsedFieldState",
    "ConditionalForward",
    "ConditionalSMC",
    "ConditionalSMCState",
    "Contestant",
    "Evidence",
    "EvidenceRound",
    "GammaRates",
    "GammaRatesState",
    "IteratedFiltering",
    "LikelihoodFit",
    "PMMHState",
    "ParisianEstimate",
    "ParticleGibbs",
    "Profile",
    "ProposalRace",
    "RenewedDraws",
    "Score",
    "SplitNUTS",
    "Tempered",
    "TemperedState",
    "TemperingReport",
    "UnderdampedLangevin",
    "UnderdampedLangevinState",
    "adjusted_profile",
    "evidence",
    "guided_metric",
    "ibis",
    "parisian_gibbs",
    "read_draws",
    "score",
]
