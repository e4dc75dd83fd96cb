"""Gaussian filters of an SDE with hidden regimes: mixtures that are merged as they grow.

- `IMM`: the interacting multiple model filter, one Gaussian for each regime, mixed before each
  step (Blom and Bar-Shalom 1988, IEEE Transactions on Automatic Control 33).
- `GPB`: the generalised pseudo-Bayesian filters; of order 2, a step for each pair of regimes,
  merged by the later one (Kim 1994, Journal of Econometrics 60); of order 1, all merged into one.

Merging is smooth in all parameters, so the likelihood has a gradient; it is an approximation of the
likelihood of the model, which `Particle(proposal="bootstrap")` estimates without bias.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

from numpyro_sde.filters.extended import ExtendedKalman
from numpyro_sde.filters.kalman import Kalman
from numpyro_sde.linear.small import congruence, matvec
from numpyro_sde.schemes.switching import SwitchingSteps
from numpyro_sde.statespace.model import AbstractFilter, FilterResult, StateSpaceModel
from numpyro_sde.statespace.updates import choose_update, linearized_update, with_valid_inputs


class _MergingFilter(AbstractFilter):
    """What the filters of several regimes share; a subclass says how Gaussians are merged."""

    inner: AbstractFilter

    def __init__(self, inner: AbstractFilter | None = None) -> None:
        inner = ExtendedKalman() if inner is None else inner
        if not isinstance(inner, Kalman | ExtendedKalman):
            raise TypeError(
                f"inner must be Kalman() or ExtendedKalman(), got {inner!r}: it moves and updates "
                "one Gaussian within a regime"
            )
        self.inner = inner

    def check(self, model: StateSpaceModel) -> None:
        require_regimes(model, f"{type(self).__name__}()")
        if isinstance(self.inner, Kalman):
            for regime in range(model.sde.chain.num_states):
                self.inner.check(in_regime(model, regime))

    def _moves(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gaussian and regime of each move in a step, and whether the first step has it: `(K,)`."""
        raise NotImplementedError

    def _merge(self, weights: Array, P: Array, m: Array, C: Array) -> tuple[Array, Array, Array]:
        """Log weights of the next step's moves, and the Gaussians that they start from."""
        raise NotImplementedError

    def filter(self, model: StateSpaceModel) -> RegimeResult:
        self.check(model)
        model = with_valid_inputs(model)
        sde: Any = model.sde
        d = model.dim - 1
        inner = self.inner if isinstance(self.inner, ExtendedKalman) else ExtendedKalman()
        update = choose_update(
            linearized_update(inner.iterations), inner.emission, inner.newton_steps
        )

        def observe(mean: Array, cov: Array, data: Any) -> tuple[Array, Array, Array]:
            total = jnp.zeros((), mean.dtype)
            for instrument, seen in zip(model.instruments, data, strict=True):
                mean, cov, term = update(mean, cov, instrument, seen)
                total = total + term
            return mean, cov, total

        def move(regime: Array, mean: Array, cov: Array, now: Any) -> tuple[Array, Array]:
            t, dt, _ = now
            one = in_regime(model, regime)

            def with_aux(x: Array) -> tuple[Array, tuple[Array, Array]]:
                next_mean, noise = one.step_moments(t, dt, x)
                return next_mean, (next_mean, noise)

            F, (next_mean, noise) = jax.jacfwd(with_aux, has_aux=True)(mean)
            return next_mean, congruence(F, cov) + noise

        source, regimes, at_first = self._moves(sde.chain.num_states)
        in_regimes = jnp.asarray(np.eye(sde.chain.num_states)[:, regimes], model.init_mean.dtype)

        def step(carry: Any, inputs: Any) -> Any:
            log_weights, means, covs = carry
            now, data = inputs

            def one(regime: Array, mean: Array, cov: Array) -> Any:
                moved = move(regime, mean, cov, now)
                return (*moved, *observe(*moved, data))

            before_m, before_C, m, C, terms = jax.vmap(one)(
                jnp.asarray(regimes), means[source], covs[source]
            )
            joint = log_weights + terms
            increment = logsumexp(joint) - logsumexp(log_weights)
            predicted = _collapse(_shares(log_weights), before_m, before_C)
            weights = _shares(joint)
            filtered = _collapse(weights, m, C)
            regime = matvec(in_regimes, weights)
            return self._merge(weights, now[2], m, C), (filtered, predicted, regime, increment)

        data = model.observation_inputs()
        m0, P0 = model.init_mean[:d], model.init_cov[:d, :d]
        mean, cov, log_density = observe(m0, P0, jax.tree.map(lambda a: a[0], data))
        log_start = jnp.where(at_first, _safe_log(sde.start)[regimes], -jnp.inf)
        count = int(source.max()) + 1
        start = (
            log_start,
            jnp.broadcast_to(mean, (count, *mean.shape)),
            jnp.broadcast_to(cov, (count, *cov.shape)),
        )
        rest = jax.tree.map(lambda a: a[1:], data)
        _, (filtered, predicted, regime, increments) = lax.scan(
            step, start, (model.step_inputs(), rest)
        )
        increments = jnp.concatenate([log_density[None], increments])
        return RegimeResult(
            times=model.times,
            log_likelihood=jnp.sum(increments),
            increments=increments,
            mean=jnp.concatenate([mean[None], filtered[0]]),
            cov=jnp.concatenate([cov[None], filtered[1]]),
            predicted_mean=jnp.concatenate([m0[None], predicted[0]]),
            predicted_cov=jnp.concatenate([P0[None], predicted[1]]),
            cross=None,
            regimes=jnp.concatenate([sde.start[None], regime]),
        )


