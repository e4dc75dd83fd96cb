"""Regimes by particles, the state by Kalman filters: unbiased, for switching linear models."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from numpyro_sde.filters.kalman import Kalman, linear_arrays
from numpyro_sde.filters.particle import without_gradient
from numpyro_sde.filters.regimes import RegimeResult, in_regime, require_regimes
from numpyro_sde.smc import regimes as smc
from numpyro_sde.statespace.checks import check_count, typed_key
from numpyro_sde.statespace.model import AbstractFilter, StateSpaceModel


class RaoBlackwell(AbstractFilter):
    """Particles over the regimes of a `SwitchingSDE`, the state integrated out given them.

    Each particle is a sequence of regimes with the Kalman filter along it. The estimate of the
    likelihood is unbiased, and exact while there are no more sequences than particles; it varies
    far less than that of `Particle`, whose particles hold the state too. `PMMH` takes it by itself.
    Draws given all data, by `smooth` or `sample_with_regimes`, hold path and regimes. It has no
    gradient: NUTS wants `IMM()` or `GPB()`, or `infer.ParticleGibbs`.

    Args:
        num_particles: sequences kept at each step.
        seed: seed of the random numbers.
        key: random key to use instead of the seed's; an array of keys `(B,)` gives one to each of B
            stretches of time.

    Raises:
        ValueError: a count below 1. In use: a path without regimes, a model that is not linear and
            normal given the regimes, an emission without noise.
        TypeError: a count that is no integer, a key that is none.

    Source: Fearnhead and Clifford (2003), "On-line inference for hidden Markov models via particle
    filters"; Whiteley, Andrieu and Doucet (2010), "Efficient Bayesian inference for switching
    state-space models using discrete particle Markov chain Monte Carlo methods".

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, numpyro_sde as nsde
        >>> chain = nsde.MarkovJumpProcess(jnp.array([[0.0, 0.6], [1.0, 0.0]]), 2)
        >>> sde = nsde.SwitchingSDE(lambda t, x, r: -x, lambda t, x, r: 0.2 + 0.8 * r, chain)
        >>> path = nsde.SDEPath(sde, [0.0, 0.5, 1.0], dist.Normal(0.0, 1.0))
        >>> result = nsde.filter_path(
        ...     path, lambda t, x: dist.Normal(x, 0.1), [0.1, 0.9, -1.2],
        ...     method=nsde.filters.RaoBlackwell(16),
        ... )
        >>> x, regimes = result.sample_with_regimes(jax.random.key(0), 5)
        >>> x.shape, regimes.shape, bool(result.regimes[-1, 1] > 0.9)
        ((5, 3, 1), (5, 3), True)
    """

    num_particles: int = eqx.field(static=True)
    seed: int = eqx.field(static=True)
    key: Any = None

    def __init__(
        self, num_particles: int = 64, *, seed: int = 0, key: PRNGKeyArray | None = None
    ) -> None:
        check_count("num_particles", num_particles, least=1)
        check_count("seed", seed, least=0)
        self.num_particles, self.seed = num_particles, seed
        self.key = None if key is None else typed_key(key)

    @property
    def random_key(self) -> PRNGKeyArray:
        """The key its random numbers come from."""
        return jax.random.key(self.seed) if self.key is None else self.key

    def with_key(self, key: PRNGKeyArray) -> RaoBlackwell:
        """The same filter on other random numbers."""
        return type(self)(self.num_particles, seed=self.seed, key=key)

    def check(self, model: StateSpaceModel) -> None:
        check_switching(model, "RaoBlackwell()")

    def log_likelihood(self, model: StateSpaceModel) -> Float[Array, ""]:
        return without_gradient(self._run(model).log_likelihood)

    def increments(self, model: StateSpaceModel) -> Float[Array, " N"]:
        return without_gradient(self._run(model).increments)

    def _run(self, model: StateSpaceModel) -> smc.Run:
        self.check(model)
        return smc.regime_filter(switching_linear(model), self.random_key, self.num_particles)

    def filter(self, model: StateSpaceModel) -> RaoBlackwellResult:
        self.check(model)
        linear = switching_linear(model)
        run = smc.regime_filter(linear, self.random_key, self.num_particles)
        moments = run.moments
        return RaoBlackwellResult(
            times=model.times,
            log_likelihood=run.log_likelihood,
            increments=run.increments,
            mean=moments.mean,
            cov=moments.cov,
            predicted_mean=moments.predicted_mean,
            predicted_cov=moments.predicted_cov,
            cross=None,
            regimes=moments.regimes,
            linear=linear,
            sequences=run.sequences,
        )


def check_switching(model: StateSpaceModel, method: str) -> None:
    """Refuse what is not linear and normal given its regimes.

    Raises:
        ValueError: naming what takes the model.
    """
    require_regimes(model, method)
    if any(instrument.exact for instrument in model.instruments):
        raise ValueError(
            f"{method} needs emissions with noise, got a dist.Delta: a path that is seen exactly "
            "is observed itself, sample(..., obs=), and its density integrates the regimes out"
        )
    try:
        for regime in range(model.sde.chain.num_states):
            Kalman().check(in_regime(model, regime))
    except ValueError as error:
        raise ValueError(
            f"{method} needs a model that is linear and normal in each regime ({error}): use "
            "IMM() or GPB(), which linearise, or Particle(proposal='bootstrap')"
        ) from error


def switching_linear(model: StateSpaceModel) -> smc.SwitchingLinear:
    """The arrays of a model that is linear and normal in each regime."""
    sde: Any = model.sde
    rows = np.arange(model.num_times)
    arrays = linear_arrays(in_regime(model, 0), rows)

    def each(regime: Array) -> Any:
        return linear_arrays(in_regime(model, regime), rows).model

    models = jax.vmap(each)(jnp.arange(sde.chain.num_states))
    return smc.SwitchingLinear(models, sde.start, model.cache, arrays.y, arrays.present)


class RaoBlackwellResult(RegimeResult):
    """What a filter over regimes returns: moments, regimes, and the sequences that were kept.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist, numpyro_sde as nsde
        >>> chain = nsde.MarkovJumpProcess(jnp.array([[0.0, 0.6], [1.0, 0.0]]), 2)
        >>> sde = nsde.SwitchingSDE(lambda t, x, r: -x, lambda t, x, r: 0.2 + 0.8 * r, chain)
        >>> path = nsde.SDEPath(sde, [0.0, 0.5, 1.0], dist.Normal(0.0, 1.0))
        >>> result = nsde.filter_path(
        ...     path, lambda t, x: dist.Normal(x, 0.1), [0.1, 0.9, -1.2],
        ...     method=nsde.filters.RaoBlackwell(16),
        ... )
        >>> result.smoothed_regimes().shape
        (3, 2)
    """

    linear: Any = None
    sequences: Any = None

    def sample_with_regimes(
        self, key: PRNGKeyArray, num_draws: int = 1
    ) -> tuple[Float[Array, "draws N d"], Int[Array, "draws N"]]:
        """Draw paths and regimes given all data.

        Returns:
            Paths, and the regime of the step that ends at each time; at the first time, of the
            first step.
        """
        return _draw(self.linear, self.sequences, typed_key(key), num_draws)

    def sample(self, key: PRNGKeyArray, num_draws: int = 1) -> Float[Array, "draws N d"]:
        """Draw paths given all data."""
        return self.sample_with_regimes(key, num_draws)[0]

    def smoothed_regimes(
        self, key: PRNGKeyArray | None = None, num_draws: int = 1000
    ) -> Float[Array, "N n"]:
        """Probabilities of the regimes given all data, as shares of draws.

        Args:
            key: random key; None for a fixed one.
            num_draws: number of draws.
        """
        key = jax.random.key(0) if key is None else typed_key(key)
        regimes = self.sample_with_regimes(key, num_draws)[1]
        n = self.linear.num_regimes
        each = jnp.arange(n).reshape(*(1,) * regimes.ndim, n)
        return jnp.mean(jnp.asarray(regimes[..., None] == each, float), axis=0)

    def smooth(
        self, key: PRNGKeyArray | None = None, num_draws: int = 1000
    ) -> tuple[Float[Array, "N d"], Float[Array, "N d d"]]:
        """Smoothed means and covariances given all data, from draws."""
        key = jax.random.key(0) if key is None else typed_key(key)
        paths = self.sample(key, num_draws)
        mean = jnp.mean(paths, axis=0)
        centred = paths - mean[None]
        return mean, jnp.einsum("kni,knj->nij", centred, centred) / num_draws

    def backward_kernel(self) -> Any:
        """Not for mixtures of regimes."""
        raise TypeError("the law of a path with regimes is a mixture: use sample or smooth")


@eqx.filter_jit
def _draw(linear: Any, sequences: Any, key: PRNGKeyArray, num_draws: int) -> tuple[Array, Array]:
    def one(key: PRNGKeyArray) -> tuple[Array, Array]:
        regime_key, state_key = jax.random.split(key)
        regimes = smc.draw_regimes(linear, sequences, regime_key)
        return smc.draw_states(linear, regimes, state_key), at_times(regimes)

    return jax.vmap(one)(jax.random.split(key, num_draws))


def at_times(regimes: Int[Array, " N-1"]) -> Int[Array, " N"]:
    """The regime of the step that ends at each time; at the first, of the first step."""
    return jnp.concatenate([regimes[:1], regimes]).astype(jnp.int32)
