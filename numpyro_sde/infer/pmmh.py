"""Particle marginal Metropolis-Hastings: a random walk on the particle filter's likelihood.

The log likelihood is replaced by an unbiased estimate, whose random numbers are part of the state:
the parameters' posterior is exact for any number of particles (Andrieu and Roberts 2009; Andrieu,
Doucet and Holenstein 2010). What the particles cost is acceptance: there are so many that the
estimate's standard deviation is near the best, 1.0 to 1.7 (Doucet, Pitt, Deligiannidis, Kohn 2015).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PRNGKeyArray
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import is_prng_key

from numpyro_sde.handlers import marginalize
from numpyro_sde.infer.racing import (
    LikelihoodEstimator,
    ProposalRace,
    RegimeEstimator,
    estimated_log_density,
    fingerprint,
    guide_is_exact,
    race_proposals,
    regimes_are_linear,
)
from numpyro_sde.infer.repeats import fresh, pairs, renewed, spread_and_level
from numpyro_sde.infer.start import approximate_mode
from numpyro_sde.models.arguments import released, with_data_as_arguments
from numpyro_sde.runtime.entry import Held, entry_point
from numpyro_sde.smc.proposals import Proposal
from numpyro_sde.smc.resampling import Resampling
from numpyro_sde.smc.settings import make_setting
from numpyro_sde.statespace.checks import typed_key

# Standard deviation of the log likelihood to aim at, and what is good enough: costs are flat there.
_TARGET_SD, _LARGEST_SD = 1.2, 1.5
# The number of particles grows by so much at once at most.
_GROWTH = 4.0
# Points count for it whose log density is at most so far below the highest, errors allowed for.
_CENTRAL = 3.0
# Of many particles with a spread below this share of what is aimed at, fewer are tried.
_MANY, _TOO_GOOD, _SAFETY = 64, 0.8, 1.2
_REPLICATES, _LEAST_REPLICATES = 24, 8
# A spread above what is good enough, but not above this, is measured so many times.
_DOUBTFUL_SD, _TURNS = 4.5, 3
_FIRST_PARTICLES = 4
# What "auto" races, with so many particles.
_RACED = ("guided", "bootstrap", "auxiliary", "defensive")
_RACE_PARTICLES = 64
_MOST_PARTICLES = 200_000
# In place of a proposal: sequences of regimes, the state by Kalman filters.
_REGIMES = "regimes"


class Tuned(NamedTuple):
    """What a kernel has found for one data set.

    Attributes:
        z: the start, unconstrained.
        factor: lower Cholesky factor of the random walk's first covariance.
        method: the filter.
        sd: standard deviation of its log likelihood; None where it was not asked.
        race: how its proposal was chosen; None where nothing was raced.
        postprocess: makes, of the model's arguments, what constrains draws.
    """

    z: dict[str, Array]
    factor: Array
    method: LikelihoodEstimator | RegimeEstimator
    sd: float | None
    race: ProposalRace | None
    postprocess: Callable[..., Any]


class PMMHState(NamedTuple):
    """State of `PMMH`.

    Attributes:
        i: number of iterations so far.
        z: unconstrained values by site.
        log_density: estimated log posterior density there, up to a constant.
        keys: the random numbers of that estimate: one key, or one for each stretch of time.
        accept_prob: acceptance probability of the last proposal.
        mean_accept_prob: its mean since warm-up ended (during warm-up, since the start).
        factor: lower Cholesky factor of the proposal's covariance.
        rng_key: key of the next iteration.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.infer.PMMHState._fields[:3]
        ('i', 'z', 'log_density')
    """

    i: Int[Array, ""]
    z: dict[str, Array]
    log_density: Float[Array, ""]
    keys: PRNGKeyArray
    accept_prob: Float[Array, ""]
    mean_accept_prob: Float[Array, ""]
    factor: Float[Array, "D D"]
    rng_key: PRNGKeyArray

    @property
    def filter_key(self) -> Array:
        """`keys` as numbers: kept with each draw, for `nsde.smooth`."""
        return jax.random.key_data(self.keys)


class PMMH(MCMCKernel):
    """Random-walk Metropolis on a particle filter's unbiased likelihood.

    Exact for the parameters of any SDE with any emission, degenerate noise included, at the cost
    of one particle filter for each proposal. The paths come afterwards, exact too:
    `nsde.smooth(mcmc, rng_key=...)`. It starts at the mode of an extended
    Kalman approximation and with that mode's curvature as the shape of its proposals; both adapt
    during warm-up only (Vihola 2012). Do not use it for more than 20 or so parameters.

    Args:
        model: the model, its path sites as they are.
        num_particles: number of particles; None chooses it so that the standard deviation of the
            log likelihood is at most 1.5 at the worst of the central points, for each data set.
        proposal: how particles move, as in `filters.Particle`. "auto" takes "guided" where the
            model is linear and normal, where that is exact; of a `SwitchingSDE` that is linear and
            normal in each regime, sequences of regimes (`filters.RaoBlackwell`); else "guided",
            "bootstrap", "auxiliary" and "defensive" are raced at 16 points about the start, those
            that miss part of the likelihood are dropped, and `proposals` shows the table.
        resampling: scheme of the filter.
        ess_threshold: share of particles below which the effective size calls for resampling.
        correlation: share of the filter's random numbers that a proposal keeps, by stretches of
            time (block pseudo-marginal: Tran, Kohn, Quiroz and Villani 2016), 0 for none. With
            0.95 or so and a long series, far fewer particles do; particles are then sorted.
        target_accept_prob: acceptance probability that warm-up aims at.

    Raises:
        ValueError: an option out of range. When run: no path that the model observes, or a start
            whose likelihood is zero.
        TypeError: a count that is no integer.

    Example:
        >>> import jax, numpy as np, numpyro, numpyro.distributions as dist, numpyro_sde as nsde
        >>> from numpyro.infer import MCMC
        >>> def model(y=None):
        ...     scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
        ...     sde = nsde.SDE(lambda t, x, p: -x, lambda t, x, p: p, params=scale)
        ...     x = numpyro.sample("x", nsde.SDEPath(sde, np.arange(4.0), dist.Normal(0.0, 1.0)))
        ...     nsde.observe("y", x, lambda t, x: dist.Normal(x, 0.5), obs=y)
        >>> mcmc = MCMC(nsde.infer.PMMH(model, num_particles=8), num_warmup=50, num_samples=50,
        ...             progress_bar=False)
        >>> mcmc.run(jax.random.key(0), np.array([0.5, -0.2, 0.1, 0.4]))
        >>> mcmc.get_samples()["scale"].shape
        (50,)
    """

    sample_field = "z"

    def __init__(
        self,
        model: Callable[..., Any],
        num_particles: int | None = None,
        *,
        proposal: str | Proposal = "auto",
        resampling: str | Resampling = "systematic",
        ess_threshold: float = 0.5,
        correlation: float = 0.0,
        target_accept_prob: float = 0.2,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be a function, got {type(model).__name__}")
        if isinstance(model, marginalize):
            raise TypeError("PMMH integrates paths out itself: hand over the model inside")
        known = 1 if num_particles is None else num_particles
        make_setting(known, proposal, resampling, ess_threshold)
        if not 0 <= correlation < 1:
            raise ValueError(f"correlation must be in [0, 1), got {correlation}")
        if not 0 < target_accept_prob < 1:
            raise ValueError(
                f"target_accept_prob must be between 0 and 1, got {target_accept_prob}"
            )
        if correlation > 0 and resampling != "systematic":
            raise ValueError(
                f"correlation needs resampling='systematic', whose outcome moves little with its "
                f"random numbers, got {resampling!r}"
            )
        self._model = model
        self._given_particles = num_particles
        self.num_particles = num_particles
        self.proposal, self.resampling = proposal, resampling
        self.ess_threshold = ess_threshold
        self.correlation = correlation
        self.target_accept_prob = target_accept_prob
        self.log_likelihood_sd: float | None = None
        self.proposals: ProposalRace | None = None
        self._num_warmup = 0
        self._tuned: dict[Any, Tuned] = {}
        self._current: Tuned | None = None

    @property
    def model(self) -> Callable[..., Any]:
        """The model."""
        return self._model

    @property
    def default_fields(self) -> tuple[str, ...]:
        return ("z", "filter_key")

    def get_diagnostics_str(self, state: PMMHState) -> str:
        return f"{self.num_particles} particles, acc. prob={float(state.mean_accept_prob):.2f}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tuned": {}, "_current": None}

    def _options(self) -> dict[str, Any]:
        return {"resampling": self.resampling, "ess_threshold": self.ess_threshold}

    def _log_density(
        self, z: dict[str, Array], keys: PRNGKeyArray, args: Any, kwargs: Any
    ) -> Array:
        """Estimated log density of unconstrained values; minus infinity where it fails."""
        method = self.tuning.method.with_key(keys)
        return estimated_log_density(self._model, method, z, args, kwargs)

    @property
    def tuning(self) -> Tuned:
        """What was found for the data in use: start, filter, race."""
        if self._current is None:
            raise RuntimeError("PMMH runs only after `tune` or `init`")
        return self._current

    def tune(self, rng_key: PRNGKeyArray, *model_args: Any, **model_kwargs: Any) -> PMMH:
        """Find a start, the shape of proposals, how particles move and their number.

        Done by the first run on each data set where that is not itself compiled (several chains at
        once on several devices are: call this before). What was found is kept with the data:
        other data are tuned for anew.

        Returns:
            The kernel itself.
        """
        found = self._tune(typed_key(rng_key), model_args, model_kwargs)
        self._tuned[fingerprint(model_args, model_kwargs)] = found
        self._use(found)
        return self

    def _tune(self, rng_key: PRNGKeyArray, args: Any, kwargs: Any) -> Tuned:
        init_key, race_key, size_key = jax.random.split(rng_key, 3)
        start, postprocess = approximate_mode(self._model, args, kwargs, init_key)
        raced, proposal = None, self.proposal
        flat, back = ravel_pytree(start.z)
        if proposal == "auto" and guide_is_exact(self._model, start.z, args, kwargs):
            proposal = "guided"
        elif proposal == "auto" and regimes_are_linear(self._model, start.z, args, kwargs):
            proposal = _REGIMES
        elif proposal == "auto":
            raced = race_proposals(
                self._model,
                args,
                kwargs,
                start,
                race_key,
                names=_RACED,
                num_particles=self._given_particles or _RACE_PARTICLES,
                options=self._options(),
            )
            proposal = raced.chosen
            flat = jnp.asarray(raced.best_point, flat.dtype)
        points = np.asarray(flat)[None] if raced is None else raced.central
        size, sd = self._given_particles, None
        if size is None:
            size, sd, best = self._choose_size(size_key, points, back, proposal, args, kwargs)
            flat = jnp.asarray(best, flat.dtype)
        # The best scale of a random walk (Roberts, Gelman and Gilks 1997).
        width = 2.38 / np.sqrt(flat.size)
        method = self._estimator(size, proposal)
        return Tuned(back(flat), width * start.factor, method, sd, raced, postprocess)

    def _estimator(
        self, num_particles: int, proposal: Any
    ) -> LikelihoodEstimator | RegimeEstimator:
        if proposal == _REGIMES:
            return RegimeEstimator(num_particles)
        return LikelihoodEstimator(num_particles, proposal=proposal, **self._options())

    def _use(self, found: Tuned) -> None:
        self._current = found
        self.num_particles, self.log_likelihood_sd = found.method.num_particles, found.sd
        self.proposals = found.race

    def _choose_size(
        self,
        key: PRNGKeyArray,
        points: np.ndarray,
        back: Callable[[Array], Any],
        proposal: Any,
        args: Any,
        kwargs: Any,
    ) -> tuple[int, float, np.ndarray]:
        """Raise the number of particles until the log likelihood is known well enough.

        What counts is the difference of two estimates that follow one another in the chain: with
        `correlation` they share most random numbers (Tran et al. 2016), and it is smaller. Points
        that hold no mass, once their estimates are good enough to tell, ask for nothing.

        Returns:
            The number, the standard deviation with it, and the point of the highest density.
        """
        size, enough = _FIRST_PARTICLES, None
        while True:
            points, sds, levels = self._estimates_at(
                key, points, back, size, proposal, args, kwargs
            )
            sd = float(np.max(sds))
            found = size, sd, points[int(np.argmax(levels))]
            if sd > _LARGEST_SD and size < _MOST_PARTICLES:
                growth = min((sd / _TARGET_SD) ** 2, _GROWTH)
                size = int(min(np.ceil(size * growth), _MOST_PARTICLES))
                if enough is not None and size >= enough[0]:
                    found = enough
                    break
            elif enough is None and sd < _TOO_GOOD * _TARGET_SD and size > _MANY:
                # What asked for so many may have been a point that holds no mass.
                enough, size = found, int(np.ceil(_SAFETY * size * (sd / _TARGET_SD) ** 2))
            else:
                break
        size, sd, best = found
        if not sd <= 2.0 * _TARGET_SD:
            others = [n for n in ("auto", "guided", "bootstrap") if n != self.proposal]
            warnings.warn(
                f"PMMH: with {size} particles the log likelihood still has a standard deviation of "
                f"{sd:.3g}; chains will stick. Use proposal={others[0]!r} or {others[1]!r}, a "
                "start nearer the data, or correlation",
                RuntimeWarning,
                stacklevel=2,
            )
        return size, sd, best

    def _estimates_at(
        self,
        key: PRNGKeyArray,
        points: np.ndarray,
        back: Callable[[Array], Any],
        size: int,
        proposal: Any,
        args: Any,
        kwargs: Any,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the points those that hold mass, the spread of estimates there, and their level."""
        method = self._estimator(size, proposal)
        count = max(_REPLICATES // len(points), _LEAST_REPLICATES)
        at = jax.vmap(back)(jnp.asarray(np.repeat(points, count, axis=0)))
        found = np.zeros((len(points), 0, 2))
        for turn in range(_TURNS):
            keys = jax.random.split(jax.random.fold_in(key, size + turn), count * len(points))
            options = {"method": method, "correlation": Held(self.correlation), "points": at}
            estimate: Any = partial(pairs, self._model, keys=keys, **options)
            values = np.asarray(with_data_as_arguments(self._model, args, kwargs, estimate))
            again = values.astype(float).reshape(len(points), count, 2)
            found = np.concatenate([found, again], axis=1)
            sds, levels = spread_and_level(found)
            # The largest of several spreads that a few runs tell is too large by chance.
            if not _LARGEST_SD < np.max(sds) <= _DOUBTFUL_SD:
                break
        holding = levels >= np.max(levels) - _CENTRAL - 2.0 * sds
        return points[holding], sds[holding], levels[holding]

    def init(
        self,
        rng_key: PRNGKeyArray,
        num_warmup: int,
        init_params: Any,
        model_args: Any,
        model_kwargs: Any,
    ) -> PMMHState:
        kwargs = {} if model_kwargs is None else model_kwargs
        self._num_warmup = num_warmup
        # Chains in one program come with a batch of keys.
        rng_key = typed_key(rng_key)
        self.tuned_for(rng_key if rng_key.ndim == 0 else rng_key[0], model_args, kwargs)
        tuned, correlation = self.tuning, Held(self.correlation)
        rest = (tuned.method, correlation, tuned.z, jnp.asarray(tuned.factor), rng_key, init_params)
        state: PMMHState = with_data_as_arguments(
            self._model, model_args, kwargs, lambda given: _first_states(self._model, given, *rest)
        )
        return state

    def tuned_for(self, key: PRNGKeyArray, args: Any, kwargs: Any) -> Tuned:
        """What was found for these arguments of the model, now in use; found where it was not."""
        data = fingerprint(args, kwargs)
        if data is None and self._current is not None:
            return self.tuning  # traced data: those that the kernel was tuned for
        if data in self._tuned:
            self._use(self._tuned[data])
            return self.tuning
        if isinstance(key, jax.core.Tracer) or data is None:
            raise ValueError(
                "PMMH chooses its start and number of particles before chains are compiled: "
                "call kernel.tune(rng_key, *model_args, **model_kwargs) first"
            )
        return self.tune(key, *args, **kwargs).tuning

    def sample(self, state: PMMHState, model_args: Any, model_kwargs: Any) -> PMMHState:
        kwargs = {} if model_kwargs is None else model_kwargs
        if not is_prng_key(state.rng_key):
            return jax.vmap(lambda s: self._step(s, model_args, kwargs))(state)
        return self._step(state, model_args, kwargs)

    def _step(self, state: PMMHState, args: Any, kwargs: Any) -> PMMHState:
        rng_key, move_key, noise_key, keep_key, accept_key = jax.random.split(state.rng_key, 5)
        flat, back = ravel_pytree(state.z)
        direction = jax.random.normal(move_key, flat.shape, flat.dtype)
        z = back(flat + state.factor @ direction)
        others = fresh(noise_key, self.correlation)
        keys = renewed(keep_key, state.keys, others, self.correlation)
        density = self._log_density(z, keys, args, kwargs)
        log_ratio = density - state.log_density
        # A start of density zero takes any finite proposal.
        log_ratio = jnp.where(jnp.isnan(log_ratio), -jnp.inf, log_ratio)
        accept_prob = jnp.exp(jnp.minimum(log_ratio, 0.0)).astype(flat.dtype)
        accepted = jax.random.uniform(accept_key, (), flat.dtype) < accept_prob
        i = state.i + 1
        warming = i <= self._num_warmup
        count = jnp.where(warming, i, i - self._num_warmup).astype(flat.dtype)
        # The running mean begins anew after warm-up.
        last = jnp.where(count == 1, 0.0, state.mean_accept_prob)
        mean = last + (accept_prob - last) / count
        factor = lax.cond(
            warming,
            lambda: _adapt(state.factor, direction, accept_prob - self.target_accept_prob, i),
            lambda: state.factor,
        )

        def choose(a: Array, b: Array) -> Array:
            return jnp.where(accepted, a, b)

        kept = jax.random.key_data(keys), jax.random.key_data(state.keys)
        return PMMHState(
            i,
            jax.tree.map(choose, z, state.z),
            choose(density, state.log_density),
            jax.random.wrap_key_data(choose(*kept)),
            accept_prob,
            mean,
            factor,
            rng_key,
        )

    def postprocess_fn(self, model_args: Any, model_kwargs: Any) -> Callable[..., Any]:
        """Constrain the values and add deterministic sites."""
        kwargs = {} if model_kwargs is None else model_kwargs
        self.tuned_for(jax.random.key(0), model_args, kwargs)
        return self.tuning.postprocess(*model_args, **kwargs)


@entry_point
def _first_states(
    model: Callable[..., Any],
    arguments: Any,
    method: LikelihoodEstimator | RegimeEstimator,
    correlation: Held,
    start: dict[str, Array],
    factor: Array,
    rng_key: PRNGKeyArray,
    given: Any,
) -> PMMHState:
    """States of one chain or of several; compiled once for a model and the shapes of its data."""
    args, kwargs = released(arguments)

    def one(key: PRNGKeyArray, z: Any) -> PMMHState:
        key, move_key, noise_key = jax.random.split(key, 3)
        flat, back = ravel_pytree(start)
        if z is None:
            spread = jnp.asarray(factor, flat.dtype) @ jax.random.normal(move_key, flat.shape)
            z = back(flat + 0.5 * spread.astype(flat.dtype))
        keys = fresh(noise_key, correlation.value)
        density = estimated_log_density(model, method.with_key(keys), z, args, kwargs)
        zero = jnp.zeros((), flat.dtype)
        first = jnp.zeros((), int), z, density, keys, zero, zero, jnp.asarray(factor, flat.dtype)
        return PMMHState(*first, key)

    return one(rng_key, given) if rng_key.ndim == 0 else jax.vmap(one)(rng_key, given)


def _adapt(factor: Array, direction: Array, excess: Array, i: Array) -> Array:
    """Robust adaptive Metropolis (Vihola 2012, equation 1): widen what is accepted too often."""
    dim = factor.shape[0]
    rate = jnp.minimum(1.0, dim * (1.0 + i) ** (-0.66)).astype(factor.dtype)
    unit = direction / jnp.linalg.norm(direction)
    change = jnp.eye(dim, dtype=factor.dtype) + rate * excess * jnp.outer(unit, unit)
    return jnp.linalg.cholesky(factor @ change @ factor.T)
