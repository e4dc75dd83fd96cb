"""What to make of a fit, in words.

Markov chains are judged by R-hat, effective sample sizes and divergences (Vehtari, Gelman,
Simpson, Carpenter and Buerkner 2021), variational fits by the k-hat of their weights and their
efficiency (Yao et al. 2018; Vehtari et al. 2024), chains along guided paths also by those of their
guide, and all by how far they are from the reference
fit in Monte Carlo errors, where the reference itself can be trusted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtri

from numpyro_sde.diagnostics.compare.statistics import khat_threshold

GOOD_RHAT, BAD_RHAT = 1.01, 1.05
GOOD_ESS, BAD_ESS = 400.0, 100.0
GOOD_KHAT, GOOD_EFFICIENCY = 0.5, 0.5
# Of the guide behind chains along guided paths.
LEAST_GUIDE_EFFICIENCY, BAD_KHAT = 0.05, 0.7
_MATERIAL = 0.1  # posterior sds: a smaller difference is of no account, however certain
_LEAST_ERRORS = 4.0
_FAR = 2.0  # posterior sds between a posterior mean and a maximum of the likelihood
_FAMILY_LEVEL = 1e-3  # of finding a difference by chance anywhere
_MANY_DIVERGENCES = 0.01
_MAX_NAMES = 8


class Evidence(NamedTuple):
    """What is known of one quantity (a scalar parameter, or a whole path) under one fit.

    Attributes:
        rhat: R-hat, for a path the largest over its elements; NaN for independent draws.
        ess: Effective sample size, smaller of bulk and tail; for a path the smallest.
        size: Difference from the reference in its sds; for a path the largest.
        in_errors: Difference in Monte Carlo errors, likewise.
        num_elements: How many scalars it stands for.

    Example:
        >>> Evidence(1.0, 900.0, 0.05, 1.2, 1).ess
        900.0
    """

    rhat: float
    ess: float
    size: float
    in_errors: float
    num_elements: int


def chain_verdict(
    quantities: Mapping[str, Evidence], divergences: float, num_draws: int
) -> tuple[str, bool]:
    """Verdict on draws of a Markov chain, and whether it can serve as a reference.

    Example:
        >>> chain_verdict({"rate": Evidence(1.0, 900.0, 0.0, 0.0, 1)}, 0, 1000)
        ('use it', True)
        >>> chain_verdict({"rate": Evidence(1.3, 9.0, 0.0, 0.0, 1)}, 0, 1000)[0]
        'do not trust these parameters: rate (R-hat 1.30, effective size 9)'
    """
    bad = {
        name: f"R-hat {known.rhat:.2f}, effective size {known.ess:.0f}"
        for name, known in quantities.items()
        if known.rhat > BAD_RHAT or known.ess < BAD_ESS
    }
    if bad:
        return f"do not trust these parameters: {_listed(bad)}", False
    if divergences > _MANY_DIVERGENCES * num_draws:
        share = f"{int(divergences)} of {num_draws} iterations diverged"
        return f"do not trust these parameters: {_names(quantities)}; {share}", False
    notes = []
    short = {
        name: f"R-hat {known.rhat:.3f}, effective size {known.ess:.0f}"
        for name, known in quantities.items()
        if known.rhat > GOOD_RHAT or known.ess < GOOD_ESS
    }
    if short:
        notes.append(f"run it longer for more than means: {_listed(short)}")
    if divergences > 0:
        notes.append(f"look where its {int(divergences)} divergences are")
    return "; ".join(["use it", *notes]), True


def guide_verdict(row: Mapping[str, Any]) -> str:
    """What to say of chains along guided paths whose guide covers little; empty if it does.

    Example:
        >>> guide_verdict({"guide_efficiency": 0.02, "guide_khat": 0.9})[:56]
        'check it by another engine: the guide covers little of t'
        >>> guide_verdict({"guide_efficiency": 0.4, "guide_khat": 0.3})
        ''
    """
    efficiency, khat = row["guide_efficiency"], row["guide_khat"]
    if not (efficiency < LEAST_GUIDE_EFFICIENCY or khat > BAD_KHAT):
        return ""
    return (
        "check it by another engine: the guide covers little of the path's posterior (efficiency "
        f"{efficiency:.2g}, k-hat {khat:.2f}), and chains along it may stay in one mode without a "
        "sign; PMMH (few parameters) or infer.Tempered see the others"
    )


def tempering_verdict(attrs: Mapping[str, Any]) -> str:
    """What to say of a run of `infer.Tempered` that its own report complains of; else empty.

    Example:
        >>> tempering_verdict({"tempering_complaints": "3 round trips, 50 are needed"})
        'do not trust its modes: 3 round trips, 50 are needed'
    """
    told = str(attrs.get("tempering_complaints", ""))
    return f"do not trust its modes: {told}" if told else ""


def variational_verdict(
    quantities: Mapping[str, Evidence],
    row: Mapping[str, Any],
    reference: str | None,
) -> str:
    """Verdict on a variational fit.

    Args:
        quantities: By name.
        row: Its `khat`, `efficiency`, `khat_parameters` and `draws`, NaN where unknown.
        reference: Name of the reference fit where that can be trusted.

    Example:
        >>> row = {"khat": 0.9, "efficiency": 0.01, "khat_parameters": 0.2, "draws": 1000}
        >>> variational_verdict({"rate": Evidence(np.nan, 1000.0, 0.0, 0.0, 1)}, row, None)
        'use its parameters as a proposal (k-hat 0.20 without the path); not its path (k-hat 0.90)'
    """
    khat, efficiency, without = (row[k] for k in ("khat", "efficiency", "khat_parameters"))
    limit = khat_threshold(int(row["draws"]))
    away = differing(quantities) if reference is not None else {}
    if np.isnan(khat):
        if away:
            return f"do not trust these parameters: {_listed(away)} away from {reference}"
        return "not judged: it has no weights, and none of its draws speak for themselves"
    if khat > limit:
        if without <= limit:
            return (
                f"use its parameters as a proposal (k-hat {without:.2f} without the path); "
                f"not its path (k-hat {khat:.2f})"
            )
        if away:
            return (
                f"do not trust these parameters: {_listed(away)} away from {reference}; "
                f"k-hat {khat:.2f}"
            )
        seen = "" if reference is None else f", although none is seen to differ from {reference}"
        return f"do not trust these parameters: {_names(quantities)}; k-hat {khat:.2f}{seen}"
    if away:
        return (
            f"use it as a proposal: {_listed(away)} away from {reference}; k-hat {khat:.2f}, so "
            "refine_fit corrects it"
        )
    if khat > GOOD_KHAT or efficiency < GOOD_EFFICIENCY:
        return (
            f"use it as a proposal: k-hat {khat:.2f}, efficiency {efficiency:.2g}; refine_fit "
            "corrects it"
        )
    return "use it"


def resampled_verdict(
    quantities: Mapping[str, Evidence], khat: float, ess: float, num_draws: int
) -> tuple[str, bool]:
    """Verdict on draws resampled by importance weights, and whether they can be a reference.

    Example:
        >>> resampled_verdict({"rate": Evidence(np.nan, 900.0, 0.0, 0.0, 1)}, 0.3, 900.0, 1000)
        ('use it', True)
    """
    if not khat <= khat_threshold(num_draws):
        text = f"do not trust these parameters: {_names(quantities)}; k-hat {khat:.2f}"
        return f"{text}, the weights correct nothing", False
    if ess < BAD_ESS:
        text = f"do not trust these parameters: {_names(quantities)}; effective size {ess:.0f}"
        return f"{text}, draw more from the guide", False
    if ess < GOOD_ESS:
        return f"use it; draw more from the guide for more than means (size {ess:.0f})", True
    return "use it", True


def point_verdict(
    quantities: Mapping[str, Evidence], attrs: Mapping[str, Any], reference: str | None
) -> str:
    """What to say of a maximum of the likelihood: where it is, and what it does not say.

    Example:
        >>> attrs = {"log_likelihood": -65.4, "log_likelihood_se": 0.2}
        >>> point_verdict({"rate": Evidence(np.nan, 1.0, 0.3, np.nan, 1)}, attrs, "NUTS")
        'a point of log likelihood -65.40 (se 0.20), not a posterior; within 2 sd of NUTS'
    """
    known = f"{attrs['log_likelihood']:.2f} (se {attrs['log_likelihood_se']:.2f})"
    parts = [f"a point of log likelihood {known}, not a posterior"]
    intervals = {
        name: "({:.4g}, {:.4g})".format(*attrs[f"profile_interval_{name}"])
        for name in quantities
        if f"profile_interval_{name}" in attrs
    }
    if intervals:
        parts.append(f"profile intervals: {', '.join(f'{n} {v}' for n, v in intervals.items())}")
    if reference is not None:
        far = {n: f"{q.size:.1f} sd" for n, q in quantities.items() if q.size > _FAR}
        away = f"away from the mean of {reference}: {_listed(far)}"
        parts.append(away if far else f"within {_FAR:g} sd of {reference}")
    return "; ".join(parts)


def differing(quantities: Mapping[str, Evidence]) -> dict[str, str]:
    """Quantities that are away from the reference by more than chance and by enough to matter.

    The limit is four Monte Carlo errors, more where there are very many scalars.

    Example:
        >>> small, large = (Evidence(1.0, 900.0, size, 12.0, 1) for size in (0.05, 0.5))
        >>> differing({"a": large, "b": small})
        {'a': '0.50 sd, 12 Monte Carlo errors'}
    """
    number = max(sum(known.num_elements for known in quantities.values()), 1)
    limit = max(_LEAST_ERRORS, float(-ndtri(_FAMILY_LEVEL / (4 * number))))
    return {
        name: f"{known.size:.2f} sd, {known.in_errors:.0f} Monte Carlo errors"
        for name, known in quantities.items()
        if known.in_errors > limit and known.size > _MATERIAL
    }


def disagreement(quantities: Mapping[str, Evidence], reference: str) -> str:
    """What to say of two trustworthy fits that differ; empty if they agree.

    Example:
        >>> disagreement({"a": Evidence(1.0, 900.0, 0.5, 12.0, 1)}, "NUTS")[:68]
        'do not trust these parameters: a (0.50 sd, 12 Monte Carlo errors) aw'
    """
    away = differing(quantities)
    if not away:
        return ""
    text = f"do not trust these parameters: {_listed(away)} away from {reference}"
    return f"{text}: if the models are the same, one of the two fits is wrong"


def _listed(reasons: Mapping[str, str]) -> str:
    shown = [f"{name} ({why})" for name, why in list(reasons.items())[:_MAX_NAMES]]
    return ", ".join(shown) + _more(len(reasons))


def _names(quantities: Mapping[str, Evidence]) -> str:
    return ", ".join(list(quantities)[:_MAX_NAMES]) + _more(len(quantities))


def _more(number: int) -> str:
    return f" and {number - _MAX_NAMES} more" if number > _MAX_NAMES else ""
