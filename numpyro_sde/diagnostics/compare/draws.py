"""Draws of every kind of fit in one form, with their pointwise log likelihood.

A fit is a NumPyro `MCMC` after `run`, an SVI with its result, a guide with its parameters, a
maximum likelihood fit, which is one draw, or a dictionary of draws. Everything that needs the model
again (log likelihood, log weights of a guide, predictions) runs it once for each draw, in batches,
under `jax.jit`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from numpyro import handlers
from numpyro.infer import MCMC, SVI
from numpyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation
from numpyro.infer.util import compute_log_probs, log_density

from numpyro_sde.diagnostics.compare.fits import POINT, RefinedFit, SVIFit
from numpyro_sde.diagnostics.compare.model_names import describe_model
from numpyro_sde.diagnostics.compare.parameter_weights import (
    NUM_PATHS,
    GuideDraw,
    parameter_log_weight,
    path_sites_of,
)
from numpyro_sde.diagnostics.compare.sites import (
    hold_values,
    is_latent,
    is_observation,
    pointwise_log_prob,
)
from numpyro_sde.diagnostics.compare.timing import Timing
from numpyro_sde.infer.likelihood_fit import LikelihoodFit
from numpyro_sde.infer.tempered import Tempered

_BATCH = 64  # draws evaluated together: enough to fill a CPU, little memory for long paths
_STATISTICS = {
    "potential_energy": "lp",
    "adapt_state.step_size": "step_size",
    "num_steps": "n_steps",
    "accept_prob": "acceptance_rate",
}


class Draws(NamedTuple):
    """A fit in one form: from :func:`read_fit`, with everything after :func:`complete_draws`.

    Attributes:
        method: `"mcmc"`, `"variational"`, `"psis"`, `"maximum likelihood"` or `"draws"`.
        engine: Class name of the kernel or guide.
        posterior: For each site an array of shape `(chain, draw, ...)`.
        statistics: For each sampler statistic an array of that shape.
        log_likelihood: For each observation site its pointwise log density, that shape.
        model: The model, None for draws without one.
        model_args: Its positional arguments.
        model_kwargs: Its keyword arguments.
        params: Values of its `param` sites.
        guide: The guide of a variational fit.
        timing: From :func:`timed`, where known.
        attributes: More numbers of the fit, by name.
    """

    method: str
    engine: str
    posterior: dict[str, np.ndarray]
    statistics: dict[str, np.ndarray]
    log_likelihood: dict[str, np.ndarray]
    model: Callable[..., Any] | None
    model_args: tuple[Any, ...]
    model_kwargs: Mapping[str, Any]
    params: Mapping[str, Any]
    guide: Any = None
    timing: Timing | None = None
    attributes: Mapping[str, Any] = MappingProxyType({})


def map_draws(
    function: Callable[[Any], dict[str, Array]], inputs: Any, num_draws: int
) -> dict[str, np.ndarray]:
    """Apply a function to every draw, in batches, and stack what it returns.

    Example:
        >>> import jax.numpy as jnp
        >>> map_draws(lambda x: {"y": 2 * x}, jnp.arange(3.0), 3)["y"]
        array([0., 2., 4.], dtype=float32)
    """
    batches = -(-num_draws // _BATCH)
    size = -(-num_draws // batches)
    # The last batch is filled up with copies: one of its own size would compile once more.
    index = np.minimum(np.arange(batches * size), num_draws - 1).reshape(batches, size)
    run = jax.jit(lambda xs: jax.lax.map(jax.vmap(function), xs))
    out = run(jax.tree.map(lambda x: x[index], inputs))
    return {
        name: np.asarray(value).reshape(-1, *value.shape[2:])[:num_draws]
        for name, value in out.items()
    }


def evaluate_model(
    draws: Draws,
    flat: Mapping[str, Any],
    num_draws: int,
    rng_key: PRNGKeyArray,
    collect: Callable[[Mapping[str, Any]], dict[str, Array]],
    *,
    forget_data: bool = False,
) -> dict[str, np.ndarray]:
    """Run the model under each draw and collect something from every trace.

    Args:
        draws: The fit, for its model and arguments.
        flat: Values to substitute, `(num_draws, ...)` for each site.
        num_draws: Number of draws.
        rng_key: Seeds whatever the values leave open.
        collect: Takes a trace, returns arrays by name.
        forget_data: Sample the observation sites instead of holding them.
    """
    assert draws.model is not None

    def one(inputs: tuple[Mapping[str, Array], PRNGKeyArray]) -> dict[str, Array]:
        values, key = inputs
        model = handlers.seed(draws.model, key)
        if forget_data:
            model = handlers.uncondition(model)
        model = hold_values(model, {**draws.params, **values})
        return collect(handlers.trace(model).get_trace(*draws.model_args, **draws.model_kwargs))

    values = {name: jnp.asarray(value) for name, value in flat.items()}
    return map_draws(one, (values, jax.random.split(rng_key, num_draws)), num_draws)


def observation_log_probs(trace: Mapping[str, Any], num_times: int | None) -> dict[str, Array]:
    """Pointwise log density of every observation site of a trace."""
    return {
        name: pointwise_log_prob(site["fn"], site["value"], num_times)
        for name, site in trace.items()
        if is_observation(site)
    }


def read_fit(
    fit: Any,
    *,
    model: Callable[..., Any] | None = None,
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    group_by_chain: bool = False,
) -> Draws:
    """Recognise a fit, unless it has been; arguments as for `to_arviz`. No guide is sampled yet.

    Raises:
        TypeError: If `fit` is none of the kinds in the module's description.
        ValueError: If an `MCMC` has not run, or draws disagree in their number.
    """
    if isinstance(fit, Draws):
        return fit
    if isinstance(fit, MCMC):
        return _from_mcmc(fit, model, model_args, model_kwargs)
    if isinstance(fit, Mapping):
        return _from_mapping(fit, model, model_args, model_kwargs, group_by_chain)
    if isinstance(fit, RefinedFit):
        return _from_refined(fit, model, model_args, model_kwargs)
    if isinstance(fit, LikelihoodFit):
        return _from_likelihood(fit, model)
    if isinstance(fit, tuple) and len(fit) >= 2:
        return _from_guide(SVIFit(*fit), model, model_args, model_kwargs)
    raise TypeError(
        "fit must be an MCMC, a tuple (svi, svi_result) or (guide, params), an SVIFit, a "
        f"RefinedFit, a LikelihoodFit or a dictionary of draws, got {type(fit).__name__}"
    )


def complete_draws(
    draws: Draws,
    *,
    num_samples: int,
    rng_key: PRNGKeyArray,
    log_likelihood: bool,
    num_times: int | None,
    deterministic: Collection[str] = (),
    num_paths: int = NUM_PATHS,
) -> Draws:
    """Sample a guide, and evaluate what the draws imply: log likelihood, deterministic sites.

    Args:
        draws: From :func:`read_fit`.
        num_samples: Draws from a guide.
        rng_key: For the guide, and for whatever the draws leave open in the model.
        log_likelihood: Whether to evaluate it.
        num_times: Length of the time axis, see `pointwise_log_prob`.
        deterministic: Deterministic sites of the model, added where the draws lack them.
        num_paths: Paths by which a guide that draws them given parameters is integrated over them.
    """
    if isinstance(draws.guide, AutoDelta | AutoLaplaceApproximation):
        # Trained to a point: what they hold as fit is `sample_posterior`, without a log density.
        rng_key, key_draws = jax.random.split(rng_key)
        samples = draws.guide.sample_posterior(
            key_draws,
            draws.params,
            *draws.model_args,
            sample_shape=(num_samples,),
            **draws.model_kwargs,
        )
        posterior = {name: np.asarray(value)[None] for name, value in samples.items()}
        draws = draws._replace(posterior=posterior)
    elif draws.guide is not None:
        keys = jax.random.split(rng_key, num_samples)
        one = _guide_draw(draws, log_likelihood, num_times, num_paths)
        values = {name: value[None] for name, value in map_draws(one, keys, num_samples).items()}
        return draws._replace(
            posterior=_with_prefix(values, "value/"),
            statistics=_with_prefix(values, "stat/"),
            log_likelihood=_with_prefix(values, "loglik/"),
        )
    implied = [name for name in deterministic if name not in draws.posterior]
    if draws.model is None or not (log_likelihood or implied):
        return draws
    return _with_implied(draws, rng_key, log_likelihood, num_times, implied)


def _with_implied(
    draws: Draws,
    rng_key: PRNGKeyArray,
    log_likelihood: bool,
    num_times: int | None,
    implied: Collection[str],
) -> Draws:
    def collect(trace: Mapping[str, Any]) -> dict[str, Array]:
        out = {f"value/{name}": jnp.asarray(trace[name]["value"]) for name in implied}
        if log_likelihood:
            densities = observation_log_probs(trace, num_times)
            out |= {f"loglik/{name}": value for name, value in densities.items()}
        return out

    shape = next(iter(draws.posterior.values())).shape[:2]
    flat = flatten_draws(draws.posterior)
    values = evaluate_model(draws, flat, shape[0] * shape[1], rng_key, collect)
    values = {name: value.reshape(shape + value.shape[1:]) for name, value in values.items()}
    return draws._replace(
        posterior={**draws.posterior, **_with_prefix(values, "value/")},
        log_likelihood=_with_prefix(values, "loglik/"),
    )


def flatten_draws(posterior: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Join chains: `(chain, draw, ...)` to `(chain * draw, ...)`."""
    return {name: value.reshape(-1, *value.shape[2:]) for name, value in posterior.items()}


