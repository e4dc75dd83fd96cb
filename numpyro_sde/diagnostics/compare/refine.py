"""A variational fit made right: by importance resampling, or by NUTS that starts from it.

`"psis"`: draws of the guide, weighed by p(y, z) / q(z), the weights' tail smoothed by a Pareto law
(Vehtari, Simpson, Gelman, Yao and Gabry 2024, Journal of Machine Learning Research 25 (72)), then
resampled. `"nuts"`: chains begin at such draws, and their mass matrix is the guide's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro import handlers
from numpyro.infer import MCMC, NUTS
from numpyro.infer.util import unconstrain_fn
from scipy.special import logsumexp

from numpyro_sde.diagnostics.compare.arviz_compat import smooth_log_weights
from numpyro_sde.diagnostics.compare.draws import Draws, complete_draws, map_draws, read_fit
from numpyro_sde.diagnostics.compare.fits import RefinedFit
from numpyro_sde.diagnostics.compare.sites import is_latent, trace_model
from numpyro_sde.diagnostics.compare.statistics import fit_weights, khat_threshold
from numpyro_sde.diagnostics.compare.timing import timed

_MAX_DENSE = 100  # dimensions of a full mass matrix
_SHRINK = 5.0  # pseudo-draws towards a small multiple of the identity, as in Stan's warm-up
_SMALL = 1e-3


def refine_fit(
    fit: Any,
    model: Callable[..., Any] | None = None,
    *,
    method: str = "psis",
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
    num_guide_draws: int = 4000,
    num_chains: int = 4,
    num_warmup: int = 150,
    chain_method: str = "vectorized",
    nuts_options: Mapping[str, Any] | None = None,
    rng_key: PRNGKeyArray | None = None,
) -> RefinedFit:
    """Correct a variational fit, and estimate the evidence by it.

    `"psis"` costs no more than draws of the guide, and is right where the guide covers the
    posterior (k-hat below 0.7); where it does not, resampling repeats few draws, which a warning
    says. `"nuts"` corrects any guide that is near enough for chains to start at: the guide saves
    most of the warm-up, and is forgotten after it.

    Args:
        fit: An :class:`SVIFit`, a tuple `(svi, svi_result)` or `(guide, params)`.
        model: The model; known from an `SVI`.
        method: `"psis"` or `"nuts"`.
        model_args: Positional arguments of the model; an `SVIFit` knows them.
        model_kwargs: Its keyword arguments.
        num_samples: Draws of the result; for `"nuts"` of each chain.
        num_guide_draws: Draws of the guide to weigh.
        num_chains: For `"nuts"`.
        num_warmup: For `"nuts"`. Where the guide covers the posterior only the step size is
            adapted; else the mass matrix too, for which 150 are few.
        chain_method: For `"nuts"`, as in `numpyro.infer.MCMC`.
        nuts_options: Further options of `NUTS`, such as `target_accept_prob`.
        rng_key: None is `jax.random.key(0)`.

    Returns:
        Draws, k-hat, effective sample size and the importance-weighted log evidence with its
        error; `to_arviz` and `compare_fits` take it.

    Raises:
        ValueError: If `method` is unknown, a number is not positive, no draw of the guide has a
            finite density, or the guide has none (`AutoDelta`, `AutoLaplaceApproximation`).
        TypeError: If `fit` is no variational fit.

    Warns:
        UserWarning: If k-hat is above its limit, so that the weights correct nothing.

    Source: see the module's description.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from numpyro_sde.diagnostics import SVIFit, refine_fit
        >>> def model():
        ...     numpyro.sample("a", dist.StudentT(10.0, 0.0, 1.0))
        >>> def guide():
        ...     numpyro.sample("a", dist.Normal(numpyro.param("loc", 0.0), 1.4))
        >>> svi = SVI(model, guide, numpyro.optim.Adam(0.01), Trace_ELBO())
        >>> better = refine_fit(SVIFit(svi, {"loc": 0.0}), num_guide_draws=2000)
        >>> better.khat < 0.7, abs(better.log_evidence) < 4 * better.log_evidence_se + 0.01
        (True, True)
    """
    if method not in ("psis", "nuts"):
        raise ValueError(f"method must be 'psis' or 'nuts', got {method!r}")
    counts = {
        "num_samples": num_samples,
        "num_guide_draws": num_guide_draws,
        "num_chains": num_chains,
        "num_warmup": num_warmup,
    }
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be positive, got {count}")
    if not isinstance(fit, tuple):
        raise TypeError(
            "fit must be an SVIFit, a tuple (svi, svi_result) or (guide, params), got "
            f"{type(fit).__name__}"
        )
    start = read_fit(fit, model=model, model_args=model_args, model_kwargs=model_kwargs)
    key_guide, key_chains = jax.random.split(jax.random.key(0) if rng_key is None else rng_key)
    drawn = complete_draws(
        start,
        num_samples=num_guide_draws,
        rng_key=key_guide,
        log_likelihood=False,
        num_times=None,
        num_paths=1,
    )
    if not {"log_p", "log_q"} <= set(drawn.statistics):
        raise ValueError(
            f"fit must have a guide with a density to weigh its draws by, got {start.engine}"
        )
    weights = _weigh(drawn)
    random = np.random.default_rng(np.asarray(jax.random.key_data(key_chains)).ravel())
    common: dict[str, Any] = {
        "khat": weights.khat,
        "ess": weights.ess,
        "num_guide_draws": num_guide_draws,
        "log_evidence": weights.log_evidence,
        "log_evidence_se": weights.log_evidence_se,
        "source": start,
    }
    if method == "psis":
        usable = weights.is_usable
        verdict = "draws as from the posterior" if usable else "the weights correct nothing"
        if not weights.is_usable:
            warnings.warn(
                f"refine_fit: k-hat {weights.khat:.2f} of the guide's weights is above "
                f"{khat_threshold(num_guide_draws):.2f}: the guide misses a part of the "
                "posterior, resampling corrects nothing, and neither these draws nor the "
                "evidence are to be trusted. Take method='nuts' or a better guide",
                stacklevel=2,
            )
        chosen = _resample(weights.share, num_samples, random)
        values = {name: value[:, chosen] for name, value in drawn.posterior.items()}
        return RefinedFit(method="psis", draws=values, verdict=verdict, **common)
    chosen = _resample(weights.share if weights.is_usable else weights.finite, 1000, random)
    mcmc, timing = _run_nuts(
        drawn,
        chosen,
        adapt=not weights.is_usable,
        rng_key=key_chains,
        sizes=(num_warmup, num_samples, num_chains),
        chain_method=chain_method,
        options=dict(nuts_options or {}),
    )
    draws = {name: np.asarray(v) for name, v in mcmc.get_samples(group_by_chain=True).items()}
    verdict = "judge the chains (compare_fits); the guide's weights are those of the start"
    return RefinedFit(
        method="nuts", draws=draws, verdict=verdict, mcmc=mcmc, timing=timing, **common
    )


class _Weights(NamedTuple):
    """Normalised importance weights and what they say."""

    share: Float[np.ndarray, " draw"]
    finite: Float[np.ndarray, " draw"]
    khat: float
    ess: float
    log_evidence: float
    log_evidence_se: float

    @property
    def is_usable(self) -> bool:
        return self.khat <= khat_threshold(len(self.share))


def _weigh(drawn: Draws) -> _Weights:
    log_ratio = np.ravel(drawn.statistics["log_p"]) - np.ravel(drawn.statistics["log_q"])
    log_ratio = np.asarray(log_ratio, np.float64)
    # A draw that the model forbids, or whose density overflowed, has no weight.
    log_ratio = np.where(np.isfinite(log_ratio), log_ratio, -np.inf)
    possible = np.isfinite(log_ratio)
    if not possible.any():
        raise ValueError("fit: no draw of the guide has a finite density under the model")
    judged = fit_weights(log_ratio)
    smoothed = log_ratio
    if np.ptp(log_ratio[possible]) > 0.0:
        smoothed = smooth_log_weights(log_ratio)[0]
    share = np.exp(smoothed - logsumexp(smoothed))
    square = float(np.sum(share**2))
    return _Weights(
        share,
        possible / possible.sum(),
        judged.khat,
        1.0 / square,
        judged.log_evidence,
        # Relative variance of a mean of weights, from the weights themselves.
        float(np.sqrt(max(square - 1.0 / len(share), 0.0))),
    )


def _resample(
    share: Float[np.ndarray, " draw"], number: int, random: np.random.Generator
) -> np.ndarray:
    """Indices with the given shares, systematically: the least noise that resampling adds."""
    points = (np.arange(number) + random.uniform()) / number
    chosen = np.searchsorted(np.cumsum(share), points).clip(max=len(share) - 1)
    return random.permutation(chosen)


def _with_params(model: Callable[..., Any], params: Mapping[str, Any]) -> Callable[..., Any]:
    """The model with its own `param` sites held: a guide's may bear names of random sites."""

    def value_of(site: Mapping[str, Any]) -> Any:
        return params.get(site["name"]) if site["type"] == "param" else None

    return handlers.substitute(model, substitute_fn=value_of)


