"""The forward algorithm: a discrete path integrated out exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from numpyro_sde.jumps import bridges, forward_backward, sparse
from numpyro_sde.schemes.markov_jumps import ChainEquation, MarkovJumps
from numpyro_sde.statespace.model import AbstractFilter, FilterResult, StateSpaceModel


class Forward(AbstractFilter):
    """The exact likelihood of data that observe a Markov jump process, with derivatives.

    A hidden Markov model in continuous time: any emission, any gaps. Transition matrices come by
    uniformisation, so the gradient is exact near defective generators too; processes of many states
    given by their edges are treated without matrices.

    Under a reaction network of law `laws.Jump()` it works on all states within `bounds` that can be
    reached (finite-state projection: Munsky and Khammash 2006). Probability that leaves them is
    counted; where it exceeds `tolerance` the likelihood is NaN, not too small a number.

    Args:
        bounds: for reaction networks, the largest count of each species.
        tolerance: probability that may leave the bounds between two data.

    Raises:
        ValueError: bounds or a tolerance out of range. In use: a path that is no `JumpPath`, nor a
            network of law `laws.Jump()` with bounds.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist, numpyro_sde as nsde
        >>> chain = nsde.MarkovJumpProcess(jnp.array([[0.0, 1.0], [3.0, 0.0]]), 2)
        >>> path = nsde.JumpPath(chain, [0.0, 0.5, 2.0], init="stationary")
        >>> result = nsde.filter_path(
        ...     path, lambda t, s: dist.Normal(s, 0.5), [0.1, 0.9, float("nan")],
        ...     method=nsde.filters.Forward(),
        ... )
        >>> result.probabilities.shape, result.smoothed().shape
        ((3, 2), (3, 2))
    """

    bounds: tuple[int, ...] | None = eqx.field(static=True)
    tolerance: float = eqx.field(static=True)

    def __init__(self, bounds: Sequence[int] | None = None, *, tolerance: float = 1e-8) -> None:
        if bounds is not None:
            array = np.asarray(bounds)
            if array.ndim != 1 or array.dtype.kind not in "iu" or np.any(array < 0):
                raise ValueError(
                    f"bounds must be the largest count of each species, whole numbers, got {bounds}"
                )
        if not 0.0 < tolerance < 1.0:
            raise ValueError(f"tolerance must lie between 0 and 1, got {tolerance}")
        self.bounds = None if bounds is None else tuple(int(b) for b in bounds)
        self.tolerance = float(tolerance)

    def check(self, model: StateSpaceModel) -> None:
        if not isinstance(model.scheme, MarkovJumps):
            raise ValueError(
                "Forward() integrates out paths on finitely many states, nsde.JumpPath or a "
                f"ReactionPath of law laws.Jump() with bounds=, got one of scheme "
                f"{type(model.scheme).__name__}: "
                f"{model.scheme.remedy('use ExtendedKalman() or Particle()')}"
            )

    def log_emission(self, model: StateSpaceModel) -> Float[Array, "N n"]:
        """Log density of the data at each time given each state; 0 where nothing is seen."""
        equation = _equation(model)
        states = jnp.arange(equation.chain.num_states, dtype=model.init_mean.dtype)[:, None]
        total = jnp.zeros((model.num_times, states.shape[0]), states.dtype)
        seen = jnp.zeros(model.num_times, bool)
        for instrument in model.instruments:
            rows = np.asarray(instrument.rows, int)
            take = rows if rows.size < model.num_times else np.arange(model.num_times)
            inputs = jax.tree.map(lambda a: jnp.asarray(a)[take], instrument.inputs)  # noqa: B023
            y, present = jnp.asarray(instrument.values)[take], jnp.asarray(instrument.present)[take]

            def one(inputs: Any, y: Array, present: Array) -> Array:
                def of_state(x: Array) -> Array:
                    return instrument.log_prob(inputs, x, y, present)  # noqa: B023

                return jnp.where(jnp.any(present), jax.vmap(of_state)(states), 0.0)

            total = total.at[take].add(jax.vmap(one)(inputs, y, present))
            seen = seen.at[take].max(jnp.any(present, axis=1))
        if equation.sink:  # what left the states that are followed is dropped at the next datum
            total = total.at[:, -1].set(jnp.where(seen, -jnp.inf, 0.0))
        return total

    def log_likelihood(self, model: StateSpaceModel) -> Float[Array, ""]:
        self.check(model)
        equation = _equation(model)
        if model.cache is None or equation.sink:
            return self._forward(model).log_likelihood
        return forward_backward.log_likelihood(
            equation.start, model.cache, self.log_emission(model)
        )

    def _forward(self, model: StateSpaceModel) -> forward_backward.Forward:
        equation, log_emission = _equation(model), self.log_emission(model)
        if model.cache is not None:
            passed = forward_backward.forward(equation.start, model.cache, log_emission)
        else:
            passed = sparse.forward(equation.start, equation.edges, model.dt, log_emission)
        if not equation.sink:
            return passed
        held = jnp.max(passed.predicted[:, -1]) <= self.tolerance
        return jax.tree.map(lambda a: jnp.where(held, a, jnp.nan), passed)

    def filter(self, model: StateSpaceModel) -> ForwardResult:
        self.check(model)
        equation, passed = _equation(model), self._forward(model)
        mean, cov = _moments(equation, passed.filtered)
        predicted_mean, predicted_cov = _moments(equation, passed.predicted)
        return ForwardResult(
            times=model.times,
            log_likelihood=passed.log_likelihood,
            increments=passed.increments,
            mean=mean,
            cov=cov,
            predicted_mean=predicted_mean,
            predicted_cov=predicted_cov,
            cross=None,
            probabilities=passed.filtered,
            predicted_probabilities=passed.predicted,
            equation=equation,
            gaps=model.dt,
            transitions=model.cache,
            log_emission=self.log_emission(model),
        )


def _equation(model: StateSpaceModel) -> ChainEquation:
    assert isinstance(model.sde, ChainEquation)
    return model.sde


def _moments(equation: ChainEquation, probabilities: Array) -> tuple[Array, Array]:
    states = equation.state_of(jnp.arange(probabilities.shape[-1]))
    states = states.reshape(probabilities.shape[-1], -1).astype(probabilities.dtype)
    mean = probabilities @ states
    second = jnp.einsum("kn,ni,nj->kij", probabilities, states, states)
    return mean, second - mean[:, :, None] * mean[:, None, :]


class ForwardResult(FilterResult):
    """What the forward algorithm returns.

    Moments are those of the states' numbers (of counts under a network).

    Attributes:
        probabilities: of each state given the data up to each time, `(N, n)`.
        predicted_probabilities: before the datum of the same time.
        equation: the process and the law of its start.
        gaps: lengths of the steps, `(N - 1,)`.
        transitions: transition matrices, `(N - 1, n, n)`; None where none were formed.
        log_emission: log density of the data at each time given each state, `(N, n)`.

    Example:
        >>> import jax, jax.numpy as jnp, numpyro.distributions as dist, numpyro_sde as nsde
        >>> chain = nsde.MarkovJumpProcess(jnp.array([[0.0, 1.0], [3.0, 0.0]]), 2)
        >>> path = nsde.JumpPath(chain, [0.0, 0.5, 2.0], init="stationary")
        >>> result = nsde.filter_path(
        ...     path, lambda t, s: dist.Normal(s, 0.5), [0.1, 0.9, float("nan")],
        ...     method=nsde.filters.Forward(),
        ... )
        >>> stats = result.path_statistics()
        >>> bool(jnp.isclose(stats.dwell.sum(), 2.0)), result.sample(jax.random.key(0), 5).shape
        (True, (5, 3, 1))
    """

    probabilities: Any = None
    predicted_probabilities: Any = None
    equation: Any = None
    gaps: Any = None
    transitions: Any = None
    log_emission: Any = None

    def smoothed(self) -> Float[Array, "N n"]:
        """Probabilities of each state given all data."""
        if self.transitions is None:
            passed = forward_backward.Forward(
                self.log_likelihood,
                self.increments,
                self.probabilities,
                self.predicted_probabilities,
            )
            return sparse.smooth(passed, self.equation.edges, self.gaps, self.log_emission)
        return forward_backward.smooth(self.equation.start, self.transitions, self.log_emission)

    def smooth(self) -> tuple[Float[Array, "N d"], Float[Array, "N d d"]]:
        """Smoothed means and covariances of the states' numbers, given all observations."""
        return _moments(self.equation, self.smoothed())

    def sample(self, key: PRNGKeyArray, num_draws: int = 1) -> Float[Array, "draws N d"]:
        """Draw paths given all data: exact, forward filtering and backward sampling."""
        states = self.equation.state_of(self._numbers(key, num_draws)).astype(self.mean.dtype)
        return states.reshape(num_draws, self.probabilities.shape[0], -1)

    def path_statistics(self) -> bridges.PathStatistics:
        """Expected numbers of jumps and times in states, given all data."""
        chain = self.equation.chain
        return bridges.path_statistics(
            chain.generator,
            self.equation.start,
            self.gaps,
            self.log_emission,
            num_terms=chain.num_terms,
        )

    def draw_jumps(
        self, key: PRNGKeyArray, num_draws: int = 1, *, num_terms: int = 64
    ) -> bridges.JumpTimes:
        """Draw paths in continuous time given all data: the jump times and the states.

        Args:
            key: random key.
            num_draws: number of paths.
            num_terms: most jumps of the uniformised process between two grid times,
                `jumps.uniformisation.terms_for`; too few give NaN.

        Returns:
            Times `(draws, J)`, NaN after the last jump, and states `(draws, J + 1)`.
        """

        def one(key: PRNGKeyArray) -> bridges.JumpTimes:
            return self.draw_jumps_padded(key, num_terms=num_terms)

        return bridges.trim(jax.vmap(one)(jax.random.split(key, num_draws)))

    def draw_jumps_padded(self, key: PRNGKeyArray, *, num_terms: int) -> bridges.JumpTimes:
        """One path in continuous time, its padding not cut: for use inside a trace."""
        key_states, key_jumps = jax.random.split(key)
        states = self._numbers(key_states, 1)[0]
        chain, times = self.equation.chain, jnp.asarray(self.times)
        if self.transitions is not None:
            return bridges.draw_jumps(
                key_jumps, chain.generator, times, states, num_terms=num_terms
            )
        source, target, rates, *_ = self.equation.edges
        return bridges.draw_sparse_jumps(
            key_jumps,
            (jnp.asarray(source), jnp.asarray(target), rates),
            times,
            states,
            num_states=chain.num_states,
            num_terms=num_terms,
        )

    def _numbers(self, key: PRNGKeyArray, num_draws: int) -> Array:
        def one(key: PRNGKeyArray) -> Array:
            if self.transitions is None:
                return sparse.draw_states(key, self.probabilities, self.equation.edges, self.gaps)
            return forward_backward.draw_states(key, self.probabilities, self.transitions)

        return jax.vmap(one)(jax.random.split(key, num_draws))

    def backward_kernel(self) -> Any:
        """Not for discrete states: they have no Gaussian backward kernel."""
        raise TypeError("discrete states have no Gaussian backward kernel: use sample or smooth")
