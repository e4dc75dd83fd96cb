"""Epidemics: an outbreak in a school, and half a century of cholera."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from numpyro_sde.datasets.files import read_columns


class BoardingSchoolFlu(NamedTuple):
    """Influenza in a boarding school of 763 boys, see :func:`load_boarding_school_flu`.

    Attributes:
        times: Days since the first case, 1 to 14, shape ``(14,)``.
        confined: Boys confined to bed, shape ``(14,)``.
        convalescent: Boys convalescent, shape ``(14,)``.

    Example:
        >>> from numpyro_sde.datasets import load_boarding_school_flu
        >>> data = load_boarding_school_flu()
        >>> int(data.confined.max()), int(data.times[data.confined.argmax()])
        (293, 6)
    """

    times: Float[np.ndarray, " time"]
    confined: Float[np.ndarray, " time"]
    convalescent: Float[np.ndarray, " time"]


class DaccaCholera(NamedTuple):
    """Cholera in Dacca, Bengal, see :func:`load_dacca_cholera`.

    Attributes:
        times: Ends of months in years, 1891 + 1/12, ..., 1941, shape ``(600,)``.
        deaths: Deaths from cholera in the month that ends then, shape ``(600,)``.
        knots: 1891 and the ends of months, where the population is given, shape ``(601,)``.
        population: Inhabitants of the district, shape ``(601,)``.
        growth: Its rate of growth, inhabitants a year, shape ``(601,)``.

    Example:
        >>> from numpyro_sde.datasets import load_dacca_cholera
        >>> data = load_dacca_cholera()
        >>> data.deaths[:3].astype(int).tolist(), int(data.population[0])
        ([2641, 939, 905], 2420656)
    """

    times: Float[np.ndarray, " time"]
    deaths: Float[np.ndarray, " time"]
    knots: Float[np.ndarray, " knot"]
    population: Float[np.ndarray, " knot"]
    growth: Float[np.ndarray, " knot"]


def load_boarding_school_flu() -> BoardingSchoolFlu:
    """Boys in bed and convalescent on 14 days of an outbreak in England, January 1978.

    Source: Anonymous (1978), "Influenza in a boarding school", British Medical Journal 1, 587; the
    daily counts as in the lessons of the pomp project (kingaa/short-course).

    Example:
        >>> from numpyro_sde.datasets import load_boarding_school_flu
        >>> load_boarding_school_flu().times.size
        14
    """
    return BoardingSchoolFlu(
        *read_columns("boarding_school_flu.csv", "day", "confined", "convalescent")
    )


def load_dacca_cholera() -> DaccaCholera:
    """Deaths from cholera in the district of Dacca in 600 months, 1891 to 1940.

    The population between censuses is the smooth curve that King et al. used. Source: King,
    Ionides, Pascual and Bouma (2008), "Inapparent infections and cholera dynamics", Nature 454,
    877-880; numbers as in pypomp (MIT licence), its covariates read off at the ends of months.

    Example:
        >>> from numpyro_sde.datasets import load_dacca_cholera
        >>> load_dacca_cholera().knots[[0, -1]].tolist()
        [1891.0, 1941.0]
    """
    month, deaths, population, growth = read_columns(
        "dacca_cholera.csv", "month", "deaths", "population", "growth"
    )
    knots = 1891.0 + month / 12.0
    return DaccaCholera(knots[1:].copy(), deaths[1:].copy(), knots, population, growth)