def require_regimes(model: StateSpaceModel, method: str) -> None:
    """Refuse a path without regimes, or one whose first state is not normal.

    Raises:
        ValueError: naming what takes the model.
    """
    if not isinstance(model.scheme, SwitchingSteps):
        otherwise = "without regimes use Kalman(), ExtendedKalman() or Particle()"
        raise ValueError(
            f"{method} is for the path of an nsde.SwitchingSDE, got one of scheme "
            f"{type(model.scheme).__name__}: {model.scheme.remedy(otherwise)}"
        )
    if not model.init_gaussian:
        raise ValueError(
            f"{method} needs a first state that is normal or fixed: use "
            "Particle(proposal='bootstrap')"
        )


def in_regime(model: StateSpaceModel, regime: Any) -> StateSpaceModel:
    """The model as it is while a regime lasts."""
    scheme: Any = model.scheme
    d = model.dim - 1
    return model._replace(
        sde=model.sde.in_regime(regime),
        scheme=scheme.base.linearizable(),
        scheme_chosen=True,
        cache=None,
        init_mean=model.init_mean[:d],
        init_cov=model.init_cov[:d, :d],
        scalar=scheme.state_shape == (),
        state_shape=None,
    )


def _shares(log_weights: Array) -> Array:
    return jnp.exp(log_weights - logsumexp(log_weights))


def _collapse(weights: Array, means: Array, covs: Array) -> tuple[Array, Array]:
    """Mean and covariance of a mixture of Gaussians."""
    mean = weights @ means
    centred = means - mean[None]
    spread = jnp.einsum("k,ki,kj->ij", weights, centred, centred)
    return mean, jnp.tensordot(weights, covs, 1) + spread


def _safe_log(p: Array) -> Array:
    return jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny))


