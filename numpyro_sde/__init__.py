"""Bayesian inference for stochastic differential equations, as a NumPyro plugin."""

from numpyro_sde.runtime import clock as _clock  # first: it takes the time of importing

# isort: split
from numpyro_sde import (
    checking,
    data,
    datasets,
    diagnostics,
    distributions,
    fields,
    filters,
    guides,
    handlers,
    infer,
    jumps,
    laws,
    multiscale,
    noise,
    processes,
    reparam,
    schemes,
    snapshots,
)
from numpyro_sde.accumulate import accumulate
from numpyro_sde.checking.run import check
from numpyro_sde.diagnostics.prediction.forecast import forecast
from numpyro_sde.distributions.compound_poisson import CompoundPoisson
from numpyro_sde.distributions.jump_path import JumpPath
from numpyro_sde.distributions.path import SDEPath
from numpyro_sde.distributions.path_law import AbstractPathLaw
from numpyro_sde.distributions.reactions import ReactionPath
from numpyro_sde.distributions.steady_state import steady_state
from numpyro_sde.effects import random_effects
from numpyro_sde.events import Events, doses
from numpyro_sde.grid import TimeGrid
from numpyro_sde.infer.evidence import evidence
from numpyro_sde.inputs import Input
from numpyro_sde.jumps.chain import MarkovJumpProcess
from numpyro_sde.jumps.reactions import ReactionNetwork
from numpyro_sde.jumps.switching import SwitchingSDE
from numpyro_sde.multiscale import ConditionalFlow, SlowFastSDE, average, homogenize
from numpyro_sde.observe import observe
from numpyro_sde.panels.chain import Chain
from numpyro_sde.panels.fitting import PanelFits, fit_panel
from numpyro_sde.panels.sharding import shard_chains, shard_panel
from numpyro_sde.panels.slurm import SubmititExecutor
from numpyro_sde.panels.two_stage import SeriesDraws
from numpyro_sde.runtime import avoid_wrong_sums, configure_cpu, enable_compilation_cache
from numpyro_sde.sde import SDE
from numpyro_sde.snapshots import (
    SnapshotLaw,
    interpolant,
    refine_reference,
    schrodinger_bridge,
)
from numpyro_sde.states.filtering import (
    filter_additive,
    filter_path,
    state_space_model,
    two_filter,
)
from numpyro_sde.states.regime_law import RegimeLaw, regime_law
from numpyro_sde.states.smoothing import smooth
from numpyro_sde.states.stream import FilterStream, StreamState

avoid_wrong_sums()
_clock.finish_import()

__version__ = "0.1.0"

__all__ = [
    "SDE",
    "AbstractPathLaw",
    "Chain",
    "CompoundPoisson",
    "ConditionalFlow",
    "Events",
    "FilterStream",
    "Input",
    "JumpPath",
    "MarkovJumpProcess",
    "PanelFits",
    "ReactionNetwork",
    "ReactionPath",
    "RegimeLaw",
    "SDEPath",
    "SeriesDraws",
    "SlowFastSDE",
    "SnapshotLaw",
    "StreamState",
    "SubmititExecutor",
    "SwitchingSDE",
    "TimeGrid",
    "accumulate",
    "average",
    "check",
    "checking",
    "configure_cpu",
    "data",
    "datasets",
    "diagnostics",
    "distributions",
    "doses",
    "enable_compilation_cache",
    "evidence",
    "fields",
    "filter_additive",
    "filter_path",
    "filters",
    "fit_panel",
    "forecast",
    "guides",
    "handlers",
    "homogenize",
    "infer",
    "interpolant",
    "jumps",
    "laws",
    "multiscale",
    "noise",
    "observe",
    "processes",
    "random_effects",
    "refine_reference",
    "regime_law",
    "reparam",
    "schemes",
    "schrodinger_bridge",
    "shard_chains",
    "shard_panel",
    "smooth",
    "snapshots",
    "state_space_model",
    "steady_state",
    "two_filter",
]
