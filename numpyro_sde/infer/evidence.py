"""The evidence of a model, by four methods: filters, tempering, its batch form, bridge sampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray
from numpyro.infer import MCMC

from numpyro_sde.infer.bridge_sampling import by_bridge
from numpyro_sde.infer.evidence_result import Evidence, EvidenceRound, complain
from numpyro_sde.infer.importance import by_filters
from numpyro_sde.infer.pmmh import PMMH
from numpyro_sde.infer.tempered import Tempered
from numpyro_sde.infer.tempered_smc import by_smc
from numpyro_sde.reparam.automatic import auto
from numpyro_sde.smc.proposals import Proposal
from numpyro_sde.statespace.checks import check_choice, check_count, typed_key

_METHODS = ("filters", "tempered", "smc", "bridge")
_OF_A_FIT = ("filters", "tempered", "bridge")
_SMC_REPEATS = 4


def evidence(
    model: Callable[..., Any] | Any,
    *args: Any,
    rng_key: PRNGKeyArray,
    method: str | None = None,
    num_draws: int = 1000,
    num_particles: int | None = None,
    proposal: str | Proposal = "auto",
    num_levels: int = 12,
    fit: Any = None,
    **kwargs: Any,
) -> Evidence:
    """Log marginal likelihood of a model, with an error and draws of the posterior.

    | `method` | how | for |
    | --- | --- | --- |
    | "filters" | parameters by importance sampling, paths by particle filters | 8 parameters |
    | "tempered" | tempering from prior or guide (`infer.Tempered`) | many, several modes |
    | "smc" | the same in one batch, four times (adaptive tempered SMC) | the same, as a check |
    | "bridge" | bridge sampling from draws that a fit has | a sound fit, few free directions |

    Estimates of two models of the same data make a Bayes factor, and go into
    `diagnostics.compare_models(..., log_evidence={"a": evidence_a, "b": evidence_b})`. The priors
    enter: an evidence under a vague prior says little.

    "filters" makes three rounds of draws from a Student t law about an approximate mode, refitted
    in between, and more where three do not agree. Of a fit by `PMMH` it takes the filters that the
    kernel has chosen, and begins where its chains ended: neither is looked for again. "tempered"
    and "smc" treat the paths of the model by `reparam.auto`, if it does not treat them itself.
    "bridge" sees the modes that the fit has
    seen, and no others.

    Args:
        model: the model, its paths as they are; or a fit, an `MCMC` after `run`, whose model and
            arguments are then taken.
        *args: arguments of the model.
        rng_key: random key.
        method: None for "filters"; of a fit for "filters" where `PMMH` ran, for "tempered" where
            `Tempered` did, else "bridge".
        num_draws: draws in each round of "filters"; sweeps of "tempered" after a warm-up of half as
            many.
        num_particles: particles of each filter, None for as many as make its log likelihood known
            to 1.2 or so, as in `PMMH`; of each repeat of "smc", None for 512.
        proposal: how particles of filters move, as in `PMMH`.
        num_levels: levels of "tempered".
        fit: the draws for "bridge" where `model` is the model: an `MCMC`, what `refine_fit`
            returned, or a dictionary of draws by site, leading axis the draws. They must be draws
            of this model, as it was fitted (guided, integrated out).
        **kwargs: keyword arguments of the model.

    Returns:
        The estimate with its standard error, and draws of the posterior.

    Raises:
        ValueError: an unknown method, one that does not suit what was given, a model that observes
            no latent path ("filters"), draws that lack a site ("bridge").
        TypeError: a count that is no integer.
        RuntimeError: no three rounds of "filters" that agree within 3 of their errors, no finite
            weights.

    Warns:
        RuntimeWarning: too few effective draws, weights with a Pareto shape above 0.7, more than 8
            parameters for "filters", halves of the draws that disagree, too few round trips.

    Example:
        >>> import jax, numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> def model(y=None):
        ...     scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
        ...     sde = nsde.SDE(lambda t, x, p: -x, lambda t, x, p: p, params=scale)
        ...     x = numpyro.sample("x", nsde.SDEPath(sde, np.arange(4.0), dist.Normal(0.0, 1.0)))
        ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.5), obs=y)
        >>> found = nsde.evidence(model, np.array([0.5, -0.2, 0.1, 0.4]), rng_key=jax.random.key(0),
        ...                       num_particles=4, num_draws=400)
        >>> round(found.log_evidence, 1), found.samples["scale"].shape
        (-4.0, (400,))
    """
    is_fit = isinstance(model, MCMC)
    if method is None:
        method = _method_for(model, fit)
    check_choice("method", method, _METHODS)
    check_count("num_draws", num_draws, least=50)
    key = typed_key(rng_key)
    if is_fit:
        if method not in _OF_A_FIT:
            raise ValueError(
                f"method={method!r} runs on a model, not on a fit: hand over the model"
            )
        return _of_fit(model, method, key, num_draws)
    if (fit is not None) != (method == "bridge"):
        raise ValueError("method='bridge' needs fit=, and no other method takes one")
    if method == "bridge":
        return by_bridge(model, args, kwargs, key, _draws_of(fit))
    if method == "filters":
        kernel = PMMH(model, num_particles, proposal=proposal)
        return by_filters(model, args, kwargs, key, num_draws=num_draws, kernel=kernel)
    treated = auto(model)
    if method == "smc":
        count = 512 if num_particles is None else num_particles
        check_count("num_particles", count, least=50)
        return by_smc(
            treated, args, kwargs, key, num_particles=count, num_repeats=_SMC_REPEATS, num_steps=8
        )
    kernel = Tempered(treated, num_levels=num_levels)
    mcmc = MCMC(kernel, num_warmup=num_draws // 2, num_samples=num_draws, progress_bar=False)
    mcmc.run(key, *args, **kwargs)
    return _of_tempering(mcmc)


def _method_for(model: Any, fit: Any) -> str:
    """The method where none was asked for."""
    kernel = model.sampler if isinstance(model, MCMC) else None
    if isinstance(kernel, PMMH):
        return "filters"
    if isinstance(kernel, Tempered):
        return "tempered"
    return "bridge" if kernel is not None or fit is not None else "filters"


def _of_fit(mcmc: MCMC, method: str, key: PRNGKeyArray, num_draws: int) -> Evidence:
    if method == "tempered":
        if not isinstance(mcmc.sampler, Tempered):
            raise ValueError(
                "method='tempered' of a fit needs one by infer.Tempered, got "
                f"{type(mcmc.sampler).__name__}: use method='bridge', or hand over the model"
            )
        return _of_tempering(mcmc)
    if method == "filters" and not isinstance(mcmc.sampler, PMMH):
        raise ValueError(
            "method='filters' of a fit needs one by infer.PMMH, got "
            f"{type(mcmc.sampler).__name__}: hand over the model"
        )
    if mcmc.last_state is None:
        raise ValueError("the fit has not run: call mcmc.run(rng_key, ...) first")
    args, kwargs = mcmc._args, mcmc._kwargs
    if method == "filters":
        return by_filters(
            mcmc.sampler.model, args, kwargs, key,
            num_draws=num_draws, kernel=mcmc.sampler, state=mcmc.last_state,
        )  # fmt: skip
    return by_bridge(mcmc.sampler.model, args, kwargs, key, mcmc.get_samples(group_by_chain=True))


def _draws_of(fit: Any) -> Mapping[str, Any]:
    """Draws `(chain, draw, ...)` of a fit or a dictionary."""
    if hasattr(fit, "get_samples"):
        return dict(fit.get_samples(group_by_chain=True))
    if isinstance(fit, Mapping):
        return {name: np.asarray(value)[None] for name, value in fit.items()}
    raise TypeError(f"fit must be an MCMC or a dictionary of draws, got {type(fit).__name__}")


def _of_tempering(mcmc: MCMC) -> Evidence:
    report = mcmc.sampler.report(mcmc)
    for text in report.complaints():
        complain(text)
    samples = mcmc.get_samples()
    count = next(iter(samples.values())).shape[0]
    rounds = tuple(EvidenceRound(v, float("nan"), float("nan")) for v in report.halves)
    return Evidence(
        report.log_evidence,
        report.error,
        float(report.round_trips),
        float("nan"),
        dict(jax.device_get(samples)),
        np.full(count, -np.log(count)),
        rounds,
        0,
        None,
        "tempered",
    )
