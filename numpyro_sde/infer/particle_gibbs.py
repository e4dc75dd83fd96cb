"""Particle Gibbs: parameters by NUTS given the path, the path by conditional SMC given them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import PRNGKeyArray
from numpyro.infer import NUTS
from numpyro.infer.gibbs import Gibbs, GibbsState
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import is_prng_key

from numpyro_sde.infer.conditional import ConditionalSMC
from numpyro_sde.infer.interweaving import Interweaving
from numpyro_sde.infer.racing import (
    ProposalRace,
    fingerprint,
    guide_is_exact,
    race_proposals,
    regimes_are_linear,
)
from numpyro_sde.infer.start import Start, approximate_mode
from numpyro_sde.models.reading import read_model
from numpyro_sde.smc.defensive import Auto
from numpyro_sde.smc.settings import PROPOSALS
from numpyro_sde.statespace.checks import typed_key

# Chains begin this many standard deviations of the approximation apart.
_SPREAD = 1.0
# What "auto" races: proposals that can weigh the present path.
_RACED = ("guided", "defensive", "bootstrap")


class ParticleGibbs(Gibbs):
    """Gibbs sampling of paths and parameters, for any SDE with a transition density.

    Runs under `numpyro.infer.MCMC` with warm-up of the inner kernel, a progress bar, several chains
    (`chain_method` "sequential" or "parallel"), pickling and resumption. Extra fields:
    `ParticleGibbs.PATH_RENEWED` (a dict of site to `(*batch, T)`, whether each state changed) and
    `ParticleGibbs.INNER_ACCEPTANCE`.

    Use it where paths are multimodal or emissions unusual. On grids much finer than the data the
    parameters of the diffusion mix slowly given a path: prefer `reparam.GuidedReparam` with NUTS,
    or `PMMH`, there.

    Args:
        model: the model, its path sites as they are.
        num_particles: number of particles of the conditional filter, at least 2.
        inner: the kernel of all other sites, a class or function called with the model and
            `inner_options`.
        sites: names of the path sites; None for all.
        inner_options: keyword arguments of `inner`.
        interweave: move the other sites a second time in each sweep, given the standard normals
            that make the paths, which then move along: what a path ties down (the parameters of its
            diffusion) is free there. None: where the paths' innovations can be read off. Costs a
            kernel more to compile, and gradients of a whitened path.
        **options: as of `ConditionalSMC`: `proposal`, `own_share`, `renewal`, `resampling`,
            `ess_threshold`. Under proposal="auto" of a model that is not linear and normal,
            "guided", "defensive" and "bootstrap" are raced at 16 points about the start, for each
            data set; `proposals` shows the table.

    Raises:
        ValueError: as `ConditionalSMC`; or no other sites than paths.
        TypeError: `inner` gives no MCMC kernel.

    Example:
        >>> import jax, numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> from numpyro.infer import MCMC
        >>> def model(y=None):
        ...     scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
        ...     sde = nsde.SDE(lambda t, x, p: -x, lambda t, x, p: p, params=scale)
        ...     x = numpyro.sample("x", nsde.SDEPath(sde, np.arange(4.0), dist.Normal(0.0, 1.0)))
        ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.5), obs=y)
        >>> kernel = nsde.infer.ParticleGibbs(model, num_particles=8)
        >>> mcmc = MCMC(kernel, num_warmup=20, num_samples=10, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), np.array([0.5, -0.2, 0.1, 0.4]),
        ...          extra_fields=(kernel.PATH_RENEWED,))
        >>> mcmc.get_samples()["x"].shape
        (10, 4)
        >>> mcmc.get_extra_fields()[kernel.PATH_RENEWED]["x"].shape
        (10, 4)
    """

    PATH_RENEWED = "block_states.0.renewed"
    INNER_ACCEPTANCE = "block_states.1.accept_prob"

    def __init__(
        self,
        model: Callable[..., Any],
        num_particles: int = 64,
        inner: Callable[..., MCMCKernel] = NUTS,
        *,
        sites: Sequence[str] | None = None,
        inner_options: dict[str, Any] | None = None,
        interweave: bool | None = None,
        **options: Any,
    ) -> None:
        paths = ConditionalSMC(model, sites, num_particles, **options)
        rest = inner(model, **(inner_options or {}))
        if not isinstance(rest, MCMCKernel):
            raise TypeError(
                f"inner must make an MCMC kernel of a model, as NUTS does, got {rest!r}"
            )
        super().__init__([(paths, paths.select_sites), (rest, None)])
        # The copy that runs: Gibbs binds its kernels to the model given the other sites.
        self._paths = self.blocks[0][0]
        self._asked_interweaving = interweave
        self._interweaving: Interweaving | None = None
        if interweave is not False:
            self._interweaving = Interweaving(
                model, inner, inner_options or {}, self._paths, self.blocks[1][0]
            )
        self._is_raced = paths.setting.proposal == Auto() and paths.own_share is None
        self.proposals: ProposalRace | None = None
        self._races: dict[Any, ProposalRace | None] = {}

    def init(
        self,
        rng_key: PRNGKeyArray,
        num_warmup: int,
        init_params: Any,
        model_args: Any,
        model_kwargs: Any,
    ) -> GibbsState:
        """Begin at the mode of an extended Kalman approximation where no start is given.

        From a draw of the prior a chain may begin where every path but its own is impossible, and
        stay there.
        """
        kwargs = {} if model_kwargs is None else model_kwargs
        read_model(self._model, model_args, kwargs)  # refuses data that are none
        if init_params is None and is_prng_key(rng_key):
            mode_key, spread_key, race_key, rng_key = jax.random.split(typed_key(rng_key), 4)
            start, _ = approximate_mode(self._model, model_args, kwargs, mode_key)
            flat, back = ravel_pytree(start.z)
            if self._is_raced and not isinstance(rng_key, jax.core.Tracer):
                self._race(start, race_key, model_args, kwargs)
            if self.proposals is not None:
                flat = jnp.asarray(self.proposals.best_point, flat.dtype)
            spread = start.factor @ jax.random.normal(spread_key, flat.shape, flat.dtype)
            init_params = back(flat + _SPREAD * spread)
        state = super().init(rng_key, num_warmup, init_params, model_args, model_kwargs)
        return self._with_interweaving(state, num_warmup, model_args, model_kwargs)

    def _with_interweaving(
        self, state: GibbsState, num_warmup: int, args: Any, kwargs: Any
    ) -> GibbsState:
        """The state with that of the second move of the parameters, where there is one."""
        if self._interweaving is None:
            return state
        rng_key, own_key = jax.random.split(state.rng_key)
        kwargs = {} if kwargs is None else kwargs
        try:
            own = self._interweaving.init(own_key, num_warmup, state.block_states, args, kwargs)
        except (TypeError, ValueError, RuntimeError):
            if self._asked_interweaving:
                raise
            return state  # paths without innovations to hold, or that rounding takes out of bounds
        return state._replace(block_states=(*state.block_states, own), rng_key=rng_key)

    def sample(self, state: GibbsState, model_args: Any, model_kwargs: Any) -> GibbsState:
        """One sweep: paths given the rest, the rest given paths, and given their innovations."""
        state = super().sample(state, model_args, model_kwargs)
        if self._interweaving is None or len(state.block_states) == 2:
            return state
        kwargs = {} if model_kwargs is None else model_kwargs
        moved = self._interweaving.move(state.block_states, model_args, kwargs)
        return state._replace(z=self._merge_z(moved), block_states=moved)

    def wrap_model(self, wrapper: Callable[..., Any]) -> ParticleGibbs:
        """The same kernel on a wrapped model."""
        new: ParticleGibbs = super().wrap_model(wrapper)
        new._paths, rest = (kernel for kernel, _ in new.blocks)
        if self._interweaving is not None:
            new._interweaving = self._interweaving.wrapped(wrapper, new._paths, rest)
        return new

    def _race(self, start: Start, key: PRNGKeyArray, args: Any, kwargs: Any) -> None:
        """Take the proposal that wins on these data; what was found is kept with them."""
        data = fingerprint(args, kwargs)
        if data is None:
            return
        if data not in self._races:
            exact = guide_is_exact(self._model, start.z, args, kwargs) or regimes_are_linear(
                self._model, start.z, args, kwargs
            )
            self._races[data] = (
                None
                if exact
                else race_proposals(
                    self._model,
                    args,
                    kwargs,
                    start,
                    key,
                    names=_RACED,
                    num_particles=self._paths.num_particles,
                    options={
                        "resampling": self._paths.setting.resampler,
                        "ess_threshold": self._paths.setting.ess_threshold,
                    },
                )
            )
        self.proposals = found = self._races[data]
        chosen = Auto() if found is None else PROPOSALS[found.chosen]()
        self._paths.setting = self._paths.setting._replace(proposal=chosen)
