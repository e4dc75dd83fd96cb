"""Conditional SMC as a block of NumPyro's Gibbs sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from numpyro_sde.distributions.state_space import ObservedPath
from numpyro_sde.filters.rao_blackwell import check_switching
from numpyro_sde.infer import conditional_regimes
from numpyro_sde.infer.block import BlockKernel
from numpyro_sde.models.arguments import released, with_data_as_arguments
from numpyro_sde.models.reading import Reading, latent_paths, read_model, refuse_weighted
from numpyro_sde.models.survey import survey
from numpyro_sde.runtime.entry import Held, entry_point
from numpyro_sde.schemes.switching import SwitchingSteps
from numpyro_sde.smc.backward import invertible
from numpyro_sde.smc.conditional import RENEWALS, conditional_smc, first_path
from numpyro_sde.smc.guided_jumps import GuidedJumps
from numpyro_sde.smc.proposals import Bootstrap, Proposal, observed_rows
from numpyro_sde.smc.resampling import Resampling
from numpyro_sde.smc.settings import Setting, make_setting, with_own_steps
from numpyro_sde.statespace.checks import check_brownian, check_choice
from numpyro_sde.statespace.guide import innovation_size
from numpyro_sde.statespace.model import StateSpaceModel


class ConditionalSMCState(NamedTuple):
    """State of `ConditionalSMC`.

    Attributes:
        z: the paths by site, `(*batch, T, *state)`.
        renewed: whether the state at each time changed in the last sweep, by site, `(*batch, T)`.
        ess: effective sample sizes of the last sweep at each time, by site.
        rng_key: key of the next sweep.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.infer.ConditionalSMCState._fields
        ('z', 'renewed', 'ess', 'rng_key')
    """

    z: dict[str, Array]
    renewed: dict[str, Array]
    ess: dict[str, Array]
    rng_key: PRNGKeyArray


class ConditionalSMC(BlockKernel):
    """Update paths given the rest of a model by conditional sequential Monte Carlo.

    A block kernel for `numpyro.infer.gibbs.Gibbs`:
    `Gibbs([(ConditionalSMC(model), ["x"]), (NUTS(model), None)])`, which `ParticleGibbs` makes for
    you. Each sweep runs a particle filter that keeps the present path and draws a new one backward,
    block by block between observation times, with new bridges inside the blocks; any number of
    particles keeps the law of the path given data and parameters.

    The path of a `SwitchingSDE` is drawn through its regimes, the state integrated out, where the
    model is linear and normal given them; `proposal` and `renewal` are then not used.

    Extra fields are `renewed` and `ess` of `ConditionalSMCState`: under `Gibbs`
    `"block_states.0.renewed"`. Do not use it where the diffusion's parameters are to be learnt on a
    very fine grid: given the path they hardly move (Roberts and Stramer 2001); `GuidedReparam` and
    `PMMH` have no such limit.

    Args:
        model: the model, its path sites as they are: no `marginalize`, no reparametrisation.
        sites: names of the path sites; None for all of the model.
        num_particles: number of particles, at least 2.
        proposal: "auto" ("guided" where the model is linear and normal and for jump-diffusions with
            normal sizes and emissions, else "defensive", or "bootstrap" where innovations cannot
            be read off a path), "guided", "defensive", "bootstrap", or a `filters.Proposal` that
            can be retraced.
        own_share: probability with which a guided particle moves as the model does until the next
            observation. Weights are those of the mixture, never above its inverse: no path far from
            what a normal guide expects is kept for long. None for 0.25 under "auto", and under
            "guided" for 0.1 where an emission is not normal or its variance depends on the state,
            as in stochastic volatility, else 0.
        renewal: "backward" draws the path backward among all particles, with new bridges between
            observations; "ancestor" (grids of which every time is observed) gives the path new
            ancestors while the filter runs; "none" follows the ancestors, which all paths share at
            the beginning of long series. Noise with a memory (`MarkovFBM`) needs "none", and so do
            steps that are not smooth where they have no density or the grid is finer than the data.
        resampling: scheme of the conditional filter.
        ess_threshold: share of particles below which the effective size calls for resampling.

    Raises:
        ValueError: an option out of range. When run: a model without path sites, a path that enters
            the density elsewhere than in `observe`, a transition without density, or noise with a
            memory and a `renewal` other than "none".
        TypeError: a count that is no integer.

    Example:
        >>> import jax, numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> from numpyro.infer import MCMC, NUTS
        >>> from numpyro.infer.gibbs import Gibbs
        >>> def model(y=None):
        ...     scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
        ...     sde = nsde.SDE(lambda t, x, p: -x, lambda t, x, p: p, params=scale)
        ...     x = numpyro.sample("x", nsde.SDEPath(sde, np.arange(4.0), dist.Normal(0.0, 1.0)))
        ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.5), obs=y)
        >>> block = nsde.infer.ConditionalSMC(model, num_particles=8)
        >>> mcmc = MCMC(Gibbs([(block, ["x"]), (NUTS(model), None)]), num_warmup=10,
        ...             num_samples=10, progress_bar=False)
        >>> mcmc.run(jax.random.key(0), np.array([0.5, -0.2, 0.1, 0.4]))
        >>> mcmc.get_samples()["x"].shape
        (10, 4)
    """

    sample_field = "z"

    def __init__(
        self,
        model: Callable[..., Any],
        sites: Sequence[str] | None = None,
        num_particles: int = 64,
        *,
        proposal: str | Proposal = "auto",
        own_share: float | None = None,
        renewal: str = "backward",
        resampling: str | Resampling = "systematic",
        ess_threshold: float = 0.5,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be a function, got {type(model).__name__}")
        if isinstance(sites, str):
            raise TypeError(f"sites must be a list of names, got the string {sites!r}")
        self.setting = make_setting(
            num_particles, proposal, resampling, ess_threshold, least=2, retraced=True
        )
        check_choice("renewal", renewal, RENEWALS)
        if own_share is not None and proposal not in ("auto", "guided"):
            raise ValueError(
                f"own_share is of proposal='guided' or 'auto', got {own_share} with "
                f"proposal={proposal!r}"
            )
        if own_share is not None and not 0 <= own_share < 1:
            raise ValueError(f"own_share must be at least 0 and below 1, got {own_share}")
        self._model = model
        self.own_share = own_share
        self.sites = None if sites is None else tuple(sites)
        self.num_particles = num_particles
        self.renewal = renewal

    @property
    def model(self) -> Callable[..., Any]:
        """The model."""
        return self._model

    @property
    def default_fields(self) -> tuple[str, ...]:
        return ("z",)

    def get_diagnostics_str(self, state: ConditionalSMCState) -> str:
        shares = [jnp.mean(renewed) for renewed in state.renewed.values()]
        return f"path renewed {float(sum(shares) / len(shares)):.2f}"

    def init(
        self,
        rng_key: PRNGKeyArray,
        num_warmup: int,  # noqa: ARG002
        init_params: Any,
        model_args: Any,
        model_kwargs: Any,
    ) -> ConditionalSMCState:
        if not init_params:
            raise ValueError(
                "ConditionalSMC is a block of numpyro.infer.gibbs.Gibbs, which hands it paths to "
                "begin with: use Gibbs([(ConditionalSMC(model), sites), ...]) or ParticleGibbs"
            )
        kwargs = {} if model_kwargs is None else model_kwargs
        z = {name: jnp.asarray(value, _kept_type(value)) for name, value in init_params.items()}
        survey(self._model, model_args, kwargs).refuse_other_uses()

        # A race may give the kernel another proposal: it decides the program too.
        proposal, threshold = self.setting.proposal, self.setting.ess_threshold
        held = Held((threshold, jax.tree.leaves(proposal)))
        # Compiled as one: a filter outside `jit` would compile every operation apart.
        state: ConditionalSMCState = with_data_as_arguments(
            self._model,
            model_args,
            kwargs,
            lambda given: _first_paths(self, proposal, held, given, rng_key, z),
        )
        return state

    def _begin(
        self, key: PRNGKeyArray, z: dict[str, Array], args: Any, kwargs: Any
    ) -> ConditionalSMCState:
        # Paths drawn by filters: those of the prior, which Gibbs hands over, may be such that no
        # other one ever replaces them.
        key, *keys = jax.random.split(key, 1 + len(z))
        renewed, ess = {}, {}
        for name, own in zip(tuple(z), keys, strict=True):
            observed = self._observed(args, kwargs, name, z)
            z = {**z, name: self._first(observed, own)}
            shape = (*observed.lead, observed.path.num_times)
            renewed[name] = jnp.ones(shape, bool)
            ess[name] = jnp.full(shape, jnp.nan)  # there was no sweep yet
        return ConditionalSMCState(z, renewed, ess, key)

    def sample(
        self, state: ConditionalSMCState, model_args: Any, model_kwargs: Any
    ) -> ConditionalSMCState:
        kwargs = {} if model_kwargs is None else model_kwargs
        rng_key, *keys = jax.random.split(state.rng_key, 1 + len(state.z))
        z, renewed, ess = dict(state.z), {}, {}
        for (name, value), key in zip(state.z.items(), keys, strict=True):
            observed = self._observed(model_args, kwargs, name, z)
            z[name], renewed[name], ess[name] = self._sweep(observed, value, key)
        return ConditionalSMCState(z, renewed, ess, rng_key)

    def _observed(self, args: Any, kwargs: Any, name: str, z: dict[str, Array]) -> ObservedPath:
        """A path with its law and data, given everything else."""
        return self._reading(args, kwargs, name, z).observed[name]

    def _reading(self, args: Any, kwargs: Any, name: str, z: dict[str, Array]) -> Reading:
        reading = read_model(self._model, args, kwargs, values=z, only=name)
        refuse_weighted(reading.paths[name], name, "conditional SMC")
        return reading

    def _first(self, observed: ObservedPath, key: PRNGKeyArray) -> Array:
        def one(model: StateSpaceModel, key: PRNGKeyArray) -> Array:
            self._check(model)
            if isinstance(model.scheme, SwitchingSteps):
                path = conditional_regimes.first_path(model, self.num_particles, key)
                return model.visible(path)
            return model.visible(first_path(model, self._setting(model), key))

        drawn: Array = observed.map_seeded(one, key, self.num_particles)
        return observed.path.of_states(drawn)

    def _sweep(
        self, observed: ObservedPath, value: Array, key: PRNGKeyArray
    ) -> tuple[Array, Array, Array]:
        def one(model: StateSpaceModel, key: PRNGKeyArray, x: Array) -> tuple[Array, Array, Array]:
            self._check(model)
            if isinstance(model.scheme, SwitchingSteps):
                path, renewed, ess = conditional_regimes.sweep(model, x, self.num_particles, key)
                return model.visible(path), renewed, ess
            if model.state_shape is None:
                states = jnp.reshape(x, (model.num_times, model.dim))
            else:
                states = model.scheme.lift(model.sde, model.times, model.dt, x, model.cache)
            sweep = conditional_smc(model, self._setting(model), states, key, renewal=self.renewal)
            return model.visible(sweep.path), sweep.renewed, sweep.ess

        dims = (1 + len(observed.path.state_shape),)
        swept = observed.map_seeded(one, key, self.num_particles, (value,), dims)
        return (observed.path.of_states(swept[0]), *swept[1:])

    def _setting(self, model: StateSpaceModel) -> Setting:
        return with_own_steps(self.setting, model, self.own_share)

    def _check(self, model: StateSpaceModel) -> None:
        if isinstance(model.scheme, SwitchingSteps):
            check_switching(model, "ConditionalSMC()")
            return
        check_brownian(model, "ConditionalSMC()")
        if model.state_shape is not None:
            # A carried bank is a function of the path: innovations can be read off, a density of
            # the carried state there is not.
            if self.renewal == "none":
                return
            raise ValueError(
                f"with noise {type(model.sde.noise).__name__} a state's law depends on the whole "
                "past of its path, so other ancestors cannot be weighed one step at a time: give "
                "renewal='none', or use PMMH, or reparam.GuidedReparam with NUTS"
            )
        if not model.scheme.smooth or innovation_size(model) > model.dim:
            self._check_rough(model)
            return
        reason = invertible(model)
        if reason:
            raise ValueError(
                f"ConditionalSMC weighs transitions of the path, but {reason}. Use PMMH, or "
                "reparam.GuidedReparam with NUTS, which work on the innovations"
            )

    def _check_rough(self, model: StateSpaceModel) -> None:
        """Refuse what needs steps whose innovations can be read off where they cannot."""
        name = type(model.scheme).__name__
        if not isinstance(self._setting(model).proposal, Bootstrap | GuidedJumps):
            model.scheme.require_smooth(f"ConditionalSMC(proposal={self.setting.proposal!r})")
            raise ValueError(
                f"ConditionalSMC(proposal={self.setting.proposal!r}) reads innovations off the "
                f"path, and those of {name} cannot be: use proposal='bootstrap'"
            )
        if self.renewal == "none":
            return
        if not model.scheme.has_density:
            model.scheme.require_smooth(f"ConditionalSMC(renewal={self.renewal!r})")
            raise ValueError(f"{name} has no transition density: give renewal='none'")
        unseen = model.num_times - observed_rows(model).size
        if unseen:
            raise ValueError(
                f"ConditionalSMC(renewal={self.renewal!r}) draws bridges between observations, and "
                f"steps of {name} have none: {unseen} of {model.num_times} grid times have no "
                "observation. Give renewal='none', or a grid of the observed times"
            )

    def select_sites(self, model_trace: Any) -> tuple[str, ...]:
        """Names of the sites it updates, found in a trace of the model."""
        return latent_paths(model_trace) if self.sites is None else self.sites


@entry_point
def _first_paths(
    kernel: ConditionalSMC,
    proposal: Proposal,  # noqa: ARG001
    options: Held,  # noqa: ARG001
    arguments: Any,
    key: PRNGKeyArray,
    z: dict[str, Array],
) -> ConditionalSMCState:
    """First paths by filters, compiled once for a kernel's proposal and options."""
    args, kwargs = released(arguments)
    return kernel._begin(key, z, args, kwargs)


def _kept_type(value: Any) -> Any:
    """The type of a path's states: whole numbers stay such, which parameters may be indexed by."""
    whole = jnp.issubdtype(jnp.result_type(value), jnp.integer)
    return jnp.result_type(value) if whole else jnp.result_type(float)
