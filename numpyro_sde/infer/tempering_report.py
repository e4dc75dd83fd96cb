"""What a tempered run says of itself: round trips, rejections, the evidence and its error."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from numpyro_sde.infer.ladder import batch_error, log_evidence

_ENOUGH_TRIPS, _LEAST_ACCEPT = 50, 0.5
_MOST_APART, _MOST_REJECTED = 0.3, 0.6


class TemperingReport(NamedTuple):
    """How a run of `Tempered` went, and the evidence that it found.

    Several chains have a ladder each: arrays are means over chains, the round trips a sum.

    Attributes:
        log_evidence: log marginal likelihood, Bennett's ratios of neighbours summed.
        error: its standard error, from batches of the run, and from several chains where these
            differ by more.
        halves: log evidence of the first and of the second half of the run.
        round_trips: how often a draw of the reference came to the posterior.
        barrier: sum of the rejections: the larger, the farther the posterior is from the reference.
        betas: inverse temperatures, `(K,)`.
        rejections: share of exchanges between neighbours that is rejected, `(K - 1,)`.
        acceptance: share of moves accepted at each level, `(K,)`.
        step_sizes: angle of a step at each level, `(K,)`.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.infer.TemperingReport._fields[:3]
        ('log_evidence', 'error', 'halves')
    """

    log_evidence: float
    error: float
    halves: tuple[float, float]
    round_trips: int
    barrier: float
    betas: Float[np.ndarray, " K"]
    rejections: Float[np.ndarray, " K-1"]
    acceptance: Float[np.ndarray, " K"]
    step_sizes: Float[np.ndarray, " K"]

    def complaints(self) -> list[str]:
        """What speaks against the run, in words; nothing where it can be believed."""
        found = []
        if self.round_trips < _ENOUGH_TRIPS:
            found.append(
                f"{self.round_trips} round trips between reference and posterior, 50 are needed"
            )
        if self.acceptance[-1] < _LEAST_ACCEPT:
            found.append(f"{self.acceptance[-1]:.0%} of moves accepted at the posterior")
        if not abs(self.halves[1] - self.halves[0]) <= _MOST_APART:
            found.append(
                f"the halves of the run have log evidences {self.halves[0]:.2f} and "
                f"{self.halves[1]:.2f}"
            )
        if np.max(self.rejections) > _MOST_REJECTED:
            found.append(
                f"{np.max(self.rejections):.0%} of exchanges rejected between two levels: use "
                f"num_levels={int(np.ceil(2.0 * self.barrier + 2.0))} or more"
            )
        return found

    def __str__(self) -> str:
        lines = [
            f"log evidence {self.log_evidence:.3f} (se {self.error:.3f}; halves "
            f"{self.halves[0]:.3f}, {self.halves[1]:.3f})",
            f"{self.round_trips} round trips, barrier {self.barrier:.2f}",
            f"{'beta':>9}{'step':>8}{'accepted':>10}{'rejected exchanges':>20}",
        ]
        rows = zip(self.betas, self.step_sizes, self.acceptance, strict=True)
        for k, (beta, step, accepted) in enumerate(rows):
            exchange = f"{self.rejections[k]:>20.2f}" if k < len(self.rejections) else ""
            lines.append(f"{beta:>9.2g}{step:>8.3f}{accepted:>10.2f}{exchange}")
        return "\n".join([*lines, *(f"WARNING: {told}" for told in self.complaints())])


def report_on(mcmc: Any) -> TemperingReport:
    """The report of an `MCMC` whose kernel is `Tempered`.

    Raises:
        ValueError: no such run.
    """
    state = getattr(mcmc, "last_state", None)
    if state is None or not hasattr(state, "betas"):
        raise ValueError("a report needs an MCMC with a Tempered kernel, after run")
    fields = mcmc.get_extra_fields(group_by_chain=True)
    ratios = np.asarray(fields["log_ratio"], np.float64)
    chains, _, levels = ratios.shape
    betas = np.reshape(np.asarray(state.betas, np.float64), (chains, levels))
    both = list(zip(betas, ratios, strict=True))
    half = ratios.shape[1] // 2
    whole = [log_evidence(b, r) for b, r in both]
    halves = [np.mean([log_evidence(b, r[s]) for b, r in both]) for s in _halves(half)]
    error = np.sqrt(np.mean([batch_error(b, r) ** 2 for b, r in both]) / chains)
    if chains > 1:
        error = max(error, np.std(whole, ddof=1) / np.sqrt(chains))
    rejections = np.asarray(fields["rejection"], np.float64).mean((0, 1))
    trips = np.asarray(fields["round_trips"])
    steps = np.exp(np.asarray(state.log_step, np.float64)).reshape(chains, levels)
    return TemperingReport(
        float(np.mean(whole)),
        float(error),
        (float(halves[0]), float(halves[1])),
        int(np.sum(trips[:, -1] - trips[:, 0] + (trips[:, 0] > 0))),
        float(rejections.sum()),
        betas.mean(0),
        rejections,
        np.asarray(fields["acceptance"], np.float64).mean((0, 1)),
        steps.mean(0),
    )


def _halves(half: int) -> tuple[slice, slice]:
    return slice(None, half), slice(half, None)
