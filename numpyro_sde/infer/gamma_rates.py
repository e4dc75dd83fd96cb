"""Rates of a Markov jump process with gamma priors, drawn given its states: a Gibbs block.

Given the whole path, its jumps N and times in states T, the likelihood of a rate q is
`q^N exp(-q T)`, so a gamma prior has a gamma posterior. Jumps are drawn first, given the states at
the grid times and the present rates, and dropped afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float, PRNGKeyArray
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.util import log_density

from numpyro_sde.distributions.jump_path import JumpPath
from numpyro_sde.infer.block import BlockKernel
from numpyro_sde.jumps.bridges import draw_sparse_jumps, path_totals
from numpyro_sde.jumps.uniformisation import largest_mean
from numpyro_sde.statespace.checks import check_count


class GammaRatesState(NamedTuple):
    """State of `GammaRates`.

    Attributes:
        z: the rates by site.
        accept_prob: acceptance probability of the last draw.
        rng_key: key of the next.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.infer.GammaRatesState._fields
        ('z', 'accept_prob', 'rng_key')
    """

    z: dict[str, Array]
    accept_prob: Array
    rng_key: PRNGKeyArray


class GammaRates(BlockKernel):
    """Draw rates with gamma priors given the states of a `JumpPath`.

    A block kernel for `numpyro.infer.gibbs.Gibbs`, beside `ConditionalForward` for the states:
    `Gibbs([(ConditionalForward(model), ["s"]), (GammaRates(model, "rates", "s"), ["rates"])])`.
    Each edge's rate is one element of the site times a constant; edges may share an element.
    Whatever else depends on the rates (a stationary start, emissions) is corrected for by a
    Metropolis step, whose acceptance is 1 where nothing does. Where nothing but `observe` sees the
    path and rates are all there is, `marginalize(model, method=filters.Forward())` under NUTS
    mixes better.

    Args:
        model: the model, its path sites as they are.
        site: name of the site of the rates, with a `dist.Gamma` prior.
        path: name of the path's site.
        num_terms: most jumps of the uniformised process between two grid times. Rates that need
            more give NaN.

    Raises:
        TypeError: a model that is no function; a prior that is not gamma; a site that is no
            `JumpPath`; a `num_terms` that is no integer.
        ValueError: when run, a path or prior inside `handlers.scale` or `mask`, or rates that are
            not multiples of the site's elements.

    Source: Bladt and Sorensen (2005), "Statistical inference for discretely observed Markov jump
    processes", J. R. Statist. Soc. B 67.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, numpyro, numpyro.distributions as dist
        >>> import numpyro_sde as nsde
        >>> from numpyro.infer import MCMC
        >>> from numpyro.infer.gibbs import Gibbs
        >>> def model(y=None):
        ...     rates = numpyro.sample("rates", dist.Gamma(2.0, jnp.ones(2)).to_event(1))
        ...     chain = nsde.MarkovJumpProcess(
        ...         lambda p: p, 2, edges=[(0, 1), (1, 0)], params=rates, event_dims=1)
        ...     s = numpyro.sample("s", nsde.JumpPath(chain, np.arange(4.0)))
        ...     nsde.observe("y", s, lambda t, s: dist.Normal(s, 0.5), obs=y)
        >>> blocks = [(nsde.infer.ConditionalForward(model), ["s"]),
        ...           (nsde.infer.GammaRates(model, "rates", "s"), ["rates"])]
        >>> mcmc = MCMC(Gibbs(blocks), num_warmup=10, num_samples=10, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), np.array([0.1, 0.9, 1.1, 0.2]))
        >>> mcmc.get_samples()["rates"].shape
        (10, 2)
    """

    sample_field = "z"

    def __init__(
        self, model: Callable[..., Any], site: str, path: str, *, num_terms: int = 128
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be a function, got {type(model).__name__}")
        check_count("num_terms", num_terms, least=16)
        self._model = model
        self.site, self.path, self.num_terms = site, path, num_terms

    @property
    def model(self) -> Callable[..., Any]:
        """The model."""
        return self._model

    @property
    def default_fields(self) -> tuple[str, ...]:
        return ("z",)

    def get_diagnostics_str(self, state: GammaRatesState) -> str:
        return f"rates accepted {float(state.accept_prob):.2f}"

    def init(
        self,
        rng_key: PRNGKeyArray,
        num_warmup: int,  # noqa: ARG002
        init_params: Any,
        model_args: Any,
        model_kwargs: Any,
    ) -> GammaRatesState:
        if not init_params:
            raise ValueError(
                "GammaRates is a block of numpyro.infer.gibbs.Gibbs, which hands it rates to begin "
                f"with: Gibbs([..., (GammaRates(model, {self.site!r}, {self.path!r}), "
                f"[{self.site!r}])])"
            )
        rates = jnp.asarray(init_params[self.site], jnp.result_type(float))
        kwargs = {} if model_kwargs is None else model_kwargs
        seen = self._seen(rates, model_args, kwargs)
        twice = self._seen(2.0 * rates, model_args, kwargs)
        known = not any(isinstance(a, jax.core.Tracer) for a in (seen.design, twice.design))
        if known and not _is_multiple(np.asarray(seen.design), np.asarray(twice.design)):
            raise ValueError(
                f"GammaRates: each rate of path {self.path!r} must be one element of site "
                f"{self.site!r} times a constant"
            )
        return GammaRatesState({self.site: rates}, jnp.ones(()), rng_key)

    def _seen(self, rates: Array, args: Any, kwargs: Any) -> _Seen:
        """The model at some rates, as far as they are concerned."""

        def run(rates: Array) -> Any:
            held = substitute(seed(self._model, 0), {self.site: rates})
            return trace(held).get_trace(*args, **kwargs)

        sites = run(rates)
        for name in (self.site, self.path):
            if name not in sites:
                raise ValueError(f"GammaRates: the model has no site {name!r}")
            if sites[name]["scale"] is not None or _has_mask(sites[name]["fn"]):
                raise ValueError(
                    f"GammaRates: site {name!r} is inside handlers.scale or mask, and is drawn "
                    "whole here"
                )
        prior, law = _bare(sites[self.site]["fn"]), _bare(sites[self.path]["fn"])
        if not isinstance(prior, dist.Gamma):
            raise TypeError(
                f"GammaRates: the prior of {self.site!r} must be a dist.Gamma, got "
                f"{type(prior).__name__}"
            )
        if not isinstance(law, JumpPath):
            raise TypeError(
                f"GammaRates: site {self.path!r} must be an nsde.JumpPath, got {type(law).__name__}"
            )
        if law.batch_shape or jnp.ndim(law.times) > 1:
            raise ValueError(
                f"GammaRates: series of path {self.path!r} must share rates and clock, got a batch "
                f"of shape {law.batch_shape}"
            )

        def edge_rates(flat: Array) -> Array:
            chain = _bare(run(jnp.reshape(flat, rates.shape))[self.path]["fn"]).chain
            return _edges(chain)[2]

        design = jax.jacfwd(edge_rates)(jnp.ravel(rates))
        shape = jnp.broadcast_to(prior.concentration, rates.shape)
        inverse = jnp.broadcast_to(prior.rate, rates.shape)
        states = jnp.reshape(sites[self.path]["value"], (-1, law.num_times))
        rest, _ = log_density(seed(self._model, 0), args, kwargs, {self.site: rates})
        moves = law.log_prob_pointwise(states)[:, 1:]
        rest = rest - jnp.sum(moves) - jnp.sum(prior.log_prob(rates))
        return _Seen(law, states, design, jnp.ravel(shape), jnp.ravel(inverse), rest)

    def sample(self, state: GammaRatesState, model_args: Any, model_kwargs: Any) -> GammaRatesState:
        kwargs = {} if model_kwargs is None else model_kwargs
        rng_key, jump_key, gamma_key, accept_key = jax.random.split(state.rng_key, 4)
        rates = state.z[self.site]
        seen = self._seen(rates, model_args, kwargs)
        counts, exposed = self._totals(seen, jump_key)
        shape = seen.shape + jnp.sum(jnp.where(seen.design > 0.0, counts[:, None], 0.0), axis=0)
        inverse = seen.inverse + exposed @ seen.design
        new = jax.random.gamma(gamma_key, shape) / inverse
        new = jnp.reshape(new, rates.shape).astype(rates.dtype)
        # What is left of the density: the start of the path and all that knows of the rates.
        gained = self._seen(new, model_args, kwargs).rest - seen.rest
        accept = jnp.exp(jnp.minimum(gained, 0.0))
        u = jax.random.uniform(accept_key, (), rates.dtype)
        chosen = jnp.where((u < accept) | jnp.any(jnp.isnan(new)), new, rates)
        return GammaRatesState({self.site: chosen}, accept, rng_key)

    def _totals(self, seen: _Seen, key: PRNGKeyArray) -> tuple[Array, Array]:
        """Jumps along each edge, and times in the state that it leaves, of all series."""
        chain, times = seen.law.chain, jnp.asarray(seen.law.times)
        source, target, rates = _edges(chain)

        def one(key: PRNGKeyArray, states: Array) -> tuple[Array, Array]:
            jumps = draw_sparse_jumps(
                key,
                (jnp.asarray(source), jnp.asarray(target), rates),
                times,
                states,
                num_states=chain.num_states,
                num_terms=self.num_terms,
            )
            totals = path_totals(jumps, times[0], times[-1], chain.num_states)
            return totals.jumps, totals.dwell

        keys = jax.random.split(key, seen.states.shape[0])
        jumps, dwell = jax.vmap(one)(keys, seen.states)
        # With too little room for the jumps nothing is known of them.
        leaving = jnp.zeros(chain.num_states, rates.dtype).at[source].add(rates)
        held = jnp.max(leaving) * jnp.max(jnp.diff(times)) <= largest_mean(self.num_terms)
        counts = jnp.where(held, jnp.sum(jumps, axis=0)[source, target], jnp.nan)
        return counts, jnp.sum(dwell, axis=0)[source]


class _Seen(NamedTuple):
    """A model at some rates.

    Attributes:
        law: of the path.
        states: of all series at the grid times, `(S, T)`.
        design: each edge's rate by each element of the site, `(E, K)`.
        shape: of the gamma prior, `(K,)`.
        inverse: its inverse scale, `(K,)`.
        rest: log density of all but the prior and the moves of the path.
    """

    law: JumpPath
    states: Array
    design: Float[Array, "E K"]
    shape: Float[Array, " K"]
    inverse: Float[Array, " K"]
    rest: Float[Array, ""]


def _is_multiple(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether each row has one positive entry, the same at two places."""
    one_each = np.all(np.sum(first != 0.0, axis=1) == 1) and np.all(first >= 0.0)
    return bool(one_each and np.allclose(first, second, rtol=1e-6))


def _edges(chain: Any) -> tuple[np.ndarray, np.ndarray, Array]:
    source, target = chain.edge_arrays
    rates = chain.rates_at
    return source, target, rates if chain.edges is not None else rates[source, target]


def _bare(law: Any) -> Any:
    while isinstance(law, dist.Independent | dist.ExpandedDistribution):
        law = law.base_dist
    return law


def _has_mask(law: Any) -> bool:
    while isinstance(law, dist.Independent | dist.ExpandedDistribution):
        law = law.base_dist
    return isinstance(law, dist.MaskedDistribution)
