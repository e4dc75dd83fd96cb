"""River and ocean series: long memory, a drifting level, a seasonal oscillation."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from numpyro_sde.datasets.files import read_columns


class NileMinima(NamedTuple):
    """Yearly minima of the Nile, see :func:`load_nile_minima`.

    Attributes:
        times: Calendar years 622 to 1284, shape ``(663,)``.
        level: Gauge units, about centimetres, shape ``(663,)``.

    Example:
        >>> from numpyro_sde.datasets import load_nile_minima
        >>> times, level = load_nile_minima()
        >>> int(times[0]), int(times[-1])
        (622, 1284)
    """

    times: Float[np.ndarray, " time"]
    level: Float[np.ndarray, " time"]


class NileFlow(NamedTuple):
    """Annual flow of the Nile, see :func:`load_nile_flow`.

    Attributes:
        times: Calendar years 1871 to 1970, shape ``(100,)``.
        flow: Annual volume in 1e8 cubic metres, shape ``(100,)``.

    Example:
        >>> from numpyro_sde.datasets import load_nile_flow
        >>> times, flow = load_nile_flow()
        >>> times.shape, flow.dtype
        ((100,), dtype('float64'))
    """

    times: Float[np.ndarray, " time"]
    flow: Float[np.ndarray, " time"]


class ElNino(NamedTuple):
    """Sea-surface temperature, see :func:`load_elnino_sst`.

    Attributes:
        times: Decimal years at the start of each month, shape ``(732,)``.
        temperature: Degrees Celsius, shape ``(732,)``.

    Example:
        >>> from numpyro_sde.datasets import load_elnino_sst
        >>> elnino = load_elnino_sst()
        >>> round(12 * float(elnino.times[1] - elnino.times[0]), 6)  # one month
        1.0
    """

    times: Float[np.ndarray, " time"]
    temperature: Float[np.ndarray, " time"]


def load_nile_minima() -> NileMinima:
    """Yearly minimum level of the Nile at the Roda gauge, years 622 to 1284.

    663 years, gauge units (about centimetres), nothing missing. The classic series for long
    memory.

    Source: Toussoun (1925), Memoire sur l'histoire du Nil, as distributed with the R package
    ``waveslim`` (BSD licence). Fractional Gaussian noise by exact maximum likelihood on
    ``level / 100``, mean and scale profiled out: Hurst index 0.8315, log likelihood 236.52
    without its constant ``-n/2 (log(2 pi) + 1)``; by Whittle's method 0.837 (Beran 1994,
    Statistics for Long-Memory Processes).

    Returns:
        A :class:`NileMinima` of float64 NumPy arrays.

    Example:
        >>> from numpyro_sde.datasets import load_nile_minima
        >>> nile = load_nile_minima()
        >>> nile.level.shape, float(nile.level[0])
        ((663,), 1157.0)
    """
    times, level = read_columns("nile_minima.csv", "year", "level_cm")
    return NileMinima(times=times, level=level)


def load_nile_flow() -> NileFlow:
    """Annual flow of the Nile at Aswan, 1871 to 1970.

    100 years, 1e8 cubic metres a year, nothing missing; the level drops about 1898.

    Source: ``nile`` of statsmodels (public domain), the series of Cobb (1978), Biometrika 65,
    243-251, and of Durbin and Koopman (2012), Time Series Analysis by State Space Methods,
    chapter 2. Local level model fitted by statsmodels: observation variance 15078, level
    variance 1478.8, log likelihood -632.538 of the years after the first, with the start
    N(0, 1e6) that statsmodels puts in place of a diffuse one.

    Returns:
        A :class:`NileFlow` of float64 NumPy arrays.

    Example:
        >>> from numpyro_sde.datasets import load_nile_flow
        >>> nile = load_nile_flow()
        >>> nile.flow.shape, float(nile.flow[0])
        ((100,), 1120.0)
    """
    times, flow = read_columns("nile_flow.csv", "year", "volume")
    return NileFlow(times=times, flow=flow)


def load_elnino_sst() -> ElNino:
    """Sea-surface temperature of the El Nino 1+2 region, monthly, 1950-01 to 2010-12.

    The file has one row of twelve months for each of 61 years; here it is one series of 732
    months in degrees Celsius, nothing missing, with ``times`` = year + (month - 1) / 12.

    Source: ``elnino`` of statsmodels (public domain; National Oceanic and Atmospheric
    Administration, Climate Prediction Center).

    Returns:
        An :class:`ElNino` of float64 NumPy arrays.

    Example:
        >>> from numpyro_sde.datasets import load_elnino_sst
        >>> elnino = load_elnino_sst()
        >>> elnino.temperature.shape, float(elnino.temperature[0])
        ((732,), 23.11)
    """
    months = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
    year, *monthly = read_columns("elnino_sst.csv", "YEAR", *months)
    return ElNino(
        times=(year[:, None] + np.arange(12.0) / 12.0).ravel(),
        temperature=np.stack(monthly, axis=-1).ravel(),
    )
