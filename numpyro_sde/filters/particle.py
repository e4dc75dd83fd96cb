"""The particle filter as a method for `marginalize`, and its result."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_sde.filters.particle_result import ParticleResult, Reliability
from numpyro_sde.smc.backward import Dynamics, invertible
from numpyro_sde.smc.conditional import bridge_reference
from numpyro_sde.smc.defensive import Auto, Defensive
from numpyro_sde.smc.guided_jumps import GuidedJumps
from numpyro_sde.smc.next_observation import ModifiedBridge, ResidualBridge
from numpyro_sde.smc.online import OnlineSums, additive_online
from numpyro_sde.smc.particle_filter import Run, run_filter
from numpyro_sde.smc.proposals import Guided, Plan, Proposal
from numpyro_sde.smc.race import Race, race
from numpyro_sde.smc.resampling import SCHEMES, Resampling, effective_size
from numpyro_sde.smc.settings import PROPOSALS, Setting, make_setting, name_of
from numpyro_sde.smc.tails import pareto_shape
from numpyro_sde.smc.two_filter import JOINS, TwoFilterResult, two_filter
from numpyro_sde.statespace.bounds import largest_log_likelihood
from numpyro_sde.statespace.checks import check_brownian, check_choice, check_count, typed_key
from numpyro_sde.statespace.exact import refuse_exact
from numpyro_sde.statespace.model import AbstractFilter, StateSpaceModel
from numpyro_sde.statespace.updates import with_valid_inputs

# Folded into the key of a filter for the race before it.
_RACE = 7


class ParticleCollapseWarning(RuntimeWarning):
    """All particles of a filter had weight zero: its log likelihood is minus infinity.

    Example:
        >>> import warnings, numpyro_sde as nsde
        >>> with warnings.catch_warnings():  # an engine that expects such parameter values
        ...     warnings.simplefilter("ignore", nsde.filters.ParticleCollapseWarning)
    """


class UnreliableFilterWarning(RuntimeWarning):
    """A particle filter whose own signs speak against its log likelihood.

    `ParticleResult.reliability` has the numbers.

    Example:
        >>> import warnings, numpyro_sde as nsde
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", nsde.filters.UnreliableFilterWarning)
    """


def _remedy(proposal: str) -> str:
    """What else to try than what is in use."""
    others = [name for name in ("auto", "guided", "bootstrap") if name != proposal]
    return f"use more particles, proposal={others[0]!r} or {others[1]!r}"


def _warn(proposal: str, log_likelihood: Any, largest: Any) -> None:
    """Say what is wrong with log likelihoods, on the host."""
    if np.any(np.isneginf(log_likelihood)):
        warnings.warn(
            "all particles had weight zero, so the log likelihood is -inf: the data are "
            f"impossible or far from every particle; {_remedy(proposal)}, or a wider emission",
            ParticleCollapseWarning,
            stacklevel=2,
        )
    if np.any(is_above(log_likelihood, largest)):
        warnings.warn(
            f"the estimated log likelihood {np.max(log_likelihood):.6g} is above the largest that "
            f"the data can have, {np.max(largest):.6g}, so it is given as NaN: weights of a few "
            f"particles have run away; {_remedy(proposal)}",
            UnreliableFilterWarning,
            stacklevel=2,
        )


def _warn_of_result(proposal: str, log_likelihood: Any, reliability: Reliability) -> None:
    _warn(proposal, log_likelihood, reliability.largest)
    if np.ndim(log_likelihood):
        return  # a panel: each element's reliability is in the result
    found = reliability.complaints()
    if found and np.isfinite(log_likelihood):
        warnings.warn(
            f"this particle filter may miss a part of the law: {'; '.join(found)}. For a better "
            f"estimate {_remedy(proposal)}, or observe more often there",
            UnreliableFilterWarning,
            stacklevel=2,
        )


def is_above(log_likelihood: Any, largest: Any) -> Any:
    """Whether an estimate is impossible, rounding left aside."""
    # A bound that is no number, as for components seen exactly, bounds nothing.
    return (largest < np.inf) & (log_likelihood > largest + 1e-3 * (1.0 + abs(largest)))


@jax.custom_jvp
def without_gradient(log_likelihood: Array) -> Array:
    """The identity, refusing to be differentiated."""
    return log_likelihood


@without_gradient.defjvp
def _refuse_gradient(primals: Any, tangents: Any) -> Any:  # noqa: ARG001
    raise TypeError(
        "a particle filter's log likelihood has no useful gradient: under NUTS, HMC and SVI its "
        "random numbers would be fixed and the target silently another one, and derivatives do not "
        "pass through resampling. Use nsde.infer.PMMH (random walk on the unbiased estimate) or "
        "nsde.infer.ParticleGibbs (NUTS for parameters, the path by conditional SMC)"
    )


class Particle(AbstractFilter):
    """A particle filter: an unbiased estimate of the likelihood of any SDE and any emission.

    `log_likelihood` is the log of an unbiased estimate, so it is itself too small on average, by
    half its variance; keep that below 2 or so (`ParticleResult.variance`) in `PMMH`. Its random
    numbers come from `seed`, or from the engine that runs it. It cannot be differentiated, so NUTS
    and SVI refuse it with the reason: use `infer.PMMH` or `infer.ParticleGibbs`.

    Args:
        num_particles: number of particles.
        proposal: how they move between observations: "auto" (guided where the model is linear and
            normal, else the best of guided, bootstrap and their mixture, raced on short filters
            with random numbers of their own), "guided" (given all later observations of the
            linearised model; best wherever linearising works), "bootstrap" (the model's own steps),
            "defensive" (guided and own steps mixed), "auxiliary", "modified_bridge" or
            "residual_bridge" (towards the next observation only); or a `filters.Proposal`.
        resampling: "systematic", "stratified", "residual", "multinomial", "ssp" or "killing", or
            a `filters.Resampling`.
        ess_threshold: share of the particles below which the effective sample size calls for
            resampling; 1 resamples at every observation.
        seed: seed of the random numbers.
        history: keep all particles, for smoothing; memory of N * num_particles states.
        key: random key to use instead of the seed's; an array of keys `(B,)` gives one to each of
            B stretches of time, particles then being resampled in the order of Hilbert's curve,
            so that changing one key changes the estimate little.

    Raises:
        ValueError: an unknown or impossible option. When used: noise that is not Brownian, or a
            scheme without innovations.
        TypeError: a count that is no integer, a key that is none.

    Warns:
        ParticleCollapseWarning: all particles had weight zero.
        UnreliableFilterWarning: the estimate is above what the data allow (it is NaN then), or,
            from `filter`, its own signs speak against it: it names the time and a remedy.

    Example:
        >>> import numpyro.distributions as dist, numpyro_sde as nsde
        >>> ou = nsde.processes.OrnsteinUhlenbeck(rate=1.0, mean=0.0, scale=1.0)
        >>> path = nsde.SDEPath(ou, [0.0, 1.0, 2.0], init=dist.Normal(0.0, 0.7))
        >>> result = nsde.filter_path(
        ...     path, lambda t, x: dist.Normal(x, 0.5), [0.3, float("nan"), -0.1],
        ...     method=nsde.filters.Particle(500),
        ... )
        >>> result.mean.shape, bool(result.variance < 1e-6)  # guided: exact for linear models
        ((3, 1), True)
    """

    num_particles: int = eqx.field(static=True)
    mover: Proposal
    resampler: Any = eqx.field(static=True)
    ess_threshold: float = eqx.field(static=True)
    seed: int = eqx.field(static=True)
    history: bool = eqx.field(static=True)
    key: Any = None

    def __init__(
        self,
        num_particles: int = 1000,
        *,
        proposal: str | Proposal = "auto",
        resampling: str | Resampling = "systematic",
        ess_threshold: float = 0.5,
        seed: int = 0,
        history: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> None:
        setting = make_setting(num_particles, proposal, resampling, ess_threshold)
        check_count("seed", seed, least=0)
        self.num_particles = num_particles
        self.mover = setting.proposal
        self.resampler = setting.resampler
        self.ess_threshold = float(ess_threshold)
        self.seed = seed
        self.history = history
        self.key = None if key is None else typed_key(key)

    @property
    def proposal(self) -> str | Proposal:
        """How particles move: a name, or a user's own proposal."""
        return name_of(self.mover, PROPOSALS)

    @property
    def resampling(self) -> str | Resampling:
        """How particles are resampled: a name, or a user's own scheme."""
        return name_of(self.resampler, SCHEMES)

    @property
    def random_key(self) -> PRNGKeyArray:
        """The key its random numbers come from."""
        return jax.random.key(self.seed) if self.key is None else self.key

    def _with(self, **changes: Any) -> Particle:
        kept = {
            "proposal": self.mover,
            "resampling": self.resampler,
            "ess_threshold": self.ess_threshold,
            "seed": self.seed,
            "history": self.history,
            "key": self.key,
        }
        return type(self)(self.num_particles, **{**kept, **changes})

    def with_key(self, key: PRNGKeyArray) -> Particle:
        """The same filter on other random numbers."""
        return self._with(key=key)

    def for_smoothing(self) -> Particle:
        return self._with(history=True)

    @property
    def weighs_by_density(self) -> bool:
        return True

    @property
    def num_starts(self) -> int:
        return self.num_particles

    @property
    def setting(self) -> Setting:
        """What the engine needs to know."""
        return Setting(self.num_particles, self.mover, self.resampler, self.ess_threshold)

    def _raced(
        self, model: StateSpaceModel
    ) -> tuple[Setting, Plan | None, Race | None, PRNGKeyArray]:
        """The setting for a model, its plan if it has one, the race, and the filter's own key.

        The race has random numbers of its own, so that the estimate stays unbiased.
        """
        key = self.random_key
        if not isinstance(self.mover, Auto):
            return self.setting.for_model(model), None, None, key
        race_key = jax.random.fold_in(key if key.ndim == 0 else key[0], _RACE)
        return *race(model, self.setting, race_key), key

    def check(self, model: StateSpaceModel) -> None:
        check_brownian(model, "Particle()")
        if not model.scheme.has_innovations:
            raise ValueError(
                f"Particle() moves particles by the scheme's innovations, which "
                f"{type(model.scheme).__name__} has not: "
                f"{model.scheme.remedy('use Euler(), Milstein() or Exact()')}"
            )
        mover = self.mover
        if type(mover) is Guided:
            mover = self.setting.for_model(model).proposal
        if isinstance(mover, GuidedJumps):
            return
        if isinstance(mover, Guided | ModifiedBridge | ResidualBridge):
            model.scheme.require_smooth(f"Particle(proposal={self.proposal!r})")

    def log_likelihood(self, model: StateSpaceModel) -> Float[Array, ""]:
        setting, plan, _, key = self._raced(model)
        value = run_filter(model, setting, key, plan=plan).log_likelihood
        largest = largest_log_likelihood(model)
        jax.debug.callback(partial(_warn, str(self.proposal)), value, largest)
        return without_gradient(jnp.where(is_above(value, largest), jnp.nan, value))

    def increments(self, model: StateSpaceModel) -> Float[Array, " N"]:
        setting, plan, _, key = self._raced(model)
        run = run_filter(model, setting, key, diagnose=True, plan=plan)
        return without_gradient(run.increments)

    def resampled_last(
        self, model: StateSpaceModel
    ) -> tuple[Float[Array, ""], Float[Array, "M d"]]:
        """Log likelihood, and equally weighted particles at the last time, to go on from."""
        setting, plan, _, key = self._raced(model)
        run_key, choice_key = jax.random.split(key)
        run = run_filter(model, setting, run_key, plan=plan)
        x, log_weights = run.last
        ancestors = setting.resampler(choice_key, jax.nn.softmax(log_weights))
        return run.log_likelihood, jnp.swapaxes(x[:, ancestors], 0, 1)

    def additive(
        self,
        model: StateSpaceModel,
        functional: Callable[[Array, Array, Array, Array], Array],
        *,
        num_backward: int = 2,
    ) -> OnlineSums:
        """Smoothed sums along the path while the filter runs: see `nsde.filter_additive`."""
        self._check_weighing(model, "filter_additive")
        setting, _, _, key = self._raced(model)
        run = partial(additive_online, model, setting, key, functional)
        result = jax.jit(lambda: run(num_backward=num_backward))()
        jax.debug.callback(partial(_warn, str(self.proposal)), result.log_likelihood, jnp.inf)
        return result

    def two_filter(self, model: StateSpaceModel, *, join: str = "all") -> TwoFilterResult:
        """Smoothed marginals by particles that run both ways: see `nsde.two_filter`."""
        check_choice("join", join, JOINS)
        self._check_weighing(model, "two_filter")
        refuse_exact(model, "two_filter")
        setting, _, _, key = self._raced(model)
        return jax.jit(lambda: two_filter(model, setting, key, join=join))()

    def _check_weighing(self, model: StateSpaceModel, caller: str) -> None:
        reason = invertible(model)
        if reason:
            otherwise = "use Particle().filter, whose draws follow ancestral lines"
            raise ValueError(
                f"{caller} weighs transitions, but {reason}: {model.scheme.remedy(otherwise)}"
            )
        if self.random_key.ndim:
            raise ValueError(
                f"{caller} needs a filter with one random key, got key of shape "
                f"{self.random_key.shape}"
            )

    def filter(self, model: StateSpaceModel) -> ParticleResult:
        """Run the filter; with `history`, keep what smoothing needs.

        The variance of the log likelihood is estimated by a second run with multinomial
        resampling, the only scheme for which particles' ancestors tell it (Lee and Whiteley 2018).
        """
        # Compiled as one: outside `jit` every operation would be compiled apart.
        result = jax.jit(lambda: self._filter(model))()
        jax.debug.callback(
            partial(_warn_of_result, str(self.proposal)), result.log_likelihood, result.reliability
        )
        value = result.log_likelihood
        above = is_above(value, result.reliability.largest)
        return eqx.tree_at(lambda r: r.log_likelihood, result, jnp.where(above, jnp.nan, value))

    def _run_keys(self, key: PRNGKeyArray) -> tuple[PRNGKeyArray, PRNGKeyArray]:
        """Random numbers of a run, and of the one beside it that shows its variance."""
        if key.ndim:
            return key, key
        run_key, second_key = jax.random.split(key)
        return run_key, second_key

    def _filter(self, model: StateSpaceModel) -> ParticleResult:
        setting, plan, raced, key = self._raced(model)
        run_key, second_key = self._run_keys(key)
        plan = setting.proposal.plan(with_valid_inputs(model)) if plan is None else plan
        run = run_filter(
            model,
            setting,
            run_key,
            diagnose=True,
            moments=True,
            history=self.history,
            plan=plan,
        )
        variance = spread = jnp.full((), jnp.nan, model.init_mean.dtype)
        if self.num_particles > 1:
            multinomial = setting._replace(resampler=SCHEMES["multinomial"])
            second_key = second_key if second_key.ndim == 0 else second_key[0]
            second = run_filter(model, multinomial, second_key, variance=True, plan=plan)
            variance = second.variance
            difference = jnp.abs(run.log_likelihood - second.log_likelihood)
            # Two runs that agree to rounding have no spread, whatever their variance is.
            floor = 1e-3 * (1.0 + jnp.abs(run.log_likelihood))
            spread = difference / jnp.sqrt(2.0 * jnp.maximum(variance, 0.0) + floor)
        index, weights = run.poorest
        reliability = Reliability(
            khat=pareto_shape(weights),
            index=index,
            time=jnp.asarray(model.times, model.init_mean.dtype)[index],
            ess=effective_size(weights) / self.num_particles,
            variance=variance,
            spread=spread,
            largest=largest_log_likelihood(model),
            race=raced,
        )
        law = guide = None
        if self.history:
            reference = bridge_reference(model, plan)
            law = Dynamics.of(model, reference)
            guide = _guide_of(setting.proposal, plan.nodes)
        return _result(model, run, variance, law, guide, reliability)


def _guide_of(proposal: Proposal, nodes: Any) -> Any:
    """What a proposal knew of later observations, for the draws of paths; None for nothing."""
    if not isinstance(proposal, Guided):
        return None
    if not isinstance(proposal, Defensive):
        return nodes
    H, e, reference = nodes
    silent = jnp.asarray(proposal.share) >= 1.0
    return jnp.where(silent, 0.0, H), jnp.where(silent, 0.0, e), reference


def _result(
    model: StateSpaceModel,
    run: Run,
    variance: Array,
    law: Dynamics | None,
    guide: Any,
    reliability: Reliability,
) -> ParticleResult:
    before_mean, before_cov, mean, cov = run.moments
    history = run.history
    return ParticleResult(
        times=model.times,
        log_likelihood=run.log_likelihood,
        increments=run.increments,
        mean=mean,
        cov=cov,
        predicted_mean=before_mean,
        predicted_cov=before_cov,
        cross=None,
        particles=None if history is None else jnp.swapaxes(history.particles, 1, 2),
        log_weights=None if history is None else jax.nn.log_softmax(history.log_weights),
        variance=variance,
        ess=run.ess,
        resampled=run.resampled,
        reliability=reliability,
        history=history,
        law=law,
        guide=guide,
    )
