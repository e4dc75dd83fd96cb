"""Markov jump processes and reaction networks: the mathematics of discrete states, in plain JAX."""

from numpyro_sde.jumps.bridges import (
    JumpTimes,
    PathStatistics,
    draw_jumps,
    path_statistics,
    path_totals,
    states_at,
)
from numpyro_sde.jumps.chain import MarkovJumpProcess
from numpyro_sde.jumps.closure import ClosedMoments, moment_closure
from numpyro_sde.jumps.generators import (
    entropy_production,
    generator_matrix,
    mean_first_passage_times,
    stationary_law,
)
from numpyro_sde.jumps.multinomial import exit_log_pmf, noisy_exit_log_pmf
from numpyro_sde.jumps.reactions import ReactionNetwork
from numpyro_sde.jumps.uniformisation import transition_matrices

__all__ = [
    "ClosedMoments",
    "JumpTimes",
    "MarkovJumpProcess",
    "PathStatistics",
    "ReactionNetwork",
    "draw_jumps",
    "entropy_production",
    "exit_log_pmf",
    "generator_matrix",
    "mean_first_passage_times",
    "moment_closure",
    "noisy_exit_log_pmf",
    "path_statistics",
    "path_totals",
    "states_at",
    "stationary_law",
    "transition_matrices",
]
