"""What snapshots cannot tell: stationary populations, starts that look alike from all sides.

One stationary density fixes at most the ratio of a reversible drift to the diffusion: not the time
scale, and nothing of a circulation. And a linear drift with additive noise is fixed by marginals
if and only if the first law has no generalised rotational symmetry (Guan, Janssens, Yadav and
others 2024, "Identifying drift, diffusion, and causal structure from temporal snapshots",
arXiv:2410.22729): a rotation of whitened cells about their mean leaves a normal cloud as it is.
"""

from __future__ import annotations

import itertools
import warnings
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import ArrayLike, Float

from numpyro_sde.grid import TimeGrid
from numpyro_sde.snapshots.cells import Cells, as_cells
from numpyro_sde.snapshots.clock import snapshot_clock
from numpyro_sde.statespace.checks import check_count

_SIGNIFICANT = 0.05
_MOST_CELLS = 400  # of a test: it compares all pairs


class IdentifiabilityReport(NamedTuple):
    """What was found in snapshots before any model is fitted.

    Attributes:
        ok: whether nothing speaks against them.
        reasons: what was found, in words.
        change: p-value, for each pair of neighbours, of the test that the two populations are the
            same, `(K - 1,)`: all large where the population is stationary.
        rotation: p-value, for each plane of the whitened first snapshot, of the test that a
            rotation in it changes nothing, `(P,)`; large where the start is symmetric. Empty for
            scalar states.

    Example:
        >>> import numpy as np, numpyro_sde as nsde
        >>> still = np.random.default_rng(0).normal(size=(3, 60, 2))
        >>> report = nsde.snapshots.identifiability([0.0, 1.0, 2.0], still)
        >>> report.ok, len(report.reasons)
        (False, 2)
    """

    ok: bool
    reasons: tuple[str, ...]
    change: Float[np.ndarray, " K-1"]
    rotation: Float[np.ndarray, " P"]


def identifiability(
    times: ArrayLike | TimeGrid,
    snapshots: Any,
    *,
    num_permutations: int = 200,
    seed: int = 0,
) -> IdentifiabilityReport:
    """Look for what snapshots cannot tell about a drift, whatever the method.

    Two permutation tests with the energy distance (Székely and Rizzo 2004). Neighbouring snapshots:
    where none differs from the next, the population is stationary as far as these cells show.
    The first snapshot, whitened, against itself rotated in each plane of its principal axes (one
    half of the cells against the other half, rotated): where no difference is seen, a linear drift
    is not unique. The tests do not prove symmetry; with few cells they miss much.

    Args:
        times: times of the snapshots, `(K,)`.
        snapshots: cells `(K, n, d)` or `(K, n)`, or a list of clouds.
        num_permutations: of each test, at least; more where there are many snapshots.
        seed: of the permutations.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: traced cells.

    Example:
        >>> import numpy as np, numpyro_sde as nsde
        >>> rng = np.random.default_rng(0)
        >>> moving = np.stack([rng.exponential(size=(300, 2)) + t for t in (0.0, 1.0)])
        >>> nsde.snapshots.identifiability([0.0, 1.0], moving).ok
        True
    """
    check_count("num_permutations", num_permutations, least=20)
    clock = snapshot_clock(times)
    cells = as_cells(snapshots, clock.times)
    if isinstance(cells.values, jax.core.Tracer):
        raise TypeError("identifiability looks at numbers: call it outside jit")
    rng = np.random.default_rng(seed)
    clouds = _clouds(cells)
    change = _changes(clouds, rng, num_permutations)
    rotation = _rotations(clouds[0], rng, num_permutations)
    reasons = []
    if _is_stationary(change):
        reasons.append(
            "the snapshots look stationary (smallest p-value of a change "
            f"{change.min():.2f}): they fix at most the ratio of a reversible drift to the "
            "diffusion, no time scale and no circulation"
        )
    if rotation.size and rotation.max() > _SIGNIFICANT:
        reasons.append(
            "the first snapshot is the same after a rotation, as far as its "
            f"{len(clouds[0])} cells show (p-value {rotation.max():.2f}): a linear drift may "
            "circulate in that plane unseen. Take a start that is off its rest point and not "
            "normal, or a prior that rules circulation in or out"
        )
    return IdentifiabilityReport(not reasons, tuple(reasons), change, rotation)


