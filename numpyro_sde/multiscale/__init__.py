"""Slow-fast systems and their limits: averaging, homogenisation, learned invariant laws."""

from numpyro_sde.multiscale.average import average
from numpyro_sde.multiscale.effective import EffectiveSDE, SampledEffectiveSDE, TwoHalvesEuler
from numpyro_sde.multiscale.fast_law import ScalarFast, UnnormalizedDensity
from numpyro_sde.multiscale.frozen import ErgodicAverage
from numpyro_sde.multiscale.rules import (
    Coordinatewise,
    GaussHermite,
    MonteCarlo,
    QuasiMonteCarlo,
)
from numpyro_sde.multiscale.slow_fast import SlowFastSDE
from numpyro_sde.multiscale.table import Table

__all__ = [
    "Coordinatewise",
    "EffectiveSDE",
    "ErgodicAverage",
    "GaussHermite",
    "MonteCarlo",
    "QuasiMonteCarlo",
    "SampledEffectiveSDE",
    "ScalarFast",
    "SlowFastSDE",
    "Table",
    "TwoHalvesEuler",
    "UnnormalizedDensity",
    "average",
]
