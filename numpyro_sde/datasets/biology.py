"""Populations and pharmacokinetics: oscillating counts, and a panel of short series."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from numpyro_sde.datasets.files import read_columns


class LotkaVolterraCounts(NamedTuple):
    """Noisy counts of a simulated predator-prey system, see :func:`load_lotka_volterra`.

    Attributes:
        times: 0, 2, ..., 30, shape ``(16,)``.
        counts: Prey and predators, shape ``(16, 2)``; prey alone, shape ``(16,)``.
        rates: The three rate constants that the data were simulated with, shape ``(3,)``:
            prey births, predation, predator deaths.
        start: Prey and predators at time 0 in the simulation, shape ``(2,)``.
        noise_scale: Standard deviation of the measurement noise, shape ``()``.

    Example:
        >>> from numpyro_sde.datasets import load_lotka_volterra
        >>> data = load_lotka_volterra()
        >>> data.rates.tolist(), float(data.noise_scale)
        ([1.0, 0.005, 0.6], 10.0)
    """

    times: Float[np.ndarray, " time"]
    counts: Float[np.ndarray, "time *species"]
    rates: Float[np.ndarray, " 3"]
    start: Float[np.ndarray, " 2"]
    noise_scale: Float[np.ndarray, ""]


class HareLynx(NamedTuple):
    """Snowshoe hares and Canadian lynx, see :func:`load_hare_lynx`.

    Attributes:
        times: Calendar years 1900 to 1920, shape ``(21,)``.
        pelts: Hare and lynx, thousands of pelts a year, shape ``(21, 2)``.

    Example:
        >>> from numpyro_sde.datasets import load_hare_lynx
        >>> times, pelts = load_hare_lynx()
        >>> times[pelts.argmax(axis=0)].astype(int).tolist()  # hares first, lynx a year later
        [1903, 1904]
    """

    times: Float[np.ndarray, " time"]
    pelts: Float[np.ndarray, "time 2"]


class RepeatedDoses(NamedTuple):
    """A simulated drug given every twelve hours, see :func:`load_repeated_doses`.

    Attributes:
        times: Hours since the first dose, each subject's own clock, shape ``(24, 10)``.
        concentration: Plasma concentration in mg/l, shape ``(24, 10)``.
        weight: Body weight in kg, shape ``(24,)``.
        dose_times: Hours of the doses, the same for all, shape ``(6,)``.
        doses: Amounts in mg, shape ``(6,)``.

    Example:
        >>> from numpyro_sde.datasets import load_repeated_doses
        >>> data = load_repeated_doses()
        >>> data.dose_times.tolist(), float(data.doses[0])
        ([0.0, 12.0, 24.0, 36.0, 48.0, 60.0], 300.0)
    """

    times: Float[np.ndarray, "subject time"]
    concentration: Float[np.ndarray, "subject time"]
    weight: Float[np.ndarray, " subject"]
    dose_times: Float[np.ndarray, " dose"]
    doses: Float[np.ndarray, " dose"]


class Lynx(NamedTuple):
    """Canadian lynx trappings, see :func:`load_lynx`.

    Attributes:
        times: Calendar years 1821 to 1934, shape ``(114,)``.
        trappings: Animals a year, shape ``(114,)``.

    Example:
        >>> from numpyro_sde.datasets import load_lynx
        >>> times, trappings = load_lynx()
        >>> int(times[trappings.argmax()])  # the largest catch
        1904
    """

    times: Float[np.ndarray, " time"]
    trappings: Float[np.ndarray, " time"]


class Theophylline(NamedTuple):
    """Oral theophylline in twelve subjects, see :func:`load_theophylline`.

    Attributes:
        times: Hours since the dose, each subject's own clock, shape ``(12, 11)``.
        concentration: Serum concentration in mg/l, shape ``(12, 11)``.
        dose: Dose in mg for each kg of body weight, shape ``(12,)``.
        weight: Body weight in kg, shape ``(12,)``.

    Example:
        >>> from numpyro_sde.datasets import load_theophylline
        >>> data = load_theophylline()
        >>> (data.dose * data.weight).round().astype(int).tolist()[:3]  # mg
        [320, 319, 319]
    """

    times: Float[np.ndarray, "subject time"]
    concentration: Float[np.ndarray, "subject time"]
    dose: Float[np.ndarray, " subject"]
    weight: Float[np.ndarray, " subject"]


def load_lotka_volterra(prey_only: bool = False) -> LotkaVolterraCounts:
    """Predator-prey counts, simulated exactly and observed with noise.

    One path of the stochastic Lotka-Volterra system by Gillespie's algorithm, with hazards
    ``1 x``, ``0.005 x z`` and ``0.6 z`` (x prey, z predators) from (50, 100), observed at times
    0, 2, ..., 30 with independent N(0, 10^2) errors (so counts are not whole and may be
    negative for other seeds).

    Source: data sets ``LVnoise10`` and ``LVpreyNoise10`` of the software ``smfsb`` (Apache-2.0)
    to Wilkinson, Stochastic Modelling for Systems Biology. Golightly and Wilkinson (2011),
    Interface Focus 1, 807-820, infer such rates by particle MCMC.

    Args:
        prey_only: Give the file in which only prey was recorded, with counts of shape ``(16,)``.

    Returns:
        A :class:`LotkaVolterraCounts` of float64 NumPy arrays.

    Example:
        >>> from numpyro_sde.datasets import load_lotka_volterra
        >>> load_lotka_volterra().counts.shape, load_lotka_volterra(prey_only=True).counts.shape
        ((16, 2), (16,))
    """
    if prey_only:
        times, counts = read_columns("lotka_volterra_prey_noise10.csv", "t", "x")
    else:
        times, *both = read_columns("lotka_volterra_noise10.csv", "t", "x1", "x2")
        counts = np.stack(both, axis=-1)
    return LotkaVolterraCounts(
        times=times,
        counts=counts,
        rates=np.array([1.0, 0.005, 0.6]),
        start=np.array([50.0, 100.0]),
        noise_scale=np.array(10.0),
    )


def load_lynx() -> Lynx:
    """Canadian lynx trapped in the Mackenzie River district, yearly, 1821 to 1934.

    114 years, numbers of animals, nothing missing; a cycle of about ten years.

    Source: Elton and Nicholson (1942), Journal of Animal Ecology 11, 215-244, as distributed
    with R (``datasets::lynx``), whose summary is: minimum 39, median 771, mean 1538,
    maximum 6991.

    Returns:
        A :class:`Lynx` of float64 NumPy arrays.

    Example:
        >>> from numpyro_sde.datasets import load_lynx
        >>> lynx = load_lynx()
        >>> lynx.trappings.shape, float(lynx.trappings.max())
        ((114,), 6991.0)
    """
    times, trappings = read_columns("lynx_1821_1934.csv", "t", "x")
    return Lynx(times=times, trappings=trappings)


def load_hare_lynx() -> HareLynx:
    """Hares and lynx of the Hudson's Bay Company, thousands of pelts a year, 1900 to 1920.

    21 years of both, nothing missing; two cycles of about ten years, the lynx a year or two behind.

    Source: records of the Hudson's Bay Company as tabulated by Howard (2009), Modeling Basics,
    after Elton and Nicholson (1942), Journal of Animal Ecology 11, 215-244. The Lotka-Volterra
    ordinary differential equation with log-normal noise gives births 0.55 a year, predation 0.028,
    lynx deaths 0.80 and growth 0.024, with noise sds of 0.25 (posterior means of Carpenter 2018,
    Predator-Prey Population Dynamics: the Lotka-Volterra model in Stan).

    Returns:
        A :class:`HareLynx` of float64 NumPy arrays.

    Example:
        >>> from numpyro_sde.datasets import load_hare_lynx
        >>> load_hare_lynx().pelts[0].tolist()
        [30.0, 4.0]
    """
    columns = ("year", "hare_thousands", "lynx_thousands")
    times, *both = read_columns("hare_lynx_1900_1920.csv", *columns)
    return HareLynx(times=times, pelts=np.stack(both, axis=-1))


def load_repeated_doses() -> RepeatedDoses:
    """Plasma concentrations under a dose every twelve hours: simulated, with system noise.

    24 subjects, six doses of 300 mg by mouth, ten samples each at times of their own, some of
    them just before a dose. Not measured on anybody: simulated exactly from one-compartment
    kinetics with first-order absorption and white noise on the concentration, so that a model
    without system noise is wrong here. Truth: absorption 1.2/h, elimination 0.10/h, volume 30 l for
    70 kg and in proportion to weight (medians); sds of their logs 0.30, 0.25, 0.15; system noise
    0.35 mg/l per root hour; measurement noise 0.20 mg/l. A sample at a dose's time comes before it.

    Source: ``tests/datasets/repeated_doses.py`` of this package, which writes the file anew.

    Returns:
        A :class:`RepeatedDoses` of float64 NumPy arrays.

    Example:
        >>> from numpyro_sde.datasets import load_repeated_doses
        >>> load_repeated_doses().concentration.shape
        (24, 10)
    """
    subject, weight, times, concentration = read_columns(
        "repeated_doses.csv", "subject", "weight", "time", "conc"
    )
    panel = np.argsort(subject, kind="stable").reshape(24, 10)
    return RepeatedDoses(
        times=times[panel],
        concentration=concentration[panel],
        weight=weight[panel[:, 0]],
        dose_times=12.0 * np.arange(6),
        doses=np.full(6, 300.0),
    )


def load_theophylline() -> Theophylline:
    """Serum theophylline after one oral dose: twelve subjects, eleven samples each.

    A balanced panel of shape (subject, time) that needs no padding: every subject gave eleven
    samples over about 25 hours, each at its own times. ``times`` are hours, ``concentration``
    mg/l, ``dose`` mg/kg and ``weight`` kg, so ``dose * weight`` is the dose in mg (about 320).

    Source: Boeckmann, Sheiner and Beal (1994), NONMEM Users Guide, part V, as distributed with
    R (``datasets::Theoph``). The one-compartment ordinary differential equation with first-order
    absorption gives log elimination rate -2.4547, log absorption rate 0.4655 and log clearance
    -3.2272 (Pinheiro and Bates 2000, Mixed-Effects Models in S and S-PLUS).

    Returns:
        A :class:`Theophylline` of float64 NumPy arrays.

    Example:
        >>> from numpyro_sde.datasets import load_theophylline
        >>> theophylline = load_theophylline()
        >>> theophylline.concentration.shape
        (12, 11)
    """
    subject, weight, dose, times, concentration = read_columns(
        "theophylline.csv", "Subject", "Wt", "Dose", "Time", "conc"
    )
    # A stable sort by subject keeps each subject's samples in the order of time.
    panel = np.argsort(subject, kind="stable").reshape(12, 11)
    return Theophylline(
        times=times[panel],
        concentration=concentration[panel],
        dose=dose[panel[:, 0]],
        weight=weight[panel[:, 0]],
    )