def warn_if_stationary(cells: Cells) -> None:
    """Warn where no snapshot differs from the next; nothing is said of traced cells."""
    if isinstance(cells.values, jax.core.Tracer) or cells.values.shape[1] < 10:
        return
    change = _changes(_clouds(cells, 100), np.random.default_rng(0), 60)
    if _is_stationary(change):
        warnings.warn(
            "the snapshots look stationary: what a bridge shows between them, and any time scale, "
            "is the reference's alone (see nsde.snapshots.identifiability)",
            UserWarning,
            stacklevel=3,
        )


def _is_stationary(change: np.ndarray) -> bool:
    """Whether no test of a change is significant, their number allowed for."""
    return bool(change.min() * change.size > _SIGNIFICANT)


def _clouds(cells: Cells, most: int = _MOST_CELLS) -> list[np.ndarray]:
    """Cells that are there, at most so many of each snapshot, evenly taken."""
    out = []
    for values, weights in zip(np.asarray(cells.values), np.asarray(cells.weights), strict=True):
        there = values[weights > 0]
        stride = max(int(np.ceil(len(there) / most)), 1)
        out.append(there[::stride])
    return out


def _changes(clouds: list[np.ndarray], rng: np.random.Generator, count: int) -> np.ndarray:
    # So many that the smallest p-value possible, times the number of tests, is significant.
    count = max(count, int(2 * len(clouds) / _SIGNIFICANT))
    pairs = itertools.pairwise(clouds)
    return np.array([energy_test(a, b, rng, count) for a, b in pairs])


def _rotations(cloud: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    """For each plane the p-value against symmetry, the smallest over two angles, allowed for."""
    n, d = cloud.shape
    if d < 2 or n < 2 * d + 2:
        return np.zeros(0)
    centred = cloud - cloud.mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred / n)
    if values.min() <= 1e-12 * max(values.max(), 1e-300):
        return np.zeros(0)
    white = centred @ vectors / np.sqrt(values)
    order = rng.permutation(n)
    count = max(count, int(4 / _SIGNIFICANT))  # the smaller of two p-values, times two
    left, right = white[order[: n // 2]], white[order[n // 2 :]]
    found = []
    for i, j in itertools.combinations(range(d), 2):
        tests = []
        for angle in (np.pi / 2, np.pi / 3):
            turned = right.copy()
            c, s = np.cos(angle), np.sin(angle)
            turned[:, i], turned[:, j] = (
                c * right[:, i] - s * right[:, j],
                s * right[:, i] + c * right[:, j],
            )
            tests.append(energy_test(left, turned, rng, count))
        found.append(min(1.0, 2.0 * min(tests)))
    return np.array(found)


def energy_test(
    a: Float[np.ndarray, "n d"],
    b: Float[np.ndarray, "m d"],
    rng: np.random.Generator,
    num_permutations: int,
) -> float:
    """P-value of the permutation test that two clouds have one law, by the energy distance.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> energy_test(rng.normal(size=(40, 1)), rng.normal(2.0, 1.0, (40, 1)), rng, 99) < 0.05
        True
    """
    both = np.concatenate([a, b])
    scale = both.std(0)
    both = both / np.where(scale > 0, scale, 1.0)
    distance = np.sqrt(np.maximum(((both[:, None] - both[None]) ** 2).sum(-1), 0.0))
    n, m = len(a), len(b)
    signs = np.concatenate([np.full(n, 1.0 / n), np.full(m, -1.0 / m)])
    shuffled = np.array([rng.permutation(signs) for _ in range(num_permutations)])
    drawn = -np.einsum("pi,pi->p", shuffled @ distance, shuffled)
    observed = -signs @ distance @ signs
    return float((1 + np.sum(drawn >= observed)) / (num_permutations + 1))
