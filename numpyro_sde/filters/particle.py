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

from numpyro_sde.smc.backward import Dynamics, invertible
from numpyro_sde.smc.conditional import bridge_reference
from numpyro_sde.smc.online import OnlineSums, additive_online
from numpyro_sde.smc.particle_filter import (
    History,
    Run,
    Setting,
    make_setting,
    over_particles,
    run_filter,
)
from numpyro_sde.smc.proposals import Guided
from numpyro_sde.smc.resampling import SCHEMES
from numpyro_sde.smc.smoothers import additive, draw_paths, fixed_lag, genealogy
from numpyro_sde.smc.two_filter import JOINS, TwoFilterResult, two_filter
from numpyro_sde.statespace.checks import check_brownian, check_choice, check_count
from numpyro_sde.statespace.model import AbstractFilter, FilterResult, StateSpaceModel

SMOOTHERS = ("mcmc", "exact", "rejection", "genealogy")


class ParticleCollapseWarning(RuntimeWarning):
    """All particles of a filter had weight zero: its log likelihood is minus infinity.

    Example:
        >>> import warnings, numpyro_sde as nsde
        >>> with warnings.catch_warnings():  # an engine that expects such parameter values
        ...     warnings.simplefilter("ignore", nsde.filters.ParticleCollapseWarning)
    """


def _warn_of_collapse(log_likelihood: Any) -> None:
    if np.any(np.isneginf(log_likelihood)):
        warnings.warn(
            "all particles had weight zero, so the log likelihood is -inf: the data are "
            "impossible or far from every particle; use more particles, proposal='guided', or a "
            "wider emission",
            ParticleCollapseWarning,
            stacklevel=2,
        )


@jax.custom_jvp
def _without_gradient(log_likelihood: Array) -> Array:
    """The identity, refusing to be differentiated."""
    return log_likelihood


