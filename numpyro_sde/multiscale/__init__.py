"""Slow-fast systems and their limits: averaging, homogenisation, learned invariant laws.

Systems, nodes, tables, simulations and effective equations are core: plain JAX, no NumPyro. What
needs NumPyro stands above the guides, whose flow it uses: `laws` (nodes of distributions),
`average`, `homogenize`, and `flow` (`ConditionalFlow` and its sites).
"""

from numpyro_sde.multiscale.average import average
from numpyro_sde.multiscale.cell_problem import CellProblem
from numpyro_sde.multiscale.effective import EffectiveSDE, SampledEffectiveSDE, TwoHalvesEuler
from numpyro_sde.multiscale.fast_law import ScalarFast, UnnormalizedDensity
from numpyro_sde.multiscale.flow import ConditionalFlow
from numpyro_sde.multiscale.frozen import ErgodicAverage
from numpyro_sde.multiscale.green_kubo import GreenKubo
from numpyro_sde.multiscale.homogenize import homogenize
from numpyro_sde.multiscale.rules import (
    Coordinatewise,
    GaussHermite,
    MonteCarlo,
    QuasiMonteCarlo,
)
from numpyro_sde.multiscale.slow_fast import SlowFastSDE
from numpyro_sde.multiscale.table import Table
from numpyro_sde.multiscale.two_scale import TwoScaleLangevin

__all__ = [
    "CellProblem",
    "ConditionalFlow",
    "Coordinatewise",
    "EffectiveSDE",
    "ErgodicAverage",
    "GaussHermite",
    "GreenKubo",
    "MonteCarlo",
    "QuasiMonteCarlo",
    "SampledEffectiveSDE",
    "ScalarFast",
    "SlowFastSDE",
    "Table",
    "TwoHalvesEuler",
    "TwoScaleLangevin",
    "UnnormalizedDensity",
    "average",
    "homogenize",
]
