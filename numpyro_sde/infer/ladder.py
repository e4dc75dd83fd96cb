"""Ladders of inverse temperatures: exchanges between levels, where to put them, the evidence.

Sources: Syed, Bouchard-Cote, Deligiannidis and Doucet (2022), "Non-reversible parallel tempering",
Journal of the Royal Statistical Society B 84, for deterministic even-odd exchanges, the barrier and
levels of equal rejection; Bennett (1976), "Efficient estimation of free energy differences from
Monte Carlo data", Journal of Computational Physics 22, for ratios of normalising constants.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.special import expit

_LEAST_REJECTION = 1e-3
_NUM_BATCHES = (5, 10, 20)


def first_ladder(num_levels: int) -> Float[np.ndarray, " K"]:
    """Inverse temperatures to begin with, dense near the reference, where most is rejected."""
    return np.linspace(0.0, 1.0, num_levels) ** 4


def exchange_rejections(
    betas: Float[Array, " K"], log_ratios: Float[Array, " K"]
) -> Float[Array, " K-1"]:
    """Probability that each pair of neighbours does not exchange its places."""
    gain = jnp.diff(betas) * (log_ratios[:-1] - log_ratios[1:])
    return -jnp.expm1(jnp.minimum(gain, 0.0))


def exchange_order(
    rejections: Float[Array, " K-1"], uniforms: Float[Array, " K-1"], odd: Bool[Array, ""]
) -> Int[Array, " K"]:
    """For each level the level whose place it takes: even pairs exchange, or odd ones."""
    pairs = jnp.arange(rejections.shape[0])
    swaps = (pairs % 2 == odd) & (uniforms >= rejections)
    none = jnp.zeros((1,), bool)
    up = jnp.concatenate([swaps, none])  # with the level above
    down = jnp.concatenate([none, swaps])
    return jnp.arange(up.shape[0]) + up.astype(int) - down.astype(int)


def respaced(betas: Float[Array, " K"], rejections: Float[Array, " K-1"]) -> Float[Array, " K"]:
    """Inverse temperatures that share the cumulated rejection equally."""
    steps = jnp.maximum(rejections, _LEAST_REJECTION)
    barrier = jnp.concatenate([jnp.zeros((1,), betas.dtype), jnp.cumsum(steps)])
    even = jnp.linspace(0.0, barrier[-1], betas.shape[0])
    found = jnp.interp(even, barrier, betas)
    return found.at[0].set(0.0).at[-1].set(1.0)


def along(
    new: Float[Array, " K"], old: Float[Array, " K"], values: Float[Array, "K *rest"]
) -> Float[Array, "K *rest"]:
    """Values of an old ladder at the levels of a new one, by linear interpolation."""
    flat = values.reshape(values.shape[0], -1)
    found = jax.vmap(lambda v: jnp.interp(new, old, v), in_axes=1, out_axes=1)(flat)
    return found.reshape(values.shape)


def bennett(cold: Float[np.ndarray, " n"], hot: Float[np.ndarray, " m"], step: float) -> float:
    """Log ratio of the normalising constants of two levels from log ratios of their draws.

    Args:
        cold: log joint over reference at draws of the colder level.
        hot: likewise of the hotter one.
        step: difference of their inverse temperatures.
    """
    from scipy.optimize import brentq  # slow to import

    above, below = step * np.asarray(cold, float), step * np.asarray(hot, float)
    shift = np.log(below.size / above.size)

    def excess(c: float) -> float:
        return float(np.sum(expit(below - c - shift)) - np.sum(expit(c + shift - above)))

    low, high = min(above.min(), below.min()) - 50.0, max(above.max(), below.max()) + 50.0
    return float(brentq(excess, low, high, xtol=1e-8)) if high > low else 0.0


def log_evidence(betas: Float[np.ndarray, " K"], log_ratios: Float[np.ndarray, "n K"]) -> float:
    """Sum of Bennett's ratios over the levels."""
    pairs = zip(np.diff(betas), log_ratios.T[1:], log_ratios.T[:-1], strict=True)
    return float(sum(bennett(cold, hot, step) for step, cold, hot in pairs))


def batch_error(betas: Float[np.ndarray, " K"], log_ratios: Float[np.ndarray, "n K"]) -> float:
    """Standard error of the log evidence from batches of a run, left out one by one.

    Draws depend on one another over stretches of unknown length: of several numbers of batches the
    largest error is taken.
    """
    errors = []
    for number in _NUM_BATCHES:
        if len(log_ratios) < 4 * number:
            continue
        parts = np.array_split(np.arange(len(log_ratios)), number)
        left = [log_evidence(betas, np.delete(log_ratios, part, axis=0)) for part in parts]
        errors.append(np.sqrt((number - 1) * np.var(left)))
    return float(max(errors)) if errors else float("nan")