def _from_mcmc(
    mcmc: MCMC,
    model: Callable[..., Any] | None,
    model_args: tuple[Any, ...],
    model_kwargs: Mapping[str, Any] | None,
) -> Draws:
    try:
        samples = mcmc.get_samples(group_by_chain=True)
        extra = mcmc.get_extra_fields(group_by_chain=True)
    except (AssertionError, AttributeError, TypeError) as error:
        raise ValueError("fit is an MCMC that has not run: call its run method first") from error
    statistics = {}
    for name, value in extra.items():
        if isinstance(value, Mapping | tuple) or name == "filter_key":
            continue  # a kernel's whole state, or random numbers: no statistic of one draw
        value = np.asarray(value)
        statistics[_STATISTICS.get(name, name)] = -value if name == "potential_energy" else value
        if name == "num_steps":
            statistics["tree_depth"] = np.log2(value).astype(int) + 1
    return Draws(
        method="mcmc",
        engine=type(mcmc.sampler).__name__,
        posterior={name: np.asarray(value) for name, value in samples.items()},
        statistics=statistics,
        log_likelihood={},
        model=model or getattr(mcmc.sampler, "model", None),
        # NumPyro keeps the arguments of `run` on the object, as its own ArviZ converter knows.
        model_args=model_args or getattr(mcmc, "_args", ()),
        model_kwargs=model_kwargs if model_kwargs is not None else getattr(mcmc, "_kwargs", {}),
        params={},
        attributes=_tempering(mcmc),
    )


