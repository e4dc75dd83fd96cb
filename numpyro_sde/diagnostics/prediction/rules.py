"""Proper scoring rules of draws and of normal laws, on NumPy arrays. Smaller is better.

Source: Gneiting and Raftery (2007), "Strictly proper scoring rules, prediction, and estimation",
Journal of the American Statistical Association 102, 359-378; the fair forms, Ferro (2014), "Fair
scores for ensemble forecasts", Quarterly Journal of the Royal Meteorological Society 140,
1917-1923. Tests hold them against the package scoringrules.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import ArrayLike, Float
from scipy.special import logsumexp, ndtr

_CHUNK = 256  # points whose pairs of draws are compared at once
_ROOT_PI = np.sqrt(np.pi)


def crps(
    draws: Float[ArrayLike, "draw *shape"], y: Float[ArrayLike, "*shape"], *, fair: bool = False
) -> Float[np.ndarray, "*shape"]:
    """Continuous ranked probability score of draws, in the unit of the data; NaN where `y` is.

    `mean |x_i - y| - mean |x_i - x_j| / 2`, by sorting, in O(M log M). It is the absolute error
    of a single draw, and grows with bias and with spread.

    Args:
        draws: Draws of the prediction, first axis.
        y: What came.
        fair: Divide the second term by `M (M - 1)` pairs instead of `M^2`: unbiased for the law
            that the draws come from; take it to compare forecasts of few or unequal numbers.

    Example:
        >>> from numpyro_sde.diagnostics import crps
        >>> ensemble = [-0.2, 0.1, 0.4, 0.9, 1.7]
        >>> round(float(crps(ensemble, 1.0)), 3), round(float(crps(ensemble, 1.0, fair=True)), 3)
        (0.332, 0.24)
    """
    draws, y = _matched(draws, y)
    number = len(draws)
    rank = 2.0 * np.arange(number) - (number - 1.0)
    error = np.abs(draws - y).mean(axis=0)
    pairs = number * (number - 1 if fair else number)
    if not pairs:
        return np.where(np.isnan(y), np.nan, error)
    spread = np.tensordot(rank, np.sort(draws, axis=0), axes=1) / pairs
    return error - spread


def crps_normal(
    mean: ArrayLike, sd: ArrayLike, y: Float[ArrayLike, "*shape"]
) -> Float[np.ndarray, "*shape"]:
    """Continuous ranked probability score of a normal law.

    Example:
        >>> round(float(crps_normal(0.3, 1.2, 1.0)), 6)
        0.438869
    """
    z = (np.asarray(y, np.float64) - mean) / sd
    density = np.exp(-0.5 * z**2) / np.sqrt(2.0 * np.pi)
    return np.asarray(sd * (z * (2.0 * ndtr(z) - 1.0) + 2.0 * density - 1.0 / _ROOT_PI))


def energy_score(
    draws: Float[ArrayLike, "draw *shape d"],
    y: Float[ArrayLike, "*shape d"],
    *,
    fair: bool = False,
) -> Float[np.ndarray, "*shape"]:
    """Energy score: the CRPS of vectors, by Euclidean distances; NaN where a component is.

    It sees the dependence of the components weakly, and adds up their units: scale them first.
    Costs O(M^2) for each vector.

    Args:
        draws: Draws of the prediction, first axis; components last.
        y: What came.
        fair: As for :func:`crps`.

    Example:
        >>> import numpy as np
        >>> from numpyro_sde.diagnostics import energy_score
        >>> float(energy_score(np.array([[0.0, 0.0], [0.0, 2.0]]), np.array([0.0, 1.0])))
        0.5
    """
    draws, y = _matched(draws, y)
    if y.ndim < 1:
        raise ValueError("y must have its components on a last axis; of scalars take crps")
    number, lead = len(draws), y.shape[:-1]
    flat, target = draws.reshape(number, -1, y.shape[-1]), y.reshape(-1, y.shape[-1])
    error = np.linalg.norm(flat - target, axis=-1).mean(axis=0)
    spread = np.empty(len(target))
    step = max(1, _CHUNK * 256 // number)
    for point in range(len(target)):
        x = flat[:, point]
        rows = (x[i : i + step, None] - x[None] for i in range(0, number, step))
        spread[point] = sum(float(np.linalg.norm(part, axis=-1).sum()) for part in rows)
    pairs = max(number * (number - 1 if fair else number), 1)
    return (error - 0.5 * spread / pairs).reshape(lead)


def log_score(log_density: Float[ArrayLike, "draw *shape"]) -> Float[np.ndarray, "*shape"]:
    """Log density of what came under the mixture of all draws' predictions. Larger is better.

    Args:
        log_density: Log density of each point under the prediction of each parameter draw.

    Example:
        >>> import numpy as np
        >>> round(float(log_score(np.log([0.2, 0.4]))), 6) == round(float(np.log(0.3)), 6)
        True
    """
    log_density = np.asarray(log_density, np.float64)
    return logsumexp(log_density, axis=0) - np.log(log_density.shape[0])


def interval_hit(
    draws: Float[ArrayLike, "draw *shape"], y: Float[ArrayLike, "*shape"], prob: float
) -> Float[np.ndarray, "*shape"]:
    """Whether the central interval of a probability holds what came: 1, 0, or NaN where none did.

    Raises:
        ValueError: If `prob` lies outside (0, 1).

    Example:
        >>> import numpy as np
        >>> interval_hit(np.arange(100.0)[:, None].repeat(2, 1), [50.0, 99.0], 0.9).tolist()
        [1.0, 0.0]
    """
    if not 0.0 < prob < 1.0:
        raise ValueError(f"prob must lie in (0, 1), got {prob}")
    draws, y = _matched(draws, y)
    low, high = np.quantile(draws, [(1.0 - prob) / 2.0, (1.0 + prob) / 2.0], axis=0)
    return np.where(np.isnan(y), np.nan, (low <= y) & (y <= high))


def interval_score(
    draws: Float[ArrayLike, "draw *shape"], y: Float[ArrayLike, "*shape"], prob: float
) -> Float[np.ndarray, "*shape"]:
    """Width of the central interval, and `2 / (1 - prob)` for each unit that it misses by.

    Source: Gneiting and Raftery (2007), equation 43.

    Example:
        >>> import numpy as np
        >>> round(float(interval_score(np.linspace(0, 1, 101), 1.2, 0.8)), 6)  # 0.8 + 10 * 0.3
        3.8
    """
    if not 0.0 < prob < 1.0:
        raise ValueError(f"prob must lie in (0, 1), got {prob}")
    draws, y = _matched(draws, y)
    low, high = np.quantile(draws, [(1.0 - prob) / 2.0, (1.0 + prob) / 2.0], axis=0)
    miss = np.maximum(low - y, 0.0) + np.maximum(y - high, 0.0)
    return high - low + miss * (2.0 / (1.0 - prob))


def _matched(draws: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    draws, y = np.asarray(draws, np.float64), np.asarray(y, np.float64)
    if draws.ndim == 0 or draws.shape[1:] != y.shape or not len(draws):
        raise ValueError(
            f"draws must have the shape of y behind a first axis of draws, got {draws.shape} "
            f"for y of shape {y.shape}"
        )
    return draws, y
