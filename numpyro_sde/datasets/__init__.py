"""Small real data sets, as float64 NumPy arrays with their units and sources.

Each ``load_*`` function reads a CSV file that ships with the package and returns a named tuple:
``times`` first, then the measured values. Panels are arrays of shape (subject, time).
"""

from numpyro_sde.datasets.biology import (
    HareLynx,
    LotkaVolterraCounts,
    Lynx,
    RepeatedDoses,
    Theophylline,
    load_hare_lynx,
    load_lotka_volterra,
    load_lynx,
    load_repeated_doses,
    load_theophylline,
)
from numpyro_sde.datasets.cells import Myoblasts, load_myoblasts
from numpyro_sde.datasets.climate import (
    ElNino,
    NileFlow,
    NileMinima,
    load_elnino_sst,
    load_nile_flow,
    load_nile_minima,
)
from numpyro_sde.datasets.epidemics import (
    BoardingSchoolFlu,
    DaccaCholera,
    load_boarding_school_flu,
    load_dacca_cholera,
)
from numpyro_sde.datasets.finance import (
    Treasury,
    TreasuryBill,
    load_us_tbill,
    load_us_treasury,
)

__all__ = [
    "BoardingSchoolFlu",
    "DaccaCholera",
    "ElNino",
    "HareLynx",
    "LotkaVolterraCounts",
    "Lynx",
    "Myoblasts",
    "NileFlow",
    "NileMinima",
    "RepeatedDoses",
    "Theophylline",
    "Treasury",
    "TreasuryBill",
    "load_boarding_school_flu",
    "load_dacca_cholera",
    "load_elnino_sst",
    "load_hare_lynx",
    "load_lotka_volterra",
    "load_lynx",
    "load_myoblasts",
    "load_nile_flow",
    "load_nile_minima",
    "load_repeated_doses",
    "load_theophylline",
    "load_us_tbill",
    "load_us_treasury",
]
