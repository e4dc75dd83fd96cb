"""Interest rates: series that a short-rate diffusion describes directly."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from numpyro_sde.datasets.files import read_columns


class Treasury(NamedTuple):
    """US Treasury yields, see :func:`load_us_treasury`.

    Attributes:
        times: Decimal years at the start of each month, shape ``(558,)``.
        yields: Per cent a year, shape ``(558, 4)``, one column for each maturity.
        maturities: The columns' maturities in years: 1, 3, 5, 10.

    Example:
        >>> from numpyro_sde.datasets import load_us_treasury
        >>> load_us_treasury().maturities.tolist()
        [1.0, 3.0, 5.0, 10.0]
    """

    times: Float[np.ndarray, " time"]
    yields: Float[np.ndarray, "time maturity"]
    maturities: Float[np.ndarray, " maturity"]


class TreasuryBill(NamedTuple):
    """US Treasury bill rate, see :func:`load_us_tbill`.

    Attributes:
        times: Decimal years at the start of each quarter, shape ``(203,)``.
        rate: Per cent a year, shape ``(203,)``.

    Example:
        >>> from numpyro_sde.datasets import load_us_tbill
        >>> times, rate = load_us_tbill()
        >>> float(times[0]), float(times[-1])
        (1959.0, 2009.5)
    """

    times: Float[np.ndarray, " time"]
    rate: Float[np.ndarray, " time"]


def load_us_treasury() -> Treasury:
    """US Treasury constant-maturity yields, monthly averages, 1953-04 to 1999-09.

    558 months, four maturities (1, 3, 5 and 10 years), per cent a year, nothing missing.
    ``times`` follow the usual convention of monthly series: year + (month - 1) / 12.

    Source: Board of Governors of the Federal Reserve System, release H.15 (public domain), as
    distributed with the R package ``tseries``. Short-rate diffusions were compared on such
    series by Chan, Karolyi, Longstaff and Sanders (1992), Journal of Finance 47, 1209-1227,
    and Ait-Sahalia (1999), Journal of Finance 54, 1361-1395; their samples differ from this
    one, so their estimates are a guide and not a target.

    Returns:
        A :class:`Treasury` of float64 NumPy arrays.

    Example:
        >>> from numpyro_sde.datasets import load_us_treasury
        >>> treasury = load_us_treasury()
        >>> treasury.yields.shape
        (558, 4)
        >>> float(treasury.yields[:, 0].max())  # the one-year yield in August 1981
        16.72
    """
    columns = ("year", "month", *(f"tcm{years}y_percent" for years in (1, 3, 5, 10)))
    year, month, *yields = read_columns("us_treasury_monthly.csv", *columns)
    return Treasury(
        times=year + (month - 1.0) / 12.0,
        yields=np.stack(yields, axis=-1),
        maturities=np.array([1.0, 3.0, 5.0, 10.0]),
    )


def load_us_tbill() -> TreasuryBill:
    """US 3-month Treasury bill rate, quarterly, 1959Q1 to 2009Q3.

    203 quarters, per cent a year, nothing missing, 0.25 years apart.

    Source: ``macrodata`` of statsmodels (public domain; Federal Reserve Bank of St. Louis).
    Maximum likelihood under the exact transition law at step 0.25, conditional on the first
    value: Ornstein-Uhlenbeck (Vasicek) rate 0.1727, mean 5.021, scale 1.760, log likelihood
    -256.5205; Cox-Ingersoll-Ross rate 0.0397, mean 3.98, scale 0.6666, log likelihood
    -214.4892.

    Returns:
        A :class:`TreasuryBill` of float64 NumPy arrays.

    Example:
        >>> from numpyro_sde.datasets import load_us_tbill
        >>> tbill = load_us_tbill()
        >>> tbill.rate.shape, float(tbill.times[1] - tbill.times[0])
        ((203,), 0.25)
    """
    times, rate = read_columns("us_tbill_quarterly.csv", "time", "tbilrate")
    return TreasuryBill(times=times, rate=rate)
