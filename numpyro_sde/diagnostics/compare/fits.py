"""Kinds of fits that NumPyro has no class for: a variational fit, and a corrected one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpyro.infer import MCMC

from numpyro_sde.describe import html_text
from numpyro_sde.diagnostics.compare.timing import Timing

# The method of a fit that is one point, without a posterior.
POINT = "maximum likelihood"


class SVIFit(NamedTuple):
    """A variational fit with what is needed to evaluate it.

    A plain tuple `(svi, result)` stands for one without model arguments.

    Attributes:
        svi: The `numpyro.infer.SVI`, or the guide alone.
        result: What `svi.run` returned, or the guide's parameters.
        model_args: Positional arguments of model and guide.
        model_kwargs: Their keyword arguments.
        timing: From :func:`timed`.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> from numpyro_sde.diagnostics import SVIFit, to_arviz
        >>> def model(y):
        ...     level = numpyro.sample("level", dist.Normal(0.0, 1.0))
        ...     numpyro.sample("y", dist.Normal(level, 1.0), obs=y)
        >>> svi = SVI(model, AutoNormal(model), numpyro.optim.Adam(0.1), Trace_ELBO())
        >>> result = svi.run(jax.random.key(0), 10, 0.5, progress_bar=False)
        >>> tree = to_arviz(SVIFit(svi, result, model_args=(0.5,)), num_samples=50)
        >>> tree["posterior"]["level"].shape
        (1, 50)
    """

    svi: Any
    result: Any
    model_args: tuple[Any, ...] = ()
    model_kwargs: Mapping[str, Any] | None = None
    timing: Timing | None = None

    def __repr__(self) -> str:
        guide = getattr(self.svi, "guide", self.svi)
        name = getattr(guide, "__name__", type(guide).__name__)
        losses = np.asarray(getattr(self.result, "losses", ()))
        trained = f", {losses.size} steps, last loss {losses[-1]:.4g}" if losses.size else ""
        return f"SVIFit({name}{trained})"

    def _repr_html_(self) -> str:
        return html_text(repr(self))


@dataclass(frozen=True)
class RefinedFit:
    """Result of :func:`refine_fit`: draws that correct a variational fit.

    Attributes:
        method: `"psis"` or `"nuts"`.
        draws: Draws by site, arrays of shape `(chain, draw, ...)`; one chain for `"psis"`.
        khat: Pareto shape of the guide's importance weights.
        ess: Their effective sample size. For `"psis"` it is that of `draws`.
        num_guide_draws: Draws of the guide that were weighed.
        log_evidence: Log evidence by importance weighting, with smoothed weights.
        log_evidence_se: Monte Carlo standard error of it; no meaning where `khat` is above 0.7.
        verdict: What to make of it, in words.
        source: The variational fit as it was read, with model and arguments.
        mcmc: The chains, for `"nuts"`.
        timing: From :func:`timed`; None if not timed.

    Example:
        >>> import numpy as np
        >>> from numpyro_sde.diagnostics import RefinedFit
        >>> draws = {"a": np.zeros((1, 9))}
        >>> fit = RefinedFit("psis", draws, 0.3, 850.0, 1000, -4.2, 0.01, "use it", source=None)
        >>> print(fit)
        psis of 1000 draws of the guide: use it
        k-hat 0.30, effective sample size 850, log evidence -4.200 (se 0.010)
    """

    method: str
    draws: Mapping[str, np.ndarray]
    khat: float
    ess: float
    num_guide_draws: int
    log_evidence: float
    log_evidence_se: float
    verdict: str
    source: Any
    mcmc: MCMC | None = None
    timing: Timing | None = None

    def get_samples(self, group_by_chain: bool = False) -> dict[str, np.ndarray]:
        """Draws by site as `MCMC.get_samples` gives them, chains joined or not.

        Args:
            group_by_chain: Keep the leading chain dimension.
        """
        if group_by_chain:
            return dict(self.draws)
        return {name: value.reshape(-1, *value.shape[2:]) for name, value in self.draws.items()}

    @property
    def weight_summary(self) -> dict[str, float]:
        """Numbers of the importance weights, by name."""
        return {
            "khat": self.khat,
            "importance_ess": self.ess,
            "num_guide_draws": self.num_guide_draws,
            "log_evidence": self.log_evidence,
            "log_evidence_se": self.log_evidence_se,
        }

    def __repr__(self) -> str:  # what an interactive session shows
        return str(self)

    def _repr_html_(self) -> str:
        return html_text(str(self))

    def __str__(self) -> str:
        return (
            f"{self.method} of {self.num_guide_draws} draws of the guide: {self.verdict}\n"
            f"k-hat {self.khat:.2f}, effective sample size {self.ess:.0f}, log evidence "
            f"{self.log_evidence:.3f} (se {self.log_evidence_se:.3f})"
        )