class GPB(_MergingFilter):
    """Generalised pseudo-Bayesian filter of an SDE with hidden regimes.

    Args:
        order: 2 keeps a Gaussian for each present regime, and takes a step for each pair of present
            and next regime; 1 keeps a single Gaussian.
        inner: how one Gaussian moves and is updated: `Kalman()` (checked to be exact) or
            `ExtendedKalman()`.

    Raises:
        ValueError: another order. In use: a path without regimes.
        TypeError: another inner filter.

    Example:
        >>> import numpyro_sde as nsde
        >>> nsde.filters.GPB(2).order
        2
    """

    order: int = eqx.field(static=True)

    def __init__(self, order: int = 2, inner: AbstractFilter | None = None) -> None:
        super().__init__(inner)
        if order not in (1, 2):
            raise ValueError(f"order must be 1 or 2, got {order}")
        self.order = order

    def _moves(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self.order == 1:
            return np.zeros(n, int), np.arange(n), np.ones(n, bool)
        source, regimes = np.divmod(np.arange(n * n), n)
        return source, regimes, source == 0  # at first all Gaussians are one

    def _merge(self, weights: Array, P: Array, m: Array, C: Array) -> tuple[Array, Array, Array]:
        n = P.shape[0]
        if self.order == 1:
            mean, cov = _collapse(weights, m, C)
            return _safe_log(weights @ P), mean[None], cov[None]
        pairs = weights.reshape(n, n)  # by the regime before and the present one
        present = jnp.sum(pairs, axis=0)
        given = pairs / jnp.maximum(present, jnp.finfo(m.dtype).tiny)[None]
        m, C = m.reshape(n, n, *m.shape[1:]), C.reshape(n, n, *C.shape[1:])
        means, covs = jax.vmap(_collapse, (1, 1, 1))(given, m, C)
        return (_safe_log(present)[:, None] + _safe_log(P)).reshape(-1), means, covs


class IMM(_MergingFilter):
    """Interacting multiple model filter of an SDE with hidden regimes.

    One Gaussian for each regime; before a step those of all regimes are mixed by the probabilities
    of having come from each. As many Kalman steps as regimes: cheaper than `GPB(2)` by their
    number, a little less accurate.

    Args:
        inner: how one Gaussian moves and is updated: `Kalman()` (checked to be exact) or
            `ExtendedKalman()`.

    Raises:
        TypeError: another inner filter.
        ValueError: in use, a path without regimes.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist, numpyro_sde as nsde
        >>> chain = nsde.MarkovJumpProcess(jnp.array([[0.0, 0.6], [1.0, 0.0]]), 2)
        >>> sde = nsde.SwitchingSDE(lambda t, x, r: -x, lambda t, x, r: 0.2 + 0.8 * r, chain)
        >>> path = nsde.SDEPath(sde, [0.0, 0.5, 1.0], dist.Normal(0.0, 1.0))
        >>> result = nsde.filter_path(
        ...     path, lambda t, x: dist.Normal(x, 0.1), [0.1, 0.9, -1.2],
        ...     method=nsde.filters.IMM(),
        ... )
        >>> result.regimes.shape, bool(result.regimes[-1, 1] > 0.9)
        ((3, 2), True)
    """

    def _moves(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.arange(n), np.arange(n), np.ones(n, bool)

    def _merge(self, weights: Array, P: Array, m: Array, C: Array) -> tuple[Array, Array, Array]:
        following = weights @ P
        came_from = weights[:, None] * P / jnp.maximum(following, jnp.finfo(m.dtype).tiny)[None]
        means, covs = jax.vmap(_collapse, (1, None, None))(came_from, m, C)
        return _safe_log(following), means, covs


class RegimeResult(FilterResult):
    """What a filter of hidden regimes returns.

    Attributes:
        regimes: probabilities of the regime of the step that ends at each time, given the data up
            to there, `(N, n)`; at the first time, of the first step's before all data.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist, numpyro_sde as nsde
        >>> chain = nsde.MarkovJumpProcess(jnp.array([[0.0, 0.6], [1.0, 0.0]]), 2)
        >>> sde = nsde.SwitchingSDE(lambda t, x, r: -x, lambda t, x, r: 0.2 + 0.8 * r, chain)
        >>> path = nsde.SDEPath(sde, [0.0, 0.5], dist.Normal(0.0, 1.0))
        >>> nsde.filter_path(
        ...     path, lambda t, x: dist.Normal(x, 0.1), [0.1, 0.9], method=nsde.filters.GPB(2),
        ... ).regimes.shape
        (2, 2)
    """

    regimes: Float[Array, "N n"] | None = None

    def backward_kernel(self) -> Any:
        """Not for mixtures of regimes."""
        raise TypeError(
            "IMM() and GPB() give filtered moments and regimes; draws of the path and its regimes "
            "given all data come from filters.RaoBlackwell(), or for a drift that is not linear "
            "from filters.Particle(proposal='bootstrap')"
        )
