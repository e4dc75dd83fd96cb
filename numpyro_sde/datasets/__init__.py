"""Small real data sets, as float64 NumPy arrays with their units and sources.

Each ``load_*`` function reads a CSV file that ships with the package and returns a named tuple:
``times`` first, then the measured values. Panels are arrays of shape (subject, time).
"""

from numpyro_sde.datasets.biology import (
    LotkaVolterraCounts,
    Lynx,
    Theophylline,
    load_lotka_volterra,
    load_lynx,
    load_theophylline,
)
from numpyro_sde.datasets.climate import (
    ElNino,
    NileFlow,
    NileMinima,
    load_elnino_sst,
    load_nile_flow,
    load_nile_minima,
)
from numpyro_sde.datasets.finance import (
    Treasury,
    TreasuryBill,
    load_us_tbill,
    load_us_treasury,
)

__all__ = [
    "ElNino",
    "LotkaVolterraCounts",
    "Lynx",
    "NileFlow",
    "NileMinima",
    "Theophylline",
    "Treasury",
    "TreasuryBill",
    "load_elnino_sst",
    "load_lotka_volterra",
    "load_lynx",
    "load_nile_flow",
    "load_nile_minima",
    "load_theophylline",
    "load_us_tbill",
    "load_us_treasury",
]