@_without_gradient.defjvp
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
        proposal: how they move between observations: "guided" (given all later observations of
            the linearised model; best wherever linearising works), "bootstrap" (the model's own
            steps), "auxiliary", "modified_bridge" or "residual_bridge" (towards the next
            observation only).
        resampling: "systematic", "stratified", "residual", "multinomial", "ssp" or "killing".
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
        TypeError: a count that is no integer.

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
    proposal: str = eqx.field(static=True)
    resampling: str = eqx.field(static=True)
    ess_threshold: float = eqx.field(static=True)
    seed: int = eqx.field(static=True)
    history: bool = eqx.field(static=True)
    key: Any = None

    def __init__(
        self,
        num_particles: int = 1000,
        *,
        proposal: str = "guided",
        resampling: str = "systematic",
        ess_threshold: float = 0.5,
        seed: int = 0,
        history: bool = False,
        key: PRNGKeyArray | None = None,
    ) -> None:
        make_setting(num_particles, proposal, resampling, ess_threshold)
        check_count("seed", seed, least=0)
        self.num_particles = num_particles
        self.proposal = proposal
        self.resampling = resampling
        self.ess_threshold = float(ess_threshold)
        self.seed = seed
        self.history = history
        self.key = key

    @property
    def random_key(self) -> PRNGKeyArray:
        """The key its random numbers come from."""
        return jax.random.key(self.seed) if self.key is None else self.key

    def _with(self, **changes: Any) -> Particle:
        kept = {
            "proposal": self.proposal,
            "resampling": self.resampling,
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
        return make_setting(self.num_particles, self.proposal, self.resampling, self.ess_threshold)

    def check(self, model: StateSpaceModel) -> None:
        check_brownian(model, "Particle()")
        if not model.scheme.has_innovations:
            raise ValueError(
                f"Particle() moves particles by the scheme's innovations, which "
                f"{type(model.scheme).__name__} has not: use Euler(), Milstein() or Exact()"
            )
        if self.proposal not in ("bootstrap", "auxiliary"):
            model.scheme.require_smooth(f"Particle(proposal={self.proposal!r})")

    def log_likelihood(self, model: StateSpaceModel) -> Float[Array, ""]:
        run = run_filter(model, self.setting, self.random_key)
        jax.debug.callback(_warn_of_collapse, run.log_likelihood)
        return _without_gradient(run.log_likelihood)

    def increments(self, model: StateSpaceModel) -> Float[Array, " N"]:
        run = run_filter(model, self.setting, self.random_key, diagnose=True)
        return _without_gradient(run.increments)

    def additive(
        self,
        model: StateSpaceModel,
        functional: Callable[[Array, Array, Array, Array], Array],
        *,
        num_backward: int = 2,
    ) -> OnlineSums:
        """Smoothed sums along the path while the filter runs: see `nsde.filter_additive`."""
        self._check_weighing(model, "filter_additive")
        run = partial(additive_online, model, self.setting, self.random_key, functional)
        result = jax.jit(lambda: run(num_backward=num_backward))()
        jax.debug.callback(_warn_of_collapse, result.log_likelihood)
        return result

    def two_filter(self, model: StateSpaceModel, *, join: str = "all") -> TwoFilterResult:
        """Smoothed marginals by particles that run both ways: see `nsde.two_filter`."""
        check_choice("join", join, JOINS)
        self._check_weighing(model, "two_filter")
        return jax.jit(lambda: two_filter(model, self.setting, self.random_key, join=join))()

    def _check_weighing(self, model: StateSpaceModel, caller: str) -> None:
        reason = invertible(model)
        if reason:
            raise ValueError(f"{caller} weighs transitions, but {reason}")
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
        jax.debug.callback(_warn_of_collapse, result.log_likelihood)
        return result

    def _filter(self, model: StateSpaceModel) -> ParticleResult:
        run_key, second_key = jax.random.split(self.random_key)
        setting = self.setting
        plan = setting.proposal.plan(model)
        run = run_filter(
            model,
            setting,
            run_key,
            diagnose=True,
            moments=True,
            history=self.history,
            plan=plan,
        )
        if self.num_particles > 1:
            multinomial = setting._replace(resampler=SCHEMES["multinomial"])
            variance = run_filter(model, multinomial, second_key, variance=True, plan=plan).variance
        else:
            variance = jnp.full((), jnp.nan, model.init_mean.dtype)
        law = guide = None
        if self.history:
            reference = bridge_reference(model, plan)
            law = Dynamics.of(model, reference)
            guide = plan.nodes if isinstance(setting.proposal, Guided) else None
        return _result(model, run, variance, law, guide)


def _result(
    model: StateSpaceModel, run: Run, variance: Array, law: Dynamics | None, guide: Any
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
        history=history,
        law=law,
        guide=guide,
    )


class ParticleResult(FilterResult):
    """What a particle filter returns.

    Moments are those of the weighted particles. With `history=True` the smoothing law can be
    drawn from, path by path.

    Attributes:
        variance: estimated relative variance of the likelihood estimate, about that of
            `log_likelihood`; useless where it is above 1 or so.
        ess: effective sample sizes where particles may be resampled, `(N,)`.
        resampled: whether they were, `(N,)`.
        history: all particles and their ancestors, or None.
        law: the path law, for smoothing, or None.
        guide: what the proposal knew of later observations, or None.

    Example:
        >>> import jax, numpyro.distributions as dist, numpyro_sde as nsde
        >>> sde = nsde.SDE(lambda t, x: x - x**3, lambda t, x: 0.5)
        >>> path = nsde.SDEPath(sde, [0.0, 0.1, 0.2], init=dist.Normal(0.0, 1.0))
        >>> result = nsde.filter_path(
        ...     path, lambda t, x: dist.Normal(x, 0.5), [0.3, 0.2, -0.1],
        ...     method=nsde.filters.Particle(100, history=True),
        ... )
        >>> result.sample(jax.random.key(0), 20).shape
        (20, 3, 1)
        >>> result.additive(jax.random.key(0), lambda t, dt, x, x_next: x * dt).shape
        (2, 1)
    """

    variance: Any = None
    ess: Any = None
    resampled: Any = None
    history: History | None = None
    law: Dynamics | None = None
    guide: Any = None

    def _kept(self) -> tuple[Dynamics, History]:
        if self.history is None or self.law is None:
            raise ValueError(
                "this particle filter kept no history: run it with Particle(..., history=True)"
            )
        return self.law, self.history

    def _look_ahead(self, law: Dynamics) -> Callable[[Any, Array], Any] | None:
        if self.guide is None:
            return None
        proposal = Guided()

        def ahead(k: Any, x: Array) -> Any:
            node = jax.tree.map(lambda a: a[k], self.guide)
            return over_particles(lambda x: proposal.look_ahead(law.model, node, x), -1)(x)

        return ahead

    def sample(
        self,
        key: PRNGKeyArray,
        num_draws: int = 1,
        *,
        method: str | None = None,
        num_moves: int = 2,
    ) -> Float[Array, "draws N d"]:
        """Draw paths from the smoothing law.

        Args:
            key: random key.
            num_draws: number of paths.
            method: "mcmc" (linear cost), "exact" (all particles weighed at every block, with a
                bridge each), "rejection" (only where every grid time is observed), "genealogy"
                (ancestral lines: poor at the beginning of long series). None takes "mcmc" where
                transitions have a density, else "genealogy".
            num_moves: moves of "mcmc" in each block.

        Raises:
            ValueError: no history, an unknown method, or one that this model does not allow.
        """
        law, history = self._kept()
        reason = invertible(law.model)
        if method is None:
            method = "genealogy" if reason else "mcmc"
        check_choice("method", method, SMOOTHERS)
        if reason and method != "genealogy":
            raise ValueError(f"method={method!r} weighs transitions, but {reason}: use 'genealogy'")
        if method == "rejection" and law.longest > 1:
            raise ValueError(
                "method='rejection' bounds the transition between observed times, but this grid "
                f"has up to {law.longest} steps between them: use 'mcmc' or 'exact'"
            )
        draw = partial(
            draw_paths,
            num_draws=num_draws,
            method=method,
            num_moves=num_moves,
            look_ahead=self._look_ahead(law),
        )
        return jax.jit(lambda: draw(law, history, key)[0])()

    def smooth(
        self, key: PRNGKeyArray | None = None, *, lag: int | None = None
    ) -> tuple[Float[Array, "N d"], Float[Array, "N d d"]]:
        """Smoothed means and covariances, given all observations or those of a lag.

        Args:
            key: random key of backward sampling, as many paths as particles; None for a fixed one.
            lag: give the moments given data up to so many grid steps later instead.
        """
        _, history = self._kept()
        if lag is not None:
            check_count("lag", lag, least=0)
            return fixed_lag(history, lag)
        key = jax.random.key(0) if key is None else key
        paths = self.sample(key, history.log_weights.shape[1])
        mean = jnp.mean(paths, axis=0)
        centred = paths - mean
        return mean, jnp.einsum("kni,knj->nij", centred, centred) / paths.shape[0]

    def genealogies(self) -> tuple[Float[Array, "M N d"], Float[Array, " M"]]:
        """Ancestral lines of the last particles, and their normalised log weights."""
        _, history = self._kept()
        return genealogy(history), jax.nn.log_softmax(history.log_weights[-1])

    def additive(
        self,
        key: PRNGKeyArray,
        functional: Callable[[Array, Array, Array, Array], Array],
        *,
        num_backward: int = 2,
    ) -> Float[Array, "blocks ..."]:
        """Smoothed sums of `functional(t, dt, x, x_next)` along the path: PaRIS.

        From the history that was kept; `nsde.filter_additive` needs none.

        Args:
            key: random key.
            functional: the term of one grid step, states `(d,)`.
            num_backward: ancestors drawn for each particle.

        Returns:
            The expected sum up to the end of each block between observed times, given the data up
            to there; the last entry is given all data.

        Raises:
            ValueError: no history, a transition without density, or fewer than 2 ancestors.
        """
        law, history = self._kept()
        reason = invertible(law.model)
        if reason:
            raise ValueError(f"additive weighs transitions, but {reason}")
        run = partial(additive, num_backward=num_backward, look_ahead=self._look_ahead(law))
        return jax.jit(lambda: run(law, history, key, functional))()

    def backward_kernel(self) -> Any:
        """Not for particles: they have no Gaussian backward kernel."""
        raise TypeError("a particle filter has no Gaussian backward kernel: use sample or smooth")