def _tempering(mcmc: MCMC) -> dict[str, Any]:
    """What a run of `infer.Tempered` says of itself."""
    if not isinstance(mcmc.sampler, Tempered):
        return {}
    report = mcmc.sampler.report(mcmc)
    return {
        "log_evidence": report.log_evidence,
        "log_evidence_se": report.error,
        "round_trips": report.round_trips,
        "tempering_complaints": "; ".join(report.complaints()),
    }


def _from_refined(
    fit: RefinedFit,
    model: Callable[..., Any] | None,
    model_args: tuple[Any, ...],
    model_kwargs: Mapping[str, Any] | None,
) -> Draws:
    source: Draws = fit.source
    method, engine, statistics = fit.method, source.engine, {}
    if fit.mcmc is not None:
        chains = _from_mcmc(fit.mcmc, None, (), None)
        method, engine, statistics = chains.method, chains.engine, chains.statistics
    return source._replace(
        method=method,
        engine=engine,
        posterior=dict(fit.draws),
        statistics=statistics,
        guide=None,
        model=model or source.model,
        model_args=model_args or source.model_args,
        model_kwargs=source.model_kwargs if model_kwargs is None else model_kwargs,
        timing=fit.timing,
        attributes={**fit.weight_summary, "refined_from": source.engine},
    )


def _from_likelihood(fit: LikelihoodFit, model: Callable[..., Any] | None) -> Draws:
    """A point as one draw. Its model is named, not run: its paths were never drawn."""
    attributes: dict[str, Any] = {
        "log_likelihood": fit.log_likelihood,
        "log_likelihood_se": fit.standard_error,
        "model": describe_model(model or fit.model, fit.model_args, fit.model_kwargs),
    }
    for site, profile in fit.profiles.items():
        attributes[f"profile_error_{site}"] = profile.adjusted.standard_error
        attributes[f"profile_interval_{site}"] = list(profile.interval)
    posterior = {name: np.asarray(value)[None, None] for name, value in fit.params.items()}
    return Draws(
        method=POINT,
        engine="IteratedFiltering",
        posterior=posterior,
        statistics={},
        log_likelihood={},
        model=None,
        model_args=(),
        model_kwargs={},
        params={},
        attributes=attributes,
    )