def _run_nuts(
    drawn: Draws,
    chosen: np.ndarray,
    *,
    adapt: bool,
    rng_key: PRNGKeyArray,
    sizes: tuple[int, int, int],
    chain_method: str,
    options: dict[str, Any],
) -> tuple[MCMC, Any]:
    num_warmup, num_samples, num_chains = sizes
    assert drawn.model is not None
    model = _with_params(drawn.model, drawn.params) if drawn.params else drawn.model
    args, kwargs = drawn.model_args, dict(drawn.model_kwargs)
    first = {name: jnp.asarray(value[0, 0]) for name, value in drawn.posterior.items()}
    trace = trace_model(model, args, kwargs, first, jax.random.key(0))
    latent = [name for name, site in trace.items() if is_latent(site)]

    def unconstrain(values: Mapping[str, Array]) -> dict[str, Array]:
        seeded = handlers.seed(model, jax.random.key(0))
        return unconstrain_fn(seeded, args, kwargs, dict(values))

    inputs = {name: jnp.asarray(drawn.posterior[name][0, chosen]) for name in latent}
    free = map_draws(unconstrain, inputs, len(chosen))
    flat = np.asarray(jax.vmap(lambda z: ravel_pytree(z)[0])(free), np.float64)
    number, dim = flat.shape
    dense = dim <= _MAX_DENSE
    spread = np.cov(flat, rowvar=False).reshape(dim, dim) if dense else flat.var(axis=0, ddof=1)
    small = _SMALL * (np.eye(dim) if dense else np.ones(dim))
    mass = (number * spread + _SHRINK * small) / (number + _SHRINK)
    kernel = NUTS(
        model,
        **{
            "dense_mass": dense,
            "inverse_mass_matrix": jnp.asarray(mass, jnp.result_type(float)),
            "adapt_mass_matrix": adapt,
            **options,
        },
    )
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method=chain_method,
        progress_bar=False,
    )
    lead = num_chains if num_chains > 1 else 0
    begin = {name: jnp.asarray(z[:num_chains] if lead else z[0]) for name, z in free.items()}
    extra = ("potential_energy", "num_steps", "diverging")
    _, timing = timed(mcmc.run, rng_key, *args, init_params=begin, extra_fields=extra, **kwargs)
    return mcmc, timing
