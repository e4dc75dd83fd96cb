"""What an estimate of the evidence holds, whatever the method."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_sde.infer.racing import ProposalRace
from numpyro_sde.statespace.checks import typed_key

_LEAST_ESS, WORST_KHAT = 100.0, 0.7


class EvidenceRound(NamedTuple):
    """One round of importance sampling.

    Attributes:
        log_evidence: its estimate.
        error: standard error of that.
        ess: effective number of draws.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.infer.EvidenceRound(-13.2, 0.05, 400.0).error
        0.05
    """

    log_evidence: float
    error: float
    ess: float


class Evidence(NamedTuple):
    """The evidence of a model, and its posterior by weighted draws.

    Attributes:
        log_evidence: the estimate; with "filters" and "smc" its exponential is unbiased, or nearly.
        error: its standard error. By the spread of the weights with "filters" (the filters' own
            noise is in it), from the dependence of the draws with "bridge", from batches of the run
            with "tempered", between independent repeats with "smc".
        ess: effective number of draws.
        khat: Pareto shape of the importance weights: above 0.7 neither estimate nor error can be
            trusted. NaN for "tempered" and "smc", which have none.
        samples: draws of the latent sites, the leading axis over draws, to be weighted.
        log_weights: their normalised log weights.
        rounds: all rounds of "filters", both halves of "bridge" and "tempered", the repeats of
            "smc".
        num_particles: particles of each filter, or of each repeat; 0 where there are none.
        proposals: how the candidates for proposal="auto" did; None where none were raced.
        method: how it was found, as `evidence` names it.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.infer.Evidence._fields[:3]
        ('log_evidence', 'error', 'ess')
    """

    log_evidence: float
    error: float
    ess: float
    khat: float
    samples: dict[str, Array]
    log_weights: Float[np.ndarray, " draws"]
    rounds: tuple[EvidenceRound, ...]
    num_particles: int
    proposals: ProposalRace | None
    method: str = "filters"

    def resampled(self, rng_key: PRNGKeyArray, num_draws: int) -> dict[str, Array]:
        """Draws of the posterior with equal weights, for `nsde.smooth` and plots.

        Paths drawn by filters that run afresh at these parameters are biased where their log
        likelihood has a standard deviation near 1: give `nsde.smooth` many more particles.

        Args:
            rng_key: random key.
            num_draws: number of draws.
        """
        weights = jnp.asarray(self.log_weights)
        index = jax.random.categorical(typed_key(rng_key), weights, shape=(num_draws,))
        return {name: value[index] for name, value in self.samples.items()}


def judge_weights(ess: float, khat: float) -> None:
    """Warn of importance weights that cannot be trusted."""
    if ess < _LEAST_ESS:
        complain(f"only {ess:.0f} effective draws: use more draws or more particles")
    if khat > WORST_KHAT:
        complain(
            f"the weights have a Pareto shape of {khat:.2f}: estimate and error may be far off"
        )


def complain(text: str) -> None:
    """Warn of an estimate."""
    warnings.warn(f"evidence: {text}", RuntimeWarning, stacklevel=4)