def _from_mapping(
    samples: Mapping[str, Any],
    model: Callable[..., Any] | None,
    model_args: tuple[Any, ...],
    model_kwargs: Mapping[str, Any] | None,
    group_by_chain: bool,
) -> Draws:
    posterior = {name: np.asarray(value) for name, value in samples.items()}
    need = 2 if group_by_chain else 1
    leads = {name: value.shape[:need] for name, value in posterior.items()}
    if not leads or len(set(leads.values())) != 1 or len(next(iter(leads.values()))) != need:
        form = "(chain, draw, ...)" if group_by_chain else "(draw, ...)"
        raise ValueError(
            f"a dictionary of draws must hold arrays of one leading shape {form} "
            f"(group_by_chain={group_by_chain}), got leading shapes {leads}"
        )
    if not group_by_chain:
        posterior = {name: value[None] for name, value in posterior.items()}
    return Draws("draws", "draws", posterior, {}, {}, model, model_args, model_kwargs or {}, {})


def _from_guide(
    fit: SVIFit,
    model: Callable[..., Any] | None,
    model_args: tuple[Any, ...],
    model_kwargs: Mapping[str, Any] | None,
) -> Draws:
    svi = fit.svi
    guide = svi.guide if isinstance(svi, SVI) else svi
    model = model or (svi.model if isinstance(svi, SVI) else getattr(guide, "model", None))
    if not callable(guide) or model is None:
        raise TypeError(
            "fit must be (svi, svi_result) or (guide, params); give model= with a guide that is "
            f"a plain function. Got ({type(svi).__name__}, {type(fit.result).__name__})"
        )
    params = getattr(fit.result, "params", fit.result)
    if not isinstance(params, Mapping):
        raise TypeError(
            f"fit[1] must be an SVI result or a dictionary, got {type(fit.result).__name__}"
        )
    kwargs = {
        **getattr(svi, "static_kwargs", {}),
        **(model_kwargs if model_kwargs is not None else fit.model_kwargs or {}),
    }
    return Draws(
        method="variational",
        engine=getattr(guide, "__name__", type(guide).__name__),
        posterior={},
        statistics={},
        log_likelihood={},
        model=model,
        model_args=tuple(model_args or fit.model_args),
        model_kwargs=kwargs,
        params=params,
        guide=guide,
        timing=fit.timing,
    )


def _guide_draw(
    draws: Draws, log_likelihood: bool, num_times: int | None, num_paths: int
) -> Callable[[PRNGKeyArray], dict[str, Array]]:
    """One particle of the evidence lower bound, with everything it visits."""
    model, guide, params = draws.model, draws.guide, draws.params
    assert model is not None
    args, kwargs = draws.model_args, dict(draws.model_kwargs)
    paths = path_sites_of(guide) if num_paths > 1 else ()

    def one(key: PRNGKeyArray) -> dict[str, Array]:
        key_guide, key_model = jax.random.split(key)
        guide_log_probs, guide_trace = compute_log_probs(
            handlers.seed(guide, key_guide), args, kwargs, params
        )
        log_q = sum(guide_log_probs.values(), start=jnp.zeros(()))
        replayed = handlers.replay(handlers.seed(model, key_model), trace=guide_trace)
        log_p, trace = log_density(replayed, args, kwargs, params)
        out = {"stat/log_p": log_p, "stat/log_q": log_q}
        if paths:
            drawn = GuideDraw(guide_log_probs, guide_trace, log_p)
            key_paths = jax.random.fold_in(key, 1)
            out["stat/log_weight_parameters"] = parameter_log_weight(
                model, guide, params, args, kwargs, drawn, paths, key_paths, num_paths
            )
        for name, site in trace.items():
            if is_latent(site) or site["type"] == "deterministic":
                out[f"value/{name}"] = jnp.asarray(site["value"])
        if log_likelihood:
            for name, value in observation_log_probs(trace, num_times).items():
                out[f"loglik/{name}"] = value
        return out

    return one


def _with_prefix(values: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix)
    }
