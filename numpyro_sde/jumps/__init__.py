"""Markov jump processes and reaction networks: the mathematics of discrete states, in plain JAX."""

from numpyro_sde.jumps.bridges import (
    JumpTimes,
    PathStatistics,
    draw_jumps,
    path_statistics,
    states_at,
)
from numpyro_sde.jumps.chain import MarkovJumpProcess
from numpyro_sde.jumps.generators import (
    entropy_production,
    generator_matrix,
    mean_first_passage_times,
    stationary_law,
)
from numpyro_sde.jumps.uniformisation import transition_matrices

__all__ = [
    "JumpTimes",
    "MarkovJumpProcess",
    "PathStatistics",
    "draw_jumps",
    "entropy_production",
    "generator_matrix",
    "mean_first_passage_times",
    "path_statistics",
    "states_at",
    "stationary_law",
    "transition_matrices",
]
