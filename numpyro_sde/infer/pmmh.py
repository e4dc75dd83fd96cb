"""Particle marginal Metropolis-Hastings: a random walk on the particle filter's likelihood.

The log likelihood is replaced by an unbiased estimate, whose random numbers are part of the state:
the parameters' posterior is exact for any number of particles (Andrieu and Roberts 2009; Andrieu,
Doucet and Holenstein 2010). What the particles cost is acceptance; their number is chosen so that
the standard deviation of the estimate is near the best one (Doucet, Pitt, Deligiannidis and Kohn
2015: 1.0 to 1.7).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PRNGKeyArray
from numpyro.infer.mcmc import MCMCKernel
from numpyro.infer.util import potential_energy
from numpyro.util import is_prng_key

from numpyro_sde.filters.particle import Particle
from numpyro_sde.handlers import marginalize
from numpyro_sde.infer.start import approximate_mode
from numpyro_sde.smc.particle_filter import make_setting, run_filter
from numpyro_sde.statespace.model import StateSpaceModel

# Standard deviation of the log likelihood to aim at.
_TARGET_SD = 1.2
_REPLICATES = 24
_FIRST_PARTICLES = 4
_MOST_PARTICLES = 200_000


class _Estimator(Particle):
    """A particle filter inside its own kernel: no warnings, no refusal."""

    # Equinox would otherwise make another constructor from the fields.
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    def log_likelihood(self, model: StateSpaceModel) -> Float[Array, ""]:
        return run_filter(model, self.setting, self.random_key).log_likelihood


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


class PMMH(MCMCKernel):
    """Random-walk Metropolis on a particle filter's unbiased likelihood.

    Exact for the parameters of any SDE with any emission, degenerate noise included, at the cost
    of one particle filter for each proposal. The paths come afterwards: `nsde.smooth(marginalize(
    model, method=nsde.filters.Particle(...)), samples, ...)`. It starts at the mode of an extended
    Kalman approximation and with that mode's curvature as the shape of its proposals; both adapt
    during warm-up only (Vihola 2012). Do not use it for more than 20 or so parameters.

    Args:
        model: the model, its path sites as they are.
        num_particles: number of particles; None chooses it at the start so that the standard
            deviation of the log likelihood is near 1.2.
        proposal: how particles move, as in `filters.Particle`.
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
        proposal: str = "guided",
        resampling: str = "systematic",
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
        self.num_particles = num_particles
        self.proposal, self.resampling = proposal, resampling
        self.ess_threshold = ess_threshold
        self.correlation = correlation
        self.target_accept_prob = target_accept_prob
        self.log_likelihood_sd: float | None = None
        self._num_warmup = 0
        self._start: Any = None
        self._postprocess: Any = None

    @property
    def model(self) -> Callable[..., Any]:
        """The model."""
        return self._model

    @property
    def default_fields(self) -> tuple[str, ...]:
        return ("z",)

    def get_diagnostics_str(self, state: PMMHState) -> str:
        return f"{self.num_particles} particles, acc. prob={float(state.mean_accept_prob):.2f}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_postprocess": None, "_start": None}

    def _method(self, num_particles: int) -> _Estimator:
        return _Estimator(
            num_particles,
            proposal=self.proposal,
            resampling=self.resampling,
            ess_threshold=self.ess_threshold,
        )

    def _log_density(
        self, z: dict[str, Array], keys: PRNGKeyArray, args: Any, kwargs: Any, num_particles: int
    ) -> Array:
        """Estimated log density of unconstrained values; minus infinity where it fails."""
        model = marginalize(self._model, method=self._method(num_particles).with_key(keys))
        value = -potential_energy(model, args, kwargs, z)
        return jnp.where(jnp.isnan(value), -jnp.inf, value)

    def tune(self, rng_key: PRNGKeyArray, *model_args: Any, **model_kwargs: Any) -> PMMH:
        """Find a start, the shape of proposals and the number of particles.

        Done by the first run where that is not itself compiled (several chains at once on several
        devices are: call this before).

        Returns:
            The kernel itself.
        """
        init_key, size_key = jax.random.split(rng_key)
        start, self._postprocess = approximate_mode(self._model, model_args, model_kwargs, init_key)
        # The best scale of a random walk (Roberts, Gelman and Gilks 1997).
        width = 2.38 / np.sqrt(start.factor.shape[0])
        self._start = start.z, width * start.factor
        if self.num_particles is None:
            self._choose_size(size_key, start.z, model_args, model_kwargs)
        return self

    def _choose_size(self, key: PRNGKeyArray, z: dict[str, Array], args: Any, kwargs: Any) -> None:
        """Raise the number of particles until the log likelihood is known well enough."""
        size = _FIRST_PARTICLES
        while True:
            keys = jax.random.split(jax.random.fold_in(key, size), _REPLICATES)
            estimate = jax.jit(
                lambda keys, n=size: lax.map(
                    lambda k: self._log_density(z, k, args, kwargs, n), keys
                )
            )
            values = np.asarray(estimate(keys), np.float64)
            sd = float(np.std(values, ddof=1)) if np.all(np.isfinite(values)) else np.inf
            if sd <= _TARGET_SD or size >= _MOST_PARTICLES:
                break
            growth = min(max((sd / _TARGET_SD) ** 2, 1.5), 8.0)
            size = int(min(np.ceil(size * growth), _MOST_PARTICLES))
        if not sd <= 2.0 * _TARGET_SD:
            warnings.warn(
                f"PMMH: with {size} particles the log likelihood still has a standard deviation of "
                f"{sd:.3g}; chains will stick. Use proposal='guided', a start nearer the data, or "
                "correlation",
                RuntimeWarning,
                stacklevel=2,
            )
        self.num_particles, self.log_likelihood_sd = size, sd

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
        tune_key = rng_key if is_prng_key(rng_key) else rng_key[0]
        if self._start is None or self._postprocess is None:
            if isinstance(rng_key, jax.core.Tracer):
                raise ValueError(
                    "PMMH chooses its start and number of particles before chains are compiled: "
                    "call kernel.tune(rng_key, *model_args, **model_kwargs) first"
                )
            self.tune(tune_key, *model_args, **kwargs)
        start, factor = self._start

        def one(key: PRNGKeyArray, params: Any) -> PMMHState:
            key, move_key, noise_key = jax.random.split(key, 3)
            flat, back = ravel_pytree(start)
            if params is None:
                spread = jnp.asarray(factor, flat.dtype) @ jax.random.normal(move_key, flat.shape)
                z = back(flat + 0.5 * spread.astype(flat.dtype))
            else:
                z = params
            keys = self._fresh(noise_key)
            density = self._log_density(z, keys, model_args, kwargs, self._size)
            zero = jnp.zeros((), flat.dtype)
            return PMMHState(
                jnp.zeros((), int),
                z,
                density,
                keys,
                zero,
                zero,
                jnp.asarray(factor, flat.dtype),
                key,
            )

        if is_prng_key(rng_key):
            return jax.jit(one)(rng_key, init_params)
        return jax.jit(jax.vmap(one))(rng_key, init_params)

    @property
    def _size(self) -> int:
        assert self.num_particles is not None
        return self.num_particles

    def _fresh(self, key: PRNGKeyArray) -> PRNGKeyArray:
        if self.correlation == 0:
            return key
        # As many stretches as keep the wanted share when about one of them is renewed.
        return jax.random.split(key, int(np.ceil(1.0 / (1.0 - self.correlation))))

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
        keys = self._fresh(noise_key)
        if self.correlation > 0:
            renew = jax.random.bernoulli(keep_key, 1.0 - self.correlation, keys.shape)
            keys = jax.random.wrap_key_data(
                jnp.where(
                    renew[:, None], jax.random.key_data(keys), jax.random.key_data(state.keys)
                )
            )
        density = self._log_density(z, keys, args, kwargs, self._size)
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
        if self._postprocess is None:
            kwargs = {} if model_kwargs is None else model_kwargs
            self.tune(jax.random.key(0), *model_args, **kwargs)
        return self._postprocess(*model_args, **({} if model_kwargs is None else model_kwargs))


def _adapt(factor: Array, direction: Array, excess: Array, i: Array) -> Array:
    """Robust adaptive Metropolis (Vihola 2012, equation 1): widen what is accepted too often."""
    dim = factor.shape[0]
    rate = jnp.minimum(1.0, dim * (1.0 + i) ** (-0.66)).astype(factor.dtype)
    unit = direction / jnp.linalg.norm(direction)
    change = jnp.eye(dim, dtype=factor.dtype) + rate * excess * jnp.outer(unit, unit)
    return jnp.linalg.cholesky(factor @ change @ factor.T)
