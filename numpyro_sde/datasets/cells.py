"""Snapshots of cells: each is seen once, at one of a few times."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from numpyro_sde.datasets.files import read_columns

_CYCLE = ("CDK1", "CCNB1", "CCNB2", "TOP2A", "AURKA", "BUB1", "MKI67")
_MUSCLE = ("MYOG", "MEF2C", "MYH3", "TNNT1", "TNNT2", "TNNC1", "MYL1", "MYL4", "ENO3")


class Myoblasts(NamedTuple):
    """Single cells on their way to muscle, see :func:`load_myoblasts`.

    Attributes:
        times: Hours after the switch of medium, 0, 24, 48 and 72, shape ``(4,)``.
        hours: The hour of each cell, one of ``times``, shape ``(271,)``.
        cycle: log10(FPKM + 1) of seven genes of the cell cycle, shape ``(271, 7)``: CDK1, CCNB1,
            CCNB2, TOP2A, AURKA, BUB1, MKI67.
        muscle: log10(FPKM + 1) of nine genes of muscle, shape ``(271, 9)``: MYOG, MEF2C, MYH3,
            TNNT1, TNNT2, TNNC1, MYL1, MYL4, ENO3.
        components: First two principal components of log10(FPKM + 1), not scaled, of the 1,000
            genes with the largest variance among the 9,337 with FPKM of 1 or more in 50 or more
            cells, shape ``(271, 2)``. The first has muscle at its upper end and fibroblasts at its
            lower, the second leads out of the cell cycle.

    Example:
        >>> from numpyro_sde.datasets import load_myoblasts
        >>> data = load_myoblasts()
        >>> [int((data.hours == t).sum()) for t in data.times]
        [69, 74, 79, 49]
    """

    times: Float[np.ndarray, " time"]
    hours: Float[np.ndarray, " cell"]
    cycle: Float[np.ndarray, "cell 7"]
    muscle: Float[np.ndarray, "cell 9"]
    components: Float[np.ndarray, "cell 2"]


def load_myoblasts() -> Myoblasts:
    """Human muscle precursors that stop dividing and become muscle: snapshots of 271 cells.

    Primary myoblasts grew in rich medium and were switched to a poor one, which makes them
    differentiate. 69, 74, 79 and 49 cells were taken 0, 24, 48 and 72 hours later and sequenced
    one by one, so that no cell is seen twice. Sixteen genes of 47,192 are given here, and two
    principal components. Single genes are often not seen in a cell at all, which is an exact zero.
    The cells at 24 hours and later are a mixture: many become muscle, some stay as they were, some
    are no myoblasts (Trapnell et al. find three states).

    Source: Trapnell et al. (2014), Nature Biotechnology 32, 381-386 (GEO accession GSE52529), as in
    the Bioconductor package HSMMSingleCell by Cole Trapnell (Artistic License 2.0, whose text and
    the differences from the original ship as ``myoblasts.LICENSE`` beside the table).

    Returns:
        A :class:`Myoblasts` of float64 NumPy arrays.

    Example:
        >>> from numpyro_sde.datasets import load_myoblasts
        >>> data = load_myoblasts()
        >>> out = data.components[:, 1]  # of the cell cycle
        >>> [round(float(out[data.hours == t].mean()), 1) for t in data.times]
        [-6.0, 1.5, 3.4, 0.7]
    """
    hours, *columns = read_columns("myoblasts.csv", "hours", *_CYCLE, *_MUSCLE, "pc1", "pc2")
    genes = np.stack(columns, axis=-1)
    end = len(_CYCLE) + len(_MUSCLE)
    return Myoblasts(
        times=np.unique(hours),
        hours=hours,
        cycle=genes[:, : len(_CYCLE)].copy(),
        muscle=genes[:, len(_CYCLE) : end].copy(),
        components=genes[:, end:].copy(),
    )
